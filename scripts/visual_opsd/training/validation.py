# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Validation while training: when it is due, and what is remembered of it.

What measures the student is handed to the trainer as a `Validate`; training knows no more of
evaluation than stands here. A validation draws no random numbers and changes no weight.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from modeling.bagel.bagel import Bagel
from modeling.host.memory import memory_errors
from scripts.visual_opsd.processes import FailedAlone
from scripts.visual_opsd.training.sharding import OFFLOAD_ADVICE, summon_full_params
from scripts.visual_opsd.validation_config import ValidationSettings


class Validate(Protocol):
    """Measures a model. `identity`: digest of all that its figures depend on, but for the model."""

    @property
    def identity(self) -> str: ...

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


@dataclass
class Progress:
    """What the validations up to now said; part of every training state.

    last, best_step: steps, -1: none. since: validations since the best one. identity: of what
    measured; figures of another measure are not compared with these.
    """

    identity: str = ""
    last: int = -1
    best: float = -1.0
    best_step: int = -1
    since: int = 0


class Validation:
    """Validates the student of a run; a run without `validate` never does.

    Args:
        total_steps: of the run; the last one is always validated.
    """

    def __init__(
        self, settings: ValidationSettings, validate: Validate | None, total_steps: int
    ) -> None:
        self.settings, self.validate, self.total_steps = settings, validate, total_steps
        self.progress = Progress("" if validate is None else validate.identity)

    def state_dict(self) -> dict[str, Any]:
        return asdict(self.progress)

    def resume(self, saved: Mapping[str, Any] | None) -> str:
        """Go on from a state's progress. Returns why that was not possible, "" if it was."""
        found = Progress(**saved or {})
        if self.validate is None or found.identity == self.validate.identity:
            self.progress = found  # kept for a later run even where nothing is validated
            return ""
        if found.last < 0:
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
        assert self.validate is not None
        started = time.perf_counter()
        with ExitStack() as stack:
            # A collective: the others may wait in it for this rank.
            doing = f"gathering weights for the validation of step {step}"
            with memory_errors(doing, OFFLOAD_ADVICE, FailedAlone):
                plain = stack.enter_context(summon_full_params(student))
            assert isinstance(plain, Bagel)
            figures = self.validate(step, plain, should_stop)
        seconds = time.perf_counter() - started
        return {f"validation/{k}": v for k, v in {**figures, "seconds": seconds}.items()}

    def note(self, step: int, figures: Mapping[str, float]) -> bool:
        """Remember the figures of a step; returns whether they are better than all before."""
        progress, accuracy = self.progress, figures["validation/accuracy"]
        progress.last = step
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
