# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The paper's training step at the true size on several GPUs of one host.

    scripts/bench/paper_shape.sh 2 --out scaling --space /dev/shm/paper_shape

Random weights and generated mazes are written into --space (about 35 GB; `save` adds a training
state), every run is started by run_visual_opsd.sh itself and ended by SIGKILL when it has shown
enough steps. Random weights never end a completion, so each has --tokens tokens less one; where
lengths shall differ, the vocabulary is so small that the end is drawn now and then. Parts:

    speed     all layers, (1, GPUS), EMA teacher, 16 rows a step: seconds by phase, memory by rank
    scaling   --layers layers, 8 rows a GPU: 1, 2, 4, ... GPUS, meshes (1, n) and (2, n/2),
              FULL_SHARD, and completions of unequal lengths
    parity    first loss and gradient norm in fp32 of a tiny model: one process against GPUS
    save      --layers layers: a sharded save, SIGKILL two steps later, resumed: the same losses?
    failures  a rank killed, a rank out of memory in its rollout: how the others end

--out gets runs.jsonl (a line a run, as soon as it is over), report.json and log.txt (how each run's
output ended). `--tiny --device cpu` shows on any machine that it works; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from data.json_lines import read_log
from data.worlds.writer import write_spatial_navigation
from modeling.bagel.bagel import Bagel
from modeling.bagel.config import BagelConfig
from modeling.host.programs import number, path_argument
from scripts.bench.common import TINY, TRUE_SIZE, sized, versions
from scripts.bench.load import ROOT, write_release
from scripts.visual_opsd import on_policy_sampler
from scripts.visual_opsd.cli import run_main

LAUNCHER = "scripts/visual_opsd/run_visual_opsd.sh"
TINY_BAGEL = ROOT / "tests" / "tiny-bagel"
ROWS, ACCUMULATION = 8, 2  # rows of a GPU's step, forwards they are split into: the paper's 16 on 2
SIZES = (1, 2, 4, 8)
WARM_UP = 2
SAVED_STEP = 3
LIMIT_S = 240.0  # of one run
# A first start compiles kernels; what follows a failure must be over much sooner.
TIMEOUT_S = 60


@dataclass
class Run:
    """What a run showed: its lines of metrics.jsonl, and when each appeared after its start."""

    lines: list[dict[str, Any]]
    arrivals: list[float]
    memory: dict[str, float]
    output: str
    code: int | None  # None: it was ended here
    seconds: float
    ended_after: float = 0.0  # what was done to it once it had shown enough

    def figures(self, skip: int) -> dict[str, Any]:
        """Median and spread of the steps after the warm-up."""
        lines = self.lines[skip:]
        walls = [b - a for a, b in zip(self.arrivals, self.arrivals[1:], strict=False)]
        names = [k for k in self.lines[-1] if k.startswith(("seconds/", "tokens_per_s/"))]
        names += ["completion_length", "scored_tokens", "peak_memory_gb", "loss", "grad_norm"]
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
    """One answer of nvidia-smi for each GPU; none without it."""
    command = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader,nounits"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    except OSError:
        return []


class Watch:
    """Peaks while a run lasts: resident and own (not mapped) memory a rank, memory in use a GPU."""

    def __init__(self, pid: int, on_gpu: bool) -> None:
        self.pid, self.on_gpu, self.peaks = pid, on_gpu, dict[str, float]()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()

    def close(self) -> dict[str, float]:
        self._ended.set()
        self._thread.join()
        return dict(sorted(self.peaks.items()))

    def _note(self, name: str, gigabytes: float) -> None:
        self.peaks[name] = max(self.peaks.get(name, 0.0), round(gigabytes, 3))

    def _look(self) -> None:
        while not self._ended.wait(1.0):
            for rank, pid in ranks(self.pid).items():
                with contextlib.suppress(OSError, KeyError):  # it ended meanwhile
                    text = Path(f"/proc/{pid}/status").read_text()
                    status = dict(line.split(":", 1) for line in text.splitlines())
                    for key, name in (("VmRSS", "host_gb"), ("RssAnon", "host_own_gb")):
                        self._note(f"rank{rank}/{name}", int(status[key].split()[0]) * 1024 / 1e9)
            for gpu, used in enumerate(ask_gpus("memory.used") if self.on_gpu else []):
                with contextlib.suppress(ValueError):  # "[N/A]"
                    self._note(f"gpu{gpu}/used_gb", float(used) * 2**20 / 1e9)


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
                folder, rows=128, heldout_rows=8, sizes=(4,), style="full", cell=cell
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
            "sample_max_new_tokens": 24 if tiny else self.args.tokens,
            "log_every": 1,
            "save_every": 1_000_000,
            "save_release": False,
            "samples_per_step": 0,
            "device": "cuda" if self.on_gpu else "cpu",
            "progress": False,
            "timeout_s": TIMEOUT_S if tiny else 300,
            "vit_max_size": 112 if tiny else 980,
            "vit_min_size": 14 if tiny else 378,
            **more,
        }
        return [part for key, value in values.items() for part in (f"--{key}", str(value))]

    def train(
        self,
        name: str,
        base: Path,
        processes: int,
        steps: int,
        *,
        rows: int | None = None,
        starved: int | None = None,
        after: Callable[[subprocess.Popen[bytes]], None] = kill,
        **more: Any,
    ) -> Run:
        """Start a run, wait until `steps` lines of metrics are there, do `after` to it.

        starved: a rank that finds no memory in its third rollout; without the launcher then.

        Raises:
            RuntimeError: it ended by itself, or its time was over, before it had shown enough.
        """
        flags = self.flags(name, rows or ROWS * processes, more)
        command = ["bash", LAUNCHER, str(base), "ema", "0.5", "1.0", "1.0", "1000", name, *flags]
        if starved is not None:
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            command += [f"--nproc_per_node={processes}", "-m", "scripts.bench.paper_shape"]
            command += ["--starve", str(starved), "--model_path", str(base), *flags]
        environment = {**os.environ, "NPROC_PER_NODE": str(processes), "PYTHON": sys.executable}
        log, metrics = self.space / f"{name}.log", self.space / name / "metrics.jsonl"
        start = time.monotonic()
        limit = min(start + LIMIT_S, self.deadline)
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
            memory = watch.close()
        ended = time.monotonic()
        text = log.read_text(errors="replace")
        with (self.out / "log.txt").open("a") as file:
            file.write(f"==== {name}: {shlex.join(command)}\n{text[-6000:]}\n")
        lines = read_log(metrics)[: len(arrivals)] if arrivals else []
        code = None if after is kill else process.returncode
        run = Run(lines, arrivals, memory, text, code, ended - start, ended - reached)
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


# -------------------------------------------------------------------------------------- parts


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


def measured(lab: Lab, part: str, name: str, base: Path, n: int, steps: int, **more: Any) -> None:
    """A run whose steps are timed; `more` names its mesh."""
    with lab.trying(part, name):
        run = lab.train(f"{part}-{name}", base, n, WARM_UP + steps, **more)
        shards = more.get("num_shard", n)
        found = {
            "gpus": n,
            "mesh": [n // shards, shards],
            **run.figures(WARM_UP),
            **run.memory,
            **traffic_gb(lab.bases[base.name], n // shards, shards),
            "seconds": round(run.seconds, 1),
        }
        lab.say(part, name, found)


def speed(lab: Lab) -> None:
    n = lab.args.gpus
    base = lab.base("whole", TRUE_SIZE)
    measured(lab, "speed", f"1x{n}", base, n, lab.args.steps, rows=16, num_shard=n)


def scaling(lab: Lab) -> None:
    n, steps = lab.args.gpus, max(lab.args.steps // 2, 1)
    base = lab.short()
    for k in (k for k in SIZES if k <= n):
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
            "save", lab.short(), n, SAVED_STEP + 2, num_shard=n, save_every=SAVED_STEP
        )
        folder = lab.space / "save" / "checkpoints"
        size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
        again = lab.train(
            "resumed", lab.short(), n, 2, num_shard=n, resume="latest", checkpoint_dir=folder
        )
        keys = ("step", "loss", "grad_norm", "completion_length")
        before, after = ([[x[k] for k in keys] for x in run.lines[-2:]] for run in (first, again))
        step = [b - a for a, b in zip(first.arrivals, first.arrivals[1:], strict=False)]
        found = {
            "killed_run": before,
            "resumed_run": after,
            "equal": before == after,
            "state_gb": round(size / 1e9, 2),
            "step_with_save_s": round(step[SAVED_STEP - 1], 2),  # it stands before the next line
            "step_s": round(statistics.median(step[: SAVED_STEP - 1]), 2),
            "first_line_after_s": [round(run.arrivals[0], 1) for run in (first, again)],
            **again.memory,
        }
        lab.say("save", "resume", found)


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

    ways: dict[str, dict[str, Any]] = {
        "killed": {"after": kill_one},
        "out_of_memory": {"after": wait, "starved": n - 1},
    }
    wanted = re.compile(rf"\brank {n - 1}: |local_rank: {n - 1}\b|out of memory|allocate memory")
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
    sample = on_policy_sampler.sample_completions

    def sample_or_fail(*given: Any, **named: Any) -> Any:
        if named["step"] == 2 and int(os.environ.get("RANK", 0)) == rank:
            torch.empty(1 << 50, dtype=torch.uint8, device=named["device"])
        return sample(*given, **named)

    on_policy_sampler.sample_completions = sample_or_fail
    from scripts.visual_opsd import train_visual_opsd  # only now: it takes the name with it

    return train_visual_opsd.main(argv)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, count = parser.add_argument, number(int, at_least=1)
    add("gpus", type=int, choices=SIZES, help="GPUs of this host to use; with cpu: processes")
    add("--only", default=",".join(PARTS), help="%(default)s (all of them)")
    add(
        "--out",
        type=path_argument,
        default="results/paper_shape",
        help="runs.jsonl, report.json, log",
    )
    add("--space", type=path_argument, help="for weights, data and states (default: in --out)")
    add("--limit_s", type=float, default=3600, help="seconds after which none starts")
    add("--layers", type=count, default=12, help="of the smaller model")
    add("--tokens", type=count, default=1024, help="of a completion, at most")
    add("--steps", type=count, default=8, help="measured after the warm-up")
    add("--tiny", action="store_true", help="a tiny model, on any machine")
    add("--device", default="cuda", choices=("cuda", "cpu"))
    return parser


def find_hardware(args: argparse.Namespace) -> str:
    """Raises ValueError: too few GPUs for what was asked."""
    if args.device == "cpu":
        if not args.tiny:
            raise ValueError("the true size needs GPUs; --tiny --device cpu runs anywhere")
        return "cpu"
    names = ask_gpus("name")
    if len(names) < args.gpus:
        raise ValueError(f"{args.gpus} GPUs, but nvidia-smi shows {len(names)}; ask for fewer")
    return f"{args.gpus} x {names[0]}"


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["--starve"]:
        return starve(int(words[1]), words[2:])
    args = build_parser().parse_args(words)
    parts = args.only.split(",")
    if unknown := [part for part in parts if part not in PARTS]:
        raise ValueError(f"--only {','.join(unknown)}: choose among {', '.join(PARTS)}")
    hardware = find_hardware(args)
    out = Path(args.out).resolve()
    space = Path(args.space).resolve() if args.space else out / "space"
    for folder in (out, space):
        folder.mkdir(parents=True, exist_ok=True)
    if (out / "runs.jsonl").exists() or any(space.iterdir()):
        raise ValueError(f"--out {out} or --space {space} holds an earlier run: name other folders")
    lab = Lab(args, out, space)
    run = {"hardware": hardware, "versions": versions(), "tiny": args.tiny, "cores": os.cpu_count()}
    command = shlex.join(["scripts/bench/paper_shape.sh", *words])
    lab.say("run", "how", {**run, "command": command, "rows_a_gpu": ROWS, "tokens": args.tokens})
    for part in parts:
        if time.monotonic() < lab.deadline:
            PARTS[part](lab)
    return 0


if __name__ == "__main__":
    run_main(main)
