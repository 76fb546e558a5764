# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""One row of a ThinkMorph parquet file and what a sample made of it holds.

Columns as released: `pid`, `question`, `answer`, `problem_image_0`, `resoning_thought_i` (that is
how the files spell it; `reasoning_thought_i` is accepted too), `reasoning_image_i` for i = 0..7
(the visual thoughts) and `full_text_only_thought` (the text-only trace). Generated worlds add
`world` and `world_state`, from which their scorers check an answer.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import PurePath
from typing import Any, Literal

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

Need = Literal["required", "optional", "unused"]


@dataclass(frozen=True)
class RowNeeds:
    """What a use of the data asks of a row beyond question, answer and problem image.

    Per part: "required" (a row without it is bad), "optional" (read if there) or "unused" (its
    column is not even read, which for the images saves most of the bytes).
    """

    visual_thoughts: Need = "required"
    text_trace: Need = "optional"
    thoughts: Need = "optional"


OPSD_ROWS = RowNeeds()
INTERLEAVED_ROWS = RowNeeds(text_trace="unused", thoughts="required")
SFT_ROWS = RowNeeds(visual_thoughts="unused", text_trace="required", thoughts="unused")
EVALUATION_ROWS = RowNeeds(visual_thoughts="unused", text_trace="unused", thoughts="unused")
WHOLE_ROWS = RowNeeds(visual_thoughts="optional", text_trace="optional", thoughts="optional")


@dataclass(frozen=True)
class Row:
    """A row as read: column values, and where it comes from.

    `row` counts inside `file`; `position` is the global place in the training order (step *
    global batch size + slot), or -1 for rows read in file order. Random numbers that belong to a
    row of a step are keyed by it: the same row can occur twice in one step.
    """

    dataset: str
    file: str
    row: int
    values: Mapping[str, Any] = field(repr=False)
    position: int = -1


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
        return _rebuild_bad_row, (self.reason, self.detail, self.file, self.row)


def _rebuild_bad_row(reason: str, detail: str, file: str, row: int) -> BadRow:
    return BadRow(reason, detail, file=file, row=row)


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


def _type_problem(name: str, kind: pa.DataType) -> str | None:
    """What is wrong with the type of a column that is used."""
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
    missing = [name for name in ("question", "answer", PROBLEM_IMAGE) if name not in names]
    used = [name for name in ("pid", "question", "answer", PROBLEM_IMAGE) if name in names]
    groups: tuple[tuple[Need, Iterable[str], str], ...] = (
        (needs.visual_thoughts, IMAGE_COLUMNS, f"reasoning_image_0 (or any up to _{MAX_INDEX})"),
        (needs.thoughts, (n for pair in THOUGHT_COLUMNS for n in pair),
         "resoning_thought_0 or reasoning_thought_0"),
        (needs.text_trace, (TEXT_TRACE,), TEXT_TRACE),
    )  # fmt: skip
    for need, columns, title in groups:
        present = [name for name in columns if name in names]
        if need != "unused":
            used += present
        if need == "required" and not present:
            missing.append(title)
    used += [name for name in WORLD_COLUMNS if name in names]
    twice = [name for name in used if schema.names.count(name) > 1]
    wrong = [f"{name} stands {schema.names.count(name)} times" for name in twice]
    problems = (_type_problem(n, schema.field(n).type) for n in used if n not in twice)
    wrong += [problem for problem in problems if problem is not None]
    return SchemaReport(tuple(used), tuple(missing), tuple(wrong), tuple(schema.names))


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
        raise BadRow(
            "wrong_type",
            f"column {column} holds {found}, expected text or a number",
            file=row.file,
            row=row.row,
        )
    return format(value, "f") if isinstance(value, Decimal) else str(value)


def row_image(row: Row, column: str) -> Image.Image | None:
    """RGB image of a column, None if the cell is empty. Raises BadRow."""
    value = row.values.get(column)
    data = value
    if isinstance(value, Mapping):
        data = value.get("bytes")
        if not data and value.get("path"):
            raise BadRow(
                "missing_image",
                f"{column} holds the path {value['path']!r} but no bytes",
                file=row.file,
                row=row.row,
            )
    if not data:
        return None
    try:
        return decode_image(bytes(data))
    except ValueError as error:
        raise BadRow("broken_image", f"{column}: {error}", file=row.file, row=row.row) from error


def _thoughts(row: Row) -> list[str]:
    """Texts of the thoughts that there are, of each the first spelling that holds one."""
    found: list[str] = []
    for spellings in THOUGHT_COLUMNS:
        candidates = (_text(row, name) for name in spellings)
        found += [text for text in candidates if text.strip()][:1]
    return found


def parse_row(row: Row, needs: RowNeeds = OPSD_ROWS) -> Sample:
    """The sample of a row, images decoded.

    All `reasoning_image_i` present become visual thoughts in the order of i; gaps are allowed.
    Raises BadRow (see there for the reasons).
    """

    def bad(reason: str, detail: str) -> BadRow:
        return BadRow(reason, detail, file=row.file, row=row.row)

    texts = {name: _text(row, name) for name in ("question", "answer")}
    for name, text in texts.items():
        if is_blank(text):
            raise bad(f"missing_{name}", f"column {name} is empty")
    problem = row_image(row, PROBLEM_IMAGE)
    if problem is None:
        raise bad("missing_image", f"column {PROBLEM_IMAGE} is empty")

    images: list[Image.Image] = []
    if needs.visual_thoughts != "unused":
        images = [image for name in IMAGE_COLUMNS if (image := row_image(row, name)) is not None]
    if needs.visual_thoughts == "required" and not images:
        raise bad("no_visual_thought", "no reasoning_image_i holds an image")

    trace = "" if needs.text_trace == "unused" else _text(row, TEXT_TRACE)
    if needs.text_trace == "required" and not trace.strip():
        raise bad("no_text_trace", f"column {TEXT_TRACE} is empty")

    thoughts = [] if needs.thoughts == "unused" else _thoughts(row)
    if needs.thoughts == "required" and not thoughts:
        raise bad("no_thought", "no resoning_thought_i holds text")

    world, state = (_text(row, name) for name in WORLD_COLUMNS)
    if world or (state and row.values.get("world") is not None):
        try:  # here, so that nothing is answered that cannot be judged
            check_world(world, state)
        except ValueError as error:
            raise bad("bad_world", str(error)) from error

    pid = _text(row, "pid") or f"{PurePath(row.file).stem}:{row.row}"
    return Sample(
        dataset=row.dataset,
        file=row.file,
        row=row.row,
        pid=pid,
        question=texts["question"],
        answer=texts["answer"],
        problem_image=problem,
        thought_images=tuple(images),
        thoughts=tuple(thoughts),
        text_trace=trace,
        world=world or None,
        world_state=state or None,
    )
