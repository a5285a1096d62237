"""HiCMAE's parts (Sun et al. 2024, arXiv 2401.05698): blocks that look across first, fusion, a decoder with skips, a head."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from maskae.nn.layers import Attention, Block, CrossAttention, Dtype, LayerNorm, Mlp, xavier
from maskae.nn.sharding import constrain, gather_parameters
from maskae.nn.stack import rematerialise

LAYER_LOGIT = 0.1


def xavier_of_two(key: jax.Array, shape: tuple[int, int], dtype: Any = jnp.float32) -> jax.Array:
    """One half of a Xavier-uniform matrix with twice as many outputs: keys and values are one map in the released code."""
    bound = math.sqrt(6 / (shape[0] + 2 * shape[1]))
    return jax.random.uniform(key, shape, dtype, -bound, bound)


class CrossSelfBlock(nn.Module):
    """x + cross(cross_norm1(x), cross_norm2(context)), then x + attention(norm1(x)), then x + mlp(norm2(x)): CROSS comes first.

    `qkv_bias` False takes the biases of queries and values away; `layer_scale` is the initial value of `layer_scale0` to `layer_scale2` [D]
    on the three branches, None leaves them out.
    """

    heads: int
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    layer_scale: float | None = None
    epsilon: float = 1e-6
    attention: str = "xla"
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
        """[B, n, D] that look at [B, m, D] -> [B, n, D]."""
        x = constrain(x, "batch")
        look = CrossAttention(
            self.heads,
            self.qkv_bias,
            implementation=self.attention,
            dtype=self.dtype,
            key_bias=False,
            key_value_init=xavier_of_two,
            name="cross_attention",
        )
        own = LayerNorm(self.epsilon, self.dtype, name="cross_norm1")(x)
        x = x + self._scaled(look(own, LayerNorm(self.epsilon, self.dtype, name="cross_norm2")(context)), 0)
        branch = LayerNorm(self.epsilon, self.dtype, name="norm1")(x)
        x = x + self._scaled(Attention(self.heads, bias_of(self.qkv_bias), self.attention, dtype=self.dtype, name="attention")(branch), 1)
        branch = LayerNorm(self.epsilon, self.dtype, name="norm2")(x)
        return x + self._scaled(Mlp(int(x.shape[-1] * self.mlp_ratio), dtype=self.dtype, name="mlp")(branch), 2)

    def _scaled(self, branch: jax.Array, which: int) -> jax.Array:
        if self.layer_scale is None:
            return branch
        scale = self.param(f"layer_scale{which}", nn.initializers.constant(self.layer_scale), (branch.shape[-1],))
        return branch * scale.astype(branch.dtype)


def bias_of(qkv_bias: bool) -> str:
    """Which of queries, keys and values have a bias, one of `maskae.nn.layers.QKV_BIASES`; keys never have one."""
    return "query_value" if qkv_bias else "none"


def run_block(owner: nn.Module, block: nn.Module, remat: str, *inputs: jax.Array) -> jax.Array:
    """`owner`'s submodule `block` on [B, n, D] inputs under a rematerialisation policy of `maskae.nn.stack`."""
    apply: Any = block
    if owner.is_initializing():
        return apply(*inputs)
    plain: Any = block.clone(parent=None, name=None)

    def step(params: dict[str, Any], *inputs: jax.Array) -> jax.Array:
        return plain.apply({"params": gather_parameters(params)}, *inputs)

    with jax.named_scope(str(block.name)):
        return rematerialise(step, remat)(owner.variables["params"][str(block.name)], *inputs)


class Fused(NamedTuple):
    """Both streams after the final norms, `video` [B, n, D] and `audio` [B, m, D]; `blocks`: (video, audio) after each layer."""

    video: jax.Array
    audio: jax.Array
    blocks: list[tuple[jax.Array, jax.Array]]


class FusionEncoder(nn.Module):
    """Layer by layer, each stream looks at the other's OLD value: (v, a) <- (block_v(v, a), block_a(a, v)); then a norm for each."""

    depth: int
    heads: int
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    layer_scale: float | None = None
    epsilon: float = 1e-6
    attention: str = "xla"
    remat: str = "none"
    dtype: Dtype = jnp.float32

    def setup(self) -> None:
        """Declare the submodules under the names that stored weights have."""
        sizes = (self.heads, self.mlp_ratio, self.qkv_bias, self.layer_scale, self.epsilon, self.attention, self.dtype)
        self.video_blocks = [CrossSelfBlock(*sizes, name=f"video_block_{i}") for i in range(self.depth)]
        self.audio_blocks = [CrossSelfBlock(*sizes, name=f"audio_block_{i}") for i in range(self.depth)]
        self.video_norm = LayerNorm(self.epsilon, self.dtype)
        self.audio_norm = LayerNorm(self.epsilon, self.dtype)

    def __call__(self, video: jax.Array, audio: jax.Array) -> Fused:
        """[B, n, D] and [B, m, D] -> the same shapes."""
        blocks = []
        for of_video, of_audio in zip(self.video_blocks, self.audio_blocks, strict=True):
            looked = run_block(self, of_video, self.remat, video, audio)
            heard = run_block(self, of_audio, self.remat, audio, video)
            video, audio = looked, heard
            blocks.append((video, audio))
        return Fused(self.video_norm(video), self.audio_norm(audio), blocks)


class Decoded(NamedTuple):
    """`prediction` [B, r, outputs] of the hidden tokens; `blocks`: each block's output [B, n + r, d], visible tokens first."""

    prediction: jax.Array
    blocks: list[jax.Array]


class SkipDecoder(nn.Module):
    """A plain block over visible and hidden tokens, then one `CrossSelfBlock` for each skipped-to encoder level; norm and a linear head.

    Encoder levels come through the same bias-free map `embed` as the tokens to decode. Tokens are never put back in order: visible ones
    stand first, hidden ones after them.
    """

    width: int
    depth: int
    heads: int
    outputs: int
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    layer_scale: float | None = None
    epsilon: float = 1e-6
    attention: str = "xla"
    remat: str = "none"
    dtype: Dtype = jnp.float32

    def setup(self) -> None:
        """Declare the submodules under the names that stored weights have."""
        self.embed = nn.Dense(self.width, use_bias=False, dtype=self.dtype, kernel_init=xavier)
        options: dict[str, Any] = {"layer_scale": self.layer_scale, "epsilon": self.epsilon, "attention": self.attention}
        options |= {"dtype": self.dtype}
        self.first = Block(self.heads, self.mlp_ratio, bias_of(self.qkv_bias), name="block_0", **options)
        crossing = (self.heads, self.mlp_ratio, self.qkv_bias)
        self.crossing = [CrossSelfBlock(*crossing, name=f"block_{i}", **options) for i in range(1, self.depth)]
        self.norm = LayerNorm(self.epsilon, self.dtype)
        self.head = nn.Dense(self.outputs, dtype=self.dtype, kernel_init=xavier)

    def __call__(
        self, latent: jax.Array, levels: Sequence[jax.Array], seen: jax.Array, hidden: jax.Array, mask_token: jax.Array
    ) -> Decoded:
        """Predictions of the hidden tokens.

        Args:
            latent: visible tokens to decode [B, n, D].
            levels: of the encoder, one for each block after the first in their order (deepest first), [B, n, D] each.
            seen, hidden: position rows of visible and hidden tokens, [B, n, d] and [B, r, d].
            mask_token: [1, 1, d].
        """
        seen = seen.astype(self.dtype)
        empty = (mask_token + hidden).astype(self.dtype)  # [B, r, d]
        x = constrain(jnp.concatenate([self.embed(latent) + seen, empty], 1), "batch")  # [B, n + r, d]
        x = run_block(self, self.first, self.remat, x)
        blocks = [x]
        for block, level in zip(self.crossing, levels, strict=True):
            x = run_block(self, block, self.remat, x, self.embed(level) + seen)
            blocks.append(x)
        return Decoded(self.head(self.norm(x[:, latent.shape[1] :])), blocks)  # [B, r, outputs]


class LayerSum(nn.Module):
    """sum_l softmax(w)_l h_l of a network's layers with learnt logits w `layers` [L], equal at first."""

    @nn.compact
    def __call__(self, layers: jax.Array) -> jax.Array:
        """[B, L, D] -> [B, D]."""
        logits = self.param("layers", nn.initializers.constant(LAYER_LOGIT), (layers.shape[1],))
        return jnp.einsum("l,bld->bd", jax.nn.softmax(logits), layers)
