# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Flash attention over packed samples whose images see themselves whole, in one pass.

In the layouts here a query row sees a prefix of its sample's keys: text up to itself, an image row
up to the end of its image. One number a row, its `limit`, says all; limits never fall from row to
row, so tiles of queries know which tiles of keys are seen whole, in part, or not at all. Nothing is
gathered and no pair of rows is computed twice, unlike with a causal call followed by one for the
images (`attention.py`, which also defines the rule).

Scores are scaled before their peak is subtracted. A peak that is rounded shifts numerator and
denominator alike; what is lost is the rounding of a scaled score and of the log-sum-exp that the
backward pass reads: a share is off by up to |score| 2^-24 of itself, at scores of 10,000 a sixth of
what rounding the same share to bf16 takes.

Forward and backward after FlashAttention-2 (arXiv 2307.08691); the backward pass computes keys' and
queries' gradients in two kernels, so that no sum depends on an order of arrival.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

_LOG2E = 1.4426950408889634


@dataclass(frozen=True)
class Launch:
    """Warps of a program, and tiles in flight."""

    warps: int
    stages: int


# What measured fastest on one H100 at head dim 128; all cut queries and keys at the same rows.
_ROWS = 64
_KEYS = 64  # of the forward pass
FORWARD = Launch(4, 3)
OF_KEYS = Launch(4, 2)
OF_QUERIES = Launch(4, 2)


@dataclass(frozen=True)
class BlockPlan:
    """Tiles of a layout, on the device.

    limits: (T,) int32, how many of its sample's keys each row sees. query_tiles: (n, 5) int32:
    first row, rows, first key, keys that all rows see, keys that some row sees. key_tiles: (m, 6)
    int32: first key, keys, first key within its sample, first row that sees one of them, first
    that sees all, row behind the sample's last. The heaviest tiles come first.
    """

    limits: Tensor
    query_tiles: Tensor
    key_tiles: Tensor | None = None


def make_plan(
    limits: Sequence[np.ndarray],
    first_keys: Sequence[int],
    device: torch.device,
    key_lens: Sequence[int] | None = None,
) -> BlockPlan:
    """The tiles of runs of rows, one run after the other.

    Args:
        limits: of each run's rows, never falling; keys are counted from first_keys of the run.
        key_lens: if the runs are whole samples, how many keys each has: needed for a gradient.
    """
    parts = [np.concatenate(limits).astype(np.int32), _query_tiles(limits, first_keys)]
    if key_lens is not None:
        parts.append(_key_tiles(limits, first_keys, key_lens))
    # One copy to the device for all of them.
    whole = torch.from_numpy(np.concatenate([part.reshape(-1) for part in parts])).to(device)
    pieces = whole.split([part.size for part in parts])
    shaped = [piece.view(part.shape) for piece, part in zip(pieces, parts, strict=True)]
    return BlockPlan(*shaped)


def _query_tiles(limits: Sequence[np.ndarray], first_keys: Sequence[int]) -> np.ndarray:
    tiles, row = [], 0
    for run, key in zip(limits, first_keys, strict=True):
        first = np.arange(0, len(run), _ROWS)
        last = np.minimum(first + _ROWS, len(run))
        columns = (row + first, last - first, np.full_like(first, key))
        tiles.append(np.stack([*columns, run[first], run[last - 1]], axis=1))
        row += len(run)
    found = np.concatenate(tiles).astype(np.int32)
    return found[np.argsort(-found[:, 4], kind="stable")]


def _key_tiles(
    limits: Sequence[np.ndarray], first_keys: Sequence[int], key_lens: Sequence[int]
) -> np.ndarray:
    tiles, row = [], 0
    for sample, key, keys in zip(limits, first_keys, key_lens, strict=True):
        first = np.arange(0, keys, _ROWS)
        count = np.minimum(first + _ROWS, keys) - first
        some = row + np.searchsorted(sample, first, side="right")
        whole = row + np.searchsorted(sample, first + count, side="left")
        end = np.full_like(first, row + len(sample))
        tiles.append(np.stack([key + first, count, first, some, whole, end], axis=1))
        row += len(sample)
    found = np.concatenate(tiles).astype(np.int32)
    return found[np.argsort(found[:, 3] - found[:, 5], kind="stable")]


def _width(dim: int) -> int:
    """Columns of a tile: products on the tensor cores take powers of two."""
    return max(16, triton.next_power_of_2(dim))


# ------------------------------------------------------------------------------------ forward


@triton.jit
def _read(at, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile, with zeros outside `rows` and `columns` where those are asked for."""
    if ROWS and COLUMNS:
        return tl.load(at, mask=rows & columns, other=0.0)
    if ROWS:
        return tl.load(at, mask=rows, other=0.0)
    if COLUMNS:
        return tl.load(at, mask=columns, other=0.0)
    return tl.load(at)


@triton.jit
def _add_keys(
    acc, total, peak, q, k_at, v_at, start, stop, limit, k_stride, v_stride, scale, d,
    MASK: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Adds the keys [start, stop), in steps of BN, to a tile's running softmax."""
    n = tl.arange(0, BN)
    NARROW: tl.constexpr = DIM < WIDTH
    for first in range(start, stop, BN):
        key = first + n
        inside = key < stop
        k = _read(k_at + key[None, :] * k_stride, inside[None, :], (d < DIM)[:, None], MASK, NARROW)
        score = tl.dot(q, k, input_precision="ieee")
        if MASK:
            score = tl.where(key[None, :] < limit[:, None], score, float("-inf"))
        top = tl.maximum(peak, tl.max(score, 1) * scale)
        share = tl.exp2(score * scale - top[:, None])
        fade = tl.exp2(peak - top)
        total = total * fade + tl.sum(share, 1)
        v = _read(v_at + key[:, None] * v_stride, inside[:, None], (d < DIM)[None, :], MASK, NARROW)
        acc = tl.dot(share.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
        peak = top
    return acc, total, peak


@triton.jit
def _forward(
    q, k, v, out, lse, tiles, limits, rows_in_all, q_stride, k_stride, v_stride, scale,
    REPEAT: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    tile, head = tl.program_id(0), tl.program_id(1)
    first_row = tl.load(tiles + tile * 5)
    rows = tl.load(tiles + tile * 5 + 1)
    first_key = tl.load(tiles + tile * 5 + 2)
    by_all = tl.load(tiles + tile * 5 + 3)
    by_some = tl.load(tiles + tile * 5 + 4)
    m, d = tl.arange(0, BM), tl.arange(0, WIDTH)
    there = (m < rows)[:, None] & (d < DIM)[None, :]
    query = tl.load(
        q + (first_row + m)[:, None] * q_stride + head * DIM + d[None, :], mask=there, other=0.0
    )
    limit = tl.load(limits + first_row + m, mask=m < rows, other=1)
    k_at = k + first_key * k_stride + (head // REPEAT) * DIM + d[:, None]
    v_at = v + first_key * v_stride + (head // REPEAT) * DIM + d[None, :]
    acc = tl.zeros((BM, WIDTH), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    peak = tl.full((BM,), -1e30, tl.float32)
    whole = by_all // BN * BN
    acc, total, peak = _add_keys(
        acc, total, peak, query, k_at, v_at, 0, whole, limit, k_stride, v_stride, scale, d,
        False, DIM, WIDTH, BN,
    )  # fmt: skip
    acc, total, peak = _add_keys(
        acc, total, peak, query, k_at, v_at, whole, by_some, limit, k_stride, v_stride, scale, d,
        True, DIM, WIDTH, BN,
    )  # fmt: skip
    to = out + (first_row + m)[:, None] * (tl.num_programs(1) * DIM) + head * DIM + d[None, :]
    tl.store(to, (acc / total[:, None]).to(out.dtype.element_ty), mask=there)
    tl.store(lse + head * rows_in_all + first_row + m, peak + tl.log2(total), mask=m < rows)


# ----------------------------------------------------------------------------------- backward


@triton.jit
def _delta(
    out, grad, delta, rows_in_all, heads, DIM: tl.constexpr, WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    h, d = tl.arange(0, HEADS), tl.arange(0, WIDTH)
    at = row * heads * DIM + h[:, None] * DIM + d[None, :]
    there = (h < heads)[:, None] & (d < DIM)[None, :]
    o = tl.load(out + at, mask=there, other=0.0).to(tl.float32)
    g = tl.load(grad + at, mask=there, other=0.0).to(tl.float32)
    tl.store(delta + h * rows_in_all + row, tl.sum(o * g, 1), mask=h < heads)


@triton.jit
def _add_rows(
    sum_k, sum_v, key, value, q_at, grad_at, lse_at, delta_at, limits, start, stop, end_row,
    column, q_stride, grad_stride, scale, d,
    MASK: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Adds what the rows [start, stop), in steps of BM, contribute to a tile of keys."""
    m = tl.arange(0, BM)
    NARROW: tl.constexpr = DIM < WIDTH
    real = (d < DIM)[None, :]
    for first in range(start, stop, BM):
        row = first + m
        if MASK:  # rows behind the sample are read as its last one, and see nothing
            row = tl.minimum(row, end_row - 1)
        query = _read(q_at + row[:, None] * q_stride, real, real, False, NARROW)
        slope = _read(grad_at + row[:, None] * grad_stride, real, real, False, NARROW)
        score = tl.dot(query, tl.trans(key), input_precision="ieee")  # (BM, BN)
        share = tl.exp2(score * scale - tl.load(lse_at + row)[:, None])
        if MASK:
            limit = tl.where(first + m < stop, tl.load(limits + row), 0)
            share = tl.where(column[None, :] < limit[:, None], share, 0.0)
        sum_v = tl.dot(tl.trans(share.to(slope.dtype)), slope, sum_v, input_precision="ieee")
        of_share = tl.dot(slope, tl.trans(value), input_precision="ieee")
        of_score = (share * (of_share - tl.load(delta_at + row)[:, None])).to(query.dtype)
        sum_k = tl.dot(tl.trans(of_score), query, sum_k, input_precision="ieee")
    return sum_k, sum_v


@triton.jit
def _backward_of_keys(
    q, k, v, grad, lse, delta, grad_k, grad_v, tiles, limits, rows_in_all,
    q_stride, k_stride, v_stride, scale, softmax_scale,
    REPEAT: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    tile, group = tl.program_id(0), tl.program_id(1)
    groups = tl.num_programs(1)
    first_key = tl.load(tiles + tile * 6)
    keys = tl.load(tiles + tile * 6 + 1)
    within = tl.load(tiles + tile * 6 + 2)
    first_row = tl.load(tiles + tile * 6 + 3)
    whole_row = tl.load(tiles + tile * 6 + 4)
    end_row = tl.load(tiles + tile * 6 + 5)
    n, d = tl.arange(0, BN), tl.arange(0, WIDTH)
    there = (n < keys)[:, None] & (d < DIM)[None, :]
    at = group * DIM + d[None, :]
    key = tl.load(k + (first_key + n)[:, None] * k_stride + at, mask=there, other=0.0)
    value = tl.load(v + (first_key + n)[:, None] * v_stride + at, mask=there, other=0.0)
    sum_k = tl.zeros((BN, WIDTH), tl.float32)
    sum_v = tl.zeros((BN, WIDTH), tl.float32)
    grad_stride = groups * REPEAT * DIM
    # Rows that see the tile in part, then whole steps of rows that see all of it, then the rest.
    head_stop = tl.minimum(first_row + tl.cdiv(whole_row - first_row, BM) * BM, end_row)
    tail_start = head_stop + (end_row - head_stop) // BM * BM
    for repeat in range(REPEAT):
        head = group * REPEAT + repeat
        q_at = q + head * DIM + d[None, :]
        grad_at = grad + head * DIM + d[None, :]
        lse_at, delta_at = lse + head * rows_in_all, delta + head * rows_in_all
        sum_k, sum_v = _add_rows(
            sum_k, sum_v, key, value, q_at, grad_at, lse_at, delta_at, limits,
            first_row, head_stop, end_row, within + n, q_stride, grad_stride, scale, d,
            True, DIM, WIDTH, BM,
        )  # fmt: skip
        sum_k, sum_v = _add_rows(
            sum_k, sum_v, key, value, q_at, grad_at, lse_at, delta_at, limits,
            head_stop, tail_start, end_row, within + n, q_stride, grad_stride, scale, d,
            False, DIM, WIDTH, BM,
        )  # fmt: skip
        sum_k, sum_v = _add_rows(
            sum_k, sum_v, key, value, q_at, grad_at, lse_at, delta_at, limits,
            tail_start, end_row, end_row, within + n, q_stride, grad_stride, scale, d,
            True, DIM, WIDTH, BM,
        )  # fmt: skip
    to = (first_key + n)[:, None] * (groups * DIM) + at
    tl.store(grad_k + to, (sum_k * softmax_scale).to(grad_k.dtype.element_ty), mask=there)
    tl.store(grad_v + to, sum_v.to(grad_v.dtype.element_ty), mask=there)


@triton.jit
def _backward_of_queries(
    q, k, v, grad, lse, delta, grad_q, tiles, limits, rows_in_all,
    q_stride, k_stride, v_stride, scale, softmax_scale,
    REPEAT: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    NARROW: tl.constexpr = DIM < WIDTH
    tile, head = tl.program_id(0), tl.program_id(1)
    first_row = tl.load(tiles + tile * 5)
    rows = tl.load(tiles + tile * 5 + 1)
    first_key = tl.load(tiles + tile * 5 + 2)
    by_some = tl.load(tiles + tile * 5 + 4)
    m, d, n = tl.arange(0, BM), tl.arange(0, WIDTH), tl.arange(0, BN)
    there = (m < rows)[:, None] & (d < DIM)[None, :]
    row = first_row + m
    query = tl.load(q + row[:, None] * q_stride + head * DIM + d[None, :], mask=there, other=0.0)
    packed = row[:, None] * (tl.num_programs(1) * DIM) + head * DIM + d[None, :]
    slope = tl.load(grad + packed, mask=there, other=0.0)
    limit = tl.load(limits + row, mask=m < rows, other=0)
    its_lse = tl.load(lse + head * rows_in_all + row, mask=m < rows, other=0.0)
    its_delta = tl.load(delta + head * rows_in_all + row, mask=m < rows, other=0.0)
    k_at = k + first_key * k_stride + (head // REPEAT) * DIM + d[None, :]
    v_at = v + first_key * v_stride + (head // REPEAT) * DIM + d[None, :]
    total = tl.zeros((BM, WIDTH), tl.float32)
    for start in range(0, by_some, BN):
        column = start + n
        inside, real = (column < by_some)[:, None], (d < DIM)[None, :]
        key = _read(k_at + column[:, None] * k_stride, inside, real, True, NARROW)
        value = _read(v_at + column[:, None] * v_stride, inside, real, True, NARROW)
        score = tl.dot(query, tl.trans(key), input_precision="ieee")  # (BM, BN)
        share = tl.exp2(score * scale - its_lse[:, None])
        share = tl.where(column[None, :] < limit[:, None], share, 0.0)
        of_share = tl.dot(slope, tl.trans(value), input_precision="ieee")
        of_score = (share * (of_share - its_delta[:, None])).to(key.dtype)
        total = tl.dot(of_score, key, total, input_precision="ieee")
    tl.store(grad_q + packed, (total * softmax_scale).to(grad_q.dtype.element_ty), mask=there)


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> Tensor:
        out, lse = _run_forward(q, k, v, plan)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plan = plan
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, lse = ctx.saved_tensors
        rows, heads, dim = q.shape
        groups = k.shape[1]
        grad = grad.contiguous()
        grad_q, grad_k, grad_v = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
        delta = torch.empty_like(lse)
        width = triton.next_power_of_2(heads)
        _delta[(rows,)](
            out, grad, delta, rows, heads, DIM=dim, WIDTH=_width(dim), HEADS=width, num_warps=4
        )
        scale = dim**-0.5
        strides = (q.stride(0), k.stride(0), v.stride(0), scale * _LOG2E, scale)
        plan, of = ctx.plan, OF_KEYS
        assert plan.key_tiles is not None, "a plan for a gradient needs key_lens"
        _backward_of_keys[(len(plan.key_tiles), groups)](
            q, k, v, grad, lse, delta, grad_k, grad_v, plan.key_tiles, plan.limits, rows, *strides,
            REPEAT=heads // groups, DIM=dim, WIDTH=_width(dim), BM=_ROWS, BN=_ROWS,
            num_warps=of.warps, num_stages=of.stages,
        )  # fmt: skip
        of = OF_QUERIES
        _backward_of_queries[(len(plan.query_tiles), heads)](
            q, k, v, grad, lse, delta, grad_q, plan.query_tiles, plan.limits, rows, *strides,
            REPEAT=heads // groups, DIM=dim, WIDTH=_width(dim), BM=_ROWS, BN=_ROWS,
            num_warps=of.warps, num_stages=of.stages,
        )  # fmt: skip
        return grad_q, grad_k, grad_v, None


def _run_forward(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> tuple[Tensor, Tensor]:
    (rows, heads, dim), groups = q.shape, k.shape[1]
    for x in (q, k, v):  # rows may be strided, heads must lie side by side
        assert x.stride(2) == 1 and x.stride(1) == dim, x.stride()
        assert len(x) * x.stride(0) < 1 << 31, "offsets are 32 bits wide"
    out = q.new_empty(q.shape)
    lse = torch.empty(heads, rows, device=q.device, dtype=torch.float32)
    _forward[(len(plan.query_tiles), heads)](
        q, k, v, out, lse, plan.query_tiles, plan.limits, rows,
        q.stride(0), k.stride(0), v.stride(0), dim**-0.5 * _LOG2E,
        REPEAT=heads // groups, DIM=dim, WIDTH=_width(dim), BM=_ROWS, BN=_KEYS,
        num_warps=FORWARD.warps, num_stages=FORWARD.stages,
    )  # fmt: skip
    return out, lse


def block_attention(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> Tensor:
    """Attention of q (T, nh, d) over k, v (S, nkv, d), packed sample after sample: (T, nh, d).

    plan: `make_plan` of the layout.
    """
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _BlockAttention.apply(q, k, v, plan)
    return _run_forward(q, k, v, plan)[0]
