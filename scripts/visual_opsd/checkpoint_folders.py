# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Names, finding and housekeeping of checkpoint folders (what is in one: training_state.py)."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from scripts.visual_opsd.processes import DistEnv, on_main

logger = logging.getLogger(__name__)

MARKER = "complete.json"
SUPERSEDED = "superseded"
_STEP_NAME = re.compile(r"step_(\d+)")
_RELEASE_NAME = re.compile(r"(\d{7})")
_STALE_NAME = re.compile(r"(step_)?\d{7}(\..*)?\.tmp")


def step_folder(checkpoint_dir: Path, step: int) -> Path:
    return checkpoint_dir / f"step_{step:07d}"


def read_marker(path: Path) -> dict[str, Any] | None:
    """The marker of a complete checkpoint; None if anything is missing or has another size."""
    try:
        marker = json.loads((path / MARKER).read_text())
        whole = all((path / n).stat().st_size == size for n, size in marker["files"].items())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None  # no marker, a torn one, or files it lists are gone
    return marker if whole else None


def release_folder(checkpoint_dir: Path, step: int) -> Path:
    return checkpoint_dir / f"{step:07d}"


def _folders(checkpoint_dir: Path, name: re.Pattern[str] = _STEP_NAME) -> dict[int, Path]:
    """Step -> folder of everything that carries a step's name, complete or not."""
    if not checkpoint_dir.is_dir():
        return {}
    found = [(name.fullmatch(p.name), p) for p in checkpoint_dir.iterdir() if p.is_dir()]
    return dict(sorted((int(m[1]), p) for m, p in found if m))


def complete_steps(checkpoint_dir: Path) -> dict[int, Path]:
    """Step -> folder of the complete checkpoints, in order of step."""
    return {s: p for s, p in _folders(checkpoint_dir).items() if read_marker(p) is not None}


def find_checkpoint(checkpoint_dir: Path, spec: str | int) -> Path | None:
    """The folder that `--resume` means.

    Args:
        checkpoint_dir: this run's checkpoints.
        spec: "latest" (None when there is none yet: the run starts from its base weights), a
            step number, or the path of a checkpoint folder.

    Raises:
        ValueError: no such step (lists those that exist), or a folder that is not complete.
    """
    steps = complete_steps(checkpoint_dir)
    if spec == "latest":
        return steps[max(steps)] if steps else None
    text = str(spec)
    if text.isdigit():
        if int(text) in steps:
            return steps[int(text)]
        known = ", ".join(map(str, steps)) or "none"
        raise ValueError(
            f"no complete checkpoint of step {text} in {checkpoint_dir}; complete steps: {known}"
        )
    path = Path(text)
    if not path.is_dir():
        raise ValueError(f"--resume {text}: no such folder (expected latest, a step, or a folder)")
    if read_marker(path) is None:
        inside = complete_steps(path)
        hint = (
            f"it holds checkpoints: name one, e.g. {inside[max(inside)]}"
            if inside
            else f"its {MARKER} is missing, or does not match the files: choose another one"
        )
        raise ValueError(f"{path} is not a complete training checkpoint; {hint}")
    return path


def check_claim(checkpoint_dir: Path, resumed_from: Path | None) -> int:
    """The step a run resumes in this folder, -1 if it begins there. Changes nothing.

    Raises:
        ValueError: the folder holds another run's checkpoints.
    """
    complete = complete_steps(checkpoint_dir)
    if resumed_from is not None and resumed_from.resolve().parent == checkpoint_dir.resolve():
        return next(s for s, p in complete.items() if p.name == resumed_from.name)
    released = _folders(checkpoint_dir, _RELEASE_NAME)
    if complete:
        raise ValueError(
            f"{checkpoint_dir} already holds checkpoints (steps "
            f"{', '.join(map(str, complete))}): continue them with --resume latest, or choose "
            "another folder"
        )
    if released:
        raise ValueError(
            f"{checkpoint_dir} already holds checkpoints (release folders "
            f"{', '.join(path.name for path in released.values())}): choose another folder"
        )
    return -1


def check_folders(results: Path, checkpoint_dir: Path, resumed_from: Path | None) -> None:
    """Make the folders of a run, and raise now what `claim_checkpoint_dir` would raise later.

    Raises:
        ValueError: one of them cannot be written to, or as `check_claim`.
    """
    for name, folder in (("results_dir", results), ("checkpoint_dir", checkpoint_dir)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise ValueError(
                f"cannot write to {folder}: {error}; choose another --{name}"
            ) from error
    check_claim(checkpoint_dir, resumed_from)


def claim_checkpoint_dir(checkpoint_dir: Path, resumed_from: Path | None, env: DistEnv) -> None:
    """Make the folder ready for a run: call it once, on all ranks, after loading.

    Removes what killed runs left half-written, and moves steps and release folders later than the
    resumed step (they belong to a future that will not happen) to `superseded/`.

    Raises:
        ValueError: as `check_claim`.
    """

    def claim() -> None:
        checkpoint_dir.mkdir(parents=True, exist_ok=True)
        for stale in checkpoint_dir.iterdir():
            if _STALE_NAME.fullmatch(stale.name):
                logger.warning("removing %s, left half-written by an earlier run", stale)
                shutil.rmtree(stale)
        resumed_step = check_claim(checkpoint_dir, resumed_from)
        for name in (_STEP_NAME, _RELEASE_NAME):
            for step, path in _folders(checkpoint_dir, name).items():
                if step > resumed_step:
                    _supersede(path)

    on_main(env, claim)


def _supersede(path: Path) -> None:
    target = path.parent / SUPERSEDED / path.name
    target.parent.mkdir(exist_ok=True)
    copies = 1
    while target.exists():
        target = target.with_name(f"{path.name}.{copies}")
        copies += 1
    logger.warning("moving %s to %s", path, target)
    os.replace(path, target)


def truncate_jsonl(path: Path, step: int) -> int:
    """Drop lines of steps after `step`, and a torn last line; returns how many were dropped.

    Without it, a resumed run's metrics.jsonl and samples.jsonl would repeat steps. Rank 0 only.
    Lines without a "step" stay. The file is replaced in one rename.
    """
    if not path.exists():
        return 0
    dropped = 0
    tmp = path.with_name(path.name + ".tmp")
    with path.open(encoding="utf-8") as lines, tmp.open("w", encoding="utf-8") as kept:
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:
                dropped += 1  # the process was killed while writing it
                continue
            if isinstance(record, dict) and record.get("step", step) > step:
                dropped += 1
            else:
                kept.write(line if line.endswith("\n") else line + "\n")
        kept.flush()
        os.fsync(kept.fileno())
    os.replace(tmp, path)
    return dropped
