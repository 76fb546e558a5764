# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The one runner of programs that read a model over rows: rows in, records out.

A program claims its folder (`claim_folder`), then `run_rows` finds what is left to do, hands this
rank's share to the program's `work`, window by window, appends what it gives, and merges all
ranks' records. A killed run goes on with any number of ranks. Figures are the program's affair.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, closing, suppress
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from data.json_lines import write_lines
from data.rejects import Reject, summarise
from data.thinkmorph import Row
from modeling.host.memory import memory_errors
from modeling.host.programs import make_folder
from scripts.visual_opsd.cli import ROWS, SHARES, Settings, option
from scripts.visual_opsd.evaluation.rows import RowPool, Sized, read_windows
from scripts.visual_opsd.evaluation.store import RankedLines, Record, read_json, write_json
from scripts.visual_opsd.processes import DistEnv, attempt, on_main
from scripts.visual_opsd.runs.folder_lock import hold_folder
from scripts.visual_opsd.runs.identity import SETTINGS_FILE, differences, stable_hash

P = TypeVar("P", bound=Sized)
# Prepared rows with their indices -> their records, in as many parts as shall be kept one by one.
Work = Callable[[Sequence[tuple[int, P]]], Iterable[Sequence[Record]]]
_CHECK_FROM = 200  # rows, before which a share of bad ones says little


@dataclass(frozen=True)
class RowSettings(Settings):
    """Whose answers, on which rows, and where they go."""

    model_path: str = option("models/ThinkMorph-7B", "release folder", path=True)
    data: str = option(
        "Spatial_Navigation", "names below the data root, folders or parquet files, separated by "
        "commas", path="list",
    )  # fmt: skip
    split: str = option("heldout", "which files of a folder: `SPLIT-*.parquet`")
    data_root: str | None = option(
        None, "folder of the data sets, else `VISUAL_OPSD_DATA_ROOT`", path=True
    )
    limit: int | None = option(None, "only the first rows", **ROWS)
    output_dir: str = option(
        "results/eval", "where the results go; held by one run at a time (`.lock`)", path=True
    )
    overwrite: bool = option(False, "throw away results of other settings")
    max_bad_rate: float = option(
        0.01, "share of unusable rows beyond which the run fails", **SHARES
    )

    def rows_of(self, pool: RowPool) -> range:
        """Indices of the rows that are read."""
        return range(min(len(pool), self.limit or len(pool)))


@dataclass(frozen=True)
class RowLimits:
    """What is read at once, and how many rows may be unusable.

    max_rows, max_tokens: as in `read_windows`. max_bad_rate: share of all rows. good_in: where
    every row was usable before, so that one that no longer is ends the run. progress: show a bar.
    """

    max_rows: int
    max_tokens: int
    max_bad_rate: float
    progress: bool = False
    good_in: str | None = None


@dataclass(frozen=True)
class Outcome:
    """Records in the order of the rows, and the unusable rows; how many records were there
    before, and the seconds that the others took."""

    records: list[Record]
    rejects: list[Reject]
    resumed: int
    seconds: float


def claim_folder(
    folder: str | Path,
    settings: Mapping[str, Any],
    stores: Sequence[RankedLines],
    *,
    result: str,
    overwrite: bool,
) -> None:
    """Make a folder the run's: rank 0, before the first row. It is held until the process ends.

    Args:
        settings: everything the records depend on (settings.json).
        stores: what ranks append to; what killed runs left there is gathered.
        result: the file that is written last. overwrite: whether to throw away what is there.

    Raises:
        ValueError: it cannot be written to, another run holds it, or it holds a training, results
            of another command, or of other settings (named).
    """
    folder = Path(folder)
    own = [result, *(f"{store.name}.jsonl" for store in stores)]
    make_folder(folder, "--output_dir")
    hold_folder(folder, "output_dir")
    _check_stranger(folder, own)
    advice = "choose another --output_dir, or pass --overwrite to throw them away"
    if overwrite:
        for store in stores:
            store.clear()
        (folder / result).unlink(missing_ok=True)
    elif (folder / result).exists() or any(store.exists() for store in stores):
        what = f"it says what the results beside it were made with; {advice}"
        held = read_json(folder / SETTINGS_FILE, what).get("settings", {})
        different = differences(held, settings)
        if different:
            found = "; ".join(different)
            raise ValueError(f"{folder} holds results of other settings ({found}); {advice}")
    made = {"hash": stable_hash(settings), "files": own, "settings": settings}
    write_json(folder / SETTINGS_FILE, made)
    for store in stores:
        store.settle()


def _check_stranger(folder: Path, own: Sequence[str]) -> None:
    """Raises ValueError: the folder is another command's, whose settings and lists of bad rows
    ours would replace."""
    held: Sequence[str] = ["metrics.jsonl"]
    if not (folder / held[0]).exists():
        held = own  # of earlier versions, which did not say
        with suppress(ValueError):
            held = read_json(folder / SETTINGS_FILE, "").get("files", own)
    if list(held) != list(own):
        raise ValueError(
            f"{folder} holds the results of another command ({', '.join(held)}): choose another "
            "--output_dir"
        )


def run_rows(
    pool: RowPool,
    indices: Sequence[int],
    prepare: Callable[[Row], P],
    work: Work[P],
    store: RankedLines,
    env: DistEnv,
    limits: RowLimits,
) -> Outcome:
    """Bring the records of `indices` (ascending) to file: a collective; all ranks get them.

    Rows that `store` holds already are left out; unusable ones are tried again, for what kept them
    from being read may be gone. They are listed in bad_rows.jsonl.

    Args:
        work: called on a rank's rows alone, so that a rank without any need not load a model.

    Raises:
        ValueError: what `work` raises, and too many unusable rows, or none that is usable.
    """
    held = attempt(store.read)  # nobody appends before everybody has read
    done = {index for index in indices if index in held and "bad" not in held[index]}
    left = [index for index in indices if index not in done]
    mine = left[env.rank :: env.world_size]
    started = time.perf_counter()
    attempt(lambda: _work_through(pool, mine, prepare, work, store, env, limits))
    seconds = time.perf_counter() - started
    held = attempt(store.read)  # nor is anything merged before
    found = [held[index] for index in indices if index in held]
    outcome = Outcome([r for r in found if "bad" not in r], _rejects(found), len(done), seconds)

    def finish() -> None:
        store.merge(outcome.records)
        if limits.good_in is None:
            bad_rows = [asdict(reject) for reject in outcome.rejects]
            write_lines(store.folder / "bad_rows.jsonl", bad_rows)
        check_bad_rate(outcome.rejects, len(indices), limits.max_bad_rate)
        if not outcome.records:
            raise ValueError(f"no row could be used: {summarise(outcome.rejects)}")

    on_main(env, finish)
    return outcome


def _work_through(
    pool: RowPool,
    indices: Sequence[int],
    prepare: Callable[[Row], P],
    work: Work[P],
    store: RankedLines,
    env: DistEnv,
    limits: RowLimits,
) -> None:
    """One rank's rows."""
    windows = read_windows(
        pool, indices, prepare, max_rows=limits.max_rows, max_tokens=limits.max_tokens
    )
    read = 0
    rejects: list[Reject] = []
    with (
        closing(windows),
        progress_bar(len(indices), store.name, limits.progress and env.is_main) as bar,
    ):
        for window in windows:
            if window.rejects and limits.good_in is not None:
                _, reject = window.rejects[0]
                raise ValueError(
                    f"{reject.file} row {reject.row} was usable in {limits.good_in} and is not "
                    f"now: {reject.detail}"
                )
            bad = [bad_record(*pair) for pair in window.rejects]
            for records in chain([bad], work(window.rows) if window.rows else ()):
                if records:
                    store.append(env.rank, records)
                rejects += _rejects(records)
                bar.update(len(records))
            read += window.count
            if read >= _CHECK_FROM:
                check_bad_rate(rejects, read, limits.max_bad_rate)


def bad_record(index: int, reject: Reject) -> Record:
    """The record of a row that cannot be used."""
    return {"index": index, "bad": asdict(reject)}


def _rejects(records: Iterable[Record]) -> list[Reject]:
    return [Reject(**record["bad"]) for record in records if "bad" in record]


def check_bad_rate(rejects: Sequence[Reject], rows: int, max_rate: float) -> None:
    """Raises ValueError if more than `max_rate` of `rows` rows could not be used."""
    if len(rejects) > max_rate * rows:
        raise ValueError(
            f"{len(rejects)} of {rows} rows cannot be used: {summarise(rejects)}. That is more "
            f"than {max_rate:.2%}: repair the data (`python -m data.check` shows it as a whole) "
            "or raise --max_bad_rate; such rows are left out of every figure"
        )


def memory_advice(rows: Sequence[object], advice: str) -> AbstractContextManager[None]:
    """Turn a lack of memory into `OutOfMemory` that names the rows under way, and what to do.

    Args:
        advice: which flags to lower.
    """
    count = "one row" if len(rows) == 1 else f"{len(rows)} rows at once"
    shown = ", ".join(map(str, rows[:3]))
    more = f" and {len(rows) - 3} more" if len(rows) > 3 else ""
    return memory_errors(
        f"with {count} ({shown}{more})",
        f"{advice}; what was done is kept, and the same command goes on from there",
    )


def progress_bar(total: int, title: str, shown: bool) -> Any:
    """A bar of rows on stderr: moving on a terminal, a line now and then in a log file."""
    interval = 0.2 if sys.stderr.isatty() else 30.0
    return tqdm(
        total=total, desc=title, unit="row", dynamic_ncols=True, mininterval=interval,
        disable=not shown,
    )  # fmt: skip
