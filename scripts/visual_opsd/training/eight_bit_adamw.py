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


def block_size(shape: Sequence[int]) -> int | None:
    """Values that share a scale: a divisor of a row's length. None: the moments are fp32.

    Args:
        shape: of the whole weight.
    """
    size = math.gcd(math.prod(shape[1:]), LARGEST_BLOCK)
    return size if math.prod(shape) >= SMALLEST_WEIGHT and size >= SMALLEST_BLOCK else None


class EightBitAdamW(KeptState):
    """AdamW with 8-bit moments on DTensors that are sharded by rows, if at all.

    torchao's optimiser does the updates, on the shards. On a GPU it compiles them, once for each
    shape of a shard; elsewhere they run as they are. `state[parameter]` shows its state as plain
    tensors: `step`, `exp_avg.codes` (the weight's shape, uint8), `exp_avg.scale` (rows, blocks of
    a row; fp32), or `exp_avg` (fp32), and so for `exp_avg_sq`; all but the first are DTensors.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], **group: Any) -> None:
        super().__init__(parameters, group)
        self._shards = [nn.Parameter(local_part(parameter)) for parameter in parameters]
        self._updates = AdamW8bit(self._shards, **group)
        for parameter, shard in zip(parameters, self._shards, strict=True):
            assert isinstance(parameter, DTensor), "shards are DTensors"
            assert all(p.is_replicate() or p.is_shard(0) for p in parameter.placements)
            step, block = torch.tensor(0.0), block_size(parameter.shape)
            moments = {
                "exp_avg": _zeros(shard, block, signed=True),
                "exp_avg_sq": _zeros(shard, block, signed=False),
            }
            self._updates.state[shard] = {"step": step, **moments}
            plain: dict[str, Tensor] = {"step": step}
            for name, moment in moments.items():
                plain |= _plain_parts(name, moment, parameter, block)
            self.state[parameter] = plain

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        (group,), (theirs,) = self.param_groups, self._updates.param_groups
        theirs |= {key: group[key] for key in ("betas", "eps", "weight_decay")}
        theirs["lr"].fill_(group["lr"])  # a tensor, or each value would be compiled anew
        for parameter, shard in zip(group["params"], self._shards, strict=True):
            shard.data = local_part(parameter)  # FSDP2 may have moved it
            shard.grad = None
            if parameter.grad is not None and shard.numel():
                shard.grad = local_part(parameter.grad)
            elif parameter.grad is not None:
                self.state[parameter]["step"] += 1
        how: AbstractContextManager[Any] = nullcontext()
        if not self._shards[0].is_cuda:  # compiling for a CPU takes 20 s a shape
            how = torch.compiler.set_stance("force_eager")
        with how:
            self._updates.step()
        self._updates.zero_grad(set_to_none=True)  # or they would outlive the parameters'
        return loss


def _zeros(shard: Tensor, block: int | None, *, signed: bool) -> Tensor:
    """A moment of zeros for a shard."""
    if block is None or not shard.numel():  # torchao's tensor cannot be empty
        return torch.zeros_like(shard, requires_grad=False)
    zeros = OptimState8bit.zeros(shard.shape, signed, block, shard.device, shard.dtype)
    if not signed:
        zeros.qmap[0] = zeros.qmap[1]
    return zeros


def _plain_parts(
    name: str, moment: Tensor, parameter: DTensor, block: int | None
) -> dict[str, Tensor]:
    """A moment as tensors that any mesh can load; they share its memory."""
    if block is None:
        return {name: _rows_of(parameter, moment, parameter.shape)}
    if isinstance(moment, OptimState8bit):
        codes, scale = moment.codes, moment.scale
    else:  # no row is this rank's
        codes, scale = moment.to(torch.uint8), moment.new_empty(0)
    per_row = math.prod(parameter.shape[1:]) // block
    scale = scale.view(len(moment), per_row)
    return {
        f"{name}.codes": _rows_of(parameter, codes, parameter.shape),
        f"{name}.scale": _rows_of(parameter, scale, (parameter.shape[0], per_row)),
    }


def _rows_of(parameter: DTensor, local: Tensor, shape: Sequence[int]) -> DTensor:
    """`local` as this rank's rows of a tensor of `shape` that is sharded as the parameter is."""
    whole = torch.empty(tuple(shape), device="meta")
    return DTensor.from_local(
        local, parameter.device_mesh, parameter.placements,
        run_check=False, shape=whole.shape, stride=whole.stride(),
    )  # fmt: skip
