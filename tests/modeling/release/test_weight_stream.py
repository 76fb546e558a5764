# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Filling tensors from weight files with threads."""

from __future__ import annotations

import errno
import itertools
import json
import os
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import modeling.release.weight_stream as weight_stream
from modeling.release.weight_files import FLOAT_DTYPES, StoredTensor, open_weights, read_file
from modeling.release.weight_stream import plan_pieces, read_piece, stream_weights, streaming

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Of one file: odd and even numbers of elements, none, one, and more than a piece holds.
SHAPES = [(7, 11), (0, 5), (), (1,), (3, 1000), (64, 64), (5,), (4099,), (2, 0)]
Sources = dict[str, StoredTensor]


def random_tensors(dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {
        f"{seed}.t{i}": torch.randn(shape, generator=random).to(dtype)
        for i, shape in enumerate(SHAPES)
    }


def write_by_hand(file: Path, entries: dict[str, Any], data: bytes) -> Path:
    """key -> (dtype name, shape, first and last byte), which may be nonsense."""
    header = {
        key: {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}
        for key, (dtype, shape, start, stop) in entries.items()
    }
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return file


@pytest.fixture
def make_file(tmp_path: Path) -> Callable[..., Sources]:
    def make(tensors: dict[str, Tensor], name: str = "model") -> Sources:
        save_file(tensors, tmp_path / f"{name}.safetensors")
        return read_file(tmp_path / f"{name}.safetensors")

    return make


def empty_like(sources: Sources, dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor]:
    """Targets that hold NaN, so that a byte that is not written is seen."""
    return {
        k: torch.full(s.shape, float("nan"), dtype=dtype, device=device) for k, s in sources.items()
    }


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        assert actual[key].dtype == tensor.dtype and actual[key].shape == tensor.shape, key
        bits = [t.cpu().reshape(-1).view(torch.uint8) for t in (actual[key], tensor)]
        assert torch.equal(*bits), key


# -- the plan ---------------------------------------------------------------------------------


@pytest.mark.parametrize("piece_bytes", [8, 100, 4096, 1 << 20])
def test_pieces_hold_every_byte_once(piece_bytes: int, make_file: Callable[..., Sources]) -> None:
    wide, half = random_tensors(torch.float32), random_tensors(torch.bfloat16, 1)
    sources = make_file({**wide, **half})
    pieces = list(plan_pieces(sources, piece_bytes))
    seen: dict[str, int] = {}
    for piece in pieces:
        assert 0 < piece.nbytes <= piece_bytes
        assert sum(part.nbytes for part in piece.parts) == piece.nbytes
        for part in piece.parts:
            source = sources[part.key]
            assert part.first == seen.get(part.key, 0), "a tensor's parts come in order"
            assert piece.start + part.offset == source.start + part.first
            assert part.first % FLOAT_DTYPES[source.dtype].itemsize == 0
            seen[part.key] = part.first + part.nbytes
    assert seen == {k: s.nbytes for k, s in sources.items() if s.nbytes}
    if piece_bytes == 1 << 20:
        assert len(pieces) == 1, "neighbours share a piece"


def test_pieces_skip_what_is_not_wanted(make_file: Callable[..., Sources]) -> None:
    sources = make_file({f"t{i}": torch.zeros(100) for i in range(5)})
    del sources["t1"]
    pieces = list(plan_pieces(sources, 1 << 20))
    assert [[part.key for part in piece.parts] for piece in pieces] == [["t0"], ["t2", "t3", "t4"]]
    assert [piece.nbytes for piece in pieces] == [400, 1200]
    # 800 bytes end inside an element of neither t2 nor t3, but of a piece of 802.
    cuts = list(plan_pieces(sources, 802))
    assert [piece.nbytes for piece in cuts] == [400, 800, 400]


# -- filling ----------------------------------------------------------------------------------


@pytest.mark.parametrize("piece_bytes", [8, 100, 4096, 1 << 20])
@pytest.mark.parametrize("wanted", DTYPES)
@pytest.mark.parametrize("stored", DTYPES)
def test_bit_equal_to_reading_one_by_one(
    stored: torch.dtype,
    wanted: torch.dtype,
    piece_bytes: int,
    make_file: Callable[..., Sources],
) -> None:
    sources = make_file(random_tensors(stored))
    targets = empty_like(sources, wanted)
    stream_weights(sources, targets, threads=3, piece_bytes=piece_bytes)
    stream_weights({}, {})  # nothing to read
    assert_same(targets, {key: source.get(dtype=wanted) for key, source in sources.items()})


def test_several_files_and_dtypes(make_file: Callable[..., Sources]) -> None:
    mixed = {**random_tensors(torch.float64), **random_tensors(torch.bfloat16, 1)}
    sources = make_file(mixed, "one") | make_file(random_tensors(torch.float16, 2), "two")
    assert len({source.file for source in sources.values()}) == 2
    targets = empty_like(sources, torch.bfloat16)
    stream_weights(sources, targets, piece_bytes=1000)
    assert_same(targets, {k: s.get(dtype=torch.bfloat16) for k, s in sources.items()})


def test_pieces_end_with_the_file(make_file: Callable[..., Sources]) -> None:
    one, two = (make_file({n: torch.randn(9) for n in "ab"}, name) for name in ("one", "two"))
    sources = {"a": one["a"], "b": two["b"]}
    assert sources["a"].stop == sources["b"].start
    targets = empty_like(sources, torch.float32)
    stream_weights(sources, targets)
    assert_same(targets, {"a": one["a"].get(), "b": two["b"].get()})


def test_elements_at_odd_bytes(tmp_path: Path) -> None:
    entries = {"a": ("F16", [1], 0, 2), "b": ("F32", [5], 2, 22)}
    values = torch.randn(5)
    data = bytes(2) + values.view(torch.uint8).numpy().tobytes()
    sources = read_file(write_by_hand(tmp_path / "odd.safetensors", entries, data))
    targets = empty_like(sources, torch.bfloat16)
    stream_weights(sources, targets)
    assert_same(targets, {"a": torch.zeros(1).bfloat16(), "b": values.bfloat16()})


def test_a_folder_with_an_index(tiny_bagel_path: Path, tmp_path: Path) -> None:
    tensors = load_file(tiny_bagel_path / "model.safetensors")
    names = {key: f"part{i % 2}.safetensors" for i, key in enumerate(tensors)}
    for name in set(names.values()):
        save_file({key: t for key, t in tensors.items() if names[key] == name}, tmp_path / name)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    sources = open_weights(tmp_path)
    targets = empty_like(sources, torch.float32)
    stream_weights(sources, targets, piece_bytes=10_000)
    assert_same(targets, tensors)


def test_targets_may_be_parts_of_one_tensor(make_file: Callable[..., Sources]) -> None:
    tensors = {name: torch.randn(rows, 16) for name, rows in (("q", 8), ("k", 2), ("v", 2))}
    sources = make_file(tensors)
    fused = torch.full((14, 16), float("nan"))
    targets = dict(zip(tensors, fused[1:13].split([8, 2, 2]), strict=True))
    stream_weights(sources, targets, piece_bytes=72)
    assert torch.equal(fused[1:13], torch.cat(list(tensors.values())))
    assert fused[[0, 13]].isnan().all(), "written beside the targets"


def test_parameters_and_inference_tensors(make_file: Callable[..., Sources]) -> None:
    sources = make_file({"a": torch.randn(50), "b": torch.randn(50).bfloat16()})
    parameters = {key: nn.Parameter(torch.zeros(50)) for key in sources}
    stream_weights(sources, parameters)
    with torch.inference_mode():
        made_there = empty_like(sources, torch.float32)
        stream_weights(sources, made_there)
    expected = {key: source.get(dtype=torch.float32) for key, source in sources.items()}
    assert_same({key: p.detach() for key, p in parameters.items()}, expected)
    assert_same(made_there, expected)
    assert all(p.requires_grad and p.grad_fn is None for p in parameters.values())


def test_wrong_targets(make_file: Callable[..., Sources]) -> None:
    sources = make_file({"a": torch.ones(4, 4)})
    with pytest.raises(AssertionError, match="'a'"):
        stream_weights(sources, {"a": torch.zeros(16)})
    with pytest.raises(AssertionError, match="a"):
        stream_weights(sources, {"a": torch.zeros(4, 4).t()})
    with pytest.raises(AssertionError, match="no targets"), streaming(sources, torch.device("cpu")):
        pass


@pytest.mark.parametrize("cores", [1, 16])
def test_readers_by_cores(
    cores: int, make_file: Callable[..., Sources], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One reader where torch spreads its copies, many where it has a single core."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: cores)
    threads, piece_bytes = weight_stream.usual_readers()
    assert (threads == 1) == (cores == 16)
    made: list[int] = []

    def counted(nbytes: int, pinned: bool) -> Tensor:
        made.append(nbytes)
        return torch.empty(nbytes, dtype=torch.uint8)

    monkeypatch.setattr(weight_stream, "staging_memory", counted)
    sources = make_file(random_tensors(torch.float32))
    targets = empty_like(sources, torch.float32)
    stream_weights(sources, targets)
    assert set(made) == {piece_bytes}
    assert_same(targets, {key: source.get() for key, source in sources.items()})


def test_few_buffers_serve_many_pieces(
    make_file: Callable[..., Sources], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ring is all the memory that reading takes, however large the file."""
    made: list[int] = []

    def counted(nbytes: int, pinned: bool) -> Tensor:
        made.append(nbytes)
        assert not pinned, "only copies to a GPU need pinned memory"
        return torch.empty(nbytes, dtype=torch.uint8)

    monkeypatch.setattr(weight_stream, "staging_memory", counted)
    sources = make_file({"a": torch.randn(64, 1000)})
    targets = empty_like(sources, torch.float32)
    stream_weights(sources, targets, threads=2, piece_bytes=1000)
    assert len(list(plan_pieces(sources, 1000))) == 256
    assert 0 < len(made) <= 2 + weight_stream.SPARE_BUFFERS and set(made) == {1000}
    assert_same(targets, {"a": sources["a"].get()})


def test_reading_begins_before_the_targets_are_there(
    make_file: Callable[..., Sources], monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = make_file({"a": torch.randn(64, 100)})
    reading = threading.Event()

    def read(*arguments: Any) -> None:
        reading.set()
        read_piece(*arguments)

    monkeypatch.setattr(weight_stream, "read_piece", read)
    with streaming(sources, torch.device("cpu"), piece_bytes=1000) as fill:
        assert reading.wait(10)
        targets = empty_like(sources, torch.float32)
        fill(targets)
    assert_same(targets, {"a": sources["a"].get()})


class LateGpu:
    """Stands for CUDA's streams and events; copies happen when somebody waits, not before."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.device, self.ordered, self.waits = torch.device("cpu"), False, 0
        self._queue: list[Callable[[], None]] = []
        self._ended, self._turn = 0, threading.Lock()
        deliver, gpu = weight_stream._deliver, self

        class Event:
            def __init__(self) -> None:
                self.until = 0

            def record(self) -> None:
                self.until = len(gpu._queue)

            def synchronize(self) -> None:
                gpu.waits += 1
                gpu.synchronize(self.until)

        def queue(*copy: Any) -> None:
            assert gpu.ordered, "copied before the memory's earlier use has ended"
            gpu._queue.append(lambda: deliver(*copy))

        monkeypatch.setattr(weight_stream, "_deliver", queue)
        monkeypatch.setattr(
            weight_stream, "staging_memory", lambda n, pinned: torch.empty(n).byte()
        )
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: self)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "the caller's")

    def wait_stream(self, stream: str) -> None:
        self.ordered = stream == "the caller's"

    def synchronize(self, until: int | None = None) -> None:
        with self._turn:
            until = len(self._queue) if until is None else until
            for copy in self._queue[self._ended : until]:
                copy()
            self._ended = max(self._ended, until)


def test_a_buffer_is_filled_again_after_its_copies(
    make_file: Callable[..., Sources], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = LateGpu(monkeypatch)
    sources = make_file({"a": torch.randn(64, 100), "b": torch.randn(900).bfloat16()})
    targets = empty_like(sources, torch.float32)
    with streaming(sources, torch.device("cuda"), threads=3, piece_bytes=500) as fill:
        fill(targets)
    assert gpu.waits == len(list(plan_pieces(sources, 500))) - 3 - weight_stream.SPARE_BUFFERS
    assert_same(targets, {key: source.get(dtype=torch.float32) for key, source in sources.items()})


# -- errors -----------------------------------------------------------------------------------


def test_a_file_cut_after_it_was_opened(make_file: Callable[..., Sources]) -> None:
    sources = make_file({"a.first": torch.ones(5000), "b.second": torch.ones(5000)})
    file = sources["a.first"].file
    os.truncate(file, sources["b.second"].start + 100)
    with pytest.raises(
        ValueError, match=r"cannot be read: it ends inside b\.second.*fetch it again"
    ):
        stream_weights(sources, empty_like(sources, torch.float32), piece_bytes=1 << 20)
    with pytest.raises(ValueError, match=f"{file.name} cannot be read: it ends inside b.second"):
        stream_weights(sources, empty_like(sources, torch.float32), piece_bytes=512)


def test_an_error_in_one_thread_stops_the_others(
    make_file: Callable[..., Sources], monkeypatch: pytest.MonkeyPatch
) -> None:
    reads, turn = [], itertools.count()

    def broken(_: Any, piece: weight_stream.Piece, memory: Tensor) -> None:
        reads.append(piece.start)
        if next(turn) == 5:
            raise OSError(errno.EIO, "the disk is broken")
        time.sleep(0.005)  # as long as a disk takes, so that threads take turns

    monkeypatch.setattr(weight_stream, "read_piece", broken)
    sources = make_file({"a": torch.randn(100, 100)})
    before = threading.active_count()
    with pytest.raises(OSError, match="the disk is broken"):
        stream_weights(sources, empty_like(sources, torch.float32), threads=3, piece_bytes=100)
    assert 5 < len(reads) < 20, "of 400"
    assert threading.active_count() == before


def test_an_error_of_the_block_stops_the_threads(make_file: Callable[..., Sources]) -> None:
    sources = make_file({"a": torch.randn(100, 100)})
    os.truncate(sources["a"].file, sources["a"].start)  # the block's own error comes first
    before = threading.active_count()
    for given in (False, True):
        with (
            pytest.raises(KeyError, match="the block"),
            streaming(sources, torch.device("cpu")) as fill,
        ):
            if given:
                fill(empty_like(sources, torch.float32))
            raise KeyError("the block")
    assert threading.active_count() == before


# -- on a GPU ---------------------------------------------------------------------------------

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.mark.cuda
@needs_gpu
@pytest.mark.parametrize("piece_bytes", [1000, 1 << 16])
@pytest.mark.parametrize("wanted", DTYPES)
@pytest.mark.parametrize("stored", DTYPES)
def test_filling_gpu_tensors(
    stored: torch.dtype,
    wanted: torch.dtype,
    piece_bytes: int,
    make_file: Callable[..., Sources],
) -> None:
    """Many turns of the ring, beside a stream of the caller's that is busy with the memory."""
    big = {f"big{i}": torch.randn(300, 1000).to(stored) for i in range(3)}
    sources = make_file({**random_tensors(stored), **big})
    expected = {key: source.get(dtype=wanted) for key, source in sources.items()}
    with torch.cuda.stream(torch.cuda.Stream()):
        work = torch.randn(4096, 4096, device="cuda")
        torch.cuda.synchronize()
        for _ in range(20):
            work = work @ work
        targets = empty_like(sources, wanted, "cuda")  # written only after the products
        stream_weights(sources, targets, threads=4, piece_bytes=piece_bytes)
        assert_same(targets, expected)


@pytest.mark.cuda
@needs_gpu
def test_errors_on_the_way_to_a_gpu(make_file: Callable[..., Sources]) -> None:
    sources = make_file({"a.first": torch.ones(5000), "b.second": torch.ones(5000)})
    os.truncate(sources["a.first"].file, sources["b.second"].start + 100)
    with pytest.raises(ValueError, match=r"it ends inside b\.second"):
        stream_weights(sources, empty_like(sources, torch.float32, "cuda"), piece_bytes=512)
    torch.cuda.synchronize()
