# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""torchao's AdamW with moments of 8 bits, in a form that training states hold on any mesh.

A moment is a code of 8 bits a value and a scale for each block of values (Dettmers et al., 2021,
arXiv:2110.02861). Two things differ from what torchao does by itself:

* A block never crosses a row of the weight, and which weights are quantised depends on their whole
  shape alone. Shards are whole rows, so blocks are the same on every mesh, and a state can be
  resumed on another one without a change of any bit.
* The second moment's table has no zero. A value that is small in its block would become 0 while
  its first moment does not, and the next update would be the first moment divided by eps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torchao.optim import AdamW8bit
from torchao.optim.subclass_8bit import OptimState8bit

from scripts.visual_opsd.training.kept_state import KeptState
from scripts.visual_opsd.training.sharding import local_part

LARGEST_BLOCK, SMALLEST_BLOCK = 256, 16  # values; a scale has 4 bytes
SMALLEST_WEIGHT = 4096  # values; smaller ones keep fp32 moments, as in torchao
_MOMENTS = ("exp_avg", "exp_avg_sq")


def block_size(shape: Sequence[int]) -> int | None:
    """Values that share a scale: a divisor of a row's length. None: the moments are fp32.

    Args:
        shape: of the whole weight.
    """
    size = math.gcd(math.prod(shape[1:]), LARGEST_BLOCK)
    return size if math.prod(shape) >= SMALLEST_WEIGHT and size >= SMALLEST_BLOCK else None


class EightBitAdamW(KeptState, AdamW8bit):
    """AdamW with 8-bit moments on DTensors that are sharded by rows, if at all.

    On a GPU torchao compiles its update, once for each shape of a weight; elsewhere it runs as it
    is. `state_dict` holds plain DTensors: `exp_avg.codes` (the weight's shape, uint8),
    `exp_avg.scale` (rows, blocks of a row; fp32), or `exp_avg` (fp32), and so for `exp_avg_sq`.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], **group: Any) -> None:
        super().__init__(parameters, **group)
        for each in self.param_groups:
            each["lr"] = self.defaults["lr"]  # a number again, see `step`
        for parameter in parameters:
            assert isinstance(parameter, DTensor), "shards are DTensors"
            assert all(p.is_replicate() or p.is_shard(0) for p in parameter.placements)
            self.state[parameter] = {
                "step": torch.tensor(0.0),
                "exp_avg": _zeros(parameter, signed=True),
                "exp_avg_sq": _zeros(parameter, signed=False),
            }

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        rates = [group["lr"] for group in self.param_groups]
        on_gpu = all(p.is_cuda for group in self.param_groups for p in group["params"])
        how: AbstractContextManager[Any] = nullcontext()
        if not on_gpu:  # compiling for a CPU takes 20 s a shape
            how = torch.compiler.set_stance("force_eager")
        try:
            for group, rate in zip(self.param_groups, rates, strict=True):
                # torchao wants a tensor; schedules and states want a number.
                group["lr"] = torch.tensor(rate, dtype=torch.float32)
            with how:
                return super().step(closure)
        finally:
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = rate

    def state_dict(self) -> dict[str, Any]:
        """The state as plain tensors that share the memory of this one."""
        packed = super().state_dict()
        parameters = [p for group in self.param_groups for p in group["params"]]
        numbers = [n for group in packed["param_groups"] for n in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            packed["state"][number] = _plain(parameter, self.state[parameter])
        return packed


@torch.no_grad()
def _zeros(parameter: DTensor, *, signed: bool) -> DTensor:
    """A moment of zeros for a weight."""
    local, block = parameter.to_local(), block_size(parameter.shape)
    zeros = torch.zeros_like(local)
    if block is not None and local.numel():  # torchao's tensor cannot be empty
        made = OptimState8bit.zeros(local.shape, signed, block, local.device, local.dtype)
        if not signed:
            made.qmap[0] = made.qmap[1]
        zeros = made
    return _sharded_as(parameter, zeros, parameter.shape)


def _sharded_as(parameter: DTensor, local: Tensor, shape: Sequence[int]) -> DTensor:
    """`local` as this rank's rows of a tensor (rows of `parameter`, ...) of `shape`."""
    whole = torch.empty(tuple(shape), device="meta")
    return DTensor.from_local(
        local, parameter.device_mesh, parameter.placements,
        run_check=False, shape=whole.shape, stride=whole.stride(),
    )  # fmt: skip


@torch.no_grad()
def _plain(parameter: DTensor, state: dict[str, Any]) -> dict[str, Any]:
    """A parameter's state for a file: codes and scales are tensors of their own."""
    block = block_size(parameter.shape)
    if block is None:
        return state
    rows, per_row = len(local_part(parameter)), math.prod(parameter.shape[1:]) // block
    found = {"step": state["step"]}
    for name in _MOMENTS:
        moment = local_part(state[name])
        if isinstance(moment, OptimState8bit):
            codes, scale = moment.codes, moment.scale
        else:  # no row is this rank's
            codes = moment.to(torch.uint8)
            scale = moment.new_empty(0)
        found[f"{name}.codes"] = _sharded_as(parameter, codes, parameter.shape)
        whole = (parameter.shape[0], per_row)
        found[f"{name}.scale"] = _sharded_as(parameter, scale.view(rows, per_row), whole)
    return found
