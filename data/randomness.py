# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Every keyed stream of random numbers: one function each, called after what it is for and gives.

A stream is a pure function of its arguments. It depends on no batch, rank, device or worker, and on
no stream drawn before it, so a resumed run draws what an unbroken one would have drawn.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from PIL import Image
from torch import Tensor

# ---------------------------------------------------------------------------- which rows


def dataset_uniforms(seed: int, block: int, count: int) -> np.ndarray:
    """Numbers in [0, 1), float64 (count,): which dataset each position of a block takes."""
    words = _philox(seed, "dataset", block).random_raw(count)
    return (words >> np.uint64(11)) * 2.0**-53


def epoch_permutation(seed: int, dataset: str, split: str, epoch: int, size: int) -> np.ndarray:
    """Order of a dataset's used rows in an epoch: a permutation of range(size), int64."""
    return _permutation(_philox(seed, dataset, split, "epoch", epoch), size)


def budget_permutation(seed: int, dataset: str, split: str, size: int) -> np.ndarray:
    """Rows of a dataset, int64 (size,): the first ones are used where a budget limits them."""
    return _permutation(_philox(seed, dataset, split, "budget"), size)


def diagnostic_permutation(seed: int, number: int, size: int) -> np.ndarray:
    """Rows of the dataset of this number, int64 (size,): the diagnostic measures the first ones."""
    return _permutation(np.random.Philox(np.random.SeedSequence((seed, number))), size)


def _philox(*key: object) -> np.random.Philox:
    digest = hashlib.blake2b("\x1f".join(map(str, key)).encode(), digest_size=16).digest()
    return np.random.Philox(key=int.from_bytes(digest, "little"))


def _permutation(stream: np.random.Philox, size: int) -> np.ndarray:
    """The ranks of raw words, whose sequence NumPy guarantees, unlike that of `permutation`."""
    return np.argsort(stream.random_raw(size), kind="stable")


# ------------------------------------------------------------------ what a row is given


def position_uniforms(seed: int, step: int, row_id: int, count: int) -> Tensor:
    """Numbers in [0, 1), float64 (count,): one for each position of a row's rollout."""
    key = np.random.SeedSequence((seed, step, row_id))
    return torch.from_numpy(np.random.Generator(np.random.Philox(key)).random(count))


def noise_generator(seed: int, position: int) -> torch.Generator:
    """On the CPU: the noise control's pictures of one row of one step."""
    return torch.Generator().manual_seed((seed * 1_000_003 + position) % 2**63)


def row_generator(purpose: str, seed: int, position: int) -> torch.Generator:
    """On the CPU: what one row of one step needs for a purpose; each has a stream of its own."""
    digest = hashlib.blake2b(f"{purpose}\x1f{seed}\x1f{position}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def noise_picture(size: tuple[int, int], seed: int, index: int) -> Image.Image:
    """Uniform random pixels, size (width, height): what the noise arm shows a row."""
    numbers = np.random.default_rng([seed, index])
    return Image.fromarray(numbers.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
