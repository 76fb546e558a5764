# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Adapters against the plain model whose weights are W + scale B A."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from data.packing import pack
from modeling import load_bagel
from modeling.bagel.adapters import (
    PROJECTIONS,
    AdaptedLinear,
    AdapterConfig,
    adapter_shapes,
    add_adapters,
    find_targets,
    initial_adapter,
    remove_adapters,
    switch_off,
)
from modeling.bagel.config import LLMConfig
from modeling.bagel.plan import LayerPlan
from modeling.bagel.projections import add_linear, adjoin_projections, project_rows
from modeling.bagel.streamed_decode import can_stream
from tests.conftest import TINY_BAGEL
from tests.modeling.segments import image, text

EVERYWHERE = ("llm", "vit", "connector")


def adapted(targets: tuple[str, ...] = EVERYWHERE, seed: int = 0) -> Any:
    """The tiny model with adapters of rank 3 whose A and B are random."""
    model = load_bagel(TINY_BAGEL, visual_gen=True).model
    add_adapters(model, AdapterConfig(3, 4.5, find_targets(model, targets)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key in adapter_shapes(model):
                parameter.normal_(0, 0.05, generator=generator)
    return model


def batch(model: Any) -> Any:
    bundle = load_bagel(TINY_BAGEL)
    contexts: list[Any] = [
        [text(6), image(4, model), text(9, scored=True)],
        [text(12, 30, scored=True)],
    ]
    return pack(contexts, bundle.special_tokens)


def logits(model: Any, packed: Any) -> Tensor:
    return model(packed, head=lambda hidden, weight: hidden @ weight.t())


def merged(model: Any) -> Any:
    """A plain model of the merged weights."""
    plain: Any = load_bagel(TINY_BAGEL, visual_gen=True).model
    with torch.no_grad():
        for path, module in model.named_modules():
            if isinstance(module, AdaptedLinear):
                change = module.lora_B.weight @ module.lora_A.weight * (4.5 / 3)
                plain.get_submodule(path).weight.add_(change)
    return plain


def test_targets() -> None:
    """All linear layers of a part, or the decoder's of one name; no drawing branch, no head."""
    model = load_bagel(TINY_BAGEL, visual_gen=True).model
    layers, seen = model.config.llm.num_hidden_layers, model.config.vision.num_hidden_layers
    found = {part: find_targets(model, [part]) for part in (*EVERYWHERE, *PROJECTIONS)}
    assert len(found["llm"]) == 7 * layers and len(found["vit"]) == 6 * seen
    assert found["connector"] == ("connector.fc1", "connector.fc2")
    assert sorted(p for name in PROJECTIONS for p in found[name]) == sorted(found["llm"])
    assert find_targets(model, ["v_proj", "q_proj"])[:2] == (
        "language_model.model.layers.0.self_attn.q_proj",
        "language_model.model.layers.0.self_attn.v_proj",
    )
    assert not [p for p in find_targets(model, EVERYWHERE) if "moe_gen" in p or "lm_head" in p]
    with pytest.raises(
        ValueError, match=r"no linear layers are called 'lm_head': name some of llm"
    ):
        find_targets(model, ["llm", "lm_head"])


def test_computes_what_merged_weights_compute() -> None:
    """With a gradient and without; switched off, exactly what the base computes."""
    model = adapted()
    packed, plain = batch(model), load_bagel(TINY_BAGEL, visual_gen=True).model
    expected, base = logits(merged(model), packed), logits(plain, packed)
    assert not torch.allclose(expected, base, atol=1e-2)
    torch.testing.assert_close(logits(model, packed), expected, atol=2e-4, rtol=2e-4)
    with torch.no_grad():
        torch.testing.assert_close(logits(model, packed), expected, atol=2e-4, rtol=2e-4)
        with switch_off(model):
            assert torch.equal(logits(model, packed), logits(plain, packed))
        torch.testing.assert_close(logits(model, packed), expected, atol=2e-4, rtol=2e-4)
    removed = remove_adapters(adapted())
    assert removed.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(logits(removed, packed), base)
    one = model.get_submodule("connector.fc1")
    plain_weight = merged(model).get_submodule("connector.fc1").weight
    torch.testing.assert_close(one.merged_weight(), plain_weight, atol=1e-6, rtol=1e-6)


def test_gradients_are_the_full_ones_projected() -> None:
    """dB = s G A^T and dA = s B^T G, with G the gradient of the plain weight; W gets none."""
    model = adapted()
    packed, plain = batch(model), merged(model)
    for each in (model, plain):
        logits(each, packed).square().mean().backward()
    checked = 0
    for path, module in model.named_modules():
        if not isinstance(module, AdaptedLinear):
            continue
        full = plain.get_submodule(path).weight.grad
        for own, projected in (
            (module.lora_B.weight, full @ module.lora_A.weight.t()),
            (module.lora_A.weight, module.lora_B.weight.t() @ full),
        ):
            assert own.grad is not None
            least = 1e-5 * float(own.grad.abs().max()) + 1e-9
            torch.testing.assert_close(own.grad, 1.5 * projected, atol=least, rtol=1e-3)
            checked += 1
    assert checked == 2 * len(find_targets(plain, EVERYWHERE))
    shapes = adapter_shapes(model)
    assert {k for k, p in model.named_parameters() if p.grad is not None} == set(shapes)
    assert {k for k, p in model.named_parameters() if p.requires_grad} == set(shapes)


def test_begins_as_the_base() -> None:
    """B is 0; A is uniform within 1 / sqrt(in) as PEFT has it, and keyed."""
    generator = torch.Generator().manual_seed(1)
    a = initial_adapter("x.lora_A.weight", (8, 400), generator)
    assert a.dtype == torch.float32 and a.shape == (8, 400)
    assert 0.95 / 20 < float(a.abs().max()) <= 1 / 20
    assert not initial_adapter("x.lora_B.weight", (5, 8), generator).any()
    again = initial_adapter("x.lora_A.weight", (8, 400), torch.Generator().manual_seed(1))
    assert torch.equal(a, again)


def test_fast_paths_call_layers_that_have_adapters() -> None:
    """A product that reads weights would leave an adapter, or another wrapper, out."""
    model = adapted(("q_proj", "down_proj"))
    layer = model.language_model.model.layers[0]
    attention, mlp = layer.self_attn, layer.mlp
    plan = LayerPlan(joins_products=True, adds_in_product=True)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(3, attention.q_proj.in_features, generator=generator)
    hidden = torch.randn(3, mlp.down_proj.in_features, generator=generator)
    projections = [attention.q_proj, attention.k_proj, attention.v_proj]
    adjoin_projections(model)
    with torch.no_grad():
        called = [projection(x) for projection in projections]
        for found, expected in zip(project_rows(x, projections, plan), called, strict=True):
            assert torch.equal(found, expected)
        added = add_linear(x.clone(), hidden, mlp.down_proj, plan)
        torch.testing.assert_close(added, x + mlp.down_proj(hidden))
        torch.testing.assert_close(
            add_linear(x.clone(), x, attention.o_proj, plan), x + attention.o_proj(x)
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("modeling.fast.runs_kernels", lambda *_: True)
            patch.setattr(LLMConfig, "head_dim", 32)
            assert not can_stream(model, 1) and can_stream(remove_adapters(model), 1)
