# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The figures of an evaluation, from its predictions, and how they are shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from data.rejects import Reject, summarise
from scripts.visual_opsd.scoring import PairedComparison, wilson_interval


def split_bad(
    records: Mapping[int, Mapping[str, Any]],
) -> tuple[list[Mapping[str, Any]], list[Reject]]:
    """Predictions, and the rows that could not be used."""
    good = [record for record in records.values() if "bad" not in record]
    return good, [Reject(**record["bad"]) for record in records.values() if "bad" in record]


def summarise_run(
    predictions: Sequence[Mapping[str, Any]], rejects: Sequence[Reject]
) -> dict[str, Any]:
    """The figures of summary.json, over all rows and for each dataset."""
    names = list(dict.fromkeys(str(line["dataset"]) for line in predictions))
    return {
        **_figures(predictions),
        "tasks": {n: _figures([p for p in predictions if p["dataset"] == n]) for n in names},
        "bad_rows": len(rejects),
        "bad_reasons": {
            reason: sum(reject.reason == reason for reject in rejects)
            for reason in sorted({reject.reason for reject in rejects})
        },
        "bad_summary": summarise(rejects) if rejects else "",
    }


def _figures(predictions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
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
        "mean_tokens": tokens / n,
        "cap_rate": share("capped"),
        "empty_rate": share("empty"),
        "answered_rate": share("answered"),
    }


def table(summary: Mapping[str, Any]) -> str:
    """The summary as text, one line a dataset and one for all."""
    names = "".join(f"{name:>8}" for name in ("tokens", "capped", "empty"))
    lines = [f"{'':24}{'n':>7}{'accuracy':>10}{'95 % interval':>17}{names}"]
    tasks = summary["tasks"] if len(summary["tasks"]) > 1 else {}
    for name, figures in [*tasks.items(), ("all", summary)]:
        low, high = figures["interval"]
        lines.append(
            f"{name:24}{figures['n']:>7}{figures['accuracy']:>10.1%}"
            f"{f'{low:.1%} - {high:.1%}':>17}{figures['mean_tokens']:>8.1f}"
            f"{figures['cap_rate']:>8.1%}{figures['empty_rate']:>8.1%}"
        )
    if summary["bad_rows"]:
        lines.append(f"{summary['bad_rows']} rows left out: {summary['bad_summary']}")
    return "\n".join(lines)


def comparison_line(comparison: PairedComparison, this: str, other: str) -> str:
    """A paired comparison in one line."""
    c = comparison
    return (
        f"{this} {c.accuracy_a:.1%} - {other} {c.accuracy_b:.1%} = {c.difference:+.1f} points "
        f"(95 % {c.low:+.1f} .. {c.high:+.1f}; {c.only_a} rows only the former, {c.only_b} only "
        f"the latter, McNemar p = {c.p_value:.2g}; n = {c.n})"
    )
