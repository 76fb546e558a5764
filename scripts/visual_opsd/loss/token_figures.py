# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""What a run wants to know of each scored token besides its loss, in a pass of its own.

The loss is as fast with this file as without: nothing of it runs in the loss, and the loss keeps
nothing for it. The logits of both models are computed once more, in chunks whose buffers are those
of the loss in size and are gone before it begins.

    fork               1 where no entry is the most probable one of both models
    topk_overlap       |student's top-k and teacher's top-k| / k
    student_topk_mass  probability that the student gives the teacher's top-k
    clip_entry         share of the compared entries whose term the clip bounds (scope "entry")
    clip_token         1 where the clip bounds anything of the token
    gradient           L2 norm of the divergence's gradient in the student's logits without a clip
    gradient_removed   L2 norm of what the clip takes from that gradient

Where logits are equal, as they often are in bf16, each of the largest is a most probable one. k is
the loss's, or `OVERLAP_K` where the loss compares the whole vocabulary or no distribution. The two
norms are of a token's `divergence`, without weights.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from data.teacher_cache import Entries
from scripts.visual_opsd.loss.cached import cached_target
from scripts.visual_opsd.loss.chunk import (
    Target,
    compute_dtype,
    divergence_and_slope,
    token_blocks,
)
from scripts.visual_opsd.loss.chunked import choose_form, in_chunks
from scripts.visual_opsd.opsd_loss import LossConfig, divergence_terms

OVERLAP_K = 256
_ALWAYS = (
    "student_entropy", "teacher_entropy", "fork", "topk_overlap", "student_topk_mass", "divergence",
)  # fmt: skip
_OF_CLIP = ("clip_token", "gradient", "gradient_removed")


def figure_names(config: LossConfig) -> tuple[str, ...]:
    """What `token_figures` gives for a loss."""
    if config.token_clip is None or config.loss_kind == "tinker":
        return _ALWAYS
    return (*_ALWAYS, *_OF_CLIP, *(("clip_entry",) if config.clip_scope == "entry" else ()))


@torch.no_grad()
def token_figures(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor | None,
    teacher_head: Tensor | None,
    labels: Tensor,
    config: LossConfig,
    *,
    chunk_size: int = 512,
    cached: Entries | None = None,
) -> dict[str, Tensor]:
    """The figures of each token by name (`figure_names`), (N,) each, in at least fp32.

    Entropies, mass and divergence (with clip and T^2) are at config.temperature, in nats. Shapes as
    in `chunked_opsd_loss`; either teacher_hidden and teacher_head or `cached` is given.
    """
    vocab, names, kind = student_head.shape[0], figure_names(config), compute_dtype(student_hidden)
    teacher: tuple[Tensor, Tensor] | Entries | None = cached
    if teacher_hidden is not None and teacher_head is not None:
        teacher = (teacher_hidden, teacher_head)

    def read(theirs: Tensor | Entries, part: slice) -> _Teacher:
        if isinstance(theirs, Entries):
            target = cached_target(theirs, config, vocab, kind)
            return _Teacher.of(target, target, vocab)
        assert teacher_head is not None
        return _read_teacher(theirs, teacher_head, labels[part], config)

    figures = student_hidden.new_zeros(len(names), len(labels), dtype=kind)
    chunks = in_chunks(student_hidden, student_head, teacher, read, config, chunk_size)
    for part, seen, logits in chunks:
        assert seen is not None, "no teacher"
        figures[:, part] = torch.stack(_of_chunk(logits, seen, labels[part], config))
    return dict(zip(names, figures, strict=True))


class _Teacher(NamedTuple):
    """What the loss compares with on c tokens, and the teacher's top-k whatever the loss is."""

    target: Target
    favourites: Tensor  # (c, k) int64
    is_first: Tensor  # (c, k) bool: which of them are the most probable

    @classmethod
    def of(cls, target: Target, reading: Target, vocab: int) -> _Teacher:
        """reading: of the same logits, with a top-k."""
        assert reading.entries is not None and reading.log_probs is not None
        k = reading.entries.shape[1]
        if k == vocab:  # of a cache alone, which has the most probable ones first
            k = _overlap_k(vocab)
        log_t = reading.log_probs[:, :k]
        return cls(target, reading.entries[:, :k], log_t == log_t.amax(-1, keepdim=True))


def _read_teacher(logits: Tensor, head: Tensor, labels: Tensor, config: LossConfig) -> _Teacher:
    """From the teacher's logits (c, V), by its head (V, H')."""
    vocab = len(head)
    target = choose_form(config, head).read_teacher(logits, labels, config)
    if target.entries is not None:
        return _Teacher.of(target, target, vocab)
    return _Teacher.of(target, _read_top_k(logits, labels, config, _overlap_k(vocab)), vocab)


def _overlap_k(vocab: int) -> int:
    return min(OVERLAP_K, max(1, vocab // 2))


def _read_top_k(logits: Tensor, labels: Tensor, config: LossConfig, k: int) -> Target:
    """Entropy of logits (c, V) at the temperature, their top-k, its mass; k < V."""
    top_k = replace(config, loss_kind="jsd", top_k=k, tail_bucket=False)
    return choose_form(top_k, logits).read_teacher(logits, labels, top_k)


def _of_chunk(
    logits: Tensor, teacher: _Teacher, labels: Tensor, config: LossConfig
) -> list[Tensor]:
    """In the order of `figure_names`, (c,) each, from the student's logits (c, V)."""
    kind, favourites = compute_dtype(logits), teacher.favourites
    student = _read_top_k(logits, labels, config, favourites.shape[1])
    assert student.entries is not None
    own = logits.gather(-1, student.entries).to(kind) / config.temperature  # (c, k)
    on_favourites = logits.gather(-1, favourites).to(kind) / config.temperature
    first = (on_favourites == own.amax(-1, keepdim=True)) & teacher.is_first
    lse = own.logsumexp(-1) - student.topk_mass.log()
    figures = [
        student.entropy,
        teacher.target.entropy,
        (~first.any(-1)).to(kind),
        _share_found(favourites, student.entries).to(kind),
        (on_favourites.logsumexp(-1) - lse).exp(),
    ]
    target = teacher.target
    if target.label_logprob is not None:
        ours = logits.gather(-1, labels[:, None])[:, 0].to(kind) / config.temperature - lse
        return [*figures, (ours - target.label_logprob) * ours]
    if target.entries is not None:
        return figures + _compare_on_support(logits, target, config)
    parts = [_compare_vocabulary(logits[p], target.part(p), config) for p in token_blocks(logits)]
    return figures + [torch.cat(pieces) for pieces in zip(*parts, strict=True)]


def _share_found(wanted: Tensor, found: Tensor) -> Tensor:
    """Share of each row's distinct numbers `wanted` (c, k) that are among `found` (c, k): (c,)"""
    ordered = found.sort(-1).values
    place = torch.searchsorted(ordered, wanted.contiguous()).clamp(max=found.shape[1] - 1)
    return (ordered.gather(-1, place) == wanted).double().mean(-1)


def _compare_on_support(logits: Tensor, target: Target, config: LossConfig) -> list[Tensor]:
    """On the target's entries and, if there is one, the tail; logits: (c, V)."""
    assert target.entries is not None and target.log_probs is not None
    values = logits.gather(-1, target.entries).to(compute_dtype(logits)) / config.temperature
    if target.log_probs.shape[1] == target.entries.shape[1]:
        return _compare(F.log_softmax(values, dim=-1), target.log_probs, None, config)
    softened = target.has_softened_tail  # the mass outside is one event at T = 1
    outside_t = 1.0 if softened else config.temperature
    lse, square_lse = values.new_empty(2, len(values))
    for part in token_blocks(logits):
        outside = logits[part].to(values.dtype) / outside_t
        outside.scatter_(-1, target.entries[part], -torch.inf)
        lse[part] = outside.logsumexp(-1)
        square_lse[part] = outside.mul_(2.0).logsumexp(-1)
    event = lse / config.temperature if softened else lse
    log_s = F.log_softmax(torch.cat([values, event[:, None]], dim=-1), dim=-1)  # (c, k + 1)
    return _compare(log_s, target.log_probs, (square_lse / 2 - lse).exp(), config)


def _compare_vocabulary(logits: Tensor, target: Target, config: LossConfig) -> list[Tensor]:
    """logits: (r, V)"""
    assert target.logits is not None
    log_s, log_t = (
        F.log_softmax(x.to(compute_dtype(x)) / config.temperature, dim=-1)
        for x in (logits, target.logits)
    )
    return _compare(log_s, log_t, None, config)


def _compare(
    log_s: Tensor, log_t: Tensor, tail_norm: Tensor | None, config: LossConfig
) -> list[Tensor]:
    """Divergence and, with a clip, its figures, (r,) each, from log-probabilities (r, K).

    tail_norm: where the last entry is everything outside, (r,), the L2 norm of the shares that its
    entries have in its gradient.
    """
    divergence, slope, _ = divergence_and_slope(log_s, log_t, config)
    clip = config.token_clip
    if clip is None:
        return [divergence]
    terms = divergence_terms(log_s, log_t, config.beta)
    whole = divergence_and_slope(log_s, log_t, replace(config, token_clip=None))[1]
    probs = log_s.exp()

    def norm(slope: Tensor) -> Tensor:  # slope: in log s
        gradient = slope - probs * slope.sum(-1, keepdim=True)
        if tail_norm is not None:
            gradient[:, -1] *= tail_norm
        return gradient.norm(dim=-1) / config.temperature

    by_entry = config.clip_scope == "entry"
    bound = ((terms if by_entry else terms.sum(-1, keepdim=True)) > clip).to(log_s.dtype)
    found = [divergence, bound.amax(-1), norm(whole), norm(whole - slope)]
    return [*found, bound.mean(-1)] if by_entry else found
