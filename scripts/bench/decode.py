# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Milliseconds of a decoded token at batch 1, 8 and 32, and of the prompt before it.

    python -m scripts.bench.decode --json decode.json

`generate` as the sampler calls it: prompt of 1,565 rows with a 518 x 518 image, temperature 1, no
end token, 256 new tokens. A step is timed between the first and the last stop check, so prompt and
recording of the graph are left out; they are in the notes. The floor is reading the weights and
the cache once. The notes also hold how far greedy tokens agree with the eager path's.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from data.packing import pack
from modeling.bagel.bagel import Bagel
from modeling.bagel.batch import PackedBatch
from modeling.bagel.generate import Generation, generate
from modeling.bagel.kv_cache import KVCache
from modeling.bagel.streamed_decode import StreamedDecoder, can_stream
from scripts.bench.common import (
    SPECIAL,
    Report,
    eagerly,
    finish,
    layer_parameters,
    parser,
    prompt,
    random_model,
    start,
    vision_parameters,
)
from scripts.visual_opsd.cli import run_main

TARGETS = {1: 5.6, 8: 6.0, 32: 7.8}
REFERENCES = {1: 45.4, 8: 57.7, 32: None}
# Ends no row: no token has this id.
NO_END = replace(SPECIAL, eos=-1)


def decode(
    model: Bagel, packed: PackedBatch, tokens: int, uniforms: Tensor | None
) -> tuple[list[Generation], list[float]]:
    """What was generated, and the time of each stop check."""
    checks: list[float] = []
    made = generate(
        model,
        packed,
        NO_END,
        max_new_tokens=tokens,
        uniforms=uniforms,
        on_check=lambda _: checks.append(time.perf_counter()),
    )
    return made, checks


def decode_bytes(model: Bagel, batch: int, rows: int) -> float:
    """Weights and cache read for one step at `rows` cached positions."""
    llm = model.config.llm
    weights = layer_parameters(model) + llm.vocab_size * llm.hidden_size
    cached = 2 * llm.num_hidden_layers * llm.num_key_value_heads * llm.head_dim * rows
    return float((weights + batch * cached) * model.dtype.itemsize)


def agreement(model: Bagel, packed: PackedBatch, tokens: int) -> dict[str, Any]:
    """Greedy tokens of the fast path against the eager one's.

    Random weights make near ties frequent: so besides where free-running rows part, the share of
    positions at which both choose alike after the same tokens, and how near the eager path's two
    best logits are where they don't, in steps of bf16.
    """
    ours, _ = decode(model, packed, tokens, None)
    with eagerly():
        theirs, _ = decode(model, packed, tokens, None)
    firsts = []
    for one, other in zip(ours, theirs, strict=True):
        differs = [a != b for a, b in zip(one.ids, other.ids, strict=True)]
        firsts.append(differs.index(True) if any(differs) else None)
    forced = torch.tensor([row.ids for row in theirs], device=packed.text_ids.device)
    mismatches, gaps = 0, []
    for fast_logits, eager_logits in forced_logits(model, packed, forced):
        best = eager_logits.topk(2, dim=-1)
        wrong = fast_logits.argmax(-1) != best.indices[:, 0]
        mismatches += int(wrong.sum())
        step = torch.finfo(torch.bfloat16).eps * best.values[:, 0].abs()
        gaps += ((best.values[:, 0] - best.values[:, 1]) / step)[wrong].tolist()
    return {
        "rows": len(firsts),
        "tokens_a_row": tokens,
        "rows_that_part": sum(first is not None for first in firsts),
        "first_difference": firsts,
        "mismatch_rate_after_the_same_tokens": round(mismatches / forced.numel(), 4),
        "largest_gap_of_a_mismatch_in_bf16_steps": round(max(gaps, default=0.0), 2),
    }


@torch.no_grad()
def forced_logits(
    model: Bagel, packed: PackedBatch, forced: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """fp32 logits (B, V) of both paths at every position of given tokens (B, n)."""
    llm, batch = model.config.llm, len(forced)
    room = max(packed.layout.key_lens) + forced.shape[1] + 1
    caches = [KVCache(llm, batch, room, forced.device, model.dtype) for _ in range(2)]
    positions = torch.tensor(packed.next_positions, device=forced.device)
    slots = torch.tensor(packed.layout.key_lens, device=forced.device)
    model.fill_cache(packed, caches[0])
    with eagerly():
        model.fill_cache(packed, caches[1])
    step: Callable[[Tensor, Tensor, Tensor], Tensor] = partial(model.decode_step, cache=caches[0])
    if can_stream(model, batch):
        step = StreamedDecoder(model, caches[0], room)
    fed = torch.full((batch,), SPECIAL.bos, device=forced.device)
    for index in range(forced.shape[1]):
        fast_logits = step(fed, positions + index, slots + index).float()
        with eagerly():
            eager = model.decode_step(fed, positions + index, slots + index, caches[1])
        yield fast_logits, eager.float()
        fed = forced[:, index]


def bench_batch(report: Report, model: Bagel, batch: int) -> None:
    machine = report.machine
    tokens = machine.size(256, 24)
    packed = pack([prompt(machine)] * batch, SPECIAL).to(machine.device)
    rows = packed.total // batch
    generator = torch.Generator().manual_seed(0)
    steps, walls, firsts = [], [], []
    for _ in range(report.repeats + 1):
        uniforms = torch.rand(batch, tokens + 1, generator=generator, dtype=torch.float64)
        begin = machine.now()
        _, checks = decode(model, packed, tokens, uniforms.to(machine.device))
        walls.append(machine.now() - begin)
        firsts.append(checks[0] - begin)
        steps.append(1e3 * (checks[-1] - checks[0]) / (tokens - 8))
    floor = 1e3 * report.ceilings.seconds(decode_bytes(model, batch, rows + tokens // 2))
    report.add(
        f"decode_b{batch}_ms",
        steps[1:],
        floor=floor,
        target=TARGETS[batch],
        reference=REFERENCES[batch],
        settings=f"batch {batch}, prompt {rows} rows, {tokens} new tokens, T = 1, no end token",
    )
    median = report.results[f"decode_b{batch}_ms"]["median"]
    report.notes[f"decode_b{batch}"] = {
        "tokens_per_s": round(1e3 * batch / median, 1),
        "whole_call_s": round(statistics.median(walls[1:]), 4),
        "prompt_and_first_8_tokens_s": round(statistics.median(firsts[1:]), 4),
        "first_call_s": round(walls[0], 2),
    }


def bench_prefill(report: Report, model: Bagel) -> None:
    machine, llm = report.machine, model.config.llm
    repeats, warm_up = max(report.repeats, 10), 3
    # A pack each, as nobody sees the same prompt twice: what a layout remembers is made again.
    segments = prompt(machine)
    packs = [pack([segments], SPECIAL).to(machine.device) for _ in range(2 * (repeats + warm_up))]
    packed, unseen = packs[0], iter(packs)
    cache = KVCache(llm, 1, packed.total, machine.device, model.dtype)

    @torch.no_grad()
    def run() -> None:
        model.fill_cache(next(unseen), cache)

    seconds = machine.timed(run, repeats, warm_up)
    # The last layer stops at its keys and values.
    last: Any = model.language_model.model.layers[-1].self_attn
    needed = layer_parameters(model) * (1 - 1 / llm.num_hidden_layers)
    needed += last.k_proj.weight.numel() + last.v_proj.weight.numel()
    flop = 2.0 * needed * packed.total
    flop += 2.0 * vision_parameters(model) * sum(packed.vit_lens)
    report.add(
        "prefill_ms",
        [1e3 * s for s in seconds],
        floor=1e3 * report.ceilings.seconds(flop=flop),
        target=42.0,
        reference=173.0,
        settings=f"{packed.total} rows, ViT of {sum(packed.vit_lens)} patches included, of a size "
        "that came before",
    )
    with eagerly("graphs"):  # as for the first images of a size
        unseen = iter(packs[repeats + warm_up :])
        seconds = machine.timed(run, repeats, warm_up)
    report.notes["prefill_of_a_new_size_ms"] = round(1e3 * statistics.median(seconds), 2)


def run(report: Report, batches: Sequence[int]) -> None:
    machine = report.machine
    model = random_model(machine.config, machine)
    bench_prefill(report, model)
    for batch in batches:
        bench_batch(report, model, batch)
    if report.brief:
        return
    packed = pack([prompt(machine) for _ in range(8)], SPECIAL).to(machine.device)
    report.notes["greedy_agreement"] = agreement(model, packed, machine.size(256, 24))


def main(argv: Sequence[str] | None = None) -> int:
    options = parser(__doc__)
    options.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32], choices=TARGETS)
    args = options.parse_args(argv)
    report = start(args)
    run(report, args.batches)
    return finish(report, args.json)


if __name__ == "__main__":
    run_main(main)
