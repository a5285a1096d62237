"""Features of the raw digits, and a count of compilations."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import jax
import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from maskae.evaluate import Features

COMPILED = "/jax/core/compile/backend_compile_duration"


@pytest.fixture(scope="session")
def digits() -> tuple[Features, Features]:
    """Raw pixels of the digits in the split of the digits protocol, unnormalised: 1437 and 360 rows, 64 channels, 16 tokens of 4."""
    images, labels = load_digits(return_X_y=True)
    rows = train_test_split(np.arange(len(labels)), test_size=360, stratify=labels, random_state=0)

    def features(chosen: np.ndarray) -> Features:
        tokens = images[chosen].reshape(-1, 4, 2, 4, 2).transpose(0, 1, 3, 2, 4).reshape(-1, 16, 4)
        return {
            "pooled": images[chosen].astype(np.float32),
            "tokens": tokens.astype(np.float32),
            "label": labels[chosen].astype(np.int32),
        }

    return features(rows[0]), features(rows[1])


@pytest.fixture(scope="session")
def compilations() -> Iterator[Callable[[], int]]:
    """How many programs XLA has compiled (or found in its cache) so far."""
    count = 0

    def listen(event: str, duration: float, **_: object) -> None:
        nonlocal count
        count += event == COMPILED

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield lambda: count
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture(scope="session")
def blobs() -> Callable[..., Features]:
    """Separable features: one direction per class (the same for every seed), plus noise; labels in turn."""

    def make(seed: int, *, rows: int = 120, width: int = 12, classes: int = 4, noise: float = 0.1) -> Features:
        centres = np.random.default_rng(99).normal(size=(classes, width))
        generator = np.random.default_rng(seed)
        label = np.arange(rows, dtype=np.int32) % classes
        pooled = centres[label] + noise * generator.normal(size=(rows, width))
        return {"pooled": pooled.astype(np.float32), "label": label}

    return make


@pytest.fixture(scope="session")
def shuffled_labels() -> Callable[[Features, int], Features]:
    """The same features with labels that mean nothing."""
    return lambda features, seed: {**features, "label": np.random.default_rng(seed).permutation(features["label"])}
