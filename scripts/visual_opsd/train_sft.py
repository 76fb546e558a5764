# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""SFT on given rows: python -m scripts.visual_opsd.train_sft --help

--mode text is the paper's baseline (the text-only trace, then the answer); --mode interleaved
makes a model that draws its visual thoughts from one that does not do so yet.
"""

from __future__ import annotations

from collections.abc import Sequence

from scripts.visual_opsd.cli import parse_config, run_main
from scripts.visual_opsd.config import SFTConfig
from scripts.visual_opsd.evaluation.validation import make_validation
from scripts.visual_opsd.training.interleaved import InterleavedSFT
from scripts.visual_opsd.training.objective import Objective
from scripts.visual_opsd.training.start import start
from scripts.visual_opsd.training.text_sft import TextSFT

_TITLE = "SFT: the text-only baseline, or (--mode interleaved) thoughts and drawings."


def read_config(argv: Sequence[str] | None) -> SFTConfig:
    """The settings; defaults depend on the mode."""
    config = parse_config(SFTConfig, argv, _TITLE, TextSFT.defaults)
    if config.flow.mode == "interleaved":
        config = parse_config(SFTConfig, argv, _TITLE, InterleavedSFT.defaults)
    return config


def make_objective(config: SFTConfig) -> Objective:
    """What the mode trains on."""
    return InterleavedSFT(config) if config.flow.mode == "interleaved" else TextSFT(config)


def main(argv: Sequence[str] | None = None) -> int:
    """Train; returns the exit code."""
    config = read_config(argv)
    return start(config, make_objective, make_validation)


if __name__ == "__main__":
    run_main(main)
