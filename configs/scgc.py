"""SCGC and SCGC*, "Self-Supervised Contrastive Graph Clustering" (Kulatilleke et al., 2022): the recipes of the released code.

    python -m maskae.main --config configs/scgc.py:dblp_star --workdir runs/dblp --config.data.root=shared/data
    python -m maskae.main --config configs/scgc.py:tiny --workdir runs/scgc_tiny --config.data.root=shared/data

Two stages: an autoencoder of the nodes' features, then 200 epochs on the whole graph from its codes and k-means' centres. `_star` is SCGC*.
`citeseer` is fetched where it is missing; the others are files `graphs_node/<name>.npz` made of the benchmark's own inputs (ACM of AM-GCN's
repository, DBLP of DCRN's; USPS, HHAR and Reuters of SDCN's authors' drives, which were not at hand: their recipes were never run).

Measured on two cores of a CPU shared with eight others: 4 to 5 minutes of training for DBLP and ACM, 6 for CiteSeer, after 1 to 2 for the
autoencoder, and 40 % more for the scores of every epoch. ACC / NMI / ARI / macro-F1 in %, of the last epoch and, by
`evaluate.maxima`, the largest of all epochs, each number by itself: the second is what the paper reports, and nothing that a user without
labels could choose. Each seed has an autoencoder of its own.

    run                     autoencoder + k-means    last epoch               largest of 200 epochs (an oracle's choice)
    dblp_star, seed 0       42.3 / 17.0 / 11.4 / 33.8  47.0 / 26.8 / 21.5 / 46.3  48.7 / 28.6 / 23.5 / 47.8
    dblp_star, seed 1       40.3 / 15.9 /  9.4 / 35.5  69.7 / 36.2 / 37.0 / 69.3  71.9 / 39.4 / 40.5 / 71.3
    dblp_star, seed 2       43.6 / 13.7 /  9.1 / 37.8  57.8 / 32.5 / 31.7 / 56.7  58.2 / 34.8 / 33.0 / 57.7
    acm_star, seed 0        77.4 / 41.7 / 44.0 / 77.7  81.9 / 51.0 / 53.4 / 82.1  92.6 / 73.4 / 79.2 / 92.6
    acm_star, seed 1        79.9 / 45.1 / 49.7 / 79.8  87.3 / 60.6 / 66.1 / 87.2  91.7 / 71.5 / 77.0 / 91.6
    citeseer_star, seed 0   57.6 / 30.3 / 29.3 / 53.7  70.5 / 44.8 / 46.4 / 63.2  71.8 / 46.4 / 47.9 / 63.3

That is three, two and one seed of SCGC*, not ten. SCGC was not run to its end: seed 0 stood at 47.7 / 26.5 / 21.3 / 47.3 on DBLP at epoch
109, and at 86.1 / 57.5 / 63.1 / 86.2 on ACM at epoch 95 (at most 92.2 / 72.6 / 78.3 / 92.3). No run ended below its start. A separate
implementation of the same recipe gave, for SCGC* at the end and at most, an accuracy of 82.1 and 82.6, 91.7 and 92.6 on ACM (two seeds),
70.5 and 71.5 on CiteSeer (one), 65.3 to 72.4 and 65.5 to 74.0 on DBLP (three). ACM and CiteSeer agree within 1 point, but for ACM's seed 1,
5 points better at the end. On DBLP seeds 0 and 2 stay 18 and 8 points below that range, although the losses end where they should
(contrast 8.22, clusters 0.12 to 0.16): not reproduced but for one seed. The start is not settled either: on the codes of seed 0 two other
seeds of k-means, 20 restarts each, give 47.4 and 48.0 in place of 42.3. The paper's ten runs share one file of an autoencoder's weights and
cannot show how much hangs on it.
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
