# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Where the answer stands in a completion: between the last complete pair of its tags."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np

# An earlier, unclosed <answer> is no part of a pair.
_ANSWER = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)


def answer_spans(text: str) -> list[tuple[int, int]]:
    """Where the contents of complete <answer>...</answer> pairs begin and end, in order."""
    return [match.span(1) for match in _ANSWER.finditer(text)]


def answer_mask(
    ids: Sequence[int], scored: Sequence[bool], decode: Callable[[list[int]], str]
) -> np.ndarray:
    """Which scored tokens are inside the last complete <answer>...</answer>, bool (tokens,).

    A token that holds both a part of a tag and a part of the answer counts. Tokens are decoded
    one by one: a character split over tokens becomes replacement marks, which moves no tag, as
    every byte of a tag decodes to itself.

    Args:
        ids: the completion's; scored: as in `data.sequence.TextSegment`, one flag more than ids.
    """
    pieces = {token: decode([token]) for token in set(ids)}
    text = "".join(pieces[token] for token in ids)
    spans = answer_spans(text)
    start, stop = spans[-1] if spans else (0, 0)
    inside, position = [], 0
    for token in ids:
        end = position + len(pieces[token])
        inside.append(position < stop and end > start)
        position = end
    inside.append(False)  # the label after the last id is the end of the completion
    return np.array([a for a, s in zip(inside, scored, strict=True) if s], dtype=bool)
