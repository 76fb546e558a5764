# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Completions of some steps, token by token, with the pictures of their rows beside them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.json_lines import Record
from modeling.release.tokenizer import load_tokenizer
from scripts.visual_opsd.analysis.report.markup import text
from scripts.visual_opsd.analysis.report.pictures import PictureFinder, RowPictures
from scripts.visual_opsd.analysis.report.runs import Run, completions, sampled_steps
from scripts.visual_opsd.analysis.report.tokens import (
    TOKENS_SHOWN,
    Decode,
    known_colours,
    split_tokens,
    token_markup,
)
from scripts.visual_opsd.evaluation.scoring import extract_answer, normalise_answer

STEPS_SHOWN = 5
_SLOTS_SHOWN = 4  # rows of a step
_NUMBERS_SHOWN = 3  # completions of a row by one run
TEXT_BYTES, PICTURE_BYTES = 900_000, 1_000_000  # of all completions together


def chosen_steps(runs: Sequence[Run], wanted: Sequence[int] | None) -> list[int]:
    """The steps to show: those wanted, else some from the first to the last sampled ones; of steps
    that all runs with completions have, with the figures of their tokens, if there are any.

    Raises:
        ValueError: no run has completions of a wanted step.
    """
    sampled = [steps for run in runs if (steps := sampled_steps(run))]
    held = [set(steps) for steps in sampled]
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
    # A run of which no step has figures stands in the way of none.
    measured = [{n for n, known in steps.items() if known} or set(steps) for steps in sampled]
    common = sorted(set.intersection(*measured) or set.intersection(*held) or every)
    places = {round(i * (len(common) - 1) / (STEPS_SHOWN - 1)) for i in range(STEPS_SHOWN)}
    return [common[place] for place in sorted(places)]


# ---------------------------------------------------------------------------------- cards


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
        self.colours: dict[str, set[str]] = {}  # label of a run -> letters of what is known

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
            size = len(card.encode("utf-8"))
            if not card or size > self._text_left:
                self.left_out += 1
                continue
            self._text_left -= size
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
                tokens = split_tokens(record, decode)
                self.colours.setdefault(run.label, set()).update(known_colours(tokens))
                return token_markup(tokens)
            except (ValueError, KeyError, TypeError, OverflowError):
                pass  # the text is there all the same
        self.uncoloured.add(run.label)
        return text(record.get("completion", ""), 4 * TOKENS_SHOWN)

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
