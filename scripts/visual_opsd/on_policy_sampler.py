# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Completions from the student's current weights (in the paper's Algorithm 1, the rollout).

The sampler is handed a plain module (`training.sharding.summon_full_params`) and knows nothing of
sharding. A row's random numbers are a pure function of (seed, step, row id), one a position, so
the same row gives the same completion at any batch size and on any rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from data.packing import context_length, group_by_tokens, pack
from data.randomness import position_uniforms
from data.sequence import Completion, Context
from modeling.bagel.bagel import Bagel
from modeling.bagel.config import SpecialTokens
from modeling.bagel.generate import Generation, generate, marker_check


@dataclass(frozen=True)
class SamplerSettings:
    """How completions are drawn; names and defaults are the trainer's `--sample_*` flags."""

    max_new_tokens: int = 1024
    temperature: float = 1.0
    do_sample: bool = True
    max_image_skips: int = 1
    # Rows and prompt tokens decoded together: bounds the cache, never changes a result.
    max_rows: int = 64
    max_prefill_tokens: int = 32768
    check_every: int = 8


# What to do where a rollout does not fit.
MEMORY_ADVICE = "lower --sample_batch_size or, in a new run, --sample_max_new_tokens"


class Interrupted(Exception):
    """The rollout was asked to stop (SIGTERM); nothing of it is used."""


def to_completion(generation: Generation) -> Completion:
    """What student and teacher score: every sampled label, nothing forced."""
    ids, sampled, logprobs = generation.ids, generation.sampled, generation.logprobs
    scored_logprobs = tuple(p for p, s in zip(logprobs, sampled, strict=True) if s)
    if generation.capped:
        return Completion(tuple(ids), (*sampled, False), scored_logprobs, capped=True)
    return Completion(tuple(ids[:-1]), tuple(sampled), scored_logprobs)


def sample_completions(
    model: Bagel,
    contexts: Sequence[Context],
    row_ids: Sequence[int],
    *,
    tokenizer: Any,
    special: SpecialTokens,
    settings: SamplerSettings,
    seed: int,
    step: int,
    numbers: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
    should_stop: Callable[[], bool] = lambda: False,
    on_ids: Callable[[int, list[int]], None] | None = None,
) -> list[Completion]:
    """One completion for every context, in order.

    Args:
        model: a plain (unsharded) module on `device`.
        contexts: student contexts; row_ids: a number that names each row within the step.
        numbers: of rows that have several completions, which one each is; None: the first.
        should_stop: polled while decoding.
        on_ids: called at each check with a context's number and the ids decoded for it so far,
            an `<|im_end|>` that ended a round included.

    Raises:
        Interrupted: `should_stop` returned True.
    """

    def stop_if_asked() -> None:
        if should_stop():
            raise Interrupted

    def check(group: Sequence[int], read_ids: Callable[[], list[list[int]]]) -> None:
        stop_if_asked()
        if on_ids is not None:
            for i, ids in zip(group, read_ids(), strict=True):
                # One token more than the budget has been drawn; no completion holds it.
                on_ids(i, ids[: settings.max_new_tokens - 1])

    which = [0] * len(contexts) if numbers is None else numbers
    completions: list[Completion] = []
    for group in decoding_groups(contexts, settings):
        uniforms = None
        if settings.do_sample:
            drawn = [
                position_uniforms(seed, step, row_ids[i], settings.max_new_tokens + 1, which[i])
                for i in group
            ]
            uniforms = torch.stack(drawn).to(device)
        stop_if_asked()
        generations = generate(
            model,
            pack([contexts[i] for i in group], special).to(device),
            special,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            uniforms=uniforms,
            continues=marker_check(tokenizer.decode),
            max_image_skips=settings.max_image_skips,
            check_every=settings.check_every,
            on_check=partial(check, group),
        )
        completions.extend(to_completion(generation) for generation in generations)
    return completions


def decoding_groups(contexts: Sequence[Context], settings: SamplerSettings) -> list[list[int]]:
    """Runs of rows that are decoded together: they fit both limits of the settings."""
    lengths = [context_length(context) for context in contexts]
    groups = []
    for run in group_by_tokens(lengths, settings.max_prefill_tokens):
        groups += [run[i : i + settings.max_rows] for i in range(0, len(run), settings.max_rows)]
    return groups
