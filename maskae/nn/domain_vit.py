"""A vision transformer whose norms and feed-forward parts depend on the domain of each example, and the second-order effects of its layers.

GM-DF, Lai et al., arXiv 2406.20078: equation 2 (norms), equation 1 (experts beside each MLP), equations 7 and 8 (how the MLP of a layer
reaches the class token through the attention of later layers).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from maskae.nn.attention_maps import look_weights
from maskae.nn.conditional import ConditionalLayerNorm
from maskae.nn.experts import SoftExperts
from maskae.nn.layers import Attention, Block, LayerNorm, Mlp
from maskae.nn.patches import patch_grid
from maskae.nn.sharding import constrain, gather_parameters
from maskae.nn.stack import rematerialise, run_blocks
from maskae.nn.vit import ACTIVATIONS, ViTEncoder


class Domain(NamedTuple):
    """What blocks know of each example's domain: `code` [B, C], which norms read, and `embedding` [B, E], which gates read."""

    code: jax.Array
    embedding: jax.Array


class Tail(NamedTuple):
    """What second-order effects need.

    Attributes:
        branches: layer -> what its MLP and experts added at each token [B, 1+N, D].
        weights: layer -> float32 [B, heads, 1+N], how much its heads' class token looks at each token.
    """

    branches: dict[int, jax.Array]
    weights: dict[int, jax.Array]


class DomainBlock(Block):
    """`Block` with domain-conditioned norms and `experts` soft experts beside its MLP; the names that both have are the same.

    `expert_count` 0 has no experts, `conditional` False plain norms. There is no layer scale and no drop path.
    """

    expert_count: int = 3
    expert_width: int = 192
    gate: str = "figure"
    conditional: bool = True

    def __call__(self, x: jax.Array, beside: Any = None, drop: Any = None, context: Any = None) -> jax.Array:
        """[B, N, D] with a `Domain` as `beside` -> [B, N, D]."""
        return self.parts(x, beside)[0]

    @nn.compact
    def parts(self, x: jax.Array, domain: Domain) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Output, what MLP and experts added to it, and the normalised input of the attention, each [B, N, D]."""
        x = constrain(x, "batch")
        normed = self._norm(x, domain, "norm1")
        mix = Attention(self.heads, self.qkv_bias, self.attention, self.kernel_init, self.dtype, name="attention")
        x = x + mix(normed)
        inside = self._norm(x, domain, "norm2")
        hidden = int(x.shape[-1] * self.mlp_ratio)
        branch = Mlp(hidden, self.activation, self.kernel_init, self.dtype, name="mlp")(inside)
        if self.expert_count:
            experts = SoftExperts(self.expert_count, self.expert_width, self.gate, dtype=self.dtype, name="experts")
            branch = branch + experts(inside, domain.embedding)
        return x + branch, branch, normed

    def _norm(self, x: jax.Array, domain: Domain, name: str) -> jax.Array:
        if self.conditional:
            return ConditionalLayerNorm(self.epsilon, self.dtype, name=name)(x, domain.code)
        return LayerNorm(self.epsilon, self.dtype, name=name)(x)


class DomainViT(ViTEncoder):
    """`ViTEncoder` of `DomainBlock`s."""

    expert_count: int = 3
    expert_width: int = 192
    gate: str = "figure"
    conditional: bool = True

    def make_block(self, name: str) -> Block:
        """The block called `name`."""
        return DomainBlock(
            self.heads,
            self.mlp_ratio,
            self.qkv_bias,
            activation=ACTIVATIONS[self.activation],
            epsilon=self.epsilon,
            attention=self.attention,
            dtype=self.dtype,
            expert_count=self.expert_count,
            expert_width=self.expert_width,
            gate=self.gate,
            conditional=self.conditional,
            name=name,
        )

    def look(self, tokens: jax.Array, domain: Domain, first: int) -> tuple[jax.Array, Tail]:
        """Patch tokens [B, N, D] -> the final norm's output [B, 1+N, D], and the inside of the layers from `first` on, counted from 0."""
        x = self.first_input(tokens)
        if self.is_initializing() or first >= self.depth:
            first = self.depth
        if first:
            x, _ = run_blocks(self, self.blocks[:first], x, beside=domain, scan=self.scan, remat=self.remat)
        tail = Tail({}, {})
        for layer in range(first, self.depth):
            x, tail.branches[layer], tail.weights[layer] = self._open(layer)(x, domain)
        return self.norm(x), tail

    def represent(self, images: jax.Array, domain: Domain, first: int) -> tuple[jax.Array, Tail]:
        """`look` of images [B, H, W, C]."""
        return self.look(self.embed(images), domain, first)

    def embed_masked(self, images: jax.Array, mask: jax.Array, mask_token: jax.Array) -> jax.Array:
        """Patch tokens [B, N, D] of images [B, H, W, C], those where `mask` [B, N] is 1 being `mask_token` [1, 1, D] in their places."""
        tokens = self.embed(images)
        places = self.position_table(patch_grid(images.shape[1], images.shape[2], self.patch_size))[:, 1:]
        hidden = (mask_token + places).astype(tokens.dtype)  # [1, N, D]
        return jnp.where(mask[:, :, None] > 0, hidden, tokens)

    def _open(self, layer: int) -> Any:
        plain: Any = self.blocks[layer].clone(parent=None, name=None)
        params = self.variables["params"][f"block_{layer}"]

        def apply(x: jax.Array, domain: Domain) -> tuple[jax.Array, jax.Array, jax.Array]:
            whole = gather_parameters(params)
            x, branch, normed = plain.apply({"params": whole}, x, domain, method="parts")
            weights = look_weights(whole["attention"]["qkv"], normed, self.heads, rows=1, qkv_bias=self.qkv_bias)
            return x, branch, weights[:, :, 0]  # [B, heads, 1+N]

        return rematerialise(apply, self.remat)


def carry(weights: jax.Array, branch: jax.Array, attention: dict[str, Any]) -> jax.Array:
    """What one layer's heads bring of `branch` to the class token, without any bias: sum_h sum_i A[h, i] W_VO[h] branch[i].

    Args:
        weights: float32 [B, heads, N], the class token's row of the layer's softmax.
        branch: [B, N, D], linear in which the result is.
        attention: the layer's parameters `qkv/kernel` [D, 3, heads, head_dim] and `out/kernel` [heads, head_dim, D].

    Returns:
        [B, D] in the dtype of `branch`.
    """
    looked = jnp.einsum("bhn,bnd->bhd", weights.astype(branch.dtype), branch)  # [B, heads, D]
    values = jnp.einsum("bhd,dhk->bhk", looked, attention["qkv"]["kernel"][:, 2].astype(branch.dtype))  # [B, heads, head_dim]
    return jnp.einsum("bhk,hkd->bd", values, attention["out"]["kernel"].astype(branch.dtype))  # [B, D]


def second_order(tail: Tail, layer: int, blocks: dict[str, Any]) -> jax.Array:
    """How the MLP of `layer` reaches the class token through the attention of all later layers (equation 7); float32 [B, D].

    `blocks` are the encoder's parameters, with `block_{i}`.
    """
    later = [each for each in sorted(tail.weights) if each > layer]
    carried = [carry(tail.weights[each], tail.branches[layer], blocks[f"block_{each}"]["attention"]) for each in later]
    return jnp.stack(carried).sum(0).astype(jnp.float32)
