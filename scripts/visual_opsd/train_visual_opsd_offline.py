# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Visual-OPSD without a teacher in memory: python -m scripts.visual_opsd.train_visual_opsd_offline

Trains on the completions and the teacher's entries that `collect_traces` wrote into a cache.
"""

from __future__ import annotations

from collections.abc import Sequence

from scripts.visual_opsd.cli import parse_config, run_main
from scripts.visual_opsd.evaluation.validation import make_validation
from scripts.visual_opsd.training.offline import OfflineConfig, VisualOPSDOffline
from scripts.visual_opsd.training.start import start


def read_config(argv: Sequence[str] | None) -> OfflineConfig:
    """The settings."""
    title = "Train with a cached teacher (collect_traces makes the cache)."
    return parse_config(OfflineConfig, argv, title, VisualOPSDOffline.defaults)


def make_objective(config: OfflineConfig) -> VisualOPSDOffline:
    """What is trained on."""
    return VisualOPSDOffline(config)


def main(argv: Sequence[str] | None = None) -> int:
    """Train; returns the exit code."""
    config = read_config(argv)
    return start(config, make_objective, make_validation)


if __name__ == "__main__":
    run_main(main)
