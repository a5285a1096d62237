"""CROMA: "Remote Sensing Representations with Contrastive Radar-Optical Masked Autoencoders", Fuller et al., NeurIPS 2023.

arXiv 2311.00566. Two encoders see different quarters of the patches of two aligned sensors. Their pooled outputs are matched across the
batch; a joint encoder lets the radar tokens look at the optical ones, and a decoder predicts all channels of the removed patches from it.
Positions enter only as an attention bias from distances, so that every encoder runs on grids it has never seen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maskae.data.device import mixup
from maskae.data.spec import DataSpec
from maskae.errors import UserError
from maskae.losses.contrastive import info_nce
from maskae.losses.reconstruction import masked_mean_squared_error, normalise_patches, patch_statistics
from maskae.masking import Mask, draw_noise, random_mask, take_tokens
from maskae.nn.alibi import patch_coordinates
from maskae.nn.augmentations import flip, rotate90, square_crop, vertical_flip
from maskae.nn.joint import Beside
from maskae.nn.patches import patchify, unpatchify
from maskae.nn.sharding import constrain
from maskae.panels import panel_sheet
from maskae.systems.contract import Batch, Outputs, Params, State
from maskae.systems.croma_arguments import SENSORS, CromaArguments
from maskae.vectors import unit

RAW_SIDE = 16
SHOWN = 6
PREDICTION = "prediction (patch's own mean/std)"


class Encodings(NamedTuple):
    """`tokens` [B, n, D] after the final norm, `positions` float32 [B, n, 2] in patches, `pooled` [B, D] of the sensor's head."""

    tokens: jax.Array
    positions: jax.Array
    pooled: jax.Array


@dataclass(frozen=True)
class Croma(CromaArguments):
    """The method; see `CromaArguments` for its arguments."""

    def encode(self, params: Params, sensor: str, images: jax.Array, keep: jax.Array | None = None) -> Encodings:
        """One sensor's images [B, H, W, c], all patches or those in `keep` int32 [B, n]."""
        apply: Any = partial(self.encoder(sensor).apply, {"params": params[sensor]})
        grid = self.grid_of(images)
        tokens, positions = apply(images, method="embed"), jnp.asarray(patch_coordinates(grid))[None]  # [B, L, D], [1, L, 2]
        if keep is not None:
            tokens, positions = constrain(take_tokens(tokens, keep), "batch"), positions[0][keep]  # [B, n, D], [B, n, 2]
        positions = jnp.broadcast_to(positions, (*tokens.shape[:2], 2))
        tokens = apply(tokens, context=self.distances(positions, positions), method="encode").tokens
        pooled: Any = self.head.apply({"params": params[f"{sensor}_head"]}, tokens)
        return Encodings(tokens, positions, pooled)

    def look(self, params: Params, radar: Encodings, optical: Encodings) -> jax.Array:
        """The joint encodings [B, n, D] of the radar tokens."""
        cross = self.distances(radar.positions, optical.positions)
        own = cross if self.joint_self_bias == "cross" else self.distances(radar.positions, radar.positions)
        encoded: Any = self.joint.apply({"params": params["joint"]}, radar.tokens, Beside(optical.tokens, own, cross))
        return encoded.tokens

    def embedding(self, params: Params, sensor: str, pooled: jax.Array) -> jax.Array:
        """What is matched: the projection of a sensor's representation [B, D], of length 1; float32."""
        apply: Any = self.projection.apply
        return unit(apply({"params": params[f"{sensor}_projection"]}, pooled))

    def forward(self, params: Params, images: dict[str, jax.Array], noise: dict[str, jax.Array]) -> dict[str, Any]:
        """Everything between the sensors' images [B, H, W, c] with their masking noises [B, L] and the prediction, by name."""
        grid = self.grid_of(images["optical"])
        masks = {sensor: random_mask(noise[sensor], self.kept(sensor, math.prod(grid))) for sensor in SENSORS}
        encoded = {sensor: self.encode(params, sensor, images[sensor], masks[sensor].keep_indices) for sensor in SENSORS}
        joint = self.look(params, encoded["radar"], encoded["optical"])
        # The joint tokens lie where the radar ones do.
        decode: Any = partial(self.decoder.apply, {"params": params["decoder"]})
        prediction = decode(joint, masks["radar"].restore, grid)  # [B, L, p*p*C]
        embedded = {sensor: self.embedding(params, sensor, encoded[sensor].pooled) for sensor in SENSORS}
        return {"masks": masks, "encoded": encoded, "joint": joint, "prediction": prediction, "embedded": embedded}

    def target(self, images: dict[str, jax.Array]) -> jax.Array:
        """What the decoder should predict, float32 [B, L, p*p*C], the optical numbers first."""
        patches = [patchify(images[sensor].astype(jnp.float32), self.patch_size) for sensor in SENSORS]
        if self.target_norm == "joint":
            return normalise_patches(jnp.concatenate(patches, -1))
        return jnp.concatenate([normalise_patches(each) for each in patches], -1)

    def reconstruction(self, prediction: jax.Array, target: jax.Array, masks: dict[str, Mask]) -> dict[str, jax.Array]:
        """Each sensor's error on its own removed patches."""
        split = self.patch_size**2 * self.optical_channels
        pairs = {"optical": (prediction[..., :split], target[..., :split]), "radar": (prediction[..., split:], target[..., split:])}
        return {sensor: masked_mean_squared_error(*pairs[sensor], masks[sensor].mask) for sensor in SENSORS}

    def contrast(self, embedded: dict[str, jax.Array], scale: jax.Array) -> jax.Array:
        """The symmetric loss that picks each example's other sensor among those of the global batch; embeddings [B, D] of length 1."""
        return info_nce(embedded["optical"], embedded["radar"], scale, stop_key_gradient=self.key_stop_gradient)

    def loss_given_noise(
        self, params: Params, images: dict[str, jax.Array], noise: dict[str, jax.Array]
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss, float32 scalar, and its parts, for the sensors' masking noises [B, L]."""
        named = self.forward(params, images, noise)
        target = self.target(images)
        scale = jnp.exp(params["logit_scale"])
        contrastive = self.contrast(named["embedded"], scale)
        errors = self.reconstruction(named["prediction"], target, named["masks"])
        trivial = self.reconstruction(jnp.zeros_like(target), target, named["masks"])
        metrics = {f"{sensor}_loss": errors[sensor] for sensor in SENSORS}
        metrics |= {"contrastive_loss": contrastive, "reconstruction_loss": errors["optical"] + errors["radar"]}
        metrics |= {"trivial_loss": trivial["optical"] + trivial["radar"], "logit_scale": scale}
        return self.contrastive_weight * contrastive + self.reconstruction_weight * metrics["reconstruction_loss"], metrics

    def sensors(self, batch: Batch) -> dict[str, jax.Array]:
        """The images of every sensor that the batch has, float32 [B, H, W, c]; bytes become 0..1."""
        found = {sensor: batch[f"sensor_{sensor}"] for sensor in SENSORS if f"sensor_{sensor}" in batch}
        if not found:
            raise UserError("croma needs the fields sensor_optical and sensor_radar; the sources two_sensor: and sentinel_pairs: have them")
        return {sensor: x / jnp.float32(255) if x.dtype == jnp.uint8 else x.astype(jnp.float32) for sensor, x in found.items()}

    def views(self, batch: Batch, rng: jax.Array) -> dict[str, jax.Array]:
        """The training images: one crop, mirroring, turn and mix for both sensors, or they would no longer lie on each other."""
        images = self.sensors(batch)
        if set(images) != set(SENSORS):
            raise UserError(f"croma trains on both sensors; the batch has only {', '.join(images)}")
        example = batch["example"]
        stacked = jnp.concatenate([images[sensor] for sensor in SENSORS], -1)  # [B, H, W, C]
        keys = jax.random.split(rng, 5)
        if self.crop_sides[0]:
            stacked = square_crop(stacked, example, keys[0], self.image_size, self.crop_sides)
        if self.flip:
            stacked = vertical_flip(flip(stacked, example, keys[1]), example, keys[2])
            stacked = rotate90(stacked, example, keys[3])
        if self.mixup_alpha:
            stacked = mixup(stacked, jax.random.beta(keys[4], self.mixup_alpha, self.mixup_alpha))
        return {"optical": stacked[..., : self.optical_channels], "radar": stacked[..., self.optical_channels :]}

    def noise(self, images: dict[str, jax.Array], example: jax.Array, rng: jax.Array) -> dict[str, jax.Array]:
        """The masking noise [B, L] of each sensor, one independent of the other."""
        length = math.prod(self.grid_of(images["optical"]))
        return {sensor: draw_noise(key, example, length) for sensor, key in zip(SENSORS, jax.random.split(rng), strict=True)}

    def loss(self, params: Params, state: State, batch: Batch, rng: jax.Array, step: jax.Array) -> tuple[jax.Array, Outputs]:
        """Both losses, weighted. `trivial_loss` is the reconstruction loss of predicting zero."""
        view_key, noise_key = jax.random.split(rng)
        images = self.views(batch, view_key)
        loss, metrics = self.loss_given_noise(params, images, self.noise(images, batch["example"], noise_key))
        return loss, Outputs(metrics, state)

    def whole(self, batch: Batch) -> dict[str, jax.Array]:
        """The sensors' whole images, at `feature_size` where it is given."""
        images, side = self.sensors(batch), self.feature_size
        if not side:
            return images
        return {sensor: jax.image.resize(x, (len(x), side, side, x.shape[3]), "linear") for sensor, x in images.items()}

    def features(self, params: Params, state: State, batch: Batch) -> dict[str, jax.Array]:
        """Of the whole images, any multiple of the patch size: `optical`, `radar` [B, D] for each sensor that is there, with both `joint`.

        Also `<sensor>_embedding` [B, D], what the contrastive loss matches, and `tokens` [B, L, D] of the pooled kind. float32.
        """
        images = self.whole(batch)
        encoded = {sensor: self.encode(params, sensor, x) for sensor, x in images.items()}
        tokens = {sensor: each.tokens for sensor, each in encoded.items()}
        found = {sensor: each.pooled for sensor, each in encoded.items()}
        found |= {f"{sensor}_embedding": self.embedding(params, sensor, each.pooled) for sensor, each in encoded.items()}
        if set(encoded) == set(SENSORS):
            tokens["joint"] = self.look(params, encoded["radar"], encoded["optical"])
            found["joint"] = tokens["joint"].astype(jnp.float32).mean(1)
        pool = self.pool if self.pool in tokens else next(iter(tokens))
        found |= {"pooled": found[pool], "tokens": tokens[pool]}
        return {name: value.astype(jnp.float32) for name, value in found.items()}

    def raw_features(self, batch: Batch) -> dict[str, jax.Array]:
        """The baseline: the numbers of both sensors at no more than 16 pixels a side, as one vector."""
        images = self.sensors(batch)
        side = min(RAW_SIDE, *(x.shape[1] for x in images.values()))
        small = [jax.image.resize(x, (len(x), side, side, x.shape[3]), "linear").reshape(len(x), -1) for x in images.values()]
        return {"pooled": jnp.concatenate(small, -1)}

    def draw(self, params: Params, state: State, batch: Batch, rng: jax.Array, spec: DataSpec) -> dict[str, np.ndarray]:
        """A sheet per sensor: the image, what its encoder saw, and the prediction with each hidden patch's true mean and contrast."""
        rows = {name: value[:SHOWN] for name, value in batch.items()}
        images = self.whole(rows)
        if set(images) != set(SENSORS):
            return {}
        named = jax.jit(self.forward)(params, images, self.noise(images, rows["example"], rng))
        grid, split = self.grid_of(images["optical"]), self.patch_size**2 * self.optical_channels
        patches = {sensor: patchify(x, self.patch_size) for sensor, x in images.items()}
        statistics = {sensor: patch_statistics(x) for sensor, x in patches.items()}
        if self.target_norm == "joint":
            statistics = dict.fromkeys(SENSORS, patch_statistics(jnp.concatenate([patches[sensor] for sensor in SENSORS], -1)))
        predicted = {"optical": named["prediction"][..., :split], "radar": named["prediction"][..., split:]}
        sheets = {}
        for sensor in SENSORS:
            mean, deviation = statistics[sensor]
            removed = named["masks"][sensor].mask[..., None] > 0  # [B, L, 1]
            hidden = {"masked": jnp.zeros_like(patches[sensor]), PREDICTION: predicted[sensor] * deviation + mean}
            columns = {"original": images[sensor]}
            for name, filling in hidden.items():
                columns[name] = unpatchify(jnp.where(removed, filling, patches[sensor]), grid, self.patch_size)
            if sensor == "optical":
                colours = jnp.asarray(spec.details.get("optical_colours", range(min(3, self.optical_channels))))
                columns = {name: x[..., colours] for name, x in columns.items()}
            count = columns["original"].shape[-1]
            shown = {name: np.asarray(x) for name, x in columns.items()}
            sheets[sensor] = panel_sheet(shown, mean=(0.0,) * count, std=(1.0,) * count, rows=SHOWN, caption=f"{sensor}, {spec.name}")
        return sheets
