# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""--on_save_error: what a run does when the disk refuses its state or its release folder."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest

from modeling.host.disk import DiskRefused
from scripts.visual_opsd.training.checkpoint_folders import complete_steps
from scripts.visual_opsd.training.trainer import Trainer
from tests.visual_opsd.training.trainers import build, metrics, one_process

SHORT: dict[str, Any] = {"sample_max_new_tokens": 2, "global_batch_size": 1, "save_every": 1}
PLENTY = 10**12


class Disk:
    """How much room there is, by the step that `trainer` has completed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.trainer: Trainer | None = None
        self.room: dict[int, list[int]] = {}  # step -> answers in turn, of state and release
        usage = shutil.disk_usage("/")
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=self.free()))

    def free(self) -> int:
        left = self.room.get(self.trainer.step if self.trainer else 0, [])
        return (left.pop(0) if len(left) > 1 else left[0]) if left else PLENTY


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def run(world: Path, results: Path, disk: Disk, full: Collection[int], **changes: Any) -> str:
    """The error that a run ends with, empty for none; no state has room after the steps `full`."""
    disk.trainer = None  # while it is built there is room
    with one_process() as env:
        disk.trainer = build(world, results, env, **{**SHORT, "save_release": False, **changes})
        disk.room |= {step: [9000] for step in full}
        try:
            assert disk.trainer.train() == 0
        except DiskRefused as error:
            return str(error)
    return ""


def kept(results: Path) -> list[str]:
    return sorted(p.name for p in (results / "checkpoints").iterdir() if p.name != ".lock")


def test_stop_ends_the_run_and_continue_tries_at_the_next_interval(
    world: Path, tmp_path: Path, disk: Disk, capsys: pytest.CaptureFixture[str]
) -> None:
    said = "the state of step 2 needs "
    error = run(world, tmp_path / "a", disk, [2], total_steps=4)
    assert error.startswith(said) and "9.0 kB free; make room" in error
    assert list(complete_steps(tmp_path / "a" / "checkpoints")) == [1]
    capsys.readouterr()
    go_on: dict[str, Any] = {"total_steps": 4, "on_save_error": "continue"}
    assert not run(world, tmp_path / "b", disk, [2], **go_on, keep_last=9)
    assert list(complete_steps(tmp_path / "b" / "checkpoints")) == [1, 3, 4]
    assert f"step 2 is not saved, training goes on: {said}" in capsys.readouterr().err
    lines = metrics(tmp_path / "b")
    assert [(line["step"], "save_error" in line) for line in lines] == [
        (1, False), (2, False), (2, True), (3, False), (4, False)
    ]  # fmt: skip
    assert lines[2]["save_error"].startswith(said)
    # The setting may change on a resume, and the result is what it would have been.
    disk.room.clear()
    assert not run(world, tmp_path / "a", disk, [], **go_on, resume="latest")
    assert metrics(tmp_path / "a")[-1]["loss"] == lines[-1]["loss"]


def test_the_last_step_must_be_saved(world: Path, tmp_path: Path, disk: Disk) -> None:
    settings: dict[str, Any] = {"total_steps": 3, "on_save_error": "continue"}
    assert "the state of step 3 needs" in run(world, tmp_path, disk, [2, 3], **settings)
    assert kept(tmp_path) == ["step_0000001"]


def test_a_release_folder_counts_as_the_state_does(
    world: Path, tmp_path: Path, disk: Disk, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its room is compared after the state is written, which stays."""
    settings: dict[str, Any] = {"total_steps": 2, "save_release": True}
    disk.room[1] = [PLENTY, 9000]
    error = run(world, tmp_path / "a", disk, [], **settings)
    assert "checkpoints/0000001 needs " in error and "9.0 kB free; make room" in error
    assert kept(tmp_path / "a") == ["step_0000001"]
    disk.room = {1: [PLENTY, 9000]}
    go_on = {**settings, "on_save_error": "continue"}
    assert not run(world, tmp_path / "b", disk, [], **go_on)
    assert "step 1 is not saved, training goes on: " in capsys.readouterr().err
    assert kept(tmp_path / "b") == ["0000002", "step_0000001", "step_0000002"]
    # A resume owes the folder of its step; that it still has no room ends no such run.
    disk.room = {1: [9000]}
    assert not run(world, tmp_path / "a", disk, [], **go_on, resume="latest")
    assert kept(tmp_path / "a") == ["0000002", "step_0000001", "step_0000002"]


def test_a_stop_whose_state_cannot_be_saved_is_an_error(
    world: Path, tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not 143: a scheduler must not take it for a run that can go on from there."""
    with one_process() as env:
        trainer = disk.trainer = build(
            world, tmp_path, env, **SHORT, total_steps=9, on_save_error="continue"
        )
        complete = trainer.states.complete

        def watch(step: int, *args: Any) -> None:
            complete(step, *args)
            if step == 2:
                disk.room[2] = [9000]
                trainer.stop.number = signal.SIGTERM

        monkeypatch.setattr(trainer.states, "complete", watch)
        with pytest.raises(DiskRefused, match=r"the state of step 2 needs .* free; make room"):
            trainer.train()
    assert list(complete_steps(tmp_path / "checkpoints")) == [1]


def test_weights_that_are_not_finite_end_the_run_all_the_same(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with one_process() as env:
        trainer = build(world, tmp_path, env, **SHORT, total_steps=3, on_save_error="continue")
        monkeypatch.setattr(
            "scripts.visual_opsd.training.state_keeper.is_finite", lambda *_: trainer.step < 2
        )
        with pytest.raises(ValueError, match="of step 2 are not finite"):
            trainer.train()
