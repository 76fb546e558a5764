# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Every attention path against a dense float64 oracle, outputs and gradients."""

from __future__ import annotations

import math
import os

import pytest
import torch
from torch import Tensor

from modeling.bagel.attention import (
    AttentionLayout,
    Block,
    DecodeLayout,
    attend,
    choose_backend,
)

LAYOUTS = {
    "text": AttentionLayout((7,), (0,), ((),)),
    "one_image": AttentionLayout((11,), (0,), ((Block(3, 8),),)),
    "two_images": AttentionLayout((15,), (0,), ((Block(0, 4), Block(9, 13)),)),
    "only_image": AttentionLayout((6, 3), (0, 0), ((Block(0, 6),), (Block(0, 3),))),
    "several": AttentionLayout((9, 1, 14), (0, 0, 0), ((Block(2, 6),), (), (Block(4, 12),))),
    "noise": AttentionLayout(
        (16,), (0,), ((Block(2, 6, True), Block(6, 10), Block(12, 14, True)),)
    ),
    "cached": AttentionLayout((5, 8), (6, 0), ((), (Block(1, 7),))),
    "cached_image": AttentionLayout((6, 4), (3, 9), ((Block(0, 6),), (Block(1, 4),))),
}


def inputs(layout: AttentionLayout, heads: int, kv_heads: int, dim: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(layout.key_lens) + heads)

    def draw(rows: int, n: int) -> Tensor:
        return torch.randn(rows, n, dim, generator=generator)

    keys = sum(layout.key_lens)
    return [draw(layout.total, heads), draw(keys, kv_heads), draw(keys, kv_heads)]


def oracle(q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout) -> Tensor:
    """Dense softmax sample by sample, from `layout.allowed` alone."""
    repeat = q.shape[1] // k.shape[1]
    out, q0, k0 = [], 0, 0
    for b, (n, s) in enumerate(zip(layout.query_lens, layout.key_lens, strict=True)):
        qb = q[q0 : q0 + n].transpose(0, 1)
        kb = k[k0 : k0 + s].repeat_interleave(repeat, 1).transpose(0, 1)
        vb = v[k0 : k0 + s].repeat_interleave(repeat, 1).transpose(0, 1)
        scores = qb @ kb.transpose(1, 2) / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(~layout.allowed(b).to(q.device), -math.inf)
        out.append((scores.softmax(-1) @ vb).transpose(0, 1))
        q0, k0 = q0 + n, k0 + s
    return torch.cat(out)


def check(backend: str, layout: AttentionLayout, tensors: list[Tensor], tolerance: float) -> None:
    mine = [x.detach().requires_grad_() for x in tensors]
    wide = [x.detach().double().requires_grad_() for x in tensors]
    out = attend(mine[0], mine[1], mine[2], layout, backend)
    expected = oracle(wide[0], wide[1], wide[2], layout)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    out.backward(weights)
    expected.backward(weights.double())
    pairs = [(out, expected), *((a.grad, b.grad) for a, b in zip(mine, wide, strict=True))]
    for actual, target in pairs:
        assert actual is not None and target is not None
        error = (actual.double() - target).norm() / target.norm().clamp_min(1e-12)
        assert error < tolerance, float(error)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (28, 4)])
@pytest.mark.parametrize("backend", ["padded", "segments"])
def test_cpu_backends(name: str, heads: tuple[int, int], backend: str) -> None:
    layout = LAYOUTS[name]
    check(backend, layout, inputs(layout, *heads, 16), 1e-5)


@pytest.mark.parametrize("name", LAYOUTS)
def test_allowed_follows_the_rule_entry_by_entry(name: str) -> None:
    """The mask, restated as the sentence of the module's docstring."""
    layout = LAYOUTS[name]
    for b, blocks in enumerate(layout.blocks):
        past, mask = layout.past_lens[b], layout.allowed(b)
        for i in range(layout.query_lens[b]):
            for j in range(-past, layout.query_lens[b]):
                common = [x for x in blocks if x.start <= i < x.end and x.start <= j < x.end]
                hidden = any(x.noise and x.start <= j < x.end for x in blocks) and not common
                assert bool(mask[i, j + past]) == ((j <= i or bool(common)) and not hidden)


def test_decode_reads_its_own_prefix_only() -> None:
    """A decode step equals the oracle on keys 0..slot, whatever lies behind them."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 6, 8), torch.randn(3, 10, 2, 8), torch.randn(3, 10, 2, 8)
    slots = torch.tensor([0, 4, 9])
    out = attend(q, k, v, DecodeLayout(slots), "decode")
    for b, slot in enumerate(slots.tolist()):
        layout = AttentionLayout((1,), (slot,), ((),))
        expected = oracle(q[b : b + 1], k[b, : slot + 1], v[b, : slot + 1], layout)
        torch.testing.assert_close(out[b : b + 1], expected, atol=1e-5, rtol=1e-5)


def test_unknown_backend_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VISUAL_OPSD_ATTENTION", "cudnn")
    with pytest.raises(ValueError, match="choose one of blocks, varlen, flash, sdpa"):
        choose_backend(torch.zeros(1), LAYOUTS["text"])


def test_one_dense_mask_serves_short_sequences_on_a_cpu() -> None:
    short, x = LAYOUTS["text"], torch.zeros(1)
    assert choose_backend(x, short) == "padded"
    assert choose_backend(x, AttentionLayout((1 << 13, 5), (1, 0), ((), ()))) == "segments"


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (28, 4)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("eager", [False, True])
def test_cuda_backends(
    name: str,
    heads: tuple[int, int],
    dtype: torch.dtype,
    eager: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layout = LAYOUTS[name]
    tensors = [x.cuda().to(dtype) for x in inputs(layout, *heads, 64)]
    if eager:
        monkeypatch.setenv("VISUAL_OPSD_EAGER", "attention")
    backend = choose_backend(tensors[0], layout)
    if not os.environ.get("VISUAL_OPSD_ATTENTION"):
        expected = "varlen" if eager or layout.limits is None else "blocks"
        assert backend == ("segments" if dtype == torch.float32 else expected)
    tolerance = {torch.float32: 1e-4, torch.float16: 3e-3, torch.bfloat16: 1e-2}[dtype]
    check(backend, layout, tensors, tolerance)
