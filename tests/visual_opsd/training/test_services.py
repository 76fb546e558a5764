# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Where else figures go: TensorBoard's event files and a run on wandb, through whole trainings."""

from __future__ import annotations

import math
import struct
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from scripts.visual_opsd.processes import DistEnv
from scripts.visual_opsd.training import event_files
from scripts.visual_opsd.training.metrics import MetricLogger, read_metrics
from scripts.visual_opsd.training.models import build_models
from tests.arrivals import Stop, spy, stop
from tests.visual_opsd.training.trainers import build, one_process, train

SERVICES: dict[str, dict[str, Any]] = {
    "tensorboard": {"tensorboard": True},
    "wandb": {"wandb_project": "p"},
}


def events(results: Path) -> dict[str, list[tuple[int, float]]]:
    """Name -> (step, value) pairs, in the order written, as TensorBoard reads them."""
    found = EventAccumulator(str(results / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {
        name: [(event.step, event.value) for event in found.Scalars(name)]
        for name in found.Tags()["scalars"]
    }


def logged(results: Path) -> dict[str, list[tuple[int, float]]]:
    """The same of metrics.jsonl, rounded as event files hold numbers: to 4 bytes."""
    found: dict[str, list[tuple[int, float]]] = {}
    for record in read_metrics(results / "metrics.jsonl"):
        step = record.pop("step")
        for name, value in record.items():
            (rounded,) = struct.unpack("f", struct.pack("f", value))
            found.setdefault(name, []).append((step, rounded))
    return found


def await_next_second() -> None:
    """Files are read in the order of their names, which begin with the second they are made in."""
    time.sleep(1.0 - time.time() % 1.0)


def test_event_files_hold_the_same_numbers(world: Path, tmp_path: Path) -> None:
    results = tmp_path / "r"
    changes: dict[str, Any] = {
        "total_steps": 4, "save_every": 2, "tensorboard": True, "save_release": False,
        "eval_every": 2, "eval_data": "Spatial_Navigation", "eval_limit": 2, "eval_split": "train",
    }  # fmt: skip
    with one_process() as env:
        whole = build(world, results, env, **changes)
        assert not (results / "tensorboard").exists()
        assert whole.train() == 0
    first = events(results)
    assert first == logged(results)
    assert [step for step, _ in first["loss"]] == [1, 2, 3, 4]
    assert [step for step, _ in first["validation/accuracy"]] == [0, 2, 4]
    # Resumed after step 2: what the first run wrote of steps 3 and 4 does not count any longer.
    await_next_second()
    train(world, results, **changes, resume="2")
    assert len(list((results / "tensorboard").iterdir())) == 2
    again = events(results)
    assert again == logged(results) and again["loss"] == first["loss"]
    assert [step for step, _ in again["seconds/train"]] == [1, 2, 3, 4]


def test_a_run_from_the_start_forgets_earlier_ones(tmp_path: Path) -> None:
    """A run that was killed before its first state leaves events, from step 0 on."""
    env = DistEnv(0, 2, 0, 2, torch.device("cpu"))
    for value in (1.0, math.nan):
        await_next_second()
        (tmp_path / "metrics.jsonl").unlink(missing_ok=True)
        with MetricLogger(
            tmp_path / "metrics.jsonl", env, total_steps=2, progress=False, tensorboard=True
        ) as log:
            for step in (0, 1):
                log.log(step, {"a": value, "b": step, "c": True, "text": "no number", "d": None})
            log.close()
            log.close()
    found = events(tmp_path)
    assert [(step, math.isnan(value)) for step, value in found.pop("a")] == [(0, True), (1, True)]
    assert found == {"b": [(0, 0.0), (1, 1.0)], "c": [(0, 1.0), (1, 1.0)]}
    silent = DistEnv(1, 2, 1, 2, torch.device("cpu"))
    with MetricLogger(tmp_path / "b" / "m.jsonl", silent, total_steps=1, tensorboard=True) as log:
        log.log(1, {"a": 1.0})
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("broken", ["start", "add_scalar", "flush", "close"])
def test_a_failing_writer_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], broken: str
) -> None:
    written = []

    class Writer:
        def __init__(self, folder: str, purge_step: int) -> None:
            self._try("start")

        def _try(self, name: str) -> None:
            if name == broken:
                raise OSError(f"no\n{name}")

        def add_scalar(self, name: str, value: float, step: int) -> None:
            self._try("add_scalar")
            written.append(step)

        def flush(self) -> None:
            self._try("flush")

        def close(self) -> None:
            self._try("close")

    monkeypatch.setattr(event_files, "_writer_class", lambda: Writer)
    env = DistEnv(0, 1, 0, 1, torch.device("cpu"))
    path = tmp_path / "metrics.jsonl"
    with MetricLogger(path, env, total_steps=2, progress=False, tensorboard=True) as log:
        log.log(1, {"loss": 1.0})
        log.log(2, {"loss": 2.0})
    assert [line["step"] for line in read_metrics(path)] == [1, 2]
    assert written == {"flush": [1], "close": [1, 2]}.get(broken, [])
    said = capsys.readouterr().err
    expected = f"TensorBoard gets nothing from here on (no {broken})"
    assert said.count("TensorBoard") == said.count(expected) == (broken != "close")


def test_a_folder_that_cannot_be_made_ends_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The real writer."""
    (tmp_path / "tensorboard").write_text("")
    env = DistEnv(0, 1, 0, 1, torch.device("cpu"))
    path = tmp_path / "metrics.jsonl"
    with MetricLogger(path, env, total_steps=1, progress=False, tensorboard=True) as log:
        log.log(1, {"loss": 1.0})
    assert len(read_metrics(path)) == 1
    assert "TensorBoard gets nothing from here on (" in capsys.readouterr().err


# ---------------------------------------------------------------------------- before the model


@pytest.mark.parametrize("service", SERVICES)
def test_a_missing_package_is_told_before_a_model_is_loaded(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, service: str
) -> None:
    loads = spy(monkeypatch, build_models, stop)
    for name in (service, "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)  # as if not installed
    said = f"needs (the package )?{service}.*pip install {service}"
    with one_process() as env, pytest.raises(ValueError, match=said):
        build(world, tmp_path / "r", env, **SERVICES[service])
    assert not loads and not (tmp_path / "r").exists()
    with one_process() as env, pytest.raises(Stop):
        build(world, tmp_path / "r", env)
    assert len(loads) == 1


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A service that keeps what it was started with."""
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    fake: Any = types.ModuleType("wandb")
    fake.started, fake.logged = [], []

    def init(**options: Any) -> Any:
        fake.started.append(options)
        fake.logged.append([])
        log: Callable[..., None] = lambda _, step: fake.logged[-1].append(step)  # noqa: E731
        return types.SimpleNamespace(log=log, finish=lambda: None)

    fake.init, fake.login = init, lambda **_: True
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_a_missing_key_is_told_before_a_model_is_loaded(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wandb: Any
) -> None:
    loads = spy(monkeypatch, build_models, stop)

    def login(**_: Any) -> None:
        raise RuntimeError("no key")

    wandb.login = login
    with one_process() as env, pytest.raises(ValueError, match=r"no usable key \(no key\)"):
        build(world, tmp_path / "r", env, wandb_project="p")
    assert not loads and not wandb.started
    with one_process() as env, pytest.raises(Stop):
        build(world, tmp_path / "r", env, wandb_project="p", wandb_offline=True)


def test_a_resumed_run_goes_on_at_wandb(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wandb: Any
) -> None:
    changes: dict[str, Any] = {"total_steps": 4, "save_every": 2, "save_release": False}
    changes |= {"wandb_project": "p"}
    train(world, tmp_path / "r", **changes)
    train(world, tmp_path / "r", **changes, resume="2")
    first, second = wandb.started
    assert first["id"] == second["id"] and second["resume"] == "allow"
    assert wandb.logged == [[1, 2, 3, 4], [3, 4]]
    # Another run has another id, and the environment's comes first.
    train(world, tmp_path / "other", **{**changes, "total_steps": 1})
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    train(world, tmp_path / "r", **changes, resume="2")
    assert wandb.started[2]["id"] != first["id"] and wandb.started[3]["id"] == "mine"
