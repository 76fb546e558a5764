# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Weight files of a checkpoint folder: reading and writing them one tensor at a time.

The public safetensors format: 8 bytes little-endian header length, a JSON header
`key -> {dtype, shape, data_offsets}`, then the raw little-endian data without holes. Knowing the
offsets lets a saver write tensors in any order and copy untouched ones as bytes.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from modeling.host.text_files import read_json_object

# Names of the format. Weights are stored in the floating ones; the others only pass through.
FLOAT_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_NAMES = ("model", "ema")  # of weight files; the first that is there is read
_SHOWN = 20  # keys named in an error
_CHUNK_BYTES = 16 * 2**20


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file: where it lies and how to read it (nothing is read before `get`)."""

    key: str
    file: Path
    dtype: str  # name of the format
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file
    stop: int
    reader: Any  # safe_open, which maps the file; shared by the tensors of one file

    @property
    def nbytes(self) -> int:
        return self.stop - self.start

    def get(self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Tensor:
        """Read the tensor to `device` in `dtype` (the stored one if None).

        The result owns its memory: a view of the mapped file would change with the file.
        """
        mapped = self.reader.get_tensor(self.key)
        # Move first, then cast: a GPU casts faster and half-width weights travel as they are.
        tensor: Tensor = mapped.to(device=device).to(dtype=dtype or mapped.dtype)
        return tensor.clone() if tensor.data_ptr() == mapped.data_ptr() else tensor


@dataclass(frozen=True)
class ComputedTensor:
    """A tensor that no file holds, behind the interface of `StoredTensor`."""

    key: str
    value: Tensor
    dtype: str = "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    def get(self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Tensor:
        """The tensor on `device` in `dtype`; the result owns its memory."""
        return self.value.to(device=device, dtype=dtype or self.value.dtype, copy=True)


TensorSource = StoredTensor | ComputedTensor


def describe_mismatch(
    expected: Mapping[str, Sequence[int]], found: Mapping[str, TensorSource]
) -> str:
    """Every key, shape and dtype of `found` that does not fit a module; "" if all do.

    expected: shapes by key, of the module's state dict.
    """
    both = [key for key in expected if key in found]
    problems = {
        "missing": [key for key in expected if key not in found],
        "unexpected": [key for key in found if key not in expected],
        "of another shape": [
            f"{key}: found {list(found[key].shape)}, expected {list(expected[key])}"
            for key in both
            if found[key].shape != tuple(expected[key])
        ],
        "not stored in a floating dtype": [
            f"{key}: {found[key].dtype}" for key in both if found[key].dtype not in FLOAT_DTYPES
        ],
    }
    return ". ".join(
        f"{len(lines)} {what}: {'; '.join(lines[:_SHOWN])}" + "; ..." * (len(lines) > _SHOWN)
        for what, lines in problems.items()
        if lines
    )


def _damaged(file: Path, why: object) -> ValueError:
    return ValueError(
        f"{file} cannot be read: {why}. The copy or download was probably cut short: "
        "delete the file and fetch it again (python download_model.py checks the sizes)"
    )


def read_file(file: str | Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, in file order; reads the header only.

    Raises:
        ValueError: file absent, truncated or damaged, or a git-lfs pointer.
    """
    file = Path(file)
    try:
        with file.open("rb") as stream:
            first = stream.read(8)
            if first == b"version ":
                raise ValueError(
                    f"{file} is a git-lfs pointer, not the weights: run `git lfs pull`"
                )
            # Checks that the tensors' bytes follow each other, up to the end of the file.
            reader = safe_open(file, framework="pt", device="cpu")
            length = int.from_bytes(first, "little")
            header = json.loads(stream.read(length))
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        size = file.stat().st_size
        raise _damaged(file, f"its {size} bytes are no safetensors file ({error})") from error
    header.pop("__metadata__", None)
    begin = 8 + length
    tensors = []
    for key, info in header.items():
        start, stop = (begin + offset for offset in info["data_offsets"])
        shape = tuple(info["shape"])
        tensors.append(StoredTensor(key, file, info["dtype"], shape, start, stop, reader))
    tensors.sort(key=lambda tensor: (tensor.start, tensor.stop, tensor.key))
    return {tensor.key: tensor for tensor in tensors}


def _weight_map(folder: Path) -> Mapping[Path, set[str] | None]:
    """Weight files of a folder and the keys to take from each (None: all)."""
    if not os.path.isdir(folder):
        raise ValueError(
            f"the checkpoint folder {folder} does not exist; give the path of a local folder "
            "(python download_model.py --save-dir DIR fetches ThinkMorph-7B or BAGEL-7B-MoT)"
        )
    for name in _NAMES:
        file = folder / f"{name}.safetensors"
        if file.is_file():
            return {file: None}
        index = folder / f"{name}.safetensors.index.json"
        if index.is_file():
            return _read_index(index)
    wanted = " or ".join(f"{name}.safetensors (or its .index.json)" for name in _NAMES)
    found = sorted(entry.name for entry in folder.iterdir()) or ["nothing"]
    raise ValueError(
        f"{folder} has no weights: {wanted} is missing (found {', '.join(found[:20])}). "
        "Give a complete checkpoint folder, or --resume a training state instead"
    )


def _read_index(index: Path) -> dict[Path, set[str]]:
    weight_map = read_json_object(index, "weight index", fix="fetch it again").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} is not a safetensors index (no weight_map); fetch it again")
    by_file: dict[Path, set[str]] = {}
    for key, name in weight_map.items():
        # Weights are files of this folder: a path could lead to anybody's.
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]{1,200}\.safetensors", name):
            shown = repr(name[:80]) if isinstance(name, str) else f"a {type(name).__name__}"
            raise ValueError(
                f"{index} is not a safetensors index ({key[:80]!r} is in {shown}, which is no "
                "NAME.safetensors of its folder); fetch it again"
            )
        by_file.setdefault(index.parent / name, set()).add(key)
    absent = [file.name for file in by_file if not os.path.isfile(file)]
    if absent:
        named = ", ".join(absent[:8]) + f" and {len(absent) - 8} more" * (len(absent) > 8)
        raise ValueError(
            f"{index} names {named}, which {index.parent} lacks; the download is "
            "incomplete (python download_model.py resumes it)"
        )
    return by_file


def open_weights(path: str | Path) -> dict[str, StoredTensor]:
    """All tensors of a checkpoint folder by key, in file order; only headers are read.

    Those of model.safetensors or, without it, of ema.safetensors; either may be an index.

    Raises:
        ValueError: no folder, no weights, or a truncated, damaged or incomplete file.
    """
    found: dict[str, StoredTensor] = {}
    for file, keys in _weight_map(Path(path)).items():
        stored = read_file(file)
        wanted = stored.keys() if keys is None else keys
        absent = sorted(wanted - stored.keys())
        if absent:
            raise ValueError(
                f"{file} lacks {len(absent)} tensors its index promises, e.g. {absent[:3]}; "
                "fetch the folder again"
            )
        found.update({key: tensor for key, tensor in stored.items() if key in wanted})
    return found


Layout = Mapping[str, tuple[str, tuple[int, ...]]]  # key -> (dtype's name, shape)


def layout_bytes(layout: Layout) -> int:
    """Bytes of all tensors of a layout."""
    return sum(math.prod(shape) * FLOAT_DTYPES[name].itemsize for name, shape in layout.values())


class WeightWriter:
    """Writes one safetensors file whose tensors arrive in any order; `write_weights` makes it.

    Each goes to its offset piece by piece: memory beyond the caller's tensor stays near 16 MiB.
    """

    def __init__(self, stream: BinaryIO, layout: Layout) -> None:
        self.layout = layout
        self._missing = set(layout)
        self._stream = stream
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        # Wider dtypes first: readers view the data in place and need aligned offsets.
        for key in sorted(layout, key=lambda k: -FLOAT_DTYPES[layout[k][0]].itemsize):
            name, shape = layout[key]
            stop = offset + math.prod(shape) * FLOAT_DTYPES[name].itemsize
            header[key] = {"dtype": name, "shape": list(shape), "data_offsets": [offset, stop]}
            offset = stop
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        begin = 8 + len(text)
        self._offsets = {key: begin + header[key]["data_offsets"][0] for key in layout}
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(begin + offset)

    def _begin(self, key: str, shape: Iterable[int]) -> str:
        assert key in self.layout, key
        if key not in self._missing:
            raise ValueError(f"{key!r} was given twice")
        name, expected = self.layout[key]
        if tuple(shape) != expected:
            raise ValueError(f"{key!r} has shape {list(shape)}, expected {list(expected)}")
        self._missing.remove(key)
        self._stream.seek(self._offsets[key])
        return name

    def write(self, key: str, tensor: Tensor) -> None:
        """Write a full tensor (any device, any floating dtype), cast to the layout's dtype.

        Raises:
            ValueError: repeated key, wrong shape, or a finite value that float16 cannot hold.
        """
        dtype = FLOAT_DTYPES[self._begin(key, tensor.shape)]
        flat = tensor.detach().reshape(-1)
        for piece in flat.split(_CHUNK_BYTES // flat.element_size()):
            cast = piece.to(dtype)
            if dtype is torch.float16 and not torch.equal(cast.isfinite(), piece.isfinite()):
                raise ValueError(f"{key!r} holds values beyond float16's range, its stored dtype")
            self._stream.write(cast.cpu().view(torch.uint8).numpy().data)

    def copy(self, source: StoredTensor) -> None:
        """Copy a stored tensor of the same key, shape and dtype as bytes."""
        name = self._begin(source.key, source.shape)
        assert name == source.dtype, (source.key, name, source.dtype)
        with source.file.open("rb", buffering=0) as stream:
            stream.seek(source.start)
            left = source.nbytes
            while left:
                piece = stream.read(min(left, _CHUNK_BYTES))
                if not piece:
                    raise _damaged(source.file, f"it ends inside {source.key}")
                self._stream.write(piece)
                left -= len(piece)

    @property
    def missing(self) -> list[str]:
        """Keys not yet written, in the layout's order."""
        return [key for key in self.layout if key in self._missing]


@contextmanager
def write_weights(file: str | Path, layout: Layout) -> Iterator[WeightWriter]:
    """Create a safetensors file; when the block ends it is whole and on the disk.

    layout: in the order wanted, wider dtypes before narrower ones.
    """
    with Path(file).open("wb") as stream:
        writer = WeightWriter(stream, layout)
        yield writer
        assert not writer.missing, f"never written: {writer.missing[:5]}"
        stream.flush()
        os.fsync(stream.fileno())
