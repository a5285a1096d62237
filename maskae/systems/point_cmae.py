"""Point-CMAE: Ren et al., ACCV 2024, arXiv 2407.05862 ("Bringing Masked Autoencoders Explicit Contrastive Properties for Point Cloud
Self-Supervised Learning").

Point-MAE twice on the same groups with independent masks, one encoder and two decoders, whose features of groups that both masks hide are
drawn together: masking itself makes the two views.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax

from maskae.errors import check_choice
from maskae.losses.agreement import PAIRINGS, token_agreement
from maskae.masking import Mask
from maskae.systems.point_mae import PointMae


@dataclass(frozen=True)
class PointCmae(PointMae):
    """Arguments with the paper's values, beside Point-MAE's.

    Args:
        reconstruction_weight: of the sum of both views' Chamfer distances, which are thousands of times smaller than the agreement term.
        agreement_weight: of the agreement term.
        pairing: "matched" compares a hidden group's features with those of the same group, the paper's statement; "all" with those of
            every group of the cloud, what the released code computes.

    Raises:
        UserError: where the sizes do not fit together or a name is unknown.
    """

    reconstruction_weight: float = 1000.0
    agreement_weight: float = 1.0
    pairing: str = "matched"

    decoders: ClassVar[tuple[str, ...]] = ("decoder", "decoder_2")
    cls_tokens: ClassVar[int] = 2

    def __post_init__(self) -> None:
        """Refuse what cannot work before anything is built."""
        super().__post_init__()
        check_choice("pairing", self.pairing, PAIRINGS)

    def objective(self, named: dict[str, Any], masks: Sequence[Mask]) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Point-MAE's reconstruction of both views and the agreement of what both hide; no stop-gradient, no negatives."""
        reconstruction, metrics = super().objective(named, masks)
        both = masks[0].mask * masks[1].mask  # [B, G]
        first, second = named["features"]
        agreement = token_agreement(first, second, both, self.pairing)
        return reconstruction + self.agreement_weight * agreement, metrics | {"agreement": agreement}
