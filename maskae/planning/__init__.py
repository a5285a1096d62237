"""What a run would need on accelerators that are not here: memory, FLOPs, bytes and collectives per chip, and what limits the step."""

from __future__ import annotations

import os

# For the TPU compiler on a machine without a TPU: do not ask the cloud's metadata server which machine this is, do not insist on being the
# only process that uses libtpu, and let the compiler's warnings out, among which is that a value is replicated on all chips.
ENVIRONMENT = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_MIN_LOG_LEVEL": "1", "TPU_STDERR_LOG_LEVEL": "1"}


def prepare_environment() -> None:
    """Sets what the TPU compiler reads when it is loaded; must come before its first use in a process."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
