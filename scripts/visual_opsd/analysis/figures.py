# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Figures of the diagnostic, the interventions and the attention analysis.

Drawn on matplotlib's Agg canvas without pyplot: no display and no global state is needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from modeling.host.disk import disk_errors

FLOOR = 1e-6  # nats; smaller divergences are drawn here
_REAL, _NOISE = "#1b6ca8", "#c8553d"
_LINE_CHARACTERS = 96
_SHOWN_TOKENS = 160
# Beyond this, matplotlib's own font has few glyphs (and warns for each it lacks).
_LAST_DRAWABLE = 0x2FFF
_BARS = ("#1b6ca8", "#8f8f8f", "#c8553d", "#e0a458", "#4c956c", "#6b4c9a")
_PARTS = ("#cccccc", "#1b6ca8", "#c8553d", "#e0a458", "#4c956c")


def save_figure(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    with disk_errors(f"writing {path}", path.parent):
        figure.savefig(path, dpi=150, bbox_inches="tight", facecolor="white")


def _clean(axes: Any) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _add_legend_beside(axes: Any) -> None:
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def draw_kl_distribution(path: Path, real: np.ndarray, noise: np.ndarray, title: str) -> None:
    """Histogram of KL per scored token (nats, log axis) for real and for noise VTs.

    Args:
        real, noise: (tokens,) KL(teacher || student), of the same tokens.
    """
    real, noise = (np.maximum(np.asarray(v, dtype=np.float64), FLOOR) for v in (real, noise))
    top = max(float(v.max(initial=FLOOR)) for v in (real, noise))
    bins = np.geomspace(FLOOR, max(top, 10 * FLOOR) * 1.001, 61)
    figure = Figure(figsize=(7.0, 3.8))
    axes = figure.add_subplot()
    for values, name, colour in ((real, "real VT", _REAL), (noise, "noise VT", _NOISE)):
        if not values.size:
            continue
        weights = np.full(values.size, 100 / values.size)
        axes.hist(values, bins=list(bins), weights=weights, color=colour, alpha=0.3)
        axes.hist(values, bins=list(bins), weights=weights, color=colour, histtype="step", lw=1.2)
        mean = float(values.mean())
        axes.axvline(mean, color=colour, lw=1.2, ls="--", label=f"{name}: mean {mean:.4f}")
    axes.set_xscale("log")
    axes.set_xlabel(f"KL(teacher || student) of a token, nats (smaller ones at {FLOOR:g})")
    axes.set_ylabel("share of tokens, %")
    axes.set_title(title, fontsize=10)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9)
    _clean(axes)
    save_figure(figure, path)


@dataclass(frozen=True)
class HeatRow:
    """One completion of the heat map: its tokens, and the KL of each scored token."""

    title: str
    tokens: Sequence[str]
    real: np.ndarray  # (tokens,)
    noise: np.ndarray
    answer: np.ndarray  # (tokens,) bool


def _printable(token: str) -> str:
    text = token.replace("\n", "\u21b5").replace("\t", "\u2192")
    shown = "".join(c if c.isprintable() and ord(c) <= _LAST_DRAWABLE else "\u25a1" for c in text)
    return shown or "\u25a1"


def _lines(tokens: Sequence[str]) -> list[list[int]]:
    """Token numbers of each line."""
    lines: list[list[int]] = []
    used = 0
    for number, token in enumerate(tokens):
        if not lines or used + len(token) > _LINE_CHARACTERS:
            lines.append([])
            used = 0
        lines[-1].append(number)
        used += len(token)
    return lines


def _shorten(row: HeatRow) -> HeatRow:
    """What is shown of a completion: its last tokens, in characters that can be drawn."""
    first = max(0, len(row.tokens) - _SHOWN_TOKENS)
    cut = f" (its last {_SHOWN_TOKENS} of {len(row.tokens)} tokens)" if first else ""
    return HeatRow(
        row.title + cut,
        [_printable(token) for token in row.tokens[first:]],
        row.real[first:],
        row.noise[first:],
        row.answer[first:],
    )


def _draw_strip(
    axes: Any, y: float, label: str, row: HeatRow, numbers: Sequence[int], values: np.ndarray,
    norm: LogNorm,
) -> None:  # fmt: skip
    axes.text(-1.0, y + 0.5, label, ha="right", va="center", fontsize=7, color="#555555")
    x = 0.0
    for number in numbers:
        width = float(len(row.tokens[number]))
        level = float(norm(max(float(values[number]), float(norm.vmin or FLOOR))))
        colour = colormaps["YlOrRd"](level)
        axes.add_patch(Rectangle((x, y), width, 1.0, facecolor=colour, edgecolor="white", lw=0.4))
        if row.answer[number]:
            axes.plot([x, x + width], [y + 0.98, y + 0.98], color="black", lw=1.0)
        axes.text(
            x + width / 2, y + 0.5, row.tokens[number], ha="center", va="center", fontsize=7,
            family="monospace", color="white" if level > 0.65 else "black", parse_math=False,
        )  # fmt: skip
        x += width


def draw_token_heatmap(path: Path, rows: Sequence[HeatRow], title: str) -> None:
    """A few completions, token by token, coloured by KL with real VTs and with noise below.

    Tokens of the answer are underlined. Of a long completion the last tokens are shown.
    """
    peak = max(
        (float(np.max(v, initial=0.0)) for row in rows for v in (row.real, row.noise)), default=1.0
    )
    norm = LogNorm(vmin=1e-4, vmax=max(peak, 1e-2), clip=True)
    drawn = [_shorten(row) for row in rows]
    lines = [_lines(row.tokens) for row in drawn]
    height = sum(1.4 + 2.5 * len(some) for some in lines)
    figure = Figure(figsize=(11.0, 0.6 + 0.19 * max(height, 4.0)))
    axes = figure.add_subplot()
    y, widest = 0.0, 60
    for row, some in zip(drawn, lines, strict=True):
        axes.text(0.0, y + 0.6, row.title, va="center", fontsize=8, weight="bold", parse_math=False)
        y += 1.4
        for numbers in some:
            widest = max(widest, sum(len(row.tokens[i]) for i in numbers))
            for label, values in (("real", row.real), ("noise", row.noise)):
                _draw_strip(axes, y, label, row, numbers, values, norm)
                y += 1.1
            y += 0.3
    axes.set_xlim(-8.0, widest + 1.0)
    axes.set_ylim(max(y, 1.0), -0.2)
    axes.axis("off")
    axes.set_title(title, fontsize=10, loc="left")
    colours = ScalarMappable(norm, colormaps["YlOrRd"])
    bar = figure.colorbar(colours, ax=axes, fraction=0.02, pad=0.01)
    bar.set_label("KL, nats", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    save_figure(figure, path)


def pick_rows(tasks: Sequence[str], usable: Sequence[bool], count: int) -> list[int]:
    """Numbers of `count` samples for the heat map: usable ones first, every task in turn."""
    order: dict[str, list[int]] = {}
    for number in sorted(range(len(tasks)), key=lambda i: (not usable[i], i)):
        order.setdefault(tasks[number], []).append(number)
    longest = max(map(len, order.values()), default=0)
    turns = [members[t] for t in range(longest) for members in order.values() if t < len(members)]
    turns.sort(key=lambda i: not usable[i])  # stable: tasks stay in turn
    return turns[: min(count, len(turns))]


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
    _add_legend_beside(axes)
    _clean(axes)
    save_figure(figure, path)


def draw_attention(path: Path, summary: Mapping[str, Any]) -> None:
    """Stacked shares of attention per layer, before and after the VT side by side.

    Args:
        summary: as `attention.analyse` gives it.
    """
    figure = Figure(figsize=(max(7.0, 2.0 + 0.28 * summary["layers"]), 3.6))
    places = np.arange(summary["layers"])
    for number, phase in enumerate(("before", "after")):
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
            _add_legend_beside(axes)
    figure.suptitle(
        f"Mean over heads, tokens and {summary['n']} samples", fontsize=8, y=-0.02, va="top"
    )
    save_figure(figure, path)
