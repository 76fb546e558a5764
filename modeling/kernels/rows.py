# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""What a decoder layer does between its matrix products, a kernel each, with gradients.

The plain forms stand in `modeling/bagel/decoder.py`: `RMSNorm`, `norm_and_rotate`, `apply_gate`.
Arithmetic is fp32 here and results are rounded once, where they round more often. Every backward
pass computes again what the forward had instead of keeping it.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

# Programs that share the rows where a weight's gradient is summed: two a multiprocessor.
_PROGRAMS = 264


# ------------------------------------------------------------------------------------ RMSNorm


@triton.jit
def _rms_norm(
    x, weight, out, rstd, width, eps, BLOCK: tl.constexpr, KEEP: tl.constexpr, PDL: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    value = tl.load(x + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt_rn(tl.sum(value * value, 0) / width + eps)
    if KEEP:
        tl.store(rstd + row, scale)
    gain = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    normed = (value * scale).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * width + columns, normed * gain, mask=inside)


@triton.jit
def _rms_norm_backward(grad, x, weight, rstd, grad_x, partial, rows, width, BLOCK: tl.constexpr):
    first = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    gain = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for row in range(first, rows, tl.num_programs(0)):
        at = tl.cast(row, tl.int64) * width + columns
        slope = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(rstd + row)
        normed = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * scale
        total += slope * normed
        slope *= gain
        mean = tl.sum(slope * normed, 0) / width
        tl.store(grad_x + at, (slope - normed * mean) * scale, mask=inside)
    tl.store(partial + first * width + columns, total, mask=inside)


def norm_rows(
    flat: Tensor, weight: Tensor, eps: float, *, rstd: Tensor | None = None, chained: bool = False
) -> Tensor:
    """The norm of each row of a contiguous x (R, H), without a gradient.

    Args:
        rstd: (R,) fp32, where the factor of each row goes.
        chained: overlap this launch with the end of the one before (Hopper and later).
    """
    rows, width = flat.shape
    out = torch.empty_like(flat)
    block = _block(width)
    flags = {"launch_pdl": True} if chained else {}
    if rows:
        _rms_norm[(rows,)](
            flat, weight, out, flat if rstd is None else rstd, width, eps, BLOCK=block,
            KEEP=rstd is not None, PDL=chained, num_warps=_warps(block), **flags,
        )  # fmt: skip
    return out


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        rstd = torch.empty(len(flat), device=x.device, dtype=torch.float32)
        out = norm_rows(flat, weight, eps, rstd=rstd)
        ctx.save_for_backward(flat, weight, rstd)
        return out.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        flat, weight, rstd = ctx.saved_tensors
        rows, width = flat.shape
        grad_x = torch.empty_like(flat)
        programs = max(1, min(_PROGRAMS, rows))
        partial = torch.empty(programs, width, device=flat.device, dtype=torch.float32)
        block = _block(width)
        _rms_norm_backward[(programs,)](
            grad.reshape(rows, width).contiguous(), flat, weight, rstd, grad_x, partial,
            rows, width, BLOCK=block, num_warps=_warps(block),
        )  # fmt: skip
        return grad_x.view(grad.shape), partial.sum(0).to(weight.dtype), None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm in one pass: x (..., H), weight (H,) -> (..., H)."""
    if torch.is_grad_enabled():
        return _RMSNorm.apply(x, weight, eps)
    return norm_rows(x.reshape(-1, x.shape[-1]).contiguous(), weight, eps).view(x.shape)


# --------------------------------------------------------------- norm and rotation of the heads


@triton.jit
def _halves(x, heads, HEADS: tl.constexpr, HALF: tl.constexpr):
    """Offsets of the left and right half of every head, and which heads exist."""
    head = tl.arange(0, HEADS)[:, None]
    inside = (head < heads) & (tl.arange(0, HALF)[None, :] < HALF)
    left = head * (2 * HALF) + tl.arange(0, HALF)[None, :]
    return x + left, x + left + HALF, inside


@triton.jit
def _rotate(x, weight, out, heads, cos, sin, eps, HEADS: tl.constexpr, HALF: tl.constexpr):
    left_at, right_at, inside = _halves(x, heads, HEADS, HALF)
    left = tl.load(left_at, mask=inside, other=0.0).to(tl.float32)
    right = tl.load(right_at, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(left * left + right * right, 1) / (2 * HALF)
    scale = (1.0 / tl.sqrt_rn(mean + eps))[:, None]
    half = tl.arange(0, HALF)
    left = left * scale * tl.load(weight + half).to(tl.float32)[None, :]
    right = right * scale * tl.load(weight + HALF + half).to(tl.float32)[None, :]
    left_to, right_to, _ = _halves(out, heads, HEADS, HALF)
    tl.store(left_to, left * cos - right * sin, mask=inside)
    tl.store(right_to, right * cos + left * sin, mask=inside)


@triton.jit
def _angles(cos, sin, row, HALF: tl.constexpr):
    """Cosine and sine of a row's angles, (1, HALF): both halves of a head turn by the same."""
    at = row * (2 * HALF) + tl.arange(0, HALF)
    c = tl.load(cos + at).to(tl.float32)[None, :]
    s = tl.load(sin + at).to(tl.float32)[None, :]
    return c, s


@triton.jit
def _norm_rotary(
    q, k, v, q_weight, k_weight, cos, sin, places, q_out, k_out, v_out,
    q_stride, k_stride, v_stride, heads, kv_heads, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, PLACE: tl.constexpr,
):  # fmt: skip
    """PLACE: k and v go to the rows of k_out and v_out that `places` names."""
    row = tl.program_id(0).to(tl.int64)
    c, s = _angles(cos, sin, row, HALF)
    kv_row = row
    if PLACE:
        kv_row = tl.load(places + row)
    to = kv_row * kv_heads * (2 * HALF)
    q_to = q_out + row * heads * (2 * HALF)
    _rotate(q + row * q_stride, q_weight, q_to, heads, c, s, eps, HEADS, HALF)
    _rotate(k + row * k_stride, k_weight, k_out + to, kv_heads, c, s, eps, KV_HEADS, HALF)
    if PLACE:
        left, right, inside = _halves(v + row * v_stride, kv_heads, KV_HEADS, HALF)
        left_to, right_to, _ = _halves(v_out + to, kv_heads, KV_HEADS, HALF)
        tl.store(left_to, tl.load(left, mask=inside), mask=inside)
        tl.store(right_to, tl.load(right, mask=inside), mask=inside)


@triton.jit
def _rotate_back(
    grad, x, weight, grad_x, heads, cos, sin, eps, HEADS: tl.constexpr, HALF: tl.constexpr
):
    """Writes the gradient of one row's heads; returns their share of the weight's, by half."""
    left_at, right_at, inside = _halves(grad, heads, HEADS, HALF)
    grad_left = tl.load(left_at, mask=inside, other=0.0).to(tl.float32)
    grad_right = tl.load(right_at, mask=inside, other=0.0).to(tl.float32)
    slope_left = grad_left * cos + grad_right * sin
    slope_right = grad_right * cos - grad_left * sin
    left_at, right_at, _ = _halves(x, heads, HEADS, HALF)
    left = tl.load(left_at, mask=inside, other=0.0).to(tl.float32)
    right = tl.load(right_at, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(left * left + right * right, 1) / (2 * HALF)
    scale = (1.0 / tl.sqrt_rn(mean + eps))[:, None]
    left *= scale
    right *= scale
    left_share, right_share = tl.sum(slope_left * left, 0), tl.sum(slope_right * right, 0)
    half = tl.arange(0, HALF)
    slope_left *= tl.load(weight + half).to(tl.float32)[None, :]
    slope_right *= tl.load(weight + HALF + half).to(tl.float32)[None, :]
    pull = (tl.sum(slope_left * left + slope_right * right, 1) / (2 * HALF))[:, None]
    left_to, right_to, _ = _halves(grad_x, heads, HEADS, HALF)
    tl.store(left_to, (slope_left - left * pull) * scale, mask=inside)
    tl.store(right_to, (slope_right - right * pull) * scale, mask=inside)
    return left_share, right_share


@triton.jit
def _norm_rotary_backward(
    q_grad, k_grad, q, k, q_weight, k_weight, cos, sin, q_grad_x, k_grad_x, partial,
    q_stride, k_stride, rows, heads, kv_heads, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    half = tl.arange(0, HALF)
    q_left, q_right = tl.zeros((HALF,), tl.float32), tl.zeros((HALF,), tl.float32)
    k_left, k_right = tl.zeros((HALF,), tl.float32), tl.zeros((HALF,), tl.float32)
    for short_row in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = tl.cast(short_row, tl.int64)
        c, s = _angles(cos, sin, row, HALF)
        at = row * heads * (2 * HALF)
        left, right = _rotate_back(
            q_grad + at, q + row * q_stride, q_weight, q_grad_x + at, heads, c, s, eps, HEADS, HALF
        )
        q_left += left
        q_right += right
        at = row * kv_heads * (2 * HALF)
        left, right = _rotate_back(
            k_grad + at, k + row * k_stride, k_weight, k_grad_x + at, kv_heads, c, s, eps,
            KV_HEADS, HALF,
        )  # fmt: skip
        k_left += left
        k_right += right
    to = partial + tl.program_id(0) * (4 * HALF) + half
    tl.store(to, q_left)
    tl.store(to + HALF, q_right)
    tl.store(to + 2 * HALF, k_left)
    tl.store(to + 3 * HALF, k_right)


@cache
def _head_sizes(heads: int, kv_heads: int, dim: int) -> dict[str, int]:
    return {
        "HEADS": triton.next_power_of_2(heads),
        "KV_HEADS": triton.next_power_of_2(kv_heads),
        "HALF": dim // 2,
    }


def place_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    places: Tensor | None,
    q_out: Tensor,
    keys: Tensor,
    values: Tensor | None,
) -> None:
    """`norm_rotary` whose results, and v, go where they are wanted; without a gradient.

    Args:
        q, k, v, q_weight, k_weight, cos, sin: as for `norm_rotary`; v like k.
        places: (T,) int64 rows of keys and values for the new k and v; None: keys are (T, nkv, d)
            themselves, and v is left alone.
        q_out: (T, nh, d), contiguous. keys, values: (R, nkv, d), contiguous.
    """
    (rows, heads, dim), kv_heads = q.shape, k.shape[1]
    v, values = k if v is None else v, keys if values is None else values
    for x in (q, k, v):  # views of one wide product are fine, heads must lie side by side
        assert x.stride(2) == 1 and x.stride(1) == dim, x.stride()
    if rows:
        _norm_rotary[(rows,)](
            q, k, v, q_weight, k_weight, cos, sin, q if places is None else places,
            q_out, keys, values, q.stride(0), k.stride(0), v.stride(0), heads, kv_heads, eps,
            **_head_sizes(heads, kv_heads, dim), PLACE=places is not None, num_warps=4,
        )  # fmt: skip


def _norm_and_rotate(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    cos, sin = cos.contiguous(), sin.contiguous()
    place_rows(q, k, None, q_weight, k_weight, cos, sin, eps, None, q_out, k_out, None)
    return q_out, k_out


class _NormRotary(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        q_weight: Tensor,
        k_weight: Tensor,
        cos: Tensor,
        sin: Tensor,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        q_out, k_out = _norm_and_rotate(q, k, q_weight, k_weight, cos, sin, eps)
        ctx.save_for_backward(q, k, q_weight, k_weight, cos.contiguous(), sin.contiguous())
        ctx.eps = eps
        return q_out, k_out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, q_grad: Tensor, k_grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, q_weight, k_weight, cos, sin = ctx.saved_tensors
        (rows, heads, dim), kv_heads = q.shape, k.shape[1]
        q_grad_x, k_grad_x = q.new_empty(q.shape), k.new_empty(k.shape)
        programs = max(1, min(2 * _PROGRAMS, rows))
        partial = torch.empty(programs, 2, dim, device=q.device, dtype=torch.float32)
        _norm_rotary_backward[(programs,)](
            q_grad.contiguous(), k_grad.contiguous(), q, k, q_weight, k_weight, cos, sin,
            q_grad_x, k_grad_x, partial, q.stride(0), k.stride(0), rows, heads, kv_heads, ctx.eps,
            **_head_sizes(heads, kv_heads, dim), num_warps=4,
        )  # fmt: skip
        of_q, of_k = partial.sum(0)
        weights = (of_q.to(q_weight.dtype), of_k.to(k_weight.dtype))
        return q_grad_x, k_grad_x, *weights, None, None, None


def norm_rotary(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Norm of each head, then half-split rotation, of queries and keys in one kernel.

    Args:
        q: (T, nh, d), k: (T, nkv, d); rows may be strided, d / 2 is a power of two.
        q_weight, k_weight: (d,). cos, sin: (T, d), whose halves are equal.
    """
    if torch.is_grad_enabled():
        return _NormRotary.apply(q, k, q_weight, k_weight, cos, sin, eps)
    return _norm_and_rotate(q, k, q_weight, k_weight, cos, sin, eps)


# ------------------------------------------------------------------------------------- SwiGLU


@triton.jit
def _silu_mul(gate, up, out, gate_stride, up_stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    g = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    silu = (g / (1.0 + tl.exp(-g))).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * width + column, silu * u, mask=inside)


@triton.jit
def _silu_mul_backward(grad, gate, up, gate_stride, up_stride, width, BLOCK: tl.constexpr):
    """Overwrites gate and up by their gradients."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    slope = tl.load(grad + row * width + column, mask=inside, other=0.0).to(tl.float32)
    gate_at, up_at = gate + row * gate_stride + column, up + row * up_stride + column
    g = tl.load(gate_at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up_at, mask=inside, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-g))
    tl.store(up_at, slope * g * sigmoid, mask=inside)
    tl.store(gate_at, slope * u * sigmoid * (1.0 + g * (1.0 - sigmoid)), mask=inside)


_SILU_BLOCK = 4096


def _apply_gate(gate: Tensor, up: Tensor) -> Tensor:
    assert gate.dim() == 2 and gate.stride(1) == up.stride(1) == 1
    rows, width = gate.shape
    out = gate.new_empty(gate.shape)
    if rows:
        block = min(_SILU_BLOCK, _block(width))
        _silu_mul[(rows, triton.cdiv(width, block))](
            gate, up, out, gate.stride(0), up.stride(0), width, BLOCK=block, num_warps=8
        )
    return out


class _SiluMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        out = _apply_gate(gate, up)
        ctx.save_for_backward(gate, up)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        if gate.shape[0]:
            rows, width = gate.shape
            block = min(_SILU_BLOCK, _block(width))
            _silu_mul_backward[(rows, triton.cdiv(width, block))](
                grad.contiguous(), gate, up, gate.stride(0), up.stride(0), width,
                BLOCK=block, num_warps=8,
            )  # fmt: skip
        # The two widest activations of a layer become their own gradients, which spares as much
        # memory again; autograd then refuses a second backward pass over them.
        torch.autograd.graph.increment_version((gate, up))
        return gate, up


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up of (T, I) tensors, which the backward pass overwrites.

    Both must be nobody else's: results of matrix products that are used here alone.
    """
    if torch.is_grad_enabled():
        return _SiluMul.apply(gate, up)
    return _apply_gate(gate, up)


@cache
def _block(width: int) -> int:
    return int(triton.next_power_of_2(width))


def _warps(block: int) -> int:
    return min(max(block // 512, 1), 8)
