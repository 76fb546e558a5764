# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""A new objective needs one short file, and nothing of the trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from scripts.visual_opsd.training import trainer as trainer_module
from scripts.visual_opsd.training.interleaved import InterleavedSFT
from scripts.visual_opsd.training.text_sft import TextSFT
from scripts.visual_opsd.training.visual_opsd import VisualOPSD
from tests.visual_opsd.training import toy_objective
from tests.visual_opsd.training.toy_objective import ConstantText
from tests.visual_opsd.training.trainers import build, metrics, one_process, train
from tests.visual_opsd.training_runs import make_world

ALONE: dict[str, Any] = {"jsd_weight": 0, "ce_weight": 1}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_world(folder, rows=12)
    return folder


def test_a_toy_in_forty_lines_learns(world: Path, tmp_path: Path) -> None:
    """Its loss falls, its states are resumed, and no other objective goes on from them."""
    assert len(Path(toy_objective.__file__).read_text().splitlines()) <= 40
    steps: dict[str, Any] = {"total_steps": 8, "save_every": 4, "lr": 0.05, "max_grad_norm": 100}
    trainer = train(world, tmp_path, ConstantText, **ALONE, **steps)
    assert trainer.teacher is None and trainer.base.vae is None
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert lines[-1]["loss"] < lines[0]["loss"] / 2
    assert all(line["loss"] == line["ce"] and not line["truncated_rate"] for line in lines)
    again = train(world, tmp_path, ConstantText, **ALONE, **steps, resume="4")
    assert again.step == 8 and metrics(tmp_path)[-1]["loss"] == lines[-1]["loss"]
    with one_process() as env, pytest.raises(ValueError, match="objective: saved 'ConstantText'"):
        build(world, tmp_path, env, VisualOPSD, **ALONE, **steps, resume="latest")


def test_the_trainer_names_no_objective() -> None:
    text = Path(trainer_module.__file__).read_text()
    for kind in (VisualOPSD, TextSFT, InterleavedSFT):
        module = kind.__module__.rpartition(".")[2]
        assert f"training.{module} import" not in text and f"{kind.__name__}(" not in text
