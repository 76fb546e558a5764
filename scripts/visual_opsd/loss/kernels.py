# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The arithmetic of `chunk.py` as Triton kernels, for logits on a GPU.

Logits are (c, V), contiguous, in any float dtype but fp64, and are read as often as the loss needs
them and no more; everything computed from them is fp32. Rows are cut into segments, one program
each, whose sums a second step adds up in a fixed order: no atomics, so results repeat bit by bit.

A row's largest logit is subtracted before anything is scaled: a scaled logit of some hundreds less
a scaled log-sum-exp would keep no more than four digits of what comes out of the exponential.

The exact top-k reads the logits once, together with the log-sum-exp. That pass leaves the largest
logit of every group of `GROUP` neighbours behind. The k groups with the largest of these hold a
top-k of the row: every other group's entries are at most the smallest of the k maxima. Only they
are looked at again, by bisection on integers in the order of the floats.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from scripts.visual_opsd.opsd_loss import LossConfig

GROUP = 32  # neighbours that share one maximum
READ_BLOCK, READ_WARPS = 8192, 8  # logits of one model a program reads at once
PAIR_BLOCK, PAIR_WARPS = 4096, 8  # the same where both models' are read
SELECT_WARPS = 16  # of the programs that select, one a row; doubled where k is large
LARGEST_K = 1024  # beyond it a program's candidates do not fit its registers

# KIND: how an entry's term of the divergence is formed. CLIP: what is bounded; 0 is nothing.
_NONE, _FORWARD, _REVERSE, _MIXTURE, _LABEL = range(5)
_ENTRY, _TOKEN = 1, 2
# Exponentials are taken to base 2, which is the one instruction that the hardware has.
_LOG2_E = tl.constexpr(math.log2(math.e))
_LOG_2 = tl.constexpr(math.log(2.0))


class RowStatistics(NamedTuple):
    """Of each row of (c, V) logits, (c,) fp32 where nothing is said."""

    lse: Tensor  # log-sum-exp of logits / T
    entropy: Tensor  # at T, in nats
    unit_lse: Tensor  # log-sum-exp at T = 1
    # (c, 3): both log-sum-exps taken apart, so that no digit is lost where logits are large: the
    # largest logit, and the logs of the sums of exponentials less it, at T and at T = 1
    norm: Tensor


class FullDivergence(NamedTuple):
    """Of each row, (c,) fp32 each; the last two are what `write_gradient` asks for."""

    divergence: Tensor  # with clip and T^2
    forward_kl: Tensor  # without
    slope_sum: Tensor  # of the slopes in log s, without T^2
    gate: Tensor  # T^2, or 0 where a clip of the whole row cuts the gradient off


def row_statistics(logits: Tensor, temperature: float) -> RowStatistics:
    """Log-sum-exp and entropy of logits (c, V), in one pass over them."""
    return _statistics(logits, temperature, None)


def statistics_and_top_k(
    logits: Tensor, temperature: float, k: int
) -> tuple[RowStatistics, Tensor, Tensor]:
    """`row_statistics` and an exact top-k from one pass over logits (c, V).

    Returns:
        The statistics; values (c, k) in the logits' dtype; index (c, k) int64, ascending. Among
        equals at the threshold those that come first are taken. A row that holds NaN still gets
        k distinct indices. For k above LARGEST_K or the number of groups it is torch.topk's.
    """
    rows, vocab = logits.shape
    assert 0 < k <= vocab, (k, vocab)
    groups = triton.cdiv(vocab, GROUP)
    if groups < k or k > LARGEST_K:
        values, index = logits.topk(k, dim=-1, sorted=False)
        return row_statistics(logits, temperature), values, index
    maxima = logits.new_empty(rows, groups)
    statistics = _statistics(logits, temperature, maxima)
    chosen = torch.empty(rows, k, dtype=torch.int32, device=logits.device)
    index = torch.empty(rows, k, dtype=torch.long, device=logits.device)
    if rows:
        # fp32's order needs all of its bits; of a half in fp32 the last ones are zeros.
        shift = {torch.bfloat16: 16, torch.float16: 13}.get(logits.dtype, 0)
        warps = SELECT_WARPS if k <= LARGEST_K // 2 else 2 * SELECT_WARPS
        _choose_groups[(rows,)](
            maxima, chosen, groups, k, BLOCK=triton.next_power_of_2(triton.cdiv(groups, GROUP)),
            WIDTH=GROUP, SHIFT=shift, num_warps=warps,
        )  # fmt: skip
        _choose_entries[(rows,)](
            logits, chosen, index, vocab, k,
            BLOCK=triton.next_power_of_2(k), WIDTH=GROUP, SHIFT=shift, num_warps=warps,
        )  # fmt: skip
    return statistics, logits.gather(-1, index), index


def divergence_on_support(
    logits: Tensor,
    index: Tensor,
    log_t: Tensor,
    scale: Tensor,
    config: LossConfig,
    cross_entropy: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The divergence where both models are renormalised on a support, and its gradient there.

    Args:
        logits: (c, V), the student's.
        index: (c, k) int64, distinct in each row.
        log_t: (c, k) fp32, the teacher's log-probabilities on the support.
        scale: (c,) fp32, what d divergence / d log s is multiplied by to reach the logits.
        cross_entropy: (labels (c,) int64, the student's `norm` (c, 3), weight (c,)): the gradient
            on the support of weight * CE, which is added.

    Returns:
        Divergence (c,) with clip and T^2, forward KL (c,), gradient (c, k), all fp32.
    """
    rows, k = index.shape
    divergence, forward_kl = torch.empty_like(scale), torch.empty_like(scale)
    inside = torch.empty_like(log_t)
    labels, norm, weight = cross_entropy or (index, scale, scale)
    if rows:
        _support[(rows,)](
            logits, index, log_t, scale, labels, norm, weight, divergence, forward_kl, inside,
            logits.shape[1], k, _rate(config.temperature), float(config.temperature) ** 2,
            float(config.beta), _bound(config), BLOCK=triton.next_power_of_2(k),
            KIND=_kind(config), CLIP=_clip(config), CE=cross_entropy is not None, num_warps=4,
        )  # fmt: skip
    return divergence, forward_kl, inside


def full_divergence(
    student: Tensor, teacher: Tensor, student_norm: Tensor, teacher_norm: Tensor, config: LossConfig
) -> FullDivergence:
    """The divergence over all of V: logits (c, V) of both models and their `norm`s (c, 3)."""
    rows, vocab = student.shape
    segments = triton.cdiv(vocab, PAIR_BLOCK)
    sums = student_norm.new_empty(3, rows, segments)
    if rows:
        _pair_sums[(rows * segments,)](
            student, teacher, student_norm, teacher_norm, sums, vocab, segments, sums.stride(0),
            _rate(config.temperature), float(config.beta), _bound(config), BLOCK=PAIR_BLOCK,
            KIND=_kind(config), CLIP=_clip(config), num_warps=PAIR_WARPS,
        )  # fmt: skip
    divergence, slope_sum, forward_kl = sums.sum(-1)
    gate = torch.full_like(divergence, config.temperature**2)
    if _clip(config) == _TOKEN:
        gate = gate.masked_fill(divergence > _bound(config), 0.0)
        divergence = divergence.clamp(max=_bound(config))
    return FullDivergence(divergence * config.temperature**2, forward_kl, slope_sum, gate)


def write_gradient(
    logits: Tensor,
    config: LossConfig,
    labels: Tensor,
    norm: Tensor,
    *,
    ce_weight: Tensor | None = None,
    pull: Tensor | None = None,
    teacher: Tensor | None = None,
    teacher_norm: Tensor | None = None,
    slope_sum: Tensor | None = None,
) -> None:
    """Overwrite the student's logits (c, V) by d loss / d logits.

    Args:
        labels: (c,) int64.
        norm: (c, 3) fp32, the student's.
        ce_weight: (c,) fp32 weight of each row's cross-entropy, or None.
        pull: (c,) fp32. With a teacher: the factor of its divergence's slope at the temperature.
            Without: the factor of d CE / d (logits / T), as the policy-gradient form wants it.
        teacher, teacher_norm, slope_sum: teacher's logits (c, V), their norm (c, 3) and the sum
            that `full_divergence` gave.
    """
    rows, vocab = logits.shape
    segments = triton.cdiv(vocab, PAIR_BLOCK)
    kind = _NONE
    if pull is not None:
        kind = _LABEL if teacher is None else _kind(config)

    def given(tensor: Tensor | None) -> Tensor:  # a pointer that is not followed
        return norm if tensor is None else tensor

    if rows:
        _gradient[(rows * segments,)](
            logits, logits if teacher is None else teacher, norm, given(teacher_norm),
            given(slope_sum), given(pull), labels, given(ce_weight), vocab, segments,
            _rate(config.temperature), float(config.beta), _bound(config), BLOCK=PAIR_BLOCK,
            KIND=kind, CLIP=_clip(config), CE=ce_weight is not None, num_warps=PAIR_WARPS,
        )  # fmt: skip


def _statistics(logits: Tensor, temperature: float, maxima: Tensor | None) -> RowStatistics:
    rows, vocab = logits.shape
    assert logits.is_contiguous(), logits.stride()
    unit = temperature == 1.0
    segments = triton.cdiv(vocab, READ_BLOCK)
    groups = triton.cdiv(vocab, GROUP)
    sums = torch.empty(4, rows, segments, dtype=torch.float32, device=logits.device)
    lse, entropy, unit_lse = sums.new_empty(3, rows)
    norm = sums.new_empty(rows, 3)
    if rows:
        _segment_sums[(rows * segments,)](
            logits, sums, logits if maxima is None else maxima, vocab, groups, segments,
            sums.stride(0), _rate(temperature), GROUPS=READ_BLOCK // GROUP, WIDTH=GROUP, UNIT=unit,
            MAXIMA=maxima is not None, num_warps=READ_WARPS,
        )  # fmt: skip
        _combine[(rows,)](
            sums, lse, entropy, unit_lse, norm, segments, sums.stride(0), 1.0 / temperature,
            _rate(temperature), BLOCK=triton.next_power_of_2(segments), UNIT=unit, num_warps=1,
        )  # fmt: skip
    return RowStatistics(lse, entropy, lse if unit else unit_lse, norm)


def _rate(temperature: float) -> float:
    """From logits to log2 of unnormalised probabilities."""
    return math.log2(math.e) / temperature


def _kind(config: LossConfig) -> int:
    return {0.0: _FORWARD, 1.0: _REVERSE}.get(config.beta, _MIXTURE)


def _clip(config: LossConfig) -> int:
    if config.token_clip is None:
        return 0
    return _ENTRY if config.clip_scope == "entry" else _TOKEN


def _bound(config: LossConfig) -> float:
    return 0.0 if config.token_clip is None else float(config.token_clip)


@triton.jit
def _segment_sums(
    logits, sums, maxima, vocab, groups, segments, stride, rate,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr, MAXIMA: tl.constexpr,
):  # fmt: skip
    """Of one segment of a row: its peak, and with y = (x - peak) / T in powers of two the sums
    of 2^y, of y 2^y, and of exp(x - peak)."""
    program = tl.program_id(0)
    row = (program // segments).to(tl.int64)
    group = (program % segments) * GROUPS + tl.arange(0, GROUPS)
    column = group[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    valid = column < vocab
    x = tl.load(logits + row * vocab + column, mask=valid, other=float("-inf")).to(tl.float32)
    top = tl.max(x, axis=1)
    if MAXIMA:
        tl.store(maxima + row * groups + group, top, mask=group < groups)
    peak = tl.max(top, axis=0)
    # A segment of nothing but -inf has no peak to subtract; its sums are 0.
    y = x - tl.where(peak == float("-inf"), 0.0, peak)
    if not UNIT:
        tl.store(sums + 3 * stride + program, tl.sum(tl.exp2(y * _LOG2_E)))
    y = y * rate
    share = tl.exp2(y)
    tl.store(sums + program, peak)
    tl.store(sums + stride + program, tl.sum(share))
    tl.store(sums + 2 * stride + program, tl.sum(share * tl.where(share > 0.0, y, 0.0)))


@triton.jit
def _combine(
    sums, lse, entropy, unit_lse, norm, segments, stride, inverse, rate,
    BLOCK: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """One row's segments into its log-sum-exp and entropy."""
    row = tl.program_id(0)
    segment = tl.arange(0, BLOCK)
    valid = segment < segments
    where = sums + row * segments + segment
    peaks = tl.load(where, mask=valid, other=float("-inf"))
    share = tl.load(where + stride, mask=valid, other=0.0)
    weighted = tl.load(where + 2 * stride, mask=valid, other=0.0)
    peak = tl.max(peaks, axis=0)
    below = tl.where(share > 0.0, peaks - peak, 0.0)  # -inf - -inf is no number
    factor = tl.exp2(below * rate)
    total = tl.sum(factor * share, axis=0)
    mean = tl.sum(factor * (weighted + share * below * rate), axis=0) / total
    tl.store(lse + row, peak * inverse + tl.log(total))
    tl.store(entropy + row, tl.log(total) - mean * _LOG_2)
    tl.store(norm + 3 * row, peak)
    tl.store(norm + 3 * row + 1, tl.log(total))
    if not UNIT:
        unit = tl.load(where + 3 * stride, mask=valid, other=0.0)
        below = tl.where(unit > 0.0, peaks - peak, 0.0)
        total = tl.sum(tl.exp2(below * _LOG2_E) * unit, axis=0)
        tl.store(unit_lse + row, peak + tl.log(total))
    tl.store(norm + 3 * row + 2, tl.log(total))


@triton.jit
def _keys(x, valid, SHIFT: tl.constexpr):
    """uint32 in the order of the floats, at least 1; 0 where not valid."""
    bits = (x.to(tl.float32) + 0.0).to(tl.int32, bitcast=True)  # + 0.0: -0.0 is no less than 0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # the order of int32
    keys = (ordered.to(tl.uint32, bitcast=True) ^ 0x80000000) >> SHIFT
    return tl.where(valid, tl.maximum(keys, tl.full((), 1, tl.uint32)), tl.full((), 0, tl.uint32))


@triton.jit
def _kth_largest(keys, low, k):
    """The largest number >= low that at least k of the keys reach; at least k reach low."""
    high = tl.max(keys)
    while low < high:
        middle = high - (high - low) // 2
        enough = tl.sum((keys >= middle).to(tl.int32)) >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    return low


@triton.jit
def _first_k(keys, bound, k):
    """Which keys (R, W) are the k largest, lower positions first among equals, and their ranks."""
    above = keys > bound
    tie = keys == bound
    # Two counts in one number: no more than k are above, and at most 2^15 keys there are.
    counts = above.to(tl.uint32) + (tie.to(tl.uint32) << 16)
    of_row = tl.sum(counts, axis=1)
    earlier = (tl.cumsum(of_row, axis=0) - of_row)[:, None] + tl.cumsum(counts, axis=1) - counts
    free = k - (tl.sum(of_row, axis=0) & 0xFFFF).to(tl.int32)
    earlier_above = (earlier & 0xFFFF).to(tl.int32)
    earlier_ties = (earlier >> 16).to(tl.int32)
    return above | (tie & (earlier_ties < free)), earlier_above + tl.minimum(earlier_ties, free)


@triton.jit
def _choose_groups(
    maxima, chosen, groups, k, BLOCK: tl.constexpr, WIDTH: tl.constexpr, SHIFT: tl.constexpr
):
    """One row's k groups with the largest maxima."""
    row = tl.program_id(0)
    group = tl.arange(0, BLOCK)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    valid = group < groups
    x = tl.load(maxima + row.to(tl.int64) * groups + group, mask=valid, other=0.0)
    keys = _keys(x, valid, SHIFT)
    low = tl.min(tl.where(valid, keys, tl.max(keys)))
    taken, rank = _first_k(keys, _kth_largest(keys, low, k), k)
    tl.store(chosen + row * k + rank, group, mask=taken)


@triton.jit
def _choose_entries(
    logits, chosen, index, vocab, k,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """One row's k largest entries within its k chosen groups."""
    row = tl.program_id(0)
    slot = tl.arange(0, BLOCK)
    group = tl.load(chosen + row * k + slot, mask=slot < k, other=0)
    column = group[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    valid = (slot < k)[:, None] & (column < vocab)
    x = tl.load(logits + row.to(tl.int64) * vocab + column, mask=valid, other=0.0)
    keys = _keys(x, valid, SHIFT)
    top = tl.max(keys, axis=1)
    low = tl.min(tl.where(slot < k, top, tl.max(top)))  # each of the k groups reaches it
    taken, rank = _first_k(keys, _kth_largest(keys, low, k), k)
    tl.store(index + row * k + rank, column.to(tl.int64), mask=taken)


@triton.jit
def _entries(bits_s, bits_t, beta, bound, KIND: tl.constexpr, CLIP: tl.constexpr):
    """(s, term of the divergence, its slope in log s, term of forward KL) of each entry.

    From log2 s and log2 t. log m is taken from the larger of log s and log t, so that what is
    raised to a power, -|log t - log s|, is never positive.
    """
    gap_bits = bits_t - bits_s
    gap = gap_bits * _LOG_2
    s, t = tl.exp2(bits_s), tl.exp2(bits_t)
    forward = t * gap
    if KIND == 1:
        term, slope = forward, -t
    elif KIND == 2:
        term = -s * gap
        slope = s + term
    else:
        lesser = tl.exp2(-tl.abs(gap_bits))
        teacher_leads = gap >= 0.0
        share = tl.where(teacher_leads, beta + (1.0 - beta) * lesser, beta * lesser + (1.0 - beta))
        rise = tl.log(share)  # log m - max(log s, log t)
        slope = (1.0 - beta) * s * (tl.minimum(-gap, 0.0) - rise)
        term = beta * t * (tl.minimum(gap, 0.0) - rise) + slope
    if CLIP == 1:
        slope = tl.where(term > bound, 0.0, slope)
        term = tl.where(term > bound, bound, term)  # NaN stays
    return s, term, slope, forward


@triton.jit
def _support(
    logits, index, log_t, scale, labels, norm, weight, divergence, forward_kl, inside,
    vocab, k, rate, square, beta, bound,
    BLOCK: tl.constexpr, KIND: tl.constexpr, CLIP: tl.constexpr, CE: tl.constexpr,
):  # fmt: skip
    """One row of `divergence_on_support`."""
    row = tl.program_id(0)
    slot = tl.arange(0, BLOCK)
    valid = slot < k
    column = tl.load(index + row * k + slot, mask=valid, other=0)
    x = tl.load(logits + row.to(tl.int64) * vocab + column, mask=valid, other=0.0).to(tl.float32)
    x = tl.where(valid, x, float("-inf"))
    y = (x - tl.max(x, axis=0)) * rate
    # Beside the support both probabilities are 0, and their gap is 0.
    ours = tl.where(valid, y - tl.log(tl.sum(tl.exp2(y), axis=0)) * _LOG2_E, -1e30)
    theirs = tl.load(log_t + row * k + slot, mask=valid, other=0.0)
    theirs = tl.where(valid, theirs * _LOG2_E, -1e30)
    s, term, slope, forward = _entries(ours, theirs, beta, bound, KIND, CLIP)
    total = tl.sum(term, axis=0)
    if CLIP == 2:
        slope = tl.where(total > bound, 0.0, slope)
        total = tl.where(total > bound, bound, total)
    tl.store(divergence + row, total * square)
    tl.store(forward_kl + row, tl.sum(forward, axis=0))
    slope = slope * (square * tl.load(scale + row))
    gradient = slope - s * tl.sum(slope, axis=0)
    if CE:
        hit = (column == tl.load(labels + row)).to(tl.float32)
        excess = tl.exp2(_bits(x, norm + 3 * row, 2, valid, _LOG2_E)) - hit
        gradient += tl.load(weight + row) * excess
    tl.store(inside + row * k + slot, gradient, mask=valid)


@triton.jit
def _bits(x, norm, total: tl.constexpr, valid, rate):
    """log2 of the probabilities; of none, and of the same none, beside the row.

    norm: of this row; total: where the log of its sum at this rate stands there.
    """
    y = (x.to(tl.float32) - tl.load(norm)) * rate
    return tl.where(valid, y - tl.load(norm + total) * _LOG2_E, -1e30)


@triton.jit
def _segment(program, segments, vocab, BLOCK: tl.constexpr):
    """A program's row, its columns, which of them exist, and where the row's logits start."""
    row = program // segments
    column = (program % segments) * BLOCK + tl.arange(0, BLOCK)
    return row, column, column < vocab, row.to(tl.int64) * vocab


@triton.jit
def _pair_sums(
    student, teacher, student_norm, teacher_norm, sums, vocab, segments, stride, rate, beta,
    bound, BLOCK: tl.constexpr, KIND: tl.constexpr, CLIP: tl.constexpr,
):  # fmt: skip
    """Of one segment of a row: the sums of the divergence's terms, slopes and of forward KL."""
    program = tl.program_id(0)
    row, column, valid, start = _segment(program, segments, vocab, BLOCK)
    ours = tl.load(student + start + column, mask=valid, other=0.0)
    theirs = tl.load(teacher + start + column, mask=valid, other=0.0)
    bits_s = _bits(ours, student_norm + 3 * row, 1, valid, rate)
    bits_t = _bits(theirs, teacher_norm + 3 * row, 1, valid, rate)
    _, term, slope, forward = _entries(bits_s, bits_t, beta, bound, KIND, CLIP)
    tl.store(sums + program, tl.sum(term, axis=0))
    tl.store(sums + stride + program, tl.sum(slope, axis=0))
    tl.store(sums + 2 * stride + program, tl.sum(forward, axis=0))


@triton.jit
def _gradient(
    student, teacher, norm, teacher_norm, slope_sum, pull, labels, weight,
    vocab, segments, rate, beta, bound,
    BLOCK: tl.constexpr, KIND: tl.constexpr, CLIP: tl.constexpr, CE: tl.constexpr,
):  # fmt: skip
    """One segment of a row of `write_gradient`."""
    program = tl.program_id(0)
    row, column, valid, start = _segment(program, segments, vocab, BLOCK)
    x = tl.load(student + start + column, mask=valid, other=0.0)
    hit = (column == tl.load(labels + row)).to(tl.float32)
    gradient = tl.zeros((BLOCK,), tl.float32)
    if KIND != 0:
        bits_s = _bits(x, norm + 3 * row, 1, valid, rate)
        if KIND == 4:
            gradient = tl.exp2(bits_s) - hit
        else:
            theirs = tl.load(teacher + start + column, mask=valid, other=0.0)
            bits_t = _bits(theirs, teacher_norm + 3 * row, 1, valid, rate)
            s, _, slope, _ = _entries(bits_s, bits_t, beta, bound, KIND, CLIP)
            gradient = slope - s * tl.load(slope_sum + row)
        gradient *= tl.load(pull + row)
    if CE:
        excess = tl.exp2(_bits(x, norm + 3 * row, 2, valid, _LOG2_E)) - hit
        gradient += tl.load(weight + row) * excess
    tl.store(student + start + column, gradient, mask=valid)
