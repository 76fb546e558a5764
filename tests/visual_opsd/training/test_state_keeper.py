# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Only good states are saved; what was trained is kept when the results' disk refuses."""

from __future__ import annotations

import errno
import math
import os
import shutil
import signal
from collections.abc import Callable, Iterable
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data.json_lines import append_records
from scripts.visual_opsd import processes
from scripts.visual_opsd.evaluation.store import RankedLines, write_json
from scripts.visual_opsd.run_config import RunSettings
from scripts.visual_opsd.training import objective, trainer, visual_opsd
from scripts.visual_opsd.training import step as step_module
from scripts.visual_opsd.training.checkpoint_folders import (
    NOT_GOOD,
    complete_steps,
    find_checkpoint,
)
from scripts.visual_opsd.training.state_keeper import StateKeeper
from scripts.visual_opsd.training.trainer import Trainer
from tests.visual_opsd.training.trainers import build, metrics, one_process, samples

GO_ON: dict[str, Any] = {"resume": "latest"}
SHORT: dict[str, Any] = {"sample_max_new_tokens": 2, "global_batch_size": 1, "save_every": 1}


@pytest.fixture
def bad(monkeypatch: pytest.MonkeyPatch) -> Callable[[Iterable[int]], None]:
    """Makes the losses of these steps NaN, counted from 1 since the call (one pack a step)."""
    plain = step_module.chunked_opsd_loss

    def choose(steps: Iterable[int]) -> None:
        chosen, calls = set(steps), iter(range(1, 1000))

        def changed(*args: Any, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
            loss, stats = plain(*args, **options)
            return (loss * math.nan if next(calls) in chosen else loss), stats

        monkeypatch.setattr(step_module, "chunked_opsd_loss", changed)

    return choose


def run(world: Path, results: Path, **changes: Any) -> tuple[Trainer, str]:
    """(the trainer, its error and notes, empty for none)."""
    with one_process() as env:
        trainer = build(world, results, env, **{**SHORT, **changes})
        try:
            assert trainer.train() == 0
        except ValueError as error:
            return trainer, "; ".join([str(error), *getattr(error, "__notes__", [])])
    return trainer, ""


def states(results: Path) -> list[int]:
    return list(complete_steps(results / "checkpoints"))


def releases(results: Path) -> list[str]:
    return sorted(p.name for p in (results / "checkpoints").glob("[0-9]*"))


# ------------------------------------------------------------------------------------ memory


def lack_memory(monkeypatch: pytest.MonkeyPatch, name: str, at: int) -> None:
    """A function that is called once a step finds no memory in step `at`."""
    module = next(m for m in (trainer, objective, visual_opsd) if hasattr(m, name))
    plain, calls = getattr(module, name), iter(range(1, 100))

    def fails(*args: Any, **options: Any) -> Any:
        if next(calls) == at:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")
        return plain(*args, **options)

    monkeypatch.setattr(module, name, fails)


def test_no_memory_in_a_rollout_keeps_the_last_completed_step(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"total_steps": 4, "save_every": 100}
    with monkeypatch.context() as patch:
        lack_memory(patch, "sample_completions", 3)
        _, error = run(world, tmp_path, **settings)
    assert error == (
        "not enough memory (CUDA out of memory. Tried to allocate) in the rollout of step 3: lower "
        "--sample_batch_size or, in a new run, --sample_max_new_tokens; state of step 2 saved; "
        "--resume it"
    )
    assert states(tmp_path) == [2]
    _, error = run(world, tmp_path, **settings, sample_batch_size=1, **GO_ON)
    assert not error and states(tmp_path) == [2, 4]
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "name, said",
    [
        ("run_pack", "in the update of step 3: lower --pack_tokens, --loss_chunk_size or, in a"),
        ("clip_grad_norm", "in the update of step 3: lower --pack_tokens"),
        ("summon_full_params", "gathering weights in the rollout of step 3: use more GPUs"),
    ],
)
def test_no_memory_where_the_other_ranks_do_not_ask(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, said: str
) -> None:
    """They are told, and nothing is saved, for which they would all be needed."""
    lack_memory(monkeypatch, name, 3)
    left = []

    class Watch:
        def leave(self, failed: bool) -> None:
            left.append(failed)

    with pytest.raises(processes.FailedAlone) as raised, one_process() as env:
        monkeypatch.setattr(processes, "_watch", Watch())
        build(world, tmp_path, env, **SHORT | {"save_every": 100}, total_steps=4).train()
    text = "; ".join([str(raised.value), *getattr(raised.value, "__notes__", [])])
    assert text.startswith(f"not enough memory (CUDA out of memory. Tried to allocate) {said}")
    assert left == [True] and "\n" not in text and not states(tmp_path)


def test_no_memory_while_images_are_encoded(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lack_memory(monkeypatch, "encode_teachers", 2)
    _, error = run(world, tmp_path, teacher_vt="vae+vit", total_steps=3, save_every=100)
    assert "while images are encoded: in a new run lower --vae_max_size" in error
    assert error.endswith("state of step 1 saved; --resume it")


# -------------------------------------------------------------------------------- divergence


def test_nothing_is_saved_or_deleted_while_steps_are_bad(
    world: Path, tmp_path: Path, bad: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad((4, 5, 6, 7))
    seen = []
    with one_process() as env:
        trainer = build(world, tmp_path, env, **SHORT, total_steps=9, keep_last=1)
        complete = trainer.states.complete

        def watch(*args: Any) -> None:
            complete(*args)
            seen.append(states(tmp_path))

        monkeypatch.setattr(trainer.states, "complete", watch)
        assert trainer.train() == 0
    # Before each save: step 2's state is deleted only when step 4, 5, ... has proven step 3's.
    assert seen == [[], [1], [2], [2, 3], [2, 3], [2, 3], [2, 3], [3], [8]]
    assert states(tmp_path) == [9]


@pytest.mark.parametrize("limit, wanted", [(2, "2 steps in a row"), (9, "at the end of the run")])
def test_a_run_that_ends_badly_names_the_last_good_state(
    world: Path, tmp_path: Path, bad: Any, limit: int, wanted: str
) -> None:
    """The steps after state 2 are all bad: it may be what it led to, so state 1 is good."""
    bad(range(3, 20))
    settings: dict[str, Any] = {"total_steps": 5, "keep_last": 1, "save_release": True}
    _, error = run(world, tmp_path, **settings, max_nonfinite_steps=limit)
    good = tmp_path / "checkpoints" / "step_0000001"
    assert wanted in error and f"the last good state is {good}: --resume last_good" in error
    assert states(tmp_path) == [1, 2] and releases(tmp_path) == ["0000001"]
    for spec in ("last_good", "latest"):
        assert find_checkpoint(tmp_path / "checkpoints", spec) == good
    if limit == 9:
        return
    # Asked for by its number it goes on all the same, and is good again once a step was finite.
    bad(())
    trainer, error = run(world, tmp_path, **settings, resume="2")
    assert not error and trainer.step == 5 and not list(tmp_path.rglob(NOT_GOOD))


def test_a_run_without_a_good_state_says_so(world: Path, tmp_path: Path, bad: Any) -> None:
    bad(range(2, 20))
    _, error = run(world, tmp_path, total_steps=3, save_release=True)
    assert "there is no good state" in error and "after that of step 1 every step" in error
    assert states(tmp_path) == [1] and releases(tmp_path) == []
    for spec in ("latest", "last_good"):
        with one_process() as env, pytest.raises(ValueError, match=r"\(--resume 1 goes on from it"):
            build(world, tmp_path, env, **SHORT, total_steps=3, resume=spec)
    with one_process() as env, pytest.raises(ValueError, match=r"there is no state in .* to go on"):
        build(world, tmp_path / "new", env, resume="last_good")


def test_a_learning_rate_that_ruins_the_weights(world: Path, tmp_path: Path) -> None:
    """No success, and no state or release but that of the step whose loss was still finite."""
    _, error = run(world, tmp_path, total_steps=12, lr=1e9, keep_last=2, save_release=True)
    assert "non-finite" in error and "no good state" in error
    assert states(tmp_path) == [1] and releases(tmp_path) == []
    assert [line["nonfinite"] for line in metrics(tmp_path)] == [0, 1, 1, 1, 1, 1]


def test_weights_that_are_not_finite_are_not_saved(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part in ("student", "ema", "optimizer"):
        results = tmp_path / part
        with one_process() as env:
            trainer = build(world, results, env, **SHORT, total_steps=3)
            complete = trainer.states.complete

            def ruin(step: int, *args: Any, part: str = part, trainer: Trainer = trainer,
                     complete: Any = complete) -> None:  # fmt: skip
                complete(step, *args)
                if step == 2:
                    ruined: Any = trainer.student if part == "student" else trainer.ema
                    value = ruined.connector.fc1.bias
                    if part == "optimizer":
                        value = next(iter(trainer.optimizer.state.values()))["exp_avg"]
                    with torch.no_grad():
                        value.to_local().view(-1)[-1] = math.inf

            monkeypatch.setattr(trainer.states, "complete", ruin)
            with pytest.raises(ValueError, match=r"of step 2 are not finite.*step_0000001: --res"):
                trainer.train()
        assert states(results) == [1]


def test_a_stop_after_bad_steps_saves_nothing(
    world: Path, tmp_path: Path, bad: Any, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    bad((3, 4))
    with one_process() as env:
        trainer = build(world, tmp_path, env, **SHORT, total_steps=9)
        complete = trainer.states.complete

        def watch(step: int, *args: Any) -> None:
            complete(step, *args)
            if step == 4:
                trainer.stop.number = signal.SIGTERM

        monkeypatch.setattr(trainer.states, "complete", watch)
        assert trainer.train() == 143
    said = capsys.readouterr().err
    assert "nothing saved, as the last 2 steps had no finite loss; the last good state is" in said
    assert states(tmp_path) == [1, 2]


# ------------------------------------------------------------------------------------- disks


def refuse(monkeypatch: pytest.MonkeyPatch, name: str, after: int, code: int) -> None:
    """Writing to files called `name` fails after so many calls, half-way through a line."""
    plain, calls = FileIO.write, iter(range(1000))

    class Refusing(FileIO):
        def write(self, data: Any) -> int:
            if Path(str(self.name)).name == name and next(calls) >= after:
                plain(self, bytes(data)[: len(data) // 2])
                raise OSError(code, os.strerror(code))
            return plain(self, data)

    def opened(self: Path, mode: str = "r", buffering: int = -1, *args: Any, **kwargs: Any) -> Any:
        if buffering == 0 and mode == "ab+":
            return Refusing(self, "ab+")
        return open(self, mode, buffering, *args, **kwargs)

    monkeypatch.setattr(Path, "open", opened)


@pytest.mark.parametrize(
    "name, kept", [("metrics.jsonl", 3), ("samples.jsonl", 2), ("bad_rows.jsonl", 2)]
)
def test_a_results_disk_that_refuses_keeps_the_last_completed_step(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kept: int
) -> None:
    """The checkpoint folder has room; the run goes on from there as if nothing had happened."""
    checkpoints: dict[str, Any] = {
        "checkpoint_dir": tmp_path / "c", "save_every": 100, "total_steps": 4
    }  # fmt: skip
    if name == "bad_rows.jsonl":
        record = Trainer._record_rejects

        def reject(self: Trainer, batch: Any, sums: dict[str, float]) -> None:
            if self.step == 2:
                self._together(lambda: append_records(tmp_path / "r" / name, [{"step": 2}]))
            record(self, batch, sums)

        monkeypatch.setattr(Trainer, "_record_rejects", reject)
    with monkeypatch.context() as patch:
        refuse(patch, name, 0 if name == "bad_rows.jsonl" else 2, errno.ENOSPC)
        _, error = run(world, tmp_path / "r", **checkpoints)
    path = tmp_path / "r" / name
    assert error.startswith(f"writing {path} failed: No space left on device")
    assert f"{path.parent} has " in error and " free; make room" in error
    assert error.endswith(f"state of step {kept} saved; --resume it")
    assert list(complete_steps(tmp_path / "c")) == [kept]
    _, error = run(world, tmp_path / "r", **checkpoints, **GO_ON)
    assert not error
    lost = [3] if name == "metrics.jsonl" else []  # a line, not a step
    assert [line["step"] for line in metrics(tmp_path / "r")] == [
        step for step in range(1, 5) if step not in lost
    ]
    assert [line["step"] for line in samples(tmp_path / "r")] == list(range(1, 5))


def test_both_disks_refuse(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    with monkeypatch.context() as patch:
        refuse(patch, "metrics.jsonl", 1, errno.EDQUOT)
        patch.setattr(shutil, "disk_usage", lambda _: usage)
        _, error = run(world, tmp_path, total_steps=3, save_every=100, plan=False)
    assert "Disk quota exceeded" in error
    assert "nor was the state of step 2 saved: the state of step 2 needs" in error
    assert not list((tmp_path / "checkpoints").iterdir())


def test_results_removed_under_way(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with one_process() as env:
        trainer = build(world, tmp_path / "r", env, **SHORT, total_steps=4,
                        checkpoint_dir=tmp_path / "c")  # fmt: skip
        complete = trainer.states.complete

        def vanish(step: int, *args: Any) -> None:
            complete(step, *args)
            if step == 2:
                shutil.rmtree(tmp_path / "r")

        monkeypatch.setattr(trainer.states, "complete", vanish)
        with pytest.raises(ValueError, match=r"metrics\.jsonl failed: No such file .* cannot be r"):
            trainer.train()
    assert list(complete_steps(tmp_path / "c"))[-1] == 2


def test_outputs_of_programs_that_read_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    from scripts.visual_opsd.analysis.baseline import save_divergences
    from scripts.visual_opsd.analysis.figures import save_figure

    gone = tmp_path / "gone"
    actions: list[Callable[[], None]] = [
        lambda: write_json(gone / "summary.json", {}),
        lambda: RankedLines(gone, "predictions").append(0, [{"index": 1}]),
        lambda: RankedLines(gone, "predictions").merge([{"index": 1}]),
        lambda: save_figure(Figure(), gone / "figure.png"),
        lambda: save_divergences(gone, {}),
    ]
    for action in actions:
        with pytest.raises(ValueError, match=rf"writing {gone}/.* failed: .*; {gone} cannot be r"):
            action()
    (tmp_path / "full.rank_0.jsonl").symlink_to("/dev/full")
    with pytest.raises(ValueError, match=r"full\.rank_0\.jsonl failed: "):
        RankedLines(tmp_path, "full").append(0, [{"index": 1}])


def test_a_finite_step_ends_a_row_of_bad_ones() -> None:
    nothing: Any = None
    keeper = StateKeeper(RunSettings(), nothing, {}, nothing)
    counts = []
    for step, finite in enumerate((False, False, True, False, True), start=1):
        keeper.complete(step, finite, {})
        counts.append(keeper.bad_steps)
    assert counts == [1, 2, 0, 1, 0]


def test_only_a_state_that_no_finite_step_followed_is_not_good(tmp_path: Path) -> None:
    nothing: Any = None
    keeper = StateKeeper(RunSettings(checkpoint_dir=str(tmp_path)), nothing, {}, nothing)
    state = tmp_path / "step_0000003"
    state.mkdir()
    keeper._saved, keeper.bad_steps = 3, 2
    for proven in (True, False):
        keeper._proven = proven
        keeper._mark()
        assert (state / NOT_GOOD).exists() is not proven
