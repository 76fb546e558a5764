# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Ends this process, with a message, when another rank of the run or its launcher has died.

A rank that is killed takes no leave. Over gloo the others may fail with a message that names
nobody; inside an NCCL collective they wait for its timeout; while they sample or save they notice
nothing. So each rank has a thread that looks once a second whether the processes of the other
ranks of its machine still live, and tells the ranks of other machines through torchrun's store.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist

_PERIOD_S = 1.0
# A rank that ends on purpose says so through the store, and its own error comes first.
_GRACE_S = 3.0
# What a run may take to save its state once its launcher is gone, as with a SIGTERM.
_SAVING_S = 600.0
_DEAD, _LEFT = "visual_opsd/dead", "visual_opsd/left/{}"


@dataclass(frozen=True)
class Peer:
    """Another rank's process; `started` tells it from a later one with its number."""

    rank: int
    host: str
    pid: int
    started: str

    @classmethod
    def here(cls, rank: int) -> Peer:
        return cls(rank, socket.gethostname(), os.getpid(), _start_time(os.getpid()))

    def lives(self) -> bool:
        """Whether the process runs, on this host. A zombie does not."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except OSError:  # another user's: it is there
            return True
        return _start_time(self.pid) == self.started


def _start_time(pid: int) -> str:
    """When a process started, in ticks; empty for a dead one, and where there is no /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


class Watch:
    """The thread. Construct it before joining the group: the launcher is watched from then on.

    launched: whether torchrun started this process, which then must not outlive it.
    """

    def __init__(self, *, launched: bool) -> None:
        self._launcher = os.getppid() if launched else None
        self._peers: Sequence[Peer] = ()
        self._me = Peer.here(0)
        self._store: dist.TCPStore | None = None
        self._stopped = threading.Event()
        threading.Thread(target=self._run, name="peer watch", daemon=True).start()

    def join(self, rank: int, local_ranks: range) -> None:
        """Begin to watch the other ranks: a collective, after the group is there.

        local_ranks: those that the launcher started on this machine.
        """
        self._me = Peer.here(rank)
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, self._me)
        self._store = _second_client()
        if self._store is not None:  # else nobody could say that a rank left in peace
            self._peers = [
                p for p in gathered
                if p.rank != rank and p.rank in local_ranks and p.host == self._me.host
            ]  # fmt: skip

    def leave(self, failed: bool) -> None:
        """End the watch; after a failure, once it is clear that no other rank's death caused it."""
        if failed and self._peers:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher's, about the dead rank
            self._stopped.wait(2 * _PERIOD_S + _GRACE_S)
        self._stopped.set()
        if failed:
            self._tell(_DEAD, f"rank {self._me.rank} on {self._me.host} failed: see its own error")
        else:
            self._tell(_LEFT.format(self._me.rank), "1")

    def _run(self) -> None:
        gone: dict[int, float] = {}
        while not self._stopped.wait(_PERIOD_S):
            if self._launcher is not None and os.getppid() != self._launcher:
                self._without_launcher()
                return
            told = self._told()
            if told:
                self._end(told)
            for peer in self._peers:
                if peer.rank not in gone and not peer.lives():
                    gone[peer.rank] = time.monotonic()
                since = gone.get(peer.rank)
                if since is None or time.monotonic() - since < _GRACE_S:
                    continue
                if not self._left(peer):
                    text = (
                        f"rank {peer.rank} (process {peer.pid} on {peer.host}) was killed; if you "
                        "did not do it, look for the out-of-memory killer in `dmesg`"
                    )
                    self._tell(_DEAD, text)
                    self._end(text)

    def _without_launcher(self) -> None:
        text = "torchrun, which started this process, has died"
        print(f"rank {self._me.rank}: {text}; stopping", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGTERM)  # a run saves its state, everything else ends
        if not self._stopped.wait(_SAVING_S):
            os._exit(128 + signal.SIGTERM)

    def _end(self, text: str) -> NoReturn:
        sys.stdout.flush()
        print(f"error: {text}; rank {self._me.rank} ends too", file=sys.stderr, flush=True)
        os._exit(1)

    # The store is the launcher's or, without one, rank 0's and gone with it.

    def _tell(self, key: str, text: str) -> None:
        if self._store is not None:
            try:
                self._store.set(key, text)
            except RuntimeError:
                self._store = None

    def _told(self) -> str:
        try:
            if self._store is not None and self._store.check([_DEAD]):
                return self._store.get(_DEAD).decode()
        except RuntimeError:
            self._store = None
        return ""

    def _left(self, peer: Peer) -> bool:
        try:
            return self._store is not None and self._store.check([_LEFT.format(peer.rank)])
        except RuntimeError:
            self._store = None
            return False


def _second_client() -> dist.TCPStore | None:
    """A connection of its own to the group's store, so that no thread waits for another."""
    try:
        return dist.TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
            timeout=timedelta(seconds=10),
        )  # fmt: skip
    except (KeyError, ValueError, RuntimeError):
        return None
