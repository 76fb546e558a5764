# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Cached contexts of conversations: grown by segments, continued as text, drawn from as images.

A `CachedContext` is a value: growing it gives another one and leaves it as it was. Contexts that
begin alike share one append-only store, so an earlier state (guidance drops the last text) costs
nothing; a store is copied only when two contexts continue from the same slots.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from data.packing import (
    context_length,
    context_positions,
    group_by_tokens,
    pack,
    pack_branches,
)
from data.sequence import LatentSegment, Segment
from modeling.bagel.attention import AttentionLayout, DecodeLayout
from modeling.bagel.bagel import Bagel
from modeling.bagel.config import SpecialTokens
from modeling.bagel.flow import Guidance, Prefix, denoise
from modeling.bagel.generate import CachedPrompt
from modeling.bagel.kv_cache import KVCache


def device_of(model: Bagel) -> torch.device:
    """Where the model takes its prompts."""
    return model.language_model.lm_head.weight.device


def _empty_cache(model: Bagel, batch: int, slots: int) -> KVCache:
    where = model.layer_devices or device_of(model)
    return KVCache(model.config.llm, batch, slots, where, model.dtype)


class ContextStore:
    """Keys and values of one conversation; the first `filled` slots are never written again."""

    def __init__(self, cache: KVCache, filled: int) -> None:
        self.cache, self.filled = cache, filled

    def __deepcopy__(self, memo: dict[int, object]) -> ContextStore:
        """Itself: whoever continues from slots that another context wrote gets a copy then."""
        return self


@dataclass(frozen=True)
class CachedContext:
    """The first `length` slots of a store; `position` is the next rope position."""

    store: ContextStore
    length: int = 0
    position: int = 0

    @classmethod
    def empty(cls, model: Bagel) -> CachedContext:
        return cls(ContextStore(_empty_cache(model, 1, 0), 0))

    @property
    def past(self) -> tuple[int, int]:
        """What the packer wants to know of it."""
        return self.length, self.position

    @property
    def prefix(self) -> Prefix:
        """What the sampler of images reads."""
        return Prefix(self.store.cache, 0, self.length)

    def with_room(self, tokens: int) -> CachedContext:
        """The same context, with `tokens` more slots in its store that nobody else writes."""
        store, end = self.store, self.length + tokens
        if store.filled != self.length or store.cache.max_len < end:
            room = end if self.length == 0 else end + end // 4  # later growth copies seldom
            store = ContextStore(store.cache.copy(max_len=room), self.length)
        store.filled = end
        return CachedContext(store, self.length, self.position)

    def before(self, segments: Sequence[Segment]) -> CachedContext:
        """The state of this context before these segments, its last ones, were added."""
        length = self.length - context_length(segments)
        position = self.position - context_positions(segments)
        assert length >= 0 and position >= 0
        return CachedContext(self.store, length, position)


class _Together:
    """Several stores as the cache of one packed chunk; sample b of the layout owns store b."""

    def __init__(self, contexts: Sequence[CachedContext]) -> None:
        self.caches = [context.store.cache for context in contexts]

    def update(
        self, layer: int, k: Tensor, v: Tensor, layout: AttentionLayout | DecodeLayout
    ) -> tuple[Tensor, Tensor]:
        """Store k, v (T, nkv, d) behind what their samples hold; all keys and values."""
        assert isinstance(layout, AttentionLayout) and len(layout.query_lens) == len(self.caches)
        merged = []
        for new, stores in (
            (k, [cache.keys[layer] for cache in self.caches]),
            (v, [cache.values[layer] for cache in self.caches]),
        ):
            parts = new.split(list(layout.query_lens))
            for store, part, past in zip(stores, parts, layout.past_lens, strict=True):
                store[0, past : past + len(part)] = part
            if any(layout.past_lens):
                whole = [s[0, :n] for s, n in zip(stores, layout.key_lens, strict=True)]
                new = whole[0] if len(whole) == 1 else torch.cat(whole)
            merged.append(new)
        return merged[0], merged[1]

    def place(self, layer: int, layout: AttentionLayout) -> None:
        """None: no single tensor holds the keys of several stores, so layers call `update`."""


@torch.no_grad()
def grow(
    model: Bagel,
    special: SpecialTokens,
    contexts: Sequence[CachedContext],
    segments: Sequence[Sequence[Segment]],
    *,
    max_tokens: int = 32768,
) -> list[CachedContext]:
    """Each context followed by its segments (none: the context itself), in packed forwards.

    max_tokens: new tokens of one forward; it bounds memory and never changes a result.
    """
    results = list(contexts)
    growing = [i for i, new in enumerate(segments) if new]
    lengths = [context_length(segments[i]) for i in growing]
    for group in group_by_tokens(lengths, max_tokens):
        chosen = [growing[j] for j in group]
        begun = [contexts[i].with_room(context_length(segments[i])) for i in chosen]
        batch = pack([segments[i] for i in chosen], special, past=[c.past for c in begun])
        model.fill_cache(batch.to(device_of(model)), _Together(begun))
        for b, i in enumerate(chosen):
            length, position = batch.layout.key_lens[b], batch.next_positions[b]
            results[i] = CachedContext(begun[b].store, length, position)
    return results


def cached_prompt(model: Bagel, contexts: Sequence[CachedContext], new: int) -> CachedPrompt:
    """What `generate` continues: the contexts copied side by side, with room for `new` tokens."""
    longest = max(context.length for context in contexts)
    cache = _empty_cache(model, len(contexts), longest + new + 1)  # it writes one token more
    for b, context in enumerate(contexts):
        old = context.store.cache
        for target, source in zip(cache.keys + cache.values, old.keys + old.values, strict=True):
            target[b, : context.length] = source[0, : context.length]
    lens = tuple(context.length for context in contexts)
    return CachedPrompt(cache, lens, tuple(context.position for context in contexts))


class Drawing(NamedTuple):
    """One image to be drawn: `LatentSegment.blank`, its noise (n, 64), and the cached context of
    each guidance branch in use."""

    image: LatentSegment
    noise: Tensor
    contexts: Sequence[CachedContext]


def draw_latents(
    model: Bagel,
    special: SpecialTokens,
    drawings: Sequence[Drawing],
    times: Tensor,
    guidance: Guidance,
) -> list[Tensor]:
    """Latent tokens, fp32 (n, 64), of images drawn at once; times, guidance: see `denoise`.

    All guidance branches run in one forward a step; if that does not fit the device's memory, they
    run in turn, with a warning.
    """
    images = [drawing.image for drawing in drawings]
    noise = torch.cat([drawing.noise for drawing in drawings])
    branches = list(zip(*(drawing.contexts for drawing in drawings), strict=True))
    pasts = [[context.past for context in contexts] for contexts in branches]
    prefixes = [[context.prefix for context in contexts] for contexts in branches]
    device = device_of(model)

    def run(together: bool) -> Tensor:
        packed = pack_branches(images, pasts, special, together=together).to(device)
        return denoise(model, noise, packed, prefixes, times, guidance)

    try:
        latents = run(True)
    except torch.OutOfMemoryError:
        if len(branches) == 1:
            raise
        warnings.warn(
            f"{len(branches)} guidance branches do not fit the device's memory in one forward; "
            "they run in turn, which is slower",
            stacklevel=2,
        )
        latents = None
    if latents is None:  # outside the handler, whose traceback keeps the failed run's memory
        latents = run(False)
    return list(latents.split([len(image.latents) for image in images]))
