# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Interleaved SFT: thoughts and drawings are learnt together, as the released base was made.

    row -> pixels (loader's workers) -> latents, flow times, noise (this process) -> packs
        -> ce_weight * CE / CE rows + mse_weight * MSE / noised rows, both counted over all ranks

A row's random numbers (encoder noise, flow time, noise of the flow) belong to (seed, position),
so ranks, packs and resumed runs see the same targets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data.limits import ContextLimits
from data.parquet import StepRows
from data.randomness import row_generator
from data.sequence import ContextBuilder
from data.thinkmorph import INTERLEAVED_ROWS, Row, parse_row
from modeling.host.memory import memory_errors
from scripts.visual_opsd.config import INTERLEAVED_DEFAULTS, SFTConfig
from scripts.visual_opsd.rows import TrainRow, encode_pictures, make_builder
from scripts.visual_opsd.scored_rows import ScoredRow
from scripts.visual_opsd.training.objective import (
    ENCODING,
    Base,
    Objective,
    Workplace,
    check_weights,
)
from scripts.visual_opsd.training.text_sft import NOT_SFT


@dataclass(frozen=True)
class PrepareInterleaved:
    """Row -> the whole interleaved sequence (as `student`), its pictures still in pixels.

    Rejected: "thoughts_do_not_fit" (not one thought more than drawings), and "too_long" beyond
    the limits, because a sequence that ends in a picture or an answer cannot be cut.
    """

    builder: ContextBuilder
    limits: ContextLimits

    def __call__(self, row: Row) -> TrainRow:
        sample = parse_row(row, INTERLEAVED_ROWS)
        images, thoughts = len(sample.thought_images), len(sample.thoughts)
        if thoughts != images + 1:
            raise row.bad(
                "thoughts_do_not_fit",
                f"{images} visual thoughts need {images + 1} thoughts around them, not {thoughts}",
            )
        context = self.builder.interleaved(sample)
        self.limits.check(row, context)
        return TrainRow.of(row, sample, context)


class InterleavedSFT(Objective):
    """Trains the drawing branch too: other rows, the frozen autoencoder, a second loss.

    Raises:
        ValueError: neither cross-entropy nor flow matching.
    """

    needs = INTERLEAVED_ROWS
    defaults = INTERLEAVED_DEFAULTS
    flow_weight: float

    def __init__(self, config: SFTConfig) -> None:
        super().__init__(config)
        self.identity = {"sft": True}
        self.flow_weight = config.flow.mse_weight
        self.time_shift = config.flow.timestep_shift
        check_weights(ce_weight=config.loss.ce_weight, mse_weight=self.flow_weight)

    @property
    def unused(self) -> dict[str, Sequence[str]]:
        return {**NOT_SFT, "only --mode text learns a text trace": ("sft_format",)}

    def prepare(self, base: Base) -> PrepareInterleaved:
        builder = make_builder(base.tokenizer, base.model, self.config.prompt)
        limits = ContextLimits(
            base.model.llm.max_position_embeddings,
            tokens=self.config.sample.max_forward_tokens,
        )
        return PrepareInterleaved(builder, limits.check_settings(builder))

    def label(self, batch: StepRows[TrainRow], place: Workplace) -> list[ScoredRow]:
        """The rows with latents in the place of pixels."""
        assert place.base.vae is not None
        seed, shift = self.config.run.global_seed, self.time_shift
        scored = []
        with place.timer("encode"), memory_errors(*ENCODING):
            for row in batch.values:
                generator = row_generator("interleaved", seed, row.position)
                context = encode_pictures(row.student, place.base.vae, generator, time_shift=shift)
                scored.append(ScoredRow(row.name, context, None))
        return scored

    def figures(self, sums: Mapping[str, float]) -> dict[str, Any]:
        figures = super().figures(sums)
        figures["loss"] += self.flow_weight * figures["mse"]
        return figures
