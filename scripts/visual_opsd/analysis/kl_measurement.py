# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The diagnostic's settings, its rows, and the measurement of a pack: same tokens, a teacher with
the VTs and one for each control."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.answer_tags import answer_mask
from data.limits import NO_LIMITS, ContextLimits
from data.packing import context_length, group_by_tokens, pack
from data.randomness import diagnostic_permutation, row_generator
from data.sequence import Completion, Context, ContextBuilder
from data.thinkmorph import Need, Row, RowNeeds, parse_row
from data.visual_thoughts import CONTROLS, VT_MEANINGS, show_thoughts
from modeling import BagelBundle
from modeling.autoencoder import AutoEncoder
from modeling.bagel.bagel import Bagel
from modeling.bagel.batch import PackedBatch
from scripts.visual_opsd.analysis.kl_statistics import (
    SampleDivergences,
    columns_of,
)
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
from scripts.visual_opsd.scored_rows import check_same_labels, score_completion


@dataclass(frozen=True)
class DiagnosticSettings(Settings):
    """What is compared with what, on which rows."""

    model_path: str = option("models/ThinkMorph-7B", "the student", path=True)
    base_path: str | None = option(
        None, "teacher and reference student; otherwise `--model_path`", path=True
    )
    baseline: str | None = option(None, "results of the base's own diagnostic", path=True)
    dataset_config_file: str = option("data/configs/opsd.yaml", "data sets and weights", path=True)
    data: str | None = option(
        None, "instead: names, folders or files, separated by commas", path="list"
    )
    split: str = option("train", "with `--data`: which files")
    data_root: str | None = option(
        None, "folder of the data sets, else `VISUAL_OPSD_DATA_ROOT`", path=True
    )
    num_samples: int = option(1000, "rows, drawn at random", **ROWS)
    completions: str = option(
        "student", "tokens to compare on: samples of the base as `student`, or the data set's "
        "text `trace`", choices=("student", "trace"),
    )  # fmt: skip
    teacher_vt: str = option(
        "vit", "what the teacher reads of a VT: `vit`, its ViT image; `vae+vit`, its latents "
        "before that, as a released model reads what it drew. `kl_diagnostic.json` names it "
        "(`teacher_vt`); completions do not depend on it, so two runs compare both on the same "
        "tokens", choices=TEACHER_VTS,
    )  # fmt: skip
    controls: str = option(
        "noise", "teachers with a control in the place of the VTs, by commas, each two columns "
        f"more; `noise` is always among them. {VT_MEANINGS}",
    )  # fmt: skip
    seed: int = option(42, "choice of rows, sampling, controls", **SEEDS)
    go_threshold: float = option(0.05, "nats on the answer", at_least=0, at_most=1000)
    output_dir: str = option("results/visual_opsd_kl_diagnostic", "where the results go", path=True)
    overwrite: bool = option(False, "replace the results it holds, which is refused otherwise")
    figures: bool = option(True, "draw the two figures")
    heatmap_samples: int = option(3, "completions in the token heat map", at_least=1, at_most=100)
    max_bad_rate: float = option(
        0.01, "share of unusable rows beyond which the run fails", **SHARES
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.baseline and Path(self.baseline).resolve() == Path(self.output_dir).resolve():
            raise ValueError(f"--output_dir {self.output_dir} is the --baseline, which other "
                             "runs need: choose another")  # fmt: skip
        unknown = sorted(self._wished - {"", *CONTROLS})
        if unknown:
            raise ValueError(f"unknown controls {', '.join(unknown)}: choose from "
                             f"{', '.join(CONTROLS)}")  # fmt: skip
        if "none" in self._wished and self.with_latents:
            raise ValueError(
                "--controls none shows no picture whose latents --teacher_vt vae+vit could read: "
                "leave one out"
            )

    @property
    def _wished(self) -> set[str]:
        return {kind.strip() for kind in self.controls.split(",")}

    @property
    def chosen(self) -> tuple[str, ...]:
        """The controls, in the order of `CONTROLS`."""
        return tuple(kind for kind in CONTROLS if kind == "noise" or kind in self._wished)

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


def choose_rows(sizes: Sequence[int], weights: Sequence[float], count: int, seed: int) -> list[int]:
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
    """One row: the contexts of the student, the teacher and, by its name, the teacher that sees
    each control; the dataset's trace if that is the completion."""

    name: RowName
    student: Context
    teacher: Context
    controls: Mapping[str, Context]
    trace: tuple[int, ...] | None

    @property
    def length(self) -> int:
        return context_length(self.teacher)


@dataclass(frozen=True)
class PrepareDiagnostic:
    """Row -> contexts of the student, the teacher and the teachers that see controls."""

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
        latents = self.settings.with_latents
        teacher = self.builder.teacher(sample, student, with_latents=latents)
        trace, new = None, None
        if self.settings.completions == "trace":
            trace = self.builder.sft_targets(sample)[0].ids
            new = given_positions(trace, teacher, self.limits)
        self.limits.check(row, teacher, new_positions=new)
        return DiagnosticRow(
            row_name(row, sample.pid, THOUGHT_IDENTITY_COLUMNS),
            student,
            teacher,
            {
                kind: self.builder.teacher(
                    sample,
                    student,
                    show_thoughts(kind, row, sample, self.settings.seed),
                    with_latents=latents,
                )
                for kind in self.settings.chosen
            },
            trace,
        )


def encode_row(row: DiagnosticRow, vae: AutoEncoder, seed: int, index: int) -> DiagnosticRow:
    """The row, the pictures of all teachers' contexts encoded."""
    arms = {"teacher": row.teacher, **{f"{kind} teacher": c for kind, c in row.controls.items()}}
    teacher, *controls = (
        encode_pictures(context, vae, row_generator(arm, seed, index))
        for arm, context in arms.items()
    )
    return replace(row, teacher=teacher, controls=dict(zip(row.controls, controls, strict=True)))


@dataclass(frozen=True)
class Scored:
    """A row's contexts, its completion (cut where the longest did not fit) appended to each.

    length: packed tokens of the longest.
    """

    index: int
    name: RowName
    completion: Completion
    student: Context
    teacher: Context
    controls: Mapping[str, Context]
    length: int


def attach(
    index: int, row: DiagnosticRow, completion: Completion, max_forward_tokens: int
) -> Scored:
    """Append a completion to the row's contexts. Raises ValueError as `score_completion`."""
    name = f"{row.name.dataset}/{row.name.pid}"
    pair = score_completion(name, row.student, row.teacher, completion, max_forward_tokens)
    cut, teacher = pair.completion, pair.teacher
    assert cut is not None and teacher is not None
    controls = {kind: (*context, cut.segment()) for kind, context in row.controls.items()}
    return Scored(index, row.name, cut, pair.student, teacher, controls, pair.length)


# ---------------------------------------------------------------------------------- measuring


@torch.no_grad()
def measure(
    teacher: BagelBundle,
    students: Sequence[Bagel],
    scored: Sequence[Scored],
    *,
    pack_tokens: int,
    device: torch.device,
) -> list[list[SampleDivergences]]:
    """Divergences of each student from the teacher with real VTs and from those with controls.

    Returns:
        for each student, its figures of every sample, in order.
    """
    kinds = list(scored[0].controls) if scored else []
    nothing = dict.fromkeys(columns_of(kinds), np.zeros(0, dtype=np.float32))
    found = [[nothing] * len(scored) for _ in students]
    # A completion capped before its first whole token has nothing to score.
    order = [i for i, s in enumerate(scored) if s.completion.count]
    order.sort(key=lambda i: scored[i].length)
    for group in group_by_tokens([scored[i].length for i in order], pack_tokens):
        numbers = [order[i] for i in group]
        columns = _measure_pack(teacher, students, [scored[i] for i in numbers], device)
        for into, samples in zip(found, columns, strict=True):
            for number, sample in zip(numbers, samples, strict=True):
                into[number] = sample
    decode = teacher.tokenizer.decode
    masks = [answer_mask(s.completion.ids, s.completion.scored, decode) for s in scored]
    return [
        [SampleDivergences(*sample) for sample in zip(columns, masks, strict=True)]
        for columns in found
    ]


def _measure_pack(
    teacher: BagelBundle,
    students: Sequence[Bagel],
    scored: Sequence[Scored],
    device: torch.device,
) -> list[list[dict[str, np.ndarray]]]:
    """Of samples that are packed together: for each student, the columns of every sample."""
    kinds = list(scored[0].controls)
    text, *shown = (
        pack(contexts, teacher.special_tokens)
        for contexts in (
            [s.student for s in scored],
            [s.teacher for s in scored],
            *([s.controls[kind] for s in scored] for kind in kinds),
        )
    )
    names = [f"{s.name.dataset}/{s.name.pid}" for s in scored]
    for other in shown:
        check_same_labels(text, other, names, teacher.tokenizer.decode)
    teachers = [_score(teacher.model, batch, device) for batch in shown]
    order = columns_of(kinds)
    found = []
    for student in students:
        own = _score(student, text, device)
        with_real, *with_controls = (chunked_divergences(*own, *seen) for seen in teachers)
        columns = {
            "kl_real": with_real["kl"],
            "jsd_real": with_real["jsd"],
            "student_entropy": with_real["student_entropy"],
            "teacher_entropy": with_real["teacher_entropy"],
        }
        for kind, figures in zip(kinds, with_controls, strict=True):
            columns |= {f"{name}_{kind}": figures[name] for name in ("kl", "jsd")}
        values = torch.stack([columns[name].float() for name in order]).cpu()  # (columns, S)
        parts = values.split(list(text.score_counts), dim=1)
        found.append([dict(zip(order, part.numpy(), strict=True)) for part in parts])
    return found


def _score(model: Bagel, batch: PackedBatch, device: torch.device) -> tuple[Tensor, Tensor]:
    """Hidden states of the scored tokens (S, H) and the head weight (V, H)."""
    return model(batch.to(device), head=lambda hidden, weight: (hidden, weight))
