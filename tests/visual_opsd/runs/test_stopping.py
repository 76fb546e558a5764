# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Stopping and dying: what was trained is kept, and nothing outlives its run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from scripts.visual_opsd.runs.stopping import StopRequest, exit_code
from tests.visual_opsd.launching import program_environment
from tests.visual_opsd.training_runs import (
    all_gone,
    descendants,
    environment,
    hear_signals,
    kill_tree,
    logged_steps,
    ranks_of,
    start,
    train_arguments,
    wait_for,
)

MODULE = "scripts.visual_opsd.train_visual_opsd"
LONG: dict[str, Any] = {"total_steps": 100_000, "sample_max_new_tokens": 4, "save_every": 100_000}


@contextmanager
def running(
    world: Path, results: Path, ranks: int = 1, **changes: Any
) -> Iterator[subprocess.Popen[str]]:
    """A run past its second step."""
    process = start(MODULE, train_arguments(world, results, **{**LONG, **changes}), ranks)
    try:
        wait_for(lambda: 2 in logged_steps(results), process, "step 2")
        yield process
    finally:
        if process.poll() is None:
            kill_tree(process)


def saved_steps(results: Path) -> list[int]:
    return sorted(int(p.name.removeprefix("step_")) for p in (results / "checkpoints").iterdir())


# ---------------------------------------------------------------------------------- signals


def test_ctrl_c_stops_like_sigterm(world: Path, tmp_path: Path) -> None:
    with running(world, tmp_path, num_workers=1) as process:
        pids = descendants(process.pid)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does, workers included
        output, _ = process.communicate(timeout=30)
    assert process.returncode == 130, output
    (step,) = saved_steps(tmp_path)
    assert f"terminated: state of step {step} saved" in output
    assert "Traceback" not in output
    assert all_gone(pids, 5)


def run_requests(body: str) -> subprocess.CompletedProcess[str]:
    """A program that gets signals from itself inside a StopRequest."""
    lines = [
        "import os, signal, time", "from scripts.visual_opsd.runs.stopping import StopRequest",
        "me = os.getpid()", "with StopRequest() as stop:",
        *(f"    {x}" for x in body.split(";")), "    print('left', int(stop.number))",
    ]  # fmt: skip
    return subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], env=environment(), capture_output=True,
        text=True, timeout=60, preexec_fn=hear_signals,
    )  # fmt: skip


def test_a_second_ctrl_c_ends_at_once() -> None:
    send = "os.kill(me, signal.SIGINT)"
    ended = run_requests(f"{send};time.sleep(1.2);{send};time.sleep(5)")
    assert ended.returncode == 130 and "left" not in ended.stdout
    assert ended.stderr.count("\n") == 1 and "second SIGINT" in ended.stderr


@pytest.mark.parametrize(
    "body, number",
    [
        # Requests like Ctrl-C and SIGTERM.
        ("os.kill(me, signal.SIGHUP)", signal.SIGHUP),
        ("os.kill(me, signal.SIGUSR1)", signal.SIGUSR1),
        # A terminal and a launcher both pass a Ctrl-C on.
        ("os.kill(me, signal.SIGINT);os.kill(me, signal.SIGINT)", signal.SIGINT),
        # A scheduler warns, then terminates: the save goes on.
        ("os.kill(me, signal.SIGUSR1);time.sleep(1.2);os.kill(me, signal.SIGTERM)", signal.SIGUSR1),
        ("os.kill(me, signal.SIGTERM);time.sleep(1.2);os.kill(me, signal.SIGTERM)", signal.SIGTERM),
    ],
)
def test_the_same_request_twice_does_not(body: str, number: int) -> None:
    ended = run_requests(body)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split() == ["left", str(int(number))]


def test_what_was_ignored_stays_ignored_and_handlers_come_back() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGUSR1)
            assert stop.number == signal.SIGUSR1
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)
    assert [exit_code(n) for n in (1, 2, 10, 15)] == [129, 130, 138, 143]


# ------------------------------------------------------------------------------- data workers


def test_workers_of_a_killed_trainer_end(world: Path, tmp_path: Path) -> None:
    with running(world, tmp_path, num_workers=2, prefetch_factor=8) as process:
        workers = descendants(process.pid)[1:]
        assert len(workers) >= 2
        time.sleep(0.5)  # until the pipes are full
        os.kill(process.pid, signal.SIGKILL)
        assert all_gone(workers, 5)
        process.communicate()


def test_a_killed_worker_ends_the_run_with_its_state_saved(world: Path, tmp_path: Path) -> None:
    with running(world, tmp_path, num_workers=2) as process:
        pids = descendants(process.pid)
        os.kill(pids[-1], signal.SIGKILL)
        output, _ = process.communicate(timeout=40)
    assert process.returncode == 1, output
    (step,) = saved_steps(tmp_path)
    (line,) = [line for line in output.splitlines() if line.startswith("error:")]
    assert f"data worker (process {pids[-1]}) ended with code -9" in line
    assert f"state of step {step} saved" in line
    assert "Traceback" not in output
    assert all_gone(pids, 5)


def test_a_stuck_worker_is_not_waited_for_for_ever(world: Path, tmp_path: Path) -> None:
    with running(world, tmp_path, num_workers=1, timeout_s=6) as process:
        worker = descendants(process.pid)[-1]
        os.kill(worker, signal.SIGSTOP)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 1, output
    assert "no rows came from the data workers for" in output
    assert f"state of step {saved_steps(tmp_path)[0]} saved" in output
    assert all_gone([worker], 5)


# ------------------------------------------------------------------------------------- ranks


@pytest.mark.slow
def test_a_dead_rank_is_named_and_the_others_end(world: Path, tmp_path: Path) -> None:
    """With data workers, which must end too."""
    with running(world, tmp_path, 2, num_workers=1) as process:
        pids = descendants(process.pid)
        victim = ranks_of(process)[1]
        killed = time.monotonic()
        os.kill(victim, signal.SIGKILL)
        assert all_gone(pids[1:], 15)
        assert time.monotonic() - killed < 15
        output, _ = process.communicate(timeout=30)
    assert process.returncode != 0
    (line,) = [line for line in output.splitlines() if line.startswith("error:")]
    assert f"rank 1 (process {victim} on " in line and line.endswith("rank 0 ends too")


@pytest.mark.slow
def test_a_rank_without_memory_ends_all(world: Path, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        """
import os, torch
from scripts.visual_opsd import train_visual_opsd
from scripts.visual_opsd.cli import run_main
from scripts.visual_opsd.training import objective
plain = objective.run_pack
def run_pack(*args, **options):
    if os.environ["RANK"] == "1":
        raise torch.OutOfMemoryError("CUDA out of memory")
    return plain(*args, **options)
objective.run_pack = run_pack
run_main(train_visual_opsd.main)
"""
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    ended = subprocess.run(
        [*command, str(program), *train_arguments(world, tmp_path / "r", **LONG)],
        env=program_environment(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    errors = sorted(x for x in ended.stderr.splitlines() if x.startswith("error:"))
    assert len(errors) == 2, ended.stderr
    own, other = errors
    assert own.startswith("error: not enough memory (CUDA out of memory) in the update of step 1:")
    assert other.startswith("error: rank 1 on ") and other.endswith("rank 0 ends too")
    assert ended.returncode == 1 and "Traceback (most" not in ended.stderr.split("error:")[0]


@pytest.mark.slow
def test_ranks_of_a_killed_launcher_save_and_end(world: Path, tmp_path: Path) -> None:
    with running(world, tmp_path, 2) as process:
        pids = descendants(process.pid)
        os.kill(process.pid, signal.SIGKILL)
        assert all_gone(pids, 20)
        output, _ = process.communicate()
    assert "torchrun, which started this process, has died" in output
    (step,) = saved_steps(tmp_path)
    assert f"state of step {step} saved" in output
