# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""What the trainers' commands do with their settings: plan, dry run, or train."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from scripts.visual_opsd.config import TrainConfig
from scripts.visual_opsd.processes import process_group
from scripts.visual_opsd.training.dry_run import dry_run
from scripts.visual_opsd.training.memory_report import show_plan
from scripts.visual_opsd.training.objective import Objective
from scripts.visual_opsd.training.trainer import Trainer

Config = TypeVar("Config", bound=TrainConfig)


def start(config: Config, make_objective: Callable[[Config], Objective]) -> int:
    """Do what the settings ask for; returns the exit code."""
    if config.memory.plan:
        return show_plan(config, make_objective(config))
    with process_group(config.run.device, config.run.timeout_s) as env:
        objective = make_objective(config)
        if config.memory.dry_run:
            return dry_run(config, env, objective)
        return Trainer(config, env, objective).train()
