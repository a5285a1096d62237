"""Classification losses against their definitions."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from maskae.losses.classification import label_smoothing_cross_entropy, soft_target_cross_entropy

LOGITS = np.asarray([[2.0, -1.0, 0.5], [0.0, 3.0, 1.0]])
LOG_PROBABILITIES = LOGITS - np.log(np.exp(LOGITS).sum(1, keepdims=True))


def test_soft_targets() -> None:
    targets = np.asarray([[0.7, 0.2, 0.1], [0.0, 0.5, 0.5]])
    expected = -(targets * LOG_PROBABILITIES).sum(1).mean()
    np.testing.assert_allclose(soft_target_cross_entropy(LOGITS, targets), expected, rtol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_smoothing_mixes_the_label_with_all_classes(smoothing: float) -> None:
    labels = jnp.asarray([0, 2])
    plain = -LOG_PROBABILITIES[[0, 1], [0, 2]]
    expected = ((1 - smoothing) * plain - smoothing * LOG_PROBABILITIES.mean(1)).mean()
    np.testing.assert_allclose(label_smoothing_cross_entropy(LOGITS, labels, smoothing), expected, rtol=1e-6)


def test_large_logits_in_half_precision_stay_finite() -> None:
    loss = label_smoothing_cross_entropy(jnp.asarray([[300.0, -300.0]], jnp.bfloat16), jnp.asarray([1]), 0.0)
    assert loss.dtype == jnp.float32
    assert float(loss) == pytest.approx(600.0)
