# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Batched decoding: one packed prefill, a static cache, rows that stop on their own.

The token loop reads nothing back to the host except every `check_every` steps. A row that
samples `<|im_end|>` pauses; at the next check it either is finished or, when its round asked
for a picture and a skip is left, goes on with the two tokens of the joint,
`<|im_end|><|im_start|>`, as its context. Pausing changes no result: a paused row keeps
rewriting one cache slot, and its random numbers are indexed by its own position.

Budget: `max_new_tokens` counts every token fed, the start token of each round and the
`<|im_end|>` of a joint included, as in the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from modeling import fast
from modeling.bagel.bagel import Bagel
from modeling.bagel.batch import PackedBatch
from modeling.bagel.config import SpecialTokens
from modeling.bagel.graphs import RepeatedStep
from modeling.bagel.kv_cache import KVCache
from modeling.bagel.streamed_decode import StreamedDecoder, can_stream

IMAGE_MARKER = "<image_start>"  # plain text, by which a model asks for a picture
TEMPERATURES = (1e-4, 1e4)  # below, fp32 logits may overflow; above, all tokens are alike

# (tokens, positions, slots) -> logits
LogitsOf: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
# (logits, temperature, uniforms) -> (token, log-probability) of each row
TokenChoice: TypeAlias = Callable[[Tensor, float, Tensor | None], tuple[Tensor, Tensor]]


@dataclass
class Generation:
    """One row's result.

    ids: every token after the first `<|im_start|>`, the final `<|im_end|>` included if sampled.
    sampled: whether the policy sampled it (False: the forced `<|im_start|>` of a later round).
    logprobs: log-probability of each id under the sampling distribution (0 where forced).
    capped: the budget ended it. rounds: tokens fed when each round began (start token first).
    """

    ids: list[int]
    sampled: list[bool]
    logprobs: list[float]
    capped: bool
    rounds: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class CachedPrompt:
    """Contexts that a cache holds already: row b of it belongs to sample b.

    lens: rows of each context. next_positions: rope position that follows each. The cache needs
    room behind the longest context for all new tokens and one more; what is decoded is written
    there, the contexts themselves stay as they are.
    """

    cache: KVCache
    lens: tuple[int, ...]
    next_positions: tuple[int, ...]


def choose(logits: Tensor, temperature: float, uniforms: Tensor | None) -> tuple[Tensor, Tensor]:
    """Next token of each row of logits (B, V), and its log-probability, fp32 (B,).

    uniforms: (B,) in [0, 1); the inverse of the cumulative distribution is taken there, so the
    choice depends on nothing but the row's logits and its own number. None: the arg-max.
    """
    logprobs = (logits.float() / temperature).log_softmax(-1)
    if uniforms is None:
        token = logits.argmax(-1)
    else:
        # float64: the sum over 150,000 entries must not depend on the device's rounding.
        cumulative = logprobs.double().exp().cumsum(-1)
        target = uniforms.double()[:, None] * cumulative[:, -1:]
        token = torch.searchsorted(cumulative, target, right=True).squeeze(1)
        token = token.clamp_max(logits.shape[-1] - 1)
    return token, logprobs.gather(1, token[:, None]).squeeze(1)


@dataclass(frozen=True)
class DecodePlan:
    """How the steps of one call compute, decided before the first.

    logits_of: `Bagel.decode_step`, or the chain of weight-streaming kernels. choose_token:
    `choose`, or its kernels. fits_graphs: a step may be captured as a CUDA graph.
    """

    logits_of: LogitsOf
    choose_token: TokenChoice
    fits_graphs: bool


def plan_decoding(model: Bagel, cache: KVCache, positions: int) -> DecodePlan:
    """positions: rope positions 0..positions-1 may come."""
    logits_of: LogitsOf = partial(model.decode_step, cache=cache)
    choose_token: TokenChoice = choose
    if can_stream(model, cache.batch):
        logits_of = StreamedDecoder(model, cache, positions)
    if fast.runs_kernels("decode", model.language_model.lm_head.weight):
        from modeling.kernels import sampling

        choose_token = sampling.choose_token
    return DecodePlan(logits_of, choose_token, fits_graphs=model.layer_devices is None)


class _Rows:
    """State of every row, on the device; the loop updates it without reading it."""

    def __init__(
        self, prompt: CachedPrompt, device: torch.device, special: SpecialTokens, budget: int
    ) -> None:
        batch = len(prompt.lens)
        self.budget = budget
        self.eos = special.eos
        self.bos = special.bos

        def full(value: int | bool, *shape: int) -> Tensor:
            return torch.full((batch, *shape), value, device=device)

        self.base_slot = torch.tensor(prompt.lens, device=device)
        self.base_position = torch.tensor(prompt.next_positions, device=device)
        self.token = full(special.bos)
        self.used = full(0)  # tokens fed so far, before the current one
        self.running = full(True)
        self.capped = full(False)
        self.force_start = full(False)
        # Column u holds what was fed or sampled as token number u (column 0: the first start).
        self.ids = full(special.eos, budget + 1)
        self.sampled = full(False, budget + 1)
        self.logprobs = torch.zeros(batch, budget + 1, device=device)

    def advance(self, token: Tensor, logprob: Tensor) -> None:
        """Record the token that follows the one just fed, and decide who goes on.

        Everything is written in place, so that a captured step can be replayed.
        """
        used = self.used + self.running
        token = torch.where(self.force_start, self.bos, token)
        column = used[:, None]
        write = self.running[:, None]

        def put(store: Tensor, value: Tensor) -> None:
            old = store.gather(1, column)
            store.scatter_(1, column, torch.where(write, value[:, None].to(store.dtype), old))

        put(self.ids, token)
        put(self.sampled, ~self.force_start)
        put(self.logprobs, torch.where(self.force_start, torch.zeros_like(logprob), logprob))
        ended = ~self.force_start & (token == self.eos)
        capped = ~ended & (used >= self.budget)
        self.capped |= self.running & capped
        self.token.copy_(torch.where(self.running, token, self.token))
        self.used.copy_(torch.where(self.running, used, self.used))
        self.running &= ~(ended | capped)
        self.force_start.zero_()

    def start_round(self, row: int) -> None:
        """Feed the `<|im_end|>` the row sampled, then a new round's start token."""
        self.running[row] = True
        self.force_start[row] = True

    def read_ids(self) -> list[list[int]]:
        """The ids of every row so far."""
        ids, used = self.ids.tolist(), self.used.tolist()
        return [row[1 : n + 1] for row, n in zip(ids, used, strict=True)]

    def collect(self, starts: list[list[int]]) -> list[Generation]:
        """The results, given where the rounds of each row start."""
        ids, sampled, logprobs = (x.tolist() for x in (self.ids, self.sampled, self.logprobs))
        used, capped = self.used.tolist(), self.capped.tolist()
        results = []
        for b, n in enumerate(used):
            # The token sampled beyond the budget is no part of the completion.
            keep = slice(1, n if capped[b] else n + 1)
            results.append(
                Generation(ids[b][keep], sampled[b][keep], logprobs[b][keep], capped[b], starts[b])
            )
        return results


class _Rounds:
    """Host-side decisions at a check: which paused rows begin another round."""

    def __init__(self, batch: int, continues: Callable[[list[int]], bool] | None, skips: int):
        self.continues, self.skips = continues, skips
        self.starts: list[list[int]] = [[0] for _ in range(batch)]
        self.finished = [False] * batch

    def check(self, rows: _Rows) -> bool:
        """True when every row is finished."""
        running, capped, used = (x.tolist() for x in (rows.running, rows.capped, rows.used))
        for row, finished in enumerate(self.finished):
            if finished or running[row]:
                continue
            if not capped[row] and self._wants_round(rows, row, used[row]):
                self.starts[row].append(used[row] + 1)
                rows.start_round(row)
            else:
                self.finished[row] = True
        return all(self.finished)

    def _wants_round(self, rows: _Rows, row: int, used: int) -> bool:
        # `used` tokens were fed in all; column `used` is the end token that was sampled.
        remaining = rows.budget - used
        if self.continues is None or len(self.starts[row]) > self.skips or remaining <= 1:
            return False
        begin = self.starts[row][-1] + 1
        return self.continues(rows.ids[row, begin:used].tolist())


def _check_settings(
    batch: int, max_new_tokens: int, temperature: float, uniforms: Tensor | None
) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    low, high = TEMPERATURES
    if not low <= temperature <= high:
        raise ValueError(
            f"temperature must be at least {low:g} and at most {high:g}, got {temperature}; "
            "greedy: no sampling"
        )
    if uniforms is not None and uniforms.shape != (batch, max_new_tokens + 1):
        raise ValueError(
            f"uniforms must be {(batch, max_new_tokens + 1)}, one number a position; got "
            f"{tuple(uniforms.shape)}"
        )


def _fill_cache(
    model: Bagel, prompt: PackedBatch | CachedPrompt, new: int
) -> tuple[CachedPrompt, torch.device]:
    """The prompt in a cache with room for `new` tokens and one more; where tokens are chosen."""
    if isinstance(prompt, CachedPrompt):
        cache, batch, longest = prompt.cache, len(prompt.lens), max(prompt.lens) + new + 1
        if cache.batch != batch or cache.max_len < longest:
            raise ValueError(
                f"the cached prompt is {cache.batch} x {cache.max_len}, but {batch} contexts and "
                f"max_new_tokens need {batch} x {longest}; make room with KVCache.copy"
            )
        return prompt, cache.keys[0].device
    lens = prompt.layout.key_lens
    device = prompt.text_ids.device
    where = model.layer_devices or device
    cache = KVCache(model.config.llm, len(lens), max(lens) + new + 1, where, model.dtype)
    model.fill_cache(prompt, cache)
    return CachedPrompt(cache, lens, prompt.next_positions), device


@torch.no_grad()
@fast.on_its_gpu
def generate(
    model: Bagel,
    prompt: PackedBatch | CachedPrompt,
    special: SpecialTokens,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    uniforms: Tensor | None = None,
    continues: Callable[[list[int]], bool] | None = None,
    max_image_skips: int = 0,
    check_every: int = 8,
    on_check: Callable[[Callable[[], list[list[int]]]], None] | None = None,
) -> list[Generation]:
    """Decode every sample of a packed or cached prompt.

    Args:
        prompt: contexts packed without cached rows, on the model's device, or cached ones.
        uniforms: (B, max_new_tokens + 1) in [0, 1), one number a position; None is greedy.
        continues: given the ids of a round that ended by itself, says whether it asked for a
            picture, so that another round may start (at most `max_image_skips` times).
        on_check: called at each check with a function that reads the ids every row has so far;
            it may stream them, or raise to stop the decoding.

    Raises:
        ValueError: max_new_tokens < 1, a temperature beyond TEMPERATURES, uniforms of another
            shape, or a cached prompt whose cache has no room for the new tokens.
    """
    batch = len(prompt.next_positions)
    _check_settings(batch, max_new_tokens, temperature, uniforms)
    cached, device = _fill_cache(model, prompt, max_new_tokens)
    rows = _Rows(cached, device, special, max_new_tokens)
    rounds = _Rounds(batch, continues, max_image_skips)
    plan = plan_decoding(model, cached.cache, max(cached.next_positions) + max_new_tokens + 1)

    def advance() -> None:
        positions, slots = rows.base_position + rows.used, rows.base_slot + rows.used
        logits = plan.logits_of(rows.token, positions, slots)
        following = rows.used + rows.running  # the position the next token will have
        numbers = None if uniforms is None else uniforms.gather(1, following[:, None]).squeeze(1)
        rows.advance(*plan.choose_token(logits, temperature, numbers))

    # A capture costs about what a few plain steps do.
    graph = plan.fits_graphs and max_new_tokens > check_every
    advance_all = RepeatedStep(advance, device, graph=graph)
    done = False
    while not done:
        for _ in range(check_every):
            advance_all()
        done = rounds.check(rows)
        if on_check is not None:
            on_check(rows.read_ids)
    return rows.collect(rounds.starts)


def marker_check(decode: Callable[[Sequence[int]], str]) -> Callable[[list[int]], bool]:
    """`continues` for `generate`: does the decoded round ask for a picture?"""
    return lambda ids: IMAGE_MARKER in decode(ids)
