"""TIP: sizes, masks, blocked keys, negatives, losses and features are those of the paper and its code."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from maskae.data.columns import Columns
from maskae.data.spec import DataSpec
from maskae.errors import UserError
from maskae.interop.case import Case
from maskae.interop.parity import compare
from maskae.interop.tip import replay_forward, system_of, variables_of
from maskae.losses.tables import cell_losses, hard_negatives, matching_loss, negative_weights
from maskae.nn.tables import CellPredictor, TableEncoder
from maskae.systems.contract import System, Variables
from maskae.systems.tip import Rows, Tip, choose
from tests.drawn import drawn
from tests.systems.test_mae import count

SMALL: dict[str, Any] = {"image_size": 8, "channels": 1, "network": "resnet18", "layers": (1,), "widths": (8,), "stem": "small"}
SMALL |= {"cardinalities": (3, 2), "continuous": 4, "table_width": 16, "table_depth": 2}
SMALL |= {"fusion_depth": 1, "heads": 2, "projection": 8, "marginal_rows": 5, "views": "crop"}
TIP = Tip(**SMALL, missing_shares=(0.4, 0.8))
B, N = 6, TIP.columns.count
EXAMPLE = jnp.arange(B, dtype=jnp.int32)


def table_of(rows: int, seed: int = 0) -> jax.Array:
    codes = [jax.random.randint(jax.random.key(seed + i), (rows, 1), 0, size) for i, size in enumerate(TIP.cardinalities)]
    return jnp.concatenate([*codes, jax.random.normal(jax.random.key(seed + 9), (rows, TIP.continuous))], 1).astype(jnp.float32)


ROWS = Rows(table_of(B), jnp.zeros((B, N), bool).at[0, 1].set(True).at[3, 4].set(True))
IMAGES = jax.random.uniform(jax.random.key(3), (B, 8, 8, 1))
BATCH = {"image": IMAGES, "table": ROWS.table, "table_missing": ROWS.missing, "example": EXAMPLE, "index": EXAMPLE}
STARTED = drawn(TIP.init, jax.random.key(0), BATCH)
# Larger weights than at the start, or nothing depends on anything.
PARAMS = jax.tree.map(lambda x: 5 * x if x.ndim > 1 else x, STARTED.params)
STATE = STARTED.state | {"marginals": table_of(5, seed=20)}
draw_cells = jax.jit(TIP.draw_cells)
DRAWS = draw_cells(EXAMPLE, jax.random.key(7))
loss_of = jax.jit(lambda params, table: TIP.loss_given_draws(params, STATE, IMAGES, ROWS._replace(table=table), DRAWS))
encode = jax.jit(lambda params, table, hidden: TIP.part("table", params, table, hidden).tokens)


def test_is_a_system() -> None:
    assert isinstance(TIP, System)


def test_sizes_of_the_released_recipe() -> None:
    system = Tip()
    batch = {"table": np.zeros((1, 17)), "table_missing": np.zeros((1, 17)), "image": np.zeros((1, 128, 128, 3))}
    params = jax.eval_shape(system.init, jax.random.key(0), batch).params
    assert count(params["encoder"]) == 23_508_032
    millions = {name: round(count(part) / 1e6, 2) for name, part in params.items()}
    assert millions["table"] == 12.64
    assert millions["fusion"] == 17.86
    assert millions["image_projector"] + millions["table_projector"] == pytest.approx(4.79, abs=0.011)
    assert count(params["predictor"]) == 513 * 51
    assert count(params["matching"]) == 1026
    assert round(count(params) / 1e6, 1) == 58.8
    assert system.forward_flops(batch) == pytest.approx(2 * 3.06e9, rel=0.02)  # there the image's tokens are projected four times


@pytest.mark.parametrize(("cardinalities", "continuous", "hidden", "corrupted"), [((22, 13, 3, 12), 13, 8, 5), ((2,) * 26, 49, 38, 22)])
def test_counts_of_hidden_and_corrupted_columns(cardinalities, continuous, hidden, corrupted) -> None:
    draws = Tip(cardinalities=cardinalities, continuous=continuous).draw_cells(jnp.arange(9), jax.random.key(1))
    np.testing.assert_array_equal(draws.hidden.sum(1), hidden)
    np.testing.assert_array_equal(draws.corrupted.sum(1), corrupted)
    assert len(np.unique(np.asarray(draws.hidden), axis=0)) > 5


def test_draws_depend_on_the_example_alone() -> None:
    order = jnp.asarray([4, 1, 0, 5, 3, 2])
    shuffled = draw_cells(EXAMPLE[order], jax.random.key(7))
    for name in ("corrupted", "rows", "hidden"):
        np.testing.assert_array_equal(getattr(shuffled, name), getattr(DRAWS, name)[order])
    np.testing.assert_array_equal(shuffled.noise, DRAWS.noise[:, order])


def test_corrupted_cells_hold_values_of_their_column() -> None:
    named = loss_of(PARAMS, ROWS.table)[2]
    corrupted, changed = np.asarray(named["corrupted"]), np.asarray(DRAWS.corrupted & ~ROWS.missing)
    np.testing.assert_array_equal(corrupted[~changed], np.asarray(ROWS.table)[~changed])
    assert changed.sum() >= B - 2
    for _, column in np.argwhere(changed):
        assert np.isin(corrupted[changed[:, column], column], STATE["marginals"][:, column]).all()


def test_a_hidden_cell_changes_nothing_but_its_own_token() -> None:
    hidden = jnp.zeros((B, N), bool).at[:, (0, 3)].set(True)
    tokens = encode(PARAMS, ROWS.table, hidden)
    other = table_of(B, seed=40)
    np.testing.assert_array_equal(tokens, encode(PARAMS, jnp.where(hidden, other, ROWS.table), hidden))
    assert jnp.abs(encode(PARAMS, jnp.where(hidden, ROWS.table, other), hidden) - tokens)[:, 0].max() > 1e-3
    moved = {**PARAMS, "table": PARAMS["table"] | {"mask_token": PARAMS["table"]["mask_token"] + jnp.arange(16.0)}}
    difference = jnp.abs(encode(moved, ROWS.table, hidden) - tokens).max((0, 2))
    np.testing.assert_array_equal(difference > 1e-3, [False, True, False, False, True, False, False])
    np.testing.assert_array_equal(difference[jnp.asarray([0, 2, 3, 5, 6])], 0.0)


def test_without_any_cell_the_class_token_knows_only_the_image() -> None:
    @jax.jit
    def fused(table: jax.Array, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        last = TIP.encode(PARAMS["encoder"], STATE["encoder"], images, train=False)[0].maps[-1]
        seen = TIP.part("fusion", PARAMS, last, method="see")
        alone, both = TIP.fused(PARAMS, seen, Rows(table, jnp.ones((B, N), bool)))
        return alone[:, 0], both[:, 0]

    alone, both = fused(ROWS.table, IMAGES)
    np.testing.assert_array_equal(fused(table_of(B, seed=50), IMAGES)[1], both)
    np.testing.assert_allclose(alone, jnp.broadcast_to(alone[:1], alone.shape), atol=1e-6)
    assert jnp.abs(both - both[:1]).max() > 1e-4


def test_values_at_uniform_outputs() -> None:
    columns = Columns((22, 13, 3, 12), 13)
    table = jnp.concatenate([jnp.ones((8, 4)), jnp.tile(jnp.asarray([1.0, -1.0]), 52).reshape(8, 13)], 1)
    counted = choose(jax.random.uniform(jax.random.key(0), (8, 17)), 8)
    categorical, continuous = cell_losses(jnp.zeros((8, 4, 50)), jnp.zeros((8, 13)), table, counted, columns)
    assert categorical == pytest.approx(math.log(50), rel=1e-5)
    assert continuous == pytest.approx(1.0)
    own, _ = cell_losses(jnp.zeros((8, 4, 50)), jnp.zeros((8, 13)), table, jnp.zeros((8, 17), bool).at[:, 1].set(True), columns, "column")
    assert own == pytest.approx(math.log(13), rel=1e-5)
    assert matching_loss(jnp.zeros((9, 2)), jnp.arange(9) < 3) == pytest.approx(math.log(2), rel=1e-6)
    constant = jnp.tile(jnp.log(jnp.asarray([2.0, 1.0])), (9, 1))
    assert matching_loss(constant, jnp.arange(9) < 3) == pytest.approx(0.6365, abs=1e-4)
    nothing = cell_losses(jnp.zeros((8, 4, 50)), jnp.zeros((8, 13)), table, jnp.zeros((8, 17), bool), columns)
    assert [float(each) for each in nothing] == [0.0, 0.0]


def test_negatives_come_as_often_as_their_weights() -> None:
    similarity = jnp.asarray([[5.0, 1.0, 0.0, 2.0], [0.0, 9.0, 0.0, 0.0], [3.0, 2.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0]])
    noise = jax.random.gumbel(jax.random.key(0), (20_000, 4, 4))
    drawn = jax.jit(jax.vmap(lambda each: hard_negatives(similarity, each)))(noise)
    found = np.stack([(drawn == key).mean(0) for key in range(4)], 1)
    weights = np.asarray(negative_weights(similarity))
    np.testing.assert_array_equal(np.diagonal(found), 0.0)
    np.testing.assert_allclose(found, weights / weights.sum(1, keepdims=True), atol=0.012)
    np.testing.assert_allclose(found[1, [0, 2, 3]], 1 / 3, atol=0.012)


def test_gradients_reach_the_image_encoder_from_every_loss_and_none_flows_through_the_draw() -> None:
    @jax.jit
    def of_encoder(params: Any) -> dict[str, jax.Array]:
        names = ("contrastive_loss", "matching_loss", "reconstruction_loss")
        grads = jax.jacrev(lambda p: jnp.stack([loss_of(p, ROWS.table)[1][name] for name in names]))(params)
        kernel = grads["encoder"]["stem"]["conv"]["kernel"]
        return dict(zip(names, jnp.abs(kernel).max((1, 2, 3, 4)), strict=True))

    assert all(value > 1e-8 for value in of_encoder(PARAMS).values())
    assert jnp.abs(jax.grad(lambda s: jnp.square(negative_weights(s)).sum())(jnp.ones((3, 3)))).max() == 0


def test_a_missing_value_is_neither_read_nor_reconstructed() -> None:
    other = jnp.where(ROWS.missing, 1.0, ROWS.table)
    assert jnp.abs(other - ROWS.table).max() > 0
    np.testing.assert_array_equal(loss_of(PARAMS, other)[0], loss_of(PARAMS, ROWS.table)[0])


# pytest -n 0 -m slow tests/systems/test_tip.py
@pytest.mark.slow
def test_a_copied_column_is_reconstructed() -> None:
    columns = Columns((4, 4), 0)
    encoder, predictor = TableEncoder(columns, 16, 1, 2), CellPredictor(columns)
    codes = jnp.tile(jnp.arange(4.0)[:, None], (4, 2))
    hidden = jnp.stack([jnp.arange(16) % 8 < 4, jnp.arange(16) % 8 >= 4], 1)
    params = {"encoder": encoder.init(jax.random.key(0), codes, hidden)["params"]}
    params["predictor"] = predictor.init(jax.random.key(1), jnp.zeros((16, 3, 16)))["params"]
    optimizer = optax.adam(1e-2)

    def loss(params: Any) -> jax.Array:
        tokens = encoder.apply({"params": params["encoder"]}, codes, hidden).tokens
        return cell_losses(*predictor.apply({"params": params["predictor"]}, tokens), codes, hidden, columns)[0]

    def step(carry: Any, _: Any) -> tuple[Any, jax.Array]:
        params, moments = carry
        value, grads = jax.value_and_grad(loss)(params)
        updates, moments = optimizer.update(grads, moments)
        return (optax.apply_updates(params, updates), moments), value

    losses = jax.jit(lambda start: jax.lax.scan(step, start, None, 200)[1])((params, optimizer.init(params)))
    assert losses[0] == pytest.approx(math.log(8), rel=0.1)
    assert losses[-1] < 0.05


def stage_of(cardinalities: list[int]) -> Any:
    batches = [{"table": table_of(8, seed), "table_missing": jnp.zeros((8, N), bool).at[:, 5].set(True)} for seed in (60, 70)]
    return SimpleNamespace(batches=lambda: iter(batches), spec=SimpleNamespace(details={"cardinalities": cardinalities}))


def test_marginals_are_values_of_the_training_rows() -> None:
    marginals = TIP.begin(Variables(PARAMS, STATE), stage_of([3, 2])).state["marginals"]
    given = np.concatenate([table_of(8, 60), table_of(8, 70)])
    assert marginals.shape == (5, N)
    assert all(np.isin(marginals[:, column], given[:, column]).all() for column in range(N - 1))
    np.testing.assert_array_equal(marginals[:, 5], 0.0)
    assert len(np.unique(marginals[:, 4])) == 5
    narrow = Tip(**SMALL | {"cardinalities": (2, 2)})
    with pytest.raises(UserError, match=r"column 0 has more values; those of the data are \(3, 2\)"):
        narrow.begin(Variables(PARAMS, STATE), stage_of([3, 2]))


def test_features_of_complete_and_incomplete_rows() -> None:
    found = jax.jit(TIP.features)(PARAMS, STATE, BATCH)
    shapes = {"pooled": (B, 16), "tokens": (B, 1 + N, 16), "image": (B, 8), "row": (B, 16), "joined": (B, 40)}
    shapes |= {"missing_40": (B, 16), "missing_80": (B, 16), "image_embedding": (B, 8), "row_embedding": (B, 8)}
    assert {name: value.shape for name, value in found.items()} == shapes
    few, many = (np.asarray(TIP.removed(EXAMPLE, share)) for share in TIP.missing_shares)
    np.testing.assert_array_equal(few.sum(1), 2)
    np.testing.assert_array_equal(many.sum(1), 4)
    assert (many | ~few).all()
    np.testing.assert_array_equal(few, TIP.removed(EXAMPLE, 0.4))
    directly = jax.jit(TIP.features)(PARAMS, STATE, BATCH | {"table_missing": ROWS.missing | few})
    np.testing.assert_allclose(directly["pooled"], found["missing_40"], atol=1e-5)


def test_pictures_of_rows() -> None:
    spec = DataSpec("rows", None, 1, (0.0,), (1.0,), details={"columns": list("abcdef")})
    picture = TIP.draw(PARAMS, STATE, BATCH, jax.random.key(0), spec)["table"]
    assert picture.dtype == np.uint8
    assert picture.ndim == 3
    assert picture.std() > 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mask_ratio": 0.01}, "hides 0 of 6 columns"),
        ({"table_width": 15}, "15 is not a multiple of its 2 heads"),
        ({"softmax": "joined"}, "did you mean 'joint'"),
        ({"views": "car"}, "did you mean 'cars'"),
        ({"weights": (1.0, -1.0, 0.0)}, "none negative"),
        ({"cardinalities": (), "continuous": 0}, "there must be columns"),
        ({"temperature": 0.0}, "must be positive"),
    ],
)
def test_wrong_arguments_are_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Tip(**SMALL | wrong)


def test_wrong_data_is_named() -> None:
    with pytest.raises(UserError, match="rows have 7 columns"):
        TIP.init(jax.random.key(0), BATCH | {"table": jnp.zeros((B, 7))})
    with pytest.raises(UserError, match="table_images: and digits_table"):
        TIP.init(jax.random.key(0), {"image": IMAGES})


def test_agrees_with_the_released_code(shared) -> None:
    case = Case.read(shared / "goldens" / "tip" / "a")
    with jax.enable_x64(True):
        system = system_of(case)
        found = replay_forward(case, system, *variables_of(case, system))
    rows = [compare(name, case.outputs[name], value) for name, value in found.items() if name in case.outputs]
    assert len(rows) > 25
    assert [row for row in rows if not row.agrees] == []
