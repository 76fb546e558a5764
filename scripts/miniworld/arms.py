# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Arms of the miniature beside each other: what the teacher sees, and how it teaches.

    python -m scripts.miniworld.arms --arms real,noise,other --seeds 71,72,73 --workers 6

Of every seed, a world; on it the base and each arm, trained as in `make demo`: text-only accuracy
on held-out mazes, and how much of the JSD to the privileged teacher is closed on the base's own
completions. Arms:

    real, noise, other, blank, shuffled, problem, none    what the teacher sees (--vt)
    contrast-A        real VTs, what they alone make likely counted A times more (against noise)
    offline-trace, offline-base    a cached teacher's word on the data set's text, on base samples
    offline-jsd       the loss of `real`, but on the base's samples and with a cached teacher
    sft               the data set's text alone
    guard-MODE        --teacher_guard MODE (off, warn, freeze, rollback), validated on the way
    rehearsal-SHARE   --vt_rehearsal SHARE, validated on the way

Further flags go to the trainer of every arm that has a use for them. An arm that is finished is not
run again and one that was stopped goes on, so more arms and seeds can be added to a folder, all
with the same mazes, base and flags. --workers arms run at once, a thread each, shared out over the
GPUs there are. result.json and table.md hold what was found of the arms and seeds named last.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from data.visual_thoughts import VT_KINDS
from modeling.host.programs import make_folder, number, path_argument
from scripts.miniworld.demo import BASE, ROOT, Demo, Job, check_ended, flags, read, start
from scripts.visual_opsd import train_sft, train_visual_opsd, train_visual_opsd_offline
from scripts.visual_opsd.cli import run_main
from scripts.visual_opsd.evaluation.scoring import compare_runs
from scripts.visual_opsd.evaluation.store import read_json, write_json
from scripts.visual_opsd.runs.identity import SETTINGS_FILE, differences
from scripts.visual_opsd.training.start import checked

TRAINERS: dict[str, Any] = {"offline": train_visual_opsd_offline, "sft": train_sft}  # by kind
VALIDATION = flags(eval_every=50, eval_data="Spatial_Navigation", eval_limit=400)
CACHED_ENTRIES = 64  # of 384; an entry takes 6 bytes
# What is completed by, and what the recipe of offline training (CE + KL at T = 2) is replaced by.
OFFLINE = {
    "offline-trace": ("trace", ()),
    "offline-base": ("base", ()),
    "offline-jsd": (
        "base",
        flags(
            kd_loss="jsd", jsd_weight=1.0, jsd_temperature=1.0, ce_weight=0.0,
            kd_use_vt_weights=False,
        ),
    ),
}  # fmt: skip


def arm_flags(arm: str) -> tuple[str, ...]:
    """What an arm adds to the demo's training.

    Raises:
        ValueError: there is no such arm.
    """
    kind, _, value = arm.partition("-")
    if arm in VT_KINDS:
        return flags(vt=arm)
    if kind == "contrast" and value:
        return flags(contrast=value)  # with noise
    if kind == "guard" and value:
        return (*VALIDATION, *flags(teacher_guard=value))
    if kind == "rehearsal" and value:
        return (*VALIDATION, *flags(vt_rehearsal=value))
    if arm in OFFLINE:
        _, more = OFFLINE[arm]
        return (*flags(jsd_top_k=CACHED_ENTRIES, num_workers=0), *more)
    if arm == "sft":
        return ()
    raise ValueError(
        f"--arms {arm}: choose among {', '.join((*VT_KINDS, *OFFLINE))}, sft, contrast-A, "
        "guard-MODE and rehearsal-SHARE"
    )


class SeedArms:
    """The base and the arms of one seed, in a folder of their own."""

    turns = itertools.count()  # of all seeds: which GPU is next

    def __init__(self, args: argparse.Namespace, seed: int) -> None:
        self.out = Path(args.out).resolve() / f"seed-{seed}"
        values = {**vars(args), "seed": seed, "out": str(self.out)}
        self.demo = Demo(argparse.Namespace(**values))
        self.seed = seed

    def run(self, job: Job) -> None:
        """Raises RuntimeError: it failed."""
        print(f"seed {self.seed}: {job.name}", flush=True)
        environment = {"OMP_NUM_THREADS": "1"}
        if (count := torch.cuda.device_count()) > 1:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
            environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[next(self.turns) % count]
        log = self.out / "logs" / f"{job.name}.log"
        check_ended(job, log, start(job, log, environment).wait())

    def once(self, result: Path, job: Callable[[], Job]) -> None:
        """Run a job unless its result is there."""
        if not result.exists():
            self.run(job())

    def prepare(self) -> None:
        """The world, and what the base does in it."""
        demo, base = self.demo, Path(self.demo.args.base)
        self.once(demo.world / "Spatial_Navigation", demo.world_job)
        self.once(self.out / "eval/base/summary.json", lambda: demo.evaluate("base", base))
        self.once(
            self.out / "diagnostic/base/kl_diagnostic.json",
            lambda: demo.diagnose("base", base, "--figures", "False"),
        )  # fmt: skip

    def run_arm(self, arm: str) -> None:
        """Train, evaluate, diagnose."""
        demo, base = self.demo, str(self.demo.args.base)
        if arm in OFFLINE:
            cache = self.out / arm / "cache"
            self.once(cache / "collect_traces.json", lambda: self._collect(arm, cache))
        last = self.out / "eval" / arm / "summary.json"
        self.once(last, lambda: self.train_job(arm))
        self.once(last, lambda: demo.evaluate(arm, demo.release(arm)))
        self.once(
            self.out / "diagnostic" / arm / "kl_diagnostic.json",
            lambda: demo.diagnose(
                arm, demo.release(arm), "--base_path", base, "--baseline",
                str(self.out / "diagnostic/base"), "--figures", "False",
            ),
        )  # fmt: skip

    def train_job(self, arm: str) -> Job:
        """Raises ValueError: as its trainer would, of settings that are wrong."""
        job = self.demo.train(arm, *arm_flags(arm), *flags(auto_resume=True))
        trainer = TRAINERS.get(arm.partition("-")[0], train_visual_opsd)
        words = job.arguments
        if arm in OFFLINE:
            words = (*words, *flags(teacher_cache=self.out / arm / "cache"))
        # What the demo and the other arms set, and this trainer refuses, gets its default back.
        objective = trainer.make_objective(trainer.read_config(words))
        for names in objective.without_effect().values():
            words = (*words, *flags(**{name: objective.standard[name] for name in names}))
        config = trainer.read_config(words)
        checked(config, trainer.make_objective(config))
        return Job(job.name, trainer.__name__, words)

    def _collect(self, arm: str, cache: Path) -> Job:
        arguments = flags(
            model_path=self.demo.args.base,
            dataset_config_file=ROOT / "examples/demo/datasets.yaml",
            data_root=self.demo.world,
            completions=OFFLINE[arm][0],
            top_k=CACHED_ENTRIES,
            seed=self.seed,
            sample_max_new_tokens=26,
            sample_max_image_skips=0,
            output_dir=cache,
        )
        words = (*arguments, *self.demo.prompt)
        return Job(f"collect-{arm}", "scripts.visual_opsd.collect_traces", words)

    def found(self, arm: str) -> dict[str, Any]:
        """Figures of a finished arm."""
        summary = read(self.out / "eval" / arm / "summary.json")
        gain = compare_runs(self.out / "eval" / arm, self.out / "eval/base")
        gap = read(self.out / "diagnostic" / arm / "kl_diagnostic.json")["gap_closed"]
        return {
            "accuracy": summary["accuracy"], "interval": summary["interval"], "n": summary["n"],
            "gain": gain.difference, "gain_interval": [gain.low, gain.high],
            "jsd_closed": gap["jsd"], "kl_closed": gap["kl"],
        }  # fmt: skip


def claim(out: Path, args: argparse.Namespace) -> None:
    """Say what the folder's arms are made with, for those that will be added.

    Raises:
        ValueError: its arms have other mazes, another base or other flags: they could not be
            compared with those to come.
    """
    shared = {name: getattr(args, name) for name in ("base", "rows", "heldout_rows", "train_flags")}
    file = out / SETTINGS_FILE
    if file.exists():
        held = read_json(file, "what the arms beside it were made with; choose another --out")
        if different := differences(held, shared):
            raise ValueError(
                f"--out {out} holds arms of other settings ({'; '.join(different)}): give the "
                "same, or choose another --out"
            )
    write_json(file, shared)


def pooled(values: Sequence[float], half_widths: Sequence[float]) -> tuple[float, float]:
    """Mean over seeds of differences on independent mazes, and half of its 95 % interval."""
    half = math.sqrt(sum(width**2 for width in half_widths)) / len(half_widths)
    return statistics.mean(values), half


def table(result: Mapping[str, Mapping[Any, dict[str, Any]]], base: Sequence[float]) -> str:
    """A line of markdown for each arm; intervals are over mazes, the seeds stand beside them."""
    lines = [
        "| arm | accuracy | gain over the base, points | of each seed | JSD gap closed |",
        "|---|---|---|---|---|",
        f"| base | {statistics.mean(base):.1%} | | | |",
    ]
    for arm, seeds in result.items():
        found = list(seeds.values())
        gains = [f["gain"] for f in found]
        halves = [(f["gain_interval"][1] - f["gain_interval"][0]) / 2 for f in found]
        mean, half = pooled(gains, halves)
        closed, spread = pooled(
            [f["jsd_closed"]["value"] for f in found],
            [1.96 * f["jsd_closed"]["se"] for f in found],
        )
        each = ", ".join(f"{gain:+.1f}" for gain in gains)
        lines.append(
            f"| `{arm}` | {statistics.mean(f['accuracy'] for f in found):.1%} | {mean:+.1f} "
            f"({mean - half:+.1f} to {mean + half:+.1f}) | {each} | {closed:.0%} +- {spread:.0%} |"
        )
    return "\n".join(lines)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.miniworld.arms",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    count = number(int, at_least=1, at_most=10**8)
    add = parser.add_argument
    add("--arms", default="real,noise,other,blank,shuffled,none", help="by commas (%(default)s)")
    add("--seeds", default="0", help="by commas; of world, order of rows, sampling (%(default)s)")
    add("--out", type=path_argument, default="results/arms", help="folder (%(default)s)")
    add("--base", type=path_argument, default=str(BASE), help="release folder to start from")
    add("--rows", type=count, default=12800, help="training mazes")
    add("--heldout-rows", type=count, default=2400, help="held-out mazes")
    add("--workers", type=count, default=2, help="arms at once")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is not there yet; 1 when an arm failed."""
    args, train_flags = build_parser().parse_known_args(argv)
    args.train_flags = train_flags
    arms = list(dict.fromkeys(args.arms.split(",")))  # the same one twice would share a folder
    words = args.seeds.split(",")
    if not all(word.isascii() and word.isdigit() for word in words):
        raise ValueError(f"--seeds {args.seeds}: numbers by commas, as in 71,72,73")
    args.base = str(Path(args.base).resolve())
    places = [SeedArms(args, seed) for seed in dict.fromkeys(map(int, words))]
    for arm in arms:
        places[0].train_job(arm)  # what is wrong is said before anything is made
    make_folder(args.out, "--out")
    out = Path(args.out)
    claim(out, args)
    failures = []
    with ThreadPoolExecutor(args.workers) as pool:
        try:
            list(pool.map(SeedArms.prepare, places))
        except RuntimeError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        running = {
            (arm, place.seed): pool.submit(place.run_arm, arm) for arm in arms for place in places
        }
        for task in running.values():
            if failure := task.exception():
                failures.append(str(failure))
    done = {
        arm: {p.seed: p.found(arm) for p in places if running[arm, p.seed].exception() is None}
        for arm in arms
    }
    result = {arm: seeds for arm, seeds in done.items() if seeds}
    base = [read(place.out / "eval/base/summary.json")["accuracy"] for place in places]
    text = table(result, base)
    (out / "result.json").write_text(json.dumps({"base": base, "arms": result}, indent=1) + "\n")
    (out / "table.md").write_text(text + "\n")
    print(f"\n{text}")
    for line in failures:
        print(f"FAILED: {line}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    run_main(main)
