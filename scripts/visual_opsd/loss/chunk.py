# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The loss of one chunk of tokens in torch: logits in, figures and gradient out.

Sits between two matmuls: the one that makes the logits and those that take d loss / d logits to the
hidden states and the head. Logits are (c, V) in the head's dtype. What is computed from them is
fp32 (fp64 for fp64 logits), in blocks of a few tokens, so that no fp32 copy of the chunk exists.

`kernel_chunk.py` computes the same in a handful of kernels on a GPU; this file says what they
compute.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from scripts.visual_opsd.opsd_loss import LossConfig

BLOCK_ELEMENTS = 1 << 22  # of one fp32 temporary: 16 MiB

# Figures of each token: all of them with a teacher, the first ones without.
STUDENT_FIGURES = ("ce", "student_entropy", "label_logprob")
FIGURES = (*STUDENT_FIGURES, "divergence", "teacher_topk_mass", "teacher_entropy", "forward_kl")


class Target(NamedTuple):
    """What the loss needs of the teacher on c tokens, in the compute dtype where nothing is said.

    Besides the two figures: the next two with a top-k, the last two for the whole vocabulary, and
    `label_logprob` alone for the policy gradient.
    """

    entropy: Tensor  # (c,) at T, in nats
    topk_mass: Tensor  # (c,); 1 without a top-k
    entries: Tensor | None = None  # (c, k) int64: the top-k
    log_probs: Tensor | None = None  # (c, K): on the top-k, renormalised, or on the top-k and tail
    label_logprob: Tensor | None = None  # (c,) at T
    logits: Tensor | None = None  # (c, V), as they came
    # (c,): log-sum-exp at T. From the kernels (c, 3): the largest logit, and the logs of the sums
    # of exponentials less it, at T and at T = 1.
    norm: Tensor | None = None
    # (c,): factor of the divergence. Of a cached teacher alone (`cached.py`), whose entry for the
    # tail, if there is one, was softened as one event.
    weight: Tensor | None = None

    @property
    def has_softened_tail(self) -> bool:
        if self.weight is None:
            return False
        assert self.entries is not None and self.log_probs is not None
        return self.log_probs.shape[1] > self.entries.shape[1]

    def part(self, tokens: slice) -> Target:
        return Target._make(None if tensor is None else tensor[tokens] for tensor in self)


class TopKGradient(NamedTuple):
    """d loss / d logits that is 0 outside a top-k."""

    values: Tensor  # (c, k) fp32
    entries: Tensor  # (c, k) int64


class ChunkLoss(NamedTuple):
    figures: Tensor  # (figures, c) in the order of FIGURES
    gradient: Tensor | TopKGradient | None  # d loss / d logits (c, V), if it was asked for


def read_teacher(logits: Tensor, labels: Tensor, config: LossConfig) -> Target:
    """The target from the teacher's logits (c, V); labels (c,). Keeps no logits with a top-k."""
    kind, temperature = compute_dtype(logits), config.temperature
    k = config.top_k_of(logits.shape[1])
    values = entries = None
    if k is not None:
        values, entries = logits.topk(k, dim=-1, sorted=False)  # (c, k)
    lse, entropy, tail_lse = logits.new_empty(3, logits.shape[0], dtype=kind)
    for part in token_blocks(logits):
        scaled = logits[part].to(kind) / temperature
        lse[part], entropy[part] = _statistics(scaled)
        if entries is not None and config.tail_bucket:
            tail_lse[part] = scaled.scatter_(-1, entries[part], -math.inf).logsumexp(-1)
    ones = torch.ones_like(lse)
    if values is not None:
        values = values.to(kind) / temperature
        mass = (values.logsumexp(-1) - lse).exp()
        log_probs = _log_probs_on_support(values, lse, tail_lse if config.tail_bucket else None)
        return Target(entropy, mass, entries, log_probs)
    if config.loss_kind == "tinker":
        label_logit = logits.gather(-1, labels[:, None])[:, 0].to(kind)
        return Target(entropy, ones, label_logprob=label_logit / temperature - lse)
    return Target(entropy, ones, logits=logits, norm=lse)


def chunk_loss(
    logits: Tensor,
    target: Target | None,
    labels: Tensor,
    config: LossConfig,
    form_gradient: bool,
    weights: Tensor | None = None,
) -> ChunkLoss:
    """Figures of the student's logits (c, V), and the gradient of

    sum over tokens of weight * (jsd_weight * divergence + ce_weight * ce),

    which overwrites them if it is asked for. labels: (c,). weights: (c,) in the compute dtype;
    None: 1. The figures are those of each token, without its weight.
    """
    kind = compute_dtype(logits)
    count = len(STUDENT_FIGURES if target is None else FIGURES)
    figures = logits.new_empty(count, logits.shape[0], dtype=kind)
    for part in token_blocks(logits):
        block = logits[part].to(kind)
        theirs = None if target is None else target.part(part)
        found, gradient = _block_loss(block, theirs, labels[part, None], config, form_gradient)
        figures[:, part] = found
        if gradient is not None:
            if weights is not None:
                gradient.mul_(weights[part, None])
            logits[part] = gradient
    return ChunkLoss(figures, logits if form_gradient else None)


def scale_gradient(gradient: Tensor, factor: Tensor) -> Tensor:
    """gradient *= factor, a scalar."""
    return gradient.mul_(factor)


def compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _block_loss(
    logits: Tensor, target: Target | None, labels: Tensor, config: LossConfig, form_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Figures (figures, r) and gradient (r, V) of a block (r, V) in the compute dtype.

    labels: (r, 1).
    """
    scaled = logits / config.temperature
    lse, entropy = _statistics(scaled)
    unit_lse = lse if config.temperature == 1.0 else _statistics(logits)[0]
    label_logit = logits.gather(-1, labels)[:, 0]
    label_logprob = label_logit / config.temperature - lse
    figures = [unit_lse - label_logit, entropy, label_logprob]
    gradient = torch.zeros_like(logits) if target is None and form_gradient else None
    if target is not None:
        if target.has_softened_tail:
            comparison = _compare_events(scaled, target, config, form_gradient)
        elif target.entries is not None:
            comparison = _compare_top_k(scaled, lse, target, config, form_gradient)
        elif target.logits is not None:
            comparison = _compare_vocabulary(scaled, lse, target, config, form_gradient)
        else:
            comparison = _compare_labels(
                scaled, lse, label_logprob, labels, target, config, form_gradient
            )
        divergence, forward_kl, gradient = comparison
        figures += [divergence, target.topk_mass, target.entropy, forward_kl]
    if gradient is not None and config.ce_weight != 0.0:
        gradient.add_((logits - unit_lse[:, None]).exp_().mul_(config.ce_weight))
        gradient.scatter_add_(-1, labels, gradient.new_full(labels.shape, -config.ce_weight))
    return torch.stack(figures), gradient


# Each of these gives divergence (r,), forward KL (r,) and the gradient (r, V) of jsd_weight *
# divergence, of logits / T (r, V), which they use up, and their log-sum-exp (r,).
Comparison = tuple[Tensor, Tensor, Tensor | None]


def _compare_top_k(
    scaled: Tensor, lse: Tensor, target: Target, config: LossConfig, form_gradient: bool
) -> Comparison:
    """On the teacher's top-k and, if there is one, the tail."""
    entries = target.entries
    assert entries is not None and target.log_probs is not None
    values = scaled.gather(-1, entries)  # (r, k)
    tail_lse = None
    if config.tail_bucket:
        tail_lse = scaled.scatter_(-1, entries, -math.inf).logsumexp(-1)
    log_s = _log_probs_on_support(values, lse, tail_lse)  # (r, K)
    divergence, slope, forward_kl = divergence_and_slope(log_s, target.log_probs, config)
    if not form_gradient:
        return divergence, forward_kl, None
    slope = slope * _scale(config)
    if target.weight is not None:
        slope = slope * target.weight[:, None]
    slope_sum = slope.sum(-1, keepdim=True)
    inside = (slope - log_s.exp() * slope_sum)[:, : entries.shape[1]]
    if tail_lse is None:
        gradient = torch.zeros_like(scaled)
    else:  # outside, the bucket's slope is shared out by s / s(tail)
        gradient = (scaled - tail_lse[:, None]).exp_().mul_(slope[:, -1:])
        gradient.sub_(scaled.sub_(lse[:, None]).exp_().mul_(slope_sum))
    return divergence, forward_kl, gradient.scatter_(-1, entries, inside)


def _compare_events(
    scaled: Tensor, target: Target, config: LossConfig, form_gradient: bool
) -> Comparison:
    """On a cached teacher's entries and its tail: k + 1 events, softened by T as they are.

    Of the tail only the mass at T = 1 was kept. The student's is taken alike: the mass of its
    tokens outside at T = 1 is one event. Where T is 1, this is `_compare_top_k`.
    """
    entries = target.entries
    assert entries is not None and target.log_probs is not None and target.weight is not None
    logits = scaled.mul_(config.temperature)
    values = logits.gather(-1, entries)  # (r, k)
    tail_lse = logits.scatter_(-1, entries, -math.inf).logsumexp(-1, keepdim=True)
    events = torch.cat([values, tail_lse], dim=-1) / config.temperature
    log_s = F.log_softmax(events, dim=-1)  # (r, k + 1)
    divergence, slope, forward_kl = divergence_and_slope(log_s, target.log_probs, config)
    if not form_gradient:
        return divergence, forward_kl, None
    slope = slope * (_scale(config) * target.weight[:, None])
    slope = slope - log_s.exp() * slope.sum(-1, keepdim=True)
    inside, outside = slope[:, :-1], slope[:, -1:]
    gradient = logits.sub_(tail_lse).exp_().mul_(outside)  # 0 at the entries
    return divergence, forward_kl, gradient.scatter_(-1, entries, inside)


def _compare_vocabulary(
    scaled: Tensor, lse: Tensor, target: Target, config: LossConfig, form_gradient: bool
) -> Comparison:
    """On all of V."""
    assert target.logits is not None and target.norm is not None
    log_s = scaled.sub_(lse[:, None])
    log_t = target.logits.to(scaled.dtype) / config.temperature - target.norm[:, None]
    divergence, slope, forward_kl = divergence_and_slope(log_s, log_t, config)
    if not form_gradient:
        return divergence, forward_kl, None
    slope_sum = slope.sum(-1, keepdim=True)
    return divergence, forward_kl, slope.sub_(log_s.exp_().mul_(slope_sum)).mul_(_scale(config))


def _compare_labels(
    scaled: Tensor,
    lse: Tensor,
    label_logprob: Tensor,
    labels: Tensor,
    target: Target,
    config: LossConfig,
    form_gradient: bool,
) -> Comparison:
    """On the sampled labels (r, 1) alone: -A log s(x), whose gradient is A (s - one-hot) / T."""
    assert target.label_logprob is not None
    advantage = target.label_logprob - label_logprob
    divergence, forward_kl = -advantage * label_logprob, torch.zeros_like(lse)
    if not form_gradient:
        return divergence, forward_kl, None
    pull = (_scale(config) * advantage)[:, None]
    gradient = scaled.sub_(lse[:, None]).exp_().mul_(pull).scatter_add_(-1, labels, -pull)
    return divergence, forward_kl, gradient


def _scale(config: LossConfig) -> float:
    """What d divergence / d (logits / T) is multiplied by."""
    return config.jsd_weight / config.temperature


def _statistics(scaled: Tensor) -> tuple[Tensor, Tensor]:
    """Log-sum-exp and entropy of (r, V): (r,) each."""
    peak = scaled.amax(-1, keepdim=True)
    shares = (scaled - peak).exp_()
    total = shares.sum(-1)
    lse = peak[:, 0] + total.log()
    return lse, lse - shares.mul_(scaled).sum(-1) / total


def _log_probs_on_support(values: Tensor, lse: Tensor, tail_lse: Tensor | None) -> Tensor:
    """Log-probabilities on the top-k, renormalised, or on the top-k and the tail: (r, K).

    values: (r, k), logits / T; lse: (r,), of all of them; tail_lse: (r,), of those outside.
    """
    if tail_lse is None:
        return F.log_softmax(values, dim=-1)
    return torch.cat([values, tail_lse[:, None]], dim=-1) - lse[:, None]


def divergence_and_slope(
    log_s: Tensor, log_t: Tensor, config: LossConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Divergence (r,), its slope in log s (r, K), both with clip and T^2, and forward KL (r,).

    `opsd_loss.divergence_terms` with its derivative; the two mixture terms share theirs, as that
    of m cancels: d/d log s = (1 - beta) s (log s - log m).
    """
    beta, clip = config.beta, config.token_clip
    gap = log_t - log_s
    weighted_gap = log_t.exp().mul_(gap)
    forward_kl = weighted_gap.sum(-1)
    if beta == 0.0:
        terms, slope = weighted_gap, -log_t.exp()
    elif beta == 1.0:
        slope = log_s.exp()
        terms = -slope * gap
        slope = slope + terms
    else:
        log_m = torch.logaddexp(log_t + math.log(beta), log_s + math.log1p(-beta))
        slope = (log_s - log_m).mul_(log_s.exp()).mul_(1.0 - beta)
        terms = (log_t - log_m).mul_(log_t.exp()).mul_(beta).add_(slope)
    if clip is not None and config.clip_scope == "entry":
        slope = slope.masked_fill_(terms > clip, 0.0)
        terms = terms.clamp_(max=clip)
    rows = terms.sum(-1)
    if clip is not None and config.clip_scope == "token":
        slope = slope.masked_fill_((rows > clip)[:, None], 0.0)
        rows = rows.clamp(max=clip)
    square = config.temperature**2
    return rows * square, slope.mul_(square), forward_kl


def token_blocks(logits: Tensor) -> Iterator[slice]:
    """Slices of tokens small enough that an fp32 copy does not count."""
    tokens, vocab = logits.shape
    step = max(1, BLOCK_ELEMENTS // vocab)
    for start in range(0, tokens, step):
        yield slice(start, min(start + step, tokens))
