# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""A report of training runs to look at: one HTML file, without network or server.

    python -m scripts.visual_opsd.report results/real results/noise --out report.html

Curves of the runs over each other, the settings they differ in, completions of some steps with a
colour for each token and their rows' pictures beside them, accuracies of evaluations. A run that
is still training can be reported as well.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from modeling.host.programs import check_new, path_argument
from scripts.visual_opsd.analysis.report.page import check_replaced, write_report
from scripts.visual_opsd.cli import run_main


def step_list(value: str) -> list[int]:
    """An argparse type: steps by commas."""
    try:
        return [int(part) for part in value.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be steps such as 1,100,500, got {value!r}"
        ) from None


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.visual_opsd.report",
        description="A report of training runs to look at: one HTML file.",
    )
    add = parser.add_argument
    add("runs", metavar="RUN", nargs="+", type=path_argument, help="results folder of a training")
    add("--out", required=True, type=path_argument, help="HTML file to write")
    add("--overwrite", action="store_true", help="replace the file if it is there")
    add(
        "--evaluations", metavar="FOLDER", nargs="+", type=path_argument, default=[],
        help="output folders of `evaluate`; the first is what the others are compared with",
    )  # fmt: skip
    add(
        "--steps", metavar="STEP[,STEP]", type=step_list, default=None,
        help="steps whose completions are shown; default: five from the first to the last",
    )  # fmt: skip
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    given = build_parser().parse_args(argv)
    out = Path(given.out)
    check_new(out, "--out", overwrite=given.overwrite)
    check_replaced(out)
    write_report(given.runs, out, evaluations=given.evaluations, steps=given.steps)
    print(f"{out} ({out.stat().st_size / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    run_main(main)
