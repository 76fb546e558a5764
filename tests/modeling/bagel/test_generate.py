# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Decoding at its edges: the last token of a budget, rounds, tokens that cannot be drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from data.packing import pack
from data.sequence import TextSegment
from modeling import load_bagel
from modeling.bagel.generate import Generation, choose, generate
from tests.conftest import TINY_BAGEL


@pytest.fixture(scope="module")
def bundle() -> Any:
    return load_bagel(TINY_BAGEL)


def scripted(
    bundle: Any, script: Sequence[int], budget: int, asked: list[list[int]], skips: int = 9
) -> Generation:
    """What is decoded when the policy draws `script`, token by token, and every round asks for a
    picture; `asked` gets the ids of the rounds that were looked at."""
    special = bundle.special_tokens
    by_column = [0]  # a joint takes a column for its forced start
    for token in script:
        by_column += [token, 0] if token == special.eos else [token]
    table = torch.tensor([*by_column, *[7] * 99])

    def next_token(logits: Tensor, temperature: float, columns: Tensor | None) -> Any:
        assert columns is not None
        return table[columns.long()], torch.zeros(len(columns))

    def continues(ids: list[int]) -> bool:
        asked.append(ids)
        return True

    with patch("modeling.bagel.generate.choose", next_token):
        (found,) = generate(
            bundle.model, pack([(TextSegment((5, 6)),)], special), special, max_new_tokens=budget,
            uniforms=torch.arange(budget + 1)[None].double(), continues=continues,
            max_image_skips=skips, check_every=1,
        )  # fmt: skip
    return found


@pytest.mark.parametrize("left", [0, 1, 2, 3])
def test_a_round_begins_only_if_a_token_of_it_can_be_drawn(bundle: Any, left: int) -> None:
    """The budget counts what is fed: the end, the forced start, then what the round draws."""
    bos, eos = bundle.special_tokens.bos, bundle.special_tokens.eos
    asked: list[list[int]] = []
    found = scripted(bundle, [11, 12, eos, 21, 22], 3 + left, asked)
    if left <= 1:
        assert asked == [] and found.rounds == [0]
        assert found.ids == [11, 12, eos] and not found.capped
        return
    assert asked == [[11, 12]] and found.rounds == [0, 4]
    # The token drawn beyond the budget is none of the completion.
    assert found.capped and found.ids == [11, 12, eos, bos, 21, 22][: 2 + left]
    assert found.sampled == [True, True, True, False, True][: 2 + left]


def test_each_round_is_judged_by_itself(bundle: Any) -> None:
    bos, eos = bundle.special_tokens.bos, bundle.special_tokens.eos
    asked: list[list[int]] = []
    found = scripted(bundle, [11, eos, 21, 22, eos, 31, eos], 30, asked, skips=2)
    assert asked == [[11], [21, 22]]
    assert found.ids == [11, eos, bos, 21, 22, eos, bos, 31, eos]
    assert not found.capped and found.rounds == [0, 3, 7]


def test_a_token_of_no_probability_is_not_drawn() -> None:
    logits = torch.tensor([[-1e9, 0.0, -1e9, 0.0, -1e9]])
    for uniform, token in ((0.0, 1), (0.25, 1), (0.5, 3), (1 - 2**-53, 3)):
        found, logprob = choose(logits, 1.0, torch.tensor([uniform], dtype=torch.float64))
        assert found.tolist() == [token] and logprob.tolist() == pytest.approx([-0.6931472])


def test_the_sum_of_a_large_vocabulary_loses_no_token() -> None:
    size = 150_000
    wanted = torch.tensor([0, 1, 4_999, 77_777, size - 2, size - 1])
    uniforms = (wanted.double() + 0.5) / size
    found, _ = choose(torch.zeros(1, size).expand(len(wanted), -1), 1.0, uniforms)
    assert torch.equal(found, wanted)


def test_a_tail_below_fp32s_resolution_can_be_drawn() -> None:
    logits = torch.tensor([[0.0, -18.5]])  # the second token's probability is 9e-9
    for uniform, token in ((1 - 1e-8, 0), (1 - 1e-9, 1)):
        found, _ = choose(logits, 1.0, torch.tensor([uniform], dtype=torch.float64))
        assert found.tolist() == [token]
