# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Names, finding and housekeeping of checkpoint folders (what is in one: checkpoints.py)."""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from data.json_lines import Record, filter_log, read_log
from modeling.host.disk import disk_errors
from modeling.host.text_files import read_json_object
from scripts.visual_opsd.processes import DistEnv, on_main
from scripts.visual_opsd.runs.identity import SETTINGS_FILE
from scripts.visual_opsd.training.state_files import (
    MARKER,
    STEP_NAME,
    DamagedState,
    check_digests,
    read_marker,
)

logger = logging.getLogger(__name__)

SUPERSEDED = "superseded"
BEST_FILE = "best.json"  # in the folder of the best validation: its step, and why
NOT_GOOD = "not_good.jsonl"  # in a state after which every step was non-finite
_NEWEST = ("latest", "last_good")  # the same: nothing bad is ever taken
_STEP = re.compile(r"[0-9]{1,18}")
_RELEASE_NAME = re.compile(r"([0-9]{7})")
_ADAPTER_NAME = re.compile(r"adapter_([0-9]{7})")
_STALE_NAME = re.compile(r"(step_|adapter_)?[0-9]{7}(\..*)?\.tmp|best\.tmp")
_DELETED = ".deleted.tmp"
_RUN_FILES = ("metrics.jsonl", "samples.jsonl", "bad_rows.jsonl", "config.yaml")


def step_folder(checkpoint_dir: Path, step: int) -> Path:
    return checkpoint_dir / f"step_{step:07d}"


def release_folder(checkpoint_dir: Path, step: int) -> Path:
    return checkpoint_dir / f"{step:07d}"


def adapter_folder(checkpoint_dir: Path, step: int) -> Path:
    return checkpoint_dir / f"adapter_{step:07d}"


def best_folder(checkpoint_dir: Path) -> Path:
    return checkpoint_dir / "best"


def best_step(checkpoint_dir: Path) -> int | None:
    """The step of the best validation's folder; None: there is none, or it does not say."""
    try:
        step = read_json_object(best_folder(checkpoint_dir) / BEST_FILE, "file").get("step")
    except ValueError:
        return None
    return step if type(step) is int else None


def _folders(checkpoint_dir: Path, name: re.Pattern[str] = STEP_NAME) -> dict[int, Path]:
    """Step -> folder of everything that carries a step's name, complete or not.

    Of several ("step_4" beside "step_0000004", a copy) the one that we named.
    """
    if not checkpoint_dir.is_dir():
        return {}
    found = [(name.fullmatch(p.name), p) for p in checkpoint_dir.iterdir() if p.is_dir()]
    steps = ((int(m[1]), len(p.name), p) for m, p in found if m)
    return {step: path for step, _, path in sorted(steps)}  # ours is the longer name


def _sort_out(
    checkpoint_dir: Path, rejected: Mapping[Path, ValueError]
) -> tuple[dict[int, Path], dict[int, ValueError]]:
    """Step -> folder of the states that seem whole; step -> what is wrong with each other one."""
    whole, faulty = {}, {}
    for step, path in _folders(checkpoint_dir).items():
        try:
            if path in rejected:
                raise rejected[path]
            read_marker(path)
            whole[step] = path
        except ValueError as error:
            faulty[step] = error
    return whole, faulty


def complete_steps(checkpoint_dir: Path) -> dict[int, Path]:
    """Step -> folder of the complete checkpoints, in order of step; their bytes are not read."""
    return _sort_out(checkpoint_dir, {})[0]


def find_checkpoint(
    checkpoint_dir: Path, spec: str | int, rejected: Mapping[Path, ValueError] | None = None
) -> Path | None:
    """The folder that `--resume` means, as far as names and sizes tell.

    Args:
        checkpoint_dir: this run's checkpoints.
        spec: "latest" (None when there is none yet: the run starts from its base weights),
            "last_good" (the same, but there must be one), a step number, or the path of a
            checkpoint folder. The first two pass over states that only non-finite steps followed.
        rejected: folders whose bytes were found damaged.

    Raises:
        DamagedState: the step or folder asked for, or all that there are, are damaged.
        ValueError: no such step (lists those that exist), no checkpoint folder, unknown format.
    """
    rejected, text = rejected or {}, str(spec)
    if text in _NEWEST:
        newest = _newest(checkpoint_dir, *_sort_out(checkpoint_dir, rejected))
        if newest is None and text == "last_good":
            raise ValueError(f"there is no state in {checkpoint_dir} to go on from")
        return newest
    if _STEP.fullmatch(text):
        whole, faulty = _sort_out(checkpoint_dir, rejected)
        if int(text) in faulty:
            raise faulty[int(text)]
        if int(text) in whole:
            return whole[int(text)]
        known = ", ".join(map(str, whole)) or "none"
        raise ValueError(
            f"no complete checkpoint of step {text} in {checkpoint_dir}; complete steps: {known}"
        )
    path = Path(text)
    if not os.path.isdir(path):
        raise ValueError(f"--resume {text}: no such folder (expected latest, a step, or a folder)")
    if path in rejected:
        raise rejected[path]
    try:
        read_marker(path)
    except DamagedState as error:
        inside = complete_steps(path)
        if inside:
            raise ValueError(
                f"{path} is not a complete training checkpoint; it holds checkpoints: name one, "
                f"e.g. {inside[max(inside)]}"
            ) from error
        raise DamagedState(
            f"{path} is not a complete training checkpoint; its {MARKER} is missing, or does not "
            f"match the files: {error}"
        ) from error
    return path


def _newest(
    checkpoint_dir: Path, whole: Mapping[int, Path], faulty: Mapping[int, ValueError]
) -> Path | None:
    for fault in faulty.values():
        if not isinstance(fault, DamagedState):
            raise fault  # of a later version: nothing to pass over
    if faulty and not whole:
        raise DamagedState(
            f"no training state in {checkpoint_dir} is whole: "
            f"{'; '.join(map(str, faulty.values()))}; bring back a copy, or begin a new run in "
            "another folder"
        )
    good = [step for step, path in whole.items() if not (path / NOT_GOOD).exists()]
    if whole and not good:
        raise ValueError(
            f"there is no good state in {checkpoint_dir}: after that of step {max(whole)} every "
            f"step was non-finite (--resume {max(whole)} goes on from it all the same)"
        )
    return whole[max(good)] if good else None


def choose_checkpoint(checkpoint_dir: Path, specs: Sequence[str], env: DistEnv) -> Path | None:
    """The training state that a run begins from, its bytes checked; called by all ranks.

    Rank 0 chooses, all ranks check. A damaged "latest" is named and the next older one taken.

    Args:
        specs: what `find_checkpoint` understands, in order of preference.

    Raises:
        ValueError: as `find_checkpoint`; that of a damaged state names the next older whole one.
    """
    rejected: dict[Path, ValueError] = {}

    def choose() -> tuple[Path | None, str]:
        """The state, or what is wrong with the one asked for and an older one."""
        for spec in specs:
            try:
                found = find_checkpoint(checkpoint_dir, spec, rejected)
            except DamagedState as error:
                if spec in _NEWEST:
                    raise
                fault = f"--resume {spec}: {error}"
                return _next_older(checkpoint_dir, spec, rejected, fault), fault
            if found is not None:
                return found, ""
        return None, ""

    while True:
        path, fault = on_main(env, choose)
        if path is None:
            return None
        try:
            check_digests(path, env)
        except DamagedState as error:
            rejected[path] = error
            continue
        if fault:
            raise ValueError(f"{fault}; the next older whole state is {path}: --resume {path}")
        if env.is_main and not set(_NEWEST).isdisjoint(specs) and path.parent == checkpoint_dir:
            _tell_damage(path, _sort_out(checkpoint_dir, rejected)[1])
        return path


def _tell_damage(chosen: Path, faulty: Mapping[int, ValueError]) -> None:
    later = {s: fault for s, fault in faulty.items() if s > int(read_marker(chosen)["step"])}
    for step, fault in later.items():
        logger.warning("DAMAGED: the state of step %d: %s", step, fault)
    if later:
        logger.warning("resuming the next older whole state: %s", chosen)


def _next_older(
    checkpoint_dir: Path, spec: str, rejected: Mapping[Path, ValueError], fault: str
) -> Path:
    """The newest state before a damaged one that seems whole. Raises ValueError: none does."""
    path = step_folder(checkpoint_dir, int(spec)) if _STEP.fullmatch(spec) else Path(spec)
    named = STEP_NAME.fullmatch(path.name)
    whole, _ = _sort_out(path.parent, rejected)
    older = [step for step in whole if named and step < int(named[1])]
    if not older:
        raise ValueError(f"{fault}; there is no older whole state in {path.parent}")
    return whole[max(older)]


def check_claim(checkpoint_dir: Path, resumed_from: Path | None) -> int:
    """The step a run resumes in this folder, -1 if it begins there. Changes nothing.

    Raises:
        ValueError: the folder holds another run's checkpoints, damaged ones too.
    """
    if resumed_from is not None and resumed_from.resolve().parent == checkpoint_dir.resolve():
        return int(read_marker(resumed_from)["step"])
    states = _folders(checkpoint_dir)
    released = {
        **_folders(checkpoint_dir, _RELEASE_NAME),
        **_folders(checkpoint_dir, _ADAPTER_NAME),
    }
    if states:
        raise ValueError(
            f"{checkpoint_dir} already holds checkpoints (steps "
            f"{', '.join(map(str, states))}): continue them with --resume latest, or choose "
            "another folder"
        )
    if released:
        raise ValueError(
            f"{checkpoint_dir} already holds checkpoints (release folders "
            f"{', '.join(path.name for path in released.values())}): choose another folder"
        )
    return -1


def _best_folders(checkpoint_dir: Path) -> list[Path]:
    """`best`, and what a kill left of an earlier one between two renames."""
    best = best_folder(checkpoint_dir)
    return [path for path in (best, best.with_name("best.old")) if os.path.lexists(path)]


def check_folders(
    results: Path, checkpoint_dir: Path, resumed_from: Path | None, *, resumes: bool
) -> None:
    """Raise now what `claim_checkpoint_dir` and the logs would raise later.

    Args:
        resumes: whether the run was told to go on from what is there, should it be nothing yet.

    Raises:
        ValueError: the logs cannot be written to or are another run's, or as `check_claim`.
    """
    for path in (results / name for name in _RUN_FILES):
        if os.path.lexists(path) and not (path.is_file() and os.access(path, os.R_OK | os.W_OK)):
            raise ValueError(
                f"{path} is no file that can be read and written, and the run logs to it: move it "
                "away or choose another --results_dir"
            )
    begins = check_claim(checkpoint_dir, resumed_from) < 0
    if resumed_from is None:
        if (results / SETTINGS_FILE).exists():
            raise ValueError(
                f"{results} holds the results of another command ({SETTINGS_FILE}), whose bad_rows."
                "jsonl the run would replace: choose another --results_dir"
            )
        if resumes:
            return  # a requeued run begins anew if it was killed before its first state
        _check_new_log(results / "metrics.jsonl", checkpoint_dir)
    for best in _best_folders(checkpoint_dir) if begins else []:
        raise ValueError(
            f"{checkpoint_dir} already holds the best model of another run ({best.name}): choose "
            f"another folder, or pass --resume latest to begin at step 0 and move it to "
            f"{SUPERSEDED}/"
        )


def _check_new_log(metrics: Path, checkpoint_dir: Path) -> None:
    """Raises ValueError: it holds steps of a run, which beginning at step 0 would delete."""
    if not metrics.exists():
        return
    steps = [r["step"] for r in read_log(metrics, lambda record: int(record["step"]) > 0)]
    if steps:
        raise ValueError(
            f"{metrics} is of an earlier run (up to step {max(steps)}), of which {checkpoint_dir} "
            "holds no state to go on from: choose another --results_dir, or pass --resume latest "
            "to throw its logs away and begin at step 0"
        )


def claim_checkpoint_dir(
    checkpoint_dir: Path, resumed_from: Path | None, env: DistEnv, other_best: str = ""
) -> None:
    """Make the folder ready for a run: call it once, on all ranks, after loading.

    Removes what killed runs left half-written, and moves steps and release folders later than the
    resumed step (they belong to a future that will not happen) to `superseded/`.

    Args:
        other_best: why the best validation's folder goes whatever its step; "": it does not.

    Raises:
        ValueError: as `check_claim`, before anything is moved.
    """

    @disk_errors(f"preparing {checkpoint_dir}", checkpoint_dir)
    def claim() -> None:
        checkpoint_dir.mkdir(parents=True, exist_ok=True)
        resumed_step = check_claim(checkpoint_dir, resumed_from)
        for stale in checkpoint_dir.iterdir():
            if _STALE_NAME.fullmatch(stale.name):
                logger.warning("removing %s, left half-written by an earlier run", stale)
                remove(stale)
        for name in (STEP_NAME, _RELEASE_NAME, _ADAPTER_NAME):
            for step, path in _folders(checkpoint_dir, name).items():
                if step > resumed_step:
                    supersede(path, f"later than step {resumed_step},")
        _claim_best(checkpoint_dir, resumed_step, other_best)

    on_main(env, claim)


def _claim_best(checkpoint_dir: Path, resumed_step: int, other: str) -> None:
    """Bring back a best folder that a kill left half replaced; supersede one of a later step."""
    best = best_folder(checkpoint_dir)
    replaced = best.with_name("best.old")
    if os.path.lexists(replaced):
        if os.path.lexists(best):
            remove(replaced)
        else:
            os.replace(replaced, best)
    if os.path.lexists(best):
        step = best_step(checkpoint_dir)
        if step is None:
            supersede(best, f"whose {BEST_FILE} names no step,")
        elif resumed_step < step:
            supersede(best, f"later than step {resumed_step},")
        elif other:
            supersede(best, f"as {other},")


def remove(path: Path) -> None:
    """Remove a file or folder; what a network disk will not let go is left, with a warning."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("cannot remove %s (%s); the next save or start tries again", path, error)


def delete_old_states(checkpoint_dir: Path, keep_last: int) -> None:
    """Delete all but the newest complete states. What cannot be deleted is warned about."""
    for old in list(complete_steps(checkpoint_dir).values())[:-keep_last]:
        # Renamed first: a kill in the middle must not leave half a checkpoint behind.
        try:
            os.replace(old, old.with_name(old.name + _DELETED))
        except OSError as error:
            logger.warning("cannot delete %s (%s); the next save tries again", old, error)
    for doomed in checkpoint_dir.glob("step_*" + _DELETED):
        remove(doomed)


def supersede(path: Path, why: str) -> None:
    """Move a folder out of the way."""
    target = path.parent / SUPERSEDED / path.name
    target.parent.mkdir(exist_ok=True)
    copies = 1
    while target.exists():
        target = target.with_name(f"{path.name}.{copies}")
        copies += 1
    logger.warning("moving %s, %s to %s", path, why, target)
    os.replace(path, target)


def restart_logs(
    results: Path, step: int, settings: Mapping[str, Any], *, validates: bool = False
) -> None:
    """Cut the logs back to `step`, and write config.yaml. Rank 0 only.

    validates: the validation of `step` is still to be made, so its line goes too: it is of other
    rows, or of a run that went on from this state before and was killed.
    """

    def is_validation(record: Record) -> bool:
        return record.get("step") == step and any(n.startswith("validation/") for n in record)

    with disk_errors(f"writing to {results}", results):
        for name in ("metrics.jsonl", "samples.jsonl"):
            truncate_jsonl(results / name, step)
        if validates:
            filter_log(results / "metrics.jsonl", lambda record: not is_validation(record))
        text = yaml.safe_dump(dict(settings), sort_keys=False)
        (results / "config.yaml").write_text(text, encoding="utf-8")


def truncate_jsonl(path: Path, step: int) -> int:
    """Drop lines of steps after `step`, and a torn last line; returns how many were dropped.

    Without it, a resumed run's metrics.jsonl and samples.jsonl would repeat steps. Rank 0 only.
    Lines without a "step" stay; damaged ones are dropped with a warning. The file is replaced in
    one rename.
    """
    return filter_log(path, lambda record: bool(record.get("step", step) <= step))
