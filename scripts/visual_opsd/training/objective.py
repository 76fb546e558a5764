# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""What a run trains on. The trainer knows no more of it than stands here.

A new objective is a subclass in a file of its own (visual_opsd.py, text_sft.py, interleaved.py),
handed to `Trainer`. It must say how a row is prepared; labels, losses and figures have defaults.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from data.parquet import StepRows
from data.thinkmorph import Row, RowNeeds
from modeling.autoencoder import AutoEncoder, load_autoencoder
from modeling.bagel.bagel import Bagel
from modeling.bagel.config import BagelConfig, SpecialTokens
from modeling.release.checkpoint import locate_weights
from modeling.release.tokenizer import load_tokenizer
from scripts.visual_opsd.cli import flat
from scripts.visual_opsd.config import RolloutSettings, TeacherSettings, TrainConfig
from scripts.visual_opsd.processes import DistEnv
from scripts.visual_opsd.rows import TrainRow
from scripts.visual_opsd.runs.stopping import StopRequest
from scripts.visual_opsd.scored_rows import ScoredRow, score_targets
from scripts.visual_opsd.training.metrics import PhaseTimer
from scripts.visual_opsd.training.step import PackResult, StepContext, run_pack, summarise

# What is done while pictures become latents, and what to do about a lack of memory then.
ENCODING = "while images are encoded", "in a new run lower --vae_max_size"

# Settings by what they are of: an objective without that has no use for them (`Objective.unused`).
# A validation, which every objective may have, takes the other settings of sampling.
GUARD = ("teacher_guard", "guard_drop")
TEACHER = (*(spec.name for spec in fields(TeacherSettings)), *GUARD)
ROLLOUT = (
    *(spec.name for spec in fields(RolloutSettings)),
    "sample_temperature", "sample_do_sample", "samples_per_step", "replay_samples",
)  # fmt: skip


@dataclass(frozen=True)
class Base:
    """What a run starts from, but for the weights. `vae`: where latents are read or learnt."""

    model: BagelConfig
    tokenizer: Any
    special: SpecialTokens
    vae: AutoEncoder | None

    @classmethod
    def open(cls, path: str, device: torch.device, *, latents: bool) -> Base:
        """Raises ValueError: files of a release folder that are missing or do not fit."""
        model, _ = locate_weights(path, visual_gen=latents)
        vae = load_autoencoder(path, device=device) if latents else None
        tokenizer, special = load_tokenizer(path)
        if len(tokenizer) > model.llm.vocab_size:
            raise ValueError(
                f"{path}: the tokenizer has {len(tokenizer)} tokens, the embedding "
                f"{model.llm.vocab_size} rows; use the release's own files"
            )
        return cls(model, tokenizer, special, vae)


@dataclass(frozen=True)
class Workplace:
    """What labels may be made with."""

    env: DistEnv
    base: Base
    student: Bagel
    timer: PhaseTimer
    stop: StopRequest


class Objective(ABC):
    """Which rows a run reads, what becomes of them, how they are labelled, what is lost on them.

    Attributes:
        needs: columns of the rows.
        teacher: the model that scores the same labels without gradient; None: there is none.
        flow_weight: weight of the flow-matching loss; None: nothing learns to draw.
        samples: whether labels are drawn from the student.
        identity: stored with training states, which a run of another identity does not go on from.
        defaults: of its program, where they are not those of the fields.
    """

    needs: RowNeeds
    teacher: TeacherSettings | None = None
    flow_weight: float | None = None
    samples: bool = False
    defaults: Mapping[str, Any] = {}

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.loss = config.loss.build()
        self.identity: dict[str, Any] = {"objective": type(self).__name__}

    @property
    def teacher_reads_latents(self) -> bool:
        return self.teacher is not None and self.teacher.teacher_vt == "vae+vit"

    @property
    def trains_drawing(self) -> bool:
        return self.flow_weight is not None

    @property
    def unused(self) -> dict[str, Sequence[str]]:
        """Why settings are of no use to it -> their names; `check_used` refuses them."""
        if self.teacher is not None:
            return {}
        why = "this run has no teacher in memory (only Visual-OPSD has one, and not with "
        return {f"{why}--jsd_weight 0)": GUARD}

    @property
    def standard(self) -> dict[str, Any]:
        """Flag -> its program's default."""
        return {**flat(type(self.config)()), **self.defaults}

    def without_effect(self) -> dict[str, list[str]]:
        """Of `unused`, what differs from the program's defaults."""
        given, standard = flat(self.config), self.standard
        found = {
            why: [name for name in names if given[name] != standard[name]]
            for why, names in self.unused.items()
        }
        return {why: names for why, names in found.items() if names}

    @abstractmethod
    def prepare(self, base: Base) -> Callable[[Row], TrainRow]:
        """What the loader's workers make of a row (they pickle it).

        Raises:
            ValueError: settings that leave no room for any row.
        """

    def label(self, batch: StepRows[TrainRow], place: Workplace) -> list[ScoredRow]:
        """This rank's rows of a step with their labels: here their own targets.

        A mistake of the user is a ValueError; the other ranks are told.
        """
        limit = self.config.sample.max_forward_tokens
        return [score_targets(row, limit) for row in batch.values]

    def run_pack(self, rows: Sequence[ScoredRow], step: StepContext) -> PackResult:
        """Forward and backward of one pack, all losses added up."""
        return run_pack(rows, step)

    def record(
        self, scored: Sequence[ScoredRow], results: Sequence[PackResult], place: Workplace
    ) -> None:
        """Write down what else a step leaves behind, before its update; errors as in `label`."""
        return

    def counts(
        self, scored: Sequence[ScoredRow], results: Sequence[PackResult], base: Base
    ) -> dict[str, float]:
        """Sums over this rank's rows of a step, the same names on all ranks."""
        return {"sequences": len(scored), "truncated": sum(row.truncated for row in scored)}

    def figures(self, sums: Mapping[str, float]) -> dict[str, Any]:
        """The sums over all ranks, those of the losses too, as metrics.jsonl has them."""
        return summarise(sums)


def check_used(objective: Objective) -> None:
    """Raises ValueError: settings that the objective has no use for, all of them with the cause."""
    given, found = flat(objective.config), objective.without_effect()
    if not found:
        return
    parts = []
    for why, names in found.items():
        shown = (f"--{n} {'none' if given[n] is None else given[n]}" for n in names)
        parts.append(f"{', '.join(shown)}: {why}")
    several = sum(map(len, found.values())) > 1
    raise ValueError(f"{'; '.join(parts)}: leave {'them' if several else 'it'} out")


def check_weights(**weights: float) -> None:
    """Raises ValueError: there is nothing to train on."""
    if not any(weights.values()):
        raise ValueError(f"{' and '.join(weights)} are both 0: there is nothing to train on")
