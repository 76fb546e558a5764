# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The arithmetic of `chunked_loss.py` on one chunk of rows: logits in, loss and gradient out.

Sits between two matmuls: the one that makes the logits and those that take d loss / d logits to the
hidden states and the head. Logits are (c, V) in the head's dtype. What is computed from them is
fp32 (fp64 for fp64 logits) and, where it is as wide as V, in blocks of a few rows, so that no fp32
copy of the chunk exists.

On a GPU `loss_kernels.py` computes the same in a handful of kernels, in place of whatever is as
wide as V or as the top-k; what is written out in torch here says what they compute.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from modeling import fast
from scripts.visual_opsd.loss.statistics import RowStatistics
from scripts.visual_opsd.opsd_loss import LossConfig

BLOCK_ELEMENTS = 1 << 22  # of one fp32 temporary: 16 MiB

# Figures of each row that come out of the forward pass.
STUDENT_FIGURES = ("ce", "student_entropy", "label_logprob")
TEACHER_FIGURES = ("divergence", "teacher_topk_mass", "teacher_entropy", "forward_kl")


def kernels_for(config: LossConfig, *heads: Tensor) -> ModuleType | None:
    """`loss_kernels` if it computes this loss on the logits of these heads, otherwise None."""
    if config.tail_bucket and config.top_k_of(heads[0].shape[0]) is not None:
        return None
    if not all(fast.runs_kernels("loss", head) for head in heads):
        return None
    from scripts.visual_opsd.loss import kernels as loss_kernels

    return loss_kernels


class Chunk:
    """The loss of one chunk of rows, between the matmul that makes logits and those of backward.

    Call order: read_teacher, read_student, figures, overwrite_with_gradient. The first is left out
    without a teacher. Logits are (c, V) in the head's dtype; c-vectors are in the compute dtype.
    `kernels` is what `kernels_for` gave for the heads of this loss.
    """

    def __init__(
        self,
        labels: Tensor,
        weights: Tensor,
        config: LossConfig,
        form_gradient: bool,
        kernels: ModuleType | None = None,
    ) -> None:
        self.labels = labels[:, None]  # (c, 1)
        self.form_gradient = form_gradient
        self.written = False  # the gradient already stands where the logits were
        self.weights = weights
        self.config = config
        self.kernels = kernels
        self.teacher_logits: Tensor | None = None
        self.index: Tensor | None = None  # (c, k): the teacher's top-k, if the loss has one
        # (c, k): the gradient there, of the divergence alone; from the kernels, of all the loss
        self.inside: Tensor | None = None
        self.advantage: Tensor | None = None  # (c,): tinker

    def read_teacher(self, logits: Tensor) -> None:
        """Normalisers and, with top-k, all that is needed of the teacher's logits."""
        config = self.config
        self.teacher_logits = logits
        k = config.top_k_of(logits.shape[1])
        if self.kernels is not None and k is not None:
            self.teacher, values, self.index = self.kernels.statistics_and_top_k(
                logits, config.temperature, k
            )
        else:
            if k is not None:
                values, self.index = logits.topk(k, dim=-1, sorted=False)
            self.teacher = self._statistics(logits)
        self.topk_mass = torch.ones_like(self.weights)
        if k is not None:
            values, lse = self._scaled(values, self.teacher)
            self.topk_mass = (values.logsumexp(-1) - lse).exp()
            self.log_t = self._on_support(values, self.teacher)
        elif config.loss_kind == "tinker":
            self.teacher_logprob = self._label_logprob(self._label_logit(logits), self.teacher)

    def read_student(self, logits: Tensor) -> Tensor:
        """The weighted loss of each row: (c, V) -> (c,)."""
        config = self.config
        self.student = self._statistics(logits)
        unit_lse = self.student.unit_lse
        self.unit_lse = _row_statistics(logits, 1.0).lse if unit_lse is None else unit_lse
        label_logit = self._label_logit(logits)
        self.label_logprob = self._label_logprob(label_logit, self.student)
        self.ce = self.unit_lse - label_logit
        self.divergence = torch.zeros_like(self.ce)
        self.forward_kl = torch.zeros_like(self.ce)
        if self.teacher_logits is None:
            pass
        elif config.loss_kind == "tinker":
            self.advantage = self.teacher_logprob - self.label_logprob
            self.divergence = -self.advantage * self.label_logprob
        elif self.index is not None:
            self._top_k(logits, self.index)
        else:
            self._full_vocabulary(logits)
        loss = config.jsd_weight * self.divergence
        if config.ce_weight != 0.0:
            loss = loss + config.ce_weight * self.ce
        return self.weights * loss

    def figures(self) -> Tensor:
        """(figures, c) in the order of STUDENT_FIGURES and TEACHER_FIGURES."""
        rows = [self.ce, self.student.entropy, self.label_logprob]
        if self.teacher_logits is not None:
            rows += [self.divergence, self.topk_mass, self.teacher.entropy, self.forward_kl]
        return torch.stack(rows)

    def overwrite_with_gradient(self, logits: Tensor) -> None:
        """Replace the student's logits (c, V) by d loss / d logits, in their dtype."""
        if self.written:
            return
        sparse = self.inside is not None and not self.config.tail_bucket
        if sparse and self.config.ce_weight == 0.0:
            assert self.index is not None and self.inside is not None
            logits.zero_().scatter_(-1, self.index, self.inside.to(logits.dtype))
            return
        if self.kernels is not None:
            self._overwrite_by_kernels(logits, self.kernels)
            return
        for part in _blocks(logits):
            block = logits[part].to(self.ce.dtype)
            logits[part] = self._add_ce(self._divergence_gradient(block, part), block, part)

    @property
    def masked_index(self) -> Tensor | None:
        return self.index if self.config.tail_bucket else None

    @property
    def _scale(self) -> Tensor:
        return self.weights * (self.config.jsd_weight / self.config.temperature)  # (c,)

    def _label_logit(self, logits: Tensor) -> Tensor:
        return logits.gather(-1, self.labels)[:, 0].to(self.weights.dtype)

    def _scaled(self, logits: Tensor, model: RowStatistics) -> tuple[Tensor, Tensor]:
        """Some logits of each row, (c, n), over T, and the log-sum-exp (c,) that goes with them."""
        logits = logits.to(self.weights.dtype)
        if model.norm is None:
            return logits / self.config.temperature, model.lse
        return (logits - model.norm[:, :1]) / self.config.temperature, model.norm[:, 1]

    def _label_logprob(self, label_logit: Tensor, model: RowStatistics) -> Tensor:
        scaled, lse = self._scaled(label_logit[:, None], model)
        return scaled[:, 0] - lse

    def _statistics(self, logits: Tensor) -> RowStatistics:
        if self.kernels is None:
            return _row_statistics(logits, self.config.temperature, self.masked_index)
        statistics: RowStatistics = self.kernels.row_statistics(logits, self.config.temperature)
        return statistics

    def _on_support(self, values: Tensor, model: RowStatistics) -> Tensor:
        """Log-probabilities on the top-k (renormalised) or on the top-k and the tail: (c, K)."""
        if not self.config.tail_bucket:
            return F.log_softmax(values, dim=-1)
        assert model.tail_lse is not None
        return torch.cat([values, model.tail_lse[:, None]], dim=-1) - model.lse[:, None]

    def _top_k(self, logits: Tensor, index: Tensor) -> None:
        """Divergence, forward KL and gradient on the top-k and, if there is one, the tail."""
        config = self.config
        if self.kernels is not None:
            ce = None
            if config.ce_weight != 0.0:
                ce = (self.labels[:, 0], self.student.norm, config.ce_weight * self.weights)
            self.divergence, self.forward_kl, self.inside = self.kernels.divergence_on_support(
                logits, index, self.log_t, self._scale, config, ce
            )
            return
        values = logits.gather(-1, index).to(self.ce.dtype) / config.temperature
        log_s = self._on_support(values, self.student)
        self.divergence, slope, self.forward_kl = _divergence(log_s, self.log_t, config)
        slope = slope * self._scale[:, None]
        self.slope_sum = slope.sum(-1)
        inside = slope - log_s.exp() * self.slope_sum[:, None]
        self.inside = inside[:, : index.shape[1]]
        self.slope_tail = slope[:, -1]

    def _full_vocabulary(self, logits: Tensor) -> None:
        """Divergence and forward KL over all of V and, in the same pass, the gradient."""
        assert self.teacher_logits is not None
        if self.kernels is not None:  # the gradient takes a second pass there
            self.divergence, self.forward_kl, self.slope_sum, self.gate = (
                self.kernels.full_divergence(
                    logits, self.teacher_logits, self.student.norm, self.teacher.norm, self.config
                )
            )
            return
        kind, temperature = self.ce.dtype, self.config.temperature
        for part in _blocks(logits):
            block = logits[part].to(kind)
            log_s = block / temperature - self.student.lse[part, None]
            log_t = self.teacher_logits[part].to(kind) / temperature - self.teacher.lse[part, None]
            rows, slope, forward_kl = _divergence(log_s, log_t, self.config)
            self.divergence[part], self.forward_kl[part] = rows, forward_kl
            if self.form_gradient:
                total = slope.sum(-1, keepdim=True)
                grad = slope.sub_(log_s.exp_().mul_(total)).mul_(self._scale[part, None])
                logits[part] = self._add_ce(grad, block, part)
        self.written = True

    def _overwrite_by_kernels(self, logits: Tensor, kernels: ModuleType) -> None:
        config = self.config
        options: dict[str, Tensor | None] = {}
        if config.ce_weight != 0.0:
            options["ce_weight"] = config.ce_weight * self.weights
        if self.advantage is not None:  # -A d log s(x) / d logits = A (s - one-hot) / T
            options["pull"] = self._scale * self.advantage
        elif self.teacher_logits is not None and self.index is None:
            options |= {"teacher": self.teacher_logits, "teacher_norm": self.teacher.norm}
            options |= {"slope_sum": self.slope_sum, "pull": self._scale * self.gate}
        kernels.write_gradient(logits, config, self.labels[:, 0], self.student.norm, **options)
        if self.index is not None:
            assert self.inside is not None
            logits.scatter_(-1, self.index, self.inside.to(logits.dtype))

    def _divergence_gradient(self, logits: Tensor, part: slice) -> Tensor:
        """d (weighted divergence) / d logits of a block of rows: (r, V) -> (r, V)."""
        if self.teacher_logits is None:
            return torch.zeros_like(logits)
        scaled = logits / self.config.temperature
        lse = self.student.lse[part, None]
        if self.advantage is not None:  # -A d log s(x) / d logits = A (s - one-hot) / T
            pull = self._scale[part, None] * self.advantage[part, None]
            grad = (scaled - lse).exp_().mul_(pull)
            return grad.scatter_add_(-1, self.labels[part], -pull)
        assert self.index is not None and self.inside is not None
        index = self.index[part]
        if self.config.tail_bucket:  # outside, the bucket's slope is shared out by s / s(tail)
            assert self.student.tail_lse is not None
            scaled.scatter_(-1, index, -math.inf)
            grad = (scaled - self.student.tail_lse[part, None]).exp_()
            grad.mul_(self.slope_tail[part, None])
            grad.sub_((scaled - lse).exp_().mul_(self.slope_sum[part, None]))
        else:
            grad = torch.zeros_like(logits)
        return grad.scatter_(-1, index, self.inside[part])

    def _add_ce(self, grad: Tensor, logits: Tensor, part: slice) -> Tensor:
        if self.config.ce_weight == 0.0:
            return grad
        weight = self.config.ce_weight * self.weights[part, None]
        grad.add_((logits - self.unit_lse[part, None]).exp_().mul_(weight))
        return grad.scatter_add_(-1, self.labels[part], -weight)


def _row_statistics(
    logits: Tensor, temperature: float, index: Tensor | None = None
) -> RowStatistics:
    """The tail's log-sum-exp comes with a top-k, index (c, k)."""
    lse = logits.new_empty(logits.shape[0], dtype=compute_dtype(logits))
    entropy = torch.empty_like(lse)
    tail_lse = None if index is None else torch.empty_like(lse)
    for part in _blocks(logits):
        block = logits[part].to(lse.dtype) / temperature
        peak = block.amax(-1, keepdim=True)
        shares = (block - peak).exp_()
        total = shares.sum(-1)
        lse[part] = peak[:, 0] + total.log()
        entropy[part] = lse[part] - shares.mul_(block).sum(-1) / total
        if index is not None and tail_lse is not None:
            tail_lse[part] = block.scatter_(-1, index[part], -math.inf).logsumexp(-1)
    return RowStatistics(lse, entropy, lse if temperature == 1.0 else None, tail_lse)


def _divergence(log_s: Tensor, log_t: Tensor, config: LossConfig) -> tuple[Tensor, Tensor, Tensor]:
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


def compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _blocks(logits: Tensor) -> Iterator[slice]:
    """Slices of rows small enough that an fp32 copy does not count."""
    rows, vocab = logits.shape
    step = max(1, BLOCK_ELEMENTS // vocab)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
