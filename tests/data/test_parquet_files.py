# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Parquet files as people have them: types, names, links, and what a disk does meanwhile."""

from __future__ import annotations

import errno
import math
import os
import re
import shutil
from collections.abc import Callable
from datetime import date
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.check import main as check
from data.dataset_info import DatasetSource
from data.parquet import StepOrder, make_loader, open_sources
from data.rejects import Reject
from data.row_groups import ParquetDataset
from data.thinkmorph import EVALUATION_ROWS, WHOLE_ROWS, BadRow, Row, parse_row
from scripts.visual_opsd.evaluation.rows import open_data
from tests.data.synthetic import SCHEMA, good_row, prepare_all, write_dataset, write_parquet


def _pid(row: Row) -> str:
    return str(row.values["pid"])


def _odd_file(folder: Path, kind: str) -> tuple[Path, str]:
    """Something that ends in .parquet, and what is said of it."""
    path = folder / "train.parquet"
    if kind == "folder":
        write_parquet(path / "part-0.parquet", [good_row(0)])
        return path, "is a folder, not a file"
    if kind == "broken link":
        path.symlink_to("../blobs/0123")
        return path, r"is a link to \.\./blobs/0123, where no file is"
    if kind == "loop":
        path.symlink_to(path)
        return path, "is a link to .*, where no file is"
    if kind == "pipe":
        os.mkfifo(path)
        return path, "is no file that can be read twice"
    if kind == "empty file":
        path.touch()
        return path, "is not a readable parquet file"
    if kind == "Latin-1":
        path = Path(os.fsdecode(os.fsencode(folder) + b"/train-caf\xe9.parquet"))
        write_parquet(folder / "train.parquet", [good_row(0)]).rename(path)
        return path, r"train-caf\\xe9\.parquet: the name of this file is not UTF-8"
    if kind == "duplicate column":
        write_parquet(path, [good_row(0)])
        table = pq.read_table(path)
        pq.write_table(table.append_column("question", table["question"]), path)
        return (
            path,
            r"train\.parquet is not Think.*question stands 2 times|question stands 2 times \(train",
        )
    assert kind == "no rows"
    return write_parquet(path, []), r"has no rows: .*train\.parquet"


ODD = ["folder", "broken link", "loop", "pipe", "empty file", "Latin-1", "duplicate column",
       "no rows"]  # fmt: skip


def checked(arguments: list[str]) -> int | str | None:
    """The exit code of data.check, 2 for arguments that argparse refuses."""
    try:
        return check(arguments)
    except SystemExit as ended:
        return ended.code


@pytest.mark.parametrize("kind", ODD)
def test_what_is_no_data_is_named_everywhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    """One line with the path, from the loader of training, of evaluation and from data.check."""
    folder = tmp_path / "World" / "data"
    folder.mkdir(parents=True)
    path, said = _odd_file(folder, kind)

    def expect(make: Callable[[], object]) -> None:
        with pytest.raises(ValueError, match=said) as caught:
            make()
        assert "\n" not in str(caught.value) and not isinstance(caught.value, BadRow)

    expect(lambda: open_sources([DatasetSource("World")], root=tmp_path))
    expect(lambda: open_data("World", "train", tmp_path, EVALUATION_ROWS))
    expect(lambda: open_data(str(folder.parent), "train", None, EVALUATION_ROWS))
    if kind != "folder":
        expect(lambda: open_data(str(path), "train", None, EVALUATION_ROWS))
    for place in (folder.parent, path):
        if place != path or kind != "folder":
            assert checked(["--num_workers", "1", os.fspath(place)]) in (1, 2)
            printed = capsys.readouterr()
            assert re.search(f"{said}|must be .* in UTF-8", printed.out + printed.err)


def test_hidden_files_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_dataset(tmp_path, "World", rows=3)
    (good,) = (folder / "data").iterdir()
    for name in (f"._{good.name}", ".train.parquet"):
        (folder / "data" / name).write_bytes(b"\x00\x05\x16\x07")
    (source,) = open_sources([DatasetSource("World")], root=tmp_path)
    assert source.dataset.files == (str(good),)
    assert check(["--num_workers", "1", str(folder)]) == 0
    good.unlink()
    for make in (
        lambda: open_sources([DatasetSource("World")], root=tmp_path),
        lambda: open_data(str(folder), "train", None, EVALUATION_ROWS),
    ):
        with pytest.raises(ValueError, match=r"no parquet files but hidden ones.*\._train"):
            make()
    capsys.readouterr()
    assert check(["--num_workers", "1", str(folder)]) == 1
    assert "no parquet files but hidden ones" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name", ["x" * 5000, "x" * 300 + ".parquet", "a\x00b", "a\nb", "caf\udce9"]
)
def test_names_that_cannot_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    for make in (
        lambda: open_sources([DatasetSource(name)], root=tmp_path),
        lambda: open_sources([DatasetSource("World")], root=tmp_path / name),
        lambda: open_data(name, "train", tmp_path, EVALUATION_ROWS),
        lambda: open_data(str(tmp_path / name / "x"), "train", None, EVALUATION_ROWS),
    ):
        with pytest.raises(
            ValueError, match=r"unknown dataset|does not exist|is not UTF-8|is not at|in UTF-8"
        ):
            make()
    with pytest.raises((ValueError, SystemExit)) as refused:
        check([str(tmp_path / name)])
    said = str(refused.value) + capsys.readouterr().err
    assert re.search("does not exist|must be .* in UTF-8", said)


def test_a_disk_that_fails_is_an_error_and_not_a_bad_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_parquet(tmp_path / "a.parquet", [good_row(0)])
    dataset = ParquetDataset("X", [path])

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ESTALE, "[Errno 116] Error reading bytes from file. Detail: ...")

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", fail)
    with pytest.raises(ValueError, match=r"a\.parquet cannot be read: Stale file handle"):
        prepare_all(dataset, _pid)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_file_that_goes_away_in_training_is_named(tmp_path: Path, num_workers: int) -> None:
    folder = write_dataset(tmp_path, "World", rows=4)
    sources = open_sources([DatasetSource("World")], root=tmp_path)
    sampler = StepOrder(sources, 0, 2)
    shutil.rmtree(folder)
    with pytest.raises(ValueError, match=r"train-00000-of-00001\.parquet does not exist"):
        list(make_loader(sampler, _pid, total_steps=2, num_workers=num_workers))


# Other layouts of the same types; "narrow" means that Arrow's own conversion would show 0.1 as
# 0.10000000149011612.
LAYOUTS = {
    "plain": (pa.string(), pa.binary()),
    "large": (pa.large_string(), pa.large_binary()),
    "view": (pa.string_view(), pa.binary_view()),
    "dictionary": (pa.dictionary(pa.int32(), pa.string()), pa.dictionary(pa.int32(), pa.binary())),
}


@pytest.mark.parametrize("bare", [False, True], ids=["struct", "bytes"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_text_and_bytes(tmp_path: Path, layout: str, bare: bool) -> None:
    text, data = LAYOUTS[layout]
    images = {"problem_image_0", "reasoning_image_0"}
    columns = {}
    for name in SCHEMA.names:
        cells = [good_row(index)[name] for index in range(3)]
        if name not in images:
            columns[name] = pa.array(cells).cast(text)
            continue
        column = pa.array([cell["bytes"] for cell in cells], pa.binary()).cast(data)
        paths = pa.nulls(3, pa.string()).cast(text)
        columns[name] = (
            column if bare else pa.StructArray.from_arrays([column, paths], ["bytes", "path"])
        )
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    dataset = ParquetDataset("X", [tmp_path / "a.parquet"], WHOLE_ROWS)
    for index in range(3):
        sample, expected = parse_row(dataset.read_row(index), WHOLE_ROWS), good_row(index)
        assert (sample.question, sample.answer) == (expected["question"], expected["answer"])
        assert (sample.pid, sample.text_trace) == (expected["pid"], f"trace {index}")
        assert sample.problem_image.getpixel((0, 0)) == (index, 0, 1)
        assert sample.thought_images[0].getpixel((0, 0)) == (index, 0, 2)


NUMBERS = [
    (
        pa.array([0.1, 3.0, None, math.nan, math.inf], pa.float32()),
        ["0.1", "3.0", None, None, None],
    ),
    (pa.array([0.1, 2.5e-7], pa.float32()), ["0.1", "2.5e-07"]),
    (pa.array([0.1], pa.float32()).cast(pa.float16()), ["0.1"]),
    (pa.array([0.1, 1 / 3, math.nan]), ["0.1", "0.3333333333333333", None]),
    (pa.array([7, -1, None], pa.int8()), ["7", "-1", None]),
    (pa.array([2**63], pa.uint64()), ["9223372036854775808"]),
    (pa.array([7, 8]).dictionary_encode(), ["7", "8"]),
    (pa.array([Decimal("0.10"), Decimal(1000)], pa.decimal128(10, 2)), ["0.10", "1000.00"]),
    (pa.array(["nan", "None", "", " "]), ["nan", "None", None, None]),
    (pa.nulls(1), [None]),
]


def _with_answers(path: Path, answers: pa.Array, column: str = "answer") -> Path:
    write_parquet(path, (good_row(index) for index in range(len(answers))))
    table = pq.read_table(path)
    pq.write_table(table.set_column(table.schema.get_field_index(column), column, answers), path)
    return path


@pytest.mark.parametrize(("answers", "texts"), NUMBERS, ids=lambda v: str(getattr(v, "type", "")))
def test_answers_are_texts_or_numbers(
    tmp_path: Path, answers: pa.Array, texts: list[str | None]
) -> None:
    dataset = ParquetDataset("X", [_with_answers(tmp_path / "a.parquet", answers)])
    found = prepare_all(dataset, lambda row: parse_row(row).answer)
    assert [r.reason if isinstance(r, Reject) else r for r in found] == [
        "missing_answer" if text is None else text for text in texts
    ]
    dataset = ParquetDataset("X", [_with_answers(tmp_path / "b.parquet", answers, "pid")])
    for row, text in enumerate(texts):
        if text is not None:
            assert parse_row(dataset.read_row(row)).pid == text
        elif answers[row].as_py() not in ("", " "):
            assert parse_row(dataset.read_row(row)).pid == f"b:{row}"


OTHER_TYPES = [
    pa.array([b"L"]), pa.array([["L"]]), pa.array([[]], pa.list_(pa.string())), pa.array([True]),
    pa.array([{"a": "L"}]), pa.array([date(2026, 1, 1)]), pa.array([b"L"], pa.binary_view()),
    pa.array([[("a", "b")]], pa.map_(pa.string(), pa.string())), pa.array([b"L"], pa.binary(1)),
    pa.array([1], pa.timestamp("s")), pa.array([1], pa.duration("s")),
]  # fmt: skip


@pytest.mark.parametrize("column", ["answer", "pid", "question"])
@pytest.mark.parametrize("cells", OTHER_TYPES, ids=lambda cells: str(cells.type))
def test_other_types_are_refused(tmp_path: Path, cells: pa.Array, column: str) -> None:
    path = _with_answers(tmp_path / "a.parquet", cells, column)
    expected = "a string" if column == "question" else "text or a number"
    with pytest.raises(ValueError) as caught:
        ParquetDataset("X", [path])
    kind = pq.read_schema(path).field(column).type
    assert f"{column} is {kind}, expected {expected}" in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_field_twice_in_an_image(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [good_row(0)])
    table = pq.read_table(path)
    for names in (["bytes", "bytes"], ["bytes", "path", "path"]):
        data = [pa.array([b"x"]) if name == "bytes" else pa.array(["y"]) for name in names]
        column = pa.StructArray.from_arrays(data, names)
        at = table.schema.get_field_index("problem_image_0")
        pq.write_table(table.set_column(at, "problem_image_0", column), path)
        with pytest.raises(ValueError, match=r"problem_image_0 is struct<.*a field stands twice"):
            ParquetDataset("X", [path])


def test_columns_that_are_not_used_may_be_anything(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [good_row(0)])
    table = pq.read_table(path)
    for name in ("other", "other", "question.x", "question.x"):
        table = table.append_column(name, pa.array([[True]]))
    pq.write_table(table, path)
    dataset = ParquetDataset("X", [path])
    assert parse_row(dataset.read_row(0)).question == "question 0?"
    assert set(dataset.read_row(0).values) <= set(SCHEMA.names)
