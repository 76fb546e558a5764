# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Rows for evaluation and the diagnostic: from files to windows of prepared rows, in file order.

Unlike training, nothing is replaced: a row that cannot be used is left out, counted and listed.
"""

from __future__ import annotations

import os
import threading
from bisect import bisect_right
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from data.dataset_info import dataset_files, is_dataset_folder, split_files
from data.rejects import Reject
from data.row_groups import ParquetDataset, RowSource, prepare_row
from data.thinkmorph import (
    EVALUATION_ROWS,
    IMAGE_COLUMNS,
    PROBLEM_IMAGE,
    Row,
    RowNeeds,
    row_digest,
)
from data.tsv import TsvDataset
from scripts.visual_opsd.config import PromptSettings

IDENTITY_COLUMNS = ("question", "answer", PROBLEM_IMAGE, "world_state")
THOUGHT_IDENTITY_COLUMNS = (*IDENTITY_COLUMNS, *IMAGE_COLUMNS)


def prompt_identity(settings: PromptSettings) -> dict[str, Any]:
    """What of the prompt settings a result depends on: the strings themselves and the sizes."""
    identity = {
        "prompts": asdict(settings.build()),
        "image_path": settings.image_path,
        "vit": settings.vit_config(),
    }
    if settings.image_path == "inferencer":  # the only path through the VAE's resize
        identity["vae"] = settings.vae_config()
    return identity


# ------------------------------------------------------------------------------ which rows


def open_data(data: str, split: str, root: str | Path | None, needs: RowNeeds) -> list[RowSource]:
    """Datasets of a comma-separated list of names (below the data root), folders or files.

    A file that ends in .tsv is a benchmark's, called by its stem; any other is parquet.

    Raises:
        ValueError: an unknown name, a folder without files of the split, two of one name, a TSV
            file where visual thoughts or traces are needed.
    """
    found: list[RowSource] = []
    for entry in (part.strip() for part in data.split(",") if part.strip()):
        path = Path(entry)
        if path.suffix == ".tsv":
            if needs != EVALUATION_ROWS:
                raise ValueError(
                    f"--data {entry}: benchmark files hold questions only, no visual thoughts; "
                    "they can be evaluated with --context text, nothing else"
                )
            found.append(TsvDataset(path.stem, path))
            continue
        if os.path.isfile(path) or (path.suffix == ".parquet" and not os.path.isdir(path)):
            files, place = [path], Path(os.path.realpath(path)).parent
        elif is_dataset_folder(path):
            files, place = split_files(path, split), path.resolve()
        elif os.path.isdir(path):
            raise ValueError(
                f"--data {entry}: the folder holds no parquet files, directly or in its data/; "
                "name a dataset's folder, or give its parent as --data_root and the name as --data"
            )
        else:
            found.append(
                ParquetDataset(entry, dataset_files(entry, split, root), needs, split=split)
            )
            continue
        name = place.parent.name if place.name == "data" else place.name
        found.append(ParquetDataset(name, files, needs, split=split))
    names = [dataset.name for dataset in found]
    if not found or len(set(names)) < len(names):
        raise ValueError(f"--data {data!r}: need at least one dataset and each name once: {names}")
    return found


class RowPool:
    """Datasets laid end to end: one index over all their rows."""

    def __init__(self, datasets: Sequence[RowSource]) -> None:
        self.datasets = tuple(datasets)
        self.starts = [0]
        for dataset in self.datasets:
            self.starts.append(self.starts[-1] + len(dataset))

    def __len__(self) -> int:
        return self.starts[-1]

    def locate(self, index: int) -> tuple[RowSource, int]:
        """Dataset of a row and the row's index in it."""
        number = bisect_right(self.starts, index) - 1
        return self.datasets[number], index - self.starts[number]

    def reject(self, index: int, reason: str, detail: str) -> Reject:
        """A row that turned out to be unusable after it was prepared."""
        dataset, row = self.locate(index)
        return Reject(dataset.name, *dataset.locate(row), reason, detail)

    def signature(self) -> list[dict[str, Any]]:
        """What tells these files from others: names, sizes and row counts, no paths."""
        return [
            {
                "name": dataset.name,
                "rows": len(dataset),
                "files": [[Path(f).name, Path(f).stat().st_size] for f in dataset.files],
                **({"md5": dataset.md5} if isinstance(dataset, TsvDataset) else {}),
            }
            for dataset in self.datasets
        ]


@dataclass(frozen=True)
class RowName:
    """Which row a result belongs to; `digest` covers its content, so files may move."""

    dataset: str
    file: str
    row: int
    pid: str
    digest: str

    def __str__(self) -> str:
        return f"{self.dataset}/{self.file} row {self.row}"


def row_name(row: Row, pid: str, columns: Sequence[str]) -> RowName:
    """The name of a row, its digest over `columns`."""
    return RowName(row.dataset, Path(row.file).name, row.row, pid, row_digest(row, columns))


# ------------------------------------------------------------------------------ reading them


class Sized(Protocol):
    """A prepared row that knows how many packed tokens its longest context takes."""

    @property
    def length(self) -> int: ...


P = TypeVar("P", bound=Sized)


@dataclass(frozen=True)
class Window(Generic[P]):
    """Rows read together: (index, prepared row) in order of length, and the rejected ones."""

    rows: list[tuple[int, P]]
    rejects: list[tuple[int, Reject]]

    @property
    def count(self) -> int:
        return len(self.rows) + len(self.rejects)


def read_windows(
    pool: RowPool,
    indices: Sequence[int],
    prepare: Callable[[Row], P],
    *,
    max_rows: int,
    max_tokens: int,
) -> Generator[Window[P], None, None]:
    """Prepare the rows of `indices` (ascending), some at a time.

    A window holds at most `max_rows` rows and, but for its last row, `max_tokens` packed tokens,
    so that image patches of a long run never pile up. Inside it rows come in order of length: what
    is then decoded or packed together is alike. The next window is read by a thread meanwhile.

    `row.position` of what `prepare` gets is the row's index in the pool.
    """
    stopped = threading.Event()

    def windows() -> Iterator[Window[P]]:
        window: Window[P] = Window([], [])
        tokens = 0
        for index in indices:
            if stopped.is_set():
                return
            dataset, row = pool.locate(index)
            item = prepare_row(dataset, row, prepare, index)
            if isinstance(item, Reject):
                window.rejects.append((index, item))
            else:
                window.rows.append((index, item))
                tokens += item.length
            if window.count >= max_rows or tokens >= max_tokens:
                yield window
                window, tokens = Window([], []), 0
        if window.count:
            yield window

    made = windows()
    with ThreadPoolExecutor(1, "row reader") as reader:
        try:
            ahead = reader.submit(next, made, None)
            while (window := ahead.result()) is not None:
                ahead = reader.submit(next, made, None)
                window.rows.sort(key=lambda pair: pair[1].length)
                yield window
        finally:
            stopped.set()  # whoever stops early waits for the row under way, not for the window
