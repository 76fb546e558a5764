# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Moves of a maze in any spelling a reader understands: the lenient reading of a plan."""

from __future__ import annotations

import re

from scripts.visual_opsd.evaluation.answer_parts import Part, is_short, read_parts

_ARROWS = {
    "R": "\u2192\u21d2\u27a1\u27f6\u2794\u25b6\u25ba\u279c\u2b95\u21e8\U0001f449\U0001f846",
    "L": "\u2190\u21d0\u2b05\u27f5\u25c0\u25c4\u21e6\U0001f448\U0001f844",
    "U": "\u2191\u21d1\u2b06\u25b2\u21e7\U0001f446\U0001f53c\U0001f845",
    "D": "\u2193\u21d3\u2b07\u25bc\u21e9\U0001f447\U0001f53d\U0001f847",
}
_ARROW_MOVES = {ord(c): move for move, arrows in _ARROWS.items() for c in arrows}
_ONE_ARROW = dict.fromkeys(_ARROW_MOVES, "\u2192")
_DIAGONALS = re.compile("[\u2196-\u2199\u2b08-\u2b0b]")
_MOVE_WORDS = {
    **{word + end: word[0].upper() for word in ("up", "down", "left", "right")
       for end in ("", "s", "ward", "wards")},
    "north": "U", "south": "D", "west": "L", "east": "R",
    "\u4e0a": "U", "\u4e0b": "D", "\u5de6": "L", "\u53f3": "R",
}  # fmt: skip
_COUNTS = {
    "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8,
    "once": 1, "twice": 2, "thrice": 3,
}  # fmt: skip
_FILLER = re.compile(
    r"(?:moves?|go|goes|steps?|then|and|first|second|third|fourth|fifth|sixth|seventh|eighth|"
    r"next|finally|lastly|the|to|cells?|"
    r"squares?|tiles?|blocks?|spaces?|units?|times?|by|now|turn|walk|head)$"
)
_BREAK = re.compile(r"[,;\n|.]+|\bthen\b|\band\b|[>\u2192]+|->", re.I)
_MARKS = re.compile(r"[\s\[\](){}<>\"'/_&+:=!-]+")
_LISTED = re.compile(r"(?:\b(?:step|move)\s?)(\d{1,3})\s?[.):-]?\s?(?=[A-Za-z])|"
                     r"(?<![A-Za-z0-9])\(?(\d{1,3})(?:[.):]\s?|-\s)(?=[A-Za-z])", re.I)  # fmt: skip
_REMARK = re.compile(
    r"\bto \(?[a-h]\d{1,2}\b\)?|\((?:in )?(?:total:? )?\d{1,3} (?:moves|steps)[^()]{0,20}\)", re.I
)
# A plan that is denied: "not RRDD", "RRDD is wrong".
_DENIED = re.compile(
    r"(?:\b(?:not|cannot|never|neither|nor|except|avoid|wrong|incorrect|instead of|rather than|"
    r"tried)|n't)"
    r"(?:\s(?:go|move|take|do|be|is|the|a|to|with|plan|path|answer|moves)){0,6}[\s:(\[\"']{0,4}"
    r"(?:[udlr]+\b|(?:up|down|left|right)\b|\u2192)"
    r"|(?:\b[udlr]+|\b(?:up|down|left|right)s?|\u2192)[\s)\]\"'.,]{0,3}(?:"
    r"(?:is|was|are)(?:\snot|n't)\s(?:it|the|a|an|correct|right|valid|possible|allowed)\b|"
    r"(?:is|was|are|seems)\s(?:wrong|incorrect|invalid|blocked|impossible)\b|"
    r"(?:does|do|will|would|can)(?:\s?not|n't)\s(?:work|reach|lead|get|end|succeed|solve|go)|"
    r"(?:won't|can't)\b|fails?\b|falls?\b)",
    re.I,
)
_NUMBERED = re.compile(r"(?<![A-Za-z0-9])(\d{1,3})\s?(?=[A-Za-z])")
_TOKEN = re.compile(
    r"(?P<before>\d{1,3})\s?[x\u00d7*]\s?(?=[a-z\u4e00-\u9fff])|[x\u00d7*^]\s?(?P<after>\d{1,3})"
    r"|(?P<number>\d{1,3})|(?P<word>[a-z]+?(?=x\s?\d)|[a-z]+|[\u4e00-\u9fff])|(?P<other>\S)"
)
_LONGEST_PLAN = 4096
_CUES = 4  # places that may introduce the plan, the last ones
_PLAN_CUE = re.compile(
    r"\b(?:answer|plan|path|moves|sequence|solution|route)\b(?:\s[^.\n:=?!]{0,40}?)?"
    r"(?:\s(?:is|be)\b|\s?[:=])[\s:=]{0,8}",
    re.I,
)


def _unlisted(text: str) -> str:
    """Without the numbers 1, 2, 3 ... of a list ("1. R 2. R", "Step 1: R")."""
    found = [int(m[1] or m[2]) for m in _LISTED.finditer(text)]
    return _LISTED.sub(", ", text) if found == list(range(1, len(found) + 1)) else text


def _tokens(piece: str) -> list[str | int | None]:
    """Moves, counts (a marked one, "x2" or "2x", with its move already), None for a foreign word.

    A run of letters is a token for each.
    """
    made: list[str | int | None] = []
    pending = 0  # of a "2x" before its move
    for found in _TOKEN.finditer(_MARKS.sub(" ", piece.lower())):
        if found["before"]:
            pending = int(found["before"])
        elif found["after"]:
            last = made.pop() if made else None
            made.append(last * int(found["after"]) if isinstance(last, str) else None)
        else:
            for meant in _meaning(found[0]):
                if pending and isinstance(meant, str):
                    meant, pending = meant * pending, 0
                made.append(meant)
    return [None] if pending else made


def _meaning(word: str) -> list[str | int | None]:
    """Moves, a count, nothing for a filler, None for a foreign word."""
    if word.isdecimal() or word in _COUNTS:
        return [_COUNTS.get(word) or int(word)]
    if word in _MOVE_WORDS:
        return [_MOVE_WORDS[word]]
    if set(word) <= set("udlr"):
        return list(word.upper())
    return [] if _FILLER.match(word) else [None]


def _counted(tokens: list[str | int | None]) -> str | None:
    """The moves of tokens with counts before or after them; None if both, or neither, is right."""

    def read(items: list[str | int | None]) -> str | None:
        plan, count = "", None
        for item in items:
            if isinstance(item, int):
                if count is not None:
                    return None
                count = item
            elif item is None:
                return None
            else:
                plan += (item if count is None else item * count)[:_LONGEST_PLAN]
                count = None
        return plan if count is None else None

    before = read(tokens)
    after = read(tokens[::-1])
    readings = {r for r in (before, after[::-1] if after is not None else None) if r is not None}
    return readings.pop() if len(readings) == 1 else None


def _plan_runs(text: str) -> tuple[list[str], bool]:
    """Runs of moves between foreign words, and whether there was a foreign word."""
    text = _REMARK.sub("", _unlisted(text))
    numbers = [int(m[1]) for m in _NUMBERED.finditer(text)]
    if len(numbers) > 2 and numbers == list(range(1, len(numbers) + 1)):
        return [], True  # "1 R 2 R 3 D": numbers of a list, or counts
    runs, foreign = [""], False
    for piece in _BREAK.split(text):
        tokens = _tokens(piece)
        while None in tokens:
            cut = tokens.index(None)
            runs[-1] += _counted(tokens[:cut]) or ""
            runs.append("")
            foreign, tokens = True, tokens[cut + 1 :]
        counted = _counted(tokens)
        if counted is None:
            return [], True
        runs[-1] += counted
    return runs, foreign


def _plan(text: str) -> set[str]:
    """Plans a statement gives: all of it, or its only run of two or more moves."""
    if re.fullmatch(r"[<>^v\s,;]+", text):
        return {text.translate(str.maketrans("<>^v", "LRUD", " ,;\n\t"))} - {""}
    if _DIAGONALS.search(text):
        return set()
    worded = text.translate(_ONE_ARROW)
    runs, foreign = _plan_runs(worded)
    if foreign and _DENIED.search(worded):
        return set()
    plans = {run for run in runs if len(run) > (1 if foreign else 0)}
    arrows = "".join(_ARROW_MOVES.get(ord(c), "") for c in text)
    if not plans and arrows:
        counted = text.translate(_ARROW_MOVES)
        return _moves_alone(re.sub(r"(?<=[UDLR])(?=[UDLR])", ",", counted), 1)
    if set(arrows) - {"R"} and plans != {arrows}:
        return plans | {arrows}
    return plans


def _moves_alone(text: str, at_least: int) -> set[str]:
    """The runs of a text without foreign words, of so many moves."""
    runs, foreign = _plan_runs(text)
    return set() if foreign else {run for run in runs if len(run) >= at_least}


def _part_plan(part: Part) -> set[str]:
    text = part.text.replace("$", " ").strip()
    for found in reversed(list(_PLAN_CUE.finditer(text))[-_CUES:]):
        rest = text[found.end() :]
        for said in (rest.partition("\n")[0], rest):
            plans = _plan(said)
            if plans:
                return plans
    if part.stated or is_short(text, 12):
        return _plan(text)
    return _moves_alone(text.rpartition("\n")[2], 2)


def lenient_plan(text: str) -> str | None:
    """The one plan ("RRDD") a generated text gives as its answer."""
    plans = read_parts(text, _part_plan)
    plan = plans.pop() if len(plans) == 1 else ""
    return plan if 0 < len(plan) <= _LONGEST_PLAN else None
