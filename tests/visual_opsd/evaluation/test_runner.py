# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The runner alone, with work that needs no model: what is claimed, resumed, shared and refused."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from data.row_groups import ParquetDataset
from data.thinkmorph import EVALUATION_ROWS, BadRow, Row
from scripts.visual_opsd.evaluation.rows import RowPool, read_windows
from scripts.visual_opsd.evaluation.runner import (
    Outcome,
    RowLimits,
    claim_folder,
    memory_advice,
    run_rows,
)
from scripts.visual_opsd.evaluation.store import RankedLines, Record
from scripts.visual_opsd.processes import DistEnv, init_distributed, shutdown
from scripts.visual_opsd.runs.folder_lock import release_folders
from tests.data.synthetic import write_dataset

LIMITS = RowLimits(max_rows=4, max_tokens=10**6, max_bad_rate=0.5)
SETTINGS = {"seed": 1, "data": ["a"]}


@pytest.fixture(scope="module")
def env() -> Iterator[DistEnv]:
    yield init_distributed("cpu")
    shutdown()


@pytest.fixture(autouse=True)
def _let_go() -> Iterator[None]:
    yield
    release_folders()


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> RowPool:
    folder = write_dataset(tmp_path_factory.mktemp("rows"), rows=240)
    files = sorted((folder / "data").iterdir())
    return RowPool([ParquetDataset("Jigsaw_Assembly", files, EVALUATION_ROWS)])


@dataclass
class Prepared:
    text: str
    length: int = 1


class Preparing:
    """Row -> its question; the rows of `bad` cannot be used."""

    def __init__(self, *bad: int) -> None:
        self.bad = bad

    def __call__(self, row: Row) -> Prepared:
        if row.position in self.bad:
            raise BadRow("too_odd", "it is odd", file=row.file, row=row.row)
        return Prepared(row.values["question"])


class Working:
    """Gives records one by one; says what it did, and dies after `dies_after` rows."""

    def __init__(self, dies_after: int = 10**9, by: str = "now") -> None:
        self.done: list[int] = []
        self.dies_after, self.by = dies_after, by

    def __call__(self, rows: Sequence[tuple[int, Prepared]]) -> Iterator[list[Record]]:
        for index, row in rows:
            if len(self.done) == self.dies_after:
                raise KeyboardInterrupt
            self.done.append(index)
            yield [{"index": index, "text": row.text, "by": self.by}]


Run = Callable[..., Outcome]


@pytest.fixture
def run(pool: RowPool, env: DistEnv, tmp_path: Path) -> Run:
    def run(
        work: Any, count: int = 10, prepare: Any = None, limits: RowLimits = LIMITS, **claimed: Any
    ) -> Outcome:
        store = RankedLines(tmp_path, "lines")
        given = {"result": "summary.json", "overwrite": False, "settings": SETTINGS, **claimed}
        claim_folder(tmp_path, stores=[store], **given)
        return run_rows(pool, range(count), prepare or Preparing(), work, store, env, limits)

    return run


def lines(folder: Path, name: str = "lines.jsonl") -> list[Record]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_every_row_has_its_record_in_order(run: Run, tmp_path: Path) -> None:
    found = run(Working())
    assert [record["index"] for record in found.records] == list(range(10))
    assert found.records[7]["text"] == "question 7?"
    assert (found.rejects, found.resumed) == ([], 0) and found.seconds > 0
    assert lines(tmp_path) == found.records
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"lines.jsonl", "bad_rows.jsonl", "settings.json", ".lock"}


@pytest.mark.parametrize("dies_after", [0, 1, 5, 9])
def test_a_killed_run_goes_on_where_it_was(run: Run, tmp_path: Path, dies_after: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(Working(dies_after))
    assert not (tmp_path / "lines.jsonl").exists()
    work = Working()
    found = run(work)
    assert found.resumed == dies_after and work.done == list(range(dies_after, 10))
    assert [record["index"] for record in found.records] == list(range(10))
    again = Working()
    assert run(again).records == found.records and not again.done


def test_leftovers_of_more_ranks_are_older_than_what_comes(run: Run, tmp_path: Path) -> None:
    bad = {"dataset": "d", "file": "f", "row": 2, "reason": "gone", "detail": "x"}
    run(Working(by="finished"), 2)
    store = RankedLines(tmp_path, "lines")
    store.append(1, [{"index": 0, "by": "killed"}])
    store.append(7, [{"index": 2, "bad": bad}, {"index": 3, "by": "killed"}])
    found = run(Working(), 4)
    assert [record["by"] for record in found.records] == ["killed", "finished", "now", "killed"]
    assert not list(tmp_path.glob("*.rank_*"))


def test_bad_rows_are_listed_and_tried_again(run: Run, tmp_path: Path) -> None:
    found = run(Working(), prepare=Preparing(1, 6))
    assert [reject.row for reject in found.rejects] == [1, 6]
    assert [(r["row"], r["reason"]) for r in lines(tmp_path, "bad_rows.jsonl")] == [
        (1, "too_odd"), (6, "too_odd"),
    ]  # fmt: skip
    work = Working()
    assert run(work, prepare=Preparing(6)).resumed == 8
    assert work.done == [1] and len(lines(tmp_path)) == 9


def test_too_many_bad_rows_end_a_run(run: Run) -> None:
    strict = RowLimits(max_rows=50, max_tokens=10**6, max_bad_rate=0.01)
    work = Working()
    with pytest.raises(ValueError, match=r"3 of 200 rows cannot be used: 3 too_odd"):
        run(work, 240, Preparing(3, 150, 199), strict)
    assert max(work.done) < 200  # it did not wait for the end
    with pytest.raises(ValueError, match="no row could be used: 2 too_odd"):
        run(work, 2, Preparing(0, 1), RowLimits(50, 10**6, 1.0), overwrite=True)


def test_a_row_that_was_usable_must_still_be(run: Run) -> None:
    limits = RowLimits(4, 10**6, 1.0, good_in="the first run")
    with pytest.raises(ValueError, match="row 2 was usable in the first run and is not now: it is"):
        run(Working(), prepare=Preparing(2), limits=limits)


def test_a_folder_of_other_settings_is_refused(run: Run, tmp_path: Path) -> None:
    run(Working(), 3)
    with pytest.raises(ValueError, match=r"other settings \(seed: saved 1, now 2\); .*--overwrite"):
        run(Working(), 3, settings={**SETTINGS, "seed": 2})
    work = Working()
    found = run(work, 3, settings={**SETTINGS, "seed": 2}, overwrite=True)
    assert (found.resumed, work.done) == (0, [0, 1, 2])
    assert lines(tmp_path) == found.records
    (tmp_path / "settings.json").unlink()
    with pytest.raises(ValueError, match=r"settings\.json does not exist; it says .*--overwrite"):
        run(Working(), 3)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_another_command_is_left_alone(
    run: Run, tmp_path: Path, overwrite: bool
) -> None:
    """All commands write settings.json and bad_rows.jsonl; a training has the latter, too."""
    run(Working(), 3, Preparing(1))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def claim(folder: Path) -> None:
        store = RankedLines(folder, "others")
        claim_folder(folder, {}, [store], result="other.json", overwrite=overwrite)

    with pytest.raises(ValueError, match=r"another command \(summary\.json, lines\.jsonl\)"):
        claim(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "metrics.jsonl").touch()
    with pytest.raises(ValueError, match=r"another command \(metrics\.jsonl\)"):
        claim(tmp_path / "training")


def test_a_result_without_records_is_claimed_like_any(run: Run, tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(ValueError, match=r"settings\.json does not exist"):
        run(Working(), 3)
    assert (tmp_path / "summary.json").read_text() == "{}"
    run(Working(), 3, overwrite=True)
    assert not (tmp_path / "summary.json").exists()  # its program writes a new one


# ------------------------------------------------------------------------------- reading ahead


def test_windows_are_bounded_sorted_and_read_ahead(pool: RowPool) -> None:
    read: list[int] = []

    def prepare(row: Row) -> Prepared:
        read.append(row.position)
        return Prepared("", length=10 - row.position)

    windows = read_windows(pool, range(8), prepare, max_rows=3, max_tokens=18)
    first = next(windows)
    assert [index for index, _ in first.rows] == [1, 0]  # 10 + 9 tokens, the shorter first
    found = [[index for index, _ in window.rows] for window in windows]
    assert found == [[4, 3, 2], [7, 6, 5]]
    assert read == list(range(8))


def test_an_error_in_reading_ends_the_run_and_the_reader(pool: RowPool) -> None:
    def prepare(row: Row) -> Prepared:
        if row.position == 5:
            raise RuntimeError("a fault of ours")
        return Prepared("")

    windows = read_windows(pool, range(8), prepare, max_rows=2, max_tokens=99)
    with pytest.raises(RuntimeError, match="a fault of ours") as error:
        list(windows)
    assert any("row 5" in note for note in error.value.__notes__)
    assert not [t for t in threading.enumerate() if t.name.startswith("row reader")]


def test_who_stops_early_waits_for_one_row_only(pool: RowPool) -> None:
    read: list[int] = []
    under_way, goes_on = threading.Event(), threading.Event()

    def prepare(row: Row) -> Prepared:
        read.append(row.position)
        if row.position == 3:
            under_way.set()
            goes_on.wait(30)
        return Prepared("", length=0 if row.position else 99)

    windows = read_windows(pool, range(240), prepare, max_rows=240, max_tokens=99)
    assert [index for index, _ in next(windows).rows] == [0]
    assert under_way.wait(30)
    closing = threading.Thread(target=windows.close)
    closing.start()
    closing.join(1)
    assert closing.is_alive()
    goes_on.set()
    closing.join(30)
    assert not closing.is_alive() and read[-1] == 3


def test_memory_advice_names_rows_and_what_is_kept() -> None:
    kept = r"lower it; what was done is kept, and the same command goes on"
    for rows, named in (([7], r"with one row \(7\)"),
                        (range(5), r"with 5 rows at once \(0, 1, 2 and 2 more\)")):  # fmt: skip
        with (
            pytest.raises(ValueError, match=f"not enough memory .* {named}: {kept}"),
            memory_advice(list(rows), "lower it"),
        ):
            raise MemoryError
