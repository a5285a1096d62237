"""SimCLR, MoCo v2, BYOL and SwAV: what the cards say has to hold, and their reference cases."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskae.errors import UserError
from maskae.interop.case import Case
from maskae.interop.cnn_contrastive import (
    byol_layout,
    byol_momentum,
    replay_byol,
    replay_moco,
    replay_optimizers,
    replay_schedules,
    replay_simclr,
    replay_slices,
    swav_layout,
    swav_of,
    with_norms,
)
from maskae.interop.parity import compare
from maskae.losses.sinkhorn import sinkhorn
from maskae.nn.heads import cosine_momentum
from maskae.optim import ema_update
from maskae.systems.byol import Byol
from maskae.systems.cnn_finetune import CnnFineTune
from maskae.systems.contract import System
from maskae.systems.moco_v2 import MocoV2
from maskae.systems.simclr import SimClr
from maskae.systems.swav import Swav
from maskae.vectors import unit

NET: dict[str, Any] = {"image_size": 8, "channels": 1, "network": "resnet18", "layers": (1,), "widths": (4,)}
NET |= {"mean": (0.5,), "std": (0.25,), "views": "crop_flip"}
BATCH = {"image": jax.random.uniform(jax.random.key(1), (4, 8, 8, 1)), "example": jnp.arange(4), "label": jnp.arange(4)}
MOCO = MocoV2(**NET, outputs=3, queue=8)
BYOL = Byol(**NET, hidden=5, outputs=3, total_steps=10)
SWAV = Swav(**NET, hidden=5, outputs=3, prototypes=6, small_crops=2, small_size=4, freeze_prototypes=2)
SIMCLR = SimClr(**NET, hidden=5, outputs=3)
KEY = jax.random.key(7)


def test_moco_puts_exactly_the_new_keys_at_the_pointer() -> None:
    assert isinstance(MOCO, System)
    variables = MOCO.init(KEY, BATCH)
    jax.tree.map(np.testing.assert_array_equal, variables.params, variables.state["key"]["params"])
    step = jax.jit(lambda p, s: MOCO.compare(p, s, BATCH["image"], 1 - BATCH["image"]))
    moved = jax.tree.map(lambda x: x + 0.1, variables.params)
    first = step(moved, variables.state)
    np.testing.assert_array_equal(first.state["queue"][:4], first.keys)
    np.testing.assert_array_equal(first.state["queue"][4:], variables.state["queue"][4:])
    np.testing.assert_allclose(first.logits[:, 1:], first.queries @ variables.state["queue"].T / 0.07, rtol=1e-5, atol=1e-5)
    expected = ema_update(variables.params, moved, 0.999)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), first.state["key"]["params"], expected)
    second = step(moved, first.state)
    assert int(first.state["pointer"]) == 4 and int(second.state["pointer"]) == 0
    np.testing.assert_array_equal(second.state["queue"][4:], second.keys)
    linear = dataclasses.replace(MOCO, mlp_head=False).init(KEY, BATCH).params["projector"]
    assert set(linear) == {"fc2"} and linear["fc2"]["kernel"].shape == (4, 3)
    with pytest.raises(UserError, match="queue=6 is no multiple of the batch of 4"):
        dataclasses.replace(MOCO, queue=6).loss(*variables, BATCH, KEY, jnp.int32(0))


def test_byol_target_follows_and_its_loss_is_bounded() -> None:
    variables = BYOL.init(KEY, BATCH)
    target = BYOL.target_params(*variables, jnp.int32(0))
    online = {name: variables.params[name] for name in ("encoder", "projector")}
    jax.tree.map(np.testing.assert_array_equal, target, online)
    first, second, state = jax.jit(lambda: BYOL.compare(*variables, BATCH["image"], 1 - BATCH["image"], target))()
    assert -2 <= float(first) <= 2 and -2 <= float(second) <= 2
    assert jax.tree.structure(state) == jax.tree.structure(variables.state)
    moved = jax.tree.map(lambda x: x + 0.1, variables.params)
    later = BYOL.target_params(moved, state, jnp.int32(1))
    expected = ema_update(variables.params["projector"], moved["projector"], 0.996)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), later["projector"], expected)
    assert [round(float(cosine_momentum(jnp.asarray(s), 0.996, 10)), 6) for s in (0, 5, 10, 20)] == [0.996, 0.998, 1.0, 1.0]


class Aligned(Byol):
    """Every image has the same representation, and projector and predictor keep it."""

    def project(self, params: Any, state: Any, images: jax.Array) -> tuple[jax.Array, Any]:
        return jnp.ones((images.shape[0], 3)), {"encoder": state["encoder"], "projector": state["projector"]}


def test_byol_is_minus_four_where_every_prediction_is_aligned() -> None:
    system = Aligned(**NET, hidden=5, outputs=3)
    variables = system.init(KEY, BATCH)
    # With zero weights the predictor gives its last bias for every image.
    params = {**variables.params, "predictor": jax.tree.map(jnp.zeros_like, variables.params["predictor"])}
    params["predictor"]["fc2"]["bias"] = jnp.full(3, 0.5)
    found = system.compare(params, variables.state, BATCH["image"], BATCH["image"], variables.state["target"]["params"])
    assert float(found.first + found.second) == pytest.approx(-4, abs=1e-5)


def test_swav_prototypes_wait_and_have_unit_length() -> None:
    variables = SWAV.init(KEY, BATCH)
    image = BATCH["image"]
    crops = [image, 1 - image, image[:, :4, :4], image[:, 4:, 4:]]
    run = jax.jit(jax.value_and_grad(lambda p, step: SWAV.cluster(p, variables.state, crops, step).loss))
    loss, waiting = run(variables.params, jnp.int32(1))
    _, learning = run(variables.params, jnp.int32(2))
    assert float(jnp.abs(waiting["prototypes"]["kernel"]).max()) == 0 < float(jnp.abs(learning["prototypes"]["kernel"]).max())
    longer = {**variables.params, "prototypes": {"kernel": 5 * variables.params["prototypes"]["kernel"]}}
    assert float(run(longer, jnp.int32(1))[0]) == pytest.approx(float(loss), rel=1e-5)


def test_a_swav_case_may_have_a_linear_head_one_size_of_crops_or_three() -> None:
    options = {"layers": [1], "sizes": [32], "nmb_crops": [2], "hidden_mlp": 0, "output_dim": 3, "nmb_prototypes": 6, "temperature": 0.1}
    options |= {"epsilon": 0.05, "sinkhorn_iterations": 3}
    kernels = {"conv1": (2, 4, 1, 1), "conv3": (8, 2, 1, 1)}
    weights = {f"swav.layer1.0.{name}.weight": np.zeros(shape) for name, shape in kernels.items()}
    weights |= {"swav.conv1.weight": np.zeros((4, 3, 7, 7)), "swav.prototypes.weight": np.zeros((6, 3))}
    case = Case(Path("case"), {"config": {"swav": options}}, weights, {}, {})
    linear = swav_of(case)
    with jax.enable_x64(True):
        assert linear.small_crops == 0 and set(jax.eval_shape(linear.init, KEY, {}).params["projector"]) == {"fc2"}
    assert swav_layout(0).names("projector/fc2/kernel")[0] == ("swav.projection_head.weight",)
    assert swav_layout(5).names("projector/fc2/kernel")[0] == ("swav.projection_head.3.weight",)
    three = {"config": {"swav": options | {"sizes": [32, 24, 16], "nmb_crops": [2, 2, 3]}}}
    assert swav_of(dataclasses.replace(case, record=three)).small_crops == 5
    with pytest.raises(UserError, match="nmb_prototypes=6 cannot be replayed"):
        swav_of(dataclasses.replace(case, weights={name: value for name, value in weights.items() if "prototypes" not in name}))


def test_sinkhorn_balances_samples_and_prototypes() -> None:
    scores = unit(jax.random.normal(KEY, (12, 5)))
    codes = sinkhorn(scores, 0.05, 200)
    np.testing.assert_allclose(codes.sum(1), 1, atol=1e-5)
    np.testing.assert_allclose(codes.sum(0), 12 / 5, atol=1e-3)
    np.testing.assert_allclose(sinkhorn(scores + 7.0, 0.05, 3), sinkhorn(scores, 0.05, 3), atol=1e-4)
    # As many prototypes as samples and one clear match each: a permutation.
    order = jnp.asarray([2, 0, 3, 1])
    np.testing.assert_allclose(sinkhorn(jnp.eye(4)[order], 0.05, 3), jnp.eye(4)[order], atol=1e-4)
    # The plain form of the released code.
    q = np.exp(np.asarray(scores, np.float64) / 0.05).T
    q /= q.sum()
    for _ in range(3):
        q /= q.sum(1, keepdims=True) * 5
        q /= q.sum(0, keepdims=True) * 12
    np.testing.assert_allclose(sinkhorn(scores, 0.05, 3), (q * 12).T, atol=1e-5)


def test_simclr_learns_in_place_of_the_order_of_its_batch() -> None:
    variables = SIMCLR.init(KEY, BATCH)
    run = jax.jit(lambda batch: SIMCLR.loss(*variables, batch, KEY, jnp.int32(0)))
    order = jnp.asarray([3, 1, 0, 2])
    loss, outputs = run(BATCH)
    assert float(run({name: value[order] for name, value in BATCH.items()})[0]) == pytest.approx(float(loss), rel=1e-5)
    assert -1 <= float(outputs.metrics["alignment"]) <= 1
    panels = SIMCLR.reconstruct(*variables, BATCH, KEY)
    assert set(panels) == set(SIMCLR.panel_labels) and panels["view 1"].shape == (4, 8, 8, 1)


def test_a_classifier_takes_the_encoder_and_its_statistics() -> None:
    tuned = CnnFineTune(**{name: value for name, value in NET.items() if name != "views"}, num_classes=4)
    given, fresh = SIMCLR.init(jax.random.key(9), BATCH), tuned.init(KEY, BATCH)
    given.state["encoder"]["stem"]["norm"]["mean"] += 1.0
    started = tuned.with_pretrained(fresh, given)
    jax.tree.map(np.testing.assert_array_equal, started.params["encoder"], given.params["encoder"])
    jax.tree.map(np.testing.assert_array_equal, started.state["encoder"], given.state["encoder"])
    assert tuned.features(*started, BATCH)["logits"].shape == (4, 4)
    wider = dataclasses.replace(tuned, widths=(6,), stem_width=4)
    with pytest.raises(UserError, match="does not fit; .* leaves differ: encoder/stage1_block0/conv1/kernel"):
        wider.with_pretrained(wider.init(KEY, BATCH), given)
    with pytest.raises(UserError, match="encoder does not fit; .* leaves differ: encoder/.* missing there"):
        tuned.with_pretrained(fresh, fresh._replace(params={"head": {}}))


def test_running_statistics_stay_and_the_loss_is_that_of_evaluation() -> None:
    tuned = CnnFineTune(**{name: value for name, value in NET.items() if name != "views"}, num_classes=4)
    params, state = tuned.init(KEY, BATCH)
    state["encoder"]["stem"]["norm"]["mean"] += 1.0
    logits = tuned.features(params, state, BATCH)["logits"]
    expected = -jax.nn.log_softmax(logits)[jnp.arange(4), BATCH["label"]].mean()
    for held in (True, False):
        loss, outputs = dataclasses.replace(tuned, running_statistics=held).loss(params, state, BATCH, KEY, 0)
        moved = outputs.state["encoder"]["stem"]["norm"]["mean"] - state["encoder"]["stem"]["norm"]["mean"]
        assert (float(jnp.abs(moved).max()) == 0) == held
        assert (float(loss) == pytest.approx(float(expected), rel=1e-5)) == held


def test_words_and_numbers_that_cannot_work_are_named() -> None:
    with pytest.raises(UserError, match="unknown views 'natural_' \\(did you mean 'natural'"):
        SimClr(**(NET | {"views": "natural_"}))
    with pytest.raises(UserError, match="temperature=0 must be positive"):
        SimClr(**NET, temperature=0)
    with pytest.raises(UserError, match="total_steps=0"):
        Byol(**NET, total_steps=0)


def case_of(meanings: dict[str, str], inputs: dict[str, np.ndarray], stored: str = "") -> Case:
    """A case whose outputs are nothing but what is said of them, of length 31; `stored` is said of the input `ct/raw`."""
    outputs = {name: {"meaning": meaning} for name, meaning in meanings.items()}
    tensors = {"outputs.safetensors": outputs, "inputs.safetensors": {"ct/raw": {"meaning": stored}}}
    return Case(Path("case"), {"tensors": tensors}, {}, inputs, {name: np.zeros(31) for name in meanings})


def test_a_slope_gives_whole_hounsfield_units_cut_towards_zero() -> None:
    case = case_of({"ct/hu": "slope 1.5, intercept -1000"}, {"ct/raw": np.asarray([[-2000, -3, 1, 7]])}, "-2000 marks padding")
    np.testing.assert_array_equal(replay_slices(case)["ct/hu"].value, [[-1000, -1004, -999, -990]])


@pytest.mark.parametrize(("words", "middle"), [("cosine=True", 0.5), ("cosine=False, linear=True", 0.5), ("cosine=False", 1.0)])
def test_swavs_factor_after_the_warm_up_is_a_cosine_a_line_or_constant(words: str, middle: float) -> None:
    case = case_of({"schedule/swav_factor": f"linear_warmup_decay(warmup_steps=10, total_steps=30, {words})"}, {})
    factor = replay_schedules(case)["schedule/swav_factor"].value
    assert factor[5] == pytest.approx(0.5) and factor[20] == pytest.approx(middle, abs=1e-6)
    assert (factor[15] == pytest.approx(0.75)) == ("linear" in words)


def test_byols_momentum_is_found_where_its_rise_is_not_recorded() -> None:
    rise = {"byol/tau_by_global_step": "over global_step 0..40 with max_steps 40, initial_tau .99"}
    assert byol_momentum(case_of(rise, {})) == (40, 0.99)
    assert byol_momentum(case_of({"byol/target_after_ema/encoder.lin.bias": "one EMA update with tau .98 (no step)"}, {})) == (1, 0.98)
    assert byol_momentum(case_of({"byol/loss": "sum"}, {})) == (1, 0.996)


def test_a_gradient_that_is_rounding_may_differ_by_rounding() -> None:
    grads = {"encoder": {"lin": {"kernel": np.ones((2, 3)), "bias": np.full(3, 1e-18)}}}
    found = with_norms(grads, byol_layout("online_network"))
    for name in ("grad/byol.online_network.encoder.lin.bias", "gradnorm/byol.online_network.encoder.lin.bias"):
        assert compare(name, -3 * np.asarray(found[name].value), found[name]).agrees
    name = "gradnorm/byol.online_network.encoder.lin.weight"
    assert not compare(name, 1.001 * np.asarray(found[name].value), found[name]).agrees


def test_the_recorded_parts_of_the_comparison_are_reproduced(shared: Path) -> None:
    case = Case.read(shared / "goldens" / "spark_medical" / "a")
    parts = (replay_moco, replay_byol, replay_simclr, replay_optimizers, replay_schedules, replay_slices)
    with jax.enable_x64(True):
        found = {name: value for part in parts for name, value in part(case).items()}
    recorded = [name for name in found if name in case.outputs]
    assert len(recorded) > 50
    for name in recorded:
        row = compare(name, case.outputs[name], found[name])
        assert row.agrees, row
