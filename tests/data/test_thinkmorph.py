# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Rows of ThinkMorph parquet as samples: columns, requirements, reasons for rejecting a row."""

from __future__ import annotations

import io
import pickle
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image

from data.thinkmorph import (
    EVALUATION_ROWS,
    OPSD_ROWS,
    SFT_ROWS,
    WHOLE_ROWS,
    BadRow,
    Row,
    RowNeeds,
    check_schema,
    inspect_schema,
    parse_row,
)
from tests.data.synthetic import IMAGE, SCHEMA, good_row, image_cell, png, truncated_png


def _row(**changes: Any) -> Row:
    return Row("Jigsaw_Assembly", "some/train-0.parquet", 7, good_row(7, **changes))


def _float_tiff(value: float) -> bytes:
    stream = io.BytesIO()
    Image.new("F", (2, 2), value).save(stream, "TIFF")
    return stream.getvalue()


def test_row_becomes_sample() -> None:
    sample = parse_row(_row())
    assert (sample.dataset, sample.file, sample.row) == (
        "Jigsaw_Assembly",
        "some/train-0.parquet",
        7,
    )
    assert (sample.pid, sample.question, sample.answer) == ("pid-7", "question 7?", "answer 7")
    assert sample.thoughts == ("before 7", "after 7") and sample.text_trace == "trace 7"
    assert sample.problem_image.mode == "RGB" and sample.problem_image.size == (8, 6)
    assert sample.problem_image.getpixel((0, 0)) == (7, 0, 1)
    assert [image.getpixel((0, 0)) for image in sample.thought_images] == [(7, 0, 2)]
    assert sample.world_state is None


def test_images_and_thoughts_up_to_index_7_in_order_with_gaps() -> None:
    row = _row(
        reasoning_image_0=None,
        reasoning_image_3=image_cell(png((3, 3, 3))),
        reasoning_image_7=image_cell(png((7, 7, 7))),
        reasoning_image_8=image_cell(png((8, 8, 8))),
        resoning_thought_1=" ",
        resoning_thought_7="late",
    )
    sample = parse_row(row)
    colours = [image.getpixel((0, 0)) for image in sample.thought_images]
    assert colours == [(3, 3, 3), (7, 7, 7)]
    assert sample.thoughts == ("before 7", "late")


def test_both_spellings_of_the_thoughts() -> None:
    corrected = _row(
        resoning_thought_0=None,
        resoning_thought_1=None,
        reasoning_thought_0="first",
        reasoning_thought_1="second",
    )
    assert parse_row(corrected).thoughts == ("first", "second")
    both = _row(reasoning_thought_0="other spelling", reasoning_thought_2="third")
    assert parse_row(both).thoughts == ("before 7", "after 7", "third")


def test_transparent_images_turn_white_and_plain_bytes_are_read() -> None:
    clear = png((0, 0, 0, 0))
    sample = parse_row(_row(problem_image_0=image_cell(clear), reasoning_image_0=clear))
    assert sample.problem_image.getpixel((0, 0)) == (255, 255, 255)
    assert sample.thought_images[0].getpixel((0, 0)) == (255, 255, 255)


def test_world_columns_and_absent_pid() -> None:
    sample = parse_row(_row(pid=None, world="spatial_navigation", world_state="SF/FG", answer=3))
    assert sample.pid == "train-0:7" and sample.answer == "3"
    assert (sample.world, sample.world_state) == ("spatial_navigation", "SF/FG")
    # Columns that are there and empty, or of a data set that only calls one of them so.
    assert parse_row(_row(world="", world_state="")).world is None
    assert parse_row(_row(world=None, world_state="anything")).world is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"question": ""}, "missing_question"),
        ({"question": None}, "missing_question"),
        ({"answer": "  \n"}, "missing_answer"),
        ({"answer": "\u200b\ufeff \x00"}, "missing_answer"),
        ({"question": "\u2060\t"}, "missing_question"),
        ({"answer": float("nan")}, "missing_answer"),
        ({"answer": b"L"}, "wrong_type"),
        ({"answer": ["L"]}, "wrong_type"),
        ({"answer": True}, "wrong_type"),
        ({"pid": {"a": 1}}, "wrong_type"),
        ({"problem_image_0": None}, "missing_image"),
        ({"problem_image_0": image_cell(b"")}, "missing_image"),
        ({"problem_image_0": {"bytes": None, "path": "a.png"}}, "missing_image"),
        ({"reasoning_image_0": {"bytes": None, "path": "a.png"}}, "missing_image"),
        ({"problem_image_0": image_cell(truncated_png())}, "broken_image"),
        ({"problem_image_0": image_cell(b"no image")}, "broken_image"),
        ({"problem_image_0": image_cell(_float_tiff(float("nan")))}, "broken_image"),
        ({"reasoning_image_1": image_cell(b"%!PS-Adobe-3.0 EPSF-3.0\n")}, "broken_image"),
        ({"reasoning_image_0": image_cell(truncated_png())}, "broken_image"),
        ({"reasoning_image_0": image_cell(None)}, "no_visual_thought"),
        ({"world": "chess", "world_state": "SF/FG"}, "bad_world"),
        ({"world": "", "world_state": "SF/FG"}, "bad_world"),
        ({"world": "spatial_navigation"}, "bad_world"),
        ({"world": "spatial_navigation", "world_state": ""}, "bad_world"),
        ({"world": "spatial_navigation", "world_state": "{{{"}, "bad_world"),
        ({"world": "spatial_navigation", "world_state": "SF/F"}, "bad_world"),
        ({"world": "spatial_navigation", "world_state": "SFG"}, "bad_world"),
        ({"world": "spatial_navigation", "world_state": "SS/FG"}, "bad_world"),
        ({"world": "spatial_navigation", "world_state": "SF/FF"}, "bad_world"),
        ({"world": "spatial_navigation", "world_state": "SH/HG"}, "bad_world"),  # no way out
        ({"world": "spatial_navigation", "world_state": "/" * 100_000}, "bad_world"),
    ],
)
def test_reasons_of_bad_rows(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRow) as caught:
        parse_row(_row(**changes))
    bad = caught.value
    assert (bad.reason, bad.file, bad.row) == (reason, "some/train-0.parquet", 7)
    assert "some/train-0.parquet:7" in str(bad) and reason in str(bad)
    assert isinstance(bad, ValueError)


def test_what_a_use_requires() -> None:
    no_image = _row(reasoning_image_0=None)
    no_text = _row(full_text_only_thought=" ", resoning_thought_0=None, resoning_thought_1="")
    broken = _row(reasoning_image_0=image_cell(truncated_png()))

    assert parse_row(no_text, OPSD_ROWS).text_trace.strip() == ""
    for needs in (SFT_ROWS, EVALUATION_ROWS):
        # Unused visual thoughts are not even decoded.
        assert parse_row(broken if needs is SFT_ROWS else no_image, needs).thought_images == ()
    assert parse_row(_row(), SFT_ROWS).text_trace == "trace 7"
    with pytest.raises(BadRow, match="no_text_trace"):
        parse_row(no_text, SFT_ROWS)
    with pytest.raises(BadRow, match="no_thought"):
        parse_row(no_text, RowNeeds(thoughts="required"))
    sample = parse_row(no_image, WHOLE_ROWS)
    assert sample.thought_images == () and sample.thoughts == ("before 7", "after 7")


def test_what_a_bad_row_says_is_one_line() -> None:
    bad = BadRow("unreadable_row", "Couldn't deserialize:\ndon't know\r\n it", file="f", row=1)
    assert bad.detail == "Couldn't deserialize: don't know it"
    assert str(bad) == f"f:1: unreadable_row: {bad.detail}"


def test_bad_row_survives_pickling() -> None:
    bad = pickle.loads(pickle.dumps(BadRow("broken_image", "cut off", file="f", row=3)))
    assert (bad.reason, bad.detail, bad.file, bad.row) == ("broken_image", "cut off", "f", 3)
    assert str(bad) == "f:3: broken_image: cut off"


def test_schema_names_missing_and_found_columns() -> None:
    assert check_schema(SCHEMA, where="x.parquet") == (
        "pid",
        "question",
        "answer",
        "problem_image_0",
        "reasoning_image_0",
        "resoning_thought_0",
        "resoning_thought_1",
        "full_text_only_thought",
    )
    schema = pa.schema([("query", pa.string()), ("answer", pa.string()), ("image", IMAGE)])
    with pytest.raises(ValueError) as caught:
        check_schema(schema, where="x.parquet")
    message = str(caught.value)
    assert "x.parquet" in message and "Columns found: query, answer, image." in message
    assert "missing columns: question, problem_image_0, reasoning_image_0 (or any" in message


def test_schema_depends_on_the_use() -> None:
    text_only = pa.schema([field for field in SCHEMA if field.name != "reasoning_image_0"])
    with pytest.raises(ValueError, match="missing columns: reasoning_image_0"):
        check_schema(text_only, OPSD_ROWS, where="x")
    assert "full_text_only_thought" in check_schema(text_only, SFT_ROWS, where="x")
    # What is unused is not read.
    assert "reasoning_image_0" not in check_schema(SCHEMA, SFT_ROWS, where="x")
    assert check_schema(SCHEMA, EVALUATION_ROWS, where="x") == (
        "pid",
        "question",
        "answer",
        "problem_image_0",
    )
    no_trace = pa.schema([field for field in SCHEMA if field.name != "full_text_only_thought"])
    assert inspect_schema(no_trace, SFT_ROWS).missing == ("full_text_only_thought",)


def test_schema_checks_types() -> None:
    fields = {field.name: field.type for field in SCHEMA}
    wrong = pa.schema({**fields, "question": pa.int64(), "problem_image_0": pa.string()}.items())
    with pytest.raises(ValueError, match="question is int64, expected a string"):
        check_schema(wrong, where="x")
    with pytest.raises(ValueError, match="problem_image_0 is string, expected a struct"):
        check_schema(wrong, where="x")
    path_only = pa.struct([("path", pa.string())])
    assert not inspect_schema(pa.schema({**fields, "problem_image_0": path_only}.items())).ok
    other = {
        **fields,
        "question": pa.dictionary(pa.int32(), pa.string()),
        "answer": pa.int64(),
        "problem_image_0": pa.large_binary(),
        "reasoning_image_1": pa.null(),
    }
    assert inspect_schema(pa.schema(other.items())).ok
