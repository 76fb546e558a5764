# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Fixed 2-D position tables, the timestep embedder and the vision connector."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modeling.bagel.layer import Layer


def sincos_table(dim: int, side: int) -> Tensor:
    """Sin-cos table of a side x side grid, fp32 (side * side, dim), row-major.

    Channels: [sin(column), cos(column), sin(row), cos(row)], dim / 4 frequencies each;
    computed in float64, then stored in fp32 like the releases.
    """
    assert dim % 4 == 0, dim
    frequencies = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies  # (side, dim / 4)
    one_axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, dim / 2)
    columns = one_axis.repeat(side, 1)
    rows = one_axis.repeat_interleave(side, dim=0)
    return torch.cat([columns, rows], dim=1).float()


class PositionTable(nn.Module):
    """A fixed table stored with the weights (VLMEvalKit's wrapper needs it in the file)."""

    def __init__(self, dim: int, side: int) -> None:
        super().__init__()
        self.dim, self.side = dim, side
        self.pos_embed = nn.Parameter(sincos_table(dim, side), requires_grad=False)

    def forward(self, position_ids: Tensor) -> Tensor:
        return self.pos_embed[position_ids]


def timestep_frequencies(t: Tensor, dim: int = 256) -> Tensor:
    """[cos | sin] of t (N,) in [0, 1] at dim / 2 frequencies, fp32 (N, dim)."""
    half = dim // 2
    frequencies = torch.exp(
        -math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=t.device) / half
    )
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedder(nn.Module):
    """MLP over `timestep_frequencies` (keys time_embedder.mlp.0 and .2)."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(256, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, t: Tensor) -> Tensor:
        first = self.mlp[0]
        assert isinstance(first, nn.Linear)
        return self.mlp(timestep_frequencies(t).to(first.weight.dtype))


class Connector(Layer):
    """ViT width to decoder width: fc1, tanh-approximated GELU, fc2."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_features, out_features)
        self.fc2 = nn.Linear(out_features, out_features)

    def compute(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
