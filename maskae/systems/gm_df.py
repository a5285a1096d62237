"""GM-DF: "Generalized Multi-Scenario Deepfake Detection", Lai et al., ACM Multimedia 2025, arXiv 2406.20078.

One detector for several data sets. The image tower of a contrastive model gets norms and experts that depend on the data set ("domain"),
its class token is compared with a learned prompt per domain and class, and the tower has to reconstruct masked images besides. Each batch
is an episode: the experts take a gradient step on some domains, and all parameters learn from the loss after it on another domain.

The paper has no released code and its text leaves parts open. Where it does, the choices are arguments; see `GmDfArguments`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maskae.data.domains import DOMAIN, SEEN
from maskae.data.episodes import EpisodeOrder
from maskae.data.spec import DataSpec
from maskae.errors import UserError
from maskae.inner_outer import inner_step
from maskae.interop.clip_text import read_text_tower
from maskae.losses.alignment import fit_gaussian, gaussian_wasserstein
from maskae.losses.class_prompts import class_prompt_logits, domain_temperature
from maskae.losses.classification import label_smoothing_cross_entropy
from maskae.losses.reconstruction import masked_mean_squared_error, normalise_patches, patch_statistics
from maskae.masking import Mask, draw_noise, random_mask
from maskae.nn.domain_vit import Domain, second_order
from maskae.nn.patches import patchify, unpatchify
from maskae.nn.sharding import constrain
from maskae.paths import flatten_paths, unflatten_paths
from maskae.plots import draw_embedding
from maskae.systems.contract import Batch, Outputs, Params, State, Variables
from maskae.systems.gm_df_parameters import EXPERTS, GmDfParameters
from maskae.systems.teacher import RANDOM
from maskae.vectors import unit


class Part(NamedTuple):
    """Examples of an episode: `images` [B, H, W, C], `labels` int32 [B], `rows` int32 [B] of the domains' tables, `noise` [B, L]."""

    images: jax.Array
    labels: jax.Array
    rows: jax.Array
    noise: jax.Array


class Seen(NamedTuple):
    """Of the image tower: `tokens` [B, 1+L, D] after the final norm, and `vector` [B, D], the class token with second-order effects."""

    tokens: jax.Array
    vector: jax.Array


@dataclass(frozen=True)
class GmDf(GmDfParameters):
    """The method; see `GmDfArguments` for its arguments."""

    def begin(self, variables: Variables, stage: Any) -> Variables:
        """Where the training records of each domain and class lie, for `order`, and the text tower's weights.

        Raises UserError for data without domains, and where a text tower has no weights.
        """
        runs = np.asarray(stage.spec.details.get("runs", ()), np.int32)
        if runs.shape != variables.state["runs"].shape:
            found = f"{len(runs)} domains" if len(runs) else "no domains; the sources forgeries: and domains: have some"
            raise UserError(f"gm_df with domains={self.domains}: {stage.spec.name} has {found}")
        if int(runs[:, :, 1].sum()) != len(stage):
            raise UserError(f"data.max_examples: gm_df draws episodes from all {runs[:, :, 1].sum()} records, not from {len(stage)}")
        params, state = dict(variables.params), {**variables.state, "runs": runs}
        if "text" in state and self.text_weights != RANDOM:
            if not self.text_weights:
                raise UserError("the text tower has no weights: give model.text_weights CLIP's safetensors file, or take text='prototypes'")
            kernel = params["projection"]["kernel"]
            state["text"], kernel = read_text_tower(self.text_weights, state["text"], kernel, self.words)
            params["projection"] = {"kernel": kernel}
        return Variables(params, state)

    def order(self, variables: Variables, batch_size: int, seed: int) -> EpisodeOrder:
        """Every batch an episode over domains, with both classes of each."""
        return EpisodeOrder(np.asarray(variables.state["runs"]), batch_size, self.groups, seed)

    def rows(self, batch: Batch) -> jax.Array:
        """The row of each example's domain in all tables, int32 [B]: 0 for an unknown one, and for all where there is no conditioning."""
        if DOMAIN not in batch or not self.domain_conditioning:
            return jnp.zeros(len(batch["image"]), jnp.int32)
        return jnp.where(batch[SEEN] > 0, batch[DOMAIN] + 1, 0)

    def domain(self, params: Params, rows: jax.Array) -> Domain:
        """What norms and gates know of the domains `rows` int32 [B]."""
        return Domain(params["code"]["table"][rows], params["prompt"]["domain"][rows])

    def see(self, params: Params, images: jax.Array, rows: jax.Array) -> Seen:
        """Images [B, H, W, C] of the domains `rows` int32 [B]."""
        first = min(self.second_order, default=self.depth)
        encode: Any = partial(self.encoder.apply, {"params": params["encoder"]})
        tokens, tail = encode(images, self.domain(params, rows), first, method="represent")
        vector = tokens[:, 0].astype(jnp.float32)  # [B, D]
        for number, layer in enumerate(self.second_order):
            normed: Any = self.second_norm.apply(
                {"params": params["second_order"][f"norm_{layer}"]}, second_order(tail, layer, params["encoder"])
            )
            vector = vector + params["second_order"]["scale"][number] * normed
        return Seen(tokens, vector)

    def embedding(self, params: Params, seen: Seen) -> jax.Array:
        """What prompts are compared with and domains aligned by: the projection, of length 1; float32 [B, E]."""
        return unit(seen.vector @ params["projection"]["kernel"])

    def class_prompts(self, params: Params, state: State) -> jax.Array:
        """The prompt of each domain row and class in the shared space, float32 [R, K, E]."""
        if self.text == "prototypes":
            return params["prompt"]["prototypes"]
        text = jax.lax.stop_gradient(state["text"])
        tables = {name: params["prompt"][name] for name in ("domain", "class")}
        sentences: Any = self.prompts.apply({"params": tables}, text["words"], self.place)  # [R * K, L, D]
        tower = {name: value for name, value in text.items() if name != "words"}
        encoded: Any = self.tower.apply({"params": tower}, sentences)
        return encoded.reshape(self.domains + 1, self.num_classes, self.embedding_width)

    def logits(self, params: Params, state: State, seen: Seen, rows: jax.Array) -> jax.Array:
        """Of real and fake, float32 [B, 2]."""
        if self.classification == "bce":
            fake = seen.vector @ params["head"]["kernel"] + params["head"]["bias"]  # [B, 1]
            return jnp.concatenate([jnp.zeros_like(fake), fake], -1)
        temperature = domain_temperature(params["prompt"]["domain"], self.temperature, self.temperature_slope)
        return class_prompt_logits(self.embedding(params, seen), self.class_prompts(params, state)[rows], temperature[rows])

    def mask(self, noise: jax.Array) -> Mask:
        """The masked patches of noise [B, L]."""
        return random_mask(noise, self.kept(noise.shape[1]))

    def predict(self, params: Params, images: jax.Array, rows: jax.Array, mask: jax.Array) -> jax.Array:
        """All patches, float32 [B, L, p*p*C], from the image whose patches with `mask` [B, L] = 1 the tower does not see."""
        encode: Any = partial(self.encoder.apply, {"params": params["encoder"]})
        tokens = encode(images, mask, params["mask_token"], method="embed_masked")
        latent, _ = encode(tokens, self.domain(params, rows), self.depth, method="look")  # [B, 1+L, D]
        grid = self.grid_of(images)
        # All tokens are there, in raster order: nothing is put in by the decoder.
        places = jnp.broadcast_to(jnp.arange(grid[0] * grid[1]), mask.shape)
        decode: Any = self.decoder.apply
        return decode({"params": params["decoder"]}, latent, places, grid).astype(jnp.float32)

    def reconstruction(self, params: Params, part: Part) -> jax.Array:
        """Squared error on masked patches, each normalised by its own mean and deviation; 0 where it has no weight."""
        if not self.reconstruction_weight:
            return jnp.zeros(())
        mask = self.mask(part.noise).mask
        target = normalise_patches(patchify(part.images.astype(jnp.float32), self.patch_size))
        return masked_mean_squared_error(self.predict(params, part.images, part.rows, mask), target, mask)

    def classification_loss(self, params: Params, state: State, part: Part) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Cross-entropy of a part; with the embeddings [B, E] and the logits [B, 2]."""
        seen = self.see(params, part.images, part.rows)
        logits = self.logits(params, state, seen, part.rows)
        loss = label_smoothing_cross_entropy(logits, part.labels, 0.0)
        return loss, {"embedding": self.embedding(params, seen), "logits": logits}

    def parts(self, batch: Batch, rng: jax.Array) -> tuple[Part, Part | None]:
        """The meta-train and the meta-test part of a batch whose rows go round the episode's domains (`EpisodeOrder`)."""
        if DOMAIN not in batch:
            raise UserError("gm_df needs the fields domain and seen; the sources forgeries: and domains: have them")
        if len(batch[DOMAIN]) % self.groups:
            raise UserError(f"a batch of {len(batch[DOMAIN])} is not made of episodes of {self.groups} domains")
        hide_key, mask_key = jax.random.split(rng)
        rows, example = self.rows(batch), batch["example"]
        if self.hide_domain:
            rows = jnp.where(draw_noise(hide_key, example, 1)[:, 0] < self.hide_domain, 0, rows)
        whole = Part(batch["image"], batch["label"], rows, draw_noise(mask_key, example, self.length))

        def cut(x: jax.Array, first: int, last: int) -> jax.Array:
            return constrain(x.reshape(-1, self.groups, *x.shape[1:])[:, first:last].reshape(-1, *x.shape[1:]), "batch")  # [B n / G, ...]

        train: Part = jax.tree.map(lambda x: cut(x, 0, self.train_domains), whole)
        if not self.test_domains:
            return train, None
        test: Part = jax.tree.map(lambda x: cut(x, self.train_domains, self.groups), whole)
        return train, test._replace(rows=jnp.zeros_like(test.rows)) if self.hide_meta_test else test

    def loss(self, params: Params, state: State, batch: Batch, rng: jax.Array, step: jax.Array) -> tuple[jax.Array, Outputs]:
        """Classification and reconstruction of the meta-train part, and of the meta-test part after the experts' step; alignment of both.

        `gradient_norm_inner` is the length of the inner gradient, `accuracy` that of the batch.
        """
        train, test = self.parts(batch, rng)
        everything = self.whole(params, state)
        flat = flatten_paths(everything)
        inner = {path: leaf for path, leaf in flat.items() if EXPERTS in path}

        def with_experts(experts: dict[str, jax.Array]) -> Params:
            return unflatten_paths(flat | experts)

        def objective(experts: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
            return self.classification_loss(with_experts(experts), state, train)

        adapted = inner_step(objective, inner, self.inner_rate if self.adapts else 0.0, first_order=self.first_order)
        reconstruction = self.reconstruction(everything, train)
        right = [(adapted.rest["logits"].argmax(-1) == train.labels).mean()]
        metrics = {"classification_loss": adapted.value, "gradient_norm_inner": adapted.gradient_norm}
        loss = adapted.value
        if test is not None:
            moved = with_experts(adapted.params)
            metrics["meta_test_loss"], seen = self.classification_loss(moved, state, test)
            reconstruction = reconstruction + self.reconstruction(moved, test)
            loss = loss + metrics["meta_test_loss"]
            right.append((seen["logits"].argmax(-1) == test.labels).mean())
            if self.alignment_weight and self.alignment != "none":
                of_train, of_test = (fit_gaussian(each["embedding"], self.shrinkage) for each in (adapted.rest, seen))
                metrics["alignment_loss"] = gaussian_wasserstein(of_train, of_test, self.alignment)
                loss = loss + self.alignment_weight * metrics["alignment_loss"]
        if self.reconstruction_weight:
            metrics["reconstruction_loss"] = reconstruction
            loss = loss + self.reconstruction_weight * reconstruction
        return loss, Outputs({**metrics, "accuracy": jnp.stack(right).mean()}, state)

    def features(self, params: Params, state: State, batch: Batch) -> dict[str, jax.Array]:
        """`pooled` [B, E], the normalised embedding; `logits` [B, 2]; `cls` [B, D] and `tokens` [B, L, D] of the image tower; float32."""
        params, rows = self.whole(params, state), self.rows(batch)
        seen = self.see(params, batch["image"], rows)
        tokens = seen.tokens.astype(jnp.float32)
        found = {"pooled": self.embedding(params, seen), "logits": self.logits(params, state, seen, rows)}
        return found | {"cls": tokens[:, 0], "tokens": tokens[:, 1:]}

    def reconstruct(self, params: Params, state: State, batch: Batch, rng: jax.Array) -> dict[str, jax.Array]:
        """Panels [B, H, W, C] in normalised units; what the tower saw shows its own pixels. None where nothing is reconstructed."""
        images = batch["image"].astype(jnp.float32)
        patches = patchify(images, self.patch_size)
        mask = self.mask(draw_noise(rng, batch["example"], patches.shape[1])).mask
        hidden = {"masked": jnp.zeros_like(patches)}
        if self.reconstruction_weight:
            mean, deviation = patch_statistics(patches)
            prediction = self.predict(self.whole(params, state), images, self.rows(batch), mask)
            hidden["prediction_with_patch_statistics"] = prediction * deviation + mean
        grid = self.grid_of(images)
        shown = {name: unpatchify(jnp.where(mask[..., None] > 0, x, patches), grid, self.patch_size) for name, x in hidden.items()}
        return {"original": images, **shown}

    def draw(self, params: Params, state: State, batch: Batch, rng: jax.Array, spec: DataSpec) -> dict[str, np.ndarray]:
        """A map of the embeddings, coloured by domain and class."""
        if DOMAIN not in batch:
            return {}
        counted = np.asarray(batch.get("valid", np.ones(len(batch["label"]), bool)))
        found = np.asarray(jax.jit(self.features)(params, state, batch)["pooled"])[counted]
        groups = np.asarray(batch[DOMAIN] * 2 + batch["label"])[counted]
        names = [f"{domain}, {kind}" for domain in spec.details.get("domains", map(str, range(self.domains))) for kind in ("real", "fake")]
        return {"domains": draw_embedding(found, groups, title=f"embeddings of {spec.name}", names=names)}
