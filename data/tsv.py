# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Random access to the rows of a benchmark's TSV file, as VLMEvalKit stores them.

A header line, then one record a question: `index`, `question`, `answer`, options `A`, `B`, ...,
and `image`: an image's bytes in base64, a list of such, or the index of the row that holds them
(repeated questions on one image share it). Records are read by RFC 4180 with tabs for commas: LF
or CRLF ends one, every other control character is text, and a field that begins with a quote may
hold tabs, line ends and doubled quotes. A quote elsewhere is text.
"""

from __future__ import annotations

import base64
import binascii
import csv
import hashlib
import os
import re
import string
from ast import literal_eval
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote

from PIL import Image

from data.dataset_info import check_file
from data.thinkmorph import BadRow, Row, is_blank
from data.transforms import decode_image

# A shorter `image` is the index of another row (VLMEvalKit's own rule).
_REFERENCE_LENGTH = 64
# What a picture looks like in `image` and `image_path`.
_PICTURES = {
    "image": re.compile(rf"[A-Za-z0-9+/_-]{{{_REFERENCE_LENGTH + 1}}}"),
    "image_path": re.compile(r"\.(png|jpe?g|webp|gif|bmp|tiff?)\b", re.IGNORECASE),
}
# Here "nan" is a text. Elsewhere it is a cell that pandas wrote as a string when it was empty.
_TEXTS = frozenset({"answer", *string.ascii_uppercase})
_QUOTING = (
    'a field with quotes in it is written "...""...", and one that begins with a quote must end '
    "with one"
)


class _Records:
    """Records of a stream, one after the other; blank lines are none.

    Attributes:
        start, stop: bytes of the record that `read` returned. line: the number of its first line.
        columns: the header, once it is known. known: indices of the records so far.
    """

    def __init__(self, stream: BinaryIO, path: Path, known: Container[str]) -> None:
        self.path, self.known = path, known
        self.columns: tuple[str, ...] = ()
        self.start = self.stop = self.line = 0
        self.digest = hashlib.md5(usedforsecurity=False)  # what VLMEvalKit names its files by
        self._lines_read = 0
        self._record: list[str] = []  # lines of the record being read
        self._reader = csv.reader(self._lines(stream), delimiter="\t", strict=True)

    def read(self) -> list[str] | None:
        """Fields of the next record, None at the end. Raises ValueError naming file and line."""
        while True:
            self.start, self.line = self.stop, self._lines_read + 1
            self._record.clear()
            try:
                fields = next(self._reader, None)
            except csv.Error as error:
                raise self._explained(error) from error
            if fields is None:
                return None
            if len(self._record) > 1:
                self._check_fields(fields)
            if len(fields) > 1 or any(field.strip() for field in fields):
                return fields

    def error(self, message: str, line: int | None = None) -> ValueError:
        return ValueError(f"{self.path} line {line or self.line}: {message}")

    def _lines(self, stream: BinaryIO) -> Iterator[str]:
        for line in stream:  # bytes are split at b"\n" only
            if len(self._record) > 1:  # a quote is still open: the last line lay inside it
                self._check_inside(self._record[-1])
            begin, self.stop = self.stop, self.stop + len(line)
            self._lines_read += 1
            self.digest.update(line)
            try:
                text = line.decode("utf-8" if begin else "utf-8-sig")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{self.path} is not UTF-8 text at byte {begin + error.start}; it is no TSV "
                    "file of a benchmark, or the download is damaged"
                ) from error
            self._record.append(text)
            yield text

    def _explained(self, error: csv.Error) -> ValueError:
        text = "".join(self._record)
        opened, closed = _misplaced_quote(text)
        if opened is not None:
            line = self.line + text.count("\n", 0, opened)
            what = "that is never closed"
            if closed is not None:
                what = f"that is closed in line {self.line + text.count(chr(10), 0, closed)} "
                what += f"before {text[closed + 1 : closed + 13]!r}"
            return self.error(f"a field opens with a quote {what}; {_QUOTING}", line)
        if "\r" in text.rstrip("\r\n"):
            return self.error(
                "a carriage return (CR) stands outside quotes; lines end with LF or CRLF: save "
                "the file with such line ends"
            )
        return self.error(str(error))

    # A quote before a question, and another one some rows later that happens to close it, make
    # one field of all that lies between. Such a field holds whole records, pictures included.

    def _swallowed(self, opened: int, line: int) -> ValueError:
        return self.error(
            f"a field opens with a quote that is not closed before the record in line {line}; "
            f"{_QUOTING}",
            opened,
        )

    def _check_inside(self, line: str) -> None:
        """Raises ValueError if a line inside a quoted field is a record of its own."""
        if '"' in line.replace('""', ""):
            return  # one field ends in it, another begins
        if self._is_record(_cells(self.columns, line)):
            text = "".join(self._record)
            opened = text.count("\n", 0, _misplaced_quote(text)[0])
            raise self._swallowed(self.line + opened, self._lines_read)

    def _check_fields(self, fields: list[str]) -> None:
        """Raises ValueError if a field of several lines holds the end of this record, up to the
        last column, and the beginning of another one."""
        line = self.line
        for place, (name, field) in enumerate(zip(self.columns, fields, strict=False)):
            first, *others = field.split("\n")
            if others:
                end = _cells(self.columns[place:], first)
                begin = _cells(self.columns[: place + 1], others[-1])
                inside = {**end, **begin, name: ""}  # its own text may be base64 in several lines
                more = len(fields) - len(self.columns)
                if more > 0 or (more < 0 and "\t" in field) or self._is_record(inside):
                    raise self._swallowed(line, line + len(others))
            line += len(others)

    def _is_record(self, cells: Mapping[str, str]) -> bool:
        """Whether cells that stand in a text are a row's: with a picture, or with a number of its
        own, words (a table of numbers has none) and the picture of a row before."""
        if any(looks.search(cells.get(name, "")) for name, looks in _PICTURES.items()):
            return True
        index = plain_index(cells.get("index", ""))
        words = re.search(r"[^\W\d_]", cells.get("question", "") + cells.get("answer", ""))
        image = plain_index(cells.get("image", ""))
        this = plain_index(_cells(self.columns, self._record[0]).get("index", ""))
        shared = image in self.known or image == this != ""
        return shared and index.isdigit() and index not in self.known and words is not None


def _cells(columns: Sequence[str], line: str) -> dict[str, str]:
    """Cells of a line by column, {} if it has not as many."""
    cells = line.rstrip("\r\n").split("\t")
    return dict(zip(columns, cells, strict=True)) if len(cells) == len(columns) else {}


def _misplaced_quote(text: str) -> tuple[int | None, int | None]:
    """Where a field of a record opens with a quote that does not end it, and where that is closed.

    (None, None): every quoted field is well formed. (place, None): never closed.
    """
    at = 0
    while at < len(text):
        if text[at] != '"':
            end = re.compile(r"[\t\n]").search(text, at)
            if end is None or end[0] == "\n":
                break
            at = end.end()
            continue
        close = text.find('"', at + 1)
        while text[close + 1 : close + 2] == '"' and close >= 0:
            close = text.find('"', close + 2)
        if close < 0:
            return at, None
        if text[close + 1 : close + 2] not in ("", "\t", "\r", "\n"):
            return at, close
        at = close + 2
    return None, None


class TsvDataset:
    """Rows of one TSV file; only the places of its records are kept in memory.

    Values of a row are strings by column name, empty ones left out; `image` is resolved to the
    row that holds it.

    Raises ValueError (on construction) for a missing or damaged file, misplaced quotes and other
    line ends, missing or repeated columns, an index that is empty or stands twice, or no rows.
    """

    def __init__(self, name: str, file: str | Path) -> None:
        self.name = name
        self.path = Path(file)
        self.files = (str(file),)
        csv.field_size_limit(2**31 - 1)
        check_file(file)
        self._spans: list[tuple[int, int]] = []
        self._places: dict[str, int] = {}  # index -> row
        try:
            with self.path.open("rb") as stream:
                self._scan(_Records(stream, self.path, self._places))
        except OSError as error:
            raise self._unreadable(error) from error
        if not self._spans:
            raise ValueError(f"{self.path} has a header but no rows; download it again")

    def _unreadable(self, error: OSError) -> ValueError:
        return ValueError(f"{self.path} cannot be read: {error.strerror or error}")

    def _scan(self, records: _Records) -> None:
        self.columns = records.columns = tuple(records.read() or ())
        self._check_columns()
        at = self.columns.index("index")
        while (fields := records.read()) is not None:
            index = plain_index(fields[at]) if at < len(fields) else ""
            if index in ("", "nan"):
                raise records.error("column index is empty; each row needs an index of its own")
            if index in self._places:
                raise records.error(
                    f"index {index!r} stands twice, first in record {self._places[index]}; each "
                    "row needs an index of its own"
                )
            self._places[index] = len(self._spans)
            self._spans.append((records.start, records.stop))
        self.md5 = records.digest.hexdigest()

    def _check_columns(self) -> None:
        missing = [name for name in ("index", "question", "answer") if name not in self.columns]
        if not {"image", "image_path"} & set(self.columns):
            missing.append("image (or image_path)")
        if missing:
            raise ValueError(
                f"{self.path} is no benchmark in VLMEvalKit's format: columns {', '.join(missing)} "
                f"are missing; found {', '.join(self.columns)[:200] or 'none'}"
            )
        twice = [name for name in dict.fromkeys(self.columns) if self.columns.count(name) > 1]
        if any(twice):  # several without a name are pandas' row numbers
            raise ValueError(
                f"{self.path}: column {', '.join(filter(None, twice))} stands twice in the header; "
                "remove or rename one"
            )

    def __len__(self) -> int:
        return len(self._spans)

    def locate(self, index: int) -> tuple[str, int]:
        """File of a row and its place in it (records after the header, from 0)."""
        assert 0 <= index < len(self), (index, len(self))
        return self.files[0], index

    def _record(self, row: int) -> dict[str, str]:
        begin, end = self._spans[row]
        try:
            with self.path.open("rb") as stream:
                stream.seek(begin)
                data = stream.read(end - begin)
            if len(data) < end - begin:
                raise ValueError("the file is shorter now")
            (fields,) = csv.reader([data.decode("utf-8")], delimiter="\t", strict=True)
        except OSError as error:
            raise self._unreadable(error) from error
        except (csv.Error, ValueError) as error:
            raise ValueError(
                f"{self.path} record {row} is not what it was when the file was opened; do not "
                "change a file while it is read"
            ) from error
        count = len(self.columns)
        # A short record lacks its last columns, unless quotes that belong to a text joined fields.
        if len(fields) > count or (len(fields) < count and any("\t" in f for f in fields)):
            raise BadRow(
                "wrong_columns",
                f"{len(fields)} fields under {count} columns",
                file=self.files[0],
                row=row,
            )
        pairs = zip(self.columns, fields, strict=False)
        return {name: field for name, field in pairs if not _is_absent(name, field)}

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


def _is_absent(column: str, text: str) -> bool:
    text = text.strip()
    return is_blank(text) or (text == "nan" and column not in _TEXTS)


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
        except (ValueError, SyntaxError, MemoryError, RecursionError):
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
    values: Mapping[str, Any] = row.values
    try:
        if values.get("image"):
            cells = as_list(values["image"])
            return [decode_image(_decode_base64(cell)) for cell in cells]
        if not values.get("image_path"):
            raise row.bad("missing_image", "neither image nor image_path holds anything")
        return [decode_image(_find(path, row)) for path in as_list(values["image_path"])]
    except OSError as error:
        raise row.bad("missing_image", str(error)) from error
    except BadRow:
        raise
    except (binascii.Error, ValueError) as error:
        raise row.bad("broken_image", str(error)) from error


def _decode_base64(cell: str) -> bytes:
    """Bytes of a cell: either alphabet of RFC 4648, padded or not, in any number of lines, with or
    without a data URL's head.

    Raises:
        binascii.Error: no base64.
    """
    head, comma, rest = cell.partition(",")
    text = unquote(rest) if comma and head.strip().lower().startswith("data:") else cell
    text = "".join(text.split()).translate(str.maketrans("-_", "+/")).rstrip("=")
    return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)


def _find(path: str, row: Row) -> Path:
    folder = Path(row.file).parent
    for candidate in (Path(path), folder / path, folder / "images" / row.dataset / path):
        if os.path.isfile(candidate):
            return candidate
    raise FileNotFoundError(f"image file {path} is neither there nor beside {row.file}")
