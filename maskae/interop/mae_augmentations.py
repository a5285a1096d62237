"""The recorded augmentations of MAE's fine-tuning and linear probing."""

from __future__ import annotations

import re

import jax.numpy as jnp
import numpy as np

from maskae.data.augment import apply_operation, operation_argument
from maskae.data.crops import probe_crop_size
from maskae.data.device import cutmix, cutmix_share, erase_size, mix_targets, mixup
from maskae.errors import UserError
from maskae.interop.case import Case, Reproduced, exact

DRAWN = "recorded draws"


def _mixing(case: Case) -> dict[str, Reproduced]:
    options = case.record["finetune"]["mixup"]
    images = jnp.asarray(case.inputs["mix_imgs"].transpose(0, 2, 3, 1))  # [B, H, W, C]
    labels = jnp.asarray(case.inputs["mix_labels"])
    classes = case.outputs["mix_targets_cutmix"].shape[1]
    box = tuple(int(edge) for edge in case.inputs["mix_bbox"])
    share = cutmix_share(box, images.shape[1], images.shape[2])
    drawn = float(case.inputs["mix_lam_mixup"])
    return {
        "mix_lam_corrected": Reproduced(share),
        "mix_imgs_cutmix": Reproduced(cutmix(images, box).transpose(0, 3, 1, 2)),
        "mix_targets_cutmix": Reproduced(mix_targets(labels, share, classes, options["label_smoothing"])),
        "mix_imgs_mixup": Reproduced(mixup(images, drawn).transpose(0, 3, 1, 2)),
        "mix_targets_mixup": Reproduced(mix_targets(labels, drawn, classes, options["label_smoothing"])),
    }


def _erase_boxes(case: Case) -> dict[str, Reproduced]:
    recorded = case.outputs["erase_boxes"]
    size = re.search(r"on a (\d+)x(\d+) image", case.meaning("erase_boxes"))
    if not size:
        raise UserError(f"cannot read the image size of erase_boxes from '{case.meaning('erase_boxes')}'")
    boxes = np.array(recorded)
    for row in boxes:
        height, width, fits = erase_size(row[0], row[1], int(size[1]), int(size[2]))
        row[4:6] = (height, width) if fits else (-1, -1)
    return {"erase_boxes": Reproduced(boxes, relative=0.0, skip=np.arange(6) < 4, note=DRAWN)}


def _probe_crops(case: Case) -> dict[str, Reproduced]:
    table = np.array(case.outputs["probe_crop_table"])
    for row in table:
        row[6:8] = probe_crop_size(row[2], row[3], int(row[0]), int(row[1]))
    return {"probe_crop_table": Reproduced(table, relative=0.0, skip=np.arange(8) < 6, note=f"image sizes and {DRAWN}")}


def _rand_augment(case: Case) -> dict[str, Reproduced]:
    options = case.record["finetune"]["randaugment"]
    arguments = [operation_argument(name, options["magnitude"]) for name in options["ops_in_order"]]
    images = [
        apply_operation(case.inputs["ra_image"], name, argument, fill=options["fillcolor"], interpolation=options["resample"])
        for name, argument in zip(options["ops_in_order"], arguments, strict=True)
    ]
    return {"ra_outputs": exact(np.stack(images))}


def replay_augmentations(case: Case) -> dict[str, Reproduced]:
    """mix_*, erase_boxes, probe_crop_table and ra_outputs, as far as they are recorded."""
    parts = {"mix_": _mixing, "erase_boxes": _erase_boxes, "probe_crop_table": _probe_crops, "ra_outputs": _rand_augment}
    found: dict[str, Reproduced] = {}
    for prefix, part in parts.items():
        if case.wants(prefix):
            found |= part(case)
    return found
