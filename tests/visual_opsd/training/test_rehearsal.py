# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""--vt_rehearsal: rows in which the student sees what the teacher sees."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data.randomness import off_policy_uniform, rehearsal_uniform
from data.sequence import Context, ImageSegment
from scripts.visual_opsd.config import RolloutSettings, TeacherSettings, TrainConfig
from scripts.visual_opsd.on_policy_sampler import sample_completions
from scripts.visual_opsd.scored_rows import ScoredRow
from scripts.visual_opsd.training import step as training_step
from scripts.visual_opsd.training import visual_opsd
from scripts.visual_opsd.training.memory_sizes import largest_load, load_of, longest_row
from scripts.visual_opsd.training.teacher import Teacher
from tests.visual_opsd.training.test_memory_plan import footprint
from tests.visual_opsd.training.trainers import build, metrics, one_process, samples, train

SHARE = 0.4
RUN: dict[str, Any] = {
    "global_batch_size": 4, "total_steps": 3, "samples_per_step": 99, "global_seed": 2,
    "vt_rehearsal": SHARE,
}  # fmt: skip
ALL: dict[str, Any] = {
    **RUN, "completions_per_row": 2, "off_policy_share": 0.4, "contrast": 0.5,
    "contrast_with": "other", "lora_rank": 2, "max_forward_tokens": 150, "pack_tokens": 200,
}  # fmt: skip


def images(context: Context | None) -> list[torch.Tensor]:
    return [s.patches for s in context or () if isinstance(s, ImageSegment)]


def is_rehearsed(step: int, slot: int) -> bool:
    """Steps count from 0."""
    return rehearsal_uniform(RUN["global_seed"], step, slot) < SHARE


class Watch:
    """What was sampled from and what was scored."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.sampled: list[Context] = []
        self.scored: list[ScoredRow] = []
        patch.setattr(visual_opsd, "sample_completions", self.sample)
        run_pack = training_step.run_pack

        def packed(rows: Any, *args: Any) -> Any:
            self.scored += rows
            return run_pack(rows, *args)

        patch.setattr("scripts.visual_opsd.training.objective.run_pack", packed)

    def sample(self, model: Any, contexts: Any, *args: Any, **options: Any) -> Any:
        self.sampled += contexts
        return sample_completions(model, contexts, *args, **options)


def test_which_rows_see_what_the_teacher_sees(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their completions are drawn from it and scored on it; the other rows are as without."""
    train(world, tmp_path / "off", **{**RUN, "vt_rehearsal": 0.0, "total_steps": 1})
    watch = Watch(monkeypatch)
    train(world, tmp_path / "on", **RUN)
    expected = [is_rehearsed(step, slot) for step in range(3) for slot in range(4)]
    assert [row.rehearsed for row in watch.scored] == expected and len(set(expected)) == 2
    for row, context in zip(watch.scored, watch.sampled, strict=True):
        ours, theirs = images(row.student), images(row.teacher)
        assert len(theirs) == 2 and len(ours) == (2 if row.rehearsed else 1)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=False))
        assert row.student[:-1] == context
        if row.rehearsed:
            assert row.student == row.teacher
    rates = [line["rehearsal_rate"] for line in metrics(tmp_path / "on")]
    assert rates == [sum(expected[n : n + 4]) / 4 for n in (0, 4, 8)]
    assert all("rehearsal_rate" not in line for line in metrics(tmp_path / "off"))
    plain = samples(tmp_path / "off")
    for slot, (one, other) in enumerate(zip(plain, samples(tmp_path / "on"), strict=False)):
        assert one["slot"] == other["slot"] == slot
        same = one["logprobs"] == pytest.approx(other["logprobs"], abs=1e-5)
        assert same != expected[slot]


def test_with_everything_else(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given texts, several completions, a contrast, adapters and limits; resumed and replayed."""
    watch = Watch(monkeypatch)
    results = tmp_path / "run"
    train(world, results, **ALL, save_every=2)
    lines, drawn = metrics(results), samples(results)
    places = [
        (step, slot)
        for step in range(3)
        for slot in range(4)
        for _ in range(1 if off_policy_uniform(2, step, slot) < 0.4 else 2)
    ]
    assert [row.rehearsed for row in watch.scored] == [is_rehearsed(*p) for p in places]
    kinds = {(row.rehearsed, row.completion.given) for row in watch.scored if row.completion}
    assert len(kinds) == 4
    for row in watch.scored:
        assert row.length <= 150 and len(images(row.control)) == 2
    assert all(line["sampler_gap"] < 1e-5 for line in lines)
    train(world, results, **ALL, save_every=2, resume="2")
    for one, other in zip(lines, metrics(results), strict=True):
        assert (one["loss"], one["grad_norm"]) == (other["loss"], other["grad_norm"])
    assert samples(results) == drawn
    replayed = tmp_path / "replayed"
    train(world, replayed, **ALL, replay_samples=results / "samples.jsonl")
    for one, other in zip(lines, metrics(replayed), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert one["rehearsal_rate"] == other["rehearsal_rate"]
    with pytest.raises(ValueError, match=r"vt_rehearsal: saved 0\.4, now 0\.5"):
        train(world, results, **{**ALL, "vt_rehearsal": 0.5}, resume="2")


def test_features_are_not_shared(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the ViT would run once for a pack of such rows, and twice for others."""
    monkeypatch.setattr(Teacher, "shares_features", lambda *_: True)
    shared: list[Any] = []
    hidden = Teacher.hidden

    def watched(self: Teacher, batch: Any, share: Any = None) -> Any:
        shared.append(share)
        return hidden(self, batch, share)

    monkeypatch.setattr(Teacher, "hidden", watched)
    for share, expected in ((0.0, False), (0.5, True)):
        shared.clear()
        with one_process() as env:
            trainer = build(world, tmp_path / str(share), env, vt_rehearsal=share, freeze_vit=True)
            assert trainer.train() == 0
        assert shared and all((one is None) == expected for one in shared)


def test_latents_are_refused() -> None:
    rollout, teacher = RolloutSettings(vt_rehearsal=0.1), TeacherSettings(teacher_vt="vae+vit")
    with pytest.raises(ValueError, match=r"--vt_rehearsal 0.1 shows .*--teacher_vt vae\+vit"):
        TrainConfig(rollout=rollout, teacher=teacher)


def test_memory_of_longer_contexts() -> None:
    """At worst all rows of a rollout and of a pack are as long as the teacher's."""
    plain = footprint(global_batch_size=8)
    longer = replace(plain, vt_rehearsal=0.1)
    row = longest_row(plain)
    loads = [load_of(of, row) for of in (plain, longer)]
    assert loads[1].prefill_tokens == loads[1].decoded * row.teacher
    assert loads[1].student == loads[1].teacher == loads[0].teacher > loads[0].student
    assert loads[1].student_patches == loads[1].teacher_patches
    assert largest_load(longer).student > largest_load(plain).student
