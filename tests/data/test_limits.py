# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Which contexts are too long: rope positions and packed tokens, each with its own way out."""

from __future__ import annotations

import pytest
import torch

from data.limits import SMALLEST_IMAGE, ContextLimits
from data.packing import context_positions, pack
from data.sequence import (
    ContextBuilder,
    ImageSegment,
    LatentSegment,
    PixelSegment,
    Prompts,
    TextSegment,
)
from data.thinkmorph import BadRow, Row
from data.transforms import to_pixels
from modeling.release.tokenizer import load_tokenizer
from tests.conftest import TINY_BAGEL

ROW = Row("d", "some.parquet", 3, {})
IMAGE = ImageSegment(torch.zeros(9, 588), torch.zeros(9, dtype=torch.int64))
LATENT = LatentSegment(torch.zeros(4, 64), torch.zeros(4, dtype=torch.int64))
BLANK = LatentSegment.blank(torch.zeros(4, dtype=torch.int64))


def text(count: int) -> TextSegment:
    return TextSegment((5,) * count)


@pytest.mark.parametrize(
    "context",
    [(text(3),), (text(0), IMAGE, text(2)), (text(1), LATENT, IMAGE, BLANK, LATENT, text(4))],
)
def test_positions_are_the_packers(context: tuple[object, ...]) -> None:
    _, special = load_tokenizer(TINY_BAGEL)
    packed = pack([context], special)  # type: ignore[list-item]
    assert context_positions(context) == packed.next_positions[0]  # type: ignore[arg-type]


def test_a_picture_in_pixels_counts_as_its_latents() -> None:
    pixels = torch.zeros(3, 32, 32), torch.zeros(4, dtype=torch.int64)
    assert context_positions((PixelSegment(*pixels),)) == 1
    assert context_positions((PixelSegment(*pixels, noised=True),)) == 0


def test_an_image_takes_one_position_and_all_its_packed_tokens() -> None:
    context = (IMAGE, text(5))  # 8 positions, 18 packed tokens
    assert ContextLimits(8).problem(context) is None
    assert ContextLimits(8, tokens=18).problem(context) is None
    assert ContextLimits(12, 4, tokens=21, room=3).problem(context) is None
    for limits, words in (
        (ContextLimits(7), "takes 8 rope positions, but the model has 7 (max_position_embeddings)"),
        (ContextLimits(11, 4, "sample_max_new_tokens"), "or lower --sample_max_new_tokens"),
        (ContextLimits(tokens=17), "takes 18 of max_forward_tokens 17: raise the limit or lower"),
        (ContextLimits(tokens=20, room=3, flag="prefill_tokens"), "18 of prefill_tokens 20"),
    ):
        assert words in (limits.problem(context) or "")
        with pytest.raises(BadRow) as bad:
            limits.check(ROW, (text(0),), context)
        assert (bad.value.reason, bad.value.file, bad.value.row) == ("too_long", "some.parquet", 3)
    assert ContextLimits(10, 4).problem(context, new_positions=2) is None


def builder(**prompts: str) -> ContextBuilder:
    tokenizer, _ = load_tokenizer(TINY_BAGEL)
    return ContextBuilder(tokenizer, to_pixels, Prompts(**prompts), max_text_tokens=200)


def test_what_no_row_can_fit_is_an_error_at_start() -> None:
    short = builder(system="Hello.", intro="", transition="")
    used = context_positions(short.frame(SMALLEST_IMAGE))
    assert ContextLimits(used + 4, 4).check_settings(short).new_positions == 4
    with pytest.raises(ValueError, match=r"--max_new_tokens: .* 200 rope positions, .* has 200"):
        ContextLimits(200, 200).check_settings(short)
    with pytest.raises(ValueError, match=r"leave no room for a row: .* up to 4, but the model"):
        ContextLimits(used + 3, 4).check_settings(short)
    long = builder(system="", intro="why " * 300, transition="")
    ContextLimits(200, 4).check_settings(long)  # the student never reads it
    with pytest.raises(ValueError, match="leave no room for a row: its context takes"):
        ContextLimits(200, 4).check_settings(long, teacher=True)
    with pytest.raises(ValueError, match="leave no room for a row: a text of 1000000 characters"):
        ContextLimits(200, 4).check_settings(builder(system="x" * 1_000_000))


def test_megabytes_are_not_tokenised(monkeypatch: pytest.MonkeyPatch) -> None:
    made = builder()
    assert made.max_text is not None
    longest = max(made.tokenizer.get_vocab(), key=len)
    assert made.max_text >= 200 * len(longest)  # never fewer characters than 200 tokens may be
    monkeypatch.setattr(made.tokenizer, "encode", None)
    with pytest.raises(BadRow, match=r"^a text of 100000000 characters"):
        made.text("a" * 100_000_000)
