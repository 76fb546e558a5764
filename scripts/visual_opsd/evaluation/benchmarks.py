# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The paper's nine benchmarks, from the TSV files VLMEvalKit uses: which there are, how a row
becomes a prompt, and what judges the answer.

A prompt is a list of parts {"type": "text" | "image", "value": ...}, as VLMEvalKit hands it to a
model; pictures of a row come first. Whoever changes how they are made raises `PROMPT_VERSION`.
"""

from __future__ import annotations

import os
import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from PIL import Image

from data.sequence import Context, ContextBuilder
from data.thinkmorph import BadRow, Row
from data.tsv import TsvDataset, as_list, plain_index, tsv_images
from scripts.visual_opsd.evaluation.benchmark_scoring import (
    Verdict,
    chart_verdict,
    choice_verdict,
    chosen_option,
    exact_verdict,
    maze_verdict,
    parse_maze,
)

PROMPT_VERSION = "vlmevalkit-text-1"
ROOT_VARIABLE = "LMUData"  # VLMEvalKit's own variable for the folder of its TSV files
IMAGE_TAG = "<img><|image_{}|></img>"
TSV_IDENTITY = (
    "index", "question", "hint", "prompt", "answer", "maze_map", *string.ascii_uppercase, "image",
    "image_path",
)  # fmt: skip

PromptKind = Literal["choice", "question", "column"]
AnswerKind = Literal["choice", "chart", "maze", "exact"]
Part: TypeAlias = dict[str, Any]

PROMPTS = {
    "choice": "pictures, then 'Hint: ...' if there is one, 'Question: ...', 'Options:' with one "
    "'X. text' a line, and a request to select from them (VLMEvalKit's text, letter for letter)",
    "question": "pictures, then the question as it stands; <IMAGE-k> and <TEST-IMAGE> in it mark "
    "where pictures belong",
    "column": "pictures, then the file's column `prompt` as it stands",
}


@dataclass(frozen=True)
class Benchmark:
    """One TSV file. `column`: of the paper's table 2. `md5`: of the file that the
    VLMEvalKit_Thinkmorph harness loads under this name, None if there is none. `pairs`: rows of
    consecutive indices belong together."""

    name: str
    column: str
    prompt: PromptKind
    answer: AnswerKind
    md5: str | None = None
    circular: bool = False
    pairs: bool = False


_ALL = (
    Benchmark("VSP_maze_task_main_original", "VSP", "question", "maze",
              "d52eb0fa0b92c7110bc29d12e0fe688c"),
    Benchmark("VisPuzzle", "VisPuzzle", "choice", "choice", "349834f8c1497ba625c9ab7d8004c09d"),
    Benchmark("ChartQA_h_bar", "ChartQA", "question", "chart", "f2b80671e108a2a4606f125f4caa7180"),
    Benchmark("ChartQA_v_bar", "ChartQA", "question", "chart", "eb380cf0104e9b013522dafbe71ba935"),
    Benchmark("VStarBench", "VStar", "choice", "choice", "b18854d7075574be06b631cd5f7d2d6a"),
    Benchmark("BLINK_Jigsaw", "BLINK-J", "choice", "choice", "174fc5d2ed0d67f9e0b33cb8a8be6727"),
    Benchmark("MMVP", "MMVP", "choice", "choice", "8cb732b141a0cba5b42159df2839e557", pairs=True),
    Benchmark("SAT_circular", "SAT", "choice", "choice", "3853dc9e3d3c5af96e6d7ed7d058859e",
              circular=True),
    Benchmark("BLINK", "BLINK", "choice", "choice", "3b6649b6a662184ea046908e5506260e"),
    Benchmark("CV-Bench-2D", "CV-Bench", "column", "choice", "a7cff4cc2857cc237ee2b89e62bccb2d"),
    Benchmark("CV-Bench-3D", "CV-Bench", "column", "choice", "bb94c0d568d652d15b60e001ac40a170"),
)  # fmt: skip
BENCHMARKS = {benchmark.name: benchmark for benchmark in _ALL}
COLUMNS = tuple(dict.fromkeys(benchmark.column for benchmark in _ALL))


def find_benchmark(dataset: TsvDataset) -> Benchmark:
    """The registered benchmark a TSV file's name says, or rules for a file of one's own: choices
    if there is a column A, else exact match; circular if the name says so."""
    if dataset.name in BENCHMARKS:
        return BENCHMARKS[dataset.name]
    circular = "circular" in dataset.name.lower()
    if "A" in dataset.columns:
        return Benchmark(dataset.name, dataset.name, "choice", "choice", circular=circular)
    return Benchmark(dataset.name, dataset.name, "question", "exact", circular=circular)


def open_benchmarks(names: str, root: str | Path | None) -> list[TsvDataset]:
    """Files of a comma-separated list of registered names ("all": every one of them).

    Args:
        root: folder of NAME.tsv; None: the environment's `LMUData`.

    Raises:
        ValueError: an unknown or repeated name, no folder given, or a missing or damaged file.
    """
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if wanted == ["all"]:
        wanted = list(BENCHMARKS)
    unknown = [name for name in wanted if name not in BENCHMARKS]
    if unknown or not wanted or len(set(wanted)) < len(wanted):
        raise ValueError(
            f"--benchmark {names!r}: give each name once, out of {', '.join(BENCHMARKS)}, or all; "
            "any other TSV file goes to --data"
        )
    folder = os.path.expanduser(root or os.environ.get(ROOT_VARIABLE) or "")
    if not folder:
        raise ValueError(
            "--benchmark needs the folder of the TSV files: --tsv_root DIR, or the environment "
            f"variable {ROOT_VARIABLE}"
        )
    absent = [name for name in wanted if not os.path.isfile(Path(folder) / f"{name}.tsv")]
    if absent:
        raise ValueError(
            f"{folder} lacks {', '.join(f'{name}.tsv' for name in absent)}: download what "
            "VLMEvalKit_Thinkmorph lists for them (EVAL.md), or name fewer benchmarks"
        )
    return [TsvDataset(name, Path(folder) / f"{name}.tsv") for name in wanted]


# ---------------------------------------------------------------------------------- prompts


def row_options(values: Mapping[str, Any]) -> dict[str, str]:
    """Options of a row by letter."""
    return {key: str(values[key]) for key in string.ascii_uppercase if key in values}


def choice_text(question: str, options: Mapping[str, str], hint: str | None = None) -> str:
    """VLMEvalKit's text of a multiple-choice question.

    Kept letter for letter, trailing blank included: prompts decide figures.
    """
    lines = [f"Hint: {hint}"] if hint is not None else []
    lines.append(f"Question: {question}")
    if options:
        lines += ["Options:", *(f"{key}. {text}" for key, text in options.items())]
        lines.append("Please select the correct answer from the options above. ")
    return "\n".join(lines) + "\n"


def make_parts(kind: PromptKind, values: Mapping[str, Any], images: Sequence[Any]) -> list[Part]:
    """The prompt of a row; `images` are whatever the parts shall hold (pictures or paths).

    Raises:
        ValueError: the row lacks the column its prompt is made of.
    """
    pictures = [{"type": "image", "value": image} for image in images]
    question = str(values.get("question", ""))
    if kind == "choice":
        text = choice_text(question, row_options(values), values.get("hint"))
        return [*pictures, {"type": "text", "value": text}]
    if kind == "column":
        if "prompt" not in values:
            raise ValueError("column prompt is empty, which holds this benchmark's question")
        return [*pictures, {"type": "text", "value": str(values["prompt"])}]
    return _placed(question, pictures)


def _placed(question: str, pictures: list[Part]) -> list[Part]:
    """Pictures where <IMAGE-k> (from 1) and <TEST-IMAGE> (the last) stand, else before the text."""
    pieces = re.split(r"(<IMAGE-\d+>|<TEST-IMAGE>)", question)
    if len(pieces) == 1:
        return [*pictures, {"type": "text", "value": question}]
    parts: list[Part] = []
    for piece in pieces:
        marker = re.fullmatch(r"<IMAGE-(\d+)>|<TEST-IMAGE>", piece)
        if marker is None:
            parts += [{"type": "text", "value": piece}] * bool(piece)
            continue
        number = int(marker[1]) if marker[1] else len(pictures)
        if not 1 <= number <= len(pictures):
            raise ValueError(f"the question names {piece} but has {len(pictures)} pictures")
        parts.append(pictures[number - 1])
    return parts


def prompt_text(parts: Sequence[Part], prefix: str = "") -> str:
    """The one text a model reads after the pictures of `parts`.

    With a `prefix` that tags the picture (prompt style "inferencer") every picture leaves its
    numbered tag where it stands, all joined by blanks, as the VLMEvalKit wrapper does. Otherwise
    pictures between texts leave "[picture k]", leading ones nothing.
    """
    tag = IMAGE_TAG.format(1)
    tagged = tag in prefix
    words: list[str] = []
    number = 0
    for part in parts:
        if part["type"] == "text":
            words.append(str(part["value"]))
            continue
        number += 1
        if tagged:
            words.append(IMAGE_TAG.format(number))
        elif words:
            words.append(f"[picture {number}]")
    if tagged:
        prefix = prefix.replace(tag, "", 1).lstrip()
    return prefix + " ".join(words)


def build_context(builder: ContextBuilder, parts: Sequence[Part]) -> Context:
    """[system, pictures, text]: the student's context of a prompt with any number of pictures.

    Raises:
        ValueError: as `ContextBuilder.image`.
    """
    prompts = builder.prompts
    system = (builder.text(prompts.system),) if prompts.system else ()
    pictures = tuple(builder.image(part["value"]) for part in parts if part["type"] == "image")
    text = prompt_text(parts, prompts.question_prefix) + prompts.instruction_suffix
    return (*system, *pictures, builder.text(text))


# ---------------------------------------------------------------------------------- rows


@dataclass(frozen=True)
class BenchmarkRow:
    """A row to answer. `group`: rows of one circular question share it (else the row's index)."""

    index: str
    parts: list[Part]
    question: str
    answer: str
    group: str
    category: str
    judge: Callable[[str], Verdict]


def parse_row(benchmark: Benchmark, row: Row) -> BenchmarkRow:
    """Prompt and judge of a row of a TSV file.

    Raises:
        BadRow: missing_question, missing_answer, missing_prompt, missing_image, broken_image,
            answer_not_an_option, bad_maze.
    """

    values = row.values
    for name in ("question", "answer"):
        # A maze is judged by its map, and CV-Bench asks in its column `prompt`.
        needed = benchmark.answer != "maze" if name == "answer" else benchmark.prompt != "column"
        if needed and name not in values:
            raise row.bad(f"missing_{name}", f"column {name} is empty")
    images: list[Image.Image] = tsv_images(row)
    try:
        parts = make_parts(benchmark.prompt, values, images)
    except ValueError as error:
        raise row.bad("missing_prompt", str(error)) from error
    index = plain_index(str(values.get("index", row.row)))
    return BenchmarkRow(
        index=index,
        parts=parts,
        question=str(values.get("prompt" if benchmark.prompt == "column" else "question", "")),
        answer=str(values.get("answer", "")),
        group=_group(benchmark, values, index),
        category=str(values.get("category", "")),
        judge=_judge(benchmark.answer, values, row.bad),
    )


def _group(benchmark: Benchmark, values: Mapping[str, Any], index: str) -> str:
    """VLMEvalKit numbers the reorderings of question i as i + 1,000,000 k, or has `g_index`."""
    if not benchmark.circular:
        return index
    if "g_index" in values:
        return plain_index(str(values["g_index"]))
    return str(int(index) % 1_000_000) if index.isdigit() else index


def _judge(
    kind: AnswerKind, values: Mapping[str, Any], bad: Callable[[str, str], BadRow]
) -> Callable[[str], Verdict]:
    answer = str(values.get("answer", ""))
    if kind == "maze":
        try:
            maze = parse_maze(str(values.get("maze_map", "")))
        except ValueError as error:
            raise bad("bad_maze", f"column maze_map: {error}") from error
        return lambda text: maze_verdict(text, maze)
    if kind == "chart":
        wanted = as_list(answer)
        return lambda text: chart_verdict(text, wanted)
    if kind == "choice":
        options = row_options(values)
        gold = chosen_option(answer, options)
        if gold is None:
            raise bad("answer_not_an_option", f"answer {answer!r} is none of {sorted(options)}")
        return lambda text: choice_verdict(text, gold, options)
    return lambda text: exact_verdict(text, answer)
