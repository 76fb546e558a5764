# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Attention of one new row a sample against a static cache, split over the cached positions.

One kernel does what follows the product with q, k and v: norm and rotation of the new query and
key, the new key and value into the cache, attention of every group of query heads over the keys
0..slot of its sample, and the sum over the parts that the positions were split into, done by
whichever program of a group finishes last. The order of that sum is fixed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_LOG2E = 1.4426950408889634


@triton.jit
def _normed(at, weight, mask, eps, HALF: tl.constexpr):
    """Both halves of heads (R, HALF), normed and scaled, fp32."""
    half = tl.arange(0, HALF)
    left = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    right = tl.load(at + HALF, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(left * left + right * right, 1) / (2 * HALF)
    scale = (1.0 / tl.sqrt(mean + eps))[:, None]
    left = left * scale * tl.load(weight + half).to(tl.float32)[None, :]
    right = right * scale * tl.load(weight + HALF + half).to(tl.float32)[None, :]
    return left, right


@triton.jit
def _part(part_max, part_sum, part_out, parts, part, count, head, dim, real):
    """What one program left behind, from beyond the first-level cache; nothing past the last."""
    at = (parts + part) * head.shape[0] + head
    there = head * 0 + part < count
    # Finite, as minus infinity from itself is no number.
    peak = tl.load(part_max + at, mask=there, other=-1e30, cache_modifier=".cg")
    total = tl.load(part_sum + at, mask=there, other=0.0, cache_modifier=".cg")
    acc_at = part_out + at[:, None] * dim.shape[0] + dim[None, :]
    acc = tl.load(acc_at, mask=real & there[:, None], other=0.0, cache_modifier=".cg")
    return peak, total, acc


@triton.jit
def _merged(peak, total, acc, other_peak, other_total, other_acc):
    """Two partial sums of a softmax as one."""
    top = tl.maximum(peak, other_peak)
    mine, theirs = tl.exp2(peak - top), tl.exp2(other_peak - top)
    total = total * mine + other_total * theirs
    return top, total, acc * mine[:, None] + other_acc * theirs[:, None]


@triton.jit
def _attend(
    qkv, q_weight, k_weight, cos, sin, positions, slots, keys, values,
    part_out, part_max, part_sum, arrived, out,
    max_len, eps, scale,
    GROUPS: tl.constexpr, REPEAT: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    DIM: tl.constexpr = 2 * HALF
    kind: tl.constexpr = out.dtype.element_ty
    row = tl.program_id(0) // GROUPS
    group = tl.program_id(0) % GROUPS
    split = tl.program_id(1)
    half = tl.arange(0, HALF)
    dim = tl.arange(0, DIM)
    head = tl.arange(0, ROWS)  # of this group's queries
    real = (head < REPEAT)[:, None]
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    slot = tl.load(slots + row)
    first = split * CHUNK
    if first <= slot:
        position = tl.load(positions + row)
        c = tl.load(cos + position * HALF + half).to(tl.float32)[None, :]
        s = tl.load(sin + position * HALF + half).to(tl.float32)[None, :]
        new = qkv + row.to(tl.int64) * ((REPEAT + 2) * GROUPS * DIM)
        q_at = new + (group * REPEAT + head)[:, None] * DIM + half[None, :]
        left, right = _normed(q_at, q_weight, real, eps, HALF)
        q_left = (left * c - right * s).to(kind)
        q_right = (right * c + left * s).to(kind)

        base = (row.to(tl.int64) * max_len * GROUPS + group) * DIM
        peak = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        acc = tl.zeros((ROWS, DIM), tl.float32)
        last = tl.minimum(first + CHUNK, slot)  # the new row comes from registers
        for start in range(first, last, BLOCK):
            seen = start + tl.arange(0, BLOCK)
            there = seen < last
            k_at = base + seen[None, :].to(tl.int64) * (GROUPS * DIM)
            k_left = tl.load(keys + k_at + half[:, None], mask=there[None, :], other=0.0)
            k_right = tl.load(keys + k_at + HALF + half[:, None], mask=there[None, :], other=0.0)
            score = tl.dot(q_left, k_left, input_precision="ieee")
            score = tl.dot(q_right, k_right, score, input_precision="ieee") * scale
            score = tl.where(there[None, :], score, float("-inf"))
            higher = tl.maximum(peak, tl.max(score, 1))
            share = tl.exp2(score - higher[:, None])
            fade = tl.exp2(peak - higher)
            total = total * fade + tl.sum(share, 1)
            v_at = base + seen[:, None].to(tl.int64) * (GROUPS * DIM) + dim[None, :]
            v = tl.load(values + v_at, mask=there[:, None], other=0.0)
            acc = tl.dot(share.to(kind), v, acc * fade[:, None], input_precision="ieee")
            peak = higher
        if slot < first + CHUNK:  # this split holds the new position
            one = tl.arange(0, 1)[:, None]
            new_at = new + (REPEAT * GROUPS + group) * DIM + one * DIM + half[None, :]
            k_one, k_two = _normed(new_at, k_weight, one == 0, eps, HALF)
            new_left = (k_one * c - k_two * s).to(kind)
            new_right = (k_two * c + k_one * s).to(kind)
            new_v = tl.load(new + ((REPEAT + 1) * GROUPS + group) * DIM + dim)
            place = base + slot.to(tl.int64) * (GROUPS * DIM)
            tl.store(keys + place + one * DIM + half[None, :], new_left)
            tl.store(keys + place + one * DIM + HALF + half[None, :], new_right)
            tl.store(values + place + dim, new_v)
            pairs = q_left.to(tl.float32) * new_left.to(tl.float32)
            pairs += q_right.to(tl.float32) * new_right.to(tl.float32)
            alone = tl.sum(pairs, 1) * scale
            top = tl.maximum(peak, alone)
            weight = tl.exp2(alone - top)
            keep = tl.exp2(peak - top)
            total = total * keep + weight
            acc = acc * keep[:, None] + weight[:, None] * new_v.to(tl.float32)[None, :]
            peak = top

        to = out + (row * GROUPS + group) * (REPEAT * DIM) + head[:, None] * DIM + dim[None, :]
        if SPLITS == 1:
            tl.store(to, acc / total[:, None], mask=real)
        else:
            at = (tl.program_id(0) * SPLITS + split) * ROWS + head
            tl.store(part_max + at, peak)
            tl.store(part_sum + at, total)
            tl.store(part_out + at[:, None] * DIM + dim[None, :], acc, mask=real)
            tl.debug_barrier()  # all of this program's parts are written before it is counted
            count = slot // CHUNK + 1
            if tl.atomic_add(arrived + tl.program_id(0), 1, sem="acq_rel") == count - 1:
                tl.debug_barrier()
                tl.store(arrived + tl.program_id(0), 0)  # for the next launch
                parts = tl.program_id(0) * SPLITS
                all_peak = tl.full((ROWS,), -1e30, tl.float32)
                all_total = tl.zeros((ROWS,), tl.float32)
                all_acc = tl.zeros((ROWS, DIM), tl.float32)
                # Four parts at a time, so that their loads are in flight together.
                for part in range(0, count, 4):
                    p0, t0, a0 = _part(
                        part_max, part_sum, part_out, parts, part, count, head, dim, real
                    )
                    p1, t1, a1 = _part(
                        part_max, part_sum, part_out, parts, part + 1, count, head, dim, real
                    )
                    p2, t2, a2 = _part(
                        part_max, part_sum, part_out, parts, part + 2, count, head, dim, real
                    )
                    p3, t3, a3 = _part(
                        part_max, part_sum, part_out, parts, part + 3, count, head, dim, real
                    )
                    p0, t0, a0 = _merged(p0, t0, a0, p1, t1, a1)
                    p2, t2, a2 = _merged(p2, t2, a2, p3, t3, a3)
                    p0, t0, a0 = _merged(p0, t0, a0, p2, t2, a2)
                    all_peak, all_total, all_acc = _merged(p0, t0, a0, all_peak, all_total, all_acc)
                tl.store(to, all_acc / all_total[:, None], mask=real)


def chunk_for(batch: int, groups: int, max_len: int) -> int:
    """Cached positions of one program: enough programs to fill the chip, few parts to sum."""
    for chunk in (512, 256, 128):
        if batch * groups * triton.cdiv(max_len, chunk) >= 132:
            return chunk
    return 64


class DecodeAttention:
    """The kernel with its scratch memory, for one batch and one length of cache.

    Args:
        batch, max_len: rows and positions of the cache. heads, kv_heads, dim: of the model.
        cos, sin: (positions, dim / 2), any float dtype, of every rope position that may come.
    """

    def __init__(
        self,
        batch: int,
        max_len: int,
        heads: int,
        kv_heads: int,
        dim: int,
        cos: Tensor,
        sin: Tensor,
    ) -> None:
        self.heads, self.kv_heads, self.dim, self.max_len = heads, kv_heads, dim, max_len
        self.cos, self.sin = cos.contiguous(), sin.contiguous()
        self.chunk = chunk_for(batch, kv_heads, max_len)
        self.splits = triton.cdiv(max_len, self.chunk)
        self.rows = max(16, triton.next_power_of_2(heads // kv_heads))
        parts = batch * kv_heads * self.splits * self.rows
        device = cos.device
        self.part_out = torch.empty(parts * dim, device=device, dtype=torch.float32)
        self.part_max = torch.empty(parts, device=device, dtype=torch.float32)
        self.part_sum = torch.empty(parts, device=device, dtype=torch.float32)
        self.arrived = torch.zeros(batch * kv_heads, device=device, dtype=torch.int32)
        self.grid = (batch * kv_heads, self.splits)

    def __call__(
        self,
        qkv: Tensor,
        q_weight: Tensor,
        k_weight: Tensor,
        eps: float,
        positions: Tensor,
        slots: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        out: Tensor,
        chained: bool = False,
    ) -> Tensor:
        """Attention of the new rows: qkv (B, (nh + 2 nkv) d) -> out (B, nh d).

        positions, slots: (B,) int64, rope position and cache row of the new token. keys, values:
            (B, max_len, nkv, d), which get the new row.
        """
        flags = {"launch_pdl": True} if chained else {}
        _attend[self.grid](
            qkv, q_weight, k_weight, self.cos, self.sin, positions, slots, keys, values,
            self.part_out, self.part_max, self.part_sum, self.arrived, out,
            self.max_len, eps, self.dim**-0.5 * _LOG2E,
            GROUPS=self.kv_heads, REPEAT=self.heads // self.kv_heads, ROWS=self.rows,
            HALF=self.dim // 2, CHUNK=self.chunk, BLOCK=min(64, self.chunk), SPLITS=self.splits,
            PDL=chained, num_warps=4, num_stages=2, **flags,
        )  # fmt: skip
        return out
