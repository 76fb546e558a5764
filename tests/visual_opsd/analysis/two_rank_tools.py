# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""One of two processes: tools one after the other, and who did which row.

two_rank_tools.py CALLS OUT: CALLS maps modules to flags (JSON). OUT gets, by kind of record and
for what the diagnostic samples and measures, the rows that this process did.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.visual_opsd import kl_diagnostic
from scripts.visual_opsd.evaluation.store import RankedLines

done: dict[str, list[int]] = defaultdict(list)
append = RankedLines.append
sample, measure = kl_diagnostic.sample_completions, kl_diagnostic.measure


def counted_append(self: RankedLines, rank: int, records: Iterable[Mapping[str, Any]]) -> None:
    records = list(records)
    done[self.name] += [record["index"] for record in records]
    append(self, rank, records)


def counted_sample(model: Any, contexts: Any, rows: Sequence[int], **options: Any) -> Any:
    done["sampled"] += rows
    return sample(model, contexts, rows, **options)


def counted_measure(teacher: Any, students: Any, scored: Sequence[Any], **options: Any) -> Any:
    done["measured"] += [one.index for one in scored]
    return measure(teacher, students, scored, **options)


if __name__ == "__main__":
    RankedLines.append = counted_append  # type: ignore[method-assign]
    diagnostic: Any = kl_diagnostic
    diagnostic.sample_completions = counted_sample
    diagnostic.measure = counted_measure
    for module, flags in json.loads(sys.argv[1]).items():
        importlib.import_module(f"scripts.visual_opsd.{module}").main(flags)
    Path(sys.argv[2]).write_text(json.dumps(done))
