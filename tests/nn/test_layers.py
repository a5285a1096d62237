"""The block's parts against plain formulas, and the initialisation's bounds."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.special import erf

from maskae.errors import UserError
from maskae.nn.layers import (
    Attention,
    AttentionContext,
    Block,
    CrossAttention,
    DropPath,
    LayerNorm,
    OutProjection,
    PatchEmbed,
    QkvProjection,
    check_cudnn,
    drop_path,
    gelu,
)

KEY = jax.random.key(0)


def test_gelu_is_the_exact_one() -> None:
    x = jnp.linspace(-4, 4, 41)
    np.testing.assert_allclose(gelu(x), 0.5 * x * (1 + erf(x / math.sqrt(2))), atol=1e-6)
    assert float(jnp.abs(gelu(x) - jax.nn.gelu(x, approximate=True)).max()) > 1e-4


def test_layer_norm_uses_its_epsilon_and_computes_in_float32() -> None:
    x = 1e-3 * jax.random.normal(KEY, (3, 16)) + 100.0
    variables = LayerNorm(1e-6).init(KEY, x)
    wide = np.asarray(x, np.float64)
    centred = wide - wide.mean(-1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(LayerNorm(1e-6).apply(variables, x), expected, rtol=2e-2, atol=1e-2)
    assert float(jnp.abs(LayerNorm(1e-5).apply(variables, x)).max()) < 0.5 * float(jnp.abs(LayerNorm(1e-6).apply(variables, x)).max())
    assert LayerNorm(1e-6, jnp.bfloat16).apply(variables, x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_fused_qkv_has_the_bound_of_one_matrix() -> None:
    kernel = QkvProjection(4).init(KEY, jnp.zeros((1, 2, 64)))["params"]["kernel"]
    assert kernel.shape == (64, 3, 4, 16)
    bound = math.sqrt(6 / (4 * 64))
    assert 0.99 * bound < float(jnp.abs(kernel).max()) <= bound


def test_out_projection_has_the_bound_of_its_matrix() -> None:
    kernel = OutProjection().init(KEY, jnp.zeros((1, 2, 4, 16)))["params"]["kernel"]
    bound = math.sqrt(6 / 128)
    assert 0.99 * bound < float(jnp.abs(kernel).max()) <= bound


def test_patch_embedding_is_initialised_as_a_linear_map_with_the_convolutions_bias() -> None:
    params = PatchEmbed(16, 128).init(KEY, jnp.zeros((1, 16, 16, 3)))["params"]
    kernel_bound, bias_bound = math.sqrt(6 / (768 + 128)), 1 / math.sqrt(768)
    assert 0.99 * kernel_bound < float(jnp.abs(params["kernel"]).max()) <= kernel_bound
    assert 0.95 * bias_bound < float(jnp.abs(params["bias"]).max()) <= bias_bound


def plain_attention(params: dict, x: np.ndarray, bias: np.ndarray | float = 0.0) -> np.ndarray:
    qkv = np.einsum("bnd,dchk->cbhnk", x, params["qkv"]["kernel"]) + np.asarray(params["qkv"]["bias"])[:, None, :, None]
    scores = np.einsum("bhnk,bhmk->bhnm", qkv[0], qkv[1]) / math.sqrt(qkv.shape[-1]) + bias
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bhnk,hkd->bnd", weights @ qkv[2], params["out"]["kernel"]) + np.asarray(params["out"]["bias"])


@pytest.mark.parametrize("with_bias", [False, True])
def test_attention_is_softmax_of_scaled_products(with_bias: bool) -> None:
    x = jax.random.normal(KEY, (2, 5, 8))
    bias = np.random.default_rng(0).normal(size=(2, 2, 5, 5)).astype(np.float32) if with_bias else None
    params = Attention(2).init(KEY, x)["params"]
    params["qkv"]["bias"] = jax.random.normal(KEY, (3, 2, 4))
    expected = plain_attention(params, np.asarray(x), 0.0 if bias is None else bias)
    np.testing.assert_allclose(Attention(2).apply({"params": params}, x, bias), expected, atol=2e-6)


def test_key_bias_changes_nothing_and_can_be_left_out() -> None:
    x = jax.random.normal(KEY, (2, 5, 8))
    params = Attention(2).init(KEY, x)["params"]
    bias = jax.random.normal(KEY, (3, 2, 4))
    full = Attention(2).apply({"params": params | {"qkv": params["qkv"] | {"bias": bias}}}, x)
    without_key = Attention(2, "query_value").apply({"params": params | {"qkv": params["qkv"] | {"bias": bias[jnp.asarray([0, 2])]}}}, x)
    np.testing.assert_allclose(full, without_key, atol=2e-6)
    assert "bias" not in Attention(2, "none").init(KEY, x)["params"]["qkv"]


def test_block_is_pre_norm_with_two_residuals() -> None:
    x = jax.random.normal(KEY, (2, 5, 8))
    block = Block(2)
    params = block.init(KEY, x)["params"]
    attention = Attention(2).apply({"params": params["attention"]}, LayerNorm().apply({"params": params["norm1"]}, x))
    middle = x + attention
    hidden = LayerNorm().apply({"params": params["norm2"]}, middle) @ params["mlp"]["fc1"]["kernel"]
    expected = middle + gelu(hidden) @ params["mlp"]["fc2"]["kernel"]
    np.testing.assert_allclose(block.apply({"params": params}, x), expected, atol=2e-6)


def test_layer_scale_multiplies_each_branch() -> None:
    x = jax.random.normal(KEY, (2, 5, 8))
    params = Block(2, layer_scale=0.0).init(KEY, x)["params"]
    assert params["layer_scale1"].shape == params["layer_scale2"].shape == (8,)
    np.testing.assert_array_equal(Block(2, layer_scale=0.0).apply({"params": params}, x), x)


def test_drop_path_keeps_where_the_draw_reaches_the_rate_and_rescales() -> None:
    branch = jnp.ones((4, 2, 3))
    kept = drop_path(branch, 0.25, jnp.asarray([0.0, 0.2, 0.25, 0.9]))
    np.testing.assert_allclose(kept[:, 0, 0], [0, 0, 4 / 3, 4 / 3], rtol=1e-6)
    np.testing.assert_array_equal(drop_path(branch, 0.0, jnp.zeros(4)), branch)


def test_block_drops_its_two_branches_separately() -> None:
    x = jax.random.normal(KEY, (2, 5, 8))
    block = Block(2)
    params = block.init(KEY, x)["params"]
    both_dropped = DropPath(jnp.float32(0.5), jnp.zeros((2, 2)))
    np.testing.assert_array_equal(block.apply({"params": params}, x, None, both_dropped), x)
    mlp_dropped = DropPath(jnp.float32(0.5), jnp.asarray([[0.9, 0.9], [0.0, 0.0]]))
    attention = Attention(2).apply({"params": params["attention"]}, LayerNorm().apply({"params": params["norm1"]}, x))
    np.testing.assert_allclose(block.apply({"params": params}, x, None, mlp_dropped), x + 2 * attention, atol=2e-6)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Attention(3), "3 heads do not divide a width of 8"),
        (Attention(2, "al"), "unknown qkv bias 'al' \\(did you mean 'all'"),
        (Attention(2, implementation="cudn"), "unknown attention 'cudn' \\(did you mean 'cudnn'"),
        (Attention(2, implementation="cudnn", dtype=jnp.bfloat16), "needs an NVIDIA GPU, and this process runs on cpu"),
    ],
)
def test_bad_arguments_are_named(module: Attention, message: str) -> None:
    with pytest.raises(UserError, match=message):
        module.init(KEY, jnp.zeros((1, 2, 8)))


def test_cudnn_attention_says_that_it_needs_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(UserError, match="computes in 16 bits, and dtype is float32"):
        check_cudnn(jnp.float32)
    check_cudnn(jnp.bfloat16)


def test_context_reaches_the_scores_of_a_block() -> None:
    x = jax.random.normal(KEY, (2, 5, 8))
    positions, slopes = jax.random.normal(KEY, (2, 5, 2)), jnp.asarray([0.5, 0.25])
    block = Block(2)
    params = block.init(KEY, x)
    distance = jnp.linalg.norm(positions[:, :, None] - positions[:, None], axis=-1)[:, None]
    by_bias = block.apply(params, x, -slopes[:, None, None] * distance)
    by_context = block.apply(params, x, context=AttentionContext(positions=positions, slopes=slopes))
    np.testing.assert_allclose(by_context, by_bias, atol=2e-6)
    np.testing.assert_allclose(Block(2, attention="pallas_tpu").apply(params, x), block.apply(params, x), atol=2e-6)
    capped = Block(2, soft_cap=0.1).apply(params, x)
    assert jnp.abs(capped - block.apply(params, x)).max() > 1e-3


def test_masked_keys_change_nothing_and_segments_are_apart() -> None:
    x = jax.random.normal(KEY, (2, 5, 8))
    attention = Attention(2)
    params = attention.init(KEY, x)
    alone = attention.apply(params, x[:, :3])
    masked = attention.apply(params, x, context=AttentionContext(key_mask=jnp.arange(5)[None] < jnp.full((2, 1), 3)))
    np.testing.assert_allclose(masked[:, :3], alone, atol=1e-6)
    packed = attention.apply(params, x, context=AttentionContext(segments=jnp.tile(jnp.asarray([0, 0, 0, 1, 1]), (2, 1))))
    np.testing.assert_allclose(packed, jnp.concatenate([alone, attention.apply(params, x[:, 3:])], axis=1), atol=1e-6)


def test_cross_attention_looks_at_other_tokens() -> None:
    x, seen = jax.random.normal(KEY, (2, 3, 8)), jax.random.normal(KEY, (2, 5, 6))
    layer = CrossAttention(2, qkv_bias=False)
    params = layer.init(KEY, x, seen)
    shapes = jax.tree.map(jnp.shape, params["params"])
    assert shapes["key"] == {"kernel": (6, 2, 4)} and shapes["out"] == {"kernel": (2, 4, 8), "bias": (8,)}
    maps = {name: np.asarray(part["kernel"]).reshape(-1, 8) for name, part in params["params"].items()}
    query, key, value = (np.asarray(tokens) @ maps[name] for name, tokens in (("query", x), ("key", seen), ("value", seen)))
    weights = [np.exp(query[..., part] @ key[..., part].swapaxes(1, 2) / 2) for part in (slice(4), slice(4, 8))]
    heads = [each / each.sum(-1, keepdims=True) @ value[..., 4 * i : 4 * i + 4] for i, each in enumerate(weights)]
    np.testing.assert_allclose(layer.apply(params, x, seen), np.concatenate(heads, -1) @ maps["out"], atol=2e-6)
    one_seen = layer.apply(params, x, seen, context=AttentionContext(key_mask=jnp.tile(jnp.arange(5) < 1, (2, 1))))
    np.testing.assert_allclose(one_seen, layer.apply(params, x, seen[:, :1]), atol=2e-6)


def test_a_given_bias_is_not_for_kernels() -> None:
    with pytest.raises(UserError, match="attention_bias goes with attention 'xla'"):
        Attention(2, implementation="pallas_tpu").init(KEY, jnp.zeros((1, 2, 8)), jnp.zeros((2, 2)))
