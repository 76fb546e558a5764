# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The ledger of bad rows: its file, its rate, and what a resumed run finds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data.rejects import Reject, RejectLedger, summarise


def _reject(row: int, step: int = 0, reason: str = "broken_image") -> Reject:
    return Reject("A", "a.parquet", row, reason, "cut off", step, row)


def _lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_file_holds_every_reject(tmp_path: Path) -> None:
    path = tmp_path / "run" / "bad_rows.jsonl"
    ledger = RejectLedger(path)
    ledger.record(16, [])
    assert not path.exists()
    ledger.record(18, [_reject(3, 1), _reject(5, 1, "missing_answer")])
    ledger.record(17, [_reject(9, 2)])
    assert _lines(path)[1] == {
        "dataset": "A",
        "file": "a.parquet",
        "row": 5,
        "reason": "missing_answer",
        "detail": "cut off",
        "step": 1,
        "slot": 5,
    }
    assert [line["row"] for line in _lines(path)] == [3, 5, 9]
    assert (ledger.rows_read, ledger.rejected) == (51, 3)
    assert ledger.reasons == {"broken_image": 2, "missing_answer": 1}


def test_rate_counts_from_row_200_on(tmp_path: Path) -> None:
    path = tmp_path / "bad_rows.jsonl"
    ledger = RejectLedger(path)
    ledger.record(199, [_reject(row) for row in range(50)])  # too early to judge
    with pytest.raises(ValueError) as caught:
        ledger.record(1, [])
    assert "50 of 200 rows read were rejected (50 broken_image)" in str(caught.value)
    assert "1.00%" in str(caught.value) and str(path) in str(caught.value)

    exact = RejectLedger()
    exact.record(200, [_reject(0), _reject(1)])  # exactly one percent is allowed
    with pytest.raises(ValueError, match=r"3 of 201 .*Latest: 1 broken_image \(a\.parquet row 2"):
        exact.record(1, [_reject(2)])

    lenient = RejectLedger(max_rate=0.5, check_from=1)
    lenient.record(2, [_reject(0)])
    with pytest.raises(ValueError, match="2 of 3"):
        lenient.record(1, [_reject(1)])
    strict = RejectLedger(max_rate=0.0, check_from=1)
    strict.record(5, [])
    with pytest.raises(ValueError, match="1 of 6"):
        strict.record(1, [_reject(0)])
    with pytest.raises(ValueError, match="must lie in"):
        RejectLedger(max_rate=1.5)


def test_resume_drops_later_lines_and_restores_the_counts(tmp_path: Path) -> None:
    path = tmp_path / "bad_rows.jsonl"
    ledger = RejectLedger(path)
    ledger.record(10, [_reject(1, step=0)])
    ledger.record(10, [_reject(2, step=3)])
    state = json.loads(json.dumps(ledger.state_dict()))  # saved before step 4
    ledger.record(10, [_reject(3, step=4)])
    ledger.record(10, [_reject(4, step=5)])
    with path.open("a") as file:
        file.write('{"dataset": "A", "st')  # killed while writing

    again = RejectLedger(path)
    again.resume(state, step=4)
    assert [line["row"] for line in _lines(path)] == [1, 2]
    assert (again.rows_read, again.reasons) == (20, {"broken_image": 2})
    again.record(10, [_reject(3, step=4)])
    assert [line["row"] for line in _lines(path)] == [1, 2, 3]
    assert list(tmp_path.iterdir()) == [path]

    elsewhere = RejectLedger(None)  # the other ranks count without a file
    elsewhere.resume(state, step=4)
    assert elsewhere.state_dict() == state


def test_summary_groups_by_reason() -> None:
    rejects = [_reject(row) for row in range(5)] + [_reject(7, reason="missing_answer")]
    text = summarise(rejects, show=2)
    assert text == (
        "5 broken_image (a.parquet row 0: cut off; a.parquet row 1: cut off), "
        "1 missing_answer (a.parquet row 7: cut off)"
    )
