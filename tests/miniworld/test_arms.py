# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""`scripts.miniworld.arms`: what the arms differ in, what is run again, how seeds are pooled.

A `SeedArms` whose programs write right answers at once stands in for the true one.
"""

from __future__ import annotations

import importlib
import itertools
import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from scripts.miniworld import arms
from scripts.miniworld.demo import Job
from scripts.visual_opsd.analysis.collection import CollectConfig
from scripts.visual_opsd.analysis.kl_measurement import DiagnosticConfig
from scripts.visual_opsd.cli import flat, parse_config
from scripts.visual_opsd.evaluation.questions import EvaluateConfig
from scripts.visual_opsd.train_sft import read_config as read_sft
from scripts.visual_opsd.train_visual_opsd import read_config
from scripts.visual_opsd.train_visual_opsd_offline import read_config as read_offline
from scripts.visual_opsd.training.objective import check_used
from tests.miniworld.results import write, write_evaluation

ROWS = 100
READERS = {
    "scripts.visual_opsd.train_visual_opsd": read_config,
    "scripts.visual_opsd.train_visual_opsd_offline": read_offline,
    "scripts.visual_opsd.train_sft": read_sft,
    "scripts.visual_opsd.evaluate": lambda words: parse_config(EvaluateConfig, words, ""),
    "scripts.visual_opsd.kl_diagnostic": lambda words: parse_config(DiagnosticConfig, words, ""),
    "scripts.visual_opsd.collect_traces": lambda words: parse_config(CollectConfig, words, ""),
}
RIGHT = {"base": 60, "real": 90, "noise": 61}


class Programs:
    """Right answers of each model, what was run, which jobs fail."""

    def __init__(self) -> None:
        self.jobs: list[tuple[int, Job]] = []
        self.fails: set[str] = set()
        self._lock = threading.Lock()

    def run(self, place: arms.SeedArms, job: Job) -> None:
        with self._lock:
            self.jobs.append((place.seed, job))
        if job.name in self.fails:
            raise RuntimeError(f"{job.name} ended with code 1")
        if job.name == "world":
            (place.demo.world / "Spatial_Navigation").mkdir(parents=True)
            return
        given = self.settings(job)
        if job.module.endswith(".evaluate"):
            self._answer(Path(given["output_dir"]), place.seed)
        elif job.module.endswith(".kl_diagnostic"):
            gap = {"value": 0.4, "se": 0.01}
            write(Path(given["output_dir"]) / "kl_diagnostic.json",
                  {"gap_closed": {"jsd": gap, "kl": gap}})  # fmt: skip
        elif job.module.endswith(".collect_traces"):
            write(Path(given["output_dir"]) / "collect_traces.json", {})
        else:
            release = Path(given["results_dir"]) / "checkpoints" / "0000280"
            release.mkdir(parents=True, exist_ok=given["auto_resume"])

    def settings(self, job: Job) -> dict[str, Any]:
        return flat(READERS[job.module](list(job.arguments)))

    def _answer(self, out: Path, seed: int) -> None:
        right = RIGHT.get(out.name, 70) + (seed if out.name == "real" else 0)
        write_evaluation(out, right, ROWS)

    def of(self, name: str, seed: int = 1) -> dict[str, Any]:
        (job,) = [job for s, job in self.jobs if s == seed and job.name == name]
        return self.settings(job)


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> Programs:
    made = Programs()
    monkeypatch.setattr(arms.SeedArms, "run", lambda place, job: made.run(place, job))
    return made


ADDED: dict[str, dict[str, Any]] = {
    **{kind: {"vt": kind} for kind in ("noise", "other", "blank", "shuffled", "problem", "none")},
    "contrast-0.5": {"contrast": 0.5},
    "guard-off": {},
    "guard-rollback": {"teacher_guard": "rollback"},
    "rehearsal-0.25": {"vt_rehearsal": 0.25},
}
VALIDATED = {"eval_every": 50, "eval_data": "Spatial_Navigation", "eval_limit": 400}


@pytest.mark.parametrize("arm", ADDED)
def test_an_arm_differs_from_the_others_in_what_its_name_says(
    programs: Programs, tmp_path: Path, arm: str
) -> None:
    words = ["--arms", f"real,{arm}", "--seeds", "1", "--out", str(tmp_path), "--workers", "1"]
    assert arms.main([*words, "--teacher_mode", "ema", "--total_steps", "90"]) == 0
    real, other = programs.of("train-real"), programs.of(f"train-{arm}")
    assert real["teacher_mode"] == other["teacher_mode"] == "ema" and real["total_steps"] == 90
    changed = {n: other[n] for n in other if other[n] != real[n] and n != "results_dir"}
    assert changed == ADDED[arm] | (VALIDATED if arm[:5] in ("guard", "rehea") else {})


@pytest.mark.parametrize("arm", ["offline-trace", "offline-base", "offline-jsd"])
def test_an_offline_arm_trains_on_its_own_cache(
    programs: Programs, tmp_path: Path, arm: str
) -> None:
    assert arms.main(["--arms", arm, "--seeds", "1", "--out", str(tmp_path)]) == 0
    cached, trained = programs.of(f"collect-{arm}"), programs.of(f"train-{arm}")
    assert cached["completions"] == ("trace" if arm == "offline-trace" else "base")
    assert trained["teacher_cache"] == cached["output_dir"]
    assert trained["jsd_top_k"] == cached["top_k"]
    assert trained["model_path"] == cached["model_path"]
    same = ("prompts", "vit_max_size", "vit_min_size", "data_root", "dataset_config_file",
            "sample_max_new_tokens", "max_forward_tokens")  # fmt: skip
    for name in same:
        assert Path(str(trained[name])).resolve() == Path(str(cached[name])).resolve(), name
    loss = [trained[n] for n in ("kd_loss", "jsd_weight", "jsd_temperature", "ce_weight",
                                 "kd_use_vt_weights")]  # fmt: skip
    assert loss == (["jsd", 1, 1, 0, False] if arm == "offline-jsd" else ["kl", 0.5, 2, 1, True])


@pytest.mark.parametrize("arm", ["sft", "offline-trace", "offline-jsd"])
def test_other_trainers_get_what_they_have_a_use_for(
    programs: Programs, tmp_path: Path, arm: str
) -> None:
    """Of the demo's settings and of the flags that all arms are given."""
    given = ["--jsd_beta", "0.3", "--completions_per_row", "2", "--total_steps", "90"]
    assert arms.main(["--arms", f"real,{arm}", "--seeds", "1", "--out", str(tmp_path), *given]) == 0
    real, other = programs.of("train-real"), programs.of(f"train-{arm}")
    names = ("teacher_mode", "completions_per_row", "jsd_token_clip", "jsd_beta", "total_steps")
    assert [real[name] for name in names] == ["fixed", 2, None, 0.3, 90]
    loss = [None, 0.3] if arm == "offline-jsd" else [0.05, 0.5]
    assert [other[name] for name in names] == ["ema", 1, *loss, 90]
    (job,) = [job for _, job in programs.jobs if job.name == f"train-{arm}"]
    trainer = importlib.import_module(job.module)
    check_used(trainer.make_objective(trainer.read_config(job.arguments)))


def test_each_seed_has_its_world_and_finished_arms_are_not_run_again(
    programs: Programs, tmp_path: Path
) -> None:
    words = ["--seeds", "1,2", "--out", str(tmp_path)]
    assert arms.main([*words, "--arms", "real"]) == 0
    for seed in (1, 2):
        trained = programs.of("train-real", seed)
        assert (trained["data_seed"], trained["global_seed"]) == (seed, seed)
        assert Path(trained["data_root"]) == tmp_path / f"seed-{seed}" / "world"
    before = len(programs.jobs)
    assert arms.main([*words, "--arms", "real,sft"]) == 0
    assert {job.name for _, job in programs.jobs[before:]} == {
        "train-sft", "eval-sft", "diagnostic-sft"
    }  # fmt: skip
    assert len(programs.jobs) == before + 6


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rows", "500"], "rows: saved 12800, now 500"),
        (["--lr", "1"], r"train_flags: saved \[\], now \['--lr', '1'\]"),
    ],
)
def test_arms_of_other_settings_are_not_added(
    programs: Programs, tmp_path: Path, words: list[str], said: str
) -> None:
    """A finished arm is not run again, so it would stand in one table with theirs."""
    command = ["--arms", "real", "--seeds", "1", "--out", str(tmp_path)]
    assert arms.main(command) == 0
    before = len(programs.jobs)
    with pytest.raises(ValueError, match=rf"--out .* holds arms of other settings \({said}"):
        arms.main([*command, *words])
    assert len(programs.jobs) == before


def test_what_is_named_twice_is_run_once(programs: Programs, tmp_path: Path) -> None:
    """Two at once would share a folder; 1 and 01 are one seed."""
    words = ["--arms", "real,sft,real", "--seeds", "1,01", "--out", str(tmp_path)]
    assert arms.main(words) == 0
    started = [job.name for _, job in programs.jobs]
    assert len(started) == len(set(started))
    assert json.loads((tmp_path / "result.json").read_text())["base"] == [0.6]


def test_the_table_pools_seeds(programs: Programs, tmp_path: Path) -> None:
    words = ["--arms", "real,noise", "--seeds", "1,3", "--out", str(tmp_path)]
    assert arms.main(words) == 0
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["base"] == [0.6, 0.6]
    assert [found["arms"]["real"][s]["gain"] for s in ("1", "3")] == pytest.approx([31, 33])
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert lines[2] == "| base | 60.0% | | | |"
    # Of 100 mazes 31 and 33 more are right: 95 % intervals of 9.11 and 9.26 points on each side.
    assert lines[3] == ("| `real` | 92.0% | +32.0 (+25.5 to +38.5) | +31.0, +33.0 | 40% +- 1% |")
    assert lines[4].startswith("| `noise` | 61.0% | +1.0 (")


def test_a_failed_arm_leaves_the_others_their_results(
    programs: Programs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    programs.fails = {"train-noise"}
    words = ["--arms", "noise,real", "--seeds", "1", "--out", str(tmp_path)]
    assert arms.main(words) == 1
    assert "FAILED: train-noise ended with code 1" in capsys.readouterr().err
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["arms"].keys() == {"real"}


def test_an_arm_goes_on_where_it_was_stopped(programs: Programs, tmp_path: Path) -> None:
    """Trainers refuse the folder of a run that they do not resume."""
    words = ["--arms", "real,sft", "--seeds", "1", "--out", str(tmp_path)]
    programs.fails = {"eval-real", "eval-sft"}
    assert arms.main(words) == 1
    programs.fails.clear()
    assert arms.main(words) == 0


def test_without_the_base_no_arm_is_run(
    programs: Programs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    programs.fails = {"eval-base"}
    assert arms.main(["--arms", "real", "--seeds", "1", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "error: eval-base ended with code 1\n"
    assert not any(job.name == "train-real" for _, job in programs.jobs)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--arms", "real,guess"], r"--arms guess: choose among real, .*guard-MODE"),
        (["--arms", "contrast-"], "--arms contrast-: choose"),
        (["--arms", "real,contrast-nan"], "--contrast must be"),
        (["--arms", "guard-freeze"], "--teacher_mode fixed never changes"),
        (["--total_steps", "30"], r"--warmup_steps must be less than --total_steps \(30\)"),
        (["--seeds", "1,two"], "--seeds 1,two: numbers by commas"),
    ],
)
def test_what_cannot_be_run_is_named(
    programs: Programs, tmp_path: Path, words: list[str], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        arms.main([*words, "--out", str(tmp_path)])
    assert not programs.jobs and not list(tmp_path.iterdir())


def test_flags_that_no_trainer_knows_end_it_at_once(
    programs: Programs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, said in (
        (["--arms", "guard-never"], "--teacher_guard: invalid choice: 'never'"),
        (["--rate", "3"], "--rate"),
    ):
        with pytest.raises(SystemExit):
            arms.main([*words, "--out", str(tmp_path)])
        assert said in capsys.readouterr().err
    assert not programs.jobs and not list(tmp_path.iterdir())


def test_a_true_job_shows_why_it_failed(tmp_path: Path) -> None:
    args = arms.build_parser().parse_args(["--out", str(tmp_path)])
    args.train_flags = []
    place = arms.SeedArms(args, 7)
    with pytest.raises(RuntimeError, match=r"(?s)x ended with code 2.*seed-7/logs/x\.log.*nowhere"):
        place.run(Job("x", "data.worlds", ("nowhere",)))


@pytest.mark.parametrize(
    ("visible", "expected"), [("2,5", ["2", "5", "2"]), (None, ["0", "1", "0"])]
)
def test_jobs_take_turns_on_the_gpus_that_are_visible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, expected: list[str]
) -> None:
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(arms.SeedArms, "turns", itertools.count())
    given: list[str] = []

    def start(job: Job, log: Path, environment: dict[str, str]) -> Any:
        given.append(environment["CUDA_VISIBLE_DEVICES"])
        return SimpleNamespace(wait=lambda: 0)

    monkeypatch.setattr(arms, "start", start)
    args = arms.build_parser().parse_args(["--out", str(tmp_path)])
    args.train_flags = []
    place = arms.SeedArms(args, 7)
    for name in "abc":
        place.run(Job(name, "data.worlds", ()))
    assert given == expected
