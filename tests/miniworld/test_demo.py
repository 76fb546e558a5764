# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""`make demo`: what its arms differ in, which students it judges, its verdict and its exit code.

`Stage` stands in for the programs that the demo starts: a "student" is a folder that says how it
was trained, an "evaluation" makes as many answers right as its student can.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from data.worlds.__main__ import build_parser as build_world_parser
from scripts.miniworld import demo
from scripts.visual_opsd.analysis.kl_measurement import DiagnosticConfig
from scripts.visual_opsd.cli import flat, parse_config
from scripts.visual_opsd.config import TrainConfig
from scripts.visual_opsd.evaluation.questions import EvaluateConfig
from scripts.visual_opsd.evaluation.scoring import PairedComparison, compare_paired
from tests.miniworld.results import write, write_evaluation
from tests.visual_opsd.training_runs import ROOT

TRAIN = "scripts.visual_opsd.train_visual_opsd"
EVALUATE = "scripts.visual_opsd.evaluate"
DIAGNOSTIC = "scripts.visual_opsd.kl_diagnostic"
CONFIGS = {TRAIN: TrainConfig, EVALUATE: EvaluateConfig, DIAGNOSTIC: DiagnosticConfig}
ROWS = 200
EARLIER, LAST = "9999990", "10000000"  # by name the earlier one comes last
# Right answers of ROWS: the base without a visual thought, with it, with noise in its place.
BASE = {"text": 120, "vt": 200, "noise": 118}
TRAINED = {"real": 170, "noise": 119, "untrained": 0}


def settings(job: demo.Job) -> dict[str, Any]:
    """What the program of a job reads from its command line."""
    return flat(parse_config(CONFIGS[job.module], job.arguments, ""))


@dataclass
class Stage:
    """Does the work of `demo.Runner` without a process; `trained`: right answers by arm."""

    trained: dict[str, int] = field(default_factory=lambda: dict(TRAINED))
    steps: Sequence[str] = (EARLIER, LAST)
    stages: list[list[demo.Job]] = field(default_factory=list)

    @property
    def jobs(self) -> dict[str, demo.Job]:
        return {job.name: job for stage in self.stages for job in stage}

    def run(self, title: str, jobs: Sequence[demo.Job]) -> None:
        self.stages.append(list(jobs))
        does = {TRAIN: self.train, EVALUATE: self.evaluate, DIAGNOSTIC: self.diagnose}
        for job in jobs:
            if job.module in does:
                does[job.module](settings(job))
            else:
                assert job.module == "data.worlds"

    def train(self, given: dict[str, Any]) -> None:
        arm = "noise" if given["noise_vt"] else "real"
        for step in self.steps:
            folder = Path(given["results_dir"]) / "checkpoints" / step
            write(folder / "student.json", arm if step == self.steps[-1] else "untrained")
        (folder.parent / f"step_{self.steps[-1]}").mkdir()

    def evaluate(self, given: dict[str, Any]) -> None:
        said = Path(given["model_path"]) / "student.json"
        trained = self.trained[json.loads(said.read_text())] if said.exists() else None
        right = BASE[given["context"]] if trained is None else trained
        write_evaluation(Path(given["output_dir"]), right, ROWS)

    def diagnose(self, given: dict[str, Any]) -> None:
        gap = {"jsd": {"value": 0.4, "se": 0.01}}
        figures = {"gap_closed": gap, "go_test": {"go": True}}
        write(Path(given["output_dir"]) / "kl_diagnostic.json", figures)


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    made = Stage()
    monkeypatch.setattr(demo.Runner, "run", lambda self, title, jobs: made.run(title, jobs))
    monkeypatch.setattr(demo, "draw", lambda out, result: (out / "demo.png").touch())
    monkeypatch.setattr(demo, "write_report", lambda runs, out, **given: out.touch())
    return made


# ------------------------------------------------------------------------------ command lines


def test_the_arms_differ_in_the_noise_alone(stage: Stage, tmp_path: Path) -> None:
    assert demo.main(["--out", str(tmp_path), "--seed", "5", "--total_steps", "600"]) == 0
    real, noise = stage.jobs["train-real"], stage.jobs["train-noise"]
    assert "--noise_vt" not in real.arguments
    place = noise.arguments.index("--noise_vt")
    assert noise.arguments[place + 1] == "True"
    rest = [*noise.arguments[:place], *noise.arguments[place + 2 :]]
    renamed = [word.replace(str(tmp_path / "noise"), str(tmp_path / "real")) for word in rest]
    assert renamed == list(real.arguments)
    first, second = settings(real), settings(noise)
    assert {n for n in first if first[n] != second[n]} == {"noise_vt", "results_dir"}
    assert (first["noise_vt"], second["noise_vt"]) == (False, True)
    assert first["total_steps"] == 600 and first["lr"] == 5e-4  # the flag beats train.yaml


Flag = tuple[tuple[str, str], Callable[[Stage, Path], set[Any]], Callable[[Any], Any]]
# Every flag of the demo: two values, what is then seen of it in the jobs, and what it must be.
FLAGS: dict[str, Flag] = {
    "--seed": (
        ("5", "6"),
        lambda stage, out: {
            world(stage)["seed"],
            *(settings(stage.jobs[f"train-{arm}"])[name]
              for arm in ("real", "noise") for name in ("data_seed", "global_seed")),
            *(settings(job)["noise_seed"] for job in of(stage, EVALUATE)),
            *(settings(job)["seed"] for job in of(stage, DIAGNOSTIC)),
        },
        int,
    ),
    "--rows": (("30", "40"), lambda stage, out: {world(stage)["rows"]}, int),
    "--heldout-rows": (
        ("50", "70"),
        lambda stage, out: {
            world(stage)["heldout_rows"],
            *(settings(job)["num_samples"] for job in of(stage, DIAGNOSTIC)),
        },
        int,
    ),
    "--base": (
        ("one", "two"),
        lambda stage, out: {
            *(settings(stage.jobs[f"train-{arm}"])["model_path"] for arm in ("real", "noise")),
            *(settings(stage.jobs[f"eval-{name}"])["model_path"]
              for name in ("base", "base-vt", "base-noise")),
            settings(stage.jobs["diagnostic-base"])["model_path"],
            *(settings(stage.jobs[f"diagnostic-{arm}"])["base_path"] for arm in ("real", "noise")),
        },
        lambda name: str(Path(name).resolve()),
    ),
    "--out": (
        ("here", "there"),
        lambda stage, out: {
            Path(world(stage)["out"]).parent,
            *(Path(settings(job)["data_root"]).parent for m in CONFIGS for job in of(stage, m)),
            *(Path(settings(job)["results_dir"]).parent for job in of(stage, TRAIN)),
            *(Path(settings(job)["output_dir"]).parents[1] for m in (EVALUATE, DIAGNOSTIC)
              for job in of(stage, m)),
            *(file.parent for name in ("result.json", "table.txt", "demo.png", "report.html")
              for file in out.rglob(name)),
        },
        Path.resolve,
    ),
    "(to the trainer)": (
        ("--lr=1e-4", "--lr=2e-4"),
        lambda stage, out: {settings(job)["lr"] for job in of(stage, TRAIN)},
        lambda text: float(text.removeprefix("--lr=")),
    ),
}  # fmt: skip


def of(stage: Stage, module: str) -> list[demo.Job]:
    return [job for job in stage.jobs.values() if job.module == module]


def world(stage: Stage) -> dict[str, Any]:
    return vars(build_world_parser().parse_args(stage.jobs["world"].arguments))


def test_every_flag_of_the_demo_has_a_row() -> None:
    actions = demo.build_parser()._actions
    flags = {action.option_strings[0] for action in actions} - {"-h"}
    assert flags | {"(to the trainer)"} == FLAGS.keys()


@pytest.mark.parametrize("name", FLAGS)
def test_every_flag_of_the_demo_arrives(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    values, seen, means = FLAGS[name]
    monkeypatch.chdir(tmp_path)
    for value in values:
        stage.stages.clear()
        (tmp_path / value).mkdir(exist_ok=True)
        out = tmp_path / value if name == "--out" else tmp_path / f"out-{value}"
        given = [value] if name.startswith("(") else [name, value]
        base = [] if name == "--base" else ["--base", str(tmp_path)]
        assert demo.main([*given, *base, *([] if name == "--out" else ["--out", str(out)])]) == 0
        assert seen(stage, tmp_path / value) == {means(out if name == "--out" else value)}


def test_what_is_compared_under_which_settings(stage: Stage, tmp_path: Path) -> None:
    """Every stage sees the prompts and sizes of train.yaml, and greedy answers of one length."""
    assert demo.main(["--out", str(tmp_path)]) == 0
    trained = settings(stage.jobs["train-real"])
    for job in stage.jobs.values():
        if job.module == "data.worlds":
            continue
        given = settings(job)
        for name in ("vit_max_size", "vit_min_size"):
            assert given[name] == trained[name]
        assert Path(given["prompts"]).samefile(trained["prompts"])
        if job.module == EVALUATE:
            assert (given["max_new_tokens"], given["image_skips"]) == (26, 0)
            assert (given["data"], given["split"]) == ("Spatial_Navigation", "heldout")
        else:
            assert (given["sample_max_new_tokens"], given["sample_max_image_skips"]) == (26, 0)
    contexts = {job.name: settings(job)["context"] for job in of(stage, EVALUATE)}
    assert contexts == {
        "eval-base": "text", "eval-base-vt": "vt", "eval-base-noise": "noise",
        "eval-real": "text", "eval-noise": "text",
    }  # fmt: skip
    assert all(settings(job)["split"] == "heldout" for job in of(stage, DIAGNOSTIC))
    baseline = settings(stage.jobs["diagnostic-base"])
    assert baseline["base_path"] is None and baseline["baseline"] is None
    for arm in ("real", "noise"):
        assert settings(stage.jobs[f"diagnostic-{arm}"])["baseline"] == baseline["output_dir"]


# ------------------------------------------------------------------------------ what is judged


def test_the_last_student_of_each_arm_is_judged(stage: Stage, tmp_path: Path) -> None:
    assert demo.main(["--out", str(tmp_path)]) == 0
    for arm in ("real", "noise"):
        expected = tmp_path / arm / "checkpoints" / LAST
        for job in (stage.jobs[f"eval-{arm}"], stage.jobs[f"diagnostic-{arm}"]):
            assert settings(job)["model_path"] == str(expected)


def test_no_student_to_judge_is_named(stage: Stage, tmp_path: Path) -> None:
    made = demo.Demo(demo.build_parser().parse_args(["--out", str(tmp_path)]))
    with pytest.raises(ValueError, match=r"real/checkpoints holds no trained student.*--save_rel"):
        made.release("real")


def test_the_result_compares_the_right_runs(
    stage: Stage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo.main(["--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    counts = {"base": 120, "base-vt": 200, "base-noise": 118, "real": 170, "noise": 119}
    assert {n: v["accuracy"] for n, v in result["accuracy"].items()} == {
        name: right / ROWS for name, right in counts.items()
    }
    for name, (a, b) in {
        "real - noise": (170, 119), "noise - base": (119, 120), "real - base": (170, 120),
    }.items():  # fmt: skip
        expected = compare_paired([i < a for i in range(ROWS)], [i < b for i in range(ROWS)])
        assert result["paired"][name] == vars(expected)
    assert result["failures"] == [] and result["seed"] == 0
    captured = capsys.readouterr()
    assert "The effect is there" in captured.out and "FAILED" not in captured.err
    table = (tmp_path / "table.txt").read_text()
    assert table in captured.out
    for label, figure in {
        "before (base)": "60.0%", "after Visual-OPSD, real VTs": "85.0%",
        "after the control, noise VTs": "59.5%", "with the real VT": "100.0%",
        "with a noise VT": "59.0%", "real VTs - noise VTs": "+25.5",
        "noise VTs - before": "-0.5",
    }.items():  # fmt: skip
        (line,) = (line for line in table.splitlines() if line.startswith(label + "  "))
        assert line.removeprefix(label).split()[0] == figure


# ------------------------------------------------------------------------------ the verdict


def paired(difference: float, low: float, high: float) -> PairedComparison:
    return PairedComparison(
        n=2400, accuracy_a=0.5, accuracy_b=0.5, difference=difference, low=low, high=high,
        only_a=0, only_b=0, p_value=1.0,
    )  # fmt: skip


STILL = paired(-0.3, -1.3, 0.7)
GAIN = paired(21.8, 20.0, 23.5)
# gain of real VTs over noise, drift of noise from the base -> what each failure says
VERDICTS: dict[str, tuple[PairedComparison, PairedComparison, list[str]]] = {
    "the smallest measured seed": (paired(18.1, 16.2, 20.0), STILL, []),
    "of the least size": (paired(8.0, 6.5, 9.5), STILL, []),
    "on few mazes": (paired(15.0, 0.1, 29.9), STILL, []),
    "not of the claimed size": (paired(5.9, 3.1, 8.7), STILL, [r"\+5.9 points.*less than 8"]),
    "just below it": (paired(7.9, 6.4, 9.4), STILL, ["less than 8"]),
    "chance": (paired(5.0, -2.1, 12.1), STILL, ["less than 8"]),
    "chance on very few mazes": (paired(9.0, -1.0, 19.0), STILL, [r"\[-1.0, .*not above 0"]),
    "from 0 on": (paired(9.0, 0.0, 18.0), STILL, ["not above 0"]),
    "nothing": (paired(0.0, 0.0, 0.0), STILL, ["less than 8"]),
    "the wrong way round": (paired(-21.8, -23.5, -20.0), STILL, ["gain -21.8.*less than 8"]),
    "noise teaches": (GAIN, paired(6.0, 4.1, 7.9), [r"noise VTs move the base by \+6.0.*than 4"]),
    "noise destroys": (GAIN, paired(-6.0, -7.9, -4.1), ["noise VTs move the base by -6.0"]),
    "noise may teach": (GAIN, paired(5.9, 3.9, 7.9), []),
    "noise may destroy": (GAIN, paired(-5.9, -7.9, -3.9), []),
    "both": (paired(1.0, -1.0, 3.0), paired(6.0, 4.1, 7.9), ["less than 8", "move the base"]),
}


@pytest.mark.parametrize("name", VERDICTS)
def test_verdict(name: str) -> None:
    gain, drift, expected = VERDICTS[name]
    other = paired(50.0, 49.0, 51.0)  # no part of the claim
    found = demo.verdict({"real - noise": gain, "noise - base": drift, "real - base": other})
    assert len(found) == len(expected)
    for failure, words in zip(found, expected, strict=True):
        assert re.search(words, failure), failure


def test_the_measured_seeds_pass() -> None:
    """docs/benchmarks/demo.json: every run that the documents show."""
    runs = json.loads((ROOT / "docs" / "benchmarks" / "demo.json").read_text())
    found = [*runs["seeds"], runs["larger_setting"]["h200_bf16"]]
    pairs = [run["paired_points"] for run in found]
    assert len(pairs) == 6
    for pair in pairs:
        measured = {name: paired(v["difference"], *v["interval"]) for name, v in pair.items()}
        assert demo.verdict(measured) == []


OUTCOMES = {
    "no effect": ({"real": 121, "noise": 119}, ["real VTs gain +1.0 points over noise"]),
    "noise does as well": (
        {"real": 170, "noise": 170},
        ["real VTs gain +0.0 points", "noise VTs move the base by +25.0 points"],
    ),
    "the base destroyed": (
        {"real": 170, "noise": 40}, ["noise VTs move the base by -40.0 points"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OUTCOMES)
def test_failures_are_reported_and_end_with_1(
    stage: Stage, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    trained, expected = OUTCOMES[name]
    stage.trained |= trained
    assert demo.main(["--out", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("FAILED: ")]
    assert len(lines) == len(expected)
    for line, words in zip(lines, expected, strict=True):
        assert line.startswith(f"FAILED: {words}")
    assert "The effect is there" not in captured.out
    held = json.loads((tmp_path / "result.json").read_text())["failures"]
    assert [f"FAILED: {failure}" for failure in held] == lines
    assert all((tmp_path / name).exists() for name in ("table.txt", "demo.png", "report.html"))


def test_a_stage_that_fails_ends_with_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = demo.Job("world", "data.worlds", ("no-such-world",))
    monkeypatch.setattr(demo.Demo, "run", lambda self: self.runner.run("worlds", [job]))
    assert demo.main(["--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "error: world ended with code 2" in error and "The effect" not in error
    assert not (tmp_path / "result.json").exists()
    with pytest.raises(ValueError, match=r"no base checkpoint at .*; give --base DIR"):
        demo.main(["--out", str(tmp_path), "--base", str(tmp_path / "none")])


def run_here(self: demo.Runner, title: str, jobs: Sequence[demo.Job]) -> None:
    """As the runner does, but in this process: the start of a program takes longer than its work.

    `test_a_stage_that_fails_ends_with_1` starts one.
    """
    assert self.out.is_dir() and title
    for job in jobs:
        module = "data.worlds.__main__" if job.module == "data.worlds" else job.module
        assert not import_module(module).main(list(job.arguments)), job.name


def test_without_the_effect_the_program_ends_with_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole road, with noise in both arms and a learning rate that moves nothing."""
    words = ["--out", str(tmp_path), "--rows", "16", "--heldout-rows", "16", "--total_steps", "2"]
    words += ["--warmup_steps", "0", "--global_batch_size", "4", "--save_every", "2"]
    words += ["--noise_vt", "True", "--lr", "1e-12", "--min_lr", "0"]
    monkeypatch.setattr(demo.Runner, "run", run_here)
    monkeypatch.chdir(ROOT)
    assert demo.main(words) == 1
    done = capsys.readouterr()
    assert "FAILED: real VTs gain +0.0 points over noise, [+0.0, +0.0]: less than 8" in done.err
    assert "The effect is there" not in done.out
    result = json.loads((tmp_path / "result.json").read_text())
    assert len(result["failures"]) == 1
    assert result["paired"]["noise - base"]["n"] == 16
    table = (tmp_path / "table.txt").read_text()
    assert table in done.out
    for arm in ("real", "noise"):
        config = (tmp_path / arm / "config.yaml").read_text()
        assert "noise_vt: true" in config and "lr: 1.0e-12" in config
        assert (tmp_path / arm / "checkpoints" / "0000002" / "model.safetensors").exists()
    assert (tmp_path / "demo.png").stat().st_size > 1000
    report = (tmp_path / "report.html").read_text()
    for label in ("real", "noise", "base", "base-vt", "base-noise"):
        assert f">{label}<" in report, label
    assert "noise_vt" in report and "data:image/png" in report
