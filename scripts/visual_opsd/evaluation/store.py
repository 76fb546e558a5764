# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Files of a run that only reads a model: JSON lines that survive a kill.

Rank k appends to NAME.rank_k.jsonl; at the end rank 0 merges these and an earlier NAME.jsonl, in
row order, into NAME.jsonl. A killed run leaves rank files, from which the next one goes on with
any number of ranks; it gathers them before anybody appends, so that what it adds is newer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from data.json_lines import append_records, read_log, write_lines
from modeling.host.disk import disk_errors, replace_file
from modeling.host.text_files import read_json_object

Record = dict[str, Any]


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, whole or not at all."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    with disk_errors(f"writing {path}", path.parent):
        replace_file(path, text.encode("utf-8"))


def read_json(path: Path, what: str) -> dict[str, Any]:
    """A JSON object. Raises ValueError, saying `what` it is for, if it is absent or no object."""
    return read_json_object(path, "file of results", fix=what)


class RankedLines:
    """JSON lines of one kind, appended to by every rank and merged by rank 0.

    A record is known by its "index", an integer; one that was read twice counts once. That of an
    unusable row has "bad" (`data.rejects.Reject`) and nothing else.

    Args:
        folder: the run's; must exist. name: stem of the files.
        is_usable: whether a record holds what is needed of it (False, or KeyError for a damaged
            one); others are left out, so that their rows are computed again.
    """

    def __init__(
        self, folder: Path, name: str, is_usable: Callable[[Record], object] = bool
    ) -> None:
        self.folder, self.name, self.is_usable = folder, name, is_usable
        self.merged = folder / f"{name}.jsonl"
        self.earlier = folder / f"{name}.rank_earlier.jsonl"

    def _rank_files(self) -> list[Path]:
        """What was appended, that of earlier runs first."""
        found = self.folder.glob(f"{self.name}.rank_*.jsonl")
        return sorted(found, key=lambda file: (file != self.earlier, file))

    def exists(self) -> bool:
        """Whether any record file is there, be it of a finished or a killed run."""
        return self.merged.is_file() or bool(self._rank_files())

    def clear(self) -> None:
        """Remove all records."""
        with disk_errors(f"emptying {self.folder}", self.folder):
            for file in [self.merged, *self._rank_files()]:
                file.unlink(missing_ok=True)

    def read(self) -> dict[int, Record]:
        """The newest record of every row, in the order of the rows (see `settle`)."""
        found: dict[int, Record] = {}
        merged = [self.merged] if self.merged.is_file() else []
        for file in [*merged, *self._rank_files()]:
            for record in read_log(file, self._is_ours):
                found[record["index"]] = record
        return dict(sorted(found.items()))

    def _is_ours(self, record: Record) -> bool:
        if type(record["index"]) is not int:
            raise TypeError("index is no integer")
        return "bad" in record or bool(self.is_usable(record))

    def settle(self) -> None:
        """Gather what killed runs left, before anybody appends: it is then older than every line
        to come, whichever rank writes that."""
        left = self._rank_files()
        if left:
            write_lines(self.earlier, self.read().values())
            for file in left:
                if file != self.earlier:
                    file.unlink()

    def append(self, rank: int, records: Iterable[Mapping[str, Any]]) -> None:
        """Add records to a rank's file; on the disk's side of a kill after this returns."""
        append_records(self.folder / f"{self.name}.rank_{rank}.jsonl", records)

    def merge(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Write `records` (what `read` gave, or some of it) as the merged file, then remove the
        rank files."""
        write_lines(self.merged, records)
        with disk_errors(f"writing {self.merged}", self.folder):
            for file in self._rank_files():
                file.unlink()
