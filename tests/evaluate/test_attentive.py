"""The attentive probe against cross-attention written out in full, and against a slow AdamW loop."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from maskae.errors import UserError
from maskae.evaluate import Features, standardise
from maskae.evaluate.attentive import attentive_logits, attentive_probe, initial_params
from maskae.evaluate.probe import Entry, make_plan, select

DECAYED = {("value", "kernel"), ("head", "kernel")}


def spotted(seed: int, rows: int = 160, tokens: int = 6, width: int = 8, classes: int = 6) -> Features:
    """Only one token of each row, in a random place and marked in channel 0, tells the class; the others say another class."""
    centres = np.random.default_rng(7).normal(size=(classes, width))
    generator = np.random.default_rng(seed)
    label = np.arange(rows, dtype=np.int32) % classes
    x = centres[generator.integers(0, classes, (rows, tokens))]
    place = generator.integers(0, tokens, rows)
    x[np.arange(rows), place] = centres[label]
    x[..., 0] = 0.0
    x[np.arange(rows), place, 0] = 3.0
    return {"tokens": (x + 0.1 * generator.normal(size=x.shape)).astype(np.float32), "label": label}


def probe(train: Features, val: Features, **arguments: object) -> list[Entry]:
    return attentive_probe(train["tokens"], train["label"], val["tokens"], val["label"], **arguments)


def test_logits_equal_full_cross_attention() -> None:
    """Query and key projections folded into one vector per head, values projected after pooling: the same function."""
    generator = np.random.default_rng(0)
    width, heads, size, classes = 8, 2, 4, 3
    query, head = generator.normal(size=(heads, size)), generator.normal(size=(width, classes))
    key, value = generator.normal(size=(2, heads, width, size))
    scale, bias, head_bias = generator.normal(size=width), generator.normal(size=width), generator.normal(size=classes)
    tokens = generator.normal(size=(5, 7, width))
    expected = []
    for image in tokens:
        pooled = []
        for h in range(heads):
            score = (image @ key[h]) @ query[h] / np.sqrt(size)
            weight = np.exp(score - score.max())
            pooled.append((weight / weight.sum()) @ (image @ value[h]))
        x = np.concatenate(pooled)
        x = (x - x.mean()) / np.sqrt(x.var() + 1e-6) * scale + bias
        expected.append(x @ head + head_bias)
    folded = np.einsum("hds,hs->hd", key, query) / np.sqrt(size) * np.sqrt(width)
    params = {
        "query": {"kernel": folded},
        "value": {"kernel": value},
        "norm": {"scale": scale, "bias": bias},
        "head": {"kernel": head, "bias": head_bias},
    }
    np.testing.assert_allclose(attentive_logits(params, tokens.astype(np.float32)), expected, rtol=1e-4, atol=1e-4)


def test_starts_as_mean_pooling() -> None:
    params = initial_params(8, 2, 3, 0)
    params["head"]["kernel"] = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    tokens = np.random.default_rng(1).normal(size=(4, 6, 8)).astype(np.float32)
    mean = np.repeat(tokens.mean(axis=1, keepdims=True), 6, axis=1)
    np.testing.assert_allclose(attentive_logits(params, tokens), attentive_logits(params, mean), rtol=1e-4, atol=1e-5)
    assert not np.allclose(initial_params(8, 2, 3, 1)["value"]["kernel"], params["value"]["kernel"])


def slow_adamw(x: np.ndarray, y: np.ndarray, batches: np.ndarray, rate: float, decay: float, seed: int) -> dict:
    def loss(params: dict, rows: np.ndarray) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(attentive_logits(params, x[rows]), y[rows]).mean()

    x, y = jnp.asarray(x), jnp.asarray(y)
    gradient = jax.jit(jax.grad(loss))
    params = initial_params(8, 2, 6, seed)
    first, second = (jax.tree.map(np.zeros_like, params) for _ in range(2))
    for step, rows in enumerate(batches):
        grads = jax.tree.map(np.asarray, gradient(params, rows))
        now = rate * (1 + np.cos(np.pi * step / len(batches))) / 2
        for group, leaves in params.items():
            for name, value in leaves.items():
                g = grads[group][name]
                first[group][name] = 0.9 * first[group][name] + 0.1 * g
                second[group][name] = 0.999 * second[group][name] + 0.001 * g**2
                mean, square = first[group][name] / (1 - 0.9 ** (step + 1)), second[group][name] / (1 - 0.999 ** (step + 1))
                shrink = decay * value if (group, name) in DECAYED else 0.0
                leaves[name] = (value - now * (mean / (np.sqrt(square) + 1e-8) + shrink)).astype(np.float32)
    return params


def test_entries_equal_a_slow_loop() -> None:
    train, val = spotted(0), spotted(1, rows=70)
    arguments = {
        "learning_rates": (3e-3, 3e-2),
        "weight_decays": (0.0, 8.0),
        "epochs": 2,
        "batch_size": 40,
        "held_out_percent": 20.0,
        "seed": 4,
    }
    plan = make_plan(train["label"], **arguments)
    x, val_x = standardise(train["tokens"], val["tokens"])
    for entry in probe(train, val, heads=2, **arguments):
        params = slow_adamw(x, train["label"], plan.batches, entry.learning_rate, entry.weight_decay, 4)
        logits = attentive_logits(params, x[plan.held_out])
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, train["label"][plan.held_out]).mean()
        assert entry.held_out_loss == pytest.approx(float(loss), rel=1e-3)
        guessed = np.asarray(attentive_logits(params, val_x)).argmax(axis=1)
        assert entry.top1 == pytest.approx(np.mean(guessed == val["label"]), abs=1.5 / 70)


def test_finds_the_token_that_a_mean_cannot_see() -> None:
    train, val = spotted(0, rows=300), spotted(1)
    assert select(probe(train, val, heads=2, epochs=40, batch_size=32)).top1 > 0.98
    mean = tuple({**features, "tokens": np.repeat(features["tokens"].mean(axis=1, keepdims=True), 6, axis=1)} for features in (train, val))
    assert select(probe(*mean, heads=2, epochs=40, batch_size=32)).top1 < 0.8


def test_label_noise_is_chance(shuffled_labels: Callable[[Features, int], Features]) -> None:
    train, val = shuffled_labels(spotted(0, rows=600), 2), shuffled_labels(spotted(1, rows=600), 3)
    assert select(probe(train, val, epochs=2)).top1 == pytest.approx(1 / 6, abs=0.06)


def test_one_compilation_and_deterministic_in_the_seed(compilations: Callable[[], int]) -> None:
    train, val = spotted(0), spotted(1)
    before = compilations()
    first, again, other = (probe(train, val, epochs=2, batch_size=31, seed=seed) for seed in (0, 0, 1))
    assert compilations() == before + 1
    assert first == again != other


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(UserError, match="heads = 3 does not divide the token width 8"):
        probe(spotted(0), spotted(1), heads=3)
