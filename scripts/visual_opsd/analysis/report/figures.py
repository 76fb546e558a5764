# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The figures of metrics.jsonl by plain names, in groups. One that is not listed is shown, too."""

from __future__ import annotations

import re
from collections.abc import Set
from dataclasses import dataclass, replace

NATS, SHARE, TOKENS, SECONDS = "nats per scored token", "%", "tokens", "seconds"
# How a name ends that has an interval, and how the names of its ends do then; "": however.
_ENDS = (
    ("", "_low", "_high"), ("", "/low", "/high"), ("", "_lower", "_upper"),
    ("accuracy", "low", "high"), ("_p50", "_p10", "_p90"),
)  # fmt: skip
_MOST_OTHERS = 40
# What is counted for other reasons, or says in one number what a curve does not show better.
_LEFT_OUT = {"rows_read", "nonfinite", "validation/n"}


@dataclass(frozen=True)
class Figure:
    """name: the field. unit: "%" for shares, which are logged from 0 to 1. low, high: fields that
    hold the ends of its interval, "" without. tenths: fields of the ten tenths of a completion, of
    a figure that is drawn over these."""

    name: str
    title: str
    unit: str = ""
    low: str = ""
    high: str = ""
    tenths: tuple[str, ...] = ()

    @property
    def fields(self) -> tuple[str, ...]:
        return (self.name, self.low, self.high, *self.tenths)

    @property
    def is_share(self) -> bool:
        return self.unit == SHARE


@dataclass(frozen=True)
class Group:
    title: str
    figures: tuple[Figure, ...]


_KNOWN = (
    Group("What is minimised", (
        Figure("loss", "Loss", NATS),
        Figure("divergence", "Divergence from the teacher, as configured", NATS),
        Figure("forward_kl", "KL(teacher, student), unclipped", NATS),
        Figure("ce", "Cross-entropy", NATS),
        Figure("mse", "Flow-matching error"),
    )),
    Group("Validation", (
        Figure("validation/accuracy", "Accuracy on rows that are not trained on", SHARE),
        Figure("validation/kl", "KL(teacher, student) on the base's answers to them", NATS),
        Figure("validation/teacher_advantage", "What the VTs add to log p of these, the teacher's",
               NATS),
        Figure("validation/mean_tokens", "Mean length of an answer", TOKENS),
        Figure("validation/cap_rate", "Answers ended by the budget", SHARE),
    )),
    Group("Teacher guard", (
        Figure("validation/teacher_accuracy", "Teacher's accuracy on these rows, VTs in view",
               SHARE),
        Figure("validation/teacher_dropped", "The teacher is worse than it was (1)"),
    )),
    Group("Optimiser", (
        Figure("grad_norm", "Gradient norm before clipping"),
        Figure("lr", "Learning rate"),
    )),
    Group("Completions", (
        Figure("completion_length", "Mean length of a completion", TOKENS),
        Figure("completion_length_p50", "Median length; band: the middle four fifths", TOKENS),
        Figure("completion_length_max", "Longest completion", TOKENS),
        Figure("answered_rate", "With an answer", SHARE),
        Figure("leak_rate", "Speaks of a picture that the student never saw", SHARE),
        Figure("cap_rate", "Ended by the budget", SHARE),
        Figure("eos_rate", "Ended by the student itself", SHARE),
        Figure("empty_rate", "Empty", SHARE),
        Figure("image_skip_rate", "Asked for an image and went on", SHARE),
        Figure("rehearsal_rate", "The student saw the visual thoughts", SHARE),
        Figure("truncated_rate", "Cut to the longest sequence", SHARE),
        Figure("scored_tokens", "Scored tokens of a step", TOKENS),
    )),
    Group("Teacher and student", (
        Figure("student_entropy", "Student's entropy", NATS),
        Figure("teacher_entropy", "Teacher's entropy", NATS),
        Figure("divergence_decile", "Divergence along a completion, by tenths of it", NATS,
               tenths=tuple(f"divergence_decile/{n}" for n in range(10))),
        Figure("divergence_answer", "Divergence within answers", NATS),
        Figure("fork_rate", "Tokens whose likeliest choices differ", SHARE),
        Figure("topk_overlap", "Top-k entries that teacher and student share", SHARE),
        Figure("teacher_topk_mass", "Teacher's mass on its top-k entries", SHARE),
        Figure("student_topk_mass", "Student's mass on the teacher's top-k entries", SHARE),
        Figure("sampler_gap", "Sampler against training forward", "nats, mean absolute"),
    )),
    Group("Clip", (
        Figure("clip_token_rate", "Tokens that the clip binds", SHARE),
        Figure("clip_entry_rate", "Entries that the clip binds", SHARE),
        Figure("clip_gradient_share", "What the clip takes of the gradient", SHARE),
    )),
    Group("Machine", (
        Figure("seconds/sample", "Rollout", SECONDS),
        Figure("seconds/train", "Forwards, loss and backward", SECONDS),
        Figure("seconds/optimise", "Optimiser", SECONDS),
        Figure("seconds/data", "Waiting for data", SECONDS),
        Figure("validation/seconds", "A validation", SECONDS),
        Figure("tokens_per_s/sample", "Rollout, all ranks", "tokens/s"),
        Figure("tokens_per_s/train", "Training, all ranks", "tokens/s"),
        Figure("mfu", "Model FLOPs utilisation", SHARE),
        Figure("model_tflop", "Work of a step", "TFLOP, all ranks"),
        Figure("peak_memory_gb", "Peak memory, rank 0", "GB"),
        Figure("gpu_allocated_gb", "Allocated on the fullest GPU between steps", "GB"),
        Figure("gpu_reserved_gb", "Reserved on the fullest GPU between steps", "GB"),
        Figure("host_memory_gb", "Memory of the largest process between steps", "GB"),
        Figure("skipped_rows", "Rejected rows since the start", "rows"),
        Figure("noised_tokens", "Noised tokens of a step", TOKENS),
    )),
)  # fmt: skip
# How the name of an unlisted figure begins -> the group it is shown in. The first that fits.
_HEADS = {
    "eval": "Validation", "validation/teacher": "Teacher guard", "validation": "Validation",
    "guard": "Teacher guard", "teacher_guard": "Teacher guard", "clip": "Clip",
    "completion": "Completions", "teacher": "Teacher and student",
    "student": "Teacher and student", "divergence": "Teacher and student", "seconds": "Machine",
    "tokens_per_s": "Machine", "peak": "Machine", "host": "Machine", "gpu": "Machine",
}  # fmt: skip
_OTHERS = "Further figures"
_ORDER = (
    "What is minimised", "Validation", "Teacher guard", "Optimiser", "Completions",
    "Teacher and student", "Clip", _OTHERS, "Machine",
)  # fmt: skip
_SHARES = ("_rate", "_share", "_mass", "_overlap", "accuracy")  # how such names end


def group_figures(names: Set[str]) -> tuple[list[Group], int]:
    """The groups that some run has figures for, and how many unlisted figures are left out.

    Fields whose names say that they end an interval (NAME_low and NAME_high) belong to NAME.
    """
    found: dict[str, list[Figure]] = {title: [] for title in _ORDER}
    taken = set(_LEFT_OUT)
    for group in _KNOWN:
        for figure in group.figures:
            shown = _with_interval(figure, names)
            if not names.isdisjoint((figure.name, *figure.tenths)):
                found[group.title].append(shown)
            taken.update(shown.fields)
    others = [
        _with_interval(Figure(name, name.replace("_", " "), _unit_of(name)), names)
        for name in sorted(names) if name not in taken
    ]  # fmt: skip
    taken = {end for figure in others for end in (figure.low, figure.high)}
    others = [figure for figure in others if figure.name not in taken]
    for figure in others[:_MOST_OTHERS]:
        found[_group_of(figure.name)].append(figure)
    groups = [Group(title, tuple(figures)) for title, figures in found.items() if figures]
    return groups, len(others[_MOST_OTHERS:])


def _unit_of(name: str) -> str:
    return SHARE if name.endswith(_SHARES) else ""


def _group_of(name: str) -> str:
    """The group of an unlisted figure: by the words that its name begins with."""
    return next((group for head, group in _HEADS.items() if re.match(rf"{head}(?![a-z0-9])", name)),
                _OTHERS)  # fmt: skip


def _with_interval(figure: Figure, names: Set[str]) -> Figure:
    """The figure with the fields of its interval, if they are there."""
    for end, *ends in _ENDS:
        if figure.name.endswith(end):
            low, high = (figure.name.removesuffix(end) + other for other in ends)
            if low in names and high in names:
                return replace(figure, low=low, high=high)
    return figure
