# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Validation while training: when it is due, and what is remembered of it.

What measures the student is handed to the trainer as a `Validate`; training knows no more of
evaluation than stands here. A validation draws no random numbers and changes no weight; what its
guard does to a teacher that has dropped (`guard.py`) follows from its figures.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, TypeAlias

from torch import nn

from data.sequence import Completion
from data.thinkmorph import Row
from modeling.bagel.bagel import Bagel
from modeling.host.memory import memory_errors
from scripts.visual_opsd.processes import FailedAlone, gather_objects
from scripts.visual_opsd.rows import TrainRow
from scripts.visual_opsd.training.guard import GuardProgress, TeacherGuard
from scripts.visual_opsd.training.sharding import OFFLOAD_ADVICE, summon_full_params
from scripts.visual_opsd.training.teacher_distance import (
    StoredCompletions,
    TeacherDistance,
    store_completions,
)
from scripts.visual_opsd.validation_config import ValidationSettings

Ask: TypeAlias = Callable[[int, Bagel, Callable[[], bool]], Mapping[str, float]]


class Validate(Protocol):
    """Measures a model. `identity`: digest of all that its figures depend on, but for the model.
    `answers`: by row, those to the first `BASE_ANSWERS` rows that this rank has had of the base.
    """

    @property
    def identity(self) -> str: ...

    @property
    def answers(self) -> Mapping[int, Completion]: ...

    def __call__(
        self, step: int, model: Bagel, should_stop: Callable[[], bool]
    ) -> Mapping[str, float]:
        """Figures, "accuracy" (0 to 1, higher is better) among them, the same on all ranks.

        Called by all ranks.

        Args:
            step: completed optimiser steps. model: plain, with full weights; to be forgotten.
            should_stop: polled while decoding.

        Raises:
            Interrupted: on all ranks, as any was told to stop.
        """

    def ask_teacher(
        self, step: int, model: Bagel, should_stop: Callable[[], bool]
    ) -> Mapping[str, float]:
        """Likewise "accuracy", "low" and "high" of a teacher, which sees the rows' VTs."""

    def rows(
        self, indices: Sequence[int], prepare: Callable[[Row], TrainRow]
    ) -> Iterator[tuple[int, TrainRow]]:
        """Those of the rows that can be prepared for training; no collective."""


@dataclass
class Progress:
    """What the validations up to now said; part of every training state.

    last, best_step: steps, -1: none. since: validations since the best one. identity: of what
    measured; figures of another measure are not compared with these. base: the base's answers by
    row, as `store_completions` gives them; None: it was not asked. guard: of the teacher.
    """

    identity: str = ""
    last: int = -1
    best: float = -1.0
    best_step: int = -1
    since: int = 0
    base: StoredCompletions | None = None
    guard: GuardProgress = field(default_factory=GuardProgress)

    @classmethod
    def of(cls, saved: Mapping[str, Any]) -> Progress:
        """From `state_dict`, of this or an earlier version."""
        return cls(**{**saved, "guard": GuardProgress(**saved.get("guard", {}))})

    def state_dict(self) -> dict[str, Any]:
        return {**vars(self), "guard": asdict(self.guard)}  # asdict would copy all answers


class Validation:
    """Validates the student of a run; a run without `validate` never does.

    Args:
        total_steps: of the run; the last one is always validated.
        distance: what compares the student with the teacher; None: there is no teacher.
        guard: what watches the teacher; None: nothing does.

    Attributes:
        messages: what there is to say of the last validation, besides `describe`.
    """

    def __init__(
        self,
        settings: ValidationSettings,
        validate: Validate | None,
        total_steps: int,
        distance: TeacherDistance | None = None,
        guard: TeacherGuard | None = None,
    ) -> None:
        self.settings, self.validate, self.total_steps = settings, validate, total_steps
        self.distance, self.guard = distance, guard
        self.progress = Progress("" if validate is None else validate.identity)
        if guard is not None:
            self.progress.guard = guard.progress
        self.messages: list[str] = []
        self._base: StoredCompletions | None = None  # of a validation that is not noted yet
        self._explained = False

    def state_dict(self) -> dict[str, Any]:
        return self.progress.state_dict()

    def resume(self, saved: Mapping[str, Any] | None) -> str:
        """Go on from a state's progress. Returns why that was not possible, "" if it was."""
        found = Progress.of(saved or {})
        same = self.validate is None or found.identity == self.validate.identity
        if self.guard is None:
            found.guard = GuardProgress()
        else:
            self.guard.resume(found.guard, same=same)
        if same:
            self.progress = found  # kept for a later run even where nothing is validated
        self.progress.guard = found.guard
        if same or found.last < 0:
            return ""
        return (
            f"validation is on other rows, or by other settings, than in step {found.last}: the "
            "best one is looked for anew"
        )

    def is_due(self, step: int) -> bool:
        """Whether the student of a completed step is to be validated, and was not yet."""
        every = self.settings.eval_every
        if self.validate is None or every is None or step == self.progress.last:
            return False
        return step % every == 0 or step == self.total_steps

    def measure(
        self, step: int, student: Bagel, should_stop: Callable[[], bool]
    ) -> dict[str, float]:
        """The figures of metrics.jsonl; called by all ranks.

        Raises:
            ValueError, Interrupted: as `Validate`.
        """
        validate = self.validate
        assert validate is not None
        started, self.messages = time.perf_counter(), []

        def ask(gathered: AbstractContextManager[nn.Module], which: Ask) -> Mapping[str, float]:
            with ExitStack() as stack:
                # A collective: the others may wait in it for this rank.
                doing = f"gathering weights for the validation of step {step}"
                with memory_errors(doing, OFFLOAD_ADVICE, FailedAlone):
                    plain = stack.enter_context(gathered)
                assert isinstance(plain, Bagel)
                return which(step, plain, should_stop)

        figures = dict(ask(summon_full_params(student), validate))
        figures |= self._compare(step)
        if self.guard is not None:
            found = ask(self.guard.teacher.gathered(), validate.ask_teacher)
            figures["teacher_accuracy"] = found["accuracy"]
            figures |= {f"teacher_accuracy_{end}": found[end] for end in ("low", "high")}
        figures["seconds"] = time.perf_counter() - started
        return {f"validation/{name}": value for name, value in figures.items()}

    def _compare(self, step: int) -> dict[str, float]:
        """How far the student is from its teacher on the base's answers, if these are known."""
        if self.distance is None:
            return {}
        assert self.validate is not None
        self._base = self.progress.base
        if step == 0:
            parts = gather_objects(store_completions(self.validate.answers))
            self._base = dict(sorted(pair for part in parts for pair in part.items()))
        if self._base is None and not self._explained:
            self._explained = True
            self.messages.append(
                "validation/kl and validation/teacher_advantage are left out: they are measured "
                "on the base's answers to these rows, and the state resumed from holds none (it "
                "is of a run without validation at step 0, or on other rows)"
            )
        return self.distance.measure(self._base, self.validate.rows) if self._base else {}

    def note(self, step: int, figures: dict[str, float]) -> bool:
        """Remember the figures of a step; returns whether they are better than all before.

        Lets the guard act on those of the teacher, and adds what it found to them.
        """
        progress, accuracy = self.progress, figures["validation/accuracy"]
        progress.last, progress.base = step, self._base
        if self.guard is not None:
            found, said = self.guard.judge(step, figures["validation/teacher_accuracy"])
            figures |= found
            self.messages += [said] if said else []
        if accuracy > progress.best:
            progress.best, progress.best_step, progress.since = accuracy, step, 0
            return True
        progress.since += 1
        return False

    @property
    def stops(self) -> bool:
        """Whether --early_stop ends the run after the last validation."""
        limit = self.settings.early_stop
        return self.validate is not None and limit is not None and self.progress.since >= limit

    def describe(self, figures: Mapping[str, float]) -> str:
        """The last validation in a line."""
        shown = {k.removeprefix("validation/"): v for k, v in figures.items()}
        text = f"step {self.progress.last}: validation {shown['accuracy']:.1%}"
        if "low" in shown:
            text += f" ({shown['low']:.1%} - {shown['high']:.1%}, n = {shown['n']:.0f})"
        if self.progress.since:
            text += f"; best {self.progress.best:.1%} at step {self.progress.best_step}"
        return text
