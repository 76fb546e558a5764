# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Writing and restoring training checkpoints: one exists whole, or it does not exist.

    <dir>/step_0000500/              appears by one rename, when everything below is on disk
        state/                       student, EMA, its kept copy, optimiser: sharded
                                     (torch.distributed.checkpoint)
        trainer.pt                   scheduler and the caller's extra values
        rng_00000.pt ...             random states, one a rank
        complete.json                written last: step, mesh, config and its hash, fingerprints of
                                     what the run reads, size and digest of every file
    <dir>/step_0000500.tmp/          being written, or left by a killed run (removed at start)
    <dir>/superseded/                steps later than the one a run was resumed from

The folder must be on storage that all ranks share. Order of calls in a trainer (those without a
file are in checkpoint_folders.py): `choose_checkpoint`, `check_resumable` (nothing is loaded yet),
`load_checkpoint`, `claim_checkpoint_dir`, `restart_logs` (nothing was moved or cut before), then
training with `save_checkpoint`. If most parameters of the student are frozen, they are left out:
they are the base's, whose fingerprint is compared before a state is loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import zlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_sharded_state

from modeling.host.disk import check_room, disk_errors, flush_to_disk, size_text
from scripts.visual_opsd.config import SFTConfig
from scripts.visual_opsd.processes import DistEnv, attempt, gather_objects, on_main
from scripts.visual_opsd.runs.identity import differences
from scripts.visual_opsd.training.checkpoint_folders import remove, step_folder
from scripts.visual_opsd.training.guard import KeptTeacher
from scripts.visual_opsd.training.run_contents import ROW_ORDER
from scripts.visual_opsd.training.sharded_files import save_sharded_state
from scripts.visual_opsd.training.state_files import (
    FORMAT_VERSION,
    WITHOUT_FROZEN,
    DamagedState,
    describe_files,
    read_marker,
    write_marker,
)

# Files whose contents are compared, not their paths (but in states of format 1, without contents).
_BY_CONTENTS = frozenset(
    ("model_path", "prompts", "dataset_config_file", "replay_samples", "teacher_cache")
)
# Settings that may differ between the run that saved and the run that resumes: these files, and
# those that name places, say how often to report, or split the same work differently. Everything
# else must be equal.
# fmt: off
FREE_FIELDS = _BY_CONTENTS | frozenset((
    "results_dir", "checkpoint_dir", "data_root", "resume", "auto_resume", "resume_from",
    "take_over", "save_every", "save_release", "keep_last", "on_save_error", "log_every",
    "samples_per_step", "figures_every", "leak_words", "progress", "timeout_s", "num_workers",
    "prefetch_factor", "max_bad_rate",
    "max_nonfinite_steps", "device", "sharding_strategy", "num_shard", "num_replicate",
    "cpu_offload", "teacher_cpu_offload", "gradient_accumulation_steps", "pack_tokens",
    "sample_batch_size", "loss_chunk_size", "activation_checkpointing", "checkpointed_layers",
    "compile_blocks", "wandb_project", "wandb_name", "wandb_offline",
    "tensorboard", "eval_every", "eval_data", "eval_split", "eval_limit", "keep_best", "early_stop",
    "teacher_guard", "guard_drop",
    "plan", "plan_gpus", "plan_gpu_gb", "dry_run",
))
# fmt: on


@dataclass
class TrainingState:
    """What a checkpoint restores in place. `scheduler` needs state_dict and load_state_dict.

    kept: where a copy of the EMA is kept, if there is one.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Any
    ema: nn.Module | None = None
    kept: KeptTeacher | None = None


@dataclass(frozen=True)
class Resumed:
    """The step that `load_checkpoint` found, and the caller's extra values."""

    step: int
    extra: dict[str, Any]


# ------------------------------------------------------------------------------------- config


def _flatten(mapping: Mapping[str, Any], left_out: Collection[str] = ()) -> dict[str, Any]:
    """Dotted name -> JSON value of a mapping of mappings."""
    flat: dict[str, Any] = {}
    for name, value in mapping.items():
        if name in left_out:
            continue
        if isinstance(value, Mapping):
            inner = _flatten(value, left_out)
            flat.update({f"{name}.{key}": leaf for key, leaf in inner.items()})
        else:
            # Through JSON, as the saved side went: tuples become lists, paths strings.
            flat[str(name)] = json.loads(json.dumps(value, default=str))
    return flat


def _comparable(flat: dict[str, Any]) -> dict[str, Any]:
    """Settings as they are compared: fp32 moments are saved alike wherever they lie, and noise has
    two flags."""
    name, noise, shown = "optim.optimizer_state", "teacher.noise_vt", "teacher.vt"
    same: dict[str, Any] = {}
    if flat.get(name) in ("gpu", "host"):
        same[name] = "gpu or host"
    if flat.get(noise) or flat.get(shown) == "noise":
        same |= {noise: True, shown: "noise"}
    return flat | same


def config_hash(config: Mapping[str, Any]) -> str:
    """Short hash of the settings that must not change over a resume."""
    text = json.dumps(_flatten(config, FREE_FIELDS), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_resumable(
    path: Path, *, config: Mapping[str, Any], contents: Mapping[str, Any]
) -> dict[str, Any]:
    """The marker of a training state that a run of these settings and contents can go on from.

    Raises:
        ValueError: not a complete checkpoint, or names every setting that matters and every file
            whose contents differ.
    """
    try:
        marker = read_marker(path)
    except DamagedState as error:
        raise DamagedState(f"{path} is not a complete training checkpoint: {error}") from error
    saved, held = dict(marker["config"]), marker.get("contents")
    free, now = FREE_FIELDS, _flatten(contents)
    if held is None:  # format 1, which knew of contents only the order of the rows
        free -= _BY_CONTENTS
        held = {ROW_ORDER: saved.pop("rows")} if "rows" in saved else {}
        now = {key: now[key] for key in held}
    asked = _flatten(config, free)
    # An option that did not exist when the state was saved was at what is its default today.
    absent = {k: v for k, v in _flatten(asdict(SFTConfig()), free).items() if k in asked}
    settings = differences(_comparable({**absent, **_flatten(saved, free)}), _comparable(asked))
    files = differences(_flatten(held), now)
    if len(settings) + len(files) > 1:  # a consequence of the others
        files = [text for text in files if not text.startswith(ROW_ORDER)]
    found = []
    if settings:
        found.append(f"the checkpoint was made with other settings ({'; '.join(settings)})")
    if files:
        found.append(f"the checkpoint was made with other contents ({'; '.join(files)})")
    if found:
        raise ValueError(
            f"{'; '.join(found)}: resume with the saved ones, or start a new run from its release "
            "folder"
        )
    return marker


# ------------------------------------------------------------------------------------- saving


def save_checkpoint(
    checkpoint_dir: Path,
    step: int,
    state: TrainingState,
    *,
    env: DistEnv,
    config: Mapping[str, Any],
    contents: Mapping[str, Any],
    extra: Mapping[str, Any],
) -> Path:
    """Write `step`'s checkpoint; called by all ranks. Returns its folder.

    A kill at any moment leaves either the whole folder or a `.tmp` one. An error on one rank
    (disk full) is raised on all, and leaves nothing of this step.

    Args:
        config: the resolved configuration (JSON-like). contents: as `run_contents` gives them.
        extra: small values for the next run (counters); numbers, strings, lists, dicts, tensors.

    Raises:
        ValueError: the step's folder exists already, too little room, or the disk refuses.
    """
    final = step_folder(checkpoint_dir, step)
    tmp = final.with_name(final.name + ".tmp")
    with_frozen = not _is_mostly_frozen(state.model)
    tensors = _sharded_state(state, bool(state.optimizer.state), with_frozen)
    marker: dict[str, Any] = {
        "format_version": FORMAT_VERSION if with_frozen else WITHOUT_FROZEN,
        "step": step,
        "world_size": env.world_size,
        "has_ema": state.ema is not None,
        "has_optimizer": "optimizer" in tensors,
        "has_kept_teacher": "kept_teacher" in tensors,
        "torch": torch.__version__,
        "config_hash": config_hash(config),
        "config": config,
        "contents": contents,
    }
    needed = _state_bytes(tensors, env)
    refused = partial(
        disk_errors,
        f"saving the state of step {step} ({size_text(needed)})",
        checkpoint_dir,
        "earlier states are as they were; make room or choose another --checkpoint_dir",
    )

    @refused()
    def start() -> None:
        if final.exists():
            # Writing over a checkpoint and dying half-way would leave a mix that loads silently.
            raise ValueError(f"{final} exists already: checkpoints are never written over")
        remove(tmp)
        tmp.mkdir(parents=True)
        check_room(checkpoint_dir, needed, f"the state of step {step}")

    @refused()
    def add_ours() -> dict[str, tuple[int, str]]:
        _save_synced(_rng_state(env), tmp / f"rng_{env.rank:05d}.pt")
        if env.is_main:
            trainer = {"scheduler": state.scheduler.state_dict(), "extra": dict(extra)}
            _save_synced(trainer, tmp / "trainer.pt")
            # Better to fail here than when the run is resumed: loading accepts simple types only.
            torch.load(tmp / "trainer.pt", weights_only=True)
        return describe_files(tmp, env)

    @refused()
    def finish() -> None:
        write_marker(tmp, marker, files)
        flush_to_disk(tmp / "state")
        flush_to_disk(tmp)
        os.replace(tmp, final)
        flush_to_disk(checkpoint_dir)

    try:
        on_main(env, start)
        with refused(), _ordinary_errors(f"writing {tmp / 'state'}"):
            save_sharded_state(tensors, tmp / "state")  # flushed to disk
        files = {k: v for part in gather_objects(attempt(add_ours)) for k, v in part.items()}
        on_main(env, finish)
    except Exception:
        if env.is_main:
            remove(tmp)  # or the disk stays full
        raise
    return final


def _state_bytes(tensors: Mapping[str, Any], env: DistEnv) -> int:
    """Upper estimate of what a state takes on disk: its tensors, and names and sizes of shards."""
    total, stack = 0, [tensors]
    while stack:
        for value in stack.pop().values():
            if isinstance(value, Mapping):
                stack.append(value)
            elif isinstance(value, Tensor):  # a DTensor counts as a whole
                total += value.numel() * value.element_size() + 2048 * env.world_size
    return total


def _is_mostly_frozen(model: nn.Module) -> bool:
    counts = {True: 0, False: 0}
    for parameter in model.parameters():
        counts[parameter.requires_grad] += parameter.numel()
    return counts[False] > counts[True]


def _sharded_state(
    state: TrainingState, with_optimizer: bool, with_frozen: bool = True
) -> dict[str, Any]:
    """References to the shards, by parameter name, so that any mesh can load them."""
    options = StateDictOptions(ignore_frozen_params=not with_frozen)
    tensors: dict[str, Any] = {"model": get_model_state_dict(state.model, options=options)}
    if with_optimizer:  # before the first step, asking would make the optimiser take one
        tensors["optimizer"] = get_optimizer_state_dict(state.model, state.optimizer)
    if state.ema is not None:
        tensors["ema"] = get_model_state_dict(state.ema)
    if state.kept is not None and state.kept.tensors:
        tensors["kept_teacher"] = dict(state.kept.tensors)
    return tensors


@contextmanager
def _ordinary_errors(doing: str) -> Iterator[None]:
    """DCP raises a BaseException (on all ranks), which `except Exception` would miss."""
    try:
        yield
    except CheckpointException as error:
        refused, texts = False, []
        for rank, (cause, _) in error.failures.items():
            # All that torch's zip writer says of a full disk is "unexpected pos 704 vs 598".
            short = "inline_container" in str(cause)
            refused = refused or short or isinstance(cause, OSError)
            texts.append(f"rank {rank}: {'a write came back short' if short else cause}")
        text = f"{doing} failed: {'; '.join(texts)}"
        raise (OSError if refused else RuntimeError)(text) from error


def _save_synced(obj: Any, path: Path) -> None:
    with path.open("wb") as handle:
        torch.save(obj, handle)
        handle.flush()
        os.fsync(handle.fileno())


# ------------------------------------------------------------------------------------ loading


def load_checkpoint(
    path: Path,
    state: TrainingState,
    *,
    env: DistEnv,
    config: Mapping[str, Any],
    contents: Mapping[str, Any],
) -> Resumed:
    """Restore `state` in place, bit-exactly; called by all ranks, on any mesh.

    `choose_checkpoint` has compared the files' bytes. With another number of ranks the global
    random states are derived anew (nothing in a step depends on them: batches and samples are
    keyed by seed, step and row); all else is exact. Call it after everything that draws from
    them (worker processes, model construction), or the continuation is not exact.

    Raises:
        ValueError: not a complete checkpoint, one that cannot be read, other settings or contents,
            or an EMA on one side only.
    """
    marker = check_resumable(path, config=config, contents=contents)
    if marker["has_ema"] != (state.ema is not None):
        has = "has an" if marker["has_ema"] else "has no"
        raise ValueError(f"{path} {has} EMA model, this run's teacher mode says otherwise")
    same_world = marker["world_size"] == env.world_size
    trainer = _load(path / "trainer.pt")
    rng = _load(path / f"rng_{env.rank:05d}.pt") if same_world else None
    with_frozen = marker["format_version"] != WITHOUT_FROZEN
    if state.kept is not None and marker.get("has_kept_teacher"):
        state.kept.allocate()  # and read where it is
    tensors = _sharded_state(state, marker["has_optimizer"], with_frozen)
    try:
        with _ordinary_errors(f"reading {path / 'state'}"):
            load_sharded_state(tensors, checkpoint_id=path / "state")
    except (RuntimeError, OSError) as error:
        if "digests" in marker:
            raise  # its bytes are right: no damage, but too little memory, say
        raise _unreadable(path / "state", error) from error
    # Not strict where the frozen lack; reading has checked that all else was there.
    options = StateDictOptions(strict=with_frozen)
    set_model_state_dict(state.model, tensors["model"], options=options)
    if marker["has_optimizer"]:
        set_optimizer_state_dict(state.model, state.optimizer, tensors["optimizer"])
    if state.ema is not None:
        set_model_state_dict(state.ema, tensors["ema"])
    state.scheduler.load_state_dict(trainer["scheduler"])
    if rng is not None:
        _set_rng_state(rng)
    else:
        key = f"{marker['config_hash']}:{marker['step']}:{env.rank}"
        _seed_all(zlib.crc32(key.encode()))
    return Resumed(marker["step"], trainer["extra"])


def _load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises what the damaged byte happens to lead to
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> DamagedState:
    reason = " ".join(str(error).split())[:200]
    return DamagedState(f"{path} cannot be read ({reason}): resume an older state")


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
