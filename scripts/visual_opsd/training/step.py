# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""One optimiser step as Algorithm 1 of the paper has it: pack, score twice, compare, descend."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from data.packing import group_by_tokens, pack
from data.sequence import Context, ImageSegment
from data.teacher_cache import Entries
from modeling.bagel.bagel import Bagel
from modeling.bagel.batch import PackedBatch, SharedFeatures
from modeling.bagel.config import SpecialTokens
from modeling.bagel.flow import flow_loss
from scripts.visual_opsd.config import OptimSettings
from scripts.visual_opsd.loss.chunked import chunked_opsd_loss, chunked_token_weights
from scripts.visual_opsd.loss.token_figures import token_figures
from scripts.visual_opsd.opsd_loss import LossConfig, contrast
from scripts.visual_opsd.processes import DistEnv
from scripts.visual_opsd.scored_rows import ScoredRow, check_same_labels
from scripts.visual_opsd.training.teacher import Teacher


def plan_packs(lengths: Sequence[int], accumulation: int, pack_tokens: int) -> list[list[int]]:
    """Indices of each forward: the share in `accumulation` runs, each cut at `pack_tokens`."""
    count = len(lengths)
    bounds = [count * i // accumulation for i in range(accumulation + 1)]
    packs: list[list[int]] = []
    for start, stop in pairwise(bounds):
        run = group_by_tokens(lengths[start:stop], pack_tokens)
        packs += [[start + i for i in group] for group in run]
    return packs


@dataclass
class PackResult:
    """What one forward and backward left behind; tensors stay on the device.

    tokens: of a measured step with a teacher, the figures of each scored token (`token_figures`).
    """

    loss: Tensor
    stats: dict[str, Tensor]
    label_logprobs: Tensor
    rows: tuple[ScoredRow, ...]
    tokens: dict[str, Tensor] | None = None

    @property
    def finite(self) -> bool:
        return math.isfinite(float(self.loss + self.stats.get("mse", 0.0)))


def shared_images(rows: Sequence[ScoredRow]) -> SharedFeatures:
    """The student's images among the teacher's: of each row the first ones of its context."""
    images: list[int] = []
    first = 0
    for row in rows:
        ours, theirs = (
            sum(isinstance(segment, ImageSegment) for segment in context or ())
            for context in (row.student, row.teacher)
        )
        images += range(first, first + ours)
        first += theirs
    return SharedFeatures(tuple(images))


@dataclass(frozen=True)
class StepContext:
    """What the packs of one optimiser step have in common.

    teacher_head: the teacher's gathered head, None when it is the student's own.
    scale: what the summed loss is multiplied by before the backward pass.
    flow_scale: the same for the flow-matching loss; None: nothing learns to draw.
    contrast: how much more what the rows' controls lack counts in the target (`opsd_loss`).
    measured: whether the figures of each token are wanted.
    shares_features: where it can, the student takes the teacher's ViT outputs.
    """

    student: Bagel
    teacher: Teacher | None
    teacher_head: Tensor | None
    special: SpecialTokens
    loss: LossConfig
    chunk_size: int
    device: torch.device
    decode: Callable[..., str]
    scale: float
    flow_scale: float | None = None
    contrast: float = 0.0
    measured: bool = False
    shares_features: bool = True


def loss_scale(count: float, env: DistEnv, weight: float = 1.0) -> float:
    """Factor that makes a summed loss the mean over all ranks' `count` scored things.

    FSDP2 averages gradients over ranks, which is undone here.
    """
    return weight * env.world_size / max(count, 1.0)


def run_pack(
    rows: Sequence[ScoredRow], step: StepContext, cached: Entries | None = None
) -> PackResult:
    """Forward (teacher without gradient, then student) and backward of one pack.

    cached: what was kept of a teacher, which is then not in memory, on the pack's scored tokens.

    Where drawing is trained, the unscaled sum of its loss and the number of its tokens are the
    statistics mse and mse_rows.
    """
    student_batch = pack([row.student for row in rows], step.special)
    teacher_hidden: Tensor | None = None
    if step.teacher is not None:
        batch = _pack_like(student_batch, [row.teacher for row in rows], rows, step)
        blind: PackedBatch | None = None
        if step.contrast:
            blind = _pack_like(student_batch, [row.control for row in rows], rows, step)
        shares = step.shares_features and step.teacher.shares_features(step.device)
        shared = shared_images(rows) if shares else None
        teacher_hidden = step.teacher.hidden(batch.to(step.device), shared)
        if blind is not None:
            control = step.teacher.hidden(blind.to(step.device))
            teacher_hidden = contrast(teacher_hidden, control, step.contrast)
        if shared is not None and shared.features is not None:
            student_batch = student_batch.with_features(shared.features)
    student_batch = student_batch.to(step.device)
    taught = None if cached is None else cached.to(step.device)
    tokens: dict[str, Tensor] | None = None

    def head(hidden: Tensor, weight: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        nonlocal tokens
        theirs = None
        if teacher_hidden is not None:
            theirs = weight.detach() if step.teacher_head is None else step.teacher_head
        labels, weights = student_batch.score_labels, None
        if step.measured and (teacher_hidden is not None or taught is not None):
            tokens = token_figures(
                hidden, weight, teacher_hidden, theirs, labels, step.loss,
                chunk_size=step.chunk_size, cached=taught,
            )  # fmt: skip
        if step.loss.weighs_tokens:
            weights = chunked_token_weights(
                hidden, weight, teacher_hidden, theirs, labels, student_batch.score_counts,
                step.loss, chunk_size=step.chunk_size,
            )  # fmt: skip
        return chunked_opsd_loss(
            hidden, weight, teacher_hidden, theirs, labels, step.loss,
            chunk_size=step.chunk_size, weights=weights, cached=taught,
        )  # fmt: skip

    if step.flow_scale is None:
        loss_sum, stats = step.student(student_batch, head=head)
        (loss_sum * step.scale).backward()
    else:
        latents = student_batch.latents
        assert latents is not None, "every pack must reach the drawing branch's weights"
        (loss_sum, stats), flow_sum = step.student(
            student_batch,
            head=head,
            flow_head=lambda velocity: flow_loss(velocity, latents.velocity_targets),
        )
        (loss_sum * step.scale + flow_sum * step.flow_scale).backward()
        stats["mse"] = flow_sum.detach()
        stats["mse_rows"] = flow_sum.new_tensor(float(len(latents.velocity_rows)))
    logprobs = stats.pop("label_logprob")
    return PackResult(loss_sum.detach(), stats, logprobs, tuple(rows), tokens)


def _pack_like(
    student: PackedBatch,
    contexts: Sequence[Context | None],
    rows: Sequence[ScoredRow],
    step: StepContext,
) -> PackedBatch:
    """The rows' contexts of another kind, which must score what the student's do."""
    batch = pack([context for context in contexts if context is not None], step.special)
    check_same_labels(student, batch, [row.name for row in rows], step.decode)
    return batch


def sampler_gap(results: Sequence[PackResult]) -> tuple[float, int]:
    """(sum, number) of |log-probability recomputed - log-probability of the sampler|.

    Over the labels of completions whose log-probabilities the sampler recorded.
    """
    total, count = 0.0, 0
    for result in results:
        completions = [row.completion for row in result.rows if row.completion is not None]
        known = [len(c.logprobs) == c.count for c in completions for _ in range(c.count)]
        recorded = [p for c in completions if len(c.logprobs) == c.count for p in c.logprobs]
        if not recorded or len(known) != len(result.label_logprobs):
            continue
        ours = result.label_logprobs.float().cpu()[torch.tensor(known)]
        total += float((ours - torch.tensor(recorded)).abs().sum())
        count += len(recorded)
    return total, count


def completion_counts(rows: Sequence[ScoredRow], eos: int) -> dict[str, float]:
    """Sums over rows that describe the completions a policy wrote."""
    completions = [c for row in rows if (c := row.completion) is not None and not c.given]
    return {
        "completions": len(completions),
        "completion_tokens": sum(len(c.ids) for c in completions),
        "capped": sum(c.capped for c in completions),
        "ended": sum(not c.capped for c in completions),
        "empty": sum(not c.ids for c in completions),
        "image_skips": sum(eos in c.ids for c in completions),
    }


_ROW_MEANS = (
    "loss", "divergence", "ce", "forward_kl", "teacher_topk_mass", "student_entropy",
    "teacher_entropy",
)  # fmt: skip
# Figure of metrics.jsonl -> the sum it is made of, and what that is divided by.
_MEANS = {
    **{name: (name, "rows") for name in _ROW_MEANS},
    "mse": ("mse", "mse_rows"),
    "truncated_rate": ("truncated", "sequences"),
    "weightless_rate": ("weightless", "rows"),
    "off_policy_rate": ("off_policy", "sequences"),
    "rehearsal_rate": ("rehearsed", "sequences"),
    "completion_length": ("completion_tokens", "completions"),
    "cap_rate": ("capped", "completions"),
    "eos_rate": ("ended", "completions"),
    "empty_rate": ("empty", "completions"),
    "image_skip_rate": ("image_skips", "completions"),
    "sampler_gap": ("gap", "gap_rows"),
}
_OF_SAMPLES = ("completions", "gap_rows")


def summarise(sums: Mapping[str, float]) -> dict[str, Any]:
    """Global sums -> the figures of metrics.jsonl: those whose sums are there.

    Of completions and of the sampler there is none where the policy wrote nothing in the step.
    """
    figures: dict[str, Any] = {
        name: sums[part] / sums[count] if sums[count] else 0.0
        for name, (part, count) in _MEANS.items()
        if part in sums and (sums[count] or count not in _OF_SAMPLES)
    }
    figures["scored_tokens"] = sums["rows"]
    if "mse_rows" in sums:
        figures["noised_tokens"] = sums["mse_rows"]
    return figures


def learning_rate_factor(step: int, optim: OptimSettings) -> float:
    """Factor on lr of 0-based step `step`: linear warm-up, then cosine down to min_lr."""
    if step < optim.warmup_steps:
        return (step + 1) / optim.warmup_steps
    if optim.lr_scheduler == "constant":
        return 1.0
    span = max(1, optim.total_steps - 1 - optim.warmup_steps)
    progress = min(1.0, (step - optim.warmup_steps) / span)
    floor = optim.min_lr / optim.lr
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
