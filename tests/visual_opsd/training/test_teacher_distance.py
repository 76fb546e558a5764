# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""validation/kl and validation/teacher_advantage: recomputed, on which rows, and when they lack."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data.packing import pack
from data.row_groups import ParquetDataset
from modeling import load_bagel
from scripts.visual_opsd.on_policy_sampler import sample_completions
from scripts.visual_opsd.training.teacher_distance import TeacherDistance
from scripts.visual_opsd.training.text_sft import TextSFT
from tests.data.synthetic import image_cell, write_dataset
from tests.visual_opsd.evaluation.tsv_files import choice_rows, write_tsv
from tests.visual_opsd.training.test_validation import COMPARED, ON, validations
from tests.visual_opsd.training.trainers import (
    build,
    one_process,
    train,
    weights,
    write_damaged,
)
from tests.visual_opsd.training_runs import TINY_BAGEL

RUN: dict[str, Any] = {**ON, "total_steps": 2, "eval_every": 2, "lr": 0.05, "ema_decay": 0.5}


def figures(results: Path) -> dict[int, tuple[float, float]]:
    """By step; all validations must have both."""
    return {
        step: (line[COMPARED[0]], line[COMPARED[1]]) for step, line in validations(results).items()
    }


def log_probabilities(values: Mapping[str, Tensor], context: Any, special: Any) -> Any:
    """Of one row by a plain model in double precision: (S, V), and the labels."""
    bundle = load_bagel(TINY_BAGEL)
    own = bundle.model.state_dict()
    bundle.model.load_state_dict({**own, **{k: v for k, v in values.items() if k in own}})
    batch = pack([context], special)
    hidden, head = bundle.model(batch, head=lambda hidden, weight: (hidden, weight))
    return (hidden.double() @ head.double().t()).log_softmax(-1), batch.score_labels


@pytest.mark.parametrize(
    "flags", [{}, {"vt": "blank", "contrast": 0.5, "off_policy_share": 0.5, "loss_chunk_size": 3}]
)
def test_recomputed(world: Path, tmp_path: Path, flags: dict[str, Any]) -> None:
    """On the greedy answers of the base to the held-out rows, with what the teacher is shown."""
    with one_process() as env:
        trainer = build(world, tmp_path, env, **RUN, **flags, pack_tokens=200)
        assert trainer.train() == 0
        student, teacher = weights(trainer.student), weights(trainer.ema)
    files = sorted((world / "Spatial_Navigation" / "data").glob("heldout-*.parquet"))
    rows = ParquetDataset("Spatial_Navigation", files)
    prepare: Any = replace(trainer.objective.prepare(trainer.base), with_trace=False)  # type: ignore[type-var]
    base, special = load_bagel(TINY_BAGEL), trainer.base.special
    kl, advantage, tokens = 0.0, 0.0, 0
    with torch.no_grad():
        for index in range(5):
            row = prepare(rows.read_row(index, index))
            (completion,) = sample_completions(
                base.model, [row.student], [index], tokenizer=base.tokenizer, special=special,
                settings=replace(trainer.config.sample.sampler(), do_sample=False), seed=0, step=0,
            )  # fmt: skip
            text, shown = ((*c, completion.segment()) for c in (row.student, row.teacher))
            ours, labels = log_probabilities(student, text, special)
            blind, _ = log_probabilities(teacher, text, special)
            theirs, _ = log_probabilities(teacher, shown, special)
            kl += float((theirs.exp() * (theirs - ours)).sum())
            gained = (theirs - blind).gather(1, labels[:, None])
            advantage, tokens = advantage + float(gained.sum()), tokens + len(labels)
    found = figures(tmp_path)[2]
    assert found == pytest.approx((kl / tokens, advantage / tokens), rel=1e-4, abs=1e-6)
    assert found != figures(tmp_path)[0]


@pytest.mark.parametrize(
    "flags",
    [
        {"lora_rank": 2},
        {"lora_rank": 2, "teacher_mode": "fixed"},
        {"teacher_mode": "fixed"},
        {"teacher_mode": "self"},
        {"teacher_vt": "vae+vit"},
        {"vt": "none"},
        {"vt": "other"},
    ],
)
def test_every_teacher(world: Path, tmp_path: Path, flags: dict[str, Any]) -> None:
    """Student and teacher are the base at step 0, so the distance is what the VTs make."""
    train(world, tmp_path, **{**RUN, **flags, "total_steps": 1})
    kl, advantage = figures(tmp_path)[0]
    assert kl > 0 and advantage != 0
    after = figures(tmp_path)[1]
    assert after[0] != kl
    fixed = flags.get("teacher_mode") == "fixed"
    assert (after[1] == pytest.approx(advantage, rel=1e-5)) == fixed


def test_after_a_resume(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The answers are part of a state; where they are not, that is said once."""
    flags = {**RUN, "total_steps": 3, "save_every": 1, "keep_last": 9}
    train(world, tmp_path, **flags)
    expected = figures(tmp_path)
    assert list(expected) == [0, 2, 3]
    train(world, tmp_path, **flags, resume="1")
    assert figures(tmp_path) == expected
    assert "left out" not in capsys.readouterr().err
    train(world, tmp_path, **{**flags, "eval_every": 1, "eval_limit": 4}, resume="1")
    assert capsys.readouterr().err.count("validation/teacher_advantage are left out") == 1
    lines = validations(tmp_path)
    assert all(name in lines[0] and name not in lines[3] for name in COMPARED)


def test_rows_without_visual_thoughts_are_left_out(tmp_path: Path) -> None:
    """Row 5 lacks them; where all do, or there cannot be any, there is nothing to measure."""
    damaged = write_damaged(tmp_path / "damaged", 7)
    empty = {"reasoning_image_0": image_cell(None)}
    write_dataset(tmp_path / "none", rows=4, change=lambda i: empty)
    measured: list[list[str]] = []
    packs = TeacherDistance._packs

    def watched(self: Any, *args: Any) -> Any:
        measured.append([])
        for rows in packs(self, *args):
            measured[-1] += [row.name for row in rows]
            yield rows

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TeacherDistance, "_packs", watched)
        for place, names in (("damaged", 5), ("none", 0)):
            data = tmp_path / place / "Jigsaw_Assembly"
            train(
                damaged, tmp_path / f"run-{place}", eval_every=1, eval_data=data,
                eval_split="train", max_bad_rate=0.5, sample_max_new_tokens=2,
            )  # fmt: skip
            lines = validations(tmp_path / f"run-{place}").values()
            assert all((name in line) == bool(names) for line in lines for name in COMPARED)
            assert [len(rows) for rows in measured] == [names] * 2
            measured.clear()


def test_where_there_is_no_teacher_or_no_thought(world: Path, tmp_path: Path) -> None:
    """SFT, and rows of a benchmark."""
    train(world, tmp_path / "sft", TextSFT, **ON)
    benchmark = write_tsv(tmp_path / "MMVP.tsv", choice_rows(3))
    train(world, tmp_path / "opsd", **{**ON, "eval_data": benchmark})
    for name in ("sft", "opsd"):
        lines = validations(tmp_path / name).values()
        assert lines and all(figure not in line for line in lines for figure in COMPARED)
