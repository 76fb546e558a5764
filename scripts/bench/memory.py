# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""What training takes of one GPU and its host at the true size, beside what `--plan` says.

    python -m scripts.bench.memory --space /dev/shm/memory --out results/memory

Random weights and generated mazes are written into --space (about 40 GB), 16 rows a step, EMA
teacher. `save` needs room for two states of 61 GB besides, of which the second is never finished:
on a host of 128 GB a /dev/shm that says it is larger (`mount -o remount,size=200g /dev/shm`).
Parts:

    full      --layers layers, weights and moments in fp32 on the GPU
    lora      all layers, adapters of rank 64 on every linear one, the allocator held to --card_gb
    host      all layers, the whole model trained, moments in host memory
    8bit      the same, moments in 8 bits
    long      --layers layers, adapters, --long_steps short steps: does anything grow?
    watch     --layers layers: what measuring a step and validating the student cost
    save      --save_layers layers: a state written, then SIGKILL in the middle of the next save,
              then resumed: are the steps that follow the same, and what did saving take?

--out gets runs.jsonl (a line a run, as soon as it is over), report.json and log.txt (how each run's
output ended). `--tiny --device cpu` shows on any machine that it works; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from modeling.host.programs import number
from scripts.bench.common import TRUE_SIZE, sized
from scripts.bench.lab import Lab, Run, kill, lab_parser, run_parts
from scripts.visual_opsd import train_visual_opsd
from scripts.visual_opsd.cli import run_main

ROWS = 16
RANK = 64
SAVED_STEP = 2
ALL_LINEAR: dict[str, Any] = {"lora_rank": RANK, "lora_targets": "llm,vit,connector"}


def train(lab: Lab, part: str, layers: int | None, steps: int, **more: Any) -> None:
    name = "whole" if layers is None else f"layers-{layers}"
    base = lab.base(name, TRUE_SIZE if layers is None else sized(layers))
    with lab.trying("memory", part):
        run = lab.train(part, base, 1, steps, rows=ROWS, **more)
        more.pop("program", None)
        found = {**run.figures(2), **run.memory, "seconds": round(run.seconds, 1)}
        lab.say("memory", part, {**found, **lab.planned(base, 1, ROWS, more)})


def full(lab: Lab) -> None:
    train(lab, "full", lab.args.layers, lab.args.steps)


def lora(lab: Lab) -> None:
    program = ["scripts.bench.memory", "--card", str(lab.args.card_gb)] if lab.on_gpu else []
    train(lab, "lora", None, lab.args.steps, program=program, **ALL_LINEAR)


def host(lab: Lab) -> None:
    train(lab, "host", None, lab.args.steps, optimizer_state="host")


def eight_bits(lab: Lab) -> None:
    train(lab, "8bit", None, lab.args.steps, optimizer_state="8bit")


def long(lab: Lab) -> None:
    """Medians over an early and a late fifth of the steps."""
    steps = lab.args.long_steps
    base = lab.base(f"layers-{lab.args.layers}", sized(lab.args.layers))
    with lab.trying("memory", "long"):
        tokens = 24 if lab.args.tiny else 64
        run = lab.train(
            "long", base, 1, steps, rows=ROWS // 2, limit_s=600, sample_max_new_tokens=tokens,
            vit_max_size=112 if lab.args.tiny else 378, **ALL_LINEAR,
        )  # fmt: skip
        fifth = steps // 5
        parts = {"early": (fifth, 2 * fifth), "late": (steps - fifth, steps)}
        found: dict[str, Any] = {"steps": steps, "seconds": round(run.seconds, 1)}
        for name, (first, last) in parts.items():
            found[name] = _medians(run, first, last)
        lab.say("memory", "long", found)


def _medians(run: Run, first: int, last: int) -> dict[str, float]:
    """Of the seconds a step, the allocator's peak, and what was watched between two steps."""
    walls = [
        b - a for a, b in zip(run.arrivals[first:last], run.arrivals[first + 1 :], strict=False)
    ]
    begin, end = run.started + run.arrivals[first], run.started + run.arrivals[last - 1]
    within = [sample for sample in run.samples if begin <= sample["at_s"] <= end]
    names = sorted({name for sample in within for name in sample if name != "at_s"})
    found = {n: statistics.median([s[n] for s in within if n in s]) for n in names}
    found["peak_memory_gb"] = float(run.lines[last - 1]["peak_memory_gb"])
    return {"step_s": round(statistics.median(walls), 4), **found}


def watch(lab: Lab) -> None:
    """Every second step is measured, and every fifth followed by a validation."""
    base = lab.base(f"layers-{lab.args.layers}", sized(lab.args.layers))
    lines = 14  # of 11 steps, and of validations after 0, 5 and 10
    with lab.trying("memory", "watch"):
        run = lab.train(
            "watch", base, 1, lines, rows=ROWS, figures_every=2, eval_every=5,
            eval_data="Spatial_Navigation", eval_limit=ROWS,
        )  # fmt: skip
        walls = [b - a for a, b in pairwise([0.0, *run.arrivals])]
        steps = [(x, wall) for x, wall in zip(run.lines, walls, strict=True) if "loss" in x][2:]
        measured, others = (
            [(x["seconds/train"], wall) for x, wall in steps if ("fork_rate" in x) is wanted]
            for wanted in (True, False)
        )
        found: dict[str, Any] = {"seconds": round(run.seconds, 1)}
        for name, pairs in (("measured", measured), ("others", others)):
            trained, whole = (
                round(statistics.median(part), 3) for part in zip(*pairs, strict=True)
            )
            found |= {
                f"{name}/steps": len(pairs),
                f"{name}/train_s": trained,
                f"{name}/step_s": whole,
            }
        found["validations"] = [x for x in run.lines if "validation/n" in x]
        found["last_measured"] = next(x for x in reversed(run.lines) if "fork_rate" in x)
        lab.say("memory", "watch", found)


def save(lab: Lab) -> None:
    """A state, a kill in the middle of the next one, and the steps after it twice."""
    layers = lab.args.save_layers
    base = lab.base(f"layers-{layers}", sized(layers))
    tokens = 24 if lab.args.tiny else 64
    more: dict[str, Any] = {"save_every": SAVED_STEP, "sample_max_new_tokens": tokens}

    def kill_in_save(process: subprocess.Popen[bytes]) -> None:
        """Wait until the next state has begun to grow; never more than a minute."""
        folder = lab.space / "save" / "checkpoints" / f"step_{2 * SAVED_STEP:07d}.tmp"
        least = 1e5 if lab.args.tiny else 5e9
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline and _size(folder) < least:
            time.sleep(0.01)
        kill(process)

    with lab.trying("memory", "save"):
        steps = 2 * SAVED_STEP
        first = lab.train("save", base, 1, steps, rows=ROWS, after=kill_in_save, **more)
        folder = lab.space / "save" / "checkpoints"
        states = sorted(path.name for path in folder.iterdir())
        state = _size(folder / f"step_{SAVED_STEP:07d}")
        again = lab.train(
            "resumed", base, 1, SAVED_STEP, rows=ROWS, resume="latest", checkpoint_dir=folder,
            **{**more, "save_every": 1_000_000},
        )  # fmt: skip
        keys = ("step", "loss", "grad_norm")
        before, after = (
            [[x[k] for k in keys] for x in r.lines[-SAVED_STEP:]] for r in (first, again)
        )
        own = [s["rank0/host_own_gb"] for s in first.samples if "rank0/host_own_gb" in s]
        found = {
            "state_gb": round(state / 1e9, 2),
            "folders_after_the_kill": states,
            "killed_run": before,
            "resumed_run": after,
            "equal": before == after,
            "host_own_gb_by_second": own,
            "host_own_gb_resumed": [s.get("rank0/host_own_gb", 0.0) for s in again.samples],
            "step_s": [round(b - a, 2) for a, b in pairwise(first.arrivals)],
            "first_line_after_s": [round(run.arrivals[0], 1) for run in (first, again)],
        }  # fmt: skip
        lab.say("memory", "save", found)


def _size(folder: Path) -> int:
    """Bytes of the files in a folder that may not be there yet."""
    total = 0
    for path in folder.rglob("*") if folder.exists() else ():
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:
            continue
    return total


PARTS = {
    "full": full, "lora": lora, "host": host, "8bit": eight_bits, "long": long, "watch": watch,
    "save": save,
}  # fmt: skip


def train_limited(gigabytes: float, argv: Sequence[str]) -> int:
    """Train, but the allocator gives no more than a smaller card has."""
    whole = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(gigabytes * 1e9 / whole)
    return train_visual_opsd.main(argv)


def build_parser() -> argparse.ArgumentParser:
    parser = lab_parser(__doc__, list(PARTS))
    parser.set_defaults(out="results/memory")
    count = number(int, at_least=1)
    parser.add_argument("--steps", type=count, default=5, help="of a run; two are warm-up")
    parser.add_argument("--card_gb", type=float, default=46.0, help="1e9 bytes; of part lora")
    parser.add_argument("--long_steps", type=count, default=200, help="of part long")
    parser.add_argument("--save_layers", type=count, default=11, help="of part save")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["--card"]:
        return train_limited(float(words[1]), words[2:])
    args = build_parser().parse_args(words)
    command = shlex.join(["python -m scripts.bench.memory", *words]).replace("'", "")
    return run_parts(args, PARTS, 1, command)


if __name__ == "__main__":
    run_main(main)
