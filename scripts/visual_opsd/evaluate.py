# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Accuracy of a checkpoint on a world, a parquet split or the paper's benchmarks.

    python -m scripts.visual_opsd.evaluate --model_path DIR --data Spatial_Navigation
    python -m scripts.visual_opsd.evaluate --model_path DIR --benchmark all --tsv_root LMUData

Greedy answers of the text-only student (`--context vt` shows it what the teacher sees, the real
visual thoughts; `noise`, `other`, ... a control in their place). A row of a generated world is
judged by the world's scorer, one of a benchmark by its rule (`benchmark_scoring.RULES`), any other
by exact match of its last <answer>...</answer>. A lenient verdict stands beside each, for reading
and not for comparing (EVAL.md). Every raw answer is kept; a killed run is resumed by the same
command; torchrun splits the rows over its processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from scripts.visual_opsd.cli import parse_config, run_main
from scripts.visual_opsd.evaluation.answers import evaluate
from scripts.visual_opsd.evaluation.benchmark_table import FIGURES_FILE, describe
from scripts.visual_opsd.evaluation.questions import EvaluateConfig
from scripts.visual_opsd.evaluation.store import read_json
from scripts.visual_opsd.evaluation.summary import comparison_lines, table, timing_text
from scripts.visual_opsd.processes import process_group


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    config = parse_config(EvaluateConfig, argv, "Accuracy of a checkpoint on a parquet split.")
    with process_group(config.compute.device, config.compute.timeout_s) as env:
        summary = evaluate(config, env)
    if env.is_main:
        settings = config.evaluate
        folder = Path(settings.output_dir)
        print(f"{settings.model_path}, context {settings.context}:")
        print(table(summary))
        if (folder / FIGURES_FILE).is_file():
            print(describe(read_json(folder / FIGURES_FILE, "")["benchmarks"]))
        print(timing_text(read_json(folder / "timing.json", "")))
        if settings.compare:
            print(comparison_lines(summary["comparison"]))
        print(f"{summary['seconds']:.1f} s; {folder / 'summary.json'}")
    return 0


if __name__ == "__main__":
    run_main(main)
