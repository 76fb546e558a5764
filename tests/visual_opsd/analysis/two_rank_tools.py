# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""One of two processes: tools one after the other, and who did which row.

two_rank_tools.py CALLS OUT: CALLS maps modules to flags (JSON). OUT gets the rows that this process
did, by "MODULE RECORDS", and what the diagnostic "sampled" and "measured".
"""

from __future__ import annotations

import importlib
import json
import socket
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.visual_opsd.analysis import diagnosis
from scripts.visual_opsd.evaluation.store import RankedLines
from tests.visual_opsd.launching import HERE, program_environment


def two_ranks(
    calls: Mapping[str, list[str]],
    done: Path,
    local_ranks: tuple[int, int] = (0, 1),
    **environment: str,
) -> tuple[list[int], list[str]]:
    """One launch of two ranks as torchrun would start them: their exit codes and outputs.

    done: stem of the files in which they say which rows they did.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**program_environment(), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
              "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **environment}  # fmt: skip
    program = HERE / "analysis" / "two_rank_tools.py"
    started = [
        subprocess.Popen(
            [sys.executable, program, json.dumps(calls), f"{done}-{rank}"],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(local_rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank, local_rank in enumerate(local_ranks)
    ]
    try:
        outputs = [process.communicate(timeout=150)[0].decode() for process in started]
    finally:
        for process in started:
            process.kill()
    return [process.returncode for process in started], outputs


def run_counted(calls: Mapping[str, list[str]]) -> dict[str, list[int]]:
    """Run tools; which rows were done."""
    done: dict[str, list[int]] = defaultdict(list)
    append = RankedLines.append
    sample, measure = diagnosis.sample_completions, diagnosis.measure
    module = ""

    def counted_append(self: Any, rank: int, records: Iterable[Mapping[str, Any]]) -> None:
        records = list(records)
        done[f"{module} {self.name}"] += [record["index"] for record in records]
        append(self, rank, records)

    def counted_sample(model: Any, contexts: Any, rows: Sequence[int], **options: Any) -> Any:
        done["sampled"] += rows
        return sample(model, contexts, rows, **options)

    def counted_measure(teacher: Any, students: Any, scored: Any, **options: Any) -> Any:
        done["measured"] += [one.index for one in scored]
        return measure(teacher, students, scored, **options)

    RankedLines.append = counted_append  # type: ignore[method-assign]
    tool: Any = diagnosis
    tool.sample_completions, tool.measure = counted_sample, counted_measure
    for module, flags in calls.items():
        importlib.import_module(f"scripts.visual_opsd.{module}").main(flags)
    return done


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(run_counted(json.loads(sys.argv[1]))))
