# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""What a teacher is shown in the place of a row's visual thoughts (VTs): themselves, or a control.

A control changes the pictures and nothing else. Each of its pictures has the size of the VT that it
stands for, so contexts keep their lengths; only `none` shows no picture.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.randomness import noise_generator, other_rows, shuffled_patches
from data.thinkmorph import BadRow, Row, Sample, full_text, thought_images
from data.transforms import patchify, unpatchify

VT_KINDS = ("real", "noise", "other", "blank", "shuffled", "problem", "none")
CONTROLS = tuple(kind for kind in VT_KINDS if kind != "real")
KEYED_KINDS = ("noise", "other", "shuffled")  # those that a seed changes
# One sentence for the help of all flags that name a kind.
VT_MEANINGS = (
    "`noise`: Gaussian numbers; `other`: those of another row of the data set, which has another "
    "answer, resized to these; `blank`: mid-grey; `shuffled`: their own patches in random order; "
    "`problem`: the problem image again; `none`: no picture between the teacher's texts"
)
MAX_OTHERS = 64  # rows tried for `other` before its own row is rejected

# (values, number of the picture in its row, stride) -> values of the same shape: a picture's ViT
# patches (n, d) with stride None, or its pixels (3, stride h, stride w) for the autoencoder.
Alter: TypeAlias = Callable[[Tensor, int, int | None], Tensor]


def keep(values: Tensor, number: int, stride: int | None) -> Tensor:
    """The values as they are."""
    return values


@dataclass(frozen=True)
class ShownThoughts:
    """The pictures in the place of a row's VTs, and what becomes of them once they are tensors."""

    images: tuple[Image.Image, ...]
    alter: Alter = keep


def show_thoughts(kind: str, row: Row, sample: Sample, seed: int = 0) -> ShownThoughts:
    """What a teacher is shown for a row's VTs.

    Args:
        kind: one of `VT_KINDS`. sample: `row` parsed with its VTs.
        seed: with `row.position` the key of all random numbers.

    Raises:
        BadRow: "no_other_row", for `other`.
    """
    own, place = sample.thought_images, row.position
    if kind == "noise":
        generator = noise_generator(seed, place)
        return ShownThoughts(own, lambda x, *_: torch.randn(x.shape, generator=generator))
    if kind == "other":
        others = other_thoughts(row, sample, seed)
        pairs = ((others[i % len(others)], image) for i, image in enumerate(own))
        return ShownThoughts(tuple(resize(other, image.size) for other, image in pairs))
    if kind == "blank":
        return ShownThoughts(own, lambda x, *_: torch.zeros_like(x))  # values lie in [-1, 1]
    if kind == "shuffled":
        return ShownThoughts(own, lambda x, n, stride: shuffle(x, seed, place, n, stride))
    if kind == "problem":
        return ShownThoughts(tuple(resize(sample.problem_image, image.size) for image in own))
    if kind == "none":
        return ShownThoughts(())
    assert kind == "real", kind
    return ShownThoughts(own)


def shuffle(
    values: Tensor, seed: int, position: int, number: int = 0, stride: int | None = None
) -> Tensor:
    """Patches (n, d), or those of pixels (C, stride h, stride w), in the order of a key."""
    if stride is not None:
        patches = shuffle(patchify(values, stride), seed, position, number)
        return unpatchify(patches, stride, values.shape)
    order = shuffled_patches(seed, position, number, len(values))
    return values[torch.from_numpy(order)]


def shuffle_picture(picture: Image.Image, seed: int, position: int, stride: int) -> Image.Image:
    """An RGB picture, sides multiples of `stride`, with its patches in the order of a key."""
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    moved = shuffle(pixels, seed, position, stride=stride)
    return Image.fromarray(moved.permute(1, 2, 0).contiguous().numpy())


def blank_picture(size: tuple[int, int]) -> Image.Image:
    """A mid-grey RGB picture, size (width, height)."""
    return Image.new("RGB", size, (128, 128, 128))


def other_thoughts(row: Row, sample: Sample, seed: int) -> tuple[Image.Image, ...]:
    """The VTs of another row of the same data set, in their own sizes.

    Candidates come in the order of (seed, row.position); those of the same answer, or that cannot
    be used, are passed over.

    Raises:
        BadRow: "no_other_row": none of the first `MAX_OTHERS` will do.
    """
    assert row.source is not None, "the row does not know its data set"
    order = other_rows(seed, row.position, len(row.source))[:MAX_OTHERS]
    for index in order.tolist():
        try:
            other = row.source.read_row(index)
            differs = _plain(full_text(other, "answer")) != _plain(sample.answer)
            if differs and (images := thought_images(other)):
                return images
        except BadRow:
            continue
    raise row.bad(
        "no_other_row",
        f"none of {len(order)} rows of the data set has another answer and visual thoughts",
    )


def _plain(answer: str) -> str:
    return " ".join(answer.casefold().split())


def resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The picture in the size (width, height) of the one that it stands for."""
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)
