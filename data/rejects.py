# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Rows that could not be used: what is known of each, their log, and how many are too many."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data.json_lines import append_records, filter_log
from modeling.host.disk import disk_errors


@dataclass(frozen=True)
class Reject:
    """One rejected row; `row` counts inside `file`, step and slot are -1 outside training."""

    dataset: str
    file: str
    row: int
    reason: str
    detail: str
    step: int = -1
    slot: int = -1


def summarise(rejects: Iterable[Reject], show: int = 3) -> str:
    """ "2 broken_image (for instance FILE row 7: ...), 1 missing_answer (...)"."""
    groups: dict[str, list[Reject]] = {}
    for reject in rejects:
        groups.setdefault(reject.reason, []).append(reject)
    parts = []
    for reason, members in sorted(groups.items(), key=lambda item: -len(item[1])):
        places = "; ".join(f"{r.file} row {r.row}: {r.detail}" for r in members[:show])
        parts.append(f"{len(members)} {reason} ({places})")
    return ", ".join(parts)


class RejectLedger:
    """Counts rows read and rejected over a run and refuses to go on above a rate.

    Feed it with the totals of *all* ranks, on every rank, so that all stop at the same step; give
    `path` on one rank only (None elsewhere). A row read again in a later epoch counts again.
    """

    def __init__(
        self, path: str | Path | None = None, *, max_rate: float = 0.01, check_from: int = 200
    ) -> None:
        if not 0 <= max_rate <= 1:
            raise ValueError(f"the rate of bad rows must lie in [0, 1], found {max_rate}")
        self.path = None if path is None else Path(path)
        self.max_rate, self.check_from = max_rate, check_from
        self.rows_read = 0
        self.reasons: Counter[str] = Counter()

    @property
    def rejected(self) -> int:
        return self.reasons.total()

    def record(self, rows_read: int, rejects: Iterable[Reject]) -> None:
        """Add one step: rows read (accepted and rejected) and the rejects among them.

        Raises ValueError once at least `check_from` rows were read and more than `max_rate` of
        them were rejected; the rejects of the step are on file by then.
        """
        rejects = list(rejects)
        assert rows_read >= len(rejects), (rows_read, len(rejects))
        self.rows_read += rows_read
        self.reasons.update(reject.reason for reject in rejects)
        if self.path is not None and rejects:
            with disk_errors(f"writing {self.path}", self.path.parent):
                self.path.parent.mkdir(parents=True, exist_ok=True)
            append_records(self.path, map(asdict, rejects))
        if self.rows_read >= self.check_from and self.rejected > self.max_rate * self.rows_read:
            counts = ", ".join(f"{count} {reason}" for reason, count in self.reasons.most_common())
            latest = f" Latest: {summarise(rejects, show=1)}." if rejects else ""
            raise ValueError(
                f"{self.rejected} of {self.rows_read} rows read were rejected ({counts}), more "
                f"than the allowed {self.max_rate:.2%}.{latest} They are listed in "
                f"{self.path or 'bad_rows.jsonl'}; repair the data (`python -m data.check` shows "
                "it as a whole) or raise the allowed rate."
            )

    def state_dict(self) -> dict[str, Any]:
        return {"rows_read": self.rows_read, "reasons": dict(self.reasons)}

    def resume(self, state: dict[str, Any], step: int) -> None:
        """Continue before `step`: counts from `state`, later lines of the log file dropped."""
        self.rows_read = int(state["rows_read"])
        self.reasons = Counter({str(k): int(v) for k, v in state["reasons"].items()})
        if self.path is not None:
            filter_log(self.path, lambda record: bool(record["step"] < step))
