# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""samples.jsonl: completions as text and as ids, and a run on completions of an earlier one.

Replaying them makes two runs comparable step by step where sampling would part them after a few
tokens: another device, another dtype, another implementation.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from data.json_lines import append_records, read_given
from data.parquet import SlotItem
from data.sequence import Completion
from scripts.visual_opsd.rows import TrainRow


def write_samples(
    path: Path,
    step: int,
    completions: Sequence[tuple[SlotItem[TrainRow], int, Completion]],
    decode: Callable[[list[int]], str],
    figures: Sequence[Mapping[str, Tensor]] = (),
) -> None:
    """Append the completions of 0-based step `step`; the file counts steps from 1.

    completions: each with its row and its number among those of the row.
    figures: of a measured step, those of each completion's scored tokens.
    """
    records: list[dict[str, Any]] = [
        {
            "step": step + 1,
            "slot": item.slot,
            "number": number,
            "row": item.value.name,
            "question": item.value.question,
            "answer": item.value.answer,
            "completion": decode(list(completion.ids)),
            "tokens": len(completion.ids),
            "capped": completion.capped,
            "given": completion.given,
            "rehearsed": item.value.rehearsed,
            "ids": completion.ids,
            "scored": "".join("01"[scored] for scored in completion.scored),
            "logprobs": _rounded(completion.logprobs, 7),
        }
        for item, number, completion in completions
    ]
    for record, found in zip(records, figures, strict=False):
        record |= token_lists(found)
    append_records(path, records)


def token_lists(figures: Mapping[str, Tensor]) -> dict[str, list[float | None] | str]:
    """What a record says of its scored tokens."""
    if not figures:
        return {}
    names = ("divergence", "student_entropy", "teacher_entropy")
    lists = {name: _rounded(figures[name].tolist(), 4) for name in names}
    return {**lists, "fork": "".join("01"[fork > 0] for fork in figures["fork"].tolist())}


def _rounded(values: Sequence[float], digits: int) -> list[float | None]:
    """JSON knows no number that is not finite."""
    return [round(value, digits) if math.isfinite(value) else None for value in values]


@dataclass(frozen=True)
class RecordedCompletions:
    """Completions of a samples.jsonl by (1-based step, slot, number in the row)."""

    path: str
    by_place: dict[tuple[int, int, int], tuple[str, Completion]]

    @classmethod
    def read(cls, path: str) -> RecordedCompletions:
        """Raises ValueError: no such file, or a line that is no completion."""
        if not os.path.isfile(path):
            raise ValueError(f"--replay_samples {path}: no such file")
        found = {}
        for number, record in read_given(path, "completion"):
            try:
                place = record["step"], record["slot"], record.get("number", 0)
                found[place] = (record["row"], _completion(record))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path} line {number} holds no completion: {error!r}") from error
        return cls(path, found)

    def take(self, step: int, item: SlotItem[TrainRow], number: int = 0) -> Completion:
        """The completion of that number of a slot of 0-based step `step`.

        Raises:
            ValueError: not recorded, or recorded for another row.
        """
        name, completion = self.by_place.get((step + 1, item.slot, number), ("", None))
        if completion is None:
            place = f"slot {item.slot}" + (f", number {number}" if number else "")
            raise ValueError(
                f"{self.path} has no completion for step {step + 1}, {place}: "
                "record with --samples_per_step of at least the global batch size (times "
                "--completions_per_row), in one process"
            )
        if name != item.value.name:
            raise ValueError(
                f"{self.path}: step {step + 1}, slot {item.slot} holds row {name}, this run reads "
                f"{item.value.name}; use the same data, seed and batch size"
            )
        return completion


def _completion(record: dict[str, Any]) -> Completion:
    """Raises ValueError, KeyError or TypeError: the record holds no completion."""
    ids, scored, logprobs = tuple(record["ids"]), record["scored"], tuple(record["logprobs"])
    if not all(type(token) is int and token >= 0 for token in ids):
        raise ValueError("ids must be token ids")
    if len(scored) != len(ids) + 1 or set(scored) - {"0", "1"}:
        raise ValueError("scored must hold a 0 or 1 for each id and one for the end")
    if None in logprobs:
        logprobs = ()  # of a student that gave numbers no more: they are not known
    if not all(isinstance(logprob, int | float) for logprob in logprobs):
        raise ValueError("logprobs must be numbers")
    flags = tuple(flag == "1" for flag in scored)
    return Completion(ids, flags, logprobs, bool(record["capped"]))
