# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Training checkpoints: a checkpoint exists whole, or it does not exist.

    <dir>/step_0000500/              appears by one rename, when everything below is on disk
        state/                       student, EMA, optimiser: sharded (torch.distributed.checkpoint)
        trainer.pt                   scheduler and the caller's extra values
        rng_00000.pt ...             random states, one a rank
        complete.json                written last: step, mesh, config and its hash, all file sizes
    <dir>/step_0000500.tmp/          being written, or left by a killed run (removed at start)
    <dir>/superseded/                steps later than the one a run was resumed from

The folder must be on storage that all ranks share. Order of calls in a trainer:
`find_checkpoint`, `load_checkpoint`, `claim_checkpoint_dir`, `truncate_jsonl`, then training with
`save_checkpoint`.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import zlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_sharded_state
from torch.distributed.checkpoint.state_dict_saver import save as save_sharded_state

from scripts.visual_opsd.checkpoint_folders import (
    MARKER,
    claim_checkpoint_dir,
    complete_steps,
    find_checkpoint,
    read_marker,
    release_folder,
    step_folder,
    truncate_jsonl,
)
from scripts.visual_opsd.processes import DistEnv, attempt, on_main

__all__ = [
    "FREE_FIELDS",
    "Resumed",
    "TrainingState",
    "check_config",
    "claim_checkpoint_dir",
    "complete_steps",
    "config_hash",
    "find_checkpoint",
    "flat_config",
    "load_checkpoint",
    "release_folder",
    "save_checkpoint",
    "truncate_jsonl",
]

FORMAT_VERSION = 1

# Settings that may differ between the run that saved and the run that resumes: they name places,
# say how often to report, or split the same work differently. Everything else must be equal.
# fmt: off
FREE_FIELDS = frozenset((
    "results_dir", "checkpoint_dir", "output_name", "data_root", "resume", "auto_resume",
    "resume_from", "save_every", "save_release", "keep_last", "log_every",
    "samples_per_step", "progress", "timeout_s", "num_workers", "prefetch_factor",
    "max_bad_rate", "max_nonfinite_steps", "device", "sharding_strategy", "num_shard",
    "num_replicate", "cpu_offload", "teacher_cpu_offload", "gradient_accumulation_steps",
    "pack_tokens", "sample_batch_size", "loss_chunk_size", "activation_checkpointing",
    "checkpointed_layers", "compile_blocks", "wandb_project", "wandb_name", "wandb_offline",
))
# fmt: on


@dataclass
class TrainingState:
    """What a checkpoint restores in place. `scheduler` needs state_dict and load_state_dict."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Any
    ema: nn.Module | None = None


@dataclass(frozen=True)
class Resumed:
    """What `load_checkpoint` found.

    `same_world` is False when the number of ranks changed: weights, EMA and optimiser are exact
    all the same, only the global random states are derived anew (nothing in a step depends on
    them: batches and samples are keyed by seed, step and row).
    """

    step: int
    same_world: bool
    extra: dict[str, Any] = field(default_factory=dict)


# ------------------------------------------------------------------------------------- config


def flat_config(
    config: Mapping[str, Any], free_fields: Collection[str] = FREE_FIELDS
) -> dict[str, Any]:
    """Dotted name -> JSON value of every setting that must not change over a resume."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if name in free_fields:
            continue
        if isinstance(value, Mapping):
            inner = flat_config(value, free_fields)
            flat.update({f"{name}.{key}": leaf for key, leaf in inner.items()})
        else:
            # Through JSON, as the saved side went: tuples become lists, paths strings.
            flat[str(name)] = json.loads(json.dumps(value, default=str))
    return flat


def config_hash(config: Mapping[str, Any], free_fields: Collection[str] = FREE_FIELDS) -> str:
    """Short hash of the settings that must not change over a resume."""
    text = json.dumps(flat_config(config, free_fields), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_config(
    saved: Mapping[str, Any],
    current: Mapping[str, Any],
    free_fields: Collection[str] = FREE_FIELDS,
) -> None:
    """ValueError naming every setting that matters and differs."""
    old, new = flat_config(saved, free_fields), flat_config(current, free_fields)
    absent = "(absent)"
    differing = [
        f"{name}: saved {old.get(name, absent)!r}, now {new.get(name, absent)!r}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name, absent) != new.get(name, absent)
    ]
    if differing:
        raise ValueError(
            "the checkpoint was made with other settings (" + "; ".join(differing) + "): resume "
            "with the saved ones, or start a new run from its release folder"
        )


# ------------------------------------------------------------------------------------- saving


def save_checkpoint(
    checkpoint_dir: Path,
    step: int,
    state: TrainingState,
    *,
    env: DistEnv,
    config: Mapping[str, Any],
    extra: Mapping[str, Any] | None = None,
    keep_last: int | None = None,
) -> Path:
    """Write `step`'s checkpoint; called by all ranks. Returns its folder.

    A kill at any moment leaves either the whole folder or a `.tmp` one. An error on one rank
    (disk full) is raised on all.

    Args:
        config: the resolved configuration (JSON-like).
        extra: small values for the next run (counters); numbers, strings, lists, dicts, tensors.
        keep_last: how many newest checkpoints to keep in the folder; None keeps all.

    Raises:
        ValueError: the step's folder exists already, or keep_last < 1.
    """
    if keep_last is not None and keep_last < 1:
        raise ValueError(f"keep_last must be at least 1 (or None: keep all), not {keep_last}")
    final = step_folder(checkpoint_dir, step)
    tmp = final.with_name(final.name + ".tmp")

    def start() -> None:
        if final.exists():
            # Writing over a checkpoint and dying half-way would leave a mix that loads silently.
            raise ValueError(f"{final} exists already: checkpoints are never written over")
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir(parents=True)

    on_main(env, start)
    with_optimizer = bool(state.optimizer.state)
    with _ordinary_errors(f"writing {tmp / 'state'}"):
        save_sharded_state(_sharded_state(state, with_optimizer), checkpoint_id=tmp / "state")
    attempt(lambda: _save_synced(_rng_state(env), tmp / f"rng_{env.rank:05d}.pt"))

    def finish() -> None:
        trainer = {"scheduler": state.scheduler.state_dict(), "extra": dict(extra or {})}
        _save_synced(trainer, tmp / "trainer.pt")
        # Better to fail here than when the run is resumed: loading accepts simple types only.
        torch.load(tmp / "trainer.pt", weights_only=True)
        files = [p for p in sorted(tmp.rglob("*")) if p.is_file()]
        for path in files:
            _fsync(path)
        marker = {
            "format_version": FORMAT_VERSION,
            "step": step,
            "world_size": env.world_size,
            "has_ema": state.ema is not None,
            "has_optimizer": with_optimizer,
            "torch": torch.__version__,
            "config_hash": config_hash(config),
            "config": json.loads(json.dumps(config, default=str)),
            "files": {p.relative_to(tmp).as_posix(): p.stat().st_size for p in files},
        }
        with (tmp / MARKER).open("w") as handle:
            json.dump(marker, handle, indent=1)
            handle.flush()
            os.fsync(handle.fileno())
        _fsync(tmp / "state")
        _fsync(tmp)
        os.replace(tmp, final)
        _fsync(checkpoint_dir)
        if keep_last is not None:
            for old in list(complete_steps(checkpoint_dir).values())[:-keep_last]:
                # Renamed first: a kill in the middle must not leave half a checkpoint behind.
                doomed = old.with_name(old.name + ".deleted.tmp")
                os.replace(old, doomed)
                shutil.rmtree(doomed)

    on_main(env, finish)
    return final


def _sharded_state(state: TrainingState, with_optimizer: bool) -> dict[str, Any]:
    """References to the shards, by parameter name, so that any mesh can load them."""
    if with_optimizer:
        model, optimizer = get_state_dict(state.model, state.optimizer)
        tensors: dict[str, Any] = {"model": model, "optimizer": optimizer}
    else:  # no step taken yet; asking for its state would make the optimiser take one
        tensors = {"model": get_model_state_dict(state.model)}
    if state.ema is not None:
        tensors["ema"] = get_model_state_dict(state.ema)
    return tensors


@contextmanager
def _ordinary_errors(doing: str) -> Iterator[None]:
    """DCP raises a BaseException (on all ranks), which `except Exception` would miss."""
    try:
        yield
    except CheckpointException as error:
        causes = "; ".join(f"rank {rank}: {cause[0]}" for rank, cause in error.failures.items())
        raise RuntimeError(f"{doing} failed: {causes}") from error


def _save_synced(obj: Any, path: Path) -> None:
    with path.open("wb") as handle:
        torch.save(obj, handle)
        handle.flush()
        os.fsync(handle.fileno())


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ------------------------------------------------------------------------------------ loading


def load_checkpoint(
    path: Path,
    state: TrainingState,
    *,
    env: DistEnv,
    config: Mapping[str, Any],
    free_fields: Collection[str] = FREE_FIELDS,
) -> Resumed:
    """Restore `state` in place, bit-exactly; called by all ranks, on any mesh.

    Call it after everything that draws from the global random states (worker processes, model
    construction), or the continuation is not exact.

    Raises:
        ValueError: not a complete checkpoint, other settings, or an EMA on one side only.
    """
    marker = read_marker(path)
    if marker is None:
        raise ValueError(f"{path} is not a complete training checkpoint")
    if marker["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"{path} has checkpoint format {marker['format_version']}, this version reads "
            f"{FORMAT_VERSION}: continue it with the version that wrote it"
        )
    check_config(marker["config"], config, free_fields)
    if marker["has_ema"] != (state.ema is not None):
        has = "has an" if marker["has_ema"] else "has no"
        raise ValueError(f"{path} {has} EMA model, this run's teacher mode says otherwise")
    tensors = _sharded_state(state, marker["has_optimizer"])
    with _ordinary_errors(f"reading {path / 'state'}"):
        load_sharded_state(tensors, checkpoint_id=path / "state")
    if marker["has_optimizer"]:
        set_state_dict(
            state.model,
            state.optimizer,
            model_state_dict=tensors["model"],
            optim_state_dict=tensors["optimizer"],
        )
    else:
        set_model_state_dict(state.model, tensors["model"])
    if state.ema is not None:
        set_model_state_dict(state.ema, tensors["ema"])
    trainer = torch.load(path / "trainer.pt", map_location="cpu", weights_only=True)
    state.scheduler.load_state_dict(trainer["scheduler"])
    same_world = marker["world_size"] == env.world_size
    if same_world:
        _set_rng_state(
            torch.load(path / f"rng_{env.rank:05d}.pt", map_location="cpu", weights_only=True)
        )
    else:
        key = f"{marker['config_hash']}:{marker['step']}:{env.rank}"
        _seed_all(zlib.crc32(key.encode()))
    return Resumed(marker["step"], same_world, trainer["extra"])


def _rng_state(env: DistEnv) -> dict[str, Any]:
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    states = {
        "python": random.getstate(),
        "numpy": (name, [int(k) for k in keys], int(position), int(has_gauss), float(cached)),
        "torch": torch.get_rng_state(),
    }
    if env.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(env.device)
    return states


def _set_rng_state(states: Mapping[str, Any]) -> None:
    random.setstate(states["python"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
