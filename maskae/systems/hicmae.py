"""HiCMAE: "Hierarchical Contrastive Masked Autoencoder for Self-Supervised Audio-Visual Emotion Recognition", Sun et al. 2024.

Information Fusion 2024, arXiv 2401.05698. A video and an audio encoder see few of their patches; a fusion encoder lets the two look at each
other, and a decoder for each predicts the hidden patches, its later blocks looking at intermediate encoder layers. At the same layers the
two encoders' mean tokens are matched across clips.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maskae.data.spec import DataSpec
from maskae.errors import UserError
from maskae.losses.contrastive import grouped_info_nce
from maskae.losses.reconstruction import standardise
from maskae.masking import Split, draw_noise, random_mask, split_tokens, take_tokens
from maskae.nn.audio_visual import Fused
from maskae.nn.layers import LayerNorm
from maskae.nn.patches import difference_frames, frames_to_channels, patchify, tubelets, unpatchify, untubelet
from maskae.nn.positions import sinusoid
from maskae.nn.sharding import constrain
from maskae.panels import panel_sheet
from maskae.systems.contract import Batch, Outputs, Params, State
from maskae.systems.hicmae_arguments import MODALITIES, HicmaeArguments
from maskae.vectors import unit

RAW_SIDE = 8
SHOWN = 6
Both = dict[str, jax.Array]


class Encodings(NamedTuple):
    """`tokens` [B, n, D] after the final norm; `layers`: every layer's output after that same norm, [B, n, D] each; `blocks` before it."""

    tokens: jax.Array
    layers: list[jax.Array]
    blocks: Any


@dataclass(frozen=True)
class Hicmae(HicmaeArguments):
    """The method; see `HicmaeArguments` for its arguments."""

    def inputs(self, batch: Batch) -> Both:
        """What the batch has of `video` float32 [B, T, H, W, C], normalised, and `audio` [B, T, F, 1]; bytes become 0..1 first."""
        found: Both = {}
        if "video" in batch:
            video = batch["video"]
            video = video / jnp.float32(255) if video.dtype == jnp.uint8 else video.astype(jnp.float32)
            found["video"] = (video - jnp.asarray(self.mean)) / jnp.asarray(self.std)
        if "spectrogram" in batch:
            found["audio"] = batch["spectrogram"].astype(jnp.float32)[..., None]
        if not found:
            raise UserError("hicmae needs the fields video and spectrogram; the source clips: has both, audio: the second")
        return found

    def embed(self, params: Params, modality: str, inputs: jax.Array) -> jax.Array:
        """All tokens of a modality without positions [B, L, D]."""
        apply: Any = self.encoder(modality).apply
        images = frames_to_channels(inputs, self.tubelet) if modality == "video" else inputs
        tokens = apply({"params": params[f"{modality}_encoder"]}, images, method="embed")
        return tokens.reshape(len(inputs), -1, self.width)  # [B, L, D]

    def encode(
        self, params: Params, modality: str, inputs: jax.Array, seen: jax.Array | None = None, draws: jax.Array | None = None
    ) -> Encodings:
        """A modality's inputs, all tokens or the rows `seen` int32 [B, n]; `draws` [depth, 2, B] of an encoder with stochastic depth."""
        own, encoder = params[f"{modality}_encoder"], self.encoder(modality)
        tokens = self.embed(params, modality, inputs)
        tokens = tokens + jnp.asarray(sinusoid(self.width, tokens.shape[1]), tokens.dtype)
        if seen is not None:
            tokens = constrain(take_tokens(tokens, seen), "batch")  # [B, n, D]
        encoded: Any = encoder.apply({"params": own}, tokens, draws, collect=True, method="encode")
        norm = LayerNorm(self.epsilon, jnp.dtype(self.dtype))
        layers: list[Any] = [norm.apply({"params": own["norm"]}, encoded.blocks[i]) for i in range(encoder.depth)]
        return Encodings(layers[-1], layers, encoded.blocks)

    def fuse(self, params: Params, video: jax.Array, audio: jax.Array) -> Fused:
        """Both modalities' tokens after each has looked at the other."""
        apply: Any = self.fusion.apply
        return apply({"params": params["fusion"]}, video, audio)

    def decode(self, params: Params, modality: str, fused: jax.Array, layers: list[jax.Array], split: Split) -> Any:
        """The decoder's `Decoded`: predictions [B, r, V] of the hidden tokens."""
        width, depth, _ = self.decoder_sizes(modality)
        table = jnp.asarray(sinusoid(width, self.tokens(modality)))
        levels = [layers[level - 1] for level in reversed(self.levels)][: depth - 1]
        places = (table[split.seen], table[split.hidden])
        own = {"params": params[f"{modality}_decoder"]}
        return self.decoder(modality).apply(own, fused, levels, *places, params[f"{modality}_mask_token"])

    def forward(self, params: Params, inputs: Both, masks: Both) -> dict[str, Any]:
        """Everything between the inputs, with masks [B, L] (1 = hidden), and the predictions, by name."""
        splits = {modality: split_tokens(masks[modality], self.visible(modality)) for modality in MODALITIES}
        encoded = {modality: self.encode(params, modality, inputs[modality], splits[modality].seen) for modality in MODALITIES}
        fused = self.fuse(params, encoded["video"].tokens, encoded["audio"].tokens)
        streams = {"video": fused.video, "audio": fused.audio}
        decoded = {each: self.decode(params, each, streams[each], encoded[each].layers, splits[each]) for each in MODALITIES}
        return {"splits": splits, "encoded": encoded, "fused": fused, "decoded": decoded}

    def target(self, modality: str, inputs: jax.Array) -> jax.Array:
        """What a decoder should predict of every token, float32 [B, L, V]: patches normalised, video by channel, then differenced."""
        if modality == "audio":
            return standardise(patchify(inputs, self.audio_patch_size))
        pixels = inputs * jnp.asarray(self.std) + jnp.asarray(self.mean)
        patches = tubelets(pixels, self.patch_size, self.tubelet)
        shape = patches.shape
        patches = standardise(patches.reshape(*shape[:2], -1, self.channels), axis=-2).reshape(shape)  # [B, L, frames*p*p*C]
        if not self.frame_difference:
            return patches
        video = untubelet(patches, (self.slots("video"), *self.grid("video")), self.patch_size, self.tubelet)
        return tubelets(difference_frames(video, self.difference_group), self.patch_size, self.tubelet)

    def reconstruction_error(self, modality: str, prediction: jax.Array, target: jax.Array) -> jax.Array:
        """Mean square of predictions [B, r, V] less their targets, float32 scalar; a tubelet's two frames by `difference_weight`."""
        error = jnp.square(prediction.astype(jnp.float32) - target)
        weight = self.difference_weight if modality == "video" and self.frame_difference else None
        if weight is None:
            return error.mean()
        first, second = jnp.split(error, 2, -1)  # [B, r, V/2]
        return (1 - weight) * first.mean() + weight * second.mean()

    def pooled_levels(self, encoded: dict[str, Encodings]) -> dict[str, list[jax.Array]]:
        """Each level's mean token of length 1, float32 [B, D], by modality."""
        found: dict[str, list[jax.Array]] = {}
        for modality, each in encoded.items():
            found[modality] = [unit(each.layers[level - 1].astype(jnp.float32).mean(1)) for level in self.levels]
        return found

    def contrast(self, video: jax.Array, audio: jax.Array) -> jax.Array:
        """The symmetric loss that picks each clip's other half within its group; [B, D] of length 1."""
        group = None if self.contrastive_scope == "global" else self.group_size
        return grouped_info_nce(video, audio, 1 / self.temperature, group)

    def loss_given_masks(self, params: Params, inputs: Both, masks: Both) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss, float32 scalar, and its parts, for masks [B, L] with 1 = hidden."""
        named = self.forward(params, inputs, masks)
        metrics, trivial = {}, jnp.float32(0)
        for modality in MODALITIES:
            target = take_tokens(self.target(modality, inputs[modality]), named["splits"][modality].hidden)  # [B, r, V]
            metrics[f"{modality}_loss"] = self.reconstruction_error(modality, named["decoded"][modality].prediction, target)
            trivial = trivial + self.reconstruction_error(modality, jnp.zeros_like(target), target)
        levels = self.pooled_levels(named["encoded"])
        for level, video, audio in zip(self.levels, levels["video"], levels["audio"], strict=True):
            metrics[f"contrastive_loss_{level}"] = self.contrast(video, audio)
        contrastive = sum((metrics[f"contrastive_loss_{level}"] for level in self.levels), jnp.float32(0))
        reconstruction = metrics["video_loss"] + metrics["audio_loss"]
        metrics |= {"contrastive_loss": contrastive, "reconstruction_loss": reconstruction, "trivial_loss": trivial}
        return reconstruction + self.contrastive_weight * contrastive, metrics

    def masks(self, example: jax.Array, rng: jax.Array) -> Both:
        """Each modality's mask float32 [B, L], 1 = hidden, one independent of the other; video's is the same in every time slot."""
        found = {}
        for modality, key in zip(MODALITIES, jax.random.split(rng), strict=True):
            places = self.places(modality)
            mask = random_mask(draw_noise(key, example, places), places - self.hidden(modality)).mask
            found[modality] = jnp.tile(mask, (1, self.slots(modality)))  # [B, L]
        return found

    def loss(self, params: Params, state: State, batch: Batch, rng: jax.Array, step: jax.Array) -> tuple[jax.Array, Outputs]:
        """Both reconstructions and the weighted contrast. `trivial_loss` is the reconstruction loss of predicting zero."""
        inputs = self.inputs(batch)
        if set(inputs) != set(MODALITIES):
            raise UserError(f"hicmae trains on clips with sound; the batch has only {', '.join(inputs)}")
        loss, metrics = self.loss_given_masks(params, inputs, self.masks(batch["example"], rng))
        return loss, Outputs(metrics, state)

    def features(self, params: Params, state: State, batch: Batch) -> dict[str, jax.Array]:
        """Of everything visible, for each modality that is there: `video`, `audio` [B, D], means over tokens and layers.

        Also `<modality>_level_<l>` [B, D], what the contrastive loss matches; with both modalities `both` [B, 4D]: these two and the mean
        fused tokens, what fine-tuning starts from; `pooled` is the one called `pool`, or what there is; `tokens` [B, L, D]. float32.
        """
        inputs = self.inputs(batch)
        encoded = {modality: self.encode(params, modality, x) for modality, x in inputs.items()}
        found: Both = {}
        for modality, levels in self.pooled_levels(encoded).items():
            found |= {f"{modality}_level_{level}": x for level, x in zip(self.levels, levels, strict=True)}
            found[modality] = jnp.stack([layer.astype(jnp.float32).mean(1) for layer in encoded[modality].layers]).mean(0)
        if set(inputs) == set(MODALITIES):
            fused = self.fuse(params, encoded["video"].tokens, encoded["audio"].tokens)
            found["both"] = jnp.concatenate([found["video"], found["audio"], fused.video.mean(1), fused.audio.mean(1)], -1)
        found["pooled"] = found.get(self.pool, found[next(iter(inputs))])
        found["tokens"] = encoded[self.pool if self.pool in encoded else next(iter(encoded))].tokens
        return {name: value.astype(jnp.float32) for name, value in found.items()}

    def raw_features(self, batch: Batch) -> dict[str, jax.Array]:
        """The baseline: the spectrogram's mean and deviation by mel bin, and the mean frame and motion at no more than 8 pixels a side."""
        inputs, parts = self.inputs(batch), []
        if "audio" in inputs:
            sound = inputs["audio"][..., 0]
            parts += [sound.mean(1), sound.std(1)]
        if "video" in inputs:
            video = inputs["video"]
            for picture in (video.mean(1), jnp.abs(jnp.diff(video, axis=1)).mean(1)):
                side = min(RAW_SIDE, picture.shape[1])
                parts.append(jax.image.resize(picture, (len(picture), side, side, picture.shape[3]), "linear").reshape(len(picture), -1))
        return {"pooled": jnp.concatenate(parts, -1)}

    def draw(self, params: Params, state: State, batch: Batch, rng: jax.Array, spec: DataSpec) -> dict[str, np.ndarray]:
        """A sheet per modality: the input, what its encoder saw, and the prediction with each hidden patch's true mean and contrast.

        Of the video the middle pair of frames' first; of the sound the whole spectrogram, time downwards.
        """
        rows = {name: value[:SHOWN] for name, value in batch.items()}
        inputs = self.inputs(rows)
        if set(inputs) != set(MODALITIES):
            return {}
        masks = self.masks(rows["example"], rng)
        named = jax.jit(self.forward)(params, inputs, masks)
        sheets = {}
        for modality in MODALITIES:
            shown = {name: np.asarray(x) for name, x in self._columns(modality, inputs[modality], masks[modality], named).items()}
            of_video = modality == "video" and self.channels in (1, 3)
            count = shown["original"].shape[-1]
            mean, std = (self.mean, self.std) if of_video else ((0.5,) * count, (0.25,) * count)
            sheets[modality] = panel_sheet(shown, mean=mean, std=std, rows=SHOWN, caption=f"{modality}, {spec.name}")
        return sheets

    def _columns(self, modality: str, inputs: jax.Array, mask: jax.Array, named: dict[str, Any]) -> Both:
        """Pictures [B, H, W, C] by title, in normalised units."""
        grid, side = self.grid(modality), self.patch(modality)
        channels = inputs.shape[-1]
        patches = tubelets(inputs, side, self.tubelet) if modality == "video" else patchify(inputs, side)
        rows = jnp.arange(len(inputs))[:, None]
        predicted = jnp.zeros(patches.shape).at[rows, named["splits"][modality].hidden].set(named["decoded"][modality].prediction)
        values = patches.reshape(*patches.shape[:2], -1, channels)
        predicted = predicted.reshape(values.shape) * values.std(-2, ddof=1, keepdims=True) + values.mean(-2, keepdims=True)
        hidden = mask[..., None] > 0
        filled = {"original": patches, "masked": jnp.where(hidden, 0, patches)}
        filled["prediction (patch's own mean/std)"] = jnp.where(hidden, predicted.reshape(patches.shape), patches)
        if modality == "audio":
            return {name: unpatchify(x, grid, side) for name, x in filled.items()}
        middle = self.slots(modality) // 2 * self.tubelet
        return {name: untubelet(x, (self.slots(modality), *grid), side, self.tubelet)[:, middle] for name, x in filled.items()}
