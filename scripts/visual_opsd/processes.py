# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The process group, and the small collectives that keep ranks in agreement."""

from __future__ import annotations

import os
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from modeling.host.disk import DiskRefused
from scripts.visual_opsd.runs.folder_lock import release_folders
from scripts.visual_opsd.runs.peers import Watch

T = TypeVar("T")


class FailedAlone(ValueError):
    """What the user can mend, found by one rank where the others do not ask: `shutdown` tells."""


_watch: Watch | None = None  # of the group that this process is in


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


# A group forms when its last process starts; on busy clusters that takes minutes, never hours.
JOIN_TIMEOUT_S = 300.0


def init_distributed(device: str = "auto", timeout_s: float = 1800) -> DistEnv:
    """Join torchrun's group, or make a group of one when WORLD_SIZE is not set.

    Args:
        device: "auto" (CUDA when there is one), "cpu" or "cuda".
        timeout_s: after this many seconds a collective that some rank never joined fails.

    Raises:
        ValueError: "cuda" without a GPU, (on all ranks) not a GPU for each of them, variables of a
            launcher that are incomplete, or processes that do not come.
    """
    use_cuda = _uses_cuda(device)
    rank, world_size, local_rank, local_world_size = launched_as()
    if use_cuda and local_rank < torch.cuda.device_count():
        torch.cuda.set_device(local_rank)
    # gloo beside NCCL: flags, object gathers and checkpoint staging travel through host memory.
    backend = "cpu:gloo,cuda:nccl" if use_cuda else "gloo"
    timeout = timedelta(seconds=timeout_s)
    global _watch
    torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    if torchrun or world_size > 1:
        _watch = Watch(launched=torchrun)
    store = dist.HashStore() if world_size == 1 else _meet(rank, world_size, timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    if _watch is not None and world_size > 1:
        _watch.join(rank, range(rank - local_rank, rank - local_rank + local_world_size))
        if use_cuda:
            try:
                check_gpus(local_rank)
            except ValueError:
                shutdown()
                raise
    here = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    return DistEnv(rank, world_size, local_rank, local_world_size, here)


def _uses_cuda(device: str) -> bool:
    found = torch.cuda.is_available()
    if device == "cuda" and not found:
        raise ValueError(
            "device cuda was asked for, but torch sees no GPU (CPU build of torch, no driver, or "
            "CUDA_VISIBLE_DEVICES is empty): install a CUDA build or use --device cpu"
        )
    return found and device != "cpu"


def check_gpus(local_rank: int) -> None:
    """Refuse a run whose ranks do not have a GPU each: a collective, through host memory.

    It comes after all have joined: a rank that refused alone, before, would leave the others
    waiting for it until their timeout. NCCL itself cannot have two ranks on one GPU.

    Raises:
        ValueError: the same on all ranks.
    """
    count = torch.cuda.device_count()
    has_one = local_rank < count
    own = str(torch.cuda.get_device_properties(local_rank).uuid) if has_one else None
    owners: dict[str, int] = {}
    for rank, (local, shown, gpu) in enumerate(gather_objects((local_rank, count, own))):
        if gpu is None:
            raise ValueError(
                f"rank {rank} has no GPU: it is local rank {local}, but its machine shows {shown}; "
                "start at most that many processes there, or use --device cpu"
            )
        if gpu in owners:
            raise ValueError(
                f"ranks {owners[gpu]} and {rank} share one GPU ({gpu}): start them with "
                "torchrun, or give each its LOCAL_RANK, and no more than GPUs; or use --device cpu"
            )
        owners[gpu] = rank


def launched_as() -> tuple[int, int, int, int]:
    """Rank, world size, local rank and local world size, from the launcher's variables.

    Variables that a shell or a pod holds for another program would make this one wait for
    processes that never come. A launcher of processes sets LOCAL_RANK too; pods that count nodes
    by WORLD_SIZE and RANK do not.
    """
    needed = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    given = {name: os.environ[name] for name in needed if os.environ.get(name)}
    numbers = {name: _whole(name, given[name]) for name in given if name != "MASTER_ADDR"}
    world_size, rank = numbers.get("WORLD_SIZE", 1), numbers.get("RANK", 0)
    local_rank = numbers.get("LOCAL_RANK", 0)
    absent = [name for name in needed if name not in given]
    # Alone, a rank other than 0 would believe that it is rank 0.
    if absent and max(world_size - 1, rank, local_rank) > 0:
        found = ", ".join(f"{name}={text}" for name, text in given.items())
        raise ValueError(
            f"{found}, but {', '.join(absent)} not set: no launcher started this process. Unset "
            "what another program left in the environment, or start several processes by torchrun "
            "or the launchers in scripts/visual_opsd"
        )
    if not max(rank, local_rank) < world_size:
        raise ValueError(
            f"RANK={rank} and LOCAL_RANK={local_rank} must be less than WORLD_SIZE={world_size}"
        )
    if numbers.get("MASTER_PORT", 0) > 65535:
        raise ValueError(f"MASTER_PORT={given['MASTER_PORT']} is no port: they end at 65535")
    beside = _whole("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_WORLD_SIZE") or "0") or world_size
    return rank, world_size, local_rank, min(beside, world_size)


def _whole(name: str, text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise ValueError(f"{name}={text!r} in the environment is not a whole number from 0")
    return int(text)


def _meet(rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """The store that the group's processes share, once all of them have come."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun keeps the store
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    names = [f"came/{restart}/{other}" for other in range(world_size)]
    join = min(timeout, timedelta(seconds=JOIN_TIMEOUT_S))
    store: dist.Store | None = None
    try:
        store = dist.TCPStore(
            address,
            port,
            world_size,
            is_master=rank == 0 and not agents,
            timeout=join,
            wait_for_workers=False,
        )
        store.set(names[rank], "")
        store.wait(names, join)
    except (RuntimeError, ValueError) as error:
        cause = str(error).split("\n")[0]
        with suppress(RuntimeError):  # the store's owner may have given up too
            missing = [str(r) for r, name in enumerate(names) if store and not store.check([name])]
            cause = f"rank {', '.join(missing)} did not come" if missing else cause
        raise ValueError(
            f"rank {rank} of {world_size} cannot meet the others at {address}:{port}: {cause} "
            f"(waited {join.total_seconds():g} s at most). Start all of them, let the port "
            "through, or unset WORLD_SIZE for a single process"
        ) from error
    store.set_timeout(timeout)
    return store


def shutdown() -> None:
    """Leave the process group (no-op when there is none), and let go of the run's folders."""
    global _watch
    if _watch is not None:
        error = sys.exc_info()[1]  # what ends the caller's block, if anything does
        together = isinstance(error, ValueError) and not isinstance(error, FailedAlone)
        _watch.leave(failed=error is not None and not together)
        _watch = None
    if dist.is_initialized():
        dist.destroy_process_group()
    release_folders()


@contextmanager
def process_group(device: str, timeout_s: float) -> Iterator[DistEnv]:
    """`init_distributed` for a block, and `shutdown` whatever ends it."""
    env = init_distributed(device, timeout_s)
    try:
        yield env
    finally:
        shutdown()


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

    The failed rank raises its own error, the others a DiskRefused, ValueError or RuntimeError (the
    first of them that it is) that quotes it.
    """
    kinds = (kind for kind in (DiskRefused, ValueError) if isinstance(error, kind))
    mine = None if error is None else (next(kinds, RuntimeError), f"{error}")
    reports = gather_objects(mine)
    if error is not None:
        raise error
    for rank, report in enumerate(reports):
        if report is not None:
            kind, text = report
            raise kind(f"rank {rank}: {text}")


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
