"""Write the weights of a run for another library.

    python tools/export_weights.py RUN --layout timm --out mae_base.safetensors

Takes the newest whole checkpoint of the run folder (the averaged parameters where the run kept them). The file's metadata holds the config
and the data statistics of the run. Never overwrites.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from maskae.checkpoint import Checkpointer
from maskae.errors import UserError
from maskae.interop.layout import Geometry
from maskae.interop.vit import LAYOUTS
from maskae.interop.weights import export_weights
from maskae.start import read_run


def export_run(run: Path, out: Path, layout: str) -> list[str]:
    """Export the newest checkpoint of `run`; the parameters that the layout has no name for.

    Raises UserError where the run has no checkpoint or no patch grid, and as `export_weights` does.
    """
    pretrained = read_run(run)
    with Checkpointer(str(run / "checkpoints"), keep_last=1) as checkpointer:
        metadata = checkpointer.metadata(pretrained.step)
    if pretrained.grid is None:
        raise UserError(f"{run} is not a run on image patches; there is no layout for it")
    params = pretrained.params
    if "encoder" not in params and "encoder" in pretrained.state:
        params = params | {"encoder": pretrained.state["encoder"]}  # a probe keeps its frozen encoder there
    geometry = Geometry(metadata["config"]["model"]["patch_size"], pretrained.grid)
    return export_weights(params, out, geometry, layout, {"step": str(pretrained.step), "maskae": json.dumps(metadata)})


def main(arguments: list[str]) -> int:
    """Run the command line; the exit status."""
    parser = argparse.ArgumentParser(prog="tools/export_weights.py", description="Write the weights of a run for another library.")
    parser.add_argument("run", type=Path, help="run folder (--workdir of the training)")
    parser.add_argument("--layout", default="paper", choices=sorted(LAYOUTS))
    parser.add_argument("--out", type=Path, required=True, help="the .safetensors file to write")
    given = parser.parse_args(arguments)
    try:
        left_out = export_run(given.run, given.out, given.layout)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"wrote {given.out}")
    for path in left_out:
        print(f"left out, the {given.layout} layout has no name for it: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
