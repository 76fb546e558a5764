# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""train_visual_opsd_offline: its own settings and those that act otherwise than in the other
trainers, two values each, and what is seen of them where they act.

A new field of `OfflineConfig` without a row here or in the tables of those fails here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from data.teacher_cache import TeacherCache
from scripts.visual_opsd import train_visual_opsd_offline
from scripts.visual_opsd.processes import init_distributed
from scripts.visual_opsd.train_visual_opsd_offline import main
from scripts.visual_opsd.training.offline import KD_LOSSES, OFFLINE_DEFAULTS, OfflineConfig
from tests.arrivals import Arrival, Stop, check_arrival, check_complete, given_in_run, spy, stop
from tests.visual_opsd.teacher_caches import PROMPT, collect
from tests.visual_opsd.training import test_sft_flags
from tests.visual_opsd.training.trainers import idle_settings
from tests.visual_opsd.training.training_flags import (
    TrainRun,
    loss,
    record,
    training_rows,
)
from tests.visual_opsd.training_runs import TINY_BAGEL, train_arguments

# What no form has a use for, which it refuses (test_unused_settings.py).
IDLE = set.intersection(
    *(idle_settings(train_visual_opsd_offline, "--kd_loss", kind) for kind in KD_LOSSES)
)
ALONE = {"device": "test_device"}


def teacher_has(part: str) -> Callable[[TrainRun], bool]:
    """Whether the teacher that is trained on was told this."""
    return lambda run: (
        TeacherCache.open(run.given["teacher_cache"]).contents["prompts"][part] is not None
    )


def chosen(run: TrainRun) -> list[int]:
    """Of the completions of each row, the number of the one that was taken."""
    cache = TeacherCache.open(run.given["teacher_cache"])
    lists = {tuple(cache.read(place)[0].ids for place in places) for places in cache.rows.values()}
    return [
        next(ids.index(row.completion.ids) for ids in lists if row.completion.ids in ids)
        for row in run.rows
    ]


def rows(places: Mapping[str, Path]) -> dict[str, Arrival]:
    return {
        "teacher_cache": Arrival(
            [places["four"], places["eight"]],
            lambda run: {row.taught.entries.shape[1] for row in run.rows},
            lambda run: {4 if run.given["teacher_cache"].name == "four" else 8},
        ),
        # A cache is of the teacher's context; test_offline.py has another one refused.
        "use_reference_intro": Arrival([False, True], teacher_has("intro")),
        "use_transition_prompt": Arrival([True, False], teacher_has("transition")),
        "kd_loss": Arrival(
            ["jsd", "kl"],
            lambda run: (run.one("chunked_opsd_loss", "config").beta == 0,
                         run.one("chunked_opsd_loss", "config").token_clip is None),
            lambda run: (run.given["kd_loss"] == "kl",) * 2,
        ),
        "kd_use_vt_weights": Arrival(
            [True, True, False, False],
            lambda run: any(bool((row.taught.weight != 1).any()) for row in run.rows),
        ),
        "jsd_weight": Arrival([0.5, 1.5], loss("jsd_weight")),
        "jsd_beta": Arrival([0.3, 0.5, 0.6, 0.5], loss("beta"), runs="ac"),
        "jsd_temperature": Arrival([1.5, 2.5], loss("temperature")),
        "jsd_top_k": Arrival([3, 4], loss("top_k")),
        "jsd_token_clip": Arrival([0.05, 0.05, 0.1, 0.05], loss("token_clip"), runs="ac"),
        "jsd_clip_scope": Arrival(
            ["entry", "entry", "token", "entry"], loss("clip_scope"), runs="ac"
        ),
        "jsd_tail_bucket": Arrival([True, False, False, True], loss("tail_bucket")),
        "ce_weight": Arrival([0.25, 0.75], loss("ce_weight")),
        "loss_chunk_size": Arrival([3, 5], lambda run: run.one("chunked_opsd_loss", "chunk_size")),
        "global_seed": Arrival(
            [11, 12, 13, 14],
            lambda run: (run.given["global_seed"],
                         run.one("make_loader", "prepare").seed, len(set(chosen(run))) > 1),
            lambda run: (run.given["global_seed"],) * 2 + (True,),
        ),
        "max_forward_tokens": Arrival(
            [4000, 5000, 4000, 5000],
            lambda run: run.one("make_loader", "prepare").limits.tokens,
        ),
    }  # fmt: skip


NAMES = ("four", "eight")
TABLE = rows(dict.fromkeys(NAMES, Path("four")))  # for the names of its rows


@pytest.fixture(scope="module")
def table(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Arrival]:
    folder = tmp_path_factory.mktemp("caches")
    made: dict[str, Any] = {"completions": "base", "completions_per_row": 4}
    places = {
        name: collect(
            world, folder / name, **made, top_k=k, max_forward_tokens=limit,
            use_reference_intro=intro, use_transition_prompt=not intro,
        )
        for name, k, limit, intro in (("four", 4, 4000, False), ("eight", 8, 5000, True))
    }  # fmt: skip
    return rows(places)


@pytest.fixture(scope="module")
def runs(
    table: dict[str, Arrival], world: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[TrainRun]:
    found = []
    for number, name in enumerate("abcd"):
        given = {
            "model_path": TINY_BAGEL, "dataset_config_file": world / "datasets.yaml",
            "data_root": world, "results_dir": tmp_path_factory.mktemp("run") / name,
            "device": "cpu", "total_steps": 2, "warmup_steps": 0, "global_batch_size": 3,
            "num_workers": 0, "save_release": False, "progress": False, "plan": False, **PROMPT,
        }  # fmt: skip
        found.append(record(main, name, {**given, **given_in_run(table, number)}))
    return found


def test_every_setting_has_a_row(table: dict[str, Any]) -> None:
    """Here or, where the trainer does with it what it does for every objective, there."""
    places = dict.fromkeys(test_sft_flags.NAMES, Path("places"))
    others = {*training_rows(places, ""), *test_sft_flags.ELSEWHERE}
    shared = others - set(table) - IDLE - set(ALONE)
    check_complete(OfflineConfig, table, ALONE, dict.fromkeys(IDLE), dict.fromkeys(shared))
    assert all(test in globals() for test in ALONE.values())


@pytest.mark.parametrize("name", TABLE)
def test_every_setting_arrives(table: dict[str, Any], runs: list[TrainRun], name: str) -> None:
    check_arrival(name, table[name], runs)


@pytest.mark.parametrize("device", ["cpu", "cuda", "auto"])
def test_device(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    calls = spy(monkeypatch, init_distributed, stop)
    with pytest.raises(Stop):
        main(["--device", device])
    assert calls[0]["device"] == device


def test_the_defaults(monkeypatch: pytest.MonkeyPatch, world: Path, tmp_path: Path) -> None:
    """What the command trains with where nothing is said."""
    from scripts.visual_opsd.training.trainer import Trainer

    seen = spy(monkeypatch, Trainer, stop)
    named = train_arguments(world, tmp_path)
    left = [w for n, w in enumerate(named) if named[n - n % 2] != "--total_steps"]
    with pytest.raises(Stop):
        main(left)
    config = seen[0]["config"]
    assert (config.optim.total_steps, config.loss.jsd_weight) == (8000, 0.5)
    assert (config.loss.jsd_temperature, config.loss.ce_weight) == (2.0, 1.0)
    assert set(OFFLINE_DEFAULTS) == {
        "results_dir", "total_steps", "jsd_weight", "jsd_temperature", "ce_weight",
    }  # fmt: skip
