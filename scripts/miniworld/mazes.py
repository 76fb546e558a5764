# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Mazes as tensors: everything pre-training needs of the maze world, vectorised on one device.

A `MazeTable` holds the cells' pictures and the boards; it is made where gymnasium is installed
and can travel as a small .npz file. A `Bank` adds what is computed from the boards: where every
move leads, distances to the goal, best moves and the drawn path's masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.worlds import spatial_navigation as nav
from data.worlds import tiles

_FAR = 1 << 14


@dataclass(frozen=True)
class MazeTable:
    """Tile pictures and boards.

    Attributes:
        cells: uint8 (tile sets, 4 kinds, 16 masks, cell, cell, 3).
        train, heldout: by size, kinds of the boards' cells, uint8 (mazes, N*N).
    """

    cells: np.ndarray
    train: dict[int, np.ndarray]
    heldout: dict[int, np.ndarray]

    @classmethod
    def build(
        cls,
        *,
        sizes: Sequence[int],
        per_size: int,
        heldout_rows: int,
        cell: int,
        seed: int,
        tile_folders: Sequence[str] = (),
    ) -> MazeTable:
        """Draw mazes and tile pictures.

        Args:
            sizes: board sides.
            per_size: training mazes of each size, or all there are if fewer.
            heldout_rows: held-out mazes, shared among the sizes as the world's generator does.
            cell: pixels per cell.
            seed: of both draws.
            tile_folders: further tile sets beside the installed gymnasium's, so that the base
                reads the pictures of other gymnasium releases too.

        Raises:
            ValueError: missing tiles, bad sizes, or too few held-out mazes.
        """
        sets = [tiles.cell_patches(cell), *(tiles.cell_patches(cell, f) for f in tile_folders)]
        heldout, _ = nav.draw_rows(heldout_rows, sizes, seed=seed, heldout=True)

        def boards(mazes: Sequence[nav.Maze], size: int) -> np.ndarray:
            return np.stack([nav.board(m).ravel() for m in mazes if m.size == size])

        train = {}
        for size in sizes:
            limit = nav.available(size, heldout=False)
            count = per_size if limit is None else min(per_size, limit)
            train[size] = boards(nav.draw(size, count, seed=seed, heldout=False), size)
        return cls(np.stack(sets), train, {size: boards(heldout, size) for size in sizes})

    def save(self, path: str | Path) -> None:
        """Write a compressed .npz."""
        arrays: dict[str, Any] = {"cells": self.cells}
        for split in ("train", "heldout"):
            for size, boards in getattr(self, split).items():
                arrays[f"{split}_{size}"] = boards
        with Path(path).open("wb") as handle:
            np.savez_compressed(handle, **arrays)

    @classmethod
    def load(cls, path: str | Path) -> MazeTable:
        """Read what `save` wrote.

        Raises:
            ValueError: no such file, or another content.
        """
        if not Path(path).is_file():
            raise ValueError(
                f"{path} does not exist; write it with `python -m scripts.miniworld.pretrain "
                "--export-table FILE` where gymnasium is installed"
            )
        with np.load(path) as arrays:
            splits: dict[str, dict[int, np.ndarray]] = {"train": {}, "heldout": {}}
            for name in arrays.files:
                split, _, size = name.partition("_")
                if split in splits and size.isdigit():
                    splits[split][int(size)] = arrays[name]
            if "cells" not in arrays.files or not splits["train"] or not splits["heldout"]:
                raise ValueError(f"{path} is not a maze table; write it anew with --export-table")
            return cls(arrays["cells"], **splits)

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(sorted(self.train))

    def patches(self, device: torch.device | str) -> Tensor:
        """Normalised ViT patches, fp32 (tile sets, 4, 16, cell*cell*3): one cell is one patch."""
        flat = torch.from_numpy(self.cells.reshape(*self.cells.shape[:3], -1)).to(device)
        return (flat.float() / 255 - 0.5) / 0.5


def maze_of(board: Sequence[int]) -> nav.Maze:
    """The maze of a row of cell kinds."""
    size = round(len(board) ** 0.5)
    cells = list(board)
    holes = frozenset(i for i, kind in enumerate(cells) if kind == tiles.HOLE)
    return nav.Maze(size, cells.index(tiles.START), cells.index(tiles.GOAL), holes)


class Bank:
    """Boards of one size on a device, with what follows from them (M mazes, C = N*N cells).

    Attributes:
        kinds: (M, C) int64. start, goal: (M,) int64.
        target: (M, C, 4) int64, the cell each move leads to, or -1 if it fails.
        distance: (M, C) int64, moves to the goal (a large number where it is out of reach).
        best: (M, C) int64, index in MOVES of the canonical best move (0 where there is none).
        masks: (M, C) int64, path masks of the canonical shortest path from the start.
    """

    def __init__(self, boards: np.ndarray, device: torch.device | str) -> None:
        self.kinds = torch.from_numpy(boards).to(device).long()
        self.size = round(boards.shape[1] ** 0.5)
        self.start = (self.kinds == tiles.START).int().argmax(1)
        self.goal = (self.kinds == tiles.GOAL).int().argmax(1)
        around = self._around().to(device)  # (C, 4)
        open_cell = (self.kinds != tiles.HOLE)[:, around.clamp_min(0)]  # (M, C, 4)
        self.target = torch.where(open_cell & (around >= 0), around, -1)
        self.distance = self._distances()
        self.best = (self._ahead() == self.distance[..., None] - 1).int().argmax(-1)
        self.masks = self._masks()

    def __len__(self) -> int:
        return len(self.kinds)

    def _around(self) -> Tensor:
        free = nav.Maze(self.size, 0, 1, frozenset())
        steps = [[free.step(cell, m) for m in tiles.MOVES] for cell in range(self.size**2)]
        return torch.tensor([[-1 if t is None else t for t in row] for row in steps])

    def _ahead(self) -> Tensor:
        """Distance after each move, (M, C, 4)."""
        flat = self.target.clamp_min(0).flatten(1)
        after = self.distance.gather(1, flat).view_as(self.target)
        return torch.where(self.target >= 0, after, _FAR)

    def _distances(self) -> Tensor:
        self.distance = torch.full_like(self.kinds, _FAR)
        self.distance.scatter_(1, self.goal[:, None], 0)
        while True:
            closer = torch.minimum(self.distance, self._ahead().amin(-1) + 1)
            closer = torch.where(self.kinds == tiles.HOLE, _FAR, closer)
            if torch.equal(closer, self.distance):
                return closer
            self.distance = closer

    def _masks(self) -> Tensor:
        masks = torch.zeros_like(self.kinds)
        cell = self.start.clone()
        rows = torch.arange(len(self), device=cell.device)
        for _ in range(int(self.distance[rows, self.start].amax())):
            moving = cell != self.goal
            move = self.best[rows, cell]
            following = torch.where(moving, self.target[rows, cell, move], cell)
            masks[rows, cell] |= torch.where(moving, 1 << move, 0)
            masks[rows, following] |= torch.where(moving, 1 << (move ^ 1), 0)
            cell = following
        return masks


@dataclass(frozen=True)
class Episodes:
    """Walks from start to goal: moves (B, T) int64 indices in MOVES, lengths (B,), and scored
    (B, T) bool, False for a detour's wrong move (which is shown, not taught)."""

    moves: Tensor
    lengths: Tensor
    scored: Tensor


def walk(
    bank: Bank, index: Tensor, steps: int, detour: float, generator: torch.Generator
) -> Episodes:
    """Walk every maze of `index` (B,) to its goal by best moves, with random detours.

    Before each step, with probability `detour`, another valid move is made instead of the best
    one, if the goal can still be reached within `steps` moves; after it the best moves are those
    from where the walk then stands.
    """
    device = index.device
    cell, goal = bank.start[index], bank.goal[index]
    columns = []
    lengths = torch.zeros_like(index)
    for step in range(steps):
        moving = cell != goal
        best = bank.best[index, cell]
        target = bank.target[index, cell]  # (B, 4)
        after = bank.distance[index[:, None], target.clamp_min(0)]
        allowed = (target >= 0) & (after + step + 1 <= steps)
        allowed.scatter_(1, best[:, None], False)
        draws = torch.rand(len(index), 5, device=device, generator=generator)
        other = torch.where(allowed, draws[:, :4], -1.0).argmax(1)
        leave = (draws[:, 4] < detour) & allowed.any(1) & moving
        move = torch.where(leave, other, best)
        columns.append((torch.where(moving, move, 0), moving & ~leave))
        cell = torch.where(moving, target.gather(1, move[:, None]).squeeze(1), cell)
        lengths += moving
    moves, scored = (torch.stack(parts, 1) for parts in zip(*columns, strict=True))
    return Episodes(moves, lengths, scored)
