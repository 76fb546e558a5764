# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The report of some runs as one HTML file that needs neither network nor server.

Texts of runs and data are strangers' (`markup.text`), and the page's own policy forbids whatever
is not in the file: no request leaves it, and no script runs but the one of this folder.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Sequence
from pathlib import Path

from modeling.host.disk import disk_errors, replace_file
from scripts.visual_opsd.analysis.report.charts import Series, constant, draw_chart
from scripts.visual_opsd.analysis.report.completions import CompletionCards, chosen_steps
from scripts.visual_opsd.analysis.report.figures import Figure, Group, group_figures
from scripts.visual_opsd.analysis.report.markup import short, text
from scripts.visual_opsd.analysis.report.runs import Run, read_runs
from scripts.visual_opsd.analysis.report.tables import (
    arms_table,
    glance_table,
    run_heads,
    settings_tables,
)
from scripts.visual_opsd.analysis.report.tokens import colour_choice

_HEAD = "<!DOCTYPE html>"
_STYLE, _SCRIPT = "report.css", "report.js"
_CHART_BYTES = 900_000  # of all curves together
_POINT_BYTES = 24  # of a point in a raw and a smoothed line
_POINTS = (40, 500)  # of a line, at least and at most
_AGES = {"early": 0.0, "middle": 0.5, "late": 1.0}  # when in a run, of what is drawn over tenths
_MOST_AGED = 4  # runs; of more only the last is drawn


def write_report(
    runs: Sequence[str | Path],
    out: Path,
    *,
    evaluations: Sequence[str | Path] = (),
    steps: Sequence[int] | None = None,
) -> None:
    """Write the report of some runs to `out`, replacing what is there.

    Args:
        runs: results folders of trainings. evaluations: output folders of `evaluate`.
        steps: whose completions to show; None: some from the first to the last.

    Raises:
        ValueError: a folder that holds no such thing, or `out` cannot be written.
    """
    page = build_page(read_runs(runs), evaluations, steps)
    with disk_errors(f"writing {out}", out.parent):
        replace_file(out, page.encode("utf-8"))


def check_replaced(out: Path) -> None:
    """Raises ValueError: `out` is there, and no report."""
    with disk_errors(f"reading {out}", out.parent):
        if not out.exists():
            return
        if out.is_file():
            with out.open("rb") as stream:
                if stream.read(len(_HEAD)) == _HEAD.encode():
                    return
    raise ValueError(
        f"--out {out} is no report, and --overwrite replaces nothing else: choose another place"
    )


def build_page(
    runs: Sequence[Run], evaluations: Sequence[str | Path], steps: Sequence[int] | None
) -> str:
    """The whole file. Raises ValueError as `write_report`."""
    style, script = (
        Path(__file__).with_name(name).read_text(encoding="utf-8") for name in (_STYLE, _SCRIPT)
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'"
    )
    sections = _sections(runs, evaluations, steps)
    links = "".join(f'<a href="#{name}">{title}</a>' for name, title, _ in sections)
    body = "".join(
        f'<section id="{name}"><h2>{title}</h2>{content}</section>'
        for name, title, content in sections
    )
    names = text(", ".join(run.label for run in runs), 200)
    return (
        f"{_HEAD}\n"
        '<html lang=en><head><meta charset=utf-8>'
        f'<meta http-equiv=Content-Security-Policy content="{policy}">'
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        '<meta name=color-scheme content="light dark">'
        f"<title>Training report: {names}</title><style>{style}{_run_rules(len(runs))}</style>"
        f"</head><body><header><h1>Training report</h1><nav>{links}</nav></header>"
        f"{_legend(runs)}<main>{body}</main><script>{script}</script></body></html>\n"
    )  # fmt: skip


def _run_rules(count: int) -> str:
    """Hides what belongs to a run whose box in the legend is not ticked; no script is needed."""
    return "".join(
        f"body:has(#run{n}:not(:checked)) main [data-run='{n}']{{display:none}}"
        for n in range(count)
    )


def _legend(runs: Sequence[Run]) -> str:
    boxes = "".join(
        f'<label><input type=checkbox id="run{n}" checked>{head}</label>'
        for n, head in enumerate(run_heads(runs))
    )
    return f"<form class=legend aria-label=Runs><b>Runs</b>{boxes}</form>"


def _sections(
    runs: Sequence[Run], evaluations: Sequence[str | Path], steps: Sequence[int] | None
) -> list[tuple[str, str, str]]:
    """(anchor, title, HTML) of the parts that there is something to show in."""
    groups, left_out = group_figures({name for run in runs for name in run.figures})
    found = [("glance", "At a glance", _errors(runs) + glance_table(runs, groups))]
    if evaluations:
        found.append(("arms", "Evaluations", arms_table(evaluations)))
    found.append(("settings", "Settings", settings_tables(runs)))
    found.append(("curves", "Curves", _curves(runs, groups, left_out)))
    found.append(("completions", "Completions", _completions(runs, steps)))
    return found


def _curves(runs: Sequence[Run], groups: Sequence[Group], left_out: int) -> str:
    """Charts of all groups; what no chart would show is said in words."""
    note = (
        "<p class=note>Faint: every logged step; strong: the mean of its neighbourhood. Point at a "
        "chart, or reach it with Tab and move with the arrow keys, to read values.</p>"
    )
    parts = [note]
    if any(run.drops() for run in runs):
        parts.append("<p class=note>Dashed uprights: validations that found the teacher worse than "
                     "it was.</p>")  # fmt: skip
    most = _points_of_a_line(runs, sum(len(group.figures) for group in groups))
    for number, group in enumerate(groups):
        parts.append(_group_of_curves(runs, group, 1000 * number, most))
    if left_out:
        parts.append(f"<p class=note>{left_out} further figures are left out.</p>")
    return "".join(parts)


def _group_of_curves(runs: Sequence[Run], group: Group, first: int, most: int) -> str:
    """The charts of a group; first: the number of the first chart. most: points of a line."""
    charts, words = "", []
    drawn: list[tuple[str, list[Series]]] = []
    for number, figure in enumerate(group.figures, first):
        series = _series(runs, figure)
        value = constant(series)
        twin = next((title for title, other in drawn if other == series), None)
        if value is not None:
            shown = short(value, is_share=figure.is_share)
            words.append(f"{figure.title}: {shown} at every step.")
        elif twin is not None:
            words.append(f"{figure.title}: the same curves as {twin}.")
        else:
            charts += draw_chart(figure, series, number, most)
            drawn.append((figure.title, series))
    said = f"<p class=same>{text(' '.join(words))}</p>" if words else ""
    return f"<h3>{text(group.title)}</h3><div class=charts>{charts}</div>{said}"


def _points_of_a_line(runs: Sequence[Run], figures: int) -> int:
    least, most = _POINTS
    return max(least, min(most, _CHART_BYTES // (_POINT_BYTES * len(runs) * max(1, figures))))


def _series(runs: Sequence[Run], figure: Figure) -> list[Series]:
    if figure.tenths:
        ages = list(_AGES) if len(runs) <= _MOST_AGED else ["late"]
        return [
            Series(n, run.label, points, age="" if age == "late" else age, note=note)
            for n, run in enumerate(runs) for age in ages
            for points, note in _profile(run, figure.tenths, _AGES[age])
        ]  # fmt: skip
    return [
        Series(n, run.label, run.figures[figure.name], run.figures.get(figure.low, ()),
               run.figures.get(figure.high, ()), tuple(run.drops()))
        for n, run in enumerate(runs) if figure.name in run.figures
    ]  # fmt: skip


def _profile(
    run: Run, tenths: Sequence[str], place: float
) -> list[tuple[list[tuple[int, float]], str]]:
    """The means of a run's tenths over a tenth of its logged steps, and which steps; [] without
    values. place: 0 for the first steps, 1 for the last."""
    steps = sorted({step for name in tenths for step, _ in run.figures.get(name, ())})
    if not steps or (place < 1 and len(steps) < 3):
        return []
    size = max(1, len(steps) // 10)
    first = round(place * (len(steps) - size))
    chosen = steps[first : first + size]
    points = []
    for number, name in enumerate(tenths, 1):
        values = [v for step, v in run.figures.get(name, ()) if chosen[0] <= step <= chosen[-1]]
        finite = [value for value in values if math.isfinite(value)]
        if finite:
            points.append((number, sum(finite) / len(finite)))
    end = f" to {chosen[-1]:,}" if size > 1 else ""
    return [(points, f"step {chosen[0]:,}{end}")] if points else []


def _errors(runs: Sequence[Run]) -> str:
    """What the disk refused to save, and how many steps were not finite."""
    lines = []
    for run in runs:
        skipped = sum(value > 0 for _, value in run.figures.get("nonfinite", ()))
        if skipped:
            lines.append(f"{run.label}: {skipped} logged steps were skipped (not finite)")
        lines += [f"{run.label}, {error}" for error in run.errors[-3:]]
    return "".join(f"<p class=warning>{text(line, 400)}</p>" for line in lines)


# ---------------------------------------------------------------------------------- completions


def _completions(runs: Sequence[Run], wanted: Sequence[int] | None) -> str:
    steps = chosen_steps(runs, wanted)
    if not steps:
        return "<p>No run wrote completions (samples.jsonl).</p>"
    cards = CompletionCards(runs)
    shown = cards.of_steps(steps)
    known = set().union(*cards.colours.values())
    parts = [colour_choice(known)]
    parts += [f"<p class=note>{text(note, 400)}</p>" for note in _teacher_notes(runs)]
    for step in steps:
        opened = " open" if step in (steps[0], steps[-1]) else ""
        parts.append(
            f"<details class=step{opened}><summary>Step {step:,}</summary>"
            f"<div class=cards>{shown[step]}</div></details>"
        )
    if cards.left_out:
        parts.append(f"<p class=note>{cards.left_out} further rows of these steps are left out; "
                     "samples.jsonl has them.</p>")  # fmt: skip
    if cards.uncoloured:
        labels = ", ".join(sorted(cards.uncoloured))
        parts.append(f"<p class=note>Without colours, for want of the base's tokenizer or of ids: "
                     f"{text(labels, 300)}.</p>")  # fmt: skip
    lacking = [label for label, letters in cards.colours.items() if letters < known]
    if lacking:
        parts.append("<p class=note>Without some of the colours, as samples.jsonl of these steps "
                     f"does not hold them: {text(', '.join(lacking), 300)}.</p>")  # fmt: skip
    missing = cards.missing_pictures()
    parts += [f"<p class=note>No pictures. {text(reason, 400)}</p>" for reason in missing]
    return "".join(parts)


def _teacher_notes(runs: Sequence[Run]) -> list[str]:
    """Runs whose teacher saw something else than the visual thoughts that are shown."""
    found = []
    for run in runs:
        kind = run.settings.get("vt", "real")
        if run.settings.get("noise_vt") is True:
            kind = "noise"
        if kind != "real":
            found.append(f"{run.label}: its teacher did not see these visual thoughts ({kind}).")
    return found
