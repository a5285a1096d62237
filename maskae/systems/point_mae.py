"""Point-MAE: "Masked Autoencoders for Point Cloud Self-supervised Learning", Pang et al., ECCV 2022, arXiv 2203.06604.

A cloud is cut into local groups of points; a transformer encodes the visible groups, and a decoder that sees them among mask tokens draws
the points of the hidden ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from maskae.errors import UserError, check_choice, check_heads
from maskae.losses.chamfer import VARIANTS, chamfer_distance
from maskae.masking import Mask, draw_noise, random_mask, removed_indices, take_tokens
from maskae.nn.augmentations import each
from maskae.nn.batch_norm import STATISTICS
from maskae.nn.flops import linear_flops
from maskae.nn.point_transformer import PointDecoder, PointTransformer
from maskae.nn.points import Groups
from maskae.point_panels import BLUE, GREY, ORANGE, cloud_sheet
from maskae.systems.contract import Batch, Outputs, Params, State, Variables
from maskae.systems.point_arguments import PointArguments
from maskae.vectors import at_least_float32, maximum_over

MASKERS = ("random", "block")
DRAWN = 6


@dataclass(frozen=True)
class PointMae(PointArguments):
    """Arguments with the paper's values, beside those of every point-cloud transformer (`PointArguments`).

    Args:
        masker: "random" groups (the method), or "block", those nearest to a random centre (the paper's ablation).
        chamfer: "l2" on squared distances (the method) or "l1".
        reconstruction_weight: of the Chamfer term. AdamW does not see it where it is the only one.

    `state` holds the running statistics of the tokenizer's batch norms, `batch_stats/encoder`.

    Raises:
        UserError: where the sizes do not fit together or a name is unknown.
    """

    decoder_depth: int = 4
    decoder_heads: int = 6
    mask_ratio: float = 0.6
    masker: str = "random"
    chamfer: str = "l2"
    reconstruction_weight: float = 1.0

    # One entry per masked view: the decoder's name. A method with CLS tokens in pre-training has one per view.
    decoders: ClassVar[tuple[str, ...]] = ("decoder",)
    cls_tokens: ClassVar[int] = 0
    # Batch statistics in the tokenizer: microbatches would change the loss.
    couples_examples: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse what cannot work before anything is built."""
        super().__post_init__()
        check_choice("masker", self.masker, MASKERS)
        check_choice("chamfer", self.chamfer, VARIANTS)
        check_heads("width", self.width, self.decoder_heads)
        if not 0 < self.visible < self.groups:
            leaves = f"mask_ratio={self.mask_ratio} leaves {self.visible} of {self.groups} groups visible"
            raise UserError(f"{leaves}; leave 1 to {self.groups - 1}")

    @property
    def visible(self) -> int:
        """Visible groups: all but int(mask_ratio * G), 26 of 64 at 0.6."""
        return self.groups - int(self.mask_ratio * self.groups)

    @property
    def encoder(self) -> PointTransformer:
        """The part that downstream tasks keep."""
        return self.transformer(self.cls_tokens)

    @property
    def decoder(self) -> PointDecoder:
        """The part that is thrown away after pre-training."""
        return PointDecoder(self.width, self.decoder_depth, self.decoder_heads, self.group_size, **self.compute)

    def init(self, rng: jax.Array, batch: Batch) -> Variables:
        """Fresh variables; the batch is not read."""
        keys = jax.random.split(rng, 1 + len(self.decoders))
        offsets, centres = self.blank_groups()
        encoder = self.encoder.init(keys[0], offsets, centres)
        visible, restore = jnp.zeros((1, self.visible, self.width)), jnp.arange(self.groups)[None]
        fresh = (self.decoder.init(key, visible, restore, centres)["params"] for key in keys[1:])
        decoders = dict(zip(self.decoders, fresh, strict=True))
        return Variables({"encoder": encoder["params"], **decoders}, {STATISTICS: {"encoder": encoder[STATISTICS]}})

    def embed(self, params: Params, state: State, offsets: jax.Array, train: bool) -> tuple[jax.Array, State]:
        """Groups [B, G, M, 3] -> tokens [B, G, D], and the state with moved statistics."""
        variables = {"params": params["encoder"], STATISTICS: state[STATISTICS]["encoder"]}
        apply: Any = partial(self.encoder.apply, variables, offsets, method="embed")
        if not train:
            return apply(), state
        tokens, moved = apply(train=True, mutable=[STATISTICS])
        return tokens, state | {STATISTICS: {"encoder": moved[STATISTICS]}}

    def masks(self, groups: Groups, example: jax.Array, key: jax.Array) -> tuple[Mask, ...]:
        """One independent mask per view."""
        return tuple(random_mask(self.noise(groups.centres, example, k), self.visible) for k in jax.random.split(key, len(self.decoders)))

    def noise(self, centres: jax.Array, example: jax.Array, key: jax.Array) -> jax.Array:
        """The masking noise [B, G] of the chosen masker."""
        if self.masker == "random":
            return draw_noise(key, example, self.groups)
        seed = each(lambda k: jax.random.randint(k, (1,), 0, self.groups), example, key)  # [B, 1]
        return -jnp.linalg.norm(centres - take_tokens(centres, seed), axis=-1)  # [B, G], the nearest are removed

    def forward(
        self, params: Params, state: State, groups: Groups, masks: Sequence[Mask], *, train: bool, draws: Sequence[Any] = ()
    ) -> dict[str, Any]:
        """Everything between groups and the predictions, by name; lists have one entry per view.

        Args:
            masks: one per view.
            train: batch statistics instead of running ones.
            draws: drop-path draws of the encoder and the decoder per view, as pairs; none switches it off.

        Returns:
            `tokens` [B, G, D], `positions` [B, G, D], `state`, and the lists `latent` [B, (1+)n, D], `features` [B, G, D] (decoder output
            before its norm, in the groups' order), `prediction` and `target` [B, m, M, 3] of removed groups in the mask's order, at least
            float32.
        """
        encode: Any = partial(self.encoder.apply, {"params": params["encoder"]})
        tokens, state = self.embed(params, state, groups.offsets, train)
        positions = encode(groups.centres, method="positions")
        named: dict[str, Any] = {"tokens": tokens, "positions": positions, "state": state}
        named |= {name: [] for name in ("latent", "features", "prediction", "target")}
        for view, (mask, name) in enumerate(zip(masks, self.decoders, strict=True)):
            encoder_draws, decoder_draws = draws[view] if draws else (None, None)
            decode: Any = partial(self.decoder.apply, {"params": params[name]})
            visible, where = (take_tokens(x, mask.keep_indices) for x in (tokens, positions))  # [B, n, D]
            latent = encode(visible, where, encoder_draws, view, method="encode").tokens  # [B, (1+)n, D]
            kept = latent[:, bool(self.cls_tokens) :]
            features = decode(kept, mask.restore, groups.centres, decoder_draws, method="decode")  # [B, G, D]
            removed = removed_indices(mask)  # [B, m]
            prediction = at_least_float32(decode(take_tokens(features, removed), method="predict"))  # [B, m, M, 3]
            target = jnp.take_along_axis(groups.offsets, removed[:, :, None, None], axis=1)  # [B, m, M, 3]
            for key, value in (("latent", latent), ("features", features), ("prediction", prediction), ("target", target)):
                named[key].append(value)
        return named

    def objective(self, named: dict[str, Any], masks: Sequence[Mask]) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The weighted Chamfer distance summed over views, and metrics.

        `trivial_chamfer` is that of predicting every point at its group's centre: a Chamfer distance near it has learned nothing.
        """
        views = list(zip(named["prediction"], named["target"], strict=True))
        total = jnp.stack([chamfer_distance(prediction, target, variant=self.chamfer) for prediction, target in views]).sum()
        # Every group holds its own centre, so that only the targets have a way to go.
        square = jnp.square(jnp.stack([target for _, target in views])).sum(-1)  # [views, B, m, M]
        trivial = square.mean() if self.chamfer == "l2" else jnp.sqrt(square).mean() / 2
        metrics = {"chamfer": total / len(views), "trivial_chamfer": trivial}
        return self.reconstruction_weight * total, metrics | {"token_deviation": token_deviation(named["features"][0])}

    def loss(self, params: Params, state: State, batch: Batch, rng: jax.Array, step: jax.Array) -> tuple[jax.Array, Outputs]:
        """The objective on augmented clouds; the new state has moved statistics."""
        augment_key, mask_key, drop_key = jax.random.split(rng, 3)
        example = batch["example"]
        groups = self.group(self.augment(self.points_of(batch), example, augment_key))
        masks = self.masks(groups, example, mask_key)
        keys = jax.random.split(drop_key, (len(masks), 2))
        depths = (self.depth, self.decoder_depth)
        draws = [tuple(self.drop_path_draws(example, k, depth) for k, depth in zip(pair, depths, strict=True)) for pair in keys]
        named = self.forward(params, state, groups, masks, train=True, draws=draws)
        loss, metrics = self.objective(named, masks)
        return loss, Outputs(metrics, named["state"])

    def features(self, params: Params, state: State, batch: Batch) -> dict[str, jax.Array]:
        """Final-norm outputs of all groups with running statistics, float32.

        `tokens` [B, G, D], `max` and `mean` of them [B, D], `cls` [B, D] where pre-training has one (the first view's), and `pooled`
        [B, 2D]: the CLS token, or without one the mean, beside the maximum.
        """
        groups = self.group(self.points_of(batch))
        variables = {"params": params["encoder"], STATISTICS: state[STATISTICS]["encoder"]}
        encoded: Any = self.encoder.apply(variables, groups.offsets, groups.centres)
        return named_features(encoded.astype(jnp.float32), bool(self.cls_tokens))

    def raw_features(self, batch: Batch) -> dict[str, jax.Array]:
        """The baseline without learning: `pooled` [B, 64], quantiles of the distances of random pairs of points (Osada et al. 2002, D2)."""
        points = self.points_of(batch)  # in random order, so that neighbours in it are random pairs
        pairs = [jnp.linalg.norm(points - jnp.roll(points, shift, axis=1), axis=-1) for shift in range(1, 9)]
        return {"pooled": jnp.quantile(jnp.concatenate(pairs, axis=1), jnp.linspace(0, 1, 64), axis=1).T}

    def draw(self, params: Params, state: State, batch: Batch, rng: jax.Array, spec: Any) -> dict[str, Any]:
        """`reconstruction`: clouds, what each view sees of them, and that with the predicted points of the hidden groups."""
        count = min(DRAWN, batch["points"].shape[0])

        def predict(params: Params, state: State, points: jax.Array) -> tuple[jax.Array, list[tuple[jax.Array, jax.Array]]]:
            groups = self.group(points[:count])
            masks = self.masks(groups, jnp.arange(count), rng)
            named = self.forward(params, state, groups, masks, train=False)
            views = []
            for mask, prediction in zip(masks, named["prediction"], strict=True):
                centres = take_tokens(groups.centres, removed_indices(mask))[:, :, None]  # [B, m, 1, 3]
                seen = take_tokens((groups.centres[:, :, None] + groups.offsets).reshape(count, self.groups, -1), mask.keep_indices)
                views.append((seen.reshape(count, -1, 3), (centres + prediction).reshape(count, -1, 3)))
            return points[:count], views

        points, views = jax.device_get(jax.jit(predict)(params, state, self.points_of(batch)))
        columns: dict[str, Any] = {"original": [[(cloud, BLUE)] for cloud in points]}
        for number, (seen, predicted) in enumerate(views, start=1):
            name = f"view {number}: " if len(views) > 1 else ""
            columns[f"{name}visible groups"] = [[(cloud, BLUE)] for cloud in seen]
            pairs = zip(seen, predicted, strict=True)
            columns[f"{name}with the predicted points"] = [[(cloud, GREY), (drawn, ORANGE)] for cloud, drawn in pairs]
        return {"reconstruction": cloud_sheet(columns, caption=f"{spec.name}, validation clouds")}

    def forward_flops(self, batch: Batch) -> float:
        """Tokens once; per view the encoder on visible groups, the decoder on all, the head on removed ones."""
        view = self.stack_flops(self.visible + min(self.cls_tokens, 1), self.depth) + self.stack_flops(self.groups, self.decoder_depth)
        view += self.position_flops() + linear_flops(self.groups - self.visible, self.width, 3 * self.group_size)
        return self.embedding_flops() + len(self.decoders) * view


def token_deviation(features: jax.Array) -> jax.Array:
    """How much a cloud's tokens [B, G, D] differ: the mean over channels and clouds of the deviation over groups; 0 is collapse."""
    return features.astype(jnp.float32).std(axis=1).mean()


def named_features(encoded: jax.Array, has_cls: bool) -> dict[str, jax.Array]:
    """Encoder output [B, (1+)G, D] -> `tokens`, `max`, `mean`, `cls` where there is one, and `pooled` [B, 2D]."""
    tokens = encoded[:, int(has_cls) :]  # [B, G, D]
    named = {"tokens": tokens, "max": maximum_over(tokens, 1), "mean": tokens.mean(1)} | ({"cls": encoded[:, 0]} if has_cls else {})
    return named | {"pooled": jnp.concatenate([named["cls" if has_cls else "mean"], named["max"]], axis=-1)}
