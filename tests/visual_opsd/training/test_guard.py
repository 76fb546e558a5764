# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""--teacher_guard: when a teacher has dropped, what becomes of it, and after a resume.

Where only figures matter they come from a script. Two ranks: two_rank_training.py.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data.packing import context_length
from scripts.visual_opsd import train_sft, train_visual_opsd, train_visual_opsd_offline
from scripts.visual_opsd.config import LossSettings, TrainConfig
from scripts.visual_opsd.evaluation import answers
from scripts.visual_opsd.evaluation.answers import evaluate
from scripts.visual_opsd.evaluation.questions import EvaluateConfig, EvaluateSettings
from scripts.visual_opsd.training.guard import GuardProgress, TeacherGuard
from scripts.visual_opsd.training.memory_plan import plan_memory
from scripts.visual_opsd.training.memory_sizes import largest_load, load_of, longest_row
from scripts.visual_opsd.training.teacher import Teacher
from scripts.visual_opsd.training.trainer import Trainer
from scripts.visual_opsd.training.visual_opsd import VisualOPSD
from scripts.visual_opsd.validation_config import ValidationSettings
from tests.visual_opsd.training.test_memory_plan import footprint
from tests.visual_opsd.training.test_validation import SHORT, Scripted, validations
from tests.visual_opsd.training.trainers import (
    build,
    metrics,
    moved,
    one_process,
    train,
    weights,
    write_damaged,
)
from tests.visual_opsd.training_runs import TINY_BAGEL, figures, full_state, train_arguments

# Best at step 1, dropped at step 3.
CURVE = {0: 0.5, 1: 0.62, 2: 0.52, 3: 0.5, 4: 0.3, 5: 0.3}
RUN: dict[str, Any] = {
    **SHORT, "total_steps": 5, "eval_every": 1, "save_every": 1, "keep_last": 9, "lr": 0.05,
    "ema_decay": 0.5, "teacher_guard": "rollback",
}  # fmt: skip


class Watched(Scripted):
    """Figures of the teacher by step. Keeps its weights, too."""

    def __init__(self, curve: Mapping[int, float] = CURVE) -> None:
        super().__init__(dict.fromkeys(range(9), 0.5))
        self.curve = curve
        self.teachers: dict[int, dict[str, Tensor]] = {}

    def ask_teacher(self, step: int, model: Any, should_stop: Any) -> dict[str, float]:
        self.teachers[step] = {name: t.clone() for name, t in model.state_dict().items()}
        return {"accuracy": self.curve[step], "low": 0.1, "high": 0.9}

    def changed(self, one: int, other: int) -> bool:
        return bool(moved(self.teachers[one], self.teachers[other]))


# ------------------------------------------------------------------------------- what it does


@pytest.mark.parametrize("adapted", [{}, {"lora_rank": 2}])
@pytest.mark.parametrize("guard", ["warn", "freeze", "rollback"])
def test_what_becomes_of_a_dropped_teacher(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], guard: str,
    adapted: dict[str, Any],
) -> None:  # fmt: skip
    seen = Watched()
    train(world, tmp_path, validation=seen.of, **{**RUN, **adapted, "teacher_guard": guard})
    assert all(seen.changed(n, n + 1) for n in range(3))
    dropped = [line["validation/teacher_dropped"] for line in validations(tmp_path).values()]
    assert dropped == [0, 0, 0, 1, 1, 1]  # 0.1 less is none yet
    assert validations(tmp_path)[3]["validation/teacher_accuracy_low"] == 0.1
    said = [line for line in capsys.readouterr().err.splitlines() if "dropped" in line]
    begin = "step 3: the teacher's accuracy has dropped to 50.0%, from 62.0% at step 1; "
    assert said[0].startswith(begin)
    assert len(said) == (3 if guard == "warn" else 1)  # once it stands it does not get worse
    if guard == "warn":
        assert seen.changed(3, 4) and seen.changed(4, 5)
        return
    assert "follows the student no longer" in said[0]
    assert not seen.changed(4, 5) and seen.changed(1, 3)
    assert not seen.changed(4, 1 if guard == "rollback" else 3)


@pytest.mark.parametrize("adapted", [{}, {"lora_rank": 2}])
@pytest.mark.parametrize("guard", ["freeze", "rollback"])
def test_resumed_runs_are_the_same(
    world: Path, tmp_path: Path, guard: str, adapted: dict[str, Any]
) -> None:
    """To the last bit, from before the drop (a copy is kept) and after it."""
    flags = {**RUN, **adapted, "teacher_guard": guard}
    whole = train(world, tmp_path / "r", validation=Watched().of, **flags)
    expected = figures(tmp_path / "r")
    stored = {step: full_state(tmp_path / "r", step, tmp_path) for step in (1, 2, 3)}
    kept = {step: {n for n in found if "kept_teacher" in n} for step, found in stored.items()}
    assert [bool(kept[step]) for step in (1, 2, 3)] == [guard == "rollback"] * 2 + [False]
    for name in kept[2]:  # the average of step 1, which has moved on since
        average = name.replace("kept_teacher", "ema")
        assert torch.equal(stored[2][name], stored[1][average])
    assert any(not torch.equal(stored[2][n], stored[2][n.replace("kept_teacher", "ema")])
               for n in kept[2]) == (guard == "rollback")  # fmt: skip
    for step in (4, 2):
        resumed = train(world, tmp_path / "r", validation=Watched().of, **flags, resume=str(step))
        assert figures(tmp_path / "r") == expected
        assert not moved(weights(whole.student), weights(resumed.student))
        for one, other in zip(whole.ema.parameters(), resumed.ema.parameters(), strict=True):  # type: ignore[union-attr]
            assert torch.equal(one.to_local(), other.to_local())


def test_flags_that_change_on_a_resume(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Switched off it lets the teacher go; a new rollback keeps what is good from then on."""
    frozen = {**RUN, "teacher_guard": "freeze"}
    train(world, tmp_path, validation=Watched().of, **frozen)
    seen = Watched()
    train(world, tmp_path, validation=seen.of, **{**RUN, "teacher_guard": "off"}, resume="4")
    assert not seen.teachers and "validation/teacher_accuracy" not in validations(tmp_path)[5]
    step_4, step_5 = (full_state(tmp_path, step, tmp_path / "..") for step in (4, 5))
    assert any(not torch.equal(step_4[n], step_5[n]) for n in step_4 if n.startswith("/ema"))
    # From step 1, whose copy is not there: step 2 is good, and what step 3 goes back to.
    seen = Watched()
    train(world, tmp_path, validation=seen.of, **RUN, resume="1")
    assert "goes back to its weights of step 2" in capsys.readouterr().err
    assert list(seen.teachers) == [2, 3, 4, 5] and not seen.changed(2, 4)
    # No good one between: nothing to go back to.
    train(world, tmp_path / "w", validation=Watched().of, **{**RUN, "teacher_guard": "warn"})
    seen = Watched()
    train(world, tmp_path / "w", validation=seen.of, **RUN, resume="2")
    assert "no earlier weights of it are kept" in capsys.readouterr().err
    assert seen.changed(3, 4) and seen.changed(4, 5)
    # A larger drop is allowed.
    seen = Watched()
    train(world, tmp_path / "w", validation=seen.of, **RUN, guard_drop=0.4, resume="2")
    assert "dropped" not in capsys.readouterr().err


class Idle(Teacher):
    """A teacher of nothing."""

    def __init__(self) -> None:
        self.follows = True


def resumed_guard(action: str, found: GuardProgress, *, same: bool = True) -> TeacherGuard:
    guard = TeacherGuard(ValidationSettings(1, "x", teacher_guard=action), Idle())
    guard.resume(found, same=same)
    return guard


def test_what_a_guard_resumes_with() -> None:
    """Figures of other rows are not compared; who stands does so by freeze and rollback alone; a
    copy that was not saved is not there."""
    guard = resumed_guard("freeze", GuardProgress(0.9, 4), same=False)
    figures, said = guard.judge(5, 0.2)
    assert not said and not figures["validation/teacher_dropped"] and guard.teacher.follows
    for same in (False, True):
        stands = GuardProgress(0.9, 4, stands=True)
        assert not resumed_guard("freeze", replace(stands), same=same).teacher.follows
        assert resumed_guard("warn", replace(stands), same=same).teacher.follows
    guard = resumed_guard("rollback", GuardProgress(0.9, 4, kept_step=4))
    assert "no earlier weights of it are kept" in guard.judge(5, 0.2)[1]
    assert guard.teacher.follows


# -------------------------------------------------------------------------- with real answers


def test_a_spoiled_teacher_is_rolled_back(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a script: a huge learning rate, and a judge who wants the teacher's first answers."""
    first: dict[tuple[int, int], str] = {}
    predict = answers.prediction

    def judged(index: int, question: Any, completion: Any, text: str) -> dict[str, Any]:
        record = predict(index, question, completion, text)
        key = index, context_length(question.context)
        return {**record, "correct": first.setdefault(key, text) == text}

    monkeypatch.setattr(answers, "prediction", judged)
    flags: dict[str, Any] = {
        "total_steps": 3, "eval_every": 1, "eval_data": "Spatial_Navigation", "eval_limit": 5,
        "lr": 0.5, "ema_decay": 0.0,
    }  # fmt: skip
    train(world, tmp_path / "off", **flags)
    assert not (tmp_path / "off" / "validation" / "0000000" / "teacher").exists()
    curves = {}
    for guard in ("warn", "rollback"):
        first.clear()
        trainer = train(world, tmp_path / guard, **flags, teacher_guard=guard)
        found = validations(tmp_path / guard).values()
        curves[guard] = [line["validation/teacher_accuracy"] for line in found]
        assert all(line.keys() == next(iter(found)).keys() for line in found)
    assert curves["rollback"][0] == 1.0 and curves["rollback"][1] < 0.9
    assert curves["rollback"][2:] == [1.0, 1.0]
    assert curves["warn"][:2] == curves["rollback"][:2] and curves["warn"][2] < 0.9
    assert trainer.ema is not None
    # Without an act the training is that of a run without a guard.
    losses = [[(x["loss"], x["grad_norm"]) for x in metrics(tmp_path / name) if "loss" in x]
              for name in ("off", "warn")]  # fmt: skip
    assert losses[0] == losses[1]


@pytest.mark.parametrize("adapted", [{}, {"lora_rank": 2, "teacher_mode": "self"}])
def test_the_teacher_is_asked_as_by_evaluate(
    world: Path, tmp_path: Path, adapted: dict[str, Any]
) -> None:
    """With --context vt, of the base at step 0; the student is answered as without."""
    run, alone = tmp_path / "run", tmp_path / "alone"
    flags: dict[str, Any] = {
        "eval_every": 9, "eval_data": "Spatial_Navigation", "eval_limit": 5, "lr": 0.3, **adapted,
    }  # fmt: skip
    with one_process() as env:
        trainer = build(world, run, env, **flags, teacher_guard="warn")
        assert trainer.train() == 0
        config = EvaluateConfig(
            EvaluateSettings(
                model_path=str(TINY_BAGEL), data="Spatial_Navigation", data_root=str(world),
                limit=5, max_new_tokens=8, output_dir=str(alone), context="vt",
            ),
            prompt=trainer.config.prompt,
        )  # fmt: skip
        evaluate(config, env)
    text = (alone / "predictions.jsonl").read_text()
    step = run / "validation" / "0000000"
    assert (step / "teacher" / "predictions.jsonl").read_text() == text
    assert (step / "predictions.jsonl").read_text() != text
    assert (run / "validation" / "0000001" / "teacher" / "predictions.jsonl").read_text() != text


def test_a_stop_while_the_teacher_answers(world: Path, tmp_path: Path) -> None:
    """It leaves no trace: the student has its own adapters again, the step is validated anew."""
    flags: dict[str, Any] = {
        "total_steps": 3, "eval_every": 1, "eval_data": "Spatial_Navigation", "eval_limit": 2,
        "teacher_guard": "rollback", "lora_rank": 2, "lr": 0.05, "ema_decay": 0.5,
    }  # fmt: skip
    whole = train(world, tmp_path / "whole", **flags)
    with one_process() as env:
        trainer: Any = build(world, tmp_path / "run", env, **flags)
        ask = trainer.validation.validate.ask_teacher

        def told(step: int, *args: Any) -> Any:
            trainer.stop.number = signal.SIGTERM if step == 2 else trainer.stop.number
            return ask(step, *args)

        trainer.validation.validate.ask_teacher = told
        assert trainer.train() == 128 + signal.SIGTERM
    assert list(validations(tmp_path / "run")) == [0, 1]
    resumed = train(world, tmp_path / "run", **flags, resume="latest")
    assert figures(tmp_path / "run") == figures(tmp_path / "whole")
    assert not moved(weights(whole.student), weights(resumed.student))


# ------------------------------------------------------------------------------ what is refused


BAD: list[tuple[Any, dict[str, Any], str]] = [
    (train_visual_opsd, {"teacher_guard": "warn"}, "--teacher_guard is of validation, which is"),
    (train_visual_opsd, {"teacher_guard": "warn", "teacher_mode": "fixed"}, "fixed never changes"),
    (train_visual_opsd, {"teacher_guard": "freeze", "teacher_mode": "self"},
     "freeze: with --teacher_mode self .* use --teacher_guard warn"),
    (train_visual_opsd, {"teacher_guard": "warn", "jsd_weight": 0, "ce_weight": 1},
     "warn: this run has no teacher in memory"),
    (train_sft, {"teacher_guard": "rollback"}, "rollback: SFT has no teacher"),
    (train_visual_opsd_offline, {"teacher_guard": "freeze"}, "freeze: .* no teacher is in memory"),
    (train_visual_opsd, {"guard_drop": 0.2}, "--guard_drop 0.2 is of the teacher's guard"),
]  # fmt: skip


@pytest.mark.parametrize(("command", "flags", "problem"), BAD)
def test_what_is_refused(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Any,
    flags: dict[str, Any], problem: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(Trainer, "__init__", lambda *_, **__: pytest.fail("built"))
    on = {} if "which is" in problem else {"eval_every": 1, "eval_data": "Spatial_Navigation"}
    with pytest.raises(ValueError, match=problem):
        command.main(train_arguments(world, tmp_path, **on, **flags))


def test_rows_for_a_guard_need_visual_thoughts(tmp_path: Path) -> None:
    folder = write_damaged(tmp_path / "damaged", 7) / "Jigsaw_Assembly"
    flags = train_arguments(
        tmp_path / "damaged", tmp_path / "run", eval_every=1, eval_data=folder,
        eval_split="train", max_bad_rate=0.2, teacher_guard="warn", data_root=tmp_path / "damaged",
    )  # fmt: skip
    with pytest.raises(
        ValueError, match=r"validation .*teacher \(--teacher_guard\): 2 of 7 rows.*no_vis"
    ):
        train_visual_opsd.main(flags)


# ------------------------------------------------------------------------------------- memory


def test_memory_of_a_guard() -> None:
    """Contexts with VTs are decoded; rollback keeps the trained averages on the host and saves
    them."""
    settings = ValidationSettings(eval_every=9, eval_data="x", teacher_guard="rollback")
    config = replace(TrainConfig(loss=LossSettings()), validation=settings)
    off = footprint(validated_rows=64)
    assert VisualOPSD(config).teacher is not None
    variants: tuple[dict[str, Any], ...] = ({}, {"lora_rank": 8, "lora_targets": ("q_proj",)})
    for adapted in variants:
        plans = {}
        for guard in ("off", "warn", "rollback"):
            of = replace(off, **adapted, teacher_guard=guard)
            plans[guard] = plan_memory(of, largest_load(of))
        row = longest_row(off)
        assert load_of(replace(off, teacher_guard="warn"), row).prefill_tokens >= row.teacher
        assert load_of(replace(off, teacher_guard="warn"), row).student == load_of(off, row).student
        host = {name: {p.name: p.size for p in plan.host} for name, plan in plans.items()}
        kept = host["rollback"]["best teacher"]
        assert kept > 0 and "best teacher" not in host["warn"]
        grown = plans["rollback"].first_save - plans["warn"].first_save
        assert grown == kept and plans["warn"].first_save == plans["off"].first_save
