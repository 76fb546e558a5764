# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""A lack of memory, of a device or the machine: one line each."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_WORDS = ("out of memory", "not enough memory", "allocate memory", "bad_alloc", "alloc_failed")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device or the machine has no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in text for words in _WORDS)


class OutOfMemory(ValueError):
    """More memory is needed than there is."""


@contextmanager
def memory_errors(doing: str, advice: str, kind: type[ValueError] = OutOfMemory) -> Iterator[None]:
    """Turn a lack of memory into `kind`, which names what was done ("in the rollout") and a fix.

    What the failed functions held is let go.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)
        cause = (str(error) or type(error).__name__).splitlines()[0]
        raise kind(f"not enough memory ({cause}) {doing}: {advice}") from error
