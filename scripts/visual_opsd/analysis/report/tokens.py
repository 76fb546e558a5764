# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The tokens of a completion as HTML, with classes that report.css gives the chosen colour."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from data.json_lines import Record
from scripts.visual_opsd.analysis.report.markup import text
from scripts.visual_opsd.analysis.report.runs import number

TOKENS_SHOWN = 400  # of a completion: three quarters from its beginning, one from its end
MOST_CHARACTERS = 200  # of a token

Decode = Callable[[list[int]], str]


@dataclass(frozen=True)
class Token:
    """A piece of a completion; figures are None where they are not known.

    probability: the sampler's. divergence, student_entropy, teacher_entropy: in nats. fork: 1.0
    where the likeliest tokens of teacher and student differ, 0.0 where they agree.
    """

    text: str
    is_scored: bool
    probability: float | None
    divergence: float | None = None
    student_entropy: float | None = None
    teacher_entropy: float | None = None
    fork: float | None = None


@dataclass(frozen=True)
class Colour:
    """A choice of what the colours of tokens mean.

    field: of Token. letter: heads the classes of its shades, LETTER1 and so on. limits: where one
    shade ends and the next begins, ascending. is_rising: large values are the strongest shade.
    """

    field: str
    letter: str
    title: str
    meaning: str
    limits: tuple[float, ...]
    is_rising: bool = True
    names: tuple[str, ...] = ()

    def shade(self, token: Token) -> str:
        """The class of a token, "" for one of the faintest shade."""
        value = getattr(token, self.field)
        if value is None:
            return ""
        size = abs(value)  # the reverse KL of a token ("tinker") has a sign
        rank = sum(size >= x if self.is_rising else size < x for x in self.limits)
        return f"{self.letter}{rank}" if rank else ""

    def shades(self) -> list[tuple[str, str]]:
        """(class, what it stands for) of its shades, by value."""
        ends = [f"{limit:g}" for limit in self.limits]
        names = self.names or (
            f"below {ends[0]}", *(f"to {end}" for end in ends[1:]), f"{ends[-1]} and more"
        )  # fmt: skip
        ranks = range(len(names)) if self.is_rising else reversed(range(len(names)))
        return [
            (f"{self.letter}{rank}" if rank else "", name)
            for rank, name in zip(ranks, names, strict=True)
        ]


COLOURS = (
    Colour("divergence", "d", "divergence",
           "the divergence between student and teacher, in nats", (0.003, 0.01, 0.03, 0.1, 0.3)),
    Colour("student_entropy", "e", "student's entropy",
           "the entropy of the student's distribution, in nats", (0.05, 0.2, 0.5, 1.0, 2.0)),
    Colour("fork", "f", "fork", "whether the likeliest tokens of teacher and student differ",
           (1.0,), names=("the same", "they differ")),
    Colour("probability", "t", "probability", "the probability with which the student sampled it",
           (0.01, 0.05, 0.2, 0.5, 0.9), is_rising=False),
)  # fmt: skip
_SAMPLED = COLOURS[-1]  # what every run records


# ---------------------------------------------------------------------------------- reading


def split_tokens(record: Record, decode: Decode) -> list[Token]:
    """The tokens of a completion, the end it sampled included.

    Tokens that only together make a character are one piece: as probable as the least of them, as
    far from the teacher and as uncertain as the most.

    Raises:
        ValueError, KeyError or TypeError: the record holds no ids, flags and probabilities.
    """
    ids, flags = record["ids"], record["scored"]
    if not all(type(token) is int for token in ids) or len(flags) != len(ids) + 1:
        raise ValueError("ids and scored do not fit")
    figures = {
        name: _by_place(map(number, _listed(record.get(name))), flags)
        for name in ("divergence", "student_entropy", "teacher_entropy", "fork")
    }
    figures["logprobs"] = _by_place(record["logprobs"], flags)
    found: list[Token] = []
    held: list[int] = []  # of a character that is not complete yet
    for place in range(len(ids)):
        held.append(place)
        piece = decode([ids[i] for i in held])
        if "\ufffd" in piece and len(held) < 4 and place + 1 < len(ids):
            continue
        found.append(_token(piece, held, flags, figures))
        held = []
    if flags[-1] == "1":
        found.append(_token("\u25a0", [len(ids)], flags, figures))
    return found


def _listed(values: Any) -> list[Any]:
    """What a record holds by token: a list, or a string of 0 and 1."""
    if isinstance(values, str) and not set(values) - {"0", "1"}:
        return list(map(int, values))
    return values if isinstance(values, list) else []


def _by_place(values: Iterable[float | None], flags: str) -> list[float | None]:
    """Values of the scored places at their places; none if they are not as many."""
    held = list(values)
    if len(held) != flags.count("1"):
        return [None] * len(flags)
    scored = iter(held)
    return [next(scored) if flag == "1" else None for flag in flags]


def _token(
    piece: str, places: list[int], flags: str, figures: dict[str, list[float | None]]
) -> Token:
    known = {
        name: [value for i in places if (value := values[i]) is not None]
        for name, values in figures.items()
    }
    logprobs = known.pop("logprobs")
    probability = math.exp(min(0.0, *logprobs)) if logprobs else None
    largest = {
        name: max(values, key=lambda value: (math.isnan(value), abs(value)), default=None)
        for name, values in known.items()
    }
    return Token(piece, any(flags[i] == "1" for i in places), probability, **largest)


# ---------------------------------------------------------------------------------- writing


def known_colours(tokens: Sequence[Token]) -> set[str]:
    """Letters of the colours that some of the tokens have a figure for."""
    return {c.letter for c in COLOURS if any(getattr(t, c.field) is not None for t in tokens)}


def token_markup(tokens: Sequence[Token]) -> str:
    """Tokens as HTML; what stands beyond the middle of a very long completion is left out."""
    if len(tokens) <= TOKENS_SHOWN:
        return "".join(map(_one_token, tokens))
    head, tail = 3 * TOKENS_SHOWN // 4, TOKENS_SHOWN // 4
    left_out = f"<i class=gap> [{len(tokens) - head - tail} tokens left out] </i>"
    return (
        "".join(map(_one_token, tokens[:head]))
        + left_out
        + "".join(map(_one_token, tokens[-tail:]))
    )


def _one_token(token: Token) -> str:
    shown = text(token.text, MOST_CHARACTERS)
    if not token.is_scored:
        return f'<s title="not scored: given, not sampled">{shown}</s>'
    title = _title(token)
    if not title:
        return shown
    classes = " ".join(filter(None, (colour.shade(token) for colour in COLOURS)))
    mark = f' class="{classes}"' if " " in classes else f" class={classes}" if classes else ""
    return f'<b{mark} title="{title}">{shown}</b>'


def _title(token: Token) -> str:
    """All that is known of a token, in few bytes: a page holds tens of thousands of them."""
    parts = [
        f"{sign} = {_brief(value)}"
        for sign, value in (
            ("p", token.probability), ("D", token.divergence), ("H", token.student_entropy),
            ("teacher's H", token.teacher_entropy),
        )
        if value is not None
    ]  # fmt: skip
    if token.fork:
        parts.append("fork")
    return ", ".join(parts)


def _brief(value: float) -> str:
    return "0" if abs(value) < 5e-5 else f"{value:.2g}"


def colour_choice(letters: Collection[str]) -> str:
    """The control of what colours mean, with a key for each choice; no control where the sampler's
    probability alone is known. The first choice is taken."""
    offered = [colour for colour in COLOURS if colour.letter in letters] or [_SAMPLED]
    control = ""
    if offered != [_SAMPLED]:
        buttons = "".join(
            f"<label><input type=radio name=colour id=by-{c.letter}"
            f"{' checked' if c is offered[0] else ''}>{text(c.title)}</label>"
            for c in offered
        )
        control = f"<fieldset class=choice><legend>Colour tokens by</legend>{buttons}</fieldset>"
    return control + "".join(_key(colour) for colour in offered) + _signs(offered)


def _key(colour: Colour) -> str:
    shades = " ".join(  # the blanks are where a narrow page may break the line
        f"<b{f' class={name}' if name else ''}>{text(meaning)}</b>"
        for name, meaning in colour.shades()
    )
    return (
        f'<p class="key by-{colour.letter}">A token\'s colour: {text(colour.meaning)}. {shades}</p>'
    )


def _signs(offered: Sequence[Colour]) -> str:
    letters = {colour.letter for colour in offered}
    said = ["p, probability"]
    said += ["D, divergence"] * ("d" in letters)
    said += ["H, entropy"] * ("e" in letters)
    said += ["fork: the likeliest tokens differ"] * ("f" in letters)
    numbers = f"Point at a token for its numbers ({'; '.join(said)})."
    return (
        f"<p class=signs>{text(numbers)} <s>not sampled</s> <span>\u25a0 the end</span> "
        "<span class=hidden>what the student never sees</span></p>"
    )
