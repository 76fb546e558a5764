# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Trainers built in this process on the tiny checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modeling import load_bagel
from scripts.visual_opsd.cli import parse_config
from scripts.visual_opsd.config import (
    INTERLEAVED_DEFAULTS,
    SFT_DEFAULTS,
    SFTConfig,
    TrainConfig,
)
from scripts.visual_opsd.evaluation.validation import make_validation
from scripts.visual_opsd.processes import DistEnv, init_distributed, shutdown
from scripts.visual_opsd.rows import TrainRow
from scripts.visual_opsd.training.interleaved import InterleavedSFT
from scripts.visual_opsd.training.metrics import read_metrics
from scripts.visual_opsd.training.offline import OFFLINE_DEFAULTS, OfflineConfig, VisualOPSDOffline
from scripts.visual_opsd.training.sharding import iter_full_state
from scripts.visual_opsd.training.text_sft import TextSFT
from scripts.visual_opsd.training.trainer import Trainer
from scripts.visual_opsd.training.visual_opsd import VisualOPSD
from tests.data.synthetic import image_cell, truncated_png, write_dataset
from tests.visual_opsd.training_runs import TINY_BAGEL, train_arguments

SFT = {
    TextSFT: SFT_DEFAULTS,
    InterleavedSFT: {**INTERLEAVED_DEFAULTS, "mode": "interleaved"},
}
# Two rows a step and short completions: a step takes a few tens of milliseconds.
SMALL = {
    "total_steps": 1,
    "warmup_steps": 0,
    "global_batch_size": 2,
    "samples_per_step": 2,
    "sample_max_new_tokens": 8,
    "use_system_prompt": False,
    "vit_max_size": 56,
    "save_every": 100,
    "eps": 1e-8,
}


@contextmanager
def one_process() -> Iterator[DistEnv]:
    try:
        yield init_distributed("cpu", 60)
    finally:
        shutdown()


def make_config(
    world: Path, results: Path, objective: type[Any] = VisualOPSD, **changes: Any
) -> Any:
    """What the objective's command would make of these flags."""
    arguments = train_arguments(world, results, **{**SMALL, **changes})
    if objective in SFT:
        return parse_config(SFTConfig, arguments, "", SFT[objective])
    if objective is VisualOPSDOffline:
        return parse_config(OfflineConfig, arguments, "", OFFLINE_DEFAULTS)
    return parse_config(TrainConfig, arguments, "")


def build(
    world: Path, results: Path, env: DistEnv, objective: type[Any] = VisualOPSD,
    validation: Callable[..., Any] = make_validation, **changes: Any,
) -> Trainer:  # fmt: skip
    config = make_config(world, results, objective, **changes)
    validate = None if config.validation.eval_every is None else validation(config, env)
    return Trainer(config, env, objective(config), validate)


def train(world: Path, results: Path, objective: type[Any] = VisualOPSD, **changes: Any) -> Trainer:
    """Build, run to the end, and hand the trainer back for inspection."""
    with one_process() as env:
        trainer = build(world, results, env, objective, **changes)
        assert trainer.train() == 0
    return trainer


def idle_settings(program: Any, *words: str) -> set[str]:
    """What a trainer that is given these words declares to have no use for."""
    objective = program.make_objective(program.read_config(words))
    return {name for names in objective.unused.values() for name in names}


def metrics(results: Path) -> list[dict[str, Any]]:
    return read_metrics(results / "metrics.jsonl")


def samples(results: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (results / "samples.jsonl").read_text().splitlines()]


def rollout(results: Path) -> list[dict[str, Any]]:
    """The samples without what the training forward found of their tokens."""
    found = ("divergence", "student_entropy", "teacher_entropy", "fork")
    return [{k: v for k, v in record.items() if k not in found} for record in samples(results)]


def weights(model: Any) -> dict[str, Tensor]:
    """Whole tensors of a sharded model, copied."""
    return {name: tensor.clone() for name, tensor in iter_full_state(model)}


def base_weights() -> dict[str, Tensor]:
    return dict(load_bagel(TINY_BAGEL).model.state_dict())


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def first_rows(trainer: Trainer, step: int = 0) -> list[TrainRow]:
    """The rows of a step of a trainer in one process, as its loader makes them."""
    size = trainer.config.data.global_batch_size
    rows = []
    for slot in range(size):
        dataset, index = next(trainer.order.candidates(step, slot))
        position = trainer.order.position(step, slot)
        rows.append(trainer.prepare(dataset.read_row(index, position)))
    return rows


def write_damaged(folder: Path, rows: int) -> Path:
    """A data set of which three rows cannot be used, and datasets.yaml; returns the folder."""
    broken: dict[int, dict[str, Any]] = {
        3: {"problem_image_0": image_cell(truncated_png())},
        5: {"reasoning_image_0": image_cell(None)},
        8: {"answer": None},
    }
    write_dataset(folder, rows=rows, change=lambda i: broken.get(i, {}))
    (folder / "datasets.yaml").write_text("datasets:\n  - {name: Jigsaw_Assembly}\n")
    return folder
