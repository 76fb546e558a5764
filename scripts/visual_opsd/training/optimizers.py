# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""AdamW with its moments where there is room: beside the weights, in host memory, or in 8 bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from scripts.visual_opsd.config import OptimSettings
from scripts.visual_opsd.training.host_adamw import HostAdamW


def make_optimizer(
    parameters: Sequence[nn.Parameter], settings: OptimSettings, device: torch.device
) -> torch.optim.Optimizer:
    """The optimiser that `optimizer_state` names.

    Args:
        parameters: fp32 shards (DTensors) that train, on `device`, where the run computes; for
            `gpu` they may lie in host memory, where AdamW then does all its work.

    Raises:
        ValueError: `host`, and the host has too little memory.
    """
    group: dict[str, Any] = {
        "lr": settings.lr,
        "betas": (settings.beta1, settings.beta2),
        "eps": settings.eps,
        "weight_decay": settings.weight_decay,
    }
    kind = settings.optimizer_state
    offloaded = any(parameter.device.type != device.type for parameter in parameters)
    if kind == "gpu":
        # Unfused, torch takes the square roots of all second moments at once on a GPU.
        fused = device.type == "cuda" and not offloaded
        return torch.optim.AdamW(parameters, fused=fused or None, **group)
    assert not offloaded, "TrainConfig refuses --cpu_offload with it"
    if kind == "host":
        return HostAdamW(parameters, **group)
    from scripts.visual_opsd.training.eight_bit_adamw import EightBitAdamW  # imports torchao

    return EightBitAdamW(parameters, **group)
