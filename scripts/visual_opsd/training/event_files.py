# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Event files for TensorBoard on request: the numbers of metrics.jsonl."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

FOLDER = "tensorboard"  # in the results folder


def check_tensorboard() -> None:
    """ValueError if the package is not installed; long before it is needed."""
    try:
        _writer_class()
    except ImportError as error:
        raise ValueError(
            f"--tensorboard True needs the package tensorboard ({one_line(error)}): pip install "
            "tensorboard, or leave the flag out (metrics.jsonl is always written)"
        ) from error


class EventFiles:
    """Scalars by step in a folder. What fails is said once, and nothing is written from then on.

    Args:
        folder: made if it is not there; earlier files in it stay.
        after: the resumed step: readers drop what earlier files hold of later steps. 0 for a run
            from the start, of which nothing earlier counts.
        say: prints a line.
    """

    def __init__(self, folder: Path, after: int, say: Callable[[str], None]) -> None:
        self._say = say
        self._writer: Any = None
        first = after + 1 if after else 0  # step 0 is a validation of the base
        try:
            self._writer = _writer_class()(str(folder), purge_step=first)
        except Exception as error:  # curves for the eye must not end a run
            self._give_up(error)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Write figures of a step (non-finite ones too), so that a kill loses none of them."""
        if self._writer is None:
            return
        try:
            for name, value in numbers.items():
                self._writer.add_scalar(name, value, step)
            self._writer.flush()
        except Exception as error:
            self._give_up(error)

    def close(self) -> None:
        """May be called twice."""
        if self._writer is not None:
            with suppress(Exception):  # every line is flushed already
                self._writer.close()
            self._writer = None

    def _give_up(self, error: Exception) -> None:
        self._say(f"TensorBoard gets nothing from here on ({one_line(error)})")
        self._writer = None


def one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _writer_class() -> Any:
    from torch.utils.tensorboard import SummaryWriter  # needs the package, takes a second

    return SummaryWriter
