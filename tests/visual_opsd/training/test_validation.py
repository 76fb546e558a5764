# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Validation while training: it changes nothing, it is `evaluate`, and what follows from it.

Where only figures matter they come from a script (`Scripted`). Two ranks: two_rank_training.py.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from modeling import load_bagel
from modeling.bagel.adapters import is_adapter_key
from modeling.host.disk import DiskRefused
from modeling.release.adapters import read_adapter
from scripts.visual_opsd import train_sft, train_visual_opsd, train_visual_opsd_offline
from scripts.visual_opsd.evaluation import validation as evaluation_validation
from scripts.visual_opsd.evaluation.answers import evaluate
from scripts.visual_opsd.evaluation.questions import EvaluateConfig, EvaluateSettings, open_rows
from scripts.visual_opsd.evaluation.scoring import wilson_interval
from scripts.visual_opsd.training.releases import ReleaseWriter
from scripts.visual_opsd.training.state_keeper import StateKeeper
from scripts.visual_opsd.training.text_sft import TextSFT
from scripts.visual_opsd.training.trainer import Trainer
from tests.arrivals import Stop, spy, stop
from tests.visual_opsd.training.trainers import (
    base_weights,
    build,
    metrics,
    moved,
    one_process,
    samples,
    train,
    weights,
    write_damaged,
)
from tests.visual_opsd.training_runs import TINY_BAGEL, train_arguments

ON: dict[str, Any] = {"eval_every": 2, "eval_data": "Spatial_Navigation", "eval_limit": 5}
# Several steps of one row, with hardly a completion.
SHORT: dict[str, Any] = {
    "sample_max_new_tokens": 2, "global_batch_size": 1, "eval_data": "Spatial_Navigation",
}  # fmt: skip


# These need the base's answers, which the state of a run without validation lacks.
COMPARED = ("validation/kl", "validation/teacher_advantage")


class Scripted:
    """Figures by step, for `build`. Keeps the weights it was shown."""

    answers: Mapping[int, Any] = {}

    def __init__(self, accuracies: Mapping[int, float], identity: str = "one") -> None:
        self.accuracies, self.identity = accuracies, identity
        self.seen: dict[int, dict[str, Tensor]] = {}

    def of(self, *_: Any) -> Scripted:
        return self

    def __call__(self, step: int, model: Any, should_stop: Callable[[], bool]) -> dict[str, float]:
        assert not should_stop()
        self.seen[step] = {name: t.clone() for name, t in model.state_dict().items()}
        return {"accuracy": self.accuracies[step]}


def training_lines(results: Path) -> list[tuple[Any, ...]]:
    found = [line for line in metrics(results) if "loss" in line]
    return [(line["step"], line["loss"], line["grad_norm"]) for line in found]


def validations(results: Path) -> dict[int, dict[str, Any]]:
    """Step -> figures; every step has one line at most."""
    found = [line for line in metrics(results) if "validation/accuracy" in line]
    assert len({line["step"] for line in found}) == len(found)
    return {line["step"]: line for line in found}


def best(results: Path) -> dict[str, Any]:
    return json.loads((results / "checkpoints" / "best" / "best.json").read_text())


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


# ---------------------------------------------------------------------------- it changes nothing


def random_states() -> tuple[Any, ...]:
    _, keys, *rest = np.random.get_state(legacy=True)
    torch_state = torch.get_rng_state()
    return random.getstate(), tuple(keys), tuple(rest), tuple(torch_state.tolist())


@pytest.mark.parametrize("objective", [None, TextSFT])
def test_training_is_the_same_to_the_last_bit(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, objective: Any
) -> None:
    """And after a resume, which neither repeats nor misses a validation."""
    kind = {} if objective is None else {"objective": objective}
    size: dict[str, Any] = {"total_steps": 3, "save_every": 2, "keep_last": 2, "lr": 1e-2}
    plain = train(world, tmp_path / "off", **kind, **size)
    call = evaluation_validation.StudentValidation.__call__
    asked: list[int] = []

    def watched(self: Any, step: int, *args: Any) -> dict[str, float]:
        asked.append(step)
        before = random_states()
        figures = call(self, step, *args)
        assert random_states() == before
        return figures

    monkeypatch.setattr(evaluation_validation.StudentValidation, "__call__", watched)
    on = train(world, tmp_path / "on", **kind, **size, **ON)
    assert training_lines(tmp_path / "on") == training_lines(tmp_path / "off")
    assert not moved(weights(plain.student), weights(on.student))
    if objective is None:
        assert samples(tmp_path / "on") == samples(tmp_path / "off")
    figures = validations(tmp_path / "on")
    assert list(figures) == asked == [0, 2, 3]
    resumed = train(world, tmp_path / "on", **kind, **size, **ON, resume="2")
    assert asked == [0, 2, 3, 3]
    assert training_lines(tmp_path / "on") == training_lines(tmp_path / "off")
    assert not moved(weights(plain.student), weights(resumed.student))
    # It may be switched on and off when a run goes on.
    late = train(world, tmp_path / "off", **kind, **size, **ON, resume="2")
    assert not moved(weights(plain.student), weights(late.student))
    assert asked[4:] == [2, 3]  # what step 2 owes, too
    for step, line in validations(tmp_path / "off").items():
        expected = {k: v for k, v in figures[step].items() if k not in COMPARED}
        assert {**line, "validation/seconds": 0} == {**expected, "validation/seconds": 0}


def test_it_is_evaluate_on_weights_in_memory(world: Path, tmp_path: Path) -> None:
    """Answers, files and figures; what an earlier start left behind goes."""
    settings: dict[str, Any] = {
        **ON, "sample_max_image_skips": 0, "instruction_suffix": " Answer.", "eval_every": 9,
        "lr": 0.3,
    }  # fmt: skip
    run, alone = tmp_path / "run", tmp_path / "alone"
    with one_process() as env:
        trainer: Any = build(world, run, env, **settings)
        trainer._one_step = lambda rows: 1 / 0
        with pytest.raises(ZeroDivisionError):
            trainer.train()
        assert list(validations(run)) == [0]
        (run / "validation" / "0000007").mkdir()
        (run / "validation" / "0000000" / "left").touch()
        trainer = build(world, run, env, **settings)
        assert trainer.train() == 0
        config = EvaluateConfig(
            EvaluateSettings(
                model_path=str(TINY_BAGEL), data="Spatial_Navigation", data_root=str(world),
                limit=5, max_new_tokens=8, image_skips=0, output_dir=str(alone),
            ),
            prompt=trainer.config.prompt,
        )  # fmt: skip
        summary = evaluate(config, env)
    assert names(run / "validation") == ["0000000", "0000001"]
    ours = run / "validation" / "0000000"
    assert names(ours) == names(alone)
    text = (ours / "predictions.jsonl").read_text()
    assert text == (alone / "predictions.jsonl").read_text()
    assert text != (run / "validation" / "0000001" / "predictions.jsonl").read_text()
    held = json.loads((ours / "summary.json").read_text())
    for name in ("n", "accuracy", "interval", "mean_tokens", "cap_rate", "tasks"):
        assert held[name] == summary[name]
    figures = validations(run)[0]
    low, high = wilson_interval(summary["correct"], 5)
    assert figures.pop("validation/kl") > 0 and figures.pop("validation/teacher_advantage") != 0
    for name, value in {
        "accuracy": summary["accuracy"], "low": low, "high": high, "n": 5,
        "mean_tokens": summary["mean_tokens"], "cap_rate": summary["cap_rate"],
    }.items():  # fmt: skip
        assert figures.pop(f"validation/{name}") == value
    assert figures.pop("validation/seconds") > 0 and figures == {"step": 0}


# ------------------------------------------------------------------------ best, and early stop

CURVE = {0: 0.3, 1: 0.2, 2: 0.5, 3: 0.5, 4: 0.4, 5: 0.45, 6: 0.9}


def test_best_and_early_stop(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings: dict[str, Any] = {
        **SHORT, "total_steps": 9, "save_every": 4, "save_release": True, "eval_every": 1,
        "keep_best": True, "early_stop": 3, "keep_last": 9,
    }  # fmt: skip
    script = Scripted(CURVE)
    train(world, tmp_path, validation=script.of, **settings)
    assert list(script.seen) == [0, 1, 2, 3, 4, 5]
    assert names(tmp_path / "checkpoints") == [
        "0000004", "0000005", "best", "step_0000004", "step_0000005",
    ]  # fmt: skip
    said = capsys.readouterr().err
    assert "step 2: validation 50.0%\n" in said
    assert "step 5: validation 45.0%; best 50.0% at step 2\n" in said
    assert "step 5: --early_stop 3 ends the run\n" in said
    kept = best(tmp_path)
    assert (kept["step"], kept["validation/accuracy"]) == (2, 0.5)
    assert kept["settings_hash"] == "one" and len(kept["run_config_hash"]) == 16
    released = dict(load_bagel(tmp_path / "checkpoints" / "best").model.state_dict())
    rounded = {k: t.bfloat16().float() for k, t in script.seen[2].items() if k in released}
    stored = base_weights()  # the release's dtypes: what is bf16 there is rounded
    for name, tensor in released.items():
        exact = torch.equal(tensor, script.seen[2][name]) or torch.equal(tensor, rounded[name])
        assert exact and name in stored, name
    lines, figures = training_lines(tmp_path), validations(tmp_path)

    # A run that has ended so has ended; with more patience it goes on.
    ended = Scripted(CURVE)
    train(world, tmp_path, validation=ended.of, **settings, resume="latest")
    assert not ended.seen and training_lines(tmp_path) == lines
    # From the middle it goes on with what was counted, and ends where it did.
    again = Scripted(CURVE)
    train(world, tmp_path, validation=again.of, **settings, resume="4")
    assert list(again.seen) == [5] and training_lines(tmp_path) == lines
    assert list(validations(tmp_path)) == list(figures)
    assert best(tmp_path) == kept
    assert names(tmp_path / "checkpoints" / "superseded") == ["0000005", "step_0000005"]
    more = Scripted({**CURVE, 7: 0, 8: 0, 9: 0})
    train(world, tmp_path, validation=more.of, **{**settings, "early_stop": 4}, resume="latest")
    assert list(more.seen) == [6, 7, 8, 9] and best(tmp_path)["step"] == 6
    # Figures of another measure are not compared with these.
    other = Scripted({8: 0.2, 9: 0.1}, identity="other")
    train(world, tmp_path, validation=other.of, **settings, resume="8")
    assert list(other.seen) == [8, 9] and best(tmp_path)["step"] == 8
    assert "best" in names(tmp_path / "checkpoints" / "superseded")


def test_a_kill_between_the_first_best_and_the_first_state(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The requeued run begins at step 0; what it left is moved away and made again."""
    settings: dict[str, Any] = {**SHORT, "total_steps": 3, "save_every": 3, "eval_every": 1}
    settings |= {"keep_best": True, "resume": "latest"}
    train(world, tmp_path / "whole", validation=Scripted(CURVE).of, **settings)
    with monkeypatch.context() as patch:
        patch.setattr(ReleaseWriter, "save", kill)
        patch.setattr(StateKeeper, "save", kill)
        with pytest.raises(KeyboardInterrupt):
            train(world, tmp_path / "run", validation=Scripted(CURVE).of, **settings)
    assert names(tmp_path / "run" / "checkpoints") == ["best"]
    train(world, tmp_path / "run", validation=Scripted(CURVE).of, **settings)
    assert training_lines(tmp_path / "run") == training_lines(tmp_path / "whole")
    assert best(tmp_path / "run")["step"] == best(tmp_path / "whole")["step"] == 2
    one, other = (
        (tmp_path / name / "checkpoints" / "best" / "model.safetensors").read_bytes()
        for name in ("run", "whole")
    )
    assert one == other
    assert names(tmp_path / "run" / "checkpoints") == ["best", "step_0000003", "superseded"]


def kill(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_a_best_model_that_was_not_kept_is_named(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With --keep_best from a resume on, which may end without any best model."""
    settings: dict[str, Any] = {**SHORT, "total_steps": 4, "save_every": 1, "eval_every": 1}
    train(world, tmp_path, validation=Scripted(CURVE).of, **settings, keep_last=9)
    settings["keep_best"] = True
    for start, told in (("1", False), ("3", True)):
        train(world, tmp_path, validation=Scripted(CURVE).of, **settings, resume=start)
        said = capsys.readouterr().err
        missing = "holds no model of the best validation so far, of step 2 (50.0%)"
        assert (missing in said) is told
        shutil.rmtree(tmp_path / "checkpoints" / "best", ignore_errors=True)


def test_the_best_adapters(world: Path, tmp_path: Path) -> None:
    """With --lora_rank; a run that stops early merges them as at its last step."""
    script = Scripted({0: 0.5, 1: 0.6, 2: 0.1})
    trainer = train(
        world, tmp_path, validation=script.of, **SHORT, total_steps=9, save_release=True,
        eval_every=1, keep_best=True, early_stop=1, lora_rank=3, lr=0.05,
    )  # fmt: skip
    folder = tmp_path / "checkpoints"
    assert names(folder) == ["0000002", "adapter_0000002", "best", "step_0000002"]
    config, tensors = read_adapter(folder / "best")
    assert best(tmp_path)["step"] == 1 and config.rank == 3
    live = {n: t for n, t in weights(trainer.student).items() if is_adapter_key(n)}
    assert tensors.keys() == live.keys()
    base = base_weights()
    for name in sorted(config.modules)[:3]:  # those that the validation saw merged
        b, a = tensors[f"{name}.lora_B.weight"], tensors[f"{name}.lora_A.weight"]
        expected = base[f"{name}.weight"] + 2 * b @ a
        torch.testing.assert_close(script.seen[1][f"{name}.weight"], expected)
        assert not torch.equal(b, live[f"{name}.lora_B.weight"])


def test_the_disk_may_refuse_the_best(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As with other saves; only the base is never written."""
    steps: list[int] = []

    def refuse(self: ReleaseWriter, step: int, facts: Any) -> None:
        steps.append(step)
        raise DiskRefused("no room")

    monkeypatch.setattr(ReleaseWriter, "save_best", refuse)
    flags: dict[str, Any] = {**SHORT, "total_steps": 2, "eval_every": 1, "keep_best": True}
    script = Scripted({0: 0.1, 1: 0.2, 2: 0.3})
    with pytest.raises(DiskRefused) as error:
        train(world, tmp_path / "a", validation=script.of, **flags, save_every=2)
    assert error.value.__notes__ == ["state of step 1 saved; --resume it"]
    assert names(tmp_path / "a" / "checkpoints") == ["step_0000001"]
    go_on = {**flags, "on_save_error": "continue"}
    train(world, tmp_path / "b", validation=script.of, **go_on)
    assert steps == [1, 1, 2]
    assert "the best model, of step 2, is not saved: no room" in capsys.readouterr().err
    refused = [line["save_error"] for line in metrics(tmp_path / "b") if "save_error" in line]
    assert refused == [f"the best model, of step {step}, is not saved: no room" for step in (1, 2)]


# --------------------------------------------------------------------------- stopped, and refused


def test_a_stop_while_answers_are_decoded(world: Path, tmp_path: Path) -> None:
    """The state of its step is saved, and the resumed run validates that step first."""
    settings: dict[str, Any] = {"total_steps": 3, **ON, "sample_max_new_tokens": 8}
    with one_process() as env:
        trainer: Any = build(world, tmp_path, env, **settings)
        begin = trainer.validation.validate._begin

        def told(step: int, *args: Any) -> None:
            begin(step, *args)
            if step == 2:
                trainer.stop.number = signal.SIGTERM

        trainer.validation.validate._begin = told
        assert trainer.train() == 128 + signal.SIGTERM
    assert names(tmp_path / "checkpoints") == ["step_0000002"]
    assert list(validations(tmp_path)) == [0]
    assert not (tmp_path / "validation" / "0000002" / "summary.json").exists()
    with one_process() as env:  # validates, and is killed before it saves another state
        trainer = build(world, tmp_path, env, **settings, resume="latest")
        trainer._one_step = lambda rows: pytest.fail("killed")
        with pytest.raises(pytest.fail.Exception):
            trainer.train()
    assert list(validations(tmp_path)) == [0, 2]
    train(world, tmp_path, **settings, resume="latest")
    assert list(validations(tmp_path)) == [0, 2, 3]
    train(world, tmp_path / "whole", **settings)
    assert training_lines(tmp_path) == training_lines(tmp_path / "whole")
    # On other rows, step 2 is validated anew: the line of the earlier ones goes.
    train(world, tmp_path, **{**settings, "eval_limit": 3}, resume="2")
    assert {step: line["validation/n"] for step, line in validations(tmp_path).items()} == {
        0: 5, 2: 3, 3: 3,
    }  # fmt: skip
    assert training_lines(tmp_path) == training_lines(tmp_path / "whole")


BAD: list[tuple[dict[str, Any], str]] = [
    ({"eval_data": "No_Such_Set"}, r"validation \(--eval_data No_Such_Set, .*No_Such_Set"),
    ({"eval_split": "nowhere"}, r"--eval_split nowhere\): .*nowhere"),
    ({"eval_data": "damaged", "eval_split": "train"},
     r"2 of 9 rows cannot be used: .*raise --max_bad_rate"),
    ({"sample_max_new_tokens": 100_000}, "--eval_data .*positions"),
    ({"eval_every": "none"}, "--eval_data is of validation, which is off: add --eval_every"),
    ({"eval_every": "none", "eval_data": "none", "eval_limit": "none", "early_stop": 3},
     "--early_stop is of validation, which is off"),
    ({"eval_data": "none"}, "--eval_every needs rows: name them by --eval_data"),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "problem"), BAD)
@pytest.mark.parametrize("command", [train_visual_opsd, train_sft])
def test_bad_data_is_told_before_a_model_is_loaded(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Any,
    flags: dict[str, Any], problem: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(Trainer, "__init__", lambda *_, **__: pytest.fail("built"))
    if flags.get("eval_data") == "damaged":
        damaged = write_damaged(tmp_path / "damaged", 9) / "Jigsaw_Assembly"
        flags = {**flags, "eval_data": damaged, "eval_limit": "none"}
    arguments = train_arguments(world, tmp_path / "run", **{**ON, **flags})
    with pytest.raises(ValueError, match=problem):
        command.main(arguments)


@pytest.mark.parametrize("command", [train_visual_opsd, train_sft, train_visual_opsd_offline])
def test_answers_are_written_by_settings_of_sampling(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Any
) -> None:
    """Also where nothing else is sampled."""
    seen = spy(monkeypatch, open_rows, stop)
    for tokens, skips, rows in ((7, 0, 3), (9, 2, 5)):
        given = {"sample_max_new_tokens": tokens, "sample_max_image_skips": skips,
                 "sample_batch_size": rows}  # fmt: skip
        with pytest.raises(Stop):
            command.main(train_arguments(world, tmp_path / "run", **{**ON, **given}))
        found = seen[-1]["config"].evaluate
        assert (found.max_new_tokens, found.image_skips, found.batch_size) == (tokens, skips, rows)


def test_rows_need_no_visual_thoughts(world: Path, tmp_path: Path) -> None:
    """Row 5 of these lacks its visual thought, which no student is shown."""
    folder = write_damaged(tmp_path / "damaged", 7) / "Jigsaw_Assembly"
    train(
        world, tmp_path / "run", TextSFT, eval_every=1, eval_data=folder, eval_split="train",
        max_bad_rate=0.2, sample_max_new_tokens=2,
    )  # fmt: skip
    figures = validations(tmp_path / "run")
    assert [line["validation/n"] for line in figures.values()] == [6, 6]
