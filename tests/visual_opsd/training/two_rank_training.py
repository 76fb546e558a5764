# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Under torchrun with two processes: runs that test_step_oracle.py recomputes, and what ranks owe
each other: whose rows, images, errors, rejects and signals count.

two_rank_training.py WORLD OUT
"""

from __future__ import annotations

import json
import math
import signal
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from data.thinkmorph import BadRow, Row
from modeling.host.programs import leave
from scripts.visual_opsd.processes import (
    DistEnv,
    gather_objects,
    init_distributed,
    shutdown,
)
from scripts.visual_opsd.training.teacher import Teacher
from scripts.visual_opsd.training.trainer import Trainer
from tests.visual_opsd.training.step_cases import TWO_RANKS, run_case
from tests.visual_opsd.training.trainers import build, metrics


def record(world: Path, out: Path, env: DistEnv) -> None:
    """Three rows over two ranks, and one row: a rank that only takes part."""
    for number, (recipe, mesh) in enumerate(TWO_RANKS.values()):
        run = run_case(world, out / f"case-{number}", env, recipe, **mesh)
        if env.is_main:
            torch.save(run, out / f"case-{number}.pt")


def features_are_shared(world: Path, out: Path, env: DistEnv) -> None:
    """The teacher's ViT outputs serve the student while one rank only takes part: same losses."""
    plain = Teacher.shares_features
    for name, options in (("self", {"teacher_mode": "self"}), ("frozen", {"freeze_vit": True})):
        found = []
        for shares in (False, True):
            Teacher.shares_features = lambda *_, shares=shares: shares  # type: ignore[method-assign]
            results = out / f"{name}-{shares}"
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
    Teacher.shares_features = plain  # type: ignore[method-assign]


def adapters_train(world: Path, out: Path, env: DistEnv) -> None:
    """Adapters over two shards: the losses that one process has, and the state it can go on from.

    test_step_oracle.py runs the one process.
    """
    lora: dict[str, Any] = {"lora_rank": 3, "lr": 0.01, "teacher_mode": "ema", "ema_decay": 0.7}
    trainer = build(
        world, out / "adapters", env, total_steps=3, save_every=2, keep_last=2, save_release=True,
        global_batch_size=4, **lora,
    )  # fmt: skip
    assert trainer.train() == 0


def validation_is_shared(world: Path, out: Path, env: DistEnv) -> None:
    """Each rank answers its rows; both have all figures, and the same training as without.

    One that is told to stop while it decodes stops both. test_step_oracle.py compares answers.
    """
    size: dict[str, Any] = {"total_steps": 2, "global_batch_size": 2}
    evaluated: dict[str, Any] = {
        "eval_every": 1, "eval_data": "Spatial_Navigation", "eval_limit": 5, "keep_best": True,
    }  # fmt: skip
    assert build(world, out / "plain", env, **size).train() == 0
    trainer: Any = build(world, out / "validated", env, **size, **evaluated)
    validate, seen = trainer.validation.validate, []

    class Recorded:
        identity, rows = validate.identity, staticmethod(validate.rows)

        @property
        def answers(self) -> Any:
            return validate.answers

        def __call__(self, step: int, *args: Any) -> dict[str, float]:
            seen.append(validate(step, *args))
            return {**seen[-1], "accuracy": step / 10}

    trainer.validation.validate = Recorded()
    assert trainer.train() == 0
    ours, theirs = gather_objects(seen)
    assert len(ours) == 3 and ours == theirs
    stopped: Any = build(world, out / "stopped", env, **size, **evaluated)

    class Told(Recorded):
        def __call__(self, step: int, *args: Any) -> dict[str, float]:
            if env.rank == 1 and step == 1:
                stopped.stop.number = signal.SIGTERM
            return super().__call__(step, *args)

    validate.folder = out / "stopped" / "validation"
    stopped.validation.validate = Told()
    assert stopped.train() == 128 + signal.SIGTERM
    assert gather_objects(stopped.states.step) == [1, 1]
    if env.is_main:
        losses = [
            [(line["loss"], line["grad_norm"]) for line in metrics(out / name) if "loss" in line]
            for name in ("plain", "validated")
        ]
        assert losses[0] == losses[1] and len(losses[0]) == 2
        kept = out / "validated" / "checkpoints" / "best" / "best.json"
        assert json.loads(kept.read_text())["step"] == 2


GUARDED: dict[str, Any] = {
    "total_steps": 3, "global_batch_size": 3, "eval_every": 1, "eval_data": "Spatial_Navigation",
    "eval_limit": 5, "teacher_guard": "rollback", "vt_rehearsal": 0.5, "save_every": 1,
    "keep_last": 9, "ema_decay": 0.5, "lr": 0.05, "eps": 1e-3,
}  # fmt: skip


def train_guarded(world: Path, results: Path, env: DistEnv, **changes: Any) -> Trainer:
    """A run whose teacher is best after step 1 and has dropped after step 2."""
    trainer: Any = build(world, results, env, **GUARDED, **changes)
    ask = trainer.validation.validate.ask_teacher

    def dropping(step: int, *args: Any) -> dict[str, float]:
        return {**ask(step, *args), "accuracy": (0.5, 0.6, 0.3, 0.3)[step]}

    trainer.validation.validate.ask_teacher = dropping
    assert trainer.train() == 0
    found: Trainer = trainer
    return found


def the_guard_is_shared(world: Path, out: Path, env: DistEnv) -> None:
    """Both ranks go back to the shards of step 1; test_step_oracle.py compares with one process."""
    trainer = train_guarded(world, out / "guarded", env)
    ours, theirs = gather_objects(trainer.validation.state_dict())
    assert ours == theirs and ours["guard"]["stands"] and list(ours["base"]) == list(range(5))


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


def rejects_of_the_other_rank(world: Path, out: Path, env: DistEnv) -> None:
    """Rank 1 alone meets a bad row: it counts once, on both, and rank 0 lists it."""
    trainer: Any = build(world, out / "rejects", env, global_batch_size=2, total_steps=2)
    prepare = trainer.prepare
    met: list[int] = []

    def fail(row: Row) -> Any:
        if env.rank == 1 and not met:
            met.append(row.row)
            raise BadRow("broken_image", "torn", file=row.file, row=row.row)
        return prepare(row)

    trainer.prepare = fail
    assert trainer.train() == 0
    assert gather_objects(len(met)) == [0, 1]
    counted = gather_objects(trainer.ledger.state_dict())
    assert counted == [{"rows_read": 5, "reasons": {"broken_image": 1}}] * 2, counted
    if env.is_main:
        lines = metrics(out / "rejects")
        assert [(line["rows_read"], line["skipped_rows"]) for line in lines] == [(3, 1), (5, 1)]
        (listed,) = (out / "rejects" / "bad_rows.jsonl").read_text().splitlines()
        assert '"torn"' in listed and '"slot": 1' in listed and '"step": 0' in listed


def one_rank_is_told_to_stop(world: Path, out: Path, env: DistEnv) -> None:
    """Rank 1 alone, after an update or in the middle of a step: both end at the same step."""
    for moment, kept in (("_update", 2), ("label", 1)):
        results = out / f"stop-{moment}"
        trainer: Any = build(world, results, env, global_batch_size=2, total_steps=5)
        owner = trainer.objective if moment == "label" else trainer
        act = getattr(owner, moment)

        def told(*args: Any, act: Any = act, trainer: Any = trainer) -> Any:
            before, result = trainer.step, act(*args)
            if env.rank == 1 and before == 1:
                trainer.stop.number = signal.SIGTERM
            return result

        setattr(owner, moment, told)
        assert trainer.train() == 128 + signal.SIGTERM
        assert gather_objects((trainer.step, trainer.states.step)) == [(kept, kept)] * 2, moment
        if env.is_main:
            saved = [path.name for path in (results / "checkpoints").glob("step_*")]
            assert saved == [f"step_{kept:07d}"]
            assert [line["step"] for line in metrics(results)] == list(range(1, kept + 1))


if __name__ == "__main__":
    torch.set_num_threads(1)
    environment = init_distributed("cpu", 60)
    try:
        for check in (
            record, features_are_shared, adapters_train, validation_is_shared,
            the_guard_is_shared, one_rank_fails, rejects_of_the_other_rank,
            one_rank_is_told_to_stop,
        ):  # fmt: skip
            check(Path(sys.argv[1]), Path(sys.argv[2]), environment)
    finally:
        shutdown()
    leave(0)  # the ordinary end of the interpreter may abort after collectives
