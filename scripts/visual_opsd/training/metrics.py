# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""What a run reports: metrics.jsonl, a progress bar, wandb and TensorBoard on request, and phase
timers."""

from __future__ import annotations

import math
import os
import resource
import secrets
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from data.json_lines import append_records, read_log
from modeling.host.disk import disk_errors
from scripts.visual_opsd.processes import DistEnv, all_reduce_sums
from scripts.visual_opsd.training.event_files import FOLDER, EventFiles, one_line

Metric = float | int | str | bool | None | Tensor


def _wandb_run_id() -> str:
    return os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)


@dataclass(frozen=True)
class WandbSettings:
    """`run_id` names the run on wandb's side; an id that exists there is continued."""

    project: str
    name: str | None = None
    offline: bool = False
    run_id: str = field(default_factory=_wandb_run_id)

    def continuing(self, saved_id: str | None) -> WandbSettings:
        """The same for a resumed run (None: it had none); WANDB_RUN_ID comes first."""
        return replace(self, run_id=os.environ.get("WANDB_RUN_ID") or saved_id or self.run_id)

    def check(self) -> None:
        """ValueError if wandb is not installed or has no key; long before it is needed."""
        wandb = _import_wandb()
        if self.offline:
            return
        try:
            # Knows WANDB_MODE, WANDB_BASE_URL and where keys are; asks on a terminal only. Whether
            # the service answers is seen later: a night's outage should not end a requeued run.
            wandb.login(verify=False)
        except Exception as error:
            raise ValueError(
                f"--wandb_project: W&B has no usable key ({one_line(error)}). Run `wandb login` "
                "or set WANDB_API_KEY, or log without network by --wandb_offline True"
            ) from error


def simple(value: Metric) -> float | int | str | None:
    """A JSON value. NaN and the infinities, which JSON lacks, become strings float() reads."""
    if isinstance(value, Tensor):
        value = value.item()
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # "nan", "inf", "-inf"
    return value


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, with non-finite numbers as floats again."""
    return [{k: _plain(v) for k, v in record.items()} for record in read_log(path)]


def _plain(value: Any) -> Any:
    """A value of a line with its non-finite numbers as floats again."""
    return float(value) if value in ("nan", "inf", "-inf") else value


class MetricLogger:
    """Writes on rank 0, does nothing elsewhere: callers need no rank checks.

    Args:
        path: the metrics file; appended to, one line a call, so that a kill loses at most the
            line being written.
        total_steps, start_step: for the progress bar (drawn on stderr).
        progress: False draws none.
        wandb: imported only when given.
        config: the run's configuration, for wandb.
        tensorboard: write the same numbers as event files beside `path`.

    Raises:
        ValueError: wandb was asked for and is not installed.
    """

    def __init__(
        self,
        path: Path,
        env: DistEnv,
        *,
        total_steps: int,
        start_step: int = 0,
        progress: bool = True,
        wandb: WandbSettings | None = None,
        config: Mapping[str, Any] | None = None,
        tensorboard: bool = False,
    ) -> None:
        self._path: Path | None = None  # on rank 0, until closed
        self._wandb_run: Any = None
        self._events: EventFiles | None = None
        self._bar: Any = None
        if not env.is_main:
            return
        if wandb is not None:
            self._wandb_run = _start_wandb(wandb, path.parent, config)
        with disk_errors(f"writing to {path.parent}", path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        if progress:
            # A log file gets a line now and then, a terminal a moving bar.
            interval = 0.2 if sys.stderr.isatty() else 30.0
            self._bar = tqdm(
                total=total_steps,
                initial=start_step,
                dynamic_ncols=True,
                mininterval=interval,
                unit="step",
            )
        if tensorboard:
            self._events = EventFiles(path.parent / FOLDER, start_step, self.message)

    def log(
        self, step: int, metrics: Mapping[str, Metric], show: Mapping[str, str] | None = None
    ) -> None:
        """Write one line for `step`.

        Args:
            metrics: scalars; a tensor must hold one element (reading it synchronises its device).
            show: name -> format of the metrics the progress bar shows, e.g. {"loss": ".4f"}.
        """
        if self._path is None:
            return
        record = {name: simple(metrics[name]) for name in sorted(metrics)}
        append_records(self._path, [{"step": step, **record}])
        if self._bar is not None and show:
            shown = {k: format(record[k], f) for k, f in show.items() if _is_number(record.get(k))}
            self._bar.set_postfix(shown, refresh=False)
        if self._wandb_run is not None:
            numbers = {k: v for k, v in record.items() if _is_number(v)}
            try:
                self._wandb_run.log(numbers, step=step)
            except Exception as error:  # somebody else's service must not end a run
                self.message(f"W&B gets nothing from here on ({one_line(error)})")
                self._wandb_run = None
        if self._events is not None:
            values = {name: _plain(value) for name, value in record.items()}
            self._events.log(step, {k: v for k, v in values.items() if _is_number(v)})

    def advance(self, steps: int = 1) -> None:
        """Move the progress bar."""
        if self._bar is not None:
            self._bar.update(steps)

    def message(self, text: str) -> None:
        """Print a line on rank 0 without tearing the bar."""
        if self._path is not None:
            tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        """Close bar, wandb run and event files; may be called twice."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        if self._wandb_run is not None:
            with suppress(Exception):  # what it could not send is on disk for `wandb sync`
                self._wandb_run.finish()
            self._wandb_run = None
        if self._events is not None:
            self._events.close()
        self._path = None

    def __enter__(self) -> MetricLogger:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)


def _import_wandb() -> Any:
    # Without network at the end wandb would wait for hours, and the GPUs with it.
    os.environ.setdefault("WANDB_FINISH_TIMEOUT", "600")
    try:
        import wandb
    except ImportError as error:
        raise ValueError(
            "--wandb_project needs wandb, which is not installed: pip install wandb, or leave "
            "the flag out (metrics.jsonl is always written)"
        ) from error
    return wandb


def _start_wandb(settings: WandbSettings, folder: Path, config: Mapping[str, Any] | None) -> Any:
    """A run; offline when the service does not answer, None when nothing helps."""
    wandb = _import_wandb()
    with disk_errors(f"writing to {folder}", folder):
        folder.mkdir(parents=True, exist_ok=True)
    options = {
        "project": settings.project,
        "name": settings.name,
        "id": settings.run_id,
        "resume": "allow",
        "dir": os.environ.get("WANDB_DIR") or str(folder),
        "config": dict(config or {}),
    }
    try:
        # None: WANDB_MODE decides.
        return wandb.init(mode="offline" if settings.offline else None, **options)
    except Exception as error:
        print(f"W&B does not start ({one_line(error)}); trying it offline", file=sys.stderr)
    try:
        wandb.teardown()  # it still holds the id
        return wandb.init(mode="offline", **options)
    except Exception as error:
        print(f"W&B gets nothing of this run ({one_line(error)})", file=sys.stderr)
    return None


class PhaseTimer:
    """Seconds and tokens by phase, of `with timer("train", tokens):`.

    A GPU runs behind the host; the phases' boundaries wait for it, so that seconds belong to the
    phase that caused them (costs a little overlap). Phases may repeat within a step and
    accumulate until `reduce`.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: dict[str, float] = {}
        self._tokens: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str, tokens: int = 0) -> Iterator[None]:
        self.add_tokens(phase, tokens)
        start = self._now()
        try:
            yield
        finally:
            self._seconds[phase] += self._now() - start

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def add_tokens(self, phase: str, tokens: int) -> None:
        """Count tokens that are known only after the phase."""
        self._seconds.setdefault(phase, 0.0)
        self._tokens[phase] = self._tokens.get(phase, 0.0) + tokens

    def reduce(self, env: DistEnv) -> dict[str, float]:
        """Since the last call: mean seconds/PHASE and, of all ranks, tokens_per_s/PHASE.

        A collective; all ranks must have run the same phases. Some phases have no tokens.
        """
        sums = {f"seconds/{p}": s for p, s in self._seconds.items()}
        sums |= {f"tokens/{p}": t for p, t in self._tokens.items()}
        self._seconds, self._tokens = {}, {}
        return phase_metrics(all_reduce_sums(sums, env), env.world_size)


def phase_metrics(sums: Mapping[str, float], world_size: int) -> dict[str, float]:
    """Sums over ranks (seconds/PHASE, tokens/PHASE) -> what is logged."""
    seconds = {k: s / world_size for k, s in sums.items() if k.startswith("seconds/")}
    rates = {}
    for key, mean in seconds.items():
        phase = key.removeprefix("seconds/")
        tokens = sums.get(f"tokens/{phase}", 0.0)
        if tokens and mean > 0:
            rates[f"tokens_per_s/{phase}"] = tokens / mean
    return seconds | rates


def seconds_of(phases: Mapping[str, float]) -> float:
    """Of all phases of a step, as `PhaseTimer.reduce` gives them."""
    return sum(seconds for name, seconds in phases.items() if name.startswith("seconds/"))


def peak_memory_gb(device: torch.device) -> float:
    """Peak GB (1e9 bytes) of this process: allocated on the GPU, or resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
