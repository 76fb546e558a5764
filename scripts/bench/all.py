# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Every benchmark of one GPU, one after the other, as one report and one table.

    python -m scripts.bench.all --json docs/benchmarks/h100.json

Each runs in a process of its own (a profiler or a graph of one must not slow the next). About six
minutes at the true size, four with `--brief`, on a GPU of 80 GB with 30 GB free in the temporary
directory and in the page cache; `--tiny` takes a minute on any machine. A table of the
figures is printed at the end; docs/benchmarks/README.md holds the one of docs/benchmarks/h100.json.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modeling.host.programs import path_argument
from scripts.bench.common import check, parser
from scripts.visual_opsd.cli import run_main

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("decode", "vt_image", "step", "loss", "load")
NAMES = {
    "prefill_ms": "prompt of 1,565 rows, ms",
    "decode_b1_ms": "decoded token, batch 1, ms",
    "decode_b8_ms": "decoding step, batch 8, ms",
    "decode_b32_ms": "decoding step, batch 32, ms",
    "step_ckpt_ms": "training step a sample, checkpointing, ms",
    "peak_gb": "its memory beyond weights and gradients, GB",
    "step_ms": "training step a sample, no checkpointing, ms",
    "loss_ms": "loss of 1,024 tokens, the paper's form, ms",
    "loss_extra_gb": "its memory, both gradients included, GB",
    "loss_full_ms": "loss of 1,024 tokens, whole vocabulary, ms",
    "loss_full_extra_gb": "its memory, both gradients included, GB",
    "vt512_s": "visual thought of 512 x 512, s",
    "vt1024_s": "visual thought of 1024 x 1024, s",
    "load_s": "loading 16.1 GB of weights, s",
}


def run_part(name: str, arguments: Sequence[str]) -> dict[str, Any]:
    """The report of one benchmark.

    Raises:
        ValueError: it failed; what it said stands above.
    """
    command = [sys.executable, "-m", f"scripts.bench.{name}", *arguments]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise ValueError(f"scripts.bench.{name} ended with code {done.returncode}, see above")
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


def merged(reports: Mapping[str, dict[str, Any]], argv: Sequence[str]) -> dict[str, Any]:
    """One report of one or more parts; each measured ceilings of its own."""
    runs = {name: report["run"] for name, report in reports.items()}
    first = next(iter(runs.values()))
    assert all(run["hardware"] == first["hardware"] for run in runs.values())
    shared = ("hardware", "versions", "dtype", "tiny", "reference_hardware")
    return {
        **{key: v for report in reports.values() for key, v in report.items() if key != "run"},
        "run": {
            "command": shlex.join(["python", "-m", "scripts.bench.all", *argv]),
            **{key: first[key] for key in shared},
            "ceilings": {name: run["ceilings"] for name, run in runs.items()},
            "notes": {k: v for run in runs.values() for k, v in run["notes"].items()},
        },
    }


def table(report: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: a line for each figure, in the order of NAMES."""
    lines = [
        "| | median | spread | floor | median / floor | target | the authors' code |",
        "|---|---|---|---|---|---|---|",
    ]
    for key, name in NAMES.items():
        if key in report:
            entry = report[key]
            columns = ("median", "spread", "floor", "ratio", "target", "reference")
            shown = ["-" if entry[k] is None else f"{entry[k]:g}" for k in columns]
            if entry["target"] is not None:
                met = entry["median"] <= entry["target"]
                shown[0] = f"**{shown[0]}**" if met else f"{shown[0]} (missed)"
            lines.append(f"| {name} | {' | '.join(shown)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    options = parser(__doc__)
    options.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    options.set_defaults(repeats=None)
    options.add_argument(
        "--folder",
        type=path_argument,
        help="of the release that `load` writes (30 GB), see there",
    )
    argv = sys.argv[1:] if argv is None else argv
    args = options.parse_args(argv)
    check(args)
    arguments = ["--device", args.device]
    arguments += ["--tiny"] * args.tiny + ["--brief"] * args.brief
    if args.repeats is not None:
        arguments += ["--repeats", str(args.repeats)]
    reports, failures = {}, []
    for name in args.only:
        print(f"scripts.bench.{name} ...", file=sys.stderr, flush=True)
        folder = ["--folder", args.folder] if args.folder and name == "load" else []
        try:
            reports[name] = run_part(name, [*arguments, *folder])
        except ValueError as error:  # the others may still run
            failures.append(str(error))
            continue
        if args.json:  # after each part, so that an interrupted run leaves what it has
            Path(args.json).write_text(json.dumps(merged(reports, argv), indent=1) + "\n")
    if reports:
        print(table(merged(reports, argv)))
    if failures:
        raise ValueError("; ".join(failures))
    return 0


if __name__ == "__main__":
    run_main(main)
