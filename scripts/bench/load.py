# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Seconds to load a release folder's understanding branch to the GPU, from a warm page cache.

    python -m scripts.bench.load --json load.json

Writes a folder of the true size (29.2 GB; `--tiny` for any machine) with random weights and the
tokenizer of tests/tiny-bagel, and times `load_bagel` in fresh processes: from the call to the last
byte on the GPU, CUDA's context made before. Beside it the floor, taken in the same run: copying as
many bytes from a pinned buffer.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from modeling import load_bagel
from modeling.bagel.bagel import Bagel
from modeling.bagel.config import BagelConfig
from modeling.host.memory import process_bytes
from modeling.host.programs import path_argument
from modeling.release.checkpoint import locate_weights
from modeling.release.weight_files import StoredTensor, write_weights
from scripts.bench.common import Machine, Report, finish, parser, start
from scripts.visual_opsd.cli import run_main

ROOT = Path(__file__).resolve().parents[2]
TARGET_S = 4.0
TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json")
COPIED_BYTES = 256 * 2**20
SAMPLE_S = 0.005


def write_release(folder: Path, config: BagelConfig) -> None:
    """Random bf16 weights, norms of 1, in the order that safetensors gives them: of names."""
    folder.mkdir(parents=True, exist_ok=True)
    vision = asdict(config.vision)
    vision["num_hidden_layers"] += 1  # the file counts the layer that never runs
    (folder / "llm_config.json").write_text(json.dumps(asdict(config.llm)))
    (folder / "vit_config.json").write_text(json.dumps(vision))
    for name in TOKENIZER_FILES:
        shutil.copyfile(ROOT / "tests" / "tiny-bagel" / name, folder / name)
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in sorted(Bagel(config).state_dict().items())}
    # One tensor as large as the largest, the same 64 MB over and over: all are its first rows.
    block = torch.empty(2**25, dtype=torch.bfloat16).normal_(0, 0.02)
    largest = max(map(math.prod, shapes.values()))
    values = block.repeat(-(-largest // len(block)))
    ones = torch.ones(max(config.llm.hidden_size, config.vision.hidden_size), dtype=torch.bfloat16)
    layout = {key: ("BF16", shape) for key, shape in shapes.items()}
    with write_weights(folder / "model.safetensors", layout) as writer:
        for key, shape in shapes.items():
            norm = len(shape) == 1 and "norm" in key and key.endswith("weight")
            writer.write(key, (ones if norm else values)[: math.prod(shape)].view(shape))


def copying(nbytes: int, device: torch.device) -> Callable[[], None]:
    """Queues copies of `nbytes` from a pinned buffer to the GPU (on the CPU: to memory)."""
    size = min(nbytes, COPIED_BYTES)
    source = torch.ones(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    target = torch.empty_like(source, device=device)

    def work() -> None:
        for done in range(0, nbytes, size):
            count = min(size, nbytes - done)
            target[:count].copy_(source[:count], non_blocking=True)

    return work


class MemoryWatch:
    """Memory of this process when a `with` block begins (`before`), and at most (`peak`)."""

    def __init__(self, every_s: float, name: str = "RssAnon") -> None:
        self._every_s, self._name, self._ended = every_s, name, threading.Event()
        self._sampler = threading.Thread(target=self._sample)

    def __enter__(self) -> MemoryWatch:
        self.peak = self.before = process_bytes(self._name) or 0
        self._sampler.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._sampler.join()
        self.peak = max(self.peak, process_bytes(self._name) or 0)

    def _sample(self) -> None:
        while not self._ended.wait(self._every_s):
            self.peak = max(self.peak, process_bytes(self._name) or 0)


def timed_load(folder: Path, machine: Machine) -> dict[str, Any]:
    """One load in this process: its seconds, and RssAnon before it and at most."""
    device = machine.device
    torch.zeros(1, device=device)  # makes CUDA's context
    with MemoryWatch(SAMPLE_S) as memory:
        begin = machine.now()
        load_bagel(folder, device=device, dtype=torch.bfloat16)
        taken = machine.now() - begin
    return {"seconds": taken, "before": memory.before, "peak": memory.peak}


def load_in_fresh_process(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-m", "scripts.bench.load", "--child", "--folder", str(folder)]
    command += ["--device", args.device]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(report: Report, folder: Path, args: argparse.Namespace) -> None:
    """The floor and all loads of a folder that is there."""
    machine = report.machine
    _, sources = locate_weights(folder)
    nbytes = sum(s.nbytes for s in sources.values() if isinstance(s, StoredTensor))
    copies = machine.timed(copying(nbytes, machine.device), args.repeats, warm_up=1)
    runs = [load_in_fresh_process(folder, args) for _ in range(args.repeats)]
    report.add(
        "load_s",
        [run["seconds"] for run in runs],
        floor=statistics.median(copies),
        target=TARGET_S,
        reference=None,
        settings=f"load_bagel in a fresh process, {nbytes / 1e9:.1f} GB of the understanding "
        "branch, bf16, warm page cache; CUDA's context is made before, the tokenizer is a tiny one",
    )
    report.notes["load"] = {
        "peak_rss_anon_gb": round(max(run["peak"] for run in runs) / 1e9, 3),
        "before_rss_anon_gb": round(max(run["before"] for run in runs) / 1e9, 3),
        "cores": os.cpu_count(),
        "file_bytes": (folder / "model.safetensors").stat().st_size,
    }


def main(argv: Sequence[str] | None = None) -> int:
    options = parser(__doc__)
    options.set_defaults(repeats=3)
    options.add_argument(
        "--folder", type=path_argument, help="kept, and used as it is if it has weights"
    )
    options.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = options.parse_args(argv)
    if args.child:
        machine = Machine(torch.device(args.device), args.tiny)
        print(json.dumps(timed_load(Path(args.folder), machine)))
        return 0
    if args.folder and not Path(args.folder).resolve().parent.is_dir():
        raise ValueError(f"--folder {args.folder}: its parent does not exist; make it first")
    report = start(args)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.folder or temporary)
        if not (folder / "model.safetensors").exists():
            write_release(folder, replace(report.machine.config, visual_gen=True))
        measure(report, folder.resolve(), args)
    return finish(report, args.json)


if __name__ == "__main__":
    run_main(main)
