# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The benchmarks run on any machine, and their report and table hold what they promise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts.bench import all as bench
from scripts.bench import decode, load

FIELDS = {"median", "spread", "floor", "ratio", "target", "reference", "settings"}


def test_tiny_versions_of_all_of_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "report.json"
    assert bench.main(["--tiny", "--device", "cpu", "--repeats", "1", "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    assert report["results"].keys() == bench.NAMES.keys()
    for key, entry in report["results"].items():
        assert entry.keys() == FIELDS, key
        assert entry["median"] > 0 or key.endswith("_gb"), key  # no GPU, no GPU memory
        assert entry["target"] is None and entry["reference"] is None
    assert report["tiny"] and report["hardware"] == "cpu"
    assert set(report["ceilings"]) == set(bench.PARTS)
    notes = report["notes"]
    assert notes["greedy_agreement"]["rows_that_part"] == 0  # one path on a CPU
    assert notes["vt512"]["from_the_eager_path"]["worst"] == 0
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith("| ")]) == len(bench.NAMES) + 1


def test_the_table_says_what_was_missed() -> None:
    entry = dict.fromkeys(FIELDS, 1.0) | {"median": 3.0, "target": 2.5, "reference": None}
    table = bench.table({"vt512_s": entry, "load_s": entry | {"median": 2.0}})
    assert "| visual thought of 512 x 512, s | 3 (missed) | 1 | 1 | 1 | 2.5 | - |" in table
    assert "| loading 16.1 GB of weights, s | **2** |" in table


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the true size needs a GPU"):
        decode.main(["--device", "cpu"])
    with pytest.raises(ValueError, match="repeats must be at least 1"):
        load.main(["--tiny", "--device", "cpu", "--repeats", "0"])
    with pytest.raises(ValueError, match=r"scripts\.bench\.decode ended with code"):
        bench.main(["--only", "decode", "--device", "cpu"])
