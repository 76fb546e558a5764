# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""kl_diagnostic: every setting, two values, and what is seen of it where it acts.

A new field of `DiagnosticConfig` without a row fails here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from data.randomness import position_uniforms, row_generator
from data.sequence import LatentSegment
from modeling.release.fingerprints import weights_fingerprint
from scripts.visual_opsd.analysis.figures import pick_rows
from scripts.visual_opsd.analysis.kl_measurement import DiagnosticConfig, choose_rows, measure
from scripts.visual_opsd.analysis.kl_statistics import go_test
from scripts.visual_opsd.kl_diagnostic import main
from scripts.visual_opsd.scored_rows import score_completion
from tests.arrivals import ABSENT, PROMPTS, Arrival, check_arrival, check_complete, given_in_run
from tests.arrivals import words as command_words
from tests.data.synthetic import write_dataset
from tests.visual_opsd.evaluation.evaluation_flags import (
    RowsRun,
    check_device,
    compute_rows,
    dtype_on_gpu,
    images,
    record,
    sampling_rows,
    shows_noise,
)
from tests.visual_opsd.training.training_flags import make_places

ALONE = {
    "device": "test_device", "precision": "test_precision", "overwrite": "test_overwrite",
    "baseline": "test_baseline",
}  # fmt: skip
WATCHED = (choose_rows, measure, go_test, row_generator, score_completion, pick_rows)
SAMPLING = "abd"  # run c scores the traces of the data set


class Diagnostic(RowsRun):
    shows_thoughts = True

    @property
    def scored(self) -> dict[int, Any]:
        """What was measured, by the row's index."""
        return {s.index: s for call in self.calls["measure"] for s in call["scored"]}

    @property
    def context(self) -> Any:
        return self.scored[min(self.scored)].teacher

    @property
    def row_values(self) -> dict[str, Any]:
        return self.cells(min(self.scored))


def models(run: Diagnostic) -> tuple[list[str], bool]:
    """The folders that were read, and whether the first is the base that all is compared with."""
    identity = json.loads((run.out / "kl_diagnostic.json").read_text())["identity"]
    paths = [str(path) for path in run.all("load_bagel", "path")]
    return paths, identity["base"] == weights_fingerprint(paths[0])


def expected_models(run: Diagnostic) -> tuple[list[str], bool]:
    trained, base = run.given["model_path"], run.given["base_path"]
    base = trained if base is ABSENT else base
    return list(dict.fromkeys(map(str, (base, trained)))), True


def expected_files(run: Diagnostic) -> set[tuple[Any, str]]:
    """(root, split) of the rows, from the settings that name them."""
    g = run.given
    if isinstance(g["data"], Path):
        return {(g["data"].parents[2], g["data"].name.split("-")[0])}
    split = g["split"]
    if g["data"] is ABSENT:
        split = "heldout" if "heldout" in str(g["dataset_config_file"]) else "train"
    return {(g["data_root"], split)}


def files(run: Diagnostic) -> set[tuple[Any, str]]:
    return {(file.parents[2], file.name.split("-")[0]) for file in run.files}


def seeds(run: Diagnostic) -> tuple[Any, ...]:
    """Of the choice of rows, the rollout's numbers, the noise, the autoencoder."""
    drawn = None
    if run.given["sample_do_sample"] and run.name in SAMPLING:
        order = [index for call in run.calls["sample_completions"] for index in call["row_ids"]]
        numbers = [row for call in run.calls["generate"] for row in call["uniforms"]]
        drawn = {i: row[:3].tolist() for i, row in zip(order, numbers, strict=True)}
    noise = {index: scored.controls["noise"] for index, scored in run.scored.items()}
    return (
        run.one("choose_rows", "seed"), drawn,
        [s for s in range(50) if shows_noise(noise, s)],
        {c["seed"] for c in run.calls["row_generator"] if c["purpose"] != "noise control"},
    )  # fmt: skip


def expected_seeds(run: Diagnostic) -> tuple[Any, ...]:
    seed, drawn = run.given["seed"], None
    if run.given["sample_do_sample"] and run.name in SAMPLING:
        drawn = {i: position_uniforms(seed, 0, i, 3).tolist() for i in sorted(run.scored)}
    latents = {seed} if run.given["teacher_vt"] == "vae+vit" else set()
    return seed, drawn, [seed], latents


def rows(places: Mapping[str, Path]) -> dict[str, Arrival]:
    file = places["two"] / "Spatial_Navigation" / "data" / "train-00000-of-00001.parquet"
    return {
        "model_path": Arrival([places["model"], places["other"], places["other"], places["model"]],
                              models, expected_models),
        "base_path": Arrival([ABSENT, places["model"], ABSENT, places["other"]],
                             models, expected_models),
        "dataset_config_file": Arrival(
            [places["train"], places["heldout"]], files, expected_files
        ),
        "data": Arrival(  # run a: a row's place in its file is not its index
            ["Jigsaw_Assembly,Spatial_Navigation", ABSENT, "Spatial_Navigation", file],
            files, expected_files,
        ),
        "split": Arrival(["heldout", "train", "train", "heldout"], files, expected_files),
        "data_root": Arrival([places["one"], places["two"], places["two"], places["one"]],
                             files, expected_files),
        "num_samples": Arrival([3, 4], lambda run: len(run.lines("completions.jsonl"))),
        "completions": Arrival(
            ["student", "student", "trace", "student"],
            lambda run: "trace" if not run.calls["sample_completions"] else "student",
        ),
        "teacher_vt": Arrival(
            ["vit", "vae+vit", "vit", "vit"],
            lambda run: {sum(isinstance(s, LatentSegment) for s in context)
                         for scored in run.scored.values()
                         for context in (scored.teacher, *scored.controls.values())},
            lambda run: {int(run.given["teacher_vt"] == "vae+vit")},
        ),
        "controls": Arrival(
            ["noise", "blank,other", "none", "noise"],
            lambda run: {tuple(scored.controls) for scored in run.scored.values()},
            lambda run: {("noise", *{"blank,other": ("other", "blank"), "none": ("none",)}.get(
                run.given["controls"], ()))},
        ),
        "seed": Arrival([41, 42, 43, 44], seeds, expected_seeds),
        "go_threshold": Arrival(
            [0.25, 0.5],
            lambda run: next(v for k, v in run.calls["go_test"][0].items() if "threshold" in k),
        ),
        "output_dir": Arrival(
            [places["results"] / f"kl-{name}" for name in "abcd"],
            lambda run: (run.given["output_dir"],
                         (run.given["output_dir"] / "kl_diagnostic.json").exists()),
            lambda run: (run.given["output_dir"], True),
        ),
        "figures": Arrival(
            [True, False],
            lambda run: {name for name in ("kl_distribution.png", "token_heatmap.png")
                         if (run.out / name).exists()},
            lambda run: {"kl_distribution.png", "token_heatmap.png"} if run.given["figures"]
            else set(),
        ),
        "heatmap_samples": Arrival(
            [1, 1, 2, 2], lambda run: run.one("pick_rows", "count"), runs="ac"
        ),
        **sampling_rows(SAMPLING),
        "pack_tokens": Arrival([7000, 8000], lambda run: run.one("measure", "pack_tokens")),
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
def runs(table: dict[str, Arrival]) -> list[Diagnostic]:
    return [
        record(main, name, {**given_in_run(table, number), "device": "cpu"}, WATCHED, Diagnostic)
        for number, name in enumerate("abcd")
    ]


def test_every_setting_has_a_row(table: dict[str, Any]) -> None:
    check_complete(DiagnosticConfig, table, ALONE)
    assert all(test in globals() for test in ALONE.values())


@pytest.mark.parametrize("name", TABLE)
def test_every_setting_arrives(table: dict[str, Any], runs: list[Diagnostic], name: str) -> None:
    check_arrival(name, table[name], runs)


def test_the_noise_teacher_sees_noise_and_the_teacher_does_not(runs: list[Diagnostic]) -> None:
    for run in runs:
        for scored in run.scored.values():
            real, noise = images(scored.teacher), images(scored.controls["noise"])
            assert torch.equal(real[0], noise[0])
            assert all(image.abs().max() <= 1 for image in real)
            assert all(image.abs().max() > 1 for image in noise[1:])


# ------------------------------------------------------------------------------- one by one


@pytest.mark.parametrize("device", ["cpu", "cuda", "auto"])
def test_device(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    check_device(main, monkeypatch, device)


@pytest.mark.parametrize(("precision", "dtype"), [("auto", torch.bfloat16),
                                                  ("fp32", torch.float32)])  # fmt: skip
def test_precision(
    runs: list[Diagnostic], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, precision: str,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    given = {**runs[0].given, "output_dir": tmp_path, "precision": precision, "device": "cpu"}
    assert dtype_on_gpu(main, monkeypatch, given) == dtype


def test_overwrite(runs: list[Diagnostic], tmp_path: Path) -> None:
    given = {**runs[0].given, "output_dir": tmp_path, "num_samples": 1, "figures": False}
    (tmp_path / "kl_diagnostic.json").write_text("{}")
    with pytest.raises(ValueError, match="--overwrite"):
        main(command_words({**given, "overwrite": False}))
    assert main(command_words({**given, "overwrite": True})) == 0
    assert "decision" in json.loads((tmp_path / "kl_diagnostic.json").read_text())


def test_baseline(runs: list[Diagnostic], tmp_path: Path, table: dict[str, Arrival]) -> None:
    """The base's completions and divergences are taken from there, and nowhere else."""
    first = runs[0]
    other, base = table["model_path"].values[1], first.given["model_path"]
    given = {**first.given, "model_path": other, "base_path": base, "output_dir": tmp_path}
    given |= {"figures": False, "sample_max_new_tokens": first.given["sample_max_new_tokens"]}
    found = record(main, "e", {**given, "baseline": first.out}, WATCHED, Diagnostic)
    here, there = (run.lines("completions.jsonl") for run in (found, first))
    assert [line["ids"] for line in here] == [line["ids"] for line in there]
    assert len(found.calls["sample_completions"]) == 1  # the student's own
    assert (
        found.calls["sample_completions"][0]["model"]
        is found.calls["load_bagel"][1]["result"].model
    )
    result = json.loads((tmp_path / "kl_diagnostic.json").read_text())
    before = json.loads((first.out / "kl_diagnostic.json").read_text())
    assert result["base"] == before["base"] and result["base"] != result["student"]
    assert before["is_baseline"] and not result["is_baseline"]
