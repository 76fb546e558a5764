# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Norms, rotation, SwiGLU and block attention as Triton kernels against their plain forms.

On a GPU the kernels run there, elsewhere in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from modeling.bagel.attention import AttentionLayout, Block, attend
from modeling.bagel.decoder import RMSNorm, apply_gate, norm_and_rotate, rotary

pytest.importorskip("triton")

from modeling.kernels import block_attention, rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def same_with_gradients(
    fast: Callable[..., tuple[Tensor, ...]],
    plain: Callable[..., tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
    tolerance: float = 2e-5,
) -> None:
    """Equal outputs and gradients, relative to the size of each."""
    results = []
    for function in (fast, plain):
        mine = [x.detach().clone().requires_grad_() for x in inputs]
        out = function(*mine)
        torch.manual_seed(1)
        slopes = [torch.randn_like(x) for x in out]
        results.append([*out, *torch.autograd.grad(out, mine, slopes)])
    for actual, expected in zip(*results, strict=True):
        error = (actual - expected).norm() / expected.norm().clamp_min(1e-12)
        assert error < tolerance, float(error)


def norm_of(weight: Tensor) -> RMSNorm:
    norm = RMSNorm(len(weight), 1e-6)
    del norm.weight
    norm.weight = weight  # type: ignore[assignment]
    return norm


@pytest.mark.parametrize("shape", [(5, 48), (1, 64), (3, 4, 30)])
def test_rms_norm(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(shape, device=DEVICE), torch.randn(shape[-1], device=DEVICE)
    same_with_gradients(
        lambda x, w: (rows.rms_norm(x, w, 1e-6),), lambda x, w: (norm_of(w)(x),), [x, weight]
    )
    with torch.no_grad():
        torch.testing.assert_close(rows.rms_norm(x, weight, 1e-6), norm_of(weight)(x))


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (7, 1)])
def test_norm_and_rotation_of_heads_that_are_views_of_one_product(heads: tuple[int, int]) -> None:
    torch.manual_seed(0)
    count, (nh, nkv), dim = 5, heads, 16
    product = torch.randn(count, (nh + 2 * nkv) * dim, device=DEVICE)
    weights = [torch.randn(dim, device=DEVICE) for _ in range(2)]
    cos, sin = rotary(torch.arange(7, 7 + count, device=DEVICE), dim, 1e6)

    def parts(product: Tensor) -> tuple[Tensor, Tensor]:
        q, k, _ = product.split([nh * dim, nkv * dim, nkv * dim], -1)
        return q.view(count, nh, dim), k.view(count, nkv, dim)

    same_with_gradients(
        lambda p, a, b: rows.norm_rotary(*parts(p), a, b, cos, sin, 1e-6),
        lambda p, a, b: norm_and_rotate(*parts(p), norm_of(a), norm_of(b), cos, sin),
        [product, *weights],
    )


def test_swiglu_and_its_refusal_of_a_second_backward_pass() -> None:
    torch.manual_seed(0)
    gate, up = torch.randn(3, 70, device=DEVICE), torch.randn(3, 70, device=DEVICE)
    # `+ 0`: both arguments are used up, as results of products are.
    same_with_gradients(
        lambda g, u: (rows.silu_mul(g + 0, u + 0),), lambda g, u: (apply_gate(g, u),), [gate, up]
    )
    gate.requires_grad_()
    out = rows.silu_mul(gate + 0, up + 0)
    out.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


LAYOUTS = {
    "text": AttentionLayout((37,), (0,), ((),)),
    "images": AttentionLayout((37, 20), (0, 0), ((Block(3, 22), Block(25, 30)), (Block(0, 20),))),
    "several": AttentionLayout((9, 1, 33), (0, 0, 0), ((Block(2, 6),), (), (Block(4, 31),))),
    "cached": AttentionLayout((7, 12), (11, 40), ((Block(0, 7, True),), (Block(2, 9),))),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(("heads", "dim"), [((6, 2), 16), ((4, 4), 12)])
def test_block_attention(
    name: str, heads: tuple[int, int], dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles of 16, so that samples have several; their edges fall inside images and texts."""
    layout = LAYOUTS[name]
    monkeypatch.setattr(block_attention, "_ROWS", 16)
    limits = layout.limits
    assert limits is not None
    for b, limit in enumerate(limits):
        assert np.array_equal(layout.allowed(b).sum(-1).numpy(), limit)
    first_keys = np.cumsum([0, *layout.key_lens])[:-1].tolist()
    plan = block_attention.make_plan(limits, first_keys, torch.device(DEVICE), layout.key_lens)
    torch.manual_seed(0)
    keys = sum(layout.key_lens)
    shapes = [(layout.total, heads[0]), (keys, heads[1]), (keys, heads[1])]
    q, k, v = (torch.randn(n, h, dim, device=DEVICE) for n, h in shapes)
    same_with_gradients(
        lambda q, k, v: (block_attention.block_attention(q, k, v, plan),),
        lambda q, k, v: (attend(q, k, v, layout, "padded"),),
        [q, k, v],
    )
    with torch.no_grad():
        out = block_attention.block_attention(q, k, v, plan)
        torch.testing.assert_close(out, attend(q, k, v, layout, "padded"), atol=1e-5, rtol=1e-5)


def test_rows_that_must_not_see_an_earlier_noised_image_have_no_limits() -> None:
    assert AttentionLayout((9,), (0,), ((Block(2, 5, True),),)).limits is None
    assert AttentionLayout((5,), (4,), ((Block(2, 5, True),),)).limits is not None
