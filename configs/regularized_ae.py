"""Regularised autoencoders, "What Regularized Auto-Encoders Learn from the Data-Generating Distribution" (Alain and Bengio, JMLR 2014).

    python -m maskae.main --config configs/regularized_ae.py:tiny --workdir runs/rae_tiny
    python -m maskae.main --config configs/regularized_ae.py:base --workdir runs/rae_base

`:tiny`      scikit-learn's digits, noise of 0.5 falling to 0.1, 3,000 steps of 128: about a minute on 2 CPU cores. With seeds 0, 1, 2 the
             squared error after denoising is 0.532, 0.529, 0.531 of the noise's on held-out digits, and the estimated log density of every
             one of them is above that of its pixels in another order.
             `--config.model.form=residual` is worse here (0.734, seed 0): pixels that are always 0 want a score of 1 / sigma.
`:base`      the paper's spiral in 2-D: 1,000 hidden units, 20,000 steps of 512, which were not run. With 2,000 steps of 256 and
             `--config.model.anneal_steps=1000 --config.optimizer.base_learning_rate=3e-3`, seed 0: rms distance of the estimated score 4.1
             from the best denoiser's and 19.0 from the density's own, from which the best denoiser is 15.7 (size 19.6): sigma is 0.1 and
             the spiral 0.05 wide.
`:mixture`   1-D, two modes, sigma 0.2, 3,000 steps of 2,048, five minutes on one busy core. Seed 0: the estimated score is 0.030 (rms) from
             the best denoiser's and 1.013 from the density's own, from which the best denoiser's is 1.005 (size 3.24).
`:gaussian`  2-D, where both criteria have the same closed form, sigma 0.5, 5,000 steps of 512, six minutes. Seed 0: 0.051 and 0.862, the
             best denoiser's 0.857 (size 2.02); the map's Jacobian J has |J - J^T| / |J| of 0.017 (1.24 before training).
`:curve`     10-D near a closed curve; not run.
The paper prints no numbers. `--config.model.criterion=contractive` trains by the Jacobian instead of noise (`model.probes=1` estimates its
norm, which more than 64 dimensions need).
"""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from maskae.config import default_config, set_duration, use_digits

VARIANTS = ("tiny", "base", "gaussian", "mixture", "curve")
STEPS = 20_000


def get_config(variant: str = "base") -> ConfigDict:
    """Digits for `tiny`, the paper's spiral for `base`, and other densities with a closed form."""
    config = default_config()
    config.system = "regularized_ae"
    config.optimizer.name = "adam"
    set_duration(config.optimizer, warmup_percent=0.0)
    if variant == "tiny":
        return digits(config)
    if variant == "mixture":
        # Trained as the known measurement was: fresh batches, no annealing.
        density(config, "mixture", 1, sigma=0.2, sigma_start=0.0, hidden=(64, 64), form="residual", proposal=1.0)
        return train(config, batch_size=2048, steps=3000, rate=3e-3)
    if variant == "gaussian":
        density(config, "gaussian", 2, sigma=0.5, sigma_start=1.0, proposal=1.2)
        return train(config, batch_size=512, steps=5000, rate=1e-3)
    if variant == "curve":
        density(config, "curve", 10, sigma=0.1, sigma_start=1.0, proposal=0.08)
        return train(config, batch_size=512, steps=STEPS, rate=1e-3)
    density(config, "spiral", 2, sigma=0.1, sigma_start=1.0, proposal=0.3)
    return train(config, batch_size=512, steps=STEPS, rate=1e-3)


def train(config: ConfigDict, *, batch_size: int, steps: int, rate: float) -> ConfigDict:
    """Adam with a cosine to 0, for so many steps; where the noise is annealed, it is in their first half."""
    config.train.batch_size = batch_size
    set_duration(config.train, total_steps=steps)
    config.model.anneal_steps = steps // 2 if config.model.sigma_start else 0
    # base_learning_rate is at a batch of 256.
    config.optimizer.base_learning_rate = rate * 256 / batch_size
    return config


def model(**given: Any) -> dict[str, Any]:
    """The system's arguments, one wide layer unless given."""
    return {
        "hidden": (1000,),
        "form": "plain",
        "criterion": "denoising",
        "activation": "tanh",
        "contraction": 0.0,
        "probes": 0,
        "path_points": 20,
        "chains": 256,
        "chain_steps": 500,
        **given,
    }


def density(config: ConfigDict, name: str, dimensions: int, **given: Any) -> None:
    """Points of a density with a closed form, to compare the estimated score with."""
    config.data.update({"source": f"density:{name}", "channels": 0, "train_transform": (), "val_transform": (), "flip": False})
    config.data.val_percent = 20.0
    config.data.examples = 8000
    config.data.fields = {"x": f"float32[{dimensions}]"}
    config.model = model(field="x", **given)
    config.evaluate.evaluators = {"score_field": {"density": name, "sigma": given["sigma"]}, "denoising": {"shuffled": False}}


def digits(config: ConfigDict) -> ConfigDict:
    """8x8 digits as 64 numbers in 0..1."""
    use_digits(config)
    config.data.statistics = "unit"
    config.model = model(field="image", hidden=(512,), sigma=0.1, sigma_start=0.5, proposal=0.04)
    config.evaluate.evaluators = {"denoising": {}, "knn": {}}
    return train(config, batch_size=128, steps=3000, rate=1e-3)
