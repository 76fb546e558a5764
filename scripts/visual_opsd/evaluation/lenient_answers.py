# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""What an answer says to a reader, where the strict rules find it misspelt: the lenient readings.

One function for each kind of answer (`lenient_option`, `lenient_number`, `lenient_text`, and
`lenient_plan` of `lenient_plans`); `benchmark_scoring` judges what they read and calls them only
where its own rule reads nothing. Two different candidates, negated ones and the article "A" are no
answer. EVAL.md lists what is read.
"""

from __future__ import annotations

import math
import re
import string
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from scripts.visual_opsd.evaluation.answer_parts import (
    BECAUSE,
    CUE,
    NOT,
    Part,
    answer_parts,
    is_short,
    read_parts,
    readable,
    said,
    visible,
)
from scripts.visual_opsd.evaluation.scoring import bare, normalise_answer

# ------------------------------------------------------------------------- letters

_OPEN, _CLOSE = r"[(\[\"']", r"[)\]\"']"
_LETTER = re.compile(
    r"(?<![A-Za-z0-9\u00c0-\u024f])(?<![A-Za-z][.'])([A-Z])(?![A-Za-z0-9\u00c0-\u024f])"
    r"(?!'[a-z])(?!\.[A-Z](?![a-z]))"
    rf"|{_OPEN}\s?([a-z])\s?{_CLOSE}"
)
_SMALL = re.compile(  # a lower-case letter that begins a statement
    r"\W{0,6}(?:(?:option|choice|letter)\s)?([a-z])(?=\s?(?:[.,:;)!?-]|$)|\s(?:because|since)\b)",
    re.I,
)
_NOT_AFTER = re.compile(
    rf"{_CLOSE}?(?:[.):]?\s?[\ue000-\uf8ff])?(?:\?\s?(?:no|nope|not)\b|"
    r"\s?[\u2716-\u2718\u274c\u274e]|\s?(?:!=|\u2260)|\s(?:"
    r"(?:is|was|does|do|can|could|would|should|must|has|are)\s?(?:not\b|n't)|can't|won't|"
    r"cannot\b|fails?\b|is out\b|(?:(?:is|was|must be|would be|seems)\s)?(?:\w+ly\s)?"
    r"(?:wrong|incorrect|false|impossible|unlikely|ruled out|eliminated|excluded)\b))",
    re.I,
)
# Words after a lone "A" that make it a letter; before any other word it is an article.
_LETTER_GOES_ON = re.compile(
    r"(?:is|was|are|because|since|as|and|or|but|for|which|that|due|seems|appears|looks|would|"
    r"should|must|has|can|cannot|isn't|matches|shows|with|if|so|vs|versus|to|through|then|oder|ou)$"
)
_GLUED = re.compile(
    r"(?<![A-Za-z0-9])(?!(?:option|choice|answer|letter)[-&/])[A-Za-z0-9]+[-&/]$", re.I
)
_GLUED_TO = re.compile(r"[-&/](?!(?:option|choice|answer|letter)\b)[A-Za-z0-9]", re.I)
_JOINED = re.compile(r"\W{0,3}(?:or|nor|and)\W{1,3}(?:option\s)?", re.I)
_DOUBTED = re.compile(r"[\ue000-\uf8ff]\?\s?(?:no|nope|not)\b", re.I)
_RIGHTLY = re.compile(  # "B is correct": a statement by itself
    r"(?<![A-Za-z])(?=[(\[\"']?[A-Z][)\]\"']?\s(?:is|seems|must be|would be)\s(?:the\s)?(?:most\s)?"
    r"(?:correct|best|answer|likely|right(?!\s(?:of|to|side|above|below)))\b)"
)
_WEAKLY = re.compile(  # "So B.", "I think (B)": the letter must follow at once and stand alone
    r"(?:^|(?<=[.\n!?,;:]))\s{0,3}(?:so|therefore|thus|hence|it is|it's|it must be|that is|i think|"
    r"i believe|i guess|i'd say|i say|final)\W{1,3}(?:(?:it is|it's|the|option|choice|letter|is)\s)"
    rf"{{0,3}}(?={_OPEN}?[A-Z]{_CLOSE}?\s?(?:[.,;:!?\n]|$|because\b|since\b))",
    re.I,
)
_LABEL_LINE = re.compile(r"\W{0,4}(?:[Oo]ption\s)?([A-Z])\s?(?:[.):,;!-].*|(?:because|since)\b.*)?")
_LABEL_AND_TEXT = re.compile(r"\W{0,4}[A-Z][.):]\s{0,3}[\ue000-\uf8ff]")
_HEAD = re.compile(
    r"(?:(?:the|a|an|it's|its|it|is|i|think|believe|say|that's|that|this|option|choice|letter|"
    r"answer|correct|would|be|must|should|so|thus|therefore|hence|on|to|in|at|of|they|are|we|"
    r"probably|likely|clearly|definitely|first|then|between|either|both|[A-Z])\b[\s:]{0,3})*",
    re.I,
)
_TAIL = re.compile(
    r"(?:\s[A-Z]|\s(?:is|seems|must be|would be)\s(?:the\s)?(?:most\s)?(?:correct|right|best|"
    r"answer|likely|true)\b.*)$"
)
_PIECES = re.compile(r"[.,:;!?\n()\[\]\"/\u2192-]+|\b(?:or|and|but)\b", re.I)
_MASKS = 0xE000  # private use: one character for each option's text


class _Options:
    """Letters and texts of a question; texts are looked for as whole words, the longest first."""

    def __init__(self, options: Mapping[str, str]) -> None:
        self.letters = frozenset(options or string.ascii_uppercase)
        letters: dict[str, set[str]] = {}  # by text
        for letter, text in options.items():
            plain = normalise_answer(readable(visible(text)).replace("$", " "))
            for form in (plain, re.sub(r"^(?:the|an?) ", "", plain)):
                if len(form) > 1:
                    letters.setdefault(form, set()).add(letter)
        forms = sorted(letters, key=len, reverse=True)
        self.masks = {form: chr(_MASKS + i) for i, form in enumerate(forms)}
        # The option of a masked text, where it is only one's.
        self.owners = {self.masks[f]: key for f, (key, *more) in letters.items() if not more}
        edge = r"[A-Za-z0-9\u00c0-\u024f]"
        texts = "|".join(re.escape(form).replace(r"\ ", r"\s") for form in forms)
        self.pattern = re.compile(rf"(?<!{edge})(?:{texts})(?!{edge})", re.I)

    def mask(self, text: str) -> str:
        """The text with a character of its own in place of each option's text."""

        def mark(found: re.Match[str]) -> str:
            return self.masks.get(re.sub(r"\s", " ", found[0]).casefold(), found[0])

        return self.pattern.sub(mark, text) if self.masks else text


def _is_word(text: str, letter: str, end: int) -> bool:
    """Is a lone "A" the article, or "I" the pronoun? (In masked text.)"""
    if letter not in "AI":
        return False
    if re.match(r"\s[\ue000-\uf8ff]\s\w", text[end : end + 4]):
        return True  # "A left turn", where "left" is an option
    following = re.match(r"\s([A-Za-z][A-Za-z'-]+)", text[end : end + 40])
    if following is None:
        return letter == "I" and text[end : end + 1] == "'"
    word = following[1].lower()
    if letter == "I":
        return word not in ("is", "and", "or")
    return not _LETTER_GOES_ON.match(word)


def _letters(text: str, begin: int, end: int, known: frozenset[str]) -> set[str]:
    """Letters that a statement text[begin:end] names, without negated ones and articles."""
    found: set[str] = set()
    because = BECAUSE.search(text, begin, end)
    denied: int | None = None  # where the last negated letter ends
    for letter, start, stop in _letter_places(text, begin, end):
        if because and start > because.start() and found:
            break  # a reason names others
        before = text[max(0, start - 100) : start]
        if letter not in known - found or _GLUED.search(before) or _GLUED_TO.match(text, stop):
            continue  # glued: "N/A", "B-52", "A/B" is a name, or two
        joined = denied is not None and _JOINED.fullmatch(text, denied, start)
        if joined or NOT.search(before) or _NOT_AFTER.match(text, stop, end):
            denied = stop
        elif not _is_word(text, letter, stop):
            found.add(letter)
    return found


def _letter_places(text: str, begin: int, end: int) -> Iterator[tuple[str, int, int]]:
    """Letters that stand alone, with where each begins and ends."""
    small = _SMALL.match(text, begin, end)
    if small and small[1].islower():
        yield small[1].upper(), small.start(1), small.end(1)
    for found in _LETTER.finditer(text, begin, end):
        yield (found[1] or found[2]).upper(), found.start(), found.end()


def _texts(text: str, begin: int, end: int, options: _Options) -> set[str]:
    """Options whose whole text is a piece of the (masked) statement text[begin:end]."""
    because = BECAUSE.search(text, begin, end)
    if because and because.start() > begin:
        end = because.start()
    found = set()
    for piece in _PIECES.split(text[begin:end]):
        piece = piece.strip()
        core = piece[_HEAD.match(piece).end() :]  # type: ignore[union-attr]  # matches nothing too
        found.add(options.owners.get(_TAIL.sub("", core).strip(), ""))
    return found - {""}


def _named(text: str, begin: int, end: int, options: _Options) -> set[str]:
    return _letters(text, begin, end, options.letters) | _texts(text, begin, end, options)


def _labelled(text: str, options: _Options) -> set[str]:
    """The letter of a text that states nothing: its first or last line begins with it, and no
    other line begins with another."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    labels = [_label(line) for line in lines]
    letters = set(filter(None, labels)) & options.letters
    if not letters and lines and is_short(lines[-1]):
        return _texts(lines[-1], 0, len(lines[-1]), options)
    return letters if len(letters) == 1 and (labels[0] or labels[-1]) else set()


def _label(line: str) -> str | None:
    """The letter that a line begins with, unless it is a wrong one."""
    label = _LABEL_LINE.fullmatch(line)
    return label[1] if label and not _NOT_AFTER.match(line, label.end(1)) else None


def _part_option(part: Part, options: _Options) -> set[str]:
    text = _DOUBTED.sub(" ", options.mask(re.sub(r" ?\$ ?", " ", part.text)))
    places = [*said(text), *said(text, _RIGHTLY), *said(text, _WEAKLY)]
    for begin, end in sorted(places, reverse=True):
        label = _LABEL_AND_TEXT.match(text, begin)
        found = _named(text, begin, max(end, label.end()) if label else end, options)
        if found:  # and nothing else in the rest of its line ("The answer is A. No, B")
            line = text.find("\n", end)
            return found | _named(text, begin, len(text) if line < 0 else line, options)
    if part.stated or is_short(text):
        return _named(text, 0, len(text), options)
    return _labelled(text, options)


def lenient_option(text: str, options: Mapping[str, str]) -> str | None:
    """The letter of the one option a generated text names as its answer.

    Args:
        options: letter -> text; {} if the question does not list them, then any letter will do.
    """
    found = read_parts(text, partial(_part_option, options=_Options(options)))
    return found.pop() if len(found) == 1 else None


# ------------------------------------------------------------------------- numbers


@dataclass(frozen=True)
class Number:
    """A number; `percent`: it stood before a percent sign, so that 45 may mean 0.45."""

    value: float
    percent: bool = False


_SCALES = {
    "hundred": 1e2, "k": 1e3, "thousand": 1e3, "M": 1e6, "mn": 1e6, "mln": 1e6, "mil": 1e6,
    "million": 1e6, "B": 1e9, "bn": 1e9, "billion": 1e9, "tn": 1e12, "trillion": 1e12,
    "\u4e07": 1e4, "\u4ebf": 1e8,
}  # fmt: skip
_SCALE_WORDS = r"((?i:hundred|thousand|million|billion|trillion))s?|([kK]|mln|mil|mn|M|B|bn|tn)"
_DIGITS = re.compile(r"(?<![A-Za-z0-9_^.,])(?:\d+(?:[.,'/:_-]\d+)*|\.\d+)")
_AFTER_DIGITS = re.compile(
    r"(?:[eE]([+-]?\d{1,4})(?![A-Za-z0-9]))?(?:\s?[\u00d7x*]\s?10\s?\^\s?([+-]?\d{1,4}))?"
    rf"(?P<power>\^[+-]?\d+)?(?:\s?(?:(?:{_SCALE_WORDS})(?![A-Za-z])|([\u4e07\u4ebf])))?"
    r"(?P<percent>\s?(?:%|(?:percent(?:age)?|per\scent|pct)\b))?",
)
_SPELLINGS = [
    (re.compile(rule), drop, comma)
    for rule, drop, comma in (
        (r"\d+(?:\.\d+)?|\.\d+", "", False),
        (r"[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?|[1-9]\d?(?:,\d\d)+,\d{3}(?:\.\d+)?", ",", False),
        (r"\d{1,3}(?:'\d{3})+(?:\.\d+)?", "'", False),
        (r"\d{1,3}(?:_\d{3})+(?:\.\d+)?", "_", False),
        (r"\d{1,3}(?:\.\d{3}){2,}(?:,\d+)?|\d{1,3}(?:\.\d{3})+,\d+", ".", True),
        (r"\d+,\d+", "", True),
    )
]
_CODES = re.compile(r"\b(?:USD|EUR|GBP|JPY|CNY|RMB|INR|CHF|CAD|AUD|US|Rs\.?)\s?(?=[-+.\d])")
_GROUPS = re.compile(r"(?<![\d.,])(\d{1,3})((?: \d{3})+)(?![\d])")
_SIGN = re.compile(r"(?<![^\W_])(?<![)%])[-+]\Z")
_LIST_MARK = re.compile(r"(?:^|\n)\s?[-+] $")  # "- 5" is a minus or a list's mark
_LIMIT = re.compile(
    r"(?:\b(?:more|less|greater|fewer|higher|lower) than|\b(?:over|under|above|below|at least|"
    r"at most)|[<>\u2264\u2265])\s?(?:about\s)?$",
    re.I,
)


def _money_and_signs(text: str) -> str:
    """Currency signs and codes away, separating blanks closed, signs joined to their number."""
    if not text.isascii() or "$" in text:
        text = "".join("$" if unicodedata.category(c) == "Sc" else c for c in text)
        text = re.sub(r"([-+]) ?\$ ?(?=[\d.])", r"\1", text).replace("$", " ")
    text = re.sub(r"\b(?:minus|negative)\s(?=[.\d])", "-", _CODES.sub(" ", text), flags=re.I)
    return _GROUPS.sub(lambda m: m[1] + m[2].replace(" ", ""), text)


def _value(digits: str) -> float | None:
    """A spelling's value; None if it is a date, a range, a ratio or otherwise no one number."""
    for pattern, drop, comma in _SPELLINGS:
        if pattern.fullmatch(digits):
            plain = digits.replace(drop, "") if drop else digits
            return float(plain.replace(",", ".") if comma else plain)
    return None


def _numbers(text: str, begin: int, end: int) -> set[Number | None]:
    """Numbers of a statement text[begin:end]; None among them for one that cannot be read."""
    found: set[Number | None] = set()
    place = begin
    while match := _DIGITS.search(text, place, end):
        after = _AFTER_DIGITS.match(text, match.end(), end)
        assert after is not None  # every part of it may be absent
        place = after.end()
        before = text[max(0, match.start() - 60) : match.start()]
        sign = _SIGN.search(before)
        if sign:
            before = before[:-1]
        if NOT.search(before) or _LIMIT.search(before):
            continue
        value = None if _LIST_MARK.search(before) else _scaled(match[0], after)
        if value is None:
            found.add(None)
        else:
            negative = sign is not None and sign[0] == "-" and value != 0
            found.add(Number(-value if negative else value, bool(after["percent"])))
    return found


def _scaled(digits: str, after: re.Match[str]) -> float | None:
    """The value of digits with the powers and scales after them."""
    value = _value(digits)
    if value is not None and after["power"]:
        value = 10.0 ** _exponent(after["power"][1:]) if digits == "10" else None
    if value is None:
        return None
    value *= 10.0 ** (_exponent(after[1]) + _exponent(after[2]))
    scale = after[4] or after[5] or after[6]
    return value * (_SCALES.get(scale) or _SCALES[scale.lower()]) if scale else value


def _exponent(text: str | None) -> int:
    return max(-300, min(300, int(text))) if text else 0


_NUMBER_CUE = re.compile(CUE.pattern + r"|[=\u2248]\s?", re.I)


def _part_number(part: Part) -> set[Number | None]:
    text = _money_and_signs(part.text)
    for begin, end in said(text, _NUMBER_CUE):
        found = _numbers(text, begin, end)
        if found:
            return found
    whole = part.whole(text)
    return _numbers(whole, 0, len(whole))


def lenient_number(text: str) -> Number | None:
    """The one number a generated text gives as its answer."""
    return _only(read_parts(text, _part_number))


def _only(found: set[Number | None]) -> Number | None:
    """One number, written once or several times, as a percentage, a share or without its sign."""
    numbers = [number for number in found if number is not None]
    if len(numbers) < len(found) or not numbers:
        return None
    first = max(numbers, key=lambda number: number.percent)
    same = (first.value, first.value / 100) if first.percent else (first.value,)
    agreed = all(
        any(math.isclose(n.value, value) for value in same[: 1 if n.percent else 2])
        for n in numbers
    )
    return first if agreed else None


def plain_number(text: str) -> Number | None:
    """The number a data set's answer is: with its scale, percent or currency, but no other word."""
    plain = _money_and_signs(readable(visible(text)))
    words = re.sub(rf"(?:{_SCALE_WORDS})(?![A-Za-z])|percent|per\scent|pct|[eE]", "", plain)
    if any(c.isalpha() for c in words):
        return None
    return _only(_numbers(plain, 0, len(plain)) or {None})


# ------------------------------------------------------------------------- other texts

_CLAUSE = re.compile(
    r"\s?(?:,\s(?:it|they|he|she|there|this|that|the|because|since|as)\b|\s(?:because|since)\b|\()",
    re.I,
)
_INTRODUCED = re.compile(r"(?:(?:i think|i believe|it is|it's|they are|the|an?)\s)*", re.I)


def _plain_forms(text: str) -> set[str]:
    forms = set()
    end = _CLAUSE.search(text, 1) if len(text) > 1 else None
    for form in (text, text[: end.start()] if end else text):
        form = bare(re.sub(r"\s+", " ", form.replace("$", " ")))
        forms.add(normalise_answer(form.strip("!;:, ")))
        start = _INTRODUCED.match(form)
        forms.add(normalise_answer(form[start.end() if start else 0 :].strip("!;:, ")))
    return forms - {""}


def lenient_text(text: str, wanted: str) -> bool:
    """Is the answer a generated text gives the wanted one, but for its dress?"""
    goal = _plain_forms(readable(visible(wanted)))
    for part in answer_parts(text):
        content = part.text.strip()
        given = [content[begin:end] for begin, end in said(content)]
        for form in given or [part.whole(content)]:
            if form.strip():
                return bool(goal & _plain_forms(form))
    return False
