# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Pictures of FrozenLake mazes from gymnasium's own tile art, composed cell by cell.

A cell's pixels depend on nothing but its kind and on which of its four neighbours the drawn path
joins, so one small table holds every cell there is and a picture is a look-up in it. Pre-training
of the miniature uses the same table on the GPU. gymnasium renamed and redrew the tiles in 1.4;
both generations are understood.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

KINDS = ("ice", "hole", "start", "goal")
ICE, HOLE, START, GOAL = range(4)
# Bit k of a path mask is set when the path joins the neighbour in direction MOVES[k].
MOVES = "LRUD"
DELTAS = ((0, -1), (0, 1), (-1, 0), (1, 0))  # (row, column) steps, in the order of MOVES

_TILE_NAMES = {
    "ice": ("tile_ice.png", "ice.png"),
    "hole": ("tile_hole.png", "hole.png"),
    "agent": ("elf_down.png", "agent.png"),
    "goal": ("goal_flag.png", "goal.png"),
}
_DESIGN = 64  # sprites that do not fill their cell are drawn for a 64 pixel cell
_SUPERSAMPLE = 8
_LINE_COLOUR = (255, 0, 144, 255)
_LINE_WIDTH = 0.24  # of a cell


def tile_folder() -> Any:
    """Where the installed gymnasium keeps its toy_text pictures (an importlib Traversable)."""
    try:
        root = importlib.resources.files("gymnasium")
    except ModuleNotFoundError as error:
        raise ValueError(
            "the maze world is drawn with gymnasium's tiles, but gymnasium is not installed: "
            "pip install gymnasium"
        ) from error
    return root.joinpath("envs", "toy_text", "img")


def _load_tiles(folder: Any) -> dict[str, Image.Image]:
    tiles = {}
    for role, names in _TILE_NAMES.items():
        found = next((folder.joinpath(n) for n in names if folder.joinpath(n).is_file()), None)
        if found is None:
            there = sorted(f.name for f in folder.iterdir()) if folder.is_dir() else []
            raise ValueError(
                f"no {role} tile: looked for {' or '.join(names)} in {folder}, which holds "
                f"{', '.join(there) or 'nothing'}; install a gymnasium between 0.26 and 1.4"
            )
        with found.open("rb") as handle:
            tiles[role] = Image.open(handle).convert("RGBA")
    return tiles


def _fit(tile: Image.Image, side: int) -> Image.Image:
    """Square art fills the cell; other sprites keep their proportions in the cell's middle."""
    if tile.width == tile.height:
        return tile.resize((side, side), Image.Resampling.NEAREST)
    size = (round(tile.width * side / _DESIGN), round(tile.height * side / _DESIGN))
    sprite = tile.resize(size, Image.Resampling.NEAREST)
    canvas = Image.new("RGBA", (side, side))
    canvas.paste(sprite, ((side - size[0]) // 2, (side - size[1]) // 2))
    return canvas


def _draw_path(canvas: Image.Image, mask: int) -> None:
    side = canvas.width
    middle, half = side / 2, side * _LINE_WIDTH / 2
    draw = ImageDraw.Draw(canvas)
    ends = {0: (0, None), 1: (side, None), 2: (None, 0), 3: (None, side)}
    for bit, (x, y) in ends.items():
        if mask >> bit & 1:
            xs = sorted((middle, middle if x is None else x))
            ys = sorted((middle, middle if y is None else y))
            wide = (0, half) if y is None else (half, 0)
            draw.rectangle(
                (xs[0] - wide[0], ys[0] - wide[1], xs[1] + wide[0], ys[1] + wide[1]),
                fill=_LINE_COLOUR,
            )
    draw.ellipse((middle - half, middle - half, middle + half, middle + half), fill=_LINE_COLOUR)


@functools.lru_cache(maxsize=8)
def cell_patches(cell: int, folder: str | None = None) -> np.ndarray:
    """Every cell there is: uint8 (n_kinds=4, 16 path masks, cell, cell, 3), read-only.

    The path runs from cell centre to cell centre, over the ice and under the elf and the flag.

    Args:
        cell: side of a cell in pixels.
        folder: tile pictures to use instead of the installed gymnasium's.

    Raises:
        ValueError: gymnasium or one of its tiles is missing, or `cell` is below 4.
    """
    if cell < 4:
        raise ValueError(f"a cell of {cell} pixels cannot show a tile; use 4 or more (default 14)")
    tiles = _load_tiles(tile_folder() if folder is None else Path(folder))
    side = cell * _SUPERSAMPLE
    fitted = {role: _fit(tile, side) for role, tile in tiles.items()}
    sprites = {START: fitted["agent"], GOAL: fitted["goal"]}
    table = np.empty((len(KINDS), 16, cell, cell, 3), dtype=np.uint8)
    for kind in range(len(KINDS)):
        for mask in range(16):
            canvas = Image.new("RGBA", (side, side), (255, 255, 255, 255))
            canvas.alpha_composite(fitted["ice"])
            if kind == HOLE:
                canvas.alpha_composite(fitted["hole"])
            if mask:
                _draw_path(canvas, mask)
            if kind in sprites:
                canvas.alpha_composite(sprites[kind])
            table[kind, mask] = np.asarray(canvas.convert("RGB").reduce(_SUPERSAMPLE))
    table.setflags(write=False)
    return table


def fingerprint(table: np.ndarray) -> str:
    """Short hash of a table, to tell which tile art a world was drawn with."""
    return hashlib.sha256(table.tobytes()).hexdigest()[:12]


def compose(kinds: np.ndarray, masks: np.ndarray, cell: int) -> np.ndarray:
    """Picture of a board: kinds and masks (N, N) -> uint8 (N*cell, N*cell, 3), by look-up."""
    rows, columns = kinds.shape
    cells: np.ndarray = cell_patches(cell)[kinds, masks]  # (N, N, cell, cell, 3)
    return cells.transpose(0, 2, 1, 3, 4).reshape(rows * cell, columns * cell, 3)
