# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""What a teacher is shown: for each kind nothing but the visual thoughts differs."""

from __future__ import annotations

import io
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data.packing import context_length
from data.row_groups import ParquetDataset
from data.sequence import ContextBuilder, ImageSegment, PixelSegment
from data.thinkmorph import BadRow, Row, parse_row
from data.transforms import ImageTransform, patchify, unpatchify
from data.visual_thoughts import (
    VT_KINDS,
    blank_picture,
    other_thoughts,
    show_thoughts,
    shuffle,
    shuffle_picture,
)
from modeling.release.tokenizer import load_tokenizer
from tests.conftest import TINY_BAGEL
from tests.data.synthetic import image_cell, truncated_png, write_dataset

VIT, VAE = ImageTransform(112, 14, 14), ImageTransform(64, 16, 16)
SEED = 5


def gradient(shift: int, size: tuple[int, int]) -> bytes:
    """A picture whose every patch is another, PNG."""
    grey = Image.linear_gradient("L").rotate(30 + shift).resize(size)
    turned = grey.transpose(Image.Transpose.ROTATE_180)
    stream = io.BytesIO()
    Image.merge("RGB", (grey, turned, Image.new("L", size, shift))).save(stream, "PNG")
    return stream.getvalue()


def cells(index: int) -> dict[str, Any]:
    """Sizes differ from row to row; rows 0 and 1 have the same answer, row 3 is broken."""
    size = (60 + 10 * index, 90 - 6 * index)
    changed: dict[str, Any] = {
        "problem_image_0": image_cell(gradient(index, (40, 70))),
        "reasoning_image_0": image_cell(gradient(100 + index, size)),
    }
    if index == 1:
        changed["answer"] = " Answer  0"
    if index == 3:
        changed["reasoning_image_0"] = image_cell(truncated_png())
    if index == 4:
        changed["reasoning_image_0"] = None
    return changed


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> ParquetDataset:
    folder = write_dataset(tmp_path_factory.mktemp("rows"), rows=6, change=cells)
    dataset = ParquetDataset("Jigsaw_Assembly", sorted(folder.glob("data/*.parquet")))
    return pickle.loads(pickle.dumps(dataset))  # as it reaches a loader's worker


@pytest.fixture(scope="module")
def builder() -> ContextBuilder:
    return ContextBuilder(load_tokenizer(TINY_BAGEL)[0], VIT, vae_transform=VAE)


def shown(kind: str, row: Row, builder: ContextBuilder, seed: int = SEED, **how: Any) -> Any:
    sample = parse_row(row)
    student = builder.student(sample)
    return student, builder.teacher(sample, student, show_thoughts(kind, row, sample, seed), **how)


@pytest.mark.parametrize("latents", [False, True])
@pytest.mark.parametrize("kind", VT_KINDS)
def test_nothing_but_the_visual_thoughts_differs(
    kind: str, latents: bool, rows: ParquetDataset, builder: ContextBuilder
) -> None:
    row = rows.read_row(0, 7)
    sample = parse_row(row)
    student = builder.student(sample)
    real: Any = builder.teacher(sample, student, with_latents=latents)
    _, found = shown(kind, row, builder, with_latents=latents)
    if kind == "none":
        texts = [s for s in real[len(student) :] if not isinstance(s, ImageSegment | PixelSegment)]
        assert list(found[len(student) :]) == texts and len(texts) == 2
        return
    assert context_length(found) == context_length(real) and len(found) == len(real)
    for place, (a, b) in enumerate(zip(found, real, strict=True)):
        assert type(a) is type(b)
        if place < len(student) or not isinstance(a, ImageSegment | PixelSegment):
            same = isinstance(a, ImageSegment) and torch.equal(a.patches, b.patches)
            assert same or a == b
            continue
        assert torch.equal(a.position_ids, b.position_ids)
        values, own = (s.patches if isinstance(s, ImageSegment) else s.pixels for s in (a, b))
        assert values.shape == own.shape and values.dtype == own.dtype
        assert torch.equal(values, own) == (kind == "real")
    again = shown(kind, row, builder, with_latents=latents)[1]
    other_seed, other_place = (
        shown(kind, r, builder, seed, with_latents=latents)[1][-2].patches
        for r, seed in ((row, SEED + 1), (rows.read_row(0, 8), SEED))
    )
    assert torch.equal(found[-2].patches, again[-2].patches)
    if kind in ("noise", "shuffled"):
        assert not torch.equal(found[-2].patches, other_seed)
        assert not torch.equal(found[-2].patches, other_place)


def test_what_each_control_shows(rows: ParquetDataset, builder: ContextBuilder) -> None:
    row = rows.read_row(0, 7)
    (vt,) = parse_row(row).thought_images
    size = vt.size
    image = {kind: shown(kind, row, builder)[1][-2].patches for kind in VT_KINDS[:-1]}
    assert not image["blank"].any()
    assert 0.9 < float(image["noise"].std()) < 1.1

    def ordered(patches: torch.Tensor) -> list[list[float]]:
        return sorted(patches.tolist())

    assert ordered(image["shuffled"]) == ordered(image["real"])
    problem = parse_row(row).problem_image.resize(size, Image.Resampling.BICUBIC)
    assert torch.equal(image["problem"], builder.image(problem).patches)
    # Rows 2 and 5 alone have another answer and a picture that can be read.
    resized = {
        number: builder.image(parse_row(rows.read_row(number)).thought_images[0].resize(
            size, Image.Resampling.BICUBIC)).patches
        for number in (2, 5)
    }  # fmt: skip
    taken = [
        [n for n, picture in resized.items()
         if torch.equal(picture, shown("other", rows.read_row(0, p), builder)[1][-2].patches)]
        for p in range(12)
    ]  # fmt: skip
    assert {tuple(found) for found in taken} == {(2,), (5,)}
    pixels = shown("shuffled", row, builder, with_latents=True)[1][-3].pixels
    assert ordered(patchify(pixels, 16)) == ordered(patchify(VAE(vt), 16))


def test_rows_with_several_visual_thoughts(rows: ParquetDataset, builder: ContextBuilder) -> None:
    """Two VTs and a row with one: it stands for both, in the size of each."""
    row = rows.read_row(0, 7)
    sample = parse_row(row)
    sizes = [(30, 20), (50, 60)]
    wider = replace(sample, thought_images=tuple(Image.new("RGB", size) for size in sizes))
    images = show_thoughts("other", row, wider, SEED).images
    assert [image.size for image in images] == sizes
    twice = replace(sample, thought_images=sample.thought_images * 2)
    student = builder.student(twice)
    shuffled = builder.teacher(twice, student, show_thoughts("shuffled", row, twice, SEED))
    first, second = (s.patches for s in shuffled[len(student) :] if isinstance(s, ImageSegment))
    assert not torch.equal(first, second)  # each has an order of its own


def test_a_data_set_of_one_answer_says_so(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path, rows=3, change=lambda _: {"answer": "yes"})
    dataset = ParquetDataset("Jigsaw_Assembly", sorted(folder.glob("data/*.parquet")))
    row = dataset.read_row(1, 0)
    with pytest.raises(BadRow, match="none of 3 rows of the data set has another answer") as error:
        other_thoughts(row, parse_row(row), SEED)
    assert (error.value.reason, error.value.row) == ("no_other_row", 1)


def test_patches_of_pictures_and_tensors() -> None:
    pixels = torch.arange(3 * 32 * 48).reshape(3, 32, 48)
    assert torch.equal(unpatchify(patchify(pixels, 16), 16, pixels.shape), pixels)
    first, second = (shuffle(torch.arange(40)[:, None], SEED, 1, number) for number in (0, 1))
    assert not torch.equal(first, second)  # a row's VTs have orders of their own
    values = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    picture = Image.fromarray(values)
    moved = shuffle_picture(picture, SEED, 3, 16)
    assert moved.size == picture.size and moved.tobytes() != picture.tobytes()
    tiles = [{np.array(p.crop((x, y, x + 16, y + 16))).tobytes()
              for x in (0, 16, 32) for y in (0, 16)} for p in (moved, picture)]  # fmt: skip
    assert tiles[0] == tiles[1]
    assert blank_picture((3, 2)).getpixel((2, 1)) == (128, 128, 128)
