# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Small ThinkMorph-schema parquet files for tests."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from data.rejects import Reject
from data.row_groups import ParquetDataset, prepare_row
from data.thinkmorph import Row

T = TypeVar("T")

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
SCHEMA = pa.schema(
    [
        ("pid", pa.string()),
        ("question", pa.string()),
        ("answer", pa.string()),
        ("problem_image_0", IMAGE),
        ("resoning_thought_0", pa.string()),
        ("reasoning_image_0", IMAGE),
        ("resoning_thought_1", pa.string()),
        ("full_text_only_thought", pa.string()),
    ]
)


def png(colour: tuple[int, ...] = (10, 20, 30), size: tuple[int, int] = (8, 6)) -> bytes:
    """One-coloured PNG; three channels give RGB, four RGBA."""
    stream = io.BytesIO()
    Image.new("RGB" if len(colour) == 3 else "RGBA", size, colour).save(stream, "PNG")
    return stream.getvalue()


def image_cell(data: bytes | None) -> dict[str, Any]:
    return {"bytes": data, "path": None}


def good_row(index: int, **changes: Any) -> dict[str, Any]:
    """Values of row `index` of every file made here; its number is in pid, texts and colours."""
    row: dict[str, Any] = {
        "pid": f"pid-{index}",
        "question": f"question {index}?",
        "answer": f"answer {index}",
        "problem_image_0": image_cell(png((index % 256, index // 256 % 256, 1))),
        "resoning_thought_0": f"before {index}",
        "reasoning_image_0": image_cell(png((index % 256, index // 256 % 256, 2))),
        "resoning_thought_1": f"after {index}",
        "full_text_only_thought": f"trace {index}",
    }
    return {**row, **changes}


def truncated_png() -> bytes:
    """A header that reads well, and half of the pixels."""
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, "PNG")
    return stream.getvalue()[: len(stream.getvalue()) // 2]


def write_parquet(
    path: Path,
    rows: Iterable[dict[str, Any]],
    *,
    schema: pa.Schema = SCHEMA,
    row_group_size: int = 4,
) -> Path:
    """Write rows; columns missing in a row are null, columns missing in the schema are left out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(list(rows), schema=schema)
    pq.write_table(table, path, row_group_size=row_group_size)
    return path


def split_file(folder: Path, split: str, at: int) -> None:
    """Make two files of a split's only one, so that a row's place in its file is not its index."""
    (file,) = folder.glob(f"{split}-*.parquet")
    table = pq.read_table(file)
    file.unlink()
    for number, part in enumerate((table.slice(0, at), table.slice(at))):
        pq.write_table(part, folder / f"{split}-{number:05d}-of-00002.parquet")


def write_dataset(
    root: Path,
    name: str = "Jigsaw_Assembly",
    rows: int = 10,
    *,
    split: str = "train",
    files: int = 1,
    row_group_size: int = 4,
    change: Callable[[int], dict[str, Any]] = lambda index: {},
) -> Path:
    """`<root>/<name>/data/<split>-*.parquet`; `change(index)` replaces cells of a row.

    Returns the dataset folder. Row numbers go on over the files.
    """
    bounds = [rows * number // files for number in range(files + 1)]
    for number in range(files):
        block = range(bounds[number], bounds[number + 1])
        write_parquet(
            root / name / "data" / f"{split}-{number:05d}-of-{files:05d}.parquet",
            (good_row(index, **change(index)) for index in block),
            row_group_size=row_group_size,
        )
    return root / name


def read_all(dataset: ParquetDataset) -> list[Row]:
    return [dataset.read_row(index) for index in range(len(dataset))]


def prepare_all(dataset: ParquetDataset, prepare: Callable[[Row], T]) -> list[T | Reject]:
    return [prepare_row(dataset, index, prepare) for index in range(len(dataset))]
