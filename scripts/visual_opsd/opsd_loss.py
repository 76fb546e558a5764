# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The Visual-OPSD objective, readable on its own.

The student (text only) and the teacher (the same model, shown the visual thoughts) score the same
sampled completion. Per scored token the loss is a generalised Jensen-Shannon divergence between
their next-token distributions, with t the teacher's and s the student's probabilities at
temperature T:

    beta = 0        KL(t || s)                                  (forward KL)
    beta = 1        KL(s || t)                                  (reverse KL)
    0 < beta < 1    beta KL(t || m) + (1 - beta) KL(s || m),    m = beta t + (1 - beta) s

summed over the vocabulary and multiplied by T^2, so that gradients keep their size as T grows.
beta = 0 and 1 are not the limits of the general form (those are 0).

Top-k. The set is the teacher's k most probable tokens. Both models' logits are gathered there
*before* the softmax: both distributions are renormalised on that set, and the mass outside does
not count. `tail_bucket=True` keeps the probabilities of the full softmax instead and adds one
bucket for everything outside the set.

Clip. `token_clip` clamps every *vocabulary entry's* term from above (the name is the recipe's);
there is no lower bound, so with beta 0 or 1, whose single terms can be negative, a clipped loss can
be negative. `clip_scope="token"` clamps the sum over the vocabulary, once per token, instead. Where
the clip binds, the gradient is zero.

Contrast. With an amount a > 0 the target is not the teacher's t but, renormalised,

    log t + a (log t - log c),

c being the same teacher's probabilities with a control in the place of the visual thoughts: what
their content makes more likely counts a times more. The logits may be combined instead, as they
differ from log-probabilities by a constant of their token only, and so may the hidden states before
the head, which is linear (`contrast`). a = 0 is t itself, to the last bit.

Weights (`token_weights`) say how much each scored token counts. Their mean over a completion is 1,
so that a completion's share in the loss does not depend on what is weighed by, and neither the
number of ranks nor what is packed together has any effect. What the sum is divided by stays the
number of scored tokens.

`loss/chunked.py` computes the same from hidden states without holding the logits of all tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORE_LABEL = -100
LOSS_KINDS = ("jsd", "tinker")
CLIP_SCOPES = ("entry", "token")
TOKEN_WEIGHTS = ("none", "early:N", "entropy", "teacher_ahead")
_LEAST_SUM = 1e-12  # of a completion's weights; below, they are rounding


@dataclass(frozen=True)
class LossConfig:
    """What the trainer minimises: jsd_weight * divergence + ce_weight * cross-entropy, per token.

    `loss_kind` "jsd" is the paper's (`generalized_jsd_loss`), "tinker" the policy-gradient form
    (`tinker_reverse_kl_loss`: no top-k, clip or beta). The other options are those of
    `generalized_jsd_loss`; `temperature` does not touch the cross-entropy. `token_weight` and
    `skip_first_tokens` are those of `token_weights`; both losses are weighed.
    """

    loss_kind: str = "jsd"
    beta: float = 0.5
    temperature: float = 1.0
    top_k: int | None = 256
    token_clip: float | None = 0.05
    clip_scope: str = "entry"
    tail_bucket: bool = False
    jsd_weight: float = 1.0
    ce_weight: float = 0.0
    token_weight: str = "none"
    skip_first_tokens: int = 0

    def __post_init__(self) -> None:
        if self.loss_kind not in LOSS_KINDS:
            raise ValueError(f"unknown loss_kind {self.loss_kind!r}: use 'jsd' or 'tinker'")
        if not 0.0 <= self.beta <= 1.0:
            raise ValueError(
                f"beta is {self.beta}: it must lie in [0, 1] (0 forward KL, 1 reverse KL, 0.5 JSD)"
            )
        if not (self.temperature > 0.0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature is {self.temperature}: it must be positive and finite")
        if self.token_clip is not None and not self.token_clip >= 0.0:
            raise ValueError(
                f"token_clip is {self.token_clip}: it must be >= 0, or None for no clip"
            )
        if self.clip_scope not in CLIP_SCOPES:
            raise ValueError(f"unknown clip_scope {self.clip_scope!r}: use 'entry' or 'token'")
        for name in ("jsd_weight", "ce_weight"):
            value = getattr(self, name)
            if not (value >= 0.0 and math.isfinite(value)):
                raise ValueError(f"{name} is {value}: it must be finite and >= 0")
        first, skipped = early_tokens(self.token_weight), self.skip_first_tokens
        if skipped < 0:
            raise ValueError(f"skip_first_tokens is {skipped}: it must be >= 0")
        if first is not None and first <= skipped:
            raise ValueError(
                f"token_weight {self.token_weight} counts the first {first} tokens, of which "
                f"skip_first_tokens {skipped} leaves none: raise the one or lower the other"
            )

    @property
    def weighs_tokens(self) -> bool:
        """Whether some tokens count more than others."""
        return self.token_weight != "none" or self.skip_first_tokens > 0

    def top_k_of(self, vocab: int) -> int | None:
        """k if the divergence is restricted to the teacher's top-k of `vocab` entries."""
        if self.loss_kind == "tinker" or self.top_k is None or not 0 < self.top_k < vocab:
            return None
        return self.top_k


def generalized_jsd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "mean",
    top_k: int | None = None,
    token_clip: float | None = None,
    *,
    tail_bucket: bool = False,
    clip_scope: str = "entry",
    weights: Tensor | None = None,
) -> Tensor:
    """Generalised JSD between the teacher's and the student's next-token distributions.

    Args:
        student_logits: (N, V) or (B, T, V), any float dtype; computed in fp32 (fp64 stays fp64).
        teacher_logits: same shape. Not detached here: pass them without a graph.
        labels: (N,) or (B, T); tokens labelled -100 are dropped, the ids play no other role.
        beta: 0 is KL(teacher || student), 1 is KL(student || teacher).
        temperature: divides both logits; the loss is multiplied by its square.
        reduction: "mean" or "sum" over the kept tokens, or "none": one value for each of them.
        top_k: restrict both to the teacher's top-k, renormalised. None, <= 0 or >= V: all of V.
        token_clip: upper bound of each vocabulary entry's term (None: no bound).
        tail_bucket: with top-k, one bucket for the mass outside instead of renormalising.
        clip_scope: "entry" as above; "token": the bound holds for a token's sum instead.
        weights: shape of labels; what each token's divergence is multiplied by (None: nothing).

    Returns:
        A scalar, or (kept tokens,) for "none". Without a kept token: 0 (connected to the graph).

    Raises:
        ValueError: shapes that differ, an unknown reduction or scope, a value out of range.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"unknown reduction {reduction!r}: use 'mean', 'sum' or 'none'")
    config = LossConfig(
        beta=beta,
        temperature=temperature,
        top_k=top_k,
        token_clip=token_clip,
        clip_scope=clip_scope,
        tail_bucket=tail_bucket,
    )
    student, teacher, keep = _kept_tokens(student_logits, teacher_logits, labels)
    divergence = divergence_per_token(student, teacher, config)
    if weights is not None:
        divergence = divergence * _kept_weights(weights, student_logits, keep)
    if reduction == "none":
        return divergence
    total = divergence.sum()
    return total if reduction == "sum" else total / max(divergence.numel(), 1)


def divergence_per_token(
    student_logits: Tensor, teacher_logits: Tensor, config: LossConfig
) -> Tensor:
    """The divergence of each token: (N, V), (N, V) -> (N,) in fp32 (fp64 for fp64 logits)."""
    k = config.top_k_of(student_logits.shape[-1])
    index = None if k is None else teacher_logits.topk(k, dim=-1).indices  # (N, k)
    log_s = _log_probs(student_logits, config, index)  # (N, K)
    log_t = _log_probs(teacher_logits, config, index)
    terms = divergence_terms(log_s, log_t, config.beta)  # (N, K)
    if config.token_clip is not None and config.clip_scope == "entry":
        terms = terms.clamp(max=config.token_clip)
    divergence = terms.sum(dim=-1)
    if config.token_clip is not None and config.clip_scope == "token":
        divergence = divergence.clamp(max=config.token_clip)
    return divergence * config.temperature**2


def divergence_terms(log_s: Tensor, log_t: Tensor, beta: float) -> Tensor:
    """What each vocabulary entry adds to the divergence: log-probabilities (N, K) -> (N, K)."""
    if beta == 0.0:
        return log_t.exp() * (log_t - log_s)
    if beta == 1.0:
        return log_s.exp() * (log_s - log_t)
    log_m = torch.logaddexp(log_t + math.log(beta), log_s + math.log1p(-beta))
    from_teacher = beta * log_t.exp() * (log_t - log_m)
    from_student = (1.0 - beta) * log_s.exp() * (log_s - log_m)
    return from_teacher + from_student


def contrast(real: Tensor, control: Tensor, amount: float) -> Tensor:
    """real + amount (real - control), rounded once: the teacher's logits (N, V), or its hidden
    states (N, H) before a linear head, with the visual thoughts and with a control."""
    kind = torch.promote_types(real.dtype, torch.float32)
    wide = real.to(kind)
    return (wide + amount * (wide - control.to(kind))).to(real.dtype)


def tinker_reverse_kl_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    sampled_token_ids: Tensor,
    labels: Tensor | None = None,
    temperature: float = 1.0,
    weights: Tensor | None = None,
) -> Tensor:
    """Reverse KL as a policy gradient on the sampled tokens, without a sum over the vocabulary.

    With x the sampled token, A = log t(x) - log s(x) is its advantage (a constant); the loss is
    mean(-A log s(x)). Its *gradient*, not its value, estimates that of KL(student || teacher). No
    top-k, no clip, no T^2.

    Args:
        student_logits: (N, V) or (B, T, V), any float dtype; computed in fp32 (fp64 stays fp64).
        teacher_logits: same shape; receives no gradient.
        sampled_token_ids: (N,) or (B, T) integer ids the student sampled.
        labels: (N,) or (B, T); tokens labelled -100 are dropped before the mean.
        temperature: divides both logits.
        weights: shape of labels; what each token's loss is multiplied by (None: nothing).

    Returns:
        A scalar; 0 (connected to the graph) if no token is kept.

    Raises:
        ValueError: shapes that differ, or a temperature that is not positive.
    """
    config = LossConfig(loss_kind="tinker", temperature=temperature)
    if sampled_token_ids.shape != student_logits.shape[:-1]:
        raise ValueError(
            f"sampled_token_ids has shape {tuple(sampled_token_ids.shape)}, the logits are of "
            f"{tuple(student_logits.shape[:-1])} tokens: pass the sampled id of each token"
        )
    student, teacher, keep = _kept_tokens(student_logits, teacher_logits, labels)
    ids = sampled_token_ids.reshape(-1, 1)[keep]  # (N, 1)
    log_s = _log_probs(student, config).gather(-1, ids)[:, 0]  # (N,)
    log_t = _log_probs(teacher, config).gather(-1, ids)[:, 0]
    advantage = (log_t - log_s).detach()
    losses = -advantage * log_s
    if weights is not None:
        losses = losses * _kept_weights(weights, student_logits, keep)
    return losses.sum() / max(log_s.numel(), 1)


def early_tokens(token_weight: str) -> int | None:
    """N of the weight "early:N", None of the others.

    Raises:
        ValueError: no weight of `TOKEN_WEIGHTS`.
    """
    kind, colon, number = token_weight.partition(":")
    if kind == "early" and number.isascii() and number.isdigit() and 0 < int(number[:20]) < 10**9:
        return int(number)
    if token_weight not in TOKEN_WEIGHTS or colon:
        raise ValueError(
            f"unknown token_weight {token_weight!r}: use none, early:N (N at least 1, as in "
            "early:32), entropy or teacher_ahead"
        )
    return None


@torch.no_grad()
def weigh_by(
    student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor, config: LossConfig
) -> Tensor:
    """What `token_weights` weighs by, before it is brought to mean 1: (N,), at T = temperature.

    "entropy": the student's entropy, in nats. "teacher_ahead": max(0, log t(x) - log s(x)) of the
    label x. The others: 1.

    Args:
        student_logits: (N, V); teacher_logits: likewise, None where "teacher_ahead" is not asked.
        labels: (N,) int64.
    """
    log_s = _log_probs(student_logits, config)
    if config.token_weight == "entropy":
        return -(log_s.exp() * log_s).sum(dim=-1).clamp(max=0.0)
    if config.token_weight == "teacher_ahead":
        assert teacher_logits is not None, "no teacher can be ahead"
        log_t = _log_probs(teacher_logits, config)
        return (log_t - log_s).gather(-1, labels[:, None])[:, 0].clamp(min=0.0)
    return torch.ones_like(log_s[:, 0])


@torch.no_grad()
def token_weights(values: Tensor, counts: Sequence[int], config: LossConfig) -> Tensor:
    """How much each scored token counts: (N,), with mean 1 over each completion.

    A token's value counts in proportion, but those of the first `skip_first_tokens` of a completion
    and, with "early:N", of those after the first N are 0. A completion of zeros (it ended before
    the tokens that count, or the teacher is nowhere ahead) keeps them: it teaches nothing.

    Args:
        values: (N,), as `weigh_by` gives them.
        counts: scored tokens of each completion, in order; their sum is N.
    """
    first = early_tokens(config.token_weight)
    weights = values.clone()
    for completion in weights.split(list(counts)):  # views
        completion[: config.skip_first_tokens] = 0.0
        if first is not None:
            completion[first:] = 0.0
        completion *= len(completion) / completion.sum().clamp(min=_LEAST_SUM)
    return weights


def vocabulary_hint(student_vocab: int, teacher_vocab: int) -> str:
    """The usual cause of logits that differ in their last dimension."""
    return (
        f"the vocabularies differ ({student_vocab} and {teacher_vocab}): student and teacher must "
        "come from checkpoints with the same tokenizer and vocab_size"
    )


def _kept_tokens(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | slice]:
    """Both logits as (N, V) without the tokens labelled -100; what picks the tokens that stay."""
    if student_logits.shape != teacher_logits.shape or student_logits.dim() not in (2, 3):
        shapes = f"{tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}"
        cause = "both must be (N, V) or (B, T, V), with the same tokens in the same order"
        if student_logits.shape[-1:] != teacher_logits.shape[-1:]:
            cause = vocabulary_hint(student_logits.shape[-1], teacher_logits.shape[-1])
        raise ValueError(f"student_logits and teacher_logits have shapes {shapes}: {cause}")
    vocab = student_logits.shape[-1]
    keep: Tensor | slice = slice(None)
    if labels is not None:
        if labels.shape != student_logits.shape[:-1]:
            raise ValueError(
                f"labels has shape {tuple(labels.shape)}, the logits are of "
                f"{tuple(student_logits.shape[:-1])} tokens: pass one label for each token"
            )
        keep = labels.reshape(-1) != IGNORE_LABEL
    return student_logits.reshape(-1, vocab)[keep], teacher_logits.reshape(-1, vocab)[keep], keep


def _kept_weights(weights: Tensor, logits: Tensor, keep: Tensor | slice) -> Tensor:
    """Weights of the tokens that stay, (N,); logits: as the loss was given them."""
    if weights.shape != logits.shape[:-1]:
        raise ValueError(
            f"weights has shape {tuple(weights.shape)}, the logits are of "
            f"{tuple(logits.shape[:-1])} tokens: pass one weight for each token"
        )
    return weights.reshape(-1)[keep]


def _log_probs(logits: Tensor, config: LossConfig, index: Tensor | None = None) -> Tensor:
    """Log-probabilities at T, in at least fp32, of what is compared: logits (N, V) -> (N, K).

    All of V without an index. With one (N, k): the entries there, renormalised, or as they are in
    the full softmax and then, as entry k + 1, everything else.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / config.temperature
    if index is None:
        return F.log_softmax(logits, dim=-1)
    if not config.tail_bucket:
        return F.log_softmax(logits.gather(-1, index), dim=-1)
    log_p = F.log_softmax(logits, dim=-1)
    inside = log_p.gather(-1, index)
    # A sum over the others, not 1 - inside: the difference has no digits left when k covers all.
    outside = log_p.scatter(-1, index, -math.inf).logsumexp(dim=-1, keepdim=True)
    return torch.cat([inside, outside], dim=-1)
