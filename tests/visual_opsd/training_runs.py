# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Start the training entry points as a user would, in processes of their own, and read results."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from data.worlds.writer import write_spatial_navigation
from tests.data.synthetic import split_file

ROOT = Path(__file__).parents[2]
TINY_BAGEL = ROOT / "tests" / "tiny-bagel"
# Figures that measure the machine, not the run.
_MACHINE = (
    "seconds/", "tokens_per_s/", "peak_memory_gb", "host_memory_gb", "gpu_", "mfu",
    "validation/seconds",
)  # fmt: skip


def make_world(folder: Path, rows: int = 16, heldout_rows: int = 12) -> Path:
    """A small maze data set and its dataset config; returns the config's path.

    The held-out rows stand in two files, so that a row's place in its file is not its index.
    Tests that only read take the session's fixture `world`.
    """
    data = write_spatial_navigation(folder, rows=rows, heldout_rows=heldout_rows, seed=3)
    split_file(data, "heldout", 3)
    config = folder / "datasets.yaml"
    config.write_text("datasets:\n  - {name: Spatial_Navigation}\n")
    return config


def train_arguments(world: Path, results: Path, **changes: Any) -> list[str]:
    """Flags of a run that takes a fraction of a second a step."""
    values: dict[str, Any] = {
        "model_path": TINY_BAGEL,
        "dataset_config_file": world / "datasets.yaml",
        "data_root": world,
        "results_dir": results,
        "device": "cpu",
        "total_steps": 6,
        "warmup_steps": 2,
        "lr": 1e-3,
        "global_batch_size": 4,
        "num_workers": 0,
        "sample_max_new_tokens": 16,
        "vit_max_size": 112,
        "vit_min_size": 14,
        "log_every": 1,
        "save_every": 2,
        "save_release": False,
        "progress": False,
        "timeout_s": 60,
        **changes,
    }
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def command(module: str, arguments: Sequence[str], ranks: int = 1) -> list[str]:
    launcher = [sys.executable, "-m"]
    if ranks > 1:
        launcher += ["torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "-m"]
    return [*launcher, module, *arguments]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_GLOO_LAZY_INIT": "1"}


def start(module: str, arguments: Sequence[str], ranks: int = 1) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(module, arguments, ranks),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=hear_signals,
    )


def hear_signals() -> None:
    """For children of tests in a shell's background, which ignore SIGINT, and SIGHUP by nohup."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def run(module: str, arguments: Sequence[str], ranks: int = 1, timeout: float = 150) -> str:
    """Run to the end; returns what it printed."""
    process = start(module, arguments, ranks)
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        kill_tree(process)
        raise AssertionError(f"timed out after {timeout} s: {process.args!r}") from None
    assert process.returncode == 0, output
    return output


def descendants(pid: int) -> list[int]:
    """The process and everything below it (torchrun puts workers into sessions of their own)."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it ended meanwhile
        parents.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found = [pid]
    for known in found:
        found += parents.get(known, [])
    return found


def ranks_of(process: subprocess.Popen[str]) -> dict[int, int]:
    """Rank -> process, of those that torchrun started."""
    found = {}
    for pid in descendants(process.pid)[1:]:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        rank = next((v for v in variables if v.startswith(b"RANK=")), None)
        parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
        if rank is not None and int(parent) == process.pid:
            found[int(rank.removeprefix(b"RANK="))] = pid
    return found


def all_gone(pids: list[int], within: float) -> bool:
    """Whether none of the processes lives (or only as a zombie), waiting a while for it."""
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        states = []
        for pid in pids:
            try:
                text = Path(f"/proc/{pid}/stat").read_text()
                states.append(text.rpartition(")")[2].split()[0])
            except OSError:
                continue
        if all(state in "ZX" for state in states):
            return True
        time.sleep(0.1)
    return False


def kill_tree(process: subprocess.Popen[str]) -> None:
    """SIGKILL to the launcher and all its workers at once."""
    for pid in descendants(process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.communicate()


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], what: str) -> None:
    """Poll until `condition`; fails if the process ends first."""
    deadline = time.monotonic() + 90
    while not condition():
        if process.poll() is not None:
            raise AssertionError(f"ended before {what}:\n{process.communicate()[0]}")
        assert time.monotonic() < deadline, f"no {what} within 90 s"
        time.sleep(0.005)


def logged_steps(results: Path) -> list[int]:
    path = results / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("}")]


def figures(results: Path) -> list[dict[str, Any]]:
    """Logged figures of each step, without those that measure the machine."""
    lines = (results / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if not k.startswith(_MACHINE)} for line in lines
    ]


def full_state(results: Path, step: int, scratch: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a training state: student, EMA, optimiser."""
    target = scratch / f"{results.name}-{step}.pt"
    dcp_to_torch_save(results / "checkpoints" / f"step_{step:07d}" / "state", target)
    found: dict[str, torch.Tensor] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found[prefix] = value
        elif isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{prefix}/{key}", inner)

    walk("", torch.load(target, weights_only=True))
    return found
