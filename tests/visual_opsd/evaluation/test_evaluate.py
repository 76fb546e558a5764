# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Evaluation end to end on the tiny checkpoint: figures, resuming, contexts, errors."""

from __future__ import annotations

import json
import shutil
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
import torch

from data.packing import pack
from data.row_groups import ParquetDataset
from data.thinkmorph import parse_row
from data.visual_thoughts import show_thoughts
from data.worlds import get_scorer
from modeling import load_bagel
from modeling.bagel.generate import generate, marker_check
from scripts.visual_opsd.cli import run_main
from scripts.visual_opsd.config import PromptSettings
from scripts.visual_opsd.evaluate import main
from scripts.visual_opsd.evaluation import answers as module
from scripts.visual_opsd.evaluation.scoring import extract_answer, wilson_interval
from scripts.visual_opsd.evaluation.store import RankedLines
from scripts.visual_opsd.rows import make_builder
from scripts.visual_opsd.runs.identity import stable_hash
from tests.conftest import TINY_BAGEL, needs_gpu
from tests.data.synthetic import image_cell, truncated_png, write_dataset

ROWS = 12  # held-out ones of `world`
# Under the released prompts the tiny model asks for a picture, skips it and answers: 30 tokens.
BUDGET = 48
SMALL = [f"--{name}={value}" for name, value in
         {"vit_max_size": 112, "vit_min_size": 14, "max_new_tokens": BUDGET,
          "device": "cpu", "progress": False}.items()]  # fmt: skip


def run(world: Path, out: Path, *flags: str, data: str = "Spatial_Navigation") -> dict[str, Any]:
    code = main(
        ["--model_path", str(TINY_BAGEL), "--data", data, "--data_root", str(world),
         "--output_dir", str(out), *SMALL, *flags]
    )  # fmt: skip
    assert code == 0
    return json.loads((out / "summary.json").read_text())


def predictions(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def text_run(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "text"
    run(world, out, "--batch_size", "5")
    return out


@pytest.fixture
def count_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows handed to the sampler, call by call."""
    calls: list[int] = []
    sample = module.sample_completions

    def counted(model: Any, contexts: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(len(contexts))
        return sample(model, contexts, *args, **kwargs)

    monkeypatch.setattr(module, "sample_completions", counted)
    return calls


def test_summary_counts_what_the_predictions_say(text_run: Path, world: Path) -> None:
    lines = predictions(text_run)
    assert [line["index"] for line in lines] == list(range(ROWS))
    files = sorted((world / "Spatial_Navigation" / "data").glob("heldout-*.parquet"))
    dataset = ParquetDataset("Spatial_Navigation", files)
    for line in lines:
        values = dataset.read_row(line["index"]).values
        assert (line["pid"], line["answer"]) == (values["pid"], values["answer"])
        assert line["correct"] == get_scorer("spatial_navigation")(values, line["text"])
    summary = json.loads((text_run / "summary.json").read_text())
    assert summary["n"] == ROWS
    assert summary["correct"] == sum(line["correct"] for line in lines)
    assert summary["accuracy"] == summary["correct"] / ROWS
    assert summary["interval"] == list(wilson_interval(summary["correct"], ROWS))
    assert summary["lenient_correct"] == sum(line["lenient"] for line in lines)
    assert summary["lenient_accuracy"] >= summary["accuracy"]
    for name in ("accuracy", "interval"):
        assert f"lenient_{name}" in summary["tasks"]["Spatial_Navigation"]
    assert summary["mean_tokens"] == sum(line["output_tokens"] for line in lines) / ROWS > 1
    assert summary["cap_rate"] == sum(line["capped"] for line in lines) / ROWS
    assert summary["bad_rows"] == summary["resumed_rows"] == 0
    assert summary["tasks"]["Spatial_Navigation"]["n"] == ROWS


@needs_gpu
def test_a_gpu_answers_alike(text_run: Path, world: Path, tmp_path: Path) -> None:
    gpu = ("--device", "cuda", "--precision", "fp32")
    assert run(world, tmp_path, "--batch_size", "5", *gpu)["device"] == "cuda"
    assert predictions(tmp_path) == predictions(text_run)
    assert run(world, tmp_path / "auto", "--device", "cuda")["n"] == ROWS  # in bf16


@pytest.mark.parametrize("context", ["text", "vt", "noise", "other", "none"])
def test_answers_are_greedy_under_the_stated_context(
    context: str, world: Path, tmp_path: Path, text_run: Path
) -> None:
    """Each row decoded alone, from a context built here, gives the very text of the run."""
    out = text_run
    if context != "text":
        out = tmp_path / context
        run(world, out, "--context", context, "--limit", "4", "--noise_seed", "9")
    bundle = load_bagel(TINY_BAGEL)
    settings = PromptSettings(vit_max_size=112, vit_min_size=14)
    builder = make_builder(bundle.tokenizer, bundle.config, settings)
    files = sorted((world / "Spatial_Navigation" / "data").glob("heldout-*.parquet"))
    dataset = ParquetDataset("Spatial_Navigation", files)
    for line in predictions(out)[:4]:
        sample = parse_row(dataset.read_row(line["index"]))
        prompt = builder.student(sample)
        if context != "text":
            kind = "real" if context == "vt" else context
            shown = show_thoughts(kind, dataset.read_row(line["index"], line["index"]), sample, 9)
            prompt = builder.teacher(sample, prompt, shown)
        generation = generate(
            bundle.model, pack([prompt], bundle.special_tokens), bundle.special_tokens,
            max_new_tokens=BUDGET, check_every=1, max_image_skips=1,
            continues=marker_check(bundle.tokenizer.decode),
        )[0]  # fmt: skip
        ids = generation.ids if generation.capped else generation.ids[:-1]
        text = bundle.tokenizer.decode(ids)
        assert len(generation.rounds) == 1 + ("<image_start>" in text)
        assert line["text"] == text
        assert line["capped"] == generation.capped
        assert line["output_tokens"] == len(ids)
    if context != "text":  # the context does reach the model
        texts = {line["index"]: line["text"] for line in predictions(text_run)}
        assert any(line["text"] != texts[line["index"]] for line in predictions(out))


def test_resume_after_a_torn_line(
    text_run: Path, world: Path, tmp_path: Path, count_rows: list[int]
) -> None:
    whole = (text_run / "predictions.jsonl").read_bytes()
    run(world, tmp_path / "run", "--batch_size", "5")
    assert sum(count_rows) == ROWS
    assert (tmp_path / "run" / "predictions.jsonl").read_bytes() == whole

    # Killed while writing the eighth line of the first rank's file, with a second rank's beside it.
    count_rows.clear()
    cut = sum(len(line) for line in whole.splitlines(keepends=True)[:7]) + 11
    (tmp_path / "run" / "predictions.jsonl").unlink()
    (tmp_path / "run" / "predictions.rank_0.jsonl").write_bytes(whole[:cut])
    last = whole.splitlines(keepends=True)[-1]
    (tmp_path / "run" / "predictions.rank_1.jsonl").write_bytes(last)
    summary = run(world, tmp_path / "run", "--batch_size", "2")
    assert sum(count_rows) == ROWS - 8 == 4
    assert summary["resumed_rows"] == 8
    assert (tmp_path / "run" / "predictions.jsonl").read_bytes() == whole
    assert not list((tmp_path / "run").glob("*.rank_*"))

    # Damaged by a disk: the rows of lines that are no predictions are answered again.
    count_rows.clear()
    lines = whole.splitlines(keepends=True)
    lines[2:5] = [b"\xff\xfe\x00\n", lines[3][:30] + b"\n", b'{"index": 4}\n']
    (tmp_path / "run" / "predictions.jsonl").write_bytes(b"".join(lines))
    assert run(world, tmp_path / "run")["resumed_rows"] == ROWS - 3
    assert sum(count_rows) == 3
    assert (tmp_path / "run" / "predictions.jsonl").read_bytes() == whole

    # Truncated by hand after the end; then nothing left to do.
    count_rows.clear()
    (tmp_path / "run" / "predictions.jsonl").write_bytes(whole[:cut])
    assert run(world, tmp_path / "run")["resumed_rows"] == 7
    assert run(world, tmp_path / "run")["resumed_rows"] == ROWS
    assert sum(count_rows) == ROWS - 7
    assert (tmp_path / "run" / "predictions.jsonl").read_bytes() == whole


def test_compare_runs_from_the_command_line(
    text_run: Path, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    lines = [{**line, "correct": line["index"] < 3} for line in predictions(text_run)]
    (other / "predictions.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    out = tmp_path / "run"
    comparison = run(world, out, "--compare", str(other))["comparison"]
    right = {line["index"] for line in predictions(out) if line["correct"]}
    expected = 100 * (len(right) - 3) / ROWS
    assert comparison["difference"] == pytest.approx(expected)
    assert comparison["only_b"] == len({0, 1, 2} - right)
    assert comparison["lenient"]["n"] == ROWS
    assert comparison["low"] <= expected <= comparison["high"]
    assert f"{expected:+.1f} points" in capsys.readouterr().out
    run(world, tmp_path / "short", "--limit", "2")
    with pytest.raises(ValueError, match="row 2 of Spatial_Navigation/heldout"):
        run(world, out, "--compare", str(tmp_path / "short"))
    assert "comparison" not in json.loads((out / "summary.json").read_text())  # but all the rest


def test_results_of_earlier_rules_are_refused(text_run: Path, world: Path, tmp_path: Path) -> None:
    """A folder whose rows were judged by other rules is neither resumed nor compared with."""
    old = tmp_path / "old"
    shutil.copytree(text_run, old)
    settings = json.loads((old / "settings.json").read_text())["settings"]
    del settings["scoring_version"]
    (old / "settings.json").write_text(
        json.dumps({"hash": stable_hash(settings), "settings": settings})
    )
    with pytest.raises(ValueError, match=r"scoring_version: saved .*absent.*, now .*--overwrite"):
        run(world, old)
    with pytest.raises(ValueError, match=r"judged by the rules .*evaluate the older run again"):
        run(world, tmp_path / "new", "--compare", str(old))


def test_exact_match_where_there_is_no_world(tmp_path: Path) -> None:
    """Rows whose answer is what the model says are right, the others wrong; tasks apart."""
    names = ("Jigsaw_Assembly", "Other")
    (tmp_path / "prompts.yaml").write_text('system: "Solve it."')  # the tiny model then answers
    prompts = ("--prompts", str(tmp_path / "prompts.yaml"))

    def write(answers: list[str]) -> None:
        for name, own in ((names[0], answers[:3]), (names[1], answers[3:])):
            cells = [{"question": "Which?", "answer": answer} for answer in own]
            write_dataset(tmp_path, name, rows=3, split="heldout", change=cells.__getitem__)

    write(["unknown"] * 6)
    run(tmp_path, tmp_path / "first", *prompts, data=",".join(names))
    said = [extract_answer(line["text"]) for line in predictions(tmp_path / "first")]
    write([f" {text}.".upper() if i % 3 != 1 else "no such thing" for i, text in enumerate(said)])
    summary = run(tmp_path, tmp_path / "second", *prompts, data=",".join(names))
    assert [line["correct"] for line in predictions(tmp_path / "second")] == [1, 0, 1] * 2
    assert summary["accuracy"] == pytest.approx(2 / 3)
    assert summary["answered_rate"] == 1
    assert {name: task["correct"] for name, task in summary["tasks"].items()} == {
        names[0]: 2, names[1]: 2,
    }  # fmt: skip


def test_bad_rows_are_counted_and_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = {"problem_image_0": image_cell(truncated_png())}
    write_dataset(tmp_path, rows=5, split="heldout", change=lambda i: broken if i in (1, 3) else {})
    out = tmp_path / "run"
    with pytest.raises(ValueError, match=r"2 of 5 rows cannot be used: 2 broken_image.*1\.00%"):
        run(tmp_path, out, data="Jigsaw_Assembly")
    assert not (out / "summary.json").exists()
    summary = run(tmp_path, out, "--max_bad_rate", "0.5", data="Jigsaw_Assembly")
    assert summary["resumed_rows"] == 3  # the good ones of the failed run
    assert (summary["n"], summary["bad_rows"]) == (3, 2)
    assert summary["bad_reasons"] == {"broken_image": 2}
    assert "2 rows left out" in capsys.readouterr().out
    listed = [json.loads(x) for x in (out / "bad_rows.jsonl").read_text().splitlines()]
    assert [(x["row"], x["reason"]) for x in listed] == [(1, "broken_image"), (3, "broken_image")]
    write_dataset(tmp_path, "Blank", rows=2, split="heldout", change=lambda i: {"answer": ""})
    with pytest.raises(ValueError, match=r"no row could be used: 2 missing_answer"):
        run(tmp_path, tmp_path / "blank", "--max_bad_rate", "1", data="Blank")


def test_what_is_needed_at_the_end_is_looked_at_first(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "load_bagel", lambda *_, **__: pytest.fail("the model was read"))
    (tmp_path / "file").write_text("x")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "predictions.jsonl").write_text('{"index": 0}\n')
    for flags, message in (
        (("--compare", str(tmp_path / "none")), r"predictions\.jsonl does not exist: give"),
        (("--compare", str(tmp_path / "odd")), r"predictions\.jsonl line 1 holds no prediction"),
        (("--compare", str(tmp_path / "out")), "is --output_dir itself"),
        (("--output_dir", str(tmp_path / "file" / "x")), "--output_dir .*file/x: cannot write"),
    ):
        with pytest.raises(ValueError, match=message):
            run(world, tmp_path / "out", *flags)


def test_user_mistakes(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def expect(message: str, *flags: str, data: str = "Spatial_Navigation") -> None:
        with pytest.raises(ValueError, match=message):
            run(world, tmp_path / "out", *flags, data=data)

    expect("checkpoint folder .*nowhere does not exist", "--model_path", "nowhere")
    expect("unknown dataset 'Nothing'", data="Nothing")
    expect("each name once", data="Spatial_Navigation,Spatial_Navigation")
    expect("no parquet files, directly or in its data/", data=str(world))
    expect("no file of split 'test'", "--split", "test")
    expect("--limit must be at least 1 and at most 1000000000, got 0", "--limit", "0")
    expect("--max_bad_rate must be at least 0 and at most 1, got 2", "--max_bad_rate", "2")
    expect("precision bf16 needs a GPU", "--precision", "bf16", "--device", "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    expect("torch sees no GPU", "--device", "cuda")
    with pytest.raises(SystemExit):
        run(world, tmp_path / "out", "--context", "picture")
    # A file may be named itself; its dataset is the folder's name.
    file = next((world / "Spatial_Navigation" / "data").glob("heldout-*"))
    run(world, tmp_path / "file", "--limit", "1", data=str(file))
    assert predictions(tmp_path / "file")[0]["dataset"] == "Spatial_Navigation"


def test_a_mistake_is_one_line_and_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run_main(lambda: main(["--model_path", "nowhere", "--data", str(TINY_BAGEL)]))
    assert stop.value.code == 1
    assert capsys.readouterr().err.startswith("error: --data ")


def test_damaged_lines_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = ['{"index": 0, "x": 1}', "broken", '{"x": 1}', '{"index": "4", "x": 1}', '{"index": 5}',
             '{"index": 6, "bad": {}}', '{"index": true, "x": 1}']  # fmt: skip
    (tmp_path / "p.jsonl").write_text("\n".join(lines) + "\n")
    # Their rows are computed again.
    assert list(RankedLines(tmp_path, "p", itemgetter("x")).read()) == [0, 6]
    assert "p.jsonl: left out: line 2 is not JSON" in caplog.text
    assert "line 3 is no record of this file: KeyError('index')" in caplog.text
    assert "and 2 more" in caplog.text
    store = RankedLines(tmp_path, "p")
    (tmp_path / "p.jsonl").write_text('{"index": 3}\n{"index": 1')
    store.append(0, [{"index": 1}])
    (tmp_path / "p.rank_0.jsonl").write_text('{"index": 1}\n{"ind')
    store.append(0, [{"index": 2}])
    assert (tmp_path / "p.rank_0.jsonl").read_text() == '{"index": 1}\n{"index": 2}\n'
    assert list(store.read()) == [1, 2, 3]
