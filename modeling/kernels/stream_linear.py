# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Products of a few rows with a large matrix, at the speed at which the matrix can be read.

A decoding step multiplies one row a sample with every weight of the model: memory bandwidth is
all that counts, and each launch that has to wait for its neighbour costs. So what stands around
the product is done in the same kernel: the norm before it (its scale is a factor of the result,
hence no pass of its own), bias, SwiGLU, residual after it.

    y = norm(x) W^T + bias          norm(x) = x / rms(x) * gain, or x
    y = silu(norm(x) W^T) * (norm(x) W2^T)
    y = residual + x W^T

One row is multiplied with ordinary arithmetic, 2 to 64 on the tensor cores.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from modeling.kernels.rows import norm_rows

MAX_ROWS = 64


@dataclass(frozen=True)
class Tile:
    """How the matrix is cut: rows and columns of a tile, warps of a program, tiles in flight."""

    rows: int
    columns: int
    warps: int
    stages: int
    swap: bool = False


@triton.jit
def _load(at, inside, WHOLE: tl.constexpr):
    """A tile, with zeros outside `inside` unless all of it is there."""
    if WHOLE:
        return tl.load(at)
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def _finish(
    y, other, residual_at, mask, kind: tl.constexpr, PAIR: tl.constexpr, RESIDUAL: tl.constexpr
):
    """SwiGLU and residual; what eager code rounds in between is rounded here too."""
    if PAIR:
        y = y.to(kind).to(tl.float32)
        silu = (y / (1.0 + tl.exp(-y))).to(kind).to(tl.float32)
        y = silu * other.to(kind).to(tl.float32)
    if RESIDUAL:
        y = y.to(kind).to(tl.float32) + tl.load(residual_at, mask=mask, other=0.0).to(tl.float32)
    return y


@triton.jit
def _one_row(
    x, weight, second, gain, bias, residual, out, N, K, eps,
    NORM: tl.constexpr, PAIR: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, WHOLE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    kind: tl.constexpr = out.dtype.element_ty
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    at = n.to(tl.int64)[:, None] * K + k[None, :]
    rows = n < N
    total = tl.zeros((BN, BK), tl.float32)
    other = tl.zeros((BN, BK), tl.float32)
    squares = tl.zeros((BK,), tl.float32)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    for start in tl.range(0, K, BK, num_stages=STAGES):
        inside = rows[:, None] & (start + k < K)[None, :]
        w = _load(weight + at + start, inside, WHOLE)
        value = _load(x + start + k, start + k < K, WHOLE).to(tl.float32)
        if NORM:
            squares += value * value
            g = _load(gain + start + k, start + k < K, WHOLE)
            value = (value * g.to(tl.float32)).to(kind).to(tl.float32)
        total += w.to(tl.float32) * value[None, :]
        if PAIR:
            w2 = _load(second + at + start, inside, WHOLE)
            other += w2.to(tl.float32) * value[None, :]
    y = tl.sum(total, 1)
    z = tl.sum(other, 1)
    if NORM:
        scale = 1.0 / tl.sqrt(tl.sum(squares, 0) / K + eps)
        y *= scale
        z *= scale
    if BIAS:
        y += tl.load(bias + n, mask=rows, other=0.0).to(tl.float32)
    y = _finish(y, z, residual + n, rows, kind, PAIR, RESIDUAL)
    tl.store(out + n, y, mask=rows)


@triton.jit
def _few_rows(
    x, weight, second, bias, residual, out, M, N, K,
    PAIR: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    WHOLE: tl.constexpr, SWAP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    kind: tl.constexpr = out.dtype.element_ty
    if SWAP:  # (BN, BM) = W tile @ x^T tile
        m, n = tl.arange(0, BM)[None, :], tl.program_id(0) * BN + tl.arange(0, BN)[:, None]
        k_of_w, k_of_x = tl.arange(0, BK)[None, :], tl.arange(0, BK)[:, None]
        total = tl.zeros((BN, BM), tl.float32)
        other = tl.zeros((BN, BM), tl.float32)
    else:  # (BM, BN) = x tile @ W^T tile
        m, n = tl.arange(0, BM)[:, None], tl.program_id(0) * BN + tl.arange(0, BN)[None, :]
        k_of_w, k_of_x = tl.arange(0, BK)[:, None], tl.arange(0, BK)[None, :]
        total = tl.zeros((BM, BN), tl.float32)
        other = tl.zeros((BM, BN), tl.float32)
    at = n.to(tl.int64) * K + k_of_w
    x_at = m * K + k_of_x
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    for start in tl.range(0, K, BK, num_stages=STAGES):
        inside = (start + k_of_w < K) & (n < N)
        w = _load(weight + at + start, inside, WHOLE)
        there = m < M
        if not WHOLE:
            there = there & (start + k_of_x < K)
        value = tl.load(x + x_at + start, mask=there, other=0.0)
        if SWAP:
            total = tl.dot(w, value, total, input_precision="ieee")
        else:
            total = tl.dot(value, w, total, input_precision="ieee")
        if PAIR:
            w2 = _load(second + at + start, inside, WHOLE)
            if SWAP:
                other = tl.dot(w2, value, other, input_precision="ieee")
            else:
                other = tl.dot(value, w2, other, input_precision="ieee")
    if BIAS:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    mask = (m < M) & (n < N)
    to = m * N + n
    total = _finish(total, other, residual + to, mask, kind, PAIR, RESIDUAL)
    tl.store(out + to, total, mask=mask)


def tile_for(rows: int, n: int, k: int, pair: bool) -> Tile:
    """The tile that measured fastest at these sizes on one H100."""
    wide, deep = n > 100_000, k > 8192
    if rows == 1:
        if wide:
            return Tile(4, 1024, 2, 5)
        return Tile(4, 512, 4, 3) if pair else Tile(8, 512, 4, 3 if deep else 1)
    if rows <= 8:
        if pair:
            return Tile(32, 128, 2, 4)
        return Tile(32, 128, 2, 6) if 4096 < n <= 8192 else Tile(16, 256, 2, 6)
    if wide:
        return Tile(64, 128, 4, 3, swap=True)
    if pair:
        return Tile(16, 256, 2, 3)
    return Tile(16, 256, 2, 4) if n <= 4096 and not deep else Tile(16, 128, 2, 6)


@cache
def _shared_memory(device: int) -> int:
    """Bytes that one program may have, of a GPU; at least what every Ampere card has."""
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", 99 * 1024))


def stages_within(tile: Tile, block: int, pair: bool, nbytes: int) -> int:
    """Tiles in flight that fit `nbytes` of shared memory with `block` rows of x, in bf16 or fp16.

    Cards for desktops have 99 KB, which are too few for what is fastest on an H100 at 64 rows.
    """
    each = 2 * tile.columns * (tile.rows * (2 if pair else 1) + block)
    return min(tile.stages, 1 + nbytes // each)  # the last of them is in registers


def stream_linear(
    x: Tensor,
    weight: Tensor,
    *,
    gain: Tensor | None = None,
    eps: float = 1e-6,
    bias: Tensor | None = None,
    second: Tensor | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    chained: bool = False,
) -> Tensor:
    """x (M, K) times weight (N, K), transposed: (M, N), with what belongs around it.

    Args:
        x, weight: contiguous, one dtype; M is at most `MAX_ROWS`.
        gain: (K,) scale of an RMSNorm of x that comes first, with `eps`.
        bias: (N,).
        second: (N, K); the result is silu(product with weight) * (product with second).
        residual: (M, N), added to the result; may be `out`.
        out: where the result goes (new memory).
        chained: overlap this launch with the end of the one before (Hopper and later).
    """
    (m, k), n = x.shape, weight.shape[0]
    assert m <= MAX_ROWS and weight.shape[1] == k and x.is_contiguous() and weight.is_contiguous()
    if out is None:
        out = x.new_empty(m, n)
    tile = tile_for(m, n, k, second is not None)
    columns = min(tile.columns, triton.next_power_of_2(max(k, 16)))
    flags = {
        "PAIR": second is not None,
        "BIAS": bias is not None,
        "RESIDUAL": residual is not None,
        "BN": tile.rows,
        "BK": columns,
        "STAGES": tile.stages,
        "WHOLE": n % tile.rows == 0 and k % columns == 0,
        "PDL": chained,
        "num_warps": tile.warps,
    }
    if chained:
        flags["launch_pdl"] = True
    grid = (triton.cdiv(n, tile.rows),)
    absent = out  # a pointer for what the kernel does not read
    second, bias, residual = (absent if t is None else t for t in (second, bias, residual))
    if m == 1:
        scale = absent if gain is None else gain
        _one_row[grid](
            x, weight, second, scale, bias, residual, out, n, k, eps,
            NORM=gain is not None, **flags,
        )  # fmt: skip
        return out
    if gain is not None:
        x = norm_rows(x, gain, eps, chained=chained)
    block = max(8 if tile.swap else 16, triton.next_power_of_2(m))
    if x.is_cuda:
        room = _shared_memory(x.device.index)
        flags["STAGES"] = stages_within(tile, block, flags["PAIR"], room)
    _few_rows[grid](
        x, weight, second, bias, residual, out, m, n, k, BM=block, SWAP=tile.swap, **flags
    )
    return out
