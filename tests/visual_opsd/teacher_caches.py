# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Teacher caches of a few mazes, made by the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data.teacher_cache import SUMMARY, TeacherCache
from scripts.visual_opsd import collect_traces
from scripts.visual_opsd.runs.identity import files_digest
from tests.visual_opsd.training_runs import TINY_BAGEL

PROMPT = {"use_system_prompt": False, "vit_max_size": 56, "vit_min_size": 14}


def collect_flags(world: Path, out: Path, **changes: Any) -> list[str]:
    given: dict[str, Any] = {
        "model_path": TINY_BAGEL, "dataset_config_file": world / "datasets.yaml",
        "data_root": world, "device": "cpu", "progress": False, "output_dir": out,
        "sample_max_new_tokens": 12, **PROMPT, **changes,
    }  # fmt: skip
    return [f"--{name}={value}" for name, value in given.items()]


def collect(world: Path, out: Path, **changes: Any) -> Path:
    """Run `collect_traces` to its end; returns the cache."""
    assert collect_traces.main(collect_flags(world, out, **changes)) == 0
    return out


def sign(cache: Path) -> None:
    """Have a cache whose files were changed pass for one that was written so."""
    summary = json.loads((cache / SUMMARY).read_text())
    summary["digest"] = files_digest(cache, TeacherCache.open(cache).files)
    (cache / SUMMARY).write_text(json.dumps(summary))
