# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Benchmark files: reading, prompts, rules, figures, and evaluation of them end to end."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.sequence import ImageSegment, TextSegment
from data.thinkmorph import BadRow
from data.tsv import TsvDataset, as_list, tsv_images
from modeling import load_bagel
from scripts.visual_opsd.config import PromptSettings
from scripts.visual_opsd.evaluate import main
from scripts.visual_opsd.evaluation import benchmark_table, benchmarks
from scripts.visual_opsd.evaluation.benchmark_scoring import (
    SCORING_VERSION,
    chart_verdict,
    choice_verdict,
    chosen_option,
    maze_verdict,
    moves,
    parse_maze,
)
from scripts.visual_opsd.evaluation.benchmark_table import (
    Estimate,
    Tables,
    combine,
    row_estimates,
)
from scripts.visual_opsd.evaluation.benchmarks import (
    BENCHMARKS,
    COLUMNS,
    PROMPT_VERSION,
    parse_row,
    row_options,
)
from scripts.visual_opsd.evaluation.scoring import wilson_interval
from scripts.visual_opsd.rows import make_builder
from tests.conftest import TINY_BAGEL
from tests.visual_opsd.evaluation.tsv_files import base64_png, choice_rows, picture, write_tsv

ROOT = Path(__file__).parents[3]
SMALL = [f"--{name}={value}" for name, value in
         {"vit_max_size": 112, "vit_min_size": 14, "max_new_tokens": 48,
          "device": "cpu", "progress": False}.items()]  # fmt: skip


# ---------------------------------------------------------------------------------- files


def test_a_file_is_read_as_its_writer_meant_it(tmp_path: Path) -> None:
    """Quoted tabs, newlines and quotes, shared and several images, an own line ending."""
    first, second = picture(1), picture(2)
    rows = [
        {"index": "7", "question": 'two\nlines,\ta tab and "quotes"', "answer": "A", "A": "5 inch",
         "image": base64_png(first)},
        {"index": "8", "question": "plain", "answer": "B", "A": "", "image": "7"},
        {"index": "9", "question": "two", "answer": "A", "A": " ",
         "image": str([base64_png(second), base64_png(first)])},
    ]  # fmt: skip
    path = write_tsv(tmp_path / "Own.tsv", rows)
    data = b"\xef\xbb\xbf" + path.read_bytes().replace(b"plain", b'5" wide') + b"\n"
    path.write_bytes(data)
    dataset = TsvDataset("Own", path)
    assert len(dataset) == 3
    assert dataset.md5 == hashlib.md5(data).hexdigest()
    values = dataset.read_row(0, 11).values
    assert values["question"] == rows[0]["question"]
    assert dataset.read_row(0, 11).position == 11
    assert dataset.locate(2) == (str(path), 2)
    row = dataset.read_row(1)
    assert row.values["question"] == '5" wide'  # a quote inside an unquoted field is a quote
    assert "A" not in row.values
    assert np.array_equal(np.asarray(tsv_images(row)[0]), np.asarray(first))
    row = dataset.read_row(2)
    assert "A" not in row.values
    pixels = [np.asarray(image) for image in tsv_images(row)]
    assert [np.array_equal(*pair) for pair in zip(pixels, map(np.asarray, (second, first)),
                                                  strict=True)] == [True, True]  # fmt: skip


def test_image_paths_are_found_beside_the_file(tmp_path: Path) -> None:
    picture(3).save(tmp_path / "one.png")
    folder = tmp_path / "images" / "Own"
    folder.mkdir(parents=True)
    picture(4).save(folder / "two.png")
    cells = ["one.png", "['one.png', 'two.png']", "three.png"]
    rows = [
        {"index": i, "question": "?", "answer": "x", "image_path": cell}
        for i, cell in enumerate(cells)
    ]
    dataset = TsvDataset("Own", write_tsv(tmp_path / "Own.tsv", rows))
    assert [len(tsv_images(dataset.read_row(i))) for i in (0, 1)] == [1, 2]
    with pytest.raises(BadRow, match=r"missing_image: image file three\.png"):
        tsv_images(dataset.read_row(2))


def test_damaged_files_and_rows_are_named(tmp_path: Path) -> None:
    path = tmp_path / "Own.tsv"

    def expect(message: str, data: bytes) -> None:
        path.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            TsvDataset("Own", path)

    expect("answer, image .*are missing; found index, question", b"index\tquestion\n")
    expect("has a header but no rows", b"index\tquestion\tanswer\timage\n")
    expect("index '1' stands twice", b"index\tquestion\tanswer\timage\n1\ta\tb\tc\n1\ta\tb\tc\n")
    expect("not UTF-8 text at byte 29", b"index\tquestion\tanswer\timage\n1\xff\n")
    with pytest.raises(ValueError, match=r"None\.tsv does not exist"):
        TsvDataset("None", tmp_path / "None.tsv")

    path.write_text("index\tquestion\tanswer\timage\n1\ta\tb\t!!\n2\ta\tb\tc\td\te\n3\ta\tb\n"
                    f"4\ta\tb\t{'A' * 80}\n")  # fmt: skip
    dataset = TsvDataset("Own", path)
    with pytest.raises(BadRow, match=r"missing_image: image '!!' is neither"):
        dataset.read_row(0)
    with pytest.raises(BadRow, match="wrong_columns: 6 fields under 4"):
        dataset.read_row(1)
    with pytest.raises(BadRow, match="missing_image: neither image nor"):
        tsv_images(dataset.read_row(2))
    with pytest.raises(BadRow, match="broken_image"):
        tsv_images(dataset.read_row(3))
    assert as_list("[not, a list]") == ["[not, a list]"]


# ---------------------------------------------------------------------------------- prompts


def test_the_nine_benchmarks_are_registered() -> None:
    assert COLUMNS == ("VSP", "VisPuzzle", "ChartQA", "VStar", "BLINK-J", "MMVP", "SAT", "BLINK",
                       "CV-Bench")  # fmt: skip
    assert len(BENCHMARKS) == 11
    assert [name for name, b in BENCHMARKS.items() if b.circular] == ["SAT_circular"]
    assert len({b.md5 for b in BENCHMARKS.values()}) == 11


def test_prompt_of_a_choice() -> None:
    """VLMEvalKit's text, trailing blank included."""
    parts = benchmarks.make_parts(
        "choice", {"question": "Which?", "hint": "Look.", "A": "one", "C": "three"}, ["x", "y"]
    )
    assert parts == [
        {"type": "image", "value": "x"},
        {"type": "image", "value": "y"},
        {
            "type": "text",
            "value": "Hint: Look.\nQuestion: Which?\nOptions:\nA. one\nC. three\n"
            "Please select the correct answer from the options above. \n",
        },
    ]
    assert benchmarks.choice_text("Which?", {}) == "Question: Which?\n"
    own = benchmarks.make_parts("column", {"question": "Which?", "prompt": "As it is."}, ["x"])
    assert own[1]["value"] == "As it is."
    with pytest.raises(ValueError, match="column prompt is empty"):
        benchmarks.make_parts("column", {"question": "Which?"}, ["x"])


def test_a_question_has_as_many_options_as_it_lists() -> None:
    values = {"question": "q", "A": "one", "B": 2, "E": "five", "Z": "last", "answer": "E"}
    assert row_options(values) == {"A": "one", "B": "2", "E": "five", "Z": "last"}


def test_pictures_in_the_text_of_a_question() -> None:
    question = "First <IMAGE-1> then <TEST-IMAGE>."
    parts = benchmarks.make_parts("question", {"question": question}, ["a", "b", "c"])
    assert [part["value"] for part in parts] == ["First ", "a", " then ", "c", "."]
    tagged = benchmarks.prompt_text(parts, "<img><|image_1|></img> ")
    assert tagged == "First  <img><|image_1|></img>  then  <img><|image_2|></img> ."
    assert benchmarks.prompt_text(parts) == "First  [picture 1]  then  [picture 2] ."
    with pytest.raises(ValueError, match="<IMAGE-4> but has 3"):
        benchmarks.make_parts("question", {"question": "<IMAGE-4>"}, ["a", "b", "c"])


def test_contexts_of_one_and_several_pictures() -> None:
    bundle = load_bagel(TINY_BAGEL)
    images = [picture(1), picture(2, (42, 70))]
    for style in ("packer", "inferencer"):
        settings = PromptSettings(prompt_style=style, vit_max_size=112, vit_min_size=14,
                                  instruction_suffix=" Now.")  # fmt: skip
        builder = make_builder(bundle.tokenizer, bundle.config, settings)
        text = {"type": "text", "value": "What is it?"}
        one = benchmarks.build_context(builder, [{"type": "image", "value": images[0]}, text])
        for ours, trained in zip(one, builder.question(images[0], "What is it?"), strict=True):
            if isinstance(ours, ImageSegment):
                assert torch.equal(ours.patches, trained.patches)  # type: ignore[union-attr]
            else:
                assert ours == trained
        two = benchmarks.build_context(
            builder, [*({"type": "image", "value": image} for image in images), text]
        )
        assert [type(s) for s in two] == [TextSegment, ImageSegment, ImageSegment, TextSegment]
        assert isinstance(two[2], ImageSegment) and isinstance(two[3], TextSegment)
        assert torch.equal(two[2].patches, builder.image(images[1]).patches)
        tags = "<img><|image_1|></img> <img><|image_2|></img> " if style == "inferencer" else ""
        assert bundle.tokenizer.decode(two[3].ids) == tags + "What is it? Now."


# ---------------------------------------------------------------------------------- rules

OPTIONS = {"A": "the left one", "B": "the right one", "C": "7", "D": "None"}


@pytest.mark.parametrize(
    ("given", "letter"),
    [
        ("B", "B"), ("b", "B"), (" (B) ", "B"), ("B.", "B"), ("**B**", "B"), ("\\boxed{B}", "B"),
        ("B. the right one", "B"), ("(b) the right one", "B"), ("B) because it is", "B"),
        ("Option B", "B"), ("The correct answer is (B).", "B"), ("answer: B", "B"),
        ("The right one.", "B"), ("7", "C"), ("7.0", "C"), ("none", "D"),
        ("B. the left one", None), ("E", None), ("A left one", None), ("the one", None),
        ("A or B", None), ("", None), ("Both", None),
        ("$\\boxed{B}$", "B"), ("\\boxed{B}.", "B"), ("B\u3002", "B"), ("\u200bB", "B"),
        ("\\boxed{\\text{B}}", None), ("\\(B\\)", None), ("B;", None), ("B, the right one", None),
        ("(A)(B)", None), ("(A) or (B)", None), ("A. x B. y", None), ("B: not (A)", None),
        ("B. 7 (see c1)", "B"),
    ],
)  # fmt: skip
def test_the_option_an_answer_names(given: str, letter: str | None) -> None:
    assert chosen_option(given, OPTIONS) == letter
    verdict = choice_verdict(f"<think>A</think><answer>{given}</answer>", "B", OPTIONS)
    assert verdict.correct == (letter == "B")
    assert verdict.given == (letter or given.strip())


def test_only_the_last_answer_in_tags_counts() -> None:
    assert choice_verdict("<answer>A</answer> or <answer>B</answer>", "B", OPTIONS).correct
    for text in ("B", "<answer>B", "The answer is B.", "<answer>B</answer><answer>A</answer>"):
        assert not choice_verdict(text, "B", OPTIONS).correct
    assert choice_verdict("B", "B", OPTIONS).given is None
    assert chosen_option("Q", {}) == "Q"  # a file whose questions hold their options
    twins = {"A": "same", "B": "same"}
    assert chosen_option("same", twins) is None


@pytest.mark.parametrize(
    ("given", "wanted", "right"),
    [
        ("100", "100", True), ("105", "100", True), ("95", "100", True), ("105.1", "100", False),
        ("94.9", "100", False), ("1.05", "1", True), ("-10", "10", False), ("0", "0", True),
        ("0.01", "0", False), ("12%", "12", True), ("12", "12 %", True), ("0.12", "12%", False),
        ("$1,200", "1200", True), ("-$5", "-5", True), ("Yes", "yes", True), ("no", "yes", False),
        ("12 points", "12", False), ("3 or 4", "3", False), ("2012", "['2011', 'x']", True),
        ("5\u20ac", "5", True), ("5 \u20ac", "5", True), ("-5$", "-5", True), ("$-5", "-5", True),
        ("5\u20b9", "5", True), ("\u22125", "-5", True), ("$\\boxed{5}$", "5", True),
        ("5 USD", "5", False), ("1 234", "1234", False), ("4,5", "4.5", False),
        ("5\\%", "5", False), ("0.05", "5%", False), ("~5", "5", False),
        ("X", "['2011', 'x']", True), ("\\boxed{3.5}", "3.5", True), ("1e2", "100", True),
    ],
)  # fmt: skip
def test_relaxed_accuracy_of_charts(given: str, wanted: str, right: bool) -> None:
    verdict = chart_verdict(f"<answer>{given}</answer>", as_list(wanted))
    assert verdict.correct == right
    assert not chart_verdict(given, as_list(wanted)).correct  # without its tags


def test_plans_are_walked() -> None:
    maze = parse_maze("['SFF'\n 'FHF'\n 'FFG']")
    assert maze.state == "SFF/FHF/FFG"
    assert parse_maze('[["S", "F"], ["H", "G"]]').state == "SF/HG"
    for text, right in {
        "<answer>R,R,D,D</answer>": True,
        "<answer>D, D, R, R</answer>": True,
        "<answer>right -> right -> down -> down</answer>": True,
        "<answer>RRDD</answer>": True,
        "<answer>\\boxed{R,R,D,D}</answer>": True,
        "so \\boxed{L} or rather \\boxed{R, R, D, D}": True,
        "<answer>R,R,L,R,D,D</answer>": True,
        "\\boxed{R,R,D,D} <answer>D</answer>": False,
        "<answer>R,D,R,D</answer>": False,
        "<answer>R,R,R,D,D</answer>": False,
        "<answer>R,R,D</answer>": False,
        "<answer>R,R,D,D,U</answer>": False,
        "<answer>go R,R,D,D</answer>": False,
        "<answer>R\uff0cR\uff0cD\uff0cD</answer>": True,
        "<answer>\uff32\uff32\uff24\uff24</answer>": True,
        "<answer>**RRDD**.</answer>": True,
        "<answer>R|R|D|D</answer>": False,
        "<answer>2 right, 2 down</answer>": False,
        "R,R,D,D": False,
    }.items():
        assert maze_verdict(text, maze).correct == right, text
    assert moves("r, Down") == "RD"
    assert moves(" , ") is None
    with pytest.raises(ValueError, match="not a maze"):
        parse_maze("SFF")


def test_rows_that_cannot_be_judged_are_bad(tmp_path: Path) -> None:
    row = {"index": "1", "question": "Which?", "A": "x", "B": "y", "answer": "C",
           "maze_map": "SFF", "image": base64_png(picture(1))}  # fmt: skip

    def reason(name: str, **changes: str) -> str:
        dataset = TsvDataset(name, write_tsv(tmp_path / f"{name}.tsv", [{**row, **changes}]))
        with pytest.raises(BadRow) as caught:
            parse_row(benchmarks.find_benchmark(dataset), dataset.read_row(0))
        return caught.value.reason

    assert reason("MMVP") == "answer_not_an_option"
    assert reason("MMVP", answer="") == "missing_answer"
    assert reason("MMVP", question="") == "missing_question"
    assert reason("MMVP", image="") == "missing_image"
    assert reason("VSP_maze_task_main_original") == "bad_maze"
    assert reason("VSP_maze_task_main_original", question="<IMAGE-2>") == "missing_prompt"
    assert reason("CV-Bench-2D", answer="A") == "missing_prompt"


# ---------------------------------------------------------------------------------- figures


def test_intervals_of_means() -> None:
    parts = [Estimate(0.8, 0.7, 0.9), Estimate(0.4, 0.2, 0.5)]
    both = combine(parts, [1, 1])
    assert both.value == pytest.approx(0.6)
    assert both.low == pytest.approx(0.6 - np.hypot(0.05, 0.1))
    assert both.high == pytest.approx(0.6 + np.hypot(0.05, 0.05))
    weighted = combine(parts, [30, 10])
    assert weighted.value == pytest.approx(0.7)
    assert combine([Estimate(1.0, 0.5, 1.0)], [1]).high == 1.0


def test_columns_of_the_table() -> None:
    figures = {name: {"correct": 3, "n": 4} for name in BENCHMARKS}
    figures["ChartQA_h_bar"] = {"correct": 90, "n": 100}
    figures["ChartQA_v_bar"] = {"correct": 5, "n": 10}
    figures["CV-Bench-2D"] = {"correct": 90, "n": 100}
    figures["CV-Bench-3D"] = {"correct": 5, "n": 10}
    row = row_estimates(figures)
    chart, cv, mean = row["ChartQA"], row["CV-Bench"], row["mean"]
    assert chart is not None and cv is not None and mean is not None
    assert chart.value == pytest.approx(0.7)  # of the two files, whatever their sizes
    assert cv.value == pytest.approx(95 / 110)  # of their rows
    assert (cv.low, cv.high) == wilson_interval(95, 110)
    assert mean.value == pytest.approx((7 * 0.75 + 0.7 + 95 / 110) / 9)
    assert mean.low < mean.value < mean.high
    del figures["CV-Bench-3D"]
    assert row_estimates(figures)["CV-Bench"] is None
    assert row_estimates(figures)["mean"] is None


def test_circular_questions_need_every_order_right(tmp_path: Path) -> None:
    rows = [{**row, "index": i} for i, row in zip([3, 1000003, 4, 1000004, 2000004],
                                                  choice_rows(5), strict=True)]  # fmt: skip
    dataset = TsvDataset("SAT_circular", write_tsv(tmp_path / "SAT_circular.tsv", rows))
    lines = []
    for number, correct in enumerate([True, True, True, False, True]):
        parsed = parse_row(BENCHMARKS["SAT_circular"], dataset.read_row(number))
        lines.append({"group": parsed.group, "correct": correct, "lenient": number != 3 or correct,
                      "answered": True})  # fmt: skip
    assert [line["group"] for line in lines] == ["3", "3", "4", "4", "4"]
    figures = benchmark_table.benchmark_figures(dataset, lines, 0)
    assert (figures["n"], figures["correct"], figures["row_accuracy"]) == (2, 1, 0.8)
    assert figures["interval"] == list(wilson_interval(1, 2))
    named = [{**row, "g_index": "5.0"} for row in rows]
    dataset = TsvDataset("SAT_circular", write_tsv(tmp_path / "SAT_circular.tsv", named))
    assert parse_row(BENCHMARKS["SAT_circular"], dataset.read_row(4)).group == "5"


def test_pairs_of_mmvp(tmp_path: Path) -> None:
    """Both rows of consecutive indices, wherever counting begins and however rows are ordered."""
    dataset = TsvDataset("MMVP", write_tsv(tmp_path / "MMVP.tsv", choice_rows(6)))

    def figures(right: dict[int, bool], rows: dict[int, int] | None = None) -> dict[str, Any]:
        lines = [{"group": str(i), "row": (rows or {}).get(i, 99), "correct": yes,
                  "lenient": yes or i == 4, "answered": True}
                 for i, yes in right.items()]  # fmt: skip
        return benchmark_table.benchmark_figures(dataset, lines, 0)

    from_one = {1: True, 2: True, 3: True, 4: False, 5: False, 6: False}
    found = figures(from_one)
    assert (found["pairs"], found["pair_accuracy"], found["accuracy"]) == (3, 1 / 3, 0.5)
    assert found["pair_interval"] == list(wilson_interval(1, 3))
    assert found["lenient_pair_accuracy"] == 2 / 3 and found["lenient_correct"] == 4
    backwards = dict(reversed(from_one.items()))
    assert figures(backwards)["pair_accuracy"] == 1 / 3
    assert figures({0: True, 1: True, 2: False, 3: True})["pair_accuracy"] == 0.5
    # A row that was not answered takes its pair along.
    assert figures({1: True, 2: True, 4: True})["pairs"] == 1
    assert figures({1: True, 2: True, 3: True}, {1: 1, 2: 2, 3: 3})["pairs"] == 1
    assert "pairs" not in figures({1: True})
    shown = benchmark_table.describe({"MMVP": found})
    assert "MMVP, pairs" in shown and "33.3%" in shown and "lenient" in shown
    table = benchmark_table.markdown_table(Tables.of({"Base": {"MMVP": found}}))
    assert "| Base | 33.33 (" in table and "| lenient | VSP |" in table


# ---------------------------------------------------------------------------------- end to end


def evaluate(root: Path, out: Path, *flags: str) -> int:
    return main(["--model_path", str(TINY_BAGEL), "--tsv_root", str(root), "--output_dir", str(out),
                 *SMALL, *flags])  # fmt: skip


def predictions(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every benchmark with a few rows; where the tiny model answers, it says 7."""
    folder = tmp_path_factory.mktemp("LMUData")
    for name in BENCHMARKS:
        rows = [{**row, "A": "8", "B": "7", "answer": "B", "prompt": f"Which is {i}?"}
                for i, row in enumerate(choice_rows(3))]  # fmt: skip
        if name.startswith("ChartQA"):
            rows = [{"index": i, "question": f"How many are {i}?", "answer": "7.2",
                     "image": rows[i]["image"]} for i in range(3)]  # fmt: skip
        if name.startswith("VSP"):
            rows = [{"index": i, "question": "Which way? <TEST-IMAGE>", "answer": "",
                     "maze_map": "['SF' 'FG']", "image": rows[i]["image"]}
                    for i in range(3)]  # fmt: skip
        write_tsv(folder / f"{name}.tsv", rows)
    return folder


def test_the_nine_benchmarks_from_evaluation_to_the_table(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert evaluate(root, tmp_path / "all", "--benchmark", "all") == 0
    printed = capsys.readouterr().out
    assert f"prompts {PROMPT_VERSION}, scoring {SCORING_VERSION}" in printed
    assert "NOT the file VLMEvalKit_Thinkmorph loads" in printed
    assert "output tokens: mean" in printed
    lines = predictions(tmp_path / "all")
    assert len(lines) == 33
    for line in lines:
        seven = "<answer>7</answer>" in line["text"]
        choice = line["dataset"].startswith("VSP") is False
        assert line["correct"] == (seven and choice), line
        if seven and choice:
            assert line["given"] == ("7" if line["dataset"].startswith("ChartQA") else "B")
    assert any(line["correct"] for line in lines)
    assert len({line["digest"] for line in lines}) == 9  # three kinds of rows, three of each
    figures = json.loads((tmp_path / "all" / "benchmarks.json").read_text())
    assert list(figures["benchmarks"]) == list(BENCHMARKS)
    for name, one in figures["benchmarks"].items():
        own = [line for line in lines if line["dataset"] == name]
        assert (one["n"], one["correct"]) == (3, sum(line["correct"] for line in own))
    timing = json.loads((tmp_path / "all" / "timing.json").read_text())
    assert timing["all"]["n"] == 33
    tokens = [line["output_tokens"] for line in lines]
    assert timing["all"]["output_tokens"]["mean"] == pytest.approx(np.mean(tokens))
    assert timing["all"]["output_tokens"]["max"] == max(tokens)
    assert 0 < timing["MMVP"]["latency_seconds"]["median"] < 60

    monkeypatch.setenv("LMUData", str(root))
    code = main(["--model_path", str(TINY_BAGEL), "--benchmark", "MMVP", "--output_dir",
                 str(tmp_path / "one"), "--batch_size", "1", *SMALL])  # fmt: skip
    assert code == 0
    texts = {line["pid"]: line["text"] for line in lines if line["dataset"] == "MMVP"}
    assert {line["pid"]: line["text"] for line in predictions(tmp_path / "one")} == texts
    alone = json.loads((tmp_path / "one" / "timing.json").read_text())
    assert alone["all"]["decoded_together"]["max"] == 1

    capsys.readouterr()
    runs = f"Whole={tmp_path / 'all'},Part={tmp_path / 'one'}"
    target = tmp_path / "table.json"
    assert benchmark_table.main(["--runs", runs, "--json", str(target)]) == 0
    with pytest.raises(ValueError, match=r"table\.json exists; .*--overwrite"):
        benchmark_table.main(["--runs", runs, "--json", str(target)])
    shown = capsys.readouterr().out
    assert "our rule" in shown and PROMPT_VERSION in shown
    table = json.loads(target.read_text())["rows"]
    right = figures["benchmarks"]["MMVP"]["correct"]
    assert table["Part"]["MMVP"]["value"] == table["Whole"]["MMVP"]["value"] == right / 3
    assert table["Part"]["mean"] is None
    lenient = json.loads(target.read_text())["lenient_rows"]
    assert lenient["Part"]["MMVP"]["value"] >= table["Part"]["MMVP"]["value"]
    assert f"| {100 * table['Whole']['mean']['value']:.2f} (" in shown
    with pytest.raises(ValueError, match="MMVP stands in an earlier folder"):
        benchmark_table.main(["--runs", f"Twice={tmp_path / 'all'}+{tmp_path / 'one'}"])
    held = json.loads((tmp_path / "one" / "benchmarks.json").read_text())
    (tmp_path / "one" / "benchmarks.json").write_text(json.dumps({**held, "prompt_version": "0"}))
    with pytest.raises(ValueError, match="made with prompt_version '0'"):
        benchmark_table.main(["--runs", f"Old={tmp_path / 'one'}"])
    for wrong in ("", "folder", "a=b,a=c"):
        with pytest.raises(ValueError, match="--runs"):
            benchmark_table.main(["--runs", wrong])


def test_a_tsv_file_of_ones_own(root: Path, tmp_path: Path) -> None:
    images = [base64_png(picture(i)) for i in range(4)]
    rows = [
        {"index": f"q{i}", "question": "Say it.", "answer": "7", "image": image}
        for i, image in enumerate(images)
    ]
    write_tsv(tmp_path / "Mine.tsv", rows)
    assert evaluate(root, tmp_path / "out", "--data", str(tmp_path / "Mine.tsv")) == 0
    lines = predictions(tmp_path / "out")
    assert [line["pid"] for line in lines] == ["q0", "q1", "q2", "q3"]
    assert [line["correct"] for line in lines] == [
        line["text"].endswith("<answer>7</answer>") for line in lines
    ]


def test_mistakes_with_benchmarks(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LMUData", raising=False)

    def expect(message: str, *flags: str) -> None:
        with pytest.raises(ValueError, match=message):
            main(["--model_path", str(TINY_BAGEL), "--output_dir", str(tmp_path / "out"), *SMALL,
                  *flags])  # fmt: skip

    expect("give each name once, out of VSP_maze", "--benchmark", "MMVPs", "--tsv_root", str(root))
    expect("give each name once", "--benchmark", "MMVP,MMVP", "--tsv_root", str(root))
    expect("needs the folder of the TSV files", "--benchmark", "MMVP")
    expect(r"lacks MMVP\.tsv", "--benchmark", "MMVP", "--tsv_root", str(tmp_path))
    expect("no visual thoughts to show", "--benchmark", "MMVP", "--context", "vt")
    expect("questions only, no visual", "--data", str(root / "MMVP.tsv"), "--context", "noise")
    expect(r"own\.tsv does not exist", "--data", "own.tsv")


_KILLED = """
import os, signal, sys
from scripts.visual_opsd import evaluate
from scripts.visual_opsd.evaluation.store import RankedLines

append, calls = RankedLines.append, []

def killed(self, rank, records):
    append(self, rank, records)
    if self.name == "predictions":
        calls.append(len(list(records)))
        if sum(calls) >= 20:
            with open(self.folder / f"predictions.rank_{rank}.jsonl", "a") as stream:
                stream.write('{"index": 3')
            os.kill(os.getpid(), signal.SIGKILL)

RankedLines.append = killed
evaluate.main(sys.argv[1:])
"""


def test_killed_half_way_and_resumed_equals_an_uninterrupted_run(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """40 rows; SIGKILL after half of them, in the middle of a line."""
    rows = [{**row, "B": "7", "answer": "B"} for row in choice_rows(40)]
    write_tsv(tmp_path / "MMVP.tsv", rows)
    arguments = ["--model_path", str(TINY_BAGEL), "--benchmark", "MMVP", "--tsv_root",
                 str(tmp_path), "--batch_size", "3", *SMALL]  # fmt: skip
    assert main([*arguments, "--output_dir", str(tmp_path / "whole")]) == 0
    whole = (tmp_path / "whole" / "predictions.jsonl").read_bytes()
    assert len(whole.splitlines()) == 40

    out = tmp_path / "killed"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, *arguments, "--output_dir", str(out)],
        cwd=ROOT, env=environment, capture_output=True, timeout=120, text=True,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (out / "predictions.jsonl").exists()
    torn = (out / "predictions.rank_0.jsonl").read_text()
    assert 20 <= torn.count("\n") < 40
    assert not torn.endswith("\n")

    assert main([*arguments, "--output_dir", str(out)]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["resumed_rows"] == torn.count("\n")
    assert (out / "predictions.jsonl").read_bytes() == whole
    assert (out / "benchmarks.json").read_bytes() == (
        tmp_path / "whole" / "benchmarks.json"
    ).read_bytes()
    assert json.loads((out / "timing.json").read_text())["all"]["n"] == 40
    assert not list(out.glob("*.rank_*"))
