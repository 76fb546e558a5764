# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""python -m tests.hostile [--kind NAME] [--only TEXT] [--every N]: try the inputs, print totals."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from tqdm import tqdm

from tests.hostile import flag_cases, folder_cases, image_cases, parquet_cases, tsv_cases
from tests.hostile.programs import PROGRAMS
from tests.hostile.runner import Case, Outcome, attempt

SOURCES = (parquet_cases, image_cases, tsv_cases, folder_cases, flag_cases)


def all_cases() -> list[Case]:
    return [case for source in SOURCES for case in source.cases()]


def try_all(cases: Iterable[Case], scratch: Path) -> Iterator[Outcome]:
    for number, case in enumerate(cases):
        yield attempt(case, scratch / str(number), PROGRAMS[case.program])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.hostile", description=__doc__)
    parser.add_argument("--kind", help="only cases of this kind")
    parser.add_argument("--only", help="only cases whose name holds this text")
    parser.add_argument("--every", type=int, default=1, help="only every nth case")
    parser.add_argument("--show", action="store_true", help="print what each command printed")
    options = parser.parse_args()
    cases = [c for c in all_cases() if options.kind in (None, c.kind)]
    cases = [c for c in cases if options.only is None or options.only in c.name]
    kinds: dict[str, Counter[str]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        chosen = cases[:: options.every]
        for outcome in tqdm(try_all(chosen, Path(scratch)), total=len(chosen), unit="case"):
            counts = kinds.setdefault(outcome.case.kind, Counter())
            counts["tried"] += 1
            counts["refused"] += not outcome.accepted and outcome.fault is None
            counts["right"] += outcome.accepted and outcome.fault is None
            counts["faults"] += outcome.fault is not None
            counts["slowest, ms"] = max(counts["slowest, ms"], int(outcome.seconds * 1000))
            counts["largest, MB"] = max(counts["largest, MB"], outcome.resident >> 20)
            if outcome.fault is not None or options.show:
                tqdm.write(f"{outcome.case}: {outcome.fault}")
            if options.show or (outcome.fault or "").startswith("a traceback"):
                tqdm.write("    " + "\n    ".join(outcome.output.strip().splitlines()[-12:]))
    columns = ("tried", "right", "refused", "faults", "slowest, ms", "largest, MB")
    print("| kind | " + " | ".join(columns) + " |\n|" + " --- |" * (len(columns) + 1))
    for kind, counts in kinds.items():
        print(f"| {kind} | " + " | ".join(str(counts[name]) for name in columns) + " |")
    return int(any(counts["faults"] for counts in kinds.values()))


if __name__ == "__main__":
    sys.exit(main())
