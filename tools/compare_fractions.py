"""Compares methods over shrinking shares of the labels: a table and a plot from finished runs.

    python tools/compare_fractions.py runs/spark_* runs/simclr_* runs/finetune_* --out runs/fractions

A run that was evaluated with `label_fractions` gives one value per share: its system's name, "untrained" and "raw pixels". A fine-tuning
run gives one value at the share of the labels that `data.max_examples` left it: "scratch", or "tuned" and the system that it started from.
Runs of one method are averaged (seeds), and their spread is the standard deviation over runs. Writes OUT.md and OUT.png, prints the table.

Exit status: 0, or 2 for bad input.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# So that it also works in a checkout that is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from PIL import Image

from maskae.errors import UserError
from maskae.plots import COLOURS, draw_picture
from maskae.run_folder import RunRecord, read_json, read_run

METRICS = ("top1", "auc")
BASELINES = ("untrained", "raw pixels")
MARKERS = "osD^vPX*<>"

# method -> percent of the labels -> a value per run
Table = dict[str, dict[float, list[float]]]


def values_of(run: RunRecord, metric: str) -> Table:
    """What one run says. Raises UserError where it was evaluated without any share of labels."""
    system = str(run.config.get("system", ""))
    found: Table = {}
    for kind, row in run.results.items():
        name = kind if kind in BASELINES else system
        for key, value in row.items():
            if share := re.fullmatch(rf"labels_([\d.e-]+)_percent_{metric}", key):
                found.setdefault(name, {})[float(share[1])] = [float(value)]
    if not found and metric == "top1":
        found = tuned_value(run)
    if not found and metric == "top1":
        raise UserError(f"{run.workdir}: no `labels_..._percent_top1` and no accuracy of a classifier among its results")
    return found


def tuned_value(run: RunRecord) -> Table:
    """The accuracy of a fine-tuning run at its share of the training records; {} for other runs."""
    scores = [row[key] for kind, row in run.results.items() if kind not in BASELINES for key in ("accuracy_top1", "top1") if key in row]
    total = run.summary.get("examples", {}).get("train")
    if not scores or not total:
        return {}
    data: Mapping[str, Any] = run.config.get("data", {})
    kept = min(int(data.get("max_examples") or total), int(total))
    start = str(run.config.get("init_from") or "")
    name = f"tuned {read_json(Path(start) / 'config.json').get('system', Path(start).name)}" if start else "scratch"
    return {name: {round(100 * kept / total, 3): [float(scores[0])]}}


def gather(runs: Sequence[RunRecord], metric: str) -> Table:
    """All runs' values by method and share. A baseline is read once per seed, however many runs evaluated it."""
    table: Table = {}
    seen: set[tuple[str, Any]] = set()
    for run in runs:
        for name, shares in values_of(run, metric).items():
            once = (name, run.config.get("seed"))
            if name in BASELINES and once in seen:
                continue
            seen.add(once)
            for share, values in shares.items():
                table.setdefault(name, {}).setdefault(share, []).extend(values)
    return table


def markdown(table: Table, metric: str) -> str:
    """The table, largest share first, mean and standard deviation over runs, the best mean of a column in bold."""
    shares = sorted({share for row in table.values() for share in row}, reverse=True)
    best = {share: max(np.mean(row[share]) for row in table.values() if share in row) for share in shares}
    lines = [f"| {metric} | runs |" + "".join(f" {share:g} % |" for share in shares), "|---|---:|" + "---:|" * len(shares)]
    for name, row in table.items():
        cells = []
        for share in shares:
            if share not in row:
                cells.append("")
                continue
            mean = float(np.mean(row[share]))
            cell = f"{mean:.3f} ± {np.std(row[share]):.3f}"
            cells.append(f"**{cell}**" if mean == best[share] else cell)
        lines.append(f"| {name} | {max(map(len, row.values()))} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def picture(tables: Mapping[str, Table]) -> np.ndarray:
    """The first metric's curves over the share of labels, with the spread over runs; uint8 [H, W, 3]."""
    metric, table = next(iter(tables.items()))
    methods = [name for name in table if name not in BASELINES]

    def paint(axes: Any) -> None:
        for i, (name, row) in enumerate(table.items()):
            shares = sorted(row)
            means, spreads = ([float(f(row[share])) for share in shares] for f in (np.mean, np.std))
            baseline = name in BASELINES
            style = {"color": "#888888", "linestyle": "--"} if baseline else {"color": COLOURS[methods.index(name) % len(COLOURS)]}
            axes.errorbar(shares, means, spreads, label=name, marker=MARKERS[i % len(MARKERS)], capsize=2, **style)
        axes.set_xscale("log")
        ticks = sorted({share for row in table.values() for share in row})
        axes.set_xticks(ticks, [f"{tick:g} %" for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel("share of the labels")
        axes.set_ylabel(metric)
        axes.legend(frameon=False, fontsize=7)

    return draw_picture(paint, title=f"{metric} over the share of labels", size=(6.4, 4.0))


def main(arguments: Sequence[str]) -> int:
    """Run the command line; the exit status."""
    parser = argparse.ArgumentParser(prog="tools/compare_fractions.py", description="Compare methods over shrinking shares of the labels.")
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--out", type=Path, required=True, help="path of the results without ending: OUT.md and OUT.png")
    given = parser.parse_args(arguments)
    try:
        runs = [read_run(path) for path in given.runs]
        tables = {metric: gather(runs, metric) for metric in METRICS}
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    text = "\n\n".join(markdown(table, metric) for metric, table in tables.items() if table)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.with_name(given.out.name + ".md").write_text(text + "\n", encoding="utf-8")
    Image.fromarray(picture(tables)).save(given.out.with_name(given.out.name + ".png"))
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
