"""GM-DF's parameters: how they start, what is frozen, and how a pretrained tower comes in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from maskae.nn.domain_vit import Domain
from maskae.nn.layers import xavier
from maskae.nn.prompts import PROMPT_STD
from maskae.nn.transfer import adopt_encoder
from maskae.paths import flatten_paths, unflatten_paths
from maskae.systems.contract import Batch, Params, State, Variables
from maskae.systems.gm_df_arguments import GmDfArguments

EXPERTS = "/experts/"
MAPS = "_map"
TRAINED_ANYWAY = (EXPERTS, "/norm", MAPS)


@dataclass(frozen=True)
class GmDfParameters(GmDfArguments):
    """From arguments to parameters; see `GmDfArguments`."""

    def init(self, rng: jax.Array, batch: Batch) -> Variables:
        """Fresh parameters; the batch is not read. `state` has the training records of each domain and class, which `begin` fills."""
        keys = dict(zip(("encoder", "code", "prompt", "head", "decoder", "text", "words"), jax.random.split(rng, 7), strict=True))
        words, scale = jax.random.split(keys["prompt"]), PROMPT_STD
        table = scale * jax.random.normal(keys["code"], (self.domains + 1, self.code_width))
        fixed = jnp.zeros((len(self.words), self.text_width))
        params: Params = {
            "encoder": self.fresh_tower(keys["encoder"]),
            "code": {"table": table},
            "prompt": dict(self.prompts.init(words[0], fixed, self.place)["params"]),
            "projection": {"kernel": self.width**-0.5 * jax.random.normal(keys["head"], (self.width, self.embedding_width))},
        }
        if self.classification == "bce":
            params["head"] = {"kernel": xavier(keys["head"], (self.width, 1)), "bias": jnp.zeros(1)}
        if self.second_order:
            norm = {"scale": jnp.ones(self.width), "bias": jnp.zeros(self.width)}
            params["second_order"] = {f"norm_{layer}": dict(norm) for layer in self.second_order}
            params["second_order"]["scale"] = jnp.full(len(self.second_order), 0.1)
        if self.reconstruction_weight:
            noise = jnp.arange(self.length)[None]
            latent = jnp.zeros((1, self.length + 1, self.width))
            params["decoder"] = dict(self.decoder.init(keys["decoder"], latent, noise, self.grid)["params"])
            params["mask_token"] = scale * jax.random.normal(keys["decoder"], (1, 1, self.width))
        state: State = {"runs": jnp.zeros((self.domains, self.num_classes, 2), jnp.int32)}
        if self.classification == "prompt" and self.text == "prototypes":
            params["prompt"]["prototypes"] = self.fresh_prototypes(words[1])
        elif self.classification == "prompt":
            blank = jnp.zeros((1, len(self.words) + 2, self.text_width))
            text = self.tower.init(keys["text"], blank)["params"]
            state["text"] = {**text, "words": scale * jax.random.normal(keys["words"], fixed.shape)}
        return self.parted(Variables(params, state))

    def fresh_tower(self, key: jax.Array) -> Params:
        """The image tower."""
        blank = Domain(jnp.zeros((1, self.code_width)), jnp.zeros((1, self.text_width)))
        made: Params = dict(self.encoder.init(key, self.blank_images(), blank, self.depth, method="represent")["params"])
        if self.architecture == "clip":
            # CLIP's patch projection has no bias, and a file of it cannot replace one.
            made["patch_embed"] = {**made["patch_embed"], "bias": jnp.zeros(self.width)}
        return made

    def fresh_prototypes(self, key: jax.Array) -> jax.Array:
        """A vector per domain and class, [domains + 1, classes, E].

        Close together, as the prompts "a real face" and "a fake face" of a text tower are: random ones, at a temperature of 0.07, would
        start with a loss of several times ln 2, and training first forgets what the image tower knows.
        """
        common, own = jax.random.split(key)
        apart = jax.random.normal(own, (self.domains + 1, self.num_classes, self.embedding_width))
        return PROMPT_STD * (jax.random.normal(common, (self.embedding_width,)) + 0.1 * apart)

    def parted(self, variables: Variables) -> Variables:
        """With what `train_vision` False freezes in `state`, out of reach of the optimizer's decay."""
        if self.train_vision:
            return variables
        leaves = flatten_paths(variables.params["encoder"])
        frozen = {path: leaf for path, leaf in leaves.items() if not is_trained_anyway(path)}
        params = {**variables.params, "encoder": unflatten_paths({p: leaf for p, leaf in leaves.items() if p not in frozen})}
        return Variables(params, {**variables.state, "encoder": unflatten_paths(frozen)})

    def whole(self, params: Params, state: State) -> Params:
        """The parameters, frozen ones among them."""
        if "encoder" not in state:
            return params
        frozen = jax.lax.stop_gradient(state["encoder"])
        return {**params, "encoder": unflatten_paths(flatten_paths(params["encoder"]) | flatten_paths(frozen))}

    def with_encoder(self, variables: Variables, encoder: Mapping[str, Any], grid: tuple[int, int] | None) -> Variables:
        """With a pretrained tower's weights; experts and the maps of the norms, which it has not, stay as they are."""
        leaves = flatten_paths(self.whole(*variables)["encoder"])
        own = {path: leaf for path, leaf in leaves.items() if EXPERTS not in path and not path.endswith(MAPS)}
        adopted, _ = adopt_encoder(unflatten_paths(own), dict(encoder), self.grid, grid)
        merged = unflatten_paths(leaves | flatten_paths(adopted))
        state = {name: value for name, value in variables.state.items() if name != "encoder"}
        return self.parted(Variables({**variables.params, "encoder": merged}, state))


def is_trained_anyway(path: str) -> bool:
    """Whether an encoder's parameter is trained also where the tower is frozen: experts, and everything of the norms."""
    return any(part in f"/{path}" for part in TRAINED_ANYWAY)
