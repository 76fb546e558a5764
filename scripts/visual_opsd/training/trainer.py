# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The training loop of Visual-OPSD, its noise control and the SFT baseline.

    rows -> rollout (full weights, no collective) -> packs -> teacher, student, loss, backward
         -> clip -> AdamW -> EMA -> metrics, checkpoint

Every random number is keyed by (seed, step, row), so a resumed run, another number of ranks and
another number of workers see the same batches and the same completions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from data.dataset_info import load_dataset_config
from data.parquet import StepLoader, StepRows, StepSampler, make_loader, open_sources
from data.rejects import RejectLedger
from data.sequence import Completion
from data.thinkmorph import OPSD_ROWS, SFT_ROWS, Row, RowNeeds
from modeling.autoencoder import load_autoencoder
from modeling.bagel.bagel import Bagel
from modeling.host.memory import memory_errors
from modeling.release.checkpoint import is_generation_key, iter_weights, locate_weights, save_bagel
from modeling.release.tokenizer import load_tokenizer
from modeling.release.weight_files import FLOAT_DTYPES, open_weights
from scripts.visual_opsd.cli import flat
from scripts.visual_opsd.config import TrainConfig, compute_dtype
from scripts.visual_opsd.on_policy_sampler import Interrupted, sample_completions
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
from scripts.visual_opsd.rows import (
    PrepareOPSD,
    PrepareSFT,
    TrainRow,
    encode_teachers,
    make_builder,
    scoring_limits,
)
from scripts.visual_opsd.runs.folder_lock import hold_folder
from scripts.visual_opsd.runs.stopping import StopRequest, exit_code
from scripts.visual_opsd.scored_rows import ScoredRow, empty_row, score_completion, score_targets
from scripts.visual_opsd.training.checkpoint_folders import NOT_GOOD, check_folders, restart_logs
from scripts.visual_opsd.training.checkpoints import (
    TrainingState,
    check_resumable,
    choose_checkpoint,
    claim_checkpoint_dir,
    load_checkpoint,
    release_folder,
)
from scripts.visual_opsd.training.metrics import (
    MetricLogger,
    PhaseTimer,
    WandbSettings,
    peak_memory_gb,
)
from scripts.visual_opsd.training.run_contents import run_contents
from scripts.visual_opsd.training.samples import RecordedCompletions, write_samples
from scripts.visual_opsd.training.sharding import (
    check_precision,
    check_shards,
    clip_grad_norm,
    copy_shards,
    iter_full_state,
    load_sharded,
    make_mesh,
    materialise,
    shard_model,
    summon_full_params,
)
from scripts.visual_opsd.training.state_keeper import StateKeeper, nonfinite_rows
from scripts.visual_opsd.training.step import (
    PackResult,
    completion_counts,
    learning_rate_factor,
    plan_packs,
    run_pack,
    sampler_gap,
    summarise,
)
from scripts.visual_opsd.training.teacher import Teacher

_SHOWN = {"loss": ".4f", "grad_norm": ".3f", "completion_length": ".1f"}
_FINE, _STOP, _FAILED = 0, 1, 2
# What to do about a lack of memory.
ENCODING = "while images are encoded", "in a new run lower --vae_max_size"
_OFFLOAD = "use more GPUs, or --cpu_offload True and --teacher_cpu_offload True"
_ROLLOUT = "lower --sample_batch_size or, in a new run, --sample_max_new_tokens"
_UPDATE = "lower --pack_tokens, --loss_chunk_size or, in a new run, --max_forward_tokens"
T = TypeVar("T")


class Trainer:
    """Builds everything a run needs, trains, saves.

    Args:
        config: resolved settings. env: this process.
        sft: train on the given text instead of on completions of the student.

    Raises:
        ValueError: anything the user can mend, with cause and fix.
    """

    draws = False  # whether the drawing branch is trained too (interleaved.py)

    def __init__(self, config: TrainConfig, env: DistEnv, *, sft: bool = False) -> None:
        self.config, self.env, self.sft = config, env, sft
        if config.loss.jsd_weight == 0 and config.loss.ce_weight == 0 and not self.draws:
            raise ValueError("jsd_weight and ce_weight are both 0: there is nothing to train on")
        if sft and config.loss.jsd_weight != 0:
            raise ValueError("SFT has no teacher: set jsd_weight to 0")
        self.dtype = compute_dtype(config.model.precision, env.device)
        self.loss = config.loss.build()
        self.settings = config.sample.sampler()
        self.results = Path(config.run.results_dir)
        # Errors in paths, prompts and data come before anything is built or written.
        self.with_teacher = not sft and config.loss.jsd_weight != 0
        self.teacher_latents = self.with_teacher and config.teacher.teacher_vt == "vae+vit"
        path, latents = config.model.model_path, self.draws or self.teacher_latents
        self.model_config, _ = locate_weights(path, visual_gen=latents)
        self.vae = load_autoencoder(path, device=env.device) if latents else None
        self.tokenizer, self.special = load_tokenizer(config.model.model_path)
        if len(self.tokenizer) > self.model_config.llm.vocab_size:
            raise ValueError(
                f"{config.model.model_path}: the tokenizer has {len(self.tokenizer)} tokens, the "
                f"embedding {self.model_config.llm.vocab_size} rows; use the release's own files"
            )
        self.sampler = self._open_data()
        self.prepare = self._prepare()
        self.ledger = RejectLedger(
            self.results / "bad_rows.jsonl" if env.is_main else None,
            max_rate=config.data.max_bad_rate,
        )
        replay = config.run.replay_samples
        self.recorded = RecordedCompletions.read(replay) if replay and not sft else None
        run = config.run
        self.wandb: WandbSettings | None = None
        if run.wandb_project:
            self.wandb = WandbSettings(run.wandb_project, run.wandb_name, run.wandb_offline)
            on_main(env, self.wandb.check)
        # What forbids a start is said before minutes of loading.
        on_main(env, self._hold_folders)
        self.contents = on_main(env, lambda: run_contents(config, self.sampler))
        self.checkpoint = choose_checkpoint(config.run.checkpoints, config.run.resume_specs, env)
        on_main(env, self._check_resume)
        self._build_models()
        self.stop = StopRequest()
        self.step = 0  # completed optimiser steps
        self.states = StateKeeper(config.run, self.state, self._saved_config(), env)
        self._restore()

    # ------------------------------------------------------------------------------- building

    def _open_data(self) -> StepSampler:
        config = self.config
        sources = open_sources(
            load_dataset_config(config.data.dataset_config_file),
            self._needs(),
            config.data.data_root,
        )
        return StepSampler(sources, config.data.data_seed, config.data.global_batch_size)

    def _needs(self) -> RowNeeds:
        return SFT_ROWS if self.sft else OPSD_ROWS

    def _prepare(self) -> Callable[[Row], TrainRow]:
        config = self.config
        builder = make_builder(self.tokenizer, self.model_config, config.prompt)
        limits = scoring_limits(self.model_config, config.sample)
        if self.sft:
            limits = replace(limits, new_positions=0).check_settings(builder)
            return PrepareSFT(builder, config.data.sft_format, limits)
        limits.check_settings(builder, teacher=True)
        noise_seed = config.run.global_seed if config.teacher.noise_vt else None
        return PrepareOPSD(builder, noise_seed, limits, self.teacher_latents)

    def _sharded(
        self,
        *,
        trains: bool,
        dtype: torch.dtype,
        offload: bool,
        visual_gen: bool,
        source: Bagel | None = None,
    ) -> Bagel:
        """A model on meta, sharded, and filled from `source` or the release folder."""
        config = self.config
        with torch.device("meta"):
            model = Bagel(replace(self.model_config, visual_gen=visual_gen))
        if not trains:
            model.requires_grad_(False)
            model.to(dtype)
        elif not self._freeze(model):
            raise ValueError("freeze_llm, freeze_vit and freeze_und leave nothing to train")
        shard_model(
            model,
            self.mesh,
            block_classes=Bagel.block_classes(),
            param_dtype=self.dtype,
            compile_blocks=config.model.compile_blocks,
            cpu_offload=offload,
        )
        if trains and config.model.activation_checkpointing:
            model.set_gradient_checkpointing(True, config.model.checkpointed_layers)
        materialise(model, self.env.device, cpu_offload=offload)
        if source is not None and source.config == model.config:
            copy_shards(model, source)  # the same weights: no need to read them again
        else:
            path = config.model.model_path
            load_sharded(model, iter_weights(path, visual_gen=visual_gen))
            check_shards(model, open_weights(path))
        return model

    def _freeze(self, model: Bagel) -> bool:
        """Apply the freeze flags; True when something still trains."""
        settings = self.config.model
        parts = (
            (settings.freeze_llm, model.language_model),
            (settings.freeze_vit, model.vit_model),
            (settings.freeze_und, model.connector),
        )
        for frozen, part in parts:
            part.requires_grad_(not frozen)
        if not self.draws:  # a teacher of mode self reads latents; nothing trains on them
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(parameter.requires_grad and not is_generation_key(name))
        return not all(frozen for frozen, _ in parts)

    def _build_models(self) -> None:
        config, run = self.config, self.config.run
        self.mesh = make_mesh(self.env, run.sharding_strategy, run.num_shard, run.num_replicate)
        mode = config.teacher.teacher_mode
        self.student = self._sharded(
            trains=True,
            dtype=torch.float32,
            offload=run.cpu_offload,
            visual_gen=self.draws or (self.teacher_latents and mode == "self"),
        )
        self.teacher: Teacher | None = None
        self.ema: Bagel | None = None
        if self.with_teacher:
            model = None
            if mode != "self":
                # A fixed teacher never accumulates small steps, so compute dtype is enough.
                master = torch.float32 if mode == "ema" else self.dtype
                offload = config.teacher.teacher_cpu_offload
                model = self._sharded(
                    trains=False,
                    dtype=master,
                    offload=offload,
                    visual_gen=self.teacher_latents,
                    source=self.student,
                )
            self.ema = model if mode == "ema" else None
            self.teacher = Teacher(mode, model, self.student, config.teacher.ema_decay)
        check_precision(self.student, self.dtype, ema=self.ema)
        self.trainable = [p for p in self.student.parameters() if p.requires_grad]
        optim = config.optim
        self.optimizer = torch.optim.AdamW(
            self.trainable,
            lr=optim.lr,
            betas=(optim.beta1, optim.beta2),
            eps=optim.eps,
            weight_decay=optim.weight_decay,
        )
        self.scheduler = LambdaLR(
            self.optimizer, lambda step: learning_rate_factor(step, self.config)
        )

    @property
    def state(self) -> TrainingState:
        return TrainingState(self.student, self.optimizer, self.scheduler, self.ema)

    def _saved_config(self) -> dict[str, Any]:
        """What is stored with checkpoints and must be the same on a resume."""
        return {"config": {**asdict(self.config), "sft": self.sft}, "contents": self.contents}

    def _extra(self) -> dict[str, Any]:
        """What of a completed step is stored besides tensors."""
        run_id = None if self.wandb is None else self.wandb.run_id
        return {"rejects": self.ledger.state_dict(), "wandb_id": run_id}

    def _hold_folders(self) -> None:
        run = self.config.run
        hold_folder(self.results, "results_dir", take_over=run.take_over)
        hold_folder(run.checkpoints, "checkpoint_dir", take_over=run.take_over)

    def _check_resume(self) -> None:
        check_folders(self.results, self.config.run.checkpoints, self.checkpoint)
        if self.checkpoint is not None:
            check_resumable(self.checkpoint, **self._saved_config())

    def _restore(self) -> None:
        run = self.config.run
        rejects: dict[str, Any] = {"rows_read": 0, "reasons": {}}
        if self.checkpoint is not None:
            resumed = load_checkpoint(  # whose digests were checked when it was chosen
                self.checkpoint, self.state, env=self.env, digests=False, **self._saved_config()
            )
            self.step = resumed.step
            rejects = self.states.resume(resumed)
            if self.wandb is not None:
                self.wandb = self.wandb.continuing(resumed.extra.get("wandb_id"))
        claim_checkpoint_dir(run.checkpoints, self.checkpoint, self.env)
        attempt(lambda: self.ledger.resume(rejects, self.step))
        on_main(self.env, lambda: restart_logs(self.results, self.step, flat(self.config)))

    # ------------------------------------------------------------------------------- training

    def train(self) -> int:
        """Run to `total_steps`; returns the exit code (0, or 128 + the signal that stopped it)."""
        config, run = self.config, self.config.run
        self.timer = PhaseTimer(self.env.device, synchronize=True)
        logger = attempt(
            lambda: MetricLogger(
                self.results / "metrics.jsonl",
                self.env,
                total_steps=config.optim.total_steps,
                start_step=self.step,
                progress=run.progress,
                wandb=self.wandb,
                config=flat(config),
            )
        )
        with self.stop, logger as self.log, closing(iter(self._loader())) as rows:
            self._begin()
            while self.step < config.optim.total_steps:
                if not self._one_step(rows):
                    self.log.message(f"terminated: {self.states.keep()}")
                    return exit_code(all_reduce_max_int(self.stop.number, self.env))
                if self._saves() and not self.states.bad_steps:
                    self.states.save(last=self.step == config.optim.total_steps)
                    self._save_release()
        if self.states.bad_steps:
            raise self.states.diverged(" at the end of the run, so it has no result")
        return 0

    def _saves(self) -> bool:
        """Whether a checkpoint is due after the last completed step."""
        last = self.step == self.config.optim.total_steps
        return last or self.step % self.config.run.save_every == 0

    def _begin(self) -> None:
        """Say where the run starts; write the release folder that a killed run still owes."""
        run = self.config.run
        if self.checkpoint is None:
            if run.resume_specs:
                self.log.message(f"no checkpoint in {run.checkpoints} yet: starting at step 0")
            return
        self.log.message(f"resumed from {self.checkpoint}")
        own = self.checkpoint.resolve().parent == run.checkpoints.resolve()
        good = self._saves() and not (self.checkpoint / NOT_GOOD).exists()
        owed = own and good and not release_folder(run.checkpoints, self.step).exists()
        if agree(owed, self.env):
            self._save_release()

    def _loader(self) -> StepLoader[TrainRow]:
        config = self.config
        return make_loader(
            self.sampler,
            self.prepare,
            rank=self.env.rank,
            world_size=self.env.world_size,
            start_step=self.step,
            total_steps=config.optim.total_steps,
            num_workers=config.data.num_workers,
            prefetch_factor=config.data.prefetch_factor,
            stuck_after_s=config.run.timeout_s,
        )

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
        scored = self._together(lambda: self._score(batch))
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

    def _score(self, batch: StepRows[TrainRow]) -> list[ScoredRow]:
        """Rows with labels: completions of the student's current weights, or the SFT targets."""
        limit = self.config.sample.max_forward_tokens
        rows: Sequence[TrainRow] = batch.values
        if self.teacher_latents:
            assert self.vae is not None
            with self.timer("encode"), memory_errors(*ENCODING):
                rows = encode_teachers(rows, self.vae, self.config.run.global_seed)
        if self.sft:
            return [score_targets(row, limit) for row in rows]
        completions = self._completions(batch)
        self._write_samples(batch, completions)
        return [
            score_completion(row.name, row.student, row.teacher or (), completion, limit)
            for row, completion in zip(rows, completions, strict=True)
        ]

    def _completions(self, batch: StepRows[TrainRow]) -> list[Completion]:
        """One completion for each row, from the student's current weights."""
        if self.recorded is not None:
            return [self.recorded.take(batch.step, item) for item in batch.items]
        doing = f"in the rollout of step {batch.step + 1}"
        with self.timer("sample"), ExitStack() as stack:
            # A collective: the others may wait in it for this rank.
            with memory_errors(f"gathering weights {doing}", _OFFLOAD, FailedAlone):
                plain = stack.enter_context(summon_full_params(self.student))
            assert isinstance(plain, Bagel)
            with memory_errors(doing, _ROLLOUT):
                completions = sample_completions(
                    plain,
                    [row.student for row in batch.values],
                    [item.slot for item in batch.items],
                    tokenizer=self.tokenizer,
                    special=self.special,
                    settings=self.settings,
                    seed=self.config.run.global_seed,
                    step=batch.step,
                    device=self.env.device,
                    should_stop=lambda: bool(self.stop.number),
                )
        self.timer.add_tokens("sample", sum(len(c.ids) for c in completions))
        return completions

    def _record_rejects(self, batch: StepRows[TrainRow], sums: dict[str, float]) -> None:
        rejects = batch.rejects
        if sums["rejects"]:
            rejects = [reject for part in gather_objects(rejects) for reject in part]
        self._together(lambda: self.ledger.record(int(sums["rows_read"]), rejects))

    def _update(self, scored: Sequence[ScoredRow], sums: dict[str, float]) -> None:
        """Packs, gradient, clipping, AdamW, EMA, metrics."""
        with self.timer("train", sum(row.length for row in scored)):
            results = self._run_packs(scored, sums)
            grad_norm = clip_grad_norm(self.trainable, self.config.optim.max_grad_norm)
        figures = self._reduce(results, scored)
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
        last = self.step == self.config.optim.total_steps
        if self.step % self.config.run.log_every == 0 or last or not finite:
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

    def _run_packs(self, scored: Sequence[ScoredRow], sums: dict[str, float]) -> list[PackResult]:
        config = self.config
        packs = plan_packs(
            [row.length for row in scored],
            config.optim.gradient_accumulation_steps,
            config.sample.pack_tokens,
        )
        model = self.model_config
        latent_dim = self.draws * model.latent_patch_size**2 * model.latent_channels
        filler = empty_row(self.teacher is not None, model.vision.patch_dim, latent_dim)
        head = self.teacher.head(self.dtype) if self.teacher is not None else None
        # FSDP2 averages gradients over ranks; the loss is divided by the global token count.
        scale = self.env.world_size / max(sums["scored"], 1.0)
        results = []
        for index in range(all_reduce_max_int(len(packs), self.env)):
            rows = [scored[i] for i in packs[index]] if index < len(packs) else [filler]
            results.append(
                run_pack(
                    self.student, self.teacher, head, rows,
                    special=self.special, loss=self.loss, chunk_size=config.loss.loss_chunk_size,
                    scale=scale, device=self.env.device, decode=self.tokenizer.decode,
                    flow_scale=self._flow_scale(sums),
                )
            )  # fmt: skip
        return results

    def _flow_scale(self, sums: dict[str, float]) -> float | None:
        """Factor on the summed flow-matching loss; None: nothing learns to draw."""
        return None

    # ------------------------------------------------------------------------------ reporting

    def _reduce(self, results: Sequence[PackResult], scored: Sequence[ScoredRow]) -> dict[str, Any]:
        """Sums over packs and ranks, then means over scored rows or completions."""
        sums: dict[str, float | Tensor] = {"loss": torch.stack([r.loss for r in results]).sum()}
        for name in results[0].stats:
            sums[name] = torch.stack([r.stats[name] for r in results]).sum()
        with_completions = not self.sft
        if with_completions:
            sums |= completion_counts(scored, self.special.eos)
            if self.config.loss.jsd_temperature == self.config.sample.sample_temperature:
                sums["gap"], sums["gap_rows"], _ = sampler_gap(results)
        else:
            sums |= {"sequences": len(scored), "truncated": sum(r.truncated for r in scored)}
        return summarise(all_reduce_sums(sums, self.env), self.loss, with_completions)

    def _note_nonfinite(self, results: Sequence[PackResult]) -> None:
        """Name the rows of a skipped step; stop after too many in a row."""
        where = nonfinite_rows(results)
        self.log.message(f"step {self.step}: non-finite, update skipped; rows: {where}")
        if self.states.bad_steps >= self.config.optim.max_nonfinite_steps:
            raise self.states.diverged(f" (rows of the last: {where}); lower --lr or check them")

    def _write_samples(self, batch: StepRows[TrainRow], completions: Sequence[Completion]) -> None:
        if self.env.is_main:
            count = self.config.run.samples_per_step
            pairs = list(zip(batch.items, completions, strict=True))[:count]
            write_samples(self.results / "samples.jsonl", batch.step, pairs, self.tokenizer.decode)

    # --------------------------------------------------------------------------------- saving

    def _save_release(self) -> None:
        """A complete release folder `<checkpoint_dir>/<step>`, which evaluators load."""
        run = self.config.run
        if not run.save_release:
            return
        trained = {name for name, p in self.student.named_parameters() if p.requires_grad}
        stored = open_weights(self.config.model.model_path)
        dtypes = {key: FLOAT_DTYPES[tensor.dtype] for key, tensor in stored.items()}
        tensors = iter_full_state(self.student, trained, dtypes.get)
        attempt(
            lambda: save_bagel(
                tensors,
                release_folder(run.checkpoints, self.step) if self.env.is_main else None,
                base=self.config.model.model_path,
                step=self.step,
                run_config=flat(self.config),
                overwrite=True,
            )
        )
