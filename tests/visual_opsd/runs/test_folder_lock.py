# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""One run, one folder: locks with and without flock, of dead, living and far holders."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from scripts.visual_opsd.runs import folder_lock
from scripts.visual_opsd.runs.folder_lock import LOCK_FILE, Holder, hold_folder, release_folders
from tests.visual_opsd.training.trainers import build, one_process
from tests.visual_opsd.training_runs import (
    ROOT,
    TINY_BAGEL,
    descendants,
    environment,
    kill_tree,
    logged_steps,
    start,
    train_arguments,
    wait_for,
)

MODULE = "scripts.visual_opsd.train_visual_opsd"
BUSY = "is held by process"


@pytest.fixture(autouse=True)
def released() -> Iterator[None]:
    yield
    release_folders()


@pytest.fixture
def no_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_lock, "_SETTLE_S", 0.05)

    def refuse(*_: Any) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)


def elsewhere(**changes: Any) -> Holder:
    return replace(Holder.here(), host="node7", machine="another boot", **changes)


def leave_lock(folder: Path, holder: Holder, age: float = 0.0) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / LOCK_FILE
    path.write_text(json.dumps(asdict(holder)))
    os.utime(path, (time.time() - age,) * 2)
    return path


def dead() -> Holder:
    return replace(Holder.here(), started="1")


def holder_process(folder: Path) -> subprocess.Popen[str]:
    """Holds the folder until it is killed."""
    program = (
        "import sys, time; from pathlib import Path\n"
        "from scripts.visual_opsd.runs.folder_lock import hold_folder\n"
        "hold_folder(Path(sys.argv[1]), 'x'); print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(folder)],
        cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


# ------------------------------------------------------------------------------- the lock alone


def test_a_held_folder_is_named_with_its_holder_and_freed_by_death(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "r"
    process = holder_process(folder)
    try:
        with pytest.raises(ValueError) as error:
            hold_folder(folder, "results_dir", take_over=True)
        held = json.loads((folder / LOCK_FILE).read_text())
        wanted = f"{folder} {BUSY} {process.pid} on {held['host']} since {held['since']}: end it"
        assert str(error.value).startswith(wanted)
        assert str(error.value).endswith("choose another --results_dir")
    finally:
        process.kill()
        process.communicate()
    hold_folder(folder, "results_dir")
    hold_folder(folder, "results_dir")  # the same process again
    release_folders()
    assert not list(folder.iterdir())


def test_a_link_is_the_same_folder(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "r")
    hold_folder(tmp_path / "r", "x")
    hold_folder(tmp_path / "link", "x")
    assert len(folder_lock._held) == 1


def test_children_do_not_keep_the_lock(tmp_path: Path) -> None:
    """A data worker that outlives its killed trainer for a moment."""
    hold_folder(tmp_path, "x")
    child = os.fork()
    if not child:
        time.sleep(30)
        os._exit(0)
    try:
        path = tmp_path / LOCK_FILE
        (lock,) = folder_lock._held.values()
        time.sleep(0.2)  # the child has begun
        os.close(lock.descriptor)  # as the kernel does for the dead
        descriptor = os.open(path, os.O_RDWR)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        lock.descriptor = descriptor
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.mark.parametrize("kind", ["dangling link", "link", "folder", "pipe"])
def test_what_is_no_lock_file_is_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / LOCK_FILE
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(tmp_path / "somewhere")
        if kind == "link":
            (tmp_path / "somewhere").write_text("precious")
    with pytest.raises(ValueError, match=r"cannot write to .*is no file, but .*\.lock'; choose"):
        hold_folder(tmp_path, "x")
    if kind == "link":
        assert (tmp_path / "somewhere").read_text() == "precious"


@pytest.mark.parametrize("changes", [{"pid": "7"}, {"token": []}, {"host": None}, {"started": 1}])
def test_a_lock_of_other_types_blocks_nobody(tmp_path: Path, changes: dict[str, Any]) -> None:
    content = asdict(elsewhere()) | changes
    (tmp_path / LOCK_FILE).write_text(json.dumps(content))
    hold_folder(tmp_path, "x")


@pytest.mark.parametrize("content", ["", "{", '{"host": 1}', "[]", "[" * 100_000, "\0" * 4096])
def test_a_lock_without_a_name_blocks_nobody(tmp_path: Path, content: str) -> None:
    (tmp_path / LOCK_FILE).write_text(content)
    hold_folder(tmp_path, "x")


def test_a_dead_holder_here_blocks_nobody(tmp_path: Path) -> None:
    leave_lock(tmp_path, dead())
    hold_folder(tmp_path, "x")


def test_a_silent_holder_elsewhere_has_died_where_flock_works(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    leave_lock(tmp_path, elsewhere(), age=100)
    hold_folder(tmp_path, "x")
    assert "which has died" in caplog.text


def test_a_holder_elsewhere_that_shows_signs_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """flock was granted, but does not reach from machine to machine."""
    path = leave_lock(tmp_path, elsewhere(), age=5)
    timer = threading.Timer(0.3, os.utime, (path,))
    timer.start()
    with pytest.raises(ValueError, match=r"on node7 since .*last sign of life .* delete .*lock if"):
        hold_folder(tmp_path, "x")
    timer.join()
    # And one that shows none is waited for, then passed over.
    monkeypatch.setattr(folder_lock, "_SILENT_S", 6)
    leave_lock(tmp_path, elsewhere(), age=5.5)
    hold_folder(tmp_path, "x")


def test_without_flock_the_file_is_the_lock(tmp_path: Path, no_flock: None) -> None:
    process = holder_process(tmp_path)
    try:
        with pytest.raises(ValueError, match=f"{BUSY} {process.pid}"):
            hold_folder(tmp_path, "x", take_over=True)
    finally:
        process.kill()
        process.communicate()
    hold_folder(tmp_path, "x")  # the dead one's file
    release_folders()
    assert not list(tmp_path.iterdir())
    hold_folder(tmp_path, "x")


def test_without_flock_a_lock_of_elsewhere_is_explained_and_taken_over(
    tmp_path: Path, no_flock: None, caplog: pytest.LogCaptureFixture
) -> None:
    for age in (0, 7200):
        leave_lock(tmp_path, elsewhere(), age)
        with pytest.raises(ValueError) as error:
            hold_folder(tmp_path, "results_dir", take_over=False)
        assert f"(last sign of life {age} s ago)" in str(error.value)
        assert "pass --take_over True if you know that it has ended" in str(error.value)
        assert [p.name for p in tmp_path.iterdir()] == [LOCK_FILE]
    hold_folder(tmp_path, "results_dir", take_over=True)
    assert "over from process" in caplog.text


def test_a_flock_that_excludes_nobody_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    monkeypatch.setattr(folder_lock, "_SETTLE_S", 0.05)
    process = holder_process(tmp_path)
    try:
        with pytest.raises(ValueError, match=f"{BUSY} {process.pid}"):
            hold_folder(tmp_path, "x")
    finally:
        process.kill()
        process.communicate()


def test_of_two_that_take_over_at_once_the_later_has_it(
    tmp_path: Path, no_flock: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = elsewhere(token="later")

    def settle(_: float) -> None:
        leave_lock(tmp_path, other)
        monkeypatch.setattr(time, "sleep", lambda _: None)

    monkeypatch.setattr(time, "sleep", settle)
    with pytest.raises(ValueError, match="on node7"):
        hold_folder(tmp_path, "x")


def test_a_holder_whose_lock_was_taken_over_ends(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path\n"
        "from scripts.visual_opsd.runs import folder_lock\n"
        "folder_lock._BEAT_S = 0.05\n"
        "folder_lock.hold_folder(Path(sys.argv[1]), 'x')\n"
        "path = Path(sys.argv[1]) / '.lock'; before = path.stat().st_mtime_ns; time.sleep(0.3)\n"
        "assert path.stat().st_mtime_ns > before\n"
        "path.write_text(sys.argv[2]); time.sleep(30)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path), json.dumps(asdict(elsewhere()))],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=25,
    )  # fmt: skip
    assert ended.returncode == 1, ended.stderr
    assert ended.stderr.startswith(f"error: {tmp_path} was taken over by process ")
    assert (tmp_path / LOCK_FILE).exists()


def test_folders_that_refuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "r", Path("/proc/nothing")):
        with pytest.raises(ValueError, match=r"cannot write to .*: .*; choose another --results_"):
            hold_folder(folder, "results_dir")

    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(ValueError, match=r"writing .*\.lock failed: No space left .* free; make"):
        hold_folder(tmp_path / "r", "results_dir")


# ------------------------------------------------------------------------------------- programs


@pytest.mark.slow
def test_a_second_start_leaves_the_first_run_unharmed(world: Path, tmp_path: Path) -> None:
    """Started together and a little later, with --resume latest; then killed and started again."""
    changes = {"resume": "latest", "sample_max_new_tokens": 4, "save_every": 1, "num_workers": 2}
    arguments = train_arguments(world, tmp_path, **changes, total_steps=100_000)
    both = [start(MODULE, arguments) for _ in range(2)]
    try:
        wait_for(lambda: any(p.poll() is not None for p in both) or 3 in logged_steps(tmp_path),
                 both[0] if both[0].poll() is None else both[1], "an end")  # fmt: skip
        loser = next(p for p in both if p.poll() is not None or p is both[1])
        output, _ = loser.communicate(timeout=60)
        winner = both[1 - both.index(loser)]
        assert loser.returncode == 1, output
        (line,) = [line for line in output.splitlines() if line.startswith("error:")]
        assert f"error: {tmp_path} {BUSY} {winner.pid} on " in line
        wait_for(lambda: 3 in logged_steps(tmp_path), winner, "step 3")
        late = start(MODULE, arguments)
        both.append(late)
        output, _ = late.communicate(timeout=60)
        assert late.returncode == 1 and f"{BUSY} {winner.pid}" in output
        assert "removing" not in output and "Traceback" not in output
        assert winner.poll() is None
        steps = logged_steps(tmp_path)
        assert steps == list(range(1, len(steps) + 1))
        os.kill(winner.pid, signal.SIGKILL)  # its workers have a moment left
        last = start(MODULE, train_arguments(world, tmp_path, **changes, total_steps=100_000))
        both.append(last)
        before = len(steps)
        wait_for(lambda: len(logged_steps(tmp_path)) > before + 2, last, "more steps")
        last.send_signal(signal.SIGTERM)
        output, _ = last.communicate(timeout=60)
        assert last.returncode == 143 and "resumed from" in output
        steps = logged_steps(tmp_path)
        assert steps == list(range(1, len(steps) + 1))
        assert not list(tmp_path.rglob(LOCK_FILE))
    finally:
        for process in both:
            if process.poll() is None:
                kill_tree(process)


def test_the_checkpoint_folder_is_held_too(world: Path, tmp_path: Path) -> None:
    """Two results folders, one --checkpoint_dir: below one of them, or elsewhere."""
    with one_process() as env:
        trainer = build(world, tmp_path / "r", env)
        checkpoints = trainer.config.run.checkpoints
        assert set(folder_lock._held) == {tmp_path / "r", checkpoints}
    process = holder_process(checkpoints)
    try:
        with one_process() as env, pytest.raises(ValueError, match=rf"{checkpoints} {BUSY}"):
            build(world, tmp_path / "other", env, checkpoint_dir=checkpoints)
    finally:
        process.kill()
        process.communicate()
    assert not list((tmp_path / "other").iterdir())


def test_two_evaluations_into_one_folder(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from scripts.visual_opsd import evaluate, kl_diagnostic
    from scripts.visual_opsd.cli import run_main

    process = holder_process(tmp_path)
    arguments = ["--model_path", str(TINY_BAGEL), "--data", "Spatial_Navigation",
                 "--data_root", str(world), "--output_dir", str(tmp_path)]  # fmt: skip
    try:
        for main, more in (
            (evaluate.main, ["--overwrite", "True"]),
            (kl_diagnostic.main, []),
        ):
            with pytest.raises(SystemExit) as ended:
                run_main(lambda main=main, more=more: main([*arguments, *more]))  # type: ignore[misc]
            assert ended.value.code == 1
            error = capsys.readouterr().err
            assert f"error: {tmp_path} {BUSY} {process.pid}" in error
            assert "another --output_dir" in error
        assert [p.name for p in tmp_path.iterdir()] == [LOCK_FILE]
        assert descendants(process.pid) == [process.pid]
    finally:
        process.kill()
        process.communicate()
