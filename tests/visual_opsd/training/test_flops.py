# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Operations of a step, against the weights of the model itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from data.packing import context_length, pack
from data.sequence import Context, ImageSegment, TextSegment, given_completion
from modeling import load_bagel
from modeling.bagel.bagel import Bagel
from modeling.release.tokenizer import load_tokenizer
from scripts.visual_opsd.scored_rows import ScoredRow
from scripts.visual_opsd.training.flops import (
    FlopCounter,
    image_flops,
    peak_flops,
    sequence_flops,
)
from tests.conftest import TINY_BAGEL


@pytest.fixture(scope="module")
def model() -> Bagel:
    return load_bagel(TINY_BAGEL).model


def linear_weights(*parts: nn.Module) -> int:
    """Entries of all matrices that multiply every token, but the generation experts'."""
    layers = [m for part in parts for n, m in part.named_modules() if "_moe_gen" not in n]
    return sum(m.weight.numel() for m in layers if isinstance(m, nn.Linear))


def test_products_are_those_of_the_models_matrices(model: Bagel) -> None:
    llm, vision = model.config.llm, model.config.vision
    decoder = linear_weights(model.language_model.model.layers)
    queries = llm.num_attention_heads * llm.head_dim
    for tokens in (1, 10):
        attention = 2 * llm.num_hidden_layers * queries * tokens**2
        assert sequence_flops(llm, tokens) == 2 * decoder * tokens + attention
    seeing = linear_weights(model.vit_model, model.connector)
    for patches in (1, 10):
        attention = 4 * vision.num_hidden_layers * vision.hidden_size * patches**2
        assert image_flops(vision, llm.hidden_size, patches) == 2 * seeing * patches + attention


def images(side: int) -> ImageSegment:
    count = side**2
    return ImageSegment(torch.zeros(count, 14 * 14 * 3), torch.arange(count))


def rows() -> tuple[ScoredRow, Context, Context]:
    """A row, and what its student and its teacher read."""
    completion = given_completion((5, 6, 7))
    student = (TextSegment((1, 2, 3, 4)), images(2), completion.segment())
    teacher = (*student[:-1], images(3), student[-1])
    return ScoredRow("a", student, teacher, completion), student, teacher


def test_forwards_of_a_row(model: Bagel) -> None:
    """Student three times, teacher and control once, the rollout's forward once more."""
    row, student, teacher = rows()
    llm = model.config.llm
    text, width = sequence_flops(llm, context_length(student)), llm.hidden_size
    image = image_flops(model.config.vision, width, 4)
    other = image_flops(model.config.vision, width, 9)
    head = 2 * width * llm.vocab_size
    seen = sequence_flops(llm, context_length(teacher)) + image + other
    learning = 3 * (text + image + 4 * head)
    count = FlopCounter.of(model, samples=False)
    assert count([replace(row, teacher=None)]) == pytest.approx(learning)
    assert count([row, row]) == pytest.approx(2 * (learning + seen + 4 * head))
    contrasted = replace(row, control=teacher)
    assert count([contrasted]) == pytest.approx(learning + 2 * seen + 4 * head)
    sampling = FlopCounter.of(model, samples=True)
    drawn = text + image + 3 * head
    assert sampling([row]) == pytest.approx(learning + seen + 4 * head + drawn)
    assert row.completion is not None
    given = replace(row, completion=replace(row.completion, given=True))
    assert sampling([given]) == count([row])


def test_frozen_weights_have_no_gradient(tiny_bagel_path: Path) -> None:
    """Two of three passes through what is frozen, one where nothing below learns."""
    model = load_bagel(tiny_bagel_path).model
    assert FlopCounter.of(model, samples=False).image_passes == 3.0
    model.requires_grad_(False)
    model.language_model.lm_head.weight.requires_grad_(True)
    count = FlopCounter.of(model, samples=False)
    named = dict(model.language_model.named_parameters())
    own = sum(p.numel() for name, p in named.items() if "_moe_gen" not in name)
    assert count.image_passes == 1.0
    assert count.text_passes == 2.0 + model.language_model.lm_head.weight.numel() / own


def test_torch_counts_alike(model: Bagel) -> None:
    """The forward as it runs: attention differs, as it knows no causality, and is small here."""
    row, student, _ = rows()
    _, special = load_tokenizer(TINY_BAGEL)
    with FlopCounterMode(display=False) as mode, torch.no_grad():
        model(pack([student], special), head=nn.functional.linear)
    one = FlopCounter(model.config, 1.0, 1.0, samples=False)
    assert one([replace(row, teacher=None)]) == pytest.approx(mode.get_total_flops(), rel=0.1)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H200", 989), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312), ("NVIDIA B200", 2250), ("NVIDIA H100 PCIe", None),
        ("NVIDIA GH200 480GB", None), ("NVIDIA H20", None), ("NVIDIA A40", 150),
        ("NVIDIA RTX A4000", None), ("NVIDIA L40S", 362), ("NVIDIA L40", None),
        ("NVIDIA GeForce RTX 4090", None), ("AMD Instinct MI300X", None),
        ("NVIDIA H800 PCIe", None), ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", None),
    ],
)  # fmt: skip
def test_peaks(name: str, tflops: float | None) -> None:
    assert peak_flops(name) == (None if tflops is None else 1e12 * tflops)
