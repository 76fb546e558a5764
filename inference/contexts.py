# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Cached contexts of conversations: grown by segments, continued as text, drawn from as images.

A `CachedContext` is a value: growing it gives another one and leaves it as it was. Contexts that
begin alike share one append-only store, so an earlier state (guidance drops the last text) costs
nothing; a store is copied only when two contexts continue from the same rows. It is here because
it joins the packer to the model's cache, and `modeling` does not import `data`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

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


def _empty_cache(model: Bagel, batch: int, rows: int) -> KVCache:
    where = model.layer_devices or device_of(model)
    return KVCache(model.config.llm, batch, rows, where, model.dtype)


class ContextStore:
    """Keys and values of one conversation; the first `filled` rows are never written again."""

    def __init__(self, cache: KVCache, filled: int) -> None:
        self.cache, self.filled = cache, filled

    def __deepcopy__(self, memo: dict[int, object]) -> ContextStore:
        """Itself: whoever continues from rows that another context wrote gets a copy then."""
        return self


@dataclass(frozen=True)
class CachedContext:
    """The first `length` rows of a store; `position` is the next rope position."""

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

    def reserved(self, rows: int) -> CachedContext:
        """The same context, with `rows` more rows in its store that nobody else writes."""
        store, end = self.store, self.length + rows
        if store.filled != self.length or store.cache.max_len < end:
            room = end if self.length == 0 else end + end // 4  # later growth copies seldom
            store = ContextStore(store.cache.copy(max_len=room), self.length)
        store.filled = end
        return CachedContext(store, self.length, self.position)

    def prefix_of(self, start: CachedContext, segments: Sequence[Segment]) -> CachedContext:
        """The state of this context when only `segments` had been added to `start`."""
        length = start.length + context_length(segments)
        position = start.position + context_positions(segments)
        assert length <= self.length and position <= self.position
        return CachedContext(self.store, length, position)


class _Together:
    """Several stores as the cache of one packed chunk; sample b of the layout owns store b."""

    def __init__(self, contexts: Sequence[CachedContext]) -> None:
        self.caches = [context.store.cache for context in contexts]

    def update(
        self, layer: int, k: Tensor, v: Tensor, layout: AttentionLayout | DecodeLayout
    ) -> tuple[Tensor, Tensor]:
        """Store k, v (T, nkv, d) behind the rows of their samples; all keys and values."""
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
        """Several stores are no place in one."""


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

    max_tokens: new rows of one forward; it bounds memory and never changes a result.
    """
    results = list(contexts)
    growing = [i for i, new in enumerate(segments) if new]
    lengths = [context_length(segments[i]) for i in growing]
    for run in group_by_tokens(lengths, max_tokens):
        rows = [growing[j] for j in run]
        begun = [contexts[i].reserved(lengths[j]) for i, j in zip(rows, run, strict=True)]
        batch = pack([segments[i] for i in rows], special, past=[c.past for c in begun])
        model.fill_cache(batch.to(device_of(model)), _Together(begun))
        for b, i in enumerate(rows):
            length, position = batch.layout.key_lens[b], batch.next_positions[b]
            results[i] = CachedContext(begun[b].store, length, position)
    return results


def decoding_prompt(model: Bagel, contexts: Sequence[CachedContext], new: int) -> CachedPrompt:
    """The contexts copied side by side, with room for `new` tokens and one more."""
    longest = max(context.length for context in contexts)
    cache = _empty_cache(model, len(contexts), longest + new + 1)
    for b, context in enumerate(contexts):
        old = context.store.cache
        for target, source in zip(cache.keys + cache.values, old.keys + old.values, strict=True):
            target[b, : context.length] = source[0, : context.length]
    lens = tuple(context.length for context in contexts)
    return CachedPrompt(cache, lens, tuple(context.position for context in contexts))


@torch.no_grad()
def start_logits(model: Bagel, special: SpecialTokens, contexts: Sequence[CachedContext]) -> Tensor:
    """(B, V) logits after the start token of a reply; nothing is kept of it."""
    prompt = decoding_prompt(model, contexts, 1)
    device = device_of(model)
    tokens = torch.full((len(contexts),), special.bos, device=device)
    positions = torch.tensor(prompt.next_positions, device=device)
    slots = torch.tensor(prompt.lens, device=device)
    return model.decode_step(tokens, positions, slots, prompt.cache)


def draw_latents(
    model: Bagel,
    special: SpecialTokens,
    images: Sequence[LatentSegment],
    branches: Sequence[Sequence[CachedContext]],
    noise: Tensor,
    times: Tensor,
    guidance: Guidance,
    *,
    together: bool = True,
) -> list[Tensor]:
    """Latent tokens, fp32 (n, 64), of images drawn at once.

    Args:
        images: `LatentSegment.blank` of each image.
        branches: of each guidance branch in use, the context of each image.
        noise, times, guidance: see `modeling.bagel.flow.denoise`.
        together: one forward a step for all branches; if that does not fit the device's memory,
            they run in turn, with a warning.
    """
    pasts = [[context.past for context in column] for column in branches]
    prefixes = [[context.prefix for context in column] for column in branches]
    device = device_of(model)

    def run(joined: bool) -> Tensor:
        packed = pack_branches(images, pasts, special, together=joined).to(device)
        return denoise(model, noise, packed, prefixes, times, guidance)

    try:
        latents = run(together)
    except torch.OutOfMemoryError:
        if not together or len(branches) == 1:
            raise
        warnings.warn(
            f"{len(branches)} guidance branches do not fit the device's memory in one forward; "
            "they run in turn (guidance_together=False does so from the start)",
            stacklevel=2,
        )
        latents = None
    if latents is None:  # outside the handler, whose traceback keeps the failed run's memory
        latents = run(False)
    return list(latents.split([len(image.latents) for image in images]))
