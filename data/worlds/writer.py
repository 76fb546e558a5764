# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Writes a generated world as parquet files in ThinkMorph's schema, all of it or nothing."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tqdm import tqdm

from data.worlds import spatial_navigation as navigation
from data.worlds.tiles import cell_patches, fingerprint

ROW_GROUP = 400
ROWS_PER_FILE = 8192
_STAMP = "world.json"  # marks a folder this module wrote, and says how

_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
SCHEMA = pa.schema(
    [
        ("pid", pa.string()),
        ("question", pa.string()),
        ("answer", pa.string()),
        ("problem_image_0", _IMAGE),
        ("resoning_thought_0", pa.string()),  # spelt as ThinkMorph's release spells it
        ("reasoning_image_0", _IMAGE),
        ("resoning_thought_1", pa.string()),
        ("full_text_only_thought", pa.string()),
        ("world", pa.string()),
        ("world_state", pa.string()),
    ]
)


def encode_png(pixels: np.ndarray) -> bytes:
    """PNG of uint8 (H, W, 3); level 1, as the pictures are small and many."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _write_split(
    folder: Path, split: str, mazes: Sequence[navigation.Maze], *, cell: int, style: str, bar: Any
) -> None:
    files = max(1, -(-len(mazes) // ROWS_PER_FILE))
    rows = navigation.iterate_rows(mazes, style)
    for number in range(files):
        path = folder / f"{split}-{number:05d}-of-{files:05d}.parquet"
        with pq.ParquetWriter(path, SCHEMA, compression="zstd") as writer:
            stop = min(len(mazes), (number + 1) * ROWS_PER_FILE)
            for first in range(number * ROWS_PER_FILE, stop, ROW_GROUP):
                group: list[dict[str, Any]] = []
                for index in range(first, min(first + ROW_GROUP, stop)):
                    maze = mazes[index]
                    plan, columns = next(rows)
                    pid = f"{split}-{maze.size}x{maze.size}-{index:06d}"
                    images = {
                        "problem_image_0": ("", f"{pid}.png"),
                        "reasoning_image_0": (plan, f"{pid}-path.png"),
                    }
                    pictures = {
                        key: {"bytes": encode_png(navigation.render(maze, drawn, cell)), "path": n}
                        for key, (drawn, n) in images.items()
                    }
                    world = {"world": navigation.WORLD, "world_state": maze.state}
                    group.append({"pid": pid, **columns, **pictures, **world})
                    bar.update()
                writer.write_table(pa.Table.from_pylist(group, schema=SCHEMA))


def _claim(target: Path, overwrite: bool) -> None:
    """Raise unless `target` may be (re)written."""
    if not target.exists():
        return
    if not overwrite:
        raise ValueError(f"{target} exists; choose another --out or pass --overwrite")
    if not (target / _STAMP).is_file():
        raise ValueError(
            f"{target} was not written by data.worlds (it holds no {_STAMP}), so --overwrite does "
            "not touch it; choose another --out"
        )


def write_spatial_navigation(
    out: str | Path,
    *,
    rows: int,
    heldout_rows: int,
    seed: int = 0,
    sizes: Sequence[int] = (3, 4),
    cell: int = 14,
    style: str = "lite",
    overwrite: bool = False,
    progress: bool = False,
) -> Path:
    """Write OUT/Spatial_Navigation/data/{train,heldout}-*.parquet and world.json beside them.

    The same arguments and library versions give the same bytes. The files are written to a
    temporary folder that is renamed at the end.

    Returns:
        The folder with the parquet files.

    Raises:
        ValueError: a bad argument, more rows than distinct mazes, missing tiles, or a folder that
            exists already.
    """
    if rows < 1 or heldout_rows < 0:
        raise ValueError(f"rows {rows}, held-out rows {heldout_rows}: need at least 1 and 0")
    if style not in navigation.STYLES:
        raise ValueError(f"unknown style {style!r}; choose from {', '.join(navigation.STYLES)}")
    target = Path(out) / navigation.DATASET / "data"
    _claim(target, overwrite)
    table = cell_patches(cell)
    splits = {}
    for split, count in (("train", rows), ("heldout", heldout_rows)):
        splits[split] = navigation.draw_rows(count, sizes, seed=seed, heldout=split == "heldout")

    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f"data.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        with tqdm(total=rows + heldout_rows, unit="row", disable=not progress) as bar:
            for split, (mazes, _) in splits.items():
                if mazes:
                    _write_split(temporary, split, mazes, cell=cell, style=style, bar=bar)
        stamp = {
            "world": navigation.WORLD,
            "seed": seed,
            "cell": cell,
            "style": style,
            "tiles": fingerprint(table),
            "rows_per_size": {split: shares for split, (_, shares) in splits.items()},
        }
        (temporary / _STAMP).write_text(json.dumps(stamp, indent=2) + "\n")
        if target.exists():
            retired = target.parent / f"data.{os.getpid()}.old.tmp"
            target.rename(retired)
            temporary.rename(target)
            shutil.rmtree(retired)
        else:
            temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target
