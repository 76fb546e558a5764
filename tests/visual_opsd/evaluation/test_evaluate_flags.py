# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""evaluate: every setting, two values, and what is seen of it where it acts.

A new field of `EvaluateConfig` without a row fails here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from modeling.release.fingerprints import weights_fingerprint
from scripts.visual_opsd.evaluate import main
from scripts.visual_opsd.evaluation.benchmarks import open_benchmarks
from scripts.visual_opsd.evaluation.questions import EvaluateConfig
from scripts.visual_opsd.evaluation.summary import comparison
from tests.arrivals import (
    PROMPTS,
    Arrival,
    Stop,
    check_arrival,
    check_complete,
    given_in_run,
    spy,
    stop,
    words,
)
from tests.data.synthetic import write_dataset
from tests.visual_opsd.evaluation.evaluation_flags import (
    RowsRun,
    check_device,
    compute_rows,
    decoded_together,
    dtype_on_gpu,
    images,
    record,
    shows_noise,
)
from tests.visual_opsd.training.training_flags import HEAD, make_places

ALONE = {
    "device": "test_device", "precision": "test_precision", "overwrite": "test_overwrite",
    "compare": "test_compare", "benchmark": "test_benchmarks", "tsv_root": "test_benchmarks",
}  # fmt: skip


class Evaluation(RowsRun):
    @property
    def context(self) -> Any:
        return self.contexts[0]

    @property
    def row_values(self) -> dict[str, Any]:
        return self.cells(0)

    @property
    def shows_thoughts(self) -> bool:
        return len(images(self.context)) > 1


def rows(places: Mapping[str, Path]) -> dict[str, Arrival]:
    file = places["two"] / "Spatial_Navigation" / "data" / "train-00000-of-00001.parquet"
    return {
        "model_path": Arrival(
            [places["model"], places["other"]],
            lambda run: (
                float(run.calls["load_bagel"][0]["result"].model.state_dict()[HEAD][0, 0]),
                json.loads((run.out / "settings.json").read_text())["settings"]["model"],
            ),
            lambda run: (
                float(load_file(run.given["model_path"] / "model.safetensors")[HEAD][0, 0]),
                weights_fingerprint(run.given["model_path"]),
            ),
        ),
        "data": Arrival(
            ["Spatial_Navigation", "Spatial_Navigation", file,
             "Jigsaw_Assembly,Spatial_Navigation"],
            lambda run: [call["name"] for call in run.calls["ParquetDataset.__init__"]],
            lambda run: {"d": ["Jigsaw_Assembly", "Spatial_Navigation"]}.get(
                run.name, ["Spatial_Navigation"]
            ),
        ),
        "split": Arrival(
            ["heldout", "heldout", "heldout", "train"],
            lambda run: {line["file"].split("-")[0] for line in run.lines("predictions.jsonl")},
            lambda run: {"train" if run.name in "cd" else "heldout"},
        ),
        "data_root": Arrival(
            [places["one"], places["two"], places["one"], places["two"]],
            lambda run: {file.parents[2] for file in run.files},
            lambda run: {places["two"] if run.name == "c" else run.given["data_root"]},
        ),
        "context": Arrival(
            ["text", "vt", "noise", "noise"],
            lambda run: (run.shows_thoughts,
                         run.shows_thoughts and shows_noise(run.contexts, run.given["noise_seed"])),
            lambda run: (run.given["context"] != "text", run.given["context"] == "noise"),
        ),
        "noise_seed": Arrival(
            [1, 2, 3, 4],
            lambda run: [seed for seed in range(6) if shows_noise(run.contexts, seed)],
            lambda run: [run.given["noise_seed"]], runs="cd",
        ),
        "limit": Arrival([3, 2, 4, 6], lambda run: len(run.lines("predictions.jsonl"))),
        "output_dir": Arrival(
            [places["results"] / f"eval-{name}" for name in "abcd"],
            lambda run: (run.given["output_dir"], run.calls and sorted(
                p.name for p in run.given["output_dir"].iterdir() if p.suffix == ".json")),
            lambda run: (run.given["output_dir"],
                         ["settings.json", "summary.json", "timing.json"]),
        ),
        "batch_size": Arrival([1, 2, 3, 4], decoded_together),
        "prefill_tokens": Arrival(
            [9000, 8000],
            lambda run: run.one("sample_completions", "settings").max_prefill_tokens,
        ),
        "max_new_tokens": Arrival([4, 5, 6, 7], lambda run: run.one("generate",
                                                                    "max_new_tokens")),
        "image_skips": Arrival([0, 2], lambda run: run.one("generate", "max_image_skips")),
        **compute_rows(),
        **PROMPTS(places["prompts"]),
    }  # fmt: skip


NAMES = ("one", "two", "model", "other", "train", "heldout", "prompts", "results")
TABLE = rows(dict.fromkeys(NAMES, Path("places")))  # for the names of its rows


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Arrival]:
    places = make_places(tmp_path_factory.mktemp("flags"))
    write_dataset(places["two"], rows=4)
    return rows(places)


@pytest.fixture(scope="module")
def runs(table: dict[str, Arrival]) -> list[Evaluation]:
    return [
        record(main, name, {**given_in_run(table, number), "device": "cpu"}, kind=Evaluation)
        for number, name in enumerate("abcd")
    ]


def test_every_setting_has_a_row(table: dict[str, Any]) -> None:
    check_complete(EvaluateConfig, table, ALONE)
    assert all(test in globals() for test in ALONE.values())


@pytest.mark.parametrize("name", TABLE)
def test_every_setting_arrives(table: dict[str, Any], runs: list[Evaluation], name: str) -> None:
    check_arrival(name, table[name], runs)


def test_answers_are_greedy(runs: list[Evaluation]) -> None:
    for run in runs:
        assert all(numbers is None for numbers in run.all("generate", "uniforms"))


# ------------------------------------------------------------------------------- one by one


@pytest.mark.parametrize("device", ["cpu", "cuda", "auto"])
def test_device(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    check_device(main, monkeypatch, device)


@pytest.mark.parametrize(("precision", "dtype"), [("auto", torch.bfloat16),
                                                  ("fp32", torch.float32)])  # fmt: skip
def test_precision(
    runs: list[Evaluation], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, precision: str,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    given = {**runs[0].given, "output_dir": tmp_path, "precision": precision, "device": "cpu"}
    assert dtype_on_gpu(main, monkeypatch, given) == dtype


def test_overwrite(runs: list[Evaluation], tmp_path: Path) -> None:
    given = {**runs[0].given, "output_dir": tmp_path, "limit": 1}
    assert main(words(given)) == 0
    given["limit"] = 2
    with pytest.raises(ValueError, match="other settings"):
        main(words({**given, "overwrite": False}))
    assert main(words({**given, "overwrite": True})) == 0
    assert len((tmp_path / "predictions.jsonl").read_text().splitlines()) == 2


def test_compare(runs: list[Evaluation], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = runs[0]
    calls = spy(monkeypatch, comparison)
    assert main(words({**first.given, "output_dir": tmp_path})) == 0
    assert not calls and "comparison" not in json.loads((tmp_path / "summary.json").read_text())
    assert main(words({**first.given, "output_dir": tmp_path, "compare": first.out})) == 0
    compared = json.loads((tmp_path / "summary.json").read_text())["comparison"]
    assert (compared["n"], compared["difference"]) == (first.given["limit"], 0)
    assert [Path(p) for p in list(calls[0].values())[:2]] == [tmp_path, first.out]


@pytest.mark.parametrize("values", [("VStar", "a"), ("MMVP,VStar", "b")])
def test_benchmarks(monkeypatch: pytest.MonkeyPatch, values: tuple[str, str]) -> None:
    calls = spy(monkeypatch, open_benchmarks, stop)
    with pytest.raises(Stop):
        main(["--device", "cpu", "--benchmark", values[0], "--tsv_root", values[1]])
    assert tuple(list(calls[0].values())[:2]) == values
