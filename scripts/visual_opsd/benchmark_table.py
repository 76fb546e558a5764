# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""A table like the paper's table 2 from finished evaluations of the benchmarks.

    python -m scripts.visual_opsd.benchmark_table --runs "Base=results/eval/base,OPSD=results/a+b"

One row a label; folders joined by "+" make one row. Every figure has a 95 % interval: Wilson's
where it is a share of questions, else the Wilson limits of its parts combined (MOVER: each part's
distance to its limit, times its weight, added in squares).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.programs import check_new, expand_path
from data.tsv import TsvDataset
from scripts.visual_opsd.benchmark_scoring import CIRCULAR_RULE, RULES, SCORING_VERSION
from scripts.visual_opsd.benchmarks import (
    BENCHMARKS,
    COLUMNS,
    PROMPT_VERSION,
    PROMPTS,
    find_benchmark,
)
from scripts.visual_opsd.cli import Settings, option, parse_config, run_main
from scripts.visual_opsd.run_store import read_json, write_json
from scripts.visual_opsd.scoring import wilson_interval

FIGURES_FILE = "benchmarks.json"
MEAN = "mean"

# How a column follows from its files. The paper does not say; VLMEvalKit prints no such column.
COLUMN_RULES = {
    "ChartQA": "mean of ChartQA_h_bar and ChartQA_v_bar (our rule)",
    "CV-Bench": "mean of CV-Bench-2D and CV-Bench-3D, weighted by their rows (our rule; "
    "VLMEvalKit averages the sources of the 2D file)",
    "SAT": f"{CIRCULAR_RULE} (VLMEvalKit's rule for files called circular)",
    "MMVP": "share of right rows, as VLMEvalKit counts, not of pairs (our rule)",
    MEAN: "mean of the nine columns (our rule)",
}


@dataclass(frozen=True)
class Estimate:
    """An accuracy with its 95 % interval; shares, not per cent."""

    value: float
    low: float
    high: float


# ---------------------------------------------------------------------------------- one file


def benchmark_figures(
    dataset: TsvDataset, predictions: Sequence[Mapping[str, Any]], bad_rows: int
) -> dict[str, Any]:
    """Figures of one TSV file from its lines of predictions.jsonl.

    `n` counts questions: rows, or groups of rows where the benchmark is circular.
    """
    benchmark = find_benchmark(dataset)
    groups: dict[str, bool] = {}
    for line in predictions:
        groups[line["group"]] = groups.get(line["group"], True) and bool(line["correct"])
    n, correct = len(groups), sum(groups.values())
    official = None if benchmark.md5 is None else dataset.md5 == benchmark.md5
    return {
        "n": n,
        "correct": correct,
        "accuracy": correct / n,
        "interval": list(wilson_interval(correct, n)),
        "rows": len(predictions),
        "row_accuracy": sum(bool(line["correct"]) for line in predictions) / len(predictions),
        "answered_rate": sum(bool(line["answered"]) for line in predictions) / len(predictions),
        "bad_rows": bad_rows,
        "rows_in_file": len(dataset),
        "md5": dataset.md5,
        "same_file_as_harness": official,
        "prompt": PROMPTS[benchmark.prompt],
        "rule": RULES[benchmark.answer],
        "circular": CIRCULAR_RULE if benchmark.circular else None,
    }


def versions() -> dict[str, str]:
    """What a figure must be quoted with."""
    return {"prompt_version": PROMPT_VERSION, "scoring_version": SCORING_VERSION}


def describe(figures: Mapping[str, Mapping[str, Any]]) -> str:
    """The figures of a run as text: one line a benchmark, then versions and rules."""
    lines = [f"{'benchmark':30}{'n':>7}{'accuracy':>10}{'95 % interval':>17}{'answered':>10}"]
    for name, one in figures.items():
        low, high = one["interval"]
        lines.append(
            f"{name:30}{one['n']:>7}{one['accuracy']:>10.1%}{f'{low:.1%} - {high:.1%}':>17}"
            f"{one['answered_rate']:>10.1%}"
        )
    lines.append(f"prompts {PROMPT_VERSION}, scoring {SCORING_VERSION} (no judge)")
    for name, one in figures.items():
        notes = [one["rule"], *([one["circular"]] if one["circular"] else [])]
        if one["same_file_as_harness"] is False:
            notes.append("NOT the file VLMEvalKit_Thinkmorph loads under this name")
        if one["rows"] < one["rows_in_file"]:
            notes.append(f"{one['rows']} of the file's {one['rows_in_file']} rows")
        lines.append(f"  {name}: {'; '.join(notes)}")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------- the columns


def combine(parts: Sequence[Estimate], weights: Sequence[float]) -> Estimate:
    """Weighted mean of independent estimates; the interval by MOVER."""
    total = sum(weights)
    shares = [weight / total for weight in weights]
    pairs = list(zip(parts, shares, strict=True))
    value = sum(part.value * share for part, share in pairs)
    below = math.sqrt(sum((share * (part.value - part.low)) ** 2 for part, share in pairs))
    above = math.sqrt(sum((share * (part.high - part.value)) ** 2 for part, share in pairs))
    return Estimate(value, max(0.0, value - below), min(1.0, value + above))


def _estimate(correct: int, n: int) -> Estimate:
    return Estimate(correct / n, *wilson_interval(correct, n))


def column_estimate(column: str, figures: Mapping[str, Mapping[str, Any]]) -> Estimate | None:
    """A column of the table, or None if one of its files was not evaluated."""
    names = [b.name for b in BENCHMARKS.values() if b.column == column]
    if any(name not in figures for name in names):
        return None
    if column == "CV-Bench":  # weighting by rows is pooling them
        return _estimate(
            sum(figures[name]["correct"] for name in names),
            sum(figures[name]["n"] for name in names),
        )
    parts = [_estimate(figures[name]["correct"], figures[name]["n"]) for name in names]
    return combine(parts, [1.0] * len(parts))


def row_estimates(figures: Mapping[str, Mapping[str, Any]]) -> dict[str, Estimate | None]:
    """Every column and the mean; the mean only where all nine columns are there."""
    row = {column: column_estimate(column, figures) for column in COLUMNS}
    whole = [estimate for estimate in row.values() if estimate is not None]
    row[MEAN] = combine(whole, [1.0] * len(whole)) if len(whole) == len(COLUMNS) else None
    return row


def read_figures(folders: Iterable[str | Path]) -> dict[str, dict[str, Any]]:
    """Figures of one model from the folders its benchmarks were evaluated in.

    Raises:
        ValueError: a folder without figures, made with other prompts or rules than this version's,
            or a benchmark that stands in two of them.
    """
    found: dict[str, dict[str, Any]] = {}
    for folder in folders:
        path = Path(folder) / FIGURES_FILE
        held = read_json(path, "give the output folder of an evaluation with --benchmark")
        for name, version in versions().items():
            if held.get(name) != version:
                raise ValueError(
                    f"{path} was made with {name} {held.get(name)!r}, this program has "
                    f"{version!r}; evaluate again (--overwrite), figures of different rules do "
                    "not belong in one table"
                )
        twice = sorted(set(held["benchmarks"]) & set(found))
        if twice:
            raise ValueError(f"{path}: {', '.join(twice)} stands in an earlier folder too")
        found.update(held["benchmarks"])
    return found


def markdown_table(rows: Mapping[str, Mapping[str, Estimate | None]]) -> str:
    """The table, per cent, and the rules below it."""
    names = [*COLUMNS, MEAN]
    lines = [f"| model | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for label, row in rows.items():
        cells = []
        for name in names:
            e = row[name]
            cells.append(
                "-" if e is None
                else f"{100 * e.value:.2f} ({100 * e.low:.1f} - {100 * e.high:.1f})"
            )  # fmt: skip
        lines.append(f"| {label} | {' | '.join(cells)} |")
    lines += ["", "Accuracy in per cent with 95 % interval; greedy answers judged without a judge."]
    lines += [f"- {name}: {rule}" for name, rule in COLUMN_RULES.items()]
    lines.append("- the paper scores ChartQA, VisPuzzle and V* with a judge model and averages "
                 "three runs; these figures do neither")  # fmt: skip
    lines.append(f"- prompts {PROMPT_VERSION}, scoring {SCORING_VERSION}")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------- command line


@dataclass(frozen=True)
class TableSettings(Settings):
    runs: str = option(
        "", "LABEL=FOLDER of evaluations with --benchmark, by commas; FOLDER+FOLDER for one row"
    )
    json: str | None = option(None, "also write the estimates to this file", path=True)
    overwrite: bool = option(False, "replace that file if it is there")


@dataclass(frozen=True)
class TableConfig:
    table: TableSettings = field(default_factory=TableSettings)


def parse_runs(text: str) -> dict[str, list[str]]:
    """ "Base=a,OPSD=b+c" as {"Base": ["a"], "OPSD": ["b", "c"]}. Raises ValueError."""
    runs: dict[str, list[str]] = {}
    for entry in filter(None, (part.strip() for part in text.split(","))):
        label, equals, folders = entry.partition("=")
        if not equals or not label or not folders or label in runs:
            raise ValueError(
                f"--runs: {entry!r} must be LABEL=FOLDER with a label of its own, for instance "
                "--runs Base=results/eval/base,OPSD=results/eval/opsd"
            )
        runs[label] = [expand_path(folder) for folder in folders.split("+")]
    if not runs:
        raise ValueError("--runs LABEL=FOLDER[,LABEL=FOLDER] names nothing to put into the table")
    return runs


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    settings = parse_config(TableConfig, argv, "Table of benchmark accuracies.").table
    runs = parse_runs(settings.runs)
    if settings.json:
        check_new(settings.json, "--json", overwrite=settings.overwrite)
    rows = {label: row_estimates(read_figures(folders)) for label, folders in runs.items()}
    print(markdown_table(rows))
    if settings.json:
        plain = {
            label: {name: None if e is None else vars(e) for name, e in row.items()}
            for label, row in rows.items()
        }
        write_json(Path(settings.json), {**versions(), "rows": plain})
    return 0


if __name__ == "__main__":
    run_main(main)
