# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""What the trainer says to mistakes of the user: settings, files, data, folders, resuming.

Bad input of the issue's acceptance list, and where else it is tested (message and exit):

    missing column        test_mistakes_in_data; data/test_parquet.py, data/test_check.py
    truncated PNG         test_trainer_bad_steps.py; data/test_thinkmorph.py
    empty parquet         test_mistakes_in_data; data/test_parquet.py
    unknown teacher mode  test_unknown_flags_are_exit_code_2; test_settings.py
    absent checkpoint     test_mistakes_in_settings[absent checkpoint]; modeling/test_checkpoint.py
    wrong vocabulary      test_wrong_vocabulary; modeling/test_checkpoint.py
    all rows bad          test_all_rows_bad; data/test_parquet.py
    resume, missing step  test_resuming_what_is_not_there; test_checkpoints.py

Besides these: device cuda without a GPU also in test_distributed.py, another run's checkpoints
in test_checkpoints.py and two_process_checks.py, damaged checkpoints in test_checkpoints.py,
the rate of bad rows in data/test_rejects.py, dataset configs in data/test_dataset_info.py,
settings of the loss in test_opsd_loss.py.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file, save_file

from scripts.visual_opsd import train_sft, train_visual_opsd
from scripts.visual_opsd.cli import parse_config, run_main
from scripts.visual_opsd.config import TrainConfig
from scripts.visual_opsd.run_config import RunSettings
from tests.data.synthetic import (
    SCHEMA,
    good_row,
    write_dataset,
    write_parquet,
)
from tests.visual_opsd.training.trainers import SMALL, metrics, train
from tests.visual_opsd.training_runs import TINY_BAGEL, train_arguments

MODULE = "scripts.visual_opsd.train_visual_opsd"


@pytest.fixture(scope="module")
def finished(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of a whole run of four steps with two checkpoints."""
    results = tmp_path_factory.mktemp("finished")
    train(world, results, **FOUR)
    return results


FOUR: dict[str, Any] = {"total_steps": 4, "save_every": 2, "save_release": True}


def run_program(
    world: Path, results: Path, *more: str, program: Any = train_visual_opsd, **changes: Any
) -> int:
    """The entry point's `main` in this process."""
    code: int = program.main([*train_arguments(world, results, **{**SMALL, **changes}), *more])
    return code


# --------------------------------------------------------------------- mistakes, named at once

SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "absent checkpoint": (
        {"model_path": "models/absent"}, r"models/absent does not exist; .* download_model\.py",
    ),
    "warm-up": (
        {"warmup_steps": 5, "total_steps": 5},
        r"--warmup_steps must be less than --total_steps \(5\), got 5: lower it",
    ),
    "bf16 on a CPU": ({"precision": "bf16"}, r"needs a GPU; on a CPU use --precision fp32"),
    "nothing trains": ({f"freeze_{p}": True for p in ("llm", "vit", "und")}, "leave nothing to"),
    "no loss": ({"jsd_weight": 0}, "jsd_weight and ce_weight are both 0"),
    "beta": ({"jsd_beta": 1.5}, r"--jsd_beta must be at least 0 and at most 1, got 1\.5"),
    "clip of 0": ({"jsd_token_clip": 0}, r"use --jsd_token_clip none"),
    "chunks": ({"loss_chunk_size": 0}, "loss_chunk_size must be at least 1"),
    "seed": ({"global_seed": -1}, r"--global_seed must be at least 0 and .* 9223372036854775807"),
    "temperature": ({"sample_temperature": 0}, r"greedy .* use --sample_do_sample False"),
    "stride": ({"vit_stride": 7}, "vit_stride 7 must be a multiple of the ViT's patch size 14"),
    "sides": ({"vit_min_size": 200}, r"must be at most --vit_max_size \(56\), got 200"),
    "prompts": ({"prompts": "absent.yaml"}, r"prompts file absent\.yaml does not exist"),
    "data set": ({"data_root": "absent"}, r"not at absent/Spatial_Navigation\. Download"),
    "dataset config": ({"dataset_config_file": "absent.yaml"}, r"absent\.yaml does not exist"),
    "mesh": ({"num_shard": 3}, "there are 1 processes"),
    "replay": ({"replay_samples": "absent.jsonl"}, r"--replay_samples absent\.jsonl: no such"),
    "drawing": ({"visual_gen": True}, "--visual_gen True"),
    "bad rate": ({"max_bad_rate": 2}, "--max_bad_rate must be at least 0 and at most 1, got 2"),
    "nothing counts": ({"skip_first_tokens": 8, "sample_max_new_tokens": 8},
                       "--skip_first_tokens 8 leaves nothing of completions of at most 8 tokens"),
    "rows": ({"global_batch_size": 0}, "global_batch_size must be at least 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_mistakes_in_settings(world: Path, tmp_path: Path, name: str) -> None:
    """Before a model is built, and before anything but empty folders is written."""
    changes, message = SETTINGS[name]
    with pytest.raises(ValueError, match=message):
        run_program(world, tmp_path / "r", **changes)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"torch sees no GPU .* use --device cpu"):
        run_program(world, tmp_path, device="cuda")


def test_sft_without_a_loss_or_with_a_teacher(world: Path, tmp_path: Path) -> None:
    for changes, message in (
        ({"ce_weight": 0}, "both 0: there is nothing to train on"),
        ({"jsd_weight": 1}, "--jsd_weight 1.0: SFT has no teacher: leave it out"),
    ):
        with pytest.raises(ValueError, match=message):
            run_program(world, tmp_path, program=train_sft, **changes)


def test_unknown_flags_are_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        (["--teacher_mod", "ema"], "--teacher_mod ema (did you mean --teacher_mode"),
        (["--jsd-beta=1"], "--jsd-beta=1 (did you mean --jsd_beta"),
        (["--noise_vt", "maybe"], "argument --noise_vt: expected True or False, got 'maybe'"),
        (["--precision", "fp16"], "argument --precision: invalid choice: 'fp16'"),
        (["--teacher_mode", "emma"], "argument --teacher_mode: invalid choice: 'emma'"),
        (["--total_steps", "1e3"], "argument --total_steps: invalid int value: '1e3'"),
    ):
        with pytest.raises(SystemExit) as ended:
            train_visual_opsd.main(words)
        assert ended.value.code == 2
        assert message in capsys.readouterr().err


def test_mistakes_are_one_line_and_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run_main(lambda: train_visual_opsd.main(["--device", "cpu", "--model_path", "absent"]))
    assert ended.value.code == 1
    assert capsys.readouterr().err.startswith("error: the checkpoint folder absent does not exist")

    def noted() -> int:
        error = ValueError("too tall")
        error.add_note("while preparing a.parquet row 3")
        raise error

    with pytest.raises(SystemExit):
        run_main(noted)
    assert capsys.readouterr().err == "error: too tall; while preparing a.parquet row 3\n"


YAMLS: dict[str, tuple[str, str]] = {
    "unknown name": ("total_step: 4\n", r"unknown name 'total_step'; did you mean total_steps"),
    "in a group": ("loss: {jsd_bta: 1}\n", r"unknown name 'jsd_bta'; did you mean jsd_beta"),
    "syntax": ("lr: [1e-5\n", "is not valid YAML: while parsing"),
    "no mapping": ("- lr\n", "must be a mapping of flag names"),
    "null": ("lr: null\n", "lr must be float, got None"),
    "type": ("total_steps: many\n", "total_steps must be int, got 'many'"),
    "bool": ("total_steps: true\n", "total_steps must be int, got True"),
    "choice": ("precision: 16\n", "precision must be one of auto, bf16, fp32, got '16'"),
}


@pytest.mark.parametrize("name", YAMLS)
def test_mistakes_in_a_configuration_file(tmp_path: Path, name: str) -> None:
    text, message = YAMLS[name]
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        parse_config(TrainConfig, ["--config", str(tmp_path / "c.yaml")], "")


def test_values_of_a_configuration_file(tmp_path: Path) -> None:
    """`null` and `none` are no value; flags win; groups may be written out or left out."""
    (tmp_path / "c.yaml").write_text(
        "jsd_top_k: none\nloss: {jsd_token_clip: null, ce_weight: 1}\nwandb_project: None\n"
        "lr: 2e-6\nresume: 500\nnoise_vt: true\neps: 1e-8\n"
    )
    words = ["--config", str(tmp_path / "c.yaml"), "--eps", "1e-9", "--jsd_top_k", "0"]
    config = parse_config(TrainConfig, words, "")
    assert config.loss.jsd_top_k == 0 and config.loss.build().top_k is None
    assert config.loss.jsd_token_clip is None and config.loss.ce_weight == 1.0
    assert config.run.wandb_project is None and config.run.resume == "500"
    assert (config.optim.lr, config.optim.eps) == (2e-6, 1e-9)
    assert config.teacher.noise_vt
    assert parse_config(TrainConfig, words[:2], "").loss.jsd_top_k is None
    empty = parse_config(TrainConfig, ["--resume", "none", "--checkpoint_dir", ""], "")
    assert empty == TrainConfig()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("system: [\n", "is not valid YAML"),
        ("systm: x\n", "must map some of .*system"),
        ("system: 5\n", "must map some of .* to strings"),
    ],
)
def test_mistakes_in_a_prompts_file(world: Path, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        run_program(world, tmp_path / "r", prompts=tmp_path / "p.yaml")


# ---------------------------------------------------------------------------------- data, model


def test_mistakes_in_data(tmp_path: Path) -> None:
    (tmp_path / "datasets.yaml").write_text("datasets:\n  - {name: Jigsaw_Assembly}\n")
    file = tmp_path / "Jigsaw_Assembly" / "data" / "train-0.parquet"
    without = pa.schema([field for field in SCHEMA if field.name != "problem_image_0"])
    write_parquet(file, [good_row(0)], schema=without)
    with pytest.raises(ValueError, match=r"train-0\.parquet .*missing columns: prob") as error:
        run_program(tmp_path, tmp_path / "r")
    message = str(error.value)
    assert "missing columns: problem_image_0. Columns found: pid, question, answer, " in message
    assert f"python -m data.check {file}" in message
    write_parquet(file, [])
    with pytest.raises(ValueError, match=r"Jigsaw_Assembly \(split train\) has no rows: .*train-0"):
        run_program(tmp_path, tmp_path / "r")
    file.write_bytes(b"PAR1 but not really")
    with pytest.raises(ValueError, match=r"train-0\.parquet is not a readable parquet file"):
        run_program(tmp_path, tmp_path / "r")


@pytest.mark.parametrize("workers", [0, 1])
def test_all_rows_bad(tmp_path: Path, workers: int) -> None:
    write_dataset(tmp_path, rows=5, change=lambda i: {"answer": " "} if i else {"question": ""})
    (tmp_path / "datasets.yaml").write_text("datasets:\n  - {name: Jigsaw_Assembly}\n")
    with pytest.raises(ValueError, match="step 0, slot 0: none of 5 candidate rows") as error:
        run_program(tmp_path, tmp_path / "r", num_workers=workers)
    for part in ("4 missing_answer (", "1 missing_question (", "data.check"):
        assert part in str(error.value)
    assert "Traceback" not in str(error.value)


def test_no_row_fits(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"leave no room for a row: .*tokens 30: raise the lim"):
        run_program(world, tmp_path, max_forward_tokens=30)  # not even one without a question
    with pytest.raises(ValueError, match=r"none of 16 candidate .* 16 too_long .*raise the limit"):
        run_program(world, tmp_path, max_forward_tokens=110)


def test_wrong_vocabulary(world: Path, tmp_path: Path) -> None:
    """A tokenizer with more tokens than the embedding has rows."""
    model = tmp_path / "model"
    shutil.copytree(TINY_BAGEL, model)
    config = json.loads((model / "llm_config.json").read_text())
    (model / "llm_config.json").write_text(json.dumps({**config, "vocab_size": 1300}))
    tensors = load_file(model / "model.safetensors")
    for key in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        tensors[key] = tensors[key][:1300].clone()
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(ValueError, match=r"tokenizer has 1318 tokens, .* 1300 rows; use the rel"):
        run_program(world, tmp_path / "r", model_path=model)


def test_a_weight_that_is_no_number(world: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(TINY_BAGEL, model)
    tensors = load_file(model / "model.safetensors")
    tensors["connector.fc1.bias"][3] = torch.nan
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors: 1 of \d+ .*: connector.fc1.bias;"):
        run_program(world, tmp_path / "r", model_path=model)


def test_a_replay_must_fit(world: Path, finished: Path, tmp_path: Path) -> None:
    """Another order of rows, more steps than recorded, and a line that is none."""
    recorded = finished / "samples.jsonl"
    for changes, message in (
        ({"data_seed": 1}, r"step 1, slot \d holds row .*, this run reads"),
        ({"total_steps": 5}, r"no completion for step 5, slot 0: record with --samples_per_step"),
        ({"global_batch_size": 3}, r"no completion for step 1, slot 2"),
    ):
        with pytest.raises(ValueError, match=message):
            run_program(world, tmp_path / str(changes), replay_samples=recorded, **changes)
    torn = tmp_path / "torn.jsonl"
    torn.write_text(recorded.read_text() + '{"step": 5, "ids": [1')
    with pytest.raises(ValueError, match=r"torn\.jsonl line 9 holds no completion"):
        run_program(world, tmp_path / "r", replay_samples=torn)


# ---------------------------------------------------------------------- folders and resuming


def test_folders_that_cannot_be_written(world: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match=r"cannot write to .*file/r: .*choose another --results"):
        run_program(world, tmp_path / "file" / "r")
    with pytest.raises(ValueError, match=r"cannot write to .*choose another --checkpoint_dir"):
        run_program(world, tmp_path / "r", checkpoint_dir=tmp_path / "file" / "c")


def test_another_runs_checkpoints_are_safe(world: Path, finished: Path, tmp_path: Path) -> None:
    """Training states, or release folders alone when the states were deleted."""
    results = tmp_path / "r"
    shutil.copytree(finished, results)
    before = (results / "metrics.jsonl").read_text()
    with pytest.raises(ValueError, match=r"already holds checkpoints \(steps 2, 4\): continue"):
        run_program(world, results, **FOUR)
    other = finished / "checkpoints" / "step_0000002"
    with pytest.raises(ValueError, match=r"already holds checkpoints \(steps 2, 4\)"):
        run_program(world, results, resume=other, **FOUR)
    for state in (results / "checkpoints").glob("step_*"):
        shutil.rmtree(state)
    with pytest.raises(ValueError, match=r"\(release folders 0000002, 0000004\): choose another"):
        run_program(world, results, **FOUR)
    with pytest.raises(ValueError, match=r"metrics\.jsonl is of an earlier run \(up to step 4\), "):
        run_program(world, results, checkpoint_dir=tmp_path / "elsewhere", **FOUR)
    assert (results / "metrics.jsonl").read_text() == before
    answers = tmp_path / "answers"
    answers.mkdir()
    (answers / "settings.json").write_text("{}")
    with pytest.raises(ValueError, match=r"answers holds the results of another command"):
        run_program(world, answers, **FOUR)


def test_resuming_what_is_not_there(world: Path, finished: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no complete checkpoint of step 3 .* steps: 2, 4"):
        run_program(world, finished, resume=3, **FOUR)
    with pytest.raises(ValueError, match="complete steps: none"):
        run_program(world, tmp_path, resume=3, **FOUR)
    with pytest.raises(ValueError, match=r"no such folder \(expected latest, a step, or"):
        run_program(world, tmp_path, resume="lastest", **FOUR)


def test_resume_flags_mean_one_thing(
    world: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert RunSettings().resume_specs == ()
    assert RunSettings(auto_resume=True).resume_specs == ("latest",)
    assert RunSettings(resume="latest", auto_resume=True).resume_specs == ("latest",)
    assert RunSettings(resume_from="p").resume_specs == ("p",)
    assert RunSettings(resume="p", resume_from="p").resume_specs == ("p",)
    conflicts: list[dict[str, Any]] = [{"resume_from": "p"}, {"auto_resume": True}]
    for options in conflicts:
        with pytest.raises(ValueError, match=r"--resume 3 contradicts .* give one of them"):
            RunSettings(resume="3", **options)
    # As in the reference: its own latest state, and only without one the folder named.
    both = {"auto_resume": True, "resume_from": finished / "checkpoints" / "step_0000002"}
    results = tmp_path / "r"
    assert run_program(world, results, **both, **FOUR) == 0
    assert [line["step"] for line in metrics(results)] == [3, 4]
    assert f"resumed from {both['resume_from']}" in capsys.readouterr().err
    assert run_program(world, results, **both, **FOUR) == 0
    assert [line["step"] for line in metrics(results)] == [3, 4]
    assert f"resumed from {results}/checkpoints/step_0000004" in capsys.readouterr().err


def test_resuming_another_run(world: Path, finished: Path, tmp_path: Path) -> None:
    """With its settings it goes on as that run did, elsewhere; with others they are named."""
    other = finished / "checkpoints" / "step_0000002"
    assert run_program(world, tmp_path / "r", resume=other, **FOUR) == 0
    ours, theirs = metrics(tmp_path / "r"), metrics(finished)[2:]
    assert [line["step"] for line in ours] == [3, 4]
    for name in ("loss", "grad_norm", "completion_length", "lr"):
        assert [line[name] for line in ours] == [line[name] for line in theirs], name
    with pytest.raises(ValueError, match="made with other settings") as error:
        run_program(world, tmp_path / "s", resume=other, lr=2e-3, noise_vt=True, **FOUR)
    for part in ("optim.lr: saved 0.001, now 0.002", "teacher.noise_vt: saved False, now True"):
        assert part in str(error.value)
    assert "results_dir" not in str(error.value)
    with pytest.raises(ValueError, match=r"sft: saved False, now True"):
        run_program(world, tmp_path / "s", resume=other, program=train_sft, **FOUR)


def test_latest_of_nothing_is_a_fresh_start(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_program(world, tmp_path, resume="latest") == 0
    assert f"no checkpoint in {tmp_path}/checkpoints yet: starting" in capsys.readouterr().err


def test_resume_owes_the_release_folder_and_supersedes_later_ones(
    world: Path, finished: Path, tmp_path: Path
) -> None:
    """Killed between state and release folder; then a step back."""
    results = tmp_path / "r"
    shutil.copytree(finished, results)
    checkpoints = results / "checkpoints"
    shutil.rmtree(checkpoints / "0000004")
    (checkpoints / "0000004.tmp").mkdir()
    assert run_program(world, results, resume="latest", **FOUR) == 0
    whole, mended = (
        (folder / "checkpoints" / "0000004" / "model.safetensors").read_bytes()
        for folder in (finished, results)
    )
    assert whole == mended
    assert not (checkpoints / "0000004.tmp").exists()
    assert run_program(world, results, resume=2, **FOUR) == 0
    assert {p.name for p in (checkpoints / "superseded").iterdir()} == {"0000004", "step_0000004"}
    assert (checkpoints / "0000004" / "model.safetensors").read_bytes() == whole
    for name in ("metrics.jsonl", "samples.jsonl"):
        steps = [json.loads(line)["step"] for line in (results / name).read_text().splitlines()]
        assert steps == sorted(steps) and set(steps) == {1, 2, 3, 4}
