# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The teacher: the same network with the privileged context.

ema    fp32 shards that follow the student: e <- d e + (1 - d) p after every step
fixed  the base weights, for the whole run
self   the student's live weights
"""

from __future__ import annotations

import torch
from torch import Tensor

from modeling import fast
from modeling.bagel.bagel import Bagel
from modeling.bagel.batch import PackedBatch, SharedFeatures
from scripts.visual_opsd.training.sharding import ema_update, full_tensor


class Teacher:
    """Scores packs without gradient.

    Args:
        model: the sharded teacher, or None for mode "self".
        student: the sharded student.
    """

    def __init__(self, mode: str, model: Bagel | None, student: Bagel, ema_decay: float) -> None:
        assert (model is None) == (mode == "self"), mode
        self.mode, self.model, self.student, self.ema_decay = mode, model, student, ema_decay

    @property
    def ema(self) -> Bagel | None:
        """The model that follows the student, in mode "ema"."""
        return self.model if self.mode == "ema" else None

    def shares_features(self, device: torch.device) -> bool:
        """Whether the student takes the teacher's ViT outputs of the images both see.

        Their weights are the same where the teacher is the student, or where the ViT is frozen.
        """
        frozen = not any(p.requires_grad for p in self.student.vit_model.parameters())
        same = self.mode == "self" or frozen
        return same and device.type == "cuda" and fast.is_on("features")

    @torch.no_grad()
    def hidden(self, batch: PackedBatch, share: SharedFeatures | None = None) -> Tensor:
        """Hidden states of the scored rows, (S, H) in the compute dtype. A collective."""
        model = self.model if self.model is not None else self.student
        hidden: Tensor = model(batch, head=lambda hidden, weight: hidden, share=share)
        return hidden

    def head(self, dtype: torch.dtype) -> Tensor | None:
        """The whole head weight (V, H), gathered once a step; None when it is the student's."""
        if self.model is None:
            return None
        return full_tensor(self.model.language_model.lm_head.weight, dtype)

    def update(self) -> None:
        """Follow the student after an optimiser step."""
        if self.ema is not None:
            ema_update(self.ema, self.student, self.ema_decay)
