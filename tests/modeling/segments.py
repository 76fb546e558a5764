# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Segments made of numbers, for tests that pack them."""

from __future__ import annotations

from typing import Any

import torch

from data.sequence import ImageSegment, TextSegment
from data.transforms import extrapolated_position_ids


def text(count: int, start: int = 20, scored: bool = False) -> TextSegment:
    ids = tuple(range(start, start + count))
    return TextSegment(ids, (True,) * (count + 1) if scored else None)


def image(side: int, model: Any) -> ImageSegment:
    """A square of side x side patches."""
    config = model.config
    patches = torch.rand(
        side * side, config.vision.patch_dim, generator=torch.Generator().manual_seed(side)
    )
    return ImageSegment(
        patches, extrapolated_position_ids(side, side, config.vit_max_patches_per_side)
    )
