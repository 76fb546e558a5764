# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Steps and ViTs as CUDA graphs: what they keep, what they let go, where they give up.

Without a GPU the capture itself is left out, everything around it is as it is there.
"""

from __future__ import annotations

import gc
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor, nn

from data.packing import pack
from modeling import fast, load_bagel
from modeling.bagel import graphs, vit_graphs
from modeling.bagel.graphs import RepeatedStep
from modeling.bagel.kv_cache import KVCache
from modeling.bagel.vision import image_layout
from modeling.bagel.vit_graphs import drop_vit_graphs, run_vit
from tests.conftest import TINY_BAGEL
from tests.modeling.segments import image, text

LENS = (4, 8)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Graphs wherever the weights are whole and no gradient is wanted."""
    monkeypatch.setattr(vit_graphs, "_can_capture", lambda *_: not torch.is_grad_enabled())
    vit_graphs._OF_MODELS.clear()
    yield
    vit_graphs._OF_MODELS.clear()


def loaded() -> Any:
    return load_bagel(TINY_BAGEL, device=DEVICE, dtype=torch.bfloat16)


def patches_of(model: Any) -> tuple[Tensor, Tensor]:
    patches = torch.rand(sum(LENS), model.config.vision.patch_dim, device=DEVICE)
    return patches, torch.arange(sum(LENS), device=DEVICE)


def graph_of(vit: nn.Module) -> Any:
    (graph,) = vit_graphs._OF_MODELS[vit].by_size.values()  # type: ignore[index]
    return graph


@pytest.mark.usefixtures("captures")
def test_a_size_is_captured_the_second_time() -> None:
    """New patches and new weights are read; weights that moved are noticed."""
    vit = loaded().model.vit_model
    model: Any = SimpleNamespace(config=loaded().model.config)

    def compare() -> None:
        patches, positions = patches_of(model)
        with torch.no_grad():
            actual = run_vit(vit, patches, positions, LENS)
            assert torch.equal(actual, vit(patches, positions, LENS))

    compare()
    assert graph_of(vit) is None
    for _ in range(3):
        compare()
    graph = graph_of(vit)
    assert graph is not None
    assert (graph.step.graph is not None) == (DEVICE == "cuda")
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.mul_(1.01)
    compare()
    assert graph_of(vit) is graph
    first = next(vit.parameters())
    first.data = first.data.clone()
    compare()
    assert graph_of(vit) is None
    drop_vit_graphs(nn.ModuleList([vit]))
    assert vit not in vit_graphs._OF_MODELS


@pytest.mark.usefixtures("captures")
def test_a_graph_keeps_its_layout_and_not_the_model() -> None:
    """Its attention reads what the layout holds; a model that is dropped is freed."""
    bundle = loaded()
    vit = bundle.model.vit_model
    inputs = patches_of(bundle.model)
    image_layout.cache_clear()
    with torch.no_grad():
        for _ in range(2):
            run_vit(vit, *inputs, LENS)
        layout, model = ref(image_layout(LENS)), ref(vit)
        for side in range(1, 80):  # more than are remembered
            image_layout((side,))
        gc.collect()
        assert layout() is graph_of(vit).layout
    del bundle, vit
    gc.collect()
    assert model() is None
    assert layout() is None
    assert not vit_graphs._OF_MODELS


@pytest.mark.usefixtures("captures")
def test_no_more_than_some_sizes_are_remembered() -> None:
    vit = loaded().model.vit_model
    patches, positions = patches_of(loaded().model)
    for side in range(1, 13):
        with torch.no_grad():
            run_vit(vit, patches[:side], positions[:side], (side,))
    assert len(vit_graphs._OF_MODELS[vit].by_size) == 8


@pytest.mark.usefixtures("captures")
def test_only_prompts_are_captured() -> None:
    """A forward under FSDP communicates, so that none is captured; a cache is filled by replays."""
    bundle = loaded()
    model = bundle.model
    packed = pack([(text(4), image(3, model), text(3))], bundle.special_tokens).to(DEVICE)

    def filled() -> KVCache:
        cache = KVCache(model.config.llm, 1, 40, DEVICE, model.dtype)
        model.fill_cache(packed, cache)
        return cache

    with torch.no_grad():
        for _ in range(3):
            model(packed)
        assert not vit_graphs._OF_MODELS
        caches = [filled() for _ in range(3)]
    assert graph_of(model.vit_model) is not None
    for cache in caches[1:]:
        for one, other in zip(cache.keys, caches[0].keys, strict=True):
            assert torch.equal(one, other)


@pytest.mark.usefixtures("captures")
def test_inference_mode_leaves_nothing_behind() -> None:
    """Captured in a caller's inference mode, used and trained after it."""
    bundle = loaded()
    vit = bundle.model.vit_model
    inputs = patches_of(bundle.model)
    image_layout.cache_clear()
    with torch.inference_mode():
        expected = [run_vit(vit, *inputs, LENS) for _ in range(2)][1].clone()
    with torch.no_grad():
        found = run_vit(vit, *inputs, LENS)
    assert torch.equal(found, expected)
    vit(*inputs, LENS).sum().backward()
    made = image_layout(LENS).memo("made", lambda: torch.arange(3))
    with torch.inference_mode():
        again = image_layout((5,)).memo("made", lambda: torch.arange(3))
    assert not made.is_inference()
    assert not again.is_inference()


def test_a_shard_is_never_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is a ViT with a weight elsewhere, or a call that wants a gradient."""

    class Shard(Tensor):
        pass

    monkeypatch.setattr(vit_graphs, "choose_backend", lambda *_: "blocks")
    monkeypatch.setattr(fast, "is_on", lambda _: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    here = torch.zeros(0, device=DEVICE).device  # with its number, as tensors name it

    class Patches:
        is_cuda, device = True, here

        def __len__(self) -> int:
            return 12

    patches: Any = Patches()
    whole = [nn.Parameter(torch.zeros(2, device=here)) for _ in range(3)]
    may: Callable[[Any], bool] = lambda weights: vit_graphs._can_capture(weights, patches, LENS)  # noqa: E731
    with torch.no_grad():
        assert may(whole)
        assert not may([*whole, nn.Parameter(torch.zeros(2, device="meta"))])
        shard: Any = SimpleNamespace(data=torch.zeros(2, device=here).as_subclass(Shard))
        shard.device = here
        assert not may([whole[0], shard, whole[1]])
    assert not may(whole)


# -------------------------------------------------------------------------------- steps


class FakeGraph:
    """Of a GPU that is not here: replays what was captured."""

    def __init__(self, step: Callable[[], None]) -> None:
        self.replay = step


class CapturedStep(RepeatedStep):
    """Captures as on a GPU; so many attempts fail, with what they took in their frames."""

    def __init__(self, step: Callable[[], None], failures: list[str]) -> None:
        super().__init__(step, torch.device("cuda"))
        self.captures, self.failures = True, failures
        self.attempts: list[ref[FakeGraph]] = []

    def _capture(self) -> Any:
        graph = FakeGraph(self.step)
        self.attempts.append(ref(graph))
        if self.failures:
            message = self.failures.pop()
            raise torch.OutOfMemoryError(message) if "Tried" in message else RuntimeError(message)
        return graph


OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate"
DRIVER = "CUDA error: out of memory"


@pytest.mark.parametrize(
    ("failures", "captured"),
    [
        ([], True),
        ([OUT_OF_MEMORY], True),
        ([DRIVER], True),
        ([DRIVER, OUT_OF_MEMORY], False),
    ],
)
def test_a_graph_that_finds_no_memory(
    failures: list[str], captured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once more with the memory of the first attempt given back, then plainly; no call is lost."""
    calls: list[int] = []
    step = CapturedStep(lambda: calls.append(1), [*failures])
    held: list[Any] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: held.append(step.attempts[-1]()))
    for count in range(1, 5):
        step()
        assert len(calls) == count
    assert (step.graph is not None, step.captures) == (captured, captured)
    assert len(step.attempts) == len(failures) + captured
    assert held == [None] * len(failures)


def test_other_errors_of_a_capture_are_raised() -> None:
    step = CapturedStep(lambda: None, ["operation not permitted when stream is capturing"])
    step()
    with pytest.raises(RuntimeError, match="not permitted"):
        step()


def test_graphs_that_live_share_no_stream_and_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuBLAS keeps a workspace a stream in a graph's memory; both come round again."""
    used: list[int] = []
    made: list[int] = []
    memory: list[int] = []  # of each graph
    new = itertools.count(1)

    class Stream:
        def __init__(self) -> None:
            made.append(0)
            self.number = len(made)

        def wait_stream(self, _: Any) -> None:
            pass

    class Graph:
        def capture_begin(self, pool: int | None, **_: Any) -> None:
            self.memory = pool or next(new)
            memory.append(self.memory)

        def pool(self) -> int:
            return self.memory

        def capture_end(self) -> None:
            pass

        def replay(self) -> None:
            pass

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        used.append(stream.number)
        yield

    monkeypatch.setattr(graphs, "_FREE", defaultdict(list))
    for name, value in {
        "CUDAGraph": Graph, "Stream": Stream, "stream": on, "current_device": lambda: 0,
        "current_stream": lambda: SimpleNamespace(wait_stream=lambda _: None),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)

    def captured_step() -> RepeatedStep:
        step = RepeatedStep(lambda: None, torch.device("cuda"))
        step.captures = True
        step()
        step()
        return step

    living = [captured_step() for _ in range(3)]
    assert used == [1, 2, 3]
    del living[1]
    living.append(captured_step())
    living.append(captured_step())
    assert used == memory == [1, 2, 3, 2, 4]


@pytest.mark.cuda
@needs_gpu
def test_graphs_one_after_the_other_take_no_more_memory() -> None:
    """As a rollout a step does: torch would keep 2 MiB and more of each."""
    device = torch.device("cuda")
    weight, state = (torch.randn(512, 512, device=device) for _ in range(2))

    def advance() -> None:
        state.copy_((state @ weight).tanh())

    def once() -> float:
        step = RepeatedStep(advance, device)
        for _ in range(3):
            step()
        assert step.graph is not None
        return float(state.sum())

    once()
    before = torch.cuda.memory_reserved()
    for _ in range(20):
        once()
    assert torch.cuda.memory_reserved() == before


@pytest.mark.usefixtures("captures")
def test_threads_do_not_get_each_others_images() -> None:
    vit = loaded().model.vit_model
    model: Any = SimpleNamespace(config=loaded().model.config)
    inputs = [patches_of(model) for _ in range(2)]
    with torch.no_grad():
        expected = [vit(*each, LENS) for each in inputs]
        for _ in range(2):
            run_vit(vit, *inputs[0], LENS)

    def look(which: int) -> bool:
        with torch.no_grad():
            seen = [run_vit(vit, *inputs[which], LENS) for _ in range(60)]
        return all(torch.equal(one, expected[which]) for one in seen)

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(look, (0, 1)))


@pytest.mark.cuda
@needs_gpu
def test_prompts_replay_the_vit() -> None:
    """As users have it: the third prompt of a size is a replay, the same as the first."""
    bundle = loaded()
    model = bundle.model
    packed = pack([(text(4), image(3, model), text(3))], bundle.special_tokens).to("cuda")
    caches = []
    with torch.inference_mode():
        for _ in range(3):
            caches.append(KVCache(model.config.llm, 1, 40, "cuda", model.dtype))
            model.fill_cache(packed, caches[-1])
    assert graph_of(model.vit_model).step.graph is not None
    for one, other in zip(caches[2].keys, caches[0].keys, strict=True):
        assert torch.equal(one, other)
