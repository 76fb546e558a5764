# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Pre-allocated key/value cache, (layers, batch, max_len, kv heads, head dim)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from modeling.bagel.attention import AttentionLayout, DecodeLayout
from modeling.bagel.config import LLMConfig


class KVCache:
    """Keys (after norm and RoPE) and values of up to `max_len` rows of each sample.

    Sample b of a layout owns cache row b. Lengths are not stored here: a packed chunk brings
    them in its layout (`past_lens`), a decode step in its `slots`.
    """

    def __init__(
        self,
        config: LLMConfig,
        batch: int,
        max_len: int,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        shape = (
            config.num_hidden_layers,
            batch,
            max_len,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)

    @property
    def batch(self) -> int:
        return self.keys.shape[1]

    @property
    def max_len(self) -> int:
        return self.keys.shape[2]

    def _rows(self, layout: AttentionLayout) -> tuple[Tensor, Tensor]:
        """Flat cache rows that the chunk fills, and those that it reads (old, then new)."""

        def make() -> tuple[Tensor, Tensor]:
            written: list[Any] = []
            read: list[Any] = []
            for b, (n, past) in enumerate(zip(layout.query_lens, layout.past_lens, strict=True)):
                if past + n > self.max_len:
                    raise ValueError(
                        f"{past + n} positions do not fit a cache of {self.max_len}; "
                        "allocate it for the prompt plus the new tokens"
                    )
                written.append(b * self.max_len + past + np.arange(n))
                read.append(b * self.max_len + np.arange(past + n))
            device = self.keys.device
            return (
                torch.from_numpy(np.concatenate(written)).to(device),
                torch.from_numpy(np.concatenate(read)).to(device),
            )

        rows: tuple[Tensor, Tensor] = layout.memo(("cache", self.max_len, self.keys.device), make)
        return rows

    def update(
        self, layer: int, k: Tensor, v: Tensor, layout: AttentionLayout | DecodeLayout
    ) -> tuple[Tensor, Tensor]:
        """Store k, v (T, nkv, d); return the keys and values that `attend` takes."""
        keys, values = self.keys[layer], self.values[layer]  # (B, M, nkv, d)
        if isinstance(layout, DecodeLayout):
            rows = torch.arange(keys.shape[0], device=keys.device)
            keys.index_put_((rows, layout.slots), k)
            values.index_put_((rows, layout.slots), v)
            return keys, values
        written, read = self._rows(layout)
        keys.flatten(0, 1).index_copy_(0, written, k)
        values.flatten(0, 1).index_copy_(0, written, v)
        if not any(layout.past_lens):
            return k, v
        return keys.flatten(0, 1)[read], values.flatten(0, 1)[read]
