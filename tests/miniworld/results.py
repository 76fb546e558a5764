# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""What an evaluation leaves behind, written at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_evaluation(out: Path, right: int, rows: int) -> None:
    """The first `right` of the rows are answered well."""
    where = {"dataset": "w", "file": "f", "digest": "d"}
    lines = [{**where, "row": i, "pid": str(i), "correct": i < right} for i in range(rows)]
    out.mkdir(parents=True)
    (out / "predictions.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    write(out / "summary.json", {"accuracy": right / rows, "interval": [0.1, 0.9], "n": rows})
