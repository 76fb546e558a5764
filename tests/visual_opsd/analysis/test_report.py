# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The report of training runs: what it shows of a real run, what it makes of strangers' texts and
of damaged folders, and whether a browser is content with it."""

from __future__ import annotations

import base64
import errno
import io
import json
import logging
import math
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from modeling.release.tokenizer import load_tokenizer
from scripts.visual_opsd import report, train_visual_opsd
from scripts.visual_opsd.analysis.report.charts import Series, draw_chart, smoothed, thinned
from scripts.visual_opsd.analysis.report.figures import Figure, group_figures
from scripts.visual_opsd.analysis.report.markup import text
from scripts.visual_opsd.analysis.report.pictures import data_uri
from tests.visual_opsd.analysis.report_runs import (
    HOSTILE,
    Page,
    sample,
    write_evaluation,
    write_lines,
    write_run,
)
from tests.visual_opsd.training_runs import TINY_BAGEL, train_arguments

MOST_BYTES = 3_000_000
STEPS = [{"step": n, "loss": 1 / n, "lr": 1e-5} for n in range(1, 4)]


def make(tmp_path: Path, *words: Any) -> Page:
    out = tmp_path / "report.html"
    assert report.main([*map(str, words), "--out", str(out), "--overwrite"]) == 0
    assert out.stat().st_size <= MOST_BYTES
    return Page(out)


# ---------------------------------------------------------------------------- a real run


@pytest.fixture(scope="module")
def trained(world: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A run of two steps, and what says that it was a control."""
    real, noise = (tmp_path_factory.mktemp("runs") / name for name in ("real", "noise"))
    handler = signal.getsignal(signal.SIGTERM)
    try:
        arguments = train_arguments(world, real, total_steps=2, warmup_steps=1, save_every=2)
        assert train_visual_opsd.main(arguments) == 0
    finally:
        signal.signal(signal.SIGTERM, handler)
    shutil.copytree(real, noise, ignore=shutil.ignore_patterns("checkpoints"))
    config = (real / "config.yaml").read_text()
    (noise / "config.yaml").write_text(config.replace("noise_vt: false", "noise_vt: true"))
    return [real, noise]


def lines(run: Path, file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / file).read_text().splitlines()]


def pixels(uri: str) -> np.ndarray:
    data = base64.b64decode(uri.split(",", 1)[1])
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def test_what_it_shows_of_real_runs(world: Path, trained: list[Path], tmp_path: Path) -> None:
    page = make(tmp_path, *trained)
    # Curves: the last value of each run stands below its chart.
    for run in trained:
        loss = lines(run, "metrics.jsonl")[-1]["loss"]
        assert f"{run.name} {loss:.4g}" in page.text
    assert "Loss nats per scored token" in page.text
    assert "Divergence from the teacher, as configured: the same curves as Loss." in page.text
    # Settings: the control's one difference, and where both leave the defaults.
    assert re.search(r"setting real noise default noise_vt False True False The same", page.text)
    assert "sample_max_new_tokens 16 1024" in page.text
    assert "its teacher did not see these visual thoughts (noise)" in page.text
    # Pictures: those of the rows that the runs took, found in the files by their pid.
    files = [*world.glob("Spatial_Navigation/data/train*.parquet")]
    rows = {row["pid"]: row for file in files for row in pq.read_table(file).to_pylist()}
    taken = {record["row"] for record in lines(trained[0], "samples.jsonl")}
    shown = [pixels(found["src"]) for found in page.of("img")]
    for name in taken:
        row = rows[name.removeprefix("Spatial_Navigation/")]
        for column in ("problem_image_0", "reasoning_image_0"):
            wanted = np.asarray(Image.open(io.BytesIO(row[column]["bytes"])).convert("RGB"))
            assert any(np.array_equal(wanted, image) for image in shown), (name, column)
    assert len(shown) == 2 * len(taken) and len(taken) == 4
    assert {found["alt"] for found in page.of("img")} == {"problem image", "visual thought"}


def test_another_rows_pictures_are_not_shown(trained: list[Path], tmp_path: Path) -> None:
    run = tmp_path / "renamed"
    shutil.copytree(trained[1], run)
    samples = [{**r, "row": f"{r['row']}x"} for r in lines(run, "samples.jsonl")]
    write_lines(run / "samples.jsonl", samples)
    assert make(tmp_path, run).of("img") == []
    assert make(tmp_path, trained[1]).of("img") != []


def test_tokens_carry_what_the_sampler_gave_them(trained: list[Path], tmp_path: Path) -> None:
    page = make(tmp_path, trained[0], "--steps", "2")
    tokenizer, _ = load_tokenizer(TINY_BAGEL)
    said = [r for r in lines(trained[0], "samples.jsonl") if r["step"] == 2]
    assert "Step 2" in page.text and "Step 1" not in page.text
    titled = [found for found in page.of("b") if "title" in found]
    spoken = [float(found["title"].split(",")[0].removeprefix("p = ")) for found in titled]
    shades = [
        next((name for name in found.get("class", "").split() if name[0] == "t"), "")
        for found in titled
    ]
    wanted = []
    for record in said:
        # Here no character is spread over tokens but what decodes to replacement marks.
        assert len(record["logprobs"]) == record["scored"].count("1")
        wanted += record["logprobs"]
    assert spoken and all(any(abs(p - math.exp(w)) < 0.006 for w in wanted) for p in spoken)
    assert set(shades) <= {"", "t1", "t2", "t3", "t4", "t5"}
    for chance, shade in zip(spoken, shades, strict=True):
        rank = sum(chance < limit for limit in (0.01, 0.05, 0.2, 0.5, 0.9))
        # At a limit the two digits of the title do not tell.
        near = any(abs(chance - limit) < 0.005 for limit in (0.01, 0.05, 0.2, 0.5, 0.9))
        assert near or shade == (f"t{rank}" if rank else "")
    assert all(", D = " in found["title"] for found in titled)  # a measured step
    for record in said:
        head = tokenizer.decode(record["ids"][:3])
        assert "".join(head.split())[:2] in "".join(page.text.split())


def test_several_completions_of_a_row(tmp_path: Path) -> None:
    many = [sample(1, number=n, completion=f"said {n}", given=n == 1) for n in range(5)]
    page = make(tmp_path, write_run(tmp_path / "a", STEPS, samples=many))
    assert [n for n in range(5) if f"said {n}" in page.text] == [0, 1, 2]
    assert "completion 2, 2 tokens, the data set's text" in page.text
    assert page.text.count("maze/1") == 1


# ---------------------------------------------------------------------------- strangers' texts


def test_no_text_of_a_run_becomes_markup(tmp_path: Path) -> None:
    name = '<img src=x onerror="alert(1)">'
    settings = {"lr": HOSTILE, HOSTILE: 1, "model_path": HOSTILE, "data_root": HOSTILE,
                "dataset_config_file": HOSTILE, "global_batch_size": 4, "data_seed": 1}  # fmt: skip
    metrics: list[dict[str, Any]] = [*STEPS, {"step": 9, HOSTILE: 1.0}]
    metrics.append({"step": 10, HOSTILE: 2.0, "save_error": HOSTILE})
    metrics.append({"step": 11, "loss": "nan", "nonfinite": 1})
    texts: dict[str, Any] = dict.fromkeys(
        ("row", "question", "answer", "completion", "tokens"), HOSTILE
    )
    figures: dict[str, Any] = {
        "divergence": [HOSTILE] * 3,
        "fork": HOSTILE,
        "student_entropy": {HOSTILE: 1},
    }
    words = [sample(1, **texts), sample(2, **figures)]
    run = write_run(tmp_path / name, metrics, settings, words)
    other = write_run(tmp_path / "other", STEPS, {"lr": 1}, [sample(1, ids="x", logprobs=5)])
    tasks = {HOSTILE: write_evaluation_figures(), "b": write_evaluation_figures()}
    arm = write_evaluation(tmp_path / "e" / name, 5, tasks=tasks, settings={"context": HOSTILE})
    page = make(tmp_path, run, other, "--evaluations", arm)
    raw = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "alert(1)" in page.text and "[U+202E]" in page.text and "[U+DCFF]" in page.text
    assert not set("\"'<>") & set(text(HOSTILE)) and len(text("x" * 9999)) < 2100
    assert len(page.of("script")) == 1 and not any(c in raw for c in "\0\u202e")
    for tag, attributes in page.elements:
        assert not any(key.startswith("on") for key in attributes), (tag, attributes)
        assert attributes.get("href", "#").startswith("#")
        assert attributes.get("src", "data:image/").startswith("data:image/")
    assert {tag for tag, _ in page.elements} <= {
        "html", "head", "meta", "title", "style", "body", "header", "h1", "nav", "a", "form", "b",
        "label", "input", "span", "i", "main", "section", "h2", "h3", "p", "div", "table",
        "caption", "thead", "tbody", "tr", "th", "td", "code", "details", "summary", "figure",
        "figcaption", "svg", "path", "g", "text", "circle", "article", "s", "script", "fieldset",
        "legend",
    }  # fmt: skip
    (policy,) = page.of("meta", **{"http-equiv": "Content-Security-Policy"})
    assert policy["content"].startswith("default-src 'none'; img-src data:;")
    style, script = ("".join(d for tag, d in page.texts if tag == t) for t in ("style", "script"))
    assert not re.search(r"//|@import|url\(", style)
    assert not re.search(r"https?:|fetch|import|innerHTML|eval|XMLHttp", script)
    assert "1 logged steps were skipped" in page.text
    assert "Without colours" in page.text and "No pictures." in page.text


def write_evaluation_figures() -> dict[str, Any]:
    return {"n": 2, "accuracy": 0.5, "interval": [0, 1], "lenient_accuracy": 0.5, "mean_tokens": 3,
            "cap_rate": 0}  # fmt: skip


# ---------------------------------------------------------------------------- curves


def heights(markup: str, run: int) -> list[list[tuple[int, float]]]:
    """The pieces of a run's line, heights turned back into values."""
    scale, offset = map(float, re.findall(r'data-y="(\S+) (\S+)"', markup)[0])
    group = markup.split(f'data-run="{run}"')[1].split("</g>")[0]
    path = re.findall(r' data-line transform="[^"]*" d="([^"]*)"', group)[0]
    pieces = [piece.split("L") for piece in path.split("M")[1:]]
    pairs = [[point.split(",") for point in piece] for piece in pieces]
    return [[(int(s), (float(h) - offset) / scale) for s, h in piece] for piece in pairs]


def test_curves_hold_the_values() -> None:
    points = [(1, 0.5), (2, 0.25), (4, math.nan), (5, 0.125), (9, math.inf), (10, 0.001)]
    markup = draw_chart(Figure("x", "X", "%"), [Series(3, "run", points)], 1, 100)
    found = heights(markup, 3)
    assert [[step for step, _ in piece] for piece in found] == [[1, 2], [5], [10]]
    values = [value for piece in found for _, value in piece]
    assert values == pytest.approx([0.5, 0.25, 0.125, 0.001], abs=1e-5)
    assert 'class="line"' in markup and markup.count("<circle") == 4 and ">40 %<" in markup
    # Three powers of ten: the axis is logarithmic, and what has no logarithm breaks the line.
    steep = [(n, 10.0**-n) for n in range(5)]
    markup = draw_chart(Figure("x", "X"), [Series(0, "a", steep)], 1, 100)
    (line,) = heights(markup, 0)
    assert "log scale" in markup and 'data-log="1"' in markup
    assert [v for _, v in line] == pytest.approx([-float(n) for n in range(5)], abs=1e-4)
    # So is the numbers' length at the axis, where few digits would not tell them apart.
    mass = [(1, 0.99999), (2, 1.0)]
    markup = draw_chart(Figure("x", "X", "%"), [Series(0, "a", mass)], 1, 100)
    labels = re.findall(r"<text class=y [^>]*>([^<]*)<", markup)
    assert len(set(labels)) == len(labels) > 2 and labels[-1] == "100 %"
    # A run without a finite value does not spoil the others; without any there is no chart.
    nothing = Series(1, "b", [(1, math.nan)])
    assert heights(draw_chart(Figure("x", "X"), [Series(0, "a", points), nothing], 1, 9), 1) == []
    assert draw_chart(Figure("x", "X"), [nothing], 1, 9) == ""
    # Tiny differences beside a large constant, and a single point, are drawn within the frame.
    for odd in ([(1, 1e9), (2, 1e9 + 1)], [(7, 0.0)], [(7, -5.0)], [(7, 1e308), (8, -1e308)]):
        drawn = draw_chart(Figure("x", "X"), [Series(0, "a", odd)], 1, 9)
        path = re.findall(r' data-line transform="[^"]*" d="([^"]*)"', drawn)[0]
        assert all(0 <= float(pair.split(",")[1]) <= 190 for pair in re.split("[ML]", path)[1:])


def test_long_runs_are_thinned_and_smoothed() -> None:
    points = [(n, float(n % 2)) for n in range(1, 1001)]
    short = thinned(points, 100)
    assert len(short) == 100 and short[-1][0] == 1000 and {v for _, v in short} == {0.5}
    assert thinned(points[:100], 100) == points[:100]
    smooth = smoothed(points)
    assert [s for s, _ in smooth] == [s for s, _ in points]
    assert all(abs(v - 0.5) < 0.02 for _, v in smooth[25:-25]) and smooth[0] == points[0]
    line = [(n, float(n)) for n in range(50)]
    assert smoothed(line) == line  # no lag, at the ends neither
    markup = draw_chart(Figure("x", "X"), [Series(0, "a", points)], 1, 100)
    assert 'class="raw"' in markup and "class=line" in markup
    assert len(heights(markup, 0)[0]) == 100


def test_intervals_and_figures_nobody_listed(tmp_path: Path) -> None:
    names = {"loss", "eval/accuracy", "eval/accuracy_low", "eval/accuracy_high", "guard/gain",
             "clip/entry_share", "strange", "rows_read"}  # fmt: skip
    groups, left_out = group_figures(names)
    found = {group.title: [figure.name for figure in group.figures] for group in groups}
    assert found == {
        "What is minimised": ["loss"], "Validation": ["eval/accuracy"],
        "Teacher guard": ["guard/gain"], "Clip": ["clip/entry_share"],
        "Further figures": ["strange"],
    }  # fmt: skip
    assert left_out == 0 and group_figures({f"f{n}" for n in range(50)})[1] == 10
    ours = {"validation/accuracy", "validation/low", "validation/high", "validation/n"}
    ((validation,), _) = group_figures(ours)
    (figure,) = validation.figures
    assert (figure.low, figure.high) == ("validation/low", "validation/high")
    metrics = [
        {"step": n, "eval/accuracy": n / 10, "eval/accuracy_low": n / 10 - 0.05,
         "eval/accuracy_high": n / 10 + 0.05, "empty_rate": 0.0} for n in (1, 5, 9)
    ]  # fmt: skip
    for line in list(metrics):  # a validation is a line of its own, the first before any step
        at = {"step": line["step"] - 1, "validation/accuracy": line["step"] / 20}
        metrics.append({**at, "validation/low": 0.01, "validation/high": 0.5, "validation/n": 8})
    page = make(tmp_path, write_run(tmp_path / "a", metrics))
    bands = page.of("path", **{"class": "band"})
    assert [band["d"].count("L") for band in bands] == [5, 5]
    assert "step 8: a 45 %" in page.text and "validation/" not in page.text
    assert "eval/accuracy" in page.text and "eval/accuracy_low" not in page.text
    assert "step 9: a 90 %" in page.text
    assert "Empty: 0 % at every step." in page.text


def test_later_figures_stand_where_they_belong() -> None:
    length = {f"completion_length_{end}" for end in ("p10", "p50", "p90", "max")}
    ends = ("accuracy", "accuracy_low", "accuracy_high", "advantage", "dropped")
    teacher = {f"validation/teacher_{end}" for end in ends}
    names = {
        *length, *teacher, "validation/kl", "validation/other", "clip_odd", "clipper", "fork_rate",
        "topk_overlap", "leak_rate", "mfu", "gpu_odd_gb", "teacher_odd", "tokens_per_s/x",
        "clip_token_rate",
        "divergence_decile/3", "grad_p10", "grad_p50", "grad_p90", "only_p10",
    }  # fmt: skip
    groups, _ = group_figures(names)
    assert {group.title: [figure.name for figure in group.figures] for group in groups} == {
        "Validation": ["validation/kl", "validation/teacher_advantage", "validation/other"],
        "Teacher guard": ["validation/teacher_accuracy", "validation/teacher_dropped"],
        "Completions": ["completion_length_p50", "completion_length_max", "leak_rate"],
        "Teacher and student": ["divergence_decile", "fork_rate", "topk_overlap", "teacher_odd"],
        "Clip": ["clip_token_rate", "clip_odd"],
        "Further figures": ["clipper", "grad_p50", "only_p10"],
        "Machine": ["mfu", "gpu_odd_gb", "tokens_per_s/x"],
    }
    found = {figure.name: figure for group in groups for figure in group.figures}
    for name, low, high in (
        (
            "validation/teacher_accuracy",
            "validation/teacher_accuracy_low",
            "validation/teacher_accuracy_high",
        ),
        ("completion_length_p50", "completion_length_p10", "completion_length_p90"),
        ("grad_p50", "grad_p10", "grad_p90"),
    ):
        assert (found[name].low, found[name].high) == (low, high)
    assert all(found[name].is_share for name in ("mfu", "fork_rate", "topk_overlap", "leak_rate"))


def test_divergence_along_a_completion(tmp_path: Path) -> None:
    """The means of the first, the middle and the last tenth of the logged steps, to scale."""
    metrics: list[dict[str, Any]] = [
        {"step": n, **{f"divergence_decile/{d}": d + n / (100 if d else 1e6) for d in range(10)}}
        for n in range(1, 31)
    ]
    metrics[29]["divergence_decile/4"] = "nan"
    page = make(tmp_path, write_run(tmp_path / "a", metrics))
    (chart,) = page.of("svg", role="img")
    assert chart["data-axis"] == "tenth"
    ages = [g for g in page.of("g") if g["data-run"] == "0"]
    assert [(g["class"], g["data-note"]) for g in ages] == [
        ("r0 early", "step 1 to 3"), ("r0 middle", "step 15 to 17"), ("r0", "step 28 to 30"),
    ]  # fmt: skip
    scale, offset = map(float, chart["data-y"].split())
    for line, middle in zip(page.of("path", **{"class": "line"}), (2, 16, 29), strict=True):
        pairs = [pair.split(",") for pair in re.split("[ML]", line["d"])[1:]]
        assert [int(tenth) for tenth, _ in pairs] == list(range(1, 11))
        for (_, height), tenth in zip(pairs, range(10), strict=True):
            is_short = middle == 29 and tenth == 4  # the last step has no finite value there
            wanted = tenth + (28.5 if is_short else middle) / (100 if tenth else 1e6)
            assert (float(height) - offset) / scale == pytest.approx(wanted, abs=1e-3)
    assert "dotted: early, dashed: mid-run" in page.text
    assert "tenth 10: a, step 1 to 3 9.02 a, step 15 to 17 9.16 a, step 28 to 30 9.29" in page.text
    assert "divergence decile" not in page.text and len(page.of("circle")) == 10
    # Of many runs only the last steps are drawn, as are those of a run of two.
    runs = [write_run(tmp_path / str(n), metrics[: 30 + n]) for n in range(5)]
    assert len(make(tmp_path, *runs).of("g")) == 5
    assert len(make(tmp_path, write_run(tmp_path / "b", metrics[:2])).of("g")) == 1


def test_a_teacher_that_dropped_is_marked(tmp_path: Path) -> None:
    flags = [0.0, 1.0, 1.0, 0.0, 1.0]
    metrics = [
        {"step": 10 * n, "loss": 1 / n, "validation/teacher_dropped": flag}
        for n, flag in enumerate(flags, 1)
    ]
    other = write_run(tmp_path / "b", [{**line, "loss": 1.0} for line in STEPS])
    page = make(tmp_path, write_run(tmp_path / "a", metrics), other)
    assert "Dashed uprights: validations that found the teacher worse" in page.text
    charts = len(page.of("svg", role="img"))
    marks = [mark["d"].split(",")[0] for mark in page.of("path", **{"class": "mark"})]
    assert len(marks) == 2 * charts and len(set(marks)) <= 4
    markup = draw_chart(
        Figure("x", "X"), [Series(0, "a", [(1, 1.0), (9, 2.0)], marks=(5, 99))], 1, 9
    )
    assert markup.count("class=mark") == 1 and 'class=mark d="M200.0,' in markup
    assert "Dashed" not in make(tmp_path, other).text


def test_arms_are_compared_with_the_first(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", STEPS)
    arms = [write_evaluation(tmp_path / "eval" / name, right)
            for name, right in (("base", 20), ("real", 35))]  # fmt: skip
    arms.append(write_evaluation(tmp_path / "eval" / "other", 3, rows=10))
    page = make(tmp_path, run, "--evaluations", *arms)
    for said in ("base text 40.0 % 10.0 - 90.0 % 75.0 % 50 12.5 25.0 %", "real text 70.0 %",
                 "+30.0 (", "other rows", "points over base"):  # fmt: skip
        assert said in page.text, said
    # Without a configuration and completions there is still a report.
    assert "No run holds its settings" in page.text and "wrote completions" in page.text


# ---------------------------------------------------------------------------- size and pictures


def test_the_file_stays_small(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    names = [f"figure{n}" for n in range(20)]
    values = rng.standard_normal((150, len(names)))
    metrics = [{"step": 7 * n, **dict(zip(names, map(float, row), strict=True))}
               for n, row in enumerate(values)]  # fmt: skip
    many = {"ids": [65] * 300, "scored": "1" * 301, "logprobs": [-3.0] * 301}
    words = [sample(step, slot, row=f"maze/{slot}", question="q" * 5000, **many)
             for step in range(3) for slot in range(8)]  # fmt: skip
    settings = {"model_path": str(TINY_BAGEL)}
    runs = [write_run(tmp_path / str(n), metrics, settings, words) for n in range(16)]
    page = make(tmp_path, *runs)
    assert len(page.of("path", **{"class": "line"})) >= 16 * len(names)
    # Four rows a step at most, and fewer where their texts would fill the file.
    assert int(re.findall(r"(\d+) further rows of these steps are left out", page.text)[0]) > 12
    with pytest.raises(ValueError, match="17 runs; at most 16 can be told apart"):
        make(tmp_path, *runs, write_run(tmp_path / "17", metrics))


def test_large_pictures_are_made_smaller() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (900, 1600, 3), dtype=np.uint8)
    uri = data_uri(Image.fromarray(noise))
    assert uri.startswith("data:image/jpeg") and pixels(uri).shape == (203, 360, 3)
    assert len(uri) < 120_000


# ---------------------------------------------------------------------------- bad input


BAD: dict[str, tuple[Callable[[Path], list[Any]], str]] = {
    "no folder": (lambda p: [p / "none"], r"RUN .*none is no folder; name the results folder"),
    "no run": (lambda p: [p], r"holds no metrics\.jsonl: name the results folder"),
    "empty": (lambda p: [write_run(p / "a", [])], r"holds no logged step yet; wait"),
    "no figure": (lambda p: [write_run(p / "a", [{"step": 1}])], "holds no logged step yet"),
    "twice": (lambda p: [write_run(p / "a", STEPS), p / "a"], "given twice"),
    "settings": (lambda p: [write_run(p / "a", STEPS, [])], "must be a mapping of settings"),  # type: ignore[arg-type]
    "steps": (
        lambda p: [write_run(p / "a", STEPS, samples=[sample(1), sample(3)]), "--steps", "1,4"],
        r"--steps 4: no run holds completions of them; there are 2 steps from 1 to 3",
    ),
    "no samples": (lambda p: [write_run(p / "a", STEPS), "--steps", "1"], "no run holds compl"),
    "evaluation": (
        lambda p: [write_run(p / "a", STEPS), "--evaluations", p / "a"], r"summary\.json does not",
    ),
    "no evaluation": (
        lambda p: [write_run(p / "a", STEPS), "--evaluations", p / "x"], "is no folder; name out",
    ),
    "damaged evaluation": (
        lambda p: [write_run(p / "a", STEPS), "--evaluations",
                   write_evaluation(p / "e", 3, interval=[0])], "lacks figures",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_in_one_line(tmp_path: Path, name: str) -> None:
    words, said = BAD[name]
    with pytest.raises(ValueError, match=said) as error:
        make(tmp_path, *words(tmp_path))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "report.html").exists()


def test_an_earlier_file_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "a", STEPS)
    out = tmp_path / "report.html"
    make(tmp_path, run)
    written = out.read_bytes()
    with pytest.raises(ValueError, match=r"--out .*report\.html exists"):
        report.main([str(run), "--out", str(out)])
    write_run(tmp_path / "a", STEPS[:2])
    monkeypatch.setattr(os, "replace", _full)
    with pytest.raises(ValueError, match=r"writing .*report\.html failed: No space left"):
        make(tmp_path, run)
    assert out.read_bytes() == written and not out.with_name("report.html.tmp").exists()
    monkeypatch.undo()
    make(tmp_path, run)
    assert out.read_bytes() != written


def _full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_overwrite_replaces_reports_alone(tmp_path: Path) -> None:
    """A slip of the keyboard must not cost a run its record."""
    run = write_run(tmp_path / "a", STEPS)
    lines = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"--out .*metrics\.jsonl is no report"):
        report.main([str(run), "--out", str(run / "metrics.jsonl"), "--overwrite"])
    assert (run / "metrics.jsonl").read_bytes() == lines


def test_damaged_lines_are_left_out_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = write_run(tmp_path / "a", STEPS, samples=[sample(1), sample(2, row=5)])
    with (run / "metrics.jsonl").open("a") as file:
        file.write(
            '[1]\n{"step": "x", "loss": 1}\n{"loss": 7}\n{"step": 4, "loss": 0.5, "lr": {}}\n'
        )
        file.write('{"step": 4, "loss": 10e999}\n{"step": 5, "lo')
    with caplog.at_level(logging.WARNING):
        page = make(tmp_path, run)
    (said,) = {r.getMessage() for r in caplog.records if "metrics.jsonl" in r.getMessage()}
    assert "line 4 is not a JSON object" in said and "line 5" in said and "line 6" in said
    assert "last logged step 4" in page.text and "Step 1" in page.text


# ---------------------------------------------------------------------------- in a browser


_FRAMES = """<!DOCTYPE html><meta charset=utf-8>
<iframe width=390 height=800 src="report.html"></iframe>
<iframe width=1280 height=900 src="report.html"></iframe><pre></pre>
<script>
onload = () => {
  document.querySelector("pre").textContent = JSON.stringify([frames[0], frames[1]].map(frame => {
    const page = frame.document, chart = page.querySelector(".chart svg");
    const readout = chart.nextElementSibling, width = page.documentElement.scrollWidth;
    chart.dispatchEvent(new frame.KeyboardEvent("keydown", {key: "Home"}));
    const both = readout.textContent, line = page.querySelector("main [data-run='1']");
    page.getElementById("run1").click();
    chart.dispatchEvent(new frame.KeyboardEvent("keydown", {key: "ArrowRight"}));
    frame.dispatchEvent(new frame.Event("beforeprint"));
    const token = page.querySelector(".tokens b"), style = frame.getComputedStyle;
    const colours = [...page.querySelectorAll(".choice input")].map(choice => {
      choice.click();
      const keys = [...page.querySelectorAll(".key")].filter(key => style(key).display !== "none");
      const names = keys.map(key => key.className).join();
      return [choice.id, names, style(token).backgroundColor];
    });
    return {colours, width, both, one: readout.textContent, hidden: style(line).display,
            folded: page.querySelectorAll("details:not([open])").length};
  }));
};
</script>"""


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_a_browser_is_content_at_phone_and_desk_width(tmp_path: Path) -> None:
    long = [{**STEPS[0], "step": n, "loss": 1 / n, "grad_norm": 2.0**n} for n in range(1, 60)]
    known: dict[str, Any] = {
        "divergence": [0.02, 0, 0],
        "student_entropy": [3, 0, 0],
        "fork": "100",
    }
    words = [sample(n, **known, logprobs=[-3, 0, 0]) for n in (1, 2)]
    words.append(sample(3, completion="x" * 3000, answer="W" * 300, **known))
    settings = {"jsd_beta": 0.25, "model_path": str(TINY_BAGEL)}
    runs = [write_run(tmp_path / name, long, {"lr": name * 40, **settings}, words)
            for name in ("one", "two")]  # fmt: skip
    make(tmp_path, *runs, "--evaluations", write_evaluation(tmp_path / "e", 5))
    (tmp_path / "frames.html").write_text(_FRAMES)
    done = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
         "--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom",
         "--virtual-time-budget=3000", str(tmp_path / "frames.html")],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr, done.stderr
    phone, desk = json.loads(re.findall(r"<pre>(.*?)</pre>", done.stdout)[0])
    assert phone.pop("width") <= 390 and desk.pop("width") <= 1280
    colours = phone.pop("colours")
    assert colours == desk.pop("colours")
    assert [(choice, key) for choice, key, _ in colours] == [
        (f"by-{letter}", f"key by-{letter}") for letter in "deft"
    ]
    light = {"d2": "c6dcf6", "e5": "4da56b", "f1": "e9c8ef", "t4": "f29b80"}
    assert [colour for *_, colour in colours] == [
        f"rgb({int(code[:2], 16)}, {int(code[2:4], 16)}, {int(code[4:], 16)})"
        for code in light.values()
    ]
    assert phone == desk == {
        "both": "step 1: one 1 two 1", "one": "step 2: one 0.5", "hidden": "none", "folded": 0
    }  # fmt: skip
