# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Figures of the studies of visual thoughts: accuracy of the arms, and where attention goes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from scripts.visual_opsd.figures import save_figure

_BARS = ("#1b6ca8", "#8f8f8f", "#c8553d", "#e0a458", "#4c956c", "#6b4c9a")
_PARTS = ("#cccccc", "#1b6ca8", "#c8553d", "#e0a458", "#4c956c")


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
    save_figure(figure, path)


def draw_attention(path: Path, summary: Mapping[str, Any]) -> None:
    """Stacked shares of attention per layer, before and after the VT side by side.

    Args:
        summary: as `attention_analysis.analyse` gives it.
    """
    phases = ("before", "after")
    figure = Figure(figsize=(max(7.0, 2.0 + 0.28 * summary["layers"]), 3.6))
    places = np.arange(summary["layers"])
    for number, phase in enumerate(phases):
        axes = figure.add_subplot(1, 2, number + 1)
        bottom = np.zeros(summary["layers"])
        for part, colour in zip(summary["parts"], _PARTS, strict=True):
            values = 100 * np.array(summary[phase]["shares"][part], dtype=float)
            axes.bar(places, values, 0.9, bottom=bottom, color=colour, label=part.replace("_", " "))
            bottom += values
        axes.set_title(f"{phase} the visual thought", fontsize=10)
        axes.set_xlabel("layer")
        axes.set_ylim(0, 100)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _clean(axes)
        if number == 0:
            axes.set_ylabel("attention of the answer's tokens, %")
        else:
            axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.suptitle(
        f"Mean over heads, tokens and {summary['n']} samples", fontsize=8, y=-0.02, va="top"
    )
    save_figure(figure, path)
