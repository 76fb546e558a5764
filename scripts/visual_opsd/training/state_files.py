# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""What proves that a training state is the one that was written: its marker.

`complete.json` is written last and holds the size and digest of every file, and a digest of its
own contents. Each rank hashes the files that it wrote, and on loading those that it will read;
blocks of a file are hashed by several threads.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from modeling.host.text_files import read_json_object
from scripts.visual_opsd.processes import DistEnv, gather_objects

MARKER = "complete.json"
FORMAT_VERSION = 2  # 1 had no digests: its files are believed by their sizes
WITHOUT_FROZEN = 3  # the same without the student's frozen parameters, which are the base's
STEP_NAME = re.compile(r"step_([0-9]+)")
# Of which rank a file is: torch.distributed.checkpoint calls shards __RANK_NUMBER.distcp.
_RANK_NAME = re.compile(r"(?:state/__|rng_)([0-9]+)[_.].*")
_FIELDS = ("step", "world_size", "has_ema", "has_optimizer", "config_hash", "config", "files")
_BLOCK_BYTES = 1 << 24
_MAX_THREADS = 4
_SHOWN = 3


class DamagedState(ValueError):
    """A training state that is not what was written; names the file and what is wrong with it."""


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def _seal(marker: Mapping[str, Any]) -> str:
    unsealed = {key: value for key, value in marker.items() if key != "digest"}
    return _digest(json.dumps(unsealed, sort_keys=True).encode()).hex()


def file_digest(path: Path, threads: int = 1) -> str:
    """Digest of the digests of a file's blocks of 16 MiB."""
    with path.open("rb") as stream, ThreadPoolExecutor(threads) as pool:
        descriptor = stream.fileno()
        starts = range(0, os.fstat(descriptor).st_size, _BLOCK_BYTES)
        blocks = pool.map(lambda start: _digest(os.pread(descriptor, _BLOCK_BYTES, start)), starts)
        return _digest(b"".join(blocks)).hex()


def _threads(env: DistEnv) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(_MAX_THREADS, (cores or 1) // env.local_world_size))


def _is_mine(name: str, env: DistEnv) -> bool:
    match = _RANK_NAME.fullmatch(name)
    return (int(match[1]) if match else 0) % env.world_size == env.rank


def describe_files(folder: Path, env: DistEnv) -> dict[str, tuple[int, str]]:
    """Size and digest of the files in `folder` that this rank wrote."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if _is_mine(name, env):
            found[name] = (path.stat().st_size, file_digest(path, _threads(env)))
    return found


def write_marker(
    folder: Path, marker: Mapping[str, Any], files: Mapping[str, tuple[int, str]]
) -> None:
    """Write the marker, to the disk: from now on the folder counts as complete."""
    marker = {
        "format_version": FORMAT_VERSION,
        **marker,
        "files": {name: size for name, (size, _) in sorted(files.items())},
        "digests": {name: digest for name, (_, digest) in sorted(files.items())},
    }
    marker = json.loads(json.dumps(marker, default=str))  # paths become strings, as when read
    with (folder / MARKER).open("w", encoding="utf-8") as handle:
        json.dump({**marker, "digest": _seal(marker)}, handle, indent=1)
        handle.flush()
        os.fsync(handle.fileno())


def read_marker(path: Path) -> dict[str, Any]:
    """The marker of a training state whose files are all there with the sizes written.

    Raises:
        DamagedState: something is missing or other than written.
        ValueError: a format that this version does not know.
    """
    try:
        marker = read_json_object(path / MARKER, "the marker")
    except ValueError as error:
        raise DamagedState(str(error)) from error
    version = marker.get("format_version")
    if version not in (1, FORMAT_VERSION, WITHOUT_FROZEN):
        if version is None:
            raise DamagedState(f"{path / MARKER} names no format_version")
        raise ValueError(
            f"{path} has checkpoint format {version}, this version reads 1 to {WITHOUT_FROZEN}: "
            "continue it with the version that wrote it"
        )
    sealed = version != 1 or "digest" in marker
    if sealed and marker.get("digest") != _seal(marker):
        raise DamagedState(f"{path / MARKER} was changed: its contents do not fit its digest")
    lacking = [name for name in _FIELDS if name not in marker]
    if lacking or not isinstance(marker["files"], dict) or not isinstance(marker["config"], dict):
        raise DamagedState(f"{path / MARKER} lacks {', '.join(lacking) or 'files or settings'}")
    named = STEP_NAME.fullmatch(path.name)
    if named and int(named[1]) != marker["step"]:
        raise DamagedState(f"{path} was renamed: it holds the state of step {marker['step']}")
    _check_sizes(path, marker["files"])
    return marker


def _check_sizes(path: Path, sizes: Mapping[str, int]) -> None:
    for name, size in sizes.items():
        try:
            found = (path / name).stat().st_size
        except OSError as error:
            raise DamagedState(f"{path / name}: {error.strerror}") from error
        if found != size:
            raise DamagedState(f"{path / name} has {found} bytes, {size} were written")


def check_digests(path: Path, env: DistEnv) -> None:
    """Compare the files of a state with what was written; called by all ranks.

    Raises:
        DamagedState: on all ranks, naming files of any.
    """
    try:
        digests = read_marker(path).get("digests", {})
        mine = {name: digest for name, digest in digests.items() if _is_mine(name, env)}
        faults = list(_faults(path, mine, _threads(env)))
    except ValueError as error:  # on this rank alone, maybe: the others must hear of it
        faults = [str(error)]
    faults = [fault for part in gather_objects(faults) for fault in part]
    if faults:
        more = f" and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise DamagedState("; ".join(faults[:_SHOWN]) + more)


def _faults(path: Path, digests: Mapping[str, str], threads: int) -> Iterator[str]:
    for name, digest in digests.items():
        try:
            found = file_digest(path / name, threads)
        except OSError as error:
            yield f"{path / name}: {error.strerror}"
            continue
        if found != digest:
            yield f"{path / name} was changed: its bytes do not fit its digest"
