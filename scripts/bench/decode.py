# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Milliseconds of a decoded token at batch 1, 8 and 32, and of the prompt before it.

    python -m scripts.bench.decode --json decode.json

`generate` as the sampler calls it: prompt of 1,565 rows with a 518 x 518 image, temperature 1, no
end token, 256 new tokens. A step is timed between the first and the last stop check, so prompt and
recording of the graph are left out; they are in the notes. The floor is reading the weights and
the cache once. The notes also hold how far greedy tokens agree with the eager path's.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from data.packing import pack
from modeling.bagel.bagel import Bagel
from modeling.bagel.batch import PackedBatch
from modeling.bagel.generate import Generation, generate
from modeling.bagel.kv_cache import KVCache
from scripts.bench.common import (
    SPECIAL,
    Machine,
    Report,
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


def agreement(
    model: Bagel, packed: PackedBatch, tokens: int
) -> dict[str, Any]:
    """Greedy tokens of the fast path against the eager one's."""
    fast_rows, _ = decode(model, packed, tokens, None)
    before = os.environ.get("VISUAL_OPSD_EAGER")
    os.environ["VISUAL_OPSD_EAGER"] = "all"
    try:
        eager_rows, _ = decode(model, packed, tokens, None)
    finally:
        os.environ.pop("VISUAL_OPSD_EAGER")
        if before is not None:
            os.environ["VISUAL_OPSD_EAGER"] = before
    firsts = []
    for ours, theirs in zip(fast_rows, eager_rows, strict=True):
        differs = [a != b for a, b in zip(ours.ids, theirs.ids, strict=True)]
        firsts.append(differs.index(True) if any(differs) else None)
    return {
        "rows": len(firsts),
        "tokens_a_row": tokens,
        "rows_that_differ": sum(first is not None for first in firsts),
        "first_difference": firsts,
    }


def bench_batch(report: Report, model: Bagel, batch: int, repeats: int) -> None:
    machine = report.machine
    tokens = machine.size(256, 24)
    packed = pack([prompt(machine)] * batch, SPECIAL).to(machine.device)
    rows = packed.total // batch
    generator = torch.Generator().manual_seed(0)
    steps, walls, firsts = [], [], []
    for _ in range(repeats + 1):
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
        "whole_call_s": round(sorted(walls[1:])[len(walls) // 2 - 1], 4),
        "prompt_and_first_8_tokens_s": round(sorted(firsts[1:])[len(firsts) // 2 - 1], 4),
        "first_call_s": round(walls[0], 2),
    }


def bench_prefill(report: Report, model: Bagel, repeats: int) -> None:
    machine, llm = report.machine, model.config.llm
    packed = pack([prompt(machine)], SPECIAL).to(machine.device)
    cache = KVCache(llm, 1, packed.total, machine.device, model.dtype)

    @torch.no_grad()
    def run() -> None:
        model(packed, cache=cache)

    seconds = machine.timed(run, max(repeats, 10), warm_up=3)
    flop = 2.0 * layer_parameters(model) * packed.total
    flop += 2.0 * vision_parameters(model) * sum(packed.vit_lens)
    report.add(
        "prefill_ms",
        [1e3 * s for s in seconds],
        floor=1e3 * report.ceilings.seconds(flop=flop),
        target=42.0,
        reference=173.0,
        settings=f"{packed.total} rows, ViT of {sum(packed.vit_lens)} patches included",
    )


def run(machine: Machine, report: Report, batches: Sequence[int], repeats: int) -> None:
    model = random_model(machine.config, machine)
    bench_prefill(report, model, repeats)
    for batch in batches:
        bench_batch(report, model, batch, repeats)
    packed = pack([prompt(machine) for _ in range(8)], SPECIAL).to(machine.device)
    report.notes["greedy_agreement"] = agreement(model, packed, machine.size(256, 24))


def main(argv: Sequence[str] | None = None) -> int:
    options = parser(__doc__)
    options.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32], choices=TARGETS)
    args = options.parse_args(argv)
    report = start(args)
    run(report.machine, report, args.batches, args.repeats)
    return finish(report, args.json)


if __name__ == "__main__":
    run_main(main)
