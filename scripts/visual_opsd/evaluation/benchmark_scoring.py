# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Is a question answered right? Rules without a judge, under one version string.

Only the last complete <answer>...</answer> counts (a maze's plan may stand in a \\boxed{} instead:
its question asks for that). Beside this strict verdict, which figures are compared by, each
function gives a lenient one: where the strict rule reads nothing, `lenient_answers` reads what the
text says to a reader, and the same judge decides. Whoever changes a rule raises `SCORING_VERSION`.
"""

from __future__ import annotations

import math
import re
import string
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from data.worlds import Scorer
from data.worlds.spatial_navigation import Maze, walk
from scripts.visual_opsd.evaluation.lenient_answers import (
    Number,
    lenient_number,
    lenient_option,
    lenient_text,
    plain_number,
)
from scripts.visual_opsd.evaluation.lenient_plans import lenient_plan
from scripts.visual_opsd.evaluation.scoring import (
    bare,
    exact_match,
    extract_answer,
    normalise_answer,
    plain_characters,
)

SCORING_VERSION = "visual-opsd-exact-2"
CHART_TOLERANCE = 0.05

RULES = {
    "choice": (
        "the last <answer>: an option's letter (alone, in brackets, after 'option' or 'answer', or "
        "followed by '.', ')' or ':' and text that is not another option's and labels no other "
        "letter), else the text of exactly one option"
    ),
    "chart": (
        "the last <answer>: a number within 5 % of the given one (thousands commas, a currency "
        "sign on either side and a final % do not matter; 0 must be hit), other answers after "
        "normalisation"
    ),
    "maze": (
        "the last <answer>, or the last \\boxed{} of a text without one: moves U, D, L, R that "
        "leave neither the board nor the ice and end on the goal; any such path counts"
    ),
    "exact": "the last <answer> equals the given answer, both normalised",
}
CIRCULAR_RULE = "a question is right if it is answered rightly in every order of its options"
PAIR_RULE = "a pair of consecutive indices is right if both its rows are (the authors' rule)"
LENIENT_RULE = (
    "lenient: what a reader takes for the answer where the strict rule reads none (tags, markup, "
    "units, prose; two candidates are none); not what figures are compared by"
)

_BOXED = re.compile(r"\\boxed\s*\{([^{}]*)\}")
_LABEL = re.compile(
    r"(?:(?:the\s+)?(?:correct\s+|final\s+|best\s+)?(?:answer|option|choice)(?:\s+is)?\s*:?\s*)?"
    r"(?:\(\s*([a-z])\s*\)|\[\s*([a-z])\s*\]|([a-z])(?=\s*[.):]|\s*$))\s*[.):]*\s*(.*)",
    re.DOTALL,
)
# Another letter in the text after a letter: "(a) or (b)", "a. left b. right".
_SECOND = re.compile(
    r"^(?:or|and|/|&|,)?\s?\(?([a-z])\)?(?:$|(?=\s(?:or|and)\b))|[(\[]\s?([a-z])\s?[)\]]|"
    r"(?:^|\s)([a-z])[.):](?=\s|$)"
)
_NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:e[+-]?\d+)?")
_MOVES = {"up": "U", "down": "D", "left": "L", "right": "R"}


@dataclass(frozen=True)
class Verdict:
    """`given`: what was taken for the answer (a letter, a plan, a text); None without one.

    `lenient`: right for a reader; never False where `correct` is True.
    """

    correct: bool
    given: str | None
    lenient: bool


def _unboxed(text: str) -> str:
    """The content of a \\boxed{} in any normal dress ("$\\boxed{B}$."), other texts as they are."""
    found = re.fullmatch(r"\\*" + _BOXED.pattern, bare(text))
    return found[1] if found else text


# ---------------------------------------------------------------------------------- choices


def chosen_option(given: str, options: Mapping[str, str]) -> str | None:
    """The letter of the option an answer names, or None.

    Args:
        options: letter -> text; {} if the question does not list them, then any letter will do.
    """
    known = options or dict.fromkeys(string.ascii_uppercase, "")
    given = _unboxed(given)
    plain = normalise_answer(given)
    if plain.upper() in known:
        return plain.upper()
    same = [key for key, text in options.items() if normalise_answer(text) == plain]
    return same[0] if len(same) == 1 else _labelling_letter(given, known)


def _labelling_letter(given: str, options: Mapping[str, str]) -> str | None:
    """The letter that an answer begins with, unless what follows names another option."""
    folded = plain_characters(given).casefold().replace("*", "")
    labelled = _LABEL.fullmatch(re.sub(r"\s+", " ", folded).strip())
    letter = (labelled[1] or labelled[2] or labelled[3]).upper() if labelled else ""
    if labelled is None or letter not in options:
        return None
    rest = normalise_answer(labelled[4])
    if rest == normalise_answer(options[letter]):
        return letter
    seconds = {next(filter(None, m.groups())).upper() for m in _SECOND.finditer(labelled[4])}
    others = {key: normalise_answer(text) for key, text in options.items() if key != letter}
    return None if rest in others.values() or seconds & others.keys() else letter


def choice_verdict(text: str, gold: str, options: Mapping[str, str]) -> Verdict:
    """Judge a generated text against the right letter."""
    given = extract_answer(text)
    letter = None if given is None else chosen_option(given, options)
    if letter is not None:
        return Verdict(letter == gold, letter, letter == gold)
    return Verdict(False, given and given.strip(), lenient_option(text, options) == gold)


# ---------------------------------------------------------------------------------- charts


def number(text: str) -> float | None:
    """The number a short answer is, without a currency sign on either side, separators and a final
    percent sign."""
    plain = normalise_answer(text).rstrip("%").strip()
    sign = plain[:1] if plain[:1] in "+-" else ""
    currencies = "".join(c for c in plain if unicodedata.category(c) == "Sc")
    plain = normalise_answer(sign + plain.removeprefix(sign).strip(currencies).strip())
    return float(plain) if _NUMBER.fullmatch(plain) else None


def _within(a: float, b: float, tolerance: float) -> bool:
    return abs(a - b) <= tolerance * abs(b) * (1 + 1e-9)


def close_enough(given: str, wanted: str) -> bool:
    """Numbers within 5 % of the wanted one; other texts equal after normalisation."""
    a, b = number(given), number(wanted)
    if a is None or b is None:
        return normalise_answer(given) == normalise_answer(wanted)
    return _within(a, b, CHART_TOLERANCE)


def chart_verdict(text: str, wanted: Sequence[str]) -> Verdict:
    """Judge a generated text; any of the wanted answers will do."""
    given = extract_answer(text)
    if given is not None:
        given = _unboxed(given).strip()
        if plain_characters(given).strip() and any(close_enough(given, a) for a in wanted):
            return Verdict(True, given, True)
    read = lenient_number(text)
    return Verdict(False, given, any(_leniently_close(text, read, answer) for answer in wanted))


def _leniently_close(
    text: str, given: Number | None, answer: str, tolerance: float = CHART_TOLERANCE
) -> bool:
    """A percentage may be its number or a hundredth of it, unless both are percentages."""
    wanted = plain_number(answer)
    if wanted is None:
        return lenient_text(text, answer)
    if given is None:
        return False
    shares = (1.0, 0.01) if given.percent != wanted.percent else (1.0,)
    return any(
        _within(
            given.value * (share if given.percent else 1.0),
            wanted.value * (share if wanted.percent else 1.0),
            tolerance,
        )
        for share in shares
    )


# ---------------------------------------------------------------------------------- mazes


def moves(text: str) -> str | None:
    """Moves of a plan such as "R, R, D", "RRD" or "right, right, down"; None for anything else."""
    plain = bare(plain_characters(_unboxed(text))).casefold()
    words = re.split(r"[\s,;.>\[\]()\"'\u2192-]+", plain)
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
    plan = None if given is None else moves(given)
    if plan is not None:
        right = _reaches(maze, plan)
        return Verdict(right, ",".join(plan), right)
    read = lenient_plan(text)
    return Verdict(False, given and given.strip(), read is not None and _reaches(maze, read))


def _reaches(maze: Maze, plan: str) -> bool:
    cells = walk(maze, plan)
    return cells is not None and cells[-1] == maze.goal


def world_verdict(text: str, scorer: Scorer, state: str | None) -> Verdict:
    """Judge by a world's own scorer; leniently by what it says of the plan in its own spelling."""
    row = {"world_state": state}
    correct = scorer(row, text)
    read = None if correct else lenient_plan(text)
    spelt = f"<answer>{','.join(read)}</answer>" if read else ""
    return Verdict(correct, None, correct or (read is not None and scorer(row, spelt)))


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
    """Judge by equality after normalisation (`scoring.exact_match`)."""
    given = extract_answer(text)
    correct = exact_match(answer, text)
    lenient = correct or _leniently_equal(text, extract_answer(answer) or answer)
    return Verdict(correct, given and given.strip(), lenient)


def _leniently_equal(text: str, answer: str) -> bool:
    """By what the data set's answer is: a letter, a plan, a number or a text."""
    plain = normalise_answer(answer)
    if len(plain) == 1 and plain in string.ascii_lowercase:
        return lenient_option(text, {}) == plain.upper()
    plan = moves(answer)
    if plan is not None and len(plan) > 1 and lenient_plan(text) == plan:
        return True
    wanted = plain_number(answer)
    if wanted is None:
        return lenient_text(text, answer)
    return _leniently_close(text, lenient_number(text), answer, tolerance=0.0)
