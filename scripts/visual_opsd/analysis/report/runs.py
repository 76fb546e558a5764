# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""What a run's folder holds for the report: figures by step, settings, completions."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.json_lines import Record, read_log
from modeling.host.text_files import read_yaml

METRICS, CONFIG, SAMPLES = "metrics.jsonl", "config.yaml", "samples.jsonl"
MOST_RUNS = 16  # eight colours, each solid and dashed
_SPECIAL = ("nan", "inf", "-inf")  # how metrics.jsonl writes what JSON lacks
_LAST_STEP = 2**53
_BY_TOKEN = ("divergence", "student_entropy", "fork")  # of logged steps, in samples.jsonl
_DROPPED = "validation/teacher_dropped"


@dataclass(frozen=True)
class Run:
    """A training run as its folder tells it.

    label: unique among the runs of a report. settings: config.yaml, {} without one. figures: name
    -> (step, value) pairs by step; values may be non-finite. errors: what the disk refused, with
    its step.
    """

    label: str
    folder: Path
    settings: Mapping[str, Any]
    figures: Mapping[str, Sequence[tuple[int, float]]]
    errors: tuple[str, ...]

    @property
    def last_step(self) -> int:
        return max(points[-1][0] for points in self.figures.values())

    def last(self, name: str) -> float | None:
        """Mean of the last tenth of a figure's finite values (of one at least), None without."""
        values = [value for _, value in self.figures.get(name, ()) if math.isfinite(value)]
        tail = values[-max(1, len(values) // 10) :]
        return sum(tail) / len(tail) if tail else None

    def drops(self) -> list[int]:
        """Steps after which the guard found the teacher worse, of a row of such only the first."""
        points = self.figures.get(_DROPPED, ())
        before = (0.0, *(value for _, value in points))
        return [step for (step, now), was in zip(points, before, strict=False) if now and not was]


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Read the folders of some runs.

    Raises:
        ValueError: too many, one given twice, or a folder without a logged step; says what to do.
    """
    paths = [Path(folder) for folder in folders]
    if len(paths) > MOST_RUNS:
        raise ValueError(f"RUN: {len(paths)} runs; at most {MOST_RUNS} can be told apart")
    found = [_checked_folder(path) for path in paths]
    if len({path.resolve() for path in found}) < len(found):
        raise ValueError("RUN: a folder is given twice; name each run once")
    labels = distinct_labels(found)
    return [_read_run(path, label) for path, label in zip(found, labels, strict=True)]


def distinct_labels(folders: Sequence[Path]) -> list[str]:
    """The folders' last names, with as much of what stands before as tells them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, parts), default=1)):
        labels = ["/".join(part[-depth:]) for part in parts]
        if len(set(labels)) == len(labels):
            return labels
    return [str(folder) for folder in folders]


def number(value: Any) -> float | None:
    """A logged figure as a float; None for what is no number."""
    if isinstance(value, str) and value in _SPECIAL:
        return float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:  # an integer beyond all floats
        return math.inf


def _checked_folder(path: Path) -> Path:
    if not path.is_dir():
        raise ValueError(f"RUN {path} is no folder; name the results folder of a training run")
    if not (path / METRICS).is_file():
        raise ValueError(
            f"RUN {path} holds no {METRICS}: name the results folder of a training run "
            f"({CONFIG}, {METRICS}, {SAMPLES})"
        )
    return path


def _step(record: Record) -> int:
    """Raises KeyError or ValueError for a record without a usable step."""
    step = record["step"]
    if type(step) is not int or not 0 <= step < _LAST_STEP:
        raise ValueError(f"step is {step!r:.40}")
    return step


def _read_run(path: Path, label: str) -> Run:
    by_step: dict[int, dict[str, float]] = {}
    errors = []
    for record in read_log(path / METRICS, lambda record: _step(record) >= 0):
        step = record.pop("step")
        if "save_error" in record:
            errors.append(f"step {step}: {record['save_error']}")
        figures = {name: number(value) for name, value in record.items()}
        known = {name: value for name, value in figures.items() if value is not None}
        by_step.setdefault(step, {}).update(known)  # a resumed run may repeat a step
    points: dict[str, list[tuple[int, float]]] = {}
    for step in sorted(by_step):
        for name, value in by_step[step].items():
            points.setdefault(name, []).append((step, value))
    if not points:
        raise ValueError(
            f"RUN {path}: {METRICS} holds no logged step yet; wait for the first --log_every steps"
        )
    return Run(label, path, _read_settings(path / CONFIG), points, tuple(errors))


def _read_settings(path: Path) -> dict[str, Any]:
    """The settings of a run by the names of their flags. Raises ValueError: no such YAML."""
    if not path.exists():
        return {}
    loaded = read_yaml(path, "configuration")
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ValueError(f"{path} must be a mapping of settings to values; it is another file")
    settings: dict[str, Any] = {}
    for name, value in loaded.items():  # groups may be written as nested mappings
        settings.update(value if isinstance(value, dict) else {str(name): value})
    return {str(name): value for name, value in settings.items()}


# ---------------------------------------------------------------------------------- completions


def sampled_steps(run: Run) -> dict[int, bool]:
    """Steps of which samples.jsonl holds completions, in order, and whether with the figures that
    student and teacher gave their tokens."""
    path = run.folder / SAMPLES
    if not path.exists():
        return {}
    found: dict[int, bool] = {}

    def note(record: Record) -> bool:
        step = _step(record)
        found[step] = found.get(step, False) or not record.keys().isdisjoint(_BY_TOKEN)
        return False  # long runs write gigabytes of them: none is held

    read_log(path, note)
    return dict(sorted(found.items()))


def completions(run: Run, steps: Collection[int]) -> list[Record]:
    """The completions of some steps, by step, slot and number in the row; of one that comes twice
    the later."""
    path = run.folder / SAMPLES
    if not path.exists():
        return []

    def wanted(record: Record) -> bool:
        places = record["slot"], record.setdefault("number", 0)  # earlier versions wrote one a row
        if not isinstance(record["row"], str) or any(type(place) is not int for place in places):
            raise TypeError("row, slot or number")
        return _step(record) in steps

    found = {(r["step"], r["slot"], r["number"]): r for r in read_log(path, wanted)}
    return [found[place] for place in sorted(found)]
