# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The KL diagnostic end to end on the tiny checkpoint, against dense arithmetic done here."""

from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from data.packing import pack
from data.row_groups import ParquetDataset
from data.sequence import Completion, TextSegment, given_completion
from data.thinkmorph import parse_row
from data.visual_thoughts import CONTROLS, show_thoughts
from data.worlds.writer import write_spatial_navigation
from modeling import load_bagel, save_bagel
from scripts.visual_opsd.analysis import diagnosis as module
from scripts.visual_opsd.analysis.baseline import load_divergences, read_baseline
from scripts.visual_opsd.analysis.figures import pick_rows
from scripts.visual_opsd.analysis.kl_measurement import DiagnosticRow, attach, choose_rows, measure
from scripts.visual_opsd.analysis.kl_statistics import (
    COLUMNS,
    SampleDivergences,
    describe,
    gap_closed,
    go_test,
)
from scripts.visual_opsd.config import PromptSettings
from scripts.visual_opsd.evaluation.rows import RowName
from scripts.visual_opsd.kl_diagnostic import main
from scripts.visual_opsd.rows import make_builder
from tests.conftest import TINY_BAGEL, needs_gpu
from tests.data.synthetic import split_file, write_dataset
from tests.visual_opsd.analysis.two_rank_tools import two_ranks

ROWS = 6
SEED = 5
SETTINGS = PromptSettings(vit_max_size=112, vit_min_size=14)
SMALL = [f"--{name}={value}" for name, value in
         {"vit_max_size": 112, "vit_min_size": 14, "num_samples": ROWS, "seed": SEED,
          "sample_max_new_tokens": 40, "sample_batch_size": 4, "pack_tokens": 700,
          "device": "cpu", "progress": False, "figures": False}.items()]  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    folder = write_spatial_navigation(
        root, rows=9, heldout_rows=0, seed=3, sizes=(3, 4), style="full"
    )
    split_file(folder, "train", 1)
    return root


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint, moved a little."""
    bundle = load_bagel(TINY_BAGEL)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in bundle.model.named_parameters():
            if "lm_head" in name or "layers.2" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    out = tmp_path_factory.mktemp("trained") / "student"
    save_bagel(bundle.model, out, base=TINY_BAGEL)
    return out


def arguments(world: Path, out: Path, *flags: str) -> list[str]:
    return ["--data", "Spatial_Navigation", "--data_root", str(world), "--output_dir", str(out),
            *SMALL, *flags]  # fmt: skip


def run(world: Path, out: Path, *flags: str, model: Path = TINY_BAGEL) -> dict[str, Any]:
    assert main(["--model_path", str(model), *arguments(world, out, *flags)]) == 0
    return json.loads((out / "kl_diagnostic.json").read_text())


@pytest.fixture(scope="module")
def baseline(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("diagnostic") / "base"
    run(world, out, "--figures")
    return out


def completions(out: Path, name: str = "completions") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]


def dense(bundle: Any, context: Any, line: dict[str, Any]) -> Tensor:
    """Float64 log-probabilities (rows, V) of the scored labels, one sequence without packing."""
    ids, scored = line["ids"], line["scored"]
    with torch.no_grad():
        hidden = bundle.model(pack([(*context, TextSegment(tuple(ids)))], bundle.special_tokens))
        logits = bundle.model.language_model.lm_head(hidden).double()
    first = len(hidden) - len(ids) - 2  # the row of the completion's <|im_start|>
    rows = [first + i for i, flag in enumerate(scored) if flag]
    return logits[rows].log_softmax(-1)


def check_columns(
    world: Path, lines: list[dict[str, Any]], samples: list[SampleDivergences], student: Path
) -> None:
    """Every column of some samples against definitions written out here."""
    base, other = load_bagel(TINY_BAGEL), load_bagel(student)
    builder = make_builder(base.tokenizer, base.config, SETTINGS)
    files = sorted((world / "Spatial_Navigation" / "data").glob("train-*.parquet"))
    dataset = ParquetDataset("Spatial_Navigation", files)
    for line, sample in list(zip(lines, samples, strict=True))[:3]:
        read = dataset.read_row(line["index"], line["index"])
        row = parse_row(read)
        prompt = builder.student(row)
        log_s = dense(other, prompt, line)
        for name in ("real", *sample.controls):
            shown = show_thoughts(name, read, row, SEED)
            log_t = dense(base, builder.teacher(row, prompt, shown), line)
            t, s = log_t.exp(), log_s.exp()
            m = ((t + s) / 2).log()
            kl = (t * (log_t - log_s)).sum(-1)
            jsd = ((t * (log_t - m)).sum(-1) + (s * (log_s - m)).sum(-1)) / 2
            assert len(kl) == sample.answer.size > 5
            for column, expected in ((f"kl_{name}", kl), (f"jsd_{name}", jsd)):
                actual = torch.from_numpy(sample.columns[column]).double()
                torch.testing.assert_close(actual, expected, atol=2e-5, rtol=2e-4)
            if name == "real":
                entropy = torch.from_numpy(sample.columns["teacher_entropy"]).double()
                torch.testing.assert_close(entropy, -(t * log_t).sum(-1), atol=2e-5, rtol=2e-4)
        entropy = torch.from_numpy(sample.columns["student_entropy"]).double()
        torch.testing.assert_close(entropy, -(s * log_s).sum(-1), atol=2e-5, rtol=2e-4)


# ---------------------------------------------------------------------------------- end to end


def test_baseline_matches_dense_arithmetic(baseline: Path, world: Path) -> None:
    lines, samples = completions(baseline), load_divergences(baseline, "base")
    check_columns(world, lines, samples, TINY_BAGEL)
    result = json.loads((baseline / "kl_diagnostic.json").read_text())
    assert result["is_baseline"] and result["own_samples"] is None
    assert [line["index"] for line in lines] == choose_rows([9], [9.0], ROWS, SEED)
    kl = np.concatenate([s.columns["kl_real"] for s in samples]).astype(np.float64)
    held = result["base"]["all"]
    assert (held["rows"], held["samples"]) == (kl.size, ROWS)
    assert held["real"]["kl"]["mean"] == pytest.approx(kl.mean())
    assert held["real"]["kl"]["median"] == pytest.approx(np.median(kl))
    assert held == result["base"]["tasks"]["Spatial_Navigation"]["all"]
    assert held["noise"]["kl"]["mean"] != held["real"]["kl"]["mean"]
    assert "4.64" in result["note"]
    # Sampled completions at temperature 1: the scored rows include the ends that were sampled.
    assert any(line["scored"][-1] for line in lines)
    assert all(sum(x["scored"]) == s.answer.size for x, s in zip(lines, samples, strict=True))
    for name in ("kl_distribution", "token_heatmap"):
        with Image.open(baseline / f"{name}.png") as picture:
            assert min(picture.size) > 150
            assert len(np.unique(np.asarray(picture.convert("L")))) > 20


def test_further_controls_are_further_columns(
    baseline: Path, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The columns of all kinds by hand; those that stand without the flag are the same."""
    out = tmp_path / "all"
    result = run(world, out, "--controls", "none, other,blank,shuffled,problem")
    lines, samples = completions(out), load_divergences(out, "base")
    assert lines == completions(baseline)
    assert samples[0].controls == list(CONTROLS)
    check_columns(world, lines, samples, TINY_BAGEL)
    for sample, before in zip(samples, load_divergences(baseline, "base"), strict=True):
        assert before.controls == ["noise"]
        for name in COLUMNS:
            np.testing.assert_allclose(sample.columns[name], before.columns[name], atol=1e-6)
    figures = result["base"]["all"]
    means = [figures[kind]["kl"]["mean"] for kind in ("real", *CONTROLS)]
    assert len(set(means)) == 7
    gap = figures["real"]["kl"]["sample_mean"] - figures["other"]["kl"]["sample_mean"]
    assert figures["difference_other"]["kl"]["mean"] == pytest.approx(gap)
    header = capsys.readouterr().out.splitlines()
    assert any(all(f"{kind} VT" in line for kind in CONTROLS) for line in header)
    with pytest.raises(ValueError, match=r"controls: saved '\(absent\)', now"):
        run(world, tmp_path / "after", "--baseline", str(baseline), "--controls", "other")
    with pytest.raises(ValueError, match="unknown controls nois: choose from noise, other"):
        run(world, tmp_path / "after", "--controls", "nois")
    with pytest.raises(ValueError, match="--controls none shows no picture"):
        run(world, tmp_path / "after", "--controls", "none", "--teacher_vt", "vae+vit")


def test_base_closes_no_gap(baseline: Path, world: Path, tmp_path: Path) -> None:
    result = run(world, tmp_path / "again", "--baseline", str(baseline))
    assert not result["is_baseline"]
    for name in ("kl", "jsd"):
        assert result["gap_closed"][name]["value"] == pytest.approx(0.0, abs=1e-6)
    assert result["gap_closed_own_samples"] is None  # its own samples are the baseline's
    assert completions(tmp_path / "again") == completions(baseline)


def test_trained_student_on_the_bases_tokens(
    baseline: Path, world: Path, trained: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "student"
    flags = ("--base_path", str(TINY_BAGEL))
    result = run(world, out, *flags, "--baseline", str(baseline), model=trained)
    table = capsys.readouterr().out
    student = load_divergences(out, "student")
    check_columns(world, completions(baseline), student, trained)
    assert completions(out) == completions(baseline)
    assert result["base"] == json.loads((baseline / "kl_diagnostic.json").read_text())["base"]
    base = load_divergences(baseline, "base")
    for kind in ("kl", "jsd"):
        before, after = (
            sum(s.columns[f"{kind}_real"].astype(np.float64).sum() for s in side)
            for side in (base, student)
        )
        assert result["gap_closed"][kind]["value"] == pytest.approx(1 - after / before)
        assert abs(1 - after / before) > 0.005  # the student did move
        assert result["gap_closed"][kind]["se"] > 0
    # Second column: the student's own samples, scored by the same teacher.
    own = completions(out, "own_completions")
    assert any(a["ids"] != b["ids"] for a, b in zip(own, completions(out), strict=True))
    check_columns(world, own, load_divergences(out, "own"), trained)
    assert result["own_samples"]["all"]["rows"] == sum(sum(line["scored"]) for line in own)
    for text in ("gap closed (same tokens): KL", "student, own samples", "4.64 nats", "GO"):
        assert text in table

    # Without a baseline the same run measures the base itself, and agrees.
    alone = run(world, tmp_path / "alone", *flags, model=trained)
    assert completions(tmp_path / "alone") == completions(baseline)
    for name, value in result["gap_closed"].items():
        assert alone["gap_closed"][name]["value"] == pytest.approx(value["value"], abs=1e-5)


def test_text_traces_have_their_answer_spans(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "trace"
    result = run(world, out, "--completions", "trace", "--go_threshold", "0")
    assert result["base"]["answer"]["samples"] == ROWS
    tokenizer = load_bagel(TINY_BAGEL).tokenizer
    for line, sample in zip(completions(out), load_divergences(out, "base"), strict=True):
        assert line["text"].startswith("<think>")
        answer = line["text"].split("<answer>")[1].split("</answer>")[0]
        labels = [*line["ids"], tokenizer.eos_token_id]
        marked = [i for i, inside in zip(labels, sample.answer, strict=True) if inside]
        assert answer in tokenizer.decode(marked)
        assert len(tokenizer.decode(marked)) <= len(answer) + 3  # at most ">" and "</" beside it
    test = result["go_test"]
    spans = [s.columns["kl_real"][s.answer] for s in load_divergences(out, "base")]
    noise = [s.columns["kl_noise"][s.answer] for s in load_divergences(out, "base")]
    gaps = np.array([a.mean() - b.mean() for a, b in zip(spans, noise, strict=True)])
    assert test["answer_kl_real"] == pytest.approx(np.concatenate(spans).mean(), rel=1e-5)
    assert test["difference"] == pytest.approx(gaps.mean(), rel=1e-4)
    assert test["standard_error"] == pytest.approx(gaps.std(ddof=1) / math.sqrt(ROWS), rel=1e-4)
    assert result["go"] == (gaps.mean() > 2 * gaps.std(ddof=1) / math.sqrt(ROWS))
    assert result["own_samples"] is None
    assert not list(out.glob("*.png"))  # --figures False


def test_tasks_from_a_dataset_config(tmp_path: Path) -> None:
    for name, rows in (("Chart_Refocus", 4), ("Visual_Search", 2)):
        write_dataset(tmp_path, name, rows=rows)
    config = tmp_path / "sets.yaml"
    config.write_text("datasets: [{name: Chart_Refocus, weight: 2}, {name: Visual_Search}]")
    out = tmp_path / "out"
    main(["--model_path", str(TINY_BAGEL), "--dataset_config_file", str(config), "--data_root",
          str(tmp_path), "--output_dir", str(out), *SMALL, "--num_samples", "3"])  # fmt: skip
    tasks = json.loads((out / "kl_diagnostic.json").read_text())["base"]["tasks"]
    assert {name: task["all"]["samples"] for name, task in tasks.items()} == {
        "Chart_Refocus": 2, "Visual_Search": 1,
    }  # fmt: skip


# --------------------------------------------------------------------------------- on a GPU


@needs_gpu
@pytest.mark.parametrize(("precision", "atol", "rtol"), [("fp32", 1e-4, 1e-3), ("auto", 0.2, 0.3)])
def test_a_gpu_measures_alike(
    world: Path, tmp_path: Path, precision: str, atol: float, rtol: float
) -> None:
    """Given texts, so that all score the same tokens; auto is bf16 there."""
    given = ("--completions", "trace")
    run(world, tmp_path / "cpu", *given)
    gpu = run(world, tmp_path / "gpu", *given, "--device", "cuda", "--precision", precision)
    assert gpu["device"] == "cuda"
    sides = (load_divergences(tmp_path / side, "base") for side in ("gpu", "cpu"))
    for ours, theirs in zip(*sides, strict=True):
        for name in COLUMNS:
            np.testing.assert_allclose(
                ours.columns[name], theirs.columns[name], atol=atol, rtol=rtol
            )


@needs_gpu
@pytest.mark.parametrize(
    ("local_ranks", "message"),
    [((0, 1), "rank 1 has no GPU"), ((0, 0), "ranks 0 and 1 share one GPU")],
)
def test_two_ranks_on_one_gpu_are_refused(
    world: Path, tmp_path: Path, local_ranks: tuple[int, int], message: str
) -> None:
    """Both at once: neither waits for the other."""
    flags = ["--model_path", str(TINY_BAGEL), *arguments(world, tmp_path / "out")]
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    codes, outputs = two_ranks(
        {"kl_diagnostic": [*flags, "--device", "cuda"]},
        tmp_path / "done",
        local_ranks,
        CUDA_VISIBLE_DEVICES=first,
    )
    assert codes == [1, 1], outputs
    assert all(message in output for output in outputs), outputs


# ---------------------------------------------------------------------------------- errors


def test_a_baseline_must_fit(baseline: Path, world: Path, trained: Path, tmp_path: Path) -> None:
    def expect(
        message: str, *flags: str, folder: Path = baseline, model: Path = TINY_BAGEL
    ) -> None:
        with pytest.raises(ValueError, match=message):
            run(world, tmp_path / "out", "--baseline", str(folder), *flags, model=model)
        assert not (tmp_path / "out").exists()

    expect(r"measured with other settings \(seed: saved 5, now 6\)", "--seed", "6")
    expect("num_samples: saved 6, now 2.*seed", "--num_samples", "2", "--seed", "6")
    expect("vit: .*14.*28", "--vit_min_size", "28")
    expect("base: ", model=trained)  # without --base_path the trained student is its own teacher
    expect("finished diagnostic", folder=tmp_path / "none")
    expect("is the --baseline, which other runs need", folder=tmp_path / "out")

    edited = tmp_path / "edited"
    shutil.copytree(baseline, edited)
    lines = completions(edited)
    lines[1]["ids"][0] += 1
    (edited / "completions.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    expect("token ids or rows differ", folder=edited)
    (edited / "completions.jsonl").unlink()
    expect(r"completions\.jsonl does not exist", folder=edited)
    shutil.copy(baseline / "completions.jsonl", edited)
    (edited / "divergences.npz").write_bytes((baseline / "divergences.npz").read_bytes()[:300])
    expect(r"divergences\.npz is damaged", folder=edited)

    held = json.loads((baseline / "kl_diagnostic.json").read_text())["identity"]
    found = read_baseline(baseline, held)
    name = RowName("Spatial_Navigation", "train.parquet", 0, "p", "another digest")
    with pytest.raises(ValueError, match=r"pid p\) is not the row"):
        found.completion(found.indices[0], name)


def test_results_of_other_settings_are_refused_before_the_model_is_read(
    baseline: Path, world: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "load_bagel", lambda *_, **__: pytest.fail("the model was read"))
    out = tmp_path / "out"
    shutil.copytree(baseline, out)
    held = (out / "kl_diagnostic.json").read_bytes()
    for message, flags, model in (
        ("seed: saved 5, now 6", ("--seed", "6"), TINY_BAGEL),
        ("student: saved", ("--base_path", str(TINY_BAGEL)), trained),
        (r"baseline: saved None, now '\w+'", ("--baseline", str(baseline)), TINY_BAGEL),
    ):
        with pytest.raises(ValueError, match=rf"other settings \({message}.*--overwrite"):
            run(world, out, *flags, model=model)
    (out / "rows.jsonl").unlink()  # as a version wrote it that kept no records
    (out / "settings.json").unlink()
    with pytest.raises(ValueError, match=r"settings\.json does not exist; .*--overwrite"):
        run(world, out)
    assert (out / "kl_diagnostic.json").read_bytes() == held
    with pytest.raises(ValueError, match=r"--output_dir .*\.json/x: cannot write there"):
        run(world, out / "kl_diagnostic.json" / "x")


def test_other_tokenizers_are_refused_before_the_model_is_read(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "load_bagel", lambda *_, **__: pytest.fail("the model was read"))
    other = tmp_path / "other"
    shutil.copytree(TINY_BAGEL, other)
    weights = other / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    loaded = module.load_tokenizer

    def another(folder: Path) -> Any:
        tokenizer, special = loaded(folder)
        tokenizer.add_tokens(["quite another"])
        return tokenizer, special

    monkeypatch.setattr(module, "load_tokenizer", another)
    with pytest.raises(ValueError, match="have different tokenizers, so their distributions"):
        run(world, tmp_path / "out", "--base_path", str(TINY_BAGEL), model=other)


def test_user_mistakes(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def expect(message: str, *flags: str, model: Path = TINY_BAGEL) -> None:
        with pytest.raises(ValueError, match=message):
            run(world, tmp_path / "out", *flags, model=model)

    expect("checkpoint folder .*nowhere does not exist", model=Path("nowhere"))
    expect("checkpoint folder .*nowhere does not exist", "--base_path", "nowhere")
    expect("unknown dataset 'Nothing'", "--data", "Nothing")
    expect("dataset config .*absent.yaml does not exist", "--data", "none",
           "--dataset_config_file", "absent.yaml")  # fmt: skip
    expect("--num_samples must be at least 1 and at most 1000000000, got 0", "--num_samples", "0")
    expect("leaves no room|max_forward_tokens", "--max_forward_tokens", "20")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    expect("torch sees no GPU", "--device", "cuda")
    write_dataset(
        tmp_path, "Blank", rows=4, change=lambda i: {"reasoning_image_0": None} if i else {}
    )
    expect("3 of 4 rows cannot be used: 3 no_visual_thought", "--data", str(tmp_path / "Blank"))


# ---------------------------------------------------------------------------------- parts


def test_same_model_and_context_differ_by_nothing() -> None:
    bundle = load_bagel(TINY_BAGEL)
    builder = make_builder(bundle.tokenizer, bundle.config, SETTINGS)
    contexts = [
        builder.question(Image.new("RGB", (28, 42), (9 * i, 99, 7)), "Why? " * (i + 1))
        for i in range(3)
    ]
    rows = [
        DiagnosticRow(RowName("D", "f", i, str(i), ""), c, c, {"noise": c}, None)
        for i, c in enumerate(contexts)
    ]
    ends = [given_completion(builder.encode("<answer>12</answer> " * n)) for n in (1, 2)]
    nothing = Completion((), (False,), capped=True)  # capped before its first token was whole
    scored = [attach(i, rows[i], c, 500) for i, c in enumerate([ends[0], nothing, ends[1]])]
    found = measure(bundle, [bundle.model], scored, pack_tokens=64, device=torch.device("cpu"))[0]
    assert [s.answer.size for s in found] == [ends[0].count, 0, ends[1].count]
    for sample in found:
        for name in COLUMNS[:4]:
            assert np.abs(sample.columns[name]).max(initial=0.0) < 1e-6
    # Cut to what fits, for all contexts alike: the last label is no longer scored.
    room = max(s.length for s in scored) - 3
    cut = attach(2, rows[2], ends[1], room)
    assert cut.completion.ids == ends[1].ids[:-3]
    assert cut.completion.count == len(cut.completion.ids)


def samples_of(*values: tuple[list[float], list[float], list[int]]) -> list[SampleDivergences]:
    """Samples of (KL real, KL noise, answer flags); JSD is a tenth of the KL."""
    made = []
    for real, noise, answer in values:
        base = {"kl_real": real, "kl_noise": noise}
        columns = {name: np.array(base.get(name, base["kl_real"])) for name in COLUMNS}
        columns["jsd_real"], columns["jsd_noise"] = np.array(real) / 10, np.array(noise) / 10
        made.append(SampleDivergences(columns, np.array(answer, dtype=bool)))
    return made


def test_figures_by_hand() -> None:
    base = samples_of(
        ([1.0, 2.0, 3.0], [0.5, 1.0, 0.0], [0, 1, 1]),
        ([4.0], [4.0], [0]),
        ([0.0, 5.0], [1.0, 1.0], [0, 1]),
    )
    figures = describe(base, ["a", "b", "a"])
    kl = figures["all"]["real"]["kl"]
    assert (kl["mean"], kl["median"], kl["max"]) == (2.5, 2.5, 5.0)
    assert kl["top5_share"] == pytest.approx(5 / 15)
    assert kl["sample_mean"] == pytest.approx((2.0 + 4.0 + 2.5) / 3)
    assert figures["answer"]["rows"] == 3
    assert figures["answer"]["samples"] == 2
    assert figures["answer"]["real"]["kl"]["mean"] == pytest.approx(10 / 3)
    # Per sample: 2.5 - 0.5 and 5 - 1.
    assert figures["answer"]["difference"]["kl"] == {"mean": 3.0, "se": 1.0}
    assert figures["tasks"]["b"]["answer"]["real"]["kl"]["mean"] is None
    assert figures["tasks"]["a"]["all"]["real"]["kl"]["mean"] == pytest.approx(11 / 5)

    test = go_test(figures, 0.05)
    assert test["go"] and test["above_threshold"] and test["above_noise"]
    assert not go_test(figures, 4.0)["go"]
    near = go_test(describe([*base, *samples_of(([1.0], [6.0], [1]))], ["a"] * 4), 0.05)
    assert near["above_threshold"] and not near["above_noise"] and not near["go"]
    none = go_test(describe(samples_of(([1.0], [0.0], [0])), ["a"]), 0.05)
    assert not none["go"] and "no answer span" in none["why"]


@pytest.mark.parametrize(
    ("mean", "difference", "go"),
    [(0.2, 0.021, True), (0.2, 0.019, False), (0.2, -0.03, False), (0.05, 0.03, False)],
)
def test_go_wants_two_standard_errors(mean: float, difference: float, go: bool) -> None:
    answer = {
        "real": {"kl": {"mean": mean}},
        "noise": {"kl": {"mean": 0.1}},
        "difference": {"kl": {"mean": difference, "se": 0.01}},
        "samples": 9,
    }
    assert go_test({"answer": answer}, 0.05)["go"] is go


def test_gap_closed_by_hand() -> None:
    base = samples_of(([1.0, 3.0], [0, 0], [0, 1]), ([2.0], [0], [0]))
    student = samples_of(([0.5, 1.5], [0, 0], [0, 1]), ([1.6], [0], [0]))
    closed = gap_closed(base, student)
    assert closed["kl"]["value"] == pytest.approx(1 - 3.6 / 6.0)
    # Residuals a - 0.6 b of the samples: 2.0 - 2.4 and 1.6 - 1.2.
    deviation = math.sqrt(2 * 0.4**2)
    assert closed["kl"]["se"] == pytest.approx(deviation * math.sqrt(2) / 6.0)
    assert closed["answer_kl"]["value"] == pytest.approx(0.5)
    assert gap_closed(base, base)["jsd"]["value"] == pytest.approx(0.0)
    longer = samples_of(([1.0, 1.0, 1.0, 1.0], [0] * 4, [0] * 4))
    own = gap_closed(base, longer, paired=False)
    assert own["kl"] == {"value": pytest.approx(1 - 1.0 / 2.0), "se": None}
    assert own["answer_kl"] == {"value": None, "se": None}
    with pytest.raises(AssertionError):
        gap_closed(base[:1], [replace(base[1])])


def test_rows_are_drawn_by_weight() -> None:
    chosen = choose_rows([100, 50], [2.0, 1.0], 30, 1)
    assert chosen == sorted(set(chosen))
    assert sum(i < 100 for i in chosen) == 20
    assert chosen == choose_rows([100, 50], [2.0, 1.0], 30, 1)
    assert chosen != choose_rows([100, 50], [2.0, 1.0], 30, 2)
    assert choose_rows([3, 50], [1.0, 1.0], 13, 0)[:3] == [0, 1, 2]  # the small set gives all
    assert choose_rows([3, 2], [1.0, 5.0], 99, 0) == list(range(5))


def test_heatmap_picks_usable_rows_of_every_task() -> None:
    tasks = ["a", "a", "b", "a", "b"]
    assert pick_rows(tasks, [False, True, True, True, False], 3) == [1, 2, 3]
    assert pick_rows(tasks, [False] * 5, 3) == [0, 2, 1]
    assert pick_rows(tasks, [True] * 5, 99) == [0, 2, 1, 4, 3]
