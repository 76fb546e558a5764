# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""`Bagel.decode_step` as a chain of weight-streaming kernels: five launches a layer.

The eager step in `bagel.py` and `decoder.py` says what is computed; here the same weights are read
at the speed of the memory. Nothing is copied but small tables: q, k and v, and gate and up, must
adjoin (`projections.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from modeling import fast
from modeling.bagel.bagel import Bagel
from modeling.bagel.decoder import RMSNorm, rotary
from modeling.bagel.kv_cache import KVCache
from modeling.bagel.projections import adjoin_projections, are_plain, joined_weights


@dataclass(frozen=True)
class _Weights:
    """Of one layer."""

    qkv: Tensor
    qkv_bias: Tensor | None
    o: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor
    input_norm: Tensor
    mlp_norm: Tensor
    q_norm: Tensor
    k_norm: Tensor

    @classmethod
    def of(cls, layer: Any) -> _Weights:
        attention, mlp = layer.self_attn, layer.mlp
        joined = joined_weights([attention.q_proj, attention.k_proj, attention.v_proj])
        assert joined is not None
        return cls(
            *joined,
            attention.o_proj.weight,
            mlp.gate_proj.weight,
            mlp.up_proj.weight,
            mlp.down_proj.weight,
            layer.input_layernorm.weight,
            layer.post_attention_layernorm.weight,
            attention.q_norm.weight,
            attention.k_norm.weight,
        )


def can_stream(model: Bagel, batch: int) -> bool:
    """Whether a model and batch can take the chain: half precision on one GPU, up to 64 rows, and
    layers that are no more than their weights."""
    head = model.language_model.lm_head.weight
    dim = model.config.llm.head_dim
    return (
        model.layer_devices is None
        and _is_plain(model)
        and type(head.data) is Tensor  # not a shard
        and fast.runs_kernels("decode", head)
        and batch <= 64
        and dim >= 32
        and dim & (dim - 1) == 0
    )


def _is_plain(model: Bagel) -> bool:
    layers: list[Any] = list(model.language_model.model.layers)
    projections = [
        projection
        for layer in layers
        for projection in (*layer.self_attn.children(), *layer.mlp.children())
        if not isinstance(projection, RMSNorm)
    ]
    return are_plain(model.language_model.lm_head, *projections)


class StreamedDecoder:
    """One decoding step of every row against a cache; call it like `Bagel.decode_step`.

    Args:
        model: of which `can_stream(model, cache.batch)` holds; its projections are made to adjoin.
        positions: rope positions 0..positions-1 may come.
    """

    def __init__(self, model: Bagel, cache: KVCache, positions: int) -> None:
        from modeling.kernels.decode_attention import DecodeAttention

        adjoin_projections(model)
        llm = model.config.llm
        decoder = model.language_model.model
        self.embedding = decoder.embed_tokens.weight
        self.norm: Any = decoder.norm.weight  # type: ignore[union-attr]
        self.head = model.language_model.lm_head.weight
        self.layers = [_Weights.of(layer) for layer in decoder.layers]
        self.eps = llm.rms_norm_eps
        self.cache = cache
        device = self.head.device
        angles = rotary(torch.arange(positions, device=device), llm.head_dim, llm.rope_theta)
        cos, sin = (angle[:, : llm.head_dim // 2].to(self.head.dtype) for angle in angles)
        heads = (llm.num_attention_heads, llm.num_key_value_heads, llm.head_dim)
        self.attention = DecodeAttention(cache.batch, cache.max_len, *heads, cos, sin)
        self.seen = self.head.new_empty(cache.batch, llm.num_attention_heads * llm.head_dim)
        # Launches that begin before the last one has ended: from Hopper on, and where programs
        # are light enough to share a multiprocessor with those of the launch before.
        hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
        self.chained = hopper and cache.batch <= 8

    def __call__(self, tokens: Tensor, positions: Tensor, slots: Tensor) -> Tensor:
        """tokens, positions, slots (B,) int64 -> logits (B, V)."""
        from modeling.kernels.stream_linear import stream_linear

        product = partial(stream_linear, eps=self.eps, chained=self.chained)
        x = self.embedding[tokens]  # (B, H)
        for index, layer in enumerate(self.layers):
            qkv = product(x, layer.qkv, gain=layer.input_norm, bias=layer.qkv_bias)
            seen = self.attention(
                qkv, layer.q_norm, layer.k_norm, self.eps, positions, slots,
                self.cache.keys[index], self.cache.values[index],
                out=self.seen, chained=self.chained,
            )  # fmt: skip
            x = product(seen, layer.o, residual=x, out=x)
            hidden = product(x, layer.gate, second=layer.up, gain=layer.mlp_norm)
            x = product(hidden, layer.down, residual=x, out=x)
        return product(x, self.head, gain=self.norm)
