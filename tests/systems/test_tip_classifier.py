"""TIP's classifier: what it trains, what it takes from pretraining, and its logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskae.errors import UserError
from maskae.systems.contract import System, Variables
from maskae.systems.tip import Tip
from maskae.systems.tip_classifier import TipClassifier
from tests.drawn import drawn
from tests.systems.test_tip import BATCH, SMALL, STARTED, B

CLASSIFIER = TipClassifier(**SMALL, num_classes=3)
LABELLED = BATCH | {"label": jnp.arange(B) % 3}


@pytest.fixture(scope="module")
def fresh() -> Variables:
    return drawn(CLASSIFIER.init, jax.random.key(5), BATCH)


def test_is_a_system() -> None:
    assert isinstance(CLASSIFIER, System)


def test_it_takes_the_pretrained_encoders(fresh: Variables) -> None:
    taken = CLASSIFIER.with_pretrained(fresh, STARTED)
    for part in ("encoder", "table", "fusion"):
        jax.tree.map(np.testing.assert_array_equal, taken.params[part], STARTED.params[part])
    jax.tree.map(np.testing.assert_array_equal, taken.params["head"], fresh.params["head"])
    jax.tree.map(np.testing.assert_array_equal, taken.state, STARTED.state)
    other = jax.eval_shape(Tip(**SMALL | {"table_width": 8}).init, jax.random.key(0), BATCH)
    with pytest.raises(UserError, match="encoder does not fit; .* leaves differ: .*fusion/"):
        CLASSIFIER.with_pretrained(fresh, Variables(other.params, fresh.state))


@pytest.mark.parametrize("trained", ["all", "head"])
def test_what_is_trained(fresh: Variables, trained: str) -> None:
    system = TipClassifier(**SMALL, num_classes=3, trained=trained)

    @jax.jit
    def of(params):
        return jax.value_and_grad(system.loss, has_aux=True)(params, fresh.state, LABELLED, jax.random.key(1), 0)

    (loss, outputs), grads = of(fresh.params)
    assert loss == pytest.approx(np.log(3), rel=0.5)
    largest = {name: max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(part)) for name, part in grads.items()}
    assert largest["head"] > 1e-4
    moved = jnp.abs(outputs.state["encoder"]["stem"]["norm"]["mean"] - fresh.state["encoder"]["stem"]["norm"]["mean"]).max()
    assert (moved > 0) == (trained == "all")
    for part in ("encoder", "table", "fusion"):
        assert (largest[part] > 0) == (trained == "all")


def test_logits(fresh: Variables) -> None:
    found = jax.jit(CLASSIFIER.features)(fresh.params, fresh.state, BATCH)
    head = fresh.params["head"]["fc2"]
    assert found["logits"].shape == (B, 3)
    np.testing.assert_allclose(found["logits"], found["pooled"] @ head["kernel"] + head["bias"], atol=1e-5)
    assert "image_embedding" not in found
