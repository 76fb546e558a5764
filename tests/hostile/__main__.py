# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""python -m tests.hostile [--kind NAME] [--only TEXT] [--every N]: try the inputs, print totals.

`--write docs/reliability.md` puts the totals of all inputs between the document's marks.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
        folder = scratch / str(number)
        yield attempt(case, folder, PROGRAMS[case.program])
        shutil.rmtree(folder)


COLUMNS = ("tried", "right", "refused", "faults", "slowest, ms", "largest, MB")
_PLACE = re.compile(r"(<!-- hostile totals -->\n).*?(<!-- end -->)", re.DOTALL)


def table(kinds: Mapping[str, Counter[str]]) -> str:
    lines = ["| kind | " + " | ".join(COLUMNS) + " |", "|" + " --- |" * (len(COLUMNS) + 1)]
    total: Counter[str] = Counter()
    for kind, counts in kinds.items():
        lines.append(f"| {kind} | " + " | ".join(str(counts[name]) for name in COLUMNS) + " |")
        for name in COLUMNS:
            counted = "," not in name
            total[name] = total[name] + counts[name] if counted else max(total[name], counts[name])
    lines.append("| **all** | " + " | ".join(f"**{total[name]}**" for name in COLUMNS) + " |")
    return "\n".join(lines) + "\n"


def write_table(document: Path, text: str) -> None:
    old = document.read_text(encoding="utf-8")
    new, places = _PLACE.subn(lambda found: found[1] + text + found[2], old)
    if places != 1:
        raise ValueError(f"{document} has {places} places for the totals, <!-- hostile totals -->")
    document.write_text(new, encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.hostile", description=__doc__)
    parser.add_argument("--kind", help="only cases of this kind")
    parser.add_argument("--only", help="only cases whose name holds this text")
    parser.add_argument("--every", type=int, default=1, help="only every nth case")
    parser.add_argument("--show", action="store_true", help="print what each command printed")
    parser.add_argument("--write", type=Path, help="also into this document, between its marks")
    options = parser.parse_args(argv)
    if options.write is not None and (options.kind or options.only or options.every > 1):
        parser.error("--write is for the totals of all inputs")
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
    text = table(kinds)
    print(text, end="")
    if options.write is not None:
        write_table(options.write, text)
    return int(any(counts["faults"] for counts in kinds.values()))


if __name__ == "__main__":
    sys.exit(main())
