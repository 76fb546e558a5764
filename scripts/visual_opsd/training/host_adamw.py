# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""AdamW whose moments lie in pinned host memory; weights and gradients stay on the GPU.

    host ──inward──▶ slot 1 │ slot 2: update │ slot 3 ──outward──▶ host

A step walks over pieces of the shards. While the GPU updates one piece, the next one's moments
come in and the last one's go out, each way on a stream of its own, so that a step takes about as
long as moving all moments once in the slower direction. The update is torch's own function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from modeling.host.memory import memory_errors
from scripts.visual_opsd.processes import FailedAlone
from scripts.visual_opsd.training.kept_state import KeptState
from scripts.visual_opsd.training.sharding import local_part

PIECE = 1 << 24  # values of a piece: two moments of 64 MiB, 1.3 ms each at 50 GB/s
SLOTS = 3  # one comes in, one is updated, one goes out: 0.4 GB of the GPU during a step
LARGEST_BLOCK = 1 << 32  # bytes of pinned memory asked for at once
_ALIGNED = 512  # bytes


@dataclass(frozen=True)
class _Piece:
    """A part of one shard, all (n,) fp32: weight and gradient on the device, moments in host
    memory; `steps`: how many updates came before this one."""

    weight: Tensor
    gradient: Tensor
    moments: tuple[Tensor, Tensor]
    steps: float
    group: dict[str, Any]


class HostAdamW(KeptState, torch.optim.AdamW):
    """torch.optim.AdamW on DTensors, with moments in host memory; same state names and groups.

    `state[parameter]` holds `exp_avg` and `exp_avg_sq` as DTensors of the parameter's mesh and
    placements whose local tensors lie in host memory, pinned if the parameter is on a GPU. When
    `step` returns they are complete and may be read.

    On the CPU the trajectory is torch.optim.AdamW's to the last bit.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], **group: Any) -> None:
        super().__init__(parameters, **group)
        self.device = local_part(parameters[0]).device
        on_gpu = self.device.type == "cuda"
        self._inward, self._outward = (
            torch.cuda.Stream(self.device) if on_gpu else None for _ in range(2)
        )
        self._make_moments(parameters)

    @torch.no_grad()
    def _make_moments(self, parameters: Sequence[nn.Parameter]) -> None:
        shapes = [local_part(parameter).shape for parameter in parameters]
        make = pinned_zeros if self.device.type == "cuda" else plain_zeros
        with memory_errors(
            "while pinned host memory is taken for AdamW's moments",
            "use more GPUs, or --optimizer_state 8bit",
            FailedAlone,
        ):
            memory = iter(make([shape.numel() for shape in shapes for _ in range(2)]))
        for parameter, shape in zip(parameters, shapes, strict=True):
            state: dict[str, Tensor] = {"step": torch.tensor(0.0)}
            for name in ("exp_avg", "exp_avg_sq"):
                moment = torch.empty_like(parameter, device="cpu")  # its memory is never touched
                assert isinstance(moment, DTensor), "shards are DTensors"
                local = next(memory).view(shape)
                moment.to_local().data = local
                assert moment.to_local().data_ptr() == local.data_ptr()
                state[name] = moment
            self.state[parameter] = state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient; returns when host memory is complete."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        pieces = list(self._pieces())
        longest = max((len(piece.weight) for piece in pieces), default=0)
        # Taken anew each time: at the peak of a step, in the backward pass, it is not needed.
        slots = torch.empty(SLOTS, 2, longest, device=self.device)
        if self._inward is not None:
            self._inward.wait_stream(torch.cuda.current_stream(self.device))
        emptied: list[torch.cuda.Event | None] = [None] * SLOTS
        try:
            for number, piece in enumerate(pieces):
                place = number % SLOTS
                slot = slots[place, :, : len(piece.weight)]
                emptied[place] = self._update(piece, slot, emptied[place])
        finally:
            if self._outward is not None:
                self._outward.synchronize()  # host memory and slots are free of copies from here
        return loss

    def _pieces(self) -> Iterator[_Piece]:
        """The work of a step; counts it in the parameters' `step`."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                steps = state["step"].item()
                state["step"] += 1
                weight, gradient, *moments = (
                    local_part(tensor).view(-1)
                    for tensor in (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
                )
                for start in range(0, len(weight), PIECE):
                    part = slice(start, start + PIECE)
                    first, second = (moment[part] for moment in moments)
                    yield _Piece(weight[part], gradient[part], (first, second), steps, group)

    def _update(
        self, piece: _Piece, slot: Tensor, emptied: torch.cuda.Event | None
    ) -> torch.cuda.Event | None:
        """One piece through its slot (2, n); `emptied`: when the slot's last content had left."""
        inward, outward = self._inward, self._outward
        with on_stream(inward):
            if inward is not None and emptied is not None:
                inward.wait_event(emptied)
            for staged, moment in zip(slot, piece.moments, strict=True):
                staged.copy_(moment, non_blocking=True)
        if inward is not None:
            torch.cuda.current_stream(self.device).wait_stream(inward)
        _adamw(piece, slot)
        if outward is not None:
            outward.wait_stream(torch.cuda.current_stream(self.device))
        with on_stream(outward):
            for staged, moment in zip(slot, piece.moments, strict=True):
                moment.copy_(staged, non_blocking=True)
            return None if outward is None else outward.record_event()


def on_stream(stream: torch.cuda.Stream | None) -> AbstractContextManager[Any]:
    """Queue work on `stream`; on a CPU there is none, and work is done at once."""
    return nullcontext() if stream is None else torch.cuda.stream(stream)


def _adamw(piece: _Piece, moments: Tensor) -> None:
    """torch's update of one piece with its staged moments (2, n); one pass on a GPU."""
    group, device = piece.group, piece.weight.device
    on_gpu = device.type == "cuda"
    adamw(
        [piece.weight], [piece.gradient], [moments[0]], [moments[1]], [],
        [torch.full((), piece.steps, device=device)],
        foreach=False, fused=on_gpu, amsgrad=False, maximize=False,
        beta1=group["betas"][0], beta2=group["betas"][1],
        lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
    )  # fmt: skip


# ----------------------------------------------------------------------------- pinned memory


def plain_zeros(counts: Sequence[int]) -> list[Tensor]:
    """Tensors (n,) fp32 of zeros, for each n of `counts`."""
    return [torch.zeros(count) for count in counts]


def pinned_zeros(counts: Sequence[int]) -> list[Tensor]:
    """The same in pinned memory, with little more of it than they need.

    torch's allocator of pinned memory rounds each request up to a power of two, which would be up
    to twice the size. So blocks of such sizes are asked for, and filled with several tensors.
    """
    found: dict[int, Tensor] = {}
    for size, places in plan_blocks([4 * count for count in counts]):
        block = torch.empty(size // 4, dtype=torch.float32, pin_memory=True).zero_().numpy()
        for index, start in places:
            # By way of numpy each has a storage of its own: what saves a view of a larger storage
            # copies it first, or all of the storage.
            part = block[start // 4 : start // 4 + counts[index]]
            found[index] = torch.from_numpy(part)
    return [found[index] for index in range(len(counts))]


def plan_blocks(sizes: Sequence[int]) -> list[tuple[int, list[tuple[int, int]]]]:
    """Blocks of memory, of powers of two, that hold things of these sizes.

    Returns: (bytes of a block, [(index of a thing in it, its first byte), ...]), ...
    """
    rounded = {i: -(-max(size, 1) // _ALIGNED) * _ALIGNED for i, size in enumerate(sizes)}
    waiting = sorted(rounded, key=lambda i: -rounded[i])
    blocks = []
    while waiting:
        rest = sum(rounded[i] for i in waiting)
        at_least = 1 << (rounded[waiting[0]] - 1).bit_length()
        size = max(at_least, min(LARGEST_BLOCK, 1 << (rest.bit_length() - 1)))
        places, end = [], 0
        for i in waiting:
            if end + rounded[i] <= size:
                places.append((i, end))
                end += rounded[i]
        taken = {i for i, _ in places}
        waiting = [i for i in waiting if i not in taken]
        blocks.append((size, places))
    return blocks
