# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The drawing of the method, docs/figures/method.svg, which `make docs` writes.

Plain SVG without a library. Its style follows the reader's preference for light or dark; what the
student never sees has a colour of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

WIDTH, HEIGHT = 940, 500
_STYLE = """
  svg { font: 15px system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
  .ground { fill: #fff; } .ink { fill: #1b1f24; } .soft { fill: #5c6570; font-size: 13px; }
  .head { fill: #1b1f24; font-weight: 600; } .step { fill: #fff; font-weight: 600; }
  .disc { fill: #5c6570; } .box { fill: #f3f5f7; stroke: #aab3bd; }
  .lane { fill: none; stroke: #d5dae0; stroke-dasharray: 4 4; }
  .wall { fill: #aab3bd; } .start { fill: #5c6570; } .goal { fill: #c8553d; }
  .hidden { fill: #e3f3e5; stroke: #3a7d44; stroke-width: 2; }
  .path { fill: none; stroke: #3a7d44; stroke-width: 5; } .hidden-ink { fill: #2e6637; }
  .student { fill: #1b6ca8; } .teacher { fill: #3a7d44; }
  .token { fill: #dbe9f5; stroke: #1b6ca8; }
  .line { fill: none; stroke: #5c6570; stroke-width: 1.6; }
  .back { fill: none; stroke: #1b6ca8; stroke-width: 2; } .tip { fill: #5c6570; }
  .back-tip { fill: #1b6ca8; } .follow { fill: none; stroke: #3a7d44; stroke-dasharray: 5 4;
    stroke-width: 1.6; } .follow-tip { fill: #3a7d44; }
  text { text-anchor: middle; } .left { text-anchor: start; }
  @media (prefers-color-scheme: dark) {
    .ground { fill: #14171b; } .ink, .head { fill: #e4e8ec; } .soft { fill: #9aa5b1; }
    .box { fill: #1d2126; stroke: #56606b; } .lane { stroke: #39414a; }
    .wall { fill: #56606b; } .start { fill: #9aa5b1; } .goal { fill: #ff8d72; }
    .hidden { fill: #17301b; stroke: #7ccb88; } .path { stroke: #7ccb88; }
    .hidden-ink { fill: #9fdcaa; } .student { fill: #5fb0ea; } .teacher { fill: #7ccb88; }
    .token { fill: #17324a; stroke: #5fb0ea; } .line { stroke: #9aa5b1; }
    .back { stroke: #5fb0ea; } .tip { fill: #9aa5b1; } .back-tip { fill: #5fb0ea; }
    .follow { stroke: #7ccb88; } .follow-tip { fill: #7ccb88; }
  }
"""
_TITLE = "One training step of Visual-OPSD"
_DESCRIPTION = (
    "A row holds a problem image, a question and a visual thought. The student's context is image "
    "and question, the teacher's also the visual thought, which the student never sees. The "
    "student samples a completion; both models score the same tokens; the divergence of their "
    "probabilities updates the student, and the teacher follows as an average of it."
)
_CHANCES = ((0.2, 0.55, 0.15, 0.1), (0.1, 0.2, 0.6, 0.1))  # student's and teacher's, of one token


def box(x: float, y: float, width: float, height: float, kind: str = "box") -> str:
    return (
        f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6"/>'
    )


def label(x: float, y: float, words: str, kind: str = "ink") -> str:
    return f'<text class="{kind}" x="{x:g}" y="{y:g}">{words}</text>'


def arrow(points: Sequence[tuple[float, float]], kind: str = "line", tip: str = "tip") -> str:
    """A line through points with a head at the last; its last piece is level or upright."""
    (x0, y0), (x, y) = points[-2:]
    dx, dy = (x > x0) - (x < x0), (y > y0) - (y < y0)
    end = (x - 8 * dx, y - 8 * dy)
    path = "L".join(f"{px:g},{py:g}" for px, py in (*points[:-1], end))
    side = f"{end[0] + 5 * dy:g},{end[1] + 5 * dx:g}", f"{end[0] - 5 * dy:g},{end[1] - 5 * dx:g}"
    return (
        f'<path class="{kind}" d="M{path}"/>'
        f'<path class="{tip}" d="M{x:g},{y:g}L{side[0]}L{side[1]}Z"/>'
    )


def step(number: int, x: float, y: float, words: str) -> str:
    """The number of a step in a disc, and its name to the right of it."""
    return (
        f'<circle class="disc" cx="{x:g}" cy="{y:g}" r="11"/>'
        f"{label(x, y + 5, str(number), 'step')}{label(x + 18, y + 5, words, 'head left')}"
    )


def maze(x: float, y: float, side: float, *, is_thought: bool) -> str:
    """A board of 3 x 3 with two holes, a start and a goal; a visual thought has the path drawn."""
    cell = side / 3

    def middle(column: int, row: int) -> tuple[float, float]:
        return x + (column + 0.5) * cell, y + (row + 0.5) * cell

    parts = [box(x, y, side, side, "hidden" if is_thought else "box")]
    for column, row in ((1, 1), (0, 2)):
        parts.append(box(x + column * cell + 3, y + row * cell + 3, cell - 6, cell - 6, "wall"))
    if is_thought:
        way = "L".join(f"{px:g},{py:g}" for px, py in map(middle, (0, 0, 1, 2, 2), (1, 0, 0, 0, 2)))
        parts.append(f'<path class="path" d="M{way}"/>')
    (sx, sy), (gx, gy) = middle(0, 1), middle(2, 2)
    radius = cell / 5
    parts.append(f'<circle class="start" cx="{sx:g}" cy="{sy:g}" r="{radius:g}"/>')
    parts.append(f'<circle class="goal" cx="{gx:g}" cy="{gy:g}" r="{radius:g}"/>')
    return "".join(parts)


def question(x: float, y: float, width: float, height: float) -> str:
    return box(x, y, width, height) + label(x + width / 2, y + height / 2 + 5, "question")


def completion(x: float, y: float) -> str:
    """Four tokens of the sampled completion."""
    names = ("y&#8321;", "y&#8322;", "&#8230;", "y&#8345;")
    return "".join(
        box(x + 38 * n, y, 34, 34, "token") + label(x + 38 * n + 17, y + 22, name)
        for n, name in enumerate(names)
    )


def chances(x: float, y: float, values: Sequence[float], kind: str) -> str:
    """Probabilities of the next token as bars that stand on y."""
    bars = "".join(
        f'<rect class="{kind}" x="{x + 18 * n:g}" y="{y - 70 * value:g}" width="14" '
        f'height="{70 * value:g}"/>'
        for n, value in enumerate(values)
    )
    return f'{bars}<path class="line" d="M{x - 4:g},{y:g}h{18 * len(values) + 4}"/>'


def draw() -> str:
    """The drawing as the text of an SVG file."""
    parts = [
        box(0, 0, WIDTH, HEIGHT, "ground"),
        # The row.
        step(1, 31, 30, "row"), box(20, 56, 132, 326, "lane"),
        maze(47, 70, 78, is_thought=False), label(86, 166, "problem image", "soft"),
        question(40, 184, 92, 34),
        maze(47, 248, 78, is_thought=True), label(86, 345, "visual thought", "hidden-ink"),
        label(86, 364, "(VT)", "hidden-ink"),
        # Two contexts, and the completion that both are followed by.
        step(2, 191, 30, "two contexts"), step(3, 441, 30, "rollout"),
        box(180, 56, 442, 120, "lane"), label(192, 76, "student", "head left"),
        maze(196, 92, 62, is_thought=False), question(266, 106, 86, 34),
        completion(456, 106), label(530, 160, "sampled by the student", "soft"),
        arrow([(360, 123), (448, 123)]),
        box(180, 248, 442, 134, "lane"), label(192, 268, "teacher", "head left"),
        maze(196, 284, 62, is_thought=False), question(266, 298, 86, 34),
        maze(360, 284, 62, is_thought=True), label(391, 366, "only the teacher", "hidden-ink"),
        completion(456, 298), arrow([(430, 315), (448, 315)]),
        arrow([(530, 180), (530, 290)]), label(540, 218, "the same tokens", "soft left"),
        arrow([(152, 123), (180, 123)]), arrow([(152, 315), (180, 315)]),
        # Two forwards.
        step(4, 669, 30, "two forwards"),
        arrow([(622, 123), (668, 123)]), arrow([(622, 315), (668, 315)]),
        chances(680, 150, _CHANCES[0], "student"), label(714, 170, "with gradient", "soft"),
        chances(680, 342, _CHANCES[1], "teacher"), label(714, 362, "no gradient", "soft"),
        # Divergence.
        step(5, 797, 150, "divergence"),
        box(786, 175, 138, 88), label(855, 201, "JSD of the two,"),
        label(855, 223, "token by token,"), label(855, 245, "top-k, clipped"),
        arrow([(760, 123), (773, 123), (773, 201), (786, 201)]),
        arrow([(760, 315), (773, 315), (773, 237), (786, 237)]),
        # Update.
        step(6, 191, 424, "update"),
        arrow([(855, 263), (855, 460), (640, 460)], "back", "back-tip"),
        box(456, 438, 184, 44), label(548, 465, "student: AdamW step", "ink"),
        box(180, 438, 210, 44), label(285, 465, "teacher: average (EMA)", "ink"),
        arrow([(456, 460), (390, 460)], "follow", "follow-tip"),
        label(748, 480, "backward", "soft"),
        box(20, 444, 32, 32, "hidden"), label(60, 456, "never seen", "hidden-ink left"),
        label(60, 475, "by the student", "hidden-ink left"),
    ]  # fmt: skip
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
        f'height="{HEIGHT}" role="img" aria-labelledby="title text">\n'
        f'<title id="title">{_TITLE}</title>\n<desc id="text">{_DESCRIPTION}</desc>\n'
        f"<style>{_STYLE}</style>\n{body}\n</svg>\n"
    )
