# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""train_sft: every setting, two values, and what is seen of it where it acts, in both modes.

A new field of `SFTConfig` without a row fails here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from data.sequence import TextSegment
from scripts.visual_opsd import train_sft
from scripts.visual_opsd.config import SFTConfig
from scripts.visual_opsd.processes import init_distributed
from scripts.visual_opsd.train_sft import main
from tests.arrivals import Arrival, Stop, check_arrival, check_complete, given_in_run, spy, stop
from tests.visual_opsd.training.trainers import idle_settings
from tests.visual_opsd.training.training_flags import (
    TrainRun,
    limits,
    loss,
    make_places,
    record,
    training_rows,
)

# What neither mode has a use for, which it refuses (test_unused_settings.py).
IDLE = set.intersection(
    *(idle_settings(train_sft, "--mode", mode) for mode in ("text", "interleaved"))
)
# The same lines of the same trainer: tests/visual_opsd/training/test_train_flags.py has them, and
# test_validation.py those of sampling, by which a validation's answers are written.
ELSEWHERE = {
    "visual_gen", "precision", "max_nonfinite_steps", "resume", "auto_resume", "resume_from",
    "take_over", "plan", "plan_gpus", "plan_gpu_gb", "dry_run",
    "lora_rank", "lora_alpha", "lora_targets", "on_save_error",
    "eval_every", "eval_data", "eval_split", "eval_limit", "keep_best", "early_stop",
    "sample_max_new_tokens", "sample_max_image_skips", "sample_batch_size",
}  # fmt: skip
ALONE = {"device": "test_device"}


def noised(run: TrainRun) -> float:
    """Weight of the flow's loss that a step's rows had, by their number of noised tokens."""
    scales = [step.flow_scale for step in run.all("run_pack", "step")]
    size = len(run.rows) // run.given["total_steps"]
    return round(scales[0] * sum(row.noised for row in run.rows[:size]), 6)


def answers(run: TrainRun) -> set[int]:
    """How many texts of a row are learnt."""
    return {
        sum(isinstance(s, TextSegment) and s.scored is not None for s in row.student)
        for row in run.rows
    }


def rows(places: Mapping[str, Path]) -> dict[str, Arrival]:
    """Runs a and c: text; b and d: interleaved."""
    own = {
        "mode": Arrival(["text", "interleaved"], lambda run: {row.noised > 0 for row in run.rows},
                        lambda run: {run.given["mode"] == "interleaved"}),
        "mse_weight": Arrival([1.0, 0.5, 1.0, 0.25], noised, runs="bd"),
        "timestep_shift": Arrival([1.0, 2.0, 1.0, 3.0],
                                  lambda run: run.one("encode_pictures", "time_shift"), runs="bd"),
        "jsd_temperature": Arrival([1.5, 2.5], loss("temperature")),
        "sft_format": Arrival(
            ["single", "single", "reference", "single"], answers,
            lambda run: {1 if run.given["sft_format"] == "single" else 2}, runs="ac",
        ),
        "global_seed": Arrival(
            [11, 12, 13, 14], lambda run: run.one("row_generator", "seed"), runs="bd"
        ),
        "max_forward_tokens": Arrival(
            [4000, 5000, 6000, 7000],
            lambda run: (limits(run).tokens,
                         {call["max_forward_tokens"] for call in run.calls["score_targets"]}),
            lambda run: (run.given["max_forward_tokens"],
                         {run.given["max_forward_tokens"]} if run.given["mode"] == "text"
                         else set()),
        ),
    }  # fmt: skip
    shared = {n: row for n, row in training_rows(places, "sft").items() if n not in IDLE}
    return {**shared, **own}


NAMES = ("one", "two", "model", "other", "train", "heldout", "prompts", "results")
TABLE = rows(dict.fromkeys(NAMES, Path("places")))  # for the names of its rows


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Arrival]:
    return rows(make_places(tmp_path_factory.mktemp("flags")))


@pytest.fixture(scope="module")
def runs(table: dict[str, Arrival]) -> list[TrainRun]:
    return [
        record(main, name, {**given_in_run(table, number), "device": "cpu"})
        for number, name in enumerate("abcd")
    ]


def test_every_setting_has_a_row(table: dict[str, Any]) -> None:
    check_complete(SFTConfig, table, ALONE, dict.fromkeys(IDLE), dict.fromkeys(ELSEWHERE))
    assert all(test in globals() for test in ALONE.values())


@pytest.mark.parametrize("name", TABLE)
def test_every_setting_arrives(table: dict[str, Any], runs: list[TrainRun], name: str) -> None:
    check_arrival(name, table[name], runs)


@pytest.mark.parametrize("mode", ["text", "interleaved"])
@pytest.mark.parametrize("device", ["cpu", "cuda", "auto"])
def test_device(monkeypatch: pytest.MonkeyPatch, device: str, mode: str) -> None:
    calls = spy(monkeypatch, init_distributed, stop)
    with pytest.raises(Stop):
        main(["--device", device, "--mode", mode])
    assert calls[0]["device"] == device
