# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""`make demo`: the paper's claim on a laptop, through the ordinary entry points.

    world -> KL diagnostic of the base -> Visual-OPSD with real VTs and with noise VTs
          -> accuracy before and after, gap closed -> a table, a figure, a report, and a verdict

Every stage is a command that is printed before it runs; nothing in trainer, evaluator or
diagnostic knows of the demo. The effect is there when real VTs gain at least 8 points of text-only
accuracy over noise, with a 95 % interval above 0, and noise does not move the base by more than 4;
else the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from modeling.host.programs import SEED, make_folder, number, path_argument
from modeling.host.text_files import read_json_object
from scripts.miniworld.demo_figure import draw
from scripts.visual_opsd.analysis.report.page import write_report
from scripts.visual_opsd.cli import run_main
from scripts.visual_opsd.evaluation.scoring import PairedComparison, compare_runs

ROOT = Path(__file__).parents[2]
BASE = ROOT / "examples" / "tiny-base"
STAGES = ("world", "real", "noise", "eval", "diagnostic", "logs")
MARKER = ".visual-opsd-demo"  # in a results folder whose stages a later demo may replace
# The bounds of the claim, in accuracy points: the least that real VTs must gain over noise, and
# the most that noise may move the base either way (the text above says both).
LEAST_GAIN, MOST_DRIFT = 8.0, 4.0


@dataclass(frozen=True)
class Job:
    """One command; `threads` is how many cores it may use."""

    name: str
    module: str
    arguments: tuple[str, ...]

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-m", self.module, *self.arguments]


def flags(**values: Any) -> tuple[str, ...]:
    """Keyword arguments as command-line flags."""
    return tuple(part for name, value in values.items() for part in (f"--{name}", str(value)))


def start(
    job: Job, log: Path, environment: Mapping[str, str], *, bar: bool = False
) -> subprocess.Popen[bytes]:
    """Start a job whose output goes to `log`, its progress bar (`bar`) to the terminal."""
    log.parent.mkdir(parents=True, exist_ok=True)
    merged = {**os.environ, "TOKENIZERS_PARALLELISM": "false", **environment}
    stderr = None if bar else subprocess.STDOUT
    with log.open("w") as file:
        return subprocess.Popen(job.command, cwd=ROOT, env=merged, stdout=file, stderr=stderr)


def check_ended(job: Job, log: Path, code: int) -> None:
    """Raises RuntimeError: the job failed; shows the end of its log and where the rest is."""
    if code:
        said = log.read_text(encoding="utf-8", errors="replace")
        tail = "\n".join(said.splitlines()[-15:])
        raise RuntimeError(f"{job.name} ended with code {code} ({log}):\n{tail}")


class Runner:
    """Runs stages of independent jobs at the same time, each on its share of the cores."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2
        self.seconds: dict[str, float] = {}

    def run(self, title: str, jobs: Sequence[Job]) -> None:
        """Run `jobs` in parallel.

        Raises:
            RuntimeError: one failed; shows the end of its log and where the rest is.
        """
        tqdm.write(f"\n== {title}")
        for job in jobs:
            shown = [part.replace(str(ROOT) + os.sep, "") for part in job.command[1:]]
            tqdm.write("   python " + shlex.join(shown))
        started = time.perf_counter()
        threads = str(max(1, self.cores // len(jobs)))
        logs = [(self.out / "logs" / f"{job.name}.log") for job in jobs]
        # The first job's progress bar is shown, the others go to their logs.
        running = [
            start(job, log, {"OMP_NUM_THREADS": threads}, bar=index == 0)
            for index, (job, log) in enumerate(zip(jobs, logs, strict=True))
        ]
        try:
            codes = [process.wait() for process in running]
        finally:
            for process in running:
                process.kill()
        for job, log, code in zip(jobs, logs, codes, strict=True):
            check_ended(job, log, code)
        self.seconds[title] = time.perf_counter() - started
        tqdm.write(f"   {self.seconds[title]:.0f} s")


def read(path: Path) -> dict[str, Any]:
    return read_json_object(path, "result")


class Demo:
    """The demo's commands and what they left in `out`."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.out = args, Path(args.out).resolve()
        self.runner = Runner(self.out)
        self.world = self.out / "world"
        # What every tool needs to build the contexts the base was pre-trained on.
        self.prompt = flags(
            prompts=ROOT / "examples/demo/prompts.yaml", vit_max_size=112, vit_min_size=14
        )

    def release(self, arm: str) -> Path:
        """The release folder of an arm's last step. Raises ValueError: there is none."""
        place = self.out / arm / "checkpoints"
        folders = [p for p in place.glob("*") if p.name.isdigit()]
        if not folders:
            raise ValueError(
                f"{place} holds no trained student to evaluate: leave --save_release, "
                "--checkpoint_dir and --results_dir of the trainer as the demo sets them"
            )
        return max(folders, key=lambda folder: int(folder.name))

    def world_job(self) -> Job:
        arguments = flags(rows=self.args.rows, seed=self.args.seed, out=self.world)
        heldout = ("--heldout-rows", str(self.args.heldout_rows))
        return Job("world", "data.worlds", ("spatial_navigation", *arguments, *heldout))

    def train(self, arm: str, *more: str) -> Job:
        """Train an arm, which differs from the others in the flags `more` alone."""
        arguments = flags(
            config=ROOT / "examples/demo/train.yaml",
            model_path=self.args.base,
            data_root=self.world,
            results_dir=self.out / arm,
            data_seed=self.args.seed,
            global_seed=self.args.seed,
        )
        return Job(f"train-{arm}", "scripts.visual_opsd.train_visual_opsd",
                   (*arguments, *more, *self.args.train_flags))  # fmt: skip

    def evaluate(self, name: str, model: Path, context: str = "text") -> Job:
        arguments = flags(
            model_path=model,
            data_root=self.world,
            context=context,
            output_dir=self.out / "eval" / name,
            max_new_tokens=26,
            image_skips=0,
            noise_seed=self.args.seed,
        )
        return Job(f"eval-{name}", "scripts.visual_opsd.evaluate", (*arguments, *self.prompt))

    def diagnose(self, name: str, model: Path, *extra: str) -> Job:
        arguments = flags(
            model_path=model,
            data="Spatial_Navigation",
            split="heldout",
            data_root=self.world,
            num_samples=min(600, self.args.heldout_rows),
            output_dir=self.out / "diagnostic" / name,
            sample_max_new_tokens=26,
            sample_max_image_skips=0,
            seed=self.args.seed,
        )
        return Job(f"diagnostic-{name}", "scripts.visual_opsd.kl_diagnostic",
                   (*arguments, *self.prompt, *extra))  # fmt: skip

    def run(self) -> None:
        """All stages; two jobs at a time."""
        base = Path(self.args.base)
        baseline = self.out / "diagnostic" / "base"
        self.runner.run(
            "a world of mazes, with the path drawn as visual thought", [self.world_job()]
        )
        self.runner.run(
            "the base: text only, and what it would do with the visual thought",
            [self.evaluate("base", base), self.evaluate("base-vt", base, "vt")],
        )
        self.runner.run(
            "the base with a noise VT, and the KL diagnostic: do real VTs carry information?",
            [self.diagnose("base", base), self.evaluate("base-noise", base, "noise")],
        )
        self.runner.run(
            "Visual-OPSD with real VTs, and its control with noise VTs",
            [self.train("real"), self.train("noise", *flags(noise_vt=True))],
        )
        self.runner.run(
            "text-only accuracy after training",
            [self.evaluate(arm, self.release(arm)) for arm in ("real", "noise")],
        )
        self.runner.run(
            "how much of the gap to the privileged teacher is closed",
            [
                self.diagnose(arm, self.release(arm), "--base_path", str(base), "--baseline",
                              str(baseline), "--figures", "False")
                for arm in ("real", "noise")
            ],
        )  # fmt: skip


def collect(out: Path) -> dict[str, Any]:
    """Figures of a finished demo, for result.json."""
    evaluations = {
        name: read(out / "eval" / name / "summary.json")
        for name in ("base", "base-vt", "base-noise", "real", "noise")
    }
    diagnostics = {
        n: read(out / "diagnostic" / n / "kl_diagnostic.json") for n in ("real", "noise")
    }
    base = read(out / "diagnostic" / "base" / "kl_diagnostic.json")
    comparisons = {
        "real - noise": compare_runs(out / "eval" / "real", out / "eval" / "noise"),
        "noise - base": compare_runs(out / "eval" / "noise", out / "eval" / "base"),
        "real - base": compare_runs(out / "eval" / "real", out / "eval" / "base"),
    }
    return {
        "accuracy": {
            name: {key: summary[key] for key in ("accuracy", "interval", "n")}
            for name, summary in evaluations.items()
        },
        "paired": {name: asdict(value) for name, value in comparisons.items()},
        "gap_closed": {name: value["gap_closed"] for name, value in diagnostics.items()},
        "gap_note": "JSD is shown: at this scale most of the mean KL sits in a handful of tokens, "
        "so KL does not order short runs trained on the JSD (docs/log.md).",
        "base_diagnostic": base["go_test"],
        "failures": verdict(comparisons),
    }


def verdict(paired: dict[str, PairedComparison]) -> list[str]:
    """What contradicts the claim.

    The gain must be shown: of the size that is claimed, and above 0 beyond doubt, which few mazes
    cannot do. A drift is held against the control only with its whole 95 % interval beyond the
    bound.
    """
    failures = []
    gain, drift = paired["real - noise"], paired["noise - base"]
    gained = (
        f"real VTs gain {gain.difference:+.1f} points over noise, "
        f"[{gain.low:+.1f}, {gain.high:+.1f}]"
    )
    if gain.difference < LEAST_GAIN:
        failures.append(f"{gained}: less than {LEAST_GAIN:g}")
    elif gain.low <= 0:
        failures.append(f"{gained}: the interval is not above 0")
    if drift.low > MOST_DRIFT or drift.high < -MOST_DRIFT:
        failures.append(
            f"noise VTs move the base by {drift.difference:+.1f} points, "
            f"[{drift.low:+.1f}, {drift.high:+.1f}]: more than {MOST_DRIFT:g}"
        )
    return failures


def table(result: dict[str, Any]) -> str:
    """The demo's result as text."""

    def row(label: str, name: str, gap: str = "") -> str:
        value = result["accuracy"][name]
        low, high = value["interval"]
        return f"{label:<38}{value['accuracy']:>8.1%}   {low:.1%} - {high:.1%}{gap:>18}"

    def gap(arm: str) -> str:
        value = result["gap_closed"][arm]["jsd"]
        return f"{value['value']:.0%} +- {1.96 * value['se']:.0%}"

    def pair(label: str, name: str) -> str:
        value = result["paired"][name]
        bounds = f"{value['low']:+.1f} to {value['high']:+.1f}"
        return f"{label:<38}{value['difference']:>+7.1f}    {bounds}"

    return "\n".join(
        (
            f"{'text-only student':<38}{'accuracy':>8}   {'95 % interval':<13}"
            f"{'JSD gap closed':>18}",
            row("before (base)", "base", "0%"),
            row("after Visual-OPSD, real VTs", "real", gap("real")),
            row("after the control, noise VTs", "noise", gap("noise")),
            "",
            f"{'the base as teacher':<38}{'accuracy':>8}",
            row("with the real VT", "base-vt"),
            row("with a noise VT", "base-noise"),
            "",
            f"{'paired, same mazes':<38}{'points':>7}    95 % interval",
            pair("real VTs - noise VTs", "real - noise"),
            pair("noise VTs - before", "noise - base"),
        )
    )


def build_parser() -> argparse.ArgumentParser:
    """Flags of the demo; unknown ones are passed on to the trainer."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.miniworld.demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Further flags (e.g. --total_steps 600 --global_batch_size 128) go to the trainer.",
    )
    rows = number(int, at_least=1, at_most=10**8)
    parser.add_argument("--seed", type=SEED, default=0, help="world, order of rows, sampling")
    parser.add_argument(
        "--out", type=path_argument, default=str(ROOT / "results" / "demo"), help="results folder"
    )
    parser.add_argument(
        "--base", type=path_argument, default=str(BASE), help="release folder to start from"
    )
    parser.add_argument("--rows", type=rows, default=12800, help="training mazes")
    parser.add_argument("--heldout-rows", type=rows, default=2400, help="held-out mazes")
    return parser


def clear(out: Path) -> None:
    """Make the results folder, without what an earlier demo left there.

    Raises:
        ValueError: it cannot be written to, or holds folders of the stages' names that no demo
            made.
    """
    held = [stage for stage in STAGES if (out / stage).exists()]
    if held and not any((out / name).exists() for name in (MARKER, "result.json")):
        raise ValueError(
            f"--out {out} holds {', '.join(held)}, which no demo seems to have made: choose "
            "another folder, or remove them"
        )
    make_folder(out, "--out")
    (out / MARKER).touch()
    for stage in held:
        shutil.rmtree(out / stage, ignore_errors=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; 0 when the effect is there."""
    parser = build_parser()
    args, train_flags = parser.parse_known_args(argv)
    args.train_flags = train_flags
    if not Path(args.base).is_dir():
        raise ValueError(f"no base checkpoint at {args.base}; give --base DIR")
    args.base = str(Path(args.base).resolve())
    out = Path(args.out).resolve()
    clear(out)
    demo = Demo(args)
    started = time.perf_counter()
    try:
        demo.run()
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    result = collect(out)
    result["seed"], result["seconds"] = args.seed, time.perf_counter() - started
    result["stage_seconds"] = demo.runner.seconds
    (out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    text = table(result)
    (out / "table.txt").write_text(text + "\n")
    draw(out, result)
    report = out / "report.html"
    arms = [out / "eval" / name for name in ("base", "real", "noise", "base-vt", "base-noise")]
    write_report([out / "real", out / "noise"], report, evaluations=arms)
    print(f"\n{text}\n\n{result['seconds']:.0f} s; figure: {out / 'demo.png'}; report: {report}")
    for failure in result["failures"]:
        print(f"FAILED: {failure}", file=sys.stderr)
    if result["failures"]:
        return 1
    print("The effect is there: real visual thoughts teach the text-only student, noise does not.")
    return 0


if __name__ == "__main__":
    run_main(main)
