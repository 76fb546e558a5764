# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Parquet: every column in types that nobody meant, cells of all sorts, and damaged files."""

from __future__ import annotations

import datetime
import decimal
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.data.synthetic import IMAGE, SCHEMA, good_row, png, write_parquet
from tests.hostile.programs import rows_of
from tests.hostile.runner import Case, Judge

ROWS = 6
TEXT_TYPES = {
    "string": pa.string(),
    "large_string": pa.large_string(),
    "string_view": pa.string_view(),
    "dictionary": pa.dictionary(pa.int32(), pa.string()),
    "dictionary_large": pa.dictionary(pa.int8(), pa.large_string()),
}
# Type -> a value of it and what an answer of it may be read as (none: it must be a bad row).
OTHER_TYPES: dict[str, tuple[pa.DataType, Any, tuple[str, ...]]] = {
    "int8": (pa.int8(), 7, ("7",)),
    "int64": (pa.int64(), 12, ("12",)),
    "uint64": (pa.uint64(), 2**63 + 1, (str(2**63 + 1),)),
    "float16": (pa.float16(), np.float16(0.5), ("0.5",)),
    "float32": (pa.float32(), 0.1, ("0.1",)),
    "float64": (pa.float64(), 0.1, ("0.1",)),
    "float_nan": (pa.float64(), float("nan"), ()),
    "float_inf": (pa.float32(), float("inf"), ()),
    "decimal": (pa.decimal128(5, 2), decimal.Decimal("1.50"), ("1.50", "1.5")),
    "bool": (pa.bool_(), True, ("True", "true")),
    "binary": (pa.binary(), b"L", ()),
    "binary_view": (pa.binary_view(), b"L", ()),
    "fixed_binary": (pa.binary(1), b"L", ()),
    "list": (pa.list_(pa.string()), ["L"], ()),
    "empty_list": (pa.list_(pa.string()), [], ()),
    "large_list": (pa.large_list(pa.string()), ["L"], ()),
    "struct": (pa.struct([("a", pa.string())]), {"a": "L"}, ()),
    "map": (pa.map_(pa.string(), pa.string()), [("a", "L")], ()),
    "date": (pa.date32(), datetime.date(2026, 1, 2), ()),
    "timestamp": (pa.timestamp("us"), datetime.datetime(2026, 1, 2), ()),
    "duration": (pa.duration("s"), datetime.timedelta(seconds=3), ()),
    "time": (pa.time64("us"), datetime.time(1, 2), ()),
    "null": (pa.null(), None, ()),
    "dictionary_int": (pa.dictionary(pa.int8(), pa.int64()), 12, ("12",)),
    "dictionary_binary": (pa.dictionary(pa.int8(), pa.binary()), b"L", ()),
}
IMAGE_CELLS: dict[str, tuple[Any, bool]] = {  # cell -> whether the row is usable
    "null": (None, False),
    "no bytes": ({"bytes": None, "path": None}, False),
    "empty bytes": ({"bytes": b"", "path": None}, False),
    "text": ({"bytes": b"a picture of a cat", "path": None}, False),
    "path of nothing": ({"bytes": None, "path": "/no/such/file.png"}, False),
    "path of a folder": ({"bytes": None, "path": "/"}, False),
    "long path": ({"bytes": None, "path": "x" * 5000}, False),
    "path with NUL": ({"bytes": None, "path": "a\0b"}, False),
    "bytes beside a bad path": ({"bytes": png(), "path": "/no/such"}, True),
}
TEXT_CELLS: dict[str, tuple[Any, bool]] = {
    "null": (None, False),
    "empty": ("", False),
    "blank": (" \t\n", False),
    "separators": ("one\u2028two\u2029three\x85four\x0bfive\x0csix\x1cseven", True),
    "crlf": ("one\r\ntwo\rthree", True),
    "NUL": ("a\0b", True),
    "json": ('{"a": [1, "\\u2028"]}', True),
    "tabs and quotes": ('"a"\t"b', True),
    "right to left": ("\u202eabc\u202c \u05d0", True),
    "astral": ("\U0001f9e9 \U00020000", True),
    "combining": ("e" + "\u0301" * 500, True),
    "format": ("{0} %s {x!r} $HOME `id`", True),
    "nan": ("nan", True),
    "None": ("None", True),
}


def _expect(usable: int, **columns: Sequence[str]) -> Judge:
    """So many rows are usable, and their columns hold one of the given texts."""

    def judge(output: str, folder: Path) -> str | None:
        rows = [row for row in rows_of(output) if "bad" not in row]
        if len(rows) != usable:
            return f"{len(rows)} usable rows, not {usable}"
        for name, allowed in columns.items():
            wrong = [row[name] for row in rows if row[name] not in allowed]
            if wrong:
                return f"{name} {wrong[0]!r}, not one of {allowed!r}"
        return None

    return judge


def _write(folder: Path, rows: Sequence[dict[str, Any]], schema: pa.Schema = SCHEMA) -> list[str]:
    file = folder / "D" / "data" / "train-00000.parquet"
    write_parquet(file, rows, schema=schema, row_group_size=len(rows) or 1)  # views cannot be cut
    return [str(folder / "D")]


def _retyped(folder: Path, column: str, kind: pa.DataType, value: Any) -> list[str]:
    schema = SCHEMA.set(SCHEMA.get_field_index(column), pa.field(column, kind))
    return _write(folder, [good_row(i, **{column: value}) for i in range(ROWS)], schema)


def _cell(folder: Path, column: str, value: Any) -> list[str]:
    return _write(folder, [good_row(i, **({column: value} if i == 2 else {})) for i in range(ROWS)])


def _types() -> Iterator[Case]:
    for name, kind in TEXT_TYPES.items():
        for column in ("question", "answer", "pid"):
            make = partial(_retyped, column=column, kind=kind, value="7 up")
            right = _expect(ROWS, **{column: ("7 up",)})
            yield Case("parquet", f"{column} as {name}", make, "rows", "accept", right=right)
    for name, (kind, value, texts) in OTHER_TYPES.items():
        for column in ("question", "answer", "pid", "problem_image_0", "full_text_only_thought"):
            make = partial(_retyped, column=column, kind=kind, value=value)
            names = (column,)
            if column == "answer":
                right = _expect(ROWS, answer=texts) if texts else _expect(0)
                yield Case("parquet", f"{column} is {name}", make, "rows", "any", names, right)
            elif column == "question":
                yield Case("parquet", f"{column} is {name}", make, "rows", "any", names, _expect(0))
            else:
                yield Case("parquet", f"{column} is {name}", make, "check", "any", ())
    for name in ("large_binary", "binary_view"):
        kind = pa.struct([("bytes", getattr(pa, name)()), ("path", pa.string_view())])
        make = partial(_retyped, column="problem_image_0", kind=kind,
                       value={"bytes": png(), "path": None})  # fmt: skip
        yield Case("parquet", f"image of {name}", make, "rows", "accept", right=_expect(ROWS))
    odd = {
        "reversed": (pa.struct([("path", pa.string()), ("bytes", pa.binary())]), ROWS),
        "bytes only": (pa.struct([("bytes", pa.binary())]), ROWS),
        "path only": (pa.struct([("path", pa.string())]), 0),
        "bytes as text": (pa.struct([("bytes", pa.string()), ("path", pa.string())]), 0),
        "list of images": (pa.list_(IMAGE), 0),
    }
    for name, (kind, usable) in odd.items():
        cell: Any = {"bytes": png(), "path": None}
        if name == "bytes as text":
            cell = {"bytes": "iVBOR", "path": None}
        if name == "list of images":
            cell = [cell]
        make = partial(_retyped, column="problem_image_0", kind=kind, value=cell)
        yield Case("parquet", f"image struct: {name}", make, "rows", "any", (), _expect(usable))


def _cells() -> Iterator[Case]:
    for name, (value, usable) in IMAGE_CELLS.items():
        make = partial(_cell, column="problem_image_0", value=value)
        yield Case("parquet", f"image cell: {name}", make, "rows", "accept",
                   right=_expect(ROWS - 1 + usable))  # fmt: skip
        yield Case("parquet", f"checked image cell: {name}", make, "check", "accept",
                   right=_checked(1 - usable))  # fmt: skip
    for name, (value, usable) in TEXT_CELLS.items():
        for column in ("question", "answer"):
            texts = [str(good_row(i)[column]) for i in range(ROWS)] + [value]
            make = partial(_cell, column=column, value=value)
            right = _expect(ROWS - 1 + usable, **{column: texts})
            yield Case("parquet", f"{column} cell: {name}", make, "rows", "accept", right=right)
    for size in (200_000, 1_000_000):
        make = partial(_cell, column="question", value="word " * (size // 5))
        yield Case("parquet", f"question of {size} characters", partial(_evaluated, make),
                   "evaluate", "accept", right=_answered(ROWS - 1))  # fmt: skip
    for value in ("{{{", "", "[]", "null", '{"size": 1e9}', "[" * 50_000, '{"start": [0]}'):
        for world in ("spatial_navigation", "no such world", ""):
            make = partial(_world, world=world, state=value)
            yield Case("parquet", f"world {world!r}, state {value[:20]!r}",
                       partial(_evaluated, make), "evaluate", "any", ("world",),
                       _answered(None))  # fmt: skip


def _world(folder: Path, world: str, state: str) -> list[str]:
    schema = SCHEMA.append(pa.field("world", pa.string())).append(
        pa.field("world_state", pa.string())
    )
    rows = [good_row(i, world=world, world_state=state) for i in range(ROWS)]
    return _write(folder, rows, schema)


def _evaluated(make: Callable[[Path], list[str]], folder: Path) -> list[str]:
    (data,) = make(folder)
    model = str(Path(__file__).parents[1] / "tiny-bagel")
    return ["--model_path", model, "--data", data, "--split", "train", "--max_bad_rate", "0.9",
            "--output_dir", str(folder / "out")]  # fmt: skip


def _answered(count: int | None) -> Judge:
    """So many rows were answered and none was judged against a state that is no state."""

    def judge(output: str, folder: Path) -> str | None:
        lines = (folder / "out" / "predictions.jsonl").read_text().split("\n")
        found = len([line for line in lines if line])
        return None if count in (None, found) else f"{found} rows answered, not {count}"

    return judge


def _checked(bad: int) -> Judge:
    def judge(output: str, folder: Path) -> str | None:
        (line,) = [line for line in output.split("\n") if line.strip().startswith("bad rows")]
        return None if line.split()[2] == str(bad) else f"{line.strip()!r}, not {bad}"

    return judge


def _damaged(folder: Path, change: Callable[[bytearray], bytes]) -> list[str]:
    (data,) = _write(folder, [good_row(i) for i in range(ROWS)])
    file = next(Path(data).rglob("*.parquet"))
    file.write_bytes(change(bytearray(file.read_bytes())))
    return [data]


def _cut(raw: bytearray, share: float) -> bytes:
    return bytes(raw[: int(len(raw) * share)])


def _flip(raw: bytearray, seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    for place in rng.integers(0, len(raw), 1 + seed % 3):
        raw[place] ^= 1 << int(rng.integers(0, 8))
    return bytes(raw)


def _files() -> Iterator[Case]:
    for share in (0.0, 0.01, 0.3, 0.6, 0.9, 0.99):
        make = partial(_damaged, change=partial(_cut, share=share))
        yield Case("parquet", f"cut at {share}", make, "rows", "refuse", (".parquet",))
        yield Case("parquet", f"checked, cut at {share}", make, "check", "refuse", (".parquet",))
    for seed in range(40):  # without checksums a flipped cell reads as another: no crash is all
        make = partial(_damaged, change=partial(_flip, seed=seed))
        yield Case("parquet", f"flipped bits {seed}", make, ("rows", "check")[seed % 2])
    whole: dict[str, Callable[[bytearray], bytes]] = {
        "zeros": lambda raw: bytes(len(raw)),
        "appended": lambda raw: bytes(raw) + b"rest",
        "an html page": lambda raw: b"<html>404</html>",
        "a pointer of git-lfs": lambda raw: b"version https://git-lfs.github.com/spec/v1\n",
        "zeros in the middle": lambda raw: bytes(raw[:200]) + bytes(400) + bytes(raw[600:]),
        "footer length": lambda raw: bytes(raw[:-8]) + b"\xff\xff\xff\x7fPAR1",
    }
    for name, change in whole.items():
        make = partial(_damaged, change=change)
        expect = "any" if name == "zeros in the middle" else "refuse"
        yield Case("parquet", f"file of {name}", make, "rows", expect, (".parquet",))
    for name, build in PLACES.items():
        for program in ("rows", "check"):
            yield Case("parquet", f"{program}, {name}", build[0], program, *build[1:])


def _beside(folder: Path, name: str | bytes, content: bytes = b"x") -> list[str]:
    (data,) = _write(folder, [good_row(i) for i in range(ROWS)])
    path = os.path.join(os.fsencode(Path(data) / "data"), os.fsencode(name))
    with open(path, "wb") as stream:
        stream.write(content)
    return [data]


def _no_rows(folder: Path) -> list[str]:
    return _write(folder, [])


def _link(folder: Path, target: str) -> list[str]:
    place = folder / "D" / "data"
    place.mkdir(parents=True)
    (place / "train-00000.parquet").symlink_to(target)
    return [str(folder / "D")]


def _folder(folder: Path) -> list[str]:
    (folder / "D" / "data" / "train-00000.parquet").mkdir(parents=True)
    return [str(folder / "D")]


def _columns(folder: Path, names: Sequence[str]) -> list[str]:
    rows = pa.Table.from_pylist([good_row(i) for i in range(ROWS)], schema=SCHEMA)
    arrays = [rows.column(name) for name in names]
    place = folder / "D" / "data"
    place.mkdir(parents=True)
    pq.write_table(pa.Table.from_arrays(arrays, names=list(names)), place / "train-0.parquet")
    return [str(folder / "D")]


NAMES = [field.name for field in SCHEMA]
PLACES: dict[str, tuple[Any, ...]] = {
    "zero rows": (_no_rows, "refuse", (".parquet", "rows")),
    "broken link": (partial(_link, target="/no/such/file"), "refuse", (".parquet",)),
    "link loop": (partial(_link, target="train-00000.parquet"), "refuse", (".parquet",)),
    "folder of that name": (_folder, "refuse", (".parquet",)),
    "hidden files": (partial(_beside, name="._train-00001.parquet"), "accept"),
    "another hidden file": (partial(_beside, name=".train-00001.parquet"), "accept"),
    "a name that is no UTF-8": (partial(_beside, name=b"train-\xe9.parquet"), "any", ("train-",)),
    "column twice": (partial(_columns, names=[*NAMES, "question"]), "refuse", ("question",)),
    "answer twice": (partial(_columns, names=[*NAMES, "answer"]), "refuse", ("answer",)),
    "no question": (partial(_columns, names=NAMES[2:]), "refuse", ("question",)),
    "no image": (partial(_columns, names=NAMES[:3]), "refuse", ("problem_image_0",)),
}


def cases() -> Iterator[Case]:
    yield from _types()
    yield from _cells()
    yield from _files()
