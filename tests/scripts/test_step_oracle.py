# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Whole runs of a few steps against `step_oracle`, on one rank and on two."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.scripts.launching import HERE, launch
from tests.scripts.runs import make_world
from tests.scripts.step_cases import CASES, TWO_RANKS, Recipe, Run, run_case
from tests.scripts.step_oracle import recompute
from tests.scripts.trainers import one_process


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_world(folder, rows=16)
    return folder


def assert_recomputed(recipe: Recipe, run: Run) -> None:
    """Every step's figures, and at the end every weight, average and moment."""
    oracle, figures = recompute(recipe, run)
    assert len(run.lines) == len(figures) == recipe.total_steps
    for line, expected in zip(run.lines, figures, strict=True):
        assert line["lr"] == pytest.approx(expected.lr, rel=1e-12)
        assert line["loss"] == pytest.approx(expected.loss, rel=1e-6, abs=1e-6, nan_ok=True)
        assert line["grad_norm"] == pytest.approx(expected.grad_norm, rel=2e-5)
        assert expected.logprob_gap < 1e-5, "not drawn with the weights of this step"
        assert "sampler_gap" not in line, "the temperatures differ"
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


@pytest.mark.parametrize("name", CASES)
def test_a_run_recomputed(world: Path, tmp_path: Path, name: str) -> None:
    with one_process() as env:
        run = run_case(world, tmp_path, env, CASES[name])
    assert_recomputed(CASES[name], run)


@pytest.mark.slow
def test_two_ranks_recomputed(world: Path, tmp_path: Path) -> None:
    """One launch for all: three runs, a bad row on one rank, and one rank that is told to stop."""
    launch(2, str(HERE / "two_rank_steps.py"), str(world), str(tmp_path), timeout=120)
    for number, (recipe, _) in enumerate(TWO_RANKS.values()):
        run = torch.load(tmp_path / f"case-{number}.pt", weights_only=False)
        assert_recomputed(recipe, run)
