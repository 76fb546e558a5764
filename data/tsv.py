# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Random access to the rows of a benchmark's TSV file, as VLMEvalKit stores them.

A header line, then one record a question: `index`, `question`, `answer`, options `A`, `B`, ...,
and `image`: an image's bytes in base64, a list of such, or the index of the row that holds them
(repeated questions on one image share it). Fields may be quoted and hold newlines.
"""

from __future__ import annotations

import base64
import binascii
import csv
import hashlib
from ast import literal_eval
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from data.thinkmorph import BadRow, Row
from data.transforms import decode_image

# A shorter `image` is the index of another row (VLMEvalKit's own rule).
_REFERENCE_LENGTH = 64
_ABSENT = ("", "nan")


class _Lines:
    """Decoded lines of a stream for csv.reader, counting the bytes taken from it."""

    def __init__(self, stream: BinaryIO, path: Path) -> None:
        self.stream, self.path = stream, path
        self.offset = 0
        self.digest = hashlib.md5(usedforsecurity=False)  # what VLMEvalKit names its files by

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self.stream.readline()
        if not line:
            raise StopIteration
        start, self.offset = self.offset, self.offset + len(line)
        self.digest.update(line)
        try:
            return line.decode("utf-8" if start else "utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{self.path} is not UTF-8 text at byte {start + error.start}; it is no TSV file "
                "of a benchmark, or the download is damaged"
            ) from error


class TsvDataset:
    """Rows of one TSV file; only the places of its records are kept in memory.

    Values of a row are strings by column name, empty ones left out; `image` is resolved to the
    row that holds it.

    Raises ValueError (on construction) for a missing or damaged file, missing columns, an index
    that stands twice, or no rows.
    """

    def __init__(self, name: str, file: str | Path) -> None:
        self.name = name
        self.path = Path(file)
        self.files = (str(file),)
        csv.field_size_limit(2**31 - 1)
        if not self.path.is_file():
            raise ValueError(f"{self.path} does not exist: give the TSV file of benchmark {name}")
        self._spans: list[tuple[int, int]] = []
        self._places: dict[str, int] = {}  # index -> row
        with self.path.open("rb") as stream:
            lines = _Lines(stream, self.path)
            reader = csv.reader(lines, delimiter="\t")
            self.columns = tuple(next(reader, ()))
            self._check_columns()
            self._scan(reader, lines)
        self.md5 = lines.digest.hexdigest()
        if not self._spans:
            raise ValueError(f"{self.path} has a header but no rows; download it again")

    def _check_columns(self) -> None:
        missing = [name for name in ("index", "question", "answer") if name not in self.columns]
        if not {"image", "image_path"} & set(self.columns):
            missing.append("image (or image_path)")
        if missing:
            raise ValueError(
                f"{self.path} is no benchmark in VLMEvalKit's format: columns {', '.join(missing)} "
                f"are missing; found {', '.join(self.columns)[:200] or 'none'}"
            )

    def _scan(self, reader: Any, lines: _Lines) -> None:
        at = self.columns.index("index")
        start = lines.offset
        while True:
            try:
                fields = next(reader, None)
            except csv.Error as error:
                raise ValueError(
                    f"{self.path} record {len(self._spans)}: {error}; download the file again"
                ) from error
            if fields is None:
                return
            if fields:  # a blank line is no record
                index = plain_index(fields[at]) if at < len(fields) else ""
                if index in self._places:
                    raise ValueError(f"{self.path}: index {index!r} stands twice")
                self._places[index] = len(self._spans)
                self._spans.append((start, lines.offset))
            start = lines.offset

    def __len__(self) -> int:
        return len(self._spans)

    def locate(self, index: int) -> tuple[str, int]:
        """File of a row and its place in it (records after the header, from 0)."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of dataset {self.name} with {len(self)} rows")
        return self.files[0], index

    def _record(self, row: int) -> dict[str, str]:
        begin, end = self._spans[row]
        with self.path.open("rb") as stream:
            stream.seek(begin)
            text = stream.read(end - begin).decode("utf-8")
        fields = next(csv.reader(text.splitlines(keepends=True), delimiter="\t"))
        if len(fields) > len(self.columns):
            raise BadRow(
                "wrong_columns",
                f"{len(fields)} fields under {len(self.columns)} columns",
                file=self.files[0],
                row=row,
            )
        pairs = zip(self.columns, fields, strict=False)  # a short record lacks its last columns
        return {name: field for name, field in pairs if field.strip() not in _ABSENT}

    def read_row(self, index: int, position: int = -1) -> Row:
        """Row `index`. Raises BadRow for a record of too many fields or a dangling image."""
        file, row = self.locate(index)
        values = self._record(row)
        image = values.get("image", "")
        if 0 < len(image) <= _REFERENCE_LENGTH:
            place = self._places.get(plain_index(image))
            shared = "" if place is None else self._record(place).get("image", "")
            if len(shared) <= _REFERENCE_LENGTH:
                raise BadRow(
                    "missing_image",
                    f"image {image!r} is neither base64 nor the index of a row that holds one",
                    file=file,
                    row=row,
                )
            values["image"] = shared
        return Row(self.name, file, row, values, position)


def plain_index(text: str) -> str:
    """The index as text: "7", " 7" and pandas' "7.0" are one."""
    text = text.strip()
    whole, dot, rest = text.partition(".")
    return whole if dot and whole.isdigit() and not rest.strip("0") else text


def as_list(text: str) -> list[str]:
    """Elements of a cell that holds a list (its Python or JSON form), or the cell itself."""
    stripped = text.strip()
    if stripped.startswith("[") and stripped.endswith("]"):
        try:
            value = literal_eval(stripped)
        except (ValueError, SyntaxError):
            return [text]
        if isinstance(value, list):
            return [str(item) for item in value]
    return [text]


def tsv_images(row: Row) -> list[Image.Image]:
    """RGB images of a row, in their order.

    Base64 cells are decoded as they are; VLMEvalKit writes them to JPEG files first and hands
    models those. Paths are looked up as given, beside the file, and in images/NAME beside it.

    Raises:
        BadRow: missing_image, broken_image.
    """

    def bad(reason: str, detail: str) -> BadRow:
        return BadRow(reason, detail, file=row.file, row=row.row)

    values: Mapping[str, Any] = row.values
    try:
        if values.get("image"):
            cells = as_list(values["image"])
            return [decode_image(base64.b64decode(_payload(c), validate=True)) for c in cells]
        if not values.get("image_path"):
            raise bad("missing_image", "neither image nor image_path holds anything")
        return [decode_image(_find(path, row)) for path in as_list(values["image_path"])]
    except FileNotFoundError as error:
        raise bad("missing_image", str(error)) from error
    except BadRow:
        raise
    except (binascii.Error, ValueError) as error:
        raise bad("broken_image", str(error)) from error


def _payload(cell: str) -> str:
    """Base64 of a cell, without a data URL's head and without line breaks."""
    head, comma, rest = cell.partition(",")
    return "".join((rest if comma and head.startswith("data:") else cell).split())


def _find(path: str, row: Row) -> Path:
    folder = Path(row.file).parent
    for candidate in (Path(path), folder / path, folder / "images" / row.dataset / path):
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(f"image file {path} is neither there nor beside {row.file}")
