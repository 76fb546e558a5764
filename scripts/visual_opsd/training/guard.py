# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""What becomes of a teacher that has got worse: `--teacher_guard`.

Its accuracy with the VTs in view comes from the validations. Everything here is decided from
figures that all ranks have, and done to each rank's own shards, so nothing communicates.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from scripts.visual_opsd.config import TeacherSettings
from scripts.visual_opsd.training.sharding import local_part, trained_pairs
from scripts.visual_opsd.training.teacher import Teacher
from scripts.visual_opsd.validation_config import ValidationSettings

_SLACK = 1e-9  # accuracies are ratios, their differences are rounded
ACTIVE = ("freeze", "rollback")


def check_guard(settings: ValidationSettings, teacher: TeacherSettings | None) -> None:
    """Raises ValueError: the teacher does not change, or cannot be held back."""
    guard = settings.teacher_guard
    if guard == "off":
        return
    assert teacher is not None, "check_used lets no such run pass"
    if teacher.teacher_mode == "fixed":
        raise ValueError(
            f"--teacher_guard {guard}: a teacher of --teacher_mode fixed never changes, so there "
            "is nothing to guard: leave it out"
        )
    if guard in ACTIVE and teacher.teacher_mode != "ema":
        raise ValueError(
            f"--teacher_guard {guard}: with --teacher_mode {teacher.teacher_mode} the teacher is "
            "the student, which cannot stay behind itself: use --teacher_guard warn, or "
            "--teacher_mode ema"
        )


class KeptTeacher:
    """A copy of what trains of an EMA teacher: this rank's shards, in host memory.

    Attributes:
        tensors: by parameter name, sharded as the teacher's; empty while nothing is kept.
    """

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher
        self.tensors: dict[str, Tensor] = {}

    def _averages(self) -> dict[str, Tensor]:
        ema = self.teacher.ema
        assert ema is not None, "check_guard lets no other teacher pass"
        return {name: average for (name, average), _ in trained_pairs(ema, self.teacher.student)}

    @torch.no_grad()
    def allocate(self) -> None:
        """Make room for a copy, with whatever values."""
        for name, average in self._averages().items():
            if name not in self.tensors:
                self.tensors[name] = torch.empty_like(average, device="cpu")

    @torch.no_grad()
    def keep(self) -> None:
        """Copy the teacher's weights, in the place of an earlier copy."""
        self.allocate()
        for name, average in self._averages().items():
            local_part(self.tensors[name]).copy_(local_part(average))

    @torch.no_grad()
    def restore(self) -> None:
        """Give the teacher the weights of the copy, which is then let go."""
        for name, average in self._averages().items():
            local_part(average).copy_(local_part(self.tensors[name]))
        self.tensors = {}


@dataclass
class GuardProgress:
    """best, best_step: of the teacher's validations; -1: none. kept_step: of the copy; -1: none.
    stands: it follows the student no longer."""

    best: float = -1.0
    best_step: int = -1
    kept_step: int = -1
    stands: bool = False


class TeacherGuard:
    """Watches the teacher of a run; there is none with `--teacher_guard off`.

    Attributes:
        kept: where `rollback` keeps the best teacher; None for the others.
    """

    def __init__(self, settings: ValidationSettings, teacher: Teacher) -> None:
        self.action, self.drop = settings.teacher_guard, settings.guard_drop
        assert self.action != "off"
        self.teacher = teacher
        self.kept = KeptTeacher(teacher) if self.action == "rollback" else None
        self.progress = GuardProgress()

    def resume(self, found: GuardProgress, *, same: bool) -> None:
        """Go on from a state's progress, when the state's copy has been loaded.

        same: its accuracies are of what is measured now.
        """
        self.progress = found
        if not same:
            found.best, found.best_step = -1.0, -1
        if self.action not in ACTIVE:
            found.stands = False
        if self.kept is None or not self.kept.tensors:
            found.kept_step = -1
        self.teacher.follows = not found.stands

    def judge(self, step: int, accuracy: float) -> tuple[dict[str, float], str]:
        """Act on a validation of the teacher. Returns further figures, and what to say, if any."""
        progress = self.progress
        best, best_step = progress.best, progress.best_step
        dropped = best - accuracy > self.drop + _SLACK
        better = accuracy > best
        if better:
            progress.best, progress.best_step = accuracy, step
        wanted = better or progress.kept_step < 0
        if self.kept is not None and wanted and not dropped and not progress.stands:
            self.kept.keep()
            progress.kept_step = step
        figures = {"validation/teacher_dropped": float(dropped)}
        if not dropped or progress.stands:
            return figures, ""
        text = f"step {step}: the teacher's accuracy has dropped to {accuracy:.1%}, from "
        text += f"{best:.1%} at step {best_step}"
        return figures, f"{text}; {self._act()}"

    def _act(self) -> str:
        """What becomes of a teacher that has dropped, and in words."""
        progress = self.progress
        if self.kept is not None and progress.kept_step < 0:
            return "no earlier weights of it are kept that it could go back to"
        if self.action == "warn":
            return "see --teacher_guard freeze and rollback"
        progress.stands, self.teacher.follows = True, False
        if self.kept is None:
            return "it follows the student no longer"
        self.kept.restore()
        step, progress.kept_step = progress.kept_step, -1
        return f"it goes back to its weights of step {step} and follows the student no longer"
