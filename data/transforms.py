# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""From image bytes to patches: decoding, white compositing, NaViT resize, patch order, positions.

The sizes reproduce the released models' preprocessing exactly: every image keeps its aspect ratio
as far as a multiple of the stride on both sides allows, and nothing is cropped or padded.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

DEFAULT_MAX_PIXELS = 14 * 14 * 9 * 1024
# Below Pillow's own warning threshold, so that one limit speaks, and Pillow's stays in force.
MAX_INPUT_PIXELS = 80_000_000


def _check_pixels(width: int, height: int, what: str) -> None:
    if width * height > MAX_INPUT_PIXELS:
        raise ValueError(
            f"{what} is {width} x {height} = {width * height:,} pixels, more than the limit of "
            f"{MAX_INPUT_PIXELS:,}; scale it down before using it"
        )


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL image as RGB; alpha channels and transparent colours are pasted on white.

    Raises ValueError for an image above `MAX_INPUT_PIXELS`.
    """
    _check_pixels(*image.size, "the image")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        if image.mode == "La":
            image = image.convert("LA")
        rgba = image.convert("RGBA")
        white = Image.new("RGB", rgba.size, (255, 255, 255))
        white.paste(rgba, mask=rgba.getchannel("A"))
        return white
    if image.mode.startswith("I;16"):
        # Pillow clips 16-bit grey at 255, which would leave a white image.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def decode_image(source: bytes | str | Path) -> Image.Image:
    """Fully decoded RGB image from encoded bytes or a file.

    Raises ValueError, naming the cause, for anything that is not a readable image: truncated or
    foreign bytes, or more than `MAX_INPUT_PIXELS` (found from the header, before decoding).
    A missing file stays a FileNotFoundError.
    """
    stream: Any = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        with Image.open(stream) as image:
            _check_pixels(*image.size, "the image")
            image.load()
            return to_rgb(image)
    except (FileNotFoundError, MemoryError):
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, IndexError ...
        what = f"{len(source)} bytes" if isinstance(source, bytes) else str(source)
        unknown = isinstance(error, UnidentifiedImageError)
        cause = "not in a format Pillow knows" if unknown else error
        raise ValueError(f"cannot decode the image ({what}): {cause}") from error


@runtime_checkable
class ImagePath(Protocol):
    """What turns an image into the pixels of one encoder: `ImageTransform`, `InferencerPath`."""

    @property
    def stride(self) -> int: ...

    @property
    def max_size(self) -> int: ...

    def resize(self, image: Image.Image, img_num: int = 1) -> Image.Image: ...

    def __call__(self, image: Image.Image, img_num: int = 1) -> Tensor: ...


@dataclass(frozen=True)
class ImageTransform:
    """Aspect-preserving resize to multiples of `stride`, then pixels in [-1, 1].

    The longest side is at most `max_size`, the shortest at least `min_size` where both fit, the
    area at most `max_pixels / img_num`. Area overflow is corrected by the *area* ratio and not by
    its square root: that is how the released weights were trained.
    """

    max_size: int
    min_size: int
    stride: int
    max_pixels: int = DEFAULT_MAX_PIXELS

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(
                    f"image transform: {field.name} must be a positive integer, found {value!r}"
                )
        if self.min_size > self.max_size:
            raise ValueError(
                f"image transform: min_size {self.min_size} is larger than max_size {self.max_size}"
            )
        if self.stride > self.max_size:
            raise ValueError(
                f"image transform: stride {self.stride} is larger than max_size {self.max_size}"
            )

    @classmethod
    def from_config(cls, spec: str | Mapping[str, Any]) -> ImageTransform:
        """From a preset name of `PRESETS` or a mapping of the fields. Raises ValueError."""
        if isinstance(spec, str):
            if spec not in PRESETS:
                raise ValueError(f"unknown image transform {spec!r}; known: {', '.join(PRESETS)}")
            return PRESETS[spec]
        if not isinstance(spec, Mapping):
            raise ValueError(
                f"an image transform is a preset name ({', '.join(PRESETS)}) or a "
                f"mapping with max_size, min_size, stride; found {spec!r}"
            )
        names = {field.name for field in fields(cls)}
        unknown = sorted(set(map(str, spec)) - names)
        missing = sorted({"max_size", "min_size", "stride"} - set(spec))
        if unknown or missing:
            raise ValueError(
                f"image transform: unknown keys {unknown}, missing keys {missing}; "
                f"the keys are {', '.join(f.name for f in fields(cls))}"
            )
        return cls(**spec)

    def _scaled(self, width: int, height: int, scale: float) -> tuple[int, int]:
        # Two roundings, both half-to-even: first to pixels, then to multiples of the stride.
        sides = (round(round(side * scale) / self.stride) * self.stride for side in (width, height))
        new_width, new_height = (max(self.stride, side) for side in sides)
        return new_width, new_height

    def target_size(self, width: int, height: int, img_num: int = 1) -> tuple[int, int]:
        """(width, height) after resizing; `img_num` images share the pixel budget."""
        if width < 1 or height < 1:
            raise ValueError(f"cannot resize an image of {width} x {height} pixels")
        if img_num < 1:
            raise ValueError(f"img_num must be at least 1, found {img_num}")
        scale = min(self.max_size / max(width, height), 1.0)
        scale = max(scale, self.min_size / min(width, height))
        width, height = self._scaled(width, height, scale)
        budget = self.max_pixels / img_num
        if width * height > budget:
            width, height = self._scaled(width, height, budget / (width * height))
        if max(width, height) > self.max_size:
            width, height = self._scaled(width, height, self.max_size / max(width, height))
        return width, height

    def resize(self, image: Image.Image, img_num: int = 1) -> Image.Image:
        """RGB image at its target size (bicubic)."""
        image = to_rgb(image)
        size = self.target_size(*image.size, img_num=img_num)
        return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)

    def __call__(self, image: Image.Image, img_num: int = 1) -> Tensor:
        """Pixels of one image, float32 (3, H, W) in [-1, 1]."""
        return to_pixels(self.resize(image, img_num))


# In this order: Visual-OPSD training and evaluation; the released models' own inference; their
# training; the autoencoder.
PRESETS: dict[str, ImageTransform] = {
    "opsd_vit": ImageTransform(980, 378, 14, 2_007_040),
    "wrapper_vit": ImageTransform(980, 224, 14),
    "thinkmorph_vit": ImageTransform(518, 224, 14),
    "vae": ImageTransform(1024, 512, 16),
}


@dataclass(frozen=True)
class InferencerPath:
    """The interleaved inferencer's ViT input: the VAE resize first, then the ViT transform.

    The image is resampled twice, so pixels differ from `vit(image)`.
    """

    vit: ImageTransform = PRESETS["wrapper_vit"]
    vae: ImageTransform = PRESETS["vae"]

    @property
    def stride(self) -> int:
        return self.vit.stride

    @property
    def max_size(self) -> int:
        return self.vit.max_size

    def resize(self, image: Image.Image, img_num: int = 1) -> Image.Image:
        return self.vit.resize(self.vae.resize(image, img_num), img_num)

    def __call__(self, image: Image.Image, img_num: int = 1) -> Tensor:
        """Pixels of one image, float32 (3, H, W) in [-1, 1]."""
        return to_pixels(self.resize(image, img_num))


def image_path(
    kind: str,
    vit: str | Mapping[str, Any] = "opsd_vit",
    vae: str | Mapping[str, Any] = "vae",
) -> ImageTransform | InferencerPath:
    """The ViT input path called `kind`: "direct" (training's) or "inferencer" (two resamplings).

    Raises ValueError for another kind or a wrong transform.
    """
    if kind == "direct":
        return ImageTransform.from_config(vit)
    if kind == "inferencer":
        return InferencerPath(ImageTransform.from_config(vit), ImageTransform.from_config(vae))
    raise ValueError(f"unknown image path {kind!r}; known: direct, inferencer")


def to_pixels(image: Image.Image) -> Tensor:
    """RGB image as float32 (3, H, W): u8 / 255, then (x - 0.5) / 0.5."""
    array = np.array(to_rgb(image), dtype=np.uint8)  # a copy: torch needs writable memory
    pixels = torch.from_numpy(array).permute(2, 0, 1).contiguous().float().div_(255)
    return pixels.sub_(0.5).div_(0.5)


def patchify(chw: Tensor, patch: int) -> Tensor:
    """(C, H, W) to (H/patch * W/patch, patch * patch * C).

    Patches in row-major order; inside a patch (row, column, channel). Serves ViT pixels (patch 14,
    3 channels) and latents (patch 2, 16 channels) alike.
    """
    if chw.dim() != 3:
        raise ValueError(f"patchify takes one (C, H, W) tensor, found {tuple(chw.shape)}")
    channels, height, width = chw.shape
    if height % patch or width % patch:
        raise ValueError(f"image of {height} x {width} is not a multiple of the patch size {patch}")
    grid = chw.reshape(channels, height // patch, patch, width // patch, patch)
    return grid.permute(1, 3, 2, 4, 0).reshape(-1, patch * patch * channels)


def _flat_positions(rows: Tensor, columns: Tensor, max_side: int) -> Tensor:
    return (rows[:, None] * max_side + columns[None, :]).flatten()


def extrapolated_position_ids(h: int, w: int, max_side: int) -> Tensor:
    """Table rows of an h x w patch grid, int64 (h*w,): row * max_side + column.

    Raises ValueError if a side has more patches than the table.
    """
    if h > max_side or w > max_side:
        raise ValueError(
            f"an image of {h} x {w} patches does not fit the position table of "
            f"{max_side} x {max_side}; lower the transform's max_size"
        )
    return _flat_positions(torch.arange(h), torch.arange(w), max_side)


def interpolated_position_ids(h: int, w: int, max_side: int) -> Tensor:
    """Table rows of an h x w patch grid spread over the whole table, int64 (h*w,).

    Patch i of n falls into bucket floor(i * max_side / n); integers avoid the question of which
    side a fraction on a bucket boundary is rounded to.
    """
    rows = torch.arange(h) * max_side // h
    columns = torch.arange(w) * max_side // w
    return _flat_positions(rows, columns, max_side)
