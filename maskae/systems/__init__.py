"""The systems by name: one paper, one file."""

from __future__ import annotations

from maskae.systems.autoencoder import Autoencoder
from maskae.systems.byol import Byol
from maskae.systems.cnn_finetune import CnnFineTune
from maskae.systems.croma import Croma
from maskae.systems.denoising_autoencoder import DenoisingAutoencoder
from maskae.systems.g_simclr import GSimClr
from maskae.systems.gm_df import GmDf
from maskae.systems.graph_mae import GraphMae
from maskae.systems.graph_mae_molecules import GraphMaeMolecules
from maskae.systems.hicmae import Hicmae
from maskae.systems.hicmae_classifier import HicmaeClassifier
from maskae.systems.identity_encoder import IdentityEncoder
from maskae.systems.mae import Mae
from maskae.systems.mae_finetune import FineTune
from maskae.systems.mae_probe import LinearProbe
from maskae.systems.mask_align import MaskAlign
from maskae.systems.mc_mae import McFineTune, McMae
from maskae.systems.moco_v2 import MocoV2
from maskae.systems.mr_mae import MrMae, MrMcMae
from maskae.systems.point_classifier import PointClassifier
from maskae.systems.point_cmae import PointCmae
from maskae.systems.point_mae import PointMae
from maskae.systems.regularized_ae import RegularizedAe
from maskae.systems.scgc import Scgc
from maskae.systems.simclr import SimClr
from maskae.systems.spark_medical import SparK
from maskae.systems.swav import Swav
from maskae.systems.tip import Tip
from maskae.systems.tip_classifier import TipClassifier
from maskae.systems.vec2face import Vec2Face

SYSTEMS: dict[str, type] = {
    "autoencoder": Autoencoder,
    "byol": Byol,
    "cnn_finetune": CnnFineTune,
    "croma": Croma,
    "denoising_autoencoder": DenoisingAutoencoder,
    "g_simclr": GSimClr,
    "gm_df": GmDf,
    "graph_mae": GraphMae,
    "graph_mae_molecules": GraphMaeMolecules,
    "hicmae": Hicmae,
    "hicmae_classifier": HicmaeClassifier,
    "identity_encoder": IdentityEncoder,
    "mae": Mae,
    "mae_finetune": FineTune,
    "mae_probe": LinearProbe,
    "mask_align": MaskAlign,
    "mc_mae": McMae,
    "mc_mae_finetune": McFineTune,
    "moco_v2": MocoV2,
    "mr_mae": MrMae,
    "mr_mc_mae": MrMcMae,
    "point_classifier": PointClassifier,
    "point_cmae": PointCmae,
    "point_mae": PointMae,
    "regularized_ae": RegularizedAe,
    "scgc": Scgc,
    "simclr": SimClr,
    "spark_medical": SparK,
    "swav": Swav,
    "tip": Tip,
    "vec2face": Vec2Face,
    "tip_classifier": TipClassifier,
}
