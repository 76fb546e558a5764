# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Figures of the studies of visual thoughts: accuracy of the arms, and where attention goes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_BARS = ("#1b6ca8", "#8f8f8f", "#c8553d", "#e0a458", "#4c956c", "#6b4c9a")


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=150, bbox_inches="tight", facecolor="white")


def _clean(axes: Any) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def draw_arms(path: Path, summary: Mapping[str, Any]) -> None:
    """A bar with its 95 % interval for each arm and for their mean; a group for each dataset.

    Args:
        summary: as `vt_intervention.summarise_arms` gives it.
    """
    groups = [*summary["tasks"].items()] if len(summary["tasks"]) > 1 else []
    groups.append(("all rows", summary))
    names = [*summary["arms"], "mean"]
    figure = Figure(figsize=(max(5.0, 1.2 + len(groups) * len(names) * 0.62), 3.6))
    axes = figure.add_subplot()
    width = 0.8 / len(names)
    for number, name in enumerate(names):
        values, errors, places = [], [], []
        for place, (_, figures) in enumerate(groups):
            arm = figures["mean"] if name == "mean" else figures["arms"][name]
            low, high = arm["interval"]
            values.append(100 * arm["accuracy"])
            errors.append((100 * (arm["accuracy"] - low), 100 * (high - arm["accuracy"])))
            places.append(place + (number - (len(names) - 1) / 2) * width)
        colour = "#222222" if name == "mean" else _BARS[number % len(_BARS)]
        axes.bar(places, values, 0.9 * width, color=colour, alpha=0.85, label=name)
        spread = np.maximum(np.array(errors).T, 0.0)  # rounding must not turn one negative
        axes.errorbar(places, values, spread, fmt="none", ecolor="black", elinewidth=0.9, capsize=2)
    axes.set_xticks(range(len(groups)), [f"{name}\n(n = {g['n']})" for name, g in groups])
    axes.set_ylim(0, 100)
    axes.set_ylabel("accuracy, % (95 % interval)")
    axes.set_title("Answers after the drawn visual thought, and after others", fontsize=10)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    _clean(axes)
    _save(figure, path)
