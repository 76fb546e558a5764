# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Text-only SFT, the paper's baseline: python -m scripts.visual_opsd.train_sft --help"""

from __future__ import annotations

from collections.abc import Sequence

from scripts.visual_opsd.cli import parse_config, run_main
from scripts.visual_opsd.config import SFT_DEFAULTS, TrainConfig
from scripts.visual_opsd.processes import init_distributed, shutdown
from scripts.visual_opsd.trainer import Trainer


def main(argv: Sequence[str] | None = None) -> int:
    """Train; returns the exit code."""
    config = parse_config(TrainConfig, argv, "Text-only SFT baseline.", SFT_DEFAULTS)
    env = init_distributed(config.run.device, config.run.timeout_s)
    try:
        return Trainer(config, env, sft=True).train()
    finally:
        shutdown()


if __name__ == "__main__":
    run_main(main)
