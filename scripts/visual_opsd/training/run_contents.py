# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""What a run is made of besides its settings: the contents of the files that these name.

They are stored with training states, by the flag that names the file, so that a resumed run finds
another base, prompt or row, while the same contents may lie anywhere.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data.parquet import Source, StepOrder
from data.randomness import RANDOMNESS_VERSION
from modeling.release.fingerprints import file_fingerprint, weights_fingerprint
from scripts.visual_opsd.config import PromptSettings, SampleSettings, TrainConfig

# Beside the weights, what a base's behaviour depends on: sizes and tokenizer.
_BASE_FILES = (
    "llm_config.json",
    "vit_config.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
ROW_ORDER = "row order"


def run_contents(config: TrainConfig, order: StepOrder) -> dict[str, Any]:
    """Flag -> prompts, or digests of the files it names; JSON values. Reads files of the run."""
    replay = config.run.replay_samples
    names = [_name(source) for source in order.sources]
    return {
        "model_path": _base(config.model.model_path),
        "prompts": asdict(config.prompt.build()),
        "dataset_config_file": {
            name: {"place": n, "weight": source.weight, "num_used_rows": source.num_used_rows}
            for n, (name, source) in enumerate(zip(names, order.sources, strict=True))
        },
        "data_root": {n: _data(s) for n, s in zip(names, order.sources, strict=True)},
        "replay_samples": file_fingerprint(Path(replay)) if replay else None,
        "random numbers": RANDOMNESS_VERSION,
        ROW_ORDER: order.signature(),
    }


def teacher_contents(
    model_path: str, prompt: PromptSettings, sample: SampleSettings, sources: Sequence[Source]
) -> dict[str, dict[str, Any]]:
    """What a cached teacher and the run that learns from it must have in common, as JSON values."""
    images: dict[str, Any] = {"image_path": prompt.image_path, **prompt.vit_config()}
    if prompt.image_path == "inferencer":  # the only path through the VAE's resize
        images["vae"] = prompt.vae_config()
    return {
        "base": _base(model_path),
        "prompts": asdict(prompt.build()),
        "images": images,
        "lengths": {"max_forward_tokens": sample.max_forward_tokens},
        "data": {_name(source): _data(source) for source in sources},
    }


def _base(model_path: str) -> dict[str, str]:
    """Digests of the weights, and of the files that say sizes and tokenizer."""
    base = Path(model_path)
    files = {n: file_fingerprint(base / n) for n in _BASE_FILES if (base / n).is_file()}
    return {"weights": weights_fingerprint(base, drawing=True), **files}


def _name(source: Source) -> str:
    return f"{source.dataset.name} ({source.dataset.split})"


def _data(source: Source) -> dict[str, Any]:
    """Rows of a data set, and file name -> rows, bytes and digest in words."""
    rows = dict.fromkeys(source.dataset.files, 0)
    for group in source.dataset.groups:
        rows[group.file] += group.rows
    described = {
        Path(file).name: f"{count} rows, {os.path.getsize(file)} bytes, digest "
        f"{file_fingerprint(Path(file))}"
        for file, count in rows.items()
    }
    return {"rows": len(source.dataset), **described}
