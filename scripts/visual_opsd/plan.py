# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""How much memory and disk a run takes: python -m scripts.visual_opsd.plan [flags of the run]

Takes the flags of train_visual_opsd or, with --sft, those of train_sft. Needs of the release folder
llm_config.json and vit_config.json alone, and no data. A machine that is not here:
--plan_gpus 4 --plan_gpu_gb 80. Ends with 1 if the run can't fit.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from scripts.visual_opsd import train_sft, train_visual_opsd
from scripts.visual_opsd.cli import run_main
from scripts.visual_opsd.training.memory_report import show_plan
from scripts.visual_opsd.training.start import checked


def main(argv: Sequence[str] | None = None) -> int:
    """Print the plan; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    trainer = train_sft if "--sft" in words else train_visual_opsd
    words = ["--plan", "True", *(word for word in words if word != "--sft")]
    config = trainer.read_config(words)
    objective = checked(config, trainer.make_objective(config))
    return show_plan(config, objective, gpus=torch.cuda.device_count())


if __name__ == "__main__":
    run_main(main)
