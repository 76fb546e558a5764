# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""What the trainer does with non-finite steps, bad rows, failing workers and signals."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from scripts.visual_opsd.training import step as step_module
from scripts.visual_opsd.training.sharding import full_tensor
from scripts.visual_opsd.training.text_sft import TextSFT
from tests.data.synthetic import (
    write_dataset,
)
from tests.visual_opsd.launching import program_environment
from tests.visual_opsd.training.trainers import (
    SMALL,
    base_weights,
    build,
    first_rows,
    metrics,
    moved,
    one_process,
    samples,
    train,
    weights,
    write_damaged,
)
from tests.visual_opsd.training_runs import (
    kill_tree,
    logged_steps,
    start,
    train_arguments,
    wait_for,
)

MODULE = "scripts.visual_opsd.train_visual_opsd"


# ---------------------------------------------------------------------------- non-finite steps


def with_loss(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """Let `change(call number, loss)` stand for the loss of each pack, counted from 0."""
    plain, calls = step_module.chunked_opsd_loss, iter(range(1000))

    def changed(*args: Any, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
        loss, stats = plain(*args, **options)
        return change(next(calls), loss), stats

    monkeypatch.setattr(step_module, "chunked_opsd_loss", changed)


def test_a_nonfinite_step_is_skipped_and_its_rows_named(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two packs a step; the second pack of step 2 is NaN. Steps 1 and 3 are updates."""
    with_loss(monkeypatch, lambda call, loss: loss * math.nan if call == 3 else loss)
    seen: list[dict[str, Tensor]] = []
    with one_process() as env:
        trainer = build(world, tmp_path, env, total_steps=3, log_every=100)
        update = trainer._update

        def watch(*args: Any) -> None:
            update(*args)
            moments = trainer.optimizer.state_dict()["state"]
            seen.append(
                {f"student/{k}": v for k, v in weights(trainer.student).items()}
                | {f"ema/{k}": v for k, v in weights(trainer.ema).items()}
                | {
                    f"{number}/{k}": full_tensor(v).clone()
                    for number, state in moments.items()
                    for k, v in state.items()
                }
            )

        monkeypatch.setattr(trainer, "_update", watch)
        assert trainer.train() == 0
        names = [row.name for row in first_rows(trainer, step=1)]
    assert seen[0].keys() == seen[1].keys() and not moved(seen[0], seen[1])
    assert moved(seen[1], seen[2])
    assert [(line["step"], line["nonfinite"]) for line in metrics(tmp_path)] == [(2, 1), (3, 0)]
    assert math.isnan(metrics(tmp_path)[0]["loss"])
    assert f"step 2: non-finite, update skipped; rows: {names[1]}\n" in capsys.readouterr().err
    assert trainer.states.bad_steps == 0


def test_a_nonfinite_gradient_of_a_finite_loss(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with_loss(monkeypatch, lambda _, loss: loss + (loss * 0).sqrt())  # 0, with slope 0 * inf
    with one_process() as env:
        trainer = build(world, tmp_path, env)
        with pytest.raises(ValueError, match=r"1 steps in a row .* at the end of the run"):
            trainer.train()
    (line,) = metrics(tmp_path)
    assert math.isfinite(line["loss"]) and math.isnan(line["grad_norm"]) and line["nonfinite"]
    assert not moved(base_weights(), weights(trainer.student))
    assert not trainer.optimizer.state
    assert "rows: none: the gradient, not a loss, is non-finite" in capsys.readouterr().err


def test_training_stops_after_k_nonfinite_steps_in_a_row(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A weight that is NaN: the rollout survives it, no update is made, and the run ends."""
    with one_process() as env:
        trainer = build(world, tmp_path, env, total_steps=9, max_nonfinite_steps=2)
        broken: Any = trainer.student.connector.fc1.bias
        with torch.no_grad():
            broken.to_local()[0] = math.nan
        with pytest.raises(ValueError, match=r"2 steps in a row had a non-finite .* --lr") as error:
            trainer.train()
        names = [row.name for row in first_rows(trainer, step=1)]
    assert all(name in str(error.value) for name in names)
    assert [line["nonfinite"] for line in metrics(tmp_path)] == [1, 1]
    changed = moved(base_weights(), weights(trainer.student))
    assert changed == {"connector.fc1.bias"} and not trainer.optimizer.state
    assert not list((tmp_path / "checkpoints").iterdir())


# ------------------------------------------------------------------------------------ bad rows


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """Twelve rows, of which three cannot be used."""
    return write_damaged(tmp_path, rows=12)


def test_bad_rows_are_replaced_and_listed(damaged: Path, tmp_path: Path) -> None:
    """An epoch and a half: the truncated PNG among others; a fresh start empties the list."""
    results = tmp_path / "r"
    settings: dict[str, Any] = {
        "total_steps": 4,
        "global_batch_size": 4,
        "sample_max_new_tokens": 2,
    }
    for _ in range(2):
        trainer = train(damaged, results, samples_per_step=4, resume="latest", **settings)
        listed = [
            json.loads(line) for line in (results / "bad_rows.jsonl").read_text().splitlines()
        ]
        reasons = {line["row"]: line["reason"] for line in listed}
        assert reasons == {3: "broken_image", 5: "no_visual_thought", 8: "missing_answer"}
        assert all(line["file"].endswith(".parquet") and line["detail"] for line in listed)
        last = metrics(results)[-1]
        assert last["skipped_rows"] == len(listed) == trainer.ledger.rejected
        assert last["rows_read"] == 16 + len(listed)
        taken = {line["row"] for line in samples(results)}
        assert taken.isdisjoint({f"Jigsaw_Assembly/pid-{i}" for i in (3, 5, 8)})
        assert len(samples(results)) == 16
        # As a run that was killed before its first checkpoint leaves the folder.
        for path in sorted((results / "checkpoints").rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()


def test_too_many_bad_rows_stop_the_run(damaged: Path, tmp_path: Path) -> None:
    with one_process() as env:
        trainer = build(damaged, tmp_path / "r", env, total_steps=9, sample_max_new_tokens=2)
        trainer.ledger.check_from = 6  # 200 in a run
        with pytest.raises(
            ValueError, match=r"\d of \d+ rows read were rejected .* allowed 1\.00%"
        ):
            trainer.train()
    assert (tmp_path / "r" / "bad_rows.jsonl").read_text()
    train(damaged, tmp_path / "s", total_steps=5, max_bad_rate=1, sample_max_new_tokens=2)


def test_contexts_without_room_are_bad_rows(tmp_path: Path) -> None:
    """A question that leaves no room for a token; the other rows are trained on."""
    write_dataset(tmp_path, rows=4, change=lambda i: {"question": "why " * 200} if i == 2 else {})
    (tmp_path / "datasets.yaml").write_text("datasets:\n  - {name: Jigsaw_Assembly}\n")
    results = tmp_path / "r"
    settings: dict[str, Any] = {
        "max_forward_tokens": 160,
        "total_steps": 2,
        "sample_max_new_tokens": 2,
    }
    train(tmp_path, results, use_reference_intro=False, use_transition_prompt=False, **settings)
    listed = [json.loads(line) for line in (results / "bad_rows.jsonl").read_text().splitlines()]
    assert {(line["row"], line["reason"]) for line in listed} == {(2, "too_long")}
    assert "of max_forward_tokens 160: raise the limit" in listed[0]["detail"]
    with one_process() as env:
        sft = build(tmp_path, tmp_path / "s", env, TextSFT, **settings)
        assert sft.train() == 0
    assert json.loads((tmp_path / "s" / "bad_rows.jsonl").read_text().splitlines()[0])["row"] == 2


# ------------------------------------------------------------------------------ worker processes


def test_a_failed_run_with_workers_ends(world: Path, tmp_path: Path) -> None:
    """One line and exit code 1, and no worker that keeps the run from ending."""
    changes = {**SMALL, "num_workers": 2, "vit_max_size": 2800, "vit_min_size": 1400}
    process = start(MODULE, train_arguments(world, tmp_path, **changes))
    try:
        output, _ = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            kill_tree(process)
    assert process.returncode == 1, output
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert "an image of 100 x 100 patches does not fit" in line
    assert "while preparing" in line and "row" in line
    assert "Traceback" not in output


def test_a_bug_in_a_worker_ends_the_process(tmp_path: Path) -> None:
    """Nobody catches it: its traceback holds the workers until the interpreter waits for them."""
    program = tmp_path / "bug.py"
    program.write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "from data.parquet import Source, StepOrder, make_loader\n"
        "from data.row_groups import ParquetDataset\n"
        "def prepare(row):\n"
        "    raise KeyError('a bug')\n"
        "sampler = StepOrder([Source(ParquetDataset('J', sys.argv[1:]))], 0, 2)\n"
        "for rows in make_loader(sampler, prepare, total_steps=9, num_workers=2):\n"
        "    pass\n"
    )
    (file,) = (write_dataset(tmp_path, rows=4) / "data").iterdir()
    ended = subprocess.run(
        [sys.executable, str(program), str(file)],
        env=program_environment(), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert ended.returncode == 1
    assert "KeyError: 'a bug'" in ended.stderr and "while preparing" in ended.stderr


def test_sigterm_to_the_whole_group_with_workers(world: Path, tmp_path: Path) -> None:
    """As a scheduler sends it: workers wait for the trainer, which saves and ends with 143."""
    changes = {**SMALL, "num_workers": 2, "total_steps": 5000, "sample_max_new_tokens": 4}
    process = start(MODULE, train_arguments(world, tmp_path, **changes))
    try:
        wait_for(lambda: 2 in logged_steps(tmp_path), process, "step 2")
        os.killpg(process.pid, signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            kill_tree(process)
    assert process.returncode == 143, output
    (saved,) = (tmp_path / "checkpoints").iterdir()
    step = int(saved.name.removeprefix("step_"))
    assert step >= 2 and f"terminated: state of step {step} saved" in output
    assert max(logged_steps(tmp_path)) == step
    assert "Traceback" not in output


def test_sigterm_in_this_process(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the first step nothing is saved; afterwards the caller's own handler is back."""
    mine: Callable[..., None] = lambda *_: None  # noqa: E731
    before = signal.signal(signal.SIGTERM, mine)
    try:
        with one_process() as env:
            trainer = build(world, tmp_path, env, total_steps=3)
            trainer.stop.number = signal.SIGTERM
            assert trainer.train() == 143
        assert "terminated: nothing to save yet" in capsys.readouterr().err
        assert not list((tmp_path / "checkpoints").iterdir())
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)
