# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Whole runs of a few steps against `step_oracle`, on one rank and on two."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from modeling.release.adapters import read_adapter
from scripts.visual_opsd.training.figures import FIELDS
from tests.visual_opsd.launching import HERE, launch
from tests.visual_opsd.training.step_cases import CASES, TWO_RANKS, Recipe, Run, run_case
from tests.visual_opsd.training.step_oracle import recompute
from tests.visual_opsd.training.trainers import metrics, one_process, train, weights
from tests.visual_opsd.training.two_rank_training import train_guarded
from tests.visual_opsd.training_runs import full_state


def assert_recomputed(recipe: Recipe, run: Run) -> None:
    """Every step's figures, and at the end every weight, average and moment."""
    oracle, figures = recompute(recipe, run)
    assert len(run.lines) == len(figures) == recipe.total_steps
    for line, expected in zip(run.lines, figures, strict=True):
        assert line["lr"] == pytest.approx(expected.lr, rel=1e-12)
        assert line["loss"] == pytest.approx(expected.loss, rel=1e-6, abs=1e-6, nan_ok=True)
        assert line["grad_norm"] == pytest.approx(expected.grad_norm, rel=2e-5)
        for part in ("ce", "divergence", "mse"):
            assert line.get(part, 0.0) == pytest.approx(getattr(expected, part), abs=2e-6), part
        assert expected.sampler_gap < 1e-5, "not drawn with the weights of this step"
        comparable = recipe.samples and recipe.jsd_temperature == recipe.sample_temperature
        assert ("sampler_gap" in line) == comparable
    state = oracle.state()
    assert run.end.keys() == state.keys()
    scales = dict.fromkeys(("student", "teacher", "exp_avg", "exp_avg_sq"), 0.0)
    for name, value in state.items():
        kind = name.split("/")[0]
        scales[kind] = max(scales[kind], float(value.abs().max()))
    for name, value in state.items():
        kind = name.split("/")[0]
        bound = 1e-6 if kind in ("student", "teacher") else 5e-5 * scales[kind]
        torch.testing.assert_close(run.end[name], value, atol=bound, rtol=1e-6, msg=name)


@pytest.fixture(scope="module")
def alone(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """Runs of one rank, each made once."""

    @cache
    def made(name: str) -> Run:
        with one_process() as env:
            return run_case(world, tmp_path_factory.mktemp("run"), env, CASES[name])

    return made


@pytest.mark.parametrize("name", CASES)
def test_a_run_recomputed(alone: Callable[[str], Run], name: str) -> None:
    assert_recomputed(CASES[name], alone(name))


@pytest.mark.slow
def test_two_ranks_recomputed(world: Path, alone: Callable[[str], Run], tmp_path: Path) -> None:
    """One launch for all that two_rank_training.py checks."""
    program = str(HERE / "training" / "two_rank_training.py")
    launch(2, program, str(world), str(tmp_path), timeout=240)
    for number, (recipe, _) in enumerate(TWO_RANKS.values()):
        run = torch.load(tmp_path / f"case-{number}.pt", weights_only=False)
        assert_recomputed(recipe, run)
        if recipe in CASES.values() and recipe.samples:
            # A row's completion does not depend on who samples it, nor with whom.
            (name,) = (name for name, other in CASES.items() if other == recipe)
            for (row, ours), (other, theirs) in zip(
                run.taken[0], alone(name).taken[0], strict=True
            ):
                assert row == other and ours is not None and theirs is not None
                assert (ours.ids, ours.scored) == (theirs.ids, theirs.scored)
    assert_adapters_as_alone(world, tmp_path)
    assert_answers_as_alone(world, tmp_path)
    assert_guard_as_alone(world, tmp_path)


def assert_answers_as_alone(world: Path, two: Path) -> None:
    """Two ranks' validation of the base is that of one."""
    flags: dict[str, Any] = {
        "eval_every": 9, "eval_data": "Spatial_Navigation", "eval_limit": 5, "total_steps": 1,
    }  # fmt: skip
    train(world, two / "one", **flags)
    lines = [
        (two / name / "validation" / "0000000" / "predictions.jsonl").read_text()
        for name in ("one", "validated")
    ]
    assert lines[0] == lines[1] and lines[0].count("\n") == 5
    held = two / "validated" / "validation" / "0000001" / "summary.json"
    assert json.loads(held.read_text())["processes"] == 2
    assert not (two / "stopped" / "validation" / "0000001" / "summary.json").exists()


def assert_guard_as_alone(world: Path, two: Path) -> None:
    """One process has the figures of two, and goes back to the weights that two kept."""
    state = two / "guarded" / "checkpoints" / "step_0000001"
    averages = []
    for name, changes in (("guard-1", {}), ("guard-2", {"resume": str(state)})):
        with one_process() as env:
            trainer = train_guarded(world, two / name, env, **changes)
            averages.append(weights(trainer.ema))
    for name, tensor in averages[0].items():
        torch.testing.assert_close(averages[1][name], tensor, atol=1e-5, rtol=1e-3)
    saved = full_state(two / "guarded", 1, two)
    for name, tensor in averages[1].items():
        assert torch.equal(saved[f"/ema/{name}"], tensor)
    lines = [
        {line["step"]: line for line in metrics(two / name) if "validation/kl" in line}
        for name in ("guarded", "guard-1", "guard-2")
    ]
    assert [list(found) for found in lines] == [[0, 1, 2, 3], [0, 1, 2, 3], [2, 3]]
    for name in ("validation/kl", "validation/teacher_advantage", "validation/teacher_dropped"):
        for step, line in lines[0].items():
            for other in lines[1:]:
                if step in other:
                    assert other[step][name] == pytest.approx(line[name], rel=1e-3, abs=1e-6)


def assert_adapters_as_alone(world: Path, two: Path) -> None:
    """One process has the losses and adapters of two, and goes on from their state."""
    flags: dict[str, Any] = {
        "lora_rank": 3, "lr": 0.01, "teacher_mode": "ema", "ema_decay": 0.7, "total_steps": 3,
        "save_every": 2, "keep_last": 2, "save_release": True, "global_batch_size": 4,
    }  # fmt: skip
    train(world, two / "alone", **flags)
    state = two / "adapters" / "checkpoints" / "step_0000002"
    train(world, two / "resumed", **flags, resume=str(state))
    lines, adapters = {}, {}
    for name in ("adapters", "alone", "resumed"):
        lines[name] = [(line["loss"], line["grad_norm"]) for line in metrics(two / name)]
        adapters[name] = read_adapter(two / name / "checkpoints" / "adapter_0000003")[1]
    assert len(lines["alone"]) == len(lines["adapters"]) == 3
    assert lines["adapters"] == [pytest.approx(pair, rel=1e-4) for pair in lines["alone"]]
    # What is measured of tokens and completions is of both ranks' rows.
    found, alone = (
        {name: metrics(two / run)[0][name] for name in FIELDS if name in metrics(two / run)[0]}
        for run in ("adapters", "alone")
    )
    assert found.pop("host_memory_gb") > 0 and alone.pop("host_memory_gb") > 0
    assert found == pytest.approx(alone, rel=1e-4) and len(found) == 20
    assert lines["resumed"][-1] == pytest.approx(lines["adapters"][-1], rel=1e-4)
    for name, tensor in adapters["alone"].items():
        for other in ("adapters", "resumed"):
            torch.testing.assert_close(adapters[other][name], tensor, atol=1e-5, rtol=1e-3)
