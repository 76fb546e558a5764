# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""What the system says of its memory: the machine's, a container's, this process's."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest

from modeling.host.memory import available_bytes, own_bytes

MACHINE = {"proc/meminfo": "MemTotal: 900 kB\nMemAvailable:  500 kB\n"}


@pytest.mark.parametrize(
    ("files", "left"),
    [
        ({}, None),
        (MACHINE, 500 * 1024),
        # A container's limit counts where it leaves less; what files fill is given back.
        (
            MACHINE | {"sys/fs/cgroup/memory.max": "9000\n", "sys/fs/cgroup/memory.current": "7000"}
            | {"sys/fs/cgroup/memory.stat": "anon 10\ninactive_file 600\n"},
            2600,
        ),
        (
            MACHINE
            | {"sys/fs/cgroup/memory.max": "max\n", "sys/fs/cgroup/memory.current": "7000"},
            500 * 1024,
        ),
        (
            {"sys/fs/cgroup/memory/memory.limit_in_bytes": "5000"}
            | {"sys/fs/cgroup/memory/memory.usage_in_bytes": "1000"},
            4000,
        ),
    ],
)  # fmt: skip
def test_available_memory(tmp_path: Path, files: dict[str, str], left: int | None) -> None:
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert available_bytes(tmp_path) == left


def test_memory_of_this_process_grows_with_what_it_holds() -> None:
    before = own_bytes()
    if before is None:
        pytest.skip("the system does not say")
    # From the system itself: an allocator may hand out what an earlier test gave back to it.
    held = mmap.mmap(-1, 50_000_000, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    held.write(b"x" * len(held))
    after = own_bytes()
    assert after is not None and after - before > 40_000_000
    assert len(held) == 50_000_000
