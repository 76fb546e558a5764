# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Every keyed stream of random numbers: one function each, called after what it is for and gives.

A stream is a pure function of its arguments. It depends on no batch, rank, device or worker, and on
no stream drawn before it, so a resumed run draws what an unbroken one would have drawn.

All streams are keyed alike, by a hash of what they are for and of their arguments. Arrays are made
of raw Philox words, whose sequence NumPy guarantees; Gaussian numbers come from torch's generator
on the CPU.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from PIL import Image
from torch import Tensor

# Stored with training states and results. A change of any stream is a new name.
RANDOMNESS_VERSION = "visual-opsd-random-2"

# ---------------------------------------------------------------------------- which rows


def dataset_uniforms(seed: int, block: int, count: int) -> np.ndarray:
    """Numbers in [0, 1), float64 (count,): which dataset each position of a block takes."""
    return _uniforms(_stream("dataset", seed, block), count)


def epoch_permutation(seed: int, dataset: str, split: str, epoch: int, size: int) -> np.ndarray:
    """Order of a dataset's used rows in an epoch: a permutation of range(size), int64."""
    return _permutation(_stream("epoch", seed, dataset, split, epoch), size)


def budget_permutation(seed: int, dataset: str, split: str, size: int) -> np.ndarray:
    """Rows of a dataset, int64 (size,): the first ones are used where a budget limits them."""
    return _permutation(_stream("budget", seed, dataset, split), size)


def diagnostic_permutation(seed: int, number: int, size: int) -> np.ndarray:
    """Rows of the dataset of this number, int64 (size,): the diagnostic measures the first ones."""
    return _permutation(_stream("diagnostic", seed, number), size)


# ------------------------------------------------------------------ what a row is given


def position_uniforms(seed: int, step: int, row_id: int, count: int, number: int = 0) -> Tensor:
    """Numbers in [0, 1), float64 (count,): one for each position of a row's rollout.

    number: which of several completions of the row; the first is the one of a row that has one.
    """
    if number:
        return torch.from_numpy(_uniforms(_stream("more", seed, step, row_id, number), count))
    return torch.from_numpy(_uniforms(_stream("rollout", seed, step, row_id), count))


def off_policy_uniform(seed: int, step: int, row_id: int) -> float:
    """In [0, 1): whether a row of a step is given its completion, by comparison with a share."""
    return float(_uniforms(_stream("off policy", seed, step, row_id), 1)[0])


def rehearsal_uniform(seed: int, step: int, row_id: int) -> float:
    """In [0, 1): whether the student of a row of a step sees what its teacher sees, likewise."""
    return float(_uniforms(_stream("rehearsal", seed, step, row_id), 1)[0])


def noise_generator(seed: int, position: int) -> torch.Generator:
    """On the CPU: the noise control's pictures of one row of one step."""
    return row_generator("noise control", seed, position)


def other_rows(seed: int, position: int, size: int) -> np.ndarray:
    """Rows of a dataset, int64 (size,): whose VTs one row of one step is shown, the first fit."""
    return _permutation(_stream("other row", seed, position), size)


def shuffled_patches(seed: int, position: int, number: int, size: int) -> np.ndarray:
    """Order of the patches of a row's VT of this number: a permutation of range(size), int64."""
    return _permutation(_stream("shuffled patches", seed, position, number), size)


def row_generator(purpose: str, seed: int, position: int) -> torch.Generator:
    """On the CPU: what one row of one step needs for a purpose; each has a stream of its own."""
    return torch.Generator().manual_seed(_hash(purpose, seed, position) >> 65)  # 63 bits


def noise_picture(size: tuple[int, int], seed: int, index: int) -> Image.Image:
    """Uniform random pixels, size (width, height): what the noise arm shows a row."""
    count = size[0] * size[1] * 3
    words = _stream("noise picture", seed, index).random_raw(-(-count // 8))
    return Image.frombytes("RGB", size, words.astype("<u8").tobytes()[:count])


# ---------------------------------------------------------------------------- the scheme


def _hash(purpose: str, *key: int | str) -> int:
    """128 bits that name a stream."""
    text = "\x1f".join(map(str, (purpose, *key)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


def _stream(purpose: str, *key: int | str) -> np.random.Philox:
    return np.random.Philox(key=_hash(purpose, *key))


def _uniforms(stream: np.random.Philox, count: int) -> np.ndarray:
    return (stream.random_raw(count) >> np.uint64(11)) * 2.0**-53


def _permutation(stream: np.random.Philox, size: int) -> np.ndarray:
    """The ranks of raw words."""
    return np.argsort(stream.random_raw(size), kind="stable")
