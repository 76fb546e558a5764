# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Image preprocessing against the recorded sizes, pixels, patches and positions."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data import transforms
from data.transforms import (
    PRESETS,
    ImageTransform,
    InferencerPath,
    decode_image,
    extrapolated_position_ids,
    image_path,
    interpolated_position_ids,
    patchify,
    to_pixels,
    to_rgb,
)
from tests.conftest import GOLDEN, assert_golden, load_golden

COLUMN_PRESETS = ["opsd_vit", "wrapper_vit", "thinkmorph_vit", "vae"]


def _recorded_transform(spec: dict[str, int]) -> ImageTransform:
    return ImageTransform(
        spec["max_image_size"], spec["min_image_size"], spec["stride"], spec["max_pixels"]
    )


def test_all_172_recorded_sizes() -> None:
    table = json.loads((GOLDEN / "01_resize_table.json").read_text())
    assert len(table["rows"]) == 172
    for width, height, img_num, *expected in table["rows"]:
        for name, (want_h, want_w) in zip(COLUMN_PRESETS, expected, strict=True):
            found = PRESETS[name].target_size(width, height, img_num)
            assert found == (want_w, want_h), (name, width, height, img_num)


@pytest.mark.parametrize("name", list(PRESETS))
def test_extreme_shapes_stay_within_the_position_table(name: str) -> None:
    transform = PRESETS[name]
    shapes = [(1, 1), (1, 60_000), (60_000, 1), (8_000, 10_000), (3, 2_000_000), (980, 981)]
    for width, height in shapes:
        for img_num in (1, 8):
            for side in transform.target_size(width, height, img_num):
                assert side % transform.stride == 0
                assert transform.stride <= side <= transform.max_size
    with pytest.raises(ValueError, match="0 x 3 pixels"):
        transform.target_size(0, 3)
    with pytest.raises(ValueError, match="img_num must be at least 1"):
        transform.target_size(3, 3, 0)


@pytest.mark.parametrize("name", list("abcdef"))
def test_golden_image(name: str) -> None:
    meta, tensors = load_golden("01_image_transform")
    entry = meta["images"][name]
    image = Image.open(GOLDEN / entry["file"])
    assert image.mode == entry["mode"] and list(image.size) == entry["size"]
    rgb = to_rgb(image)
    assert rgb.mode == "RGB"
    assert hashlib.sha256(np.asarray(rgb).tobytes()).hexdigest() == entry["rgb_sha256"]
    assert decode_image(GOLDEN / entry["file"]).tobytes() == rgb.tobytes()
    for kind, want in entry["results"].items():
        transform = _recorded_transform(meta["transforms"][kind])
        resized = transform.resize(image)
        assert [resized.height, resized.width] == want["resized_hw"], kind
        chw = np.ascontiguousarray(np.asarray(resized).transpose(2, 0, 1))
        assert hashlib.sha256(chw.tobytes()).hexdigest() == want["resized_uint8_chw_sha256"], kind
        pixels = transform(image)
        assert pixels.dtype == torch.float32 and pixels.shape == (3, *want["resized_hw"])
        assert float(pixels.mean()) == pytest.approx(want["mean"], abs=1e-5)
        assert float(pixels.std()) == pytest.approx(want["std"], abs=1e-5)
        full, strided = f"{name}.{kind}.pixels", f"{name}.{kind}.pixels_strided"
        if full in tensors:
            assert_golden(meta, full, pixels, tensors[full])
        else:
            assert_golden(meta, strided, pixels[:, ::31, ::37], tensors[strided])


def test_golden_patches_and_positions() -> None:
    meta, tensors = load_golden("02_patchify_positions")
    assert_golden(meta, "patches_p14", patchify(tensors["image"], 14), tensors["patches_p14"])
    assert_golden(meta, "latent_tokens", patchify(tensors["latent"], 2), tensors["latent_tokens"])
    for entry in meta["positions"]:
        h, w = (entry[side] // entry["patch_size"] for side in ("img_h", "img_w"))
        side, index = entry["max_num_patches_per_side"], entry["index"]
        for kind, function in (
            ("extrapolate", extrapolated_position_ids),
            ("interpolate", interpolated_position_ids),
        ):
            name = f"{kind}{index}"
            assert_golden(meta, name, function(h, w, side), tensors[name])


@pytest.mark.parametrize("max_side", [1, 7, 64, 70])
def test_interpolated_positions_equal_the_bucketize_definition(max_side: int) -> None:
    boundaries = torch.arange(1, max_side, dtype=torch.float64) / max_side
    for n in range(1, max_side + 1):
        fractions = torch.arange(n, dtype=torch.float64) / n
        bucket = torch.bucketize(fractions, boundaries, right=True)
        assert torch.equal(interpolated_position_ids(n, 1, max_side), bucket * max_side)
        assert torch.equal(interpolated_position_ids(1, n, max_side), bucket)


def test_patchify_and_positions_refuse_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="not a multiple of the patch size 14"):
        patchify(torch.zeros(3, 28, 30), 14)
    with pytest.raises(ValueError, match=r"one \(C, H, W\) tensor"):
        patchify(torch.zeros(1, 3, 28, 28), 14)
    with pytest.raises(ValueError, match="71 x 3 patches does not fit"):
        extrapolated_position_ids(71, 3, 70)


def test_white_compositing_of_every_kind_of_transparency() -> None:
    red_half = Image.new("RGBA", (2, 1), (255, 0, 0, 128))
    red_half.putpixel((1, 0), (0, 0, 0, 0))
    rgb = to_rgb(red_half)
    assert rgb.getpixel((0, 0)) == (255, 127, 127)
    assert rgb.getpixel((1, 0)) == (255, 255, 255)

    grey = Image.new("LA", (1, 1), (0, 0))
    assert to_rgb(grey).getpixel((0, 0)) == (255, 255, 255)

    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    stream = io.BytesIO()
    palette.save(stream, "PNG", transparency=0)
    keyed = decode_image(stream.getvalue())
    assert [keyed.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (40, 50, 60)]

    stream = io.BytesIO()
    Image.new("RGB", (1, 1), (1, 2, 3)).save(stream, "PNG", transparency=(1, 2, 3))
    assert decode_image(stream.getvalue()).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV", "I", "F"])
def test_other_modes_become_rgb(mode: str) -> None:
    image = Image.new("RGB", (3, 2), (200, 200, 200)).convert("L").convert("RGB")
    converted = to_rgb(image.convert("L").convert(mode) if mode in "IF" else image.convert(mode))
    assert converted.mode == "RGB" and converted.size == (3, 2)


def test_16_bit_grey_keeps_its_shades() -> None:
    stream = io.BytesIO()
    Image.fromarray(np.array([[0, 0x8000, 0xFFFF]], dtype=np.uint16)).save(stream, "PNG")
    shades = [decode_image(stream.getvalue()).getpixel((x, 0)) for x in range(3)]
    assert shades == [(0, 0, 0), (128, 128, 128), (255, 255, 255)]


def _png(size: tuple[int, int]) -> bytes:
    stream = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(stream, "PNG")
    return stream.getvalue()


def test_undecodable_bytes_are_one_value_error() -> None:
    whole = _png((40, 30))
    for broken in (whole[: len(whole) // 2], whole[:20], b"", b"not an image", whole[8:]):
        with pytest.raises(ValueError, match="cannot decode the image"):
            decode_image(broken)
    with pytest.raises(FileNotFoundError):
        decode_image(Path("no/such/file.png"))


def test_pixel_limit_names_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    pillow_limit = Image.MAX_IMAGE_PIXELS
    assert pillow_limit is not None and pillow_limit > transforms.MAX_INPUT_PIXELS
    monkeypatch.setattr(transforms, "MAX_INPUT_PIXELS", 1_000)
    with pytest.raises(ValueError, match=r"40 x 30 = 1,200 pixels, more than the limit of 1,000"):
        decode_image(_png((40, 30)))
    with pytest.raises(ValueError, match="limit"):
        to_rgb(Image.new("RGB", (40, 30)))
    # A header that promises far more than the file holds: refused before any decoding.
    monkeypatch.undo()
    bomb = bytearray(_png((4, 4)))
    bomb[16:24] = (300_000).to_bytes(4, "big") * 2
    with pytest.raises(ValueError, match="cannot decode the image"):
        decode_image(bytes(bomb))
    assert pillow_limit == Image.MAX_IMAGE_PIXELS


def test_presets_and_mappings() -> None:
    assert ImageTransform.from_config("opsd_vit") == ImageTransform(980, 378, 14, 2_007_040)
    assert ImageTransform.from_config("wrapper_vit") == ImageTransform(980, 224, 14)
    assert ImageTransform.from_config("vae") == ImageTransform(1024, 512, 16)
    spec = {"max_size": 112, "min_size": 56, "stride": 14}
    assert ImageTransform.from_config(spec) == ImageTransform(112, 56, 14, 1_806_336)
    with pytest.raises(ValueError, match="known: opsd_vit"):
        ImageTransform.from_config("vit")
    with pytest.raises(ValueError, match=r"unknown keys \['patch'\], missing keys \['stride'\]"):
        ImageTransform.from_config({"max_size": 112, "min_size": 56, "patch": 14})
    with pytest.raises(ValueError, match="preset name"):
        ImageTransform.from_config(14)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="min_size must be a positive integer"):
        ImageTransform(112, 0, 14)
    with pytest.raises(ValueError, match="larger than max_size"):
        ImageTransform(112, 224, 14)
    with pytest.raises(ValueError, match="stride 14 is larger"):
        ImageTransform(7, 7, 14)


def test_inferencer_path_resamples_twice() -> None:
    image = Image.open(GOLDEN / "images/a.png")
    path = image_path("inferencer", vit="wrapper_vit")
    assert isinstance(path, InferencerPath) and path.stride == 14 and path.max_size == 980
    by_hand = PRESETS["wrapper_vit"](PRESETS["vae"].resize(image))
    assert torch.equal(path(image), by_hand)
    direct = image_path("direct", vit="wrapper_vit")
    assert direct == PRESETS["wrapper_vit"]
    # The VAE's minimum side of 512 enlarges this image of 640 x 480 before the ViT sees it.
    assert direct(image).shape == (3, 476, 644) and by_hand.shape == (3, 518, 686)
    large = image.resize((1024, 1024))
    assert path(large).shape == direct(large).shape == (3, 980, 980)
    with pytest.raises(ValueError, match="known: direct, inferencer"):
        image_path("packer")
    for transform in (path, direct):  # worker processes get them pickled
        assert pickle.loads(pickle.dumps(transform)) == transform


def test_pixels_cover_minus_one_to_one() -> None:
    image = Image.new("RGB", (2, 1), (0, 128, 255))
    pixels = to_pixels(image)
    assert pixels[:, 0, 0].tolist() == pytest.approx([-1.0, 128 / 127.5 - 1, 1.0], abs=1e-6)
