# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Room on a disk, and what a disk refused: one line each."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class DiskRefused(ValueError):
    """A disk had no room or refused to write: the same may succeed later."""


def size_text(size: float) -> str:
    """ "512 bytes", "3.1 kB", "2.0 MB", "128.0 GB"."""
    if size < 1000:
        return f"{size:.0f} bytes"
    for unit in ("kB", "MB"):
        size /= 1000
        if size < 1000:
            return f"{size:.1f} {unit}"
    return f"{size / 1000:.1f} GB"


def check_room(folder: Path, needed: float, what: str) -> None:
    """Raises DiskRefused, saying how much is needed and there, if a disk has too little room."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DiskRefused(
            f"{what} needs {size_text(needed)} but {folder} has {size_text(free)} free; make room "
            "or choose another disk"
        )


def flush_to_disk(path: Path) -> None:
    """Wait until a file's bytes, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(file: Path, content: bytes) -> None:
    """Write a file, whole or not at all: what stood there stays until the new one is on the disk.

    Raises:
        OSError: the disk refuses; nothing is left beside it.
    """
    temporary = file.with_name(file.name + ".tmp")
    try:
        temporary.write_bytes(content)
        flush_to_disk(temporary)
        os.replace(temporary, file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush_to_disk(file.parent)


@contextmanager
def disk_errors(
    doing: str, folder: Path, advice: str = "make room or choose another disk"
) -> Iterator[None]:
    """What the system refuses under `folder` (full, quota, read-only, gone) as DiskRefused."""
    try:
        yield
    except (ConnectionError, TimeoutError):
        raise  # OSErrors too, but of no disk
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        try:
            room = f"{folder} has {size_text(shutil.disk_usage(folder).free)} free"
        except OSError:
            room = f"{folder} cannot be reached"
        reason = error.strerror or error
        raise DiskRefused(f"{doing} failed: {reason}{where}; {room}; {advice}") from error
