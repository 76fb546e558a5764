# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""A table like the paper's table 2 from finished evaluations of the benchmarks.

    python -m scripts.visual_opsd.evaluation.benchmark_table --runs "Base=DIR,OPSD=DIR+DIR"

One row a label; folders joined by "+" make one row. Every figure has a 95 % interval: Wilson's
where it is a share of questions, else the Wilson limits of its parts combined (MOVER: each part's
distance to its limit, times its weight, added in squares).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data.tsv import TsvDataset
from modeling.host.programs import check_new, expand_path
from scripts.visual_opsd.cli import Settings, option, parse_config, run_main
from scripts.visual_opsd.evaluation.benchmark_scoring import (
    CIRCULAR_RULE,
    LENIENT_RULE,
    PAIR_RULE,
    RULES,
    SCORING_VERSION,
)
from scripts.visual_opsd.evaluation.benchmarks import (
    BENCHMARKS,
    COLUMNS,
    PROMPT_VERSION,
    PROMPTS,
    find_benchmark,
)
from scripts.visual_opsd.evaluation.scoring import lenient_figures, wilson_interval
from scripts.visual_opsd.evaluation.store import read_json, write_json
from scripts.visual_opsd.evaluation.summary import share

FIGURES_FILE = "benchmarks.json"
MEAN = "mean"

# How a column follows from its files. The paper does not say; VLMEvalKit prints no such column.
COLUMN_RULES = {
    "ChartQA": "mean of ChartQA_h_bar and ChartQA_v_bar (our rule)",
    "CV-Bench": "mean of CV-Bench-2D and CV-Bench-3D, weighted by their rows (our rule; "
    "VLMEvalKit averages the sources of the 2D file)",
    "SAT": f"{CIRCULAR_RULE} (VLMEvalKit's rule for files called circular)",
    "MMVP": "share of right rows, as VLMEvalKit's Average, not of pairs (our rule)",
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
    names = [line["group"] for line in predictions]
    groups = _all_right(predictions, names, "correct")
    n, correct = len(groups), sum(groups.values())
    official = None if benchmark.md5 is None else dataset.md5 == benchmark.md5
    return {
        "n": n,
        "correct": correct,
        "accuracy": correct / n,
        "interval": list(wilson_interval(correct, n)),
        **lenient_figures(sum(_all_right(predictions, names, "lenient").values()), n),
        "rows": len(predictions),
        "row_accuracy": sum(bool(line["correct"]) for line in predictions) / len(predictions),
        **(_pair_figures(predictions) if benchmark.pairs else {}),
        "answered_rate": sum(bool(line["answered"]) for line in predictions) / len(predictions),
        "bad_rows": bad_rows,
        "rows_in_file": len(dataset),
        "md5": dataset.md5,
        "same_file_as_harness": official,
        "prompt": PROMPTS[benchmark.prompt],
        "rule": RULES[benchmark.answer],
        "circular": CIRCULAR_RULE if benchmark.circular else None,
    }


def _all_right(
    predictions: Sequence[Mapping[str, Any]], names: Sequence[str | int], verdict: str
) -> dict[str | int, bool]:
    """Group -> is every row of it right?"""
    groups: dict[str | int, bool] = {}
    for line, name in zip(predictions, names, strict=True):
        groups[name] = groups.get(name, True) and bool(line[verdict])
    return groups


def _pair_figures(predictions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Figures of the pairs of consecutive indices, (1, 2), (3, 4) ..., or (0, 1), (2, 3) ... in a
    file that counts from 0. A pair counts if both its rows were answered.
    """
    if not all(line["group"].isdigit() for line in predictions):
        return {}
    indices = [int(line["group"]) for line in predictions]
    # Row 0 may be a bad one; then the others' places tell where counting begins.
    first = 0 if 0 in indices or all(
        index == line["row"] for index, line in zip(indices, predictions, strict=True)
    ) else 1  # fmt: skip
    names = [(index - first) // 2 for index in indices]
    both = [name for name, count in Counter(names).items() if count == 2]
    if not both:
        return {}
    found = {"pairs": len(both), "pair_rule": PAIR_RULE}
    for verdict, prefix in (("correct", ""), ("lenient", "lenient_")):
        right = _all_right(predictions, names, verdict)
        correct = sum(right[name] for name in both)
        found[f"{prefix}pair_accuracy"] = correct / len(both)
        found[f"{prefix}pair_interval"] = list(wilson_interval(correct, len(both)))
    return found


def versions() -> dict[str, str]:
    """What a figure must be quoted with."""
    return {"prompt_version": PROMPT_VERSION, "scoring_version": SCORING_VERSION}


def describe(figures: Mapping[str, Mapping[str, Any]]) -> str:
    """The figures of a run as text: one line a benchmark, then versions and rules."""
    lines = [
        f"{'benchmark':30}{'n':>7}{'accuracy':>10}{'95 % interval':>17}{'lenient':>10}"
        f"{'95 % interval':>17}{'answered':>10}"
    ]
    for name, one in figures.items():
        row = f"{share(one)}{share(one, 'lenient_')}{one['answered_rate']:>10.1%}"
        lines.append(f"{name:30}{one['n']:>7}{row}")
        if "pairs" in one:
            pairs = f"{share(one, 'pair_')}{share(one, 'lenient_pair_')}"
            lines.append(f"{name + ', pairs':30}{one['pairs']:>7}{pairs}")
    lines.append(LENIENT_RULE)
    lines.append(f"prompts {PROMPT_VERSION}, scoring {SCORING_VERSION} (no judge)")
    for name, one in figures.items():
        notes = [one["rule"], *([one["circular"]] if one["circular"] else [])]
        notes += [one["pair_rule"]] if "pairs" in one else []
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


def column_estimate(
    column: str, figures: Mapping[str, Mapping[str, Any]], verdict: str = "correct"
) -> Estimate | None:
    """A column of the table, or None if one of its files was not evaluated."""
    names = [b.name for b in BENCHMARKS.values() if b.column == column]
    if any(name not in figures for name in names):
        return None
    if column == "CV-Bench":  # weighting by rows is pooling them
        return _estimate(
            sum(figures[name][verdict] for name in names),
            sum(figures[name]["n"] for name in names),
        )
    parts = [_estimate(figures[name][verdict], figures[name]["n"]) for name in names]
    return combine(parts, [1.0] * len(parts))


def row_estimates(
    figures: Mapping[str, Mapping[str, Any]], verdict: str = "correct"
) -> dict[str, Estimate | None]:
    """Every column and the mean; the mean only where all nine columns are there.

    `verdict`: "correct", or "lenient_correct" for those of a reader.
    """
    row = {column: column_estimate(column, figures, verdict) for column in COLUMNS}
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


def _cell(e: Estimate | None) -> str:
    return f"{100 * e.value:.2f} ({100 * e.low:.1f} - {100 * e.high:.1f})" if e else "-"


def _grid(title: str, names: Sequence[str], rows: Mapping[str, Sequence[Estimate | None]]) -> str:
    lines = [f"| {title} | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    lines += [f"| {label} | {' | '.join(map(_cell, row))} |" for label, row in rows.items()]
    return "\n".join(lines)


def pair_estimates(figures: Mapping[str, Mapping[str, Any]]) -> list[Estimate | None]:
    """MMVP's pairs: of the strict and of the lenient verdicts."""
    one = figures.get("MMVP", {})
    return [
        Estimate(one[f"{prefix}pair_accuracy"], *one[f"{prefix}pair_interval"])
        if "pairs" in one else None
        for prefix in ("", "lenient_")
    ]  # fmt: skip


@dataclass(frozen=True)
class Tables:
    """Estimates of runs, by label: every column by both verdicts, and MMVP's pairs."""

    rows: dict[str, dict[str, Estimate | None]]
    lenient_rows: dict[str, dict[str, Estimate | None]]
    mmvp_pairs: dict[str, list[Estimate | None]]

    @classmethod
    def of(cls, runs: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Tables:
        """runs: label -> benchmark -> its figures."""
        return cls(
            {label: row_estimates(figures) for label, figures in runs.items()},
            {label: row_estimates(figures, "lenient_correct") for label, figures in runs.items()},
            {label: pair_estimates(figures) for label, figures in runs.items()},
        )


def markdown_table(tables: Tables) -> str:
    """The tables of both verdicts and of MMVP's pairs, per cent, and the rules below them."""
    parts = []
    for title, rows in (("model", tables.rows), ("lenient", tables.lenient_rows)):
        shown = {label: list(row.values()) for label, row in rows.items()}
        parts += [_grid(title, [*COLUMNS, MEAN], shown), ""]
    if any(estimate for row in tables.mmvp_pairs.values() for estimate in row):
        parts += [_grid("MMVP, pairs", ["strict", "lenient"], tables.mmvp_pairs), ""]
    parts.append("Accuracy in per cent with 95 % interval; greedy answers judged without a judge.")
    parts += [f"- {name}: {rule}" for name, rule in COLUMN_RULES.items()]
    parts += [f"- {LENIENT_RULE}", f"- MMVP, pairs: {PAIR_RULE}"]
    parts.append("- the paper scores ChartQA, VisPuzzle and V* with a judge model and averages "
                 "three runs; these figures do neither")  # fmt: skip
    parts.append(f"- prompts {PROMPT_VERSION}, scoring {SCORING_VERSION}")
    return "\n".join(parts)


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
    tables = Tables.of({label: read_figures(folders) for label, folders in runs.items()})
    print(markdown_table(tables))
    if settings.json:
        write_json(Path(settings.json), {**versions(), **asdict(tables)})
    return 0


if __name__ == "__main__":
    run_main(main)
