# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Is a benchmark's question answered right? Rules without a judge, under one version string.

Only the last complete <answer>...</answer> counts (a maze's plan may stand in a \\boxed{} instead:
its question asks for that). Whoever changes a rule raises `SCORING_VERSION`.
"""

from __future__ import annotations

import math
import re
import string
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from data.worlds.spatial_navigation import Maze, walk
from scripts.visual_opsd.scoring import extract_answer, normalise_answer

SCORING_VERSION = "visual-opsd-exact-1"
CHART_TOLERANCE = 0.05

RULES = {
    "choice": (
        "the last <answer>: an option's letter (alone, in brackets, after 'option' or 'answer', or "
        "followed by '.', ')' or ':' and text that is not another option's), else the text of "
        "exactly one option"
    ),
    "chart": (
        "the last <answer>: a number within 5 % of the given one (thousands separators, a currency "
        "sign and a final % do not matter; 0 must be hit), other answers after normalisation"
    ),
    "maze": (
        "the last <answer>, or the last \\boxed{} of a text without one: moves U, D, L, R that "
        "leave neither the board nor the ice and end on the goal; any such path counts"
    ),
    "exact": "the last <answer> equals the given answer, both normalised",
}
CIRCULAR_RULE = "a question is right if it is answered rightly in every order of its options"

_BOXED = re.compile(r"\\+boxed\s*\{([^{}]*)\}")
_LABEL = re.compile(
    r"(?:(?:the\s+)?(?:correct\s+|final\s+|best\s+)?(?:answer|option|choice)(?:\s+is)?\s*:?\s*)?"
    r"(?:\(\s*([a-z])\s*\)|\[\s*([a-z])\s*\]|([a-z])(?=\s*[.):]|\s*$))\s*[.):]*\s*(.*)",
    re.DOTALL,
)
_CURRENCY = "$\u20ac\u00a3\u00a5"
_NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:e[+-]?\d+)?")
_MOVES = {"up": "U", "down": "D", "left": "L", "right": "R"}


@dataclass(frozen=True)
class Verdict:
    """`given`: what was taken for the answer (a letter, a plan, a text); None without one."""

    correct: bool
    given: str | None


def _unboxed(text: str) -> str:
    found = _BOXED.fullmatch(text.strip())
    return found[1] if found else text


# ---------------------------------------------------------------------------------- choices


def chosen_option(given: str, options: Mapping[str, str]) -> str | None:
    """The letter of the option an answer names, or None.

    Args:
        options: letter -> text; {} if the question does not list them, then any letter will do.
    """
    known = options or dict.fromkeys(string.ascii_uppercase, "")
    plain = normalise_answer(_unboxed(given))
    letter = plain.upper()
    if letter in known:
        return letter
    same = [key for key, text in options.items() if normalise_answer(text) == plain]
    if len(same) == 1:
        return same[0]
    folded = unicodedata.normalize("NFKC", _unboxed(given)).casefold()
    labelled = _LABEL.fullmatch(folded.replace("*", "").strip())
    if labelled is None:
        return None
    letter = (labelled[1] or labelled[2] or labelled[3]).upper()
    rest = normalise_answer(labelled[4])
    others = {normalise_answer(text) for key, text in options.items() if key != letter}
    contradicts = rest in others and rest != normalise_answer(options.get(letter, ""))
    return letter if letter in known and not contradicts else None


def choice_verdict(text: str, gold: str, options: Mapping[str, str]) -> Verdict:
    """Judge a generated text against the right letter."""
    given = extract_answer(text)
    if given is None:
        return Verdict(False, None)
    letter = chosen_option(given, options)
    return Verdict(letter == gold, letter or given.strip())


# ---------------------------------------------------------------------------------- charts


def number(text: str) -> float | None:
    """The number a short answer is, without currency sign, separators and a final percent sign."""
    plain = normalise_answer(text).rstrip("%").strip()
    sign = plain[:1] if plain[:1] in "+-" else ""
    plain = normalise_answer(sign + plain.removeprefix(sign).lstrip(_CURRENCY).strip())
    return float(plain) if _NUMBER.fullmatch(plain) else None


def close_enough(given: str, wanted: str, tolerance: float = CHART_TOLERANCE) -> bool:
    """Numbers within `tolerance` of the wanted one; other texts equal after normalisation."""
    a, b = number(given), number(wanted)
    if a is None or b is None:
        return normalise_answer(given) == normalise_answer(wanted)
    return abs(a - b) <= tolerance * abs(b) * (1 + 1e-9)


def chart_verdict(text: str, wanted: Sequence[str]) -> Verdict:
    """Judge a generated text; any of the wanted answers will do."""
    given = extract_answer(text)
    if given is None:
        return Verdict(False, None)
    given = _unboxed(given).strip()
    return Verdict(any(close_enough(given, answer) for answer in wanted), given)


# ---------------------------------------------------------------------------------- mazes


def moves(text: str) -> str | None:
    """Moves of a plan such as "R, R, D", "RRD" or "right, right, down"; None for anything else."""
    words = re.split(r"[\s,;.>\[\]()\"'\u2192-]+", _unboxed(text).casefold())
    plan = ""
    for word in filter(None, words):
        if word in _MOVES:
            plan += _MOVES[word]
        elif set(word) <= set("udlr"):
            plan += word.upper()
        else:
            return None
    return plan or None


def maze_verdict(text: str, maze: Maze) -> Verdict:
    """Judge a generated plan by walking it."""
    given = extract_answer(text)
    if given is None:
        boxes = _BOXED.findall(text)
        given = boxes[-1] if boxes else None
    if given is None:
        return Verdict(False, None)
    plan = moves(given)
    if plan is None:
        return Verdict(False, given.strip())
    cells = walk(maze, plan)
    return Verdict(cells is not None and cells[-1] == maze.goal, ",".join(plan))


def parse_maze(text: str) -> Maze:
    """The maze of a `maze_map` cell: the letters S, F, H and G row by row, in any wrapping.

    Raises:
        ValueError: they are no maze.
    """
    letters = re.findall("[SFHG]", text)
    side = max(math.isqrt(len(letters)), 1)
    rows = ("".join(letters[i : i + side]) for i in range(0, len(letters), side))
    return Maze.parse("/".join(rows))


def exact_verdict(text: str, answer: str) -> Verdict:
    """Judge by equality after normalisation."""
    given = extract_answer(text)
    if given is None:
        return Verdict(False, None)
    return Verdict(normalise_answer(given) == normalise_answer(answer), given.strip())
