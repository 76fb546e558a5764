# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""`--dry_run`: a step with rows as long as the settings allow, planned beside measured memory.

An ordinary trainer does it, with rows that are made up and completions of full length, in a folder
that is gone afterwards. There are two steps: the optimiser's moments exist from the end of the
first one on.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from data.parquet import SlotItem, StepRows
from data.sequence import Completion, Context, ImageSegment, PixelSegment, TextSegment
from modeling.bagel.config import BagelConfig
from modeling.host.memory import own_bytes
from scripts.visual_opsd.config import TrainConfig
from scripts.visual_opsd.processes import DistEnv, on_main
from scripts.visual_opsd.rows import TrainRow
from scripts.visual_opsd.runs.folder_lock import release_folders
from scripts.visual_opsd.training.memory_plan import planned_phases
from scripts.visual_opsd.training.memory_sizes import (
    Footprint,
    ReleaseSizes,
    RowLengths,
    World,
    load_of,
    longest_row,
    make_footprint,
)
from scripts.visual_opsd.training.metrics import PhaseTimer
from scripts.visual_opsd.training.objective import Objective, Workplace
from scripts.visual_opsd.training.trainer import Trainer
from scripts.visual_opsd.training.visual_opsd import VisualOPSD
from scripts.visual_opsd.validation_config import ValidationSettings

_STEPS = 2
_LOOKS_S = 0.002  # between two looks at the memory of a process


def full_completion(tokens: int) -> Completion:
    """A completion that its budget ended: every token was sampled, the end was not."""
    return Completion((0,) * tokens, (True,) * tokens + (False,), capped=True)


def made_up_row(row: RowLengths, model: BagelConfig) -> TrainRow:
    """A row of given lengths, of black pictures and one repeated token, for any objective."""

    def grid(count: int) -> Tensor:
        return torch.arange(count)

    def image(patches: int) -> ImageSegment:
        return ImageSegment(torch.zeros(patches, model.vision.patch_dim), grid(patches))

    def picture(noised: bool) -> PixelSegment:
        stride = 8 * model.latent_patch_size
        pixels = torch.zeros(3, stride, stride * row.latents)
        return PixelSegment(pixels, grid(row.latents), noised)

    answer = TextSegment((0,) * row.new, (True,) * (row.new + 1))
    student: Context = (image(row.image), TextSegment((0,) * row.text))
    teacher: Context = student
    if row.shown:
        seen = (image(row.shown), TextSegment((0,) * row.shown_text))
        latents = (picture(False),) if row.latents else ()
        teacher = (*student, *latents, *seen)
    if row.draws:
        pixels = picture(True)
        student = (*student, pixels, replace(pixels, noised=False), answer)
    return TrainRow("made up", 0, "", "", student, teacher, targets=(answer,))


class FullLength(VisualOPSD):
    """Visual-OPSD whose completions are all of full length, whatever is drawn or recorded."""

    def __init__(self, config: TrainConfig, tokens: int) -> None:
        super().__init__(config)
        self.recorded, self.completion = None, full_completion(tokens)

    def roll_out(self, batch: StepRows[TrainRow], place: Workplace) -> list[Completion]:
        if self.samples:
            super().roll_out(batch, place)
        each = self.rollout.completions_per_row
        return [self.completion] * (each * len(batch.items))


class MeasuredPhases(PhaseTimer):
    """A timer that keeps the most bytes each phase held: allocated on the GPU or, on a CPU, what
    this process has taken since `begin`."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.peaks: dict[str, float] = {}
        self.before = 0 if device.type == "cuda" else own_bytes() or 0

    @contextmanager
    def __call__(self, phase: str, tokens: int = 0) -> Iterator[None]:
        with super().__call__(phase, tokens), self._watched(phase):
            yield

    @contextmanager
    def _watched(self, phase: str) -> Iterator[None]:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            yield
            torch.cuda.synchronize(self._device)
            self._keep(phase, torch.cuda.max_memory_allocated(self._device))
            return
        ended = threading.Event()

        def look() -> None:
            while True:
                self._keep(phase, max(0, (own_bytes() or 0) - self.before))
                if ended.wait(_LOOKS_S):
                    return

        watcher = threading.Thread(target=look, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()

    def _keep(self, phase: str, held: float) -> None:
        self.peaks[phase] = max(held, self.peaks.get(phase, 0.0))


class DryRun(Trainer):
    """A trainer on made-up rows that saves nothing."""

    timer_class = MeasuredPhases
    row: TrainRow

    def _rows(self) -> Generator[StepRows[TrainRow], None, None]:
        slots = self.order.slots(self.env.rank, self.env.world_size)
        for step in range(_STEPS):
            items = [SlotItem(slot, self.order.position(step, slot), self.row) for slot in slots]
            yield StepRows(step, tuple(items))

    def _saves(self) -> bool:
        return False


def quiet(config: TrainConfig, folder: Path) -> TrainConfig:
    """The same run without anything that is read of another one or left behind."""
    run = replace(
        config.run, results_dir=str(folder), checkpoint_dir=None, resume=None, auto_resume=False,
        resume_from=None, save_release=False, progress=False, log_every=1, wandb_project=None,
        tensorboard=False,
    )  # fmt: skip
    optim = replace(config.optim, total_steps=_STEPS, warmup_steps=0)
    return replace(config, run=run, optim=optim)


def dry_run(config: TrainConfig, env: DistEnv, objective: Objective) -> int:
    """Make the steps, print the table; returns the exit code. Called by all ranks."""
    before = 0 if env.device.type == "cuda" else own_bytes() or 0
    config = replace(config, validation=ValidationSettings())  # which is no part of a step
    folder = Path(on_main(env, lambda: tempfile.mkdtemp(prefix="visual-opsd-dry-run-")))
    try:
        own = quiet(config, folder)
        if isinstance(objective, VisualOPSD):
            objective = FullLength(own, 1)
        trainer = DryRun(own, env, objective)
        release = ReleaseSizes.read(config.model.model_path)
        world = World(env.world_size, env.local_world_size, env.device)
        of = make_footprint(config, release, objective, world)
        row = longest_row(of)
        limit = config.sample.max_forward_tokens
        if row.longest > limit:
            raise ValueError(
                f"--max_forward_tokens {limit} leaves no room for a row: one with the smallest "
                f"images takes {row.longest} tokens; raise it, or lower --vit_min_size"
            )
        if isinstance(objective, FullLength):
            objective.completion = full_completion(row.new)
        trainer.row = made_up_row(row, release.model)
        if config.teacher.contrast:
            trainer.row = replace(trainer.row, control=trainer.row.teacher)
        assert isinstance(trainer.timer, MeasuredPhases)
        trainer.timer.before = before
        with trainer.timer("resident"):
            pass
        code = trainer.train()
    finally:
        release_folders()
        if env.is_main:
            shutil.rmtree(folder, ignore_errors=True)
    if env.is_main and code == 0:
        print(compare(of, row, trainer.timer.peaks))
    return code


def compare(of: Footprint, row: RowLengths, measured: dict[str, float]) -> str:
    """Planned beside measured bytes of each phase that both know, in GB."""
    planned = planned_phases(of, load_of(of, row))
    lines = [
        f"rows of {row.longest} tokens with completions of {row.new}, {of.rows} a step on each",
        f"{'phase':<10}{'planned, GB':>13}{'measured, GB':>14}{'planned / measured':>20}",
    ]
    for phase, size in planned.items():
        if phase in measured:
            ratio = f"{size / measured[phase]:.2f}" if measured[phase] else "-"
            lines.append(f"{phase:<10}{size / 1e9:>13.3f}{measured[phase] / 1e9:>14.3f}{ratio:>20}")
    return "\n".join(lines)
