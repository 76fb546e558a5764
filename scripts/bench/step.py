# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Milliseconds a sample of a training step: student, teacher, loss, backward; with its memory.

    python -m scripts.bench.step --json step.json

The trainer's own `run_pack` on packs of several samples: student 2,079 rows, teacher 3,516 (one
518 x 518 visual thought), 513 scored rows, beta 0.5, top-k 256, clip 0.05, one set of bf16 weights
(teacher mode self), no optimiser, no sharding. With activation checkpointing packs hold four
samples, without it two. Gradients are dropped before each timed pack, as a step does; the memory
is what a second pack needs beyond weights and gradients.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from data.packing import context_length
from data.sequence import Completion
from modeling.bagel.bagel import Bagel
from scripts.bench.common import (
    SPECIAL,
    Machine,
    Report,
    finish,
    image,
    layer_parameters,
    parser,
    prompt,
    random_model,
    start,
    text,
    vision_parameters,
)
from scripts.visual_opsd.cli import run_main
from scripts.visual_opsd.opsd_loss import LossConfig
from scripts.visual_opsd.scored_rows import ScoredRow
from scripts.visual_opsd.training.step import PackResult, StepContext, run_pack
from scripts.visual_opsd.training.teacher import Teacher

PACKED = {True: 4, False: 2}  # samples of a pack, with and without checkpointing
TARGETS = {True: 330.0, False: 285.0}
REFERENCES = {True: 891.0, False: 638.0}


def sample(machine: Machine, name: str) -> ScoredRow:
    """A row whose completion has 512 tokens and its end, all sampled."""
    student = prompt(machine)
    teacher = (*student, text(machine, 40), image(machine), text(machine, 22))
    ids = text(machine, 512).ids
    completion = Completion(ids, (True,) * (len(ids) + 1), (0.0,) * (len(ids) + 1))
    segment = completion.segment()
    return ScoredRow(name, (*student, segment), (*teacher, segment), completion)


def step_flop(model: Bagel, row: ScoredRow, checkpointing: bool) -> float:
    """Products alone, for one sample; a checkpointed layer runs its forward twice."""
    images = [len(s.position_ids) for s in (row.teacher or ()) if not hasattr(s, "ids")]
    student, teacher = context_length(row.student), context_length(row.teacher or ())
    passes = 2.0 * (4 if checkpointing else 3)
    flop = layer_parameters(model) * (passes * student + 2.0 * teacher)
    flop += vision_parameters(model) * (passes * images[0] + 2.0 * sum(images))
    head = model.config.llm.vocab_size * model.config.llm.hidden_size
    return flop + 8.0 * head * row.scored


def one_pack(
    report: Report, model: Bagel, checkpointing: bool, layers: int | None = None
) -> tuple[list[float], float]:
    """Seconds of each repeat, and bytes beyond weights and gradients."""
    machine = report.machine
    model.set_gradient_checkpointing(checkpointing, layers)
    rows = [sample(machine, f"row {i}") for i in range(PACKED[checkpointing])]
    teacher = Teacher("self", None, model, 0.0)

    step = StepContext(
        model, teacher, None, special=SPECIAL, loss=LossConfig(), chunk_size=512,
        device=machine.device, decode=str, scale=1.0 / sum(row.scored for row in rows),
    )  # fmt: skip

    def pack_once() -> PackResult:
        return run_pack(rows, step)

    def one_step() -> None:
        model.zero_grad(set_to_none=True)
        pack_once()

    seconds = machine.timed(one_step, report.repeats)
    # Gradients stay, as for the second pack of a step.
    before = machine.reset_peak()
    pack_once()
    return seconds, machine.peak() - before


def bench(report: Report, model: Bagel, checkpointing: bool) -> float:
    """Adds the time a sample; returns the bytes beyond weights and gradients."""
    count, row = PACKED[checkpointing], sample(report.machine, "one")
    seconds, extra = one_pack(report, model, checkpointing)
    flop = step_flop(model, row, checkpointing)
    lengths = (context_length(row.student), context_length(row.teacher or ()))
    report.add(
        "step_ckpt_ms" if checkpointing else "step_ms",
        [1e3 * s / count for s in seconds],
        floor=1e3 * report.ceilings.seconds(flop=flop),
        target=TARGETS[checkpointing],
        reference=REFERENCES[checkpointing],
        settings=f"student {lengths[0]}, teacher {lengths[1]} rows, {row.scored} scored, "
        f"packed by {count}, checkpointing {'on' if checkpointing else 'off'}; ms a sample",
    )
    return extra


def run(report: Report) -> None:
    # As FSDP2 gathers weights, each for itself.
    model = random_model(report.machine.config, report.machine, adjoin=False).requires_grad_(True)
    model.vit_pos_embed.requires_grad_(False)
    extra = bench(report, model, True)
    report.add(
        "peak_gb",
        [extra / 1e9],
        floor=None,
        target=4.0,
        reference=3.0,
        settings="beyond weights and gradients, 4 samples packed, checkpointing on",
    )
    extra = bench(report, model, False)
    report.notes["peak_gb_without_checkpointing"] = round(extra / 1e9, 2)
    if report.brief:
        return
    half = model.config.llm.num_hidden_layers // 2
    seconds, extra = one_pack(report, model, True, layers=half)
    report.notes[f"checkpointed_layers_{half}"] = {
        "ms": round(1e3 * statistics.median(seconds) / PACKED[True], 1),
        "gb": round(extra / 1e9, 2),
    }


def main(argv: Sequence[str] | None = None) -> int:
    args = parser(__doc__).parse_args(argv)
    report = start(args)
    run(report)
    return finish(report, args.json)


if __name__ == "__main__":
    run_main(main)
