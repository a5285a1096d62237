"""TIP's arguments, their checks, and the networks that follow from them."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from maskae.data.columns import Columns
from maskae.errors import UserError, check_choice, check_heads, check_share
from maskae.nn.flops import linear_flops
from maskae.nn.heads import ProjectionHead
from maskae.nn.tables import CellPredictor, FusionEncoder, TableEncoder
from maskae.nn.views import view_called
from maskae.systems.cnn_arguments import CnnArguments
from maskae.systems.contract import Batch, State, Variables

TABLE, MISSING = "table", "table_missing"
SOFTMAXES = ("joint", "column")
PARTS = ("contrastive", "matching", "reconstruction")


@dataclass(frozen=True)
class TipArguments(CnnArguments):
    """Arguments beside those of every convolutional system (`CnnArguments`), with the values of the released recipe for cars.

    Args:
        cardinalities: of the categorical columns, which come first in a row; continuous columns follow.
        continuous: number of continuous columns.
        table_width: of the tokens of a row, before and after they are fused with the image's.
        table_depth, fusion_depth: blocks of the encoder of rows, and of the one that fuses.
        heads: of every block.
        projection: channels in which image and row are compared.
        temperature: of the similarities.
        image_share: of the contrastive loss, what looks for an image's row; the rest looks for a row's image.
        corruption: share of a row's columns that are replaced by values of other rows where rows are compared with images.
        mask_ratio: share of a row's columns that are hidden and reconstructed.
        weights: of the contrastive, the matching and the reconstruction loss.
        softmax: of a categorical cell: "joint" over the values of all columns (released), "column" over its column's.
        marginal_rows: how many values of each column are kept to draw replacements from.
        views: recipe of the image's view, one of `maskae.nn.views.VIEWS`, with `view_probability`; else the image as it is.
        crop: share of the area that the view takes, in place of the recipe's.
        missing_shares: `features` also gives the fused class token with so large a share of each row's cells removed.

    Raises:
        UserError: where a name is unknown, a share is out of range, or sizes do not fit together.
    """

    image_size: int | tuple[int, int] = 128
    _: KW_ONLY
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    cardinalities: tuple[int, ...] = (22, 13, 3, 12)
    continuous: int = 13
    table_width: int = 512
    table_depth: int = 4
    fusion_depth: int = 4
    heads: int = 8
    mlp_ratio: float = 4.0
    projection: int = 128
    temperature: float = 0.1
    image_share: float = 0.5
    corruption: float = 0.3
    mask_ratio: float = 0.5
    weights: tuple[float, float, float] = (1 / 3, 1 / 3, 1 / 3)
    softmax: str = "joint"
    marginal_rows: int = 1024
    views: str = "cars"
    view_probability: float = 0.95
    crop: tuple[float, float] | None = None
    missing_shares: tuple[float, ...] = ()

    # The losses compare examples, and batch statistics couple them.
    couples_examples: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse what cannot work before anything is built."""
        super().__post_init__()
        check_choice("softmax", self.softmax, SOFTMAXES)
        check_heads("table_width", self.table_width, self.heads)
        view_called(self.views)
        check_share("corruption", self.corruption)
        for share in self.missing_shares:
            check_share("missing_shares", share)
        for name, value in (("image_share", self.image_share), ("view_probability", self.view_probability)):
            if not 0 <= value <= 1:
                raise UserError(f"{name}={value} must lie in 0..1")
        if self.temperature <= 0:
            raise UserError(f"temperature={self.temperature} must be positive")
        if any(cardinality < 1 for cardinality in self.cardinalities) or self.continuous < 0 or not self.columns.count:
            raise UserError(f"cardinalities={self.cardinalities}, continuous={self.continuous}: there must be columns, of a value at least")
        count, hidden = self.columns.count, self.hidden_columns
        if not 0 < hidden < count:
            raise UserError(f"mask_ratio={self.mask_ratio} hides {hidden} of {count} columns; it must hide some, and not all")
        if len(self.weights) != len(PARTS) or min(self.weights) < 0:
            raise UserError(f"weights={self.weights} must be three, none negative: of the {', '.join(PARTS)} loss")
        if self.marginal_rows < 1:
            raise UserError(f"marginal_rows={self.marginal_rows} must be at least 1")

    @property
    def columns(self) -> Columns:
        """The columns of a row."""
        return Columns(tuple(self.cardinalities), self.continuous)

    @property
    def hidden_columns(self) -> int:
        """Columns of each row that are hidden for reconstruction; a half rounds to the even number, as in the released code."""
        return round(self.mask_ratio * self.columns.count)

    @property
    def corrupted_columns(self) -> int:
        """Columns of each row that are replaced."""
        return int(self.corruption * self.columns.count)

    @property
    def _tokens(self) -> dict[str, Any]:
        return {"heads": self.heads, "mlp_ratio": self.mlp_ratio, "dtype": jnp.dtype(self.dtype)}

    @property
    def table_encoder(self) -> TableEncoder:
        """Of rows alone."""
        return TableEncoder(self.columns, self.table_width, self.table_depth, **self._tokens)

    @property
    def fusion(self) -> FusionEncoder:
        """Of rows that look at images."""
        return FusionEncoder(self.table_width, self.fusion_depth, **self._tokens)

    @property
    def predictor(self) -> CellPredictor:
        """Of hidden cells."""
        return CellPredictor(self.columns, jnp.dtype(self.dtype))

    @property
    def heads_by_name(self) -> dict[str, tuple[ProjectionHead, int]]:
        """The projections of image and row, and the matching head, each with the channels of its input."""
        dtype = jnp.dtype(self.dtype)
        return {
            "image_projector": (ProjectionHead(self.projection, self.width, dtype=dtype), self.width),
            "table_projector": (ProjectionHead(self.projection, self.table_width, dtype=dtype), self.table_width),
            "matching": (ProjectionHead(2, dtype=dtype), self.table_width),
        }

    def init(self, rng: jax.Array, batch: Batch) -> Variables:
        """Fresh parameters; in `state` the image encoder's statistics and `marginals` [R, N], zeros until `begin`.

        Raises UserError where the batch's rows do not have the arguments' number of columns.
        """
        self.check_rows(batch)
        keys = iter(jax.random.split(rng, 7))
        encoder = self.init_encoder(next(keys))
        row, hidden = jnp.zeros((1, self.columns.count)), jnp.zeros((1, self.columns.count), bool)
        tokens = jnp.zeros((1, 1 + self.columns.count, self.table_width))
        params = {"encoder": encoder.params, "table": self.table_encoder.init(next(keys), row, hidden)["params"]}
        params["fusion"] = self.fusion.init(next(keys), tokens, jnp.zeros((1, 1, 1, self.width)))["params"]
        params["predictor"] = self.predictor.init(next(keys), tokens)["params"]
        for name, (head, inputs) in self.heads_by_name.items():
            params[name] = head.start(next(keys), inputs)[0]
        state: State = {"encoder": encoder.state, "marginals": jnp.zeros((self.marginal_rows, self.columns.count))}
        return Variables(params, state)

    def check_rows(self, batch: Batch) -> None:
        """Raises UserError where the batch has no rows, or rows with another number of columns."""
        if TABLE not in batch or MISSING not in batch:
            raise UserError("tip needs the fields table and table_missing; the sources table_images: and digits_table have them")
        given = batch[TABLE].shape[-1]
        if given != self.columns.count:
            raise UserError(
                f"rows have {given} columns, but cardinalities={self.cardinalities} and continuous={self.continuous} "
                f"make {self.columns.count}; the source's details name its columns"
            )

    def forward_flops(self, batch: Batch) -> float:
        """The image encoder once, the encoder of rows twice, the fusion four times; 6.0 GFLOP for cars at 128 pixels."""
        heads = sum(head.flops(inputs) * (3 if name == "matching" else 1) for name, (head, inputs) in self.heads_by_name.items())
        return self.encoder_flops(self._pixels) + self.row_flops(2, 4) + heads

    def row_flops(self, encoded: int, fused: int) -> float:
        """The encoder of rows so many times, the image's tokens once, and the fusion so many times."""
        reduction = self.backbone.reductions[-1]
        seen = -(-self._pixels[0] // reduction) * -(-self._pixels[1] // reduction)
        see = linear_flops(seen, self.width, self.table_width)
        return self.table_encoder.flops() * encoded + see + self.fusion.flops(1 + self.columns.count, seen) * fused
