# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Interleaved SFT: thoughts and drawings are learnt together, as the released base was made.

    row -> pixels (loader's workers) -> latents, flow times, noise (this process) -> packs
        -> ce_weight * CE / CE rows + mse_weight * MSE / noised rows, both counted over all ranks

A row's random numbers (encoder noise, flow time, noise of the flow) belong to (seed, position),
so ranks, packs and resumed runs see the same targets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from data.limits import ContextLimits
from data.parquet import StepRows
from data.randomness import row_generator
from data.sequence import ContextBuilder
from data.thinkmorph import INTERLEAVED_ROWS, Row, RowNeeds, parse_row
from modeling.host.memory import memory_errors
from scripts.visual_opsd.config import SFTConfig
from scripts.visual_opsd.processes import DistEnv
from scripts.visual_opsd.rows import TrainRow, encode_pictures, make_builder
from scripts.visual_opsd.scored_rows import ScoredRow
from scripts.visual_opsd.training.step import PackResult
from scripts.visual_opsd.training.trainer import ENCODING, Trainer


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
        name = f"{sample.dataset}/{sample.pid}"
        return TrainRow(name, row.position, sample.question, sample.answer, context)


class InterleavedTrainer(Trainer):
    """The trainer with the drawing branch: other rows, the frozen autoencoder, a second loss.

    Raises:
        ValueError: as `Trainer`; also a base without generation weights or autoencoder.
    """

    draws = True
    config: SFTConfig

    def __init__(self, config: SFTConfig, env: DistEnv) -> None:
        if config.loss.ce_weight == 0 and config.flow.mse_weight == 0:
            raise ValueError("ce_weight and mse_weight are both 0: there is nothing to train on")
        super().__init__(config, env, sft=True)

    def _needs(self) -> RowNeeds:
        return INTERLEAVED_ROWS

    def _prepare(self) -> Callable[[Row], TrainRow]:
        builder = make_builder(self.tokenizer, self.model_config, self.config.prompt)
        limits = ContextLimits(
            self.model_config.llm.max_position_embeddings,
            tokens=self.config.sample.max_forward_tokens,
        )
        return PrepareInterleaved(builder, limits.check_settings(builder))

    def _score(self, batch: StepRows[TrainRow]) -> list[ScoredRow]:
        """The rows with latents in the place of pixels."""
        assert self.vae is not None
        seed, shift = self.config.run.global_seed, self.config.flow.timestep_shift
        scored = []
        with self.timer("encode"), memory_errors(*ENCODING):
            for row in batch.values:
                generator = row_generator("interleaved", seed, row.position)
                context = encode_pictures(row.student, self.vae, generator, time_shift=shift)
                scored.append(ScoredRow(row.name, context, None))
        return scored

    def _flow_scale(self, sums: dict[str, float]) -> float:
        # FSDP2 averages gradients over ranks; the loss is divided by the global row count.
        return self.config.flow.mse_weight * self.env.world_size / max(sums["noised"], 1.0)

    def _reduce(self, results: Sequence[PackResult], scored: Sequence[ScoredRow]) -> dict[str, Any]:
        figures = super()._reduce(results, scored)
        figures["loss"] += self.config.flow.mse_weight * figures["mse"]
        return figures
