# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The paper's objective, and its controls: completions of the student, scored by a teacher that has
seen the visual thoughts (VTs), or what a control shows in their place."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from data.limits import NO_LIMITS, ContextLimits
from data.parquet import SlotItem, StepRows
from data.randomness import off_policy_uniform, rehearsal_uniform, row_generator
from data.sequence import Completion, ContextBuilder, given_completion
from data.thinkmorph import OPSD_ROWS, Row, parse_row
from data.visual_thoughts import show_thoughts
from modeling.autoencoder import AutoEncoder
from modeling.bagel.bagel import Bagel
from modeling.host.memory import memory_errors
from scripts.visual_opsd.config import TrainConfig
from scripts.visual_opsd.on_policy_sampler import MEMORY_ADVICE, sample_completions
from scripts.visual_opsd.processes import FailedAlone
from scripts.visual_opsd.rows import (
    TrainRow,
    encode_pictures,
    make_builder,
    scoring_limits,
)
from scripts.visual_opsd.scored_rows import ScoredRow, score_completion
from scripts.visual_opsd.training.figures import figures_of_rows
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

_TRACED_ROWS = replace(OPSD_ROWS, text_trace="required")


@dataclass(frozen=True)
class PrepareOPSD:
    """Row -> student and teacher context.

    vt: what the teacher sees in the place of the VTs (`data.visual_thoughts`), by `seed`. A row
    whose contexts with the real ones do not fit the limits is rejected as "too_long", so that all
    kinds train on the same rows. contrast_with: what the control context shows; None: there is
    none.
    with_latents: the teacher also reads the VTs' latents (still pixels here). with_trace: the row
    must have a text trace, which becomes its target.
    """

    builder: ContextBuilder
    vt: str = "real"
    seed: int = 0
    limits: ContextLimits = NO_LIMITS
    with_latents: bool = False
    contrast_with: str | None = None
    with_trace: bool = False

    def __call__(self, row: Row) -> TrainRow:
        sample = parse_row(row, _TRACED_ROWS if self.with_trace else OPSD_ROWS)
        student = self.builder.student(sample)
        shown = show_thoughts(self.vt, row, sample, self.seed)
        teacher = self.builder.teacher(sample, student, shown, with_latents=self.with_latents)
        longest = teacher if shown.images else self.builder.teacher(sample, student)
        self.limits.check(row, longest)
        control = None
        if self.contrast_with is not None:
            other = show_thoughts(self.contrast_with, row, sample, self.seed)
            control = self.builder.teacher(sample, student, other, with_latents=self.with_latents)
        targets = self.builder.sft_targets(sample) if self.with_trace else ()
        return TrainRow.of(row, sample, student, teacher=teacher, control=control, targets=targets)


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
        self.rollout = config.rollout
        if self.rollout.off_policy_share:
            self.needs = _TRACED_ROWS
        replay = config.run.replay_samples
        self.recorded = RecordedCompletions.read(replay) if replay else None
        self.samples = self.recorded is None
        skipped, budget = config.loss.skip_first_tokens, config.sample.sample_max_new_tokens
        if self.samples and skipped >= budget:
            raise ValueError(
                f"--skip_first_tokens {skipped} leaves nothing of completions of at most {budget} "
                "tokens (--sample_max_new_tokens), so the run would learn nothing: lower it"
            )
        # Of the step under way: its number from 0, and the completions that samples.jsonl shows.
        self.step = 0
        self.shown: list[tuple[SlotItem[TrainRow], int, Completion]] = []

    @property
    def unused(self) -> dict[str, Sequence[str]]:
        return {**super().unused, "it is the form of SFT's targets (train_sft)": ("sft_format",)}

    def prepare(self, base: Base) -> PrepareOPSD:
        config = self.config
        builder = make_builder(base.tokenizer, base.model, config.prompt)
        limits = scoring_limits(base.model, config.sample).check_settings(builder, teacher=True)
        shown, seed = config.teacher.shown, config.run.global_seed
        latents, traced = self.teacher_reads_latents, self.rollout.off_policy_share > 0
        contrast_with = config.teacher.contrast_with if config.teacher.contrast else None
        return PrepareOPSD(builder, shown, seed, limits, latents, contrast_with, traced)

    def label(self, batch: StepRows[TrainRow], place: Workplace) -> list[ScoredRow]:
        """The rows with their completions; a row that has several is scored as so many rows."""
        batch = self.rehearse(batch)
        rows: Sequence[TrainRow] = batch.values
        seed, limit = self.config.run.global_seed, self.config.sample.max_forward_tokens
        if self.teacher_reads_latents:
            assert place.base.vae is not None
            with place.timer("encode"), memory_errors(*ENCODING):
                rows = encode_teachers(rows, place.base.vae, seed)
        taken = self.complete(batch, place)
        pairs = zip(batch.items, taken, strict=True)
        all_of_them = ((item, n, c) for item, found in pairs for n, c in enumerate(found))
        self.shown = list(islice(all_of_them, self.config.run.samples_per_step))
        self.step = batch.step
        scored = []
        for row, completions in zip(rows, taken, strict=True):
            teacher = row.teacher
            assert teacher is not None  # as `PrepareOPSD` makes them
            for completion in completions:
                made = score_completion(
                    row.name, row.student, teacher, completion, limit, row.control
                )
                scored.append(replace(made, rehearsed=row.rehearsed))
        return scored

    def record(
        self, scored: Sequence[ScoredRow], results: Sequence[PackResult], place: Workplace
    ) -> None:
        """The first completions of rank 0, whole, to samples.jsonl, with their tokens' figures."""
        if not place.env.is_main:
            return
        path = Path(self.config.run.results_dir) / "samples.jsonl"
        found = {id(row): figures for row, figures in figures_of_rows(results)}
        figures = [found.get(id(row), {}) for row in scored[: len(self.shown)]]
        write_samples(path, self.step, self.shown, place.base.tokenizer.decode, figures)

    def rehearse(self, batch: StepRows[TrainRow]) -> StepRows[TrainRow]:
        """The rows, in a share of which the student sees what the teacher sees."""
        share, seed = self.rollout.vt_rehearsal, self.config.run.global_seed
        if not share:
            return batch
        items = []
        for item in batch.items:
            row = item.value
            if rehearsal_uniform(seed, batch.step, item.slot) < share:
                assert row.teacher is not None  # as `PrepareOPSD` makes them
                row = replace(row, student=row.teacher, rehearsed=True)
            items.append(replace(item, value=row))
        return replace(batch, items=tuple(items))

    def complete(self, batch: StepRows[TrainRow], place: Workplace) -> list[list[Completion]]:
        """The completions of each row: the student's or recorded ones, or its text trace alone.

        Called by all ranks.
        """
        each, share = self.rollout.completions_per_row, self.rollout.off_policy_share
        seed, step = self.config.run.global_seed, batch.step
        given = {
            item.slot: self.trace_of(item.value)
            for item in batch.items
            if share and off_policy_uniform(seed, step, item.slot) < share
        }
        others = replace(batch, items=tuple(i for i in batch.items if i.slot not in given))
        if share == 1:
            drawn = []  # no weights are gathered
        elif self.recorded is None:
            drawn = self.roll_out(others, place)
        else:
            places = [(item, n) for item in others.items for n in range(each)]
            drawn = [self.recorded.take(step, item, n) for item, n in places]
        turns = iter(drawn)
        return [
            [given[item.slot]] if item.slot in given else list(islice(turns, each))
            for item in batch.items
        ]

    def trace_of(self, row: TrainRow) -> Completion:
        """The row's text trace and answer as its completion, cut where the budget ends one."""
        (target,) = row.targets
        trace = replace(given_completion(target.ids), given=True)
        most = max(1, self.settings.max_new_tokens - 1)
        if len(trace.ids) <= most:
            return trace
        return replace(trace.truncated(most), capped=True)

    def roll_out(self, batch: StepRows[TrainRow], place: Workplace) -> list[Completion]:
        """Each row's completions, one row after the other, from the student's current weights.

        Called by all ranks.
        """
        each = self.rollout.completions_per_row
        doing = f"in the rollout of step {batch.step + 1}"
        with place.timer("sample"), ExitStack() as stack:
            # A collective: the others may wait in it for this rank.
            with memory_errors(f"gathering weights {doing}", OFFLOAD_ADVICE, FailedAlone):
                plain = stack.enter_context(summon_full_params(place.student))
            assert isinstance(plain, Bagel)
            with memory_errors(doing, MEMORY_ADVICE):
                completions = sample_completions(
                    plain,
                    [row.student for row in batch.values for _ in range(each)],
                    [item.slot for item in batch.items for _ in range(each)],
                    tokenizer=place.base.tokenizer,
                    special=place.base.special,
                    settings=self.settings,
                    seed=self.config.run.global_seed,
                    step=batch.step,
                    numbers=list(range(each)) * len(batch.items),
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
        if self.rollout.off_policy_share:
            sums["off_policy"] = sum(row.completion.given for row in scored if row.completion)
        if self.rollout.vt_rehearsal:
            sums["rehearsed"] = sum(row.rehearsed for row in scored)
        if self.config.loss.jsd_temperature == self.config.sample.sample_temperature:
            sums["gap"], sums["gap_rows"] = sampler_gap(results)
        return sums
