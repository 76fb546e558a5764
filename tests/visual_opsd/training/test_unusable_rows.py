# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""A row can be bad, a run is not: every program leaves out the same rows and uses the others.

Also lack of memory while answering, what killed runs leave behind, and folders that are taken.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from PIL import Image

from scripts.visual_opsd import evaluate, kl_diagnostic
from scripts.visual_opsd.analysis import attention as attention_analysis
from scripts.visual_opsd.analysis import diagnosis, vt_intervention
from scripts.visual_opsd.evaluation import answers, runner
from scripts.visual_opsd.evaluation.store import RankedLines
from scripts.visual_opsd.training.objective import Objective
from scripts.visual_opsd.training.text_sft import TextSFT
from scripts.visual_opsd.training.visual_opsd import VisualOPSD
from tests.conftest import TINY_BAGEL
from tests.data.synthetic import SCHEMA, good_row, write_dataset, write_parquet
from tests.visual_opsd.evaluation.test_benchmarks import base64_png, write_tsv
from tests.visual_opsd.training.trainers import train

GOOD = (0, 7)
CHANGES: dict[int, dict[str, Any]] = {
    1: {"question": "why " * 50_000},
    2: {"question": "x" * 1_000_000},
    3: {"world": "spatial_navigation", "world_state": "{{{"},
    4: {"world": "spatial_navigation"},
    5: {"world": "chess", "world_state": "SF/FG"},
    6: {"question": "why " * 160},  # too long for a model of 320 positions
}
REASONS = {1: "too_long", 2: "too_long", 6: "too_long"} | dict.fromkeys((3, 4, 5), "bad_world")
FLAGS = ["--device=cpu", "--progress=False", "--vit_max_size=56", "--vit_min_size=14",
         "--max_bad_rate=1", "--use_system_prompt=False"]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint, as if made for 320 positions."""
    folder = tmp_path_factory.mktemp("model") / "short"
    shutil.copytree(TINY_BAGEL, folder)
    path = folder / "llm_config.json"
    sizes = {**json.loads(path.read_text()), "max_position_embeddings": 320}
    path.write_text(json.dumps(sizes))
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    names = ("world", "world_state")
    schema = pa.schema([*SCHEMA, *(pa.field(name, pa.string()) for name in names)])
    rows = [good_row(i, **CHANGES.get(i, {})) for i in range(8)]
    write_parquet(folder / "Mixed" / "data" / "train-0.parquet", rows, schema=schema)
    short = [good_row(0), good_row(1, **CHANGES[6]), good_row(2)]
    write_parquet(folder / "Three" / "data" / "train-0.parquet", short)
    (folder / "datasets.yaml").write_text("datasets:\n  - {name: Mixed}\n")
    return folder


def data(root: Path, model: Path, out: Path, name: str = "Mixed") -> list[str]:
    return [f"--model_path={model}", f"--data={root / name}", "--split=train",
            f"--output_dir={out}", *FLAGS]  # fmt: skip


def listed(path: Path) -> dict[int, str]:
    records = map(json.loads, path.read_text().splitlines())
    return {record["row"]: record["reason"] for record in records}


@pytest.mark.parametrize("context", ["text", "noise"])
def test_evaluation(root: Path, model: Path, tmp_path: Path, context: str) -> None:
    out = tmp_path / "out"
    flags = [*data(root, model, out), "--max_new_tokens=4", f"--context={context}"]
    assert evaluate.main(flags) == 0
    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert tuple(line["index"] for line in lines) == GOOD
    assert listed(out / "bad_rows.jsonl") == REASONS
    for record in map(json.loads, (out / "bad_rows.jsonl").read_text().splitlines()):
        assert record["file"].endswith("train-0.parquet") and len(record["detail"]) < 300


def test_benchmarks(model: Path, tmp_path: Path) -> None:
    image = base64_png(Image.new("RGB", (8, 8)))
    rows = [{"index": i, "question": "Say it.", "answer": "A", "A": "a", "B": "b", "image": image}
            for i in range(5)]  # fmt: skip
    rows[1]["question"] = rows[2]["B"] = "why " * 50_000
    rows[3]["image"] = str([image] * 400)
    write_tsv(tmp_path / "Mine.tsv", rows)
    out = tmp_path / "out"
    flags = [f"--model_path={model}", f"--data={tmp_path / 'Mine.tsv'}", f"--output_dir={out}"]
    assert evaluate.main([*flags, *FLAGS, "--max_new_tokens=4"]) == 0
    assert listed(out / "bad_rows.jsonl") == dict.fromkeys((1, 2, 3), "too_long")


@pytest.mark.parametrize("completions", ["student", "trace"])
def test_diagnostic(root: Path, model: Path, tmp_path: Path, completions: str) -> None:
    flags = ["--sample_max_new_tokens=4", "--figures=False", f"--completions={completions}"]
    assert kl_diagnostic.main([*data(root, model, tmp_path / "out"), *flags]) == 0
    report = json.loads((tmp_path / "out" / "kl_diagnostic.json").read_text())
    assert (report["completions"]["n"], report["bad_rows"]) == (2, 6)
    assert "3 too_long" in report["bad_summary"] and "3 bad_world" in report["bad_summary"]


def test_diagnostic_leaves_out_what_max_forward_tokens_has_no_room_for(
    root: Path, tmp_path: Path
) -> None:
    """Row 1 fits the model's positions; found before anything is sampled."""
    flags = [*data(root, TINY_BAGEL, tmp_path / "out", "Three"), "--sample_max_new_tokens=4"]
    assert kl_diagnostic.main([*flags, "--figures=False", "--max_forward_tokens=240"]) == 0
    report = json.loads((tmp_path / "out" / "kl_diagnostic.json").read_text())
    assert (report["completions"]["n"], report["bad_rows"]) == (2, 1)
    assert "of max_forward_tokens 240: raise the limit" in report["bad_summary"]


def test_interventions(root: Path, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    sizes = ["--image_size=32", "--vae_max_size=32", "--vae_min_size=32", "--num_timesteps=2"]
    with pytest.raises(ValueError, match="none of 2 rows asked for a picture"):
        vt_intervention.main([*data(root, model, out), *sizes, "--max_new_tokens=2"])
    assert listed(out / "bad_rows.jsonl") == REASONS


def test_attention(root: Path, model: Path, tmp_path: Path) -> None:
    assert attention_analysis.main(data(root, model, tmp_path / "out")) == 0
    report = json.loads((tmp_path / "out" / "attention.json").read_text())
    assert (report["n"], report["bad_rows"]) == (2, 6)


@pytest.mark.parametrize("objective", [VisualOPSD, TextSFT])
def test_training(root: Path, model: Path, tmp_path: Path, objective: type[Objective]) -> None:
    settings: dict[str, Any] = {"model_path": model, "max_bad_rate": 1, "global_batch_size": 8}
    train(root, tmp_path / "r", objective, sample_max_new_tokens=4, **settings)
    assert listed(tmp_path / "r" / "bad_rows.jsonl") == REASONS


def test_budgets_beyond_the_model_are_an_error_at_start(
    root: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (answers, diagnosis, vt_intervention):
        monkeypatch.setattr(module, "load_bagel", None)  # nothing is loaded for it
    programs: list[tuple[Callable[[list[str]], int], str]] = [
        (evaluate.main, "max_new_tokens"),
        (kl_diagnostic.main, "sample_max_new_tokens"),
        (vt_intervention.main, "max_new_tokens"),
    ]
    for program, flag in programs:
        with pytest.raises(ValueError, match=rf"--{flag}: .* but the model has 320 \(max_pos"):
            program([*data(root, model, tmp_path / "out"), f"--{flag}=100000"])
    with pytest.raises(ValueError, match=r"--sample_max_new_tokens: .* the model has 320"):
        train(root, tmp_path / "r", model_path=model, sample_max_new_tokens=320)
    (tmp_path / "prompts.yaml").write_text("instruction_suffix: " + "x" * 1_000_000)
    with pytest.raises(ValueError, match="leave no room for a row: a text of 1000000 characters"):
        evaluate.main([*data(root, model, tmp_path / "out"), "--max_new_tokens=4",
                       f"--prompts={tmp_path / 'prompts.yaml'}"])  # fmt: skip
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------ memory


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"),
        MemoryError(),
    ],
)
def test_lack_of_memory_names_rows_and_flags_and_keeps_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    write_parquet(tmp_path / "Six" / "data" / "train-0.parquet", map(good_row, range(6)))
    flags = [*data(tmp_path, TINY_BAGEL, tmp_path / "out", "Six"), "--max_new_tokens=2"]
    sample, calls = answers.sample_completions, [0]

    def fails_later(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == 2:
            raise error
        return sample(*args, **kwargs)

    monkeypatch.setattr(answers, "sample_completions", fails_later)
    with pytest.raises(ValueError, match="not enough memory") as said:
        evaluate.main([*flags, "--batch_size=3"])
    text = str(said.value)
    assert "with 3 rows at once (Six/train-0.parquet row 3, Six/train-0.parquet row 4" in text
    assert "lower --batch_size (3), --prefill_tokens (32768)" in text and "\n" not in text
    assert evaluate.main([*flags, "--batch_size=2"]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["resumed_rows"], summary["n"]) == (3, 6)


def test_a_row_that_does_not_fit_alone_is_left_out(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = answers.sample_completions

    def fails_for_row_1(model: Any, contexts: Any, row_ids: Any, **kwargs: Any) -> Any:
        if 1 in row_ids:
            raise MemoryError
        return sample(model, contexts, row_ids, **kwargs)

    monkeypatch.setattr(answers, "sample_completions", fails_for_row_1)
    flags = [*data(root, TINY_BAGEL, tmp_path / "out", "Three"), "--max_new_tokens=2"]
    assert evaluate.main([*flags, "--batch_size=1"]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["n"] == 2 and summary["bad_reasons"] == {"out_of_memory": 1}
    assert listed(tmp_path / "out" / "bad_rows.jsonl") == {1: "out_of_memory"}


def test_lack_of_memory_in_the_other_programs(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(diagnosis, "measure", fails)
    monkeypatch.setattr(attention_analysis, "measure", fails)
    monkeypatch.setattr(vt_intervention.Interventions, "draw", fails)
    programs: list[tuple[Callable[[list[str]], int], str]] = [
        (kl_diagnostic.main, r"with 3 rows .*lower --sample_batch_size \(64\), --pack_tokens"),
        (attention_analysis.main, r"with one row .*lower --max_forward_tokens \(16384\)"),
        (vt_intervention.main, r"with 3 rows .*lower --batch_size \(8\)"),
    ]
    for number, (program, advice) in enumerate(programs):
        flags = data(root, TINY_BAGEL, tmp_path / str(number), "Three")
        message = f"not enough memory .*{advice}.*the same command goes on"
        with pytest.raises(ValueError, match=message):
            program(flags)


def test_what_is_not_about_memory_passes() -> None:
    with (
        pytest.raises(RuntimeError, match="shapes differ"),
        runner.memory_advice(["a row"], "lower nothing"),
    ):
        raise RuntimeError("shapes differ")


# ------------------------------------------------------------------------------------ folders


def test_the_newer_record_wins_whatever_its_rank(tmp_path: Path) -> None:
    lines = RankedLines(tmp_path, "p")
    lines.merge([{"index": 0, "by": "finished"}])
    lines.append(1, [{"index": 0, "by": "killed"}, {"index": 1, "by": "killed"}])
    lines.append(3, [{"index": 2, "by": "killed"}])
    for run in ("second", "third"):  # each with fewer ranks than the one before
        lines.settle()
        lines.append(0, [{"index": 1, "by": run}])
        assert {i: line["by"] for i, line in lines.read().items()} == {
            0: "killed", 1: run, 2: "killed",
        }  # fmt: skip
    assert (tmp_path / "p.jsonl").read_text() == '{"index": 0, "by": "finished"}\n'
    lines.merge(lines.read().values())
    assert [path.name for path in tmp_path.iterdir()] == ["p.jsonl"]


def test_a_stale_bad_row_of_a_higher_rank_is_answered(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = [*data(root, TINY_BAGEL, out, "Three"), "--max_new_tokens=2", "--limit=1"]
    assert evaluate.main(flags) == 0
    whole = (out / "predictions.jsonl").read_bytes()
    (out / "predictions.jsonl").unlink()
    bad = {"dataset": "Three", "file": "f", "row": 0, "reason": "unreadable_row", "detail": "x"}
    (out / "predictions.rank_5.jsonl").write_text(json.dumps({"index": 0, "bad": bad}) + "\n")
    assert evaluate.main(flags) == 0
    assert (out / "predictions.jsonl").read_bytes() == whole


def test_state_of_another_folder_leaves_no_release_of_its_step(tmp_path: Path) -> None:
    write_dataset(tmp_path, rows=2)
    (tmp_path / "datasets.yaml").write_text("datasets:\n  - {name: Jigsaw_Assembly}\n")
    settings: dict[str, Any] = {"save_release": True, "save_every": 1, "total_steps": 2}
    train(tmp_path, tmp_path / "a", **settings)
    shutil.rmtree(tmp_path / "a" / "checkpoints" / "step_0000002")
    foreign = tmp_path / "a" / "checkpoints" / "step_0000001"
    train(tmp_path, tmp_path / "b", resume_from=foreign, **settings)
    names = {path.name for path in (tmp_path / "b" / "checkpoints").iterdir()}
    assert names == {"step_0000002", "0000002"}
