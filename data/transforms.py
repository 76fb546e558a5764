# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""From image bytes to patches: decoding, white compositing, NaViT resize, patch order, positions.

The sizes reproduce the released models' preprocessing exactly: every image keeps its aspect ratio
as far as a multiple of the stride on both sides allows, and nothing is cropped or padded.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor

DEFAULT_MAX_PIXELS = 14 * 14 * 9 * 1024
# Below Pillow's own warning threshold, so that one limit speaks, and Pillow's stays in force.
MAX_INPUT_PIXELS = 80_000_000
# What data sets hold and Pillow decodes by itself. The others would hand a stranger's bytes to
# plugins nobody asked for, EPS to another program. (MPO is one of JPEG's.)
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_XMP = re.compile(rb"""tiff:Orientation\s*(?:=\s*["']|>)\s*([1-8])(?!\d)""")
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262  # TIFF tags
_ROUNDED = 1e-3  # what floats may exceed their range by, as a share of it


def _check_pixels(width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise ValueError(f"the image has no pixels: it is {width} x {height}")
    if width * height > MAX_INPUT_PIXELS:
        raise ValueError(
            f"the image is {width} x {height} = {width * height:,} pixels, more than the limit of "
            f"{MAX_INPUT_PIXELS:,}; scale it down before using it"
        )


@contextmanager
def _decoding(what: str) -> Iterator[None]:
    """Decoders raise OSError, SyntaxError, struct.error, IndexError ...: one ValueError for all."""
    try:
        yield
    except (FileNotFoundError, MemoryError):
        raise
    except Exception as error:
        unknown = isinstance(error, UnidentifiedImageError)
        cause = f"in none of the formats {', '.join(FORMATS)}" if unknown else error
        raise ValueError(f"cannot decode the image ({what}): {cause}") from error


def to_rgb(image: Image.Image, *, upright: bool = True) -> Image.Image:
    """Any PIL image as RGB; alpha channels and transparent colours are pasted on white.

    Turned or mirrored as its EXIF or XMP orientation says; `upright=False` leaves the pixels as
    they are stored, as the authors' code does (TIFF files Pillow turns for both). Either way the
    result holds no orientation any more. Grey of more than 8 bits: see `_grey`.

    Raises ValueError for an image above `MAX_INPUT_PIXELS`, without pixels, that cannot be
    decoded, or whose values have no known range.
    """
    if image.format == "EPS":
        raise ValueError("EPS is a program, not a picture: convert it to PNG first")
    _check_pixels(*image.size)
    with _decoding("opened by the caller"):
        _load(image)
    return _to_rgb(image, upright)


def decode_image(source: bytes | str | Path, *, upright: bool = True) -> Image.Image:
    """Fully decoded RGB image from encoded bytes or a file; `upright` as in `to_rgb`.

    Raises ValueError, naming the cause, for anything that is not a readable image: truncated or
    foreign bytes, a format that `FORMATS` lacks, what `to_rgb` refuses (too many pixels are found
    from the header, before decoding). A missing file stays a FileNotFoundError.
    """
    stream: Any = io.BytesIO(source) if isinstance(source, bytes) else source
    what = f"{len(source)} bytes" if isinstance(source, bytes) else str(source)
    with _decoding(what), Image.open(stream, formats=FORMATS) as image:
        _check_pixels(*image.size)
        _load(image)
        return _to_rgb(image, upright)


def _load(image: Image.Image) -> None:
    """Decode, and bring a PNG's transparent colour to the 8 bits that Pillow brings samples to."""
    tiles = getattr(image, "tile", None)
    raw = tiles[0].args if tiles else None
    image.load()
    key = image.info.get("transparency")
    if raw in ("L;2", "L;4") and isinstance(key, int):
        image.info["transparency"] = key * (85 if raw == "L;2" else 17)
    elif raw == "RGB;16B" and isinstance(key, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in key)


def _to_rgb(image: Image.Image, upright: bool) -> Image.Image:
    turn = _TURNS.get(_orientation(image))
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        rgb = _grey(image).convert("RGB")
    elif image.has_transparency_data:
        rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        rgb = Image.new("RGB", rgba.size, (255, 255, 255))
        rgb.paste(rgba, mask=rgba.getchannel("A"))
    elif image.mode == "RGB" and turn is None:
        return image
    else:
        rgb = image.convert("RGB")
    if turn is not None and upright:
        rgb = rgb.transpose(turn)
    rgb.info = {}  # metadata would turn it, or key out its colours, once more
    return rgb


def _orientation(image: Image.Image) -> int:
    """Orientation of a loaded image, 1 to 8: EXIF's, else XMP's; 1 where both are silent or broken.

    Read more widely than by `ImageOps.exif_transpose`: numbers of any type, XMP in any spelling,
    and where ExifTool and ImageMagick keep both in PNG files.
    """
    if isinstance(image, TiffImageFile):
        return 1  # Pillow turned it while loading
    app1 = _raw_profile(image, "APP1")
    found: Any = None
    with suppress(Exception):  # whatever comes of parsing a stranger's bytes: it stays as it is
        exif = image.getexif()
        if not exif and app1:
            exif.load(app1)
        found = exif.get(ExifTags.Base.Orientation)
        found = found[0] if isinstance(found, bytes | tuple) else found
        if found in range(1, 9):
            return int(found)
    texts = [image.info.get(name) for name in ("xmp", "XML:com.adobe.xmp")]
    for text in (*texts, _raw_profile(image, "xmp"), app1):
        data = text.encode() if isinstance(text, str) else text
        if isinstance(data, bytes) and (match := _XMP.search(data.replace(b"\0", b""))):
            return int(match[1])
    return 1


def _raw_profile(image: Image.Image, name: str) -> bytes:
    """What ImageMagick and ExifTool write as hex into a text block of a PNG; empty without it."""
    with suppress(KeyError, AttributeError, ValueError):
        return bytes.fromhex("".join(image.info[f"Raw profile type {name}"].split("\n")[3:]))
    return b""


def _grey(image: Image.Image) -> Image.Image:
    """8-bit grey of modes I;16*, I and F, black at 0; pixels of a transparent value are white.

    White is 2^16 in 16-bit modes (2^12 in a TIFF of 12 bits). Modes I and F do not say theirs: it
    is 1 for an F without larger values, else the first of 2^8, 2^10, 2^12, ... 2^32 that is above
    all values.

    Raises ValueError, naming the mode, for values that are negative, NaN or infinite, and for F
    with a maximum between 1 and 32, which fits neither 0 to 1 nor 0 to 255.
    """
    mode, values = image.mode, np.asarray(image)
    low, high = float(values.min()), float(values.max())
    tags = getattr(image, "tag_v2", {})
    if mode.startswith("I;16"):
        white = 2**12 if tags.get(_BITS_PER_SAMPLE) == (12,) else 2**16
    elif mode == "F" and high <= 1 + _ROUNDED:
        white = 1
    else:
        white = next((2**n for n in range(8, 34, 2) if high < 2**n), 0)
    if not (white and low >= -_ROUNDED * white) or (mode == "F" and 1 + _ROUNDED < high < 32):
        raise ValueError(
            f"the image is of mode {mode} with values from {low:g} to {high:g}, which fit no range "
            "that is known (0 to 1 or 0 to 2^n); save it as 8- or 16-bit grey"
        )
    scaled = values.astype(np.float32)
    scaled *= 256 / white
    grey = np.clip(scaled, 0, 255, out=scaled).astype(np.uint8)
    if tags.get(_PHOTOMETRIC) == 0:  # zero is white: Pillow minds it in 8-bit files only
        grey = 255 - grey
    if isinstance(key := image.info.get("transparency"), int):
        grey[values == key] = 255
    return Image.fromarray(grey)


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
        for name in ("min_size", "stride"):
            if getattr(self, name) > self.max_size:
                raise ValueError(
                    f"image transform: {name} {getattr(self, name)} is larger than max_size "
                    f"{self.max_size}"
                )

    @classmethod
    def from_config(cls, spec: str | Mapping[str, Any]) -> ImageTransform:
        """From a preset name of `PRESETS` or a mapping of the fields. Raises ValueError."""
        if isinstance(spec, str):
            if spec not in PRESETS:
                raise ValueError(f"unknown image transform {spec!r}; known: {', '.join(PRESETS)}")
            return PRESETS[spec]
        try:
            return cls(**spec)
        except TypeError as error:
            raise ValueError(
                f"an image transform is a preset name ({', '.join(PRESETS)}) or a mapping with "
                f"max_size, min_size, stride and perhaps max_pixels; found {spec!r}"
            ) from error

    def _scaled(self, width: int, height: int, scale: float) -> tuple[int, int]:
        # Two roundings, both half-to-even: first to pixels, then to multiples of the stride.
        sides = (round(round(side * scale) / self.stride) * self.stride for side in (width, height))
        new_width, new_height = (max(self.stride, side) for side in sides)
        return new_width, new_height

    def target_size(self, width: int, height: int, img_num: int = 1) -> tuple[int, int]:
        """(width, height) after resizing; `img_num` images share the pixel budget."""
        assert width >= 1 and height >= 1 and img_num >= 1, (width, height, img_num)
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
    channels, height, width = chw.shape
    assert height % patch == 0 and width % patch == 0, (height, width, patch)
    grid = chw.reshape(channels, height // patch, patch, width // patch, patch)
    return grid.permute(1, 3, 2, 4, 0).reshape(-1, patch * patch * channels)


def unpatchify(patches: Tensor, patch: int, shape: Sequence[int]) -> Tensor:
    """The tensor of this shape (C, H, W) of which `patchify` makes these patches."""
    channels, height, width = shape
    grid = patches.reshape(height // patch, width // patch, patch, patch, channels)
    return grid.permute(4, 0, 2, 1, 3).reshape(channels, height, width)


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
