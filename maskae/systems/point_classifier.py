"""Classification of point clouds by a pretrained encoder: fine-tuning, and the frozen "linear" and "mlp" protocols.

Pang et al., ECCV 2022, arXiv 2203.06604, section 4.2; Ren et al., ACCV 2024, arXiv 2407.05862, section 4. A new CLS token beside the
maximum of all group tokens goes into a linear classifier or into an MLP of two hidden layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from maskae.errors import UserError, check_choice, check_share
from maskae.losses.classification import label_smoothing_cross_entropy
from maskae.nn.augmentations import each
from maskae.nn.batch_norm import STATISTICS, BatchNorm
from maskae.nn.flops import linear_flops
from maskae.nn.point_augmentations import random_subset, spread_subset
from maskae.nn.point_transformer import PointTransformer, normal
from maskae.nn.transfer import adopt_parameters
from maskae.systems.contract import Batch, Outputs, Params, State, Variables
from maskae.systems.point_arguments import PointArguments
from maskae.systems.point_mae import named_features

HEADS = ("mlp", "linear")
HEAD_WIDTH = 256
# A training cloud is a random part of this many times its points, spread evenly: 1,200 for 1,024.
OVERSAMPLING = 1200 / 1024
CLS_NAMES = ("cls_token", "cls_position")


class PointHead(nn.Module):
    """[CLS; maximum] -> logits: one linear map `fc3`, or before it twice a linear map to 256, batch norm, ReLU, dropout."""

    num_classes: int
    kind: str = "mlp"
    dropout: float = 0.5

    @nn.compact
    def __call__(self, x: jax.Array, keep: jax.Array | None = None, *, train: bool = False) -> jax.Array:
        """float32 [B, 2D] -> [B, K]; `keep` bool [2, B, 256] says which hidden units dropout leaves, None switches it off."""
        for layer in (1, 2) if self.kind == "mlp" else ():
            x = nn.Dense(HEAD_WIDTH, kernel_init=normal, name=f"fc{layer}")(x)  # [B, 256]
            x = nn.relu(BatchNorm(name=f"norm{layer}")(x, train=train))
            if keep is not None:
                x = jnp.where(keep[layer - 1], x / (1 - self.dropout), 0)
        return nn.Dense(self.num_classes, kernel_init=normal, name="fc3")(x)  # [B, K]


@dataclass(frozen=True)
class PointClassifier(PointArguments):
    """Arguments with the values of the papers' fine-tuning, beside those of every point-cloud transformer (`PointArguments`).

    Args:
        points: per cloud; of larger clouds farthest point sampling takes 1.17 times as many, of which training draws at random.
        head: "mlp" (fine-tuning and the MLP-3 protocol) or "linear".
        frozen: train the head and the CLS token alone (the MLP-LINEAR and MLP-3 protocols). The encoder is then used as it is, with its
            running statistics and without drop path.
        dropout: in the MLP.

    `state` holds the running statistics `batch_stats` and, where frozen, the `encoder` without its CLS token.

    Raises:
        UserError: where the sizes do not fit together or a name is unknown.
    """

    num_classes: int = 40
    points: int = 1024
    head: str = "mlp"
    frozen: bool = False
    dropout: float = 0.5

    # Batch statistics: microbatches would change the loss.
    couples_examples: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse what cannot work before anything is built."""
        super().__post_init__()
        check_choice("head", self.head, HEADS)
        check_share("dropout", self.dropout)
        if self.points < max(self.groups, self.group_size):
            raise UserError(f"points={self.points} are too few for groups={self.groups} of group_size={self.group_size}")

    @property
    def encoder(self) -> PointTransformer:
        """The pretrained part with a CLS token of its own."""
        return self.transformer(cls_tokens=1)

    @property
    def classifier(self) -> PointHead:
        """The head."""
        return PointHead(self.num_classes, self.head, self.dropout)

    def init(self, rng: jax.Array, batch: Batch) -> Variables:
        """Fresh variables; the batch is not read. `with_pretrained` puts the pretrained encoder in."""
        encoder_key, head_key = jax.random.split(rng)
        encoder = self.encoder.init(encoder_key, *self.blank_groups())
        head = self.classifier.init(head_key, jnp.zeros((1, 2 * self.width)))
        params = {"encoder": encoder["params"], "head": head["params"]}
        state = {STATISTICS: {"encoder": encoder[STATISTICS], "head": head.get(STATISTICS, {})}}
        if self.frozen:
            cls = {name: params["encoder"][name] for name in CLS_NAMES}
            rest = {name: value for name, value in params["encoder"].items() if name not in cls}
            params, state = params | {"encoder": cls}, state | {"encoder": rest}
        return Variables(params, state)

    def with_pretrained(self, variables: Variables, pretrained: Variables) -> Variables:
        """`variables` with the encoder and the running statistics of a pretrained system, whose CLS tokens are not used.

        Raises:
            UserError: listing every leaf that is missing or has another shape.
        """
        params, state = variables
        own = state["encoder"] if self.frozen else params["encoder"]
        adopted = adopt_parameters(own, pretrained.params.get("encoder", {}), skip=CLS_NAMES)
        given = pretrained.state.get(STATISTICS, {}).get("encoder", {})
        statistics = {**state[STATISTICS], "encoder": adopt_parameters(state[STATISTICS]["encoder"], given)}
        if self.frozen:
            return Variables(params, {**state, "encoder": adopted, STATISTICS: statistics})
        return Variables({**params, "encoder": adopted}, {**state, STATISTICS: statistics})

    def sample(self, points: jax.Array, example: jax.Array | None = None, key: jax.Array | None = None) -> jax.Array:
        """`self.points` of the points [B, N, 3]: spread evenly, and with a key a random part of somewhat more of them."""
        available = points.shape[1]
        if available < self.points:
            raise UserError(f"{available} points per cloud are fewer than points={self.points}")
        if available == self.points:
            return points
        if key is None or example is None:
            return spread_subset(points, self.points)
        return random_subset(spread_subset(points, min(available, round(self.points * OVERSAMPLING))), self.points, example, key)

    def encode(self, params: Params, state: State, points: jax.Array, train: bool, draws: Any = None) -> tuple[dict[str, jax.Array], State]:
        """Points [B, N, 3] -> the features of `named_features`, float32, and the encoder's statistics moved where it is trained."""
        groups = self.group(points)
        statistics = state[STATISTICS]["encoder"]
        variables = {"params": {**state.get("encoder", {}), **params["encoder"]}, STATISTICS: statistics}
        apply: Any = partial(self.encoder.apply, variables, groups.offsets, groups.centres)
        if train and not self.frozen:
            encoded, moved = apply(train=True, draws=draws, mutable=[STATISTICS])
            statistics = moved[STATISTICS]
        else:
            encoded = apply()
        return named_features(encoded.astype(jnp.float32), has_cls=True), statistics

    def loss(self, params: Params, state: State, batch: Batch, rng: jax.Array, step: jax.Array) -> tuple[jax.Array, Outputs]:
        """Cross-entropy on sampled, augmented clouds; the new state has moved statistics."""
        sample_key, augment_key, drop_key, dropout_key = jax.random.split(rng, 4)
        example = batch["example"]
        points = self.augment(self.sample(self.points_of(batch), example, sample_key), example, augment_key)
        named, moved = self.encode(params, state, points, True, self.drop_path_draws(example, drop_key, self.depth))
        keep = None
        if self.dropout:
            keep = each(lambda k: jax.random.bernoulli(k, 1 - self.dropout, (2, HEAD_WIDTH)), example, dropout_key).transpose(1, 0, 2)
        variables = {"params": params["head"], STATISTICS: state[STATISTICS]["head"]}
        logits, new = self.classifier.apply(variables, named["pooled"], keep, train=True, mutable=[STATISTICS])
        loss = label_smoothing_cross_entropy(logits, batch["label"], smoothing=0.0)
        accuracy = (logits.argmax(-1) == batch["label"]).astype(jnp.float32).mean()
        statistics = {"encoder": moved, "head": new.get(STATISTICS, {})}
        return loss, Outputs({"accuracy": accuracy}, {**state, STATISTICS: statistics})

    def features(self, params: Params, state: State, batch: Batch) -> dict[str, jax.Array]:
        """`pooled` [B, 2D] as the head sees it, `cls`, `max`, `mean` [B, D], `tokens` [B, G, D], `logits` [B, K]; float32."""
        named, _ = self.encode(params, state, self.sample(self.points_of(batch)), False)
        variables = {"params": params["head"], STATISTICS: state[STATISTICS]["head"]}
        logits: Any = self.classifier.apply(variables, named["pooled"])
        return named | {"logits": logits}

    def train_flops(self, batch: Batch) -> float:
        """Three forward passes, or one and a third where the encoder is frozen: its products with frozen weights have one gradient less."""
        forward = self.forward_flops(batch)
        return forward + self.stack_flops(1 + self.groups, self.depth) if self.frozen else 3 * forward

    def forward_flops(self, batch: Batch) -> float:
        """Tokens, blocks on 1 + G tokens, head."""
        sizes = (2 * self.width, *((HEAD_WIDTH, HEAD_WIDTH) if self.head == "mlp" else ()), self.num_classes)
        head = sum(linear_flops(1, a, b) for a, b in zip(sizes, sizes[1:], strict=False))
        return self.embedding_flops() + self.stack_flops(1 + self.groups, self.depth) + head
