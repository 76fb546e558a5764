# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Pre-allocated key/value cache: one (batch, max_len, kv heads, head dim) pair a layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from modeling.bagel.attention import AttentionLayout, DecodeLayout
from modeling.bagel.config import LLMConfig


@dataclass(frozen=True)
class Placement:
    """Where a cache keeps the keys and values of a layer.

    keys, values: (R, nkv, d), rows of all samples; each sample's old and new ones follow each
    other. rows: (T,) int64, the rows of the packed new ones. starts: first row of each sample.
    """

    keys: Tensor
    values: Tensor
    rows: Tensor
    starts: tuple[int, ...]


class KeyValues(Protocol):
    """What a decoder layer asks for keys and values: `KVCache`, or a sampler's `StepCache`."""

    def update(
        self, layer: int, k: Tensor, v: Tensor, layout: AttentionLayout | DecodeLayout
    ) -> tuple[Tensor, Tensor]:
        """Store k, v (T, nkv, d); return the keys and values that `attend` takes."""

    def place(self, layer: int, layout: AttentionLayout) -> Placement | None:
        """Where they would be stored, for who writes them there himself; None: nowhere in one."""


class KVCache:
    """Keys (after norm and RoPE) and values of up to `max_len` rows of each sample.

    Sample b of a layout owns cache row b. Lengths are not stored here: a packed chunk brings
    them in its layout (`past_lens`), a decode step in its `slots`.

    device: that of all layers, or one for each layer (a model spread over several).
    """

    def __init__(
        self,
        config: LLMConfig,
        batch: int,
        max_len: int,
        device: torch.device | str | Sequence[torch.device],
        dtype: torch.dtype,
    ) -> None:
        layers = config.num_hidden_layers
        devices = [device] * layers if isinstance(device, torch.device | str) else device
        assert len(devices) == layers, (len(devices), layers)
        shape = (batch, max_len, config.num_key_value_heads, config.head_dim)
        self.batch, self.max_len = batch, max_len
        self.keys = [torch.zeros(shape, device=d, dtype=dtype) for d in devices]
        self.values = [torch.zeros(shape, device=d, dtype=dtype) for d in devices]

    def copy(self, max_len: int) -> KVCache:
        """A cache of its own with the same samples and more or less room."""
        kept = min(max_len, self.max_len)

        def copy_rows(store: Tensor) -> Tensor:
            new = store.new_zeros((self.batch, max_len, *store.shape[2:]))
            new[:, :kept] = store[:, :kept]
            return new

        cache = object.__new__(KVCache)
        cache.batch, cache.max_len = self.batch, max_len
        cache.keys = [copy_rows(store) for store in self.keys]
        cache.values = [copy_rows(store) for store in self.values]
        return cache

    def _rows(self, layout: AttentionLayout, device: torch.device) -> tuple[Tensor, Tensor]:
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
            return (
                torch.from_numpy(np.concatenate(written)).to(device),
                torch.from_numpy(np.concatenate(read)).to(device),
            )

        rows: tuple[Tensor, Tensor] = layout.memo(("cache", self.max_len, device), make)
        return rows

    def update(
        self, layer: int, k: Tensor, v: Tensor, layout: AttentionLayout | DecodeLayout
    ) -> tuple[Tensor, Tensor]:
        """Store k, v (T, nkv, d); return the keys and values that `attend` takes."""
        keys, values = self.keys[layer], self.values[layer]  # (B, M, nkv, d)
        if isinstance(layout, DecodeLayout):
            rows = torch.arange(keys.shape[0], device=keys.device)
            slots = layout.slots.to(keys.device)  # elsewhere only if the model is spread
            keys.index_put_((rows, slots), k)
            values.index_put_((rows, slots), v)
            return keys, values
        written, read = self._rows(layout, keys.device)
        keys.flatten(0, 1).index_copy_(0, written, k)
        values.flatten(0, 1).index_copy_(0, written, v)
        if not any(layout.past_lens):
            return k, v
        return keys.flatten(0, 1)[read], values.flatten(0, 1)[read]

    def place(self, layer: int, layout: AttentionLayout) -> Placement:
        """See `KeyValues.place`."""
        keys, values = self.keys[layer], self.values[layer]
        written, _ = self._rows(layout, keys.device)
        starts = tuple(range(0, self.batch * self.max_len, self.max_len))
        return Placement(keys.flatten(0, 1), values.flatten(0, 1), written, starts)
