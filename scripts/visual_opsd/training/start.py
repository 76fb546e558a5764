# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""What the trainers' commands do with their settings: plan, dry run, or train."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from scripts.visual_opsd.config import TrainConfig
from scripts.visual_opsd.processes import DistEnv, process_group
from scripts.visual_opsd.training.dry_run import dry_run
from scripts.visual_opsd.training.guard import check_guard
from scripts.visual_opsd.training.memory_report import show_plan
from scripts.visual_opsd.training.objective import Objective, check_used
from scripts.visual_opsd.training.trainer import Trainer
from scripts.visual_opsd.training.validation import Validate

Config = TypeVar("Config", bound=TrainConfig)


def start(
    config: Config,
    make_objective: Callable[[Config], Objective],
    make_validation: Callable[[TrainConfig, DistEnv], Validate],
) -> int:
    """Do what the settings ask for; returns the exit code.

    Args:
        make_validation: called by all ranks, with --eval_every, before anything is loaded.
    """
    if config.memory.plan:
        return show_plan(config, checked(config, make_objective(config)))
    with process_group(config.run.device, config.run.timeout_s) as env:
        objective = checked(config, make_objective(config))
        if config.memory.dry_run:
            return dry_run(config, env, objective)
        every = config.validation.eval_every
        validate = None if every is None else make_validation(config, env)
        return Trainer(config, env, objective, validate).train()


def checked(config: TrainConfig, objective: Objective) -> Objective:
    """Raises ValueError: as `check_used` and `check_guard`."""
    check_used(objective)
    check_guard(config.validation, objective.teacher)
    return objective
