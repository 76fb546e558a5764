# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Benchmark files: texts that cut records in lesser readers, and files that are cut themselves."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from tests.data.synthetic import png
from tests.hostile.programs import rows_of
from tests.hostile.runner import Case, Judge

COLUMNS = ("index", "image", "question", "A", "B", "answer", "category")
PICTURE = base64.b64encode(png()).decode()
SEPARATORS = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e\x1f\ufeff\u200b\xa0\u3000"
NASTY = (
    *SEPARATORS, '"', '""', "'", "\t", "\n", "\r\n", "\\", "\\n", ",", ";", "#", "=1+1", "nan x",
    "\0", "\U0001f9e9", "<|im_end|>", "a", "b c", "7", " ", "NULL",
)  # fmt: skip


def _row(number: int, **changes: str) -> dict[str, str]:
    return {
        "index": str(number), "image": PICTURE, "question": f"question {number}?",
        "A": f"left {number}", "B": f"right {number}", "answer": "A", "category": "c", **changes,
    }  # fmt: skip


def _text(rows: Sequence[dict[str, str]], columns: Sequence[str] = COLUMNS, **how: str) -> str:
    stream = io.StringIO(newline="")
    options = {"delimiter": "\t", "lineterminator": "\n", **how}
    writer = csv.DictWriter(stream, columns, **options)  # type: ignore[arg-type]
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def _write(folder: Path, content: Callable[[], str | bytes]) -> list[str]:
    made = content()
    data = made if isinstance(made, bytes) else made.encode()
    (folder / "VStarBench.tsv").write_bytes(data)
    return [str(folder / "VStarBench.tsv")]


def _holds(wanted: Sequence[dict[str, str] | None]) -> Judge:
    """The rows hold exactly these texts, None being a bad one."""

    def judge(output: str, folder: Path) -> str | None:
        found = rows_of(output)
        if len(found) != len(wanted):
            return f"{len(found)} rows, not {len(wanted)}"
        for number, (row, values) in enumerate(zip(found, wanted, strict=True)):
            if values is None:
                if "bad" not in row:
                    return f"row {number} counts as good"
                continue
            for name, value in values.items():
                if name != "image" and row.get(name, "") != value:
                    return f"row {number}, {name}: {row.get(name)!r}, not {value!r}"
        return None

    return judge


def _case(name: str, content: Callable[[], str | bytes], expect: str = "accept",
          names: tuple[str, ...] = (), right: Judge | None = None) -> Case:  # fmt: skip
    return Case("tsv", name, partial(_write, content=content), "rows", expect, names, right)


def _round_trips() -> Iterator[Case]:
    for seed in range(60):
        rng = np.random.default_rng(seed)
        rows = []
        for index in range(8):
            row = _row(index)
            for name in ("question", "A", "B", "category"):
                parts = rng.choice(len(NASTY), int(rng.integers(0, 5)))
                text = "x" + "".join(NASTY[part] for part in parts) + "x"
                row[name] = text.replace("\0", "")
            rows.append(row)
        order = [str(name) for name in rng.permutation(COLUMNS)]
        ending = ("\n", "\r\n")[seed % 2]
        content = partial(_text, rows, order, lineterminator=ending)
        yield _case(f"round trip {seed}", content, right=_holds(rows))
    for mark in SEPARATORS:
        for column in ("question", "category"):
            rows = [_row(i, **({column: f"first{mark}second"} if i == 1 else {})) for i in range(3)]
            order = [name for name in COLUMNS if name != column] + [column]
            yield _case(f"{mark!r} in {column}, the last column", partial(_text, rows, order),
                        right=_holds(rows))  # fmt: skip
    for text in ("nan", "None", "NaN", "NA", "null", "inf", "True", "0", "-", "1.0"):
        rows = [_row(0, A=text), _row(1, B=text)]
        yield _case(f"option {text!r}", partial(_text, rows), right=_holds(rows))


def _pictures() -> Iterator[Case]:
    raw = bytes(range(256)) * 2
    bare = PICTURE.rstrip("=")
    urlsafe = base64.urlsafe_b64encode(png((250, 251, 255), (31, 17))).decode()
    good = {
        "padded": PICTURE, "unpadded": bare, "URL-safe": urlsafe, "URL-safe, unpadded":
        urlsafe.rstrip("="), "data URL": "data:image/png;base64," + PICTURE,
        "with line breaks": "\n".join(PICTURE[i : i + 40] for i in range(0, len(PICTURE), 40)),
        "list": f"['{PICTURE}', '{PICTURE}']", "JSON list": f'["{PICTURE}"]',
    }  # fmt: skip
    for name, cell in good.items():
        rows = [_row(0, image=cell), _row(1)]
        yield _case(f"image {name}", partial(_text, rows), right=_holds(rows))
    bad = {
        "empty": "", "no base64": "!" * 80, "another row's index": "77", "its own index": "0",
        "cut": PICTURE[: len(PICTURE) // 2], "of noise": base64.b64encode(raw).decode(),
        "empty list": "[]", "nested list": "[" * 3000 + "]" * 3000, "list of numbers": "[1, 2]",
        "an open list": f"['{PICTURE}'", "a path": "/etc/passwd", "umlauts": "ü" * 100,
    }  # fmt: skip
    for name, cell in bad.items():
        rows = [_row(0, image=cell), _row(1)]
        yield _case(f"image {name}", partial(_text, rows), right=_holds([None, rows[1]]))


def _structure() -> Iterator[Case]:
    rows = [_row(i) for i in range(12)]
    plain = _text(rows)
    names = ("VStarBench.tsv",)
    head, *records = plain.split("\n")[:-1]

    def lines(*changed: str) -> str:
        return "\n".join([head, *changed]) + "\n"

    for place in (0, 5, 11):
        opened = [r.replace(f"question {place}?", f'"question {place}?') if i == place else r
                  for i, r in enumerate(records)]  # fmt: skip
        yield _case(f"quote opened in record {place}", partial(lines, *opened), "refuse", names)
    closed = list(opened)
    closed[2] = closed[2].replace("question 2?", '"question 2?')
    yield _case("quotes opened in two records", partial(lines, *closed), "refuse", names)
    wrong: dict[str, str | bytes] = {
        "bare CR": plain.replace("\n", "\r"),
        "a column twice": plain.replace("\tB\t", "\tA\t", 1),
        "the index column twice": plain.replace("category", "index", 1),
        "an index twice": _text([_row(0), _row(0)]),
        "an index twice, as 0 and 0.0": _text([_row(0), _row(0, index="0.0")]),
        "an empty index": _text([_row(0, index=""), _row(1)]),
        "no question": _text([{k: v for k, v in _row(0).items() if k != "question"}],
                             [c for c in COLUMNS if c != "question"]),
        "only a header": head + "\n",
        "nothing": "",
        "commas": plain.replace("\t", ","),
        "UTF-16": plain.encode("utf-16"),
        "Latin-1": plain.replace("question 3", "größe").encode("latin-1"),
        "a zip": b"PK\x03\x04" + bytes(200),
        "an html page": "<html>\n<body>404</body>\n</html>\n",
        "text behind a closing quote": plain.replace("question 4?", '"question" 4?'),
    }  # fmt: skip
    for name, content in wrong.items():
        yield _case(f"file: {name}", partial(_given, content), "refuse", names)
    fine: dict[str, tuple[str, Sequence[dict[str, str] | None]]] = {
        "byte order mark": ("\ufeff" + plain, rows),
        "no newline at the end": (plain.rstrip("\n"), rows),
        "blank lines": (plain.replace("\n", "\n\n"), rows),
        "CRLF": (plain.replace("\n", "\r\n"), rows),
        "a quote inside a field": (
            plain.replace("question 3?", 'a 5" screen?'),
            [_row(i, **({"question": 'a 5" screen?'} if i == 3 else {})) for i in range(12)],
        ),
        "a record of too many fields": (
            plain.replace("question 3?", "a\tb"), [None if i == 3 else _row(i) for i in range(12)],
        ),
    }  # fmt: skip
    for name, (text, wanted) in fine.items():
        yield _case(f"file: {name}", partial(_given, text), right=_holds(wanted))
    for share in (0.2, 0.5, 0.9):
        whole = _text([_row(i, question='multi\n"line"') for i in range(20)])
        cut = whole.encode()[: int(len(whole) * share)]
        yield _case(f"file cut at {share}", partial(_given, cut), "any", names)
    for seed in range(20):
        yield _case(f"flipped {seed}", partial(_flipped, plain, seed), "any", names)


def _given(content: str | bytes) -> str | bytes:
    return content


def _flipped(text: str, seed: int) -> bytes:
    rng, raw = np.random.default_rng(seed), bytearray(text.encode())
    for place in rng.integers(0, len(raw), 4):
        raw[place] = int(rng.integers(0, 256))
    return bytes(raw)


def cases() -> Iterator[Case]:
    yield from _round_trips()
    yield from _pictures()
    yield from _structure()
