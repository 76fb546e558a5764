# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Qwen2 decoder as a mixture of transformers: one layer class, two experts, joint attention.

Understanding rows (text, markers, ViT features) use the plain weights; latent rows of a drawn
image use the `*_moe_gen` twins, which exist only in models built with `visual_gen=True`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from modeling.bagel.attention import AttentionLayout, DecodeLayout, attend
from modeling.bagel.config import LLMConfig
from modeling.bagel.kv_cache import KeyValues

GEN_SUFFIX = "_moe_gen"


@dataclass(frozen=True)
class Routing:
    """Which rows each expert processes; both int64, together a partition of all rows."""

    und_rows: Tensor
    gen_rows: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Routing:
        """The same on `device` (a model spread over several devices moves its arguments)."""
        return Routing(
            self.und_rows.to(device, non_blocking=non_blocking),
            self.gen_rows.to(device, non_blocking=non_blocking),
        )


class RMSNorm(nn.Module):
    """Root-mean-square norm: statistics in fp32, cast back, then scaled."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return wide.to(x.dtype) * self.weight


def rotary(position_ids: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin (T, head_dim) in fp32; the frequencies are recomputed, so no cast reaches them.

    (The reference keeps them in a buffer that its FSDP casts to bf16.)
    """
    exponent = torch.arange(0, head_dim, 2, device=position_ids.device).float() / head_dim
    angles = position_ids.float()[:, None] * (1.0 / theta**exponent)  # (T, d / 2)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half-split rotation of x (T, heads, d)."""
    left, right = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat([-right, left], dim=-1) * sin[:, None]


def route(module: nn.Module, name: str, x: Tensor, routing: Routing | None) -> Tensor:
    """Apply `name` to understanding rows and its generation twin to latent rows of x (T, ...)."""
    und = getattr(module, name)
    if routing is None:
        return und(x)
    y_und = und(x[routing.und_rows])
    y_gen = getattr(module, name + GEN_SUFFIX)(x[routing.gen_rows])
    out = y_und.new_empty((x.shape[0], *y_und.shape[1:]))
    return out.index_copy(0, routing.und_rows, y_und).index_copy(0, routing.gen_rows, y_gen)


class Attention(nn.Module):
    def __init__(self, config: LLMConfig, experts: tuple[str, ...]) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        width, dim = config.hidden_size, config.head_dim
        for suffix in experts:
            self.add_module(f"q_proj{suffix}", nn.Linear(width, self.heads * dim))
            self.add_module(f"k_proj{suffix}", nn.Linear(width, self.kv_heads * dim))
            self.add_module(f"v_proj{suffix}", nn.Linear(width, self.kv_heads * dim))
            self.add_module(f"o_proj{suffix}", nn.Linear(self.heads * dim, width, bias=False))
            self.add_module(f"q_norm{suffix}", RMSNorm(dim, config.rms_norm_eps))
            self.add_module(f"k_norm{suffix}", RMSNorm(dim, config.rms_norm_eps))

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        layout: AttentionLayout | DecodeLayout,
        routing: Routing | None,
        cache: KeyValues | None,
        layer: int,
    ) -> Tensor:
        q = route(self, "q_proj", x, routing).unflatten(-1, (self.heads, -1))  # (T, nh, d)
        k = route(self, "k_proj", x, routing).unflatten(-1, (self.kv_heads, -1))
        v = route(self, "v_proj", x, routing).unflatten(-1, (self.kv_heads, -1))
        q = apply_rotary(route(self, "q_norm", q, routing), cos, sin)
        k = apply_rotary(route(self, "k_norm", k, routing), cos, sin)
        if cache is not None:
            k, v = cache.update(layer, k, v, layout)
        return route(self, "o_proj", attend(q, k, v, layout).flatten(1), routing)


class MLP(nn.Module):
    def __init__(self, config: LLMConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP; the same code with or without a cache."""

    def __init__(self, config: LLMConfig, layer: int, visual_gen: bool) -> None:
        super().__init__()
        experts = ("", GEN_SUFFIX) if visual_gen else ("",)
        self.layer = layer
        self.self_attn = Attention(config, experts)
        for suffix in experts:
            self.add_module(f"mlp{suffix}", MLP(config))
            for name in ("input_layernorm", "post_attention_layernorm"):
                self.add_module(name + suffix, RMSNorm(config.hidden_size, config.rms_norm_eps))
        self.checkpointing = False

    def _body(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        layout: AttentionLayout | DecodeLayout,
        routing: Routing | None,
        cache: KeyValues | None,
    ) -> Tensor:
        normed = route(self, "input_layernorm", x, routing)
        x = x + self.self_attn(normed, cos, sin, layout, routing, cache, self.layer)
        normed = route(self, "post_attention_layernorm", x, routing)
        return x + route(self, "mlp", normed, routing)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        layout: AttentionLayout | DecodeLayout,
        routing: Routing | None = None,
        cache: KeyValues | None = None,
    ) -> Tensor:
        if self.checkpointing and x.requires_grad:
            # Inside the layer, so that a sharded layer recomputes without gathering twice.
            return checkpoint(self._body, x, cos, sin, layout, routing, cache, use_reentrant=False)
        return self._body(x, cos, sin, layout, routing, cache)


class Decoder(nn.Module):
    """Embeddings, layers and final norms; holds the keys below `language_model.model`."""

    def __init__(self, config: LLMConfig, visual_gen: bool) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, i, visual_gen) for i in range(config.num_hidden_layers)
        )
        for suffix in ("", GEN_SUFFIX) if visual_gen else ("",):
            self.add_module(f"norm{suffix}", RMSNorm(config.hidden_size, config.rms_norm_eps))
        self.head_dim, self.rope_theta = config.head_dim, config.rope_theta

    def forward(
        self,
        x: Tensor,
        position_ids: Tensor,
        layout: AttentionLayout | DecodeLayout,
        routing: Routing | None = None,
        cache: KeyValues | None = None,
    ) -> Tensor:
        """x (T, H), position_ids (T,) -> hidden states after the final norm (T, H)."""
        cos, sin = rotary(position_ids, self.head_dim, self.rope_theta)
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin, layout, routing, cache)
        return route(self, "norm", x, routing)


class LanguageModel(nn.Module):
    """Decoder and untied head (keys `language_model.model...`, `language_model.lm_head`)."""

    def __init__(self, config: LLMConfig, visual_gen: bool) -> None:
        super().__init__()
        self.model = Decoder(config, visual_gen)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
