# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The settings of `collect_traces`, and its rows."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from data.limits import NO_LIMITS, ContextLimits
from data.packing import context_length
from data.sequence import Context, ContextBuilder
from data.teacher_cache import row_key
from data.thinkmorph import Need, Row, RowNeeds, parse_row
from modeling.bagel.config import BagelConfig
from scripts.visual_opsd.cli import ROWS, SEEDS, SHARES, TOGETHER, Settings, option
from scripts.visual_opsd.config import (
    TEACHER_VTS,
    ComputeSettings,
    PromptSettings,
    SampleSettings,
)
from scripts.visual_opsd.evaluation.rows import RowName
from scripts.visual_opsd.rows import given_positions, open_builder, scoring_limits

COMPLETIONS = ("trace", "base")


@dataclass(frozen=True)
class CollectSettings(Settings):
    """Whose word is kept, on which completions of which rows."""

    model_path: str = option(
        "models/ThinkMorph-7B", "release folder: teacher with the visual thoughts in view, and the "
        "base that offline training starts from", path=True,
    )  # fmt: skip
    dataset_config_file: str = option(
        "data/configs/opsd.yaml", "data sets; all rows of each are collected, whatever its weight "
        "and row budget", path=True,
    )  # fmt: skip
    data_root: str | None = option(
        None, "folder of the data sets, else `VISUAL_OPSD_DATA_ROOT`", path=True
    )
    limit: int | None = option(None, "only the first rows of each data set", **ROWS)
    completions: str = option(
        "trace", "`trace`: the data set's text-only thought, then the answer in `<answer>` tags; "
        "`base`: samples of the model itself, from text and problem image", choices=COMPLETIONS,
    )  # fmt: skip
    completions_per_row: int = option(1, "with `base`: samples of a row", **TOGETHER)
    top_k: int = option(
        256, "the teacher's most probable entries that are kept of a token, 6 bytes each",
        at_least=1, at_most=2**24,
    )  # fmt: skip
    teacher_vt: str = option(
        "vit", "what the teacher reads of a VT: `vit`, its ViT image; `vae+vit`, its latents "
        "before that", choices=TEACHER_VTS,
    )  # fmt: skip
    seed: int = option(42, "sampling", **SEEDS)
    output_dir: str = option(
        "results/teacher-cache", "where the cache goes; held by one run at a time", path=True
    )
    overwrite: bool = option(False, "throw away a cache of other settings")
    max_bad_rate: float = option(
        0.01, "share of unusable rows beyond which the run fails", **SHARES
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.completions == "trace" and self.completions_per_row > 1:
            raise ValueError(
                f"--completions_per_row {self.completions_per_row}: a row has one trace; draw "
                "samples with --completions base"
            )

    @property
    def with_latents(self) -> bool:
        return self.teacher_vt == "vae+vit"

    @property
    def needs(self) -> RowNeeds:
        trace: Need = "required" if self.completions == "trace" else "unused"
        return RowNeeds(visual_thoughts="required", text_trace=trace)


@dataclass(frozen=True)
class CollectConfig:
    collect: CollectSettings = field(default_factory=CollectSettings)
    prompt: PromptSettings = field(default_factory=PromptSettings)
    sample: SampleSettings = field(default_factory=SampleSettings)
    compute: ComputeSettings = field(default_factory=ComputeSettings)


# ---------------------------------------------------------------------------------- rows


@dataclass(frozen=True)
class TraceRow:
    """One row: both contexts, and its text trace if that is the completion."""

    name: RowName
    student: Context
    teacher: Context
    trace: tuple[int, ...] | None

    @property
    def length(self) -> int:
        return context_length(self.teacher)


@dataclass(frozen=True)
class PrepareTraces:
    """Row -> contexts of student and teacher; "too_long" beyond the limits."""

    builder: ContextBuilder
    settings: CollectSettings
    limits: ContextLimits = NO_LIMITS

    @classmethod
    def of(cls, config: CollectConfig) -> tuple[PrepareTraces, BagelConfig]:
        """Raises ValueError: no row can fit the base's positions or max_forward_tokens."""
        settings = config.collect
        builder, model = open_builder(
            settings.model_path, config.prompt, visual_gen=settings.with_latents
        )
        limits = scoring_limits(model, config.sample)
        if settings.completions == "trace":
            limits = replace(limits, new_positions=0)
        return cls(builder, settings, limits.check_settings(builder, teacher=True)), model

    def __call__(self, row: Row) -> TraceRow:
        sample = parse_row(row, self.settings.needs)
        student = self.builder.student(sample)
        teacher = self.builder.teacher(sample, student, with_latents=self.settings.with_latents)
        trace, new = None, None
        if self.settings.completions == "trace":
            trace = self.builder.sft_targets(sample)[0].ids
            new = given_positions(trace, teacher, self.limits)
        self.limits.check(row, teacher, new_positions=new)
        name = RowName(row.dataset, Path(row.file).name, row.row, sample.pid, row_key(row))
        return TraceRow(name, student, teacher, trace)
