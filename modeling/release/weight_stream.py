# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Fill tensors on a GPU from weight files, in the time of the slower of reading and copying.

Pieces of the mapped files are copied into a small ring of pinned buffers, by as many cores as torch
uses, and on from there by a side stream; a buffer is filled again once its last copy has ended. So
later pieces are read while earlier ones travel. With tensors on the CPU the same code runs on
ordinary memory, without a stream.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import torch
from torch import Tensor

from modeling.release.weight_files import FLOAT_DTYPES, StoredTensor, damaged

# One core takes some 5 GB/s out of the page cache and PCIe 5 carries about 55: a dozen must read.
# Where torch has the cores, one thread that hands it large pieces is best: the interpreter has
# little to do (53 GB/s measured, against 37 of twelve threads). `scripts.bench.load` measures other
# choices. Pinning costs about 0.5 s a GiB, and the whole load shall take little more than 0.3 s:
# so the ring is small.
MANY_CORES = 8
ONE_READER = (1, 32 * 2**20)  # threads, bytes of a piece
READERS = (12, 8 * 2**20)
SPARE_BUFFERS = 2


def usual_readers() -> tuple[int, int]:
    """Threads and bytes of a piece: by the cores that torch may use."""
    return ONE_READER if torch.get_num_threads() >= MANY_CORES else READERS


@dataclass(frozen=True)
class Part:
    """A run of one tensor's bytes inside a piece."""

    key: str
    first: int  # byte of the tensor
    nbytes: int
    offset: int  # byte of the piece


@dataclass
class Piece:
    """A run of one file's bytes that is read at once; tensors that lie side by side share it."""

    file: Path
    start: int  # byte of the file
    nbytes: int = 0
    parts: list[Part] = field(default_factory=list)


def plan_pieces(sources: Mapping[str, StoredTensor], piece_bytes: int) -> Iterator[Piece]:
    """Pieces of at most `piece_bytes` that hold the tensors' bytes once and no others.

    In the order of the files. A tensor is cut between two elements only.
    """
    assert piece_bytes >= max(dtype.itemsize for dtype in FLOAT_DTYPES.values()), piece_bytes
    piece: Piece | None = None
    for key, source in sorted(sources.items(), key=lambda kv: (str(kv[1].file), kv[1].start)):
        width = FLOAT_DTYPES[source.dtype].itemsize
        at = source.start
        while at < source.stop:
            room = 0
            if piece is not None and (piece.file, piece.start + piece.nbytes) == (source.file, at):
                room = (piece_bytes - piece.nbytes) // width * width
            if piece is None or not room:
                if piece is not None:
                    yield piece
                piece, room = Piece(source.file, at), piece_bytes // width * width
            taken = min(room, source.stop - at)
            piece.parts.append(Part(key, at - source.start, taken, piece.nbytes))
            piece.nbytes += taken
            at += taken
    if piece is not None:
        yield piece


class MappedFile:
    """A file's bytes in memory: pages of the file, not of the process."""

    def __init__(self, file: Path) -> None:
        self.stream = file.open("rb", buffering=0)
        array = np.memmap(self.stream, dtype=np.uint8, mode="r")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # nothing writes to what is read-only
            self.bytes = torch.from_numpy(array)

    def __enter__(self) -> MappedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()
        del self.bytes


def read_piece(file: MappedFile, piece: Piece, memory: Tensor) -> None:
    """Copy a piece of a file to the beginning of `memory`; other threads run meanwhile.

    Raises:
        ValueError: the file ends before the piece does.
    """
    # To touch a page behind the end of a file kills the process.
    length = os.fstat(file.stream.fileno()).st_size - piece.start
    if length < piece.nbytes:
        key = next(part.key for part in piece.parts if length < part.offset + part.nbytes)
        raise damaged(piece.file, f"it ends inside {key}")
    memory[: piece.nbytes].copy_(file.bytes[piece.start : piece.start + piece.nbytes])


def staging_memory(nbytes: int, pinned: bool) -> Tensor:
    """(nbytes,) uint8, pinned for copies to a GPU.

    Freed pinned memory stays with torch's allocator, for whoever asks for as much again.
    """
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=pinned)


class _Buffer:
    def __init__(self, nbytes: int, pinned: bool) -> None:
        self.bytes = staging_memory(nbytes, pinned)
        self.copied = torch.cuda.Event() if pinned else None


class _Ring:
    """Staging buffers, given out in the order in which their copies were queued."""

    def __init__(self, count: int, nbytes: int, pinned: bool) -> None:
        self._nbytes, self._pinned = nbytes, pinned
        self._free: SimpleQueue[_Buffer | None] = SimpleQueue()
        for _ in range(count):
            self._free.put(None)  # made when first needed, by its reader, while others read

    def take(self) -> _Buffer:
        """A buffer whose copies have ended (never waits for another thread's buffer)."""
        buffer = self._free.get()
        if buffer is None:
            return _Buffer(self._nbytes, self._pinned)
        if buffer.copied is not None:
            buffer.copied.synchronize()
        return buffer

    def give(self, buffer: _Buffer) -> None:
        """Return a buffer whose copies are queued on the current stream."""
        if buffer.copied is not None:
            buffer.copied.record()
        self._free.put(buffer)


@dataclass(frozen=True)
class _Target:
    """Where a source goes: its elements, or its bytes where nothing is cast."""

    flat: Tensor
    stored: torch.dtype
    cast: bool

    @classmethod
    def of(cls, target: Tensor, stored: torch.dtype) -> _Target:
        flat = target.reshape(-1)  # contiguous, so a view
        cast = target.dtype != stored
        return cls(flat if cast else flat.view(torch.uint8), stored, cast)


def _deliver(part: Part, data: Tensor, target: _Target) -> None:
    """Queue the copy of a part's bytes (nbytes,) to its place in `target`."""
    if not target.cast:
        target.flat[part.first : part.first + part.nbytes].copy_(data, non_blocking=True)
        return
    # Cast where it goes: a GPU casts faster, and torch would cast on the CPU first.
    arrived = data.to(target.flat.device, non_blocking=True, copy=True).view(target.stored)
    first = part.first // target.stored.itemsize
    target.flat[first : first + arrived.numel()].copy_(arrived)


@contextmanager
def streaming(
    sources: Mapping[str, StoredTensor],
    device: torch.device,
    *,
    threads: int | None = None,
    piece_bytes: int | None = None,
) -> Iterator[Callable[[Mapping[str, Tensor]], None]]:
    """Read every source into the target of its name while the block runs.

    Reading begins at once. The block gives the targets by calling what it gets, and may go on with
    other work; all of it has arrived when the block has ended.

        with streaming(sources, device) as fill:
            fill(targets)

    Args:
        sources: stored tensors of a floating dtype, of any number of files.
        device: of all targets. Each is a contiguous tensor of its source's shape and any floating
            dtype; a part of a larger tensor will do.
        threads, piece_bytes: `usual_readers` unless given.

    Raises:
        ValueError: a file ends early. Any error of a thread stops the others and is raised when
            the block ends, unless that raises itself; the targets hold anything then.
    """
    usual = usual_readers()
    threads, piece_bytes = threads or usual[0], piece_bytes or usual[1]
    on_gpu = device.type == "cuda"
    ring = _Ring(threads + SPARE_BUFFERS, piece_bytes, pinned=on_gpu)
    side = torch.cuda.Stream(device) if on_gpu else None
    pieces: SimpleQueue[Piece | None] = SimpleQueue()
    stopped = threading.Event()
    given: Future[dict[str, _Target]] = Future()

    def fill(targets: Mapping[str, Tensor]) -> None:
        found = {}
        for key, source in sources.items():
            target = targets[key]
            assert tuple(target.shape) == source.shape, (key, target.shape, source.shape)
            assert target.is_contiguous(), key
            assert target.device == (side.device if side is not None else device), key
            found[key] = _Target.of(target.detach(), FLOAT_DTYPES[source.dtype])
        if side is not None:  # whatever the targets' memory was used for before ends first
            side.wait_stream(torch.cuda.current_stream(device))
        given.set_result(found)

    def work() -> None:
        # Inference mode, as targets may be made in it or require gradients. It, the device and
        # the stream are a thread's own.
        targets: dict[str, _Target] | None = None
        with torch.inference_mode(), torch.cuda.stream(side):
            while (piece := pieces.get()) is not None and not stopped.is_set():
                buffer = ring.take()
                read_piece(mapped[piece.file], piece, buffer.bytes)
                targets = targets or given.result()
                for part in piece.parts:
                    data = buffer.bytes[part.offset : part.offset + part.nbytes]
                    _deliver(part, data, targets[part.key])
                ring.give(buffer)

    try:
        with ExitStack() as files, ThreadPoolExecutor(threads) as pool:
            mapped = {
                file: files.enter_context(MappedFile(file))
                for file in {source.file for source in sources.values()}
            }
            jobs = [pool.submit(work) for _ in range(threads)]
            try:
                for piece in plan_pieces(sources, piece_bytes):
                    pieces.put(piece)
                for _ in range(threads):
                    pieces.put(None)
                yield fill
                assert given.done(), "the block gave no targets"
                for job in as_completed(jobs):
                    job.result()
            finally:
                stopped.set()  # after an error the others end with the piece they are at
                given.cancel()
                for _ in range(threads):
                    pieces.put(None)
    finally:
        if side is not None:  # also after an error: the caller may free what is written to
            side.synchronize()


def stream_weights(
    sources: Mapping[str, StoredTensor],
    targets: Mapping[str, Tensor],
    *,
    threads: int | None = None,
    piece_bytes: int | None = None,
) -> None:
    """Read every source into the target of its name, as `streaming` does; returns when done."""
    device = next((targets[key].device for key in sources), torch.device("cpu"))
    with streaming(sources, device, threads=threads, piece_bytes=piece_bytes) as fill:
        fill(targets)


@contextmanager
def calm_interpreter() -> Iterator[None]:
    """No cyclic garbage collection while the block runs, and quick turns between threads.

    With torch and transformers imported a full collection visits 330,000 objects: 0.14 to 0.2 s,
    half of a load to a GPU, and the objects that a load makes were enough to start one. And a
    thread that has read its piece would wait up to 5 ms, Python's usual turn, for one that builds
    the module.
    """
    was_on, turn = gc.isenabled(), sys.getswitchinterval()
    gc.disable()
    sys.setswitchinterval(1e-4)
    try:
        yield
    finally:
        sys.setswitchinterval(turn)
        if was_on:
            gc.enable()
