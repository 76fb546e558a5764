# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""What `chunk.py` computes of one chunk of tokens, by Triton kernels: for logits on a GPU, without
a tail bucket.

Logits are (c, V) in bf16 or fp16; what is computed from them is fp32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from scripts.visual_opsd.loss import kernels, sparse_products
from scripts.visual_opsd.loss.chunk import ChunkLoss, Target, TopKGradient
from scripts.visual_opsd.opsd_loss import LossConfig


def read_teacher(logits: Tensor, labels: Tensor, config: LossConfig) -> Target:
    """As `chunk.read_teacher`."""
    k = config.top_k_of(logits.shape[1])
    if k is not None:
        statistics, values, entries = kernels.statistics_and_top_k(logits, config.temperature, k)
        values = _scaled(values, statistics.norm, config.temperature)  # (c, k)
        mass = (values.logsumexp(-1) - statistics.norm[:, 1]).exp()
        return Target(statistics.entropy, mass, entries, F.log_softmax(values, dim=-1))
    statistics = kernels.row_statistics(logits, config.temperature)
    ones = torch.ones_like(statistics.entropy)
    if config.loss_kind == "tinker":
        label_logit = logits.gather(-1, labels[:, None])
        label_logprob = _label_logprob(label_logit, statistics.norm, config.temperature)
        return Target(statistics.entropy, ones, label_logprob=label_logprob)
    return Target(statistics.entropy, ones, logits=logits, norm=statistics.norm)


def chunk_loss(
    logits: Tensor,
    target: Target | None,
    labels: Tensor,
    config: LossConfig,
    form_gradient: bool,
    weights: Tensor | None = None,
) -> ChunkLoss:
    """As `chunk.chunk_loss`; a gradient that is 0 outside a small top-k comes as that alone."""
    student = kernels.row_statistics(logits, config.temperature)
    label_logit = logits.gather(-1, labels[:, None])  # (c, 1)
    label_logprob = _label_logprob(label_logit, student.norm, config.temperature)
    figures = [student.unit_lse - label_logit[:, 0].float(), student.entropy, label_logprob]
    ce_weight = None
    if config.ce_weight != 0.0:
        ce_weight = torch.full_like(label_logprob, config.ce_weight)
        if weights is not None:
            ce_weight *= weights
    comparison = None
    if target is not None:
        ce = None if ce_weight is None else (labels, student.norm, ce_weight)
        scale = torch.full_like(label_logprob, config.jsd_weight / config.temperature)
        if weights is not None:
            scale *= weights
        comparison = _compare(logits, target, student.norm, label_logprob, ce, scale, config)
        figures += [comparison.divergence, target.topk_mass, target.entropy, comparison.forward_kl]
    gradient: Tensor | TopKGradient | None = None
    if form_gradient:
        gradient = _gradient(logits, labels, student.norm, ce_weight, comparison, config)
    return ChunkLoss(torch.stack(figures), gradient)


def scale_gradient(gradient: Tensor, factor: Tensor) -> Tensor:
    """gradient *= factor, a scalar; nothing is done where that is 1."""
    return sparse_products.scale_(gradient, factor)


class _Comparison(NamedTuple):
    divergence: Tensor  # (c,)
    forward_kl: Tensor  # (c,)
    top_k: TopKGradient | None = None  # the gradient there, the cross-entropy's included
    slopes: Mapping[str, Tensor] = {}  # else: what `write_gradient` needs of the divergence


def _compare(
    logits: Tensor,
    target: Target,
    norm: Tensor,
    label_logprob: Tensor,
    ce: tuple[Tensor, Tensor, Tensor] | None,
    scale: Tensor,
    config: LossConfig,
) -> _Comparison:
    """Divergence from the target; ce as `divergence_on_support` takes it.

    scale: (c,), what each token's d divergence / d (logits / T) is multiplied by.
    """
    if target.entries is not None:
        assert target.log_probs is not None
        if target.weight is not None:
            scale = scale * target.weight
        divergence, forward_kl, inside = kernels.divergence_on_support(
            logits, target.entries, target.log_probs, scale, config, ce
        )
        return _Comparison(divergence, forward_kl, TopKGradient(inside, target.entries))
    if target.label_logprob is not None:  # -A d log s(x) / d logits = A (s - one-hot) / T
        advantage = target.label_logprob - label_logprob
        divergence = -advantage * label_logprob
        slopes = {"pull": scale * advantage}
        return _Comparison(divergence, torch.zeros_like(divergence), slopes=slopes)
    assert target.logits is not None and target.norm is not None
    divergence, forward_kl, slope_sum, gate = kernels.full_divergence(
        logits, target.logits, norm, target.norm, config
    )
    slopes = {"teacher": target.logits, "teacher_norm": target.norm, "slope_sum": slope_sum}
    return _Comparison(divergence, forward_kl, slopes={**slopes, "pull": scale * gate})


def _gradient(
    logits: Tensor,
    labels: Tensor,
    norm: Tensor,
    ce_weight: Tensor | None,
    comparison: _Comparison | None,
    config: LossConfig,
) -> Tensor | TopKGradient:
    """d loss / d logits, written over the logits unless the top-k's entries are enough."""
    top_k = None if comparison is None else comparison.top_k
    if top_k is not None and ce_weight is None:
        if sparse_products.pays(top_k.entries.shape[1], logits.shape[1]):
            return top_k
        logits.zero_()
    else:
        slopes = {} if comparison is None else comparison.slopes
        kernels.write_gradient(logits, config, labels, norm, ce_weight=ce_weight, **slopes)
    if top_k is not None:
        logits.scatter_(-1, top_k.entries, top_k.values.to(logits.dtype))
    return logits


def _scaled(logits: Tensor, norm: Tensor, temperature: float) -> Tensor:
    """Some logits of each token, (c, n), less its largest one, over T."""
    return (logits.float() - norm[:, :1]) / temperature


def _label_logprob(label_logit: Tensor, norm: Tensor, temperature: float) -> Tensor:
    """(c, 1) -> (c,)"""
    return _scaled(label_logit, norm, temperature)[:, 0] - norm[:, 1]
