# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Runs of a few steps whose every number `step_oracle` computes again, and what they leave behind.

Nothing of a recipe is the program's default, so that a setting which does not arrive is seen.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.parquet import StepRows
from data.sequence import Completion
from scripts.visual_opsd.processes import DistEnv, gather_objects
from scripts.visual_opsd.rows import TrainRow
from scripts.visual_opsd.scored_rows import ScoredRow
from scripts.visual_opsd.training.interleaved import InterleavedSFT
from scripts.visual_opsd.training.objective import Workplace
from scripts.visual_opsd.training.sharding import full_tensor, load_sharded
from scripts.visual_opsd.training.text_sft import TextSFT
from scripts.visual_opsd.training.trainer import Trainer
from scripts.visual_opsd.training.visual_opsd import PrepareOPSD, VisualOPSD
from tests.visual_opsd.training.trainers import SMALL, build, first_rows, metrics, weights

OBJECTIVES = {"opsd": VisualOPSD, "sft": TextSFT, "interleaved": InterleavedSFT}
HEAD = "language_model.lm_head.weight"


@dataclass(frozen=True)
class Recipe:
    """What a run is told, by the names of its flags; and the kind of run it is.

    other_head: the teacher's head is changed before the first step, and nothing else of it.
    skipped: 0-based step that is said to be non-finite.
    """

    kind: str = "opsd"
    other_head: bool = False
    skipped: int | None = None
    teacher_mode: str = "ema"
    teacher_vt: str = "vit"
    ema_decay: float = 0.6
    noise_vt: bool = False
    contrast: float = 0.0
    contrast_with: str = "none"
    sample_temperature: float = 0.8
    jsd_weight: float = 0.7
    jsd_beta: float = 0.3
    jsd_temperature: float = 1.5
    jsd_top_k: int = 7
    jsd_token_clip: float | None = 0.02
    jsd_clip_scope: str = "entry"
    jsd_tail_bucket: bool = False
    jsd_loss_kind: str = "jsd"
    ce_weight: float = 0.2
    token_weight: str = "none"
    skip_first_tokens: int = 0
    completions_per_row: int = 1
    off_policy_share: float = 0.0
    sft_format: str = "reference"
    mse_weight: float = 0.6
    timestep_shift: float = 2.0
    lr: float = 4e-3
    min_lr: float = 1e-3
    lr_scheduler: str = "cosine"
    warmup_steps: int = 1
    total_steps: int = 3
    beta1: float = 0.7
    beta2: float = 0.8
    eps: float = 1e-4
    weight_decay: float = 0.3
    max_grad_norm: float = 0.02
    freeze_vit: bool = False
    gradient_accumulation_steps: int = 1
    global_batch_size: int = 3
    global_seed: int = 77

    @property
    def draws(self) -> bool:
        return self.kind == "interleaved"

    @property
    def samples(self) -> bool:
        return self.kind == "opsd"

    @property
    def with_teacher(self) -> bool:
        return self.samples and self.jsd_weight > 0

    @property
    def reads_latents(self) -> bool:
        return self.draws or self.teacher_vt == "vae+vit"

    def flags(self) -> dict[str, Any]:
        said = asdict(self)
        for name in ("kind", "other_head", "skipped"):
            del said[name]
        if self.samples:
            del said["mse_weight"], said["timestep_shift"]
        else:
            said["jsd_weight"] = 0
            said["mode"] = "interleaved" if self.draws else "text"
        if self.reads_latents:
            said |= {"vae_max_size": 64, "vae_min_size": 16}
        return {**SMALL, "sample_max_new_tokens": 6, "samples_per_step": 9, **said}


CASES = {
    "ema, a clip of each entry": Recipe(total_steps=4, max_grad_norm=0.01, global_seed=78),
    "fixed, tail bucket, another head": Recipe(
        teacher_mode="fixed", other_head=True, jsd_tail_bucket=True, gradient_accumulation_steps=3
    ),
    "self, whole vocabulary, constant rate": Recipe(
        teacher_mode="self", jsd_top_k=0, jsd_token_clip=None, ce_weight=0.0, jsd_beta=0.0,
        lr_scheduler="constant", warmup_steps=2,
    ),
    "noise, a clip of each token, a step skipped": Recipe(
        noise_vt=True, jsd_clip_scope="token", jsd_token_clip=0.4, freeze_vit=True, skipped=1
    ),
    "latents and noise, reverse KL": Recipe(
        teacher_vt="vae+vit", noise_vt=True, jsd_beta=1.0, jsd_token_clip=None
    ),
    "contrast": Recipe(contrast=0.6, jsd_temperature=1.0, max_grad_norm=0.01),
    "tinker, another head": Recipe(jsd_loss_kind="tinker", other_head=True),
    "the paper's loss": Recipe(
        max_grad_norm=0.01, global_seed=78,
        sample_temperature=1.0, jsd_weight=1.0, jsd_beta=0.5, jsd_temperature=1.0, jsd_top_k=256,
        jsd_token_clip=0.05, ce_weight=0.0, gradient_accumulation_steps=2,
    ),
    "tokens weighed by entropy, two completions, some given": Recipe(
        token_weight="entropy", skip_first_tokens=1, completions_per_row=2, off_policy_share=0.4,
        jsd_temperature=0.8,
    ),
    # A lead may be tiny, and is then magnified with its rounding, so later steps part.
    "tokens weighed by the teacher's lead": Recipe(
        token_weight="teacher_ahead", skip_first_tokens=1, other_head=True, teacher_mode="fixed",
        total_steps=1, warmup_steps=0, lr_scheduler="constant",
    ),
    # Hotter: likely tokens only would leave a gradient of a size with its rounding.
    "cross-entropy on own samples": Recipe(
        jsd_weight=0.0, sample_temperature=1.2, jsd_temperature=1.2
    ),
    "SFT": Recipe(kind="sft", gradient_accumulation_steps=3),
    "SFT on early tokens": Recipe(kind="sft", token_weight="early:5", skip_first_tokens=2),
    "interleaved SFT": Recipe(kind="interleaved", gradient_accumulation_steps=3),
}  # fmt: skip
# name: recipe, and how two ranks share the model.
TWO_RANKS: dict[str, tuple[Recipe, dict[str, Any]]] = {
    "ema, sharded": (CASES["ema, a clip of each entry"], {"sharding_strategy": "FULL_SHARD"}),
    "fixed, replicated, one row": (
        replace(CASES["fixed, tail bucket, another head"], global_batch_size=1, contrast=0.5),
        {"num_replicate": 2},
    ),
    "tokens weighed, two completions, some given": (
        CASES["tokens weighed by entropy, two completions, some given"],
        {"sharding_strategy": "FULL_SHARD"},
    ),
    "interleaved SFT": (CASES["interleaved SFT"], {}),
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """What a run did, on all ranks: by step and slot, and at its end.

    rows: those that the steps should take, once for each completion; with noise, still with their
    visual thoughts. taken: the row's name and its completion (None for SFT), each step's in order
    of the slots.
    end: whole tensors: student/, teacher/, exp_avg/, exp_avg_sq/ and a parameter's name.
    """

    rows: list[list[TrainRow]]
    taken: list[list[tuple[str, Completion | None]]]
    end: dict[str, Tensor]
    lines: list[dict[str, Any]]


def make_trainer(
    world: Path, results: Path, env: DistEnv, recipe: Recipe, **changes: Any
) -> Trainer:
    trainer = build(world, results, env, OBJECTIVES[recipe.kind], **recipe.flags(), **changes)
    if recipe.other_head:
        assert trainer.teacher is not None and trainer.teacher.model is not None
        model = trainer.teacher.model
        whole = weights(model)
        load_sharded(model, {**whole, HEAD: other_head(whole[HEAD])}.items())
    return trainer


def other_head(weight: Tensor) -> Tensor:
    """The head of a teacher that is the student in everything else."""
    return weight + 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))


def run_case(world: Path, results: Path, env: DistEnv, recipe: Recipe, **changes: Any) -> Run:
    """Train to the end; what it returns is whole on rank 0."""
    trainer: Any = make_trainer(world, results, env, recipe, **changes)
    seen: list[list[tuple[int, str, Completion | None]]] = []
    label = trainer.objective.label

    def watched(batch: StepRows[TrainRow], place: Workplace) -> list[ScoredRow]:
        rows = label(batch, place)
        left = iter(rows)
        found = []
        for item in batch.items:
            first = next(left)
            given = first.completion is not None and first.completion.given
            more = 0 if given else recipe.completions_per_row - 1
            found += [(item.slot, r.name, r.completion) for r in (first, *islice(left, more))]
        assert next(left, None) is None
        seen.append(found)
        return rows

    reduce = trainer._reduce

    def reduced(*args: Any) -> dict[str, Any]:
        figures = reduce(*args)
        return figures | {"loss": math.nan} if trainer.step == recipe.skipped else figures

    trainer.objective.label, trainer._reduce = watched, reduced
    assert trainer.train() == 0
    end = dict(final_state(trainer))
    if isinstance(trainer.prepare, PrepareOPSD):
        trainer.prepare = replace(trainer.prepare, vt="real")
    taken, rows = [], []
    for step, parts in enumerate(zip(*gather_objects(seen), strict=True)):
        labelled = sorted((row for part in parts for row in part), key=lambda row: row[0])
        assert {slot for slot, _, _ in labelled} == set(range(recipe.global_batch_size))
        taken.append([(name, completion) for _, name, completion in labelled])
        of_step = first_rows(trainer, step)
        rows.append([of_step[slot] for slot, _, _ in labelled])
    return Run(rows, taken, end, metrics(results))


def final_state(trainer: Trainer) -> Iterator[tuple[str, Tensor]]:
    """Whole tensors of everything that is learnt or averaged; a collective."""
    models = {"student": trainer.student, "teacher": trainer.teacher and trainer.teacher.model}
    for prefix, model in models.items():
        if model is not None:
            yield from ((f"{prefix}/{k}", v) for k, v in weights(model).items())
    for name, parameter in trainer.student.named_parameters():
        state = trainer.optimizer.state.get(parameter, {})
        for moment in ("exp_avg", "exp_avg_sq"):
            if moment in state:
                yield f"{moment}/{name}", full_tensor(state[moment]).clone()
