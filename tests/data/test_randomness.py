# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Every stream of random numbers is that of its key: of all of it, and of nothing else."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from data.randomness import (
    RANDOMNESS_VERSION,
    budget_permutation,
    dataset_uniforms,
    diagnostic_permutation,
    epoch_permutation,
    noise_generator,
    noise_picture,
    off_policy_uniform,
    other_rows,
    position_uniforms,
    row_generator,
    shuffled_patches,
)

SEEDS = (0, 1, 11, 2**63 - 1)
PLACES = (0, 1, 11, 111)
NAMES = ("a", "b", "ab")
PURPOSES = ("teacher", "interleaved", "drawing")
# Each stream, and values of each of its arguments.
STREAMS: list[tuple[Callable[..., Any], tuple[tuple[Any, ...], ...]]] = [
    (dataset_uniforms, (SEEDS, PLACES, (4,))),
    (epoch_permutation, (SEEDS, NAMES, NAMES, PLACES, (99,))),
    (budget_permutation, (SEEDS, NAMES, NAMES, (99,))),
    (diagnostic_permutation, (SEEDS, PLACES, (99,))),
    (position_uniforms, (SEEDS, PLACES, PLACES, (4,), (0, 1, 11))),
    (off_policy_uniform, (SEEDS, PLACES, PLACES)),
    (noise_generator, (SEEDS, PLACES)),
    (row_generator, (PURPOSES, SEEDS, PLACES)),
    (other_rows, (SEEDS, PLACES, (99,))),
    (shuffled_patches, (SEEDS, PLACES, PLACES, (99,))),
    (noise_picture, (((4, 2),), SEEDS, PLACES)),
]


def first_numbers(drawn: Any) -> tuple[float, ...]:
    """Of what a stream gives: an array, a tensor, a generator or a picture."""
    if isinstance(drawn, torch.Generator):
        drawn = torch.rand(4, dtype=torch.float64, generator=drawn)
    return tuple(np.asarray(drawn).flatten().tolist())


@pytest.mark.parametrize("stream, parts", STREAMS)
def test_each_key_has_numbers_of_its_own(
    stream: Callable[..., Any], parts: tuple[tuple[Any, ...], ...]
) -> None:
    """No part of a key is left out, and none runs into the next (1, 11 and 11, 1; "a", "b")."""
    keys = list(product(*parts))
    found = [first_numbers(stream(*key)) for key in keys]
    assert len(set(found)) == len(keys)
    assert first_numbers(stream(*keys[0])) == found[0]  # whatever was drawn since


def test_streams_of_one_key_differ_by_what_they_are_for() -> None:
    pairs = {
        tuple(dataset_uniforms(1, 2, 4)),
        tuple(position_uniforms(1, 2, 0, 4).tolist()),
        (off_policy_uniform(1, 2, 0), *position_uniforms(1, 2, 0, 4)[1:].tolist()),
        first_numbers(noise_generator(1, 2)),
        *(first_numbers(row_generator(purpose, 1, 2)) for purpose in PURPOSES),
    }
    assert len(pairs) == 4 + len(PURPOSES)
    orders = (epoch_permutation(1, "a", "b", 0, 99), budget_permutation(1, "a", "b", 99))
    assert tuple(orders[0]) != tuple(orders[1]) != tuple(diagnostic_permutation(1, 0, 99))


def test_a_longer_rollout_begins_with_the_same_numbers() -> None:
    assert torch.equal(position_uniforms(1, 2, 3, 5), position_uniforms(1, 2, 3, 9)[:5])


def test_uniforms_lie_in_the_unit_interval() -> None:
    for numbers in (position_uniforms(1, 2, 3, 4096).numpy(), dataset_uniforms(1, 2, 4096)):
        assert numbers.dtype == np.float64 and numbers.shape == (4096,)
        assert 0 <= numbers.min() < 0.01 and 0.99 < numbers.max() < 1
        assert abs(numbers.mean() - 0.5) < 0.02


@pytest.mark.parametrize("size", [0, 1, 2, 1000])
def test_permutations_hold_every_row_once(size: int) -> None:
    for order in (
        epoch_permutation(1, "name", "train", 2, size),
        budget_permutation(1, "name", "train", size),
        diagnostic_permutation(1, 2, size),
        other_rows(1, 2, size),
        shuffled_patches(1, 2, 3, size),
    ):
        assert order.dtype == np.int64 and sorted(order) == list(range(size))


def test_noise_pictures_have_the_size_asked_for() -> None:
    picture = noise_picture((6, 4), 1, 2)
    assert picture.size == (6, 4) and picture.mode == "RGB"


def test_the_numbers_are_those_of_their_version() -> None:
    """Others change every figure: rename RANDOMNESS_VERSION then, and say so in CHANGELOG."""
    assert RANDOMNESS_VERSION == "visual-opsd-random-2"
    expected = {
        "dataset": [0.4980738767417098, 0.050883559253042],
        "epoch": [3, 2, 1, 0, 4, 7, 6, 5],
        "budget": [4, 2, 6, 7, 1, 3, 5, 0],
        "diagnostic": [7, 3, 2, 4, 6, 1, 5, 0],
        "rollout": [0.6608612767444029, 0.17108239881070675],
        "second completion": [0.0270680745770564, 0.2069837603457122],
        "off policy": 0.16901307851481662,
        "noise control": [187786, 750436],
        "row": [380782, 817906],
        "noise picture": [174, 140, 86, 70, 168, 84],
    }
    found = {
        "dataset": dataset_uniforms(7, 3, 2).tolist(),
        "epoch": epoch_permutation(7, "name", "train", 3, 8).tolist(),
        "budget": budget_permutation(7, "name", "train", 8).tolist(),
        "diagnostic": diagnostic_permutation(7, 3, 8).tolist(),
        "rollout": position_uniforms(7, 3, 5, 2).tolist(),
        "second completion": position_uniforms(7, 3, 5, 2, 1).tolist(),
        "off policy": off_policy_uniform(7, 3, 5),
        "noise control": torch.randint(10**6, (2,), generator=noise_generator(7, 3)).tolist(),
        "row": torch.randint(10**6, (2,), generator=row_generator("teacher", 7, 3)).tolist(),
        "noise picture": list(noise_picture((2, 1), 7, 3).tobytes()),
    }
    assert found == expected
