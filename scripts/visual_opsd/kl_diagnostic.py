# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The KL diagnostic: what the visual thoughts (VTs) hold that the text-only student lacks.

    python -m scripts.visual_opsd.kl_diagnostic --model_path BASE --output_dir DIR0
    python -m scripts.visual_opsd.kl_diagnostic --model_path TRAINED --base_path BASE \
        --baseline DIR0 --output_dir DIR1

The teacher is always the base with the real VTs in view. On every token of the base's own
completions (or of the dataset's text traces) its distribution is compared with the student's:
full-vocabulary KL(teacher || student) and JSD in nats; Gaussian noise in place of the VTs is the
control, `--controls` adds others. The first call is the baseline: it says GO or NO-GO and saves
completions and divergences. The second reuses them, so that

    gap closed = 1 - KL(base teacher || trained student) / KL(base teacher || base student)

is measured on identical tokens; the trained student's own samples are a second column. A killed
run is resumed by the same command; torchrun splits the rows over its processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from scripts.visual_opsd.analysis.baseline import SUMMARY
from scripts.visual_opsd.analysis.diagnosis import diagnose
from scripts.visual_opsd.analysis.kl_measurement import DiagnosticConfig
from scripts.visual_opsd.analysis.kl_statistics import table
from scripts.visual_opsd.cli import parse_config, run_main
from scripts.visual_opsd.processes import process_group


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code (0 for GO and for NO-GO)."""
    config = parse_config(DiagnosticConfig, argv, "Teacher-student divergence on the same tokens.")
    with process_group(config.compute.device, config.compute.timeout_s) as env:
        result = diagnose(config, env)
    if env.is_main:
        print(table(result))
        folder = Path(config.diagnostic.output_dir)
        print(f"{result['seconds']:.1f} s; {folder / SUMMARY}")
    return 0


if __name__ == "__main__":
    run_main(main)
