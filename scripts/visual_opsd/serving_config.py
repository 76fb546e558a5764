# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Give a release folder the config.json and preprocessor_config.json that serving code reads.

    python -m scripts.visual_opsd.serving_config models/BAGEL-7B-MoT

Saved checkpoints have both. This mends a folder from elsewhere or from before: a file that is
absent, is no JSON (as in early snapshots of BAGEL-7B-MoT) or contradicts the weights is replaced,
each in one step; one that agrees with them is kept. Nothing else is touched. EVAL.md says what
other programs make of such a folder.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from modeling.host.disk import disk_errors, replace_file
from modeling.host.programs import path_argument, run_main
from modeling.release.checkpoint import is_generation_key, locate_weights
from modeling.release.serving_config import ServingFile, serving_files
from modeling.release.weight_files import open_weights


def mend(folder: Path) -> list[ServingFile]:
    """Write what a folder lacks of the two files; returns both, with what was wrong with them.

    Raises:
        ValueError: it is no complete release (`locate_weights`), or cannot be written to. What
            it held is still there then.
    """
    draws = any(is_generation_key(key) for key in open_weights(folder))
    config, _ = locate_weights(folder, visual_gen=draws)
    files = serving_files(folder, config)
    with disk_errors(f"writing to {folder}", folder):
        for file in files:
            if file.problem is not None:
                replace_file(folder / file.name, file.content)
    return files


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.visual_opsd.serving_config",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=path_argument, help="a release folder, such as a checkpoint")
    folder = Path(parser.parse_args(argv).folder)
    for file in mend(folder):
        what = "kept as it is" if file.problem is None else f"written; {file.problem}"
        print(f"{folder / file.name}: {what}")
    return 0


if __name__ == "__main__":
    run_main(main)
