"""SparK for convolutional networks, and the CT study that compares it with contrastive pretraining (Wolf et al., Scientific Reports 2023,
arXiv 2308.06534; SparK: Tian et al., ICLR 2023, arXiv 2301.03580).

    python -m maskae.main --config configs/spark_medical.py:tiny --workdir runs/spark --config.data.root=shared/data
    python tools/compare_fractions.py runs/spark* runs/simclr* runs/moco_v2* runs/byol* runs/swav* --out runs/fractions

The comparison's other methods are configs/{simclr,moco_v2,byol,swav}.py with the same variants; configs/cnn_finetune.py fine-tunes any of
them. The evaluator `label_fractions` probes frozen features with 100, 30, 10 and 3 % of the labels.

`:tiny`      organs in the slices of one CT volume (32 classes, 32 pixels), a network of two stages, 4 x 4 cells of 8 pixels, 400 steps.
`:chest`     the same network on 277 chest X-rays at 64 pixels, 300 steps; labelled COVID-19 or another finding, 78 validate.
`:natural`   the same network on Caltech-101 at 32 pixels, 600 steps.
`:published` as `:tiny`, on the same volume as its authors publish it (neither clipped nor rounded): 2.3 MB, fetched where they are missing.
`:base`      the study's recipe: ResNet-50 on the 244,527 slices of LIDC-IDRI, 224 pixels, batch 32, 1600 epochs. A folder of the slices as
             8-bit pictures; `slices:FOLDER` makes them from NIfTI files. 24 PFLOP per epoch.
`:imagenet`  SparK's own recipe: batch 4096, 1600 epochs; the paper's ResNet-50 reaches 80.6 % fine-tuned (supervised: 79.8 %).

Measured with `:tiny`, seeds 0 to 2 (60 to 95 CPU seconds a run): probe accuracy, and macro AUC in brackets, with shares of 1,242 labels,
each the mean of three draws, and over seeds; 333 slices of the same scan validate, 32 classes. One scan says nothing about other patients.

    labels          100 %         30 %          10 %          3 %
    raw pixels      .330 (.795)   .310 (.800)   .290 (.794)   .195 (.726)
    untrained       .196 (.769)   .170 (.755)   .166 (.723)   .126 (.686)
    SparK           .290 (.861)   .261 (.845)   .240 (.823)   .189 (.760)
    SimCLR          .305 (.852)   .271 (.833)   .242 (.814)   .213 (.751)
    MoCo v2         .227 (.805)   .231 (.791)   .207 (.766)   .161 (.704)
    BYOL            .261 (.803)   .220 (.780)   .192 (.746)   .146 (.691)
    SwAV            .304 (.873)   .285 (.862)   .247 (.852)   .230 (.807)

Deviations over seeds are .005 to .033 in accuracy and .001 to .013 in AUC. Ahead of SimCLR, MoCo v2 and BYOL in AUC with every share, SparK
is behind SwAV, whose views alone are not mirrored while 18 of the classes are left or right, and in accuracy behind SimCLR too: the study's
order did not reproduce at this size. Nor did it that SparK loses LEAST as labels shrink: from 100 % to 3 % it keeps 65 % of its accuracy,
SwAV 76 %, MoCo v2 71 %, SimCLR 70 %, BYOL 56 %. Raw pixels are ahead of every method in accuracy down to 10 %, of MoCo v2 and BYOL
below 100 % in AUC too.
Fine-tuned by configs/cnn_finetune.py:tiny with a tenth of the labels (`--config.data.max_examples=124`), seeds 0 to 2: SparK .276, .252,
.306 (mean .278), SimCLR .308, MoCo v2 .266, BYOL .269, SwAV .309, from scratch .240, .318, .309 (mean .289): pretraining gains nothing
beyond the spread over seeds.
With `:published`, seed 0, SparK has .288 (.846), .244 (.824), .206 (.810), .169 (.761), raw pixels .324 (.796) with all labels.

`:natural` and `:chest`, means of seeds 0 to 2 (`:natural` has 3,030 labels, `:chest` 277, 78 X-rays validate; always saying COVID-19 has
.756), 1.5 to 2 minutes a run on one core:

    labels                          100 %         30 %          10 %          3 %
    natural  raw pixels             .199 (.783)   .164 (.750)   .122 (.695)   .074 (.637)
             SparK, untrained       .149 (.780)   .097 (.722)   .058 (.667)   .040 (.617)
             SparK                  .186 (.811)   .134 (.756)   .085 (.690)   .054 (.631)
             the others, untrained  .174 (.811)   .114 (.745)   .067 (.687)   .046 (.627)
             SimCLR                 .248 (.869)   .179 (.824)   .122 (.759)   .069 (.686)
             MoCo v2                .234 (.856)   .170 (.812)   .106 (.744)   .066 (.672)
             BYOL                   .194 (.827)   .134 (.774)   .081 (.705)   .051 (.638)
             SwAV                   .174 (.806)   .124 (.753)   .073 (.683)   .041 (.623)
    chest    raw pixels             .744 (.672)   .692 (.577)   .774 (.665)   .748 (.574)
             SparK, untrained       .675 (.516)   .715 (.581)   .697 (.551)   .600 (.495)
             SparK                  .705 (.595)   .719 (.627)   .705 (.636)   .695 (.531)
             the others, untrained  .637 (.450)   .671 (.510)   .678 (.491)   .650 (.462)
             SimCLR                 .709 (.613)   .722 (.663)   .695 (.638)   .709 (.569)
             MoCo v2                .714 (.658)   .714 (.644)   .701 (.615)   .699 (.578)
             BYOL                   .722 (.604)   .705 (.619)   .719 (.623)   .692 (.529)
             SwAV                   .731 (.622)   .689 (.605)   .694 (.584)   .726 (.543)

Deviations over seeds on photographs are .002 to .012 in accuracy and .001 to .017 in AUC. There SimCLR and MoCo v2 are ahead of raw pixels
in AUC, SparK gains over its start with every share, BYOL a little, SwAV in 600 steps nothing; from 100 % to 3 % SparK keeps as much of its
AUC as SimCLR, 78 and 79 %. On X-rays every method's AUC is above its start's with every share (deviations .005 to .065), their order lies
within the seeds', and no accuracy is above that of always saying COVID-19. Not run: the study's own data.
"""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from maskae.config import default_config, set_duration

# Small runs on: source, side of the pictures, channels, mean and deviation of their values, steps.
SMALL: dict[str, tuple[str, int, int, float, float, int]] = {
    "tiny": ("organs:ct_volumes/volumes.npz#ct_abdomen", 32, 1, 0.42, 0.19, 400),
    "chest": ("table_images:covid_cxr@finding=COVID-19*:age", 64, 1, 0.52, 0.23, 300),
    "natural": ("archive:caltech101", 32, 3, 0.5, 0.27, 600),
    "published": ("organs:totalsegmentator#ct_abdomen", 32, 1, 0.41, 0.2, 400),
}
VARIANTS = (*SMALL, "base", "imagenet")
MEDICAL = ("tiny", "chest", "published", "base")
# The volume of `:published` and its mask, reference files of TotalSegmentator's tests (Apache-2.0).
TESTS = "https://raw.githubusercontent.com/wasserth/TotalSegmentator/0e65a448d557382b1e925276212b3bec7f5aff83/tests/reference_files"
PUBLISHED = (
    (
        "totalsegmentator/ct_abdomen.nii.gz",
        f"{TESTS}/example_ct.nii.gz",
        "dbd3ae6d614d1d7ef3a46925c30c70038ed52da6b37fdd6afdc7b9b71387e3e1",
    ),
    (
        "totalsegmentator/ct_abdomen_seg.nii.gz",
        f"{TESTS}/example_seg_fast_force_split.nii.gz",
        "e8097758e56e73099075b6caaebce23ef11bc6fad66a4ec3753b9406846558c7",
    ),
)

# Mean and deviation of LIDC's slices as the study's contrastive code has them; SparK's keeps ImageNet's.
CT_MEAN, CT_STD = (0.1806,), (0.1907,)
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
LIDC_SLICES = 244_527
IMAGENET_IMAGES = 1_281_167
ORGAN_SQUARES = 1_242


def data_of(config: ConfigDict, variant: str) -> None:
    """The data of a variant, the same for every method: images in 0..1, views are made on the device."""
    data = config.data
    data.statistics = "unit"
    data.flip = False
    if variant in SMALL:
        data.source, data.image_size, data.channels, *_ = SMALL[variant]
        data.cache = "ram"
        data.train_transform = data.val_transform = (("resize_center_crop", {"resize": data.image_size}),)
        if variant == "published":
            data.downloads, data.examples = PUBLISHED, ORGAN_SQUARES
    else:
        data.source = "folder:lidc_slices" if variant == "base" else "tfds:imagenet2012"
        data.examples = LIDC_SLICES if variant == "base" else IMAGENET_IMAGES
        data.train_transform = data.val_transform = (("resize_center_crop", {"resize": 224}),)


def network_of(config: ConfigDict, variant: str) -> dict[str, Any]:
    """The encoder of a variant, the same for every method."""
    model: dict[str, Any] = {"image_size": config.data.get_ref("image_size"), "channels": config.data.get_ref("channels")}
    if variant in SMALL:
        *_, mean, std, _ = SMALL[variant]
        return model | {"network": "resnet18", "layers": (1, 1), "widths": (32, 64), "stem_width": 16, "mean": (mean,), "std": (std,)}
    return model | {"network": "resnet50", "dtype": "bfloat16"} | IMAGENET


def evaluation_of(config: ConfigDict, variant: str) -> None:
    """What a variant's features are measured by, the same for every method."""
    config.evaluate.evaluators = {"label_fractions": {}, "knn": {}}
    if variant == "base":
        config.evaluate.evaluators = {"rank": {}}  # LIDC's slices have no labels
    if variant not in SMALL:
        config.evaluate.max_examples = 20_000
        set_duration(config.evaluate, every_epochs=100.0)
        set_duration(config.checkpoint, every_epochs=1.0)


def small_run(config: ConfigDict, variant: str) -> None:
    """Length and optimizer of a small run, the same for every contrastive method."""
    config.train.batch_size = 64
    set_duration(config.train, total_steps=SMALL[variant][-1])
    config.optimizer.name = "adam"
    config.optimizer.base_learning_rate = 4e-3  # 1e-3 at batch 64
    set_duration(config.optimizer, warmup_percent=10.0)


def get_config(variant: str = "base") -> ConfigDict:
    """The recipe of one size."""
    config = default_config()
    config.system = "spark_medical"
    data_of(config, variant)
    evaluation_of(config, variant)
    small = variant in SMALL
    config.model = network_of(config, variant) | {"mask_ratio": 0.6, "decoder_width": 32 if small else 768}
    config.model.update({"drop_path": 0.0 if small else 0.05, "zero_last": True})
    config.data.train_transform = (("random_resized_crop", {"scale": (0.67, 1.0)}),)
    config.data.flip = True
    if small:
        small_run(config, variant)
    optimizer = config.optimizer
    optimizer.name = "lamb"
    optimizer.arguments = {"b1": 0.9, "b2": 0.95, "eps": 1e-6, "weight_decay": 0.04, "weight_decay_end": 0.2}
    optimizer.no_decay = ("vectors", "mask_token")
    optimizer.clip_norm = 5.0
    optimizer.schedule = "cosine_inclusive"
    if small:
        optimizer.base_learning_rate = 1.6e-2  # 4e-3 at batch 64
        return config
    config.train.batch_size = 32 if variant == "base" else 4096
    set_duration(config.train, total_epochs=1600.0)
    optimizer.base_learning_rate = 2e-4
    optimizer.minimum = 0.001 * 2e-4 * config.train.batch_size / 256
    set_duration(optimizer, warmup_epochs=40.0)
    config.model.remat = variant == "imagenet"
    config.log.every_steps = 100
    return config
