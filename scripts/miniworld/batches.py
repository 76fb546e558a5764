# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Packed batches of mazes, filled on the device into a layout that `pack()` makes once.

Contexts are those of `data.sequence.ContextBuilder`, id for id and patch for patch: student =
[system, maze, question], teacher = [system, maze, question, intro, maze with path, transition].
Completions are written to a fixed length; what follows their end is causal padding that nobody
scores and nobody sees.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from data.packing import pack
from data.sequence import ImageSegment, Prompts, Segment, TextSegment
from data.transforms import extrapolated_position_ids
from data.worlds import spatial_navigation as nav
from data.worlds.tiles import MOVES
from modeling.bagel.batch import PackedBatch
from modeling.bagel.config import SpecialTokens
from scripts.miniworld.mazes import Bank, Episodes

STUDENT, TEACHER = "student", "teacher"
_BEFORE = 9  # tokens of a completion before its moves: <think> start a 1 goal a 1 </think> <answer>


def completion_length(steps: int) -> int:
    """Tokens of a completion of `steps` moves, without the markers around it."""
    return _BEFORE + steps + 1


class Vocabulary:
    """Token ids of the demo's strings, on a device.

    Raises:
        ValueError: the tokenizer splits a word of the lite style, so lengths are not fixed.
    """

    def __init__(
        self, tokenizer: Any, special: SpecialTokens, prompts: Prompts, device: torch.device | str
    ) -> None:
        self.special, self.prompts, self.tokenizer = special, prompts, tokenizer

        def ids(texts: Sequence[str]) -> Tensor:
            found = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
            if any(len(f) != 1 for f in found):
                raise ValueError(
                    f"the tokenizer does not make single tokens of {texts}; build it with "
                    "python -m scripts.miniworld.tokenizer"
                )
            return torch.tensor([f[0] for f in found], device=device)

        letters = [chr(ord("a") + i) for i in range(nav.MAX_SIZE)]
        self.columns = ids([f" {letter}" for letter in letters])
        self.rows = ids([str(i + 1) for i in range(nav.MAX_SIZE)])
        self.first_moves, self.next_moves = ids(list(MOVES)), ids([f",{m}" for m in MOVES])
        self.think, self.start, self.goal, self.end_think, self.answer, self.end_answer = (
            ids([t]) for t in ("<think>", "start", " goal", "</think>", "<answer>", "</answer>")
        )

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))

    def squares(self, cells: Tensor, size: int) -> Tensor:
        """Names of cells (B,) as ids (B, 2): " b", "3"."""
        return torch.stack([self.columns[cells % size], self.rows[cells // size]], 1)

    def completions(self, bank: Bank, index: Tensor, walked: Episodes) -> tuple[Tensor, Tensor]:
        """Ids (B, L) and the weight (B, L + 1) of each label (ids, then the final end).

        L = `completion_length(T)`; after a shorter answer's end all is `<|im_end|>`, weight 0.
        """
        batch, steps = walked.moves.shape
        length = completion_length(steps)
        ids = torch.full((batch, length), self.special.eos, device=index.device)
        start = self.squares(bank.start[index], bank.size)
        goal = self.squares(bank.goal[index], bank.size)

        def alike(token: Tensor) -> Tensor:
            return token.expand(batch, 1)

        words = [alike(self.think), alike(self.start), start, alike(self.goal), goal]
        words += [alike(self.end_think), alike(self.answer)]
        ids[:, :_BEFORE] = torch.cat(words, 1)
        ids[:, _BEFORE] = self.first_moves[walked.moves[:, 0]]
        ids[:, _BEFORE + 1 : -1] = self.next_moves[walked.moves[:, 1:]]
        place = torch.arange(length + 1, device=index.device)
        end = _BEFORE + walked.lengths[:, None]  # place of </answer>
        ids = torch.where(place[:-1] > end, self.special.eos, ids)
        ids.scatter_(1, end, alike(self.end_answer))
        weight = (place <= end + 1).float()
        weight[:, _BEFORE : _BEFORE + steps] *= (
            walked.scored | (place[_BEFORE : _BEFORE + steps] >= end)
        ).float()
        return ids, weight


@dataclass(frozen=True)
class Group:
    """`count` rows of one board size and one kind of context."""

    size: int
    kind: str
    count: int


class Template:
    """A packed batch of fixed composition whose contents are replaced for every step.

    Args:
        steps: by size, moves that completions have room for; None packs bare contexts.
        side: rows of the model's ViT position table.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        groups: Sequence[Group],
        *,
        side: int,
        steps: Mapping[int, int] | None,
        device: torch.device | str,
    ) -> None:
        self.groups = tuple(groups)
        self.vocabulary = vocabulary
        contexts = []
        starts: list[int] = []
        text_tokens = 0
        for group in groups:
            context = self._context(group, side)
            if steps is not None:
                blank = (0,) * completion_length(steps[group.size])
                context.append(TextSegment(blank, (True,) * (len(blank) + 1)))
            own = sum(len(s.ids) + 2 if isinstance(s, TextSegment) else 2 for s in context)
            for _ in range(group.count):
                contexts.append(context)
                text_tokens += own
                if steps is not None:  # the completion's ids are the sample's last text tokens
                    starts.append(text_tokens - 1 - completion_length(steps[group.size]))
        self.batch = pack(contexts, vocabulary.special).to(device)
        self._starts = torch.tensor(starts, device=device)

    def _context(self, group: Group, side: int) -> list[Segment]:
        words, prompts = self.vocabulary, self.vocabulary.prompts
        blank = torch.zeros(group.size**2, 14 * 14 * 3)
        image = ImageSegment(blank, extrapolated_position_ids(group.size, group.size, side))
        asked = prompts.question_prefix + nav.LITE_QUESTION + prompts.instruction_suffix

        def text(string: str | None) -> list[Segment]:
            return [TextSegment(words.encode(string))] if string else []

        context = [*text(prompts.system), image, *text(asked)]
        if group.kind == TEACHER:
            context += [*text(prompts.intro), image, *text(prompts.transition)]
        return context

    def fill(
        self,
        pictures: Sequence[tuple[Tensor, Tensor | None]],
        completions: Sequence[tuple[Tensor, Tensor]] | None = None,
    ) -> tuple[PackedBatch, Tensor | None]:
        """The batch with these pictures and completions.

        Args:
            pictures: per group, patches (B, C, 588) of the maze and, for a teacher, of its VT.
            completions: per group, ids (B, L) and label weights (B, L + 1).

        Returns:
            the batch, and the weight of each of its scored rows (None without completions).
        """
        flat = []
        for problem, thought in pictures:
            images = problem[:, None] if thought is None else torch.stack([problem, thought], 1)
            flat.append(images.flatten(0, 2))
        batch = replace(self.batch, vit_patches=torch.cat(flat))
        if completions is None:
            return batch, None
        text_ids, labels, weights, row = batch.text_ids.clone(), [], [], 0
        for ids, weight in completions:
            count, length = ids.shape
            places = self._starts[row : row + count, None] + torch.arange(length, device=ids.device)
            text_ids[places] = ids
            row += count
            end = ids.new_full((count, 1), self.vocabulary.special.eos)
            labels.append(torch.cat([ids, end], 1).flatten())
            weights.append(weight.flatten())
        return replace(batch, text_ids=text_ids, score_labels=torch.cat(labels)), torch.cat(weights)


def maze_pictures(
    bank: Bank, index: Tensor, patches: Tensor, tile_set: Tensor
) -> tuple[Tensor, Tensor]:
    """Patches (B, C, 588) of mazes and of their VTs, from the table (sets, 4, 16, 588).

    tile_set: (B,) int64, which tile art each row is drawn with.
    """
    kinds, sets = bank.kinds[index], tile_set[:, None]
    return patches[sets, kinds, 0], patches[sets, kinds, bank.masks[index]]
