# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""How the layers of one forward compute, decided where the forward begins and handed down.

A layer reads its plan and asks no device, dtype or environment. Every choice is between plain
torch and a fast path that `modeling/fast.py` names; both compute the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modeling import fast
from modeling.bagel.attention import AttentionLayout, DecodeLayout, choose_backend
from modeling.bagel.layer import Layer

# Rows up to which a product is bound by reading its weight.
_FEW_ROWS = 8


@dataclass(frozen=True)
class LayerPlan:
    """Of one layer; the defaults are plain torch.

    backend: of attention (attention.py).
    row_kernels: norms and SwiGLU are Triton kernels. head_kernels: so are norm and rotation of
        queries and keys.
    attends_in_cache: keys and values are written where the cache keeps them, and read there.
    adds_in_product: a residual is added inside the product before it, in the residual's memory.
    joins_products: layers that read the same rows are one product if their weights adjoin.
    streamed_rows: so many rows at most are multiplied by the weight-streaming kernel.
    keys_only: the layer stops at its keys and values; nothing behind them is wanted.
    """

    backend: str = "padded"
    row_kernels: bool = False
    head_kernels: bool = False
    attends_in_cache: bool = False
    adds_in_product: bool = False
    joins_products: bool = False
    streamed_rows: int = 0
    keys_only: bool = False

    def streams(self, x: Tensor) -> bool:
        """Whether the weight-streaming kernel multiplies these rows."""
        return 0 < len(x) <= self.streamed_rows


PLAIN = LayerPlan()


def plan_layer(
    x: Tensor,
    layout: AttentionLayout | DecodeLayout,
    head_dim: int = 0,
    *,
    holds_weights: bool = True,
    compiled: bool = False,
) -> LayerPlan:
    """The plan of layers that see rows like x, with a gradient or not as the caller's mode is.

    head_dim: of layers that rotate their heads. holds_weights: False where a hook brings each
        weight for the call of its own module. compiled: by torch, which our kernels would stop.
    """
    compiled = compiled or torch.compiler.is_compiling()
    row_kernels = not compiled and fast.runs_kernels("rows", x)
    half = head_dim // 2
    head_kernels = row_kernels and holds_weights and half & (half - 1) == 0
    backend = "decode"
    if isinstance(layout, AttentionLayout):
        backend = choose_backend(x, layout, compiled=compiled)
    # What follows reuses memory or reads weights directly.
    if torch.is_grad_enabled() or not holds_weights or compiled:
        return LayerPlan(backend, row_kernels, head_kernels)
    return LayerPlan(
        backend,
        row_kernels,
        head_kernels,
        attends_in_cache=head_kernels and backend == "blocks",
        adds_in_product=row_kernels,
        joins_products=x.is_cuda and fast.is_on("projections"),
        streamed_rows=_FEW_ROWS if fast.runs_kernels("decode", x) else 0,
    )


def plan_layers(
    layers: nn.ModuleList,
    x: Tensor,
    layout: AttentionLayout | DecodeLayout,
    head_dim: int = 0,
    *,
    devices: Sequence[torch.device] | None = None,
) -> list[LayerPlan]:
    """The plan of each layer of a stack; one for all unless they are spread over `devices`."""
    compiled = any(isinstance(layer, Layer) and layer.compiled for layer in layers)
    if devices is None:
        return [plan_layer(x, layout, head_dim, compiled=compiled)] * len(layers)
    return [
        plan_layer(
            x.new_empty(0, device=device),
            layout,
            head_dim,
            holds_weights=all(weight.device == device for weight in layer.parameters()),
            compiled=compiled,
        )
        for layer, device in zip(layers, devices, strict=True)
    ]
