# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Saves a run's states, and only good ones.

While the last steps were non-finite nothing is saved and nothing deleted. Such a step updates no
weight, so a state is proven by the first finite step after it. Until then no older state is
deleted; and if only non-finite steps follow, the state is marked as not good when the run ends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from data.json_lines import write_lines
from modeling.release.finite import find_nonfinite
from scripts.visual_opsd.processes import DistEnv, agree, gather_objects, on_main
from scripts.visual_opsd.run_config import RunSettings
from scripts.visual_opsd.training.checkpoint_folders import (
    NOT_GOOD,
    adapter_folder,
    delete_old_states,
    find_checkpoint,
    release_folder,
    remove,
    step_folder,
    supersede,
)
from scripts.visual_opsd.training.checkpoints import Resumed, TrainingState, save_checkpoint
from scripts.visual_opsd.training.sharding import local_part
from scripts.visual_opsd.training.step import PackResult

_SHOWN = 8


def nonfinite_rows(results: Sequence[PackResult]) -> str:
    """The rows whose losses were not finite, on any rank; called by all ranks."""
    mine = [row.name for result in results if not result.finite for row in result.rows]
    names = [name for part in gather_objects(mine) for name in part]
    if not names:
        return "none: the gradient, not a loss, is non-finite"
    return ", ".join(names[:_SHOWN])


def is_finite(state: TrainingState, env: DistEnv) -> bool:
    """Whether every weight, average and moment is a finite number; called by all ranks."""
    tensors: list[Tensor] = list(state.model.parameters())
    if state.ema is not None:
        tensors += state.ema.parameters()
    tensors += [
        value
        for moments in state.optimizer.state.values()
        for value in moments.values()
        if isinstance(value, Tensor)
    ]
    shards = {str(number): local_part(tensor) for number, tensor in enumerate(tensors)}
    return not agree(bool(find_nonfinite(shards)), env)


class StateKeeper:
    """Knows the last completed step and how it went. Every method is called by all ranks.

    Args:
        settings: config and contents, as `save_checkpoint` wants them.

    Attributes:
        bad_steps: how many steps up to the last one were non-finite.
    """

    def __init__(
        self, run: RunSettings, state: TrainingState, settings: Mapping[str, Any], env: DistEnv
    ) -> None:
        self.run, self.state, self.settings, self.env = run, state, settings, env
        self.step, self.bad_steps = 0, 0
        self._extra: dict[str, Any] = {}
        self._saved = 0  # the step of the newest state
        self._proven = True  # whether a finite step followed it

    def resume(self, found: Resumed) -> dict[str, Any]:
        """Go on from a state; returns its counts of rejected rows."""
        self.step = self._saved = found.step
        self._proven = found.step == 0
        self.bad_steps, self._extra = int(found.extra["bad_steps"]), found.extra
        rejects: dict[str, Any] = found.extra["rejects"]
        return rejects

    def complete(self, step: int, finite: bool, extra: dict[str, Any]) -> None:
        """Note that a step is done; its state may be saved from now on, with `extra`."""
        self.step, self._extra = step, extra
        self.bad_steps = 0 if finite else self.bad_steps + 1
        if finite and not self._proven:
            self._proven = True
            on_main(self.env, self._prove)

    def note(self, extra: Mapping[str, Any]) -> None:
        """Save `extra` with the last completed step, whose state is not saved yet."""
        self._extra = {**self._extra, **extra}

    def save(self, *, last: bool = False) -> None:
        """Save the state of the last completed step, if it is not saved yet.

        Args:
            last: no step follows.

        Raises:
            ValueError: it is not finite, or as `save_checkpoint`.
        """
        assert not self.bad_steps
        if self.step == self._saved:
            return
        if not is_finite(self.state, self.env):
            raise ValueError(
                f"the weights or moments of step {self.step} are not finite, so they are not "
                f"saved: lower --lr; {self._last_good()}"
            )
        save_checkpoint(
            self.run.checkpoints,
            self.step,
            self.state,
            env=self.env,
            **self.settings,
            extra={**self._extra, "bad_steps": 0},
        )
        self._saved, self._proven = self.step, False
        if last:
            on_main(self.env, self._delete_old)

    def keep(self) -> str:
        """Save the last completed step before the run ends; says what is kept."""
        if self.bad_steps:
            count = f"the last {self.bad_steps} steps" if self.bad_steps > 1 else "the last step"
            return f"nothing saved, as {count} had no finite loss; {self._last_good()}"
        self.save()
        if not self.step:
            return "nothing to save yet"
        return f"state of step {self.step} saved; --resume it"

    def keep_beside(self, error: ValueError) -> None:
        """Save before the run ends with an error, and say in the error what is kept."""
        try:
            error.add_note(self.keep())
        except ValueError as second:
            error.add_note(f"nor was the state of step {self.step} saved: {second}")

    def diverged(self, advice: str) -> ValueError:
        """The error of a run that ends with non-finite steps."""
        on_main(self.env, self._mark)
        return ValueError(
            f"{self.bad_steps} steps in a row had a non-finite loss or gradient{advice}; "
            f"{self._last_good()}"
        )

    def _mark(self) -> None:
        """If only non-finite steps followed the newest state, it is not good."""
        folder, step = self.run.checkpoints, self._saved
        state = step_folder(folder, step)
        if self._proven:
            return
        if state.is_dir():
            line = {"step": step, "nonfinite_steps_after": self.bad_steps}
            write_lines(state / NOT_GOOD, [line])
        for result in (release_folder(folder, step), adapter_folder(folder, step)):
            if result.is_dir():
                supersede(result, f"step {step}, after which every step was non-finite,")

    def _last_good(self) -> str:
        def find() -> str:
            try:
                path = find_checkpoint(self.run.checkpoints, "last_good")
            except ValueError as error:
                return str(error)
            return f"the last good state is {path}: --resume last_good"

        return on_main(self.env, find)

    def _prove(self) -> None:
        remove(step_folder(self.run.checkpoints, self._saved) / NOT_GOOD)
        self._delete_old()

    def _delete_old(self) -> None:
        delete_old_states(self.run.checkpoints, self.run.keep_last)
