# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Save a checkpoint in a process of its own and print how many bytes of memory that took more.

    python -m tests.modeling.release.saving_memory BASE OUT ROWS COUNT

BASE holds tensors big.0 to big.COUNT-1 of (ROWS, 64); those of even number are replaced by fp32
ones. Anonymous memory counts, pages of mapped files do not.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch

from modeling import save_bagel
from scripts.bench.load import MemoryWatch


def main(base: Path, out: Path, rows: int, count: int) -> int:
    trained = ((f"big.{i}", torch.full((rows, 64), -float(i))) for i in range(0, count, 2))
    with MemoryWatch(every_s=0.001) as memory:
        save_bagel(trained, out, base=base)
    return memory.peak - memory.before


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    base, out, rows, count = sys.argv[1:]
    print(main(Path(base), Path(out), int(rows), int(count)))
