# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Look at ThinkMorph-schema parquet before training on it.

    python -m data.check PATH [--tokenizer DIR] [--split train] [--use opsd|sft|evaluation]

PATH is a parquet file, a dataset folder or a folder of datasets. Prints a table for each dataset;
exit code 1 if a file cannot be read, lacks columns or holds no rows.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data.dataset_info import is_dataset_folder, split_files
from data.limits import SMALLEST_IMAGE, ContextLimits
from data.row_groups import ParquetDataset, RowGroup, open_parquet
from data.sequence import ContextBuilder, TextSegment
from data.thinkmorph import (
    EVALUATION_ROWS,
    IMAGE_COLUMNS,
    OPSD_ROWS,
    PROBLEM_IMAGE,
    SFT_ROWS,
    WHOLE_ROWS,
    BadRow,
    Row,
    RowNeeds,
    Sample,
    inspect_schema,
    parse_row,
    row_image,
)
from data.transforms import to_pixels
from modeling.bagel.config import read_llm_config
from modeling.host.programs import number, path_argument, run_main

USES: dict[str, RowNeeds] = {"opsd": OPSD_ROWS, "sft": SFT_ROWS, "evaluation": EVALUATION_ROWS}
MAX_BAD_RATE = 0.01
LARGE_GROUP = 256 << 20
SHOWN = 5
# Without a tokenizer: about what fills the releases' 32,768 positions, at 4 characters a token.
LONG_QUESTION = 4 * 32768
# Added tokens of Qwen2's vocabulary, the four that frame every block among them.
CONTROL_TOKEN = re.compile(
    r"<\|(?:endoftext|im_(?:start|end)|(?:object_ref|box|quad)_(?:start|end)"
    r"|vision_(?:start|end|pad)|(?:image|video)_pad|fim_(?:prefix|middle|suffix|pad)"
    r"|repo_name|file_sep)\|>|</?tool_call>"
)

Lines = list[tuple[str, str]]
Parse = Callable[[Row, RowNeeds], Sample]


@dataclass
class RowStats:
    """What was seen in some rows; adds up over row groups."""

    rows: int = 0
    images: int = 0
    undecodable: int = 0
    long_questions: int = 0
    control_tokens: int = 0
    usable: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    visual_thoughts: Counter[int] = field(default_factory=Counter)
    problem_sizes: list[tuple[int, int]] = field(default_factory=list)
    thought_sizes: list[tuple[int, int]] = field(default_factory=list)
    lengths: dict[str, list[int]] = field(default_factory=dict)

    def add(self, other: RowStats) -> None:
        for name, value in vars(other).items():
            mine = getattr(self, name)
            if isinstance(value, int):
                setattr(self, name, mine + value)
            elif isinstance(value, list):
                mine.extend(value)
            elif isinstance(value, Counter):
                mine.update(value)
            else:
                for key, numbers in value.items():
                    mine.setdefault(key, []).extend(numbers)

    def see(self, sample: Sample, length: Callable[[str], int]) -> None:
        texts = {
            "question": sample.question,
            "answer": sample.answer,
            "text trace": sample.text_trace,
            "thoughts": "".join(sample.thoughts),
        }
        lengths = {key: length(text) for key, text in texts.items() if text}
        for key, count in lengths.items():
            self.lengths.setdefault(key, []).append(count)
        self.long_questions += len(sample.question) > LONG_QUESTION
        self.control_tokens += any(map(CONTROL_TOKEN.search, texts.values()))
        self.images += 1 + len(sample.thought_images)
        self.visual_thoughts[len(sample.thought_images)] += 1
        self.problem_sizes.append(sample.problem_image.size)
        self.thought_sizes += [image.size for image in sample.thought_images]
        self.usable["evaluation"] += 1
        self.usable["opsd"] += bool(sample.thought_images)
        self.usable["sft"] += bool(sample.text_trace.strip())

    def see_bad(self, row: Row | None, bad: BadRow, parse: Parse) -> None:
        self.reasons[bad.reason] += 1
        if len(self.examples) < SHOWN:
            self.examples.append(str(bad))
        if row is None:
            return
        for use, needs in USES.items():  # a broken visual thought, say, does not disturb SFT
            with contextlib.suppress(BadRow):
                parse(row, needs)
                self.usable[use] += 1
        for column in (PROBLEM_IMAGE, *IMAGE_COLUMNS):
            try:
                self.images += row_image(row, column) is not None
            except BadRow as image:
                self.images += 1
                self.undecodable += image.reason == "broken_image"


def scan(
    dataset: ParquetDataset,
    rows: range,
    length: Callable[[str], int],
    positions: int | None = None,
) -> RowStats:
    """Statistics of some rows, every image decoded; positions: of the model, if it is known."""
    stats = RowStats()
    limits = ContextLimits(positions)

    def parse(row: Row, needs: RowNeeds) -> Sample:
        sample = parse_row(row, needs)
        if positions is not None:  # the least any prompt makes of it
            limits.check(row, (SMALLEST_IMAGE, TextSegment((0,) * length(sample.question))))
        return sample

    for index in rows:
        stats.rows += 1
        row = None
        try:
            row = dataset.read_row(index)
            stats.see(parse(row, WHOLE_ROWS), length)
        except BadRow as bad:
            stats.see_bad(row, bad, parse)
    return stats


def scan_all(
    dataset: ParquetDataset,
    length: Callable[[str], int],
    num_workers: int = 1,
    positions: int | None = None,
) -> RowStats:
    """`scan` of a whole dataset, a row group at a time, over threads (decoding frees the GIL)."""
    parts = [range(group.first, group.first + group.rows) for group in dataset.groups]
    total = RowStats()
    # Each part reads through its own copy: the row-group cache is not made for threads.
    with (
        tqdm(total=len(dataset), desc=dataset.name, unit="row", delay=2, leave=False) as bar,
        ThreadPoolExecutor(max(1, num_workers)) as pool,
    ):
        for stats in pool.map(
            lambda part: scan(copy.copy(dataset), part, length, positions), parts
        ):
            total.add(stats)
            bar.update(stats.rows)
    return total


def _group(group: RowGroup) -> str:
    return f"{group.rows} rows, {group.bytes / 2**20:.1f} MiB"


def _range(values: Sequence[int]) -> str:
    if not values:
        return "none"
    return f"min {min(values)}, median {int(np.median(values))}, max {max(values)}"


def _sizes(sizes: list[tuple[int, int]]) -> str:
    if not sizes:
        return "none"
    ordered = sorted(sizes, key=lambda size: size[0] * size[1])
    smallest, middle, largest = (ordered[i] for i in (0, len(ordered) // 2, -1))
    words = (f"{w} x {h}" for w, h in (smallest, middle, largest))
    return "min {}, median {}, max {} (width x height, by area)".format(*words)


def _schema_lines(files: Iterable[Path], needs: RowNeeds) -> tuple[Lines, bool]:
    """Columns over all files, and whether every file can be used."""
    used: dict[str, None] = {}
    others: dict[str, None] = {}
    problems: dict[str, None] = {}
    for file in files:
        try:
            with open_parquet(file) as parquet:
                report = inspect_schema(parquet.schema_arrow, needs)
                whole = inspect_schema(parquet.schema_arrow, WHOLE_ROWS)
        except (ValueError, OSError) as error:
            problems[str(error)] = None
            continue
        used.update(dict.fromkeys(whole.used))
        others.update(dict.fromkeys(name for name in report.found if name not in whole.used))
        for kind, names in (("missing", report.missing), ("wrong type", whole.wrong_type)):
            problems.update(dict.fromkeys(f"{kind}: {name} ({file.name})" for name in names))
    lines = [
        ("columns found", ", ".join(used) or "none of those used"),
        ("columns ignored", ", ".join(others) or "none"),
        ("columns missing", "\n".join(problems) or "none"),
    ]
    return lines, not problems


def check_dataset(
    name: str,
    files: Sequence[Path],
    *,
    use: str = "opsd",
    length: Callable[[str], int] = len,
    unit: str = "characters",
    num_workers: int = 1,
    positions: int | None = None,
) -> tuple[Lines, bool]:
    """Table of one dataset as (label, value) lines, and whether it can be used."""
    schema_lines, ok = _schema_lines(files, USES[use])
    lines: Lines = [("files", str(len(files)))]
    if not ok:
        return [*lines, *schema_lines, ("SCHEMA ERROR", f"cannot be used for {use}")], False
    try:
        dataset = ParquetDataset(name, files, WHOLE_ROWS)
        stats = scan_all(dataset, length, num_workers, positions)
    except ValueError as error:  # no rows, or a file went away
        return [*lines, *schema_lines, ("ERROR", str(error))], False
    largest = max(dataset.groups, key=lambda group: group.bytes)
    lines += [
        ("row groups", f"{len(dataset.groups)}, the largest of {_group(largest)}"),
        ("rows", str(stats.rows)),
        *schema_lines,
        *_row_lines(stats, unit),
        *(("note", note) for note in _notes(stats)),
        *(("WARNING", warning) for warning in _warnings(stats, use, largest, positions)),
    ]
    return lines, True


def _row_lines(stats: RowStats, unit: str) -> Lines:
    bad = stats.reasons.total()
    reasons = ", ".join(f"{count} {reason}" for reason, count in stats.reasons.most_common())
    counts = ", ".join(f"{n} rows with {k}" for k, n in sorted(stats.visual_thoughts.items()))
    return [
        ("images", str(stats.images)),
        ("images undecodable", str(stats.undecodable)),
        ("bad rows", f"{bad} ({reasons})" if bad else "0"),
        *((f"usable for {use}", f"{stats.usable[use]} rows") for use in USES),
        ("visual thoughts", counts or "none"),
        ("problem image", _sizes(stats.problem_sizes)),
        ("visual thought", _sizes(stats.thought_sizes)),
        *((f"{text} ({unit})", _range(values)) for text, values in stats.lengths.items()),
        *(("bad row", example) for example in stats.examples[:SHOWN]),
    ]


def _notes(stats: RowStats) -> Iterator[str]:
    if stats.control_tokens:
        yield (
            f"{stats.control_tokens} rows hold control tokens such as <|im_end|> in their texts, "
            "which become control ids, as in the authors' code"
        )


def _warnings(stats: RowStats, use: str, largest: RowGroup, positions: int | None) -> Iterator[str]:
    if stats.long_questions and positions is None:
        yield (
            f"{stats.long_questions} rows have questions of more than {LONG_QUESTION} characters, "
            "which few models have positions for: --tokenizer DIR counts"
        )
    lost = stats.rows - stats.usable[use]
    if lost > MAX_BAD_RATE * stats.rows:
        yield (
            f"{lost} of {stats.rows} rows cannot be used for {use}, more than the "
            f"{MAX_BAD_RATE:.0%} training allows"
        )
    if largest.bytes > LARGE_GROUP:
        yield (
            f"a row group holds {_group(largest)}; random reads are faster with row_group_size=100"
        )


def find_datasets(path: Path, split: str) -> list[tuple[str, list[Path] | ValueError]]:
    """(name, files) at a path; an error in place of the files of a dataset without the split.

    Raises ValueError if there is nothing at the path.
    """
    if os.path.lexists(path) and not os.path.isdir(path):
        return [(path.stem, [path])]
    if not os.path.isdir(path):
        raise ValueError(f"{path} does not exist")
    single = is_dataset_folder(path)
    folders = [path] if single else sorted(p for p in path.iterdir() if is_dataset_folder(p))
    if not folders:
        raise ValueError(
            f"{path} holds no parquet files; expected a .parquet file, a dataset folder "
            "(NAME/data/*.parquet) or a folder of those"
        )
    found: list[tuple[str, list[Path] | ValueError]] = []
    for folder in folders:
        try:
            found.append((folder.resolve().name, split_files(folder, split)))
        except ValueError as error:
            found.append((folder.resolve().name, error))
    return found


def format_table(title: str, lines: Lines) -> str:
    width = max(len(label) for label, _ in lines)
    out = [title]
    for label, value in lines:
        first, *rest = value.splitlines() or [""]
        out.append(f"  {label:<{width}}  {first}")
        out += [f"  {'':<{width}}  {line}" for line in rest]
    return "\n".join(out)


def _length_function(
    tokenizer_path: str | None,
) -> tuple[Callable[[str], int], str, int | None]:
    """Length of a text, its unit, and the rope positions of the model, if it is known."""
    if tokenizer_path is None:
        return len, "characters", None
    from modeling.release.tokenizer import load_tokenizer

    tokenizer: Any = load_tokenizer(tokenizer_path)[0]
    positions = None
    if (Path(tokenizer_path) / "llm_config.json").is_file():
        positions = read_llm_config(tokenizer_path).max_position_embeddings
    encode = ContextBuilder(tokenizer, to_pixels, max_text_tokens=positions).encode
    lock = threading.Lock()  # tokenizers refuse concurrent use

    @lru_cache(maxsize=64)  # a row that is bad for one use is looked at for each
    def length(text: str) -> int:
        with lock:
            return len(encode(text))

    return length, "tokens", positions


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m data.check", description="Check ThinkMorph-schema parquet files."
    )
    parser.add_argument(
        "path", type=path_argument, help="parquet file, dataset folder, or folder of datasets"
    )
    parser.add_argument(
        "--tokenizer",
        type=path_argument,
        metavar="DIR",
        help="checkpoint folder: lengths in tokens, and questions that its model has no positions "
        "for are bad rows",
    )
    parser.add_argument("--split", default="train", help="split to read (default: train)")
    parser.add_argument(
        "--use", choices=sorted(USES), default="opsd", help="what the data is for (default: opsd)"
    )
    parser.add_argument(
        "--num_workers",
        type=number(int, at_least=1, at_most=1024),
        default=min(8, os.cpu_count() or 1),
        help="decoding threads",
    )
    options = parser.parse_args(arguments)
    length, unit, positions = _length_function(options.tokenizer)
    datasets = find_datasets(Path(options.path), options.split)
    good = True
    for name, files in datasets:
        if isinstance(files, ValueError):
            lines, ok = [("ERROR", str(files))], False
        else:
            lines, ok = check_dataset(
                name, files, use=options.use, length=length, unit=unit,
                num_workers=options.num_workers, positions=positions,
            )  # fmt: skip
        print(format_table(f"{name} (split {options.split})", lines), flush=True)
        good &= ok
    return 0 if good else 1


if __name__ == "__main__":
    run_main(main)
