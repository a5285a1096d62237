"""The table of systems that the five common tests run through, a row each, and their recorded loss curves.

    pytest -n 0 -m slow tests/systems/test_every_system.py [-k NAME]
    python -m tests.systems.cases mae

The first runs the rows that are not in `FAST`, since the suite's time is limited. The second writes `tests/refs/systems/mae.json`, the
losses that a run of the row must give again; an old one must be removed first.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
REFERENCES = ROOT / "tests" / "refs" / "systems"
DATA = Path(os.environ.get("MASKAE_SHARED", ROOT.parent / "shared")) / "data"

# A run of every row is this short, looked at only by its losses, and never sees the untrained baselines.
COMMON = (
    "log.every_steps=1",
    "log.tensorboard=false",
    "log.watchdog_factor=0",
    "checkpoint.every_percent=100",
    "evaluate.every_steps=0",
    "evaluate.evaluators={}",
    "evaluate.baselines=false",
    "evaluate.panels=0",
    "data.threads=1",
)


@dataclass(frozen=True)
class Case:
    """One system at its smallest.

    Attributes:
        config: of `configs/`, with its variant.
        overrides: what makes it tiny; the last stage takes `steps` steps of batches that divide by 8 (or of one record).
        stages: steps of each stage where the config has stages, in their order; () takes `steps`.
        data: folder of the data root that it reads; "" reads nothing but what the libraries bring.
        steps: of the recorded run.
        overfit: steps on one batch, and the share of the first loss that the last one must be below.
        tolerance: relative, of the recorded curve; 1e-4 covers both Python's versions of jax.
        gradient_tolerance: relative to the largest gradient, of 8 devices against 1.
    """

    config: str
    overrides: tuple[str, ...] = ()
    stages: tuple[int, ...] = ()
    data: str = ""
    steps: int = 20
    overfit: tuple[int, float] = (40, 0.9)
    tolerance: float = 1e-4
    gradient_tolerance: float = 1e-4
    root: str = field(default="", kw_only=True)


SMALL_VIT = ("model.width=16", "model.depth=1", "model.heads=2")
SMALL_DECODER = ("model.decoder_width=16", "model.decoder_depth=1", "model.decoder_heads=2")


def in_stage(name: str, *overrides: str) -> tuple[str, ...]:
    """The overrides for one stage."""
    return tuple(f"stage.{name}.{each}" for each in overrides)


SMALL_TEACHER = (
    *in_stage("teacher", *SMALL_VIT, *SMALL_DECODER),
    "train.batch_size=16",
    "optimizer.schedule=constant",
    "optimizer.base_learning_rate=0.08",
)


def small_teacher(path: str) -> tuple[str, ...]:
    """Overrides that make the teacher at `model.<path>` as small as the ViT."""
    return tuple(each.replace("model.", f"model.{path}.") for each in SMALL_VIT)


SMALL_POINTS = (
    "data.source=points:mosd_rgbd_clouds/mosd.npz@64",
    "model.groups=8",
    "model.group_size=8",
    "model.width=16",
    "model.depth=1",
    "model.heads=2",
    "model.token_widths=(8,8,8)",
    "train.batch_size=16",
)

SMALL_CLIPS = (
    "data.source=spoken_digits:fsdd@16,4,32,16",
    "data.max_examples=64",
    "model.image_size=16",
    "model.frames=4",
    "model.spectrogram_size=(32,16)",
    "model.width=16",
)
SMALL_CNN = (
    "data.image_size=16",
    "model.layers=(1,1)",
    "model.widths=(4,8)",
    "model.stem_width=4",
    "train.batch_size=16",
    "optimizer.schedule=constant",
    "optimizer.base_learning_rate=0.16",
)
SMALL_VIEWS = (*SMALL_CNN, "model.views=crop_flip")

SMALL_FACES = ("layers=(1,)", "widths=(8,)", "features_width=16")

CASES: dict[str, Case] = {
    "byol": Case(
        "configs/byol.py:tiny",
        (*SMALL_VIEWS, "model.hidden=8", "model.outputs=4", "optimizer.base_learning_rate=0.01"),
        data="ct_volumes",
        tolerance=3e-3,  # the loss passes 0, and Adam's first steps have the size of the rate also where gradients are rounding
    ),
    "cnn_finetune": Case("configs/cnn_finetune.py:tiny", (*SMALL_CNN, "optimizer.groups={}"), data="ct_volumes"),
    "croma": Case(
        "configs/croma.py:sentinel",
        (
            "data.source=sentinel_pairs:rs_s1s2_pairs/rs_s1s2_pairs.npz@32",
            "model.image_size=32",
            "model.width=16",
            "model.heads=2",
            "model.decoder_width=16",
            "model.decoder_heads=2",
            "train.batch_size=16",
            "model.flip=false",
            "optimizer.schedule=constant",
            "optimizer.base_learning_rate=0.16",
        ),
        data="rs_s1s2_pairs",
    ),
    "g_simclr": Case(
        "configs/g_simclr.py:tiny",
        (
            "data.max_examples=64",
            "data.image_size=16",
            "train.batch_size=16",
            *in_stage(
                "autoencoder", "model.image_size=16", "model.widths=(4,)", "evaluate.evaluators={}", "evaluate.map_examples=0"
            ),
            *in_stage(
                "contrast",
                "model.image_size=16",
                "model.network=resnet18",
                "model.layers=(1,)",
                "model.widths=(4,)",
                "model.outer_widths=(8,)",
                "model.stem_width=4",
                "model.head_widths=(8,8,4)",
                "model.records=64",
                "model.clusters=24",
                "model.views=crop_flip",
                "log.every_steps=1",
                "optimizer.schedule=constant",
                "optimizer.base_learning_rate=0.16",
            ),
        ),
        stages=(6, 14),
        data="eurosat_rgb",
    ),
    "gm_df": Case(
        "configs/gm_df.py:real_vs_ai",
        (
            *SMALL_VIT,
            *SMALL_DECODER,
            "data.image_size=16",
            "model.second_order=()",
            "model.code_width=4",
            "model.expert_width=8",
            "model.embedding_width=16",
            "model.text_width=16",
            "model.hide_domain=0.0",
            "train.batch_size=24",
            "optimizer.schedule=constant",
            "optimizer.base_learning_rate=0.05",
        ),
        data="real_vs_ai_mini",
    ),
    "graph_mae": Case(
        "configs/graph_mae.py:mutag",
        ("model.width=16", "model.depth=2", "train.batch_size=16", "optimizer.base_learning_rate=0.08"),
        data="graphs_tu",
        tolerance=1e-3,  # at this rate rounding grows: compiled without optimisation it ends 3e-4 away
    ),
    "hicmae": Case(
        "configs/hicmae.py:tiny",
        (
            *SMALL_CLIPS,
            "model.depth=1",
            "model.heads=2",
            "model.levels=(1,)",
            "model.decoder_width=16",
            "model.decoder_heads=2",
            "model.mask_ratio=0.75",
            "model.group_size=16",
            "train.batch_size=16",
            "optimizer.schedule=constant",
            "optimizer.base_learning_rate=0.08",
        ),
        data="fsdd",
    ),
    "hicmae_classifier": Case(
        "configs/hicmae_classifier.py:tiny",
        (
            *SMALL_CLIPS,
            "model.heads=2",
            "model.decoder_width=16",
            "model.mixup=0.8",
            "model.cutmix=1.0",
            "train.batch_size=16",
            "optimizer.schedule=constant",
            "optimizer.base_learning_rate=0.08",
        ),
        data="fsdd",
    ),
    "mae": Case("configs/mae.py:tiny", (*SMALL_VIT, *SMALL_DECODER, "train.batch_size=16"), overfit=(40, 0.95)),
    "mask_align": Case(
        "configs/mask_align.py:tiny",
        (*SMALL_TEACHER, *in_stage("student", *SMALL_VIT, "model.layer_weights=top1", *small_teacher("teacher"))),
        stages=(2, 20),
    ),
    "mr_mae": Case(
        "configs/mr_mae.py:tiny",
        (*SMALL_TEACHER, *in_stage("student", *SMALL_VIT, *SMALL_DECODER, *small_teacher("teachers.here"))),
        stages=(2, 20),
    ),
    "moco_v2": Case("configs/moco_v2.py:tiny", (*SMALL_VIEWS, "model.queue=32", "model.outputs=4"), data="ct_volumes"),
    "point_classifier": Case(
        "configs/point_classifier.py:tiny",
        (*SMALL_POINTS, "model.points=64", "optimizer.base_learning_rate=0.064"),
        data="mosd_rgbd_clouds",
    ),
    "point_cmae": Case(
        "configs/point_cmae.py:tiny",
        (*SMALL_POINTS, "model.decoder_depth=1", "model.decoder_heads=2"),
        data="mosd_rgbd_clouds",
    ),
    "regularized_ae": Case(
        "configs/regularized_ae.py:tiny",
        ("model.hidden=(32,)", "model.sigma_start=0.0", "model.path_points=4", "train.batch_size=16", "optimizer.base_learning_rate=0.08"),
    ),
    "scgc": Case(
        "configs/scgc.py:tiny",
        (
            "stage.autoencoder.data.source=node_rows:bat",
            "stage.autoencoder.train.batch_size=64",
            "stage.autoencoder.model.hidden=(16,16)",
            "stage.autoencoder.evaluate.evaluators={}",
            "stage.autoencoder.evaluate.map_examples=0",
            "stage.clustering.data.source=neighbourhood:bat:sum2",
            "stage.clustering.model.hidden=(16,16)",
            "stage.clustering.model.scale=4.0",
            "stage.clustering.optimizer.base_learning_rate=2.56",
            "stage.clustering.evaluate.evaluators={}",
            "stage.clustering.evaluate.every_steps=0",
            "stage.clustering.log.every_steps=1",
        ),
        stages=(10, 10),
        data="graphs_node",
        overfit=(40, 0.96),  # where the graph links most nodes, their contrast cannot fall far
    ),
    "simclr": Case("configs/simclr.py:tiny", (*SMALL_VIEWS, "model.hidden=8", "model.outputs=4"), data="ct_volumes"),
    "spark_medical": Case(
        "configs/spark_medical.py:tiny",
        (*SMALL_CNN, "model.decoder_width=16", "optimizer.base_learning_rate=0.64"),
        data="ct_volumes",
        overfit=(60, 0.97),
    ),
    "swav": Case(
        "configs/swav.py:tiny",
        (*SMALL_VIEWS, "model.hidden=8", "model.outputs=4", "model.prototypes=8", "model.small_crops=1", "model.freeze_prototypes=3"),
        data="ct_volumes",
    ),
    "tip": Case(
        "configs/tip.py:tiny",
        (
            "model.layers=(1,)",
            "model.widths=(8,)",
            "model.table_width=16",
            "model.table_depth=1",
            "model.fusion_depth=1",
            "model.heads=2",
            "model.projection=8",
            "model.missing_shares=()",
            "train.batch_size=16",
            "model.view_probability=0.0",
            "optimizer.schedule=constant",
            "optimizer.base_learning_rate=0.16",
        ),
        overfit=(60, 0.93),
    ),
    "vec2face": Case(
        "configs/vec2face.py:tiny",
        (
            *(f"stage.{stage}.model.{size}" for stage in ("identity", "faces") for size in SMALL_FACES),
            "stage.faces.model.width=16",
            "stage.faces.model.depth=1",
            "stage.faces.model.heads=2",
            "stage.faces.model.decoder_heads=2",
            "stage.faces.model.map_channels=8",
            "stage.faces.model.paint_width=8",
            "stage.faces.model.groups=4",
            "stage.faces.model.critic_widths=(8,8)",
            "stage.faces.model.adversarial_start=8",
            "stage.faces.optimizer.base_learning_rate=0.02",
            "stage.identity.evaluate.evaluators={}",
            "stage.faces.evaluate.evaluators={}",
            "train.batch_size=16",
        ),
        stages=(10, 10),
        overfit=(80, 0.95),
    ),
}


# One of each kind: patches, a whole graph, two stages on a graph, vectors.
FAST = ("mae", "graph_mae", "scgc", "regularized_ae")


def overrides_of(case: Case) -> list[str]:
    """All overrides of a row's run."""
    from maskae.config import load_config

    names = load_config(str(ROOT / case.config)).stages
    if names:
        lengths = [f"stage.{name}.train.total_steps={steps}" for name, steps in zip(names, case.stages, strict=True)]
    else:
        lengths = [f"train.total_steps={case.steps}"]
    root = [f"data.root={DATA / case.root}"] if case.data else []
    return [*COMMON, *root, *case.overrides, *lengths]


def load(case: Case):
    """The locked config of a row's run."""
    from maskae.config import load_config

    return load_config(str(ROOT / case.config), overrides_of(case))


def folders(config, workdir: Path) -> list[Path]:
    """The run folders that a run of `config` leaves: one per stage."""
    from maskae.train import stage_folders

    return list(stage_folders(config, workdir).values()) if config.stages else [workdir]


def losses_in(config, workdir: Path) -> list[float]:
    """The logged losses, of all stages one after the other."""
    from maskae.monitor import read_metrics

    return [row["loss"] for folder in folders(config, workdir) for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]


def main(names: list[str]) -> int:
    """Records the curves of the named rows."""
    from maskae.train import run

    for name in names:
        path = REFERENCES / f"{name}.json"
        if path.exists():
            print(f"{path} is there already; a new reference is a decision: remove the old one first", file=sys.stderr)
            return 2
        config = load(CASES[name])
        with tempfile.TemporaryDirectory() as folder:
            if run(config, Path(folder) / "run"):
                return 1
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps({"losses": losses_in(config, Path(folder) / "run")}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    import tests.conftest  # noqa: F401 (the eight simulated devices that the tests run on)

    sys.exit(main(sys.argv[1:]))
