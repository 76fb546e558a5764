# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Small benchmark files in VLMEvalKit's format, for tests."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def picture(seed: int, size: tuple[int, int] = (60, 44)) -> Image.Image:
    """A noisy RGB picture; each seed another."""
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise)


def base64_png(image: Image.Image) -> str:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def write_tsv(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write rows of the columns of the first, absent ones empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def choice_rows(count: int, answer: str = "A") -> list[dict[str, Any]]:
    """Multiple-choice questions, each with a picture of its own and of its own size."""
    return [
        {
            "index": i,
            "question": f"Which picture is number {i}?",
            "A": f"the {i}th",
            "B": "none of them",
            "C": "all",
            "D": "",
            "answer": answer,
            "category": "even" if i % 2 == 0 else "odd",
            "image": base64_png(picture(i, (56 + 14 * (i % 3), 42 + 7 * (i % 4)))),
        }
        for i in range(count)
    ]
