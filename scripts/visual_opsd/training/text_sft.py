# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The SFT baseline: cross-entropy on the text-only trace, then the answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from data.limits import ContextLimits
from data.sequence import ContextBuilder
from data.thinkmorph import SFT_ROWS, Row, parse_row
from scripts.visual_opsd.config import SFT_DEFAULTS, TrainConfig
from scripts.visual_opsd.rows import TrainRow, given_positions, make_builder, scoring_limits
from scripts.visual_opsd.training.objective import (
    ROLLOUT,
    TEACHER,
    Base,
    Objective,
    check_weights,
)

# What no SFT has a use for. `--jsd_temperature` also softens the entropy that is logged, and that
# `--token_weight entropy` weighs by.
NOT_SFT: dict[str, Sequence[str]] = {
    "SFT has no teacher": (
        *TEACHER, "use_reference_intro", "use_transition_prompt", "jsd_weight", "jsd_beta",
        "jsd_top_k", "jsd_token_clip", "jsd_clip_scope", "jsd_tail_bucket", "jsd_loss_kind",
    ),
    "SFT draws no completions": (*ROLLOUT, "leak_words"),
}  # fmt: skip


@dataclass(frozen=True)
class PrepareSFT:
    """Row -> student context and the scored target text; "too_long" beyond the limits."""

    builder: ContextBuilder
    form: str
    limits: ContextLimits

    def __call__(self, row: Row) -> TrainRow:
        sample = parse_row(row, SFT_ROWS)
        student = self.builder.student(sample)
        targets = self.builder.sft_targets(sample, self.form)
        head = (*student, *targets[:-1])
        new = given_positions(targets[-1].ids, head, self.limits)
        self.limits.check(row, head, new_positions=new)
        return TrainRow.of(row, sample, student, targets=targets)


class TextSFT(Objective):
    """Trains on the given text: no teacher, no rollout.

    Raises:
        ValueError: no cross-entropy.
    """

    needs = SFT_ROWS
    defaults = SFT_DEFAULTS

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        self.identity = {"sft": True}
        check_weights(jsd_weight=config.loss.jsd_weight, ce_weight=config.loss.ce_weight)

    @property
    def unused(self) -> dict[str, Sequence[str]]:
        return {**NOT_SFT, "only --mode interleaved draws": ("mse_weight", "timestep_shift")}

    def prepare(self, base: Base) -> PrepareSFT:
        builder = make_builder(base.tokenizer, base.model, self.config.prompt)
        limits = replace(scoring_limits(base.model, self.config.sample), new_positions=0)
        return PrepareSFT(builder, self.config.data.sft_format, limits.check_settings(builder))
