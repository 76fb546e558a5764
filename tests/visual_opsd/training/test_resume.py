# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""A killed run, resumed, equals an uninterrupted one bit for bit; in one process and on two."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from scripts.visual_opsd.train_visual_opsd import main
from scripts.visual_opsd.training.checkpoint_folders import step_folder
from scripts.visual_opsd.training.state_files import read_marker
from tests.visual_opsd import training_runs
from tests.visual_opsd.training_runs import (
    figures,
    full_state,
    kill_tree,
    logged_steps,
    start,
    train_arguments,
    wait_for,
)

MODULE = "scripts.visual_opsd.train_visual_opsd"


def run(arguments: list[str], ranks: int = 1) -> None:
    """Train to the end: one rank in this process, which spares its start, more under torchrun."""
    if ranks == 1:
        assert main(arguments) == 0
    else:
        training_runs.run(MODULE, arguments, ranks)


def assert_same_run(left: Path, right: Path, step: int, scratch: Path) -> None:
    """Figures of every step, completions, weights, EMA and optimiser."""
    assert figures(left) == figures(right)
    assert (left / "samples.jsonl").read_text() == (right / "samples.jsonl").read_text()
    ours, theirs = full_state(left, step, scratch), full_state(right, step, scratch)
    assert ours.keys() == theirs.keys()
    assert {key.split("/")[1] for key in ours} == {"model", "ema", "optimizer"}
    different = [key for key in ours if not torch.equal(ours[key], theirs[key])]
    assert not different, different[:5]
    assert digests(left, step) == digests(right, step)


def digests(results: Path, step: int) -> dict[str, str]:
    """Digests of the files of a training state: all shards (student, EMA, optimiser), counters.

    Not of .metadata, which names the folder, nor of the process's own generators, which nothing
    seeds and no step draws from.
    """
    found = read_marker(step_folder(results / "checkpoints", step))["digests"]
    kept = {k: v for k, v in found.items() if k.endswith(".distcp") or k == "trainer.pt"}
    assert len(kept) >= 2
    return kept


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_sigkill_and_resume_is_bit_exact(world: Path, tmp_path: Path, ranks: int) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    # Two ranks add gradients in another order than one: an Adam eps of 1e-15 would turn the
    # rounding of gradients that are zero in exact arithmetic into steps of full size.
    extra = {"num_workers": 1} if ranks == 1 else {"eps": 1e-8}
    run(train_arguments(world, whole, **extra), ranks)
    process = start(MODULE, train_arguments(world, killed, **extra), ranks)
    try:
        # State 2 is complete, step 3 is counted, and step 4 is under way.
        wait_for(lambda: 3 in logged_steps(killed), process, "step 3")
    finally:
        kill_tree(process)
    assert max(logged_steps(killed)) < 6
    run(train_arguments(world, killed, resume="latest", **extra), ranks)
    assert [line["step"] for line in figures(killed)] == [1, 2, 3, 4, 5, 6]
    assert_same_run(whole, killed, 6, tmp_path)
    if ranks == 2:
        resharded(world, tmp_path, whole)


def resharded(world: Path, scratch: Path, two: Path) -> None:
    """The two-rank state of step 4, continued by one process, ends where two ranks ended."""
    one = scratch / "one"
    state = two / "checkpoints" / "step_0000004"
    run(train_arguments(world, one, resume=state, eps=1e-8))
    last = {line["step"]: line for line in figures(two)}
    for line in figures(one):
        for name in ("loss", "grad_norm", "completion_length", "scored_tokens"):
            assert line[name] == pytest.approx(last[line["step"]][name], rel=1e-4), name
    ours, theirs = full_state(one, 6, scratch), full_state(two, 6, scratch)
    for key in ours:
        if key.startswith(("/model", "/ema")):
            torch.testing.assert_close(ours[key], theirs[key], atol=2e-5, rtol=1e-3)


@pytest.mark.slow
def test_sigterm_during_a_rollout_saves_and_resumes(world: Path, tmp_path: Path) -> None:
    """SIGTERM in the middle of sampling: exit code 143, the last whole step saved, no loss."""
    longer = {"sample_max_new_tokens": 24, "save_every": 100, "total_steps": 5}
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run(train_arguments(world, whole, **longer))
    process = start(MODULE, train_arguments(world, stopped, **longer))
    try:
        wait_for(lambda: 2 in logged_steps(stopped), process, "step 2")
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            kill_tree(process)
    assert process.returncode == 143, output
    saved = sorted(p.name for p in (stopped / "checkpoints").iterdir())
    assert len(saved) == 1
    assert saved[0] in {f"step_{n:07d}" for n in (2, 3, 4)}, saved
    run(train_arguments(world, stopped, auto_resume=True, **longer))
    assert_same_run(whole, stopped, 5, tmp_path)
