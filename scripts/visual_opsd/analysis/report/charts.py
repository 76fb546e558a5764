# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""One figure of several runs over each other, as plain SVG.

Lines have steps as their first coordinate, which a matrix brings to their place, so that the
browser's read-out finds the exact step; the second is a height in the drawing. Colours are classes
of report.css: `r0`, `r1`, ... by run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from scripts.visual_opsd.analysis.report.figures import Figure
from scripts.visual_opsd.analysis.report.markup import short, text

Points = Sequence[tuple[int, float]]  # (step, value) by step

_WIDTH, _HEIGHT = 360, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 10, 8, 24
_SMOOTHED_FROM = 40  # points; a line of fewer is shown as it is
_DOTS_BELOW = 25
_LOG_FROM = 1000  # largest by smallest value
_LARGEST = 1e300  # values beyond stand at the edge: differences must stay finite


@dataclass(frozen=True)
class Series:
    """The figure of one run, a line.

    run: its place among the runs. low, high: ends of its interval. marks: steps that are marked.
    age: "early" or "middle" for a line that a later one of the run follows, and note: which it is.
    """

    run: int
    label: str
    points: Points
    low: Points = ()
    high: Points = ()
    marks: tuple[int, ...] = ()
    age: str = ""
    note: str = ""

    @property
    def name(self) -> str:
        """What a reader calls the line."""
        return f"{self.label}, {self.note}" if self.note else self.label


@dataclass(frozen=True)
class _Axis:
    """A linear map from data (or their logarithms) to the drawing, and the marks on it."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    @property
    def scale(self) -> float:
        return (self.end - self.start) / (self.high - self.low)

    @property
    def offset(self) -> float:
        return self.start - self.low * self.scale

    def place(self, value: float) -> float:
        """Where a value of the axis (a logarithm, if it is one) stands in the drawing."""
        return self.offset + value * self.scale

    def marks(self, most: int) -> list[tuple[float, float]]:
        """(value, place) of the numbers written at the axis."""
        if self.is_log:
            first, last = math.ceil(self.low - 1e-9), math.floor(self.high + 1e-9)
            stride = max(1, math.ceil((last - first) / most))
            return [(10.0**e, self.place(e)) for e in range(first, last + 1, stride)]
        step = nice_step((self.high - self.low) / most)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [(n * step, self.place(n * step)) for n in range(first, last + 1)]


def nice_step(least: float) -> float:
    """The smallest 1, 2 or 5 times a power of ten that is not below `least` (above 0)."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(f * power for f in (1.0, 2.0, 5.0, 10.0) if f * power >= least * (1 - 1e-9))


def thinned(points: Points, most: int) -> list[tuple[int, float]]:
    """At most `most` points, each the mean of the finite ones of a stretch, at its last step."""
    if len(points) <= most:
        return list(points)
    found = []
    for number in range(most):
        part = points[number * len(points) // most : (number + 1) * len(points) // most]
        finite = [value for _, value in part if math.isfinite(value)]
        found.append((part[-1][0], sum(finite) / len(finite) if finite else math.nan))
    return found


def smoothed(points: Points) -> list[tuple[int, float]]:
    """Each finite point as the mean of its neighbourhood, a twentieth of all points wide."""
    finite = [(step, value) for step, value in points if math.isfinite(value)]
    reach = max(1, len(finite) // 40)
    sums = [0.0]
    for _, value in finite:
        sums.append(sums[-1] + value)
    found = []
    for place, (step, _) in enumerate(finite):
        near = min(reach, place, len(finite) - 1 - place)  # the same on both sides: no lag
        first, last = place - near, place + near + 1
        found.append((step, (sums[last] - sums[first]) / (last - first)))
    return found


def constant(series: Sequence[Series]) -> float | None:
    """The one value that all runs have at all steps, None if there are several or none."""
    values = {value for s in series for _, value in s.points}
    return values.pop() if len(values) == 1 else None


def draw_chart(figure: Figure, series: Sequence[Series], number: int, most: int) -> str:
    """A <figure> of a figure's curves, "" if no run has a finite value of it.

    Args:
        number: tells its elements apart from those of other charts. most: points of a line.
    """
    drawn = [_thinned(s, most) for s in series]
    values = [v for s in drawn for p in (s.points, s.low, s.high) for _, v in p if math.isfinite(v)]
    steps = [step for s in drawn for step, _ in s.points]
    if not values:
        return ""
    y = _value_axis(values, may_be_log=not figure.tenths)  # of a profile the peak counts
    first, last = min(steps), max(steps)
    if first == last:
        first, last = first - 1, last + 1
    x = _Axis(first, last, _LEFT, _WIDTH - _RIGHT)
    units = (
        "" if figure.is_share else figure.unit, "log scale" if y.is_log else "",
        "dotted: early, dashed: mid-run" if any(s.age for s in series) else "",
    )  # fmt: skip
    unit = text(", ".join(filter(None, units)))
    curves = "".join(_curves(s, x, y) for s in drawn)
    return (
        f'<figure class=chart><figcaption><b id="t{number}">{text(figure.title, 80)}</b>'
        f"{f' <span>{unit}</span>' if unit else ''}</figcaption>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role=img tabindex=0 aria-labelledby="t{number}" '
        f'aria-describedby="d{number}" data-x="{x.scale:.9g} {x.offset:.9g}" '
        f'data-y="{y.scale:.9g} {y.offset:.9g}" data-log="{int(y.is_log)}" '
        f'data-share="{int(figure.is_share)}" data-axis="{_axis_name(figure)}">'
        f"{_frame(figure, x, y)}{curves}"
        f'<path class=cursor d="M0,{_TOP}V{_HEIGHT - _BOTTOM}"/></svg>'
        f'<p class=readout id="d{number}" aria-live=polite>{_last_values(figure, series)}</p>'
        "</figure>"
    )


def _thinned(series: Series, most: int) -> Series:
    points, low, high = (thinned(p, most) for p in (series.points, series.low, series.high))
    return replace(series, points=points, low=low, high=high)


def _axis_name(figure: Figure) -> str:
    return "tenth" if figure.tenths else "step"


def _value_axis(values: Sequence[float], *, may_be_log: bool) -> _Axis:
    """Logarithmic, if it may be, where values reach over three powers of ten; from 0 on where 0 is
    near."""
    low, high = (min(max(v, -_LARGEST), _LARGEST) for v in (min(values), max(values)))
    start, end = _HEIGHT - _BOTTOM, _TOP
    if may_be_log and low > 0 and high / low >= _LOG_FROM:
        return _Axis(math.log10(low), math.log10(high), start, end, is_log=True)
    if 0 <= low < high / 2:
        low = 0.0
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # a constant: in the middle
        room = abs(high) / 2 or 1.0
        low, high = low - room, high + room
    room = 0.04 * (high - low)
    return _Axis(low - room * (low != 0), high + room, start, end)


def _frame(figure: Figure, x: _Axis, y: _Axis) -> str:
    """Grid, numbers and the name of the horizontal axis."""
    parts, marks = [], y.marks(4)
    for (_, place), label in zip(marks, _labels(figure, marks), strict=True):
        parts.append(
            f'<path class=grid d="M{_LEFT},{place:.1f}H{_WIDTH - _RIGHT}"/>'
            f'<text class=y x="{_LEFT - 5}" y="{place + 3.5:.1f}">{label}</text>'
        )
    bottom = _HEIGHT - _BOTTOM
    for value, place in x.marks(5):
        if value == int(value):
            parts.append(
                f'<path class=grid d="M{place:.1f},{bottom}v4"/>'
                f'<text class=x x="{place:.1f}" y="{bottom + 15}">{value:,.0f}</text>'
            )
    parts.append(f'<path class=axis d="M{_LEFT},{bottom}H{_WIDTH - _RIGHT}"/>')
    return "".join(parts)


def _labels(figure: Figure, marks: Sequence[tuple[float, float]]) -> list[str]:
    """Numbers at the axis, with as many digits as tell them apart."""
    for digits in (4, 6, 8):
        labels = [short(value, is_share=figure.is_share, digits=digits) for value, _ in marks]
        if len(set(labels)) == len(labels):
            break
    return labels


def _curves(series: Series, x: _Axis, y: _Axis) -> str:
    # Only steps are scaled: divergences of 1e-7 would need factors beyond a browser's floats.
    matrix = f"matrix({x.scale:.9g} 0 0 1 {x.offset:.9g} 0)"
    is_smoothed = len(series.points) >= _SMOOTHED_FROM
    kind, note = (f" {series.age}" if series.age else ""), text(series.note, 40)
    parts = [f'<g class="r{series.run}{kind}" data-run="{series.run}" data-note="{note}">']
    parts += [
        f'<path class=mark d="M{x.place(step):.1f},{_TOP}V{_HEIGHT - _BOTTOM}"/>'
        for step in series.marks if x.low <= step <= x.high
    ]  # fmt: skip
    if series.low and series.high:
        parts.append(f'<path class=band transform="{matrix}" d="{_band(series, y)}"/>')
    raw = _path(series.points, y)
    parts.append(f'<path class="{"raw" if is_smoothed else "line"}" data-line transform="{matrix}" '
                 f'd="{raw}"/>')  # fmt: skip
    if is_smoothed:
        mean = _path(smoothed(series.points), y)
        parts.append(f'<path class=line transform="{matrix}" d="{mean}"/>')
    elif len(series.points) <= _DOTS_BELOW and not series.age:
        parts += [
            f'<circle cx="{x.place(step):.1f}" cy="{_height(value, y):.1f}" r=2.5 />'
            for step, value in series.points
            if _is_drawable(value, y)
        ]
    return "".join((*parts, "</g>"))


def _is_drawable(value: float, y: _Axis) -> bool:
    return math.isfinite(value) and (value > 0 or not y.is_log)


def _height(value: float, y: _Axis) -> float:
    shown = math.log10(value) if y.is_log else value
    return y.place(min(max(shown, y.low), y.high))


def _pairs(points: Points, y: _Axis) -> Iterator[str]:
    for step, value in points:
        yield f"{step},{_height(value, y):.3f}" if _is_drawable(value, y) else ""


def _path(points: Points, y: _Axis) -> str:
    """A line that is broken where a value is missing."""
    path, pen = [], "M"
    for pair in _pairs(points, y):
        if pair:
            path.append(pen + pair)
        pen = "L" if pair else "M"
    return "".join(path)


def _band(series: Series, y: _Axis) -> str:
    corners = [p for p in _pairs(series.high, y) if p]
    corners += [p for p in reversed(list(_pairs(series.low, y))) if p]
    return f"M{'L'.join(corners)}Z" if corners else ""


def _last_values(figure: Figure, series: Sequence[Series]) -> str:
    """What stands below a chart until somebody points at it: the last value of each run."""
    last = max(s.points[-1][0] for s in series)
    parts = []
    for s in series:
        step, value = s.points[-1]
        other = "" if step == last else f" ({_axis_name(figure)} {step:,})"
        shown = short(value, is_share=figure.is_share) + other
        parts.append(f'<span class="r{s.run}"><i></i>{text(s.name, 60)} {shown}</span>')
    return f"<span>{_axis_name(figure)} {last:,}:</span> " + " ".join(parts)
