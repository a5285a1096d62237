"""What moving tokens costs as a gather and as a product with a one-hot matrix, forward and backward, for MAE's shapes.

    python tools/plan_token_moves.py                              # compiled for v5e:1x1 and v6e:1x1, no TPU needed
    python tools/plan_token_moves.py --topology cpu --shape 8,196,49,768

For a TPU it prints the compiler's own estimates: FLOPs, bytes accessed and seconds. For `cpu` it times both in turns and prints the median.
Exit status: 0, or 2 for bad input.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# Before jax is imported: the tool itself computes on no accelerator.
os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.sharding import SingleDeviceSharding  # noqa: E402

from maskae.errors import UserError  # noqa: E402
from maskae.masking import restore_tokens, take_tokens  # noqa: E402
from maskae.planning.chips import parse_topology  # noqa: E402
from maskae.planning.compile import tpu_devices  # noqa: E402

IMPLEMENTATIONS = ("gather", "one_hot")
TURNS = 11


def moves(shape: tuple[int, int, int, int], dtype: Any, implementation: str) -> Iterator[tuple[str, Callable[..., Any], list[Any]]]:
    """(name, function giving value and gradient, shapes of its arguments) of both moves for (batch, tokens, kept, width)."""
    batch, length, kept, width = shape

    def take(tokens: jax.Array, indices: jax.Array, gradient: jax.Array) -> Any:
        value, pull_back = jax.vjp(lambda x: take_tokens(x, indices, implementation), tokens)
        return value, pull_back(gradient)

    def restore(tokens: jax.Array, token: jax.Array, indices: jax.Array, gradient: jax.Array) -> Any:
        value, pull_back = jax.vjp(lambda x, y: restore_tokens(x, y, indices, implementation), tokens, token)
        return value, pull_back(gradient)

    whole, part, token = (jax.ShapeDtypeStruct(size, dtype) for size in ((batch, length, width), (batch, kept, width), (1, 1, width)))
    yield "take", take, [whole, jax.ShapeDtypeStruct((batch, kept), jnp.int32), part]
    yield "restore", restore, [part, token, jax.ShapeDtypeStruct((batch, length), jnp.int32), whole]


def estimate(function: Callable[..., Any], shapes: list[Any], device: Any) -> tuple[float, float, float]:
    """FLOPs, bytes and seconds of a program as its compiler sees them."""
    placed = [jax.ShapeDtypeStruct(each.shape, each.dtype, sharding=SingleDeviceSharding(device)) for each in shapes]
    cost: Any = jax.jit(function).lower(*placed).compile().cost_analysis()
    # Every instruction that the compiler has no estimate for (those that only name memory) counts as -1 second.
    return cost["flops"], cost["bytes accessed"], cost["optimal_seconds"] % 1


def arguments(shapes: list[Any], length: int) -> list[jax.Array]:
    """Random tokens, and per sample random indices without repeats."""
    key = jax.random.key(0)
    order = jnp.argsort(jax.random.uniform(key, (shapes[0].shape[0], length)), axis=1)
    return [order[:, : each.shape[1]] if each.dtype == jnp.int32 else jax.random.normal(key, each.shape, each.dtype) for each in shapes]


def timed(functions: list[Callable[..., Any]], given: list[jax.Array]) -> list[float]:
    """Median seconds of each function, run in turns."""
    compiled = [jax.jit(function) for function in functions]
    seconds: list[list[float]] = [[] for _ in functions]
    for turn in range(TURNS + 1):
        for function, record in zip(compiled, seconds, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(function(*given))
            if turn:
                record.append(time.perf_counter() - start)
    return [statistics.median(record) for record in seconds]


def report(name: str, shape: tuple[int, int, int, int], dtype: Any) -> Iterator[str]:
    """One line per move on the topology called `name`. Raises UserError for an unknown one."""
    start = f"{name:8} {jnp.dtype(dtype).name:8} {','.join(map(str, shape)):16}"
    pairs = list(zip(*(moves(shape, dtype, each) for each in IMPLEMENTATIONS), strict=True))
    if name == "cpu":
        for (move, gather, shapes), (_, one_hot, _) in pairs:
            first, second = timed([gather, one_hot], arguments(shapes, shape[1]))
            yield f"{start} {move:7} gather {1e3 * first:.3f} ms, one_hot {1e3 * second:.3f} ms: {second / first:.2f} times"
        return
    device = tpu_devices(parse_topology(name))[0]
    for both in pairs:
        parts = []
        for implementation, (_, function, shapes) in zip(IMPLEMENTATIONS, both, strict=True):
            flops, moved, seconds = estimate(function, shapes, device)
            parts.append(f"{implementation} {1e6 * seconds:.0f} us ({flops / 1e9:.3f} GFLOP, {moved / 1e9:.3f} GB)")
        yield f"{start} {both[0][0]:7} {', '.join(parts)}"


def parse_shape(text: str) -> tuple[int, int, int, int]:
    """`64,196,49,768` -> numbers. Raises UserError for anything else."""
    parts = text.split(",")
    if len(parts) != 4 or not all(part.isdigit() and int(part) for part in parts) or int(parts[2]) > int(parts[1]):
        raise UserError(f"--shape {text}: expected batch,tokens,kept,width, such as 64,196,49,768")
    batch, length, kept, width = map(int, parts)
    return batch, length, kept, width


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; bad input is one line on standard error and status 2."""
    parser = argparse.ArgumentParser(prog="tools/plan_token_moves.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", action="append", metavar="NAME", help="such as v5e:1x1, or cpu; may be repeated")
    parser.add_argument("--shape", action="append", metavar="B,L,N,D", help="batch, tokens, kept ones, width; may be repeated")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    flags = parser.parse_args(argv)
    try:
        for name in flags.topology or ["v5e:1x1", "v6e:1x1"]:
            for shape in map(parse_shape, flags.shape or ["64,196,49,768", "64,196,49,1024", "64,196,49,512"]):
                for line in report(name, shape, jnp.dtype(flags.dtype)):
                    print(line, flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
