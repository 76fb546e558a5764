# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""SigLIP vision tower at native resolution: images of any size, packed one after the other.

Module names follow the release (`vit_model.vision_model...`). The patch convolution is stored
as a linear layer over (row, column, channel); position ids index the flattened table.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modeling.bagel.attention import AttentionLayout, Block, attend
from modeling.bagel.config import VisionConfig
from modeling.bagel.layer import Layer
from modeling.bagel.plan import LayerPlan, plan_layers
from modeling.bagel.projections import project_rows


@lru_cache(maxsize=64)
def image_layout(lens: tuple[int, ...]) -> AttentionLayout:
    """Images of so many patches, each attending to itself alone."""
    return AttentionLayout(lens, (0,) * len(lens), tuple((Block(0, n),) for n in lens))


class VisionAttention(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, layout: AttentionLayout, plan: LayerPlan) -> Tensor:
        projected = project_rows(x, [self.q_proj, self.k_proj, self.v_proj], plan)
        q, k, v = (y.view(len(y), self.heads, -1) for y in projected)  # (N, nh, d)
        return self.out_proj(attend(q, k, v, layout, plan.backend).flatten(1))


class VisionMLP(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class VisionLayer(Layer):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = VisionAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = VisionMLP(config)

    def compute(self, x: Tensor, layout: AttentionLayout, plan: LayerPlan) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), layout, plan)
        return x + self.mlp(self.layer_norm2(x))


class VisionEmbeddings(nn.Module):
    def __init__(self, config: VisionConfig, side: int) -> None:
        super().__init__()
        self.patch_embedding = nn.Linear(config.patch_dim, config.hidden_size)
        self.position_embedding = nn.Embedding(side * side, config.hidden_size)

    def forward(self, patches: Tensor, position_ids: Tensor) -> Tensor:
        patches = patches.to(self.patch_embedding.weight.dtype)
        return self.patch_embedding(patches) + self.position_embedding(position_ids)


class VisionEncoder(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_hidden_layers))


class VisionTransformer(nn.Module):
    """patches (N, 588), position_ids (N,), rows of each image -> features (N, Hv)."""

    def __init__(self, config: VisionConfig, side: int) -> None:
        super().__init__()
        self.embeddings = VisionEmbeddings(config, side)
        self.encoder = VisionEncoder(config)
        # Applied although layer -2 is selected, as in the releases.
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        # Where each layer computes, if not all where the patches are (release/spread.py).
        self.layer_devices: tuple[torch.device, ...] | None = None

    def forward(self, patches: Tensor, position_ids: Tensor, lens: Sequence[int]) -> Tensor:
        layout = image_layout(tuple(lens))
        x = self.embeddings(patches, position_ids)
        plans = plan_layers(self.encoder.layers, x, layout, devices=self.layer_devices)
        for layer, plan in zip(self.encoder.layers, plans, strict=True):
            x = layer(x, layout, plan)
        return self.post_layernorm(x)


class VisionModel(nn.Module):
    """Holder that gives the keys their `vision_model.` prefix."""

    def __init__(self, config: VisionConfig, side: int) -> None:
        super().__init__()
        self.vision_model = VisionTransformer(config, side)

    def forward(self, patches: Tensor, position_ids: Tensor, lens: Sequence[int]) -> Tensor:
        return self.vision_model(patches, position_ids, lens)
