# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The memory plan: held to tensors that exist, to sums by hand, to peaks measured on GPUs."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from modeling.bagel.config import BagelConfig, LLMConfig, VisionConfig
from scripts.bench.common import TRUE_SIZE, sized
from scripts.bench.lab import MAZE
from scripts.visual_opsd.config import LossSettings, SFTConfig, TrainConfig
from scripts.visual_opsd.training.interleaved import InterleavedSFT
from scripts.visual_opsd.training.memory_check import GPU, HOST, Finding, Room, judge, suggest
from scripts.visual_opsd.training.memory_plan import (
    Plan,
    largest_plan,
    least_plan,
    plan_memory,
    planned_phases,
)
from scripts.visual_opsd.training.memory_sizes import (
    Footprint,
    ReleaseSizes,
    RowLengths,
    World,
    largest_load,
    load_of,
    longest_row,
    make_footprint,
    shortest_row,
    student_weights,
)
from scripts.visual_opsd.training.objective import Objective
from scripts.visual_opsd.training.sharding import local_part
from scripts.visual_opsd.training.text_sft import TextSFT
from scripts.visual_opsd.training.visual_opsd import VisualOPSD
from scripts.visual_opsd.validation_config import ValidationSettings
from tests.visual_opsd.training.trainers import SMALL, build, one_process
from tests.visual_opsd.training_runs import TINY_BAGEL

CUDA = torch.device("cuda")


def footprint(
    model: BagelConfig = TRUE_SIZE, gpus: int = 1, objective: type[Any] = VisualOPSD, **changes: Any
) -> Footprint:
    config = TrainConfig() if objective is VisualOPSD else SFTConfig()
    if objective is InterleavedSFT:
        config = replace(config, loss=replace(config.loss, jsd_weight=0.0, ce_weight=1.0))
    made: Objective = objective(config)
    of = make_footprint(config, ReleaseSizes.of_model(model), made, World(gpus, gpus, CUDA))
    return replace(of, **changes)


def parts(plan: Plan) -> dict[str, float]:
    """Name -> bytes of what is always there."""
    return {part.name: part.size for part in plan.resident}


def moment(plan: Plan, phase: str) -> dict[str, float]:
    (found,) = (m for m in plan.moments if m.phase == phase)
    return {part.name: part.size for part in found.parts}


# --------------------------------------------------------------------------- tensors that exist


def held(tensors: Iterable[Tensor]) -> int:
    return sum(local_part(tensor).nbytes for tensor in tensors)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"teacher_mode": "fixed", "freeze_vit": True},
        {"teacher_mode": "self", "freeze_llm": True},
    ],
)
def test_weights_gradients_and_moments_are_exact(
    world: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    with one_process() as env:
        trainer = build(world, tmp_path, env, **{**SMALL, **changes})
        release = ReleaseSizes.read(TINY_BAGEL)
        env_world = World(1, 1, env.device)
        of = make_footprint(trainer.config, release, trainer.objective, env_world)
        gradients: list[int] = []
        trainer.optimizer.register_step_pre_hook(
            lambda *_: gradients.append(
                held(p.grad for p in trainer.trainable if p.grad is not None)
            )
        )
        assert trainer.train() == 0
    plan = largest_plan(of)
    moments = [t for state in trainer.optimizer.state.values() for t in state.values() if t.dim()]
    found = {"weights": held(trainer.student.parameters()), "moments": held(moments)}
    if trainer.teacher is not None and trainer.teacher.model is not None:
        found["teacher"] = held(trainer.teacher.model.parameters())
    assert parts(plan) == found
    assert [moment(plan, "optimise")["gradients"]] == gradients
    # A state's files hold the same tensors, and their names.
    written = sum(f.stat().st_size for f in (tmp_path / "checkpoints").rglob("*.distcp"))
    state = plan.first_save - of.release_bytes * of.save_release
    assert state < written < 1.35 * state


# ---------------------------------------------------------------------------------- sums by hand

HAND = BagelConfig(llm=LLMConfig(64, 3, 4, 2, 128, 100), vision=VisionConfig(32, 2, 2, 48))
LAYER = 64 * 64 + 64 + 2 * (64 * 32 + 32) + 64 * 64 + 2 * 16 + 3 * 64 * 128 + 2 * 64
VIT_LAYER = 4 * (32 * 32 + 32) + 2 * 32 * 48 + 48 + 32 + 4 * 32
TABLE = 70 * 70 * 64  # fixed
ROOT = 2 * 100 * 64 + (588 * 32 + 32 + 70 * 70 * 32 + 2 * 32) + (32 * 64 + 64 + 64 * 64 + 64) + 64
TRAINED = 3 * LAYER + 2 * VIT_LAYER + ROOT


def test_sums_by_hand() -> None:
    of = footprint(HAND, global_batch_size=6, gradient_accumulation_steps=2, pack_tokens=300)
    row = RowLengths(image=20, text=30, shown=20, shown_text=10, new=40)
    load = load_of(of, row)
    assert (row.student, row.teacher, row.longest) == (54, 88, 130)
    # Three rows a forward, two of them a pack; six decoded, with room for 1024 tokens and one more.
    assert (load.student, load.teacher, load.scored) == (2 * 96, 2 * 130, 2 * 41)
    assert (load.cache_tokens, load.prefill_tokens, load.repeated) == (
        6 * (54 + 1025),
        6 * 54,
        True,
    )
    plan = plan_memory(of, load)
    assert parts(plan) == {
        "weights": 4 * (TRAINED + TABLE), "moments": 8 * TRAINED, "teacher": 4 * (TRAINED + TABLE),
    }  # fmt: skip
    sample = moment(plan, "sample")
    assert sample["gathered weights"] == 2 * (TRAINED + TABLE)
    assert sample["cache"] == load.cache_tokens * 3 * 2 * 2 * 16 * 2
    assert moment(plan, "optimise") == {"gradients": 4 * TRAINED}
    assert planned_phases(of, load) == plan.phases()
    assert plan.allocated == max(plan.phases().values())
    assert [part.size for part in plan.disk] == [
        2 * (8 * (TRAINED + TABLE) + 8 * TRAINED), 2 * of.release_bytes,
    ]  # fmt: skip


def test_shards_divide_what_is_sharded_and_nothing_else() -> None:
    one, four = footprint(HAND), footprint(HAND, 4)
    assert four.shards == 4 and replace(four, num_shard=2).shards == 2
    whole, quarter = largest_plan(one), largest_plan(replace(four, global_batch_size=64))
    for name, size in parts(whole).items():
        assert size / 4 <= parts(quarter)[name] < size / 4 * 1.02, name
    assert moment(whole, "sample") == moment(quarter, "sample")
    with pytest.raises(ValueError, match="num_shard"):
        largest_plan(replace(four, num_shard=3))


def test_adapters() -> None:
    """A and B of every linear layer: rank times the sum of its sides."""
    sides = 2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128)
    of = footprint(HAND, lora_rank=8)
    plan = largest_plan(of)
    count = 3 * 8 * sides
    assert student_weights(of).trained == count
    assert parts(plan) == {
        "frozen base": 2 * (TRAINED + TABLE), "adapters": 4 * count, "moments": 8 * count,
        "teacher": 4 * count,
    }  # fmt: skip
    assert moment(plan, "optimise")["gradients"] == 4 * count
    fixed = largest_plan(replace(of, teacher_mode="fixed", lora_targets=("q_proj", "v_proj")))
    assert parts(fixed) == {
        "frozen base": 2 * (TRAINED + TABLE), "adapters": 4 * 3 * 8 * (128 + 96),
        "moments": 8 * 3 * 8 * (128 + 96),
    }  # fmt: skip


def test_where_moments_and_shards_may_lie() -> None:
    of = footprint(HAND)
    host = largest_plan(replace(of, optimizer_state="host"))
    assert "moments" not in parts(host)
    assert {p.name: p.size for p in host.host}["moments"] == 8 * TRAINED
    eight = largest_plan(replace(of, optimizer_state="8bit"))
    assert parts(eight)["moments"] == 2.04 * TRAINED
    offloaded = largest_plan(replace(of, cpu_offload=True, teacher_cpu_offload=True))
    assert parts(offloaded) == {} and "gradients" not in moment(offloaded, "train")
    there = {p.name: p.size for p in offloaded.host}["offloaded"]
    assert there >= 4 * (TRAINED + TABLE) * 2 + 12 * TRAINED


# ------------------------------------------------------------------------------ measured on GPUs

EVERY_LINEAR = ("llm", "vit", "connector")


@pytest.mark.parametrize(
    ("layers", "settings", "measured"),
    [
        (12, {}, 92.11),
        (28, {"lora_rank": 64, "lora_targets": EVERY_LINEAR}, 41.32),
        (28, {"optimizer_state": "host"}, 107.24),
        (28, {"optimizer_state": "8bit"}, 123.64),
    ],
)
def test_peaks_of_real_runs(layers: int, settings: dict[str, Any], measured: float) -> None:
    """docs/benchmarks/memory.json: peak_memory_gb on an H200, torch 2.11, EMA teacher, 16 rows."""
    of = footprint(sized(layers), global_batch_size=16, **settings)
    assert plan_memory(of, load_of(of, MAZE)).allocated / 1e9 == pytest.approx(measured, rel=0.005)


def test_the_full_size() -> None:
    release = ReleaseSizes.of_model(TRUE_SIZE)
    assert release.folder == pytest.approx(29.5e9, rel=0.01)
    of = footprint()
    assert student_weights(of).trained == pytest.approx(8.035e9, rel=1e-3)
    assert largest_plan(footprint(lora_rank=64)).allocated < 46e9
    drawing = footprint(objective=InterleavedSFT)
    assert student_weights(drawing).trained == pytest.approx(14.58e9, rel=1e-3)
    assert {m.phase for m in largest_plan(drawing).moments} == {
        "encode", "train", "optimise", "save",
    }  # fmt: skip


# ------------------------------------------------------------------------------- rows and verdict


def test_no_row_within_the_limits_takes_more_than_the_most() -> None:
    numbers = random.Random(0)
    for _ in range(200):
        of = footprint(
            HAND,
            global_batch_size=numbers.randint(1, 40),
            gradient_accumulation_steps=numbers.randint(1, 4),
            sample_batch_size=numbers.choice([1, 3, 64]),
            pack_tokens=numbers.choice([500, 4000, 16384]),
            max_forward_tokens=numbers.choice([2000, 5000, 10240]),
        )
        longest, shortest = longest_row(of), shortest_row(of)
        assert shortest.longest <= longest.longest <= of.max_forward_tokens
        room = longest.longest - shortest.longest
        row = replace(shortest, text=shortest.text + numbers.randint(0, room))
        row = replace(row, new=min(1023, row.new + of.max_forward_tokens - row.longest))
        load, most = asdict(load_of(of, row)), asdict(largest_load(of))
        for name in ("decoded", "cache_tokens", "prefill_tokens", "teacher", "repeated"):
            assert load[name] <= most[name], (name, row, of)


def test_least_is_less_than_most() -> None:
    for of in (footprint(), footprint(gpus=8), footprint(lora_rank=64)):
        assert least_plan(of).allocated < largest_plan(of).allocated


def test_verdicts() -> None:
    of = footprint(gpus=2)
    low, high = least_plan(of).allocated, largest_plan(of).gpu
    (fits,) = judge(of, Room(gpu=high))
    assert not fits.tight and "it fits each GPU" in fits.text
    (tight,) = judge(of, Room(gpu=(low + high) / 2))
    assert tight.tight and not tight.impossible and "may not fit each GPU" in tight.text
    (lacking,) = judge(of, Room(gpu=low - 1))
    assert lacking.impossible and "does not fit each GPU: it needs at least" in lacking.text
    assert judge(of, Room()) == []
    disk = largest_plan(of).first_save
    (none,) = judge(of, Room(disk=disk - 1))
    assert none.impossible and "the disk of --checkpoint_dir" in none.text
    (resumed,) = judge(of, Room(disk=disk - 1, written=disk))
    assert not resumed.impossible


def test_suggestions_help_and_the_best_comes_first() -> None:
    of = footprint(gpus=2)
    (finding,) = judge(of, Room(gpu=80e9))
    found = suggest(of, finding)
    assert [one.saved for one in found] == sorted((one.saved for one in found), reverse=True)
    by_flag = {one.flags: one for one in found}
    assert by_flag["--lora_rank 64"].fits and by_flag["4 GPUs"].fits
    assert not by_flag["--teacher_cpu_offload True"].fits
    assert by_flag["--teacher_mode self"].left == largest_plan(
        replace(of, teacher_mode="self")
    ).gpu  # fmt: skip
    assert "--freeze_vit True" not in by_flag  # what is saved is not worth a line


def test_suggestions_together_where_none_is_enough() -> None:
    of = footprint(lora_rank=64, sample_max_new_tokens=4096, optimizer_state="8bit", num_shard=1)
    need = largest_plan(of).gpu
    found = suggest(of, Finding(GPU, 0.94 * need, 0.0, need))
    assert [one.fits for one in found] == [False] * (len(found) - 1) + [True]
    together = found[-1]
    assert together.flags.count("--") > 1 and together.left <= 0.94 * need
    # It does not go with 8-bit moments.
    assert not any("--cpu_offload" in one.flags for one in found)


def test_suggestions_for_the_host() -> None:
    of = footprint(cpu_offload=True, num_workers=8)
    need = sum(part.size for part in largest_plan(of).host)
    flags = [one.flags for one in suggest(of, Finding(HOST, 1e9, 1e9, need))]
    assert flags[0] in ("--lora_rank 64", "--cpu_offload False")
    assert "--num_workers 0" in flags


def test_validation_decodes_more_rows_and_keeps_the_best() -> None:
    """A step of 16 rows on 8 GPUs draws 2 completions on each; 200 rows are answered 25 at once."""

    def planned(objective: Any, config: Any, **settings: Any) -> Plan:
        config = replace(config, validation=ValidationSettings(**settings))
        release = ReleaseSizes.of_model(TRUE_SIZE)
        return largest_plan(make_footprint(config, release, objective(config), World(8, 8, CUDA)))

    on: dict[str, Any] = {"eval_every": 100, "eval_data": "x"}
    sft = SFTConfig(loss=LossSettings(jsd_weight=0.0, ce_weight=1.0))
    for objective, config, before in ((VisualOPSD, TrainConfig(), 2), (TextSFT, sft, 0)):
        decoded = [
            next((m.parts for m in plan.moments if m.phase == "sample"), None)
            for plan in (planned(objective, config, **flags) for flags in ({}, on))
        ]
        assert (decoded[0] is not None) == bool(before) and decoded[1] is not None
        for flags, rows in (({}, before), ({**on, "eval_limit": 200}, 25), (on, 64)):
            assert planned(objective, config, **flags).of.decoded_rows == rows
    plain, best = (planned(VisualOPSD, TrainConfig(), **on, keep_best=k) for k in (False, True))
    sizes = [sum(part.size for part in plan.disk) for plan in (plain, best)]
    assert sizes[1] - sizes[0] == 2 * plain.of.release_bytes
