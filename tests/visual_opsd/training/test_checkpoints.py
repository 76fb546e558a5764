# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Checkpoints in one process: exact resume, kills, finding, settings, log files.

What needs two processes, another mesh or another world size is in two_process_checks.py.
"""

from __future__ import annotations

import json
import pickle
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scripts.visual_opsd.processes import DistEnv, init_distributed, shutdown
from scripts.visual_opsd.training import checkpoint_folders as folders
from scripts.visual_opsd.training import checkpoints as T
from scripts.visual_opsd.training.sharding import iter_full_state
from scripts.visual_opsd.training.state_files import MARKER
from tests.visual_opsd.launching import program_environment
from tests.visual_opsd.training.toy_distributed_model import ToyRun, state_hash

HERE = Path(__file__).parent
CONFIG: dict[str, Any] = {
    "lr": 1e-5,
    "log_every": 10,
    "teacher": {"mode": "ema", "decay": 0.995},
    "run": {"results_dir": Path("results/a")},
    "betas": (0.9, 0.95),
}


@pytest.fixture(scope="module")
def env() -> Iterator[DistEnv]:
    yield init_distributed("cpu")
    shutdown()


@pytest.fixture
def run(env: DistEnv) -> ToyRun:
    return ToyRun(env, (1, 1))


def save(run: ToyRun, folder: Path, step: int, **options: Any) -> Path:
    settings: dict[str, Any] = {"config": CONFIG, "contents": {}, "extra": {}, **options}
    return T.save_checkpoint(folder, step, run.state, env=run.env, **settings)


def load(run: ToyRun, path: Path, config: dict[str, Any] = CONFIG) -> T.Resumed:
    return T.load_checkpoint(path, run.state, env=run.env, config=config, contents={})


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), torch.rand(1).item()


def test_resume_is_bit_exact(env: DistEnv, run: ToyRun, tmp_path: Path) -> None:
    run.train_step(0)
    path = save(run, tmp_path, 1, extra={"bad_rows": {"torn": 2}, "seen": 16})
    expected = [(run.train_step(s), draws()) for s in (1, 2)]
    other = ToyRun(env, (1, 1), seed=9)
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    resumed = load(other, path)
    assert resumed == T.Resumed(1, {"bad_rows": {"torn": 2}, "seen": 16})
    assert other.state.scheduler.last_epoch == 1
    assert [(other.train_step(s), draws()) for s in (1, 2)] == expected
    assert state_hash(other.state) == state_hash(run.state)
    # The comparison is sensitive: one lost moment changes the hash.
    next(iter(other.state.optimizer.state.values()))["exp_avg"].mul_(1.0001)
    assert state_hash(other.state) != state_hash(run.state)


def test_a_checkpoint_before_the_first_update(env: DistEnv, run: ToyRun, tmp_path: Path) -> None:
    """No optimiser state yet: saving must not make the optimiser invent one."""
    path = save(run, tmp_path, 0)
    assert not run.state.optimizer.state
    other = ToyRun(env, (1, 1), seed=9)
    load(other, path)
    assert not other.state.optimizer.state
    assert [other.train_step(s) for s in (0, 1)] == [run.train_step(s) for s in (0, 1)]
    assert state_hash(other.state) == state_hash(run.state)


def test_without_ema(env: DistEnv, tmp_path: Path) -> None:
    run, other = ToyRun(env, (1, 1)), ToyRun(env, (1, 1), seed=9)
    run.train_step(0)
    with_ema = save(run, tmp_path / "ema", 1)
    ema, run.state.ema, other.state.ema = run.state.ema, None, None
    path = save(run, tmp_path / "self", 1)
    load(other, path)
    ours, theirs = dict(iter_full_state(run.model)), dict(iter_full_state(other.model))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    with pytest.raises(ValueError, match="has an EMA model"):
        load(other, with_ema)
    run.state.ema = ema
    with pytest.raises(ValueError, match="has no EMA model"):
        load(run, path)


def test_finding(run: ToyRun, tmp_path: Path) -> None:
    assert folders.find_checkpoint(tmp_path / "new", "latest") is None
    for step in (5, 10, 15):
        save(run, tmp_path, step)
    assert folders.find_checkpoint(tmp_path, "latest") == tmp_path / "step_0000015"
    assert folders.find_checkpoint(tmp_path, "5") == tmp_path / "step_0000005"
    assert folders.find_checkpoint(tmp_path, str(tmp_path / "step_0000010")) == (
        tmp_path / "step_0000010"
    )
    with pytest.raises(ValueError, match=r"no complete checkpoint of step 7 .* 5, 10, 15"):
        folders.find_checkpoint(tmp_path, "7")
    with pytest.raises(ValueError, match="complete steps: none"):
        folders.find_checkpoint(tmp_path / "new", 7)
    with pytest.raises(ValueError, match="no such folder"):
        folders.find_checkpoint(tmp_path, "lastest")
    with pytest.raises(ValueError, match=r"it holds checkpoints: name one, .*step_0000015"):
        folders.find_checkpoint(tmp_path, str(tmp_path))


def damage_marker(path: Path) -> None:
    (path / "complete.json").unlink()


def damage_torn_marker(path: Path) -> None:
    marker = path / "complete.json"
    marker.write_text(marker.read_text()[:-20])


def damage_truncated(path: Path) -> None:
    shard = max((path / "state").glob("*.distcp"), key=lambda p: p.stat().st_size)
    shard.write_bytes(shard.read_bytes()[:-1])


def damage_missing(path: Path) -> None:
    (path / "rng_00000.pt").unlink()


@pytest.mark.parametrize(
    "damage", [damage_marker, damage_torn_marker, damage_truncated, damage_missing]
)
def test_half_written_folders_are_ignored(run: ToyRun, tmp_path: Path, damage: Any) -> None:
    good = save(run, tmp_path, 1)
    bad = save(run, tmp_path, 2)
    damage(bad)
    assert folders.find_checkpoint(tmp_path, "latest") == good
    with pytest.raises(ValueError, match=r"not a complete training checkpoint; its complete"):
        folders.find_checkpoint(tmp_path, str(bad))
    with pytest.raises(ValueError, match="not a complete training checkpoint"):
        load(run, bad)
    folders.claim_checkpoint_dir(tmp_path, good, run.env)
    save(run, tmp_path, 2)  # the damaged one is out of the way
    assert list(folders.complete_steps(tmp_path)) == [1, 2]
    assert (tmp_path / "superseded" / "step_0000002").is_dir()


def test_never_written_over(run: ToyRun, tmp_path: Path) -> None:
    path = save(run, tmp_path, 3)
    before = {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match="never written over"):
        save(run, tmp_path, 3)
    assert {p: p.read_bytes() for p in path.rglob("*") if p.is_file()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["step_0000003"]


def test_keep_last(run: ToyRun, tmp_path: Path) -> None:
    for step in range(1, 6):
        save(run, tmp_path, step)
        folders.delete_old_states(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_0000004", "step_0000005"]


def test_superseding_keeps_every_generation(run: ToyRun, tmp_path: Path) -> None:
    for _ in range(3):
        if not (tmp_path / "step_0000001").exists():
            save(run, tmp_path, 1)
        save(run, tmp_path, 2)
        folders.claim_checkpoint_dir(tmp_path, tmp_path / "step_0000001", run.env)
    assert sorted(p.name for p in (tmp_path / "superseded").iterdir()) == [
        "step_0000002",
        "step_0000002.1",
        "step_0000002.2",
    ]
    assert list(folders.complete_steps(tmp_path)) == [1]


def test_claiming_another_runs_folder(run: ToyRun, tmp_path: Path) -> None:
    mine = save(run, tmp_path / "mine", 4)
    save(run, tmp_path / "other", 2)
    for resumed_from in (None, mine):
        with pytest.raises(ValueError, match=r"already holds checkpoints .steps 2"):
            folders.claim_checkpoint_dir(tmp_path / "other", resumed_from, run.env)
    folders.claim_checkpoint_dir(tmp_path / "fresh", mine, run.env)  # a fork into an empty folder
    assert list((tmp_path / "fresh").iterdir()) == []


def test_the_best_folder(run: ToyRun, tmp_path: Path) -> None:
    """It stays if its step is not later than the resumed one; a kill may have half replaced it."""
    mine = save(run, tmp_path, 4)
    best, old = tmp_path / "best", tmp_path / "best.old"

    def put(folder: Path, text: str) -> None:
        folder.mkdir()
        (folder / folders.BEST_FILE).write_text(text)

    for name in (best, old):
        put(name, "{}")
        mine.rename(tmp_path.parent / "away")
        for start in (None, tmp_path.parent / "away"):
            with pytest.raises(ValueError, match=rf"best model of another run .{name.name}.: choo"):
                folders.check_folders(tmp_path, tmp_path, start, resumes=start is not None)
        folders.check_folders(tmp_path, tmp_path, None, resumes=True)
        (tmp_path.parent / "away").rename(mine)
        shutil.rmtree(name)
    put(old, '{"step": 3}')
    (tmp_path / "best.tmp").mkdir()
    folders.claim_checkpoint_dir(tmp_path, mine, run.env)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best", "step_0000004"]
    assert folders.best_step(tmp_path) == 3
    put(old, '{"step": 2}')
    folders.claim_checkpoint_dir(tmp_path, mine, run.env)
    assert folders.best_step(tmp_path) == 3 and not old.exists()
    folders.claim_checkpoint_dir(tmp_path, mine, run.env, "other rows")
    for text in ('{"step": 5}', '{"step": "4"}', "torn"):
        put(best, text)
        folders.claim_checkpoint_dir(tmp_path, mine, run.env)
    names = sorted(p.name for p in (tmp_path / "superseded").iterdir())
    assert names == ["best", "best.1", "best.2", "best.3"]


@pytest.mark.parametrize(("target", "name"), [(torch, "save"), (T, "_save_synced")])
def test_a_failed_save_leaves_no_checkpoint(
    run: ToyRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    target: Any,
    name: str,
) -> None:
    """Inside the sharded writer and in our own files."""

    def full_disk(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(target, name, full_disk)
        with pytest.raises(ValueError, match="No space left"):
            save(run, tmp_path, 1)
    assert not list(tmp_path.iterdir())  # nothing keeps the disk full
    assert folders.find_checkpoint(tmp_path, "latest") is None
    save(run, tmp_path, 1)  # the same step may be tried again
    assert list(folders.complete_steps(tmp_path)) == [1]


def test_extra_values_that_could_not_be_loaded(run: ToyRun, tmp_path: Path) -> None:
    with pytest.raises(pickle.UnpicklingError, match="weights_only"):
        save(run, tmp_path, 1, extra={"folder": tmp_path})
    assert folders.find_checkpoint(tmp_path, "latest") is None


@pytest.mark.parametrize("moment", ["shards", "rename"])
def test_sigkill_while_saving(env: DistEnv, tmp_path: Path, moment: str) -> None:
    """A process killed inside save_checkpoint leaves step 1 usable and step 2 invisible."""
    program = tmp_path / "killed.py"
    program.write_text(
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from tests.visual_opsd.training.toy_distributed_model import ToyRun\n"
        "from scripts.visual_opsd.training import checkpoints as T\n"
        "from scripts.visual_opsd.processes import init_distributed\n"
        "run, where = ToyRun(init_distributed('cpu'), (1, 1)), Path(sys.argv[1])\n"
        "def save(step):\n"
        "    run.train_step(step - 1)\n"
        "    said = dict(config={}, contents={}, extra={})\n"
        "    T.save_checkpoint(where, step, run.state, env=run.env, **said)\n"
        "save(1)\n"
        "die = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)\n"
        "if sys.argv[2] == 'shards':\n"
        "    T.save_sharded_state = die\n"
        "else:\n"
        "    os.replace = die\n"
        "save(2)\n"
    )
    where = tmp_path / "checkpoints"
    ended = subprocess.run(
        [sys.executable, str(program), str(where), moment],
        env=program_environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    half_written = where / "step_0000002.tmp"
    assert (half_written / MARKER).is_file() == (moment == "rename")
    found = folders.find_checkpoint(where, "latest")
    assert found == where / "step_0000001"
    folders.claim_checkpoint_dir(where, found, env)
    assert not list(where.glob("*.tmp"))


def test_settings_that_matter(run: ToyRun, tmp_path: Path) -> None:
    path = save(run, tmp_path, 1)
    free = CONFIG | {"log_every": 1, "run": {"results_dir": "elsewhere"}, "betas": [0.9, 0.95]}
    load(run, path, free)
    assert T.config_hash(free) == T.config_hash(CONFIG)
    changed: dict[str, Any] = CONFIG | {"lr": 2e-5, "teacher": {"mode": "ema", "decay": 0.99}}
    changed["new_flag"] = True
    assert T.config_hash(changed) != T.config_hash(CONFIG)
    with pytest.raises(ValueError) as caught:
        load(run, path, changed)
    text = str(caught.value)
    assert "lr: saved 1e-05, now 2e-05" in text
    assert "teacher.decay: saved 0.995, now 0.99" in text
    assert "new_flag: saved '(absent)', now True" in text
    assert "mode" not in text and "log_every" not in text


def test_unknown_format(run: ToyRun, tmp_path: Path) -> None:
    path = save(run, tmp_path, 1)
    marker = json.loads((path / "complete.json").read_text())
    assert marker["step"] == 1 and marker["config"]["run"] == {"results_dir": "results/a"}
    assert set(marker["files"]) == {
        p.relative_to(path).as_posix()
        for p in path.rglob("*")
        if p.is_file() and p.name != "complete.json"
    }
    (path / "complete.json").write_text(json.dumps(marker | {"format_version": 99}))
    with pytest.raises(ValueError, match="checkpoint format 99"):
        load(run, path)


def test_a_moved_checkpoint_loads(env: DistEnv, run: ToyRun, tmp_path: Path) -> None:
    run.train_step(0)
    path = save(run, tmp_path / "a", 1)
    moved = tmp_path / "b" / "my best run"
    shutil.copytree(path, moved)
    other = ToyRun(env, (1, 1), seed=9)
    found = folders.find_checkpoint(tmp_path / "c", str(moved))
    assert found == moved
    load(other, found)
    assert state_hash(other.state) == state_hash(run.state)


def test_truncate_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert folders.truncate_jsonl(path, 3) == 0 and not path.exists()
    kept = ['{"config": "header"}', '{"step": 1, "x": "é"}', '{"step": 3}', '{"step": 3, "y": 1}']
    path.write_text("\n".join([*kept, '{"step": 4}', '{"step": 5, "lo']), encoding="utf-8")
    assert folders.truncate_jsonl(path, 3) == 2
    assert path.read_text(encoding="utf-8") == "\n".join(kept) + "\n"
    assert folders.truncate_jsonl(path, 3) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]
