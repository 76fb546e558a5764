# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""A sample of the hostile inputs; `make soak` tries all of them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.hostile.__main__ import all_cases
from tests.hostile.programs import PROGRAMS
from tests.hostile.runner import Case, attempt

CASES = all_cases()
EVERY = int(os.environ.get("HOSTILE_EVERY", "24"))


def test_there_are_enough_of_every_kind() -> None:
    kinds = {case.kind for case in CASES}
    assert kinds == {"parquet", "image", "tsv", "release", "yaml", "flag"}
    assert all(sum(case.kind == kind for case in CASES) >= 100 for kind in kinds)
    assert len({str(case) for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES[::EVERY], ids=str)
def test_refused_in_a_line_or_right(case: Case, tmp_path: Path) -> None:
    outcome = attempt(case, tmp_path / "case", PROGRAMS[case.program])
    assert outcome.fault is None, f"{outcome.fault}\n{outcome.output[-3000:]}"


def _guard(name: str, tmp_path: Path, main) -> str | None:
    case = Case("guard", name, lambda folder: [], "none", "refuse", ("file.x",))
    return attempt(case, tmp_path / "case", main).fault


def _raise(error: BaseException):
    def main(argv) -> int:
        raise error

    return main


@pytest.mark.parametrize(
    "main, fault",
    [
        (_raise(ValueError("file.x is bad")), None),
        (_raise(ValueError("something is bad")), "names none of"),
        (_raise(TypeError("file.x")), "a traceback or crash"),
        (lambda argv: 0, "accepted"),
        (lambda argv: 1, "without an error line"),
        (lambda argv: os.kill(os.getpid(), 9), "a traceback or crash"),
        (lambda argv: Path(os.environ["HOSTILE_TEST_PLACE"]).write_text("x") and 1, "reached"),
        (lambda argv: len(bytes(8 << 30)) and 1, "a traceback or crash"),
    ],
)
def test_the_judge_itself(main, fault: str | None, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOSTILE_TEST_PLACE", str(tmp_path / "case" / "escaped"))
    found = _guard("x", tmp_path, main)
    assert (found is None) if fault is None else (fault in (found or ""))
