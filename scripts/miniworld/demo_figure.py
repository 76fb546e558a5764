# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The demo's figure: a maze with its visual thought, accuracies, and the gap closed."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from data.json_lines import read_log

_BEFORE, _REAL, _NOISE, _TEACHER = "#8a8f98", "#1b6ca8", "#c8553d", "#3a7d44"


def predictions(folder: Path) -> list[dict[str, Any]]:
    return read_log(folder / "predictions.jsonl")


def example(out: Path) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """(before, after) of the longest maze that only the trained student solves."""
    pairs = list(
        zip(
            predictions(out / "eval" / "base"), predictions(out / "eval" / "real"), strict=True
        )
    )  # fmt: skip
    solved = [pair for pair in pairs if pair[1]["correct"] and not pair[0]["correct"]]
    return max(solved, key=lambda pair: len(pair[1]["answer"]), default=None)


def _pictures(out: Path, row: dict[str, Any]) -> list[Image.Image]:
    """Problem image and visual thought of a held-out row."""
    (path,) = out.glob(f"world/**/{Path(row['file']).name}")
    columns = ["problem_image_0", "reasoning_image_0"]
    cells = pq.read_table(path, columns=columns).slice(row["row"], 1).to_pylist()[0]
    return [Image.open(io.BytesIO(cells[name]["bytes"])).convert("RGB") for name in columns]


def _bars(axes: Axes, labels: list[str], values: list[float], errors: Any, colours: list[str],
          title: str) -> None:  # fmt: skip
    bars = axes.bar(labels, values, yerr=errors, color=colours, capsize=4, width=0.65)
    axes.bar_label(bars, fmt="%.1f", label_type="center", color="white", fontsize=11)
    axes.set_title(title, fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="x", labelsize=9)


def draw(out: Path, result: dict[str, Any]) -> None:
    """Write `out/demo.png` from a finished demo's folder and result."""
    figure = Figure(figsize=(12.5, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(1, 4, width_ratios=(1, 1, 1.5, 1.1))
    found = example(out)
    if found is not None:
        before, after = found
        titles = ("problem image: what the student sees", "visual thought: the teacher's privilege")
        notes = (f"before: {_answer(before)}", f"after: {_answer(after)}")
        for column, (picture, title, note) in enumerate(
            zip(_pictures(out, after), titles, notes, strict=True)
        ):
            axes = figure.add_subplot(grid[column])
            axes.imshow(picture, interpolation="nearest")
            axes.set_title(title, fontsize=8)
            axes.set_xlabel(note, fontsize=10)
            axes.set_xticks([])
            axes.set_yticks([])
    accuracy = result["accuracy"]
    names = ("base", "noise", "real")
    values = [100 * accuracy[name]["accuracy"] for name in names]
    errors = [
        [100 * abs(accuracy[name]["interval"][side] - accuracy[name]["accuracy"]) for name in names]
        for side in (0, 1)
    ]
    axes = figure.add_subplot(grid[2])
    labels = ["before", "after,\nnoise VTs", "after,\nreal VTs"]
    title = f"text-only accuracy on {accuracy['base']['n']:,} held-out mazes, %"
    _bars(axes, labels, values, errors, [_BEFORE, _NOISE, _REAL], title)
    teacher = 100 * accuracy["base-vt"]["accuracy"]
    axes.axhline(teacher, color=_TEACHER, linestyle="--", linewidth=1)
    axes.text(-0.4, teacher - 1, "base with the real VT", color=_TEACHER, fontsize=8, va="top")
    axes.set_ylim(0, 104)
    axes = figure.add_subplot(grid[3])
    gaps = [result["gap_closed"][name]["jsd"] for name in ("noise", "real")]
    _bars(
        axes,
        ["noise VTs", "real VTs"],
        [100 * gap["value"] for gap in gaps],
        [196 * gap["se"] for gap in gaps],
        [_NOISE, _REAL],
        "JSD gap to the teacher closed, %",
    )
    axes.axhline(0, color="black", linewidth=0.8)
    figure.savefig(out / "demo.png", dpi=130, facecolor="white")


def _answer(row: dict[str, Any]) -> str:
    """The moves of a prediction, short enough for a caption."""
    text = row["text"].split("<answer>")[-1].split("</answer>")[0]
    return f"{text[:24]} ({'right' if row['correct'] else 'wrong'})"
