"""SCGC and SCGC*, "Self-Supervised Contrastive Graph Clustering" (Kulatilleke et al., 2022): the recipes of the released code.

    python -m maskae.main --config configs/scgc.py:dblp_star --workdir runs/dblp --config.data.root=shared/data
    python -m maskae.main --config configs/scgc.py:tiny --workdir runs/scgc_tiny --config.data.root=shared/data

Two stages: an autoencoder of the nodes' features, then 200 epochs on the whole graph from its codes and k-means' centres. `_star` is SCGC*.
`citeseer` is fetched where it is missing; the others are files `graphs_node/<name>.npz` made of the benchmark's own inputs (ACM of AM-GCN's
repository, DBLP of DCRN's; USPS, HHAR and Reuters of SDCN's authors' drives, which were not at hand: their recipes were never run).

Measured on one CPU core: about 3 minutes a run, the autoencoder included. ACC / NMI / ARI / macro-F1 in %, means over seeds, of the last
epoch and, by `evaluate.maxima`, the largest of all epochs, each number by itself: the second is what the paper reports, and nothing that a
user without labels could choose. Each seed has an autoencoder of its own (`--config.seed=S`); +- is the deviation of ACC over seeds.

    run, seeds           autoencoder + k-means           last epoch                      largest of 200 epochs (an oracle's choice)
    dblp_star, 0-9       43.0 / 15.6 /  8.4 / 38.6 +-3.1  67.4 / 36.7 / 36.7 / 66.8 +-5.0  68.2 / 37.9 / 37.7 / 67.7 +-4.8
    acm_star, 0-9        80.2 / 46.5 / 50.8 / 80.3 +-4.4  83.2 / 53.2 / 56.6 / 83.2 +-1.5  92.2 / 72.5 / 78.2 / 92.1 +-0.4
    citeseer_star, 0-9   53.3 / 27.0 / 26.1 / 49.6 +-5.0  68.8 / 42.5 / 43.7 / 61.3 +-2.1  69.5 / 43.7 / 44.6 / 61.9 +-2.5
    dblp, 0-9            43.0 / 15.6 /  8.4 / 38.6 +-3.1  64.4 / 34.0 / 33.4 / 63.8 +-4.6  64.8 / 34.5 / 33.9 / 64.2 +-4.6
    acm, 0-9             80.2 / 46.5 / 50.8 / 80.3 +-4.4  86.5 / 58.9 / 64.2 / 86.5 +-1.1  92.0 / 72.2 / 77.9 / 92.0 +-0.5
    citeseer, 0-9        53.3 / 27.0 / 26.1 / 49.6 +-5.0  68.3 / 42.3 / 43.3 / 60.7 +-3.0  69.0 / 43.5 / 44.3 / 61.3 +-3.4

A separate implementation of the same recipe gave, at the end and at most, an accuracy for SCGC* of 65 to 72 and 66 to 74 on DBLP (three
seeds), 82 to 83 and 92 to 93 on ACM (two), 70.5 and 71.5 on CiteSeer (one); for SCGC of 54 to 71 and 54 to 73 on DBLP, 86 to 87 and 92 to
93 on ACM. Here SCGC* on DBLP spreads wider, from 58.2 (seed 2) and 62.0 (seed 0) to 75.1 (seed 8), CiteSeer from 64.4 to 70.9; the rest
agrees within 2 points, but for ACM's seeds 1, 2 and 5 of SCGC*, which end above. On ACM SCGC* ends BELOW its start with seeds 5, 7 and 9
(86.4 to 84.8, 83.8 to 81.7, 83.5 to 82.5), as in that implementation; no other run ended below its start. SCGC on DBLP lies between 57.9
and 73.4. The paper's ten runs share one file of an autoencoder's weights and cannot show how much hangs on it.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from maskae.config import default_config, set_duration


class Set(NamedTuple):
    """A data set: nodes, features, classes, non-zero weights of both variants where known, and the graph to build (of k nearest)."""

    nodes: int
    features: int
    classes: int
    pairs: tuple[int, int] = (0, 0)
    graph: str = ""
    rate: float = 1e-3


class Terms(NamedTuple):
    """alpha, beta, R and tau of the paper."""

    contrast_weight: float
    cluster_weight: float
    steps: int
    scale: float


SETS = {
    "usps": Set(9298, 256, 10, graph=":heat3"),
    "hhar": Set(10299, 561, 6, graph=":heat5"),
    "reut": Set(10000, 2000, 4, graph=":ncos3"),
    "acm": Set(3025, 1870, 3, (135919, 29281)),
    "dblp": Set(4057, 334, 4, (11113, 11113)),
    "citeseer": Set(3327, 3703, 6, (12431, 12431), rate=1e-4),
}
SCGC = {
    "usps": Terms(1.0, 0.1, 4, 0.5),
    "hhar": Terms(1.0, 10.0, 4, 2.25),
    "reut": Terms(3.0, 0.1, 3, 1.0),
    "acm": Terms(0.5, 0.1, 2, 0.25),
    "dblp": Terms(0.5, 0.1, 1, 0.25),
    "citeseer": Terms(1.0, 0.1, 1, 0.25),
}
SCGC_STAR = {
    "usps": Terms(4.0, 0.1, 4, 0.25),
    "hhar": Terms(1.0, 10.0, 3, 2.25),
    "reut": Terms(0.5, 0.1, 3, 0.25),
    "acm": Terms(1.0, 0.1, 1, 0.25),
    "dblp": Terms(1.0, 0.1, 1, 0.25),
    "citeseer": Terms(1.0, 0.1, 1, 0.25),
}
VARIANTS = ("tiny", "base", *SETS, *(f"{name}_star" for name in SETS))
EPOCHS, AUTOENCODER_EPOCHS, AUTOENCODER_BATCH = 200, 30, 256


def get_config(variant: str = "base") -> ConfigDict:
    """The recipe of one data set, of SCGC or with `_star` of SCGC*; `base` is SCGC on DBLP."""
    if variant == "tiny":
        return tiny(recipe("dblp", star=True))
    name = "dblp" if variant == "base" else variant.removesuffix("_star")
    return recipe(name, star=variant.endswith("_star"))


def recipe(name: str, *, star: bool) -> ConfigDict:
    """An autoencoder on the nodes' features, then clustering of the whole graph from its codes."""
    config = default_config()
    config.data.channels = 0
    config.data.train_transform = ()
    config.data.val_transform = ()
    config.data.flip = False
    config.data.val_percent = 0.0
    config.optimizer.name = "adam"
    config.optimizer.schedule = "constant"
    set_duration(config.optimizer, warmup_percent=0.0)
    set_duration(config.checkpoint, every_percent=20.0)
    config.system = "scgc"
    config.stages = ("autoencoder", "clustering")
    config.stage = {"autoencoder": autoencoder(name), "clustering": clustering(name, star)}
    return config


def autoencoder(name: str) -> dict[str, Any]:
    """Stage 1, SDCN's script: k-means on its codes is where clustering starts from."""
    data = SETS[name]
    return {
        "system": "autoencoder",
        "model": {"hidden": (500, 500, 2000), "latent": 10, "activation": "relu", "field": "nodes"},
        "data": {"source": f"node_rows:{name}", "examples": data.nodes, "fields": {"nodes": f"float32[{data.features}]"}},
        # The last batch of an epoch is a smaller one there; here it is filled from the next epoch, for as many steps.
        "train": {"batch_size": AUTOENCODER_BATCH, "total_steps": AUTOENCODER_EPOCHS * math.ceil(data.nodes / AUTOENCODER_BATCH)},
        "optimizer": {"base_learning_rate": 1e-3 * 256 / AUTOENCODER_BATCH},
        "evaluate": {"evaluators": {"clustering": {"clusters": data.classes, "restarts": 20}}, "map_examples": 1000},
    }


def clustering(name: str, star: bool) -> dict[str, Any]:
    """Stage 2: one record, so that a step is an epoch; clusters are scored after every one."""
    data, terms = SETS[name], (SCGC_STAR if star else SCGC)[name]
    pairs = data.pairs[star] or 8 * data.nodes
    fields = {"nodes": f"float32[{data.nodes},{data.features}]", "node_label": f"int32[{data.nodes}]"}
    fields |= {"neighbour_rows": f"int32[{pairs}]", "neighbour_columns": f"int32[{pairs}]", "neighbour_weights": f"float32[{pairs}]"}
    return {
        "init_from": "stage:autoencoder",
        "system": "scgc",
        "model": {
            "clusters": data.classes,
            "hidden": (500, 500, 2000),
            "latent": 10,
            "activation": "relu",
            "decode": not star,
            "scale": terms.scale,
            "contrast_weight": terms.contrast_weight,
            "cluster_weight": terms.cluster_weight,
        },
        "data": {
            "source": f"neighbourhood:{name}:{'sum' if star else 'power'}{terms.steps}{data.graph}",
            "examples": 1,
            "fields": fields,
        },
        "train": {"batch_size": 1, "total_steps": EPOCHS},
        # base_learning_rate is at a batch of 256, and the batch is one graph.
        "optimizer": {"base_learning_rate": data.rate * 256},
        "evaluate": {
            "batch_size": 1,
            "every_steps": 1,
            "evaluators": {"node_clusters": {}},
            "maxima": True,
            "pictures": "last",
        },
        "log": {"every_steps": 10},
    }


def tiny(config: ConfigDict) -> ConfigDict:
    """DBLP with narrow layers and few steps: learning, no evidence of quality."""
    hidden = (128, 128, 256)
    for stage in config.stage.values():
        stage.model.hidden = hidden
    set_duration(config.stage.clustering.train, total_steps=60)
    return config
