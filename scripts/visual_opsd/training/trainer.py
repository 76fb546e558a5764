# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The training loop, for any objective.

    rows -> labels (of Visual-OPSD: a rollout, full weights, no collective) -> packs -> teacher,
         student, losses, backward -> clip -> AdamW -> EMA -> metrics, checkpoint

Every random number is keyed by (seed, step, row), so a resumed run, another number of ranks and
another number of workers see the same batches and the same completions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from data.dataset_info import load_dataset_config
from data.parquet import StepLoader, StepOrder, StepRows, make_loader, open_sources
from data.rejects import RejectLedger
from modeling.host.disk import DiskRefused
from modeling.host.memory import memory_errors
from scripts.visual_opsd.cli import flat
from scripts.visual_opsd.config import TrainConfig, compute_dtype
from scripts.visual_opsd.on_policy_sampler import Interrupted
from scripts.visual_opsd.processes import (
    DistEnv,
    FailedAlone,
    agree,
    all_reduce_max_int,
    all_reduce_sums,
    attempt,
    gather_objects,
    on_main,
    raise_together,
)
from scripts.visual_opsd.rows import TrainRow
from scripts.visual_opsd.runs.folder_lock import hold_folder
from scripts.visual_opsd.runs.stopping import StopRequest, exit_code
from scripts.visual_opsd.scored_rows import ScoredRow, empty_row
from scripts.visual_opsd.training.checkpoint_folders import (
    NOT_GOOD,
    best_step,
    check_folders,
    choose_checkpoint,
    claim_checkpoint_dir,
    restart_logs,
)
from scripts.visual_opsd.training.checkpoints import (
    TrainingState,
    check_resumable,
    config_hash,
    load_checkpoint,
)
from scripts.visual_opsd.training.event_files import check_tensorboard
from scripts.visual_opsd.training.figures import Measurement, means
from scripts.visual_opsd.training.guard import TeacherGuard
from scripts.visual_opsd.training.memory_report import check_memory
from scripts.visual_opsd.training.metrics import (
    MetricLogger,
    PhaseTimer,
    WandbSettings,
    peak_memory_gb,
    seconds_of,
)
from scripts.visual_opsd.training.models import adapter_config, build_models
from scripts.visual_opsd.training.objective import Base, Objective, Workplace
from scripts.visual_opsd.training.optimizers import make_optimizer
from scripts.visual_opsd.training.releases import ReleaseWriter
from scripts.visual_opsd.training.run_contents import run_contents
from scripts.visual_opsd.training.sharding import (
    OFFLOAD_ADVICE,
    clip_grad_norm,
)
from scripts.visual_opsd.training.state_keeper import StateKeeper, nonfinite_rows
from scripts.visual_opsd.training.step import (
    PackResult,
    StepContext,
    learning_rate_factor,
    loss_scale,
    plan_packs,
)
from scripts.visual_opsd.training.teacher_distance import TeacherDistance
from scripts.visual_opsd.training.validation import Validate, Validation

_SHOWN = {"loss": ".4f", "grad_norm": ".3f", "completion_length": ".1f"}
_FINE, _STOP, _FAILED = 0, 1, 2
_UPDATE = "lower --pack_tokens, --loss_chunk_size or, in a new run, --max_forward_tokens"
T = TypeVar("T")


class Trainer:
    """Builds everything a run needs, trains, saves.

    Args:
        config: resolved settings. env: this process. objective: what is trained on.
        validate: what measures the student every `--eval_every` steps; None: nothing does.

    Raises:
        ValueError: anything the user can mend, with cause and fix.
    """

    timer_class: type[PhaseTimer] = PhaseTimer

    def __init__(
        self,
        config: TrainConfig,
        env: DistEnv,
        objective: Objective,
        validate: Validate | None = None,
    ) -> None:
        self.config, self.env, self.objective = config, env, objective
        self.dtype = compute_dtype(config.model.precision, env.device)
        self.results = Path(config.run.results_dir)
        # Errors in paths, prompts and data come before anything is built or written.
        latents = objective.trains_drawing or objective.teacher_reads_latents
        self.base = Base.open(config.model.model_path, env.device, latents=latents)
        dataset_config = load_dataset_config(config.data.dataset_config_file)
        sources = open_sources(dataset_config, objective.needs, config.data.data_root)
        self.order = StepOrder(sources, config.data.data_seed, config.data.global_batch_size)
        self.prepare = objective.prepare(self.base)
        self.ledger = RejectLedger(
            self.results / "bad_rows.jsonl" if env.is_main else None,
            max_rate=config.data.max_bad_rate,
        )
        run = config.run
        self.wandb: WandbSettings | None = None
        if run.wandb_project:
            self.wandb = WandbSettings(run.wandb_project, run.wandb_name, run.wandb_offline)
            on_main(env, self.wandb.check)
        if run.tensorboard:
            on_main(env, check_tensorboard)
        # What forbids a start is said before minutes of loading.
        check_memory(config, objective, env)
        on_main(env, self._hold_folders)
        self.contents = on_main(env, lambda: run_contents(config, self.order))
        self.checkpoint = choose_checkpoint(run.checkpoints, run.resume_specs, env)
        on_main(env, self._check_resume)
        with memory_errors("while models are built", OFFLOAD_ADVICE, FailedAlone):
            self._build_models()
        self.stop = StopRequest()
        self.timer = self.timer_class(env.device)
        self.place = Workplace(env, self.base, self.student, self.timer, self.stop)
        decode = self.base.tokenizer.decode
        self.measurement = Measurement(run, env, self.student, decode, samples=objective.samples)
        self.step = 0  # completed optimiser steps
        self.validation = self._make_validation(validate)
        self.releases = ReleaseWriter(config, self.student, self.adapters, env)
        self.states = StateKeeper(run, self.state, self._saved_config(), env)
        self._restore()

    # ------------------------------------------------------------------------------- building

    def _build_models(self) -> None:
        optim = self.config.optim
        self.student, self.teacher = build_models(
            self.config, self.base.model, self.objective, self.dtype, self.env
        )
        self.ema = None if self.teacher is None else self.teacher.ema
        lora = self.config.lora
        self.adapters = adapter_config(self.student, lora) if lora.lora_rank else None
        self.trainable = [p for p in self.student.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(self.trainable, optim, self.env.device)
        self.scheduler = LambdaLR(self.optimizer, lambda step: learning_rate_factor(step, optim))

    def _make_validation(self, validate: Validate | None) -> Validation:
        config, teacher = self.config, self.teacher
        settings, total_steps = config.validation, config.optim.total_steps
        if validate is None or teacher is None:
            return Validation(settings, validate, total_steps)
        distance = TeacherDistance(config, self.place, teacher, self.prepare, self.dtype)
        guard = None if settings.teacher_guard == "off" else TeacherGuard(settings, teacher)
        return Validation(settings, validate, total_steps, distance, guard)

    @property
    def state(self) -> TrainingState:
        guard = self.validation.guard
        kept = None if guard is None else guard.kept
        return TrainingState(self.student, self.optimizer, self.scheduler, self.ema, kept)

    def _saved_config(self) -> dict[str, Any]:
        """What is stored with checkpoints and must be the same on a resume."""
        config = {**asdict(self.config), **self.objective.identity}
        return {"config": config, "contents": self.contents}

    def _extra(self) -> dict[str, Any]:
        """What of a completed step is stored besides tensors."""
        run_id = None if self.wandb is None else self.wandb.run_id
        return {
            "rejects": self.ledger.state_dict(),
            "wandb_id": run_id,
            "validation": self.validation.state_dict(),
        }

    def _hold_folders(self) -> None:
        run = self.config.run
        hold_folder(self.results, "results_dir", take_over=run.take_over)
        hold_folder(run.checkpoints, "checkpoint_dir", take_over=run.take_over)

    def _check_resume(self) -> None:
        run = self.config.run
        check_folders(
            self.results, run.checkpoints, self.checkpoint, resumes=bool(run.resume_specs)
        )
        if self.checkpoint is not None:
            check_resumable(self.checkpoint, **self._saved_config())

    def _restore(self) -> None:
        rejects: dict[str, Any] = {"rows_read": 0, "reasons": {}}
        anew = ""  # why a best model is not compared with any longer
        begins_at = -1  # lines of step 0, which a run before its first state left, go too
        if self.checkpoint is not None:
            resumed = load_checkpoint(
                self.checkpoint, self.state, env=self.env, **self._saved_config()
            )
            self.step = begins_at = resumed.step
            rejects = self.states.resume(resumed)
            if self.wandb is not None:
                self.wandb = self.wandb.continuing(resumed.extra.get("wandb_id"))
            anew = self.validation.resume(resumed.extra.get("validation"))
        claim_checkpoint_dir(self.config.run.checkpoints, self.checkpoint, self.env, anew)
        attempt(lambda: self.ledger.resume(rejects, self.step))
        due = self.validation.is_due(begins_at)
        on_main(
            self.env,
            lambda: restart_logs(self.results, begins_at, flat(self.config), validates=due),
        )

    # ------------------------------------------------------------------------------- training

    def train(self) -> int:
        """Run to the end; returns the exit code (0, or 128 + the signal that stopped it)."""
        config, run = self.config, self.config.run
        logger = attempt(
            lambda: MetricLogger(
                self.results / "metrics.jsonl",
                self.env,
                total_steps=config.optim.total_steps,
                start_step=self.step,
                progress=run.progress,
                wandb=self.wandb,
                config=flat(config),
                tensorboard=run.tensorboard,
            )
        )
        with self.stop, logger as self.log, closing(self._rows()) as rows:
            going = self._begin()
            while going and not self._ends():
                going = self._one_step(rows) and self._validate()
                if going and self._saves() and not self.states.bad_steps:
                    self._save()
            if not going:
                self.log.message(f"terminated: {self.states.keep()}")
                return exit_code(all_reduce_max_int(self.stop.number, self.env))
        if self.states.bad_steps:
            raise self.states.diverged(" at the end of the run, so it has no result")
        return 0

    def _ends(self) -> bool:
        """Whether no step follows the last completed one."""
        return self.step == self.config.optim.total_steps or self.validation.stops

    def _saves(self) -> bool:
        """Whether a checkpoint is due after the last completed step."""
        last = self._ends()
        return last or self.step % self.config.run.save_every == 0

    def _save(self) -> None:
        """The state of the last completed step and its release folder, unless the disk refuses."""
        last = self._ends()
        try:
            self.states.save(last=last)
            self.releases.save(self.step, last=last)
        except DiskRefused as error:  # on all ranks together
            if last or self.config.run.on_save_error == "stop":
                raise
            text = str(error)
            self.log.message(f"step {self.step} is not saved, training goes on: {text}")
            self._together(lambda: self.log.log(self.step, {"save_error": text}))

    def _validate(self) -> bool:
        """Validate the last completed step if that is due; False: the run was told to stop.

        A validation that is stopped leaves no trace: a resumed run makes up for it.
        """
        validation = self.validation
        if not validation.is_due(self.step):
            return True
        figures = self._together(
            lambda: validation.measure(self.step, self.student, lambda: bool(self.stop.number))
        )
        if figures is None:
            return False
        is_best = validation.note(self.step, figures)
        self.states.note(self._extra())
        for text in (validation.describe(figures), *validation.messages):
            self.log.message(text)
        self._together(lambda: self.log.log(self.step, figures))
        # Before the first step it is the base, which lies where it was read.
        if is_best and self.step and validation.settings.keep_best:
            self._save_best(figures)
        if validation.stops:
            self.log.message(f"step {self.step}: --early_stop {validation.settings.early_stop} "
                             "ends the run")  # fmt: skip
        return True

    def _save_best(self, figures: Mapping[str, float]) -> None:
        """The release folder of the best validation so far, unless the disk refuses."""
        facts = {
            "step": self.step,
            **figures,
            "settings_hash": self.validation.progress.identity,
            "run_config_hash": config_hash(self._saved_config()["config"]),
        }
        try:
            self.releases.save_best(self.step, facts)
        except DiskRefused as error:  # on all ranks together
            if self.config.run.on_save_error == "stop":
                self.states.keep_beside(error)  # of other saves the state comes first
                raise
            text = f"the best model, of step {self.step}, is not saved: {error}"
            self.log.message(text)
            self._together(lambda: self.log.log(self.step, {"save_error": text}))

    def _tell_missing_best(self) -> None:
        """A best validation whose model is not kept is never written, however good it was."""
        progress, folder = self.validation.progress, self.config.run.checkpoints
        wanted = self.validation.settings.keep_best and progress.best_step > 0
        if wanted and best_step(folder) != progress.best_step:
            self.log.message(
                f"--keep_best: {folder} holds no model of the best validation so far, of step "
                f"{progress.best_step} ({progress.best:.1%}); the next better one is written"
            )

    def _begin(self) -> bool:
        """Say where the run starts; make up for what a killed run still owes: a validation, a
        release folder. A run's first validation is of its base. False: it was told to stop."""
        run = self.config.run
        if self.checkpoint is None:
            if run.resume_specs:
                self.log.message(f"no checkpoint in {run.checkpoints} yet: starting at step 0")
            return self._validate()
        self.log.message(f"resumed from {self.checkpoint}")
        self._tell_missing_best()
        if not self._validate():
            return False
        own = self.checkpoint.resolve().parent == run.checkpoints.resolve()
        good = self._saves() and not (self.checkpoint / NOT_GOOD).exists()
        last = self._ends()
        if agree(own and good and self.releases.is_owed(self.step, last=last), self.env):
            self._save()
        return True

    def _rows(self) -> Generator[StepRows[TrainRow], None, None]:
        """This rank's rows of each step that is to come."""
        config = self.config
        loader: StepLoader[TrainRow] = make_loader(
            self.order,
            self.prepare,
            rank=self.env.rank,
            world_size=self.env.world_size,
            start_step=self.step,
            total_steps=config.optim.total_steps,
            num_workers=config.data.num_workers,
            prefetch_factor=config.data.prefetch_factor,
            stuck_after_s=config.run.timeout_s,
        )
        return iter(loader)

    def _together(self, action: Callable[[], T]) -> T | None:
        """Run on every rank: None on all when one was told to stop, one's error raised on all.

        Before the error of a user, the state of the last completed step is saved.

        Between two of these calls every rank joins the same collectives, so a rank that failed
        (bad rows, out of memory in a rollout) is never waited for. `FailedAlone` passes.
        """
        status, failure, result = _FINE, None, None
        try:
            result = action()
            status = _STOP if self.stop.number else _FINE
        except Interrupted:
            status = _STOP
        except FailedAlone:
            raise
        except Exception as error:
            status, failure = _FAILED, error
        worst = all_reduce_max_int(status, self.env)
        if worst == _FAILED:
            try:
                raise_together(failure)
            except ValueError as error:
                self.states.keep_beside(error)
                raise
        return result if worst == _FINE else None

    def _one_step(self, loader: Iterator[StepRows[TrainRow]]) -> bool:
        """One optimiser step; False when the run was told to stop (nothing of the step counts)."""
        with self.timer("data"):
            batch = self._together(lambda: next(loader))
        if batch is None:
            return False
        scored = self._together(lambda: self.objective.label(batch, self.place))
        if scored is None:
            return False
        sums = all_reduce_sums(
            {
                "scored": sum(row.scored for row in scored),
                "noised": sum(row.noised for row in scored),
                "rows_read": batch.rows_read,
                "rejects": len(batch.rejects),
            },
            self.env,
        )
        self._record_rejects(batch, sums)
        with memory_errors(f"in the update of step {batch.step + 1}", _UPDATE, FailedAlone):
            self._update(scored, sums)
        return not agree(bool(self.stop.number), self.env)

    def _record_rejects(self, batch: StepRows[TrainRow], sums: dict[str, float]) -> None:
        rejects = batch.rejects
        if sums["rejects"]:
            rejects = [reject for part in gather_objects(rejects) for reject in part]
        self._together(lambda: self.ledger.record(int(sums["rows_read"]), rejects))

    def _update(self, scored: Sequence[ScoredRow], sums: dict[str, float]) -> None:
        """Packs, gradient, clipping, AdamW, EMA, metrics."""
        due = self._is_logged(self.step + 1)
        measured = due and self.measurement.is_due(self.step + 1)
        with self.timer("train", sum(row.length for row in scored)):
            results = self._run_packs(scored, sums, measured)
            grad_norm = clip_grad_norm(self.trainable, self.config.optim.max_grad_norm)
        figures = self._reduce(results, scored, measured)
        # Before the update: if it fails, the last completed step can still be saved.
        self._together(lambda: self.objective.record(scored, results, self.place))
        finite = math.isfinite(float(grad_norm)) and math.isfinite(figures["loss"])
        learning_rate = self.scheduler.get_last_lr()[0]
        with self.timer("optimise"):
            if finite:
                self.optimizer.step()
                if self.teacher is not None:
                    self.teacher.update()
            self.optimizer.zero_grad(set_to_none=True)
            self.scheduler.step()
        self.step += 1
        self.states.complete(self.step, finite, self._extra())
        phases = self.timer.reduce(self.env)
        if measured:
            tflop = figures["model_tflop"]
            figures |= self.measurement.of_machine(scored, tflop, seconds_of(phases))
        if due or not finite:
            figures |= {
                **phases,
                "grad_norm": float(grad_norm),
                "lr": learning_rate,
                "skipped_rows": self.ledger.rejected,
                "rows_read": self.ledger.rows_read,
                "nonfinite": not finite,
                "peak_memory_gb": peak_memory_gb(self.env.device),
            }
            self._together(lambda: self.log.log(self.step, figures, show=_SHOWN))
        self.log.advance()
        if not finite:
            self._note_nonfinite(results)

    def _is_logged(self, step: int) -> bool:
        """Whether the 1-based step has a line in metrics.jsonl, whatever becomes of it."""
        return step % self.config.run.log_every == 0 or step == self.config.optim.total_steps

    def _run_packs(
        self, scored: Sequence[ScoredRow], sums: dict[str, float], measured: bool
    ) -> list[PackResult]:
        config, objective, model = self.config, self.objective, self.base.model
        packs = plan_packs(
            [row.length for row in scored],
            config.optim.gradient_accumulation_steps,
            config.sample.pack_tokens,
        )
        flow_scale = None
        if objective.flow_weight is not None:
            flow_scale = loss_scale(sums["noised"], self.env, objective.flow_weight)
        step = StepContext(
            self.student,
            self.teacher,
            None if self.teacher is None else self.teacher.head(self.dtype),
            special=self.base.special,
            loss=objective.loss,
            chunk_size=config.loss.loss_chunk_size,
            device=self.env.device,
            decode=self.base.tokenizer.decode,
            scale=loss_scale(sums["scored"], self.env),
            flow_scale=flow_scale,
            contrast=config.teacher.contrast,
            measured=measured,
            # A pack whose students all see all images would run the ViT once, others twice: ranks
            # would wait for each other.
            shares_features=not config.rollout.vt_rehearsal,
        )
        filler = empty_row(
            model.vision.patch_dim,
            with_teacher=self.teacher is not None,
            with_shown=config.teacher.shown != "none",
            latent_dim=model.latent_dim if objective.trains_drawing else None,
        )
        return [
            objective.run_pack([scored[i] for i in packs[n]] if n < len(packs) else [filler], step)
            for n in range(all_reduce_max_int(len(packs), self.env))
        ]

    # ------------------------------------------------------------------------------ reporting

    def _reduce(
        self, results: Sequence[PackResult], scored: Sequence[ScoredRow], measured: bool
    ) -> dict[str, Any]:
        """What a step reports, from its sums over packs, rows and ranks."""
        sums: dict[str, float | Tensor] = {"loss": torch.stack([r.loss for r in results]).sum()}
        for name in results[0].stats:
            sums[name] = torch.stack([r.stats[name] for r in results]).sum()
        sums |= self.objective.counts(scored, results, self.base)
        if measured:
            sums |= attempt(lambda: self.measurement.sums(results, scored))
        found = all_reduce_sums(sums, self.env)
        return {**self.objective.figures(found), **means(found)}

    def _note_nonfinite(self, results: Sequence[PackResult]) -> None:
        """Name the rows of a skipped step; stop after too many in a row."""
        where = nonfinite_rows(results)
        self.log.message(f"step {self.step}: non-finite, update skipped; rows: {where}")
        if self.states.bad_steps >= self.config.optim.max_nonfinite_steps:
            raise self.states.diverged(f" (rows of the last: {where}); lower --lr or check them")
