# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The tables of planted faults keep up with the code, and the tool that plants them works."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.mutants import AREAS, ROOT, Fault, table
from tests.mutants import __main__ as tool


@pytest.mark.parametrize("area", AREAS)
def test_every_fault_still_applies(area: str) -> None:
    """Its text stands once in the code, the result is Python, and its tests exist."""
    texts: dict[str, str] = {}
    problems, seen = [], set()
    for fault in table(area):
        file = ROOT / fault.file
        text = texts.setdefault(fault.file, file.read_text(encoding="utf-8"))
        try:
            fault.planted(text)
        except ValueError as error:
            problems.append(str(error))
        if not fault.tests:
            problems.append(f"{fault.what}: no test")
        for test in fault.tests:
            name, _, function = test.partition("::")
            path = ROOT / "tests" / name
            here = path.is_file() and re.search(rf"^def {function}\(", path.read_text(), re.M)
            if not (here if function else path.is_file()):
                problems.append(f"{fault.what}: no test {test}")
        seen.add((fault.file, fault.what))
    assert problems == []
    assert len(seen) == len(table(area)), "two faults of a file have one name"


def test_there_are_enough_of_them() -> None:
    assert sum(len(table(area)) for area in AREAS) >= 150


@pytest.mark.parametrize("noticed", [True, False])
def test_a_fault_is_planted_and_taken_out_again(tmp_path: Path, noticed: bool) -> None:
    (tmp_path / "tests").mkdir()
    code = tmp_path / "planted.py"
    code.write_text("ONE = 1\nTWO = 2\n")
    (tmp_path / "tests" / "test_code.py").write_text(
        "import planted\n\n\ndef test_one() -> None:\n    assert planted.ONE == 1\n"
    )
    old, new = ("ONE = 1", "ONE = 3") if noticed else ("TWO = 2", "TWO = 3")
    (outcome,) = tool.plant_all(
        [tmp_path], [("area", Fault("another", "planted.py", old, new, ("test_code.py",)))]
    )
    assert bool(outcome.noticed_by) == noticed
    assert code.read_text() == "ONE = 1\nTWO = 2\n"
    said = tool.report([outcome], 1.0)
    assert ("SURVIVED planted.py: another" in said) != noticed


def test_a_list_that_is_out_of_date_ends_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = Fault("gone", "README.md", "this text is not there", "", ("test_docs.py",))
    monkeypatch.setattr(tool, "table", lambda area: [gone])
    assert tool.main(["--only", "data"]) == 1
    assert "its text stands 0 times" in capsys.readouterr().err
