"""Vec2Face: "Scaling Face Dataset Generation with Loosely Constrained Vectors", Wu et al., ICLR 2025, arXiv 2409.02979.

A frozen network gives each image an identity vector. The vector is spread into the rows of a feature map, rows are masked, and a masked
autoencoder with an image decoder paints the face again. What is painted must be near in pixels, to a perceptual network, in structure and
in identity, and late in training it must pass a patch discriminator. Afterwards any vector near those of real faces makes a face, and
gradient steps on the vector change its attributes.

The networks see images in -1..1; batches hold them in 0..1, data.statistics="unit".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from maskae.data.spec import DataSpec
from maskae.errors import UserError, check_choice
from maskae.identity_vectors import descend, vary
from maskae.keys import purpose_key
from maskae.losses.adversarial import discriminator_loss
from maskae.losses.attributes import ATTRIBUTES, cosine, edit_error
from maskae.losses.denoising import standard_noise
from maskae.losses.perceptual import map_distance, structural_similarity, vgg_input
from maskae.masking import draw_noise
from maskae.nn.batch_norm import STATISTICS
from maskae.nn.dropout_block import Dropout
from maskae.nn.row_mask import MaskRate, RowMask, mask_rows
from maskae.nn.vector_autoencoder import Painted, init_generator
from maskae.panels import panel_sheet
from maskae.systems.contract import Batch, Outputs, Params, State, Variables
from maskae.systems.vec2face_arguments import Vec2FaceArguments, in_units, signed

STAGE, RANDOM = "stage:", "random"
SHOWN = 6
SMALL_SIDE = 16
EDITS = (("slant", -0.3), ("slant", 0.3), ("brightness", -0.15), ("brightness", 0.15), ("quality", 3.0))


class Critique(NamedTuple):
    """Logit maps [B, h, w, 1], at least float32, of the real images, of the painted ones, and of the latter as the generator sees them."""

    real: jax.Array
    fake: jax.Array
    painted: jax.Array


@dataclass(frozen=True)
class Vec2Face(Vec2FaceArguments):
    """The method; see `Vec2FaceArguments` for its arguments. `optimizer.groups` gives the discriminator an optimizer of its own."""

    def init(self, rng: jax.Array, batch: Batch) -> Variables:
        """Untrained networks; `begin` replaces the frozen ones."""
        keys = [purpose_key(rng, name) for name in ("generator", "discriminator", "face", "vgg", "weights")]
        image = jnp.zeros((1, self.image_size, self.image_size, self.channels))
        params = {"generator": init_generator(self.generator, keys[0], self.features_width)}
        params["discriminator"] = dict(self.discriminator.init(keys[1], image)["params"])
        face = self.face().init(keys[2], image)
        state: State = {"face": {"params": face["params"], "statistics": face[STATISTICS]}}
        if self.perceptual == "vgg":
            maps = self.vgg.init(keys[3], vgg_input(image))["params"]
            weights = {f"stage{i}": jax.random.uniform(keys[4], (width,)) for i, width in enumerate(self.vgg_widths)}
            state["perceptual"] = {"vgg": maps, "weights": weights}
        return Variables(params, state)

    def begin(self, variables: Variables, stage: Any) -> Variables:
        """The frozen networks from an earlier stage or from files. Raises UserError where weights are absent or do not fit."""
        from maskae.interop.vec2face import read_face, read_perceptual

        state = dict(variables.state)
        if self.face_weights.startswith(STAGE):
            system, earlier = stage.earlier(self.face_weights.removeprefix(STAGE))
            if "face" not in earlier.params:
                raise UserError(f"{self.face_weights} has no identity network; it has {', '.join(sorted(earlier.params))}")
            state["face"] = {"params": earlier.params["face"], "statistics": earlier.state["face"]}
        elif self.face_weights == RANDOM:
            logging.warning("the identity network's weights are random")
        elif self.face_weights:
            state["face"] = read_face(self.face_weights, state["face"])
        else:
            raise UserError("no identity network: give model.face_weights a safetensors file, or 'stage:NAME' of an identity_encoder")
        if self.perceptual == "vgg" and self.perceptual_weights != RANDOM:
            if not self.perceptual_weights:
                raise UserError("perceptual='vgg' needs model.perceptual_weights, a safetensors file; 'identity' needs none")
            state["perceptual"] = read_perceptual(self.perceptual_weights, state["perceptual"])
        return Variables(variables.params, state)

    def recognise(self, state: State, images: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """Identity vectors [B, D] of images [B, H, W, C], and the maps on the way; gradients flow into the images alone."""
        frozen = jax.lax.stop_gradient(state["face"])
        found: Any = self.face().apply({"params": frozen["params"], STATISTICS: frozen["statistics"]}, images)
        return found

    def row_mask(self, law: MaskRate, example: jax.Array, key: jax.Array) -> RowMask:
        """The rows of each example's feature map that are masked, a share of them drawn from the law."""
        noise = draw_noise(purpose_key(key, "rows"), example, self.row_count)
        return mask_rows(noise, law.dropped(self.row_count), jnp.ceil(self.row_count * law.draw(purpose_key(key, "rate"))))

    def paint(self, params: Params, vectors: jax.Array, mask: RowMask, dropout: Dropout | None = None) -> Painted:
        """Vectors [B, D] -> images."""
        painted: Any = self.generator.apply({"params": params["generator"]}, vectors, mask, dropout)
        return painted

    def generate(self, params: Params, vectors: jax.Array, example: jax.Array, key: jax.Array) -> jax.Array:
        """Images [B, H, W, C] of vectors [B, D]: a few rows are masked here too, so that it depends on `key`."""
        return self.paint(params, vectors, self.row_mask(self.generation_law, example, key)).image

    def distance(self, state: State, painted: jax.Array, real: jax.Array) -> jax.Array:
        """The perceptual distance of each pair of images, [B]."""
        if self.perceptual == "none":
            return jnp.zeros(len(real))
        if self.perceptual == "identity":
            own, other = (self.recognise(state, images)[1] for images in (painted, real))
            return map_distance(own, other)
        frozen = jax.lax.stop_gradient(state["perceptual"])
        maps: list[Any] = [self.vgg.apply({"params": frozen["vgg"]}, vgg_input(images)) for images in (painted, real)]
        return map_distance(maps[0], maps[1], [frozen["weights"][f"stage{i}"] for i in range(len(self.vgg_widths))])

    def terms(self, state: State, painted: Painted, vectors: jax.Array, real: jax.Array) -> dict[str, jax.Array]:
        """The generator's unweighted losses but for the adversarial one; scalars, at least float32."""
        image, rows = painted.image, jax.lax.stop_gradient(painted.rows)
        return {
            "pixel": jnp.square(image - real).mean(),
            "perceptual": self.distance(state, image, real).mean(),
            "structural": 1 - structural_similarity(in_units(image), in_units(real)),
            "identity": (1 - cosine(vectors, self.recognise(state, image)[0])).mean(),
            "token": jnp.square(painted.logits[:, 1:] - rows[:, 1:]).mean(),
        }

    def criticise(self, params: Params, painted: jax.Array, real: jax.Array) -> Critique:
        """The discriminator's logits. Its own loss does not move the generator, nor the generator's loss the discriminator."""
        own = params["discriminator"]
        frozen = jax.lax.stop_gradient(own) if self.stop_at_discriminator else own
        look: Any = self.discriminator.apply
        fake = look({"params": own}, jax.lax.stop_gradient(painted))
        return Critique(look({"params": own}, real), fake, look({"params": frozen}, painted))

    def weighted(self, terms: dict[str, jax.Array]) -> jax.Array:
        """The generator's loss without the adversarial term."""
        seen = self.perceptual_weight * terms["perceptual"] + self.structural_weight * terms["structural"]
        return terms["pixel"] + seen + terms["identity"] + terms["token"]

    def loss_of(
        self, params: Params, state: State, real: jax.Array, vectors: jax.Array, mask: RowMask, dropout: Dropout | None, active: Any
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Both networks' losses in one sum, of which each gets its own gradient; the adversarial parts count where `active` is 1, not 0."""
        painted = self.paint(params, vectors, mask, dropout)
        terms = self.terms(state, painted, vectors, real)
        logits = self.criticise(params, painted.image, real)
        generator = self.weighted(terms) - active * logits.painted.mean()
        critic = active * discriminator_loss(logits.real, logits.fake, self.discriminator_loss)
        spread = painted.rows[:, 1:].var(1).mean()  # constant rows would solve the token loss alone
        metrics = {f"{name}_loss": value for name, value in terms.items()} | {"generator_loss": generator, "discriminator_loss": critic}
        return generator + critic, metrics | {"row_variance": spread}

    def vectors_of(self, state: State, batch: Batch) -> jax.Array:
        """The batch's own `vector` [B, D] where the data stores them, else the identity network's."""
        found = batch["vector"].astype(jnp.float32) if "vector" in batch else self.recognise(state, signed(batch["image"]))[0]
        return jax.lax.stop_gradient(found)

    def loss(self, params: Params, state: State, batch: Batch, rng: jax.Array, step: jax.Array) -> tuple[jax.Array, Outputs]:
        """The losses above; one mask rate for the batch, positions per example."""
        real, mask = signed(batch["image"]), self.row_mask(self.training_law, batch["example"], rng)
        dropout = Dropout(self.dropout, purpose_key(rng, "dropout"), batch["example"])
        active = (step >= self.adversarial_start).astype(jnp.float32)
        loss, metrics = self.loss_of(params, state, real, self.vectors_of(state, batch), mask, dropout, active)
        return loss, Outputs(metrics, state)

    def varied(self, params: Params, state: State, vectors: jax.Array, example: jax.Array, key: jax.Array) -> jax.Array:
        """How much of the identity stays: cosines [B, variations] of images of a vector and of its neighbours, to the identity network."""
        first = self.recognise(state, self.generate(params, vectors, example, key))[0]
        normal = standard_noise(purpose_key(key, "variation"), example, vectors.shape[1:])

        def kept(deviation: jax.Array) -> jax.Array:
            images = self.generate(params, vary(vectors, deviation * normal), example, key)
            return cosine(first, self.recognise(state, images)[0])

        return jax.lax.map(kept, jnp.asarray(self.variations)).T

    def features(self, params: Params, state: State, batch: Batch) -> dict[str, jax.Array]:
        """`pooled` [B, D] the image's vector, `generated` [B, D] that of the image painted from it, `kept` [B, variations] of `varied`,
        and both images at no more than 16 pixels, `pixels` and `generated_pixels` [B, ...] in 0..1. float32; the key is always the same.
        """
        key, vectors, example = jax.random.key(0), self.vectors_of(state, batch), batch["index"]
        painted = self.generate(params, vectors, example, key)
        shape = (len(vectors), *2 * (min(SMALL_SIDE, self.image_size),), self.channels)
        small = [jax.image.resize(x, shape, "linear").reshape(len(x), -1) for x in (batch["image"], in_units(painted))]
        found = {"pooled": vectors, "generated": self.recognise(state, painted)[0]}
        found |= {"pixels": small[0], "generated_pixels": jnp.clip(small[1], 0, 1)}
        return found | {"kept": self.varied(params, state, vectors, example, key)}

    def reconstruct(self, params: Params, state: State, batch: Batch, rng: jax.Array) -> dict[str, jax.Array]:
        """The image and what is painted from its vector alone."""
        painted = self.generate(params, self.vectors_of(state, batch), batch["example"], rng)
        return {"original": batch["image"].astype(jnp.float32), "prediction": in_units(painted)}

    def edit(
        self, params: Params, state: State, vectors: jax.Array, goals: dict[str, jax.Array], key: jax.Array, steps: int = 30
    ) -> jax.Array:
        """Vectors [B, D] moved until the painted images have the attributes `goals`, the paper's AttrOP with its number of steps capped.

        Adam of rate 0.1 on the vector, down `edit_error` of goals [B]. Raises UserError for an attribute that there is none of.
        """
        for name in goals:
            check_choice("attribute", name, ATTRIBUTES)

        def loss(moved: jax.Array) -> jax.Array:
            images = self.generate(params, moved, jnp.arange(len(vectors)), key)
            return edit_error(images, self.recognise(state, images)[0], vectors, goals).sum()

        return descend(loss, vectors, steps)

    def draw(self, params: Params, state: State, batch: Batch, rng: jax.Array, spec: DataSpec) -> dict[str, np.ndarray]:
        """Attribute edits of generated images, and variations of their vectors with more and more noise."""
        rows = {name: value[:SHOWN] for name, value in batch.items()}
        vectors, example, paint = self.vectors_of(state, rows), rows["example"], jax.jit(self.generate)
        first = paint(params, vectors, example, rng)
        edits, edit = {"original": signed(rows["image"]), "generated": first}, jax.jit(self.edit)
        for name, change in EDITS:
            goal = ATTRIBUTES[name](first, vectors) + change
            moved = edit(params, state, vectors, {name: goal}, rng)
            edits[f"{name} {change:+}"] = paint(params, moved, example, rng)
        normal = jax.random.normal(purpose_key(rng, "variation"), vectors.shape)
        variations = {f"noise {s}": paint(params, vary(vectors, s * normal), example, rng) for s in self.variations}
        half = (0.5,) * self.channels
        sheets = {"attributes": edits, "variations": {"generated": first, **variations}}
        return {
            name: panel_sheet({key: np.asarray(x) for key, x in columns.items()}, mean=half, std=half, rows=SHOWN, caption=spec.name)
            for name, columns in sheets.items()
        }

    def forward_flops(self, batch: Batch) -> float:
        """Generator, identity network on the painted and on the real image, perceptual network on both, discriminator three times."""
        side, frozen = self.image_size, self._frozen_flops
        own = self.generator.flops(self.features_width, self.training_law.dropped(self.row_count))
        return own + 2 * frozen + 3 * self.discriminator.flops(side, self.channels)

    def train_flops(self, batch: Batch) -> float:
        """Frozen networks: two forward passes and the gradient of one input."""
        return 3 * (self.forward_flops(batch) - 2 * self._frozen_flops) + 3 * self._frozen_flops

    @property
    def _frozen_flops(self) -> float:
        perceptual = self.vgg.flops(self.image_size) if self.perceptual == "vgg" else 0.0
        return self.face().flops(self.image_size, self.channels) + perceptual
