# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Which tokens are the answer, however a tokenizer cuts the tags."""

from __future__ import annotations

import pytest

from data.answer_tags import answer_mask


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (["<answer>", "L", ",", "R", "</answer>"], "01110"),
        (["<", "answer", ">L", ",", "R</", "answer", ">"], "0011100"),
        (["<answer>", "A", "</answer>", "<answer>", "B", "C", "</answer>"], "0000110"),
        (["<answer>", "A", "</answer>", "<answer>", "B"], "01000"),
        (["<answer>", "A", "B"], "000"),
        (["no", " answer"], "00"),
        (["<answer>", "</answer>"], "00"),
        (["<answer>\ufffd", "\ufffd", "\ufffd</answer>"], "111"),  # a character over three tokens
        (["<think>", "x<answer>y</answer>z", "w"], "010"),
    ],
)
def test_answer_mask(pieces: list[str], expected: str) -> None:
    def decode(ids: list[int]) -> str:
        return "".join(pieces[i] for i in ids)

    ids = list(range(len(pieces)))
    mask = answer_mask(ids, [True] * (len(ids) + 1), decode)
    assert "".join(str(int(x)) for x in mask) == expected + "0"  # the end is no answer
    # Forced tokens have no row; what remains keeps its verdict.
    scored = [i % 2 == 0 for i in range(len(ids) + 1)]
    half = answer_mask(ids, scored, decode)
    assert half.tolist() == [bool(m) for m, s in zip(mask, scored, strict=True) if s]
