# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Image preprocessing against the recorded sizes, pixels, patches and positions."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from data import transforms
from data.transforms import (
    FORMATS,
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
    for wrong in ((0, 3, 1), (3, 3, 0)):
        with pytest.raises(AssertionError):
            transform.target_size(*wrong)


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
    with pytest.raises(AssertionError):
        patchify(torch.zeros(3, 28, 30), 14)
    with pytest.raises(ValueError, match="too many values"):
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


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV", "I", "F", "RGBX", "LAB"])
def test_other_modes_keep_their_pixels(mode: str) -> None:
    shades = [0, 255, 255] if mode == "1" else [10, 120, 200]
    image = Image.fromarray(np.array([shades], dtype=np.uint8)).convert("RGB")
    if mode == "LAB":
        to_lab = ImageCms.buildTransform(
            ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB"
        )
        given = ImageCms.applyTransform(image, to_lab)
        assert given is not None
    else:
        given = (image.convert("L") if mode in "IF1P" else image).convert(mode)
    assert given.mode == mode
    converted = to_rgb(given)
    assert converted.mode == "RGB" and converted.size == (3, 1)
    assert np.asarray(converted) == pytest.approx(np.asarray(image), abs=3)


@pytest.mark.parametrize("mode", ["RGBA", "RGBa", "LA", "La", "PA", "P"])
def test_modes_with_alpha(mode: str) -> None:
    """Grey 40 at half cover becomes 147 on white; without cover, white."""
    image = Image.new("RGBA", (2, 1), (40, 40, 40, 128))
    image.putpixel((1, 0), (0, 0, 0, 0))
    steps = {"RGBa": ["RGBa"], "LA": ["LA"], "La": ["LA", "La"], "PA": ["PA"]}.get(mode, [])
    if mode == "PA":
        image = Image.fromarray(np.array([[[0, 128], [1, 0]]], np.uint8), "PA")
        image.putpalette([40, 40, 40, 0, 0, 0])
    elif mode == "P":
        image = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
        image.putpalette([40, 40, 40, 128, 0, 0, 0, 0], "RGBA")
    else:
        for step in steps:
            image = image.convert(step)
    assert image.mode == mode
    assert np.asarray(to_rgb(image))[0, :, 0].tolist() == pytest.approx([147, 255], abs=1)


def _tiff(values: np.ndarray, **tags: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, "TIFF", **tags)
    return stream.getvalue()


def _shades(source: Image.Image | bytes) -> list[int]:
    rgb = decode_image(source) if isinstance(source, bytes) else to_rgb(source)
    pixels = np.asarray(rgb)
    assert (pixels == pixels[..., :1]).all()
    return pixels[0, :, 0].tolist()


def test_16_bit_grey_keeps_its_shades() -> None:
    values = np.array([[0, 0x8000, 0xFFFF]], dtype=np.uint16)
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, "PNG")
    assert _shades(stream.getvalue()) == _shades(_tiff(values)) == [0, 128, 255]
    assert _shades(_tiff(values.astype(">u2"))) == [0, 128, 255]
    # A transparent value no pixel has; one that is there.
    for key, middle in ((5, 128), (0x8000, 255)):
        stream = io.BytesIO()
        Image.fromarray(values).save(stream, "PNG", transparency=key)
        assert _shades(stream.getvalue()) == [0, middle, 255]
    for mode in ("I;16", "I;16L", "I;16B", "I;16N"):
        assert _shades(Image.new(mode, (1, 1), 0x4000)) == [64]
    image = Image.open(io.BytesIO(_tiff(np.array([[0, 0x800, 0xFFF]], dtype=np.uint16))))
    image.tag_v2[258] = (12,)  # type: ignore[attr-defined]
    assert _shades(image) == [0, 128, 255]


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.float32])
def test_tiff_whose_zero_is_white(kind: Any) -> None:
    full = {np.uint8: 255, np.uint16: 65535}.get(kind, 1)
    tiff = _tiff(np.array([[0, full]], dtype=kind))
    tag = struct.pack("<HHI", 262, 3, 1)  # PhotometricInterpretation: 1 says that black is zero
    assert tiff.count(tag + b"\1") == 1
    assert _shades(tiff) == [0, 255]
    assert _shades(tiff.replace(tag + b"\1", tag + b"\0")) == [255, 0]


@pytest.mark.parametrize(
    ("values", "shades"),
    [
        (np.array([[0, 100, 255]], np.int32), [0, 100, 255]),
        (np.array([[0, 512, 1023]], np.int32), [0, 128, 255]),
        (np.array([[0, 32768, 65535]], np.int32), [0, 128, 255]),
        (np.array([[0, 2**30, 2**31 - 1]], np.int32), [0, 64, 128]),
        (np.array([[0, 0.5, 1]], np.float32), [0, 128, 255]),
        (np.array([[-1e-4, 0.5, 1.0005]], np.float32), [0, 128, 255]),
        (np.array([[0, 100, 255]], np.float32), [0, 100, 255]),
        (np.array([[0, 32768, 65535]], np.float32), [0, 128, 255]),
        (np.array([[0.25, 0.25]], np.float32), [64, 64]),
        (np.zeros((1, 2), np.int32), [0, 0]),
    ],
)
def test_grey_without_a_stated_range(values: np.ndarray, shades: list[int]) -> None:
    assert _shades(Image.fromarray(values)) == _shades(_tiff(values)) == shades


@pytest.mark.parametrize(
    "values",
    [
        np.array([[-5, 300]], np.int32),
        np.array([[0, np.nan]], np.float32),
        np.array([[0, np.inf]], np.float32),
        np.array([[-np.inf, 1]], np.float32),
        np.array([[-1, 1]], np.float32),  # which is grey: 0 or the middle?
        np.array([[0, 1.5]], np.float32),  # of 1, of 2 or of 255?
        np.array([[0, 1e30]], np.float32),
    ],
)
def test_grey_of_no_known_range_is_refused(values: np.ndarray) -> None:
    mode = "I" if values.dtype == np.int32 else "F"
    for read in (lambda: decode_image(_tiff(values)), lambda: to_rgb(Image.fromarray(values))):
        with pytest.raises(ValueError, match=f"of mode {mode} with values from .* save it as"):
            read()


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _raw_png(depth: int, colour: int, rows: bytes, key: bytes, size: tuple[int, int]) -> bytes:
    head = struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0)
    chunks = (b"IHDR", head), (b"tRNS", key), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*chunk) for chunk in chunks)


@pytest.mark.parametrize(
    ("depth", "colour", "row", "key", "pixels"),
    [
        (1, 0, "40", "0000", [255, 255]),
        (2, 0, "70", "0001", [255, 255]),
        (2, 0, "70", "0000", [85, 255]),
        (4, 0, "2a", "0002", [255, 170]),
        (8, 0, "0780", "0007", [255, 128]),
        (16, 0, "12348000", "1234", [255, 128]),
        (16, 2, "123412341234 800080008000", "123412341234", [255, 128]),
        (16, 2, "000000000000 800080008000", "010001000100", [0, 128]),
    ],
)
def test_transparent_colours_of_any_depth(
    depth: int, colour: int, row: str, key: str, pixels: list[int]
) -> None:
    """Pillow compares samples that it brought to 8 bits with the colour as it is stored."""
    png = _raw_png(depth, colour, b"\0" + bytes.fromhex(row), bytes.fromhex(key), (2, 1))
    assert _shades(png) == _shades(Image.open(io.BytesIO(png))) == pixels


# -- orientation ------------------------------------------------------------------------------

_AS_STORED = Image.new("RGB", (24, 16), "white")
_AS_STORED.paste((255, 0, 0), (0, 0, 12, 8))
_AS_STORED.paste((0, 0, 255), (12, 8, 24, 16))
# Orientation -> numpy's turns to the left, and whether the stored columns are reversed first.
_UPRIGHT = {1: (0, 0), 2: (0, 1), 3: (2, 0), 4: (2, 1), 5: (1, 1), 6: (3, 0), 7: (3, 1), 8: (1, 0)}


def _upright(orientation: int) -> np.ndarray:
    turns, mirrored = _UPRIGHT[orientation]
    pixels = np.asarray(_AS_STORED, int)
    return np.rot90(pixels[:, ::-1] if mirrored else pixels, turns)


def _exif(orientation: Any) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


def _saved(format_: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    _AS_STORED.save(stream, format_, **options)
    return stream.getvalue()


def _text(name: str, value: str) -> PngInfo:
    info = PngInfo()
    if name.startswith("XML"):
        info.add_itxt(name, value)
    else:
        info.add_text(name, f"\nprofile\n{len(value.encode()):8}\n{value.encode().hex()}\n")
    return info


def _turned(kind: str, orientation: int) -> bytes:
    xmp = f'<rdf:Description tiff:Orientation="{orientation}"/>'
    if kind.endswith("XMP text"):
        return _saved("PNG", pnginfo=_text("XML:com.adobe.xmp", xmp))
    if kind.endswith("profile"):
        return _saved("PNG", pnginfo=_text("Raw profile type xmp", xmp))
    name, how = kind.split()
    options: dict[str, Any] = {"quality": 95} if name in ("JPEG", "MPO") else {}
    if name == "WEBP":
        options["lossless"] = True
    if name == "MPO":
        options.update(save_all=True, append_images=[_AS_STORED])
    if how == "EXIF":
        return _saved(name, exif=_exif(orientation), **options)
    return _saved(name, xmp=xmp.encode(), **options)


_KINDS = [
    "JPEG EXIF", "JPEG XMP", "PNG EXIF", "PNG XMP text", "PNG raw profile", "WEBP EXIF",
    "WEBP XMP", "MPO EXIF", "TIFF EXIF",
]  # fmt: skip


@pytest.mark.parametrize("kind", _KINDS)
def test_pictures_are_turned_upright(kind: str) -> None:
    for orientation in range(1, 9):
        data = _turned(kind, orientation)
        found = decode_image(data)
        want = _upright(orientation)
        assert found.size == (want.shape[1], want.shape[0]), orientation
        assert np.abs(np.asarray(found, int) - want).mean() < 12, orientation
        assert to_rgb(found).tobytes() == found.tobytes()  # once is enough
        with Image.open(io.BytesIO(data)) as opened:
            assert to_rgb(opened).tobytes() == found.tobytes()
            assert PRESETS["vae"].resize(opened).tobytes() == PRESETS["vae"].resize(found).tobytes()
        stored = decode_image(data, upright=False)
        if not kind.startswith("TIFF"):  # Pillow turns these, so the authors' code does
            assert np.abs(np.asarray(stored, int) - _upright(1)).mean() < 12
        assert to_rgb(stored).tobytes() == stored.tobytes()


@pytest.mark.parametrize(
    "xmp",
    [
        "<tiff:Orientation>6</tiff:Orientation>",
        "<x tiff:Orientation='6'/>",
        '<x tiff:Orientation = "6"/>',
        "<tiff:Orientation> 6 </tiff:Orientation>",
    ],
)
def test_spellings_of_xmp(xmp: str) -> None:
    for written in (xmp.encode(), xmp.encode("utf-16-le")):
        assert decode_image(_saved("JPEG", xmp=written)).size == (16, 24)
    # EXIF goes first.
    assert decode_image(_saved("JPEG", xmp=xmp.encode(), exif=_exif(1))).size == (24, 16)


@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0MM", b"\xff" * 40, _exif(9), _exif(0)])
def test_broken_orientation_leaves_the_picture(exif: Any) -> None:
    for format_ in ("JPEG", "PNG", "WEBP"):
        assert decode_image(_saved(format_, exif=exif)).size == (24, 16)


def test_metadata_of_exiftool_and_other_number_types() -> None:
    exif = _exif(6).tobytes()
    info = PngInfo()
    info.add_text("Raw profile type APP1", f"\ngeneric\n{len(exif):8}\n{exif.hex()}\n")
    assert decode_image(_saved("PNG", pnginfo=info)).size == (16, 24)
    # One BYTE and one LONG instead of a SHORT.
    for kind, value in ((1, b"\x06\0\0\0"), (4, b"\x06\0\0\0")):
        entry = struct.pack("<HHI", 274, kind, 1) + value
        data = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 1) + entry + bytes(4)
        assert decode_image(_saved("JPEG", exif=data)).size == (16, 24), kind


# -- what is no picture -----------------------------------------------------------------------


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
    with (
        Image.open(io.BytesIO(whole[: len(whole) // 2])) as opened,
        pytest.raises(ValueError, match=r"cannot decode the image \(opened by the caller\)"),
    ):
        to_rgb(opened)
    with pytest.raises(ValueError, match="has no pixels: it is 0 x 3"):
        to_rgb(Image.new("RGB", (0, 3)))
    with pytest.raises(FileNotFoundError):
        decode_image(Path("no/such/file.png"))


def test_no_other_program_sees_an_image(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def started(*_: Any, **__: Any) -> None:
        raise AssertionError("another program was started")

    monkeypatch.setattr("subprocess.Popen", started)
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", "gs")
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    (tmp_path / "picture.png").write_bytes(postscript)  # whatever its name says
    for source in (postscript, tmp_path / "picture.png"):
        with pytest.raises(ValueError, match="in none of the formats PNG, JPEG"):
            decode_image(source)
    with (
        Image.open(io.BytesIO(postscript)) as opened,
        pytest.raises(ValueError, match="EPS is a program"),
    ):
        to_rgb(opened)


@pytest.mark.parametrize("format_", [*FORMATS, "MPO"])
def test_every_format_is_read(format_: str) -> None:
    data = _saved(format_)
    assert decode_image(data).size == (24, 16)
    for broken in (data[:30], data[: len(data) // 2]):
        with pytest.raises(ValueError, match="cannot decode the image"):
            decode_image(broken)


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
    sizes = {"max_size": 112, "min_size": 56}
    for wrong in (sizes, {**sizes, "stride": 14, "patch": 14}, 14):
        with pytest.raises(ValueError, match=r"preset name .* mapping with max_size"):
            ImageTransform.from_config(wrong)  # type: ignore[arg-type]
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
