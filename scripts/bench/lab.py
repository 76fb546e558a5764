# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Runs of the trainer at the true size on one host, watched from outside.

Random weights and generated mazes are written into a folder, every run is a process of its own and
is ended by SIGKILL when it has shown enough steps. What is found is kept at once: runs.jsonl (a
line a run), report.json and log.txt (how each run's output ended).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from data.json_lines import read_log
from data.worlds.writer import write_spatial_navigation
from modeling.bagel.config import BagelConfig
from modeling.host.memory import process_bytes
from modeling.host.programs import number, path_argument
from scripts.bench.common import TINY, sized, versions
from scripts.bench.load import ROOT, write_release
from scripts.visual_opsd import train_visual_opsd
from scripts.visual_opsd.training.memory_plan import plan_memory
from scripts.visual_opsd.training.memory_sizes import (
    ReleaseSizes,
    RowLengths,
    World,
    load_of,
    make_footprint,
)
from scripts.visual_opsd.training.visual_opsd import VisualOPSD

LAUNCHER = "scripts/visual_opsd/run_visual_opsd.sh"
# Its problem and its one VT are 37 x 37 patches each; texts as the default prompts make them.
MAZE = RowLengths(image=1369, text=228, shown=1369, shown_text=62, new=1023)
ROWS, ACCUMULATION = 8, 2  # rows of a GPU's step, forwards they are split into: the paper's 16 on 2
LIMIT_S = 240.0  # of one run
# A first start compiles kernels; what follows a failure must be over much sooner.
TIMEOUT_S = 60


@dataclass
class Run:
    """What a run showed: its lines of metrics.jsonl, and when each appeared after its start.

    started: on the clock of the samples.
    """

    lines: list[dict[str, Any]]
    arrivals: list[float]
    samples: list[dict[str, float]]  # what it held, see `Watch`
    output: str
    code: int | None  # None: it was ended here
    seconds: float
    started: float = 0.0
    ended_after: float = 0.0  # what was done to it once it had shown enough

    @property
    def memory(self) -> dict[str, float]:
        return peaks(self.samples)

    def figures(self, skip: int) -> dict[str, Any]:
        """Median and spread of the steps after the warm-up."""
        lines = self.lines[skip:]
        walls = [b - a for a, b in zip(self.arrivals, self.arrivals[1:], strict=False)]
        names = [k for k in self.lines[-1] if k.startswith(("seconds/", "tokens_per_s/"))]
        names += ["completion_length", "scored_tokens", "peak_memory_gb", "loss", "grad_norm"]
        names += ["sampler_gap"] * ("sampler_gap" in self.lines[-1])
        columns = {name: [float(line[name]) for line in lines] for name in names}
        columns["step_s"] = walls[max(skip - 1, 0) :]
        phases = [sum(v for k, v in line.items() if k.startswith("seconds/")) for line in lines]
        # Phases are means over the ranks: what is left waits for the slowest, or is in no phase.
        pairs = zip(columns["step_s"], phases, strict=False)
        columns["waiting_s"] = [wall - phase for wall, phase in pairs]
        return {name: spread(values) for name, values in columns.items() if values}


def spread(values: Sequence[float]) -> dict[str, float]:
    median = statistics.median(values)
    return {"median": round(median, 5), "spread": round(max(values) - min(values), 5)}


# -------------------------------------------------------------------------------- processes


def tree(pid: int) -> list[int]:
    """A process and everything below it, whatever sessions torchrun made."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            parents.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found = [pid]
    for known in found:
        found += parents.get(known, [])
    return found


def ranks(pid: int) -> dict[int, int]:
    """Process of each rank below a launcher; a rank's own children come after it."""
    found: dict[int, int] = {}
    for process in tree(pid):
        with contextlib.suppress(OSError):
            for entry in Path(f"/proc/{process}/environ").read_bytes().split(b"\0"):
                if entry.startswith(b"RANK="):
                    found.setdefault(int(entry[5:]), process)
    return found


def kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to a launcher and all its ranks at once."""
    for pid in tree(process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def ask_gpus(what: str) -> list[str]:
    """One answer of nvidia-smi for each GPU that CUDA_VISIBLE_DEVICES leaves; none without it."""
    command = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader,nounits"]
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        command.append(f"--id={visible}")
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    except OSError:
        return []


class Watch:
    """What a run holds, looked at every second while it lasts.

    Of each rank resident and own (not mapped) memory and open files, of each GPU memory in use.
    """

    def __init__(self, pid: int, on_gpu: bool) -> None:
        self.pid, self.on_gpu = pid, on_gpu
        self.samples: list[dict[str, float]] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()

    def close(self) -> list[dict[str, float]]:
        self._ended.set()
        self._thread.join()
        return self.samples

    def _look(self) -> None:
        while not self._ended.wait(1.0):
            sample = {"at_s": time.monotonic()}
            for rank, pid in ranks(self.pid).items():
                with contextlib.suppress(OSError):  # it ended meanwhile
                    sample |= {f"rank{rank}/{k}": v for k, v in _held_by(pid).items()}
            for gpu, used in enumerate(ask_gpus("memory.used") if self.on_gpu else []):
                with contextlib.suppress(ValueError):  # "[N/A]"
                    sample[f"gpu{gpu}/used_gb"] = round(float(used) * 2**20 / 1e9, 3)
            self.samples.append(sample)


def _held_by(pid: int) -> dict[str, float]:
    """Raises OSError: it has ended."""
    files = len(os.listdir(f"/proc/{pid}/fd"))
    sizes = {"host_gb": process_bytes("VmRSS", pid), "host_own_gb": process_bytes("RssAnon", pid)}
    known = {name: round(size / 1e9, 3) for name, size in sizes.items() if size is not None}
    return {**known, "open_files": files}


def peaks(samples: Sequence[dict[str, float]]) -> dict[str, float]:
    """The largest value of each, but of the time."""
    names = sorted({name for sample in samples for name in sample if name != "at_s"})
    return {name: max(sample.get(name, 0.0) for sample in samples) for name in names}


# --------------------------------------------------------------------------------------- lab


@dataclass
class Lab:
    """Where runs happen, and what they share."""

    args: argparse.Namespace
    out: Path
    space: Path
    report: dict[str, Any] = field(default_factory=dict)
    bases: dict[str, BagelConfig] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.deadline = time.monotonic() + self.args.limit_s

    @property
    def on_gpu(self) -> bool:
        return self.args.device != "cpu"

    @property
    def tokens(self) -> int:
        """Of a completion, at most."""
        return 24 if self.args.tiny else int(self.args.tokens)

    def base(self, name: str, config: BagelConfig) -> Path:
        """A release folder of random weights, written when it is first wanted."""
        folder = self.space / name
        if name not in self.bases:
            start = time.monotonic()
            write_release(folder, TINY if self.args.tiny else config)
            self.bases[name] = TINY if self.args.tiny else config
            self.say("bases", name, {"seconds": round(time.monotonic() - start, 2)})
        return folder

    def short(self) -> Path:
        return self.base("short", sized(self.args.layers))

    def world(self) -> Path:
        """Mazes of 520 pixels a side, which the ViT sees at 518 (37 x 37 patches)."""
        folder = self.space / "world"
        if not folder.exists():
            cell = 14 if self.args.tiny else 130
            write_spatial_navigation(
                folder, rows=128, heldout_rows=16, sizes=(4,), style="full", cell=cell
            )
            (folder / "datasets.yaml").write_text("datasets:\n  - {name: Spatial_Navigation}\n")
        return folder

    def flags(self, name: str, rows: int, more: dict[str, Any]) -> list[str]:
        world, tiny = self.world(), self.args.tiny
        values: dict[str, Any] = {
            "dataset_config_file": world / "datasets.yaml",
            "data_root": world,
            "results_dir": self.space / name,
            "checkpoint_dir": self.space / name / "checkpoints",
            "global_batch_size": rows,
            "gradient_accumulation_steps": ACCUMULATION,
            "sample_max_new_tokens": self.tokens,
            "log_every": 1,
            "figures_every": 0,
            "save_every": 1_000_000,
            "save_release": False,
            "samples_per_step": 0,
            "plan": False,  # it is compared with what is measured, and is to refuse nothing
            "device": "cuda" if self.on_gpu else "cpu",
            "progress": False,
            "timeout_s": TIMEOUT_S if tiny else 300,
            "vit_max_size": 112 if tiny else 980,
            "vit_min_size": 14 if tiny else 378,
            **more,
        }
        return [part for key, value in values.items() for part in (f"--{key}", str(value))]

    def planned(self, base: Path, gpus: int, rows: int, more: dict[str, Any]) -> dict[str, float]:
        """What `--plan` says of a run with its mazes on so many GPUs, in GB: of `peak_memory_gb`
        and of each phase; "needed" is with what torch does not allocate."""
        flags = ["--model_path", str(base), *self.flags("planned", rows, more)]
        config = train_visual_opsd.read_config(flags)
        world = World(gpus, gpus, torch.device("cuda" if self.on_gpu else "cpu"))
        release = ReleaseSizes.read(config.model.model_path)
        of = make_footprint(config, release, VisualOPSD(config), world)
        row = replace(MAZE, new=config.sample.sample_max_new_tokens - 1)
        plan = plan_memory(of, load_of(of, row))
        found = {"peak": plan.allocated, "needed": plan.gpu, **plan.phases()}
        found["host"] = sum(part.size for part in plan.host)
        return {f"planned/{name}_gb": round(v / 1e9, 3) for name, v in found.items()}

    def train(
        self,
        name: str,
        base: Path,
        processes: int,
        steps: int,
        *,
        rows: int | None = None,
        program: Sequence[str] = (),
        limit_s: float = LIMIT_S,
        after: Callable[[subprocess.Popen[bytes]], None] = kill,
        **more: Any,
    ) -> Run:
        """Start a run, wait until `steps` lines of metrics are there, do `after` to it.

        program: module and first arguments that stand for the launcher.

        Raises:
            RuntimeError: it ended by itself, or its time was over, before it had shown enough.
        """
        flags = self.flags(name, rows or ROWS * processes, more)
        command = ["bash", LAUNCHER, str(base), "ema", "0.5", "1.0", "1.0", "1000", name, *flags]
        if program:
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            command += [f"--nproc_per_node={processes}", "-m", *program]
            command += ["--model_path", str(base), *flags]
        environment = {**os.environ, "NPROC_PER_NODE": str(processes), "PYTHON": sys.executable}
        log, metrics = self.space / f"{name}.log", self.space / name / "metrics.jsonl"
        start = time.monotonic()
        limit = min(start + limit_s, self.deadline)
        arrivals: list[float] = []
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
            )
        watch = Watch(process.pid, self.on_gpu)
        try:
            while len(arrivals) < steps and process.poll() is None and time.monotonic() < limit:
                count = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
                arrivals += [time.monotonic() - start] * (count - len(arrivals))
                time.sleep(0.005)
            enough, reached = len(arrivals) >= steps, time.monotonic()
            if enough:
                after(process)
        finally:
            kill(process)
            samples = watch.close()
        ended = time.monotonic()
        text = log.read_text(errors="replace")
        with (self.out / "log.txt").open("a") as file:
            file.write(f"==== {name}: {shlex.join(command)}\n{text[-6000:]}\n")
        lines = read_log(metrics)[: len(arrivals)] if arrivals else []
        code = None if after is kill else process.returncode
        run = Run(lines, arrivals, samples, text, code, ended - start, start, ended - reached)
        if not enough:
            last = " | ".join(text.strip().splitlines()[-3:])
            raise RuntimeError(
                f"{name}: {len(lines)} of {steps} steps in {run.seconds:.0f} s: {last}"
            )
        return run

    def say(self, part: str, name: str, found: dict[str, Any]) -> None:
        """Print and keep what was found, before anything else is tried."""
        self.report.setdefault(part, {})[name] = found
        line = json.dumps({"part": part, "name": name, **found})
        print(line, flush=True)
        with (self.out / "runs.jsonl").open("a") as file:
            file.write(line + "\n")
        (self.out / "report.json").write_text(json.dumps(self.report, indent=1) + "\n")

    @contextmanager
    def trying(self, part: str, name: str) -> Iterator[None]:
        """An error of one run is reported, and the next one is tried."""
        try:
            yield
        except (RuntimeError, OSError, ValueError, AssertionError) as error:
            self.say(part, name, {"error": str(error)})


def lab_parser(description: str | None, parts: Sequence[str]) -> argparse.ArgumentParser:
    """What every such benchmark is told."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, count = parser.add_argument, number(int, at_least=1)
    add("--only", default=",".join(parts), help="%(default)s (all of them)")
    add("--out", type=path_argument, help="runs.jsonl, report.json, log")
    add("--space", type=path_argument, help="for weights, data and states (default: in --out)")
    add("--limit_s", type=float, default=3600, help="seconds after which none starts")
    add("--layers", type=count, default=12, help="of the smaller model")
    add("--tokens", type=count, default=1024, help="of a completion, at most")
    add("--tiny", action="store_true", help="a tiny model, on any machine")
    add("--device", default="cuda", choices=("cuda", "cpu"))
    return parser


def run_parts(
    args: argparse.Namespace, parts: Mapping[str, Callable[[Lab], None]], gpus: int, command: str
) -> int:
    """Do those that --only names, each while there is time; returns the exit code.

    Raises:
        ValueError: unknown parts, too few GPUs, or folders that hold an earlier run.
    """
    names = args.only.split(",")
    if unknown := [name for name in names if name not in parts]:
        raise ValueError(f"--only {','.join(unknown)}: choose among {', '.join(parts)}")
    hardware = find_hardware(args, gpus)
    out = Path(args.out).resolve()
    space = Path(args.space).resolve() if args.space else out / "space"
    for folder in (out, space):
        folder.mkdir(parents=True, exist_ok=True)
    if (out / "runs.jsonl").exists() or any(space.iterdir()):
        raise ValueError(f"--out {out} or --space {space} holds an earlier run: name other folders")
    lab = Lab(args, out, space)
    run = {"hardware": hardware, "versions": versions(), "tiny": args.tiny, "cores": os.cpu_count()}
    lab.say("run", "how", {**run, "command": command, "rows_a_gpu": ROWS, "tokens": args.tokens})
    for name in names:
        if time.monotonic() < lab.deadline:
            parts[name](lab)
    return 0


def find_hardware(args: argparse.Namespace, gpus: int) -> str:
    """Raises ValueError: too few GPUs for what was asked."""
    if args.device == "cpu":
        if not args.tiny:
            raise ValueError("the true size needs GPUs; --tiny --device cpu runs anywhere")
        return "cpu"
    names = ask_gpus("name")
    if len(names) < gpus:
        raise ValueError(f"{gpus} GPUs, but nvidia-smi shows {len(names)}; ask for fewer")
    return f"{gpus} x {names[0]}"
