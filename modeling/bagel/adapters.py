# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters (LoRA, Hu et al. 2021) beside frozen linear layers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AdapterConfig:
    """Which linear layers have an adapter: y = W x + b + scale * B A x.

    rank: rows of A (rank, in) and columns of B (out, rank), one for all layers.
    alpha: numerator of the scale.
    modules: paths in Bagel, e.g. "language_model.model.layers.0.self_attn.q_proj".
    """

    rank: int
    alpha: float
    modules: tuple[str, ...]

    @property
    def scale(self) -> float:
        """Factor of the product B A."""
        return self.alpha / self.rank
