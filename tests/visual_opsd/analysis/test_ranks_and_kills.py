# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The tools that read a model on two ranks and after a kill: what one whole run gives."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.worlds.writer import write_spatial_navigation
from scripts.visual_opsd import evaluate, kl_diagnostic
from scripts.visual_opsd.analysis import attention, diagnosis
from scripts.visual_opsd.analysis.baseline import load_divergences
from scripts.visual_opsd.analysis.kl_measurement import choose_rows
from scripts.visual_opsd.analysis.kl_statistics import COLUMNS
from scripts.visual_opsd.evaluation.store import RankedLines
from tests.conftest import TINY_BAGEL
from tests.data.synthetic import split_file
from tests.visual_opsd.analysis.two_rank_tools import two_ranks

ROWS, SEED = 6, 5
READ = {"model_path": TINY_BAGEL, "data": "Spatial_Navigation", "split": "train",
        "vit_max_size": 112, "vit_min_size": 14, "device": "cpu", "progress": False}  # fmt: skip
DIAGNOSTIC = {"num_samples": ROWS, "seed": SEED, "sample_max_new_tokens": 40,
              "sample_batch_size": 1, "pack_tokens": 700, "figures": False}  # fmt: skip
ATTENTION = {"context": "vae+vit", "limit": 7, "seed": SEED, "vae_max_size": 64,
             "vae_min_size": 32}  # fmt: skip
DRAWING = {"prompt_style": "packer", "arms": "removed", "num_timesteps": 2, "limit": 3,
           "max_new_tokens": 40, "vae_max_size": 64, "vae_min_size": 32}  # fmt: skip
Flags = Callable[..., list[str]]


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> Flags:
    """A command line over nine mazes, whose results go to a folder."""
    root = tmp_path_factory.mktemp("world")
    folder = write_spatial_navigation(
        root, rows=9, heldout_rows=0, seed=3, sizes=(3, 4), style="full"
    )
    split_file(folder, "train", 1)

    def command(out: Path, settings: dict[str, Any]) -> list[str]:
        given = {**READ, "data_root": root, **settings, "output_dir": out}
        return [f"--{name}={value}" for name, value in given.items()]

    return command


@pytest.fixture(scope="module")
def whole(flags: Flags, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of one process that nobody disturbed."""
    out = tmp_path_factory.mktemp("whole")
    assert evaluate.main(flags(out / "evaluate", {"max_new_tokens": 40})) == 0
    assert kl_diagnostic.main(flags(out / "kl", DIAGNOSTIC)) == 0
    assert attention.main(flags(out / "attention", ATTENTION)) == 0
    return out


def read(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text())
    del found["settings"]  # names the folder
    return found


def same_diagnosis(one: Path, other: Path) -> bool:
    """Completions to the last byte; divergences within rounding, as rows are packed otherwise."""
    for a, b in zip(load_divergences(one, "base"), load_divergences(other, "base"), strict=True):
        for name in COLUMNS:
            np.testing.assert_allclose(a.columns[name], b.columns[name], atol=1e-5)
    first, second = ((out / "completions.jsonl").read_bytes() for out in (one, other))
    return first == second


def test_two_processes_agree_with_one(flags: Flags, whole: Path, tmp_path: Path) -> None:
    """Four tools, one launch; each row is done once."""
    calls = {
        "evaluate": flags(tmp_path / "evaluate", {"max_new_tokens": 40}),
        "kl_diagnostic": flags(tmp_path / "kl", DIAGNOSTIC),
        "analysis.vt_intervention": flags(tmp_path / "vt", DRAWING),
        "analysis.attention": flags(tmp_path / "attention", ATTENTION),
    }
    codes, outputs = two_ranks(calls, tmp_path / "done")
    assert codes == [0, 0], outputs
    assert "all" in outputs[0] and "all" not in outputs[1]  # rank 0 alone prints
    assert "answer tokens look at" in outputs[0] and "answer tokens" not in outputs[1]
    chosen = choose_rows([9], [9.0], ROWS, SEED)
    rows = {
        "evaluate predictions": range(9), "evaluate timing": range(9),
        "sampled": chosen, "measured": chosen, "kl_diagnostic rows": chosen,
        "analysis.vt_intervention drawings": range(3),
        "analysis.vt_intervention outputs": range(3), "analysis.attention rows": range(7),
    }  # fmt: skip
    ours, theirs = (json.loads((tmp_path / f"done-{rank}").read_text()) for rank in range(2))
    assert ours.keys() == theirs.keys() == rows.keys()
    for name, expected in rows.items():
        assert sorted(ours[name] + theirs[name]) == list(expected), name
        assert abs(len(ours[name]) - len(theirs[name])) <= 1, name
    for folder in ("evaluate", "kl", "vt", "attention"):
        assert not list((tmp_path / folder).glob("*.rank_*"))
    predictions = (tmp_path / "evaluate" / "predictions.jsonl").read_bytes()
    assert predictions == (whole / "evaluate" / "predictions.jsonl").read_bytes()
    assert read(tmp_path / "evaluate" / "summary.json")["processes"] == 2
    assert same_diagnosis(tmp_path / "kl", whole / "kl")
    figures = [read(out / "attention" / "attention.json") for out in (tmp_path, whole)]
    assert figures[0] == figures[1]


def kill_after(patch: pytest.MonkeyPatch, parts: int) -> None:
    """End the process, as far as it can see, once so many parts are on file."""
    append, calls = RankedLines.append, []

    def dying(self: RankedLines, rank: int, records: Any) -> None:
        append(self, rank, records)
        calls.append(rank)
        if len(calls) == parts:
            with (self.folder / f"{self.name}.rank_{rank}.jsonl").open("a") as stream:
                stream.write('{"index": 5, "da')
            raise KeyboardInterrupt

    patch.setattr(RankedLines, "append", dying)


def test_attention_is_the_same_after_a_kill(
    flags: Flags, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = flags(tmp_path, ATTENTION)
    with monkeypatch.context() as patch:
        kill_after(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            attention.main(command)
    assert not (tmp_path / "attention.json").exists()
    measured: list[int] = []
    measure = attention.Watching._read

    def counted(self: Any, index: int, row: Any) -> Any:
        measured.append(index)
        return measure(self, index, row)

    monkeypatch.setattr(attention.Watching, "_read", counted)
    assert attention.main(command) == 0
    assert len(measured) == 3
    for name in ("attention.json", "rows.jsonl"):
        found, expected = (out / name for out in (tmp_path, whole / "attention"))
        if name == "rows.jsonl":
            assert found.read_bytes() == expected.read_bytes()
        else:
            assert read(found) == read(expected)
    assert attention.main(command) == 0  # nothing is left to read
    assert len(measured) == 3
    assert read(tmp_path / "attention.json") == read(whole / "attention" / "attention.json")


def test_the_diagnostic_goes_on_after_a_kill(
    flags: Flags, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = flags(tmp_path, DIAGNOSTIC)
    with monkeypatch.context() as patch:
        kill_after(patch, 1)  # a window of four rows
        with pytest.raises(KeyboardInterrupt):
            kl_diagnostic.main(command)
    assert not (tmp_path / "kl_diagnostic.json").exists()
    assert kl_diagnostic.main(command) == 0
    result = read(tmp_path / "kl_diagnostic.json")
    assert (result["resumed_rows"], result["completions"]["n"]) == (4, ROWS)
    assert same_diagnosis(tmp_path, whole / "kl")
    assert not list(tmp_path.glob("*.rank_*"))
    # Once more, with other figures only: nothing is measured, and the verdict is drawn anew.
    monkeypatch.setattr(diagnosis.Diagnosis, "_records", None)
    assert kl_diagnostic.main([*command, "--go_threshold=0.5"]) == 0
    again = read(tmp_path / "kl_diagnostic.json")
    assert again["resumed_rows"] == ROWS and again["go_test"]["threshold"] == 0.5
    assert again["base"] == result["base"]
