# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""A memory plan in words: the table of --plan, and the check before a run loads anything."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from scripts.visual_opsd.config import TrainConfig
from scripts.visual_opsd.processes import DistEnv, attempt, launched_as
from scripts.visual_opsd.training.memory_check import Finding, Room, judge, suggest
from scripts.visual_opsd.training.memory_plan import Component, Plan, largest_plan, least_plan
from scripts.visual_opsd.training.memory_sizes import (
    Footprint,
    ReleaseSizes,
    World,
    longest_row,
    make_footprint,
    student_weights,
)
from scripts.visual_opsd.training.objective import Objective

_DOING = {
    "sample": "while completions are drawn",
    "encode": "while pictures become latents",
    "train": "in the forward and backward passes",
    "optimise": "while the optimiser steps",
    "save": "while a state is saved",
}
_WIDTH = 30  # of the names


# -------------------------------------------------------------------------------------- table


def describe(plan: Plan, least: Plan) -> str:
    """The table of a plan, in GB, with what each line is; least: the plan of a shortest row."""
    of = plan.of
    each = "each GPU" if of.on_gpu else "each process"
    lines = [*_heading(of), "", _line(f"{each}, GB", None, "")]
    lines += _group("always there", plan.resident)
    for moment in plan.moments:
        lines += _group(_DOING[moment.phase], moment.parts, plus=True)
    if plan.beside:
        lines += _group("beside torch's allocations", plan.beside, plus=True)
    lines.append(_line("  in all", plan.gpu, f"fullest {_DOING[plan.fullest.phase]}; with the "
                       f"shortest rows {least.gpu / 1e9:.1f}"))  # fmt: skip
    hosts = min(of.per_node, of.gpus)
    unit = "GPU" if of.on_gpu else "process"
    lines += ["", *_group(f"each host ({_count(hosts, unit)}), GB", plan.host, indent="")]
    lines += ["", *_group("disk, GB", plan.disk, indent="")]
    return "\n".join(lines)


def _heading(of: Footprint) -> list[str]:
    student, row = student_weights(of), longest_row(of)
    dtype = "bf16" if of.item == 2 else "fp32"
    what = "adapters" if of.lora_rank is not None else "numbers"
    trained, total = _size(student.trained), _size(student.total("numbers"))
    unit = "GPU" if of.on_gpu else "process"
    shard = (
        f"each holds 1/{of.shards} of the weights" if of.shards > 1 else "each holds all weights"
    )
    return [
        f"Memory plan: {trained} {what} train, of {total}; "
        f"{_count(of.gpus, unit)}, {shard}; computed in {dtype}.",
        f"Rows are as long as the settings let them be: {row.longest} tokens with a completion of "
        f"{row.new}; {_count(of.rows, 'row')} a step on each.",
    ]


def _size(numbers: int) -> str:
    return f"{numbers / 1e9:.2f} billion" if numbers >= 1e8 else f"{numbers:,}"


def _count(number: int, word: str) -> str:
    plural = "processes" if word == "process" else word + "s"
    return f"{number} {word if number == 1 else plural}"


def _group(
    title: str, parts: Sequence[Component], *, plus: bool = False, indent: str = "  "
) -> list[str]:
    size = sum(part.size for part in parts)
    lines = [_line(indent + title, size, "on top of what is always there" if plus else "")]
    return lines + [_line(f"{indent}  {part.name}", part.size, part.why) for part in parts]


def _line(name: str, size: float | None, why: str) -> str:
    shown = "" if size is None else f"{size / 1e9:9.1f}"
    return f"{name:<{_WIDTH + 12}}{shown:>9}  {why}".rstrip()


def advice(of: Footprint, findings: Sequence[Finding], *, indent: str = "  ") -> list[str]:
    """Lines that say of each resource whether it suffices, and what would help where it doesn't."""
    lines = []
    for finding in findings:
        lines.append(finding.text)
        if finding.tight:
            helping = suggest(of, finding)
            lines += [indent + one.text for one in helping]
            if not helping:
                lines.append(indent + "no setting helps much")
    return lines


# ------------------------------------------------------------------------------- entry points


def show_plan(config: TrainConfig, objective: Objective, *, gpus: int | None = None) -> int:
    """Print the plan of a configuration and its verdict; nothing is loaded.

    Args:
        gpus: how many there are, where no launcher says it; None: one process.

    Returns:
        The exit code: 1 if the run can't fit, otherwise 0.

    Raises:
        ValueError: no release folder's configuration there, or settings that contradict.
    """
    release = ReleaseSizes.read(config.model.model_path)
    rank, world, _, local = launched_as()
    if rank:
        return 0
    settings = config.memory
    if world == 1 and gpus:
        world = local = gpus
    if settings.plan_gpus is not None:
        world = local = settings.plan_gpus
    imagined = settings.plan_gpus is not None or settings.plan_gpu_gb is not None
    device = torch.device("cpu" if config.run.device == "cpu" and not imagined else "cuda")
    of = make_footprint(config, release, objective, World(world, local, device))
    print(describe(largest_plan(of), least_plan(of)))
    room = Room.here(device, config.run.checkpoints)
    if imagined:  # of another machine nothing else is known
        gb = settings.plan_gpu_gb
        room = Room(gpu=room.gpu if gb is None else gb * 1e9)
    findings = judge(of, room)
    print("", *advice(of, findings), sep="\n")
    if of.on_gpu and room.gpu is None:
        print("there is no GPU here to compare with: name one, as by --plan_gpu_gb 80")
    return int(any(finding.impossible for finding in findings))


def check_memory(config: TrainConfig, objective: Objective, env: DistEnv) -> None:
    """Compare a run's plan with what is there; called by all ranks, before anything is loaded.

    What rows of full length would exceed is a warning on stderr.

    Raises:
        ValueError: the run can't fit; names what is lacking and what would help. On all ranks.
    """
    if config.memory.plan is False:
        return
    world = World(env.world_size, env.local_world_size, env.device)

    def check() -> None:
        release = ReleaseSizes.read(config.model.model_path)
        of = make_footprint(config, release, objective, world)
        findings = judge(of, Room.here(env.device, config.run.checkpoints))
        lacking = [finding for finding in findings if finding.impossible]
        if lacking:
            lines = "; ".join(advice(of, lacking, indent=""))
            raise ValueError(f"{lines}; --plan True shows all of it, --plan False skips this check")
        tight = [finding for finding in findings if finding.tight]
        if tight and env.is_main:
            print("warning:", *advice(of, tight), sep="\n  ", file=sys.stderr)

    attempt(check)
