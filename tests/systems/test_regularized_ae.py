"""The theorems of regularised autoencoders as measured limits, in double precision where they are exact."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from maskae.data.sources import open_source
from maskae.data.spec import DataSpec
from maskae.densities import (
    DENSITIES,
    affine_optimum,
    contractive_optimum,
    hessian,
    log_density,
    optimal_denoiser,
    optimal_jacobian,
    score,
    widened,
)
from maskae.errors import UserError
from maskae.evaluate import make_evaluators
from maskae.evaluate.score_field import root_mean_square
from maskae.interop import regularized_ae as interop
from maskae.interop.case import Case
from maskae.interop.parity import compare
from maskae.losses import denoising
from maskae.nn.score import langevin, line_integral, metropolis, path_ratio, walk_draws
from maskae.systems.regularized_ae import RegularizedAe

MODES = DENSITIES["mixture"]()
GAUSSIAN = DENSITIES["gaussian"]()
COVARIANCE = GAUSSIAN.covariances[0]
GRID = np.linspace(-2.6, 2.6, 5201)


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


def column(values) -> jax.Array:
    return jnp.asarray(values)[:, None]


@pytest.mark.parametrize(
    ("sigma", "slope", "error"),
    [(0.5, [[0.724409, 0.157480], [0.157480, 0.671916]], 0.4539), (0.1, [[0.982318, 0.013098], [0.013098, 0.977952]], 0.03256)],
)
def test_on_gaussian_data_both_criteria_have_one_affine_optimum(double, sigma, slope, error):
    x = np.random.default_rng(0).multivariate_normal([0.3, -0.2], COVARIANCE, 4000)
    np.testing.assert_allclose(affine_optimum(COVARIANCE, sigma**2), slope, atol=1e-6)
    np.testing.assert_allclose(optimal_jacobian(GAUSSIAN, jnp.asarray(x[:3]), sigma), np.tile(slope, (3, 1, 1)), atol=1e-6)
    true = -np.linalg.inv(COVARIANCE)
    estimated = (affine_optimum(COVARIANCE, sigma**2) - np.eye(2)) / sigma**2
    assert np.linalg.norm(estimated - true) / np.linalg.norm(true) == pytest.approx(error, rel=1e-3)

    mean, fitted = jnp.asarray(x.mean(0)), jnp.asarray(affine_optimum(np.cov(x.T, bias=True), sigma**2))

    def contractive(matrix, offset):
        return denoising.contractive_error(lambda rows: rows @ matrix.T + offset, jnp.asarray(x), sigma**2).mean()

    for gradient in jax.jit(jax.grad(contractive, (0, 1)))(fitted, mean - fitted @ mean):
        np.testing.assert_allclose(gradient, 0, atol=1e-12)
    noisy = np.concatenate([x + sigma * np.random.default_rng(1).standard_normal(x.shape), np.ones((len(x), 1))], 1)
    least_squares = np.linalg.lstsq(noisy, x, rcond=None)[0][:2].T
    np.testing.assert_allclose(least_squares, fitted, atol=0.05 * sigma)


def optimum_errors(sigma: float) -> np.ndarray:
    """rms under p of the score's and the Hessian's error: rows denoising, contractive."""
    points, middles = column(GRID), column((GRID[1:] + GRID[:-1]) / 2)
    density, between = (np.exp(np.asarray(log_density(MODES, where))) for where in (points, middles))
    solved = contractive_optimum(GRID, density, between, sigma**2)
    optima = [(optimal_denoiser(MODES, sigma)(points)[:, 0], optimal_jacobian(MODES, points, sigma)[:, 0, 0])]
    optima.append((solved, np.gradient(solved, GRID)))
    true = score(MODES, points)[:, 0], hessian(MODES, points)[:, 0, 0]
    errors = [[(r - GRID) / sigma**2 - true[0], (slope - 1) / sigma**2 - true[1]] for r, slope in optima]
    assert root_mean_square(true[0], density) == pytest.approx(3.309, abs=1e-3)
    return np.asarray([[root_mean_square(error, density) for error in pair] for pair in errors])


def test_the_optima_of_both_criteria_approach_the_score_with_the_square_of_the_noise(double):
    errors = np.stack([optimum_errors(sigma) for sigma in (0.2, 0.1, 0.05, 0.025)])
    np.testing.assert_allclose(errors[:, 0, 0], [1.0338, 0.3351, 0.0905, 0.0231], rtol=5e-3)
    np.testing.assert_allclose(errors[:, 1, 0], [1.0614, 0.3563, 0.1006, 0.0269], rtol=5e-3)
    np.testing.assert_allclose(errors[:, 0, 1], [3.723, 1.218, 0.330, 0.084], rtol=5e-3)
    np.testing.assert_allclose(errors[:, 1, 1], [3.879, 1.529, 0.581, 0.256], rtol=5e-3)
    assert errors[2, 0, 0] / errors[3, 0, 0] == pytest.approx(4, rel=0.03)


def test_the_best_denoiser_is_the_mean_of_the_clean_points(double):
    x = np.linspace(-2, 2, 7)
    np.testing.assert_allclose(optimal_denoiser(MODES, 0.2)(column(x))[:, 0], interop.mean_of_clean(MODES, x, 0.2), atol=1e-12)


def test_reconstruction_error_is_no_energy(double):
    assert float(optimal_denoiser(MODES, 0.1)(jnp.zeros((1, 1)))[0, 0]) == pytest.approx(0, abs=1e-15)
    low, high = np.exp(log_density(MODES, jnp.asarray([[0.0], [1.0]])))
    assert low / high == pytest.approx(0.0077, abs=1e-4)


def test_the_line_integral_of_the_score_is_the_difference_of_log_density(double):
    def from_left(sigma, end, points):
        return float(line_integral(interop.recorded_field(MODES, sigma), jnp.asarray([-1.0]), jnp.asarray([end]), points))

    assert from_left(0.05, 1.0, 5) == pytest.approx(0, abs=1e-12)
    assert [from_left(0.05, 0.5, n) for n in (5, 20, 2000)] == pytest.approx([-0.807, -1.351, -1.3513], abs=6e-4)
    ends = np.asarray(log_density(MODES, jnp.asarray([[-1.0], [0.5]])))
    gaps = [from_left(sigma, 0.5, 2000) - (ends[1] - ends[0]) for sigma in (0.05, 0.025, 0.0125)]
    assert gaps[0] == pytest.approx(0.0376, abs=1e-4)
    assert gaps[1] / gaps[2] == pytest.approx(4, rel=0.02)


def walk(ratio, steps=1000, chains=40):
    normal, uniform = walk_draws(jax.random.key(3), steps, chains, 1)
    start = jnp.where(jnp.arange(chains) % 2, 1.0, -1.0)[:, None]
    chain = jax.jit(lambda *given: metropolis(ratio, *given, 1.0))(start, normal, uniform)
    return np.asarray(chain.states)[..., 0], float(chain.accepted.mean())


def test_walks_by_the_score_sample_the_widened_density():
    states, acceptance = walk(path_ratio(lambda x: score(widened(MODES, 0.05), x), 8))
    assert acceptance == pytest.approx(0.42, abs=0.02)
    assert states.mean() == pytest.approx(0, abs=0.1)
    assert states.std() == pytest.approx(1.046, abs=0.03)
    assert (states > 0).mean() == pytest.approx(0.5, abs=0.05)
    assert states[states > 0].std() == pytest.approx(0.306, abs=0.015)


def test_walks_by_the_density_itself_accept_as_the_textbook_says():
    _, acceptance = walk(lambda x, y: log_density(MODES, y) - log_density(MODES, x))
    grid = np.linspace(-5, 5, 401)
    density = np.exp(np.asarray(log_density(MODES, column(grid.astype(np.float32))), np.float64))
    proposal = np.exp(-0.5 * np.square(grid[:, None] - grid)) / np.sqrt(2 * np.pi)
    expected = (np.minimum(density[:, None], density) * proposal).sum() * (grid[1] - grid[0]) ** 2
    assert acceptance == pytest.approx(expected, abs=0.01)
    states, always = walk(lambda x, y: jnp.zeros(x.shape[:-1]), steps=100)
    assert always == 1
    assert states[-1].std() > 5


def test_langevin_walks_have_the_variance_of_their_step():
    normal, _ = walk_draws(jax.random.key(0), 300, 500, 1)
    states = jax.jit(lambda draws: langevin(lambda x: -x, jnp.zeros((500, 1)), draws, 0.5))(normal)
    assert float(states[50:].var()) == pytest.approx(1 / (1 - 0.5 / 4), rel=0.02)


def gap_of_the_criteria(reconstruct, x, sigma) -> float:
    """Expected denoising error, by Gauss-Hermite quadrature, less the contractive one with lambda = sigma^2."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(12)

    @jax.jit
    def both(x, sigma):
        errors = jax.vmap(lambda node: denoising.denoising_error(reconstruct, x, jnp.full_like(x, sigma * node)).mean())(jnp.asarray(nodes))
        return errors @ (weights / weights.sum()) - denoising.contractive_error(reconstruct, x, sigma**2).mean()

    return float(both(x, sigma))


def test_the_criteria_agree_for_affine_maps_and_differ_by_the_laplacian_for_others(double):
    x = column(np.linspace(-1, 1.5, 11))
    for sigma in (0.1, 1.0):
        assert gap_of_the_criteria(lambda rows: 0.3 * rows + 0.7, x, sigma) == pytest.approx(0, abs=1e-13)
    a = 0.4
    gaps = [gap_of_the_criteria(lambda rows: rows + a * rows**2, x, sigma) / sigma**2 for sigma in (0.1, 0.01)]
    limit = float((a * x**2 * 2 * a).mean())
    assert gaps[1] == pytest.approx(limit, rel=1e-3)
    assert abs(gaps[0] - limit) == pytest.approx(100 * abs(gaps[1] - limit), rel=0.05)


def test_the_criteria_of_simple_maps(double):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((50, 3)))
    noise = jnp.asarray(np.random.default_rng(1).standard_normal((50, 3)))
    np.testing.assert_allclose(denoising.contractive_error(lambda rows: rows, x, 0.2), 0.6)
    np.testing.assert_allclose(denoising.denoising_error(lambda rows: rows, x, noise), np.square(noise).sum(1))
    centre = jnp.asarray([1.0, 2.0, 3.0])
    constant = denoising.contractive_error(lambda rows: jnp.broadcast_to(centre, rows.shape), x, 0.2)
    np.testing.assert_allclose(constant, np.square(x - centre).sum(1))
    np.testing.assert_allclose(affine_optimum(COVARIANCE, 1e9), 0, atol=1e-8)
    np.testing.assert_allclose(affine_optimum(COVARIANCE, 1e-9), np.eye(2), atol=1e-8)


def variables(system: RegularizedAe, dimensions: int = 3):
    """Parameters none of which is 0."""
    shapes = jax.eval_shape(lambda: system.init(jax.random.key(0), {"x": jnp.zeros((1, dimensions))}).params)
    return jax.tree.map(lambda leaf: jnp.asarray(np.random.default_rng(leaf.size).standard_normal(leaf.shape)), shapes)


def test_probes_estimate_the_jacobian_without_bias_and_the_tied_map_is_a_gradient(double):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((5, 3)))
    plain, tied = RegularizedAe(hidden=(7,)), RegularizedAe(hidden=(7,), form="tied")
    params, tied_params = variables(plain), variables(tied)

    axes = np.sqrt(3) * np.broadcast_to(np.eye(3)[:, None], (3, 5, 3))
    signs = np.broadcast_to(np.stack(np.meshgrid(*[[-1.0, 1.0]] * 3), -1).reshape(8, 1, 3), (8, 5, 3))

    @jax.jit
    def of_plain(params):
        def reconstruct(rows):
            return plain.reconstruct_vectors(params, rows)

        estimates = [denoising.estimated_jacobian_norm(reconstruct, x, jnp.asarray(probes)) for probes in (axes, signs)]
        return denoising.jacobian_norm(reconstruct, x), estimates, denoising.asymmetry(denoising.jacobian(reconstruct, x))

    @jax.jit
    def of_tied(params):
        matrices = denoising.jacobian(lambda rows: tied.reconstruct_vectors(params, rows), x)
        slope = jax.vmap(jax.grad(lambda row: tied.energy(params, row)))(x)
        return denoising.asymmetry(matrices), slope, tied.displacement(params, x)

    exact, estimates, uneven = of_plain(params)
    for estimate in estimates:
        np.testing.assert_allclose(estimate, exact, rtol=1e-12)
    assert uneven.min() > 0.05
    uneven, slope, displacement = of_tied(tied_params)
    np.testing.assert_allclose(uneven, 0, atol=1e-14)
    np.testing.assert_allclose(slope, displacement, atol=1e-13)
    with pytest.raises(UserError, match="form=tied has"):
        plain.energy(params, x)


def fit(system, draw, steps, rate):
    """Parameters after Adam with a cosine to 0, in one scan; `draw(key)` is a batch."""
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))
    params = system.init(jax.random.key(0), draw(jax.random.key(0))).params

    def step(carry, number):
        key = jax.random.fold_in(jax.random.key(1), number)
        slope = jax.grad(lambda params: system.loss(params, {}, draw(key), jax.random.fold_in(key, 1), number)[0])(carry[0])
        updates, moments = optimizer.update(slope, carry[1])
        return (optax.apply_updates(carry[0], updates), moments), None

    return jax.jit(lambda start: jax.lax.scan(step, start, jnp.arange(steps))[0][0])((params, optimizer.init(params)))


def features_of(system, params, batch):
    batch |= {"index": jnp.arange(len(batch[system.field]))}
    return {name: np.asarray(value) for name, value in jax.jit(system.features)(params, {}, batch).items()}


def test_a_network_learns_the_score_of_the_mixture():
    system = RegularizedAe(hidden=(64, 64), form="residual", sigma=0.2)
    example = jnp.arange(512)

    def draw(key):
        mode, spread = jax.random.rademacher(key, (512, 1), jnp.float32), jax.random.normal(jax.random.fold_in(key, 9), (512, 1))
        return {"x": mode + 0.3 * spread, "example": example}

    params = fit(system, draw, 1000, 3e-3)
    source = open_source("density:mixture@5000", "val", val_percent=80)
    val = features_of(system, params, {"x": jnp.asarray(np.stack([source[i]["x"] for i in range(len(source))]))})
    found = make_evaluators({"score_field": {"density": "mixture", "sigma": 0.2}})["score_field"]({}, val)
    assert found["score_size"] == pytest.approx(3.309, rel=0.05)
    assert found["score_error"] < 1.05 * found["score_error_of_optimum"]
    assert found["score_from_optimum"] < 0.2


def test_on_digits_noise_falls_and_shuffled_pixels_are_less_probable():
    source = open_source("digits", "train", statistics="unit")
    images = jnp.asarray(np.stack([source[i]["image"] for i in range(len(source))]) / 16.0, jnp.float32)
    system = RegularizedAe(hidden=(256,), field="image", sigma=0.1, sigma_start=0.5, anneal_steps=200)

    def draw(key):
        return {"image": images[jax.random.randint(key, (64,), 0, len(images))], "example": jnp.arange(64)}

    params = fit(system, draw, 400, 3e-3)
    source = open_source("digits", "val", statistics="unit")
    held_out = jnp.asarray(np.stack([source[i]["image"] for i in range(100)]) / 16.0, jnp.float32)
    found = make_evaluators({"denoising": {}})["denoising"]({}, features_of(system, params, {"image": held_out}))
    assert found["error_left"] < 0.8
    assert found["density_above_shuffled"] > 0.95


def test_the_source_draws_its_density_and_each_record_depends_on_its_generator():
    train = open_source("density:curve@400", "train", val_percent=25)
    val = open_source("density:curve@400", "val", val_percent=25)
    assert (len(train), len(val)) == (300, 100)
    assert train.spec == DataSpec.from_json(val.spec.to_json())
    one, again, other = (train.sample(index, np.random.default_rng(seed))["x"] for index, seed in ((0, 1), (5, 1), (0, 2)))
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)
    assert one.dtype == np.float32
    x = np.stack([train[i]["x"] for i in range(300)])
    own, mirrored = (float(log_density(DENSITIES["curve"](), jnp.asarray(rows)).mean()) for rows in (x, -x))
    assert own > mirrored
    for name, words in (("density:spirals", "did you mean 'spiral'"), ("density:spiral@x", "density:spiral@10000")):
        with pytest.raises(UserError, match=words):
            open_source(name, "train")


@pytest.mark.parametrize("density", ["mixture", "spiral"])
def test_it_draws_its_field_and_its_walks(density):
    source = open_source(f"density:{density}@100", "val", val_percent=50)
    x = jnp.asarray(np.stack([source[i]["x"] for i in range(20)]))
    system = RegularizedAe(hidden=(4,), chain_steps=3, chains=8)
    params = system.init(jax.random.key(0), {"x": x}).params
    pictures = system.draw(params, {}, {"x": x, "valid": jnp.arange(20) < 15}, jax.random.key(0), source.spec)
    assert set(pictures) == {"score", "samples"}
    for picture in pictures.values():
        assert picture.dtype == np.uint8
        assert picture.std() > 5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"form": "tide"}, "did you mean 'tied'"),
        ({"form": "tied", "hidden": (4, 4)}, "one layer"),
        ({"criterion": "contracting"}, "did you mean 'contractive'"),
        ({"sigma": 0.0}, "sigma=0.0: it must be positive"),
        ({"probes": -1}, "probes=-1"),
        ({"activation": "prelu"}, "kink"),
    ],
)
def test_it_refuses_what_cannot_work(arguments, words):
    with pytest.raises(UserError, match=words):
        RegularizedAe(**arguments)


def test_the_noise_falls_geometrically_and_the_contractive_loss_wants_probes_in_many_dimensions():
    noise = [float(denoising.annealed_noise(jnp.asarray(step), 1.0, 0.01, 10)) for step in (0, 5, 10, 99)]
    assert noise == pytest.approx([1.0, 0.1, 0.01, 0.01])
    batch = {"x": jnp.ones((2, 65)), "example": jnp.arange(2)}
    exact = RegularizedAe(hidden=(4,), criterion="contractive")
    params = exact.init(jax.random.key(0), batch).params
    with pytest.raises(UserError, match="probes=1"):
        exact.loss(params, {}, batch, jax.random.key(0), jnp.asarray(0))
    loss, _ = dataclasses.replace(exact, probes=2).loss(params, {}, batch, jax.random.key(0), jnp.asarray(0))
    assert np.isfinite(loss)


def test_the_recorded_points_of_a_grid_need_not_contain_its_end():
    grid = np.linspace(-4.0, 4.0, 149)
    assert [interop.stride_of(grid[::every], grid) for every in (1, 50, 74)] == [1, 50, 74]
    assert len(grid[:: interop.stride_of(grid[:1], grid)]) == 1


def test_the_reference_case_is_reproduced(shared, double):
    case = Case.read(shared / "goldens" / "regularized_ae" / "a")
    mixture = interop.mixture_of(case.record["config"]["mix1"])
    found = interop.replay_lines_and_walks(case, mixture) | interop.replay_network(case, "residual") | interop.replay_space(case)
    rows = [compare(name, case.outputs[name], value) for name, value in found.items()]
    assert len(rows) == 28
    assert [row for row in rows if not row.agrees] == []
