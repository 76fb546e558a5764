# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Qwen2 decoder as a mixture of transformers: one layer class, two experts, joint attention.

Understanding rows (text, markers, ViT features) use the plain weights; latent rows of a drawn
image use the `*_moe_gen` twins, which exist only in models built with `visual_gen=True`. The rows
of each expert are held in a tensor of their own and meet in the attention alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modeling.bagel.attention import AttentionLayout, DecodeLayout, attend, attend_in_place
from modeling.bagel.config import LLMConfig
from modeling.bagel.kv_cache import KeyValues, Placement
from modeling.bagel.layer import Layer
from modeling.bagel.plan import PLAIN, LayerPlan, plan_layer, plan_layers
from modeling.bagel.projections import add_linear, are_plain, project_rows

# Of the understanding expert, then of the generation expert.
SUFFIXES = ("", "_moe_gen")
# Rows of the understanding expert and, where there are latents, of the generation expert.
Rows: TypeAlias = tuple[Tensor, ...]


@dataclass(frozen=True)
class Routing:
    """Which rows each expert processes; both int64, together a partition of all rows."""

    und_rows: Tensor
    gen_rows: Tensor


@dataclass(frozen=True)
class SharedInputs:
    """What all layers of a forward share.

    cos, sin: (T_e, d) of the rows of each expert, in the compute dtype.
    """

    cos: Rows
    sin: Rows
    layout: AttentionLayout | DecodeLayout
    routing: Routing | None
    cache: KeyValues | None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> SharedInputs:
        """The same on `device` (a model spread over several devices moves its arguments)."""

        def move(x: Tensor) -> Tensor:
            return x.to(device, non_blocking=non_blocking)

        routing = self.routing
        if routing is not None:
            routing = Routing(move(routing.und_rows), move(routing.gen_rows))
        cos, sin = tuple(map(move, self.cos)), tuple(map(move, self.sin))
        return replace(self, cos=cos, sin=sin, routing=routing)


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

    def forward(self, x: Tensor, plan: LayerPlan = PLAIN) -> Tensor:
        if plan.row_kernels:
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


def norm_and_rotate(
    q: Tensor,
    k: Tensor,
    q_norm: RMSNorm,
    k_norm: RMSNorm,
    cos: Tensor,
    sin: Tensor,
    plan: LayerPlan = PLAIN,
) -> tuple[Tensor, Tensor]:
    """Norm of each head, then rotation: q (T, nh, d), k (T, nkv, d), cos and sin (T, d)."""
    if plan.head_kernels:
        from modeling.kernels.rows import norm_rotary

        return norm_rotary(q, k, q_norm.weight, k_norm.weight, cos, sin, q_norm.eps)
    return apply_rotary(q_norm(q, plan), cos, sin), apply_rotary(k_norm(k, plan), cos, sin)


def apply_gate(gate: Tensor, up: Tensor, *, plan: LayerPlan = PLAIN) -> Tensor:
    """silu(gate) * up; nobody else may hold these two, which a backward pass overwrites."""
    if plan.row_kernels:
        from modeling.kernels.rows import silu_mul

        return silu_mul(gate, up)
    return F.silu(gate) * up


class Attention(nn.Module):
    def __init__(self, config: LLMConfig, experts: Sequence[str]) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        width, dim = config.hidden_size, config.head_dim
        self.head_dim = dim
        for suffix in experts:
            self.add_module(f"q_proj{suffix}", nn.Linear(width, self.heads * dim))
            self.add_module(f"k_proj{suffix}", nn.Linear(width, self.kv_heads * dim))
            self.add_module(f"v_proj{suffix}", nn.Linear(width, self.kv_heads * dim))
            self.add_module(f"o_proj{suffix}", nn.Linear(self.heads * dim, width, bias=False))
            self.add_module(f"q_norm{suffix}", RMSNorm(dim, config.rms_norm_eps))
            self.add_module(f"k_norm{suffix}", RMSNorm(dim, config.rms_norm_eps))

    def _project_heads(
        self, suffix: str, x: Tensor, plan: LayerPlan
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q (T_e, nh, d), k and v (T_e, nkv, d) of one expert's rows, not yet rotated."""
        q, k, v = project_rows(x, [getattr(self, f"{n}_proj{suffix}") for n in "qkv"], plan)
        kv = (len(x), self.kv_heads, self.head_dim)
        return q.view(len(x), self.heads, self.head_dim), k.view(kv), v.view(kv)

    def _norms(self, suffix: str) -> tuple[RMSNorm, RMSNorm]:
        """Those of queries and of keys."""
        return getattr(self, f"q_norm{suffix}"), getattr(self, f"k_norm{suffix}")

    def project(
        self, xs: Rows, shared: SharedInputs, plan: LayerPlan
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Packed q (T, nh, d), k and v (T, nkv, d), rotated, from the rows of each expert."""
        parts = []
        for suffix, x, cos, sin in zip(SUFFIXES, xs, shared.cos, shared.sin, strict=False):
            q, k, v = self._project_heads(suffix, x, plan)
            parts.append((*norm_and_rotate(q, k, *self._norms(suffix), cos, sin, plan), v))
        q, k, v = (join_rows(part, shared.routing) for part in zip(*parts, strict=True))
        return q, k, v

    def forward(
        self, xs: Rows, shared: SharedInputs, plan: LayerPlan, layer: int, residuals: Rows
    ) -> Rows:
        """`residuals` with what the normed rows xs of each expert attend to added.

        The residuals' memory may be taken for the sum. With `plan.keys_only` nothing is added.
        """
        layout, cache = shared.layout, shared.cache
        place = None
        if plan.attends_in_cache and cache is not None and not plan.keys_only:
            assert isinstance(layout, AttentionLayout)
            place = cache.place(layer, layout)
        if place is not None:
            seen = self._attend_in_cache(xs, shared, plan, place)
        else:
            q, k, v = self.project(xs, shared, plan)
            if cache is not None:
                k, v = cache.update(layer, k, v, layout)
            if plan.keys_only:
                return residuals
            seen = split_rows(attend(q, k, v, layout, plan.backend).flatten(1), shared.routing)
        return tuple(
            add_linear(residual, x, getattr(self, f"o_proj{suffix}"), plan)
            for suffix, residual, x in zip(SUFFIXES, residuals, seen, strict=False)
        )

    def _attend_in_cache(
        self, xs: Rows, shared: SharedInputs, plan: LayerPlan, place: Placement
    ) -> Rows:
        """The same for kernels: nothing is joined, split or gathered.

        Keys and values are written where the cache has them, queries stay in the experts' order.
        """
        from modeling.kernels.rows import place_rows

        layout, routing = shared.layout, shared.routing
        assert isinstance(layout, AttentionLayout)
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
        parts = zip(SUFFIXES, xs, shared.cos, shared.sin, rows, q_all.split(sizes), strict=False)
        for suffix, x, cos, sin, to, q_out in parts:
            q_norm, k_norm = self._norms(suffix)
            place_rows(
                *self._project_heads(suffix, x, plan), q_norm.weight, k_norm.weight, cos, sin,
                q_norm.eps, to, q_out, place.keys, place.values,
            )  # fmt: skip
        seen = attend_in_place(q_all, place.keys, place.values, layout, place.starts, order)
        return seen.flatten(1).split(sizes)


class MLP(nn.Module):
    def __init__(self, config: LLMConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, residual: Tensor, plan: LayerPlan) -> Tensor:
        """`residual`, whose memory may be taken, with the MLP of the normed rows x added."""
        if plan.streams(x) and are_plain(self.gate_proj, self.up_proj):
            from modeling.kernels.stream_linear import stream_linear

            hidden = stream_linear(x, self.gate_proj.weight, second=self.up_proj.weight)
        else:
            gate_and_up = [self.gate_proj, self.up_proj]
            hidden = apply_gate(*project_rows(x, gate_and_up, plan), plan=plan)
        return add_linear(residual, hidden, self.down_proj, plan)


def run_experts(module: nn.Module, name: str, plan: LayerPlan, *arguments: Rows) -> Rows:
    """Call `name` on the understanding rows and its generation twin on the latent rows."""
    of_experts = zip(SUFFIXES, zip(*arguments, strict=True), strict=False)
    return tuple(getattr(module, name + suffix)(*xs, plan) for suffix, xs in of_experts)


class DecoderLayer(Layer):
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

    def compute(self, xs: Rows, shared: SharedInputs, plan: LayerPlan) -> Rows:
        """Rows of each expert (T_e, H) -> the same rows, one layer deeper."""
        normed = run_experts(self, "input_layernorm", plan, xs)
        xs = self.self_attn(normed, shared, plan, self.layer, xs)
        if plan.keys_only:
            return xs
        normed = run_experts(self, "post_attention_layernorm", plan, xs)
        return run_experts(self, "mlp", plan, normed, xs)


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
        # Where each layer computes, if not all where the prompt is (release/spread.py).
        self.layer_devices: tuple[torch.device, ...] | None = None

    def forward(
        self,
        x: Tensor,
        position_ids: Tensor,
        layout: AttentionLayout | DecodeLayout,
        routing: Routing | None = None,
        cache: KeyValues | None = None,
        keys_only: bool = False,
    ) -> Tensor:
        """x (T, H), position_ids (T,) -> hidden states after the final norm (T, H).

        x is no one's afterwards: its memory may hold sums. keys_only: the hidden states are not
        wanted, so the last layer stops at its keys.
        """
        angles = rotary(position_ids, self.head_dim, self.rope_theta)
        cos, sin = (split_rows(angle.to(x.dtype), routing) for angle in angles)
        shared = SharedInputs(cos, sin, layout, routing, cache)
        own_plan = plan_layer(x, layout, self.head_dim)
        plans = plan_layers(self.layers, x, layout, self.head_dim, devices=self.layer_devices)
        if keys_only:
            plans[-1] = replace(plans[-1], keys_only=True)
        xs = split_rows(x, routing)
        for layer, plan in zip(self.layers, plans, strict=True):
            xs = layer(xs, shared, plan)
        if not keys_only:
            xs = run_experts(self, "norm", own_plan, xs)
        return join_rows(xs, routing)


class LanguageModel(nn.Module):
    """Decoder and untied head (keys `language_model.model...`, `language_model.lm_head`)."""

    def __init__(self, config: LLMConfig, visual_gen: bool) -> None:
        super().__init__()
        self.model = Decoder(config, visual_gen)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
