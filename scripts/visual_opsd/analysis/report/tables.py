# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The report's tables: the runs at a glance, the settings they differ in, the evaluated arms."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scripts.visual_opsd.analysis.report.figures import Figure, Group
from scripts.visual_opsd.analysis.report.markup import short, table, text
from scripts.visual_opsd.analysis.report.runs import Run, distinct_labels
from scripts.visual_opsd.cli import flat
from scripts.visual_opsd.config import TrainConfig
from scripts.visual_opsd.evaluation.scoring import compare_runs
from scripts.visual_opsd.evaluation.store import read_json

SUMMARY = "summary.json"
# Where a run writes: every run has its own, and its name is the run's already.
_PLACES = {"results_dir", "checkpoint_dir", "wandb_name"}
_GLANCE = (
    "validation/accuracy", "loss", "divergence", "forward_kl", "ce", "grad_norm",
    "completion_length", "cap_rate", "student_entropy", "seconds/sample", "seconds/train",
)  # fmt: skip
_ABSENT = object()


def run_heads(runs: Sequence[Run]) -> list[str]:
    """Labels of the runs as heads of columns, each with its colour."""
    return [f'<span class="r{n}"><i></i>{text(run.label, 60)}</span>' for n, run in enumerate(runs)]


def glance_table(runs: Sequence[Run], groups: Sequence[Group]) -> str:
    """Steps and the last values of the main figures, a column a run."""
    listed = {figure.name: figure for group in groups for figure in group.figures}
    rows = [["last logged step", *(f"{run.last_step:,}" for run in runs)]]
    for figure in (listed[name] for name in _GLANCE if name in listed):
        cells = [_last(run, figure) for run in runs]
        rows.append([f"{text(figure.title, 80)}{_unit(figure)}", *cells])
    caption = "Means of the last tenth of the logged steps."
    return table(("", *run_heads(runs)), rows, caption)


def _last(run: Run, figure: Figure) -> str:
    value = run.last(figure.name)
    return "" if value is None else short(value, is_share=figure.is_share)


def _unit(figure: Figure) -> str:
    return f", {text(figure.unit)}" if figure.unit and not figure.is_share else ""


# ---------------------------------------------------------------------------------- settings


def settings_tables(runs: Sequence[Run]) -> str:
    """What the runs differ in, and below it what they share that is not the paper's default."""
    known = [run for run in runs if run.settings]
    if not known:
        return "<p>No run holds its settings (config.yaml).</p>"
    defaults = flat(TrainConfig())
    names = [n for run in known for n in run.settings if n not in _PLACES]
    names = list(dict.fromkeys(names))
    held = {name: [run.settings.get(name, _ABSENT) for run in runs] for name in names}
    differ = [n for n, values in held.items() if any(v != values[0] for v in values)]
    heads = ("setting", *run_heads(runs), "default")
    parts = []
    if len(runs) > 1:
        rows = [_setting(n, held[n], defaults) for n in differ]
        parts.append(
            table(heads, rows, "What the runs differ in.", kind="values")
            if rows
            else "<p>The runs have the same settings.</p>"
        )
    same = [
        n for n, values in held.items()
        if n not in differ and n in defaults and values[0] != defaults[n]
    ]  # fmt: skip
    if same:
        rows = [_setting(n, held[n][:1], defaults) for n in same]
        shared = table(("setting", "value", "default"), rows, kind="values")
        title = "The same in all runs, and not the default" if len(runs) > 1 else "Not the default"
        opened = "" if len(runs) > 1 else " open"
        parts.append(f"<details{opened}><summary>{title} ({len(same)})</summary>{shared}</details>")
    return "\n".join(parts)


def _setting(name: str, values: Sequence[Any], defaults: dict[str, Any]) -> list[str]:
    cells = [_value(value) for value in (*values, defaults.get(name, _ABSENT))]
    return [f"<code>{text(name, 60)}</code>", *cells]


def _value(value: Any) -> str:
    if value is _ABSENT:
        return "-"
    return text("none" if value is None else value if value != "" else '""', 200)


# ---------------------------------------------------------------------------------- arms


def arms_table(folders: Sequence[str | Path]) -> str:
    """Accuracies of finished evaluations with 95 % intervals, compared with the first's rows.

    Raises:
        ValueError: a folder that holds no finished evaluation, or one given twice.
    """
    paths = [Path(folder) for folder in folders]
    summaries = [_summary(path) for path in paths]
    if len({path.resolve() for path in paths}) < len(paths):
        raise ValueError("--evaluations: a folder is given twice; name each once")
    labels = distinct_labels(paths)
    rows = []
    for path, label, summary in zip(paths, labels, summaries, strict=True):
        tasks = summary["tasks"] if len(summary["tasks"]) > 1 else {}
        against = "" if path is paths[0] else _against(path, paths[0])
        settings = summary.get("settings") or {}
        rows.append([text(label, 60), text(settings.get("context", "-"), 40),
                     *_accuracies(path, summary), against])  # fmt: skip
        rows += [
            [f"&nbsp;&nbsp;{text(name, 60)}", "", *_accuracies(path, figures), ""]
            for name, figures in tasks.items()
        ]
    heads = ("evaluation", "context", "accuracy", "", "95 % interval", "lenient", "rows",
             "tokens", "capped", f"points over {text(labels[0], 60)}")  # fmt: skip
    return table(heads, rows)


def _summary(path: Path) -> dict[str, Any]:
    """Raises ValueError: no summary of an evaluation."""
    if not path.is_dir():
        raise ValueError(f"--evaluations {path} is no folder; name output folders of `evaluate`")
    summary = read_json(path / SUMMARY, "--evaluations takes output folders of finished `evaluate`")
    if not isinstance(summary.get("tasks"), dict):
        raise ValueError(f"--evaluations {path / SUMMARY} is not of an evaluation: it has no tasks")
    return summary


def _accuracies(path: Path, figures: dict[str, Any]) -> list[str]:
    """Raises ValueError: a figure is missing."""
    try:
        low, high = figures["interval"]
        value = float(figures["accuracy"])
        lenient, capped = (
            f"{100 * float(figures[name]):.1f} %" for name in ("lenient_accuracy", "cap_rate")
        )
        bar = (
            '<svg class=bar viewBox="0 0 100 10" aria-hidden=true><path class=grid d="M0,5H100"/>'
            f'<path class=reach d="M{100 * low:.1f},5H{100 * high:.1f}"/>'
            f'<circle cx="{100 * value:.1f}" cy=5 r=3 /></svg>'
        )
        reach = f"{100 * low:.1f} - {100 * high:.1f} %"
        rows, tokens = f"{int(figures['n']):,}", short(float(figures["mean_tokens"]))
        return [f"<b>{100 * value:.1f} %</b>", bar, reach, lenient, rows, tokens, capped]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"--evaluations {path / SUMMARY} lacks figures ({error!r}); evaluate again"
        ) from error


def _against(path: Path, first: Path) -> str:
    """The paired difference, or that there is none."""
    try:
        pair = compare_runs(path, first)
    except ValueError:
        return "other rows"
    return f"{pair.difference:+.1f} ({pair.low:+.1f} to {pair.high:+.1f})"
