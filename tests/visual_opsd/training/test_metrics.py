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

from scripts.visual_opsd.processes import DistEnv, init_distributed, shutdown
from scripts.visual_opsd.training import metrics as M

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


class FakeWandb(types.ModuleType):
    """A service with what the methods in `broken` cannot do."""

    def __init__(self, *broken: str) -> None:
        super().__init__("wandb")
        self.broken = broken
        self.started: list[dict[str, Any]] = []
        self.logged: list[int] = []

    def _try(self, name: str) -> None:
        if name in self.broken:
            raise RuntimeError(f"no\n{name}")

    def login(self, *, verify: bool) -> bool:
        assert not verify  # no network
        self._try("login")
        return True

    def init(self, **options: Any) -> FakeWandb:
        self.started.append(options)
        self._try(f"init {options['mode']}")
        return self

    def teardown(self) -> None:
        pass

    def log(self, numbers: dict[str, float], step: int) -> None:
        self.logged.append(step)
        self._try("log")

    def finish(self) -> None:
        self._try("finish")


@pytest.fixture
def wandb_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_RUN_ID", "WANDB_DIR", "WANDB_MODE", "WANDB_FINISH_TIMEOUT"):
        monkeypatch.setenv(name, "")  # restored afterwards, whatever the code under test sets
        monkeypatch.delenv(name)


@pytest.mark.usefixtures("wandb_environment")
@pytest.mark.parametrize(
    ("broken", "modes", "logged", "said"),
    [
        ((), [None], [1, 2], ""),
        (("init None",), [None, "offline"], [1, 2], "does not start (no init None); trying it off"),
        (("init None", "init offline"), [None, "offline"], [], "gets nothing of this run (no init"),
        (("log",), [None], [1], "gets nothing from here on (no log)"),
        (("finish",), [None], [1, 2], ""),
    ],
)
def test_a_failing_service_ends_no_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    broken: tuple[str, ...],
    modes: list[str | None],
    logged: list[int],
    said: str,
) -> None:
    fake = FakeWandb(*broken)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    path = tmp_path / "m.jsonl"
    with M.MetricLogger(
        path, env_of(), total_steps=2, progress=False, wandb=M.WandbSettings("p", run_id="one")
    ) as log:
        log.log(1, {"loss": 1.0})
        log.log(2, {"loss": 2.0})
    assert [options["mode"] for options in fake.started] == modes
    assert {(o["id"], o["resume"], o["dir"]) for o in fake.started} == {
        ("one", "allow", str(tmp_path))
    }
    assert fake.logged == logged
    assert [line["step"] for line in M.read_metrics(path)] == [1, 2]
    output = capsys.readouterr().err
    assert said in output and output.count("W&B") == len([b for b in broken if b != "finish"])


@pytest.mark.usefixtures("wandb_environment")
def test_wandb_is_checked_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb("login"))
    with pytest.raises(ValueError, match=r"no usable key \(no login\).*WANDB_API_KEY"):
        M.WandbSettings("p").check()
    M.WandbSettings("p", offline=True).check()
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if not installed
    with pytest.raises(ValueError, match="pip install wandb"):
        M.WandbSettings("p", offline=True).check()

    one, two = M.WandbSettings("p"), M.WandbSettings("p")
    assert one.run_id != two.run_id
    assert one.continuing("saved").run_id == "saved"
    assert one.continuing(None) == one  # states of earlier versions hold none
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "there"))
    assert M.WandbSettings("p").run_id == one.continuing("saved").run_id == "mine"
    M.MetricLogger(tmp_path / "m.jsonl", env_of(), total_steps=1, progress=False, wandb=one).close()
    assert fake.started[0]["dir"] == str(tmp_path / "there")


@pytest.mark.usefixtures("wandb_environment")
def test_the_real_wandb_finds_a_missing_key_without_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    for name in ("HOME", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.chdir(tmp_path)
    wandb.teardown()
    with pytest.raises(ValueError, match="--wandb_project: W&B has no usable key"):
        M.WandbSettings("p").check()
    wandb.teardown()  # what it remembers of the environment
    monkeypatch.setenv("WANDB_MODE", "disabled")
    M.WandbSettings("p").check()
    wandb.teardown()


def test_phase_timer() -> None:
    timer = M.PhaseTimer(CPU)
    with timer("sample"):
        time.sleep(0.02)
    timer.add_tokens("sample", 30)
    with timer("sample", tokens=10):
        time.sleep(0.02)
    with pytest.raises(KeyError), timer("save"):
        raise KeyError
    env = init_distributed("cpu")
    reduced, again = timer.reduce(env), timer.reduce(env)
    shutdown()
    assert 0.04 <= reduced["seconds/sample"] < 60  # a busy machine oversleeps
    assert reduced["tokens_per_s/sample"] == pytest.approx(40 / reduced["seconds/sample"])
    assert set(reduced) == {"seconds/sample", "tokens_per_s/sample", "seconds/save"}
    assert again == {}


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
