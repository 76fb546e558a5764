# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The only packer: contexts become one sequence that `Bagel.forward` takes.

Text block: `<|im_start|> ids <|im_end|>`, causal, one rope position a token.
Image block: `<|vision_start|> patches <|vision_end|>`, bidirectional inside, one position for all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from data.sequence import Context, ImageSegment, Segment, TextSegment
from modeling.bagel.attention import AttentionLayout, Block
from modeling.bagel.batch import PackedBatch
from modeling.bagel.config import SpecialTokens


def segment_length(segment: Segment) -> int:
    """Rows a segment takes, its two markers included."""
    body = segment.ids if isinstance(segment, TextSegment) else segment.patches
    return len(body) + 2


def context_length(context: Iterable[Segment]) -> int:
    """Rows of a context."""
    return sum(segment_length(segment) for segment in context)


class _Builder:
    """Collects the rows of one pack."""

    def __init__(self, special: SpecialTokens) -> None:
        self.special = special
        self.row = 0
        self.text_ids: list[int] = []
        self.text_rows: list[int] = []
        self.positions: list[int] = []
        self.images: list[ImageSegment] = []
        self.vit_rows: list[np.ndarray] = []
        self.score_rows: list[int] = []
        self.score_labels: list[int] = []

    def put_text(self, ids: Iterable[int], positions: Iterable[int]) -> None:
        for token, position in zip(ids, positions, strict=True):
            self.text_ids.append(token)
            self.text_rows.append(self.row)
            self.positions.append(position)
            self.row += 1

    def add_text(self, segment: TextSegment, position: int) -> int:
        start = self.row
        ids = (self.special.bos, *segment.ids, self.special.eos)
        self.put_text(ids, range(position, position + len(ids)))
        if segment.scored is not None:
            for i, scored in enumerate(segment.scored):
                if scored:
                    self.score_rows.append(start + i)
                    self.score_labels.append(ids[i + 1])
        return position + len(ids)

    def add_image(self, segment: ImageSegment, position: int) -> int:
        self.put_text([self.special.start_of_image], [position])
        n = len(segment.patches)
        self.images.append(segment)
        self.vit_rows.append(np.arange(self.row, self.row + n))
        self.positions.extend([position] * n)
        self.row += n
        self.put_text([self.special.end_of_image], [position])
        return position + 1


def pack(
    contexts: Sequence[Sequence[Segment]],
    special: SpecialTokens,
    *,
    past: Sequence[tuple[int, int]] | None = None,
) -> PackedBatch:
    """Pack contexts one after the other, with no attention between them.

    Args:
        contexts: segments of each sample; text segments with `scored` give the scored rows.
        past: (cached rows, next rope position) of each sample when they continue a cache.

    Returns:
        a `PackedBatch` on the CPU.

    Raises:
        ValueError: no context, or an empty one.
    """
    if not contexts or any(len(context) == 0 for context in contexts):
        raise ValueError("pack() needs at least one context, each with at least one segment")
    past = past if past is not None else [(0, 0)] * len(contexts)
    builder = _Builder(special)
    lens, blocks, counts, next_positions = [], [], [], []
    for context, (_, position) in zip(contexts, past, strict=True):
        start, scored_before = builder.row, len(builder.score_rows)
        own: list[Block] = []
        for segment in context:
            if isinstance(segment, TextSegment):
                position = builder.add_text(segment, position)
            else:
                first = builder.row - start
                position = builder.add_image(segment, position)
                own.append(Block(first, builder.row - start))
        lens.append(builder.row - start)
        blocks.append(tuple(own))
        counts.append(len(builder.score_rows) - scored_before)
        next_positions.append(position)
    return PackedBatch(
        text_ids=_long(builder.text_ids),
        text_rows=_long(builder.text_rows),
        vit_patches=torch.cat([s.patches for s in builder.images]) if builder.images else None,
        vit_rows=_long(np.concatenate(builder.vit_rows) if builder.images else []),
        vit_position_ids=(
            torch.cat([s.position_ids for s in builder.images]) if builder.images else _long([])
        ),
        vit_lens=tuple(len(s.patches) for s in builder.images),
        position_ids=_long(builder.positions),
        layout=AttentionLayout(tuple(lens), tuple(n for n, _ in past), tuple(blocks)),
        score_rows=_long(builder.score_rows),
        score_labels=_long(builder.score_labels),
        score_counts=tuple(counts),
        next_positions=tuple(next_positions),
    )


def _long(values: Sequence[int] | np.ndarray) -> Tensor:
    return torch.as_tensor(np.asarray(values, dtype=np.int64))


def group_by_tokens(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Split indices into runs whose lengths sum to at most `limit` (a longer one stands alone)."""
    groups: list[list[int]] = []
    used = 0
    for index, length in enumerate(lengths):
        if not groups or used + length > limit:
            groups.append([])
            used = 0
        groups[-1].append(index)
        used += length
    return groups


__all__ = ["Context", "context_length", "group_by_tokens", "pack", "segment_length"]
