# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""A folder of weights that is there whole or not at all, written while all ranks take part."""

from __future__ import annotations

import shutil
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from modeling.host.disk import flush_to_disk


@contextmanager
def drive_to_the_end(items: Iterator[Any]) -> Iterator[None]:
    """Draw what the block leaves of `items`, also after an error in it."""
    try:
        yield
    except Exception:
        deque(items, 0)  # other ranks wait in the collectives of the remaining tensors
        raise
    deque(items, 0)


@contextmanager
def new_folder(out_dir: Path, *, overwrite: bool) -> Iterator[Path]:
    """The folder to write into, `out_dir` + ".tmp"; it gets its name when the block ends.

    After an error it is gone, and an existing `out_dir` is as it was. The block flushes its files.

    Raises:
        ValueError: `out_dir` exists and `overwrite` is False.
    """
    if out_dir.exists() and not overwrite:
        raise ValueError(f"{out_dir} exists already; choose another folder or pass overwrite=True")
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    temporary = out_dir.with_name(out_dir.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        yield temporary
        flush_to_disk(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _put_in_place(temporary, out_dir)


def write_text(file: Path, text: str) -> None:
    """Write a text file in UTF-8 and wait until it is on the disk."""
    file.write_text(text, encoding="utf-8")
    flush_to_disk(file)


def _put_in_place(temporary: Path, out_dir: Path) -> None:
    replaced = out_dir.with_name(out_dir.name + ".old")
    if out_dir.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        out_dir.rename(replaced)
    temporary.rename(out_dir)
    flush_to_disk(out_dir.parent)
    shutil.rmtree(replaced, ignore_errors=True)
