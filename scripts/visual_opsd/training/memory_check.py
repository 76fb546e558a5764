# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Does a planned run fit the machine? Which settings would make it fit?

Two figures are compared with what is there: the least that a run needs, beyond which it is sure to
fail, and the most that the settings allow, which rows of full length will take.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from modeling.host.memory import available_bytes
from scripts.visual_opsd.training.memory_plan import Plan, largest_plan, least_plan
from scripts.visual_opsd.training.memory_sizes import Footprint

_SHOWN = 8  # suggestions
_HELPS = 0.005  # share of the need that a suggestion saves at least

GPU, HOST, DISK = "gpu", "host", "disk"
_PLACES = {GPU: "each GPU", HOST: "the host's memory", DISK: "the disk of --checkpoint_dir"}


@dataclass(frozen=True)
class Room:
    """Bytes that a run may take of each; None: not known, so not compared.

    written: what its checkpoint folder holds already.
    """

    gpu: float | None = None
    host: float | None = None
    disk: float | None = None
    written: float = 0.0

    @classmethod
    def here(cls, device: torch.device, checkpoints: Path) -> Room:
        """Of this process's GPU, of the host, and of the disk that the folder is or will be on."""
        gpu = None
        if device.type == "cuda" and torch.cuda.is_available():
            free, _ = torch.cuda.mem_get_info(device)
            gpu = float(free + torch.cuda.memory_reserved(device))
        return cls(gpu, available_bytes(), *_disk_room(checkpoints))


def _disk_room(folder: Path) -> tuple[float | None, float]:
    """Free bytes where a folder is or will be, and bytes of the files that it holds."""
    written = 0
    with suppress(OSError):
        written = sum(path.lstat().st_size for path in folder.rglob("*"))
    for place in (folder, *folder.absolute().parents):
        with suppress(OSError):
            return float(shutil.disk_usage(place).free), written
    return None, written


# ------------------------------------------------------------------------------------ verdict


@dataclass(frozen=True)
class Finding:
    """Of one resource: what is there, the least and the most that the run takes of it."""

    resource: str
    room: float
    least: float
    most: float

    @property
    def impossible(self) -> bool:
        return self.least > self.room

    @property
    def tight(self) -> bool:
        return self.most > self.room

    @property
    def text(self) -> str:
        where = _PLACES[self.resource]
        if self.impossible:
            return (
                f"the run does not fit {where}: it needs at least {_gb(self.least)} GB, "
                f"{_gb(self.room)} GB are there"
            )
        if self.tight:
            return (
                f"it may not fit {where}: it needs {_gb(self.least)} to {_gb(self.most)} GB, "
                f"{_gb(self.room)} GB are there"
            )
        return f"it fits {where}: {_gb(self.most)} GB at most of {_gb(self.room)}"


def needed(plan: Plan, resource: str, *, least: bool = False) -> float:
    """Bytes of a resource that a plan takes; of the least also without what is only likely."""
    if resource == GPU:
        return plan.allocated if least else plan.gpu
    if resource == HOST:
        skipped = ("data workers", "saving", "processes") if least else ()
        return sum(part.size for part in plan.host if part.name not in skipped)
    return plan.first_save if least else sum(part.size for part in plan.disk)


def judge(of: Footprint, room: Room) -> list[Finding]:
    """What is known of each resource, in the order GPU, host, disk."""
    least, most = least_plan(of), largest_plan(of)
    found = []
    for resource, there in ((GPU, room.gpu), (HOST, room.host), (DISK, room.disk)):
        if there is None or (resource == GPU and not of.on_gpu):
            continue
        low = needed(least, resource, least=True)
        high = max(low, needed(most, resource))
        if resource == DISK:
            low, high = max(0.0, low - room.written), max(0.0, high - room.written)
        found.append(Finding(resource, there, low, high))
    return found


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f}"


# -------------------------------------------------------------------------------- suggestions


@dataclass(frozen=True)
class Suggestion:
    """One setting changed (or several), what that saves and whether it is enough."""

    flags: str
    saved: float
    left: float
    fits: bool

    @property
    def text(self) -> str:
        enough = "fits" if self.fits else "not enough alone"
        return f"{self.flags}: saves {_gb(self.saved)} GB, {_gb(self.left)} GB remain: {enough}"


_Change = dict[str, object]


def _changes(of: Footprint, resource: str) -> Iterator[_Change]:
    """Settings one might change, as fields of a footprint."""
    if resource == DISK:
        yield {"keep_last": 1}
        yield {"save_release": False}
        yield {"save_every": of.total_steps}
        yield from _adapters(of)
        return
    if resource == HOST:
        yield {"num_workers": 0}
        yield {"prefetch_factor": 1}
        yield {"cpu_offload": False}
        yield {"teacher_cpu_offload": False}
        yield {"optimizer_state": "gpu"}
    elif of.lora_rank is None and not of.cpu_offload:
        yield {"optimizer_state": "host"}
        yield {"optimizer_state": "8bit"}
    yield from _adapters(of)
    if of.teacher_mode is not None:
        yield {"teacher_mode": "fixed"}
        yield {"teacher_mode": "self"}
    if resource == GPU:
        yield {"teacher_cpu_offload": True}
        if of.optimizer_state == "gpu":
            yield {"cpu_offload": True}
        yield {"activation_checkpointing": True, "checkpointed_layers": None}
        yield {"freeze_vit": True}
    for gpus in (2, 4, 8):
        if of.on_gpu and gpus > of.gpus and (of.num_shard, of.num_replicate) == (None, None):
            yield {"gpus": gpus, "per_node": max(of.per_node, gpus)}
    yield {"gradient_accumulation_steps": 1}
    for name, value in (
        ("sample_batch_size", min(of.sample_batch_size, of.completions)),
        ("pack_tokens", of.pack_tokens),
        ("sample_max_new_tokens", of.sample_max_new_tokens),
        ("max_forward_tokens", of.max_forward_tokens),
        ("loss_chunk_size", of.loss_chunk_size),
    ):
        yield {name: max(1, value // 2)}


def _adapters(of: Footprint) -> Iterator[_Change]:
    if of.lora_rank is None and not (of.draws or of.freeze_llm):
        yield {"lora_rank": 64}


def _flags(change: _Change) -> str:
    if "gpus" in change:
        return f"{change['gpus']} GPUs"
    return " ".join(f"--{n} {str(v).lower() if v is None else v}" for n, v in change.items())


def _need(of: Footprint, resource: str) -> float | None:
    """None: such a run can't be."""
    try:
        return needed(largest_plan(of), resource)
    except ValueError:
        return None


def suggest(of: Footprint, finding: Finding) -> list[Suggestion]:
    """Single changes that help, best first; then, where none is enough, the first ones together."""
    need = _need(of, finding.resource)
    assert need is not None
    margin = need - finding.most  # what a checkpoint folder holds already
    tried: list[tuple[float, _Change]] = []
    for change in _changes(of, finding.resource):
        if all(getattr(of, name) == value for name, value in change.items()):
            continue
        left = _need(replace(of, **change), finding.resource)  # type: ignore[arg-type]
        if left is not None and need - left > _HELPS * need:
            tried.append((left, change))
    tried.sort(key=lambda pair: pair[0])

    def suggestion(left: float, flags: str) -> Suggestion:
        return Suggestion(flags, need - left, left - margin, left - margin <= finding.room)

    found = [suggestion(left, _flags(change)) for left, change in tried[:_SHOWN]]
    if tried and not any(one.fits for one in found):
        found += _together(of, [change for _, change in tried], finding, suggestion)
    return found


def _together(
    of: Footprint, changes: list[_Change], finding: Finding,
    suggestion: Callable[[float, str], Suggestion],
) -> list[Suggestion]:  # fmt: skip
    """The fewest changes, taken in their order, that make it fit; none if nothing does."""
    changed: set[str] = set()
    flags: list[str] = []
    left = float("inf")
    for change in changes:
        if changed & change.keys() or "gpus" in change or change.get("cpu_offload"):
            continue
        now = _need(replace(of, **change), finding.resource)  # type: ignore[arg-type]
        if now is None or now >= left:
            continue
        of, left = replace(of, **change), now  # type: ignore[arg-type]
        changed |= change.keys()
        flags.append(_flags(change))
        whole = suggestion(left, " ".join(flags))
        if whole.fits:
            return [whole] if len(flags) > 1 else []
    return []
