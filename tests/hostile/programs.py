# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The commands under attack, each as its `main(argv)`, and what stands in for slow parts."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import data.check
from data.rejects import Reject
from data.row_groups import prepare_row
from data.sequence import Completion
from data.thinkmorph import EVALUATION_ROWS, Row, parse_row
from data.tsv import TsvDataset, tsv_images
from examples import inference_demo
from modeling.release.tokenizer import load_tokenizer
from scripts.visual_opsd import evaluate, train_visual_opsd
from scripts.visual_opsd.evaluation.rows import open_data
from scripts.visual_opsd.training.trainer import Trainer
from tests.conftest import TINY_BAGEL

# Where pixels are looked at, as shares of the sides.
POINTS = ((0.1, 0.5), (0.5, 0.5), (0.9, 0.5), (0.5, 0.1), (0.5, 0.9))


def _pixels(image: Any) -> list[tuple[int, ...]]:
    width, height = image.size
    return [image.getpixel((int(x * width), int(y * height))) for x, y in POINTS]


def read_rows(argv: Sequence[str]) -> int:
    """Print what every row of a file holds, as evaluation would see it: one JSON object a line."""
    (path,) = argv
    for dataset in open_data(path, "train", None, EVALUATION_ROWS):

        def values(row: Row, tsv: bool = isinstance(dataset, TsvDataset)) -> dict[str, Any]:
            if tsv:
                images = tsv_images(row)
                texts = {k: v for k, v in row.values.items() if k != "image"}
            else:
                sample = parse_row(row, EVALUATION_ROWS)
                images, texts = [sample.problem_image], {
                    "question": sample.question, "answer": sample.answer, "pid": sample.pid,
                }  # fmt: skip
            return {
                **texts, "pixels": [_pixels(i) for i in images], "sizes": [i.size for i in images],
            }  # fmt: skip

        for index in range(len(dataset)):
            found = prepare_row(dataset, index, values)
            print(json.dumps({"bad": found.reason} if isinstance(found, Reject) else found))
    return 0


def rows_of(output: str) -> list[dict[str, Any]]:
    """What `read_rows` printed."""
    return [json.loads(line) for line in output.split("\n") if line.startswith("{")]


def evaluate_without_decoding(argv: Sequence[str]) -> int:
    """The evaluation with a sampler that answers A to everything."""
    ids = load_tokenizer(TINY_BAGEL)[0].encode("<answer>A</answer>", add_special_tokens=False)
    answer = Completion(tuple(ids), (True,) * (len(ids) + 1))
    evaluate.sample_completions = lambda model, contexts, *_, **__: [answer] * len(contexts)
    return evaluate.main([
        "--device", "cpu", "--progress", "False", "--vit_max_size", "56", "--vit_min_size", "14",
        "--max_new_tokens", "64", *argv,
    ])  # fmt: skip


def train_until_models(argv: Sequence[str]) -> int:
    """The trainer up to where it would build its models: all checks of what was given."""

    def reached(self: Trainer) -> None:
        raise SystemExit(0)

    Trainer._build_models = reached  # type: ignore[method-assign]
    return train_visual_opsd.main(["--device", "cpu", "--progress", "False", *argv])


def demo(argv: Sequence[str]) -> int | None:
    return inference_demo.main(["--device", "cpu", "--max_new_tokens", "2", *argv])


PROGRAMS: Mapping[str, Callable[[Sequence[str]], int | None]] = {
    "check": data.check.main,
    "rows": read_rows,
    "evaluate": evaluate_without_decoding,
    "train": train_until_models,
    "demo": demo,
}

ROOT = Path(__file__).parents[2]
