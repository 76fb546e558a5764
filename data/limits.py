# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""How long the contexts of a row may be, decided in one place before anything is computed.

Two things end: the rope positions that a model was trained for, of which an image takes one
whatever its size, and the packed tokens of a forward, which are what memory is spent on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from data.packing import context_length, context_positions
from data.sequence import Context, ContextBuilder, ImageSegment, PixelSegment
from data.thinkmorph import BadRow, Row

# What a row may take where a flag only says how much is computed together (lowering such a flag
# must not make rows unusable).
PACKED_TOKENS = 32768
SMALLEST_IMAGE = ImageSegment(torch.zeros(1, 0), torch.zeros(1, dtype=torch.int64))


@dataclass(frozen=True)
class ContextLimits:
    """What a row's contexts may take.

    positions: rope positions of the model (max_position_embeddings). new_positions: those that
    follow a context, by `budget` (the flag to lower). tokens: packed tokens of a context, by
    `flag` (the one to raise), of which `room` are kept for what follows. None: no limit.
    """

    positions: int | None = None
    new_positions: int = 0
    budget: str = "max_new_tokens"
    tokens: int | None = None
    flag: str = "max_forward_tokens"
    room: int = 0

    def problem(self, context: Context, new_positions: int | None = None) -> str | None:
        """Why a context is too long, None if it is not; new_positions: of this row alone."""
        new = self.new_positions if new_positions is None else new_positions
        packed, positions = context_length(context), context_positions(context)
        if self.positions is not None and positions + new > self.positions:
            follows = f" and what follows it up to {new}" if new else ""
            lower = f", or lower --{self.budget}" if self.new_positions else ""
            return (
                f"its context takes {positions} rope positions{follows}, but the model has "
                f"{self.positions} (max_position_embeddings): shorten its texts{lower}"
            )
        if self.tokens is not None and packed + self.room > self.tokens:
            sizes = "vit_max_pixels"
            if any(isinstance(segment, PixelSegment) for segment in context):
                sizes += " or vae_max_size"
            return (
                f"its context takes {packed} of {self.flag} {self.tokens}: raise the limit or "
                f"lower {sizes}"
            )
        return None

    def check(self, row: Row, *contexts: Context, new_positions: int | None = None) -> None:
        """Raise BadRow ("too_long") if one of a row's contexts does not fit."""
        for context in contexts:
            problem = self.problem(context, new_positions)
            if problem is not None:
                raise row.bad("too_long", problem)

    def check_settings(self, builder: ContextBuilder, *, teacher: bool = False) -> ContextLimits:
        """These limits, if a row without a question of its own and with tiny images fits them.

        teacher: also with the teacher's prompts.

        Raises:
            ValueError: no row can fit.
        """
        if self.positions is not None and self.new_positions >= self.positions:
            raise ValueError(
                f"--{self.budget}: the answers of a row may take {self.new_positions} rope "
                f"positions, but the model has {self.positions} (max_position_embeddings): lower it"
            )
        try:
            problem = self.problem(builder.frame(SMALLEST_IMAGE, teacher=teacher))
        except BadRow as bad:
            problem = bad.detail
        if problem is not None:
            raise ValueError(f"the prompts (see --prompts) leave no room for a row: {problem}")
        return self


NO_LIMITS = ContextLimits()
