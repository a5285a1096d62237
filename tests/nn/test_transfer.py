"""Adopting a pretrained encoder: what is copied, what is resized and said, and what is refused, leaf by leaf."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from maskae.errors import UserError
from maskae.nn.positions import sincos_2d
from maskae.nn.transfer import adopt_encoder
from maskae.nn.vit import ViTEncoder


def encoder(key: int, *, grid: tuple[int, int] = (2, 2), trainable: bool = True, final_norm: bool = True, width: int = 8) -> dict[str, Any]:
    module = ViTEncoder(2, width, 1, 2, grid, trainable_position=trainable, final_norm=final_norm)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 2 * grid[0], 2 * grid[1], 1)))["params"]
    random = np.random.default_rng(key)
    return jax.tree.map(lambda leaf: random.normal(size=leaf.shape).astype(np.float32), shapes)


def test_equal_encoders_are_copied_without_a_word() -> None:
    own, given = encoder(0), encoder(1)
    adopted, notes = adopt_encoder(own, given, (2, 2))
    chex.assert_trees_all_equal(adopted, given)
    assert notes == []


def test_the_fixed_table_becomes_the_position_parameter() -> None:
    adopted, notes = adopt_encoder(encoder(0), encoder(1, trainable=False), (2, 2))
    np.testing.assert_array_equal(adopted["position"][0], sincos_2d(8, (2, 2)))
    assert notes == []


def test_another_resolution_resizes_the_pretraining_table_and_says_so() -> None:
    """The table of the pre-training grid is resized, which is not the fixed table of the new grid."""
    given = encoder(1, grid=(3, 3), trainable=False)
    adopted, notes = adopt_encoder(encoder(0, grid=(4, 2)), given, (4, 2), (3, 3))
    assert notes == ["position table resized from 3 x 3 to 4 x 2 patches"]
    assert adopted["position"].shape == (1, 9, 8)
    np.testing.assert_array_equal(adopted["position"][0, 0], 0.0)
    assert np.abs(adopted["position"][0] - sincos_2d(8, (4, 2))).max() > 0.1
    learned, notes = adopt_encoder(encoder(0, grid=(4, 2)), {**given, "position": sincos_2d(8, (3, 3))[None]}, (4, 2))
    np.testing.assert_array_equal(learned["position"], adopted["position"])
    assert notes == ["position table resized from 3 x 3 to 4 x 2 patches"]


def test_the_table_of_the_papers_fine_tuning(shared: Path) -> None:
    weights = load_file(shared / "goldens" / "mae" / "a" / "weights.safetensors")
    given = encoder(1, grid=(8, 8), width=48) | {"position": weights["pos_embed"]}
    adopted, _ = adopt_encoder(encoder(0, grid=(10, 10), width=48), given, (10, 10))
    np.testing.assert_allclose(adopted["position"], weights["finetune.pos_embed"], atol=2e-6)


def test_norms_come_and_go_with_a_note() -> None:
    own, given = encoder(0), encoder(1, final_norm=False)
    adopted, notes = adopt_encoder(own, given, (2, 2))
    chex.assert_trees_all_equal(adopted["norm"], own["norm"])
    assert notes[0] == "norm/bias is not in the pretrained encoder and stays as it is"
    _, notes = adopt_encoder(given, own, (2, 2))
    assert notes == ["norm/bias of the pretrained encoder is not used", "norm/scale of the pretrained encoder is not used"]


def test_every_differing_leaf_is_listed() -> None:
    own, given = encoder(0), encoder(1)
    given["patch_embed"]["kernel"] = np.zeros((16, 8), np.float32)
    del given["block_0"]["mlp"]["fc1"]["bias"]
    with pytest.raises(UserError) as caught:
        adopt_encoder(own, given, (2, 2))
    assert "2 leaves differ" in str(caught.value)
    assert "patch_embed/kernel: (16, 8) there, (4, 8) here" in str(caught.value)
    assert "block_0/mlp/fc1/bias: missing, expected (32,)" in str(caught.value)
    with pytest.raises(UserError, match="16 leaves differ"):
        adopt_encoder(own, {}, (2, 2))


def test_a_table_that_is_not_square_needs_its_grid() -> None:
    given = encoder(1, grid=(3, 2))
    with pytest.raises(UserError, match="6 patches is not square"):
        adopt_encoder(encoder(0), given, (2, 2))
    assert adopt_encoder(encoder(0), given, (2, 2), (3, 2))[0]["position"].shape == (1, 5, 8)
    assert adopt_encoder(encoder(0, grid=(3, 2)), given, (3, 2))[1] == []
