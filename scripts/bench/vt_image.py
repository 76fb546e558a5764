# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Seconds to draw one visual thought: 50 time steps, three guidance branches, and the decoder.

    python -m scripts.bench.vt_image --size 512 --json vt512.json

Random weights at BAGEL-7B's true size (`--tiny` for any machine), contexts of the lengths that
a problem image and a question leave behind. Prints one JSON object, beside the public
reference's figure on one H100 80 GB.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from data.packing import pack_branches
from data.sequence import LatentSegment
from data.transforms import extrapolated_position_ids
from modeling.autoencoder import AutoEncoder, AutoEncoderConfig, decode_tokens
from modeling.bagel.bagel import Bagel
from modeling.bagel.config import BagelConfig, LLMConfig, SpecialTokens, VisionConfig
from modeling.bagel.flow import Guidance, Prefix, denoise, flow_schedule, initial_noise
from modeling.bagel.kv_cache import KVCache
from scripts.visual_opsd.cli import run_main

TRUE_SIZE = BagelConfig(
    llm=LLMConfig(3584, 28, 28, 4, 18944, 152064),
    vision=VisionConfig(1152, 26, 16, 4304),
    visual_gen=True,
)
TINY = BagelConfig(
    llm=LLMConfig(64, 2, 4, 2, 128, 512),
    vision=VisionConfig(32, 2, 2, 64),
    visual_gen=True,
)
# Cached positions under the full, text-dropped and image-dropped context, and the reference's
# seconds an image, by image side.
CONTEXTS = {512: (2743, 2489, 194), 1024: (9346, 9092, 194)}
REFERENCE_S = {512: 11.0, 1024: 31.4}


def random_model(config: BagelConfig, device: torch.device, dtype: torch.dtype) -> Bagel:
    """Built on the device, parameter by parameter."""
    with torch.device("meta"):
        model = Bagel(config)
    model.to(dtype).to_empty(device=device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.fill_(1.0)
            else:
                parameter.normal_(0, 0.02)
    return model.requires_grad_(False)


def random_prefixes(model: Bagel, lengths: Sequence[int]) -> list[list[Prefix]]:
    """A cached context of each length, filled with random keys and values."""
    caches = []
    device = next(model.parameters()).device
    for length in lengths:
        cache = KVCache(model.config.llm, 1, length, device, model.dtype)
        for store in (*cache.keys, *cache.values):
            store.normal_()
        caches.append([Prefix(cache, 0, length)])
    return caches


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--size", type=int, default=512, choices=sorted(CONTEXTS))
    parser.add_argument("--num_timesteps", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="small widths, short contexts")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", help="also write the result here")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    torch.manual_seed(0)
    model = random_model(TINY if args.tiny else TRUE_SIZE, device, dtype)
    with torch.device(device):
        vae = AutoEncoder(AutoEncoderConfig(width=32) if args.tiny else AutoEncoderConfig())
    vae.requires_grad_(False)
    size = 64 if args.tiny else args.size
    lengths = (20, 12, 8) if args.tiny else CONTEXTS[args.size]
    grid = size // 16
    side = model.config.max_latent_size
    blank = LatentSegment.blank(extrapolated_position_ids(grid, grid, side))
    special = SpecialTokens(1, 2, 3, 4)
    branches = pack_branches([blank], [[(n, n)] for n in lengths], special).to(device)
    prefixes = random_prefixes(model, lengths)
    guidance = Guidance(text_scale=4.0, image_scale=2.0, interval=(0.0, 1.0), renorm="global")
    times = flow_schedule(args.num_timesteps, 3.0)

    def draw() -> tuple[float, float]:
        """(seconds of denoising, seconds of decoding)"""
        noise = initial_noise([grid * grid])
        stamps = [_now(on_gpu)]
        latents = denoise(model, noise, branches, prefixes, times, guidance)
        stamps.append(_now(on_gpu))
        decode_tokens(vae, latents, grid, grid)
        stamps.append(_now(on_gpu))
        return stamps[1] - stamps[0], stamps[2] - stamps[1]

    draw()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    runs = [draw() for _ in range(args.repeats)]
    totals = [sum(run) for run in runs]
    median = statistics.median(totals)
    reference = None if args.tiny else REFERENCE_S[args.size]
    result = {
        "what": f"one {size} x {size} image, {args.num_timesteps - 1} steps, three branches",
        "hardware": torch.cuda.get_device_name() if on_gpu else "cpu",
        "torch": torch.__version__,
        "dtype": str(dtype).removeprefix("torch."),
        "contexts": lengths,
        "median_s": round(median, 3),
        "spread_s": round(max(totals) - min(totals), 3),
        "step_ms": round(1e3 * statistics.median(r[0] for r in runs) / (args.num_timesteps - 1), 2),
        "decode_s": round(statistics.median(r[1] for r in runs), 3),
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if on_gpu else None,
        "reference_s": reference,
        "speed_up": round(reference / median, 2) if reference else None,
    }
    print(json.dumps(result))
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
    return 0


def _now(on_gpu: bool) -> float:
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    run_main(main)
