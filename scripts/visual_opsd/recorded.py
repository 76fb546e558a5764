# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""samples.jsonl: completions as text and as ids, and a run on completions of an earlier one.

Replaying them makes two runs comparable step by step where sampling would part them after a few
tokens: another device, another dtype, another implementation.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from data.parquet import SlotItem
from data.sequence import Completion
from scripts.visual_opsd.rows import TrainRow


def write_samples(
    path: Path,
    step: int,
    pairs: Sequence[tuple[SlotItem[TrainRow], Completion]],
    decode: Callable[[list[int]], str],
) -> None:
    """Append the completions of 0-based step `step`; the file counts steps from 1."""
    with path.open("a", encoding="utf-8") as file:
        for item, completion in pairs:
            record = {
                "step": step + 1,
                "slot": item.slot,
                "row": item.value.name,
                "question": item.value.question,
                "answer": item.value.answer,
                "completion": decode(list(completion.ids)),
                "tokens": len(completion.ids),
                "capped": completion.capped,
                "ids": completion.ids,
                "scored": "".join("01"[scored] for scored in completion.scored),
                "logprobs": [round(p, 7) for p in completion.logprobs],
            }
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


@dataclass(frozen=True)
class RecordedCompletions:
    """Completions of a samples.jsonl by (1-based step, slot)."""

    path: str
    by_place: dict[tuple[int, int], tuple[str, Completion]]

    @classmethod
    def read(cls, path: str) -> RecordedCompletions:
        """Raises ValueError: no such file, or a line that is no completion."""
        if not Path(path).is_file():
            raise ValueError(f"--replay_samples {path}: no such file")
        found = {}
        for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
            try:
                record = json.loads(line)
                completion = Completion(
                    tuple(record["ids"]),
                    tuple(flag == "1" for flag in record["scored"]),
                    tuple(record["logprobs"]),
                    record["capped"],
                )
                found[record["step"], record["slot"]] = (record["row"], completion)
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path} line {number} holds no completion: {error!r}") from error
        return cls(path, found)

    def take(self, step: int, item: SlotItem[TrainRow]) -> Completion:
        """The completion of a slot of 0-based step `step`.

        Raises:
            ValueError: not recorded, or recorded for another row.
        """
        name, completion = self.by_place.get((step + 1, item.slot), ("", None))
        if completion is None:
            raise ValueError(
                f"{self.path} has no completion for step {step + 1}, slot {item.slot}: record "
                "with --samples_per_step of at least the global batch size, in one process"
            )
        if name != item.value.name:
            raise ValueError(
                f"{self.path}: step {step + 1}, slot {item.slot} holds row {name}, this run reads "
                f"{item.value.name}; use the same data, seed and batch size"
            )
        return completion
