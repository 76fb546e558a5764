# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""What a forward pass takes: one packed sequence of several samples (built by data/packing.py)."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from modeling.bagel.attention import AttentionLayout


@dataclass(frozen=True)
class PackedBatch:
    """Tensors, attention layout and scored rows of a packed sequence of T rows.

    Attributes:
        text_ids, text_rows: (Nt,) int64; token ids and the rows they fill.
        vit_patches: (Nv, 588) fp32 or None; vit_rows, vit_position_ids: (Nv,) int64;
            vit_lens: patches of each image.
        position_ids: (T,) int64 rope positions, restarting at each sample.
        layout: lengths, cached lengths and image blocks of each sample.
        score_rows: (S,) int64 rows whose output predicts a sampled label; score_labels: (S,)
            those labels; score_counts: scored rows of each sample, summing to S.
        next_positions: rope position that follows each sample.
    """

    text_ids: Tensor
    text_rows: Tensor
    vit_patches: Tensor | None
    vit_rows: Tensor
    vit_position_ids: Tensor
    vit_lens: tuple[int, ...]
    position_ids: Tensor
    layout: AttentionLayout
    score_rows: Tensor
    score_labels: Tensor
    score_counts: tuple[int, ...]
    next_positions: tuple[int, ...]

    @property
    def total(self) -> int:
        """Rows of the packed sequence."""
        return self.layout.total

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch with every tensor on `device`."""
        moved = {
            f.name: getattr(self, f.name).to(device, non_blocking=True)
            for f in fields(self)
            if isinstance(getattr(self, f.name), Tensor)
        }
        return replace(self, **moved)
