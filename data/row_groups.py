# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Random access to rows of parquet files: an index from metadata, reads by row group, a cache."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data.thinkmorph import OPSD_ROWS, BadRow, Row, RowNeeds, check_schema

CACHE_BYTES = 256 << 20
BLOCK_BYTES = 64 << 20


@dataclass(frozen=True)
class RowGroup:
    """Place of a row group: `first` counts in the dataset, `first_in_file` in its file.

    It is read in blocks of `block_rows` rows; only a very large group has more than one.
    `bytes` is the decompressed size of all columns.
    """

    file: str
    number: int
    rows: int
    first: int
    first_in_file: int
    block_rows: int
    bytes: int


def open_parquet(file: str | Path) -> pq.ParquetFile:
    """Raises ValueError for what is no parquet file; a missing file stays FileNotFoundError."""
    try:
        # A buffered stream reads page by page: a file of one huge row group is never whole in
        # memory.
        return pq.ParquetFile(
            file, buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True
        )
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError) as error:
        with Path(file).open("rb") as stream:
            pointer = stream.read(40).startswith(b"version https://git-lfs")
        hint = (
            "it is a Git LFS pointer, not the data: fetch it with `git lfs pull`"
            if pointer
            else "download it again"
        )
        raise ValueError(f"{file} is not a readable parquet file: {error}; {hint}") from error


def _blocks(batches: Iterator[pa.RecordBatch], size: int) -> Iterator[pa.Table]:
    """Tables of `size` rows (the last may be shorter); a batch may be shorter than asked for."""
    pending: list[pa.RecordBatch] = []
    for batch in batches:
        pending.append(batch)
        while sum(part.num_rows for part in pending) >= size:
            table = pa.Table.from_batches(pending)
            yield table.slice(0, size)
            pending = [part for part in table.slice(size).to_batches() if part.num_rows]
    if pending:
        yield pa.Table.from_batches(pending)


class ParquetDataset:
    """Random access to the rows of some parquet files.

    The index comes from metadata only. Rows are read by row group (huge groups in blocks), with
    the columns `needs` asks for, through a cache of `cache_bytes`; the cache is per process and
    does not travel to worker processes.

    Raises ValueError (on construction) for unreadable files, missing columns and no rows at all.
    """

    def __init__(
        self,
        name: str,
        files: Sequence[str | Path],
        needs: RowNeeds = OPSD_ROWS,
        *,
        split: str = "train",
        cache_bytes: int = CACHE_BYTES,
        block_bytes: int = BLOCK_BYTES,
    ) -> None:
        self.name, self.split, self.needs = name, split, needs
        self.files = tuple(str(file) for file in files)
        self.cache_bytes = cache_bytes
        self.columns: dict[str, tuple[str, ...]] = {}
        groups: list[RowGroup] = []
        first = 0
        for file in self.files:
            with open_parquet(file) as parquet:
                metadata = parquet.metadata
                self.columns[file] = check_schema(parquet.schema_arrow, needs, where=file)
                in_file = 0
                for number in range(metadata.num_row_groups):
                    group = metadata.row_group(number)
                    rows, size = group.num_rows, group.total_byte_size
                    if rows == 0:
                        continue
                    block_rows = -(-rows // max(1, -(-size // block_bytes)))
                    groups.append(RowGroup(file, number, rows, first, in_file, block_rows, size))
                    first += rows
                    in_file += rows
        if not groups:
            listed = ", ".join(self.files) or "no files"
            raise ValueError(
                f"dataset {name} (split {split}) has no rows: {listed}. The files are empty; "
                "generate or download them again."
            )
        self.groups = tuple(groups)
        self._length = first
        self._firsts = [group.first for group in groups]
        self._forget()

    def _forget(self) -> None:
        self._cache: OrderedDict[tuple[int, int], pa.Table] = OrderedDict()
        self._handle: tuple[str, pq.ParquetFile] | None = None
        self._stream: tuple[int, int, Iterator[pa.Table]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        for name in ("_cache", "_handle", "_stream"):
            del state[name]
        return state

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
        if not 0 <= index < self._length:
            raise IndexError(f"row {index} of dataset {self.name} with {self._length} rows")
        group = bisect_right(self._firsts, index) - 1
        return group, index - self.groups[group].first

    def _parquet(self, file: str) -> pq.ParquetFile:
        if self._handle is None or self._handle[0] != file:
            if self._handle is not None:
                self._handle[1].close()
            self._stream = None
            self._handle = (file, open_parquet(file))
        return self._handle[1]

    def _read_block(self, number: int, block: int) -> pa.Table:
        """Rows [block * block_rows, (block + 1) * block_rows) of row group `number`."""
        group = self.groups[number]
        parquet = self._parquet(group.file)
        columns = list(self.columns[group.file])
        if group.block_rows >= group.rows:
            return parquet.read_row_group(group.number, columns=columns, use_threads=False)
        # Reading on from the last block makes a pass in order linear in the size of the group.
        if self._stream is None or self._stream[0] != number or self._stream[1] > block:
            batches = parquet.iter_batches(
                group.block_rows, row_groups=[group.number], columns=columns, use_threads=False
            )
            self._stream = (number, 0, _blocks(batches, group.block_rows))
        _, at, blocks = self._stream
        self._stream = None  # an error below leaves no half-read stream behind
        expected = min(group.block_rows, group.rows - block * group.block_rows)
        table = next(itertools.islice(blocks, block - at, None), None)
        if table is None or table.num_rows != expected:
            raise OSError(f"row group {group.number} ends before its stated {group.rows} rows")
        self._stream = (number, block + 1, blocks)
        return table

    def _block(self, number: int, block: int) -> pa.Table:
        key = (number, block)
        table = self._cache.get(key)
        if table is None:
            table = self._read_block(number, block)
            room = self.cache_bytes - table.nbytes
            held = sum(other.nbytes for other in self._cache.values())
            while self._cache and held > room:
                held -= self._cache.popitem(last=False)[1].nbytes
            self._cache[key] = table
        self._cache.move_to_end(key)
        return table

    def read_row(self, index: int, position: int = -1) -> Row:
        """Row `index` of the dataset. Raises BadRow("unreadable_row") for damaged data pages."""
        number, offset = self._group_of(index)
        group = self.groups[number]
        row = group.first_in_file + offset
        block, inside = divmod(offset, group.block_rows)
        try:
            values = self._block(number, block).slice(inside, 1).to_pylist()[0]
        except (FileNotFoundError, PermissionError):
            raise  # the data is gone, not damaged
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise BadRow("unreadable_row", str(error), file=group.file, row=row) from error
        return Row(self.name, group.file, row, values, position)


def iter_rows(dataset: ParquetDataset, start: int = 0, stop: int | None = None) -> Iterator[Row]:
    """Rows [start, stop) in file order, for evaluation. Raises BadRow for damaged data."""
    stop = len(dataset) if stop is None else min(stop, len(dataset))
    for index in range(start, stop):
        yield dataset.read_row(index)
