# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""JSON lines: what separates records, and what a kill, a disk or a user does to them."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from data.json_lines import append_records, encode, filter_log, read_given, read_log, write_lines
from data.rejects import Reject, RejectLedger
from scripts.visual_opsd.training.checkpoint_folders import truncate_jsonl
from scripts.visual_opsd.training.metrics import read_metrics
from scripts.visual_opsd.training.samples import RecordedCompletions

SEPARATORS = "\u2028 \u2029 \x85 \x0b \x0c \x1c \x1d \x1e \r \u00a0 \ufeff \x00"
TEXTS = [{"n": 0, "text": f"a{SEPARATORS}b"}, {"n": 1, "text": SEPARATORS}, {"n": 2, "text": "\n"}]
# Lines that are no records, and what is said of them.
DAMAGED = [
    (b"broken", "not JSON"),
    (b"\xff\xfe\x00binary", "not UTF-8 text (byte 0)"),
    (b'{"n": "caf\xe9"}', "not UTF-8 text (byte 10)"),
    (b"\x00\x00\x00\x00", "not JSON"),
    (b"[1, 2]", "not a JSON object but a list"),
    (b"null", "not a JSON object but a NoneType"),
    (b'{"n": 1}{"n": 2}', "not JSON"),
    (b'{"n": ' + b"[" * 100_000, "nested too deeply"),
    (b'{"n": ' + b"9" * 5000 + b"}", "not JSON"),
]


@pytest.mark.parametrize("written", ["as we do", "escaped", "raw"])
def test_only_newlines_separate(tmp_path: Path, written: str) -> None:
    path = tmp_path / "a.jsonl"
    if written == "as we do":
        write_lines(path, TEXTS[:1])
        append_records(path, TEXTS[1:])
    else:
        lines = [json.dumps(r, ensure_ascii=written == "escaped") for r in TEXTS]
        path.write_bytes("\r\n".join(lines).encode() + b"\r\n\r\n \n")
    assert read_log(path) == TEXTS
    assert [record for _, record in read_given(path, "record")] == TEXTS
    before = path.read_bytes()
    assert filter_log(path, lambda record: record["n"] < 2) == 1
    assert read_log(path) == TEXTS[:2]
    assert before.startswith(path.read_bytes())  # byte by byte


def test_a_file_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, steps = tmp_path / "a.jsonl", []

    def noted(name: str, plain: Any) -> Any:
        def call(*arguments: Any) -> None:
            steps.append(name)
            plain(*arguments)

        return call

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, noted(name, getattr(os, name)))
    write_lines(path, TEXTS)
    assert filter_log(path, lambda record: record["n"] == 1) == 2
    assert steps == ["fsync", "replace"] * 2
    assert read_log(path) == TEXTS[1:2]


def test_what_utf8_lacks_is_escaped(tmp_path: Path) -> None:
    record = {"file": "caf\udce9.parquet", "text": "é \U0001f600"}
    line = encode(record)
    assert line.count(b"\n") == 1 and "é \U0001f600".encode() in line
    write_lines(tmp_path / "a.jsonl", [record])
    assert read_log(tmp_path / "a.jsonl") == [record]


@pytest.mark.parametrize(("line", "said"), DAMAGED, ids=[repr(x[:12]) for x, _ in DAMAGED])
def test_damaged_lines(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, line: bytes, said: str
) -> None:
    """A log goes on without them and says so; a file somebody gives is refused."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"n": 1}\n' + line + b'\n{"n": 2}\n')
    assert read_log(path) == [{"n": 1}, {"n": 2}]
    assert len(caplog.records) == 1 and caplog.records[0].levelno == logging.WARNING
    assert f"{path}: left out: line 2 is not " in caplog.text and said in caplog.text
    with pytest.raises(ValueError, match=r"a\.jsonl line 2 holds no record: it is ") as caught:
        list(read_given(path, "record"))
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert filter_log(path, lambda record: True) == 1
    assert path.read_bytes() == b'{"n": 1}\n{"n": 2}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize("torn", [b'{"n": 2, "te', b'{"n": "caf\xc3', b"\x00\x00", b"{"])
def test_a_torn_last_line(tmp_path: Path, caplog: pytest.LogCaptureFixture, torn: bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"n": 1}\n' + torn)
    assert read_log(path) == [{"n": 1}] and not caplog.records
    with pytest.raises(
        ValueError, match=r"line 2 .* it is not .*; the file ends in the middle of it"
    ):
        list(read_given(path, "record"))
    append_records(path, [{"n": 3}, {"n": 4}])
    assert path.read_bytes() == b'{"n": 1}\n{"n": 3}\n{"n": 4}\n'
    path.write_bytes(torn)
    append_records(path, [{"n": 3}])
    assert path.read_bytes() == b'{"n": 3}\n'


def test_a_last_line_that_only_lacks_its_end_counts(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"n": 1}\n{"n": 2}')
    assert read_log(path) == [{"n": 1}, {"n": 2}]
    append_records(path, [{"n": 3}])
    assert read_log(path) == [{"n": 1}, {"n": 2}, {"n": 3}]
    path.write_bytes(b'{"n": 1}\n{"n": 2}')
    assert filter_log(path, lambda record: True) == 0
    assert path.read_bytes() == b'{"n": 1}\n{"n": 2}\n'


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    for name in ("folder.jsonl", "loop.jsonl", "none.jsonl", "x" * 5000):
        with pytest.raises(ValueError, match="cannot be read: "):
            read_log(tmp_path / name)
        with pytest.raises(ValueError, match="cannot be read: "):
            list(read_given(tmp_path / name, "record"))
    with pytest.raises(ValueError, match=r"folder\.jsonl cannot be read: Is a directory"):
        filter_log(tmp_path / "folder.jsonl", lambda record: True)
    assert filter_log(tmp_path / "none.jsonl", lambda record: True) == 0
    for name in ("folder.jsonl", "none/a.jsonl", "x" * 5000):
        with pytest.raises(ValueError, match=r"writing .* failed: "):
            append_records(tmp_path / name, [{}])
        with pytest.raises(ValueError, match=r"writing .* failed: "):
            write_lines(tmp_path / name, [{}])
    assert not list(tmp_path.glob("*.tmp"))


# ----------------------------------------------------------------- the files written in this way


def test_metrics_of_a_damaged_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    lines: list[dict[str, Any]] = [{"step": 1, "note": SEPARATORS}, {"step": 2}, {"step": 3}]
    good = [encode(line) for line in lines]
    odd = b'{"step": "x"}\n{"step": null}\n'
    path.write_bytes(good[0] + b"\xff\xfe\x00\n" + odd + good[1] + good[2] + b'{"step": 3, "l')
    assert [record["step"] for record in read_metrics(path)] == [1, "x", None, 2, 3]
    caplog.clear()
    assert truncate_jsonl(path, 2) == 5
    assert "metrics.jsonl: left out: line 2 is not UTF-8" in caplog.text
    assert "line 3 is no record of this file" in caplog.text
    assert path.read_bytes() == good[0] + good[1]


def test_bad_rows_keep_their_texts_over_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "bad_rows.jsonl"
    ledger = RejectLedger(path)
    rejects = [Reject("d", f"f{SEPARATORS}", i, "r", SEPARATORS, i, 0) for i in range(6)]
    rejects.append(Reject("d", "caf\udce9", 6, "r", "x", 1, 0))
    for reject in rejects:
        ledger.record(1000, [reject])
    with path.open("ab") as file:
        file.write(b'\xff\n{"row": 1}\n7\n')
    RejectLedger(path).resume({"rows_read": 7000, "reasons": {"r": 7}}, 3)
    assert [record["row"] for record in read_log(path)] == [0, 1, 2, 6]


def sample(**changes: Any) -> dict[str, Any]:
    return {"step": 1, "slot": 0, "row": "d/1", "completion": SEPARATORS, "capped": False,
            "ids": [1, 2], "scored": "101", "logprobs": [-0.5, -0.25], **changes}  # fmt: skip


def test_recorded_completions(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    write_lines(path, [sample(), sample(slot=1)])
    assert len(RecordedCompletions.read(str(path)).by_place) == 2
    write_lines(path, [sample(logprobs=[-0.5, None])])  # of a student whose numbers were NaN
    ((_, completion),) = RecordedCompletions.read(str(path)).by_place.values()
    assert completion.ids == (1, 2) and completion.logprobs == ()
    for record in (
        {"step": 1}, sample(ids="ab"), sample(ids=[1.5, 2]), sample(ids=[-1, 2]), sample(scored=7),
        sample(scored="10"), sample(scored="1x1"), sample(logprobs=["a"]), sample(step=[1]),
    ):  # fmt: skip
        write_lines(path, [sample(), record])
        with pytest.raises(ValueError, match=r"samples\.jsonl line 2 holds no completion: "):
            RecordedCompletions.read(str(path))
    path.write_bytes(encode(sample()) + b'{"step": 2, "sl')
    with pytest.raises(
        ValueError, match=r"samples\.jsonl line 2 holds no completion: it is not JSON"
    ):
        RecordedCompletions.read(str(path))
    for name in ("none.jsonl", "x" * 5000):
        with pytest.raises(ValueError, match=r"--replay_samples .*: no such file"):
            RecordedCompletions.read(str(tmp_path / name))
