# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Seconds to draw one visual thought: 49 Euler steps, three guidance branches, and the decoder.

    python -m scripts.bench.vt_image --json vt_image.json

Contexts of the lengths that a problem image and a question leave behind (512 x 512: 2,743, 2,489
and 194 positions; 1024 x 1024: 9,346, 9,092 and 194); guidance text 4, image 2 on [0, 1], shift 3,
global renorm. The notes say how far the picture is from that of the eager path, in grey levels, and
how far that is from itself when its branches run in turn: with random weights rounding grows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from data.packing import pack_branches
from data.sequence import LatentSegment
from data.transforms import extrapolated_position_ids
from modeling.autoencoder import AutoEncoder, AutoEncoderConfig, decode_tokens
from modeling.bagel.bagel import Bagel
from modeling.bagel.flow import Guidance, Prefix, denoise, flow_schedule, initial_noise
from modeling.bagel.kv_cache import KVCache
from modeling.host.programs import number
from scripts.bench.common import (
    SPECIAL,
    Machine,
    Report,
    eagerly,
    finish,
    layer_parameters,
    parser,
    random_model,
    start,
)
from scripts.visual_opsd.cli import run_main

# Cached positions under the full, text-dropped and image-dropped context, by image side.
CONTEXTS = {512: (2743, 2489, 194), 1024: (9346, 9092, 194)}
TINY_CONTEXTS = (20, 12, 8)
TARGETS = {512: 3.9, 1024: 18.5}
REFERENCES = {512: 11.0, 1024: 31.4}
GUIDANCE = Guidance(text_scale=4.0, image_scale=2.0, interval=(0.0, 1.0), renorm="global")


def random_prefixes(model: Bagel, machine: Machine, lengths: Sequence[int]) -> list[list[Prefix]]:
    """A cached context of each length, filled with random keys and values."""
    caches = []
    for length in lengths:
        cache = KVCache(model.config.llm, 1, length, machine.device, model.dtype)
        for store in (*cache.keys, *cache.values):
            store.normal_()
        caches.append([Prefix(cache, 0, length)])
    return caches


def image_flop(model: Bagel, tokens: int, lengths: Sequence[int], steps: int) -> float:
    """Products of the generation expert and attention, of all steps and branches."""
    llm = model.config.llm
    products = 2.0 * layer_parameters(model) * tokens * len(lengths)
    pairs = sum((tokens + 2) * (length + tokens + 2) for length in lengths)
    attention = 4.0 * pairs * llm.num_attention_heads * llm.head_dim * llm.num_hidden_layers
    return steps * (products + attention)


def difference(one: Tensor, other: Tensor) -> dict[str, float]:
    """Mean and worst difference of two uint8 pictures, in grey levels."""
    levels = (one.int() - other.int()).abs()
    return {"mean": round(float(levels.float().mean()), 3), "worst": int(levels.max())}


def bench(report: Report, model: Bagel, vae: AutoEncoder, size: int, steps: int) -> None:
    machine = report.machine
    lengths = TINY_CONTEXTS if machine.tiny else CONTEXTS[size]
    grid = machine.size(size // 16, size // 256)
    blank = LatentSegment.blank(extrapolated_position_ids(grid, grid, model.config.max_latent_size))
    branches = pack_branches([blank], [[(n, n)] for n in lengths], SPECIAL).to(machine.device)
    prefixes = random_prefixes(model, machine, lengths)
    times = flow_schedule(steps + 1, 3.0)
    noise = initial_noise([grid * grid], generator=torch.Generator().manual_seed(0))

    def draw(times: Tensor = times) -> Tensor:
        latents = denoise(model, noise, branches, prefixes, times, GUIDANCE)
        return decode_tokens(vae, latents, grid, grid)

    machine.reset_peak()
    draw(times[:4])  # warms up as well as all steps do
    seconds = machine.timed(draw, report.repeats, warm_up=0)
    report.add(
        f"vt{size}_s",
        seconds,
        floor=report.ceilings.seconds(flop=image_flop(model, grid * grid, lengths, steps)),
        target=TARGETS[size],
        reference=REFERENCES[size],
        settings=f"{16 * grid} x {16 * grid}, {steps} steps, three branches in one forward, "
        f"contexts of {', '.join(map(str, lengths))}, decoder included",
    )
    note: dict[str, object] = {"peak_gb": round(machine.peak() / 1e9, 2)}
    if size == min(CONTEXTS) and not report.brief:  # the eager path takes its time
        ours = draw()
        with eagerly():
            theirs = draw()
            branches = replace(branches, together=None)
            in_turn = draw()
        note["from_the_eager_path"] = difference(ours, theirs)
        note["eager_path_with_branches_in_turn_from_itself"] = difference(in_turn, theirs)
    report.notes[f"vt{size}"] = note


def run(report: Report, sizes: Sequence[int], steps: int) -> None:
    machine = report.machine
    model = random_model(replace(machine.config, visual_gen=True), machine)
    with torch.device(machine.device):
        vae = AutoEncoder(AutoEncoderConfig(width=32) if machine.tiny else AutoEncoderConfig())
    vae.requires_grad_(False)
    for size in sizes:
        bench(report, model, vae, size, steps)


def main(argv: Sequence[str] | None = None) -> int:
    options = parser(__doc__)
    options.set_defaults(repeats=3)
    options.add_argument("--sizes", type=int, nargs="+", default=[512, 1024], choices=CONTEXTS)
    steps = number(int, at_least=1, at_most=10_000)
    options.add_argument("--steps", type=steps, default=49, help="Euler steps")
    args = options.parse_args(argv)
    report = start(args)
    run(report, args.sizes, args.steps)
    return finish(report, args.json)


if __name__ == "__main__":
    run_main(main)
