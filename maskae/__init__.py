"""maskae: masked autoencoders and contrastive learners in JAX, pretrained with one command on a CPU, a GPU mesh or a TPU pod."""

import importlib.util
import os
from pathlib import Path

__version__ = "0.1.0"


def _has_only_the_compiler_of_a_tpu() -> bool:
    """Whether libtpu is installed (it comes with the tests, to compile for TPUs) on a machine that has neither a TPU nor a GPU."""
    devices = ("accel*", "vfio*", "nvidia*", "kfd")
    return importlib.util.find_spec("libtpu") is not None and not any(any(Path("/dev").glob(pattern)) for pattern in devices)


# There jax would look for a TPU and libtpu would complain at length. This stands before any import of jax.
if _has_only_the_compiler_of_a_tpu():
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
