# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Random access to rows of parquet files: an index from metadata, reads by row group, a cache."""

from __future__ import annotations

import os
import warnings
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from data.dataset_info import check_file
from data.rejects import Reject
from data.thinkmorph import OPSD_ROWS, BadRow, Row, RowNeeds, RowReader, check_schema

T = TypeVar("T")

CACHE_BYTES = 256 << 20
# Memory of a worker grows with the row group, whatever is read of it: writers put up to 1024 rows
# into one page.
LARGE_GROUP_BYTES = 1 << 30


class RowSource(RowReader, Protocol):
    """A dataset whose rows can be read by number, whatever its files are."""

    @property
    def name(self) -> str: ...

    @property
    def files(self) -> tuple[str, ...]: ...

    def locate(self, index: int) -> tuple[str, int]: ...


@dataclass(frozen=True)
class RowGroup:
    """Place of a row group: `first` counts in the dataset, `first_in_file` in its file.

    `bytes` is the decompressed size of all columns.
    """

    file: str
    number: int
    rows: int
    first: int
    first_in_file: int
    bytes: int


def open_parquet(file: str | Path) -> pq.ParquetFile:
    """Raises ValueError for what is no parquet file, is not there, or cannot be read."""
    check_file(file)
    try:
        # A buffered stream holds one page besides the decoded rows, not whole column chunks.
        return pq.ParquetFile(
            file, buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True
        )
    except (pa.ArrowException, OSError) as error:
        if getattr(error, "errno", None) is not None:
            raise unreadable(file, error) from error
        with Path(file).open("rb") as stream:
            pointer = stream.read(40).startswith(b"version https://git-lfs")
        hint = (
            "it is a Git LFS pointer, not the data: fetch it with `git lfs pull`"
            if pointer
            else "download it again"
        )
        raise ValueError(f"{file} is not a readable parquet file: {error}; {hint}") from error


def unreadable(file: str | Path, error: BaseException) -> ValueError:
    """The error about a file that the system does not let us read (it may well be whole)."""
    reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else error
    return ValueError(f"{file} cannot be read: {reason}")


def _plain(cell: pa.Scalar) -> Any:
    """Python value of a cell; a narrow float is its shortest decimal: 0.1, not 0.10000000149."""
    value = cell.as_py()
    if pa.types.is_float16(cell.type) or pa.types.is_float32(cell.type):
        narrow = cell.type.to_pandas_dtype()
        return None if value is None else float(str(narrow(value)))
    return value


class ParquetDataset:
    """Random access to the rows of some parquet files.

    The index comes from metadata only. Rows are read by row group, with the columns `needs` asks
    for, through a cache of `CACHE_BYTES` (always at least the last group); the cache belongs to
    its process and does not travel to workers. Not for use by several threads at once.

    Raises ValueError (on construction) for unreadable files, missing columns and no rows at all.
    """

    def __init__(
        self,
        name: str,
        files: Sequence[str | Path],
        needs: RowNeeds = OPSD_ROWS,
        *,
        split: str = "train",
    ) -> None:
        self.name, self.split, self.needs = name, split, needs
        self.files = tuple(str(file) for file in files)
        self.columns: dict[str, tuple[str, ...]] = {}
        groups: list[RowGroup] = []
        self._length = 0
        for file in self.files:
            with open_parquet(file) as parquet:
                self.columns[file] = check_schema(parquet.schema_arrow, needs, where=file)
                before = self._length
                for number in range(parquet.metadata.num_row_groups):
                    group = parquet.metadata.row_group(number)
                    rows, size = group.num_rows, group.total_byte_size
                    first = self._length
                    if rows:
                        groups.append(RowGroup(file, number, rows, first, first - before, size))
                    self._length += rows
        if not groups:
            listed = ", ".join(self.files) or "no files"
            raise ValueError(
                f"dataset {name} (split {split}) has no rows: {listed}. The files are empty; "
                "generate or download them again."
            )
        largest = max(groups, key=lambda group: group.bytes)
        if largest.bytes > LARGE_GROUP_BYTES:
            warnings.warn(
                f"{largest.file}: a row group of {largest.rows} rows holds "
                f"{largest.bytes / 2**30:.1f} GiB, and reading any row of it takes as much memory "
                "in every worker; rewrite the file with row_group_size=100",
                stacklevel=2,
            )
        self.groups = tuple(groups)
        self._firsts = [group.first for group in groups]
        self._forget()

    def _forget(self) -> None:
        self._cache: OrderedDict[int, pa.Table] = OrderedDict()
        self._handle: tuple[str, pq.ParquetFile] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_cache", "_handle")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def __len__(self) -> int:
        return self._length

    def locate(self, index: int) -> tuple[str, int]:
        """File of a row of the dataset and its place in that file."""
        group, offset = self._group_of(index)
        return self.groups[group].file, self.groups[group].first_in_file + offset

    def _group_of(self, index: int) -> tuple[int, int]:
        assert 0 <= index < self._length, (index, self._length)
        group = bisect_right(self._firsts, index) - 1
        return group, index - self.groups[group].first

    def _parquet(self, file: str) -> pq.ParquetFile:
        if self._handle is None or self._handle[0] != file:
            if self._handle is not None:
                self._handle[1].close()
            self._handle = (file, open_parquet(file))
        return self._handle[1]

    def _group(self, number: int) -> pa.Table:
        """A row group, from the cache or read; the oldest make room for it."""
        table = self._cache.get(number)
        if table is None:
            group = self.groups[number]
            table = self._parquet(group.file).read_row_group(
                group.number, columns=list(self.columns[group.file]), use_threads=False
            )
            held = sum(other.nbytes for other in self._cache.values())
            while self._cache and held > CACHE_BYTES - table.nbytes:
                held -= self._cache.popitem(last=False)[1].nbytes
            self._cache[number] = table
        self._cache.move_to_end(number)
        return table

    def read_row(self, index: int, position: int = -1) -> Row:
        """Row `index` of the dataset.

        Raises:
            BadRow: "unreadable_row": damaged data pages.
            ValueError: the file is gone or cannot be reached.
        """
        number, offset = self._group_of(index)
        group = self.groups[number]
        row = group.first_in_file + offset
        try:
            table = self._group(number)
            values = {name: _plain(table[name][offset]) for name in self.columns[group.file]}
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            if getattr(error, "errno", None) is not None:  # the disk's fault, not the page's
                raise unreadable(group.file, error) from error
            raise BadRow("unreadable_row", str(error), file=group.file, row=row) from error
        return Row(self.name, group.file, row, values, position, self)


def prepare_row(
    dataset: RowSource, index: int, prepare: Callable[[Row], T], position: int = -1
) -> T | Reject:
    """`prepare` of one row, or why it was rejected (BadRow raised in reading or preparing)."""
    file, number = dataset.locate(index)
    try:
        return prepare(dataset.read_row(index, position))
    except BadRow as bad:
        return Reject(dataset.name, file, number, bad.reason, bad.detail)
    except Exception as error:
        error.add_note(f"while preparing {file} row {number}")
        raise
