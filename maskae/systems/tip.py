"""TIP: "Tabular-Image Pre-training for Multimodal Classification with Incomplete Data", Du et al., ECCV 2024, arXiv 2407.07582.

A row of a table and an image are encoded, compared across the batch, and fused. Three losses: which image belongs to which row
(contrastive), whether a fused pair belongs together (matching), and what a hidden cell of the row held (reconstruction from the other cells
and the image). Hiding cells is what the data does, too: a missing cell is encoded as a hidden one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maskae.data.spec import DataSpec
from maskae.errors import UserError
from maskae.evaluate.features import extract, to_host
from maskae.keys import purpose_key
from maskae.losses.contrastive import info_nce
from maskae.losses.tables import cell_losses, hard_negatives, matching_loss
from maskae.masking import draw_noise
from maskae.nn import augmentations
from maskae.nn.views import view_called
from maskae.plots import draw_table
from maskae.systems.contract import Batch, Outputs, Params, State, Variables
from maskae.systems.tip_arguments import MISSING, TABLE, TipArguments
from maskae.vectors import unit

SHOWN = 6
REMOVAL_SEED = 2021


class Draws(NamedTuple):
    """What is random in a step.

    Attributes:
        corrupted: bool [B, N], the cells that are replaced in the compared row.
        rows: int32 [B, N], the row of the marginals that replaces a cell.
        hidden: bool [B, N], the cells that are reconstructed.
        noise: float32 [2, B, B], Gumbel, for drawing each image's wrong row and each row's wrong image.
    """

    corrupted: jax.Array
    rows: jax.Array
    hidden: jax.Array
    noise: jax.Array


class Rows(NamedTuple):
    """A batch's rows: `table` float32 [B, N], `missing` bool [B, N]."""

    table: jax.Array
    missing: jax.Array


def choose(noise: jax.Array, count: int) -> jax.Array:
    """bool [B, N]: the `count` columns of largest noise float32 [B, N] in each row."""
    return jnp.argsort(jnp.argsort(-noise, 1), 1) < count


def rows_of(batch: Batch) -> Rows:
    """The batch's rows."""
    return Rows(batch[TABLE].astype(jnp.float32), batch[MISSING].astype(bool))


def corrupted_rows(rows: Rows, marginals: jax.Array, draws: Draws) -> jax.Array:
    """Rows [B, N] with the drawn cells replaced by values of `marginals` [R, N]; a missing cell stays what it is."""
    replacement = jnp.take_along_axis(marginals, draws.rows, 0)  # [B, N]
    return jnp.where(draws.corrupted & ~rows.missing, replacement, rows.table)


@dataclass(frozen=True)
class Tip(TipArguments):
    """The method; see `TipArguments` for its arguments. Variables: see its `init`."""

    def begin(self, variables: Variables, stage: Any) -> Variables:
        """`marginals` from the training rows: of each column evenly spaced order statistics of the values that are there.

        Raises UserError where a categorical column has a code beyond its cardinality.
        """
        found = extract(lambda batch: {}, stage.batches(), (TABLE, MISSING))
        table, missing = found[TABLE], found[MISSING] > 0
        marginals = np.zeros((self.marginal_rows, self.columns.count), np.float32)
        for number in range(self.columns.count):
            there = np.sort(table[~missing[:, number], number])
            if len(there):
                places = (np.arange(self.marginal_rows) + 0.5) * len(there) / self.marginal_rows
                marginals[:, number] = there[places.astype(int)]
        for number, cardinality in enumerate(self.cardinalities):
            if np.max(marginals[:, number]) >= cardinality:
                wanted = tuple(stage.spec.details.get("cardinalities", []))
                raise UserError(f"cardinalities={self.cardinalities}: column {number} has more values; those of the data are {wanted}")
        return Variables(variables.params, {**variables.state, "marginals": jnp.asarray(marginals)})

    def draw_cells(self, example: jax.Array, rng: jax.Array) -> Draws:
        """A step's draws, each row's from `rng` and its number alone. example: int32 [B]."""
        length, size = self.columns.count, len(example)
        picked = jnp.floor(draw_noise(purpose_key(rng, "rows"), example, length) * self.marginal_rows).astype(jnp.int32)
        gumbel = [draw_noise(purpose_key(rng, name), example, size) for name in ("wrong_row", "wrong_image")]
        return Draws(
            choose(draw_noise(purpose_key(rng, "corruption"), example, length), self.corrupted_columns),
            jnp.minimum(picked, self.marginal_rows - 1),
            choose(draw_noise(purpose_key(rng, "mask"), example, length), self.hidden_columns),
            -jnp.log(-jnp.log(jnp.clip(jnp.stack(gumbel), 1e-12, 1 - 1e-7))),
        )

    def view(self, batch: Batch, rng: jax.Array) -> jax.Array:
        """The image that a step sees, as the network wants it: a view, or with the rest of the probability the image as it is."""
        images, example = batch["image"].astype(jnp.float32), batch["example"]
        viewed = view_called(self.views)(images, example, purpose_key(rng, "view"), self._pixels[0], self.crop)
        if images.shape[1:3] != viewed.shape[1:3]:
            images = jax.image.resize(images, viewed.shape, "linear")
        kept = augmentations.chosen(example, purpose_key(rng, "keep"), self.view_probability)
        return self.normalised(jnp.where(kept, viewed, images))

    def part(self, name: str, params: Params, *inputs: jax.Array, **options: Any) -> Any:
        """The module `name` on its own parameters."""
        modules: dict[str, Any] = {"table": self.table_encoder, "fusion": self.fusion, "predictor": self.predictor}
        if name in modules:
            return modules[name].apply({"params": params[name]}, *inputs, **options)
        return self.heads_by_name[name][0].run(params[name], {}, *inputs)[0]

    def forward(self, params: Params, state: State, images: jax.Array, rows: Rows, draws: Draws) -> dict[str, Any]:
        """Everything between normalised images [B, H, W, C] with their rows and the predictions, by name.

        One pass of the fusion serves 4B pairs: B that match, each row with another image, each image with another row, and the rows with
        hidden cells.
        """
        pyramid, moved = self.encode(params["encoder"], state["encoder"], images, train=True)
        corrupted = corrupted_rows(rows, state["marginals"], draws)
        compared = self.part("table", params, corrupted, rows.missing).tokens  # [B, 1+N, D]
        image = unit(self.part("image_projector", params, pyramid.pooled))  # [B, projection]
        row = unit(self.part("table_projector", params, compared[:, 0]))  # [B, projection]
        similarity = image @ row.T / self.temperature  # [B, B]
        other_row = hard_negatives(similarity, draws.noise[0])
        other_image = hard_negatives(similarity.T, draws.noise[1])

        hidden = draws.hidden | rows.missing
        masked = self.part("table", params, rows.table, hidden).tokens
        seen = self.part("fusion", params, pyramid.maps[-1], method="see")  # [B, h*w, D]
        left = jnp.concatenate([compared, compared, compared[other_row], masked])  # [4B, 1+N, D]
        right = jnp.concatenate([seen, seen[other_image], seen, seen])  # [4B, h*w, D]
        fused = self.part("fusion", params, left, right, method="fuse").tokens
        pairs, recovered = jnp.split(fused, [3 * len(images)])
        matches = self.part("matching", params, pairs[:, 0])  # [3B, 2]
        named = {"map": pyramid.maps[-1], "corrupted": corrupted, "compared": compared, "masked": masked, "seen": seen}
        named |= {"image": image, "row": row, "similarity": similarity, "pairs": pairs, "recovered": recovered, "matches": matches}
        return named | {"cells": self.part("predictor", params, recovered), "statistics": moved}

    def loss_given_draws(
        self, params: Params, state: State, images: jax.Array, rows: Rows, draws: Draws
    ) -> tuple[jax.Array, dict[str, jax.Array], dict[str, Any]]:
        """The loss, float32 scalar, its parts, and what `forward` names."""
        named = self.forward(params, state, images, rows, draws)
        ways = [(named["image"], named["row"]), (named["row"], named["image"])]
        of_image, of_row = (info_nce(*way, 1 / self.temperature, two_way=False) for way in ways)
        contrastive = self.image_share * of_image + (1 - self.image_share) * of_row
        together = jnp.arange(len(named["matches"])) < len(images)
        matching = matching_loss(named["matches"], together)
        # A missing cell has no true value to be compared with.
        counted = draws.hidden & ~rows.missing
        logits, numbers = named["cells"]
        categorical, continuous = cell_losses(logits, numbers, rows.table, counted, self.columns, self.softmax)
        reconstruction = (categorical + continuous) / 2
        parts = {"contrastive_loss": contrastive, "matching_loss": matching, "reconstruction_loss": reconstruction}
        metrics = parts | {"categorical_loss": categorical, "continuous_loss": continuous}
        metrics["matching_accuracy"] = ((named["matches"][:, 1] > named["matches"][:, 0]) == together).mean()
        return jnp.asarray(self.weights) @ jnp.stack(list(parts.values())), metrics, named

    def loss(self, params: Params, state: State, batch: Batch, rng: jax.Array, step: jax.Array) -> tuple[jax.Array, Outputs]:
        """The three losses, weighted; the best constant answer to matching has the loss 0.6365."""
        if len(batch["example"]) < 2:
            raise UserError("tip compares the examples of a batch: train.batch_size must be at least 2")
        draws = self.draw_cells(batch["example"], rng)
        loss, metrics, named = self.loss_given_draws(params, state, self.view(batch, rng), rows_of(batch), draws)
        return loss, Outputs(metrics, {**state, "encoder": named["statistics"]})

    def fused(self, params: Params, seen: jax.Array, rows: Rows) -> tuple[jax.Array, jax.Array]:
        """Row tokens before and after they look at an image's tokens [B, m, D], each [B, 1+N, D]; no cell is replaced or hidden."""
        alone = self.part("table", params, *rows).tokens
        return alone, self.part("fusion", params, alone, seen, method="fuse").tokens

    def features(self, params: Params, state: State, batch: Batch) -> dict[str, jax.Array]:
        """Of the whole image and the row, with running statistics; all float32.

        `pooled` [B, D] is the fused class token and `tokens` [B, 1+N, D] are all fused ones; `image` [B, C] and `row` [B, D] are what each
        side gives alone, `joined` [B, C+2D] all three, `image_embedding` and `row_embedding` what is compared; `missing_<percent>` [B, D]
        is `pooled` with so large a share of the cells of each row removed besides (see `removed`).
        """
        rows = rows_of(batch)
        pyramid, _ = self.encode(params["encoder"], state["encoder"], self.normalised(batch["image"]), train=False)
        seen = self.part("fusion", params, pyramid.maps[-1], method="see")
        alone, tokens = self.fused(params, seen, rows)
        found = {"pooled": tokens[:, 0], "tokens": tokens, "image": pyramid.pooled, "row": alone[:, 0]}
        found["joined"] = jnp.concatenate([found[name].astype(jnp.float32) for name in ("image", "row", "pooled")], 1)
        found |= self.embeddings(params, found)
        for share in self.missing_shares:
            fewer = rows._replace(missing=rows.missing | self.removed(batch["index"], share))
            found[f"missing_{round(100 * share)}"] = self.fused(params, seen, fewer)[1][:, 0]
        return {name: value.astype(jnp.float32) for name, value in found.items()}

    def embeddings(self, params: Params, features: dict[str, Any]) -> dict[str, jax.Array]:
        """`image_embedding` and `row_embedding` [B, projection], of length 1, from the features of each side."""
        sides = {"image": "image_projector", "row": "table_projector"}
        return {f"{side}_embedding": unit(self.part(name, params, features[side])) for side, name in sides.items()}

    def removed(self, index: jax.Array, share: float) -> jax.Array:
        """bool [B, N]: int(share * N) cells of each record, the same at every evaluation; a larger share removes these and more."""
        return choose(draw_noise(jax.random.key(REMOVAL_SEED), index, self.columns.count), int(share * self.columns.count))

    def draw(self, params: Params, state: State, batch: Batch, rng: jax.Array, spec: DataSpec) -> dict[str, np.ndarray]:
        """Rows of the table: as they are, with hidden cells, and completed from the image and the other cells."""
        shown = {name: value[:SHOWN] for name, value in batch.items()}
        rows = rows_of(shown)
        hidden = choose(draw_noise(rng, shown["example"], self.columns.count), self.hidden_columns) | rows.missing

        def complete(params: Params, state: State) -> jax.Array:
            pyramid, _ = self.encode(params["encoder"], state["encoder"], self.normalised(shown["image"]), train=False)
            seen = self.part("fusion", params, pyramid.maps[-1], method="see")
            tokens = self.fused(params, seen, Rows(rows.table, hidden))[1]
            return jnp.where(hidden, self.most_likely(*self.part("predictor", params, tokens)), rows.table)

        completed = to_host(jax.jit(complete)(params, state))
        table, missing, masked = (to_host(x) for x in (rows.table, rows.missing, hidden))
        names = spec.details.get("columns", [str(number) for number in range(self.columns.count)])
        lines = {"row": np.where(missing, np.nan, table), "seen": np.where(masked, np.nan, table), "completed": completed}
        return {"table": draw_table(lines, names, title=f"{spec.name}: rows, cells that the encoder saw, completed rows")}

    def most_likely(self, logits: jax.Array, numbers: jax.Array) -> jax.Array:
        """A value for every cell, float32 [B, N]: the most likely code of its column, or the number."""
        if not self.columns.values:
            return numbers.astype(jnp.float32)
        bounds = zip(self.columns.offsets, self.cardinalities, strict=True)
        codes = [logits[:, column, start : start + size].argmax(-1) for column, (start, size) in enumerate(bounds)]
        return jnp.concatenate([jnp.stack(codes, 1).astype(jnp.float32), numbers.astype(jnp.float32)], 1)
