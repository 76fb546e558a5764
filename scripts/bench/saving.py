# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Host memory and seconds to save a training state and to go on from it; a kill in a save.

    python -m scripts.bench.saving --layers 10 --folder /dev/shm/states --json saving.json

Random fp32 shards of the student with EMA and AdamW's moments: 16 bytes a parameter, 56 GB for 10
of the 28 layers (with a ViT of as many). Three processes, one after the other, on one GPU or CPU:

    save   saves step 1, fills everything with another value, loads the state, compares digests
    kill   begins to save step 2 and is killed in the middle (its check of free room is left out:
           only a part is ever written)
    load   finds step 1 as the latest state, loads it in a fresh process, compares digests

Memory is what a process held at most beyond what it held before: anonymous pages, all resident
pages, and what torch's allocator of pinned memory has taken. The folder must have room for a state
and a part of the next, and is left without either.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from modeling.bagel.bagel import Bagel
from modeling.bagel.config import BagelConfig
from modeling.host.disk import check_room
from modeling.host.programs import path_argument
from scripts.bench.common import TINY, add_report, check, sized, versions, write
from scripts.bench.load import MemoryWatch
from scripts.visual_opsd.cli import run_main
from scripts.visual_opsd.processes import DistEnv, process_group
from scripts.visual_opsd.training import checkpoints
from scripts.visual_opsd.training.checkpoint_folders import (
    choose_checkpoint,
    claim_checkpoint_dir,
    remove,
    step_folder,
)
from scripts.visual_opsd.training.checkpoints import TrainingState
from scripts.visual_opsd.training.sharding import local_part, make_mesh, materialise, shard_model

ROOT = Path(__file__).resolve().parents[2]
SAMPLE_S = 0.005
DIGEST_VALUES = 2**24
SETTINGS: dict[str, Any] = {"config": {}, "contents": {}}


# ------------------------------------------------------------------------------------ a state


def random_state(config: BagelConfig, env: DistEnv, seed: int) -> TrainingState:
    """Student, EMA and moments of random values, on the device."""
    mesh = make_mesh(env)
    torch.manual_seed(seed)

    def model() -> Bagel:
        with torch.device("meta"):
            made = Bagel(config)
        made = made.requires_grad_(True)
        shard_model(made, mesh, block_classes=Bagel.block_classes(), param_dtype=torch.float32)
        materialise(made, env.device)
        return made

    student, ema = model(), model()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5)
    for parameter in student.parameters():
        # As its first step would; that step would take temporary memory of the weights' size.
        moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.tensor(1.0), **moments}
    state = TrainingState(student, optimizer, LambdaLR(optimizer, lambda _: 1.0), ema)
    with torch.no_grad():
        for tensor in shards(state):
            tensor.normal_()
    return state


def shards(state: TrainingState) -> list[Tensor]:
    """This rank's part of everything that is saved (but the counts of steps)."""
    assert state.ema is not None
    moments = [
        value
        for values in state.optimizer.state.values()
        for name, value in values.items()
        if name != "step"
    ]
    tensors = [*state.model.parameters(), *state.ema.parameters(), *moments]
    return [local_part(tensor.detach()) for tensor in tensors]


def digest(state: TrainingState) -> int:
    """A number in which every bit and its place count; computed on the device."""
    total = 0
    for number, tensor in enumerate(shards(state)):
        for start, piece in enumerate(tensor.reshape(-1).view(torch.int32).split(DIGEST_VALUES)):
            places = torch.arange(1, 2 * len(piece), 2, device=piece.device)
            total += (7 * number + start + 1) * int((piece * places).sum())
    return total % 2**64


# -------------------------------------------------------------------------------- three parts


def pinned_bytes() -> int:
    if not torch.cuda.is_available():
        return 0
    return int(torch.cuda.host_memory_stats().get("allocated_bytes.current", 0))


def measured(call: Callable[[], Any], nbytes: int) -> dict[str, float]:
    """Seconds of a call, GB/s, and GB of host memory at most beyond those before."""
    pinned = pinned_bytes()
    with MemoryWatch(SAMPLE_S) as anonymous, MemoryWatch(SAMPLE_S, "VmRSS") as resident:
        begin = time.perf_counter()
        call()
        taken = time.perf_counter() - begin
    return {
        "seconds": round(taken, 3),
        "gb_per_s": round(nbytes / 1e9 / taken, 3),
        "anonymous_gb": round((anonymous.peak - anonymous.before) / 1e9, 4),
        "resident_gb": round((resident.peak - resident.before) / 1e9, 4),
        "pinned_gb": round((pinned_bytes() - pinned) / 1e9, 4),
    }


def save_state(state: TrainingState, folder: Path, step: int, env: DistEnv) -> None:
    checkpoints.save_checkpoint(folder, step, state, env=env, **SETTINGS, extra={})


def load_state(state: TrainingState, path: Path, env: DistEnv) -> None:
    checkpoints.load_checkpoint(path, state, env=env, **SETTINGS)


def run_part(part: str, folder: Path, config: BagelConfig, env: DistEnv) -> dict[str, Any]:
    state = random_state(config, env, seed={"save": 1, "kill": 2, "load": 3}[part])
    nbytes = sum(tensor.nbytes for tensor in shards(state))
    made = digest(state)
    if part == "kill":
        with mock.patch.object(checkpoints, "check_room"):
            save_state(state, folder, 2, env)
        return {}
    found: dict[str, Any] = {"state_gb": round(nbytes / 1e9, 3), "digest": made}
    path = step_folder(folder, 1)
    if part == "save":
        check_room(folder, 1.1 * nbytes, "a state and a part of the next")
        found["save"] = measured(lambda: save_state(state, folder, 1, env), nbytes)
        with torch.no_grad():
            for tensor in shards(state):
                tensor.fill_(7.0)
    else:
        begin = time.perf_counter()
        chosen = choose_checkpoint(folder, ("latest",), env)
        found["choose_s"] = round(time.perf_counter() - begin, 3)
        if chosen != path:
            raise ValueError(f"after the kill {chosen} is the latest state, not {path}")
        claim_checkpoint_dir(folder, chosen, env)
        if any(folder.glob("*.tmp")):
            raise ValueError(f"{folder} still holds what the killed save had written")
    found["load"] = measured(lambda: load_state(state, path, env), nbytes)
    found["loaded_digest"] = digest(state)
    return found


# ------------------------------------------------------------------------------- the command


def command(part: str, folder: Path, args: argparse.Namespace) -> list[str]:
    words = [sys.executable, "-m", "scripts.bench.saving", "--part", part, "--folder", str(folder)]
    words += ["--device", args.device, "--layers", str(args.layers)]
    return words + ["--tiny"] * args.tiny


def part_in_fresh_process(part: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    done = subprocess.run(command(part, folder, args), cwd=ROOT, stdout=subprocess.PIPE)
    if done.returncode:
        raise ValueError(f"the part {part!r} ended with code {done.returncode}, see above")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def written_bytes(folder: Path) -> int:
    """What the save of step 2 has on the disk so far."""
    half = step_folder(folder, 2)
    files = half.with_name(half.name + ".tmp").glob("state/*.distcp")
    return sum(file.stat().st_size for file in files)


def kill_in_a_save(folder: Path, args: argparse.Namespace, at: float) -> dict[str, float]:
    """Start the part that saves step 2, and SIGKILL it when `at` bytes are written."""
    process = subprocess.Popen(command("kill", folder, args), cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        while process.poll() is None and written_bytes(folder) < at:
            time.sleep(0.0005)
    finally:
        process.kill()
    code = process.wait()
    if code != -signal.SIGKILL or step_folder(folder, 2).exists():
        raise ValueError(f"the save was not killed in the middle (it ended with code {code})")
    return {"killed_at_gb": round(written_bytes(folder) / 1e9, 4)}


def measure(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    saved = part_in_fresh_process("save", folder, args)
    size = sum(file.stat().st_size for file in step_folder(folder, 1).rglob("*"))
    killed = kill_in_a_save(folder, args, min(size / 2, shutil.disk_usage(folder).free / 2))
    resumed = part_in_fresh_process("load", folder, args)
    found = {saved["digest"], saved["loaded_digest"], resumed["loaded_digest"]}
    if len(found) != 1:
        raise ValueError(f"a state was loaded with other values than were saved: digests {found}")
    return {
        "state_gb": saved["state_gb"],
        "save": saved["save"],
        "load": saved["load"],
        "kill": killed,
        "load_after_kill": {**resumed["load"], "choose_s": resumed["choose_s"]},
        "digests_equal": True,
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=10, help="decoder layers (%(default)s)")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, whatever --layers says")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help="cuda or cpu (%(default)s here)")
    parser.add_argument("--folder", type=path_argument, help="where states go, made for them")
    parser.add_argument("--part", choices=("save", "kill", "load"), help=argparse.SUPPRESS)
    add_report(parser)
    parser.set_defaults(repeats=None)
    args = parser.parse_args(argv)
    if args.layers < 1:
        raise ValueError("--layers must be at least 1")
    device = check(args)
    config = TINY if args.tiny else sized(args.layers)
    if args.part:
        with process_group(device.type, 1800) as env:
            print(json.dumps(run_part(args.part, Path(args.folder), config, env)))
        return 0
    if args.folder and Path(args.folder).exists() and any(Path(args.folder).iterdir()):
        raise ValueError(f"--folder {args.folder} is not empty: name a new one")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.folder or temporary).resolve()
        folder.mkdir(exist_ok=True)
        try:
            found = measure(folder, args)
        finally:
            for left in folder.iterdir():
                remove(left)
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    run = {"hardware": hardware, "versions": versions(), "tiny": args.tiny}
    return write({**found, "run": {**run, "llm": asdict(config.llm)}}, args.json)


if __name__ == "__main__":
    run_main(main)
