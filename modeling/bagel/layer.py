# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""A layer that is sharded, compiled and recomputed as a whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


class Layer(nn.Module):
    """Subclasses define `compute`; its first argument is a tensor of rows, or a tuple of such.

    checkpointing: the backward pass computes the activations again. compiled: set by `compile`.
    """

    compute: Callable[..., Any]

    def __init__(self) -> None:
        super().__init__()
        self.checkpointing = False
        self.compiled = False

    def compile(self, *arguments: Any, **options: Any) -> None:
        super().compile(*arguments, **options)
        self.compiled = True

    def forward(self, *arguments: Any) -> Any:
        first = arguments[0]
        xs = first if isinstance(first, tuple) else (first,)
        if self.checkpointing and any(x.requires_grad for x in xs):
            # Inside the layer, so that a sharded one recomputes without gathering twice.
            return checkpoint(self.compute, *arguments, use_reentrant=False)
        return self.compute(*arguments)
