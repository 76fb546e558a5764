# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Completions of some steps, token by token, with the pictures of their rows beside them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.json_lines import Record
from modeling.release.tokenizer import load_tokenizer
from scripts.visual_opsd.analysis.report.markup import text
from scripts.visual_opsd.analysis.report.pictures import PictureFinder, RowPictures
from scripts.visual_opsd.analysis.report.runs import Run, completions, sampled_steps
from scripts.visual_opsd.evaluation.scoring import extract_answer, normalise_answer

STEPS_SHOWN = 5
_SLOTS_SHOWN = 4  # rows of a step
_NUMBERS_SHOWN = 3  # completions of a row by one run
_TOKENS_SHOWN = 400  # of a completion: three quarters from its beginning, one from its end
TEXT_BYTES, PICTURE_BYTES = 900_000, 1_000_000  # of all completions together
# Upper ends of the classes t5 ... t1: the probability that the sampler gave the token.
_RARE = (0.01, 0.05, 0.2, 0.5, 0.9)

Decode = Callable[[list[int]], str]


@dataclass(frozen=True)
class Token:
    """A piece of a completion. probability: the sampler's, None where it is not known."""

    text: str
    is_scored: bool
    probability: float | None


def chosen_steps(runs: Sequence[Run], wanted: Sequence[int] | None) -> list[int]:
    """The steps to show: those wanted, else some from the first to the last sampled ones, of
    steps that all runs with completions have, if there are any.

    Raises:
        ValueError: no run has completions of a wanted step.
    """
    held = [set(steps) for run in runs if (steps := sampled_steps(run))]
    if not held:
        if wanted:
            raise ValueError("--steps: no run holds completions (samples.jsonl)")
        return []
    every = set.union(*held)
    if wanted:
        lacking = sorted(set(wanted) - every)
        if lacking:
            raise ValueError(
                f"--steps {', '.join(map(str, lacking))}: no run holds completions of them; there "
                f"are {len(every)} steps from {min(every)} to {max(every)}"
            )
        return sorted(set(wanted))
    common = sorted(set.intersection(*held) or every)
    places = {round(i * (len(common) - 1) / (STEPS_SHOWN - 1)) for i in range(STEPS_SHOWN)}
    return [common[place] for place in sorted(places)]


# ---------------------------------------------------------------------------------- tokens


def split_tokens(record: Record, decode: Decode) -> list[Token]:
    """The tokens of a completion, the end it sampled included.

    Tokens that only together make a character are one piece, as probable as the least of them.

    Raises:
        ValueError, KeyError or TypeError: the record holds no ids, flags and probabilities.
    """
    ids, flags, logprobs = record["ids"], record["scored"], list(record["logprobs"])
    if not all(type(token) is int for token in ids) or len(flags) != len(ids) + 1:
        raise ValueError("ids and scored do not fit")
    known = len(logprobs) == flags.count("1")
    values = iter(logprobs)
    chances = [next(values) if known and flag == "1" else None for flag in flags]
    found: list[Token] = []
    held: list[int] = []  # of a character that is not complete yet
    for place in range(len(ids)):
        held.append(place)
        piece = decode([ids[i] for i in held])
        if "\ufffd" in piece and len(held) < 4 and place + 1 < len(ids):
            continue
        found.append(_token(piece, held, flags, chances))
        held = []
    if flags[-1] == "1":
        found.append(_token("\u25a0", [len(ids)], flags, chances))
    return found


def _token(piece: str, places: list[int], flags: str, chances: list[float | None]) -> Token:
    known = [c for i in places if (c := chances[i]) is not None]
    probability = math.exp(min(0.0, *known)) if known else None
    return Token(piece, any(flags[i] == "1" for i in places), probability)


def token_markup(tokens: Sequence[Token]) -> str:
    """Tokens as HTML; what stands beyond the middle of a very long completion is left out."""
    if len(tokens) <= _TOKENS_SHOWN:
        return "".join(map(_one_token, tokens))
    head, tail = 3 * _TOKENS_SHOWN // 4, _TOKENS_SHOWN // 4
    left_out = f"<i class=gap> [{len(tokens) - head - tail} tokens left out] </i>"
    return (
        "".join(map(_one_token, tokens[:head]))
        + left_out
        + "".join(map(_one_token, tokens[-tail:]))
    )


def _one_token(token: Token) -> str:
    if not token.is_scored:
        return f'<s title="not scored: given, not sampled">{text(token.text, 200)}</s>'
    if token.probability is None:
        return text(token.text, 200)
    rank = sum(token.probability < limit for limit in _RARE)
    mark = f" class=t{rank}" if rank else ""
    return f'<b{mark} title="p = {token.probability:.2g}">{text(token.text, 200)}</b>'


class Tokenizers:
    """One token decoder for each base that a run started from, if its folder is still there."""

    def __init__(self) -> None:
        self._known: dict[str, Decode | None] = {}

    def of(self, run: Run) -> Decode | None:
        """None: there is no tokenizer at the run's model_path."""
        path = str(run.settings.get("model_path"))
        if path not in self._known:
            try:
                tokenizer: Any = load_tokenizer(Path(path))[0] if Path(path).is_dir() else None
            except ValueError:
                tokenizer = None
            self._known[path] = tokenizer and tokenizer.decode
        return self._known[path]


# ---------------------------------------------------------------------------------- cards


class CompletionCards:
    """Cards of the chosen steps: a row's pictures, and what each run wrote for it."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self._runs = runs
        self._finders = [PictureFinder(run) for run in runs]
        self._tokenizers = Tokenizers()
        self._pictures: dict[str, RowPictures | None] = {}
        self._text_left, self._picture_left = TEXT_BYTES, PICTURE_BYTES
        self.left_out = 0  # cards for which there was no room
        self.uncoloured: set[str] = set()  # labels of runs whose tokens cannot be told apart

    def missing_pictures(self) -> list[str]:
        """For each run whose data are not there: why."""
        return [f"{f.run.label}: {f.missing}" for f in self._finders if f.missing]

    def of_steps(self, steps: Sequence[int]) -> dict[int, str]:
        """Step -> its cards as HTML."""
        # (step, slot, row) -> (place of the run, record): runs of one seed share their rows.
        rows: dict[tuple[int, int, str], list[tuple[int, Record]]] = {}
        for number, run in enumerate(self._runs):
            for record in completions(run, steps):
                if record["number"] >= _NUMBERS_SHOWN:
                    continue
                place = (record["step"], record["slot"], record["row"])
                rows.setdefault(place, []).append((number, record))
        found = dict.fromkeys(steps, "")
        counts = dict.fromkeys(steps, 0)
        for place in sorted(rows):
            step = place[0]
            counts[step] += 1
            card = self._card(place, rows[place]) if counts[step] <= _SLOTS_SHOWN else ""
            if not card or len(card) > self._text_left:
                self.left_out += 1
                continue
            self._text_left -= len(card)
            found[step] += self._with_pictures(place, rows[place], card)
        return found

    def _card(self, place: tuple[int, int, str], written: list[tuple[int, Record]]) -> str:
        """Question, answer and completions of a row."""
        first = written[0][1]
        parts = [
            f"<div class=texts><p class=rowname>{text(place[2], 120)}</p>",
            f"<p class=question>{text(first.get('question', ''), 1500)}</p>",
            "<p class=answer><span>Answer in the data:</span> "
            f"{text(first.get('answer', ''), 300)}</p>",
        ]
        for number, record in written:
            run = self._runs[number]
            notes = [f"{record.get('tokens', '?')} tokens"]
            if record["number"]:
                notes.insert(0, f"completion {record['number'] + 1}")
            if record.get("given") is True:
                notes.append("the data set's text")
            if record.get("capped") is True:
                notes.append("ended by the budget")
            if _is_same_answer(record):
                notes.append("\u2713 the answer in the data")
            parts.append(
                f'<div class="completion r{number}" data-run="{number}"><p class=run><i></i>'
                f"{text(run.label, 60)} <span>{text(', '.join(notes), 120)}</span></p>"
                f"<p class=tokens dir=auto>{self._tokens(run, record)}</p></div>"
            )
        return "".join((*parts, "</div>"))

    def _tokens(self, run: Run, record: Record) -> str:
        decode = self._tokenizers.of(run)
        if decode is not None:
            try:
                return token_markup(split_tokens(record, decode))
            except (ValueError, KeyError, TypeError, OverflowError):
                pass  # the text is there all the same
        self.uncoloured.add(run.label)
        return text(record.get("completion", ""), 4 * _TOKENS_SHOWN)

    def _with_pictures(
        self, place: tuple[int, int, str], written: list[tuple[int, Record]], card: str
    ) -> str:
        step, slot, name = place
        if name not in self._pictures:
            self._pictures[name] = next(
                (p for n, _ in written if (p := self._finders[n].find(step, slot, name))), None
            )
        pictures = self._pictures[name]
        shown = ""
        if pictures is not None and pictures.size <= self._picture_left:
            self._picture_left -= pictures.size
            shown = _picture_markup(pictures)
        return f"<article class=card>{shown}{card}</article>"


def _is_same_answer(record: Record) -> bool:
    """Whether the completion's answer is that of the data, as written."""
    given = extract_answer(str(record.get("completion", "")))
    wanted = str(record.get("answer", ""))
    return given is not None and normalise_answer(given) == normalise_answer(wanted)


def _picture_markup(pictures: RowPictures) -> str:
    problem = (
        f'<figure><img alt="problem image" src="{pictures.problem}">'
        "<figcaption>problem image</figcaption></figure>"
    )
    many = len(pictures.thoughts) > 1
    thoughts = "".join(
        f'<figure class=hidden><img alt="visual thought" src="{uri}">'
        f"<figcaption>visual thought{f' {number}' if many else ''}</figcaption></figure>"
        for number, uri in enumerate(pictures.thoughts, 1)
    )
    return f"<div class=pictures>{problem}{thoughts}</div>"
