# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Digests that tell contents apart, whatever their files and folders are called.

Up to 64 MiB everything is hashed, of more a sample: three pieces of each tensor, 64 of any other
file. A training step or another data set changes them all; one changed byte in the middle of a
large file may go unseen.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from modeling.autoencoder import AE_FILE
from modeling.release.checkpoint import is_generation_key
from modeling.release.weight_files import open_weights, read_file

_WHOLE_BYTES = 1 << 26
_SAMPLE_BYTES = 4096
_PIECES, _PIECE_BYTES = 64, 1 << 16


def file_fingerprint(path: Path) -> str:
    """Digest of a file's size and bytes; of pieces, evenly from first to last, if it is large."""
    size = path.stat().st_size
    digest = hashlib.blake2b(f"{size}\n".encode(), digest_size=16)
    with path.open("rb") as stream:
        if size <= _WHOLE_BYTES:
            digest.update(stream.read())
        else:
            for piece in range(_PIECES):
                stream.seek((size - _PIECE_BYTES) * piece // (_PIECES - 1))
                digest.update(stream.read(_PIECE_BYTES))
    return digest.hexdigest()


def weights_fingerprint(path: str | Path, *, drawing: bool = False) -> str:
    """Digest that tells two checkpoints apart, whatever their folders are called.

    Covers names, shapes and dtypes of the tensors that understanding uses, and their bytes (of
    large files the first, middle and last 4 KiB of each tensor: a training step moves them all).

    drawing: also those that drawing uses: the generation expert and the autoencoder.

    Raises:
        ValueError: as `modeling.release.weight_files.open_weights`.
    """
    digest = hashlib.blake2b(digest_size=16)
    found = sorted(open_weights(path).items())
    tensors = [t for k, t in found if drawing or not is_generation_key(k)]
    autoencoder = Path(path) / AE_FILE
    if drawing and autoencoder.is_file():
        tensors += [t for _, t in sorted(read_file(autoencoder).items())]
    whole = sum(tensor.nbytes for tensor in tensors) <= _WHOLE_BYTES
    for tensor in tensors:
        digest.update(f"{tensor.key} {tensor.dtype} {tensor.shape}\n".encode())
        if whole or tensor.nbytes <= 3 * _SAMPLE_BYTES:
            spans = [(tensor.start, tensor.nbytes)]
        else:
            middle = tensor.start + tensor.nbytes // 2
            starts = (tensor.start, middle, tensor.stop - _SAMPLE_BYTES)
            spans = [(start, _SAMPLE_BYTES) for start in starts]
        with tensor.file.open("rb") as stream:
            for start, size in spans:
                stream.seek(start)
                digest.update(stream.read(size))
    return digest.hexdigest()
