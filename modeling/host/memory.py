# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Memory of the machine: what is left, what this process holds, and a lack of it in one line."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

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


def available_bytes(root: Path = Path("/")) -> int | None:
    """Host memory that programs can still take: the machine's, or less where a container's limit
    leaves less. None: the system does not say (only Linux does).

    root: where /proc and /sys are.
    """
    found = [_kernel_value(root / "proc/meminfo", "MemAvailable:")]
    for limit, usage, stat in (
        ("memory.max", "memory.current", "memory.stat"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
    ):
        group = root / "sys/fs/cgroup"
        with suppress(OSError, ValueError):  # "max": no limit; or there is no such group
            left = int((group / limit).read_text()) - int((group / usage).read_text())
            # Pages of files are counted as used, but given back when asked for.
            found.append(left + (_kernel_value(group / stat, "inactive_file") or 0))
    return min((value for value in found if value is not None), default=None)


def own_bytes() -> int | None:
    """Memory of this process that is no file's (RssAnon); None: the system does not say."""
    return process_bytes("RssAnon")


def process_bytes(name: str, pid: int | str = "self") -> int | None:
    """An entry of /proc/PID/status: "RssAnon", "VmRSS" (with pages of mapped files), ...

    None: there is no such process, or the system does not say.
    """
    return _kernel_value(Path(f"/proc/{pid}/status"), f"{name}:")


def _kernel_value(file: Path, name: str) -> int | None:
    """A value of a file of the kernel's "NAME VALUE" lines, in bytes."""
    with suppress(OSError, ValueError):
        for line in file.read_text().splitlines():
            words = line.split()
            if words[:1] == [name]:
                return int(words[1]) * (1024 if words[2:] == ["kB"] else 1)
    return None
