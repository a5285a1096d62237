"""Regularised autoencoders as score estimators (Alain and Bengio, "What Regularized Auto-Encoders Learn from the Data-Generating
Distribution", ICLR 2013 and JMLR 15, 2014).

A map r of vectors to vectors, trained to remove Gaussian noise or to keep its Jacobian small, learns `(r(x) - x) / sigma^2`, near the
gradient of log p(x). From that come differences of log density, and samples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from maskae.errors import UserError, nearest
from maskae.losses.denoising import annealed_noise, asymmetry, contractive_error, denoising_error, jacobian, standard_noise
from maskae.nn.flops import linear_flops
from maskae.nn.graph_layers import ACTIVATIONS
from maskae.nn.mlp import Mlp, mlp_flops
from maskae.nn.score import langevin, line_integral, metropolis, path_ratio, walk_draws
from maskae.systems.contract import Batch, Outputs, Params, State, Variables

FORMS = ("plain", "residual", "tied")
CRITERIA = ("denoising", "contractive")
LARGEST_EXACT = 64  # dimensions up to which the whole Jacobian is computed
LANGEVIN_STEP = 0.5  # of sigma^2, the least variance that the chain's target can have


@dataclass(frozen=True)
class RegularizedAe:
    """Arguments. A record is one vector: whatever its field holds, flattened.

    Args:
        hidden: widths of the hidden layers; one where `form` is "tied".
        form: "plain" r(x) = MLP(x), "residual" r(x) = x + sigma^2 MLP(x), whose MLP is the score itself, or "tied"
            r(x) = W^T sigmoid(W x + b) + c, which is the gradient of a closed-form energy.
        criterion: "denoising", or "contractive" with the Jacobian of all of r.
        field: of the records, such as "x" or "image".
        activation: between the MLP's layers.
        sigma: standard deviation of the noise at the end; the contractive weight lambda is its square.
        sigma_start: of the noise at the start, falling geometrically; 0 keeps `sigma`.
        anneal_steps: train steps until `sigma` is reached.
        contraction: lambda; 0 takes sigma^2. Other values give the score times lambda.
        probes: random directions per record that estimate the Jacobian's norm; 0 computes it exactly, in up to 64 dimensions.
        path_points: of the midpoint rule along a line.
        chains: random walks that are pictured, from validation records.
        chain_steps: of each.
        proposal: width of the Metropolis-Hastings proposal.

    Raises:
        UserError: for an unknown name or a number out of its range.
    """

    hidden: tuple[int, ...] = (1000,)
    form: str = "plain"
    criterion: str = "denoising"
    field: str = "x"
    activation: str = "tanh"
    sigma: float = 0.1
    sigma_start: float = 0.0
    anneal_steps: int = 0
    contraction: float = 0.0
    probes: int = 0
    path_points: int = 20
    chains: int = 256
    chain_steps: int = 500
    proposal: float = 0.1

    def __post_init__(self) -> None:
        """Refuse what cannot work before anything is built."""
        object.__setattr__(self, "hidden", tuple(self.hidden))
        for key, known in (("form", FORMS), ("criterion", CRITERIA), ("activation", ACTIVATIONS)):
            if (value := getattr(self, key)) not in known:
                raise UserError(f"{key}={value}: unknown{nearest(value, known)}; there are {', '.join(known)}")
        if not self.hidden or min(self.hidden) < 1 or (self.form == "tied" and len(self.hidden) > 1):
            raise UserError(f"hidden={self.hidden}: widths must be at least 1, and form='tied' has one layer")
        if self.activation == "prelu":
            raise UserError("activation=prelu: a learned slope has a kink; the theorems want a smooth map, such as tanh")
        for name in ("sigma", "proposal", "path_points", "chains", "chain_steps"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name}={getattr(self, name)}: it must be positive")
        for name in ("sigma_start", "anneal_steps", "contraction", "probes"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}={getattr(self, name)}: it must not be negative")

    @property
    def variance(self) -> float:
        """What r(x) - x has to be divided by: lambda where it was chosen apart, else sigma^2."""
        return self.contraction if self.criterion == "contractive" and self.contraction else self.sigma**2

    def inputs(self, batch: Batch) -> jax.Array:
        """Records as vectors, float32 [B, d]. Raises UserError where they lack the field."""
        if self.field not in batch:
            raise UserError(f"the records have no field '{self.field}'{nearest(self.field, batch)}; there are {', '.join(sorted(batch))}")
        return batch[self.field].reshape(batch[self.field].shape[0], -1).astype(jnp.float32)

    def init(self, rng: jax.Array, batch: Batch) -> Variables:
        """Kernels that keep the variance, biases 0; the residual form starts as the identity."""
        dimensions = self.inputs(batch).shape[-1]
        draw = jax.nn.initializers.lecun_normal()
        if self.form == "tied":
            kernel = draw(rng, (dimensions, self.hidden[0]))
            return Variables({"kernel": kernel, "hidden": {"bias": jnp.zeros(self.hidden)}, "output": {"bias": jnp.zeros(dimensions)}}, {})
        widths, network = (dimensions, *self.hidden, dimensions), {}
        for number, shape in enumerate(zip(widths, widths[1:], strict=False)):
            is_zero = self.form == "residual" and number == len(self.hidden)
            kernel = jnp.zeros(shape) if is_zero else draw(jax.random.fold_in(rng, number), shape)
            network[f"layer_{number}"] = {"kernel": kernel, "bias": jnp.zeros(shape[1])}
        return Variables({"network": network}, {})

    def layers(self, params: Params, x: jax.Array) -> list[jax.Array]:
        """The outputs of every layer for x [..., d]; the last one is that of the map inside of r."""
        if self.form == "tied":
            hidden = jax.nn.sigmoid(x @ params["kernel"] + params["hidden"]["bias"])
            return [hidden, hidden @ params["kernel"].T + params["output"]["bias"]]
        layers: Any = Mlp((*self.hidden, x.shape[-1]), self.activation).apply({"params": params["network"]}, x, True)
        return layers

    def displacement(self, params: Params, x: jax.Array, sigma: jax.Array | float | None = None) -> jax.Array:
        """r(x) - x of x [..., d]; the residual form has it without the rounding of a difference. `sigma` None is the final one."""
        output = self.layers(params, x)[-1]
        if self.form != "residual":
            return output - x
        return (self.variance if sigma is None else sigma**2) * output

    def reconstruct_vectors(self, params: Params, x: jax.Array, sigma: jax.Array | float | None = None) -> jax.Array:
        """r(x) of x [..., d]."""
        return x + self.displacement(params, x, sigma) if self.form == "residual" else self.layers(params, x)[-1]

    def score(self, params: Params, x: jax.Array) -> jax.Array:
        """(r(x) - x) / sigma^2, the estimated gradient of log p, of x [..., d]."""
        return self.layers(params, x)[-1] if self.form == "residual" else self.displacement(params, x) / self.variance

    def energy(self, params: Params, x: jax.Array) -> jax.Array:
        """sum softplus(W x + b) + c.x - |x|^2 / 2 of x [..., d]: r(x) - x is its gradient, and over sigma^2 it is log p + constant.

        Raises UserError where the map is not tied: it need not be any function's gradient.
        """
        if self.form != "tied":
            raise UserError(f"form={self.form} has no energy; form=tied has")
        raised = jax.nn.softplus(x @ params["kernel"] + params["hidden"]["bias"]).sum(-1)
        return raised + x @ params["output"]["bias"] - 0.5 * jnp.square(x).sum(-1)

    def loss(self, params: Params, state: State, batch: Batch, rng: jax.Array, step: jax.Array) -> tuple[jax.Array, Outputs]:
        """Squares summed over dimensions, mean over records. Raises UserError where the exact Jacobian would be too large."""
        x = self.inputs(batch)
        start = self.sigma_start or self.sigma
        sigma = annealed_noise(step, start, self.sigma, self.anneal_steps)

        def reconstruct(rows: jax.Array) -> jax.Array:
            return self.reconstruct_vectors(params, rows, sigma)

        if self.criterion == "denoising":
            noise = sigma * standard_noise(rng, batch["example"], x.shape[1:])
            errors = denoising_error(reconstruct, x, noise)
        else:
            errors = contractive_error(reconstruct, x, self.contraction or sigma**2, self.directions(rng, batch["example"], x.shape[-1]))
        return errors.mean(), Outputs({"sigma": sigma, "error_over_noise": errors.mean() / (x.shape[-1] * sigma**2)}, state)

    def directions(self, rng: jax.Array, example: jax.Array, dimensions: int) -> jax.Array | None:
        """Probes [P, B, d] of +-1 for the Jacobian's norm; None for the exact one."""
        if not self.probes:
            if dimensions > LARGEST_EXACT:
                raise UserError(f"the exact Jacobian of {dimensions} dimensions takes as many passes; set probes=1 or more")
            return None
        draw = jax.vmap(lambda i: jax.random.rademacher(jax.random.fold_in(rng, i), (self.probes, dimensions), jnp.float32))
        return jnp.swapaxes(draw(example), 0, 1)

    def features(self, params: Params, state: State, batch: Batch) -> dict[str, jax.Array]:
        """`pooled` is the last hidden layer. The others are what evaluators of score fields read, see `maskae.evaluate.score_field`."""
        x = self.inputs(batch)
        noise = self.sigma * standard_noise(jax.random.key(0), batch["index"], x.shape[1:])
        shuffled = x[:, jax.random.permutation(jax.random.key(1), x.shape[1])]
        gain = line_integral(lambda rows: self.score(params, rows), shuffled, x, self.path_points)
        features = {
            "pooled": self.layers(params, x)[-2],
            "x": x,
            "score": self.score(params, x),
            "noisy_error": jnp.square(noise).sum(-1),
            "denoised_error": denoising_error(lambda rows: self.reconstruct_vectors(params, rows), x, noise),
            "log_density_gain": gain,
        }
        if x.shape[1] <= LARGEST_EXACT:
            features["asymmetry"] = asymmetry(jacobian(lambda rows: self.reconstruct_vectors(params, rows), x))
        return features

    def raw_features(self, batch: Batch) -> dict[str, jax.Array]:
        """The input itself, [B, d]."""
        return {"pooled": self.inputs(batch)}

    def walks(self, params: Params, start: jax.Array, rng: jax.Array) -> dict[str, jax.Array]:
        """Ends of Metropolis-Hastings and Langevin walks from `start` [chains, d], and the `acceptance` of the former, a scalar."""
        normal, uniform = walk_draws(rng, self.chain_steps, *start.shape)

        def field(rows: jax.Array) -> jax.Array:
            return self.score(params, rows)

        chain = metropolis(path_ratio(field, self.path_points), start, normal, uniform, self.proposal)
        drifted = langevin(field, start, normal, LANGEVIN_STEP * self.variance)
        return {"metropolis": chain.states[-1], "langevin": drifted[-1], "acceptance": chain.accepted.mean()}

    def draw(self, params: Params, state: State, batch: Batch, rng: jax.Array, spec: Any) -> dict[str, Any]:
        """`score`: the field in one or two dimensions; `samples`: data beside the ends of walks that start at it."""
        from maskae.evaluate.features import to_host
        from maskae.score_panels import draw_samples, draw_score

        x = to_host(self.inputs(batch))[to_host(batch["valid"])][: self.chains]
        walked = {name: to_host(value) for name, value in jax.jit(self.walks)(params, jnp.asarray(x), rng).items()}
        pictures = {"samples": draw_samples(x, walked, spec)}
        if x.shape[1] <= 2:
            pictures["score"] = draw_score(x, lambda rows: to_host(jax.jit(self.score)(params, jnp.asarray(rows))), spec)
        return pictures

    def forward_flops(self, batch: Batch) -> float:
        """All linear maps of r on one record; the contractive criterion takes 1 + d or 1 + probes passes, of which this counts all."""
        dimensions = math.prod(batch[self.field].shape[1:])
        if self.form == "tied":
            once = 2 * linear_flops(1, dimensions, self.hidden[0])
        else:
            once = mlp_flops(1, dimensions, (*self.hidden, dimensions))
        return once * (1 + (self.probes or dimensions)) if self.criterion == "contractive" else once
