"""One stored layout serves unrolled and scanned stacks, and no remat policy changes a value."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskae.errors import UserError
from maskae.nn.stack import REMAT_POLICIES, drop_path_rates, rematerialise
from maskae.nn.vit import ViTEncoder

IMAGES = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
DRAWS = jax.random.uniform(jax.random.key(2), (2, 2, 2))
# Not a constant: the mean square of a normalised output hardly depends on the parameters.
TARGET = jax.random.normal(jax.random.key(3), (2, 5, 16))


def encoder(**options) -> ViTEncoder:
    return ViTEncoder(4, 16, 2, 2, (2, 2), drop_path=0.4, **options)


PARAMS = encoder().init(jax.random.key(0), IMAGES)["params"]


def value_and_gradient(model: ViTEncoder) -> tuple[jax.Array, dict]:
    def loss(params: dict) -> jax.Array:
        return jnp.square(model.apply({"params": params}, IMAGES, draws=DRAWS).astype(jnp.float32) - TARGET).mean()

    return jax.jit(jax.value_and_grad(loss))(PARAMS)


@pytest.fixture(scope="module")
def reference() -> tuple[jax.Array, dict]:
    return value_and_gradient(encoder())


@pytest.mark.parametrize(("scan", "remat"), [(False, "dots"), (False, "offload"), *((True, remat) for remat in REMAT_POLICIES)])
def test_scan_and_remat_change_no_value(scan: bool, remat: str, reference: tuple[jax.Array, dict]) -> None:
    loss, grads = value_and_gradient(encoder(scan=scan, remat=remat))
    np.testing.assert_allclose(loss, reference[0], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), grads, reference[1])


def test_scanned_and_unrolled_models_have_the_same_parameters() -> None:
    scanned = encoder(scan=True).init(jax.random.key(0), IMAGES)["params"]
    jax.tree.map(np.testing.assert_array_equal, scanned, PARAMS)
    assert {name for name in PARAMS if name.startswith("block_")} == {"block_0", "block_1"}


@pytest.mark.parametrize("scan", [False, True])
def test_collected_outputs_are_those_of_each_block(scan: bool) -> None:
    model = encoder(scan=scan, final_norm=False)
    params = {name: value for name, value in PARAMS.items() if name != "norm"}
    tokens = model.apply({"params": params}, IMAGES, method="embed")
    encoded = model.apply({"params": params}, tokens, collect=True, method="encode")
    assert len(encoded.blocks) == 2
    np.testing.assert_array_equal(encoded.blocks[1], encoded.tokens)
    shallow = ViTEncoder(4, 16, 1, 2, (2, 2), final_norm=False)
    first = shallow.apply({"params": {k: v for k, v in params.items() if k != "block_1"}}, IMAGES)
    np.testing.assert_allclose(encoded.blocks[0], first, atol=1e-6)


@pytest.mark.parametrize("scan", [False, True])
def test_bfloat16_is_close_and_its_gradients_are_float32(scan: bool, reference: tuple[jax.Array, dict]) -> None:
    loss, grads = value_and_gradient(encoder(scan=scan, dtype=jnp.bfloat16))
    np.testing.assert_allclose(loss, reference[0], rtol=2e-2)
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
    norm = jnp.linalg.norm(reference[1]["block_1"]["attention"]["qkv"]["kernel"])
    difference = jnp.linalg.norm(grads["block_1"]["attention"]["qkv"]["kernel"] - reference[1]["block_1"]["attention"]["qkv"]["kernel"])
    assert float(difference / norm) < 0.05


def test_full_remat_keeps_only_block_inputs() -> None:
    def residuals(remat: str) -> int:
        model = encoder(remat=remat)
        _, pullback = jax.vjp(lambda params: model.apply({"params": params}, IMAGES).sum(), PARAMS)
        return sum(leaf.size for leaf in jax.tree.leaves(pullback) if hasattr(leaf, "size"))

    assert residuals("full") < residuals("dots") < residuals("none")


def test_drop_path_rates_rise_linearly_from_zero() -> None:
    np.testing.assert_allclose(drop_path_rates(0.3, 4), [0, 0.1, 0.2, 0.3], rtol=1e-6)


def test_unknown_policy_is_named() -> None:
    with pytest.raises(UserError, match="unknown remat policy 'dot' \\(did you mean 'dots'"):
        rematerialise(lambda: None, "dot")
