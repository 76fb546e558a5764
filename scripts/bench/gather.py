# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Time and memory of full weights for sampling, gathered from FSDP2's shards, in three ways.

    python -m torch.distributed.run --standalone --nproc_per_node=2 -m scripts.bench.gather

Random weights of BAGEL-7B's understanding branch and ViT, fp32 shards, bf16 gathered; one process
works too. `--layers` makes it smaller, `--tiny` as small as a test wants.

    bound      every unit stays unsharded, the plain module points at the gathered tensors
    copied     unit by unit into memory of its own, freed afterwards: what the trainer does on CUDA
    refreshed  the same into memory that is kept between steps

Only the last two let projections adjoin. Kept memory would also keep a recorded decoding step
valid; `record_s` is what recording it anew costs instead, at batch 2. Rank 0 prints the report, in
a form of its own: it has neither targets nor floors.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from modeling.bagel.bagel import Bagel
from modeling.bagel.graphs import RepeatedStep
from modeling.bagel.kv_cache import KVCache
from modeling.bagel.streamed_decode import StreamedDecoder, can_stream
from scripts.bench.common import (
    Machine,
    layers_parser,
    parse_layers,
    sized,
    versions,
    write,
)
from scripts.visual_opsd.cli import run_main
from scripts.visual_opsd.processes import DistEnv, barrier, init_distributed, shutdown
from scripts.visual_opsd.training.sharding import (
    copy_units,
    make_mesh,
    materialise,
    shard_model,
    summon_full_params,
)


def measured(
    env: DistEnv, machine: Machine, call: Callable[[], Any], repeats: int
) -> dict[str, float]:
    """First and median seconds of a collective, and the peak beyond what is held outside, in GB."""
    before = machine.reset_peak()
    seconds = []
    for _ in range(repeats):
        barrier(env)
        seconds += machine.timed(call, 1, warm_up=0)
    peak = machine.peak()
    return {
        "first_s": round(seconds[0], 4),
        "median_s": round(statistics.median(seconds[1:] or seconds), 4),
        "peak_beyond_gb": round((peak - before) / 1e9, 2),
        "left_behind_gb": round((machine.reset_peak() - before) / 1e9, 3),
    }


def record_seconds(plain: Bagel, machine: Machine) -> float | None:
    """Seconds to record a decoding step of two rows, if this device records any."""
    if not can_stream(plain, 2):
        return None
    cache = KVCache(plain.config.llm, 2, 2048, machine.device, plain.dtype)
    step = StreamedDecoder(plain, cache, 2048)
    tokens = torch.zeros(2, dtype=torch.int64, device=machine.device)
    place = torch.full_like(tokens, 1500)

    @torch.no_grad()
    def advance() -> None:
        tokens.copy_(step(tokens, place, place).argmax(-1))

    recorded, replayed = machine.timed(RepeatedStep(advance, machine.device), 2, warm_up=1)
    return round(recorded - replayed, 4)


def main(argv: Sequence[str] | None = None) -> int:
    parser = layers_parser(__doc__)
    parser.add_argument("--num_shard", type=int, help="default: all ranks of a node")
    args = parse_layers(parser, argv)
    env = init_distributed(args.device)
    machine = Machine(env.device, args.tiny)
    mesh = make_mesh(env, num_shard=args.num_shard)
    with torch.device("meta"):
        model = Bagel(machine.config if args.tiny else sized(args.layers))
    shard_model(model, mesh, block_classes=Bagel.block_classes(), param_dtype=machine.dtype)
    materialise(model, env.device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.to_local().normal_(0, 0.02)  # type: ignore[attr-defined]
    sharded = machine.reset_peak()

    def summon(copy: bool) -> None:
        with summon_full_params(model, copy=copy):
            machine.now()

    ways = {
        name: measured(env, machine, partial(summon, copy), args.repeats)
        for name, copy in (("bound", False), ("copied", True))
    }
    with summon_full_params(model, copy=True) as plain:
        assert isinstance(plain, Bagel)
        recording = record_seconds(plain, machine)
    kept = copy_units(model)
    ways["refreshed"] = measured(env, machine, partial(copy_units, model, kept), args.repeats)
    if env.is_main:
        report = {
            "hardware": machine.hardware,
            "versions": versions(),
            "tiny": args.tiny,
            "mesh": list(mesh.shape),
            "parameters": sum(p.numel() for p in model.parameters()),
            "sharded_gb": round(sharded / 1e9, 2),
            "kept_gb": round(sum(t.numel() * t.element_size() for t in kept.values()) / 1e9, 2),
            **ways,
            "record_s": recording,
        }
        write(report, args.json)
    shutdown()
    return 0


if __name__ == "__main__":
    run_main(main)
