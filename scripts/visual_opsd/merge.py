# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""A release folder from an adapter and the release it was trained on.

    python -m scripts.visual_opsd.merge ADAPTER BASE OUT

OUT has the base's dtype and files and is read like any release: by `evaluate`, as `--model_path` of
a further training, by VLMEvalKit. ADAPTER is a folder in the format of the peft package.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from modeling.host.programs import path_argument
from modeling.release.adapters import merge_adapter
from scripts.visual_opsd.cli import run_main


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description="A release folder from an adapter and the release it was trained on."
    )
    add = parser.add_argument
    add("adapter", metavar="ADAPTER", type=path_argument, help="folder with adapter_config.json")
    add("base", metavar="BASE", type=path_argument, help="release folder it was trained on")
    add("out", metavar="OUT", type=path_argument, help="folder to write, which must not exist")
    given = parser.parse_args(argv)
    out = Path(given.out)
    if out.exists():
        raise ValueError(f"OUT {out} exists already; choose another folder")
    print(merge_adapter(given.adapter, given.base, out))
    return 0


if __name__ == "__main__":
    run_main(main)
