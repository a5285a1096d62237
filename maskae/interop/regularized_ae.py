"""Reference cases of regularised autoencoders, in double precision: closed forms, both criteria's optima, walks, and small networks.

There is no released code. The recorded names are W [H, d], b [H], V [d, H], c [d].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maskae.densities import (
    Mixture,
    affine_optimum,
    contractive_optimum,
    hessian,
    log_density,
    optimal_denoiser,
    optimal_jacobian,
    score,
    widened,
)
from maskae.evaluate.score_field import root_mean_square
from maskae.interop.case import Case, Reproduced, exact
from maskae.losses.denoising import contractive_error, denoising_error, estimated_jacobian_norm, jacobian, jacobian_norm
from maskae.nn.score import line_integral, metropolis, path_ratio
from maskae.systems.contract import Params
from maskae.systems.regularized_ae import RegularizedAe

CLOSED, SOLVED, WALKED = 1e-10, 1e-8, 1e-9  # what the records allow double precision
QUADRATURE_REACH, QUADRATURE_NODES = 12.0, 4001  # standard deviations of the noise to each side
# Official name -> path here and whether it is stored transposed.
Names = dict[str, tuple[tuple[str, ...], bool]]
NETWORK: Names = {
    "W": (("network", "layer_0", "kernel"), True),
    "b": (("network", "layer_0", "bias"), False),
    "V": (("network", "layer_1", "kernel"), True),
    "c": (("network", "layer_1", "bias"), False),
}
TIED: Names = {"W": (("kernel",), True), "b": (("hidden", "bias"), False), "c": (("output", "bias"), False)}


def names_of(form: str) -> Names:
    """The parameters of one form."""
    return TIED if form == "tied" else NETWORK


def load_params(weights: dict[str, np.ndarray], form: str) -> Params:
    """Recorded weights as the system's parameters, in double precision."""
    params: Params = {}
    for name, (path, transposed) in names_of(form).items():
        node = params
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = jnp.asarray(weights[name].T if transposed else weights[name], jnp.float64)
    return params


def official_names(params: Params, form: str) -> dict[str, np.ndarray]:
    """Parameters or gradients under the recorded names and in their shapes."""
    found = {}
    for name, (path, transposed) in names_of(form).items():
        leaf: Any = params
        for part in path:
            leaf = leaf[part]
        found[name] = np.asarray(leaf.T if transposed else leaf)
    return found


def mixture_of(recorded: dict[str, list[float]]) -> Mixture:
    """A recorded mixture in one dimension."""
    weights, means, deviations = (np.asarray(recorded[name], np.float64) for name in ("weights", "means", "stds"))
    return Mixture(weights, means[:, None], np.square(deviations)[:, None, None])


def replay_line(case: Case, mixture: Mixture) -> dict[str, Reproduced]:
    """One dimension: density, score and best denoiser at the recorded points."""

    @jax.jit
    def compute(x: jax.Array) -> dict[str, jax.Array]:
        found = {"logp": log_density(mixture, x), "score": score(mixture, x)[:, 0], "hessian": hessian(mixture, x)[:, 0, 0]}
        for number, sigma in enumerate(case.record["config"]["sigmas1"]):
            wide = widened(mixture, sigma)
            found[f"logp_sigma{number}"] = log_density(wide, x)
            found[f"score_sigma{number}"] = score(wide, x)[:, 0]
            found[f"r_star{number}"] = optimal_denoiser(mixture, sigma)(x)[:, 0]
            found[f"jac_star{number}"] = optimal_jacobian(mixture, x, sigma)[:, 0, 0]
        return found

    return {f"d1/{name}": Reproduced(value, CLOSED) for name, value in compute(case.inputs["x1"][:, None]).items()}


def replay_space(case: Case) -> dict[str, Reproduced]:
    """Several dimensions with full covariances, and a single Gaussian's affine optimum."""
    mixture = Mixture(*(case.inputs[f"mixd/{name}"] for name in ("weights", "means", "covariances")))
    sigmas = case.record["config"]["sigmas_d"]

    @jax.jit
    def compute(x: jax.Array) -> dict[str, jax.Array]:
        found = {"logp": log_density(mixture, x), "score": score(mixture, x), "hessian": hessian(mixture, x)}
        for number, sigma in enumerate(sigmas):
            found[f"score_sigma{number}"] = score(widened(mixture, sigma), x)
            found[f"r_star{number}"] = optimal_denoiser(mixture, sigma)(x)
            found[f"jac_star{number}"] = optimal_jacobian(mixture, x, sigma)
        return found

    found = {f"dd/{name}": Reproduced(value, CLOSED) for name, value in compute(case.inputs["xd"]).items()}
    slopes = [affine_optimum(case.inputs["gauss/covariance"], sigma**2) for sigma in sigmas]
    return found | {f"gauss/A{number}": Reproduced(slope, CLOSED) for number, slope in enumerate(slopes)}


def mean_of_clean(mixture: Mixture, x: np.ndarray, sigma: float) -> np.ndarray:
    """E[clean point | noisy point x] in one dimension, [N], by quadrature over the noise: theorem 1's integral form."""
    noise = np.linspace(-QUADRATURE_REACH, QUADRATURE_REACH, QUADRATURE_NODES) * sigma
    clean = x[:, None] - noise  # [N, nodes]
    weights = np.exp(np.asarray(log_density(mixture, jnp.asarray(clean)[..., None])) - 0.5 * np.square(noise / sigma))
    return (weights * clean).sum(1) / weights.sum(1)


def stride_of(recorded: np.ndarray, grid: np.ndarray) -> int:
    """Every how many points of an even grid [N] were recorded; the last one need not be among them."""
    return round(float(recorded[1] - recorded[0]) / float(grid[1] - grid[0])) if len(recorded) > 1 else len(grid)


def replay_grid(case: Case, mixture: Mixture) -> dict[str, Reproduced]:
    """Both criteria's optima on a grid, and how far their scores and Hessians are from the density's."""
    options = case.record["config"]
    low, high, count = options["grid"]
    grid = np.linspace(low, high, int(count))
    points = jnp.asarray(grid)[:, None]
    middles = jnp.asarray((grid[1:] + grid[:-1]) / 2)[:, None]
    density, between = (np.exp(np.asarray(log_density(mixture, where))) for where in (points, middles))
    slope, bend = np.asarray(score(mixture, points))[:, 0], np.asarray(hessian(mixture, points))[:, 0, 0]
    every = stride_of(case.outputs["rcae/x"], grid)
    found = {"rcae/x": Reproduced(grid[::every], CLOSED)}
    errors: dict[str, list[list[float]]] = {"dae": [], "rcae": []}
    for number, sigma in enumerate(options["sigmas1"]):
        solved = contractive_optimum(grid, density, between, sigma**2)
        found[f"rcae/r{number}"] = Reproduced(solved[::every], SOLVED)
        best = np.asarray(optimal_denoiser(mixture, sigma)(points))[:, 0]
        slopes = {"dae": np.asarray(optimal_jacobian(mixture, points, sigma))[:, 0, 0], "rcae": np.gradient(solved, grid)}
        for name, r in (("dae", best), ("rcae", solved)):
            pairs = ((r - grid) / sigma**2 - slope, (slopes[name] - 1) / sigma**2 - bend)
            errors[name].append([root_mean_square(error, density) for error in pairs])
    found |= {f"err/{name}": Reproduced(rows, SOLVED) for name, rows in errors.items()}
    quadrature = mean_of_clean(mixture, case.outputs["quad/x"], options["quad"]["sigma"])
    found |= {"quad/x": Reproduced(case.outputs["quad/x"], note="the recorded points"), "quad/r_star": Reproduced(quadrature, CLOSED)}
    return found | {"err/score_rms": Reproduced([root_mean_square(slope, density)], CLOSED)}


def recorded_field(mixture: Mixture, sigma: float) -> Callable[[jax.Array], jax.Array]:
    """(r(x) - x) / sigma^2 of the best denoiser."""
    denoise = optimal_denoiser(mixture, sigma)
    return lambda x: (denoise(x) - x) / sigma**2


def replay_lines_and_walks(case: Case, mixture: Mixture) -> dict[str, Reproduced]:
    """Line integrals by midpoint rules, and Metropolis-Hastings with the recorded draws."""
    path, walk = case.record["config"]["path"], case.record["config"]["mh"]
    start, end = (jnp.asarray(side)[:, None] for side in np.asarray(path["pairs"], np.float64).T)
    field = recorded_field(mixture, path["sigma"])
    exact_ones = (widened(mixture, path["sigma"]), mixture)

    @jax.jit
    def differences(start: jax.Array, end: jax.Array) -> jax.Array:
        columns = [line_integral(field, start, end, points) for points in path["n"]]
        return jnp.stack(columns + [log_density(each, end) - log_density(each, start) for each in exact_ones], 1)

    ratio = path_ratio(recorded_field(mixture, walk["sigma"]), walk["n"])
    draws = [jnp.asarray(case.inputs[f"mh/{name}"]) for name in ("start", "normal", "uniform")]
    chain = jax.jit(lambda start, normal, uniform: metropolis(ratio, start[:, None], normal[..., None], uniform, walk["eta"]))(*draws)
    return {
        "path/values": Reproduced(differences(start, end), CLOSED),
        "mh/state": Reproduced(chain.states[..., 0], WALKED),
        "mh/accept": exact(chain.accepted.astype(jnp.int32)),
    }


def replay_network(case: Case, form: str) -> dict[str, Reproduced]:
    """One form of the small network: map, Jacobian, both losses and their gradients."""
    options = case.record["config"]["net"]
    system = RegularizedAe(hidden=(options["hidden"],), form=form, sigma=options["sigma"])
    params = load_params({name.removeprefix("net/"): value for name, value in case.weights.items()}, form)
    x, eps, probes = (jnp.asarray(case.inputs[f"net/{name}"]) for name in ("x", "eps", "probes"))

    def denoising(params: Params) -> jax.Array:
        return denoising_error(lambda rows: system.reconstruct_vectors(params, rows), x, options["sigma"] * eps).mean()

    def contractive(params: Params) -> jax.Array:
        return contractive_error(lambda rows: system.reconstruct_vectors(params, rows), x, options["lam"]).mean()

    @jax.jit
    def compute(params: Params) -> tuple[dict[str, jax.Array], dict[str, Params]]:
        def reconstruct(rows: jax.Array) -> jax.Array:
            return system.reconstruct_vectors(params, rows)

        (dae, dae_slope), (rcae, rcae_slope) = (jax.value_and_grad(objective)(params) for objective in (denoising, contractive))
        found = {
            "r": reconstruct(x),
            "jacobian": jacobian(reconstruct, x),
            "loss_dae": dae[None],
            "loss_rcae": rcae[None],
            "jac_norm_hutchinson": estimated_jacobian_norm(reconstruct, x, probes).mean()[None],
            "jac_norm": jacobian_norm(reconstruct, x).mean()[None],
        }
        if form == "tied":
            found["energy"] = system.energy(params, x)
        return found, {"dae": dae_slope, "rcae": rcae_slope}

    found, slopes = compute(params)
    named = {f"net/{form}/{name}": Reproduced(value, CLOSED) for name, value in found.items()}
    for kind, slope in slopes.items():
        named |= {f"grad_{kind}/net/{form}/{name}": Reproduced(value, CLOSED) for name, value in official_names(slope, form).items()}
    return named


def replay(case: Case) -> dict[str, Reproduced]:
    """Every recorded output of a case."""
    mixture = mixture_of(case.record["config"]["mix1"])
    with jax.enable_x64(True):
        found = replay_line(case, mixture) | replay_space(case) | replay_grid(case, mixture) | replay_lines_and_walks(case, mixture)
        for form in ("plain", "residual", "tied"):
            found |= replay_network(case, form)
        return {name: dataclasses.replace(each, value=np.asarray(each.value)) for name, each in found.items()}
