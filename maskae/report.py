"""One page, `report.html`, that shows a whole run: numbers, baselines, pictures, curves, settings. It needs no network and no other file.

python -m maskae.report RUN     # makes the page again from what lies in the run's folder
"""

from __future__ import annotations

import base64
import datetime
import html
import json
import math
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from maskae.errors import UserError
from maskae.monitor.clock import format_seconds
from maskae.monitor.tables import is_machine_column, write_atomically
from maskae.plots import Chart, draw_charts
from maskae.report_style import STYLE
from maskae.run_folder import RunRecord, flatten, read_run

# What the evaluators measure in shares of 1, larger is better; other numbers (a rank, a chosen penalty) get no bar and no winner.
SCORE_WORDS = ("top1", "top5", "accuracy", "miou")
# Settings that a probe chose: shown under the results, not among them.
CHOICE_WORDS = ("learning_rate", "weight_decay", "penalty", "grid/")
FIRST_CURVES = ("loss", "machine/examples_per_second", "learning_rate", "gradient_norm")
MACHINE_CURVES = ("machine/examples_per_second", "machine/data_wait_share", "machine/mfu")
MOST_CURVES = 24
# The rows of the run itself; the others are what it is compared with.
OWN_ROWS = ("pretrained", "trained")
MOST_BAD_RECORDS = 50


def write_report(workdir: Path) -> Path:
    """Writes `<workdir>/report.html` from what lies in the folder; missing pieces are left out or said to be missing.

    Reads config.json, summary.json, totals.json, evaluation.json, metrics.jsonl and panels/*.png.

    Raises:
        UserError: there is no such folder, or one of the JSON files is damaged.
    """
    run = read_run(workdir)
    title = html.escape(run.workdir.resolve().name)
    drawn = (draw(run) for draw in (_results, _panels, _curves, _facts, _bad_records, _next_steps, _settings))
    body = "\n".join(filter(None, (_head(run, title), *drawn)))
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{title} · maskae</title><style>{STYLE}</style></head><body><main>\n{body}\n</main></body></html>\n"
    )
    path = workdir / "report.html"
    write_atomically(path, page)
    return path


def _head(run: RunRecord, title: str) -> str:
    total = run.summary.get("total_steps")
    parts = [
        run.summary.get("system", ""),
        f"step {run.last_step:,}" + (f" of {total:,}" if total else ""),
        run.summary.get("data", ""),
        _devices(run),
        f"written {datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC",
    ]
    subtitle = " · ".join(html.escape(str(part)) for part in parts if part)
    cards = "".join(
        f'<div class="card"><div class="value">{html.escape(value)}</div><div class="name">{html.escape(name)}</div></div>'
        for name, value in _headline(run)
    )
    return f'<h1>{title}</h1><p class="subtitle">{subtitle}</p><div class="cards">{cards}</div>'


def _headline(run: RunRecord) -> Iterable[tuple[str, str]]:
    """The few numbers that one looks for first."""
    if "loss" in run.curves:
        values = [value for value in run.curves["loss"][1] if math.isfinite(value)]
        if values:
            yield f"last loss (first {values[0]:.3g})", f"{values[-1]:.4g}"
    kind = next(iter(_ordered(run)), None)
    if kind is not None:
        by_evaluator: dict[str, str] = {}
        for name in filter(_is_score, run.results[kind]):
            by_evaluator.setdefault(name.partition("_")[0], name)
        for name in list(by_evaluator.values())[:3]:
            yield f"{_words(name)}, {kind}", f"{run.results[kind][name]:.3f}"
    if "parameters" in run.summary:
        yield "parameters", _short(run.summary["parameters"])
    if "machine/examples_per_second" in run.curves:
        rates = run.curves["machine/examples_per_second"][1]
        yield "examples/s (median)", f"{sorted(rates)[len(rates) // 2]:,.0f}"
        utilisation = run.curves.get("machine/mfu")
        yield "MFU (last)", f"{100 * utilisation[1][-1]:.1f} %" if utilisation else "unknown"
    if "train_seconds" in run.totals:
        yield f"training time ({_short(run.totals['device_hours'])} device-hours)", format_seconds(run.totals["train_seconds"])


def _results(run: RunRecord) -> str:
    kinds = _ordered(run)
    names = list(dict.fromkeys(name for kind in kinds for name in run.results[kind]))
    if not names:
        return '<h2>Evaluation</h2><p class="quiet">No evaluation numbers in this folder. Data without labels has none.</p>'
    shown = [name for name in names if not (_is_choice(name) or _is_spread(name, names))]
    chosen = [name for name in names if _is_choice(name)]
    step = f" at step {run.results_step:,}" if run.results_step is not None else ""
    note = (
        "Features are frozen. The same evaluators on an untrained encoder and on the pixels themselves show what pretraining is worth; "
        "the best score of a row is bold."
        if len(kinds) > 1
        else ""
    )
    table = _score_table(run, kinds, shown)
    details = f"<details><summary>What the probes chose</summary>{_score_table(run, kinds, chosen)}</details>" if chosen else ""
    return f'<h2>Evaluation{step}</h2><p class="quiet">{note}</p>{table}{details}'


def _score_table(run: RunRecord, kinds: Sequence[str], names: Sequence[str]) -> str:
    header = "".join(f"<th>{html.escape(kind)}</th>" for kind in kinds)
    rows = []
    for name in names:
        values = {kind: run.results[kind].get(name) for kind in kinds}
        best = max((value for value in values.values() if value is not None), default=None) if _is_score(name) else None
        digits = ".4f" if _is_score(name) else ".4g"
        cells = "".join(_score_cell(value, run.results[kind].get(f"{name}_std"), value == best, digits) for kind, value in values.items())
        rows.append(f'<tr><th title="{html.escape(name)}">{html.escape(_words(name))}</th>{cells}</tr>')
    return (
        f'<div class="scroll"><table class="scores"><thead><tr><th></th>{header}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def _score_cell(value: float | None, spread: float | None, best: bool, digits: str) -> str:
    """One number; `best` is also False for numbers that are no scores, whose `value` never equals a best of None."""
    if value is None:
        return '<td class="quiet">–</td>'
    text = f"{value:{digits}}" + (f' <span class="quiet">± {spread:.2g}</span>' if spread is not None else "")
    return f'<td class="best">{text}</td>' if best else f"<td>{text}</td>"


def _panels(run: RunRecord) -> str:
    if not run.panels:
        return '<h2>Pictures</h2><p class="quiet">No panels in this folder.</p>'
    parts = []
    for name, files in run.panels.items():
        for file in (files[0], files[-1]) if len(files) > 1 else files:
            parts.append(f"<figure>{_picture(file)}<figcaption>{html.escape(_words(name))}, {_step_of(file)}</figcaption></figure>")
    return f'<h2>Pictures</h2><div class="figures">{"".join(parts)}</div>'


def _curves(run: RunRecord) -> str:
    charts = _charts(run)
    if not charts:
        return '<h2>Curves</h2><p class="quiet">No metrics in this folder.</p>'
    images = []
    for chart in charts:
        drawn = base64.b64encode(draw_charts([chart], columns=1, kind="svg")).decode()
        images.append(f'<img alt="{html.escape(chart.title)}" src="data:image/svg+xml;base64,{drawn}">')
    return f'<h2>Curves</h2><div class="charts">{"".join(images)}</div>'


def _charts(run: RunRecord) -> list[Chart]:
    """A chart per metric, the usual ones first; scores with the baselines' levels, of the machine only the rates."""
    names = [name for name in run.curves if not is_machine_column(name) or name in MACHINE_CURVES]
    scores = [name for name in names if _is_score(name)]
    beside = [name for name in names if name.startswith("trivial_") and name.removeprefix("trivial_") in names]
    rest = [name for name in names if not (name in scores or name in beside or _is_choice(name) or _is_spread(name, names))]
    order = [name for name in FIRST_CURVES if name in rest]
    order += scores + [name for name in rest if name not in order]
    charts = []
    for name in order[:MOST_CURVES]:
        values = run.curves[name][1]
        if name not in FIRST_CURVES and min(values) == max(values) and len(values) > 1:
            continue  # a count of mishaps that stayed at zero
        metric = name.removeprefix("evaluate/")
        levels = {kind: row[metric] for kind, row in run.results.items() if metric in row and kind not in OWN_ROWS}
        lines = {"trivial prediction": run.curves[f"trivial_{name}"]} if f"trivial_{name}" in beside else {}
        lines["this run"] = run.curves[name]
        charts.append(Chart(_words(name.removeprefix("machine/")), lines, levels if _is_score(name) else {}))
    return charts


def _facts(run: RunRecord) -> str:
    facts = {name: value for name, value in run.summary.items() if name not in ("versions", "arguments")}
    facts |= {name: value for name, value in run.totals.items() if name != "bad_records"}
    versions = run.summary.get("versions", {})
    if not facts and not versions:
        return ""
    columns = _fact_table(facts) + (_fact_table(versions) if versions else "")
    return f'<h2>The run</h2><div class="columns">{columns}</div>'


def _bad_records(run: RunRecord) -> str:
    bad = run.totals.get("bad_records", {})
    count = bad.get("count", 0)
    if not count:
        return '<h2>Data</h2><p class="quiet">Every record could be read.</p>' if bad else ""
    names = "".join(f"<li>{html.escape(str(name))}</li>" for name in bad.get("names", [])[:MOST_BAD_RECORDS])
    more = f"<p>and {count - MOST_BAD_RECORDS:,} more</p>" if count > MOST_BAD_RECORDS else ""
    noun = "record" if count == 1 else "records"
    return f'<h2>Data</h2><p class="warning">{count:,} {noun} could not be read and were skipped:</p><ul class="records">{names}</ul>{more}'


def _next_steps(run: RunRecord) -> str:
    folder = shlex.quote(str(run.workdir))
    command = f"python -m maskae.main {_arguments(run)}"
    steps = {
        "Resume, or train on with a larger total": f"{command} --workdir {folder}",
        "Evaluate the newest checkpoint": f"{command} --evaluate {folder}",
        "Compare with another run": f"python tools/compare.py {folder} OTHER_RUN",
        "Make this page again": f"python -m maskae.report {folder}",
    }
    rows = "".join(f"<dt>{html.escape(name)}</dt><dd><code>{html.escape(line)}</code></dd>" for name, line in steps.items())
    return f"<h2>What to do next</h2><dl>{rows}</dl>"


def _arguments(run: RunRecord) -> str:
    """The command line's config and overrides, without the folder."""
    words = [str(word) for word in run.summary.get("arguments", ())]
    kept = [word for i, word in enumerate(words) if not word.startswith("--workdir") and words[max(i - 1, 0)] != "--workdir"]
    return shlex.join(kept) if kept else "--config CONFIG"


def _settings(run: RunRecord) -> str:
    if not run.config:
        return ""
    flat = {name: json.dumps(value) if not isinstance(value, str) else value for name, value in sorted(flatten(run.config).items())}
    table = f'<div class="columns">{_fact_table(flat)}</div>'
    return f"<h2>Settings</h2><details><summary>{len(flat)} settings, as resolved</summary>{table}</details>"


def _fact_table(facts: Mapping[str, Any]) -> str:
    rows = []
    for name, value in facts.items():
        label = name.removesuffix("_seconds") + "_time" if name.endswith("_seconds") else name
        rows.append(f"<tr><th>{html.escape(_words(label))}</th><td>{html.escape(_value(name, value))}</td></tr>")
    return f'<div class="scroll"><table class="facts"><tbody>{"".join(rows)}</tbody></table></div>'


def _value(name: str, value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_value(key if name != 'pause_seconds' else name, entry)}" for key, entry in value.items()) or "none"
    if value is None:
        return "unknown"
    if name.endswith("_seconds"):
        return format_seconds(value)
    if "flops" in name:
        return f"{_short(value)}FLOP" + ("/s" if "peak" in name else "")
    if isinstance(value, float):
        return f"{value:,.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _devices(run: RunRecord) -> str:
    if "device" not in run.summary:
        return ""
    return f"{run.summary.get('devices', 1)} x {run.summary['device']}"


def _ordered(run: RunRecord) -> list[str]:
    """The kinds of features that have numbers, the trained one first."""
    return sorted((kind for kind, metrics in run.results.items() if metrics), key=lambda kind: kind not in OWN_ROWS)


def _is_score(name: str) -> bool:
    return any(word in name for word in SCORE_WORDS) and not name.endswith("_std") and not _is_choice(name)


def _is_choice(name: str) -> bool:
    return name != "learning_rate" and any(word in name for word in CHOICE_WORDS)


def _is_spread(name: str, names: Sequence[str]) -> bool:
    """Whether a number is the spread of another one (`feature_std` is a number of its own)."""
    return name.endswith("_std") and name.removesuffix("_std") in names


def _words(name: str) -> str:
    return name.replace("_", " ").replace("evaluate/", "")


def _short(value: float) -> str:
    """`1.23 M`, `56.7 G`: three digits and a prefix."""
    for size, letter in ((1e15, " P"), (1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g} "


def _step_of(panel: Path) -> str:
    return f"step {int(panel.stem.partition('_')[0]):,}"


def _picture(file: Path) -> str:
    return f'<img alt="{html.escape(file.stem)}" src="data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}">'


def main(arguments: Sequence[str]) -> int:
    """`python -m maskae.report RUN`; returns the exit status, 2 for bad input."""
    if len(arguments) != 1:
        print("usage: python -m maskae.report RUN", file=sys.stderr)
        return 2
    try:
        print(write_report(Path(arguments[0])))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
