# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Files of a run that only reads a model: JSON lines that survive a kill, and settings.

Rank k appends to NAME.rank_k.jsonl; at the end rank 0 merges these and an earlier NAME.jsonl, in
row order, into NAME.jsonl. A killed run leaves rank files, from which the next one goes on with
any number of ranks; it gathers them before anybody appends, so that what it adds is newer.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from data.json_lines import append_records, read_log, write_lines
from modeling.host.disk import disk_errors
from modeling.host.programs import make_folder
from modeling.host.text_files import read_json_object
from scripts.visual_opsd.runs.folder_lock import hold_folder

SETTINGS_FILE = "settings.json"


def stable_hash(value: Any) -> str:
    """Digest of a JSON-able value; the order of keys does not matter."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    with disk_errors(f"writing {path}", path.parent):
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)


def read_json(path: Path, what: str) -> dict[str, Any]:
    """A JSON object. Raises ValueError, saying `what` it is for, if it is absent or no object."""
    return read_json_object(path, "file of results", fix=what)


class RankedLines:
    """JSON lines of one kind, appended to by every rank and merged by rank 0.

    Args:
        folder: the run's; must exist. name: stem of the files.
        key: field that names a record (an integer); a record read twice counts once.
        fields: what else a record must hold, unless it holds "bad"; others are left out, so that
            their rows are computed again.
    """

    def __init__(
        self, folder: Path, name: str, key: str = "index", fields: Iterable[str] = ()
    ) -> None:
        self.folder, self.name, self.key, self.fields = folder, name, key, tuple(fields)
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

    def read(self) -> dict[int, dict[str, Any]]:
        """The newest record of every key, in the order of the keys (see `settle`)."""
        found: dict[int, dict[str, Any]] = {}
        merged = [self.merged] if self.merged.is_file() else []
        for file in [*merged, *self._rank_files()]:
            for record in read_log(file, self._is_ours):
                found[record[self.key]] = record
        return dict(sorted(found.items()))

    def _is_ours(self, record: dict[str, Any]) -> bool:
        if type(record[self.key]) is not int:
            raise TypeError(f"{self.key} is no integer")
        missing = [name for name in self.fields if name not in record]
        if missing and "bad" not in record:
            raise KeyError(*missing)
        return True

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


def hold_output(folder: str | Path) -> None:
    """Make an output folder and hold it: rank 0, before it reads anything there.

    Raises:
        ValueError: it cannot be written to, or another run holds it.
    """
    make_folder(folder, "--output_dir")
    hold_folder(Path(folder), "output_dir")


def claim_output(folder: str | Path, result: str, overwrite: bool) -> None:
    """Make the folder of a run that writes everything at its end.

    Raises:
        ValueError: it cannot be written to, or holds the file `result` and is not to be replaced.
    """
    hold_output(folder)
    if (Path(folder) / result).exists() and not overwrite:
        raise ValueError(
            f"--output_dir {folder} holds results ({result}); choose another, or pass --overwrite "
            "to replace them"
        )


def claim_folder(
    folder: Path, settings: Mapping[str, Any], *, has_results: bool, hint: str
) -> None:
    """Make `folder`, which rank 0 holds, the run's: write settings.json, or find the same there.

    Args:
        settings: everything the results depend on.
        has_results: the folder holds results that other settings would spoil.
        hint: what the user can do about other settings.

    Raises:
        ValueError: the results are of other settings; names the ones that differ.
    """
    path = folder / SETTINGS_FILE
    if has_results:
        held = read_json(path, "it says what the results beside it were made with; " + hint)
        if held.get("hash") != stable_hash(settings):
            different = "; ".join(differing(held.get("settings", {}), settings))
            raise ValueError(f"{folder} holds results of other settings ({different}); {hint}")
        return
    write_json(path, {"hash": stable_hash(settings), "settings": settings})


def differing(held: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """"name: old, now new" of every setting in which two runs differ."""

    def short(value: Any) -> str:
        text = json.dumps(value, ensure_ascii=False)
        return text if len(text) <= 60 else text[:57] + "..."

    wanted = json.loads(json.dumps(wanted))  # tuples become lists, as in what was read
    return [
        f"{name}: {short(held.get(name))}, now {short(wanted.get(name))}"
        for name in sorted({*held, *wanted})
        if held.get(name) != wanted.get(name)
    ]
