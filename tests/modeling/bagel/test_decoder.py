# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Numbers that a tolerance of the goldens would let pass: roundings, bases, kinds of GELU."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from data.packing import pack
from data.sequence import ImageSegment, TextSegment
from modeling import load_bagel
from modeling.bagel.config import VisionConfig
from modeling.bagel.decoder import RMSNorm
from modeling.bagel.embeddings import Connector, sincos_table, timestep_frequencies
from modeling.bagel.vision import VisionMLP
from tests.conftest import TINY_BAGEL


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_norm_in_half_precision_rounds_as_the_reference(dtype: torch.dtype) -> None:
    """Statistics in fp32, then the cast, then the scale: equal to the last bit."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 48, generator=generator).to(dtype)
    norm = RMSNorm(48, 1e-6).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(torch.rand(48, generator=generator) + 0.5)
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        expected = normed.to(dtype) * norm.weight
        assert torch.equal(norm(x), expected)
        # The other order would show here.
        assert not torch.equal((normed * norm.weight).to(dtype), expected)


def test_a_norm_of_small_values_is_held_by_eps() -> None:
    x = torch.full((1, 4), 1e-3)
    expected = 1e-3 / math.sqrt(1e-6 + 1e-2)
    assert RMSNorm(4, 1e-2)(x).tolist() == [pytest.approx([expected] * 4, rel=1e-5)]


def test_frequencies_of_flow_times() -> None:
    """[cos | sin] of t / 10000^(i / half); the last frequency tells the base to four digits."""
    dim, half = 256, 128
    found = timestep_frequencies(torch.tensor([1.0, 0.25]))
    assert found.shape == (2, dim)
    for row, t in zip(found.tolist(), (1.0, 0.25), strict=True):
        angles = [t * 10000.0 ** (-i / half) for i in range(half)]
        assert row[:half] == pytest.approx([math.cos(a) for a in angles], abs=2e-7)
        assert row[half:] == pytest.approx([math.sin(a) for a in angles], rel=1e-5)


def test_the_position_table() -> None:
    """[sin | cos] of the column, then of the row, row by row."""
    dim, side = 16, 5
    table = sincos_table(dim, side)
    frequencies = [10000.0 ** (-i / 4) for i in range(4)]
    for row in range(side):
        for column in range(side):
            expected: list[float] = []
            for place in (column, row):
                expected += [math.sin(place * f) for f in frequencies]
                expected += [math.cos(place * f) for f in frequencies]
            assert table[row * side + column].tolist() == pytest.approx(expected, rel=1e-6)


def tanh_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@torch.no_grad()
def test_gelu_is_the_tanh_form() -> None:
    """The exact one differs by up to 5e-4, less than the goldens' tolerances see."""
    x = torch.linspace(-4, 4, 64)[:, None]
    config = VisionConfig(
        hidden_size=1, intermediate_size=1, num_hidden_layers=1, num_attention_heads=1
    )
    for module in (Connector(1, 1), VisionMLP(config)):
        for layer in (module.fc1, module.fc2):
            layer.weight.fill_(1.0)
            layer.bias.zero_()
        torch.testing.assert_close(module(x), tanh_gelu(x), atol=2e-6, rtol=0)


@pytest.mark.parametrize(("on", "layers"), [(False, None), (True, None), (True, 1)])
def test_checkpointed_blocks_run_again_in_the_backward_pass(on: bool, layers: int | None) -> None:
    bundle = load_bagel(TINY_BAGEL)
    model = bundle.model
    model.set_gradient_checkpointing(on, layers)
    runs: Counter[str] = Counter()

    def count(name: str) -> Any:
        return lambda *_: runs.update([name])

    parts: dict[str, Any] = {"connector": model.connector.fc1}
    for number, layer in enumerate(model.vit_model.vision_model.encoder.layers):
        parts[f"vision {number}"] = layer.mlp
    for number, layer in enumerate(model.language_model.model.layers):
        parts[f"decoder {number}"] = layer.mlp
    for name, part in parts.items():
        part.register_forward_pre_hook(count(name))
    image = ImageSegment(torch.rand(4, 588), torch.arange(4))
    batch = pack([(image, TextSegment((5, 6)))], bundle.special_tokens)
    model(batch).sum().backward()
    for name in parts:
        again = on and (layers is None or not name.startswith("decoder") or name == "decoder 0")
        assert runs[name] == 1 + again, name
