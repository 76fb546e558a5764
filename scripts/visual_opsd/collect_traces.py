# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""A teacher's word, kept for offline training: python -m scripts.visual_opsd.collect_traces --help

For every row a completion (the data set's text trace, or samples of the base) and, on each of its
scored tokens, the most probable entries of the base that sees the visual thoughts, and how far
these move it (`vt_weight`). A killed run is resumed by the same command; torchrun splits the rows
over its processes. `train_visual_opsd_offline` trains on the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from data.dataset_info import load_dataset_config
from data.parquet import open_sources
from data.teacher_cache import SUMMARY
from modeling.host.disk import size_text
from scripts.visual_opsd.analysis.collection import collect
from scripts.visual_opsd.analysis.trace_rows import CollectConfig
from scripts.visual_opsd.cli import parse_config, run_main
from scripts.visual_opsd.evaluation.rows import RowPool
from scripts.visual_opsd.processes import on_main, process_group
from scripts.visual_opsd.training.run_contents import teacher_contents


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    config = parse_config(CollectConfig, argv, "Keep a teacher's word for offline training.")
    settings = config.collect
    with process_group(config.compute.device, config.compute.timeout_s) as env:
        sources = open_sources(
            load_dataset_config(settings.dataset_config_file), settings.needs, settings.data_root
        )
        contents = on_main(
            env,
            lambda: teacher_contents(settings.model_path, config.prompt, config.sample, sources),
        )
        result = collect(config, env, RowPool([source.dataset for source in sources]), contents)
    if env.is_main:
        size = sum(result["shards"].values())
        print(
            f"{result['completions']} completions of {result['rows']} rows, {result['tokens']} "
            f"tokens, {size_text(size)}; mean vt_weight {result['mean_vt_weight']:.4f} nats; "
            f"{result['bad_rows']} rows left out {result['bad_summary']}".rstrip()
        )
        print(f"{result['seconds']:.1f} s; {Path(settings.output_dir) / SUMMARY}")
    return 0


if __name__ == "__main__":
    run_main(main)
