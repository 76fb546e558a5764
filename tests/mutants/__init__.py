# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Faults such as a skilled but careless engineer makes, and which tests must notice each.

One table an area stands in a file of its own beside this one; `python -m tests.mutants` plants
them (`__main__`). A fault is a piece of text that stands exactly once in a file, and what replaces
it; `tests/test_mutants.py` checks that it still does, so that the tables keep up with the code.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).parents[2]
AREAS = (
    "data",
    "model",
    "loss",
    "trainer",
    "checkpoint",
    "evaluation",
    "launcher",
    "demo",
    "report",
)


@dataclass(frozen=True)
class Fault:
    """One fault: in `file`, `old` becomes `new`.

    tests: what could notice it, as pytest takes it (files, or file::test), below tests/.
    """

    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def planted(self, text: str) -> str:
        """The file's text with the fault in it.

        Raises:
            ValueError: `old` does not stand in it exactly once, or the result is no Python.
        """
        count = text.count(self.old)
        if count != 1 or self.old == self.new:
            raise ValueError(f"{self.file}: {self.what}: its text stands {count} times in the file")
        changed = text.replace(self.old, self.new)
        if self.file.endswith(".py"):
            try:
                ast.parse(changed)
            except SyntaxError as error:
                raise ValueError(f"{self.file}: {self.what}: no Python any more: {error}") from None
        return changed


def faults(file: str, tests: str, rows: Sequence[tuple[str, ...]]) -> list[Fault]:
    """Faults of one file: (what, old, new), and a fourth item for one that other tests notice."""
    return [
        Fault(what, file, old, new, tuple((other[0] if other else tests).split()))
        for what, old, new, *other in rows
    ]


def table(area: str) -> list[Fault]:
    """The faults of an area."""
    found: list[Fault] = import_module(f"tests.mutants.{area}").FAULTS
    return found
