# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""How long answers took and how long they are: one line a row, and their statistics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


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


def summarise_timing(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Statistics of all rows and of each dataset; {} without lines."""
    if not lines:
        return {}
    names = list(dict.fromkeys(str(line["dataset"]) for line in lines))
    groups = {"all": list(lines)} | {n: [x for x in lines if x["dataset"] == n] for n in names}
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
        for name, group in groups.items()
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
