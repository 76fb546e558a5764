# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""States take little memory to write and read, and no disk for what is frozen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load as torch_load
from torch.distributed.checkpoint.state_dict_saver import save as torch_save

from scripts.visual_opsd.processes import DistEnv, init_distributed, shutdown
from scripts.visual_opsd.training import checkpoints as T
from scripts.visual_opsd.training import sharded_files
from scripts.visual_opsd.training.sharding import local_part
from scripts.visual_opsd.training.state_files import read_marker
from tests.conftest import needs_gpu
from tests.visual_opsd.training.toy_distributed_model import ToyRun, state_hash
from tests.visual_opsd.training.trainers import metrics, train, weights

SAID: dict[str, Any] = {"config": {}, "contents": {}}
MIB = 2**20


@pytest.fixture
def env() -> Iterator[DistEnv]:
    yield init_distributed("cpu")
    shutdown()


def measure(folder: Path, device: str) -> dict[str, float]:
    """MiB beyond resident of a state of 192 MiB: 24 tensors of 8 MiB, in pieces of 4 MiB."""
    command = [sys.executable, "-m", "tests.visual_opsd.training.state_memory", str(folder)]
    done = subprocess.run(
        [*command, device, "32768", "6", str(4 * MIB)],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parents[3],
        # glibc shall give back at once what is freed.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": str(MIB), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = {key: size / MIB for key, size in json.loads(done.stdout).items()}
    print(found)
    return found


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_a_state_needs_two_pieces_whatever_its_size(tmp_path: Path) -> None:
    found = measure(tmp_path, "cpu")
    # Saving: a piece. Kept copies would be 192, and the 96 of weights and EMA are what torch's own
    # planner copies. Loading: two pieces; whole tensors would be 16.
    assert 4 <= found["saving"] < 24, found
    assert 4 <= found["loading"] < 14, found


@needs_gpu
@pytest.mark.cuda
def test_a_state_on_a_gpu_pins_no_memory(tmp_path: Path) -> None:
    found = measure(tmp_path, "cuda")
    assert found["saving"] < 64 and found["loading"] < 64, found  # with CUDA's own staging
    assert found["pinned"] <= 4, found


def test_pieces_and_whole_tensors_are_read_alike(
    env: DistEnv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's own reader reads pieces; a state that torch's own writer made loads as ever."""
    run = ToyRun(env, (1, 1))
    run.train_step(0)
    monkeypatch.setattr(sharded_files, "PIECE_BYTES", 500)
    path = T.save_checkpoint(tmp_path, 1, run.state, env=env, **SAID, extra={})
    metadata = FileSystemReader(path / "state").read_metadata().state_dict_metadata
    chunks = {key: getattr(entry, "chunks", []) for key, entry in metadata.items()}
    assert [chunk.sizes[0] for chunk in chunks["model.embed.weight"]] == [10, 10, 10, 7]
    assert [chunk.offsets[0] for chunk in chunks["ema.embed.weight"]] == [0, 10, 20, 30]
    assert len(chunks["model.layers.0.norm"]) == 1
    other = ToyRun(env, (1, 1), seed=9)
    tensors = T._sharded_state(other.state, True)
    torch_load(tensors, checkpoint_id=path / "state")
    assert state_hash(other.state) == state_hash(run.state)

    def plainly(tensors: dict[str, Any], folder: Path) -> None:
        torch_save(tensors, checkpoint_id=folder)

    monkeypatch.setattr(T, "save_sharded_state", plainly)
    old = T.save_checkpoint(tmp_path / "old", 1, run.state, env=env, **SAID, extra={})
    third = ToyRun(env, (1, 1), seed=8)
    T.load_checkpoint(old, third.state, env=env, **SAID)
    assert state_hash(third.state) == state_hash(run.state)


def test_what_is_mostly_frozen_is_left_out(world: Path, tmp_path: Path) -> None:
    """The run goes on to the last bit; EMA and moments are all there."""
    settings: dict[str, Any] = {"freeze_llm": True, "freeze_vit": True, "lr": 1e-2}
    settings |= {"total_steps": 2, "save_every": 1, "sample_max_new_tokens": 2}
    whole = train(world, tmp_path / "whole", **settings)
    state = tmp_path / "whole" / "checkpoints" / "step_0000001"
    assert read_marker(state)["format_version"] == 3  # which earlier versions refuse in one line
    named = dict(whole.student.named_parameters())
    assert named_in(state, "model") == {name for name, p in named.items() if p.requires_grad}
    assert named_in(state, "ema") == set(named)
    again = train(world, tmp_path / "again", **settings, resume=str(state))
    for ours, theirs in ((whole.student, again.student), (whole.ema, again.ema)):
        expected, got = weights(ours), weights(theirs)
        assert all(torch.equal(got[name], value) for name, value in expected.items())
    assert metrics(tmp_path / "again")[-1]["loss"] == metrics(tmp_path / "whole")[-1]["loss"]


def test_states_with_and_without_the_frozen_load(
    env: DistEnv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ToyRun(env, (1, 1))
    run.train_step(0)
    for left_out in (False, True):
        with torch.no_grad():  # the base's value is 0.5: an older state counts, whatever it holds
            local_part(run.model.get_parameter("frozen")).fill_(0.5 if left_out else 0.25)
        monkeypatch.setattr(T, "_is_mostly_frozen", lambda _, value=left_out: value)
        path = T.save_checkpoint(tmp_path / f"{left_out}", 1, run.state, env=env, **SAID, extra={})
        assert ("frozen" in named_in(path, "model")) != left_out
        monkeypatch.setattr(T, "_is_mostly_frozen", lambda _, value=left_out: not value)
        other = ToyRun(env, (1, 1), seed=9)
        T.load_checkpoint(path, other.state, env=env, **SAID)
        assert state_hash(other.state) == state_hash(run.state)


def named_in(path: Path, part: str) -> set[str]:
    saved = FileSystemReader(path / "state").read_metadata().state_dict_metadata
    return {key.removeprefix(f"{part}.") for key in saved if key.startswith(f"{part}.")}
