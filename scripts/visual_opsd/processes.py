# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The process group, and the small collectives that keep ranks in agreement."""

from __future__ import annotations

import os
import sys
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from scripts.visual_opsd.folder_lock import release_folders
from scripts.visual_opsd.peers import Watch

_watch: Watch | None = None  # of the group that this process is in
T = TypeVar("T")


@dataclass(frozen=True)
class DistEnv:
    """Who this process is. `device` is where its shard lives and computes."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def init_distributed(device: str = "auto", timeout_s: float = 1800) -> DistEnv:
    """Join torchrun's group, or make a group of one when WORLD_SIZE is not set.

    Args:
        device: "auto" (CUDA when there is one), "cpu" or "cuda".
        timeout_s: after this many seconds a collective that some rank never joined fails.

    Raises:
        ValueError: unknown device, "cuda" without a GPU, or more local ranks than GPUs.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"unknown device {device!r}: use auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "device cuda was asked for, but torch sees no GPU (CPU build of torch, no driver, or "
            "CUDA_VISIBLE_DEVICES is empty): install a CUDA build or use --device cpu"
        )
    use_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    launched = "WORLD_SIZE" in os.environ
    rank = int(os.environ.get("RANK", 0)) if launched else 0
    world_size = int(os.environ["WORLD_SIZE"]) if launched else 1
    local_rank = int(os.environ.get("LOCAL_RANK", 0)) if launched else 0
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size)) if launched else 1
    if use_cuda:
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"local rank {local_rank} has no GPU: this machine shows "
                f"{torch.cuda.device_count()}; start at most that many processes a node"
            )
        torch.cuda.set_device(local_rank)
    # gloo beside NCCL: flags, object gathers and checkpoint staging travel through host memory.
    backend = "cpu:gloo,cuda:nccl" if use_cuda else "gloo"
    timeout = timedelta(seconds=timeout_s)
    global _watch
    if launched:
        _watch = Watch(launched="TORCHELASTIC_RUN_ID" in os.environ)
        dist.init_process_group(backend, timeout=timeout)
        _watch.join(rank, range(rank - local_rank, rank - local_rank + local_world_size))
    else:
        store = dist.HashStore()
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
    here = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    return DistEnv(rank, world_size, local_rank, local_world_size, here)


def shutdown() -> None:
    """Leave the process group (no-op when there is none), and let go of the run's folders."""
    global _watch
    if _watch is not None:
        error = sys.exc_info()[1]  # what ends the caller's block, if anything does
        _watch.leave(failed=error is not None and not isinstance(error, ValueError))
        _watch = None
    if dist.is_initialized():
        dist.destroy_process_group()
    release_folders()


def leave(code: int) -> NoReturn:
    """End this process at once, with everything it printed written out.

    After collectives the ordinary end of the interpreter is not safe: a gloo thread that is late
    to release a tensor then asks for the interpreter, is refused, and aborts the process
    ("terminate called without an active exception", in some per cent of the runs on a busy CPU).
    What must be closed (files, wandb, data workers) is closed by its owner before.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def all_reduce_sums(values: Mapping[str, float | Tensor], env: DistEnv) -> dict[str, float]:
    """Sum each named scalar over ranks in one float64 collective, and one device sync.

    All ranks pass the same names (checked).
    """
    names = sorted(values)
    checksum = float(zlib.crc32("\n".join(names).encode()))
    entries = [*(values[name] for name in names), checksum]
    packed = torch.stack(
        [
            entry.detach().to(env.device, torch.float64).reshape(())
            if isinstance(entry, Tensor)
            else torch.tensor(entry, dtype=torch.float64, device=env.device)
            for entry in entries
        ]
    )
    dist.all_reduce(packed)
    *sums, check = packed.tolist()
    assert check == checksum * env.world_size, f"ranks reduce different names; here: {names}"
    return dict(zip(names, sums, strict=True))


def all_reduce_max_int(value: int, env: DistEnv) -> int:
    """The largest value of any rank (through host memory: no device sync)."""
    tensor = torch.tensor(value, dtype=torch.int64)
    if env.world_size > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return int(tensor)


def agree(flag: bool, env: DistEnv) -> bool:
    """True on every rank when it is true on any."""
    return bool(all_reduce_max_int(int(flag), env))


def barrier(env: DistEnv) -> None:
    """Wait for all ranks, on the host."""
    all_reduce_max_int(0, env)


def gather_objects(obj: Any) -> list[Any]:
    """Every rank's object, in rank order, on every rank. For small things: it pickles."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, obj)
    return gathered


def raise_together(error: Exception | None) -> None:
    """Raise on all ranks when any rank brings an error, so that nobody waits for the failed one.

    The failed rank raises its own error, the others a ValueError or RuntimeError that quotes it.
    """
    mine = None if error is None else (isinstance(error, ValueError), f"{error}")
    reports = gather_objects(mine)
    if error is not None:
        raise error
    for rank, report in enumerate(reports):
        if report is not None:
            is_value_error, text = report
            raise (ValueError if is_value_error else RuntimeError)(f"rank {rank}: {text}")


def on_main(env: DistEnv, action: Callable[[], T]) -> T:
    """Run on rank 0 while the others wait; its result (small: it is pickled) or error is theirs."""
    barrier(env)
    result: list[Any] = [attempt(lambda: action() if env.is_main else None)]
    if env.world_size > 1:
        dist.broadcast_object_list(result, src=0)
    return cast(T, result[0])


def attempt(action: Callable[[], T]) -> T:
    """Run on every rank, each gets its own result; an error on any is raised on all."""
    error: Exception | None = None
    result: Any = None
    try:
        result = action()
    except Exception as caught:
        error = caught
    raise_together(error)
    return cast(T, result)
