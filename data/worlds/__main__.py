# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Command line: python -m data.worlds spatial_navigation --rows N --out DIR."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence

from data.worlds import spatial_navigation as navigation
from data.worlds.writer import write_spatial_navigation
from modeling.host.programs import SEED, number, path_argument, run_main


def _sizes(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of sizes such as 3,4") from None


def build_parser() -> argparse.ArgumentParser:
    """All flags of `python -m data.worlds`."""
    parser = argparse.ArgumentParser(
        prog="python -m data.worlds",
        description="Write a generated world as parquet files in ThinkMorph's schema.",
    )
    worlds = parser.add_subparsers(dest="world", required=True)
    maze = worlds.add_parser(
        navigation.WORLD, help="FrozenLake mazes; the visual thought is the maze with its path"
    )
    rows = number(int, at_least=0, at_most=10**8)
    maze.add_argument("--rows", type=rows, required=True, help="training rows")
    maze.add_argument(
        "--heldout-rows", "--heldout_rows", type=rows, help="held-out rows (default: rows / 5)"
    )
    maze.add_argument(
        "--out",
        type=path_argument,
        required=True,
        help="data root; files go to OUT/Spatial_Navigation",
    )
    maze.add_argument("--seed", type=SEED, default=0)
    maze.add_argument("--sizes", type=_sizes, default=(3, 4), help="board sides (default 3,4)")
    maze.add_argument(
        "--cell",
        type=number(int, at_least=1, at_most=1024),
        default=14,
        help="pixels per cell (default 14)",
    )
    maze.add_argument(
        "--style",
        choices=navigation.STYLES,
        default="lite",
        help="lite: few tokens, for the miniature; full: prose, for real models",
    )
    maze.add_argument("--overwrite", action="store_true", help="replace a world written before")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code. Raises ValueError for a user's mistake."""
    args = build_parser().parse_args(argv)
    started = time.perf_counter()
    heldout = args.rows // 5 if args.heldout_rows is None else args.heldout_rows
    folder = write_spatial_navigation(
        args.out,
        rows=args.rows,
        heldout_rows=heldout,
        seed=args.seed,
        sizes=args.sizes,
        cell=args.cell,
        style=args.style,
        overwrite=args.overwrite,
        progress=sys.stderr.isatty(),
    )
    stamp = json.loads((folder / "world.json").read_text())
    for split, shares in stamp["rows_per_size"].items():
        listed = ", ".join(f"{count} of {size}x{size}" for size, count in shares.items())
        print(f"{split}: {sum(shares.values())} rows ({listed})")
    print(f"wrote {folder} in {time.perf_counter() - started:.1f} s")
    return 0


if __name__ == "__main__":
    run_main(main)
