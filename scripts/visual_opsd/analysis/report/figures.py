# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The figures of metrics.jsonl by plain names, in groups. One that is not listed is shown, too."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

NATS, SHARE, TOKENS, SECONDS = "nats per scored token", "%", "tokens", "seconds"
_LOW, _HIGH = ("_low", "/low", "_lower"), ("_high", "/high", "_upper")  # ends of an interval
_MOST_OTHERS = 40
# What is counted for other reasons, or says in one number what a curve does not show better.
_LEFT_OUT = {"rows_read", "nonfinite", "validation/n"}


@dataclass(frozen=True)
class Figure:
    """name: the field. unit: "%" for shares, which are logged from 0 to 1. low, high: fields of
    its 95 % interval, "" without."""

    name: str
    title: str
    unit: str = ""
    low: str = ""
    high: str = ""

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
        Figure("validation/accuracy", "Accuracy on rows that are not trained on", SHARE,
               "validation/low", "validation/high"),
        Figure("validation/teacher_accuracy", "The teacher's, with visual thoughts in view", SHARE,
               "validation/teacher_accuracy_low", "validation/teacher_accuracy_high"),
        Figure("validation/kl", "KL(teacher, student) on the base's answers", NATS),
        Figure("validation/teacher_advantage", "What visual thoughts tell the teacher there", NATS),
        Figure("validation/mean_tokens", "Mean length of an answer", TOKENS),
        Figure("validation/cap_rate", "Answers ended by the budget", SHARE),
    )),
    Group("Optimiser", (
        Figure("grad_norm", "Gradient norm before clipping"),
        Figure("lr", "Learning rate"),
    )),
    Group("Completions", (
        Figure("completion_length", "Mean length of a completion", TOKENS),
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
        Figure("teacher_topk_mass", "Teacher's mass on its top-k entries", SHARE),
        Figure("sampler_gap", "Sampler against training forward", "nats, mean absolute"),
    )),
    Group("Machine", (
        Figure("seconds/sample", "Rollout", SECONDS),
        Figure("seconds/train", "Forwards, loss and backward", SECONDS),
        Figure("seconds/optimise", "Optimiser", SECONDS),
        Figure("seconds/data", "Waiting for data", SECONDS),
        Figure("validation/seconds", "A validation", SECONDS),
        Figure("tokens_per_s/sample", "Rollout, all ranks", "tokens/s"),
        Figure("tokens_per_s/train", "Training, all ranks", "tokens/s"),
        Figure("peak_memory_gb", "Peak memory, rank 0", "GB"),
        Figure("skipped_rows", "Rejected rows since the start", "rows"),
        Figure("noised_tokens", "Noised tokens of a step", TOKENS),
    )),
)  # fmt: skip
# The head of the name of an unlisted figure -> the group it is shown in.
_HEADS = {
    "eval": "Validation", "validation": "Validation", "guard": "Teacher guard",
    "teacher_guard": "Teacher guard", "clip": "Clip", "seconds": "Machine",
    "tokens_per_s": "Machine",
}  # fmt: skip
_OTHERS = "Further figures"
_ORDER = (
    "What is minimised", "Validation", "Teacher guard", "Optimiser", "Completions",
    "Teacher and student", "Clip", _OTHERS, "Machine",
)  # fmt: skip
_SHARES = ("_rate", "_share", "_mass", "_overlap", "accuracy")  # how such names end


def group_figures(names: Collection[str]) -> tuple[list[Group], int]:
    """The groups that some run has figures for, and how many unlisted figures are left out.

    A field whose name says that it ends an interval (NAME_low and NAME_high) belongs to NAME.
    """
    listed = [figure for group in _KNOWN for figure in group.figures]
    known = {name for figure in listed for name in (figure.name, figure.low, figure.high)}
    ends = {name: _interval(name, names) for name in names}
    taken = {end for pair in ends.values() for end in pair} | known | _LEFT_OUT
    others = sorted(name for name in names if name not in taken)
    found: dict[str, list[Figure]] = {title: [] for title in _ORDER}
    for group in _KNOWN:
        found[group.title] += [figure for figure in group.figures if figure.name in names]
    for name in others[:_MOST_OTHERS]:
        unit = SHARE if name.endswith(_SHARES) else ""
        figure = Figure(name, name.replace("_", " "), unit, *ends[name])
        found[_HEADS.get(name.split("/")[0], _OTHERS)].append(figure)
    groups = [Group(title, tuple(figures)) for title, figures in found.items() if figures]
    return groups, len(others[_MOST_OTHERS:])


def _interval(name: str, names: Collection[str]) -> tuple[str, str]:
    for low, high in zip(_LOW, _HIGH, strict=True):
        if name + low in names and name + high in names:
            return name + low, name + high
    return "", ""
