# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The figures of an evaluation, from its predictions, and how they are shown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from data.rejects import Reject, summarise
from scripts.visual_opsd.evaluation.scoring import compare_runs, lenient_figures, wilson_interval
from scripts.visual_opsd.evaluation.store import Record


def by_dataset(lines: Sequence[Record]) -> dict[str, list[Record]]:
    """The lines of each dataset, in the order in which these come."""
    found: dict[str, list[Record]] = {}
    for line in lines:
        found.setdefault(line["dataset"], []).append(line)
    return found


def summarise_run(predictions: Sequence[Record], rejects: Sequence[Reject]) -> dict[str, Any]:
    """The figures of summary.json, over all rows and for each dataset."""
    return {
        **_figures(predictions),
        "tasks": {name: _figures(lines) for name, lines in by_dataset(predictions).items()},
        "bad_rows": len(rejects),
        "bad_reasons": dict(sorted(Counter(reject.reason for reject in rejects).items())),
        "bad_summary": summarise(rejects) if rejects else "",
    }


def _figures(predictions: Sequence[Record]) -> dict[str, Any]:
    n = len(predictions)

    def share(name: str) -> float:
        return sum(bool(line[name]) for line in predictions) / n

    correct = sum(bool(line["correct"]) for line in predictions)
    tokens = sum(int(line["output_tokens"]) for line in predictions)
    return {
        "n": n,
        "correct": correct,
        "accuracy": share("correct"),
        "interval": list(wilson_interval(correct, n)),
        **lenient_figures(sum(bool(line["lenient"]) for line in predictions), n),
        "mean_tokens": tokens / n,
        "cap_rate": share("capped"),
        "empty_rate": share("empty"),
        "answered_rate": share("answered"),
    }


def table(summary: Mapping[str, Any]) -> str:
    """The summary as text, one line a dataset and one for all."""
    names = f"{'lenient':>10}{'95 % interval':>17}"
    names += "".join(f"{name:>8}" for name in ("tokens", "capped", "empty"))
    lines = [f"{'':24}{'n':>7}{'accuracy':>10}{'95 % interval':>17}{names}"]
    tasks = summary["tasks"] if len(summary["tasks"]) > 1 else {}
    for name, figures in [*tasks.items(), ("all", summary)]:
        lines.append(
            f"{name:24}{figures['n']:>7}{share(figures)}{share(figures, 'lenient_')}"
            f"{figures['mean_tokens']:>8.1f}{figures['cap_rate']:>8.1%}{figures['empty_rate']:>8.1%}"
        )
    if summary["bad_rows"]:
        lines.append(f"{summary['bad_rows']} rows left out: {summary['bad_summary']}")
    return "\n".join(lines)


def share(figures: Mapping[str, Any], prefix: str = "") -> str:
    """Accuracy and interval as two columns of a table; `prefix` "lenient_": of that verdict."""
    low, high = figures[f"{prefix}interval"]
    return f"{figures[f'{prefix}accuracy']:>10.1%}{f'{low:.1%} - {high:.1%}':>17}"


def comparison(folder: Path, other: str) -> dict[str, Any]:
    """The paired figures of two runs, and under `lenient` those of their lenient verdicts.

    Raises:
        ValueError: as `compare_runs`.
    """
    return {
        "other": other,
        **asdict(compare_runs(folder, other)),
        "lenient": asdict(compare_runs(folder, other, "lenient")),
    }


def comparison_lines(figures: Mapping[str, Any]) -> str:
    """What `comparison` gave, a line for each verdict."""
    lines = []
    for label, c in (("", figures), ("lenient: ", figures["lenient"])):
        lines.append(
            f"{label}this {c['accuracy_a']:.1%} - {figures['other']} {c['accuracy_b']:.1%} = "
            f"{c['difference']:+.1f} points (95 % {c['low']:+.1f} .. {c['high']:+.1f}; "
            f"{c['only_a']} rows only the former, {c['only_b']} only the latter, McNemar p = "
            f"{c['p_value']:.2g}; n = {c['n']})"
        )
    return "\n".join(lines)


def timing_line(
    index: int, dataset: str, prepare: float, batch: tuple[int, float], tokens: int
) -> dict[str, Any]:
    """A line of timing.jsonl. The seconds of a row are those of its whole batch, which is how
    long it waited for its answer: measure latency with --batch_size 1."""
    return {
        "index": index,
        "dataset": dataset,
        "prepare_seconds": round(prepare, 6),
        "decode_seconds": round(batch[1], 6),
        "decoded_together": batch[0],
        "output_tokens": tokens,
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    array = np.asarray(values, dtype=np.float64)
    return {
        "mean": float(array.mean()),
        "median": float(np.median(array)),
        "p95": float(np.quantile(array, 0.95)),
        "max": float(array.max()),
    }


def summarise_timing(lines: Sequence[Record]) -> dict[str, Any]:
    """Statistics of all rows and of each dataset; {} without lines."""
    if not lines:
        return {}
    return {
        name: {
            "n": len(group),
            "latency_seconds": _spread(
                [line["prepare_seconds"] + line["decode_seconds"] for line in group]
            ),
            "prepare_seconds": _spread([line["prepare_seconds"] for line in group]),
            "output_tokens": _spread([line["output_tokens"] for line in group]),
            "decoded_together": _spread([line["decoded_together"] for line in group]),
        }
        for name, group in {"all": lines, **by_dataset(lines)}.items()
    }


def timing_text(summary: Mapping[str, Any]) -> str:
    """The statistics of all rows in two lines."""
    if not summary:
        return "nothing was timed"
    one = summary["all"]
    latency, tokens = one["latency_seconds"], one["output_tokens"]
    return (
        f"seconds to an answer: mean {latency['mean']:.2f}, median {latency['median']:.2f}, 95 % "
        f"below {latency['p95']:.2f} ({one['decoded_together']['mean']:.1f} rows decoded "
        f"together)\noutput tokens: mean {tokens['mean']:.1f}, median {tokens['median']:.0f}, "
        f"95 % below {tokens['p95']:.0f}, longest {tokens['max']:.0f}"
    )
