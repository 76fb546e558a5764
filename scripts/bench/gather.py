# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Memory and time of gathering full weights for sampling (`summon_full_params`), true size.

    python -m torch.distributed.run --standalone --nproc_per_node=2 -m scripts.bench.gather

Random weights of BAGEL-7B's understanding branch and ViT, fp32 shards, bf16 gather. `--layers`
makes it smaller. Rank 0 prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence

import torch

from modeling.bagel.bagel import Bagel
from modeling.bagel.config import BagelConfig, LLMConfig, VisionConfig
from scripts.visual_opsd.cli import run_main
from scripts.visual_opsd.distributed import make_mesh, materialise, shard_model, summon_full_params
from scripts.visual_opsd.processes import barrier, init_distributed, shutdown


def sized(layers: int) -> BagelConfig:
    """The true widths with fewer decoder and ViT layers."""
    llm = LLMConfig(3584, layers, 28, 4, 18944, 152064)
    vision = VisionConfig(1152, min(layers, 26), 16, 4304)
    return BagelConfig(llm=llm, vision=vision)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--num_shard", type=int, help="default: all ranks of a node")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(argv)
    env = init_distributed(args.device)
    on_gpu = env.device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32

    def allocated() -> float:
        return torch.cuda.memory_allocated(env.device) / 1e9 if on_gpu else 0.0

    def now() -> float:
        if on_gpu:
            torch.cuda.synchronize(env.device)
        return time.perf_counter()

    mesh = make_mesh(env, num_shard=args.num_shard)
    with torch.device("meta"):
        model = Bagel(sized(args.layers))
    shard_model(model, mesh, block_classes=Bagel.block_classes(), param_dtype=dtype)
    materialise(model, env.device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.to_local().normal_(0, 0.02)  # type: ignore[attr-defined]
    sharded, seconds, gathered = allocated(), [], 0.0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(env.device)
    for _ in range(args.repeats):
        barrier(env)
        start = now()
        with summon_full_params(model):
            seconds.append(now() - start)
            gathered = allocated()
    peak = torch.cuda.max_memory_allocated(env.device) / 1e9 if on_gpu else 0.0
    if env.is_main:
        report = {
            "hardware": torch.cuda.get_device_name(env.device) if on_gpu else "cpu",
            "torch": torch.__version__,
            "mesh": list(mesh.shape),
            "parameters": sum(p.numel() for p in model.parameters()),
            "sharded_gb": round(sharded, 2),
            "gathered_gb": round(gathered - sharded, 2),
            "peak_gb": round(peak, 2),
            "left_behind_gb": round(allocated() - sharded, 3),
            "first_s": round(seconds[0], 3),
            "median_s": round(statistics.median(seconds[1:] or seconds), 3),
        }
        print(json.dumps(report))
    shutdown()
    return 0


if __name__ == "__main__":
    run_main(main)
