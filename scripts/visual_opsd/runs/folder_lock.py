# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""One run, one folder: rank 0 holds the folders that its run writes to, until it ends or dies.

FOLDER/.lock names the holder. Where the file system honours flock, the lock falls with the
process. Elsewhere the file itself is the lock: a holder on this machine is looked up among the
processes; of one on another machine only its sign of life, the file's time, can be seen, so that
lock must be taken over by hand once it has fallen silent. A holder whose lock was taken over ends.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from modeling.host.disk import disk_errors
from scripts.visual_opsd.runs.peers import Peer

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"
_BEAT_S = 10.0
_SILENT_S = 35.0  # three signs of life are missing
_PATIENCE_S = 10.0  # for a holder that is just beginning, or whose last child is just ending
_SETTLE_S = 1.0  # by when two that took the same lock over see which of them was the later


@dataclass(frozen=True)
class Holder:
    """Who holds a lock. `machine` is one boot and one process namespace, where `pid` counts."""

    host: str
    pid: int
    started: str
    machine: str
    since: str
    token: str

    @classmethod
    def here(cls) -> Holder:
        me = Peer.here(0)
        since = time.strftime("%Y-%m-%d %H:%M:%S %Z")
        return cls(me.host, me.pid, me.started, _machine(), since, os.urandom(8).hex())

    @property
    def is_here(self) -> bool:
        return self.machine == _machine()

    def lives(self) -> bool:
        """Whether the process runs; to be asked on its own machine."""
        return Peer(0, self.host, self.pid, self.started).lives()


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return Peer.here(0).host


def _read(path: Path) -> Holder | None:
    """None: there is no lock, or nobody has written into it yet (a stranger's text is no name)."""
    try:
        found = Holder(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    kinds = {name: int if name == "pid" else str for name in asdict(found)}
    return found if all(type(getattr(found, n)) is kind for n, kind in kinds.items()) else None


class _Lock:
    """A lock that is held, and the thread that shows it."""

    def __init__(self, path: Path, descriptor: int, holder: Holder) -> None:
        self.path, self.descriptor, self.holder = path, descriptor, holder
        self._released = threading.Event()
        threading.Thread(target=self._beat, name="folder lock", daemon=True).start()

    def _beat(self) -> None:
        while not self._released.wait(_BEAT_S):
            found = _read(self.path)
            if found is not None and found != self.holder and not self._released.is_set():
                text = f"{self.path.parent} was taken over by {_name(found)}; this run ends"
                print(f"error: {text}", file=sys.stderr, flush=True)
                os._exit(1)
            with contextlib.suppress(OSError):
                os.utime(self.path)

    def release(self) -> None:
        self._released.set()
        with contextlib.suppress(OSError):
            if _read(self.path) == self.holder:
                self.path.unlink()
        os.close(self.descriptor)


_held: dict[Path, _Lock] = {}


def _forget() -> None:
    """In a child, which must not keep the lock of a dead parent."""
    for lock in _held.values():
        with contextlib.suppress(OSError):
            os.close(lock.descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget)


def hold_folder(folder: Path, flag: str, *, take_over: bool | None = None) -> None:
    """Make a folder, and hold it until `release_folders` or the end of this process.

    For rank 0, before it reads anything there that it will change. A folder that this process
    holds already stays held.

    Args:
        flag: the setting that named the folder. take_over: whether to override the lock of
            another machine; None where there is no such setting.

    Raises:
        ValueError: another run holds it (says who, and since when), or it cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        key = folder.resolve()
        if key in _held:
            return
        _held[key] = _acquire(folder / LOCK_FILE, flag, take_over)
    except OSError as error:
        raise ValueError(f"cannot write to {folder}: {error}; choose another --{flag}") from error


def release_folders() -> None:
    """Let go of all folders."""
    while _held:
        _held.popitem()[1].release()


def _acquire(path: Path, flag: str, take_over: bool | None) -> _Lock:
    """Raises OSError or ValueError as `hold_folder`."""
    wait = _Wait(path, flag, take_over)
    removed = False
    while True:
        descriptor, created = _open(path)
        keep = False
        try:
            excluded = _flock(path, descriptor)
            if excluded and not _is_at(path, descriptor):
                continue  # its holder just released it
            verdict = "ours" if excluded is None and created else wait.judge(excluded)
            if verdict == "remove":
                path.unlink(missing_ok=True)
                removed = True
            if verdict == "ours":
                me = Holder.here()
                _write(path, descriptor, me)
                if removed or excluded is None:
                    time.sleep(_SETTLE_S)
                keep = _read(path) == me
                if keep:
                    return _Lock(path, descriptor, me)
        finally:
            if not keep:
                os.close(descriptor)
        time.sleep(0.2)


def _open(path: Path) -> tuple[int, bool]:
    """(descriptor, whether the file is new). Raises OSError, for what is no file of ours too."""
    flags = os.O_RDWR | os.O_CLOEXEC
    while True:
        if (os.path.lexists(path) and not path.is_file()) or path.is_symlink():
            raise FileExistsError(errno.EEXIST, "is no file, but stands where the lock belongs: "
                                  "remove it", str(path))  # fmt: skip
        with contextlib.suppress(FileExistsError):
            return os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o644), True
        with contextlib.suppress(FileNotFoundError):
            return os.open(path, flags), False


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _flock(path: Path, descriptor: int) -> bool | None:
    """True: ours. False: another's. None: this file system does not know of such locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    try:
        second = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True  # released by its holder; seen by _is_at
    try:
        fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(second)
    return None  # granted twice


def _write(path: Path, descriptor: int, me: Holder) -> None:
    with disk_errors(f"writing {path}", path.parent):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(asdict(me)).encode(), 0)
        os.fsync(descriptor)


def _name(holder: Holder) -> str:
    return f"process {holder.pid} on {holder.host} since {holder.since}"


class _Wait:
    """What to do about a lock that is there: take it, wait, remove it, or give up."""

    def __init__(self, path: Path, flag: str, take_over: bool | None) -> None:
        self.path, self.flag, self.take_over = path, flag, take_over
        self._until = time.monotonic() + _PATIENCE_S
        self._seen: dict[str, float] = {}  # token -> first sign of life seen

    def judge(self, excluded: bool | None) -> str:
        """Args: excluded: as `_flock`. Raises ValueError: another run holds the folder."""
        holder = _read(self.path)
        if excluded and (holder is None or holder.is_here):
            return "ours"  # it died
        if holder is None:
            if time.monotonic() < self._until:
                return "wait"
            if excluded is None:
                return "remove"  # it died before it wrote its name
            raise self._refusal("another run, which has not written its name,", "end it first")
        if holder.is_here:
            return self._judge_here(holder, excluded)
        return self._judge_elsewhere(holder, excluded)

    def _judge_here(self, holder: Holder, excluded: bool | None) -> str:
        if holder.lives():
            raise self._refusal(_name(holder), "end it first")
        if excluded is None:
            return "remove"
        if time.monotonic() < self._until:
            return "wait"  # for a process that it left behind
        raise self._refusal(_name(holder), "it is dead, but one of its children still runs")

    def _judge_elsewhere(self, holder: Holder, excluded: bool | None) -> str:
        if self.take_over:
            logger.warning("taking %s over from %s", self.path.parent, _name(holder))
            return "ours" if excluded else "remove"
        beat, silent = self._silence()
        alive = beat != self._seen.setdefault(holder.token, beat)
        if excluded and not alive:
            if silent < _SILENT_S:
                return "wait"  # locks may not reach from machine to machine: is it alive?
            logger.warning(
                "%s was held by %s, which has died: going on", self.path.parent, _name(holder)
            )
            return "ours"
        how = f"delete {self.path}" if self.take_over is None else "pass --take_over True"
        raise self._refusal(
            f"{_name(holder)} (last sign of life {max(silent, 0):.0f} s ago)",
            f"end it first, or {how} if you know that it has ended, which cannot be seen from here",
        )

    def _silence(self) -> tuple[float, float]:
        """(time of the last sign of life, seconds since), by the clock of the file system."""
        probe = self.path.with_name(f"{LOCK_FILE}.{os.urandom(4).hex()}")
        try:
            probe.touch()
            now = probe.stat().st_mtime
            beat = self.path.stat().st_mtime
        except FileNotFoundError:
            return 0.0, 0.0  # released meanwhile
        finally:
            probe.unlink(missing_ok=True)
        return beat, now - beat

    def _refusal(self, who: str, advice: str) -> ValueError:
        return ValueError(
            f"{self.path.parent} is held by {who}: {advice}, or choose another --{self.flag}"
        )
