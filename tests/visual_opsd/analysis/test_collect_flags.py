# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""collect_traces: every setting, two values, and what is seen of it where it acts.

A new field of `CollectConfig` without a row fails here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from data.packing import group_by_tokens
from data.randomness import position_uniforms, row_generator
from data.sequence import LatentSegment
from data.teacher_cache import SUMMARY, write_shard
from scripts.visual_opsd.analysis.trace_rows import CollectConfig
from scripts.visual_opsd.collect_traces import main
from scripts.visual_opsd.loss.cached import read_entries
from scripts.visual_opsd.scored_rows import score_completion
from tests.arrivals import PROMPTS, Arrival, check_arrival, check_complete, given_in_run
from tests.arrivals import words as command_words
from tests.data.synthetic import write_dataset
from tests.visual_opsd.evaluation.evaluation_flags import (
    RowsRun,
    check_device,
    compute_rows,
    dtype_on_gpu,
    record,
    sampling_rows,
)
from tests.visual_opsd.training.training_flags import make_places

ALONE = {
    "device": "test_device", "precision": "test_precision", "overwrite": "test_overwrite",
}  # fmt: skip
WATCHED = (read_entries, write_shard, row_generator, score_completion, group_by_tokens)
SAMPLING = "ab"  # runs c and d score the traces of the data set


class Collected(RowsRun):
    shows_thoughts = True

    @property
    def summary(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.out / SUMMARY).read_text())
        return found

    @property
    def context(self) -> Any:
        """The teacher's context of the row with index 0."""
        (place,) = [n for n, name in enumerate(self.all("score_completion", "name"))
                    if name == f"Spatial_Navigation/{self.files[0].name} row 0"][:1]  # fmt: skip
        return self.all("score_completion", "teacher")[place]

    @property
    def row_values(self) -> dict[str, Any]:
        found: dict[str, Any] = pq.read_table(self.files[0]).slice(0, 1).to_pylist()[0]
        return found


def seeds(run: Collected) -> tuple[Any, Any]:
    """Of the rollout's numbers, and of the autoencoder's noise."""
    drawn = None
    if run.given["sample_do_sample"] and run.name in SAMPLING:
        drawn = [call["uniforms"][:, :3].tolist() for call in run.calls["generate"]]
    return drawn, {c["seed"] for c in run.calls["row_generator"] if c["purpose"] == "teacher"}


def expected_seeds(run: Collected) -> tuple[Any, Any]:
    seed, drawn = run.given["seed"], None
    if run.given["sample_do_sample"] and run.name in SAMPLING:
        order = [(call["step"], row) for call in run.calls["sample_completions"]
                 for row in call["row_ids"]]  # fmt: skip
        drawn = [[position_uniforms(seed, step, row, 3).tolist()] for step, row in order]
    return drawn, {seed} if run.given["teacher_vt"] == "vae+vit" else set()


def rows(places: Mapping[str, Path]) -> dict[str, Arrival]:
    return {
        "model_path": Arrival([places["model"], places["other"]],
                              lambda run: run.one("load_bagel", "path"),
                              lambda run: str(run.given["model_path"])),
        "dataset_config_file": Arrival(
            [places["train"], places["heldout"]],
            lambda run: {file.name.split("-")[0] for file in run.files},
            lambda run: {"heldout" if "heldout" in str(run.given["dataset_config_file"])
                         else "train"},
        ),
        "data_root": Arrival([places["one"], places["two"], places["two"], places["one"]],
                             lambda run: {file.parents[2] for file in run.files},
                             lambda run: {run.given["data_root"]}),
        "limit": Arrival([2, 3], lambda run: run.summary["rows"]),
        "completions": Arrival(
            ["base", "base", "trace", "trace"],
            lambda run: "base" if run.calls["sample_completions"] else "trace",
        ),
        "completions_per_row": Arrival(
            [2, 3, 1, 1], lambda run: run.summary["completions"] / run.summary["rows"]
        ),
        "top_k": Arrival([8, 16], lambda run: (run.one("read_entries", "top_k"),
                                               run.summary["top_k"]),
                         lambda run: (run.given["top_k"],) * 2),
        "teacher_vt": Arrival(
            ["vit", "vae+vit"],
            lambda run: {sum(isinstance(s, LatentSegment) for s in context)
                         for context in run.all("score_completion", "teacher")},
            lambda run: {int(run.given["teacher_vt"] == "vae+vit")},
        ),
        "seed": Arrival([41, 42, 43, 44], seeds, expected_seeds),
        "output_dir": Arrival(
            [places["results"] / f"cache-{name}" for name in "abcd"],
            lambda run: (run.given["output_dir"],
                         {call["folder"] for call in run.calls["write_shard"]}),
            lambda run: (run.given["output_dir"], {run.given["output_dir"]}),
        ),
        **sampling_rows(SAMPLING),
        "pack_tokens": Arrival(
            [7000, 8000], lambda run: run.given["pack_tokens"] in run.all("group_by_tokens",
                                                                          "limit")
            and run.given["pack_tokens"],
        ),
        **compute_rows(),
        **PROMPTS(places["prompts"]),
    }  # fmt: skip


NAMES = ("one", "two", "model", "other", "train", "heldout", "prompts", "results")
TABLE = rows(dict.fromkeys(NAMES, Path("places")))  # for the names of its rows


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Arrival]:
    places = make_places(tmp_path_factory.mktemp("flags"))
    write_dataset(places["one"], rows=4, split="heldout")
    return rows(places)


@pytest.fixture(scope="module")
def runs(table: dict[str, Arrival]) -> list[Collected]:
    return [
        record(main, name, {**given_in_run(table, number), "device": "cpu"}, WATCHED, Collected)
        for number, name in enumerate("abcd")
    ]


def test_every_setting_has_a_row(table: dict[str, Any]) -> None:
    check_complete(CollectConfig, table, ALONE)
    assert all(test in globals() for test in ALONE.values())


@pytest.mark.parametrize("name", TABLE)
def test_every_setting_arrives(table: dict[str, Any], runs: list[Collected], name: str) -> None:
    check_arrival(name, table[name], runs)


# ------------------------------------------------------------------------------- one by one


@pytest.mark.parametrize("device", ["cpu", "cuda", "auto"])
def test_device(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    check_device(main, monkeypatch, device)


@pytest.mark.parametrize(("precision", "dtype"), [("auto", torch.bfloat16),
                                                  ("fp32", torch.float32)])  # fmt: skip
def test_precision(
    runs: list[Collected], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, precision: str,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    given = {**runs[0].given, "output_dir": tmp_path, "precision": precision, "device": "cpu"}
    assert dtype_on_gpu(main, monkeypatch, given) == dtype


def test_overwrite(runs: list[Collected], tmp_path: Path) -> None:
    given = {**runs[2].given, "output_dir": tmp_path, "limit": 1}
    (tmp_path / SUMMARY).write_text("{}")
    with pytest.raises(ValueError, match="--overwrite"):
        main(command_words({**given, "overwrite": False}))
    assert main(command_words({**given, "overwrite": True})) == 0
    assert json.loads((tmp_path / SUMMARY).read_text())["rows"] == 1
