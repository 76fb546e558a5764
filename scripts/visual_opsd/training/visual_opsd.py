# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The paper's objective, and its controls: completions of the student, scored by a teacher that has
seen the visual thoughts (VTs), or what a control shows in their place."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from data.limits import NO_LIMITS, ContextLimits
from data.parquet import StepRows
from data.randomness import row_generator
from data.sequence import Completion, ContextBuilder
from data.thinkmorph import OPSD_ROWS, Row, parse_row
from data.visual_thoughts import show_thoughts
from modeling.autoencoder import AutoEncoder
from modeling.bagel.bagel import Bagel
from modeling.host.memory import memory_errors
from scripts.visual_opsd.config import TrainConfig
from scripts.visual_opsd.on_policy_sampler import sample_completions
from scripts.visual_opsd.processes import FailedAlone
from scripts.visual_opsd.rows import (
    TrainRow,
    encode_pictures,
    make_builder,
    scoring_limits,
)
from scripts.visual_opsd.scored_rows import ScoredRow, score_completion
from scripts.visual_opsd.training.objective import (
    ENCODING,
    Base,
    Objective,
    Workplace,
    check_weights,
)
from scripts.visual_opsd.training.samples import RecordedCompletions, write_samples
from scripts.visual_opsd.training.sharding import OFFLOAD_ADVICE, summon_full_params
from scripts.visual_opsd.training.step import PackResult, completion_counts, sampler_gap

_ADVICE = "lower --sample_batch_size or, in a new run, --sample_max_new_tokens"


@dataclass(frozen=True)
class PrepareOPSD:
    """Row -> student and teacher context.

    vt: what the teacher sees in the place of the VTs (`data.visual_thoughts`), by `seed`. A row
    whose contexts with the real ones do not fit the limits is rejected as "too_long", so that all
    kinds train on the same rows. contrast_with: what the control context shows; None: there is
    none.
    with_latents: the teacher also reads the VTs' latents (still pixels here).
    """

    builder: ContextBuilder
    vt: str = "real"
    seed: int = 0
    limits: ContextLimits = NO_LIMITS
    with_latents: bool = False
    contrast_with: str | None = None

    def __call__(self, row: Row) -> TrainRow:
        sample = parse_row(row, OPSD_ROWS)
        student = self.builder.student(sample)
        shown = show_thoughts(self.vt, row, sample, self.seed)
        teacher = self.builder.teacher(sample, student, shown, with_latents=self.with_latents)
        longest = teacher if shown.images else self.builder.teacher(sample, student)
        self.limits.check(row, longest)
        control = None
        if self.contrast_with is not None:
            other = show_thoughts(self.contrast_with, row, sample, self.seed)
            control = self.builder.teacher(sample, student, other, with_latents=self.with_latents)
        return TrainRow.of(row, sample, student, teacher=teacher, control=control)


def encode_teachers(rows: Sequence[TrainRow], vae: AutoEncoder, seed: int) -> list[TrainRow]:
    """The rows, the pictures of their teachers' contexts encoded."""
    encoded = []
    for row in rows:
        assert row.teacher is not None
        generator = row_generator("teacher", seed, row.position)
        row = replace(row, teacher=encode_pictures(row.teacher, vae, generator))
        if row.control is not None:
            generator = row_generator("control teacher", seed, row.position)
            row = replace(row, control=encode_pictures(row.control, vae, generator))
        encoded.append(row)
    return encoded


class VisualOPSD(Objective):
    """Trains on completions of the student's current weights, or on recorded ones.

    Raises:
        ValueError: neither divergence nor cross-entropy, or no recorded completions.
    """

    needs = OPSD_ROWS

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        self.identity = {"sft": False}
        check_weights(jsd_weight=config.loss.jsd_weight, ce_weight=config.loss.ce_weight)
        self.teacher = config.teacher if config.loss.jsd_weight else None
        self.settings = config.sample.sampler()
        replay = config.run.replay_samples
        self.recorded = RecordedCompletions.read(replay) if replay else None
        self.samples = self.recorded is None

    def prepare(self, base: Base) -> PrepareOPSD:
        config = self.config
        builder = make_builder(base.tokenizer, base.model, config.prompt)
        limits = scoring_limits(base.model, config.sample).check_settings(builder, teacher=True)
        shown, seed = config.teacher.shown, config.run.global_seed
        contrast_with = config.teacher.contrast_with if config.teacher.contrast else None
        return PrepareOPSD(builder, shown, seed, limits, self.teacher_reads_latents, contrast_with)

    def label(self, batch: StepRows[TrainRow], place: Workplace) -> list[ScoredRow]:
        """The rows with completions of the student, which are also written to samples.jsonl."""
        rows: Sequence[TrainRow] = batch.values
        seed, limit = self.config.run.global_seed, self.config.sample.max_forward_tokens
        if self.teacher_reads_latents:
            assert place.base.vae is not None
            with place.timer("encode"), memory_errors(*ENCODING):
                rows = encode_teachers(rows, place.base.vae, seed)
        if self.recorded is None:
            completions = self.roll_out(batch, place)
        else:
            completions = [self.recorded.take(batch.step, item) for item in batch.items]
        if place.env.is_main:
            path = Path(self.config.run.results_dir) / "samples.jsonl"
            pairs = list(zip(batch.items, completions, strict=True))
            shown = pairs[: self.config.run.samples_per_step]
            write_samples(path, batch.step, shown, place.base.tokenizer.decode)
        scored = []
        for row, completion in zip(rows, completions, strict=True):
            assert row.teacher is not None  # as `PrepareOPSD` makes them
            contexts = row.student, row.teacher
            scored.append(score_completion(row.name, *contexts, completion, limit, row.control))
        return scored

    def roll_out(self, batch: StepRows[TrainRow], place: Workplace) -> list[Completion]:
        """One completion for each row, from the student's current weights; called by all ranks."""
        doing = f"in the rollout of step {batch.step + 1}"
        with place.timer("sample"), ExitStack() as stack:
            # A collective: the others may wait in it for this rank.
            with memory_errors(f"gathering weights {doing}", OFFLOAD_ADVICE, FailedAlone):
                plain = stack.enter_context(summon_full_params(place.student))
            assert isinstance(plain, Bagel)
            with memory_errors(doing, _ADVICE):
                completions = sample_completions(
                    plain,
                    [row.student for row in batch.values],
                    [item.slot for item in batch.items],
                    tokenizer=place.base.tokenizer,
                    special=place.base.special,
                    settings=self.settings,
                    seed=self.config.run.global_seed,
                    step=batch.step,
                    device=place.env.device,
                    should_stop=lambda: bool(place.stop.number),
                )
        place.timer.add_tokens("sample", sum(len(c.ids) for c in completions))
        return completions

    def counts(
        self, scored: Sequence[ScoredRow], results: Sequence[PackResult], base: Base
    ) -> dict[str, float]:
        sums = super().counts(scored, results, base)
        sums |= completion_counts(scored, base.special.eos)
        if self.config.loss.jsd_temperature == self.config.sample.sample_temperature:
            sums["gap"], sums["gap_rows"] = sampler_gap(results)
        return sums
