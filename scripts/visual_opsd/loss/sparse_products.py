# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The two products behind the loss where d loss / d logits is sparse, as Triton kernels.

In the paper's form a row of d loss / d logits has k = 256 entries that are not 0, of V = 152,064.
The dense products multiply the zeros as well, at 2 H FLOP an entry; these read the k rows of the
head (or of the hidden states, the other way round), at 2 H bytes an entry. On an H100 the matrix
units get through some 240 entries in the time that one takes to arrive, the others are 594 times as
many. Sums are fp32, in the order of the rows, without atomics; every element of the gradient is
written once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# From as many dense entries for each sparse one on, the sparse products are taken.
DENSE_PER_SPARSE = 384
HIDDEN_BLOCK, HIDDEN_TILE, HIDDEN_WARPS = 512, 8, 4  # columns, entries of a step
HEAD_TILE, HEAD_WARPS = 2, 8  # entries of a step; a program has all columns


def pays(k: int, vocab: int) -> bool:
    """Whether k entries of a row of `vocab` are few enough."""
    return k * DENSE_PER_SPARSE <= vocab


def sparse_times_head(values: Tensor, index: Tensor, head: Tensor, out: Tensor) -> None:
    """out (c, H) = S @ head, where row i of S (c, V) holds values[i] at index[i] and zeros.

    Args:
        values: (c, k) fp32.
        index: (c, k) int64.
        head: (V, H), rows contiguous.
        out: (c, H), contiguous, any float dtype.
    """
    rows, k = index.shape
    width = head.shape[1]
    blocks = triton.cdiv(width, HIDDEN_BLOCK)
    assert head.stride(1) == 1 and out.is_contiguous()
    if rows:
        _times_head[(rows * blocks,)](
            values, index, head, out, k, width, head.stride(0), blocks,
            BLOCK=HIDDEN_BLOCK, TILE=HIDDEN_TILE, num_warps=HIDDEN_WARPS,
        )  # fmt: skip


def sparse_times_hidden(values: Tensor, index: Tensor, hidden: Tensor, vocab: int) -> Tensor:
    """S^T @ hidden: (V, H) in the dtype of hidden (N, H); S as above, values and index (N, k)."""
    k, width = index.shape[1], hidden.shape[1]
    hidden = hidden.contiguous()
    out = hidden.new_empty(vocab, width)
    # Entries by vocabulary id, of one id by row: the sort is stable.
    ids, order = index.flatten().int().sort(stable=True)
    every = torch.arange(vocab + 1, dtype=torch.int32, device=index.device)
    bounds = torch.searchsorted(ids, every, out_int32=True)  # (V + 1,): where an id's entries start
    _times_hidden[(vocab,)](
        values.flatten()[order], (order // k).int(), bounds, hidden, out, width,
        BLOCK=triton.next_power_of_2(width), TILE=HEAD_TILE, num_warps=HEAD_WARPS,
    )  # fmt: skip
    return out


def scale_(tensor: Tensor, factor: Tensor) -> Tensor:
    """tensor *= factor, a scalar on the device, in fp32; nothing is read where that is 1."""
    assert tensor.is_contiguous() and factor.numel() == 1
    block = 8192
    if tensor.numel():
        _scale[(triton.cdiv(tensor.numel(), block),)](
            tensor, factor, tensor.numel(), BLOCK=block, num_warps=8
        )
    return tensor


@triton.jit
def _times_head(
    values, index, head, out, k, width, stride, blocks, BLOCK: tl.constexpr, TILE: tl.constexpr
):
    """One row of out, BLOCK of its columns."""
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    column = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((TILE, BLOCK), tl.float32)
    start = 0
    while start < k:
        entry = start + tl.arange(0, TILE)
        factor = tl.load(values + row * k + entry, mask=entry < k, other=0.0)
        place = tl.load(index + row * k + entry, mask=entry < k, other=0) * stride
        mask = (entry < k)[:, None] & (column < width)[None, :]
        block = tl.load(head + place[:, None] + column[None, :], mask=mask, other=0.0)
        total += factor[:, None] * block.to(tl.float32)
        start += TILE
    tl.store(out + row * width + column, tl.sum(total, axis=0), mask=column < width)


@triton.jit
def _times_hidden(
    values, rows, bounds, hidden, out, width, BLOCK: tl.constexpr, TILE: tl.constexpr
):
    """One row of out: the sum over the entries of one vocabulary id."""
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    total = tl.zeros((TILE, BLOCK), tl.float32)
    start, last = tl.load(bounds + program), tl.load(bounds + program + 1)
    while start < last:
        entry = start + tl.arange(0, TILE)
        factor = tl.load(values + entry, mask=entry < last, other=0.0)
        place = tl.load(rows + entry, mask=entry < last, other=0).to(tl.int64) * width
        mask = (entry < last)[:, None] & (column < width)[None, :]
        block = tl.load(hidden + place[:, None] + column[None, :], mask=mask, other=0.0)
        total += factor[:, None] * block.to(tl.float32)
        start += TILE
    tl.store(
        out + program.to(tl.int64) * width + column, tl.sum(total, axis=0), mask=column < width
    )


@triton.jit
def _scale(tensor, factor, count, BLOCK: tl.constexpr):
    by = tl.load(factor).to(tl.float32)
    if by != 1.0:
        place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(tensor + place, mask=place < count, other=0.0).to(tl.float32)
        tl.store(tensor + place, x * by, mask=place < count)
