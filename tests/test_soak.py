# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The judges of `make soak` see what they are there for."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from scripts.visual_opsd.training.trainer import Trainer
from tests import soak
from tests.hostile import __main__ as hostile
from tests.soak import Look, fingerprint, growing, growth
from tests.visual_opsd.training.trainers import train


def looks(**slopes: float) -> list[Look]:
    """Figures that jump up and down, with an outlier, and grow by `slopes` a step."""
    found = []
    for number in range(20):
        level = {"memory": 300.0, "handles": 16.0, "threads": 6.0, "seconds": 0.06, "logged": 2e3}
        for name in level:
            level[name] += slopes.get(name, 0) * 100 * number
        level["memory"] += 3 * (-1) ** number + 90 * (number == 11)
        level["seconds"] *= 1 + 0.05 * (-1) ** number
        found.append(Look(100 * (number + 1), **level))
    return found


def test_growth_is_a_median_slope() -> None:
    assert growth([(x, 2.0 * x + 900 * (x == 3)) for x in range(10)]) == 18
    assert growth([(x, 5.0) for x in range(9)]) == 0


def test_nothing_grows() -> None:
    faults, lines = growing(looks())
    assert faults == [] and len(lines) == 5


@pytest.mark.parametrize(
    "name, slope",
    [("memory", 0.007), ("handles", 0.001), ("threads", 0.001), ("seconds", 1e-5), ("logged", 0.2)],
)
def test_what_grows_is_named(name: str, slope: float) -> None:
    (fault,), _ = growing(looks(**{name: slope}))
    assert fault.startswith(f"{name} grows by ")


def test_a_run_opens_nothing_that_it_does_not_close(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sample of the 2,000 steps, with a state at every second one."""
    update, seen = Trainer._update, []

    def watch(self: Trainer, *args: Any) -> None:
        update(self, *args)
        found = soak.look(os.getpid(), tmp_path)
        seen.append((found["handles"], found["threads"]))

    monkeypatch.setattr(Trainer, "_update", watch)
    train(world, tmp_path, total_steps=5, save_every=2)
    handles, threads = zip(*seen[2:], strict=True)  # the last step's loader has less to do
    assert max(handles) == handles[0] and max(threads) == threads[0], seen
    assert soak.last_step(tmp_path) == 5


def test_every_file_of_a_run_counts(world: Path, tmp_path: Path) -> None:
    train(world, tmp_path / "run", total_steps=1, save_release=True)
    first = fingerprint(tmp_path / "run", 1, tmp_path)
    parts = {name.split("/")[1] for name in first if name.startswith("tensor ")}
    assert parts == {"model", "ema", "optimizer"}
    found = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    for path, data in found.items():
        if path.name in (".metadata", "complete.json") or path.name.startswith("rng_"):
            continue
        at = {"metrics.jsonl": data.find(b'"loss": ') + 10, "__0_0.distcp": len(data) // 2}
        place = at.get(path.name, len(data) - 2)
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    ours = fingerprint(tmp_path / "run", 1, tmp_path)
    files = {name for name in first if not name.startswith("tensor ")}
    names = {Path(name).name for name in files}
    assert {"samples.jsonl", "config.yaml", "trainer.pt", "__0_0.distcp", "ae.safetensors"} <= names
    changed = {name for name in first if ours[name] != first[name]}
    assert files < changed and len(changed) == len(files) + 1  # a byte of one tensor
    for path, data in found.items():
        path.write_bytes(data)
    log = tmp_path / "run" / "metrics.jsonl"
    slower = log.read_text().replace('"seconds/train": ', '"seconds/train": 9')
    assert slower != log.read_text()
    log.write_text(slower)
    assert fingerprint(tmp_path / "run", 1, tmp_path) == first


def test_totals_are_written_between_their_marks(tmp_path: Path) -> None:
    counts = [Counter({"tried": 3, "right": 3, "slowest, ms": number}) for number in range(2)]
    document = tmp_path / "page.md"
    document.write_text("x\n<!-- hostile totals -->\nold\n<!-- end -->\ny\n")
    hostile.write_table(document, hostile.table(dict(zip("ab", counts, strict=True))))
    text = document.read_text()
    assert "old" not in text and text.startswith("x\n<!-- hostile totals -->\n| kind |")
    assert "| a | 3 | 3 | 0 | 0 | 0 | 0 |\n| b | 3 | 3 | 0 | 0 | 1 | 0 |\n" in text
    total = "| **all** | **6** | **6** | **0** | **0** | **1** | **0** |\n"
    assert text.endswith(f"{total}<!-- end -->\ny\n")
    document.write_text("no marks\n")
    with pytest.raises(ValueError, match="has 0 places"):
        hostile.write_table(document, "")
    with pytest.raises(SystemExit):
        hostile.main(["--every", "2", "--write", str(document)])
