# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""After a resume everything that a trainer holds is what the uninterrupted run held.

Attributes are walked, not named: a new one is compared, or has to be listed below with a reason.
"""

from __future__ import annotations

import random
import sys
import types
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from data.parquet import StepOrder
from scripts.visual_opsd.processes import DistEnv
from scripts.visual_opsd.training.sharding import full_tensor
from scripts.visual_opsd.training.trainer import Trainer
from tests.visual_opsd.training.trainers import build, one_process, write_damaged

# What a trainer holds besides its state.
NOT_STATE = {
    "config.run.resume": "names the state that is resumed",
    "states.run": "config.run again",
    "states.settings.config.run.resume": "and again",
    "states._extra": "a copy of the ledger and of wandb's id, replaced at the next step",
    "checkpoint": "names it too",
    "timer": "measures a call of train()",
    "place": "names student, base, timer and stop again",
    "objective.config.run.resume": "config again",
    "releases.config.run.resume": "and again",
    "log": "writes for a call of train()",
    "stop._before": "the process's own handlers, while train() runs",
    "env": "the same",
    "states.env": "the same",
    "measurement.env": "the same",
    "objective.step": "of the step under way",
    "objective.shown": "its completions, until they are written",
}


def held(trainer: Trainer) -> dict[str, Any]:
    """Dotted name -> value of everything the trainer and the process's generators hold."""
    found: dict[str, Any] = {}
    for name, value in vars(trainer).items():
        walk(name, value, found)
    generators: dict[str, Any] = {
        "python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()
    }  # fmt: skip
    walk("random states", generators, found)
    return {
        name: value
        for name, value in found.items()
        if not any(name == other or name.startswith(f"{other}.") for other in NOT_STATE)
    }


def walk(name: str, value: Any, found: dict[str, Any]) -> None:
    """Add the leaves of a value under their dotted names."""
    if name in NOT_STATE:
        return
    if isinstance(value, Tensor):
        found[name] = full_tensor(value).clone()
    elif isinstance(value, np.ndarray):
        found[name] = torch.from_numpy(value.astype(np.int64))
    elif isinstance(value, torch.Generator):
        found[name] = value.get_state()
    elif isinstance(value, type | types.FunctionType | types.MethodType | torch.device):
        found[name] = str(getattr(value, "__qualname__", value))
    elif value is None or isinstance(value, str | int | float | Enum | Path | torch.dtype):
        found[name] = value
    else:
        inside = parts(value)
        found[f"{name} is a"] = f"{type(value).__name__} of {len(inside)}"
        for key, part in inside.items():
            walk(f"{name}.{key}", part, found)


def parts(value: Any) -> Mapping[Any, Any]:
    if isinstance(value, Mapping):
        return value
    if isinstance(value, list | tuple):
        return dict(enumerate(value))
    if isinstance(value, nn.Module):
        trains = {f"{n} trains": p.requires_grad for n, p in value.named_parameters()}
        return {**dict(value.named_parameters()), **dict(value.named_buffers()), **trains}
    if isinstance(value, Optimizer | LRScheduler):
        return value.state_dict()
    if hasattr(value, "get_vocab"):
        return value.get_vocab()  # a tokenizer
    if isinstance(value, StepOrder):  # beside these it holds what it has read and computed
        rows = [next(value.candidates(step, 0)) for step in range(8)]
        return {"signature": value.signature(), "rows": [(d.name, index) for d, index in rows]}
    return vars(value)


def differing(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    names = [*ours, *(name for name in theirs if name not in ours)]
    return [
        name
        for name in names
        if name not in ours or name not in theirs or not same(ours[name], theirs[name])
    ]


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return type(one) is type(other) and bool(one == other)


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """Ten rows, of which three cannot be used: an epoch meets them all."""
    return write_damaged(tmp_path, rows=10)


@pytest.fixture
def start(damaged: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Trainer]:
    """Makes trainers whose second step is skipped, with draws from the process's generators in
    each step, and a run on wandb."""
    fake = types.ModuleType("wandb")
    run = types.SimpleNamespace(log=lambda *_, **__: None, finish=lambda: None)
    fake.init = lambda **_: run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)

    def make(results: Path, env: DistEnv, seed: int, **changes: Any) -> Trainer:
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        trainer = build(
            damaged, results, env, total_steps=5, save_every=3, global_batch_size=3,
            wandb_project="p", wandb_offline=True, max_bad_rate=1, sample_max_new_tokens=2,
            ema_decay=0.6, warmup_steps=1, **changes,
        )  # fmt: skip
        reduce = trainer._reduce

        def reduced(*args: Any) -> dict[str, Any]:
            random.random(), np.random.random(), torch.rand(1)
            figures = reduce(*args)
            return figures | {"loss": float("nan")} if trainer.step == 1 else figures

        monkeypatch.setattr(trainer, "_reduce", reduced)
        return trainer

    return make


def test_everything_is_restored(start: Callable[..., Trainer], tmp_path: Path) -> None:
    results, moved = tmp_path / "r", tmp_path / "moved"
    before: dict[str, Any] = {}
    with one_process() as env:
        whole = start(results, env, seed=1)
        save = whole.states.save

        def saved(**options: Any) -> None:
            save(**options)
            if whole.step == 3:
                del vars(whole.states)["save"]
                before.update(held(whole))

        whole.states.save = saved  # type: ignore[method-assign]
        assert whole.train() == 0
        after = held(whole)
        results.rename(moved)
        state = moved / "checkpoints" / "step_0000003"
        resumed = start(results, env, seed=2, resume=state)
        assert not differing(before, held(resumed))
        assert resumed.train() == 0
        assert not differing(after, held(resumed))
    # There was something to restore, and the walk found it.
    assert before["scheduler.last_epoch"] == 3 and float(before["optimizer.state.0.step"]) == 2
    assert any(name.startswith("ledger.reasons.") for name in before)
    changed = set(differing(before, after))
    for name in (
        "step", "states._saved", "scheduler.last_epoch", "optimizer.state.0.exp_avg",
        "ledger.rows_read", "student.language_model.lm_head.weight",
        "ema.language_model.lm_head.weight", "random states.python.1.624", "random states.torch",
    ):  # fmt: skip
        assert name in changed, name
    assert len({"wandb.run_id", "order.signature"} & before.keys()) == 2
