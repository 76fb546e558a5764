# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Visual-OPSD (and its noise control): python -m scripts.visual_opsd.train_visual_opsd --help

One process, or any number of them under torchrun.
"""

from __future__ import annotations

from collections.abc import Sequence

from scripts.visual_opsd.cli import parse_config, run_main
from scripts.visual_opsd.config import TrainConfig
from scripts.visual_opsd.evaluation.validation import make_validation
from scripts.visual_opsd.training.start import start
from scripts.visual_opsd.training.visual_opsd import VisualOPSD


def read_config(argv: Sequence[str] | None) -> TrainConfig:
    """The settings."""
    return parse_config(TrainConfig, argv, "Train with Visual-OPSD.")


def make_objective(config: TrainConfig) -> VisualOPSD:
    """What is trained on."""
    return VisualOPSD(config)


def main(argv: Sequence[str] | None = None) -> int:
    """Train; returns the exit code."""
    config = read_config(argv)
    return start(config, make_objective, make_validation)


if __name__ == "__main__":
    run_main(main)
