# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Training with a control in the place of the visual thoughts (--vt)."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from data.limits import ContextLimits
from data.packing import context_length
from data.row_groups import ParquetDataset
from data.thinkmorph import BadRow
from data.visual_thoughts import CONTROLS, VT_KINDS
from scripts.visual_opsd.config import PromptSettings, TeacherSettings
from scripts.visual_opsd.rows import open_builder
from scripts.visual_opsd.scored_rows import empty_row
from scripts.visual_opsd.training.checkpoints import (
    TrainingState,
    check_resumable,
    save_checkpoint,
)
from scripts.visual_opsd.training.visual_opsd import PrepareOPSD
from tests.arrivals import spy
from tests.conftest import TINY_BAGEL
from tests.visual_opsd.training.trainers import one_process, rollout, train


def test_controls_train_on_the_same_completions(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With workers, to which the other rows' data set travels; only the labels differ. A rank
    without rows runs the ViT as often as the others: once less where no VT is shown."""
    losses, samples = {}, {}
    fillers = spy(monkeypatch, empty_row)
    for kind in ("real", "other", "none"):
        results = tmp_path / kind
        train(world, results, vt=kind, num_workers=1, total_steps=1)
        losses[kind] = json.loads((results / "metrics.jsonl").read_text().splitlines()[0])["loss"]
        samples[kind] = str(rollout(results))
    assert [call["with_shown"] for call in fillers] == [True, True, False]
    assert len(set(losses.values())) == 3
    assert len(set(samples.values())) == 1


def test_every_control_leaves_out_the_same_rows(world: Path) -> None:
    """One token less than the real context takes: too long for all, `none` included."""
    files = sorted((world / "Spatial_Navigation" / "data").glob("train-*.parquet"))
    row = ParquetDataset("Spatial_Navigation", files).read_row(0, 3)
    builder, _ = open_builder(TINY_BAGEL, PromptSettings(vit_max_size=112, vit_min_size=14))
    real = PrepareOPSD(builder)(row)
    assert real.teacher is not None
    length = context_length(real.teacher)
    for kind in VT_KINDS:
        prepare = PrepareOPSD(builder, kind, 1, ContextLimits(tokens=length))
        made = prepare(row)
        assert made.teacher is not None
        found = context_length(made.teacher)
        assert found < length if kind == "none" else found == length
        short = replace(prepare, limits=ContextLimits(tokens=length - 1))
        with pytest.raises(BadRow, match="max_forward_tokens"):
            short(row)


def test_combinations_that_contradict_each_other_are_refused() -> None:
    assert TeacherSettings().shown == "real"
    assert TeacherSettings(noise_vt=True).shown == TeacherSettings(vt="noise").shown == "noise"
    assert TeacherSettings(noise_vt=True, vt="noise").shown == "noise"
    for kind in CONTROLS:
        assert TeacherSettings(vt=kind).shown == kind
        if kind != "noise":
            with pytest.raises(ValueError, match=f"contradicts --vt {kind}: leave one out"):
                TeacherSettings(noise_vt=True, vt=kind)
    with pytest.raises(ValueError, match=r"no picture whose latents --teacher_vt vae\+vit"):
        TeacherSettings(vt="none", teacher_vt="vae+vit")
    with pytest.raises(ValueError, match="--vt must be one of real, noise, other"):
        TeacherSettings(vt="nothing")


def test_noise_goes_on_under_either_of_its_flags(tmp_path: Path) -> None:
    """A state of before --vt existed, too; a state of another control does not."""

    def config(**settings: Any) -> dict[str, Any]:
        return {"teacher": asdict(TeacherSettings(**settings))}

    old = config(noise_vt=True)
    del old["teacher"]["vt"]
    states = {"old": old, "alias": config(noise_vt=True), "noise": config(vt="noise")}
    states |= {"other": config(vt="other"), "real": config()}
    model = nn.Linear(1, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    state = TrainingState(model, optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer))
    paths = {}
    for name, saved in states.items():
        with one_process() as env:
            paths[name] = save_checkpoint(
                tmp_path / name, 1, state, env=env, config=saved, contents={}, extra={}
            )
    for name, path in paths.items():
        for now in ("alias", "noise"):
            if name in ("old", "alias", "noise"):
                check_resumable(path, config=states[now], contents={})
                continue
            with pytest.raises(ValueError, match=f"teacher.vt: saved '{name}', now 'noise'"):
                check_resumable(path, config=states[now], contents={})
