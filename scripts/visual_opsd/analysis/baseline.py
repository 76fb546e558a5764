# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""What a run of the KL diagnostic leaves for later ones: completions and divergences per row."""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from data.json_lines import read_log
from data.sequence import Completion
from data.visual_thoughts import CONTROLS
from modeling.host.disk import disk_errors
from scripts.visual_opsd.analysis.kl_statistics import SampleDivergences, columns_of
from scripts.visual_opsd.evaluation.rows import RowName
from scripts.visual_opsd.evaluation.store import read_json
from scripts.visual_opsd.runs.identity import differences, stable_hash

SUMMARY = "kl_diagnostic.json"
_DIVERGENCES = "divergences.npz"
_HINT = (
    "give the output folder of a finished diagnostic of the base (run it first with --model_path "
    "BASE --output_dir DIR, then pass --baseline DIR)"
)


def completion_line(
    index: int, name: RowName, completion: Completion, decode: Callable[[Sequence[int]], str]
) -> dict[str, Any]:
    """A line of completions.jsonl; `scored` has one flag more than `ids` (the end)."""
    return {
        "index": index,
        **asdict(name),
        "text": decode(completion.ids),
        "ids": list(completion.ids),
        "scored": [int(flag) for flag in completion.scored],
        "capped": completion.capped,
    }


def completions_hash(lines: Iterable[Mapping[str, Any]]) -> str:
    """Digest of which rows were completed and with which ids."""
    return stable_hash([[x["index"], x["digest"], x["ids"], x["scored"]] for x in lines])


def encode_divergences(sample: SampleDivergences) -> dict[str, str]:
    """A completion's figures as JSON: base64 of each array's bytes."""
    arrays = {**sample.columns, "answer": sample.answer}
    return {name: b64encode(array.tobytes()).decode() for name, array in arrays.items()}


def decode_divergences(texts: Mapping[str, str]) -> SampleDivergences:
    """What `encode_divergences` was given."""
    columns = {
        name: np.frombuffer(b64decode(text), dtype=np.float32)
        for name, text in texts.items()
        if name != "answer"
    }
    return SampleDivergences(columns, np.frombuffer(b64decode(texts["answer"]), dtype=bool))


def save_divergences(folder: Path, blocks: Mapping[str, Sequence[SampleDivergences]]) -> None:
    """Write divergences.npz: for each block BLOCK_counts (samples,), BLOCK_answer and one array
    (tokens,) for each column, the samples' tokens one after the other."""
    arrays: dict[str, Any] = {}
    for block, samples in blocks.items():
        arrays[f"{block}_counts"] = np.array([s.answer.size for s in samples], dtype=np.int64)
        arrays[f"{block}_answer"] = np.concatenate([s.answer for s in samples])
        for name in samples[0].columns:
            arrays[f"{block}_{name}"] = np.concatenate([s.columns[name] for s in samples])
    with disk_errors(f"writing {folder / _DIVERGENCES}", folder):
        np.savez_compressed(folder / _DIVERGENCES, **arrays)


def load_divergences(folder: Path, block: str) -> list[SampleDivergences]:
    """One block of divergences.npz, sample by sample.

    Raises:
        ValueError: the file is absent or damaged.
    """
    path = folder / _DIVERGENCES
    try:
        with np.load(path) as arrays:
            bounds = np.cumsum([0, *arrays[f"{block}_counts"]]).tolist()
            answer = arrays[f"{block}_answer"]
            further = (kind for kind in CONTROLS if f"{block}_kl_{kind}" in arrays)
            names = columns_of(sorted({"noise", *further}))
            columns = {name: arrays[f"{block}_{name}"] for name in names}
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; {_HINT}") from None
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise ValueError(f"{path} is damaged ({error}): run the baseline again") from error
    if any(len(column) != bounds[-1] for column in (answer, *columns.values())):
        raise ValueError(f"{path} is damaged: arrays of different lengths; run the baseline again")
    return [
        SampleDivergences({n: c[a:b] for n, c in columns.items()}, answer[a:b])
        for a, b in pairwise(bounds)
    ]


@dataclass(frozen=True)
class Baseline:
    """A finished run's completions (lines) and the base's divergences, by row index.

    hash: of the completions.
    """

    folder: Path
    lines: dict[int, dict[str, Any]]
    base: dict[int, SampleDivergences]
    hash: str

    @property
    def indices(self) -> list[int]:
        return list(self.lines)

    def completion(self, index: int, name: RowName) -> Completion:
        """The base's completion of a row.

        Raises:
            ValueError: the row's content is not what the baseline saw.
        """
        line = self.lines[index]
        if line["digest"] != name.digest:
            raise ValueError(
                f"row {name.row} of {name.dataset}/{name.file} (pid {name.pid}) is not the row "
                f"that the baseline {self.folder} completed (pid {line['pid']}): the data changed; "
                "run the baseline again"
            )
        scored = tuple(bool(flag) for flag in line["scored"])
        return Completion(tuple(line["ids"]), scored, capped=bool(line["capped"]))


def read_baseline(folder: str | Path, wanted: Mapping[str, Any]) -> Baseline:
    """Read a baseline and check that it measured what this run would measure.

    Args:
        wanted: this run's identity (base weights, data, seed, sampling, prompts, precision).

    Raises:
        ValueError: no finished diagnostic there, other settings (named), or files that were
            changed since.
    """
    folder = Path(folder)
    summary = read_json(folder / SUMMARY, _HINT)
    different = differences(summary.get("identity") or {}, wanted)
    if different:
        raise ValueError(
            f"the baseline {folder} was measured with other settings ({'; '.join(different)}): "
            "repeat them here, or run the baseline again"
        )
    path = folder / "completions.jsonl"
    if not path.is_file():
        raise ValueError(f"{path} does not exist; {_HINT}")
    lines = read_log(path)
    digest = completions_hash(lines)
    if digest != summary["completions"]["hash"]:
        raise ValueError(
            f"{path} is not the file that {folder / SUMMARY} was made with (its "
            "token ids or rows differ): run the baseline again"
        )
    base = load_divergences(folder, "base")
    if [sum(line["scored"]) for line in lines] != [sample.answer.size for sample in base]:
        raise ValueError(f"{folder / _DIVERGENCES} and {path} do not fit; run the baseline again")
    indices = [int(line["index"]) for line in lines]
    return Baseline(
        folder,
        dict(zip(indices, lines, strict=True)),
        dict(zip(indices, base, strict=True)),
        digest,
    )
