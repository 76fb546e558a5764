# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Row-group reads, the order of training rows, and the loader that follows it."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import pickle
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from data import row_groups
from data.dataset_info import DatasetSource
from data.parquet import Source, StepOrder, StepRows, make_loader, open_sources
from data.rejects import Reject
from data.row_groups import ParquetDataset
from data.thinkmorph import EVALUATION_ROWS, BadRow, Row, parse_row
from tests.data.synthetic import (
    SCHEMA,
    good_row,
    image_cell,
    prepare_all,
    read_all,
    truncated_png,
    write_dataset,
    write_parquet,
)

BROKEN = {"problem_image_0": image_cell(truncated_png())}


def _pid(row: Row) -> str:
    """A cheap `prepare`."""
    return str(row.values["pid"])


def _sample(row: Row) -> tuple[str, str, int, torch.Tensor]:
    """A `prepare` that decodes and returns a tensor."""
    sample = parse_row(row)
    pixels = torch.from_numpy(np.array(sample.problem_image))
    return sample.dataset, sample.pid, row.position, pixels


def _dataset(tmp_path: Path, rows: int = 10, **options: Any) -> ParquetDataset:
    folder = write_dataset(tmp_path, rows=rows, **options)
    return ParquetDataset("Jigsaw_Assembly", sorted((folder / "data").glob("*.parquet")))


def _numbers(dataset: ParquetDataset) -> list[int]:
    return [int(row.values["pid"].split("-")[1]) for row in read_all(dataset)]


# ------------------------------------------------------------------------------ reading


def test_rows_of_several_files_in_order(tmp_path: Path) -> None:
    dataset = _dataset(tmp_path, rows=23, files=3, row_group_size=3)
    assert len(dataset) == 23 and len(dataset.groups) == 9
    assert _numbers(dataset) == list(range(23))
    row = dataset.read_row(20, position=99)
    assert row.file.endswith("train-00002-of-00003.parquet") and row.row == 5
    assert dataset.locate(20) == (row.file, 5) and row.position == 99
    assert row.values["question"] == "question 20?"
    assert [dataset.read_row(i).values["answer"].split()[1] for i in (7, 8)] == ["7", "8"]
    for index in (-1, 23):
        with pytest.raises(AssertionError):
            dataset.read_row(index)


def test_only_needed_columns_and_row_groups_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_dataset(tmp_path, rows=20, row_group_size=5)
    files = sorted((folder / "data").glob("*.parquet"))
    read: list[tuple[int, tuple[str, ...]]] = []
    original = pq.ParquetFile.read_row_group

    def spy(self: pq.ParquetFile, number: int, columns: list[str], **options: Any) -> pa.Table:
        read.append((number, tuple(columns)))
        return original(self, number, columns=columns, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", spy)
    dataset = ParquetDataset("Jigsaw_Assembly", files, EVALUATION_ROWS)
    assert read == []  # the index needs metadata only
    dataset.read_row(12)
    dataset.read_row(14)
    assert read == [(2, ("pid", "question", "answer", "problem_image_0"))]
    assert set(dataset.read_row(10).values) == {"pid", "question", "answer", "problem_image_0"}


def test_cache_is_bounded_and_stays_in_its_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = _dataset(tmp_path, rows=40, row_group_size=4)
    most = 3 * dataset._group(0).nbytes
    monkeypatch.setattr(row_groups, "CACHE_BYTES", most)
    for index in range(40):
        dataset.read_row(index)
        assert sum(t.nbytes for t in dataset._cache.values()) <= most
    assert list(dataset._cache)[-1] == 9 and len(dataset._cache) > 1
    monkeypatch.setattr(row_groups, "CACHE_BYTES", 0)  # a larger group is still readable
    assert dataset.read_row(5).values["pid"] == "pid-5" and len(dataset._cache) == 1
    copy = pickle.loads(pickle.dumps(dataset))
    assert len(copy._cache) == 0 and copy._handle is None
    assert _numbers(copy) == list(range(40))


def test_huge_row_groups_are_warned_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_groups, "LARGE_GROUP_BYTES", 100)
    with pytest.warns(UserWarning, match=r"row group of 4 rows holds .*row_group_size=100"):
        _dataset(tmp_path)


def test_empty_and_foreign_files(tmp_path: Path) -> None:
    empty = write_parquet(tmp_path / "empty.parquet", [])
    with pytest.raises(
        ValueError, match=r"dataset X \(split train\) has no rows: .*empty\.parquet"
    ):
        ParquetDataset("X", [empty])
    full = write_parquet(tmp_path / "full.parquet", [good_row(0)])
    assert len(ParquetDataset("X", [empty, full])) == 1
    text = tmp_path / "text.parquet"
    text.write_text("not parquet at all")
    with pytest.raises(ValueError, match=r"text\.parquet is not a readable parquet file.*again"):
        ParquetDataset("X", [full, text])
    text.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(ValueError, match="Git LFS pointer"):
        ParquetDataset("X", [text])
    cut = tmp_path / "cut.parquet"
    cut.write_bytes(full.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"cut\.parquet is not a readable parquet file"):
        ParquetDataset("X", [cut])
    with pytest.raises(ValueError, match=r"absent\.parquet does not exist"):
        ParquetDataset("X", [tmp_path / "absent.parquet"])


def test_missing_column_names_file_and_columns(tmp_path: Path) -> None:
    schema = pa.schema([field for field in SCHEMA if field.name != "answer"])
    path = write_parquet(tmp_path / "a.parquet", [{"pid": "1"}], schema=schema)
    with pytest.raises(ValueError, match=r"a\.parquet.*missing columns: answer.*found: pid, que"):
        ParquetDataset("X", [path])


def _damage(path: Path, marker: bytes) -> None:
    data = bytearray(path.read_bytes())
    at = data.find(marker)
    assert at > 0
    data[at : at + len(marker)] = bytes(byte ^ 0xFF for byte in marker)
    path.write_bytes(bytes(data))


def test_damaged_pages_reject_their_rows_only(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pa.Table.from_pylist([good_row(index) for index in range(8)], schema=SCHEMA)
    pq.write_table(
        table, path, row_group_size=4, write_page_checksum=True, compression="none",
        use_dictionary=False,
    )  # fmt: skip
    _damage(path, b"question 6?")
    dataset = ParquetDataset("X", [path])
    results = prepare_all(dataset, _pid)
    assert results[:4] == ["pid-0", "pid-1", "pid-2", "pid-3"]
    for number, result in enumerate(results[4:], start=4):
        assert isinstance(result, Reject)
        assert (result.reason, result.file, result.row) == ("unreadable_row", str(path), number)
    with pytest.raises(BadRow, match="unreadable_row"):
        read_all(dataset)


def test_a_vanished_file_is_an_error_and_not_a_bad_row(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [good_row(0)])
    dataset = ParquetDataset("X", [path])
    path.unlink()
    with pytest.raises(ValueError, match=r"a\.parquet does not exist") as caught:
        prepare_all(dataset, _pid)
    assert not isinstance(caught.value, BadRow)


def test_bad_rows_are_rejects_in_their_place(tmp_path: Path) -> None:
    dataset = _dataset(tmp_path, rows=6, change=lambda i: BROKEN if i == 3 else {})
    results = prepare_all(dataset, _sample)[2:5]
    assert [r.reason if isinstance(r, Reject) else r[1] for r in results] == [
        "pid-2",
        "broken_image",
        "pid-4",
    ]


# ------------------------------------------------------------------------------ order


class _Rows:
    """Stands in for a dataset where only its size matters."""

    def __init__(self, name: str, rows: int, split: str = "train") -> None:
        self.name, self.rows, self.split = name, rows, split
        self.groups = ()

    def __len__(self) -> int:
        return self.rows


def _source(name: str, rows: int, weight: float = 1.0, budget: int | None = None) -> Source:
    return Source(_Rows(name, rows), weight, budget)  # type: ignore[arg-type]


def _first(sampler: StepOrder, step: int, slot: int) -> tuple[str, int]:
    dataset, row = next(sampler.candidates(step, slot))
    return dataset.name, row


def _stream(sampler: StepOrder, steps: int) -> list[tuple[str, int]]:
    slots = itertools.product(range(steps), range(sampler.global_batch_size))
    return [_first(sampler, step, slot) for step, slot in slots]


def test_order_is_pinned() -> None:
    """These rows must never change: a resumed run would train on other data without notice."""
    one = StepOrder([_source("A", 7)], seed=42, global_batch_size=3)
    assert [row for _, row in _stream(one, 5)] == PINNED_ONE
    two = StepOrder([_source("A", 7), _source("B", 5, 2.0)], seed=42, global_batch_size=3)
    assert [f"{name}{row}" for name, row in _stream(two, 4)] == PINNED_TWO.split()


PINNED_ONE = [6, 4, 0, 2, 3, 5, 1, 3, 2, 5, 1, 0, 6, 4, 2]
PINNED_TWO = "B4 A6 B3 B2 B0 A4 B1 B0 A0 A2 B4 A3"


def test_every_epoch_is_a_fresh_permutation() -> None:
    sampler = StepOrder([_source("A", 11)], seed=1, global_batch_size=4)
    rows = [row for _, row in _stream(sampler, 11)]
    epochs = [rows[start : start + 11] for start in range(0, 44, 11)]
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    other_seed = StepOrder([_source("A", 11)], seed=2, global_batch_size=4)
    other_name = StepOrder([_source("B", 11)], seed=1, global_batch_size=4)
    assert rows != [row for _, row in _stream(other_seed, 11)]
    assert rows != [row for _, row in _stream(other_name, 11)]


def test_order_does_not_depend_on_what_was_asked_before() -> None:
    sources = [_source("A", 100), _source("B", 30, 0.5), _source("C", 9, 2.0)]
    forward = StepOrder(sources, seed=5, global_batch_size=16)
    expected = _stream(forward, 700)  # crosses choice blocks and many epochs
    fresh = StepOrder(sources, seed=5, global_batch_size=16)
    for step, slot in [(699, 3), (0, 0), (256, 0), (255, 15), (410, 7), (1, 1)]:
        assert _first(fresh, step, slot) == expected[step * 16 + slot]
    # The batch size only cuts the stream.
    assert _stream(StepOrder(sources, seed=5, global_batch_size=7), 100) == expected[:700]


def test_weights_set_the_shares_and_each_dataset_keeps_its_own_epochs() -> None:
    sources = [_source("A", 50, 6.0), _source("B", 20, 3.0), _source("C", 10, 1.0)]
    sampler = StepOrder(sources, seed=0, global_batch_size=10)
    stream = _stream(sampler, 1200)
    share = Counter(name for name, _ in stream)
    for name, expected in (("A", 0.6), ("B", 0.3), ("C", 0.1)):
        assert share[name] / len(stream) == pytest.approx(expected, abs=0.02)
    for name, rows in (("A", 50), ("B", 20), ("C", 10)):
        own = [row for other, row in stream if other == name]
        for start in range(0, len(own) - rows, rows):
            assert sorted(own[start : start + rows]) == list(range(rows))
    # A dataset's own order does not depend on its neighbours.
    alone = StepOrder([_source("B", 20)], seed=0, global_batch_size=1)
    assert [r for n, r in stream if n == "B"][:50] == [r for _, r in _stream(alone, 50)]


def test_zero_weight_is_never_drawn() -> None:
    sources = [_source("A", 5, 0.0), _source("B", 5, 1.0), _source("C", 5, 0.0)]
    sampler = StepOrder(sources, seed=0, global_batch_size=10)
    assert {name for name, _ in _stream(sampler, 500)} == {"B"}


def test_row_budget_keeps_the_first_of_a_seeded_permutation() -> None:
    small, large = (
        [row for _, row in _stream(StepOrder([_source("A", 40, 1.0, n)], 3, 6), 20)]
        for n in (6, 12)
    )
    assert len(set(small)) == 6 and len(set(large)) == 12
    assert set(small) < set(large)  # a larger budget adds rows
    assert all(sorted(small[at : at + 6]) == sorted(set(small)) for at in range(0, 120, 6))
    other = StepOrder([_source("A", 40, 1.0, 6)], 4, 6)
    assert {row for _, row in _stream(other, 1)} != set(small)
    with pytest.warns(UserWarning, match="40 rows, fewer than num_used_rows 41; all of them"):
        capped = StepOrder([_source("A", 40, 1.0, 41)], 3, 40)
    assert {row for _, row in _stream(capped, 1)} == set(range(40))


def test_candidates_go_on_in_the_slots_own_epoch() -> None:
    sampler = StepOrder([_source("A", 5)], seed=9, global_batch_size=2)
    order = [row for _, row in _stream(sampler, 3)]
    for position in range(5):
        found = [row for _, row in sampler.candidates(*divmod(position, 2))]
        assert found == [order[(position + k) % 5] for k in range(5)]
    assert next(sampler.candidates(2, 1))[1] == order[5]  # the next epoch


def test_what_an_order_cannot_be_made_of() -> None:
    one = _source("A", 5)
    for sources, size in (([one], 0), ([], 1), ([one, one], 1), ([_source("A", 5, 0.0)], 1)):
        with pytest.raises(AssertionError):
            StepOrder(sources, 0, size)
    sampler = StepOrder([one], 0, 4)
    with pytest.raises(AssertionError):
        sampler.position(0, 4)
    with pytest.raises(AssertionError):
        sampler.slots(2, 2)


def test_signature_follows_what_the_order_depends_on(tmp_path: Path) -> None:
    dataset = _dataset(tmp_path / "a", rows=10)
    same = StepOrder([Source(dataset)], 1, 4).signature()
    moved = _dataset(tmp_path / "b", rows=10)
    assert StepOrder([Source(moved)], 1, 4).signature() == same
    grown = _dataset(tmp_path / "c", rows=11)
    others = [
        StepOrder([Source(grown)], 1, 4),
        StepOrder([Source(dataset)], 2, 4),
        StepOrder([Source(dataset)], 1, 5),
        StepOrder([Source(dataset, num_used_rows=9)], 1, 4),
        StepOrder([Source(_dataset(tmp_path / "d", rows=10, files=2))], 1, 4),
        StepOrder([Source(dataset, weight=2.0)], 1, 4),
    ]
    assert len({same, *(other.signature() for other in others)}) == 7


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 16, 20])
def test_shares_of_ranks(world_size: int) -> None:
    sampler = StepOrder([_source("A", 5)], 0, 16)
    shares = [sampler.slots(rank, world_size) for rank in range(world_size)]
    assert [slot for share in shares for slot in share] == list(range(16))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


# ------------------------------------------------------------------------------ loading


@pytest.fixture(scope="module")
def sampler(tmp_path_factory: pytest.TempPathFactory) -> StepOrder:
    """Two datasets, one in two files and with bad rows of several kinds in its middle."""
    root = tmp_path_factory.mktemp("datasets")
    bad: dict[int, dict[str, Any]] = {4: BROKEN, 5: {"answer": ""}, 11: {"reasoning_image_0": None}}
    write_dataset(root, "Jigsaw_Assembly", rows=17, files=2, change=lambda i: bad.get(i, {}))
    write_dataset(root, "My_World", rows=8)
    config = [DatasetSource("Jigsaw_Assembly", 2.0), DatasetSource("My_World", 1.0, 6)]
    return StepOrder(open_sources(config, root=root), seed=42, global_batch_size=6)


Flat = list[tuple[int, int, int, tuple[str, str, int], list[int], tuple[Reject, ...]]]


def _flat(loader: Any) -> Flat:
    """Everything a loader yields, comparable, in order."""
    return [
        (rows.step, item.slot, item.position, item.value[:3], item.value[3].flatten().tolist(),
         item.rejects)
        for rows in loader
        for item in rows.items
    ]  # fmt: skip


def _load(sampler: StepOrder, prepare: Callable[[Row], Any] = _sample, **options: Any) -> Flat:
    return _flat(make_loader(sampler, prepare, **{"total_steps": 9, **options}))


@pytest.fixture(scope="module")
def straight(sampler: StepOrder) -> Flat:
    return _load(sampler)


def test_steps_slots_and_positions(sampler: StepOrder, straight: Flat) -> None:
    assert [entry[:2] for entry in straight] == list(itertools.product(range(9), range(6)))
    assert [entry[2] for entry in straight] == list(range(54))
    assert all(entry[3][2] == entry[2] for entry in straight)  # prepare saw the position
    assert {entry[3][0] for entry in straight} == {"Jigsaw_Assembly", "My_World"}
    assert len(make_loader(sampler, _sample, start_step=4, total_steps=9)) == 5


def test_bad_rows_are_replaced_by_the_next_of_the_permutation(
    sampler: StepOrder, straight: Flat
) -> None:
    rejects = [reject for entry in straight for reject in entry[5]]
    reasons = {"broken_image", "missing_answer", "no_visual_thought"}
    assert {reject.reason for reject in rejects} == reasons
    for step, slot, _, value, _, rejected in straight:
        candidates = [d.read_row(i) for d, i in sampler.candidates(step, slot)]
        for reject, candidate in zip(rejected, candidates, strict=False):
            assert (reject.file, reject.row) == (candidate.file, candidate.row)
            assert (reject.dataset, reject.step, reject.slot) == (candidate.dataset, step, slot)
        assert value[1] == candidates[len(rejected)].values["pid"]
    used = {(entry[3][0], entry[3][1]) for entry in straight}
    assert not used & {("Jigsaw_Assembly", f"pid-{i}") for i in (4, 5, 11)}


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_same_batches_on_any_number_of_ranks(
    sampler: StepOrder, straight: Flat, world_size: int
) -> None:
    parts = [_load(sampler, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert sorted(itertools.chain(*parts), key=lambda entry: entry[2]) == straight
    if world_size == 8:  # more ranks than slots: some steps are empty, but all are there
        idle = list(make_loader(sampler, _sample, rank=0, world_size=8, total_steps=3))
        assert [(rows.step, rows.items, rows.rows_read) for rows in idle] == [
            (step, (), 0) for step in range(3)
        ]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("num_workers", [1, 3])
def test_same_batches_with_any_number_of_workers(
    sampler: StepOrder, straight: Flat, num_workers: int
) -> None:
    found = _load(sampler, num_workers=num_workers, rank=1, world_size=2)
    assert found == [entry for entry in straight if entry[1] >= 3]


@pytest.mark.parametrize(("start", "num_workers"), [(1, 0), (5, 0), (4, 2), (9, 0)])
def test_resume_equals_a_straight_run(
    sampler: StepOrder, straight: Flat, start: int, num_workers: int
) -> None:
    copy = pickle.loads(pickle.dumps(sampler))
    found = _load(copy, start_step=start, num_workers=num_workers)
    assert found == [entry for entry in straight if entry[0] >= start]


def test_rows_read_counts_accepted_and_rejected(sampler: StepOrder) -> None:
    steps: list[StepRows[Any]] = list(make_loader(sampler, _sample, total_steps=9))
    assert sum(rows.rows_read for rows in steps) == 54 + sum(len(rows.rejects) for rows in steps)
    assert any(rows.rejects for rows in steps)
    assert [len(rows.values) for rows in steps] == [6] * 9


@pytest.mark.parametrize("num_workers", [0, 1])
def test_all_rows_bad_names_the_reasons(tmp_path: Path, num_workers: int) -> None:
    dataset = _dataset(tmp_path, rows=5, change=lambda i: BROKEN if i else {"answer": None})
    sampler = StepOrder([Source(dataset)], 0, 2)
    loader = make_loader(sampler, _sample, total_steps=3, num_workers=num_workers)
    with pytest.raises(ValueError) as caught:
        list(loader)
    message = str(caught.value)
    assert "step 0, slot 0: none of 5 candidate rows of dataset Jigsaw_Assembly" in message
    assert "4 broken_image (" in message and "1 missing_answer (" in message
    assert "train-00000-of-00001.parquet row 0: column answer is empty" in message
    assert "data.check" in message and "Traceback" not in message


def test_candidates_of_a_slot_are_bounded(tmp_path: Path) -> None:
    dataset = _dataset(tmp_path, rows=100, row_group_size=50, change=lambda i: {"answer": ""})
    sampler = StepOrder([Source(dataset)], 0, 1)
    with pytest.raises(ValueError, match="none of 64 candidate rows"):
        list(make_loader(sampler, _sample, total_steps=1))


def _reject_long(row: Row) -> str:
    if row.row % 2:
        raise row.bad("too_long", "more tokens than allowed")
    return _pid(row)


def _bug(row: Row) -> str:
    raise KeyError("a bug in prepare")


def test_prepare_may_reject_but_its_bugs_surface(tmp_path: Path) -> None:
    dataset = _dataset(tmp_path, rows=6)
    sampler = StepOrder([Source(dataset)], 0, 6)
    (rows,) = make_loader(sampler, _reject_long, total_steps=1)
    assert {int(value.split("-")[1]) % 2 for value in rows.values} == {0}
    assert {reject.reason for reject in rows.rejects} == {"too_long"}
    with pytest.raises(KeyError) as caught:
        list(make_loader(sampler, _bug, total_steps=1))
    assert "train-00000-of-00001.parquet row" in caught.value.__notes__[0]


def test_workers_survive_signals_to_the_process_group(sampler: StepOrder) -> None:
    loader = make_loader(
        sampler, _pid, total_steps=40, num_workers=1, prefetch_factor=1
    )  # fmt: skip
    before = {process.pid for process in multiprocessing.active_children()}
    steps = iter(loader)
    seen = [next(steps).step]
    (worker,) = (p for p in multiprocessing.active_children() if p.pid not in before)
    assert worker.pid is not None
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(worker.pid, number)
    seen += [rows.step for rows in steps]
    assert seen == list(range(40))
    worker.join(10)
    assert not worker.is_alive()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_global_random_state_is_left_alone(sampler: StepOrder, num_workers: int) -> None:
    before = torch.random.get_rng_state()
    list(make_loader(sampler, _pid, total_steps=2, num_workers=num_workers))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_loader_arguments(sampler: StepOrder) -> None:
    for wrong in ({"num_workers": -1}, {"num_workers": 1, "prefetch_factor": 0}):
        with pytest.raises(AssertionError):
            make_loader(sampler, _pid, total_steps=1, **wrong)
    assert list(make_loader(sampler, _pid, start_step=5, total_steps=3)) == []


def test_open_sources(tmp_path: Path) -> None:
    write_dataset(tmp_path, "My_World", rows=3)
    write_dataset(tmp_path, "My_World", rows=2, split="heldout")
    config = [
        DatasetSource("My_World"),
        DatasetSource("My_World", 0.5, 2, "heldout"),
        DatasetSource("Visual_Search", 0.0),  # not there, and not asked for
    ]
    sources = open_sources(config, root=tmp_path)
    assert [(len(s.dataset), s.dataset.split, s.weight) for s in sources] == [
        (3, "train", 1.0),
        (2, "heldout", 0.5),
    ]
    with pytest.raises(ValueError, match=r"download_model\.py --datasets"):
        open_sources([DatasetSource("Visual_Search")], root=tmp_path)
    with pytest.raises(ValueError, match="no dataset with a weight above 0"):
        open_sources([], root=tmp_path)
