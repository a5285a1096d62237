"""Weights go out and come back under every layout; what does not fit is said leaf by leaf."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from maskae.errors import UserError
from maskae.interop.layout import Geometry
from maskae.interop.vit import LAYOUTS
from maskae.interop.weights import export_weights, load_weights, read_tensors
from maskae.nn.positions import resize_positions, sincos_2d
from maskae.paths import flatten_paths
from maskae.systems.mae import Mae
from maskae.systems.mae_finetune import FineTune

SMALL: dict[str, Any] = {"image_size": 16, "patch_size": 4, "width": 16, "depth": 2, "heads": 2}
MAE = Mae(**SMALL, decoder_width=8, decoder_depth=1, decoder_heads=2)
GEOMETRY = Geometry(4, (4, 4))
PARAMS = jax.eval_shape(lambda: MAE.init(jax.random.key(0), {}).params)


def randomised(tree: Any, seed: int = 0) -> Any:
    generator = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: generator.normal(size=leaf.shape).astype(np.float32), tree)


def zeros(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), tree)


def assert_equal(left: Any, right: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, left, right)


@pytest.mark.parametrize("layout", ["paper", "huggingface", "maskae"])
@pytest.mark.parametrize("named", [True, False])
def test_pretraining_weights_round_trip(layout: str, named: bool, tmp_path: Path) -> None:
    params = randomised(PARAMS)
    assert export_weights(params, tmp_path / "w.safetensors", GEOMETRY, layout) == []
    loaded, report = load_weights(tmp_path / "w.safetensors", zeros(PARAMS), GEOMETRY, layout if named else None)
    assert_equal(loaded, params)
    assert report.layout == layout
    assert not report.missing + report.unexpected + report.mismatched + report.notes


def test_timm_takes_the_encoder_and_says_what_it_left_out(tmp_path: Path) -> None:
    params = randomised(PARAMS)
    left_out = export_weights(params, tmp_path / "w.safetensors", GEOMETRY, "timm")
    assert left_out == [path for path in flatten_paths(params) if path.startswith("decoder/")]
    loaded, report = load_weights(tmp_path / "w.safetensors", zeros(PARAMS), GEOMETRY)
    assert_equal(loaded["encoder"], params["encoder"])
    assert report.missing == left_out
    assert not report.unexpected


def test_foreign_shapes_and_fixed_tables(tmp_path: Path) -> None:
    params = randomised(PARAMS)
    export_weights(params, tmp_path / "paper.safetensors", GEOMETRY, "paper")
    export_weights(params, tmp_path / "hf.safetensors", GEOMETRY, "huggingface", {"commit": "abc"})
    paper, hf = load_file(tmp_path / "paper.safetensors"), load_file(tmp_path / "hf.safetensors")
    assert paper["patch_embed.proj.weight"].shape == (16, 3, 4, 4)
    kernel = params["encoder"]["patch_embed"]["kernel"].reshape(4, 4, 3, 16)
    np.testing.assert_array_equal(paper["patch_embed.proj.weight"][5, 2, 1, 3], kernel[1, 3, 2, 5])
    qkv = params["encoder"]["block_1"]["attention"]["qkv"]["kernel"]
    np.testing.assert_array_equal(paper["blocks.1.attn.qkv.weight"][16 + 8 + 3], qkv[:, 1, 1, 3])
    np.testing.assert_array_equal(hf["vit.encoder.layer.1.attention.attention.key.weight"], paper["blocks.1.attn.qkv.weight"][16:32])
    np.testing.assert_array_equal(hf["vit.encoder.layer.1.attention.attention.value.bias"], paper["blocks.1.attn.qkv.bias"][32:])
    np.testing.assert_array_equal(paper["pos_embed"][0], sincos_2d(16, (4, 4)))
    np.testing.assert_array_equal(paper["decoder_pos_embed"][0], sincos_2d(8, (4, 4)))
    metadata = read_tensors(tmp_path / "hf.safetensors")[1]
    assert metadata == {"layout": "huggingface", "patch_size": "4", "grid": "4x4", "commit": "abc"}


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_wrappers_prefixes_are_ignored(prefix: str, tmp_path: Path) -> None:
    params = randomised(PARAMS)
    export_weights(params, tmp_path / "w.safetensors", GEOMETRY, "paper")
    save_file({prefix + name: value for name, value in load_file(tmp_path / "w.safetensors").items()}, tmp_path / "p.safetensors")
    assert_equal(load_weights(tmp_path / "p.safetensors", zeros(PARAMS), GEOMETRY)[0], params)


def test_huggingface_base_model_without_its_prefix(tmp_path: Path) -> None:
    params = randomised(PARAMS)
    export_weights({"encoder": params["encoder"]}, tmp_path / "w.safetensors", GEOMETRY, "huggingface")
    bare = {name.removeprefix("vit."): value for name, value in load_file(tmp_path / "w.safetensors").items()}
    save_file(bare, tmp_path / "b.safetensors")
    loaded, report = load_weights(tmp_path / "b.safetensors", zeros(PARAMS), GEOMETRY)
    assert report.layout == "huggingface"
    assert_equal(loaded["encoder"], params["encoder"])


def test_pretraining_weights_into_a_classifier_of_another_resolution(tmp_path: Path) -> None:
    params = randomised(PARAMS)
    export_weights(params, tmp_path / "w.safetensors", GEOMETRY, "paper")
    tuned = FineTune(**(SMALL | {"image_size": (24, 16)}), num_classes=3)
    template = tuned.init(jax.random.key(0), {}).params
    loaded, report = load_weights(tmp_path / "w.safetensors", template, Geometry(4, (6, 4)))
    expected = resize_positions(jnp.asarray(sincos_2d(16, (4, 4)))[None], (4, 4), (6, 4))
    np.testing.assert_array_equal(loaded["encoder"]["position"], expected)
    assert "position table resized from 4 x 4 to 6 x 4 patches" in report.notes
    assert report.missing == ["fc_norm/bias", "fc_norm/scale", "head/bias", "head/kernel"]
    assert "norm.weight" in report.unexpected
    assert_equal(loaded["encoder"]["block_1"], params["encoder"]["block_1"])
    assert_equal(loaded["head"], template["head"])


def test_an_oblong_table_comes_back_by_the_grid_in_the_metadata(tmp_path: Path) -> None:
    tuned = FineTune(**(SMALL | {"image_size": (32, 8)}), num_classes=3)
    params = randomised(tuned.init(jax.random.key(0), {}).params)
    export_weights(params, tmp_path / "w.safetensors", Geometry(4, (8, 2)), "timm")
    square = FineTune(**SMALL, num_classes=3).init(jax.random.key(0), {}).params
    loaded, _ = load_weights(tmp_path / "w.safetensors", square, GEOMETRY)
    expected = resize_positions(jnp.asarray(params["encoder"]["position"]), (8, 2), (4, 4))
    np.testing.assert_array_equal(loaded["encoder"]["position"], expected)


def test_fine_tuned_weights_into_a_pretraining_model(tmp_path: Path) -> None:
    tuned = randomised(FineTune(**SMALL, num_classes=3).init(jax.random.key(0), {}).params)
    export_weights(tuned, tmp_path / "w.safetensors", GEOMETRY, "timm")
    loaded, report = load_weights(tmp_path / "w.safetensors", zeros(PARAMS), GEOMETRY)
    assert_equal(loaded["encoder"]["block_0"], tuned["encoder"]["block_0"])
    assert "encoder/norm/scale" in report.missing
    assert set(report.unexpected) == {"head.weight", "head.bias", "fc_norm.weight", "fc_norm.bias"}
    assert "pos_embed is not the fixed sine-cosine table" in report.notes[0]


def test_other_patch_size_and_width_are_listed_leaf_by_leaf(tmp_path: Path) -> None:
    export_weights(randomised(PARAMS), tmp_path / "w.safetensors", GEOMETRY, "paper")
    other = Mae(**(SMALL | {"patch_size": 8}), decoder_width=8, decoder_depth=1, decoder_heads=2, keep=1)
    template = zeros(jax.eval_shape(other.init, jax.random.key(0), {}).params)
    loaded, report = load_weights(tmp_path / "w.safetensors", template, Geometry(8, (2, 2)))
    assert "the file has patches of 4 x 4 pixels, the model of 8" in report.notes
    assert report.mismatched == [
        "decoder_pred.bias: (48,) in the file, (192,) in the model (decoder/head/bias)",
        "decoder_pred.weight: (48, 8) in the file, (192, 8) in the model (decoder/head/kernel)",
        "patch_embed.proj.weight: (16, 3, 4, 4) in the file, (16, 3, 8, 8) in the model (encoder/patch_embed/kernel)",
    ]
    assert not loaded["encoder"]["patch_embed"]["kernel"].any()
    assert loaded["encoder"]["block_0"]["mlp"]["fc1"]["kernel"].any()
    assert any("not loaded, other shape: decoder_pred.bias" in line for line in report.lines())


def test_nothing_that_fits_is_an_error(tmp_path: Path) -> None:
    save_file({"conv1.weight": np.zeros((3, 3), np.float32)}, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="nothing in .* fits the model in any known layout .* conv1.weight"):
        load_weights(tmp_path / "w.safetensors", zeros(PARAMS), GEOMETRY)


def test_half_precision_files_load_as_float32(tmp_path: Path) -> None:
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), randomised(PARAMS))
    export_weights(half, tmp_path / "w.safetensors", GEOMETRY, "paper")
    loaded, _ = load_weights(tmp_path / "w.safetensors", zeros(PARAMS), GEOMETRY)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {np.dtype("float32")}
    assert_equal(loaded["encoder"]["norm"], jax.tree.map(lambda leaf: leaf.astype(np.float32), half["encoder"]["norm"]))


def test_files_are_not_overwritten_or_guessed(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"precious")
    with pytest.raises(UserError, match="exists; weights are not overwritten"):
        export_weights(randomised(PARAMS), path, GEOMETRY)
    assert path.read_bytes() == b"precious"
    with pytest.raises(UserError, match="not a readable safetensors file"):
        read_tensors(path)
    with pytest.raises(UserError, match="no weights file"):
        read_tensors(tmp_path / "absent.safetensors")
    with pytest.raises(UserError, match="python -m maskae.interop.torch_file"):
        read_tensors(tmp_path / "mae.pth")
    with pytest.raises(UserError, match="no folder"):
        export_weights(randomised(PARAMS), tmp_path / "absent" / "w.safetensors", GEOMETRY)
    with pytest.raises(UserError, match="unknown layout 'tim' \\(did you mean 'timm'"):
        export_weights(randomised(PARAMS), tmp_path / "new.safetensors", GEOMETRY, "tim")


def test_every_parameter_has_one_name_in_the_papers_layout() -> None:
    names = [name for path in flatten_paths(PARAMS) for name in LAYOUTS["paper"].names(path)[0]]
    assert len(set(names)) == len(names) == len(flatten_paths(PARAMS))
