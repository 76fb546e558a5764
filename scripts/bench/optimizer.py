# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Seconds of an optimiser step for each --optimizer_state, beside what moving the moments takes.

    python -m scripts.bench.optimizer --json optimizer.json

The 8.0 billion parameters of BAGEL-7B's understanding branch and ViT in their true shapes, fp32
weights and gradients, one process. `--layers` takes fewer decoder layers, `--tiny` a tiny model.
At the true size weights and gradients take 64 GB of the GPU, `gpu` 64 GB more and what AdamW
computes meanwhile, `8bit` 17; `host` takes 65 GB of host memory. A state that does not fit is left
out, with the reason.

    inward, outward    pinned host memory to the GPU and back, one at a time, GB/s
    both               each of the two while the other runs, GB/s
    transfer_s         all moments in and out at that speed: the least that `host` can take
    first_s            the first step, in which `8bit` compiles
    ratio              median_s over transfer_s

The report has a form of its own, with neither targets nor floors.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from modeling.bagel.bagel import Bagel
from modeling.host.memory import OutOfMemory, memory_errors
from scripts.bench.common import (
    Machine,
    layers_parser,
    parse_layers,
    sized,
    versions,
    write,
)
from scripts.visual_opsd.cli import run_main
from scripts.visual_opsd.config import OPTIMIZER_STATES, OptimSettings
from scripts.visual_opsd.processes import init_distributed, shutdown
from scripts.visual_opsd.training.host_adamw import PIECE, on_stream
from scripts.visual_opsd.training.optimizers import make_optimizer
from scripts.visual_opsd.training.sharding import make_mesh

COPIES = 40  # of a buffer of a piece's two moments: 5 GB each way


def bandwidth(machine: Machine) -> dict[str, float]:
    """GB/s between pinned host memory and the device, in each direction and both at once."""
    count = machine.size(2 * PIECE, 1 << 16)
    host = [torch.zeros(count, pin_memory=machine.on_gpu) for _ in range(2)]
    device = [torch.zeros(count, device=machine.device) for _ in range(2)]
    streams = [torch.cuda.Stream(machine.device) if machine.on_gpu else None for _ in range(2)]

    def copy(inward: bool, outward: bool) -> float:
        """Seconds of COPIES in each direction asked for."""
        start = machine.now()
        for _ in range(COPIES):
            if inward:
                with on_stream(streams[0]):
                    device[0].copy_(host[0], non_blocking=True)
            if outward:
                with on_stream(streams[1]):
                    host[1].copy_(device[1], non_blocking=True)
        return machine.now() - start

    ways = {"inward": (True, False), "outward": (False, True), "both": (True, True)}
    moved = COPIES * 4 * count / 1e9
    found = {}
    for name, way in ways.items():
        copy(*way)
        found[name] = round(moved / copy(*way), 2)
    return found


def make_parameters(shapes: Sequence[torch.Size], mesh: DeviceMesh) -> list[nn.Parameter]:
    """fp32 weights and gradients of these shapes, as FSDP2's shards of one process are."""
    made = []
    for shape in shapes:
        weight, gradient = (torch.empty(shape, device=mesh.device_type) for _ in range(2))
        placements = [Shard(0)]
        parameter = nn.Parameter(DTensor.from_local(weight.normal_(0, 0.02), mesh, placements))
        parameter.grad = DTensor.from_local(gradient.normal_(0, 1e-5), mesh, placements)
        made.append(parameter)
    return made


def measured(
    kind: str, parameters: list[nn.Parameter], machine: Machine, repeats: int, transfer: float
) -> dict[str, Any]:
    """Seconds of steps with one kind of state; or why it did not fit."""
    before = machine.reset_peak()
    try:
        with memory_errors(f"with --optimizer_state {kind}", "take fewer --layers"):
            settings = OptimSettings(optimizer_state=kind)
            optimizer = make_optimizer(parameters, settings, machine.device)
            first, *seconds = machine.timed(optimizer.step, repeats + 1, warm_up=0)
    except OutOfMemory as error:
        return {"left_out": str(error)}
    median = statistics.median(seconds)
    return {
        "first_s": round(first, 4),
        "median_s": round(median, 4),
        "spread_s": round(max(seconds) - min(seconds), 4),
        "ratio": round(median / transfer, 3),
        "held_gb": round((machine.reset_peak() - before) / 1e9, 2),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = layers_parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=OPTIMIZER_STATES, default=OPTIMIZER_STATES)
    args = parse_layers(parser, argv)
    env = init_distributed(args.device)
    machine = Machine(env.device, args.tiny)
    with torch.device("meta"):
        model = Bagel(machine.config if args.tiny else sized(args.layers))
    shapes = [parameter.shape for parameter in model.parameters()]
    count = sum(shape.numel() for shape in shapes)
    speed = bandwidth(machine)
    transfer = 8 * count / 1e9 / speed["both"]
    parameters = make_parameters(shapes, make_mesh(env))
    states = {}
    for kind in args.only:
        states[kind] = measured(kind, parameters, machine, args.repeats, transfer)
        gc.collect()
        if machine.on_gpu:
            torch.cuda.empty_cache()  # what one has used in small parts, another needs in large
    report = {
        "hardware": machine.hardware,
        "versions": versions(),
        "tiny": args.tiny,
        "parameters": count,
        "gb_s": speed,
        "transfer_s": round(transfer, 4),
        **states,
    }
    write(report, args.json)
    shutdown()
    return 0


if __name__ == "__main__":
    run_main(main)
