# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""TSV files as people write them: what ends a record, stray quotes, repeated names, base64."""

from __future__ import annotations

import base64
import random
import string
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from data.thinkmorph import BadRow
from data.tsv import TsvDataset, plain_index, tsv_images
from tests.visual_opsd.evaluation.tsv_files import base64_png, picture, write_tsv

COLUMNS = ("index", "question", "A", "B", "answer", "image")
IMAGE = base64_png(picture(1))
LINE_ENDS = {"LF": "\n", "CRLF": "\r\n"}
SEPARATORS = ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x1f", "\u00a0",
              "\ufeff", "\x00"]  # fmt: skip


def cells(index: int, /, **changes: str) -> list[str]:
    """Row `index`; its picture is that of the row before, unless it is the first of ten."""
    image = IMAGE if index % 10 == 0 else str(index - index % 10)
    values = {"index": str(index), "question": f"What is shown in {index}?", "A": "one", "B": "two",
              "answer": "A", "image": image, **changes}  # fmt: skip
    return [values[name] for name in COLUMNS]


def write(
    path: Path, rows: Sequence[Sequence[str]], columns: Sequence[str] = COLUMNS, end: str = "\n"
) -> Path:
    """Rows as they stand, nothing quoted."""
    lines = ["\t".join(row) for row in (columns, *rows)]
    path.write_bytes("".join(line + end for line in lines).encode())
    return path


def error_of(path: Path) -> str:
    with pytest.raises(ValueError) as caught:
        TsvDataset("Own", path)
    message = str(caught.value)
    assert not isinstance(caught.value, BadRow) and str(path) in message and "\n" not in message
    return message


# ---------------------------------------------------------------------------------- records


@pytest.mark.parametrize("end", LINE_ENDS.values(), ids=LINE_ENDS)
@pytest.mark.parametrize("quoted", [False, True])
def test_only_line_ends_separate(tmp_path: Path, end: str, quoted: bool) -> None:
    """A separator of Unicode or ASCII is text, in the last column too."""
    text = "first" + "half".join(SEPARATORS) + "second"
    columns = ("index", "image", "answer", "question")
    rows = [["0", IMAGE, "x", text], ["1", "0", text, "last"]]
    if quoted:
        rows = [[f'"{cell}"' for cell in row] for row in rows]
    dataset = TsvDataset("Own", write(tmp_path / "Own.tsv", rows, columns, end))
    assert len(dataset) == 2
    assert dataset.read_row(0).values["question"] == text
    assert dataset.read_row(1).values["answer"] == text
    assert dataset.read_row(1).values["image"] == IMAGE


@pytest.mark.parametrize("end", LINE_ENDS.values(), ids=LINE_ENDS)
def test_quoted_fields_hold_what_they_like(tmp_path: Path, end: str) -> None:
    table = f'He said ""so"":{end}1\t2\t3\t4\t5\t6{end}{end}2\t4\t6\t8\tA\t0\rend'
    rows = [cells(0), cells(1, question=f'"{table}"', A='5" by 3"', B='a "b" c'),
            cells(2, image='"' + end.join(IMAGE[i:i + 76] for i in range(0, len(IMAGE), 76)) + '"'),
            [" "], [""], cells(3, question='""', A='"""quoted"""')]  # fmt: skip
    path = write(tmp_path / "Own.tsv", rows, end=end)
    path.write_bytes(path.read_bytes().removesuffix(end.encode()))
    dataset = TsvDataset("Own", path)
    assert len(dataset) == 4
    values = dataset.read_row(1).values
    assert values["question"] == table.replace('""', '"')
    assert (values["A"], values["B"]) == ('5" by 3"', 'a "b" c')
    (image,) = tsv_images(dataset.read_row(2))
    assert np.array_equal(np.asarray(image), np.asarray(picture(1)))
    assert dataset.read_row(3).values["A"] == '"quoted"'
    assert "question" not in dataset.read_row(3).values


def with_quotes(rows: int, **marks: tuple[int, str]) -> list[list[str]]:
    """Rows with `column=(row, text)` in place of the cell of a row."""
    made = [cells(index) for index in range(rows)]
    for column, (row, text) in marks.items():
        made[row][COLUMNS.index(column)] = text
    return made


@pytest.mark.parametrize("end", LINE_ENDS.values(), ids=LINE_ENDS)
@pytest.mark.parametrize("column", ["question", "A", "B", "answer"])
def test_an_unclosed_quote_names_its_line(tmp_path: Path, end: str, column: str) -> None:
    rows = with_quotes(300, **{column: (150, '"What')})
    message = error_of(write(tmp_path / "Own.tsv", rows, end=end))
    assert "line 152: a field opens with a quote that is not closed before the record" in message


def test_an_unclosed_quote_in_the_last_rows(tmp_path: Path) -> None:
    """Where nothing shows that records were swallowed, the end of the file does."""
    two = "two\nlines"
    for row, column in ((9, "question"), (9, "image"), (8, "B")):
        rows = with_quotes(10, **{column: (row, '"What')})
        rows[0][1] = f'"{two}"'
        message = error_of(write(tmp_path / "Own.tsv", rows))
        assert f"line {row + 3}: a field opens with a quote that is " in message
    rows = with_quotes(1, question=(0, '"He said ""so""'))
    assert "line 2: a field opens with a quote that is never closed" in error_of(
        write(tmp_path / "Own.tsv", rows)
    )
    (tmp_path / "Own.tsv").write_text('index\t"question\tanswer\timage\n0\ta\tb\tc\n')
    assert "line 1: a field opens with a quote that is never closed" in error_of(
        tmp_path / "Own.tsv"
    )


@pytest.mark.parametrize("references", [False, True])
@pytest.mark.parametrize("last", [151, 152, 299])
@pytest.mark.parametrize("closing", ['why?"', '"why?', 'why "here" now'])
def test_a_later_quote_does_not_hide_an_open_one(
    tmp_path: Path, references: bool, last: int, closing: str
) -> None:
    """149 rows in one field are no question, wherever the quote is that closes it."""
    rows = [cells(i) if references else cells(i, image=IMAGE) for i in range(300)]
    rows[150][1] = '"What'
    rows[last][1] = closing
    assert "line 152: a field opens with a quote that is " in error_of(
        write(tmp_path / "Own.tsv", rows)
    )


@pytest.mark.parametrize(
    "order",
    [
        ("index", "image", "question", "answer", "A", "B"),
        ("question", "A", "B", "answer", "index", "image"),
        ("image_path", "index", "A", "B", "answer", "question"),
    ],
)
@pytest.mark.parametrize("last", [151, 160])
def test_columns_in_any_order(tmp_path: Path, order: tuple[str, ...], last: int) -> None:
    rows = []
    for index in range(300):
        values = dict(zip(COLUMNS, cells(index, image=IMAGE), strict=True))
        values["image_path"] = f"pictures/{index}.jpg"
        rows.append([values[name] for name in order])
    dataset = TsvDataset("Own", write(tmp_path / "Own.tsv", rows, order))
    assert len(dataset) == 300
    at = order.index("question")
    rows[150][at], rows[last][at] = '"What', 'why?"'
    assert "line 152: a field opens" in error_of(write(tmp_path / "Own.tsv", rows, order))


def test_text_after_a_closing_quote(tmp_path: Path) -> None:
    rows = with_quotes(4, question=(2, '"Stop" is what sign?'))
    message = error_of(write(tmp_path / "Own.tsv", rows))
    assert "line 4: a field opens with a quote that is closed in line 4 before ' is what sig" in (
        message
    )


def test_a_quote_that_joins_fields_makes_a_bad_row(tmp_path: Path) -> None:
    rows = with_quotes(3, question=(1, '"What is'), A=(1, 'this?"'))
    dataset = TsvDataset("Own", write(tmp_path / "Own.tsv", rows))
    with pytest.raises(BadRow, match="wrong_columns: 5 fields under 6"):
        dataset.read_row(1)
    assert dataset.read_row(2).values["answer"] == "A"


def test_carriage_returns_alone(tmp_path: Path) -> None:
    rows = [cells(i) for i in range(3)]
    message = error_of(write(tmp_path / "Own.tsv", rows, end="\r"))
    assert "line 1: a carriage return (CR) stands outside quotes" in message
    rows[1][1] = "What is\rshown?"
    assert "line 3: a carriage return" in error_of(write(tmp_path / "Own.tsv", rows))


def test_other_encodings(tmp_path: Path) -> None:
    path = write(tmp_path / "Own.tsv", [cells(0, question="café?")])
    text = path.read_text(encoding="utf-8")
    for encoding, byte in (("utf-16", 0), ("latin-1", 37)):
        path.write_bytes(text.encode(encoding))
        assert f"is not UTF-8 text at byte {byte};" in error_of(path)


# ---------------------------------------------------------------------------------- names


def test_columns_and_indices_stand_once(tmp_path: Path) -> None:
    path = tmp_path / "Own.tsv"
    columns = ("index", "question", "A", "A", "answer", "image")
    assert "column A stands twice in the header" in error_of(write(path, [cells(0)], columns))
    assert "line 4: index '1' stands twice, first in record 1" in error_of(
        write(path, [cells(0), cells(1), cells(2, index=" 1.0")])
    )
    for empty in ("", "  ", "nan"):
        message = error_of(write(path, [cells(0), cells(1, index=empty)]))
        assert "line 3: column index is empty" in message
    short = ["question", "A", "B", "answer", "image", "index"]
    assert "line 2: column index is empty" in error_of(write(path, [["q", "one"]], short))
    unnamed = ["", "", *COLUMNS]  # what pandas writes beside a table, twice
    assert len(TsvDataset("Own", write(path, [["0", "0", *cells(0)]], unnamed))) == 1


@pytest.mark.parametrize("text", ["nan", "None", "NA", "null", "N/A", "NaN", "-"])
def test_texts_that_pandas_takes_for_nothing(tmp_path: Path, text: str) -> None:
    rows = [dict(zip(COLUMNS, cells(0, A=text, answer=text), strict=True), hint="nan", B="")]
    values = TsvDataset("Own", write_tsv(tmp_path / "Own.tsv", rows)).read_row(0).values
    assert (values["A"], values["answer"]) == (text, text)
    assert "B" not in values and "hint" not in values


# ---------------------------------------------------------------------------------- pictures


def data_url(text: str) -> str:
    return "data:image/png;base64," + text.replace("+", "%2B").replace("=", "%3D")


WRITTEN = {
    "unpadded": lambda text: text.rstrip("="),
    "overpadded": lambda text: text + "==",
    "URL-safe": lambda text: text.replace("+", "-").replace("/", "_"),
    "both": lambda text: text.replace("+", "-").replace("/", "_").rstrip("="),
    "in lines": lambda text: "\r\n".join(text[i : i + 76] for i in range(0, len(text), 76)),
    "data URL": data_url,
}


@pytest.mark.parametrize("change", WRITTEN.values(), ids=WRITTEN)
def test_base64_as_people_write_it(tmp_path: Path, change: Callable[[str], str]) -> None:
    for seed in range(3):
        text = base64_png(picture(seed, (9 + seed, 7)))
        rows = [{"index": 0, "question": "?", "answer": "x", "image": change(text)}]
        (image,) = tsv_images(TsvDataset("Own", write_tsv(tmp_path / "Own.tsv", rows)).read_row(0))
        assert np.array_equal(np.asarray(image), np.asarray(picture(seed, (9 + seed, 7))))


def test_a_picture_may_be_another_rows(tmp_path: Path) -> None:
    """Up to 64 characters are an index, whatever they are."""
    name = "i" * 64
    rows = [
        {"index": name, "question": "q", "answer": "a", "image": IMAGE},
        {"index": "7.0", "question": "q", "answer": "a", "image": name},
        {"index": "8", "question": "q", "answer": "a", "image": "7"},
    ]
    dataset = TsvDataset("b", write_tsv(tmp_path / "b.tsv", rows[:2]))
    assert dataset.read_row(1).values["image"] == IMAGE
    dangling = TsvDataset("c", write_tsv(tmp_path / "c.tsv", rows))
    with pytest.raises(BadRow, match="neither base64 nor the index of a row that holds one"):
        dangling.read_row(2)  # of a row that is itself somebody's


def test_plain_indices() -> None:
    given = ("7", " 7 ", "7.0", "7.00", "7.5", "7.05", "a.0", "007", ".0", "7.")
    expected = ["7", "7", "7", "7", "7.5", "7.05", "a.0", "007", ".0", "7"]
    assert [plain_index(text) for text in given] == expected


def test_what_is_no_base64_is_a_bad_row(tmp_path: Path) -> None:
    texts = ["A" * 81, "A" * 40 + "!" + "A" * 40, "A" * 40 + "=" + "A" * 40, "A" * 79 + "é",
             "[" * 5000, base64.b64encode(b"text" * 40).decode()]  # fmt: skip
    rows = [{"index": i, "question": "?", "answer": "x", "image": t} for i, t in enumerate(texts)]
    dataset = TsvDataset("Own", write_tsv(tmp_path / "Own.tsv", rows))
    for row in range(len(rows)):
        with pytest.raises(BadRow, match="broken_image"):
            tsv_images(dataset.read_row(row))


def test_image_paths_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "loop.png").symlink_to("loop.png")
    paths = ["x" * 5000, "folder.png", "loop.png", "a\x00b.png", "[" * 4000 + "]" * 4000]
    rows = [{"index": i, "question": "?", "answer": "x", "image_path": p}
            for i, p in enumerate(paths)]  # fmt: skip
    dataset = TsvDataset("Own", write_tsv(tmp_path / "Own.tsv", rows))
    for row in range(len(rows)):
        with pytest.raises(BadRow, match="missing_image"):
            tsv_images(dataset.read_row(row))


# ---------------------------------------------------------------------------------- the file


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "folder.tsv").mkdir()
    (tmp_path / "loop.tsv").symlink_to("loop.tsv")
    (tmp_path / "broken.tsv").symlink_to("nothing.tsv")
    assert "is a folder" in error_of(tmp_path / "folder.tsv")
    for name in ("loop.tsv", "broken.tsv"):
        assert "is a link to " in error_of(tmp_path / name)
    for name in ("x" * 5000, "a\x00b"):
        assert "does not exist" in error_of(tmp_path / name)
    with pytest.raises(ValueError, match=r"/caf\\xe9\.tsv: the name of this file is not UTF-8"):
        TsvDataset("Own", tmp_path / "caf\udce9.tsv")


def test_a_file_that_changes_while_it_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "Own.tsv", [cells(i) for i in range(20)])
    dataset = TsvDataset("Own", path)
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"Own\.tsv record 19 is not what it was"):
        dataset.read_row(19)
    path.unlink()
    with pytest.raises(ValueError, match=r"Own\.tsv cannot be read: No such file"):
        dataset.read_row(0)


def test_all_letters_are_options(tmp_path: Path) -> None:
    columns = ("index", "question", "answer", "image", *string.ascii_uppercase)
    row = ["0", "?", "Z", IMAGE, *["nan"] * 26]
    values = TsvDataset("Own", write(tmp_path / "Own.tsv", [row], columns)).read_row(0).values
    assert [values[letter] for letter in string.ascii_uppercase] == ["nan"] * 26


# ---------------------------------------------------------------------------------- at random


def random_columns(rng: random.Random) -> list[str]:
    columns = [*COLUMNS[:2], *COLUMNS[4:], *rng.sample(["A", "B", "C", "hint"], rng.randint(0, 4))]
    return rng.sample(columns, len(columns))


def random_text(rng: random.Random, columns: int) -> str:
    """Of one or several lines, with quotes or tabs, some a table as wide as the file."""
    widths = [2, columns - 1, columns]
    lines = [[str(rng.randint(0, 60)) for _ in range(rng.choice(widths))] for _ in range(3)]
    table = "\n".join(map("\t".join, lines))
    words = rng.choices(["what", '5"', '"so"', "left", *SEPARATORS], k=5)
    return rng.choice(["Table:\n" + table, table, 'one "1"\r\ntwo', f"a {' '.join(words)} b"])


def test_what_csv_writes_is_read_back(tmp_path: Path) -> None:
    """No false alarm: texts of several lines, with quotes, and tables of any number of columns."""
    for seed in range(60):
        rng = random.Random(seed)
        columns = random_columns(rng)
        rows = []
        for index in range(rng.randint(1, 20)):
            shared = IMAGE if index % 3 == 0 else str(rng.randrange(0, index, 3))
            fixed = {"index": str(index), "answer": rng.choice(["A", "7"]), "image": shared}
            rows.append(
                {name: fixed.get(name) or random_text(rng, len(columns)) for name in columns}
            )
        dataset = TsvDataset("Own", write_tsv(tmp_path / "Own.tsv", rows))
        assert len(dataset) == len(rows)
        for index, row in enumerate(rows):
            assert dataset.read_row(index).values == {**row, "image": IMAGE}


def test_a_stray_quote_never_loses_rows_unsaid(tmp_path: Path) -> None:
    for seed in range(100):
        rng = random.Random(seed)
        columns = random_columns(rng)
        texts = [name for name in columns if name not in ("index", "image")]
        rows = []
        for index in range(rng.randint(2, 30)):
            image = IMAGE if seed % 2 or index % 7 == 0 else str(index - index % 7)
            values = {"index": str(index), "answer": "A", "image": image}
            rows.append({name: values.get(name, f"what is {name}") for name in columns})
        first = rng.randrange(len(rows) - 1)
        name = rng.choice(texts)
        rows[first][name] = '"' + rows[first][name]
        if rng.random() < 0.8:
            second, name = rng.randrange(first + 1, len(rows)), rng.choice(texts)
            rows[second][name] = rng.choice(['{}"', '"{}', '"{}"', '{} "x" y']).format(
                rows[second][name]
            )
        message = error_of(write(tmp_path / "Own.tsv", [list(r.values()) for r in rows], columns))
        assert f"line {first + 2}: a field opens with a quote" in message
