# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The switch of the fast paths."""

from __future__ import annotations

import gc
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from weakref import ref

import numpy as np
import pytest
import torch
from torch import nn

from data.packing import pack
from data.sequence import TextSegment
from modeling import fast, load_bagel
from modeling.bagel.attention import AttentionLayout, Block, DecodeLayout
from modeling.bagel.generate import generate
from modeling.bagel.graphs import RepeatedStep
from modeling.bagel.plan import LayerPlan, plan_layer, plan_layers
from modeling.bagel.projections import adjoin_projections, joined_weights, project_rows

TINY_BAGEL = Path(__file__).resolve().parents[1] / "tiny-bagel"


def test_names_turn_paths_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VISUAL_OPSD_EAGER", raising=False)
    assert all(fast.is_on(path) for path in fast.FAST_PATHS)
    monkeypatch.setenv("VISUAL_OPSD_EAGER", " decode, loss")
    assert [p for p in fast.FAST_PATHS if not fast.is_on(p)] == ["decode", "loss"]
    monkeypatch.setenv("VISUAL_OPSD_EAGER", "all")
    assert not any(fast.is_on(path) for path in fast.FAST_PATHS)


def test_an_unknown_name_is_an_error_that_lists_the_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VISUAL_OPSD_EAGER", "decoding")
    with pytest.raises(ValueError, match=r"names decoding; choose among .*decode.*, or all"):
        fast.is_on("rows")


def test_kernels_want_half_precision_on_a_gpu() -> None:
    assert not fast.runs_kernels("rows", torch.zeros(2))
    if torch.cuda.is_available() and fast.has_triton():
        assert not fast.runs_kernels("rows", torch.zeros(2, device="cuda"))
        assert fast.runs_kernels("rows", torch.zeros(2, device="cuda", dtype=torch.bfloat16))


def on_gpu(index: int, dtype: torch.dtype = torch.bfloat16) -> Any:
    device = SimpleNamespace(index=index, type="cuda")
    return SimpleNamespace(is_cuda=True, dtype=dtype, device=device)


def test_kernels_run_on_the_current_gpu_if_it_is_new_enough(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("VISUAL_OPSD_EAGER", raising=False)
    capabilities = {0: (9, 0), 1: (8, 0), 2: (7, 5)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)
    monkeypatch.setattr(fast, "has_triton", lambda: True)
    fast.is_ampere.cache_clear()
    try:
        for current in capabilities:
            monkeypatch.setattr(torch.cuda, "current_device", lambda now=current: now)
            runs = [index for index in capabilities if fast.runs_kernels("rows", on_gpu(index))]
            assert runs == ([current] if current < 2 else [])
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        assert not fast.runs_kernels("rows", on_gpu(0, torch.float32))
    finally:
        fast.is_ampere.cache_clear()


@pytest.mark.parametrize("path", ["attention", "rows", "decode", "loss"])
def test_a_name_turns_its_kernels_off_alone(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "has_triton", lambda: True)
    monkeypatch.setattr(fast, "is_ampere", lambda _: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setenv("VISUAL_OPSD_EAGER", path)
    for kernels in ("attention", "rows", "decode", "loss"):
        assert fast.runs_kernels(kernels, on_gpu(0)) is (kernels != path)


def test_graphs_turn_off_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VISUAL_OPSD_EAGER", raising=False)
    assert RepeatedStep(lambda: None, torch.device("cuda")).captures
    assert not RepeatedStep(lambda: None, torch.device("cpu")).captures
    monkeypatch.setenv("VISUAL_OPSD_EAGER", "graphs")
    assert not RepeatedStep(lambda: None, torch.device("cuda")).captures


def three_layers(device: str) -> list[nn.Linear]:
    model = load_bagel(TINY_BAGEL, device=device).model
    adjoin_projections(model)
    attention: Any = model.language_model.model.layers[0].self_attn
    return [attention.q_proj, attention.k_proj, attention.v_proj]


def test_joined_weights_are_those_of_the_layers() -> None:
    layers = three_layers("cpu")
    joined = joined_weights(layers)
    assert joined is not None
    x = torch.randn(5, layers[0].in_features)
    found = nn.functional.linear(x, *joined).split([layer.out_features for layer in layers], -1)
    torch.testing.assert_close(found, tuple(layer(x) for layer in layers))
    layers[1].weight.data = layers[1].weight.data.clone()  # elsewhere: no longer one
    assert joined_weights(layers) is None


def test_a_bias_that_moved_is_noticed() -> None:
    layers = three_layers("cpu")
    assert joined_weights(layers) is not None
    layers[2].bias.data = layers[2].bias.data.clone()
    assert joined_weights(layers) is None


def test_joined_weights_keep_no_memory() -> None:
    """Layers whose weights went elsewhere must not leave the old ones behind."""
    memory = np.zeros((8, 4), np.float32)
    held = ref(memory)
    layers = [nn.Linear(4, 4, bias=False) for _ in range(2)]
    for layer, rows in zip(layers, torch.from_numpy(memory).split(4), strict=True):
        layer.weight.data = rows
    del memory, rows
    assert joined_weights(layers) is not None
    assert held() is not None
    nn.ModuleList(layers).to("meta")
    gc.collect()
    assert held() is None
    assert joined_weights(layers) is None


@pytest.mark.parametrize("loads_inside", [False, True])
def test_projections_adjoin_in_inference_mode(loads_inside: bool) -> None:
    """Weights that were loaded outside of it can be trained later; the others stay usable in it."""
    with torch.inference_mode(loads_inside):
        model = load_bagel(TINY_BAGEL).model
    with torch.inference_mode():
        adjoin_projections(model)
        attention: Any = model.language_model.model.layers[0].self_attn
        layers = [attention.q_proj, attention.k_proj, attention.v_proj]
        joined = joined_weights(layers)
        assert joined is not None
        assert torch.equal(joined[0][: len(layers[0].weight)], layers[0].weight)
    assert layers[0].weight.is_inference() == loads_inside
    if not loads_inside:
        x = torch.rand(2, layers[0].in_features)
        sum(layer(x).sum() for layer in layers).backward()
        assert all(layer.weight.grad is not None for layer in layers)


LAYOUT = AttentionLayout((2,), (0,), ((),))


def test_a_plan_without_and_with_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one, no memory is reused and no weight is read but through its module."""
    monkeypatch.setattr(fast, "runs_kernels", lambda *_: True)
    x = torch.zeros(2, 4)
    assert plan_layer(x, LAYOUT, 32) == LayerPlan("blocks", row_kernels=True, head_kernels=True)
    with torch.no_grad():
        plan = plan_layer(x, LAYOUT, 32)
        assert plan.attends_in_cache and plan.adds_in_product and plan.streams(x)
        assert not plan.streams(torch.zeros(9, 4)) and not plan.streams(x[:0])
        narrow = plan_layer(x, LAYOUT, 24)  # half a head is no power of two
        assert narrow == replace(plan, head_kernels=False, attends_in_cache=False)
        step = plan_layer(x, DecodeLayout(torch.zeros(2, dtype=torch.int64)), 32)
        assert step == replace(plan, backend="decode", attends_in_cache=False)
        # A noised image that other rows must not see: the kernels cannot follow.
        hidden = AttentionLayout((4,), (0,), ((Block(0, 2, True),),))
        assert plan_layer(x, hidden, 32).backend != "blocks"
        assert not plan_layer(x, hidden, 32).attends_in_cache


def test_layers_whose_weights_are_elsewhere_read_none_directly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a model spread over devices, a hook may bring a weight for the call of its module."""
    model = load_bagel(TINY_BAGEL, visual_gen=True).model
    layers: Any = model.language_model.model.layers
    monkeypatch.setattr(fast, "runs_kernels", lambda *_: True)
    x, devices = torch.zeros(2, 64), [torch.device("cpu")] * len(layers)
    layers[1].self_attn.k_norm_moe_gen.to("meta")
    with torch.no_grad():
        whole, torn, last = plan_layers(layers, x, LAYOUT, 16, devices=devices)
        assert whole == last == plan_layer(x, LAYOUT, 16) and whole.attends_in_cache
    assert torn == LayerPlan("blocks", row_kernels=True)


def test_compiled_layers_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    layers: Any = load_bagel(TINY_BAGEL).model.language_model.model.layers
    monkeypatch.setattr(fast, "runs_kernels", lambda *_: True)
    x = torch.zeros(2, 64)
    with torch.no_grad():
        assert plan_layers(layers, x, LAYOUT, 16) == [plan_layer(x, LAYOUT, 16)] * len(layers)
        layers[0].compile()
        assert plan_layers(layers, x, LAYOUT, 16) == [LayerPlan()] * len(layers)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_projections_turn_off_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = three_layers("cuda")
    x = torch.randn(20, layers[0].in_features, device="cuda")
    found, shared = [], []
    for eager in ("decode", "projections"):
        monkeypatch.setenv("VISUAL_OPSD_EAGER", eager)
        with torch.no_grad():
            found.append(project_rows(x, layers, plan_layer(x, LAYOUT)))
        shared.append(len({part.untyped_storage().data_ptr() for part in found[-1]}) == 1)
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=1e-4)
    assert shared == [True, False]


def test_a_models_gpu_is_the_current_one_while_it_works(monkeypatch: pytest.MonkeyPatch) -> None:
    entered = []

    @contextmanager
    def record(device: Any) -> Any:
        entered.append(device.index)
        yield
        entered.append("left")

    monkeypatch.setattr(torch.cuda, "device", record)

    @fast.on_its_gpu
    def work(model: Any, number: int, *, more: int) -> tuple[int, list[Any]]:
        return number + more, list(entered)

    model: Any = SimpleNamespace(parameters=lambda: iter([on_gpu(1)]))
    assert work(model, 1, more=2) == (3, [1])
    assert entered == [1, "left"]
    model = SimpleNamespace(parameters=lambda: iter([torch.zeros(1)]))
    assert work(model, 1, more=3) == (4, [1, "left"])


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
def test_a_model_on_another_gpu_than_the_current_one() -> None:
    found = []
    for device in ("cuda:0", "cuda:1"):
        bundle = load_bagel(TINY_BAGEL, device=device, dtype=torch.bfloat16)
        context = (TextSegment(tuple(range(5, 30))),)
        packed = pack([context, context], bundle.special_tokens).to(device)
        made = generate(bundle.model, packed, bundle.special_tokens, max_new_tokens=40)
        found.append([row.ids for row in made])
    assert found[0] == found[1]
