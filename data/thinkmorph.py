# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""One row of a ThinkMorph parquet file and what a sample made of it holds.

Columns as released: `pid`, `question`, `answer`, `problem_image_0`, `resoning_thought_i` (that is
how the files spell it; `reasoning_thought_i` is accepted too), `reasoning_image_i` for i = 0..7
(the visual thoughts) and `full_text_only_thought` (the text-only trace). Generated worlds add
`world` and `world_state`, from which their scorers check an answer.
"""

from __future__ import annotations

import hashlib
import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from functools import partial
from pathlib import PurePath
from typing import Any, Literal, Protocol

import pyarrow as pa
from PIL import Image

from data.transforms import decode_image
from data.worlds import check_world

MAX_INDEX = 7
PROBLEM_IMAGE = "problem_image_0"
TEXT_TRACE = "full_text_only_thought"
IMAGE_COLUMNS = tuple(f"reasoning_image_{i}" for i in range(MAX_INDEX + 1))
WORLD_COLUMNS = ("world", "world_state")
# Spellings of each thought, the released one first.
THOUGHT_COLUMNS = tuple(
    (f"resoning_thought_{i}", f"reasoning_thought_{i}") for i in range(MAX_INDEX + 1)
)
_ALWAYS = ("question", "answer", PROBLEM_IMAGE)
# Fields of `RowNeeds`, the columns of each, and what to call them where none is there.
_PARTS = (
    ("visual_thoughts", IMAGE_COLUMNS, f"reasoning_image_0 (or any up to _{MAX_INDEX})"),
    ("thoughts", sum(THOUGHT_COLUMNS, ()), "resoning_thought_0 or reasoning_thought_0"),
    ("text_trace", (TEXT_TRACE,), TEXT_TRACE),
)

Need = Literal["required", "optional", "unused"]


@dataclass(frozen=True, kw_only=True)
class RowNeeds:
    """What a use of the data asks of a row beyond question, answer and problem image.

    Per part: "required" (a row without it is bad), "optional" (read if there) or "unused" (its
    column is not even read, which for the images saves most of the bytes).
    """

    visual_thoughts: Need = "unused"
    text_trace: Need = "unused"
    thoughts: Need = "unused"


EVALUATION_ROWS = RowNeeds()
WHOLE_ROWS = RowNeeds(visual_thoughts="optional", text_trace="optional", thoughts="optional")
OPSD_ROWS = replace(WHOLE_ROWS, visual_thoughts="required")
SFT_ROWS = RowNeeds(text_trace="required")
INTERLEAVED_ROWS = RowNeeds(visual_thoughts="required", thoughts="required")


class RowReader(Protocol):
    """Rows of one dataset by number."""

    def __len__(self) -> int: ...

    def read_row(self, index: int, position: int = -1) -> Row: ...


@dataclass(frozen=True)
class Row:
    """A row as read: column values, and where it comes from.

    `row` counts inside `file`; `position` is the global place in the training order (step *
    global batch size + slot), or -1 for rows read in file order. Random numbers that belong to a
    row of a step are keyed by it: the same row can occur twice in one step. `source` holds the
    other rows of its dataset, for uses that show a row what belongs to another.
    """

    dataset: str
    file: str
    row: int
    values: Mapping[str, Any] = field(repr=False)
    position: int = -1
    source: RowReader | None = field(default=None, repr=False, compare=False)

    def bad(self, reason: str, detail: str) -> BadRow:
        """The error that says why this row cannot be used."""
        return BadRow(reason, detail, file=self.file, row=self.row)


@dataclass(frozen=True)
class Sample:
    """One training or evaluation example.

    `thought_images` are the visual thoughts (VTs), `thoughts` the texts around them, `text_trace`
    the text-only reasoning ("" if absent or unused), `world` and `world_state` what a generated
    world's scorer needs (None elsewhere). All images are RGB.
    """

    dataset: str
    file: str
    row: int
    pid: str
    question: str
    answer: str
    problem_image: Image.Image
    thought_images: tuple[Image.Image, ...] = ()
    thoughts: tuple[str, ...] = ()
    text_trace: str = ""
    world: str | None = None
    world_state: str | None = None


class BadRow(ValueError):
    """A row that cannot be used: `.reason` is a short slug, `.detail` says what was found.

    Reasons raised here: missing_question, missing_answer, wrong_type, missing_image, broken_image,
    no_visual_thought, no_text_trace, no_thought, bad_world. Whoever prepares rows may add reasons.
    """

    def __init__(self, reason: str, detail: str, *, file: str = "", row: int = -1) -> None:
        detail = " ".join(detail.split())  # the libraries' errors may have lines
        super().__init__(f"{file}:{row}: {reason}: {detail}" if file else detail)
        self.reason, self.detail, self.file, self.row = reason, detail, file, row

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions pickle by their message alone; this one crosses process borders.
        return partial(BadRow, file=self.file, row=self.row), (self.reason, self.detail)


@dataclass(frozen=True)
class SchemaReport:
    """Columns of a file that this project uses, and what stands in the way."""

    used: tuple[str, ...]
    missing: tuple[str, ...]
    wrong_type: tuple[str, ...]
    found: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.missing and not self.wrong_type


def _is_any(kind: pa.DataType, *names: str) -> bool:
    """Whether a type is one of Arrow's, be it stored as a dictionary or named by an extension."""
    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return any(getattr(pa.types, f"is_{name}")(kind) for name in names)


_TEXT = ("string", "large_string", "string_view", "null")
_BYTES = ("binary", "large_binary", "binary_view", "null")
_NUMBER = ("integer", "floating", "decimal")


def _column_problem(schema: pa.Schema, name: str) -> str | None:
    """What is wrong with a column that is used."""
    if (count := schema.names.count(name)) > 1:
        return f"{name} stands {count} times"
    kind = schema.field(name).type
    if name == PROBLEM_IMAGE or name in IMAGE_COLUMNS:
        expected = "a struct with a binary field `bytes`"
        if pa.types.is_struct(kind):
            fields = [field.name for field in kind]
            if len(set(fields)) < len(fields):
                return f"{name} is {kind}, in which a field stands twice"
            good = "bytes" in fields and _is_any(kind.field("bytes").type, *_BYTES)
        else:
            good = _is_any(kind, *_BYTES)
    elif name in ("pid", "answer"):
        expected, good = "text or a number", _is_any(kind, *_TEXT, *_NUMBER)
    else:
        expected, good = "a string", _is_any(kind, *_TEXT)
    return None if good else f"{name} is {kind}, expected {expected}"


def inspect_schema(schema: pa.Schema, needs: RowNeeds = OPSD_ROWS) -> SchemaReport:
    """Which columns of a file are used under `needs`, which are missing or of the wrong type."""
    names = set(schema.names)
    wanted = ["pid", *_ALWAYS]
    missing = [name for name in _ALWAYS if name not in names]
    for part, columns, title in _PARTS:
        need: Need = getattr(needs, part)
        if need != "unused":
            wanted += columns
        if need == "required" and names.isdisjoint(columns):
            missing.append(title)
    used = tuple(name for name in (*wanted, *WORLD_COLUMNS) if name in names)
    problems = (_column_problem(schema, name) for name in used)
    wrong = tuple(problem for problem in problems if problem is not None)
    return SchemaReport(used, tuple(missing), wrong, tuple(schema.names))


def check_schema(schema: pa.Schema, needs: RowNeeds = OPSD_ROWS, *, where: str) -> tuple[str, ...]:
    """Columns to read from a file. Raises ValueError naming missing, wrong and found columns."""
    report = inspect_schema(schema, needs)
    if not report.ok:
        problems = []
        if report.missing:
            problems.append(f"missing columns: {', '.join(report.missing)}")
        problems += report.wrong_type
        raise ValueError(
            f"{where} is not ThinkMorph-schema parquet: {'; '.join(problems)}. "
            f"Columns found: {', '.join(report.found) or 'none'}. "
            f"Inspect it with `python -m data.check {where}`."
        )
    return report.used


def is_blank(text: str) -> bool:
    """Whether a text shows nothing: blanks, zero-width and control characters."""
    return all(c.isspace() or unicodedata.category(c) in ("Cc", "Cf") for c in text)


def _text(row: Row, column: str) -> str:
    """Text or number of a cell as text, "" if it is empty or no finite number. Raises BadRow."""
    value = row.values.get(column)
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int | float | Decimal):
        found = type(value).__name__
        raise row.bad("wrong_type", f"column {column} holds {found}, expected text or a number")
    return format(value, "f") if isinstance(value, Decimal) else str(value)


def row_image(row: Row, column: str) -> Image.Image | None:
    """RGB image of a column, None if the cell is empty. Raises BadRow."""
    value = row.values.get(column)
    data = value
    if isinstance(value, Mapping):
        data = value.get("bytes")
        if not data and value.get("path"):
            path = value["path"]
            raise row.bad("missing_image", f"{column} holds the path {path!r} but no bytes")
    if not data:
        return None
    try:
        return decode_image(bytes(data))
    except ValueError as error:
        raise row.bad("broken_image", f"{column}: {error}") from error


def full_text(row: Row, column: str) -> str:
    """Text of a column. Raises BadRow if it is blank."""
    text = _text(row, column)
    if is_blank(text):
        raise row.bad(f"missing_{column}", f"column {column} is empty")
    return text


def thought_images(row: Row) -> tuple[Image.Image, ...]:
    """The visual thoughts there are, RGB. Raises BadRow."""
    images = (row_image(row, name) for name in IMAGE_COLUMNS)
    return tuple(image for image in images if image is not None)


def _thoughts(row: Row) -> tuple[str, ...]:
    """Texts of the thoughts that there are, of each the first spelling that holds one."""
    found: list[str] = []
    for spellings in THOUGHT_COLUMNS:
        candidates = (_text(row, name) for name in spellings)
        found += [text for text in candidates if text.strip()][:1]
    return tuple(found)


def _world(row: Row) -> tuple[str | None, str | None]:
    """World and its state, checked here so that nothing is answered that cannot be judged."""
    world, state = (_text(row, name) for name in WORLD_COLUMNS)
    if world or (state and row.values.get("world") is not None):
        try:
            check_world(world, state)
        except ValueError as error:
            raise row.bad("bad_world", str(error)) from error
    return world or None, state or None


def row_digest(row: Row, columns: Sequence[str]) -> str:
    """Digest of the cells of some columns; image cells count by their bytes."""
    digest = hashlib.blake2b(digest_size=8)
    for column in columns:
        value = row.values.get(column)
        if isinstance(value, Mapping):
            value = value.get("bytes")
        data = value if isinstance(value, bytes) else str("" if value is None else value).encode()
        digest.update(f"{column} {len(data)} ".encode() + data)
    return digest.hexdigest()


def parse_row(row: Row, needs: RowNeeds = OPSD_ROWS) -> Sample:
    """The sample of a row, images decoded.

    All `reasoning_image_i` present become visual thoughts in the order of i; gaps are allowed.
    Raises BadRow (see there for the reasons).
    """

    def require(need: Need, found: object, reason: str, detail: str) -> None:
        if need == "required" and not found:
            raise row.bad(reason, detail)

    question, answer = full_text(row, "question"), full_text(row, "answer")
    problem = row_image(row, PROBLEM_IMAGE)
    if problem is None:
        raise row.bad("missing_image", f"column {PROBLEM_IMAGE} is empty")
    images = () if needs.visual_thoughts == "unused" else thought_images(row)
    missing = "no reasoning_image_i holds an image"
    require(needs.visual_thoughts, images, "no_visual_thought", missing)
    trace = "" if needs.text_trace == "unused" else _text(row, TEXT_TRACE)
    require(needs.text_trace, trace.strip(), "no_text_trace", f"column {TEXT_TRACE} is empty")
    thoughts = () if needs.thoughts == "unused" else _thoughts(row)
    require(needs.thoughts, thoughts, "no_thought", "no resoning_thought_i holds text")
    world, world_state = _world(row)
    return Sample(
        dataset=row.dataset,
        file=row.file,
        row=row.row,
        pid=_text(row, "pid") or f"{PurePath(row.file).stem}:{row.row}",
        question=question,
        answer=answer,
        problem_image=problem,
        thought_images=images,
        thoughts=thoughts,
        text_trace=trace,
        world=world,
        world_state=world_state,
    )
