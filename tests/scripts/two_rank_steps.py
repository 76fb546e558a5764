# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Under torchrun with two processes: runs that test_step_oracle.py recomputes, and whose rows,
rejects and signals count.

two_rank_steps.py WORLD OUT
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

import torch

from data.thinkmorph import BadRow, Row
from scripts.visual_opsd.processes import (
    DistEnv,
    gather_objects,
    init_distributed,
    leave,
    shutdown,
)
from tests.scripts.step_cases import TWO_RANKS, run_case
from tests.scripts.trainers import build, metrics


def record(world: Path, out: Path, env: DistEnv) -> None:
    """Three rows over two ranks: two and one."""
    for number, (recipe, mesh) in enumerate(TWO_RANKS.values()):
        run = run_case(world, out / f"case-{number}", env, recipe, **mesh)
        if env.is_main:
            torch.save(run, out / f"case-{number}.pt")


def rejects_of_the_other_rank(world: Path, out: Path, env: DistEnv) -> None:
    """Rank 1 alone meets a bad row: it counts once, on both, and rank 0 lists it."""
    trainer: Any = build(world, out / "rejects", env, global_batch_size=2, total_steps=2)
    prepare, met = trainer.prepare, []

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
    for moment, kept in (("_update", 2), ("_score", 1)):
        results = out / f"stop{moment}"
        trainer: Any = build(world, results, env, global_batch_size=2, total_steps=5)
        act = getattr(trainer, moment)

        def told(*args: Any, act: Any = act, trainer: Any = trainer) -> Any:
            before, result = trainer.step, act(*args)
            if env.rank == 1 and before == 1:
                trainer.stop.number = signal.SIGTERM
            return result

        setattr(trainer, moment, told)
        assert trainer.train() == 128 + signal.SIGTERM
        assert gather_objects((trainer.step, trainer.saved_step)) == [(kept, kept)] * 2, moment
        if env.is_main:
            saved = [path.name for path in (results / "checkpoints").iterdir()]
            assert saved == [f"step_{kept:07d}"]
            assert [line["step"] for line in metrics(results)] == list(range(1, kept + 1))


if __name__ == "__main__":
    torch.set_num_threads(1)
    environment = init_distributed("cpu", 60)
    try:
        for check in (record, rejects_of_the_other_rank, one_rank_is_told_to_stop):
            check(Path(sys.argv[1]), Path(sys.argv[2]), environment)
    finally:
        shutdown()
    leave(0)  # the ordinary end of the interpreter may abort after collectives
