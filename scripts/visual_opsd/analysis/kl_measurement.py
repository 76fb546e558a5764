# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The diagnostic's settings, its rows, and the measurement of a pack: same tokens, two teachers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.limits import NO_LIMITS, ContextLimits
from data.packing import context_length, group_by_tokens, pack
from data.randomness import diagnostic_permutation, noise_generator, row_generator
from data.sequence import Completion, Context, ContextBuilder
from data.thinkmorph import Need, Row, RowNeeds, parse_row
from modeling import BagelBundle
from modeling.autoencoder import AutoEncoder
from modeling.bagel.bagel import Bagel
from modeling.bagel.batch import PackedBatch
from scripts.visual_opsd.analysis.kl_statistics import COLUMNS, SampleDivergences, answer_mask
from scripts.visual_opsd.cli import ROWS, SEEDS, SHARES, Settings, option
from scripts.visual_opsd.config import TEACHER_VTS, ComputeSettings, PromptSettings, SampleSettings
from scripts.visual_opsd.evaluation.rows import THOUGHT_IDENTITY_COLUMNS, RowName, row_name
from scripts.visual_opsd.loss.chunked import chunked_divergences
from scripts.visual_opsd.rows import (
    encode_pictures,
    given_positions,
    open_builder,
    scoring_limits,
)
from scripts.visual_opsd.scored_rows import ScoredRow, check_same_labels, score_completion


@dataclass(frozen=True)
class DiagnosticSettings(Settings):
    """What is compared with what, on which rows."""

    model_path: str = option("models/ThinkMorph-7B", "student: release folder", path=True)
    base_path: str | None = option(
        None, "teacher and reference student; default: model_path", path=True
    )
    baseline: str | None = option(
        None, "output folder of the base's own diagnostic, whose completions are reused",
        path=True,
    )  # fmt: skip
    dataset_config_file: str = option(
        "data/configs/opsd.yaml", "datasets and their weights", path=True
    )
    data: str | None = option(
        None, "instead: datasets below the data root, folders or parquet files, by commas",
        path="list",
    )  # fmt: skip
    split: str = option("train", "with --data: files of a folder that are read")
    data_root: str | None = option(
        None, "folder of the datasets, else VISUAL_OPSD_DATA_ROOT", path=True
    )
    num_samples: int = option(1000, "rows to measure, drawn at random", **ROWS)
    completions: str = option(
        "student", "student: the base's own samples; trace: the dataset's text traces",
        choices=("student", "trace"),
    )  # fmt: skip
    teacher_vt: str = option(
        "vit", "what the teacher reads of a visual thought; vae+vit: as at inference",
        choices=TEACHER_VTS,
    )  # fmt: skip
    seed: int = option(42, "choice of rows, sampling and noise", **SEEDS)
    go_threshold: float = option(
        0.05, "GO needs an answer-span KL above this, in nats", at_least=0, at_most=1000
    )
    output_dir: str = option(
        "results/visual_opsd_kl_diagnostic", "tables, figures, completions", path=True
    )
    overwrite: bool = option(False, "replace the results that output_dir holds")
    figures: bool = option(True, "draw kl_distribution.png and token_heatmap.png")
    heatmap_samples: int = option(
        3, "completions in the token heat map", at_least=1, at_most=100
    )
    max_bad_rate: float = option(
        0.01, "share of unusable rows beyond which the run fails", **SHARES
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.baseline and Path(self.baseline).resolve() == Path(self.output_dir).resolve():
            raise ValueError(f"--output_dir {self.output_dir} is the --baseline, which other "
                             "runs need: choose another")  # fmt: skip

    @property
    def base(self) -> str:
        return self.base_path or self.model_path

    @property
    def with_latents(self) -> bool:
        """Whether the teacher reads the VTs' latents too."""
        return self.teacher_vt == "vae+vit"

    @property
    def needs(self) -> RowNeeds:
        """Columns to read."""
        trace: Need = "required" if self.completions == "trace" else "unused"
        return RowNeeds(visual_thoughts="required", text_trace=trace)


@dataclass(frozen=True)
class DiagnosticConfig:
    diagnostic: DiagnosticSettings = field(default_factory=DiagnosticSettings)
    prompt: PromptSettings = field(default_factory=PromptSettings)
    sample: SampleSettings = field(default_factory=SampleSettings)
    compute: ComputeSettings = field(default_factory=ComputeSettings)


# ---------------------------------------------------------------------------------- rows


def choose_rows(
    sizes: Sequence[int], weights: Sequence[float], count: int, seed: int
) -> list[int]:
    """Indices (ascending, over all datasets) of `count` rows, or of all if there are fewer.

    Datasets share the count by weight (Sainte-Lague's rule); rows of each are drawn at random.
    """
    taken = [0] * len(sizes)
    for _ in range(min(count, sum(sizes))):
        open_sets = (i for i, size in enumerate(sizes) if taken[i] < size)
        taken[min(open_sets, key=lambda i: ((taken[i] + 0.5) / weights[i], i))] += 1
    chosen: list[int] = []
    start = 0
    for number, (size, share) in enumerate(zip(sizes, taken, strict=True)):
        rows = diagnostic_permutation(seed, number, size)[:share]
        chosen += [start + int(row) for row in np.sort(rows)]
        start += size
    return chosen


@dataclass(frozen=True)
class DiagnosticRow:
    """One row: the three contexts, and the dataset's trace if that is the completion."""

    name: RowName
    question: str
    answer: str
    student: Context
    teacher: Context
    noise: Context
    trace: tuple[int, ...] | None

    @property
    def length(self) -> int:
        return context_length(self.teacher)


@dataclass(frozen=True)
class PrepareDiagnostic:
    """Row -> contexts of the student, the teacher and the teacher that sees noise."""

    builder: ContextBuilder
    settings: DiagnosticSettings
    limits: ContextLimits = NO_LIMITS

    @classmethod
    def of(cls, config: DiagnosticConfig) -> PrepareDiagnostic:
        """Raises ValueError: no row can fit the base's positions or max_forward_tokens."""
        settings = config.diagnostic
        builder, model = open_builder(
            settings.base, config.prompt, visual_gen=settings.with_latents
        )
        limits = scoring_limits(model, config.sample)
        if settings.completions == "trace":
            limits = replace(limits, new_positions=0)
        return cls(builder, settings, limits.check_settings(builder, teacher=True))

    def __call__(self, row: Row) -> DiagnosticRow:
        sample = parse_row(row, self.settings.needs)
        student = self.builder.student(sample)
        noise = noise_generator(self.settings.seed, row.position)
        latents = self.settings.with_latents
        teacher = self.builder.teacher(sample, student, with_latents=latents)
        trace, new = None, None
        if self.settings.completions == "trace":
            trace = self.builder.sft_targets(sample)[0].ids
            new = given_positions(trace, teacher, self.limits)
        self.limits.check(row, teacher, new_positions=new)
        return DiagnosticRow(
            row_name(row, sample.pid, THOUGHT_IDENTITY_COLUMNS),
            sample.question,
            sample.answer,
            student,
            teacher,
            self.builder.teacher(sample, student, noise, with_latents=latents),
            trace,
        )


def encode_row(row: DiagnosticRow, vae: AutoEncoder, seed: int, index: int) -> DiagnosticRow:
    """The row, the pictures of both teachers' contexts encoded."""
    teacher, noise = (
        encode_pictures(context, vae, row_generator(arm, seed, index))
        for arm, context in (("teacher", row.teacher), ("noise teacher", row.noise))
    )
    return replace(row, teacher=teacher, noise=noise)


@dataclass(frozen=True)
class Scored:
    """A row with its completion appended to every context (cut where the longest did not fit)."""

    index: int
    row: DiagnosticRow
    pair: ScoredRow
    noise: Context

    @property
    def completion(self) -> Completion:
        assert self.pair.completion is not None
        return self.pair.completion

    @property
    def teacher(self) -> Context:
        assert self.pair.teacher is not None
        return self.pair.teacher


def attach(
    index: int, row: DiagnosticRow, completion: Completion, max_forward_tokens: int
) -> Scored:
    """Append a completion to the row's contexts. Raises ValueError as `score_completion`."""
    name = f"{row.name.dataset}/{row.name.pid}"
    pair = score_completion(name, row.student, row.teacher, completion, max_forward_tokens)
    assert pair.completion is not None
    return Scored(index, row, pair, (*row.noise, pair.completion.segment()))


# ---------------------------------------------------------------------------------- measuring


def _score(model: Bagel, batch: PackedBatch, device: torch.device) -> tuple[Tensor, Tensor]:
    """Hidden states of the scored rows (S, H) and the head weight (V, H)."""
    return model(batch.to(device), head=lambda hidden, weight: (hidden, weight))


@torch.no_grad()
def measure(
    teacher: BagelBundle,
    students: Sequence[Bagel],
    scored: Sequence[Scored],
    *,
    pack_tokens: int,
    device: torch.device,
) -> list[list[SampleDivergences]]:
    """Divergences of each student from the teacher with real VTs and with noise.

    Returns:
        for each student, its figures of every sample, in order.
    """
    decode = teacher.tokenizer.decode
    found: list[dict[int, dict[str, np.ndarray]]] = [{} for _ in students]
    # A completion capped before its first whole token has nothing to score.
    order = [i for i, s in enumerate(scored) if s.completion.count]
    order.sort(key=lambda i: scored[i].pair.length)
    for group in group_by_tokens([scored[i].pair.length for i in order], pack_tokens):
        numbers = [order[i] for i in group]
        chosen = [scored[i] for i in numbers]
        packs = [
            pack(contexts, teacher.special_tokens)
            for contexts in (
                [s.pair.student for s in chosen],
                [s.teacher for s in chosen],
                [s.noise for s in chosen],
            )
        ]
        for other in packs[1:]:
            check_same_labels(packs[0], other, [s.pair.name for s in chosen], decode)
        real, noise = (_score(teacher.model, batch, device) for batch in packs[1:])
        counts = list(packs[0].score_counts)
        for student, into in zip(students, found, strict=True):
            own = _score(student, packs[0], device)
            with_real = chunked_divergences(*own, *real)
            with_noise = chunked_divergences(*own, *noise)
            columns = {
                "kl_real": with_real["kl"],
                "jsd_real": with_real["jsd"],
                "kl_noise": with_noise["kl"],
                "jsd_noise": with_noise["jsd"],
                "student_entropy": with_real["student_entropy"],
                "teacher_entropy": with_real["teacher_entropy"],
            }
            rows = torch.stack([columns[name].float() for name in COLUMNS]).cpu()  # (6, S)
            for number, part in zip(numbers, rows.split(counts, dim=1), strict=True):
                into[number] = dict(zip(COLUMNS, part.numpy(), strict=True))
    nothing = {name: np.zeros(0, dtype=np.float32) for name in COLUMNS}
    masks = [answer_mask(s.completion.ids, s.completion.scored, decode) for s in scored]
    return [
        [SampleDivergences(into.get(i, nothing), mask) for i, mask in enumerate(masks)]
        for into in found
    ]
