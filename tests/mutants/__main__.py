# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Plant the faults of the tables one at a time, and say which ones no test notices.

    python -m tests.mutants [--only AREA] [--jobs N]

Each is planted in a temporary copy of the working tree, never in the tree itself, and only the
tests that its table names are run on it. First they all run on the copy as it is: a test that
fails anyway notices nothing. Exit code 1 if a fault survives or its text is gone, 2 if a test fails
without any fault.
"""

from __future__ import annotations

import argparse
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.mutants import AREAS, ROOT, Fault, table

TIMEOUT_S = 900.0  # of the tests of one fault; one that makes them hang is noticed


@dataclass(frozen=True)
class Outcome:
    """What the tests said of a fault: the first that failed, "" if none did."""

    area: str
    fault: Fault
    noticed_by: str
    seconds: float


def copy_tree(target: Path) -> Path:
    """What git knows of the working tree, changes included, and the virtual environment."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout.decode()
    for name in names.split("\0"):
        if name and os.path.lexists(ROOT / name):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name, follow_symlinks=False)
    if (ROOT / ".venv").exists() and not (target / ".venv").exists():
        (target / ".venv").symlink_to((ROOT / ".venv").resolve())
    return target


def run_tests(tree: Path, tests: Sequence[str]) -> tuple[int, str]:
    """Exit code of pytest, stopped at the first failure, and that failure."""
    paths = [f"tests/{test}" for test in tests]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *paths]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tree)}
    process = subprocess.Popen(
        command, cwd=tree, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace", start_new_session=True,
    )  # fmt: skip
    try:
        said, _ = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return 1, f"no end within {TIMEOUT_S:.0f} s"
    failed = [x for x in said.splitlines() if x.startswith(("FAILED tests/", "ERROR tests/"))]
    return process.returncode, failed[0] if failed else said[-2000:]


def forget_bytecode(file: Path) -> None:
    """Python would take the old one for a file of the same size that changed in this second."""
    for compiled in (file.parent / "__pycache__").glob(f"{file.stem}.*.pyc"):
        compiled.unlink()


def plant(tree: Path, area: str, fault: Fault) -> Outcome:
    """Run the fault's tests on a tree that holds it, and take it out again.

    They pass without it, so that any other end of pytest is its doing.
    """
    file = tree / fault.file
    text = file.read_text(encoding="utf-8")
    started = time.monotonic()
    try:
        file.write_text(fault.planted(text), encoding="utf-8")
        forget_bytecode(file)
        code, said = run_tests(tree, fault.tests)
    finally:
        file.write_text(text, encoding="utf-8")
        forget_bytecode(file)
    return Outcome(area, fault, said if code else "", time.monotonic() - started)


def check_sound(trees: Sequence[Path], tests: Sequence[str]) -> str:
    """The first failure of the tests on trees without a fault, "" if they pass."""
    shares = [tests[n :: len(trees)] for n in range(len(trees))]
    with ThreadPoolExecutor(len(trees)) as pool:
        results = pool.map(lambda pair: run_tests(*pair) if pair[1] else (0, ""),
                           zip(trees, shares, strict=True))  # fmt: skip
        return next((said for code, said in results if code), "")


def plant_all(trees: Sequence[Path], chosen: Sequence[tuple[str, Fault]]) -> list[Outcome]:
    """All faults, as many at a time as there are trees; a line for each when it is known."""
    free: queue.SimpleQueue[Path] = queue.SimpleQueue()
    for tree in trees:
        free.put(tree)

    def work(pair: tuple[str, Fault]) -> Outcome:
        tree = free.get()
        try:
            found = plant(tree, *pair)
        finally:
            free.put(tree)
        verdict = "noticed " if found.noticed_by else "SURVIVED"
        by = found.noticed_by.split(" - ")[0].removeprefix("FAILED ")[:120]
        print(f"{verdict} {found.seconds:4.0f} s  {found.fault.file}: {found.fault.what}  [{by}]",
              flush=True)  # fmt: skip
        return found

    with ThreadPoolExecutor(len(trees)) as pool:
        return list(pool.map(work, chosen))


def report(outcomes: Sequence[Outcome], seconds: float) -> str:
    """Figures of each area, and the survivors."""
    lines = [f"{'area':12}{'planted':>8}{'noticed':>9}"]
    for area in dict.fromkeys(outcome.area for outcome in outcomes):
        own = [outcome for outcome in outcomes if outcome.area == area]
        lines.append(f"{area:12}{len(own):>8}{sum(bool(o.noticed_by) for o in own):>9}")
    lines.append(f"{'all':12}{len(outcomes):>8}{sum(bool(o.noticed_by) for o in outcomes):>9}"
                 f"  in {seconds:.0f} s")  # fmt: skip
    for outcome in outcomes:
        if not outcome.noticed_by:
            fault = outcome.fault
            lines.append(f"SURVIVED {fault.file}: {fault.what}\n  {fault.old!r}\n  became "
                         f"{fault.new!r}\n  and these pass: {' '.join(fault.tests)}")  # fmt: skip
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutants",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", help=f"an area ({', '.join(AREAS)}), or a part of a file's path")
    parser.add_argument("--jobs", type=int, default=1, help="faults tried at the same time")
    args = parser.parse_args(argv)
    every = [(area, fault) for area in AREAS for fault in table(area)]
    chosen = [(a, f) for a, f in every if args.only in (None, a) or args.only in f.file]
    try:
        for _, fault in chosen:
            fault.planted((ROOT / fault.file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if not chosen or args.jobs < 1:
        print("error: there is no such area or file, or --jobs is no number from 1",
              file=sys.stderr)  # fmt: skip
        return 2
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        trees = [copy_tree(Path(folder) / str(n)) for n in range(min(args.jobs, len(chosen)))]
        failure = check_sound(trees, sorted({test for _, f in chosen for test in f.tests}))
        if failure:
            print(f"error: without any fault a test fails: {failure}", file=sys.stderr)
            return 2
        outcomes = plant_all(trees, chosen)
    print(report(outcomes, time.monotonic() - started))
    return 0 if all(outcome.noticed_by for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
