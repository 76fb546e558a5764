# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The settings of a run as a whole: folders, saving, resuming, processes, and its memory plan.

They stand among the trainer's (`config.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from scripts.visual_opsd.cli import ROWS, SEEDS, TIMEOUTS, TOGETHER, Settings, option

# What is made only in a visual thought, or how the teacher's context names one (training/leaks.py).
DEFAULT_LEAK_WORDS = (
    "visual thought, visual thoughts, visual reference, visual references, reference image, "
    "reference images, reference picture, reference pictures, edited image, generated image, "
    "modified image, annotated image, updated image, marked image, highlighted image, "
    "drawn line, drawn path, highlighted path, I drew, I have drawn, I've drawn, I highlighted, "
    "I have highlighted, I've highlighted, my drawing, my sketch"
)


@dataclass(frozen=True)
class RunSettings(Settings):
    results_dir: str = option(
        "results/visual-opsd", "metrics, samples and configuration (the launchers name it after "
        "the run)", path=True,
    )  # fmt: skip
    checkpoint_dir: str | None = option(
        None, "checkpoints; otherwise `checkpoints/` in the results folder", path=True
    )
    save_every: int = option(
        500, "steps between checkpoints; the last step is always saved", **ROWS
    )
    save_release: bool = option(True, "write a release folder at each checkpoint too")
    keep_last: int = option(2, "training states kept; release folders are all kept", **ROWS)
    on_save_error: str = option(
        "stop", "when the disk refuses a state or release folder: `stop` ends the run; `continue` "
        "trains on and tries again after `--save_every` steps, but the last step must be saved",
        choices=("stop", "continue"),
    )  # fmt: skip
    log_every: int = option(10, "steps between lines of `metrics.jsonl`", **ROWS)
    figures_every: int = option(
        1, "of the logged steps, those that are multiples of it are measured: forks, clip, "
        "places, leaks, memory, MFU (TRAIN.md, section 6), and the lists of tokens in "
        "`samples.jsonl`; 0: none", at_least=0, at_most=10**9,
    )  # fmt: skip
    leak_words: str = option(
        DEFAULT_LEAK_WORDS, "phrases, separated by commas, by which a completion speaks of a "
        "picture that the student never saw; the share of such completions is `leak_rate`"
    )  # fmt: skip
    samples_per_step: int = option(
        2, "completions of rank 0 written to `samples.jsonl` at each step",
        at_least=0, at_most=2**20,
    )  # fmt: skip
    replay_samples: str | None = option(
        None, "train on the completions of this `samples.jsonl` instead of sampling", path=True
    )
    resume: str | None = option(
        None, "`latest`, `last_good`, a step, or the folder of a training state", path=True
    )
    auto_resume: bool = option(False, "the same as `--resume latest`")
    resume_from: str | None = option(None, "the same as `--resume PATH`", path=True)
    take_over: bool = option(
        False, "take folders that a run on another machine held, if you know that it has ended"
    )
    global_seed: int = option(4396, "random numbers of sampling and of the noise control", **SEEDS)
    device: str = option("auto", "`auto`, `cpu` or `cuda`", choices=("auto", "cpu", "cuda"))
    sharding_strategy: str = option(
        "HYBRID_SHARD", "`HYBRID_SHARD`: shards within a group, copies across groups; "
        "`FULL_SHARD`: over all ranks", choices=("HYBRID_SHARD", "FULL_SHARD"),
    )  # fmt: skip
    num_shard: int | None = option(
        None, "ranks that share one copy; otherwise the GPUs of a node", **TOGETHER
    )
    num_replicate: int | None = option(None, "copies; otherwise ranks / `--num_shard`", **TOGETHER)
    cpu_offload: bool = option(False, "weights, gradients and optimiser in host memory")
    timeout_s: float = option(1800.0, "seconds after which a stuck collective fails", **TIMEOUTS)
    progress: bool = option(True, "draw a progress bar")
    wandb_project: str | None = option(None, "log to this wandb project too")
    wandb_name: str | None = option(None, "wandb run name")
    wandb_offline: bool = option(False, "wandb without network")
    tensorboard: bool = option(
        False, "write the numbers of `metrics.jsonl` as event files for TensorBoard too"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("resume", "resume_from"):
            spec = getattr(self, name)
            if spec is not None and spec.isdigit() and not spec.isascii():
                raise ValueError(
                    f"--{name} must be latest, a step number in plain digits or a folder, got "
                    f"{spec!r}"
                )
        if self.resume is not None:
            others = (self.resume_from, "latest" if self.auto_resume else None)
            if any(other not in (None, self.resume) for other in others):
                raise ValueError(
                    f"--resume {self.resume} contradicts --resume_from or --auto_resume, which "
                    "mean the same: give one of them"
                )

    @property
    def checkpoints(self) -> Path:
        return Path(self.checkpoint_dir or Path(self.results_dir) / "checkpoints")

    @property
    def resume_specs(self) -> tuple[str, ...]:
        """Where to begin, in order of preference: `find_checkpoint` decides."""
        latest = "latest" if self.auto_resume else None
        specs = (self.resume, latest, self.resume_from)
        return tuple(dict.fromkeys(spec for spec in specs if spec is not None))


@dataclass(frozen=True)
class PlanSettings(Settings):
    """Whether a run's memory is planned, and for which machine."""

    plan: bool | None = option(
        None, "print how much memory and disk the run takes, say whether that fits, and end; "
        "`none`: compare it with what is there before anything is loaded; `False`: do not"
    )  # fmt: skip
    plan_gpus: int | None = option(
        None, "with `--plan`: GPUs of one machine, instead of those at hand", **TOGETHER
    )
    plan_gpu_gb: float | None = option(
        None, "with `--plan`: memory of each of them, in GB (1e9 bytes)", above=0, at_most=1e6
    )
    dry_run: bool = option(
        False, "make one step with rows as long as the settings allow, show planned beside "
        "measured memory, and leave nothing behind"
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.plan and (self.plan_gpus, self.plan_gpu_gb) != (None, None):
            raise ValueError("--plan_gpus and --plan_gpu_gb are of a plan: add --plan")
        if self.plan and self.dry_run:
            raise ValueError("--plan computes and --dry_run measures: give one of them")
