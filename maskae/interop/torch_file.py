"""PyTorch checkpoints to safetensors: the one place that imports torch, and only when it is called.

    python -m maskae.interop.torch_file mae_pretrain_vit_base.pth mae_base.safetensors
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from maskae.errors import UserError

# Where training scripts put the state dict inside what they save.
STATE_KEYS = ("model", "state_dict", "model_state_dict", "module")


def convert_torch_file(source: str | Path, destination: str | Path) -> list[str]:
    """Write every tensor of a PyTorch state dict as safetensors under the same names.

    Only tensors are unpickled (`weights_only`), so that a file from elsewhere cannot run code.

    Returns:
        The names written.

    Raises:
        UserError: torch is not installed, the source is missing or holds no tensors, or the destination exists.
    """
    try:
        import torch
    except ImportError as error:
        raise UserError("reading a PyTorch file needs torch: pip install 'maskae[interop]'") from error
    source, destination = Path(source), Path(destination)
    if not source.is_file():
        raise UserError(f"no weights file {source}")
    if destination.exists():
        raise UserError(f"{destination} exists; weights are not overwritten")
    state: Any = torch.load(source, map_location="cpu", weights_only=True)
    for key in STATE_KEYS:
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
            break
    if not isinstance(state, dict):
        raise UserError(f"{source} holds a {type(state).__name__}, not a state dict")
    tensors = {}
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            value = value.detach()
            value = value.float() if value.dtype in (torch.bfloat16, torch.float16) else value
            tensors[name] = np.asarray(value.numpy(), order="C")
    if not tensors:
        raise UserError(f"{source} holds no tensors at its top level or under {', '.join(STATE_KEYS)}")
    save_file(tensors, destination, metadata={"source": source.name})
    return sorted(tensors)


def main(arguments: list[str]) -> int:
    """Convert `SOURCE DESTINATION`; 0, or 2 with one line on stderr."""
    try:
        if len(arguments) != 2:
            raise UserError("usage: python -m maskae.interop.torch_file SOURCE.pth DESTINATION.safetensors")
        names = convert_torch_file(*arguments)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{len(names)} tensors written to {arguments[1]}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
