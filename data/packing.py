# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The only packer: contexts become one sequence that `Bagel.forward` takes.

Text block: `<|im_start|> ids <|im_end|>`, causal, one rope position a token.
Image block: `<|vision_start|> patches <|vision_end|>`, bidirectional inside, one position for all.
Latent block: the same with latent tokens; a noised one is hidden from all other rows, and the
block that follows takes its position again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from data.sequence import ImageSegment, LatentSegment, PixelSegment, Segment, TextSegment
from modeling.bagel.attention import AttentionLayout, Block
from modeling.bagel.batch import PackedBatch, PackedLatents
from modeling.bagel.config import SpecialTokens
from modeling.bagel.flow import Branches, noised


def segment_length(segment: Segment) -> int:
    """Rows a segment takes, its two markers included."""
    if isinstance(segment, TextSegment):
        return len(segment.ids) + 2
    return len(segment.position_ids) + 2


def context_length(context: Iterable[Segment]) -> int:
    """Rows of a context."""
    return sum(segment_length(segment) for segment in context)


def context_positions(context: Iterable[Segment]) -> int:
    """Rope positions of a context: one for each token of a text block, one for a whole image."""
    positions = 0
    for segment in context:
        if isinstance(segment, TextSegment):
            positions += segment_length(segment)
        elif isinstance(segment, PixelSegment):
            positions += not segment.noised
        else:
            positions += not (isinstance(segment, LatentSegment) and segment.noise is not None)
    return positions


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
        self.latents: list[LatentSegment] = []
        self.latent_rows: list[np.ndarray] = []
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

    def put_image(self, n: int, position: int) -> np.ndarray:
        """Both markers and n rows between them, which are returned."""
        self.put_text([self.special.start_of_image], [position])
        rows = np.arange(self.row, self.row + n)
        self.positions.extend([position] * n)
        self.row += n
        self.put_text([self.special.end_of_image], [position])
        return rows

    def add_image(self, segment: ImageSegment, position: int) -> int:
        self.images.append(segment)
        self.vit_rows.append(self.put_image(len(segment.patches), position))
        return position + 1

    def add_latents(self, segment: LatentSegment, position: int) -> int:
        self.latents.append(segment)
        self.latent_rows.append(self.put_image(len(segment.latents), position))
        return position + (segment.noise is None)

    def add(self, context: Iterable[Segment], position: int) -> tuple[int, tuple[Block, ...]]:
        """Append a context; the position after it, and its images by their place in it."""
        start = self.row
        blocks: list[Block] = []
        for segment in context:
            if isinstance(segment, TextSegment):
                position = self.add_text(segment, position)
                continue
            assert not isinstance(segment, PixelSegment), "encode the pictures before packing"
            first, noise = self.row - start, False
            if isinstance(segment, ImageSegment):
                position = self.add_image(segment, position)
            else:
                position = self.add_latents(segment, position)
                noise = segment.noise is not None
            blocks.append(Block(first, self.row - start, noise))
        return position, tuple(blocks)

    def packed_latents(self, sample_lens: Sequence[int]) -> PackedLatents | None:
        if not self.latents:
            return None
        rows = np.concatenate(self.latent_rows)
        lens = [len(r) for r in self.latent_rows]
        tokens, targets, predicted = [], [self.latents[0].latents[:0]], [rows[:0]]
        for segment, own in zip(self.latents, self.latent_rows, strict=True):
            if segment.time is None or segment.noise is None:
                tokens.append(segment.latents)
                continue
            seen, target = noised(segment.latents, segment.noise, segment.time)
            tokens.append(seen)
            targets.append(target)
            predicted.append(own)
        velocity_rows = np.concatenate(predicted)
        bounds = np.searchsorted(velocity_rows, np.cumsum([0, *sample_lens]))
        times = [segment.time or 0.0 for segment in self.latents]
        return PackedLatents(
            tokens=torch.cat(tokens),
            rows=_long(rows),
            und_rows=_long(np.delete(np.arange(self.row), rows)),
            position_ids=torch.cat([s.position_ids for s in self.latents]),
            lens=tuple(lens),
            images=_long(np.repeat(np.arange(len(lens)), lens)),
            times=torch.tensor(times, dtype=torch.float32),
            velocity_rows=_long(velocity_rows),
            velocity_targets=torch.cat(targets),
            velocity_counts=tuple(np.diff(bounds).tolist()),
        )


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
        position, own = builder.add(context, position)
        lens.append(builder.row - start)
        blocks.append(own)
        counts.append(len(builder.score_rows) - scored_before)
        next_positions.append(position)
    images = builder.images
    return PackedBatch(
        text_ids=_long(builder.text_ids),
        text_rows=_long(builder.text_rows),
        vit_patches=torch.cat([s.patches for s in images]) if images else None,
        vit_rows=_long(np.concatenate([[], *builder.vit_rows])),
        vit_position_ids=torch.cat([_long([]), *(s.position_ids for s in images)]),
        vit_lens=tuple(len(s.patches) for s in images),
        position_ids=_long(builder.positions),
        layout=AttentionLayout(tuple(lens), tuple(n for n, _ in past), tuple(blocks)),
        score_rows=_long(builder.score_rows),
        score_labels=_long(builder.score_labels),
        score_counts=tuple(counts),
        next_positions=tuple(next_positions),
        latents=builder.packed_latents(lens),
    )


def pack_branches(
    images: Sequence[LatentSegment],
    pasts: Sequence[Sequence[tuple[int, int]]],
    special: SpecialTokens,
    *,
    together: bool = True,
) -> Branches:
    """What `denoise` takes to draw `images` (`LatentSegment.blank`) after cached contexts.

    Args:
        pasts: of each guidance branch (full context, text dropped, image dropped; as many as are
            used), (cached rows, next rope position) of each image.
        together: also pack all branches into one sequence, so that a step is one forward.
    """
    each = tuple(pack([(image,) for image in images], special, past=past) for past in pasts)
    if not together or len(pasts) == 1:
        return Branches(each, None)
    all_images = [(image,) for _ in pasts for image in images]
    return Branches(each, pack(all_images, special, past=[p for past in pasts for p in past]))


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
