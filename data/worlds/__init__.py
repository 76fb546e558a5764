# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Generated worlds in ThinkMorph's parquet schema, each with an exact scorer.

A row written by a world names it in its `world` column and carries all its scorer needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from data.worlds import spatial_navigation

Scorer = Callable[[Mapping[str, Any], str], bool]

# World -> its scorer, and what raises ValueError for a state that the scorer cannot judge by.
_WORLDS: dict[str, tuple[Scorer, Callable[[str | None], None]]] = {
    spatial_navigation.WORLD: (spatial_navigation.score, spatial_navigation.check_state)
}


def check_world(world: str, state: str | None) -> None:
    """Raise ValueError unless the scorer of a row's world can judge by the row's `world_state`."""
    get_scorer(world)
    _WORLDS[world][1](state)


def get_scorer(world: str) -> Scorer:
    """The scorer `(row, generated text) -> bool` of a world.

    Raises:
        ValueError: no world has this name.
    """
    if world not in _WORLDS:
        known = ", ".join(sorted(_WORLDS))
        raise ValueError(f"unknown world {world[:60]!r}; the worlds are {known}")
    return _WORLDS[world][0]
