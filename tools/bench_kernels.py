"""Measures every kernel against the plain version of the same computation, in turns, and writes which attention `auto` takes.

    python tools/bench_kernels.py [--kernels attention,contrastive] [--lengths 50,197,226,785,1568] [--options plain,segments]
        [--batch 64] [--dtype bfloat16] [--heads 12] [--head_size 64] [--rounds 7] [--seconds 0.1] [--out figures.json] [--write_table]

Kernels: attention (maskae's implementations and, where it is installed, tokamax), token_moves (gather or one-hot product), contrastive,
chamfer (all pairs at once or in blocks), neighbours (segment_sum or maskae's). Inputs are random. Every version's result and gradients are
compared with the plain version's in float32 and full precision before anything is timed; one that is off is not timed. Then all versions
take turns, the first one changing, --rounds times; a turn is as many calls in a row as fill --seconds. Ratios are taken within a round:
how many times as fast as the first version, median [lowest..highest]. A version wins where it is faster in every round; where none is,
the first one does. Kernels in Pallas are timed only on what they are compiled for.

--write_table puts the winners of forward and backward together into maskae/kernels/attention_table.json, in place of this device's rows of
the same dtype, head size and options. A length counts up to the geometric middle to the next one measured, the last up to itself.
Exit status: 0; 1 where a version was off or failed; 2 for bad input.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

# So that it also works in a checkout that is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np

from maskae.errors import UserError, nearest
from maskae.kernels.choice import TABLE
from maskae.kernels.operands import IMPLEMENTATIONS
from maskae.monitor.device_info import describe_run
from tools.bench_step import spread
from tools.kernel_cases import KERNELS, OPTION_SETS, Contest, Sizes, forward_only, pick, with_gradients

DTYPES = ("float32", "bfloat16", "float16")
LENGTHS = (50, 197, 226, 785, 1568)
# Pass -> what makes a program of a version. The last decides which version wins.
PASSES = {"forward": forward_only, "forward+backward": with_gradients}
FLAGS = ("kernels", "lengths", "options", "batch", "dtype", "heads", "head_size", "rounds", "seconds", "out", "write_table", "help")
Program = Callable[[], Any]


def bound(dtype: str, backend: str) -> float:
    """How far a result may be off, as a share of the largest element expected. Accelerators multiply float32 in TF32 or bfloat16."""
    if dtype != "float32":
        return 6e-2
    return 1e-4 if backend == "cpu" else 2e-2


def largest_error(found: Any, wanted: Any) -> float:
    """The largest difference of an array of two trees, as a share of the largest element wanted in it; inf where one is not finite."""
    worst = 0.0
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
        if not np.isfinite(got).all():
            return math.inf
        worst = max(worst, float(np.abs(got - want).max() / max(np.abs(want).max(), 1e-30)))
    return worst


def expected(contest: Contest, arguments: Any, program: Callable[..., Any]) -> Any:
    """The reference's result on the same inputs in float32, products in full precision."""
    wide = jax.tree.map(lambda array: array.astype(jnp.float32) if jnp.issubdtype(array.dtype, jnp.floating) else array, arguments)
    with jax.default_matmul_precision("highest"):
        return jax.block_until_ready(jax.jit(program(contest.reference))(*wide))


def first_line(failure: Exception) -> str:
    """What an exception says, or its kind where it says nothing; at most 100 characters."""
    return (str(failure).strip() or type(failure).__name__).splitlines()[0][:100]


def prepare(contest: Contest, arguments: Any, maker: Callable[..., Any], dtype: str) -> tuple[dict[str, Program], dict[str, str]]:
    """The versions that give the right result, compiled, and why the others are not timed."""
    try:
        wanted = expected(contest, arguments, maker)
    except RuntimeError as failure:  # which mostly is: out of memory, where a kernel would still fit
        return {}, {name: f"not checked, as the reference failed: {first_line(failure)}" for name in contest.versions}
    programs: dict[str, Program] = {}
    faults: dict[str, str] = {}
    allowed = bound(dtype, jax.default_backend())
    for name, version in contest.versions.items():
        try:
            compiled = jax.jit(maker(version)).lower(*arguments).compile()
            error = largest_error(compiled(*arguments), wanted)
        except (RuntimeError, NotImplementedError, ValueError) as failure:  # such as: out of memory, a size that a library refuses
            faults[name] = f"failed: {first_line(failure)}"
            continue
        if error > allowed:
            faults[name] = f"off by {error:.1e} of the largest element, which may be {allowed:.0e}"
            continue
        programs[name] = lambda compiled=compiled: compiled(*arguments)  # type: ignore[misc]
    return programs, faults


def time_calls(program: Program, count: int) -> float:
    """Seconds per call of `count` calls in a row. A CPU is waited for after each: independent calls would overlap there."""
    each = jax.default_backend() == "cpu"
    began = time.perf_counter()
    for number in range(count):
        result = program()
        if each or number == count - 1:
            jax.block_until_ready(result)
    return (time.perf_counter() - began) / count


def race(programs: dict[str, Program], rounds: int, seconds: float) -> dict[str, list[float]]:
    """Seconds per call of each program, one value per round; each round begins with the next program."""
    counts = {}
    for name, program in programs.items():
        time_calls(program, 1)
        counts[name] = max(1, math.ceil(seconds / time_calls(program, 2)))
    values: dict[str, list[float]] = {name: [] for name in programs}
    order = list(programs)
    for number in range(rounds):
        first = number % len(order)
        for name in order[first:] + order[:first]:
            values[name].append(time_calls(programs[name], counts[name]))
    return values


def winner(ratios: dict[str, dict[str, float]], candidates: Iterable[str]) -> str | None:
    """The fastest of the candidates that beat the first version in every round; else the first, where it is there."""
    ahead = [name for name in candidates if name in ratios and ratios[name]["low"] > 1]
    return max(ahead, key=lambda name: ratios[name]["median"]) if ahead else next(iter(ratios), None)


def measure(contest: Contest, sizes: Sizes, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """One result per pass: times and ratios by version, what is not timed and why, and the winner."""
    learned, other = contest.make()
    shape = jax.eval_shape(next(iter(contest.versions.values())), learned, other)
    cotangent = jnp.asarray(np.random.default_rng(1).normal(size=shape.shape), shape.dtype)
    results = []
    for name, maker in PASSES.items():
        programs, faults = prepare(contest, (learned, other, cotangent), maker, sizes.dtype)
        times = race(programs, rounds, seconds) if programs else {}
        baseline = next(iter(contest.versions))
        against = times.get(baseline, [])
        ratios = {version: spread([a / b for a, b in zip(against, own, strict=True)]) for version, own in times.items() if against}
        results.append(
            {
                "kernel": contest.kernel,
                "case": contest.case,
                "pass": name,
                "seconds": {version: spread(own) for version, own in times.items()},
                "ratio": ratios,
                "absent": contest.absent,
                "faults": faults,
                "winner": winner(ratios, list(ratios)[1:]),
                "row": contest.row,
            }
        )
    return results


def lines_of(result: dict[str, Any]) -> list[str]:
    """One result for people."""
    lines = []
    head = f"{result['kernel']:<12s} {result['case']:<22s} {result['pass']:<17s}"
    for name, times in result["seconds"].items():
        ratio = result["ratio"].get(name)
        text = "" if ratio is None else f"{ratio['median']:7.2f} [{ratio['low']:.2f}..{ratio['high']:.2f}]"
        mark = "  wins" if name == result["winner"] and len(result["seconds"]) > 1 else ""
        lines.append(f"{head} {name:<12s} {1e3 * times['median']:10.3f} {text}{mark}")
        head = " " * len(head)
    lines += [f"{head} {name:<12s} {'-':>10s}    {reason}" for name, reason in result["faults"].items()]
    if result["absent"] and result["pass"] == next(iter(PASSES)):
        lines.append(f"{head} not timed: " + ", ".join(f"{name} ({reason})" for name, reason in result["absent"].items()))
    return lines


def table_rows(results: Sequence[dict[str, Any]], device: str, notes: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the table of choices (maskae.kernels.choice) from the results of attention forward and backward together."""
    decisive = [result for result in results if result["row"] and result["pass"] == list(PASSES)[-1] and result["ratio"]]
    rows = []
    for options in dict.fromkeys(result["row"]["options"] for result in decisive):
        own = sorted((result for result in decisive if result["row"]["options"] == options), key=lambda result: result["row"]["length"])
        least = 1
        for number, result in enumerate(own):
            measured = dict(result["row"])
            length = measured.pop("length")
            most = math.isqrt(length * own[number + 1]["row"]["length"]) if number + 1 < len(own) else length
            ours = [name for name in result["ratio"] if name in IMPLEMENTATIONS]
            row = {"device": device, **measured, "min_length": least, "max_length": most, "implementation": winner(result["ratio"], ours)}
            rows.append(row | {"measured_length": length, "ratios": result["ratio"], **notes})
            least = most + 1
    return rows


def merge_rows(old: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The table with the new rows in place of those of the same device, dtype, head size and options."""

    def what(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["device"], row.get("dtype"), row.get("head_dim"), row["options"]

    replaced = {what(row) for row in new}
    return [row for row in old if what(row) not in replaced] + list(new)


def write_table(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Puts the rows into the file, one per line."""
    merged = merge_rows(json.loads(path.read_text())["rows"], rows)
    body = ",\n".join(json.dumps(row) for row in merged)
    path.write_text(f'{{"rows": [\n{body}\n]}}\n' if merged else '{"rows": []}\n')


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def names(flag: str, text: str, known: Iterable[str]) -> tuple[str, ...]:
    """Comma-separated names. Raises UserError for an unknown one."""
    known = tuple(known)
    chosen = tuple(filter(None, text.split(",")))
    for name in chosen:
        if name not in known:
            raise UserError(f"--{flag}: no {name!r}{nearest(name, known)}; there are {', '.join(known)}")
    if not chosen:
        raise UserError(f"--{flag} names nothing; there are {', '.join(known)}")
    return chosen


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, Sizes]:
    """Command-line words -> (flags, sizes). Raises UserError."""
    on_cpu = jax.default_backend() == "cpu"
    parser = _Parser(prog="python tools/bench_kernels.py", description="Measure the kernels.", allow_abbrev=False)
    parser.add_argument("--kernels", default=",".join(KERNELS), help="comma-separated")
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)), help="tokens, comma-separated")
    parser.add_argument("--options", default=",".join(OPTION_SETS), help="option sets of attention, comma-separated")
    parser.add_argument("--batch", type=int, default=4 if on_cpu else 64)
    parser.add_argument("--dtype", default="float32" if on_cpu else "bfloat16")
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--head_size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.1, help="of one turn")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the numbers there, as JSON")
    parser.add_argument("--write_table", action="store_true", help="update the table that 'auto' reads")
    flags, rest = parser.parse_known_args(argv)
    for word in rest:
        raise UserError(f"unknown argument {word}{nearest(word.split('=')[0].lstrip('-'), FLAGS)}")
    flags.kernels = names("kernels", flags.kernels, KERNELS)
    names("dtype", flags.dtype, DTYPES)
    try:
        lengths = tuple(sorted({int(word) for word in flags.lengths.split(",")}))
    except ValueError:
        raise UserError(f"--lengths={flags.lengths}: whole numbers with commas between them") from None
    for name, value in (("lengths", lengths[0]), *((name, getattr(flags, name)) for name in ("batch", "heads", "head_size", "rounds"))):
        if value < 1:
            raise UserError(f"--{name}: {value}, which must be at least 1")
    if not flags.seconds > 0:
        raise UserError(f"--seconds={flags.seconds}: must be above 0")
    if flags.out is not None and not flags.out.parent.is_dir():
        raise UserError(f"--out={flags.out}: no folder {flags.out.parent}")
    if flags.write_table and "attention" not in flags.kernels:
        raise UserError("--write_table needs attention among --kernels")
    options = names("options", flags.options, OPTION_SETS)
    return flags, Sizes(lengths, flags.batch, flags.dtype, flags.heads, flags.head_size, options)


def run(flags: argparse.Namespace, sizes: Sizes, command: str) -> bool:
    """Measures, prints, writes; whether every version was right."""
    about = describe_run()
    versions = {name: version for name, version in about["versions"].items() if name in ("jax", "jaxlib")}
    print(f"{about['devices']} x {about['device']}, {about['platform']}, {versions}, commit {about['commit']}\n{command}")
    print(f"batch {sizes.batch}, {sizes.dtype}, {sizes.heads} heads of {sizes.head_size}, {flags.rounds} rounds of {flags.seconds} s\n")
    print(f"{'kernel':<12s} {'case':<22s} {'pass':<17s} {'version':<12s} {'median ms':>10s}   times as fast as the first version")
    results = []
    for contest in pick(flags.kernels, sizes):
        for result in measure(contest, sizes, flags.rounds, flags.seconds):
            results.append(result)
            print("\n".join(lines_of(result)), flush=True)
    notes = {"batch": sizes.batch, "heads": sizes.heads, "command": command, "versions": versions, "commit": about["commit"]}
    rows = table_rows(results, about["device"], notes)
    for row in rows:
        print(f"auto: {row['options']}, lengths {row['min_length']}..{row['max_length']}, {row['dtype']}: {row['implementation']}")
    if flags.out is not None:
        report = {"run": about, "command": command, "sizes": vars(sizes)}
        flags.out.write_text(json.dumps(report | {"results": results, "rows": rows}, indent=1) + "\n")
    if flags.write_table:
        write_table(TABLE, rows)
    return not any(result["faults"] for result in results)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status: 0, 1 where a version was off or failed, 2 for bad input."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        flags, sizes = parse(words)
        return 0 if run(flags, sizes, " ".join(["python tools/bench_kernels.py", *words])) else 1
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
