# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""What an evaluation asks: its settings, the rows they name, and the context of each."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

from data.limits import NO_LIMITS, PACKED_TOKENS, ContextLimits
from data.packing import context_length
from data.sequence import Context, ContextBuilder
from data.thinkmorph import EVALUATION_ROWS, Row, RowNeeds, Sample, parse_row
from data.tsv import TsvDataset
from data.visual_thoughts import CONTROLS, VT_MEANINGS, show_thoughts
from data.worlds import get_scorer
from scripts.visual_opsd.cli import PACKED, ROUNDS, SEEDS, TOGETHER, TOKENS, Settings, option
from scripts.visual_opsd.config import ComputeSettings, PromptSettings
from scripts.visual_opsd.evaluation import benchmarks
from scripts.visual_opsd.evaluation.benchmark_scoring import Verdict, exact_verdict, world_verdict
from scripts.visual_opsd.evaluation.rows import (
    IDENTITY_COLUMNS,
    RowName,
    RowPool,
    open_data,
    row_name,
)
from scripts.visual_opsd.evaluation.runner import RowSettings
from scripts.visual_opsd.rows import open_builder

Judge = Callable[[str], Verdict]


@dataclass(frozen=True)
class EvaluateSettings(RowSettings):
    """What is evaluated on what."""

    context: str = option(
        "text", "`text`: the student's; `vt`: the teacher's; the others: the teacher's with a "
        f"control in the place of the VTs. {VT_MEANINGS}", choices=("text", "vt", *CONTROLS),
    )  # fmt: skip
    batch_size: int = option(256, "rows decoded together", **TOGETHER)
    prefill_tokens: int = option(
        PACKED_TOKENS, "prompt tokens decoded together at most; a row of more than this and the "
        "default is unusable", **PACKED,
    )  # fmt: skip
    max_new_tokens: int = option(1024, "budget of an answer", **TOKENS)
    image_skips: int = option(
        1, "rounds that may follow an `<image_start>`, as in training", **ROUNDS
    )
    noise_seed: int = option(
        0, "random numbers of `--context noise`, `other` and `shuffled`", **SEEDS
    )
    compare: str | None = option(None, "results of another run on the same rows", path=True)

    @property
    def needs(self) -> RowNeeds:
        """Columns to read; only the teacher's context needs visual thoughts."""
        if self.context == "text":
            return EVALUATION_ROWS
        return RowNeeds(visual_thoughts="required")


@dataclass(frozen=True)
class BenchmarkSettings(Settings):
    """Benchmarks by name, instead of `--data`."""

    benchmark: str | None = option(None, "instead of `--data`: names separated by commas, or all")
    tsv_root: str | None = option(
        None, "folder of the TSV files, else the variable `LMUData`", path=True
    )


@dataclass(frozen=True)
class EvaluateConfig:
    evaluate: EvaluateSettings = field(default_factory=EvaluateSettings)
    benchmark: BenchmarkSettings = field(default_factory=BenchmarkSettings)
    prompt: PromptSettings = field(default_factory=PromptSettings)
    compute: ComputeSettings = field(default_factory=ComputeSettings)


def open_rows(config: EvaluateConfig) -> RowPool:
    """The rows the settings name.

    Raises:
        ValueError: as `open_data` and `open_benchmarks`; benchmarks with a teacher's context.
    """
    settings, named = config.evaluate, config.benchmark
    if named.benchmark is None:
        return RowPool(open_data(settings.data, settings.split, settings.data_root, settings.needs))
    if settings.context != "text":
        raise ValueError(
            f"--context {settings.context}: benchmarks hold no visual thoughts to show; use "
            "--context text"
        )
    return RowPool(benchmarks.open_benchmarks(named.benchmark, named.tsv_root))


def benchmark_files(pool: RowPool) -> list[TsvDataset]:
    """The benchmarks among the datasets."""
    return [dataset for dataset in pool.datasets if isinstance(dataset, TsvDataset)]


@dataclass(frozen=True)
class Question:
    """One row to answer: its context, and what judges the answer.

    `benchmark`: further fields of its line, for a row of a benchmark. `seconds`: reading, decoding
    and resizing took.
    """

    name: RowName
    question: str
    answer: str
    context: Context
    judge: Judge
    benchmark: Mapping[str, str] | None = None
    seconds: float = 0.0

    @property
    def length(self) -> int:
        return context_length(self.context)


@dataclass(frozen=True)
class PrepareQuestion:
    """Row -> the context the model answers from."""

    builder: ContextBuilder
    settings: EvaluateSettings
    rules: Mapping[str, benchmarks.Benchmark] = field(default_factory=dict)
    limits: ContextLimits = NO_LIMITS

    @classmethod
    def of(cls, config: EvaluateConfig, pool: RowPool) -> PrepareQuestion:
        """Raises ValueError: no answer, or no row, can fit the model's positions."""
        settings = config.evaluate
        builder, model = open_builder(settings.model_path, config.prompt)
        limits = ContextLimits(
            model.llm.max_position_embeddings,
            settings.max_new_tokens,
            tokens=max(settings.prefill_tokens, PACKED_TOKENS),
            flag="prefill_tokens",
        ).check_settings(builder, teacher=settings.context != "text")
        rules = {d.name: benchmarks.find_benchmark(d) for d in benchmark_files(pool)}
        return cls(builder, settings, rules, limits)

    def __call__(self, row: Row) -> Question:
        started = time.perf_counter()
        made = self._benchmark(row) if row.dataset in self.rules else self._sample(row)
        self.limits.check(row, made.context)
        return replace(made, seconds=time.perf_counter() - started)

    def _benchmark(self, row: Row) -> Question:
        line = benchmarks.parse_row(self.rules[row.dataset], row)
        return Question(
            row_name(row, line.index, benchmarks.TSV_IDENTITY),
            line.question,
            line.answer,
            benchmarks.build_context(self.builder, line.parts),
            line.judge,
            {"group": line.group, "category": line.category},
        )

    def _sample(self, row: Row) -> Question:
        sample = parse_row(row, self.settings.needs)
        context = self.builder.student(sample)
        if (kind := self.settings.context) != "text":
            kind = "real" if kind == "vt" else kind
            shown = show_thoughts(kind, row, sample, self.settings.noise_seed)
            context = self.builder.teacher(sample, context, shown)
        name = row_name(row, sample.pid, IDENTITY_COLUMNS)
        return Question(name, sample.question, sample.answer, context, judge_of(sample))


def judge_of(sample: Sample) -> Judge:
    """What judges a text that answers a sample: its world's scorer, else exact match."""
    if sample.world is None:
        return partial(exact_verdict, answer=sample.answer)
    scorer = get_scorer(sample.world)
    return partial(world_verdict, scorer=scorer, state=sample.world_state)
