# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Runs too long for the test suite: hostile inputs, random kills, thousands of steps.

    python -m tests.soak                                 all three, as `make soak` does
    python -m tests.soak hostile [--kind image ...]      tests/hostile, its arguments behind
    python -m tests.soak kills [--count 50] [--seed 0]   SIGKILL, resume, compare with a whole run
    python -m tests.soak steps [--count 2000]            does anything grow?

Prints totals; ends with code 1 if anything was not as it must be.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from statistics import median
from typing import Any

from tqdm import tqdm

from scripts.visual_opsd.training.checkpoint_folders import complete_steps, step_folder
from tests.data.synthetic import image_cell, truncated_png, write_dataset
from tests.visual_opsd.training_runs import (
    ROOT,
    all_gone,
    descendants,
    figures,
    full_state,
    kill_tree,
    logged_steps,
    make_world,
    ranks_of,
    start,
    train_arguments,
)

MODULE = "scripts.visual_opsd.train_visual_opsd"
PARTS = ("hostile", "kills", "steps")

# ---------------------------------------------------------------------------------- kills

KILLS_A_RUN = 5
STEPS = 12
PATIENCE_S = 300.0  # for one attempt of a run of twelve steps
# (ranks, workers), by turns.
SHAPES = ((1, 0), (2, 1), (1, 2), (2, 0), (1, 1), (2, 2))
MOMENTS = ("anywhere", "step", "step", "save", "save")
VICTIMS = ("all", "all", "one process")
# Where processes that lost another must be gone, seconds.
GONE_WITHIN_S = 20.0


def kill_world(folder: Path) -> Path:
    """Rows of which some are bad, so that their list is resumed, too."""
    bad: dict[int, dict[str, Any]] = {
        3: {"problem_image_0": image_cell(truncated_png())}, 11: {"answer": None},
    }  # fmt: skip
    write_dataset(folder, rows=24, change=lambda row: bad.get(row, {}))
    (folder / "datasets.yaml").write_text("datasets:\n  - {name: Jigsaw_Assembly}\n")
    return folder


def run_arguments(world: Path, results: Path, ranks: int, workers: int) -> list[str]:
    # Two ranks: as in training/test_resume.py, for the sake of the other order of sums.
    eps = {"eps": 1e-8} if ranks > 1 else {}
    return train_arguments(
        world, results, resume="latest", total_steps=STEPS, num_workers=workers, keep_last=2,
        save_release=True, timeout_s=120, **eps,
    )  # fmt: skip


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def fingerprint(results: Path, step: int, scratch: Path) -> dict[str, str]:
    """Name -> digest of everything that a run must leave the same, however often it was killed.

    Every file outside the states by its bytes (of metrics.jsonl without what measures the
    machine); of the last state the shards and trainer.pt, and, as .metadata names folders and has
    an id, every tensor that is read by it. The generators of the process (rng_*.pt) are seeded by
    nothing, and no step draws from them.
    """
    found = {}
    last = step_folder(results / "checkpoints", step)
    for path in sorted(p for p in results.rglob("*") if p.is_file()):
        name = str(path.relative_to(results))
        if "/step_" in name:
            kept = path.suffix == ".distcp" or path.name == "trainer.pt"
            if kept and path.is_relative_to(last):
                found[name] = digest(path.read_bytes())
        elif name != "metrics.jsonl":
            found[name] = digest(path.read_bytes())
    found["metrics.jsonl"] = digest(json.dumps(figures(results)).encode())
    for name, tensor in full_state(results, step, scratch).items():
        found[f"tensor {name}"] = digest(tensor.contiguous().numpy().tobytes())
    return found


@dataclass
class Kills:
    """What was done, and what was wrong."""

    done: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    half_written: int = 0  # kills that left a .tmp
    faults: list[str] = field(default_factory=list)

    def fault(self, text: str) -> None:
        tqdm.write(f"FAULT: {text}")
        self.faults.append(text)


class RunKiller:
    """Kills runs at random moments, resumes them, compares their ends."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.world, self.results = kill_world(folder / "world"), folder / "run"
        self.scratch = folder / "scratch"
        self.scratch.mkdir()
        self.random = random.Random(seed)
        self.found = Kills()
        self._whole: dict[tuple[int, int], tuple[dict[str, str], float]] = {}

    def whole(self, shape: tuple[int, int]) -> tuple[dict[str, str], float]:
        """Fingerprint and seconds of an uninterrupted run; in the same folder, as files name it."""
        if shape not in self._whole:
            started = time.monotonic()
            process = self._start(shape)
            output = self._to_the_end(process)
            seconds = time.monotonic() - started
            assert process.returncode == 0, output
            self._whole[shape] = fingerprint(self.results, STEPS, self.scratch), seconds
            shutil.rmtree(self.results)
        return self._whole[shape]

    def run(self, number: int, kills: int, bar: tqdm[Any]) -> None:
        """One run, killed up to `kills` times (it may end before its last kill)."""
        shape = SHAPES[number % len(SHAPES)]
        expected, seconds = self.whole(shape)
        history = []
        for _ in range(kills):
            moment, victim = self.random.choice(MOMENTS), self.random.choice(VICTIMS)
            process = self._start(shape)
            if not self._wait(moment, process, seconds):
                break
            self._kill(process, victim)
            self.found.done[f"{moment}, {victim}"] += 1
            self.found.half_written += any(self.results.rglob("*.tmp"))
            history.append(f"{moment} at step {max(logged_steps(self.results), default=0)}")
            bar.update()
        else:
            process = self._start(shape)
        output = self._to_the_end(process)
        where = f"run {number} ({shape[0]} ranks, {shape[1]} workers; killed {history})"
        if process.returncode != 0:
            self.found.fault(f"{where} ended with {process.returncode}:\n{output[-3000:]}")
        else:
            self._compare(where, expected)
        self.found.runs += 1
        shutil.rmtree(self.results)

    def _start(self, shape: tuple[int, int]) -> subprocess.Popen[str]:
        return start(MODULE, run_arguments(self.world, self.results, *shape), shape[0])

    def _to_the_end(self, process: subprocess.Popen[str]) -> str:
        try:
            return process.communicate(timeout=PATIENCE_S)[0]
        except subprocess.TimeoutExpired:
            kill_tree(process)
            return f"no end after {PATIENCE_S:.0f} s"

    def _wait(self, moment: str, process: subprocess.Popen[str], seconds: float) -> bool:
        """Wait for a random moment; False if the run ended before it."""
        if moment == "anywhere":
            until = time.monotonic() + self.random.uniform(0, seconds)
            return _until(lambda: time.monotonic() > until, process)
        if moment == "step":
            pause = self.random.uniform(0, 0.3)
            reached = _until(self._steps_later(), process)
        else:
            skip, pause = self.random.randint(0, 3), self.random.uniform(0, 0.15)
            seen: set[str] = set()
            started = time.time()

            def saving() -> bool:
                with contextlib.suppress(FileNotFoundError):  # renamed meanwhile
                    for path in (self.results / "checkpoints").glob("*.tmp"):
                        if path.stat().st_mtime > started:  # not what a killed run left
                            seen.add(path.name)
                return len(seen) > skip

            reached = _until(saving, process)
        time.sleep(pause)
        return reached and process.poll() is None

    def _steps_later(self) -> Callable[[], bool]:
        """Whether the process that was just started has made some steps of those that are left."""
        log = self.results / "metrics.jsonl"
        stale = log.stat().st_mtime_ns if log.exists() else 0
        saved = max(complete_steps(self.results / "checkpoints"), default=0)
        wanted = self.random.randint(min(saved + 1, STEPS), STEPS)

        def reached() -> bool:
            # Lines of steps after the state are those of the killed run, until they are cut.
            fresh = log.exists() and log.stat().st_mtime_ns > stale
            return fresh and max(logged_steps(self.results), default=0) >= wanted

        return reached

    def _kill(self, process: subprocess.Popen[str], victim: str) -> None:
        """SIGKILL to all processes of a run at once, or to one: what it leaves must end alone."""
        pids = descendants(process.pid)
        if victim == "one process":
            ranks = list(ranks_of(process).values())
            os.kill(self.random.choice([process.pid, *ranks]), signal.SIGKILL)
            if not all_gone(pids, GONE_WITHIN_S):
                self.found.fault(f"processes outlive their run: {pids}")
        kill_tree(process)

    def _compare(self, where: str, expected: dict[str, str]) -> None:
        try:
            ours = fingerprint(self.results, STEPS, self.scratch)
        except Exception as error:
            self.found.fault(f"{where} cannot be read: {error!r}")
            return
        names = sorted(n for n in ours.keys() | expected.keys() if ours.get(n) != expected.get(n))
        if names:
            self.found.fault(f"{where} differs in {len(names)} things: {names[:8]}")
        left = [str(p) for p in self.results.rglob("*.tmp")]
        if left:
            self.found.fault(f"{where} left {left}")


def _until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> bool:
    """Poll; False if the process ended first."""
    deadline = time.monotonic() + PATIENCE_S
    while process.poll() is None and time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.003)
    return False


def kills(count: int, seed: int) -> list[str]:
    """Kill `count` times; returns what was wrong."""
    with tempfile.TemporaryDirectory() as folder, tqdm(total=count, unit="kill") as bar:
        killer = RunKiller(Path(folder), seed)
        runs = 0
        while bar.n < count:
            killer.run(runs, min(KILLS_A_RUN, count - int(bar.n)), bar)
            runs += 1
            if runs > 4 * count + 8:
                killer.found.fault("the runs end before they can be killed")
                break
    found = killer.found
    print(
        f"kills: {sum(found.done.values())} in {found.runs} runs of {STEPS} steps (seed {seed}), "
        f"{found.half_written} of them left something half-written"
    )
    for kind, number in sorted(found.done.items()):
        print(f"    {number:4d} {kind}")
    return found.faults


# ---------------------------------------------------------------------------------- steps


@dataclass(frozen=True)
class Look:
    """A run at a moment: trainer and data worker together."""

    step: int
    memory: float  # resident, not backed by files, MB
    handles: float
    threads: float
    seconds: float  # CPU time a step, since the look before
    logged: float  # bytes of logs a step, since the look before


# How much a figure may grow over the run, after the warm-up: share of its level, and beside that
# an amount of its own unit.
MARGINS = {
    "memory": (0.0, 8.0), "handles": (0.0, 0.5), "threads": (0.0, 0.5),
    "seconds": (0.10, 0.002), "logged": (0.10, 0.0),
}  # fmt: skip
LOOK_EVERY = 100


def look(pid: int, results: Path) -> dict[str, float]:
    """Sums over a process and those below it, as they are now."""
    found = dict.fromkeys(("memory", "handles", "threads", "cpu", "logs"), 0.0)
    for each in descendants(pid):
        place = Path(f"/proc/{each}")
        status = dict(line.split(":", 1) for line in (place / "status").read_text().splitlines())
        stat = (place / "stat").read_text().rpartition(")")[2].split()
        found["memory"] += int(status["RssAnon"].split()[0]) / 1024
        found["threads"] += int(status["Threads"])
        found["handles"] += len(os.listdir(place / "fd"))
        found["cpu"] += (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")
    found["logs"] += sum(p.stat().st_size for p in results.glob("*.jsonl"))
    return found


def last_step(results: Path) -> int:
    """The last step in metrics.jsonl, read from its end."""
    path = results / "metrics.jsonl"
    if not path.exists():
        return 0
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - 8192))
        lines = [line for line in stream.read().split(b"\n") if line.endswith(b"}")]
    return int(json.loads(lines[-1])["step"]) if len(lines) > 1 else 0


def looks(process: subprocess.Popen[str], results: Path, count: int) -> Iterator[Look]:
    """Look every hundred steps until the run ends."""
    before: dict[str, float] = {}
    step = 0
    for mark in range(LOOK_EVERY, count, LOOK_EVERY):
        while last_step(results) < mark:
            if process.poll() is not None:
                return
            time.sleep(0.01)
        with contextlib.suppress(FileNotFoundError):  # it just ended
            now, at = look(process.pid, results), last_step(results)
            if before:
                seconds, logged = ((now[k] - before[k]) / (at - step) for k in ("cpu", "logs"))
                yield Look(at, now["memory"], now["handles"], now["threads"], seconds, logged)
            before, step = now, at


def growth(points: Sequence[tuple[float, float]]) -> float:
    """Growth over all points along their median slope (Theil and Sen), which outliers leave be."""
    slopes = [(y - b) / (x - a) for n, (a, b) in enumerate(points) for x, y in points[n + 1 :]]
    return median(slopes) * (points[-1][0] - points[0][0])


def growing(seen: Sequence[Look]) -> tuple[list[str], list[str]]:
    """(what grows, a line of figures each); the first quarter is the warm-up."""
    faults, lines = [], []
    kept = seen[len(seen) // 4 :]
    for name in (spec.name for spec in fields(Look) if spec.name != "step"):
        points = [(float(at.step), float(getattr(at, name))) for at in kept]
        level, grown = median(y for _, y in points), growth(points)
        share, amount = MARGINS[name]
        lines.append(
            f"    {name}: {points[0][1]:.4g} at step {kept[0].step}, {points[-1][1]:.4g} at step "
            f"{kept[-1].step}; growth {grown:+.3g}, allowed {share * level + amount:.3g}"
        )
        if grown > share * level + amount:
            faults.append(f"{name} grows by {grown:.3g} in {kept[-1].step - kept[0].step} steps")
    return faults, lines


def steps(count: int) -> list[str]:
    """One trainer with a data worker makes `count` steps; returns what was wrong."""
    with tempfile.TemporaryDirectory() as folder, tqdm(total=count, unit="step") as bar:
        world, results = Path(folder) / "world", Path(folder) / "run"
        world.mkdir()
        make_world(world, rows=64)
        process = start(
            MODULE,
            train_arguments(
                world, results, total_steps=count, num_workers=1, save_every=LOOK_EVERY,
                save_release=True, sample_max_new_tokens=8, global_batch_size=2,
                vit_max_size=56, timeout_s=600, lr=1e-5,
            ),
        )  # fmt: skip
        seen = []
        started = time.monotonic()
        try:
            for found in looks(process, results, count):
                seen.append(found)
                bar.update(found.step - bar.n)
            output, _ = process.communicate(timeout=PATIENCE_S)
        finally:
            if process.poll() is None:
                kill_tree(process)
        made = last_step(results)
        bar.update(made - bar.n)
    print(f"steps: {made} in {time.monotonic() - started:.0f} s, looked at {len(seen)} times")
    if process.returncode != 0 or made != count:
        return [f"the run of {count} steps ended with {process.returncode}:\n{output[-3000:]}"]
    if len(seen) < 8:
        return [f"{count} steps are too few to see a growth"]
    faults, lines = growing(seen)
    print("\n".join(lines))
    return faults


# ---------------------------------------------------------------------------------- all


def hostile(arguments: Sequence[str]) -> list[str]:
    """In a process of its own: memory is measured against its size."""
    ended = subprocess.run([sys.executable, "-m", "tests.hostile", *arguments], cwd=ROOT)
    return [] if ended.returncode == 0 else ["hostile inputs: see the table above"]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.soak", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parts = parser.add_subparsers(dest="part", metavar="{" + ",".join(PARTS) + "}")
    parts.add_parser("hostile", add_help=False)
    kill = parts.add_parser("kills", help="SIGKILL at random moments, resume, compare")
    kill.add_argument("--count", type=int, default=50)
    kill.add_argument("--seed", type=int, default=0)
    step = parts.add_parser("steps", help="many tiny steps: does anything grow?")
    step.add_argument("--count", type=int, default=2000)
    options, rest = parser.parse_known_args(argv)
    if rest and options.part != "hostile":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    chosen = PARTS if options.part is None else (options.part,)
    faults = []
    for part in chosen:
        given = options if options.part else parts.choices[part].parse_known_args([])[0]
        print(f"== {part}", flush=True)
        if part == "hostile":
            faults += hostile(rest)
        elif part == "kills":
            faults += kills(given.count, given.seed)
        else:
            faults += steps(given.count)
    print(f"== {', '.join(chosen)}: {len(faults)} faults", *faults, sep="\n")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
