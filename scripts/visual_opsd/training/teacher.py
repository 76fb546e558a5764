# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The teacher: the same network with the privileged context.

ema    fp32 shards that follow the student: e <- d e + (1 - d) p after every step
fixed  the base weights, for the whole run
self   the student's live weights

Where the student is a frozen base with adapters, the teacher needs no model of its own: it is the
same base with no adapters (fixed), with averaged ones (ema) or with the live ones (self).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from modeling import fast
from modeling.bagel.adapters import switch_off
from modeling.bagel.bagel import Bagel
from modeling.bagel.batch import PackedBatch, SharedFeatures
from scripts.visual_opsd.training.sharding import (
    ema_update,
    full_tensor,
    local_part,
    summon_full_params,
    trained_pairs,
)


class Teacher:
    """Scores packs without gradient.

    Args:
        model: the sharded teacher, or None where it is the student.
        student: the sharded student.

    Attributes:
        ema: what follows the student, in mode "ema". follows: whether it still does.
    """

    def __init__(self, mode: str, model: Bagel | None, student: Bagel, ema_decay: float) -> None:
        self.mode, self.model, self.student, self.ema_decay = mode, model, student, ema_decay
        self.ema: nn.Module | None = model if mode == "ema" else None
        self.follows = True

    @property
    def _scores(self) -> Bagel:
        return self.model if self.model is not None else self.student

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
        hidden: Tensor = self._scores(batch, head=lambda hidden, weight: hidden, share=share)
        return hidden

    def head(self, dtype: torch.dtype) -> Tensor | None:
        """The whole head weight (V, H), gathered once a step; None when it is the student's."""
        if self.model is None:
            return None
        return full_tensor(self.model.language_model.lm_head.weight, dtype)

    @contextmanager
    def gathered(self) -> Iterator[Bagel]:
        """Its whole weights, as `summon_full_params` gives them; all ranks enter and leave."""
        with summon_full_params(self._scores) as plain:
            assert isinstance(plain, Bagel)
            yield plain

    def update(self) -> None:
        """Follow the student after an optimiser step."""
        if self.ema is not None and self.follows:
            ema_update(self.ema, self.student, self.ema_decay)


class AdapterTeacher(Teacher):
    """The teacher of a student that has adapters; the base, and so the head, is the student's."""

    def __init__(self, mode: str, student: Bagel, ema_decay: float) -> None:
        super().__init__(mode, None, student, ema_decay)
        if mode == "ema":
            self.ema = _copy_trained(student)

    @torch.no_grad()
    def hidden(self, batch: PackedBatch, share: SharedFeatures | None = None) -> Tensor:
        if self.mode == "fixed":
            with switch_off(self.student):
                return super().hidden(batch, share)
        with self._averaged():
            return super().hidden(batch, share)

    @contextmanager
    def gathered(self) -> Iterator[Bagel]:
        assert self.mode != "fixed", "the base's weights need not be gathered"
        with self._averaged(), super().gathered() as plain:
            yield plain

    def _averaged(self) -> AbstractContextManager[None]:
        """Within this the student computes with the teacher's adapters."""
        return nullcontext() if self.ema is None else _exchanged(self.ema, self.student)


def _copy_trained(model: nn.Module) -> nn.Module:
    """Copies of the shards that train, by the same names, in a module without a forward."""
    copies = nn.Module()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            path, _, own = name.rpartition(".")
            holder = copies
            for part in path.split("."):
                if part not in dict(holder.named_children()):
                    holder.add_module(part, nn.Module())
                holder = holder.get_submodule(part)
            copy = nn.Parameter(parameter.detach().clone(), requires_grad=False)
            holder.register_parameter(own, copy)
    return copies


@contextmanager
def _exchanged(other: nn.Module, model: nn.Module) -> Iterator[None]:
    """Within this the model computes with the values of `other`, which holds the model's.

    The shards are exchanged in place: the next gather, of any rank, sees them.
    """
    pairs = [(local_part(a), local_part(b)) for (_, a), (_, b) in trained_pairs(other, model)]

    @torch.no_grad()
    def exchange() -> None:
        for ours, theirs in pairs:
            kept = ours.clone()
            ours.copy_(theirs)
            theirs.copy_(kept)

    exchange()
    try:
        yield
    finally:
        exchange()
