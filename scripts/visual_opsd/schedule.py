# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""What a run computes in, and how its learning rate goes."""

from __future__ import annotations

import math

import torch

from scripts.visual_opsd.config import TrainConfig


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Dtype of the forward passes.

    Raises:
        ValueError: bf16 asked for on a CPU, where everything is fp32.
    """
    if precision == "bf16" and device.type == "cpu":
        raise ValueError("precision bf16 needs a GPU; on a CPU use --precision fp32 (or auto)")
    if precision == "fp32" or device.type == "cpu":
        return torch.float32
    return torch.bfloat16


def learning_rate_factor(step: int, config: TrainConfig) -> float:
    """Factor on lr of 0-based step `step`: linear warm-up, then cosine down to min_lr."""
    optim = config.optim
    if step < optim.warmup_steps:
        return (step + 1) / optim.warmup_steps
    if optim.lr_scheduler == "constant":
        return 1.0
    span = max(1, optim.total_steps - 1 - optim.warmup_steps)
    progress = min(1.0, (step - optim.warmup_steps) / span)
    floor = optim.min_lr / optim.lr
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
