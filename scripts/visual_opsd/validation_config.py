# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The settings of validation while training; they stand among the trainer's (`config.py`)."""

from __future__ import annotations

from dataclasses import dataclass, fields

from scripts.visual_opsd.cli import ROWS, SHARES, Settings, option

BASE_ANSWERS = 256  # of the first rows, on which the teacher is compared with the student
TEACHER_GUARDS = ("off", "warn", "freeze", "rollback")


@dataclass(frozen=True)
class ValidationSettings(Settings):
    """When the student is evaluated, on which rows, and what follows from it."""

    eval_every: int | None = option(
        None, "steps between validations: greedy answers to rows that are not trained on, before "
        "the first step, every so many, and after the last; `none`: no validation", **ROWS,
    )  # fmt: skip
    eval_data: str | None = option(
        None, "its rows, named as for `evaluate --data`; needed with `--eval_every`", path="list"
    )
    eval_split: str = option("heldout", "which files of a data set: `SPLIT-*.parquet`")
    eval_limit: int | None = option(None, "only the first rows; `none`: all", **ROWS)
    keep_best: bool = option(
        False, "after a validation that is better than all before it, write the release folder "
        "(with `--lora_rank`: the adapters) to `best` in the checkpoint folder",
    )  # fmt: skip
    early_stop: int | None = option(
        None, "end the run, as at its last step, after this many validations in a row of which "
        "none was better than all before it; `none`: train to `--total_steps`", **ROWS,
    )  # fmt: skip

    teacher_guard: str = option(
        "off", "unless `off`, the teacher's weights answer the rows too, the real VTs in view; "
        "when their accuracy has dropped, `warn` says so, `freeze` has the teacher follow the "
        "student no longer, `rollback` takes it back to its best validation and leaves it there "
        "(both with `--teacher_mode ema` alone)", choices=TEACHER_GUARDS,
    )  # fmt: skip
    guard_drop: float = option(
        0.1, "how far below the teacher's best accuracy so far is a drop, as a share of the rows",
        **SHARES,
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eval_every is None:
            for spec in fields(self):
                if getattr(self, spec.name) != spec.default:
                    raise ValueError(
                        f"--{spec.name} is of validation, which is off: add --eval_every STEPS"
                    )
        elif self.eval_data is None:
            raise ValueError(
                "--eval_every needs rows: name them by --eval_data (a data set's name, a folder "
                "or a file, as for evaluate --data)"
            )
        elif self.teacher_guard == "off" and self.guard_drop != 0.1:
            raise ValueError(
                f"--guard_drop {self.guard_drop} is of the teacher's guard, which is off: add "
                "--teacher_guard warn, freeze or rollback"
            )
