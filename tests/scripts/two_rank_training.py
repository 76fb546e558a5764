# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Under torchrun with two processes: runs that test_trainer.py compares with one process.

two_rank_training.py WORLD OUT
"""

from __future__ import annotations

import math
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from data.thinkmorph import Row
from scripts.visual_opsd.processes import (
    DistEnv,
    gather_objects,
    init_distributed,
    leave,
    shutdown,
)
from scripts.visual_opsd.teacher import Teacher
from tests.scripts.trainers import build, metrics, weights


def same_batches(world: Path, out: Path, env: DistEnv) -> None:
    """Four rows over two ranks, and one row: a rank that only takes part."""
    for size in (4, 1):
        trainer = build(
            world, out / f"two-{size}", env, total_steps=2, global_batch_size=size,
            samples_per_step=size,
        )  # fmt: skip
        assert trainer.train() == 0
        student = weights(trainer.student)  # a collective
        if env.is_main:
            torch.save(student, out / f"two-{size}.pt")


def images_are_lent(world: Path, out: Path, env: DistEnv) -> None:
    """The teacher's ViT outputs serve the student while one rank only takes part: same losses."""
    plain = Teacher.lends
    for name, options in (("self", {"teacher_mode": "self"}), ("frozen", {"freeze_vit": True})):
        found = []
        for lends in (False, True):
            Teacher.lends = lambda *_, lends=lends: lends  # type: ignore[method-assign]
            results = out / f"{name}-{lends}"
            trainer = build(
                world, results, env, total_steps=2, global_batch_size=1, samples_per_step=1,
                **options,
            )  # fmt: skip
            assert trainer.train() == 0
            if env.is_main:
                found.append([(line["loss"], line["grad_norm"]) for line in metrics(results)])
        if env.is_main:
            for one, other in zip(*map(chain.from_iterable, found), strict=True):
                assert math.isclose(one, other, rel_tol=1e-4), found
    Teacher.lends = plain  # type: ignore[method-assign]


def one_rank_fails(world: Path, out: Path, env: DistEnv) -> None:
    """A mistake that only rank 1's rows show: both ranks raise, nobody waits for the other."""
    trainer: Any = build(world, out / "fails", env, global_batch_size=2)
    prepare = trainer.prepare

    def fail(row: Row) -> Any:
        if env.rank == 1:
            raise ValueError("a picture that does not fit")
        return prepare(row)

    trainer.prepare = fail
    message = "nothing was raised"
    try:
        trainer.train()
    except ValueError as error:
        message = str(error)
    messages = gather_objects(message)
    assert messages == ["rank 1: a picture that does not fit", "a picture that does not fit"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    environment = init_distributed("cpu", 60)
    try:
        same_batches(Path(sys.argv[1]), Path(sys.argv[2]), environment)
        images_are_lent(Path(sys.argv[1]), Path(sys.argv[2]), environment)
        one_rank_fails(Path(sys.argv[1]), Path(sys.argv[2]), environment)
    finally:
        shutdown()
    leave(0)  # the ordinary end of the interpreter may abort after collectives
