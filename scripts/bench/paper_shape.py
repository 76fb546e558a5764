# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The paper's training step at the true size on several GPUs of one host.

    scripts/bench/paper_shape.sh 2 --out scaling --space /dev/shm/paper_shape

Random weights and generated mazes are written into --space (about 35 GB; `save` adds a training
state), every run is started by run_visual_opsd.sh itself and ended by SIGKILL when it has shown
enough steps. Random weights never end a completion, so each has --tokens tokens less one; where
lengths shall differ, the vocabulary is so small that the end is drawn now and then. Parts:

    speed     all layers, (1, GPUS), EMA teacher, 16 rows a step, completions of --tokens and of
              half as many: seconds by phase, memory by rank
    scaling   --layers layers, 8 rows a GPU: one GPU beside all of them in meshes (1, n) and
              (2, n/2), FULL_SHARD, and completions of unequal lengths
    parity    first loss and gradient norm in fp32 of a tiny model: one process against GPUS
    save      --layers layers: a sharded save and a release folder, SIGKILL two steps later,
              resumed: the same losses?
    failures  a rank killed, a rank out of memory in its rollout: how the others end

--out gets runs.jsonl (a line a run, as soon as it is over), report.json and log.txt (how each run's
output ended). `--tiny --device cpu` shows on any machine that it works; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from modeling.bagel.bagel import Bagel
from modeling.bagel.config import BagelConfig
from modeling.host.programs import number
from scripts.bench.common import TINY, TRUE_SIZE, sized
from scripts.bench.lab import LIMIT_S, ROWS, TIMEOUT_S, Lab, lab_parser, ranks, run_parts
from scripts.bench.load import ROOT
from scripts.visual_opsd import train_visual_opsd
from scripts.visual_opsd.cli import run_main
from scripts.visual_opsd.on_policy_sampler import sample_completions
from scripts.visual_opsd.training import visual_opsd
from scripts.visual_opsd.training.checkpoint_folders import release_folder, step_folder

TINY_BAGEL = ROOT / "tests" / "tiny-bagel"
SIZES = (1, 2, 4, 8)
WARM_UP = 2
SAVED_STEP = 3


def shard_counts(n: int) -> tuple[int, ...]:
    """Of the meshes (1, n) and (2, n / 2)."""
    return (n,) if n == 1 else (n, n // 2)


def traffic_gb(config: BagelConfig, replicas: int, shards: int) -> dict[str, float]:
    """GB a GPU receives, by the plan, for the rollout and for each pack of a step.

    Weights travel in bf16: once for the rollout; for a pack the student's forward and backward and
    the teacher's forward. Gradients travel in fp32: scattered over shards, reduced over replicas.
    """
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Bagel(config).parameters())
    others = parameters * (1 - 1 / shards)
    reduced = others + 2 * parameters / shards * (1 - 1 / replicas)
    found = {
        "parameters_billion": parameters / 1e9,
        "gathered_rollout_gb": 2 * others / 1e9,
        "gathered_pack_gb": 3 * 2 * others / 1e9,
        "reduced_pack_gb": 4 * reduced / 1e9,
    }
    return {name: round(value, 3) for name, value in found.items()}


def measured(
    lab: Lab, part: str, name: str, base: Path, n: int, steps: int, rows: int = 0, **more: Any
) -> None:
    """A run whose steps are timed; rows: of a step, ROWS a GPU if 0; `more` names its mesh."""
    rows, config = rows or ROWS * n, lab.bases[base.name]
    with lab.trying(part, name):
        run = lab.train(f"{part}-{name}", base, n, WARM_UP + steps, rows=rows, **more)
        shards = more.get("num_shard", n)
        found = {
            "gpus": n,
            "layers": config.llm.num_hidden_layers,
            "rows": rows,
            "mesh": [n // shards, shards],
            **run.figures(WARM_UP),
            **run.memory,
            **lab.planned(base, n, rows, more),
            **traffic_gb(config, n // shards, shards),
            "seconds": round(run.seconds, 1),
        }
        lab.say(part, name, found)


def speed(lab: Lab) -> None:
    n = lab.args.gpus
    base = lab.base("whole", TRUE_SIZE)
    measured(lab, "speed", f"1x{n}", base, n, lab.args.steps, rows=16, num_shard=n)
    half, steps = lab.tokens // 2, max(lab.args.steps // 2, 1)
    measured(
        lab, "speed", f"1x{n}-{half}", base, n, steps,
        rows=16, num_shard=n, sample_max_new_tokens=half,
    )  # fmt: skip


def scaling(lab: Lab) -> None:
    n, steps = lab.args.gpus, max(lab.args.steps // 2, 1)
    base = lab.short()
    for k in sorted({1, n}):
        for shards in shard_counts(k):
            measured(lab, "scaling", f"{k // shards}x{shards}", base, k, steps, num_shard=shards)
    measured(lab, "scaling", f"full{n}", base, n, steps, sharding_strategy="FULL_SHARD")
    few = sized(lab.args.layers)
    base = lab.base("ending", replace(few, llm=replace(few.llm, vocab_size=TINY.llm.vocab_size)))
    measured(lab, "scaling", f"unequal{n}", base, n, steps, num_shard=n)
    done = lab.report.get("scaling", {})
    walls = {k: v["step_s"]["median"] for k, v in done.items() if "step_s" in v}
    if "1x1" in walls:
        share = {k: round(walls["1x1"] / wall, 4) for k, wall in walls.items()}
        lab.say("scaling", "efficiency", share)


def parity(lab: Lab) -> None:
    n = lab.args.gpus
    small: dict[str, Any] = {"precision": "fp32", "vit_max_size": 112, "vit_min_size": 14}
    small |= {"sample_max_new_tokens": 64, "use_system_prompt": False}
    rows = 8 * n
    with lab.trying("parity", "all"):
        one = lab.train("parity-1", TINY_BAGEL, 1, 1, rows=rows, samples_per_step=rows, **small)
        small["replay_samples"] = lab.space / "parity-1" / "samples.jsonl"
        for shards in shard_counts(n):
            name = f"{n // shards}x{shards}"
            run = lab.train(
                f"parity-{name}", TINY_BAGEL, n, 1, rows=rows, num_shard=shards, **small
            )
            pairs = {
                key: (float(run.lines[0][key]), float(one.lines[0][key]))
                for key in ("loss", "grad_norm")
            }
            apart = {key: abs(a - b) / abs(b) for key, (a, b) in pairs.items()}
            good = max(apart.values()) <= 1e-6
            lab.say("parity", name, {"relative": apart, "values": pairs, "within_1e-6": good})


def save(lab: Lab) -> None:
    n = lab.args.gpus
    with lab.trying("save", "resume"):
        first = lab.train(
            "save", lab.short(), n, SAVED_STEP + 2, num_shard=n, save_every=SAVED_STEP,
            save_release=True, limit_s=2 * LIMIT_S,
        )  # fmt: skip
        folder = lab.space / "save" / "checkpoints"
        state, release = step_folder(folder, SAVED_STEP), release_folder(folder, SAVED_STEP)
        begun = time.time() - time.monotonic() + first.started + first.arrivals[SAVED_STEP - 1]
        (state_gb, state_end), (release_gb, release_end) = map(_written, (state, release))
        again = lab.train(
            "resumed", lab.short(), n, 2, num_shard=n, resume="latest", checkpoint_dir=folder
        )
        keys = ("step", "loss", "grad_norm", "completion_length")
        before, after = ([[x[k] for k in keys] for x in run.lines[-2:]] for run in (first, again))
        found = {
            "killed_run": before,
            "resumed_run": after,
            "equal": before == after,
            "state_gb": state_gb,
            "state_s": round(state_end - begun, 1),  # it stands before the next line
            "release_gb": release_gb,
            "release_s": round(release_end - state_end, 1),
            "step_s": [round(b - a, 2) for a, b in pairwise(first.arrivals)],
            "first_line_after_s": [round(run.arrivals[0], 1) for run in (first, again)],
            **{f"saved/{name}": most for name, most in first.memory.items()},
            **{f"resumed/{name}": most for name, most in again.memory.items()},
        }
        lab.say("save", "resume", found)


def _written(folder: Path) -> tuple[float, float]:
    """GB of a folder's files, and when the last of them was written, in seconds of the epoch."""
    stats = [path.stat() for path in folder.rglob("*") if path.is_file()]
    return round(sum(s.st_size for s in stats) / 1e9, 2), max(s.st_mtime for s in stats)


def failures(lab: Lab) -> None:
    n = lab.args.gpus
    small: dict[str, Any] = {"vit_max_size": 112, "vit_min_size": 14, "timeout_s": TIMEOUT_S}
    small["sample_max_new_tokens"] = 64

    def wait(process: subprocess.Popen[bytes]) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(2 * TIMEOUT_S)

    def kill_one(process: subprocess.Popen[bytes]) -> None:
        os.kill(ranks(process.pid)[n - 1], signal.SIGKILL)
        wait(process)

    starving = ["scripts.bench.paper_shape", "--starve", str(n - 1)]
    ways: dict[str, dict[str, Any]] = {
        "killed": {"after": kill_one},
        "out_of_memory": {"after": wait, "program": starving},
    }
    wanted = re.compile(rf"\brank {n - 1}(: | \(process)|out of memory|allocate memory")
    for name, how in ways.items():
        with lab.trying("failures", name):
            run = lab.train(f"failures-{name}", TINY_BAGEL, n, 2, **how, **small)
            named = [x.strip()[:300] for x in run.output.splitlines() if wanted.search(x)]
            found = {
                "exit_code": run.code,
                "ended_after_s": round(run.ended_after, 2),
                "within_timeout": run.ended_after <= TIMEOUT_S and run.code not in (0, -9),
                "named": named[-6:],
            }
            lab.say("failures", name, found)


PARTS = {f.__name__: f for f in (speed, scaling, parity, failures, save)}


def starve(rank: int, argv: Sequence[str]) -> int:
    """Train, but rank `rank` asks for a petabyte in its third rollout."""

    def sample_or_fail(*given: Any, **named: Any) -> Any:
        if named["step"] == 2 and int(os.environ.get("RANK", 0)) == rank:
            torch.empty(1 << 50, dtype=torch.uint8, device=named["device"])
        return sample_completions(*given, **named)

    with mock.patch.object(visual_opsd, "sample_completions", sample_or_fail):
        return train_visual_opsd.main(argv)


def build_parser() -> argparse.ArgumentParser:
    parser = lab_parser(__doc__, list(PARTS))
    parser.set_defaults(out="results/paper_shape")
    count = number(int, at_least=1)
    parser.add_argument(
        "gpus", type=int, choices=SIZES, help="GPUs of this host to use; with cpu: processes"
    )
    parser.add_argument("--steps", type=count, default=8, help="measured after the warm-up")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["--starve"]:
        return starve(int(words[1]), words[2:])
    args = build_parser().parse_args(words)
    command = shlex.join(["scripts/bench/paper_shape.sh", *words])
    return run_parts(args, PARTS, args.gpus, command)


if __name__ == "__main__":
    run_main(main)
