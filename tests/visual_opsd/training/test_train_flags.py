# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""train_visual_opsd: every setting, two values, and what is seen of it where it acts.

A new field of `TrainConfig` without a row fails here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data.dataset_info import load_dataset_config
from data.randomness import rehearsal_uniform
from modeling.bagel.adapters import PROJECTIONS, add_adapters
from scripts.visual_opsd import train_visual_opsd
from scripts.visual_opsd.cli import parse_config
from scripts.visual_opsd.config import TrainConfig
from scripts.visual_opsd.evaluation.rows import open_data
from scripts.visual_opsd.evaluation.validation import StudentValidation
from scripts.visual_opsd.processes import init_distributed
from scripts.visual_opsd.runs.folder_lock import hold_folder
from scripts.visual_opsd.train_visual_opsd import main
from scripts.visual_opsd.training.checkpoint_folders import choose_checkpoint
from scripts.visual_opsd.training.dry_run import dry_run
from scripts.visual_opsd.training.memory_check import judge
from scripts.visual_opsd.training.memory_report import describe
from scripts.visual_opsd.training.metrics import read_metrics
from scripts.visual_opsd.training.sharding import (
    clip_grad_norm,
    ema_update,
    make_mesh,
    shard_model,
)
from tests.arrivals import (
    ABSENT,
    Stop,
    check_arrival,
    check_complete,
    given_in_run,
    spy,
    spy_method,
    stop,
    table_of,
    words,
)
from tests.visual_opsd.training.trainers import idle_settings
from tests.visual_opsd.training.training_flags import (
    TrainRun,
    distillation_rows,
    make_places,
    record,
    schedule,
    training_rows,
)
from tests.visual_opsd.training_runs import TINY_BAGEL

# Settings that contradict the runs of the table, and the test that has them.
ALONE = {
    "visual_gen": "test_visual_gen",
    "precision": "test_precision",
    "max_nonfinite_steps": "test_max_nonfinite_steps",
    "resume": "test_where_a_run_begins",
    "auto_resume": "test_where_a_run_begins",
    "resume_from": "test_where_a_run_begins",
    "device": "test_device",
    "take_over": "test_take_over",
    "lora_rank": "test_adapters",
    "lora_alpha": "test_adapters",
    "lora_targets": "test_adapters",
    "plan": "test_plan",
    "plan_gpus": "test_plan",
    "plan_gpu_gb": "test_plan",
    "dry_run": "test_dry_run",
    **dict.fromkeys(
        ("eval_every", "eval_data", "eval_split", "eval_limit", "keep_best", "early_stop"),
        "test_validation",
    ),
    "teacher_guard": "test_teacher_guard",
    "guard_drop": "test_teacher_guard",
    "vt_rehearsal": "test_vt_rehearsal",
}
IDLE = idle_settings(train_visual_opsd)  # refused (test_unused_settings.py)
ELSEWHERE = {
    "on_save_error": "tests/visual_opsd/training/test_save_errors.py",
}
HERE = Path("places")  # only the names of the rows are wanted without a folder
NAMES = {"one", "two", "model", "other", "train", "heldout", "prompts", "results"}
TABLE = table_of(training_rows(dict.fromkeys(NAMES, HERE), "opsd"),
                 distillation_rows(dict.fromkeys(NAMES, HERE)))  # fmt: skip


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_places(tmp_path_factory.mktemp("flags"))


@pytest.fixture(scope="module")
def table(places: dict[str, Path]) -> dict[str, Any]:
    return table_of(training_rows(places, "opsd"), distillation_rows(places))


@pytest.fixture(scope="module")
def runs(table: dict[str, Any]) -> list[TrainRun]:
    return [
        record(main, name, {**given_in_run(table, number), "device": "cpu"})
        for number, name in enumerate("abcd")
    ]


def test_every_setting_has_a_row(table: dict[str, Any]) -> None:
    check_complete(TrainConfig, table, ALONE, dict.fromkeys(IDLE), ELSEWHERE)
    assert all(test in globals() for test in ALONE.values())


@pytest.mark.parametrize("name", TABLE)
def test_every_setting_arrives(table: dict[str, Any], runs: list[TrainRun], name: str) -> None:
    check_arrival(name, table[name], runs)


# ------------------------------------------------------------------------------- one by one


def test_visual_gen() -> None:
    """Kept for the reference's scripts: it can only be False here."""
    assert parse_config(TrainConfig, ["--visual_gen", "False"], "") == TrainConfig()
    with pytest.raises(ValueError, match="--visual_gen True: only interleaved SFT"):
        main(["--visual_gen", "True"])


@pytest.mark.parametrize("device", ["cpu", "cuda", "auto"])
def test_device(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    calls = spy(monkeypatch, init_distributed, stop)
    with pytest.raises(Stop):
        main(["--device", device])
    assert calls[0]["device"] == device


def apart(run: TrainRun, results: Path) -> dict[str, Any]:
    """A run's settings for one beside it, without W&B, which need not be installed, and without a
    plan, as its mesh is of more processes than there are."""
    return {**run.given, "results_dir": results, "wandb_project": "none", "plan": False}


@pytest.mark.parametrize(("plan", "checks"), [("none", 1), ("False", 0)])
def test_plan(
    runs: list[TrainRun], monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], plan: str, checks: int,
) -> None:  # fmt: skip
    """How often a plan is compared with the machine, and for which machine one is shown."""
    judged = spy(monkeypatch, judge)
    spy(monkeypatch, make_mesh, stop)
    given = {**apart(runs[0], tmp_path), "num_shard": 1, "num_replicate": 1}
    with pytest.raises(Stop):
        main(words({**given, "plan": plan}))
    assert len(judged) == checks
    shown = spy(monkeypatch, describe)
    for gpus, gb in ((1, 9.0), (4, 80.0)):
        machine = {"plan_gpus": gpus, "plan_gpu_gb": gb, "num_shard": gpus}
        assert main(words({**given, **machine, "plan": True})) == 0
        assert shown[-1]["plan"].of.gpus == gpus and judged[-1]["room"].gpu == gb * 1e9
    assert "Memory plan: " in capsys.readouterr().out


@pytest.mark.parametrize("wished", [False, True])
def test_dry_run(monkeypatch: pytest.MonkeyPatch, wished: bool) -> None:
    ran = spy(monkeypatch, dry_run, lambda config, env, objective: 0)
    spy(monkeypatch, load_dataset_config, stop)
    arguments = ["--model_path", str(TINY_BAGEL), "--device", "cpu", "--dry_run", str(wished)]
    with nullcontext() if wished else pytest.raises(Stop):
        assert main(arguments) == 0
    assert len(ran) == wished


@pytest.mark.parametrize("take_over", [False, True])
def test_take_over(
    runs: list[TrainRun], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, take_over: bool
) -> None:
    calls = spy(monkeypatch, hold_folder, lambda folder, flag, take_over=None: None)
    spy(monkeypatch, make_mesh, stop)
    with pytest.raises(Stop):
        main(words({**apart(runs[0], tmp_path), "take_over": take_over}))
    assert [(call["flag"], call["take_over"]) for call in calls] == [
        ("results_dir", take_over), ("checkpoint_dir", take_over),
    ]  # fmt: skip


def test_validation(runs: list[TrainRun], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Which steps and rows are validated, what is kept, and where the run ends."""
    opened = spy(monkeypatch, open_data)
    accuracies = iter((0.0,))

    def measure(self: Any, step: int, *_: Any) -> dict[str, float]:
        measured.append((step, len(self.indices)))
        return {"accuracy": next(accuracies)}

    monkeypatch.setattr(StudentValidation, "__call__", measure)
    places = {"num_shard": 1, "num_replicate": 1, "total_steps": 4, "save_release": False}
    file = runs[0].given["data_root"] / "Spatial_Navigation"
    for number, (flags, found, split, steps, kept) in enumerate((
        ({"eval_data": "Spatial_Navigation", "eval_every": 2, "eval_limit": 3, "keep_best": True},
         ("Spatial_Navigation", 3), "heldout", [0, 2, 4], True),
        ({"eval_data": file, "eval_every": 1, "eval_split": "train", "early_stop": 2},
         (str(file), 12), "train", [0, 1, 2, 3], False),
    )):  # fmt: skip
        measured: list[tuple[int, int]] = []
        accuracies = iter((0.1, 0.2, 0.2, 0.1))
        results = tmp_path / str(number)
        given = {**apart(runs[0], results), **places}
        assert main(words({**given, **flags})) == 0
        assert (opened[-1]["data"], opened[-1]["split"]) == (found[0], split)
        assert measured == [(step, found[1]) for step in steps]
        assert (results / "checkpoints" / "best").is_dir() == kept


def test_teacher_guard(
    runs: list[TrainRun], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whether a teacher that has dropped by 0.3 follows on."""
    accuracies: Iterator[float]
    monkeypatch.setattr(StudentValidation, "__call__", lambda *_: {"accuracy": 0.5})
    monkeypatch.setattr(
        StudentValidation, "ask_teacher",
        lambda *_: {"accuracy": next(accuracies), "low": 0, "high": 1},
    )  # fmt: skip
    updates = spy(monkeypatch, ema_update)
    shared = {"num_shard": 1, "num_replicate": 1, "total_steps": 3, "save_release": False,
              "eval_every": 1, "eval_limit": 1, "eval_data": "Spatial_Navigation"}  # fmt: skip
    for number, (guard, drop, moves) in enumerate(
        (("freeze", 0.2, 1), ("rollback", 0.25, 1), ("rollback", 0.4, 3), ("warn", 0.2, 3))
    ):
        accuracies = iter((0.9, 0.6, 0.6, 0.6))
        updates.clear()
        given = {**apart(runs[0], tmp_path / str(number)), **shared}
        assert main(words({**given, "teacher_guard": guard, "guard_drop": drop})) == 0
        assert len(updates) == moves, (guard, drop)


def test_vt_rehearsal(runs: list[TrainRun], tmp_path: Path) -> None:
    given = {**apart(runs[0], tmp_path), "num_shard": 1, "num_replicate": 1}
    for share in (0.5, 1.0):
        results = tmp_path / str(share)
        assert main(words({**given, "results_dir": results, "vt_rehearsal": share})) == 0
        rates = [line["rehearsal_rate"] for line in read_metrics(results / "metrics.jsonl")]
        places = itertools.product(range(given["total_steps"]), range(given["global_batch_size"]))
        drawn = [rehearsal_uniform(given["global_seed"], *place) < share for place in places]
        assert sum(rates) / len(rates) == sum(drawn) / len(drawn)


def test_adapters(runs: list[TrainRun], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What the student gets, and that nothing else of it trains."""
    calls = spy(monkeypatch, add_adapters, stop)
    whole = ("freeze_llm", "freeze_vit", "freeze_und", "num_shard", "num_replicate")
    given = {**apart(runs[0], tmp_path), **dict.fromkeys(whole, ABSENT)}
    for flags, rank, alpha, adapted in (
        ({"lora_rank": 5}, 5, 10.0, set(PROJECTIONS)),
        (
            {"lora_rank": 3, "lora_alpha": 7.5, "lora_targets": "v_proj, k_proj"},
            3,
            7.5,
            {"k_proj", "v_proj"},
        ),
    ):
        with pytest.raises(Stop):
            main(words({**given, **flags}))
        made = calls[-1]["config"]
        assert (made.rank, made.alpha) == (rank, alpha)
        assert {path.rpartition(".")[2] for path in made.modules} == adapted


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("auto", torch.bfloat16), ("bf16", torch.bfloat16), ("fp32", torch.float32)],
)
def test_precision(
    runs: list[TrainRun], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, precision: str,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    """What the student computes in on a GPU, which need not be there."""

    def on_gpu(*_: Any, **__: Any) -> Any:
        return replace(init_distributed("cpu", 60), device=torch.device("cuda"))

    spy(monkeypatch, init_distributed, on_gpu)
    spy(monkeypatch, make_mesh, lambda *_, **__: None)
    calls = spy(monkeypatch, shard_model, stop)
    with pytest.raises(Stop):
        main(words({**apart(runs[0], tmp_path), "precision": precision}))
    assert calls[0]["param_dtype"] == dtype


BEGINNINGS: list[tuple[dict[str, Any], str | None]] = [
    ({"resume": "2"}, "step_0000002"),
    ({"resume": "latest"}, "step_0000003"),
    ({"auto_resume": True}, "step_0000003"),
    ({"auto_resume": False, "results_dir": "new"}, None),
    ({"resume_from": "step_0000002", "results_dir": "new"}, "step_0000002"),
    ({"resume_from": "step_0000003", "results_dir": "new"}, "step_0000003"),
    ({"resume_from": "step_0000002", "auto_resume": True}, "step_0000003"),
    ({"resume_from": "step_0000002", "auto_resume": True, "results_dir": "new"}, "step_0000002"),
]


@pytest.mark.parametrize(("changes", "begins"), BEGINNINGS)
def test_where_a_run_begins(
    runs: list[TrainRun], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any], begins: str | None,
) -> None:  # fmt: skip
    first = runs[0]
    given = {**first.given, "wandb_project": "none", "plan": False, **changes}
    if "resume_from" in given:
        given["resume_from"] = first.checkpoints / given["resume_from"]
    if changes.get("results_dir") == "new":
        given["results_dir"] = tmp_path
    chosen = spy(monkeypatch, choose_checkpoint)
    spy(monkeypatch, make_mesh, stop)
    with pytest.raises(Stop):
        main(words(given))
    found = chosen[0]["result"]
    assert found == (begins and first.checkpoints / begins)


@pytest.mark.parametrize("limit", [1, 3])
def test_max_nonfinite_steps(
    runs: list[TrainRun], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    """So many skipped steps end a run; nothing is learnt in them, and the schedule goes on."""
    given = {**apart(runs[0], tmp_path), "total_steps": 5, "warmup_steps": 1}
    given |= {"max_nonfinite_steps": limit, "num_shard": 1, "num_replicate": 1}
    spy(monkeypatch, clip_grad_norm, lambda *_: torch.tensor(torch.nan))
    steps = spy_method(monkeypatch, torch.optim.AdamW, "step")
    with pytest.raises(ValueError, match=f"{limit} steps in a row had a non-finite"):
        main(words(given))
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, limit + 1))
    assert all(line["nonfinite"] for line in lines) and not steps
    expected = schedule(TrainRun("skipped", given, {}))
    assert [line["lr"] for line in lines] == pytest.approx(expected[:limit])
