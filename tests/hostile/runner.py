# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Tries one input on one command, in a process of its own, and says what came of it.

The process is forked from this one, which has everything imported: a case takes a fraction of a
second, and a crash, a leak or a changed working directory ends with it. The command runs as its
entry point does (`run_main`); its address space is bounded.
"""

from __future__ import annotations

import os
import re
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

# Beyond what the process holds at its start.
MEMORY_LIMIT = 4 << 30  # of addresses: an absurd request fails at once
RESIDENT_LIMIT = 1 << 30  # of memory in use: more is a verdict
SECONDS_LIMIT = 30.0
CANARY = "canary"  # no input may make, change or remove this file beside its folder

# Says what is wrong with an accepted result; None if nothing is.
Judge = Callable[[str, Path], str | None]


@dataclass(frozen=True)
class Case:
    """One input.

    make: writes the input into an empty folder and returns the command's arguments.
    program: name in `programs.PROGRAMS`. expect: "refuse", "accept" or "any" of the two.
    names: one of these words must stand in a refusal. right: judges what was accepted.
    """

    kind: str
    name: str
    make: Callable[[Path], Sequence[str]]
    program: str
    expect: str = "any"
    names: tuple[str, ...] = ()
    right: Judge | None = None

    def __str__(self) -> str:
        return f"{self.kind}: {self.name}"


@dataclass(frozen=True)
class Outcome:
    """What came of a case; `fault` is None if the command did what it must."""

    case: Case
    fault: str | None
    accepted: bool
    output: str
    seconds: float
    resident: int  # bytes beyond those at the start


def attempt(case: Case, folder: Path, main: Callable[[Sequence[str]], int | None]) -> Outcome:
    """Try a case; `folder` must be empty."""
    inputs = folder / "inputs"
    inputs.mkdir(parents=True)
    (folder / CANARY).write_text("alive")
    read_end, write_end = os.pipe()
    started = time.monotonic()
    sys.stdout.flush()
    sys.stderr.flush()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    child = os.fork()
    if child == 0:
        os.close(read_end)
        _run_child(case, inputs, main, write_end)
    os.close(write_end)
    text, in_time = _read(read_end, child, started)
    _, status, usage = os.wait4(child, 0)
    code = os.waitstatus_to_exitcode(status)
    resident = max(0, usage.ru_maxrss - before) * 1024
    fault = _judge(case, folder, code, text, in_time, resident)
    return Outcome(case, fault, code == 0, text, time.monotonic() - started, resident)


def _run_child(
    case: Case, folder: Path, main: Callable[[Sequence[str]], int | None], output: int
) -> None:
    """Never returns."""
    code = 99
    try:
        os.setsid()
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout = os.fdopen(1, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
        arguments = [str(argument) for argument in case.make(folder)]
        addresses = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")
        resource.setrlimit(resource.RLIMIT_AS, (addresses + MEMORY_LIMIT,) * 2)
        from scripts.visual_opsd.cli import run_main

        run_main(lambda: main(arguments))
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
        if isinstance(leaving.code, str):
            print(leaving.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 98
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _read(stream: int, child: int, started: float) -> tuple[str, bool]:
    parts, in_time = [], True
    with os.fdopen(stream, "rb") as pipe:
        while True:
            left = started + SECONDS_LIMIT - time.monotonic()
            ready = select.select([pipe], [], [], max(0.0, left))[0]
            if not ready:
                os.killpg(child, signal.SIGKILL)
                in_time = False
                break
            part = os.read(pipe.fileno(), 1 << 16)
            if not part:
                break
            parts.append(part)
    return b"".join(parts).decode("utf-8", "replace"), in_time


def _judge(
    case: Case, folder: Path, code: int, text: str, in_time: bool, resident: int
) -> str | None:
    if not in_time:
        return f"took more than {SECONDS_LIMIT:.0f} s"
    canary = folder / CANARY
    if not canary.is_file() or canary.read_text() != "alive" or len(list(folder.iterdir())) != 2:
        return "reached outside its folder"
    if "Traceback (most recent call last)" in text or code not in (0, 1, 2):
        return f"a traceback or crash (exit code {code})"
    if resident > RESIDENT_LIMIT:
        return f"took {resident / 2**30:.1f} GiB"
    if code == 0:
        if case.expect == "refuse":
            return "accepted"
        return case.right(text, folder / "inputs") if case.right else None
    if case.expect == "accept":
        return f"refused: {text.strip()[-300:]}"
    errors = [line for line in text.splitlines() if re.search(r"(^|: )error: ", line)]
    if not errors and "ERROR" not in text:
        return f"exit code {code} without an error line"
    if case.names and not any(word in text for word in case.names):
        return f"the refusal names none of {case.names}: {text.strip()[-300:]}"
    return None
