# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The next token of each row from its logits: `choose` of `modeling/bagel/generate.py`.

A first kernel reduces blocks of the vocabulary, a second one finds the block in which the
cumulative probability passes the row's number, and the token inside it. Sums are fp64, and a row's
arithmetic does not depend on its neighbours. The peak is subtracted before the temperature divides,
which is exact near it however large logits are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


@triton.jit
def _reduce(logits, peaks, sums, tokens, vocab, blocks, inverse_temperature, BLOCK: tl.constexpr):
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    entry = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row * vocab + entry, mask=entry < vocab, other=float("-inf"))
    x = x.to(tl.float32)
    peak, token = tl.max(x, 0, return_indices=True, return_indices_tie_break_left=True)
    share = tl.where(entry < vocab, tl.exp((x - peak) * inverse_temperature), 0.0)
    to = row * blocks + block
    tl.store(peaks + to, peak)
    tl.store(sums + to, tl.sum(share.to(tl.float64), 0))
    tl.store(tokens + to, block * BLOCK + token)


@triton.jit
def _pick(
    logits, peaks, sums, tokens, uniforms, token_out, logprob_out, vocab, blocks,
    inverse_temperature, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, GREEDY: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCKS)
    there = block < blocks
    its_peak = tl.load(peaks + row * blocks + block, mask=there, other=float("-inf"))
    its_sum = tl.load(sums + row * blocks + block, mask=there, other=0.0)
    peak = tl.max(its_peak, 0)
    fade = tl.exp((its_peak - peak) * inverse_temperature)
    mass = tl.where(there, its_sum * fade.to(tl.float64), 0.0)
    total = tl.sum(mass, 0)
    if GREEDY:
        _, best = tl.max(its_peak, 0, return_indices=True, return_indices_tie_break_left=True)
        # NaN wins no comparison, and may leave what lies behind the last block or entry.
        best = tl.minimum(best, blocks - 1)
        token = tl.minimum(tl.load(tokens + row * blocks + best), vocab - 1)
        chosen = peak
    else:
        target = tl.load(uniforms + row).to(tl.float64) * total
        passed = tl.cumsum(mass, 0)
        before = tl.sum((there & (passed <= target)).to(tl.int32), 0)
        before = tl.minimum(before, blocks - 1)
        rest = target - tl.sum(tl.where(block < before, mass, 0.0), 0)
        entry = before * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(logits + row * vocab + entry, mask=entry < vocab, other=float("-inf"))
        x = x.to(tl.float32)
        share = tl.exp((x - peak) * inverse_temperature)
        share = tl.where(entry < vocab, share, 0.0).to(tl.float64)
        below = tl.sum((tl.cumsum(share, 0) <= rest).to(tl.int32), 0)
        token = tl.minimum(before * BLOCK + below, vocab - 1)
        # Rounding may leave the target behind the block's last entry of any probability.
        chosen = tl.sum(tl.where(entry == token, x, 0.0), 0)
        outside = token >= (before + 1) * BLOCK
        token = tl.where(outside, (before + 1) * BLOCK - 1, token)
        chosen = tl.where(outside, tl.sum(tl.where(entry == token, x, 0.0), 0), chosen)
    tl.store(token_out + row, token.to(tl.int64))
    logprob = (chosen - peak) * inverse_temperature - tl.log(total).to(tl.float32)
    tl.store(logprob_out + row, logprob)


def choose_token(
    logits: Tensor, temperature: float, uniforms: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Token (B,) int64 and its log-probability, fp32 (B,), of logits (B, V).

    uniforms: (B,) in [0, 1), where the inverse of the cumulative distribution is taken; None: the
        arg-max, the lowest of equals.
    """
    batch, vocab = logits.shape
    blocks = triton.cdiv(vocab, BLOCK)
    device = logits.device
    peaks = torch.empty(batch, blocks, device=device, dtype=torch.float32)
    sums = torch.empty(batch, blocks, device=device, dtype=torch.float64)
    tokens = torch.empty(batch, blocks, device=device, dtype=torch.int32)
    token = torch.empty(batch, device=device, dtype=torch.int64)
    logprob = torch.empty(batch, device=device, dtype=torch.float32)
    inverse = 1.0 / temperature
    _reduce[(batch, blocks)](
        logits, peaks, sums, tokens, vocab, blocks, inverse, BLOCK=BLOCK, num_warps=8
    )
    _pick[(batch,)](
        logits, peaks, sums, tokens, token if uniforms is None else uniforms, token, logprob,
        vocab, blocks, inverse, BLOCK=BLOCK, BLOCKS=triton.next_power_of_2(blocks),
        GREEDY=uniforms is None, num_warps=8,
    )  # fmt: skip
    return token, logprob
