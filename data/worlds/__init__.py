# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Generated worlds in ThinkMorph's parquet schema, each with an exact scorer.

A row written by a world names it in its `world` column and carries all its scorer needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from data.worlds import spatial_navigation

Scorer = Callable[[Mapping[str, Any], str], bool]

_SCORERS: dict[str, Scorer] = {spatial_navigation.WORLD: spatial_navigation.score}

_STATE_CHECKS: dict[str, Callable[[str | None], None]] = {
    spatial_navigation.WORLD: spatial_navigation.check_state
}


def check_world(world: str, state: str | None) -> None:
    """Raise ValueError unless the scorer of a row's world can judge by the row's `world_state`."""
    get_scorer(world)
    _STATE_CHECKS[world](state)


def get_scorer(world: str) -> Scorer:
    """The scorer `(row, generated text) -> bool` of a world.

    Raises:
        ValueError: no world has this name.
    """
    if world not in _SCORERS:
        known = ", ".join(sorted(_SCORERS))
        raise ValueError(f"unknown world {world[:60]!r}; the worlds are {known}")
    return _SCORERS[world]
