# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Qwen2 decoder as a mixture of transformers: one layer class, two experts, joint attention.

Understanding rows (text, markers, ViT features) use the plain weights; latent rows of a drawn
image use the `*_moe_gen` twins, which exist only in models built with `visual_gen=True`. The rows
of each expert are held in a tensor of their own and meet in the attention alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from modeling import fast
from modeling.bagel.attention import (
    AttentionLayout,
    DecodeLayout,
    attend,
    attend_in_place,
    attends_in_place,
)
from modeling.bagel.config import LLMConfig
from modeling.bagel.kv_cache import KeyValues
from modeling.bagel.projections import added, few_rows, products

# Of the understanding expert, then of the generation expert.
SUFFIXES = ("", "_moe_gen")
# Rows of the understanding expert and, where there are latents, of the generation expert.
Rows: TypeAlias = tuple[Tensor, ...]


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


def split_rows(x: Tensor, routing: Routing | None) -> Rows:
    """(T, ...) -> the rows of each expert."""
    if routing is None:
        return (x,)
    return x.index_select(0, routing.und_rows), x.index_select(0, routing.gen_rows)


def join_rows(parts: Rows, routing: Routing | None) -> Tensor:
    """The rows of each expert back in the packed order: (T, ...)."""
    if routing is None:
        return parts[0]
    out = parts[0].new_empty((sum(len(part) for part in parts), *parts[0].shape[1:]))
    for part, rows in zip(parts, (routing.und_rows, routing.gen_rows), strict=True):
        out = out.index_copy_(0, rows, part)
    return out


class RMSNorm(nn.Module):
    """Root-mean-square norm: statistics in fp32, cast back, then scaled."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if fast.runs_kernels("rows", x):
            from modeling.kernels.rows import rms_norm

            return rms_norm(x, self.weight, self.eps)
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


def turns_by_kernel(x: Tensor, dim: int, norms: Sequence[RMSNorm]) -> bool:
    """Whether kernels norm and rotate the heads, of width dim, of rows like x."""
    half = dim // 2
    return (
        fast.runs_kernels("rows", x)
        and half & (half - 1) == 0
        # Not so if a module hook brings a norm for its call.
        and all(norm.weight.device == x.device for norm in norms)
    )


def turned(
    q: Tensor, k: Tensor, q_norm: RMSNorm, k_norm: RMSNorm, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """Norm of each head, then rotation: q (T, nh, d), k (T, nkv, d), cos and sin (T, d)."""
    if turns_by_kernel(q, q.shape[-1], (q_norm, k_norm)):
        from modeling.kernels.rows import norm_rotary

        return norm_rotary(q, k, q_norm.weight, k_norm.weight, cos, sin, q_norm.eps)
    return apply_rotary(q_norm(q), cos, sin), apply_rotary(k_norm(k), cos, sin)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up; nobody else may hold these two, which a backward pass overwrites."""
    if fast.runs_kernels("rows", gate):
        from modeling.kernels.rows import silu_mul

        return silu_mul(gate, up)
    return F.silu(gate) * up


class Attention(nn.Module):
    def __init__(self, config: LLMConfig, experts: tuple[str, ...]) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        width, dim = config.hidden_size, config.head_dim
        self.head_dim, self.experts = dim, experts
        for suffix in experts:
            self.add_module(f"q_proj{suffix}", nn.Linear(width, self.heads * dim))
            self.add_module(f"k_proj{suffix}", nn.Linear(width, self.kv_heads * dim))
            self.add_module(f"v_proj{suffix}", nn.Linear(width, self.kv_heads * dim))
            self.add_module(f"o_proj{suffix}", nn.Linear(self.heads * dim, width, bias=False))
            self.add_module(f"q_norm{suffix}", RMSNorm(dim, config.rms_norm_eps))
            self.add_module(f"k_norm{suffix}", RMSNorm(dim, config.rms_norm_eps))

    def _heads_of(self, suffix: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q (T_e, nh, d), k and v (T_e, nkv, d) of one expert's rows, not yet rotated."""
        q, k, v = products(x, [getattr(self, f"{n}_proj{suffix}") for n in "qkv"])
        kv = (len(x), self.kv_heads, self.head_dim)
        return q.view(len(x), self.heads, self.head_dim), k.view(kv), v.view(kv)

    def _norms_of(self, suffix: str) -> tuple[RMSNorm, RMSNorm]:
        """Those of queries and of keys."""
        return getattr(self, f"q_norm{suffix}"), getattr(self, f"k_norm{suffix}")

    def project(
        self, xs: Rows, cos: Rows, sin: Rows, routing: Routing | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Packed q (T, nh, d), k and v (T, nkv, d), rotated, from the rows of each expert."""
        parts = []
        for suffix, x, c, s in zip(SUFFIXES, xs, cos, sin, strict=False):
            q, k, v = self._heads_of(suffix, x)
            parts.append((*turned(q, k, *self._norms_of(suffix), c, s), v))
        q, k, v = (join_rows(part, routing) for part in zip(*parts, strict=True))
        return q, k, v

    def forward(
        self,
        xs: Rows,
        cos: Rows,
        sin: Rows,
        layout: AttentionLayout | DecodeLayout,
        routing: Routing | None,
        cache: KeyValues | None,
        layer: int,
        residuals: Rows,
        keys_only: bool = False,
    ) -> Rows:
        """`residuals`, used up, plus what the normed rows xs of each expert see.

        keys_only: nothing is added: what the cache keeps is all that is wanted.
        """
        if keys_only:
            assert cache is not None
            _, k, v = self.project(xs, cos, sin, routing)
            cache.update(layer, k, v, layout)
            return residuals
        seen = None
        if cache is not None and self._places(xs[0], layout):
            assert isinstance(layout, AttentionLayout)
            seen = self._attend_in_cache(xs, cos, sin, layout, routing, cache, layer)
        if seen is None:
            q, k, v = self.project(xs, cos, sin, routing)
            if cache is not None:
                k, v = cache.update(layer, k, v, layout)
            seen = split_rows(attend(q, k, v, layout).flatten(1), routing)
        each_part = zip(SUFFIXES, residuals, seen, strict=False)
        return tuple(added(x, y, getattr(self, f"o_proj{suffix}")) for suffix, x, y in each_part)

    def _places(self, x: Tensor, layout: AttentionLayout | DecodeLayout) -> bool:
        """Whether `_attend_in_cache` can serve."""
        if torch.is_grad_enabled() or not isinstance(layout, AttentionLayout):
            return False
        norms = [norm for suffix in self.experts for norm in self._norms_of(suffix)]
        return turns_by_kernel(x, self.head_dim, norms) and attends_in_place(x, layout)

    def _attend_in_cache(
        self,
        xs: Rows,
        cos: Rows,
        sin: Rows,
        layout: AttentionLayout,
        routing: Routing | None,
        cache: KeyValues,
        layer: int,
    ) -> Rows | None:
        """The same for kernels: nothing is joined, split or gathered.

        Keys and values are written where the cache has them, queries stay in the experts' order.
        """
        from modeling.kernels.rows import place_rows

        place = cache.place(layer, layout)
        if place is None:
            return None
        rows: Rows = (place.rows,)
        order = None
        if routing is not None:
            key = ("experts", place.rows.device, len(place.keys), place.starts)
            rows, order = layout.memo(
                key,
                lambda: (
                    split_rows(place.rows, routing),
                    torch.cat([routing.und_rows, routing.gen_rows]),
                ),
            )
        sizes = [len(x) for x in xs]
        q_all = xs[0].new_empty(sum(sizes), self.heads, self.head_dim)
        each_part = zip(SUFFIXES, xs, cos, sin, rows, q_all.split(sizes), strict=False)
        for suffix, x, c, s, to, q_out in each_part:
            q_norm, k_norm = self._norms_of(suffix)
            place_rows(
                *self._heads_of(suffix, x), q_norm.weight, k_norm.weight, c, s, q_norm.eps,
                to, q_out, place.keys, place.values,
            )  # fmt: skip
        seen = attend_in_place(q_all, place.keys, place.values, layout, place.starts, order)
        return seen.flatten(1).split(sizes)


class MLP(nn.Module):
    def __init__(self, config: LLMConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """`residual`, used up, plus the MLP of the normed rows x."""
        if few_rows(x, self.gate_proj):
            from modeling.kernels.stream_linear import stream_linear

            hidden = stream_linear(x, self.gate_proj.weight, second=self.up_proj.weight)
        else:
            hidden = gated(*products(x, [self.gate_proj, self.up_proj]))
        return added(residual, hidden, self.down_proj)


def each(module: nn.Module, name: str, *arguments: Rows) -> Rows:
    """Apply `name` to the understanding rows and its generation twin to the latent rows."""
    of_experts = zip(SUFFIXES, zip(*arguments, strict=True), strict=False)
    return tuple(getattr(module, name + suffix)(*xs) for suffix, xs in of_experts)


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP; the same code with or without a cache."""

    def __init__(self, config: LLMConfig, layer: int, visual_gen: bool) -> None:
        super().__init__()
        experts = SUFFIXES if visual_gen else SUFFIXES[:1]
        self.layer = layer
        self.self_attn = Attention(config, experts)
        for suffix in experts:
            self.add_module(f"mlp{suffix}", MLP(config))
            for name in ("input_layernorm", "post_attention_layernorm"):
                self.add_module(name + suffix, RMSNorm(config.hidden_size, config.rms_norm_eps))
        self.checkpointing = False

    def _body(
        self,
        xs: Rows,
        cos: Rows,
        sin: Rows,
        layout: AttentionLayout | DecodeLayout,
        routing: Routing | None,
        cache: KeyValues | None,
        keys_only: bool,
    ) -> Rows:
        normed = each(self, "input_layernorm", xs)
        xs = self.self_attn(normed, cos, sin, layout, routing, cache, self.layer, xs, keys_only)
        if keys_only:
            return xs
        return each(self, "mlp", each(self, "post_attention_layernorm", xs), xs)

    def forward(
        self,
        xs: Rows,
        cos: Rows,
        sin: Rows,
        layout: AttentionLayout | DecodeLayout,
        routing: Routing | None = None,
        cache: KeyValues | None = None,
        keys_only: bool = False,
    ) -> Rows:
        """Rows of each expert (T_e, H), their cos and sin (T_e, d) -> the same rows, one deeper.

        keys_only: only the cache's keys and values are wanted; the rows come back as they are.
        """
        arguments = (xs, cos, sin, layout, routing, cache, keys_only)
        if self.checkpointing and any(x.requires_grad for x in xs):
            # Inside the layer, so that a sharded layer recomputes without gathering twice.
            return checkpoint(self._body, *arguments, use_reentrant=False)
        return self._body(*arguments)


class Decoder(nn.Module):
    """Embeddings, layers and final norms; holds the keys below `language_model.model`."""

    def __init__(self, config: LLMConfig, visual_gen: bool) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, i, visual_gen) for i in range(config.num_hidden_layers)
        )
        for suffix in SUFFIXES if visual_gen else SUFFIXES[:1]:
            self.add_module(f"norm{suffix}", RMSNorm(config.hidden_size, config.rms_norm_eps))
        self.head_dim, self.rope_theta = config.head_dim, config.rope_theta

    def forward(
        self,
        x: Tensor,
        position_ids: Tensor,
        layout: AttentionLayout | DecodeLayout,
        routing: Routing | None = None,
        cache: KeyValues | None = None,
        keys_only: bool = False,
    ) -> Tensor:
        """x (T, H), used up, position_ids (T,) -> hidden states after the final norm (T, H).

        keys_only: the hidden states are not wanted, so the last layer stops at its keys.
        """
        angles = rotary(position_ids, self.head_dim, self.rope_theta)
        cos, sin = (split_rows(angle.to(x.dtype), routing) for angle in angles)
        xs = split_rows(x, routing)
        last = len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            xs = layer(xs, cos, sin, layout, routing, cache, keys_only and index == last)
        return join_rows(xs if keys_only else each(self, "norm", xs), routing)


class LanguageModel(nn.Module):
    """Decoder and untied head (keys `language_model.model...`, `language_model.lm_head`)."""

    def __init__(self, config: LLMConfig, visual_gen: bool) -> None:
        super().__init__()
        self.model = Decoder(config, visual_gen)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
