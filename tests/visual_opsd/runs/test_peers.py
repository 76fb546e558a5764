# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The watch over other ranks, without ranks: what it is told, what it tells, when it ends."""

from __future__ import annotations

import os
import subprocess
import threading
from dataclasses import replace
from typing import Any

import pytest

from scripts.visual_opsd.runs import peers
from scripts.visual_opsd.runs.peers import Peer, Watch

HERE = Peer.here(0)


class Store:
    """The group's store, in memory."""

    def __init__(self) -> None:
        self.held: dict[str, str] = {}

    def set(self, key: str, value: str) -> None:
        self.held[key] = value

    def check(self, keys: list[str]) -> bool:
        return all(key in self.held for key in keys)

    def get(self, key: str) -> bytes:
        return self.held[key].encode()


class Ended(Exception):
    """In the place of the process's end."""


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Any:
    """One whose thread does not run: a test calls `_run` itself."""
    monkeypatch.setattr(threading.Thread, "start", lambda self: None)
    monkeypatch.setattr(peers, "_PERIOD_S", 0.0)
    monkeypatch.setattr(peers, "_GRACE_S", 0.0)
    made: Any = Watch(launched=False)
    made._store = Store()
    return made


def test_a_process_is_its_number_and_its_start() -> None:
    assert HERE.lives()
    assert not replace(HERE, started="1").lives()  # the number was given again
    process = subprocess.Popen(["sleep", "60"])
    peer = Peer(1, HERE.host, process.pid, peers._start_time(process.pid))
    assert peer.started and peer.lives()
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert not peer.lives()  # a zombie
    process.wait()
    assert not peer.lives()


def test_ranks_of_this_machine_are_watched(watch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the process itself, another launcher's ranks, or those of another machine."""
    far = replace(HERE, host="elsewhere")
    everyone = [HERE, *(replace(HERE, rank=rank) for rank in (1, 2)), replace(far, rank=3)]

    def gather(into: list[Any], _: Any) -> None:
        into[:] = everyone

    monkeypatch.setattr(peers.dist, "get_world_size", lambda: len(everyone))
    monkeypatch.setattr(peers.dist, "all_gather_object", gather)
    monkeypatch.setattr(peers, "_second_client", Store)
    watch.join(0, range(0, 4))
    assert [peer.rank for peer in watch._peers] == [1, 2]
    watch.join(0, range(0, 2))
    assert [peer.rank for peer in watch._peers] == [1]
    monkeypatch.setattr(peers, "_second_client", lambda: None)
    watch._peers = []
    watch.join(0, range(0, 4))
    assert not watch._peers  # nobody could say that a rank left in peace


def test_a_killed_rank_is_told_to_all(
    watch: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def end(code: int) -> None:
        raise Ended(code)

    monkeypatch.setattr(os, "_exit", end)
    watch._peers = [replace(HERE, rank=1, started="1")]
    with pytest.raises(Ended, match="1"):
        watch._run()
    assert "rank 1" in watch._store.held[peers._DEAD]
    assert "error: rank 1" in capsys.readouterr().err
    # The others, of other machines too, end with the same words.
    watch._peers = []
    with pytest.raises(Ended, match="1"):
        watch._run()
    assert "error: rank 1" in capsys.readouterr().err


def test_a_rank_that_left_was_not_killed(watch: Any) -> None:
    watch._peers = [replace(HERE, rank=1, started="1")]
    watch._store.set(peers._LEFT.format(1), "1")
    rounds = iter([False, False, False, True])
    watch._stopped.wait = lambda _: next(rounds)
    watch._run()
    assert peers._DEAD not in watch._store.held


@pytest.mark.parametrize("failed", [False, True])
def test_leaving_is_told(watch: Any, failed: bool) -> None:
    watch.leave(failed)
    assert (peers._DEAD in watch._store.held) == failed
    assert (peers._LEFT.format(0) in watch._store.held) != failed
