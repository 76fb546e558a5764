# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Rows with their labels: contexts that end in the tokens a loss scores, checked to be the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from data.packing import context_length
from data.sequence import Completion, Context, ImageSegment, LatentSegment, TextSegment
from modeling.bagel.batch import PackedBatch
from scripts.visual_opsd.rows import TrainRow


@dataclass(frozen=True)
class ScoredRow:
    """A row with its labels: the student's and the teacher's context, both ending in them.

    control: likewise the context to contrast the teacher's with, if any. rehearsed: the student
    sees what the teacher sees.
    """

    name: str
    student: Context
    teacher: Context | None
    completion: Completion | None = None
    truncated: bool = False
    control: Context | None = None
    rehearsed: bool = False

    @property
    def length(self) -> int:
        """Rows of the longest of the sequences."""
        contexts = (self.student, self.teacher, self.control)
        return max(context_length(c) for c in contexts if c is not None)

    @property
    def scored(self) -> int:
        return sum(sum(s.scored) for s in self.student if isinstance(s, TextSegment) and s.scored)

    @property
    def noised(self) -> int:
        """Latent rows whose velocity is predicted."""
        noisy = (s for s in self.student if isinstance(s, LatentSegment) and s.noise is not None)
        return sum(len(s.latents) for s in noisy)


def score_completion(
    name: str,
    student: Context,
    teacher: Context,
    completion: Completion,
    max_forward_tokens: int,
    control: Context | None = None,
) -> ScoredRow:
    """Append a sampled completion to all contexts, cut so that the longest one fits.

    A given text that the budget of a completion has cut counts as truncated too.
    The contexts leave room for a token at least: those of other rows were rejected as "too_long".
    """
    longest = max(context_length(c) for c in (student, teacher, control) if c is not None)
    room = max_forward_tokens - longest - 2  # the completion's two markers
    truncated = len(completion.ids) > room
    if truncated:
        assert room >= 1, f"{name}: its context takes {longest} of {max_forward_tokens} tokens"
        completion = completion.truncated(room)
    truncated |= completion.given and completion.capped
    end = (completion.segment(),)
    seen = None if control is None else (*control, *end)
    return ScoredRow(name, (*student, *end), (*teacher, *end), completion, truncated, seen)


def score_targets(row: TrainRow, max_forward_tokens: int) -> ScoredRow:
    """SFT: the given text is the completion, cut so that it fits; there is no teacher."""
    context = (*row.student, *row.targets)
    length = context_length(context)
    if length > max_forward_tokens:
        over = length - max_forward_tokens
        *others, last = row.targets
        assert over < len(last.ids), f"{row.name}: {length} of {max_forward_tokens} tokens"
        kept = last.ids[: len(last.ids) - over]
        cut = TextSegment(kept, (True,) * len(kept) + (False,))
        return ScoredRow(row.name, (*row.student, *others, cut), None, truncated=True)
    return ScoredRow(row.name, context, None)


def empty_row(
    patch_dim: int,
    *,
    with_teacher: bool,
    with_shown: bool = True,
    latent_dim: int | None = None,
) -> ScoredRow:
    """A pack of weight zero for a rank without rows: it joins the collectives, scores nothing.

    It holds an image, and latents where drawing is trained (None: it is not), because a rank that
    skipped the ViT would leave the others waiting. The teacher has one more of its own: where the
    student takes its features of the images both see, its ViT runs once for those and once for
    others (with_shown: there are others).
    """
    first = torch.zeros(1, dtype=torch.int64)
    context: Context = (ImageSegment(torch.zeros(1, patch_dim), first), TextSegment(()))
    if latent_dim is not None:
        context = (LatentSegment(torch.zeros(1, latent_dim), first), *context)
    other = ImageSegment(torch.zeros(1, patch_dim), first)
    teacher = (*context[:-1], *((other,) if with_shown else ()), context[-1])
    if not with_teacher:
        return ScoredRow("(no row)", context, None)
    return ScoredRow("(no row)", context, teacher, control=teacher)


def check_same_labels(
    student: PackedBatch, teacher: PackedBatch, names: Sequence[str], decode: Callable[..., str]
) -> None:
    """Student and teacher must score identical ids in identical order, sample by sample.

    Raises:
        ValueError: they do not (a bug: nothing is ever cut to fit); names the sample and shows
            how both begin.
    """
    if student.score_counts == teacher.score_counts and torch.equal(
        student.score_labels, teacher.score_labels
    ):
        return
    pairs = zip(
        names,
        torch.split(student.score_labels, list(student.score_counts)),
        torch.split(teacher.score_labels, list(teacher.score_counts)),
        strict=True,
    )
    for name, ours, theirs in pairs:
        if ours.shape != theirs.shape or not torch.equal(ours, theirs):
            raise ValueError(
                f"{name}: student and teacher score different tokens ({len(ours)} and "
                f"{len(theirs)} rows). Student: {decode(ours[:24].tolist())!r}; teacher: "
                f"{decode(theirs[:24].tolist())!r}"
            )
