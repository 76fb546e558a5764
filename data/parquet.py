# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The order of training rows as a pure function of (seed, step), and the loader that follows it.

Slot s of step t with global batch size B is position t * B + s. A position picks a dataset by
weight, then the next row of that dataset's stream: a fresh permutation each epoch. Nothing else
enters, so ranks, workers and resumed runs agree without a saved cursor, whatever NumPy's version.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import hashlib
import itertools
import math
import multiprocessing
import os
import pickle
import signal
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from data.dataset_info import DatasetSource, check_sources, dataset_files
from data.randomness import (
    RANDOMNESS_VERSION,
    budget_permutation,
    dataset_uniforms,
    epoch_permutation,
)
from data.rejects import Reject, summarise
from data.row_groups import ParquetDataset, prepare_row
from data.thinkmorph import OPSD_ROWS, Row, RowNeeds

T = TypeVar("T")

MAX_CANDIDATES = 64  # of a slot that were bad, before the run ends
_CHOICE_BLOCK = 4096


@dataclass(frozen=True)
class Source:
    """A dataset with its share of the draws (see `DatasetSource`)."""

    dataset: ParquetDataset
    weight: float = 1.0
    num_used_rows: int | None = None


def open_sources(
    config: Sequence[DatasetSource], needs: RowNeeds = OPSD_ROWS, root: str | Path | None = None
) -> list[Source]:
    """Open the datasets of a config under the data root, leaving out those of weight 0.

    Raises ValueError as `dataset_files` and `ParquetDataset` do.
    """
    check_sources(list(config))
    sources = []
    for entry in config:
        if entry.weight > 0:
            files = dataset_files(entry.name, entry.split, root)
            dataset = ParquetDataset(entry.name, files, needs, split=entry.split)
            sources.append(Source(dataset, entry.weight, entry.num_used_rows))
    return sources


class StepOrder:
    """Which rows a slot of a step may take; a pure function of (sources, seed, step, slot).

    The order of a dataset depends on its name and split, its row count, its budget and the seed,
    the interleaving of datasets on the weights in the order given.
    """

    def __init__(self, sources: Sequence[Source], seed: int, global_batch_size: int) -> None:
        assert global_batch_size >= 1, global_batch_size
        self.sources, self.seed = tuple(sources), seed
        self.global_batch_size = global_batch_size
        names = [(source.dataset.name, source.dataset.split) for source in sources]
        assert names and len(set(names)) == len(names), names
        weights = np.array([source.weight for source in sources], dtype=np.float64)
        assert np.all(np.isfinite(weights) & (weights >= 0)) and weights.sum() > 0, weights
        # Upper edges of the choice intervals; the last dataset of positive weight takes the rest,
        # whatever the rounding of the sum.
        self._edges = np.cumsum(weights / weights.sum())
        self._edges[np.flatnonzero(weights)[-1] :] = 1.0
        self._used = [self._budget(source) for source in sources]
        self._orders: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
        self._blocks: OrderedDict[int, np.ndarray] = OrderedDict()
        # Draws of each dataset before block b, (blocks known + 1, datasets).
        self._before = [np.zeros(len(weights), dtype=np.int64)]

    @staticmethod
    def _budget(source: Source) -> int:
        rows, budget = len(source.dataset), source.num_used_rows
        if budget is not None and budget > rows:
            warnings.warn(
                f"dataset {source.dataset.name} has {rows} rows, fewer than num_used_rows "
                f"{budget}; all of them are used. An incomplete download? `python -m data.check`",
                stacklevel=3,
            )
        return rows if budget is None else min(budget, rows)

    def signature(self) -> str:
        """Digest of everything the order depends on; a resumed run should find it unchanged."""
        parts: list[object] = [RANDOMNESS_VERSION, self.seed, self.global_batch_size]
        for source, used in zip(self.sources, self._used, strict=True):
            groups = [(Path(g.file).name, g.rows) for g in source.dataset.groups]
            parts += [source.dataset.name, source.dataset.split, source.weight, used, groups]
        return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()

    def _choices(self, block: int) -> np.ndarray:
        """Dataset number of each position of a block, int64 (_CHOICE_BLOCK,)."""
        if block not in self._blocks:
            uniforms = dataset_uniforms(self.seed, block, _CHOICE_BLOCK)
            self._blocks[block] = np.searchsorted(self._edges, uniforms, side="right")
            if len(self._blocks) > 4:
                self._blocks.popitem(last=False)
        return self._blocks[block]

    def _draw(self, position: int) -> tuple[int, int]:
        """Dataset of a position and how many earlier positions chose the same one."""
        if len(self.sources) == 1:
            return 0, position
        block, offset = divmod(position, _CHOICE_BLOCK)
        while len(self._before) <= block:
            counts = np.bincount(self._choices(len(self._before) - 1), minlength=len(self.sources))
            self._before.append(self._before[-1] + counts)
        choices = self._choices(block)
        dataset = int(choices[offset])
        return dataset, int(self._before[block][dataset] + (choices[:offset] == dataset).sum())

    def _order(self, dataset: int, epoch: int) -> np.ndarray:
        """Permutation of the used rows of a dataset in an epoch."""
        key = (dataset, epoch)
        if key not in self._orders:
            opened, used = self.sources[dataset].dataset, self._used[dataset]
            order = epoch_permutation(self.seed, opened.name, opened.split, epoch, used)
            if used < len(opened):
                subset = budget_permutation(self.seed, opened.name, opened.split, len(opened))
                order = subset[order]
            self._orders[key] = order
            if len(self._orders) > 2 * len(self.sources):
                self._orders.popitem(last=False)
        return self._orders[key]

    def position(self, step: int, slot: int) -> int:
        """Global place of a slot: step * global_batch_size + slot."""
        assert step >= 0 and 0 <= slot < self.global_batch_size, (step, slot)
        return step * self.global_batch_size + slot

    def candidates(self, step: int, slot: int) -> Iterator[tuple[ParquetDataset, int]]:
        """(dataset, row) pairs for a slot: its own row, then the next ones of the permutation.

        The permutation is that of the slot's epoch, wrapped around, so each used row comes once.
        A replacement also keeps its own slot: decisions of slots do not depend on each other.
        """
        dataset, ordinal = self._draw(self.position(step, slot))
        used = self._used[dataset]
        epoch, start = divmod(ordinal, used)
        order = self._order(dataset, epoch)
        for offset in range(used):
            yield self.sources[dataset].dataset, int(order[(start + offset) % used])

    def slots(self, rank: int, world_size: int) -> range:
        """Contiguous share of the slots of a rank; shares differ by at most one, may be empty."""
        assert 0 <= rank < world_size, (rank, world_size)
        size = self.global_batch_size
        return range(rank * size // world_size, (rank + 1) * size // world_size)


# ------------------------------------------------------------------------------ loading


@dataclass(frozen=True)
class SlotItem(Generic[T]):
    """What `prepare` made of the first good candidate of a slot, and the rejected ones before."""

    slot: int
    position: int
    value: T
    rejects: tuple[Reject, ...] = ()


@dataclass(frozen=True)
class StepRows(Generic[T]):
    """This rank's slots of one step in slot order; empty if the rank has no slot."""

    step: int
    items: tuple[SlotItem[T], ...]

    @property
    def values(self) -> list[T]:
        return [item.value for item in self.items]

    @property
    def rejects(self) -> list[Reject]:
        return [reject for item in self.items for reject in item.rejects]

    @property
    def rows_read(self) -> int:
        return len(self.items) + len(self.rejects)


@dataclass(frozen=True)
class _Failure:
    """A ValueError of a worker: DataLoader would wrap the error itself into a traceback."""

    message: str


class _Steps(IterableDataset[Any], Generic[T]):
    """Steps [start, stop) of a rank; with workers, each builds whole steps in turn."""

    def __init__(
        self, order: StepOrder, prepare: Callable[[Row], T], slots: range, steps: range
    ) -> None:
        self.order, self.prepare = order, prepare
        self.slots, self.steps = slots, steps

    def build(self, step: int) -> StepRows[T]:
        return StepRows(step, tuple(self._fill(step, slot) for slot in self.slots))

    def _fill(self, step: int, slot: int) -> SlotItem[T]:
        """The first candidate of a slot that can be used. Raises ValueError if none can."""
        position = self.order.position(step, slot)
        rejects: list[Reject] = []
        candidates = self.order.candidates(step, slot)
        for dataset, index in itertools.islice(candidates, MAX_CANDIDATES):
            found = prepare_row(dataset, index, self.prepare, position)
            if not isinstance(found, Reject):
                return SlotItem(slot, position, found, tuple(rejects))
            rejects.append(replace(found, step=step, slot=slot))
        raise ValueError(
            f"step {step}, slot {slot}: none of {len(rejects)} candidate rows of dataset "
            f"{rejects[0].dataset} could be used: {summarise(rejects)}. "
            "`python -m data.check` shows what is wrong with the files as a whole."
        )

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        if worker is None:
            yield from map(self.build, self.steps)
            return
        for step in self.steps[worker.id :: worker.num_workers]:
            built: StepRows[T] | _Failure
            try:
                built = self.build(step)
            except ValueError as error:
                built = _Failure("; ".join([str(error), *getattr(error, "__notes__", [])]))
            # As bytes through the pipe: neither a file descriptor for each tensor nor /dev/shm,
            # both of which run out on ordinary machines.
            yield pickle.dumps(built, protocol=pickle.HIGHEST_PROTOCOL)


def _quiet_worker(closing: Any, parent: int, _: int) -> None:
    # A signal to the process group is the trainer's to handle: with dead workers it could not
    # finish its step and save.
    def end(*_: object) -> None:
        if closing.value:
            os._exit(0)

    signal.signal(signal.SIGTERM, end)
    for name in ("SIGINT", "SIGHUP", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """End this process when its parent is gone.

    DataLoader's own check joins a thread that may be writing to a full pipe nobody reads any more;
    meanwhile the worker would hold the sockets by which other ranks notice the trainer's death.
    """
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


class LostWorker(ValueError):
    """A process that reads data was killed or is stuck."""


@contextmanager
def _watching(workers: Sequence[Any], stuck_after_s: float, before: Any) -> Iterator[None]:
    """Raises LostWorker in the main thread when one of the processes dies, or after a time."""
    stuck = threading.Event()

    def check(*_: object) -> None:
        lost = next((worker for worker in workers if worker.exitcode), None)
        if lost is None:
            return
        signal.signal(signal.SIGCHLD, before)  # once: the others' ends are no news on the way out
        if stuck.is_set():
            raise LostWorker(
                f"no rows came from the data workers for {stuck_after_s:.0f} s (--timeout_s): "
                "is the storage stuck?"
            )
        raise LostWorker(
            f"data worker (process {lost.pid}) ended with code {lost.exitcode}; -9 often means "
            "that memory ran out (`dmesg` tells): lower --num_workers or --prefetch_factor, or "
            "read with --num_workers 0"
        )

    def give_up() -> None:
        stuck.set()
        for worker in workers:
            worker.kill()  # a stuck one would be waited for at the end

    timer = threading.Timer(min(stuck_after_s, threading.TIMEOUT_MAX), give_up)
    timer.daemon = True
    signal.signal(signal.SIGCHLD, check)  # interrupts the reading of half an item, too
    timer.start()
    try:
        check()
        yield
    except RuntimeError:  # DataLoader's own words for it, or anything else
        check()
        raise
    finally:
        timer.cancel()
        signal.signal(signal.SIGCHLD, before)


class StepLoader(Generic[T]):
    """Iterable of `StepRows` in step order; made by `make_loader`."""

    def __init__(
        self, steps: _Steps[T], loader: DataLoader[Any], closing: Any, stuck_after_s: float
    ) -> None:
        self._steps, self._loader, self._closing = steps, loader, closing
        self._stuck_after_s = stuck_after_s

    def __len__(self) -> int:
        return len(self._steps.steps)

    def __iter__(self) -> Generator[StepRows[T], None, None]:
        # Python ends what workers are left at exit by SIGTERM, and waits for them. They are left
        # whenever an error's traceback still holds this generator.
        atexit.register(self._let_workers_end)
        self._closing.value = False
        try:
            for item in self._items():
                if isinstance(item, bytes):
                    item = pickle.loads(item)  # from our own worker
                if isinstance(item, _Failure):
                    raise ValueError(item.message)
                yield item
        finally:
            self._let_workers_end()
            atexit.unregister(self._let_workers_end)

    def _items(self) -> Generator[Any, None, None]:
        """The loader's items. Raises LostWorker.

        DataLoader has the death of a worker raised wherever the main thread happens to be, in the
        middle of an optimiser step, say. Here it is raised where an item is waited for.
        """
        before = signal.getsignal(signal.SIGCHLD)
        made = iter(self._loader)
        workers = multiprocessing.active_children() if self._loader.num_workers else []
        if not workers:
            yield from made
            return
        signal.signal(signal.SIGCHLD, before)
        while True:
            try:
                with _watching(workers, self._stuck_after_s, before):
                    item = next(made)
            except StopIteration:
                return
            yield item

    def _let_workers_end(self) -> None:
        self._closing.value = True


def make_loader(
    order: StepOrder,
    prepare: Callable[[Row], T],
    *,
    rank: int = 0,
    world_size: int = 1,
    start_step: int = 0,
    total_steps: int,
    num_workers: int = 0,
    prefetch_factor: int = 2,
    stuck_after_s: float = math.inf,
) -> StepLoader[T]:
    """Loader of a rank's share of the steps [start_step, total_steps).

    `prepare` (picklable, a pure function of the row) turns a row into what training wants and may
    raise BadRow; the slot then takes its next candidate. Output depends neither on `num_workers`
    nor, slot by slot, on the world size. Iterating raises ValueError, naming rows and reasons,
    when `MAX_CANDIDATES` rows for a slot were all bad, and LostWorker for a worker that was
    killed, or when nothing came for `stuck_after_s` seconds.
    """
    assert num_workers >= 0 and prefetch_factor >= 1, (num_workers, prefetch_factor)
    steps = range(start_step, max(start_step, total_steps))
    dataset = _Steps(order, prepare, order.slots(rank, world_size), steps)
    closing = multiprocessing.RawValue(ctypes.c_bool, False)
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_size=None,
        num_workers=num_workers,
        prefetch_factor=prefetch_factor if num_workers else None,
        worker_init_fn=functools.partial(_quiet_worker, closing, os.getpid()),
        generator=torch.Generator(),  # or each pass would draw from the trainer's global one
    )
    return StepLoader(dataset, loader, closing, stuck_after_s)
