# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""metrics.jsonl, the progress bar, wandb on request, phase timers."""

from __future__ import annotations

import json
import math
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts.visual_opsd import metrics as M
from scripts.visual_opsd.distributed import DistEnv, init_distributed, shutdown

CPU = torch.device("cpu")


def env_of(rank: int = 0) -> DistEnv:
    return DistEnv(rank, 2, rank, 2, CPU)


def test_lines_are_valid_sorted_json(tmp_path: Path) -> None:
    path = tmp_path / "results" / "metrics.jsonl"
    with M.MetricLogger(path, env_of(), total_steps=2, progress=False) as log:
        log.log(1, {"z": torch.tensor(1.5), "loss": math.nan, "grad": math.inf, "low": -math.inf})
        # Flushed by line: readable while the run goes on.
        (line,) = path.read_text().splitlines()
        log.log(2, {"skipped": True, "n": torch.tensor(3), "note": "x", "none": None})
        assert line.startswith('{"step": 1, "grad"')
    first, second = [
        json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
        for text in path.read_text().splitlines()
    ]
    assert first == {"step": 1, "z": 1.5, "loss": "nan", "grad": "inf", "low": "-inf"}
    assert list(first) == ["step", "grad", "loss", "low", "z"]
    assert second == {"step": 2, "skipped": 1, "n": 3, "note": "x", "none": None}
    again = M.read_metrics(path)
    assert math.isnan(again[0]["loss"]) and again[0]["low"] == -math.inf
    assert again[1]["note"] == "x"


def test_appends_after_a_resume_and_is_silent_on_other_ranks(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2):
        log = M.MetricLogger(path, env_of(), total_steps=2, progress=False)
        log.log(step, {"loss": 1.0})
        log.close()
        log.close()
    assert [r["step"] for r in M.read_metrics(path)] == [1, 2]
    with M.MetricLogger(tmp_path / "no" / "m.jsonl", env_of(1), total_steps=2) as log:
        log.log(1, {"loss": 1.0})
        log.advance()
        log.message("quiet")
    assert not (tmp_path / "no").exists()


def test_only_scalars(tmp_path: Path) -> None:
    with (
        M.MetricLogger(tmp_path / "m.jsonl", env_of(), total_steps=1, progress=False) as log,
        pytest.raises(RuntimeError),
    ):
        log.log(1, {"vector": torch.ones(2)})


def test_progress_bar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with M.MetricLogger(tmp_path / "m.jsonl", env_of(), total_steps=9, start_step=4) as log:
        log.log(5, {"loss": 0.12345, "bad": math.nan}, show={"loss": ".3f", "bad": ".3f"})
        for _ in range(5):
            log.advance()
        log.message("a line")
    shown = capsys.readouterr().err
    assert "4/9" in shown and "9/9" in shown and "loss=0.123" in shown and "a line" in shown


def test_wandb_only_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: dict[str, Any] = {"logged": []}

    class Run:
        def log(self, numbers: dict[str, float], step: int) -> None:
            calls["logged"].append((step, numbers))

        def finish(self) -> None:
            calls["finished"] = True

    def init(**options: Any) -> Run:
        calls["init"] = options
        return Run()

    fake = types.ModuleType("wandb")
    fake.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    path = tmp_path / "m.jsonl"
    with M.MetricLogger(path, env_of(), total_steps=1, progress=False):
        assert "init" not in calls
    settings = M.WandbSettings("project", "name", offline=True)
    with M.MetricLogger(
        path, env_of(), total_steps=1, progress=False, wandb=settings, config={"lr": 1e-5}
    ) as log:
        log.log(1, {"loss": 2.0, "note": "text", "bad": math.nan})
    assert calls["init"]["mode"] == "offline" and calls["init"]["config"] == {"lr": 1e-5}
    assert calls["logged"] == [(1, {"loss": 2.0})] and calls["finished"]
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if not installed
    with pytest.raises(ValueError, match="pip install wandb"):
        M.MetricLogger(path, env_of(), total_steps=1, progress=False, wandb=settings)
    with M.MetricLogger(path, env_of(1), total_steps=1, wandb=settings):
        pass  # other ranks never import it


def test_phase_timer() -> None:
    timer = M.PhaseTimer(CPU)
    with timer("sample") as count:
        time.sleep(0.02)
        count(30)
    with timer("sample", tokens=10):
        time.sleep(0.02)
    with pytest.raises(KeyError), timer("save"):
        raise KeyError
    env = init_distributed("cpu")
    reduced = timer.reduce(env)
    shutdown()
    assert 0.04 <= reduced["seconds/sample"] < 60  # a busy machine oversleeps
    assert reduced["tokens_per_s/sample"] == pytest.approx(40 / reduced["seconds/sample"])
    assert set(reduced) == {"seconds/sample", "tokens_per_s/sample", "seconds/save"}
    assert timer.pop() == {}


def test_phase_metrics_over_ranks() -> None:
    """Ranks run side by side: seconds are averaged, tokens added."""
    sums = {"seconds/student": 8.0, "tokens/student": 400.0, "seconds/save": 2.0}
    assert M.phase_metrics(sums, 4) == {
        "seconds/student": 2.0,
        "tokens_per_s/student": 200.0,
        "seconds/save": 0.5,
    }


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux only")
def test_peak_memory_is_in_gigabytes() -> None:
    peak = M.peak_memory_gb(CPU)
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x]
    assert peak == pytest.approx(int(line.split()[1]) * 1024 / 1e9, rel=0.1)
