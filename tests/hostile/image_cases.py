# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Images of every mode and orientation by their pixels, and bytes that are none or half a one."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.data.synthetic import good_row, write_parquet
from tests.hostile.programs import rows_of
from tests.hostile.runner import Case, Judge

WIDTH, HEIGHT = 48, 32
XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF '
    'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description '
    'xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="{}"/></rdf:RDF></x:xmpmeta>'
)
# How a camera that stores orientation k has turned the picture: what undoes the viewer's turn.
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, -1),
}


def _ramp(low: float, high: float) -> np.ndarray:
    """(HEIGHT, WIDTH), rising from left to right."""
    return np.tile(np.linspace(low, high, WIDTH), (HEIGHT, 1))


def _colour() -> np.ndarray:
    """(HEIGHT, WIDTH, 3): blue left, red right, green at the top."""
    picture = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    picture[:, : WIDTH // 3] = (0, 0, 250)
    picture[:, 2 * WIDTH // 3 :] = (250, 0, 0)
    picture[: HEIGHT // 4, WIDTH // 3 : 2 * WIDTH // 3] = (0, 250, 0)
    return picture


def _saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def _write(folder: Path, data: Callable[[], bytes]) -> list[str]:
    cell = {"bytes": data(), "path": None}
    file = folder / "D" / "data" / "train-0.parquet"
    write_parquet(file, [good_row(0), good_row(1, problem_image_0=cell)])
    return [str(folder / "D")]


def _second(output: str) -> dict[str, Any]:
    return rows_of(output)[1]


def _is_ramp(output: str, folder: Path) -> str | None:
    row = _second(output)
    if "bad" in row:
        return None  # rejected by name is right too
    left, middle, right = row["pixels"][0][:3]
    fine = max(left) < 60 and 85 <= min(middle) <= max(middle) <= 170 and min(right) > 195
    return None if fine else f"a ramp became {left} {middle} {right}"


def _is_colour(output: str, folder: Path) -> str | None:
    row = _second(output)
    if "bad" in row:
        return f"rejected: {row['bad']}"
    (left, _, right, top, _), (size,) = row["pixels"][0], row["sizes"]
    fine = left[2] > 150 > left[0] and right[0] > 150 > right[2] and top[1] > 150 > top[0]
    fine = fine and tuple(size) == (WIDTH, HEIGHT)
    return None if fine else f"left {left}, right {right}, top {top}, size {size}"


def _is_bad(output: str, folder: Path) -> str | None:
    row = _second(output)
    return None if "bad" in row else f"decoded as {row['sizes']} {row['pixels'][0][:3]}"


def _either(output: str, folder: Path) -> str | None:
    return None


def _image(name: str, data: Callable[[], bytes], right: Judge) -> Case:
    return Case("image", name, partial(_write, data=data), "rows", "accept", right=right)


def _png(depth: int, colour: int, rows: bytes, chunks: bytes = b"", size: Any = None) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        crc = zlib.crc32(name + body)
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", crc)

    width, height = size or (WIDTH, HEIGHT)
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunks
        + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )  # fmt: skip


def _grey16(transparent: int | None = None) -> bytes:
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in _ramp(0, 65535))
    mark = b""
    if transparent is not None:
        body = struct.pack(">H", transparent)
        mark = struct.pack(">I", 2) + b"tRNS" + body + struct.pack(">I", zlib.crc32(b"tRNS" + body))
    return _png(16, 0, lines, mark)


def _tiff(values: np.ndarray) -> bytes:
    return _saved(Image.fromarray(values), "TIFF")


def _depths() -> Iterator[Case]:
    grey = _ramp(0, 255).astype(np.uint8)
    arrays = {
        "int32 0..65535": _ramp(0, 65535).astype(np.int32),
        "int32 0..255": _ramp(0, 255).astype(np.int32),
        "int32 0..2^30": _ramp(0, 2**30 - 1).astype(np.int32),
        "int32 negative": _ramp(-1000, 1000).astype(np.int32),
        "float 0..1": _ramp(0, 1).astype(np.float32),
        "float 0..255": _ramp(0, 255).astype(np.float32),
        "float -1..1": _ramp(-1, 1).astype(np.float32),
        "float 1e30": _ramp(0, 1e30).astype(np.float32),
    }
    for name, values in arrays.items():
        yield _image(f"TIFF {name}", partial(_tiff, values), _is_ramp)
    for name, value in {"nan": np.nan, "inf": np.inf, "-inf": -np.inf}.items():
        for share in (0.01, 1.0):
            values = _ramp(0, 1).astype(np.float32)
            values.ravel()[: max(1, int(values.size * share))] = value
            wanted = _is_bad if share == 1.0 else _is_ramp
            yield _image(f"TIFF {share:.0%} {name}", partial(_tiff, values), wanted)
    yield _image("PNG 16 bits", _grey16, _is_ramp)
    for value in (1, 30000):
        yield _image(f"PNG 16 bits, {value} transparent", partial(_grey16, value), _is_ramp)
    for order in ("<u2", ">u2"):
        values = _ramp(0, 65535).astype(order)
        yield _image(f"TIFF {order}", partial(_tiff, values), _is_ramp)
    for mode in ("L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "1"):
        image = Image.fromarray(grey).convert("RGB")
        image = image.convert("L").convert(mode) if mode != "LAB" else image
        kinds = ("TIFF",) if mode in ("CMYK", "YCbCr", "LAB") else ("PNG", "TIFF")
        for kind in kinds:
            wanted = _either if mode == "1" else _is_ramp
            yield _image(f"{kind} {mode}", partial(_saved, image, kind), wanted)
    colours = Image.fromarray(_colour())
    for kind in ("JPEG", "WEBP", "GIF", "BMP", "PPM"):
        image = Image.fromarray(grey)
        yield _image(f"{kind} grey", partial(_saved, image, kind), _is_ramp)
        yield _image(f"{kind} colour", partial(_saved, colours, kind), _is_colour)
    yield _image("JPEG CMYK", partial(_saved, colours.convert("CMYK"), "JPEG"), _is_colour)


def _oriented(kind: str, turn: int, how: str) -> bytes:
    image = Image.fromarray(np.ascontiguousarray(STORED[turn](_colour())))
    options: dict[str, Any] = {"quality": 95} if kind in ("JPEG", "WEBP", "MPO") else {}
    if how == "xmp":
        options["xmp"] = XMP.format(turn).encode()
    elif kind == "TIFF":
        options["tiffinfo"] = {274: turn}
    else:
        exif = Image.Exif()
        exif[274] = turn
        options["exif"] = exif
    if kind == "MPO":
        options |= {"save_all": True, "append_images": [image]}
    return _saved(image, kind, **options)


def _orientations() -> Iterator[Case]:
    for kind in ("JPEG", "PNG", "WEBP", "TIFF", "MPO"):
        for turn in STORED:
            make = partial(_oriented, kind, turn, "exif")
            yield _image(f"{kind} orientation {turn}", make, _is_colour)
    for kind in ("JPEG", "WEBP"):
        for turn in STORED:
            make = partial(_oriented, kind, turn, "xmp")
            yield _image(f"{kind} orientation {turn} in XMP", make, _is_colour)
    for turn in (0, 9, 255, 65535):
        exif = Image.Exif()
        exif[274] = turn
        data = partial(_saved, Image.fromarray(_colour()), "JPEG", exif=exif, quality=95)
        yield _image(f"orientation {turn}, which is none", data, _is_colour)
    for body in (b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0" + b"\xff" * 40):
        data = partial(_saved, Image.fromarray(_colour()), "JPEG", exif=body, quality=95)
        yield _image(f"EXIF {body[6:14]!r}", data, _is_colour)


def _cut(data: bytes, share: float) -> bytes:
    return data[: int(len(data) * share)]


def _flipped(data: bytes, seed: int) -> bytes:
    rng, raw = np.random.default_rng(seed), bytearray(data)
    for place in rng.integers(0, len(raw), 3):
        raw[place] = int(rng.integers(0, 256))
    return bytes(raw)


def _damage() -> Iterator[Case]:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8))
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"):
        whole = _saved(noise, kind)
        for share in (0.05, 0.3, 0.7):
            yield _image(f"{kind} cut at {share}", partial(_cut, whole, share), _is_bad)
        for seed in range(5):
            yield _image(f"{kind} flipped {seed}", partial(_flipped, whole, seed), _either)
    others = {
        "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(touch) print\n%%EOF\n",
        "PDF": b"%PDF-1.4\n1 0 obj\n<<>>\nendobj\n",
        "SVG": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
        "HTML": b"<html><body>404</body></html>",
        "nothing": b"",
        "one byte": b"\x89",
        "text": "ein Bild".encode("utf-16"),
        "WMF": b"\xd7\xcd\xc6\x9a" + bytes(60),
        "FITS": b"SIMPLE  =                    T" + b" " * 2850,
        "pickle": b"cos\nsystem\n(S'touch ../canary2'\ntR.",
    }
    for name, data in others.items():
        yield _image(f"bytes of {name}", partial(bytes, data), _is_bad)
    for size in ((60_000, 60_000), (2**31 - 1, 1), (0, 5), (5, 0), (2**31, 2**31)):
        made = partial(_png, 8, 0, b"\0\0", size=size)
        yield _image(f"PNG header of {size}", made, _is_bad)
    text = struct.pack(">I", 20) + b"zTXt" + b"a\0\0" + zlib.compress(bytes(2_000_000))[:17]
    yield _image("PNG text bomb", partial(_png, 8, 0, bytes((WIDTH + 1) * HEIGHT), text), _either)
    for shape in ((1, 1), (1, 4000), (4000, 1)):
        image = Image.new("RGB", shape, (9, 9, 9))
        yield _image(f"PNG of {shape}", partial(_saved, image, "PNG"), _either)


def cases() -> Iterator[Case]:
    yield from _depths()
    yield from _orientations()
    yield from _damage()
