# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Milliseconds of the loss, forward and backward, both heads' products included; its memory.

    python -m scripts.bench.loss --json loss.json

1,024 scored rows, random bf16 hidden states, separate student and teacher heads at the true size.
`paper`: beta 0.5, top-k 256, clip 0.05 an entry. `full`: the exact divergence over the whole
vocabulary. Memory is the peak beyond what was allocated before, both gradients included. The floor
is that of four dense products of rows, width and vocabulary; the paper's form can pass below it,
since two of its products leave out the gradient's zeros. The notes say where the time goes, in
milliseconds for all rows.

The note `figures` is of what a measured step adds (`token_figures`), on the scored rows of a step,
beside the loss of as many; its peak must not pass the loss's.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from modeling import fast
from scripts.bench.common import Machine, Report, finish, parser, start
from scripts.visual_opsd.cli import run_main
from scripts.visual_opsd.loss.chunked import chunked_opsd_loss
from scripts.visual_opsd.loss.token_figures import token_figures
from scripts.visual_opsd.opsd_loss import LossConfig

CHUNK = 512
FORMS = {"paper": LossConfig(), "full": LossConfig(top_k=None, token_clip=None)}
STEP_ROWS = 16368
MEASURED = {
    **FORMS,
    "full_clip": LossConfig(top_k=None),
    "tail": LossConfig(tail_bucket=True),
}
TARGET_MS = {"paper": 9.0, "full": 14.0}
TARGET_GB = 1.3
REFERENCE_MS, REFERENCE_GB = 12.8, 2.49  # of the paper's form; the other is not practical there


class Problem:
    """Hidden states and heads of both models, and labels."""

    def __init__(self, machine: Machine, rows: int = 1024) -> None:
        self.machine = machine
        self.rows = machine.size(rows, 64)
        self.width, self.vocab = machine.size(3584, 64), machine.size(152064, 2000)
        self.chunk = machine.size(CHUNK, 32)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, device=machine.device, dtype=machine.dtype)

        # Logits of standard deviation 3: entropies like those of a trained head.
        scale = 3.0 * self.width**-0.5
        self.hidden, self.teacher_hidden = draw(self.rows, self.width), draw(self.rows, self.width)
        self.head = draw(self.vocab, self.width).mul_(scale)
        self.teacher_head = draw(self.vocab, self.width).mul_(scale)
        self.hidden.requires_grad_()
        self.head.requires_grad_()
        self.labels = torch.randint(self.vocab, (self.rows,), device=machine.device)

    def drop_gradients(self) -> None:
        self.hidden.grad = self.head.grad = None

    def step(self, config: LossConfig) -> None:
        self.drop_gradients()
        loss, _ = chunked_opsd_loss(
            self.hidden, self.head, self.teacher_hidden, self.teacher_head, self.labels, config,
            chunk_size=self.chunk,
        )  # fmt: skip
        loss.backward()

    def figures(self, config: LossConfig) -> None:
        token_figures(
            self.hidden, self.head, self.teacher_hidden, self.teacher_head, self.labels, config,
            chunk_size=self.chunk,
        )  # fmt: skip

    def measure(
        self, config: LossConfig, repeats: int, call: Callable[[LossConfig], None] | None = None
    ) -> tuple[list[float], float]:
        """Milliseconds of each repeat, and bytes beyond what was there; call: None for `step`."""
        call = call or self.step
        times = [1e3 * s for s in self.machine.timed(lambda: call(config), repeats, 3)]
        self.drop_gradients()
        before = self.machine.reset_peak()
        call(config)
        extra = self.machine.peak() - before
        self.drop_gradients()
        return times, extra


def product_times(problem: Problem, rows: int, repeats: int) -> dict[str, float]:
    """Median milliseconds of the dense products alone, in chunks of `rows`."""
    hidden, head = problem.hidden.detach(), problem.head.detach()
    logits = head.new_empty(rows, problem.vocab)
    grad_hidden, grad_head = torch.empty_like(hidden), torch.empty_like(head)
    torch.mm(hidden[:rows], head.t(), out=logits)

    parts = [slice(i * rows, (i + 1) * rows) for i in range(problem.rows // rows)]

    def add_head_gradient(part: slice) -> Tensor:
        beta = float(part.start > 0)
        return torch.addmm(grad_head, logits.t(), hidden[part], beta=beta, out=grad_head)

    def time(call: Callable[[slice], Tensor]) -> float:
        return median(problem.machine, lambda: [call(part) for part in parts], repeats)

    return {
        "logits_of_one_model": time(lambda part: torch.mm(hidden[part], head.t(), out=logits)),
        "hidden_gradient": time(lambda part: torch.mm(logits, head, out=grad_hidden[part])),
        "head_gradient": time(add_head_gradient),
    }


def kernel_times(problem: Problem, repeats: int) -> dict[str, float]:
    """Median milliseconds of everything between and in place of products, for all rows."""
    from scripts.visual_opsd.loss import kernels as loss_kernels
    from scripts.visual_opsd.loss import sparse_products as loss_products

    paper, full = FORMS["paper"], FORMS["full"]
    k, rows = paper.top_k_of(problem.vocab), problem.chunk
    assert k is not None
    hidden, head = problem.hidden.detach()[:rows], problem.head.detach()
    student = hidden @ head.t()
    teacher = problem.teacher_hidden[:rows] @ problem.teacher_head.t()
    norm = loss_kernels.row_statistics(student, 1.0).norm
    theirs, values, index = loss_kernels.statistics_and_top_k(teacher, 1.0, k)
    log_t = values.float().log_softmax(-1)
    ones = torch.ones_like(theirs.lse)
    inside = loss_kernels.divergence_on_support(student, index, log_t, ones, paper)[2]
    sums = loss_kernels.full_divergence(student, teacher, norm, theirs.norm, full)
    every_index = index.repeat(problem.rows // rows, 1)
    every_inside = inside.repeat(problem.rows // rows, 1)
    grad_hidden = torch.empty_like(hidden)
    unit = torch.ones((), device=student.device)
    grad_head = torch.empty_like(head)

    def gradient() -> None:
        loss_kernels.write_gradient(
            student, full, problem.labels[:rows], norm, pull=sums.gate, teacher=teacher,
            teacher_norm=theirs.norm, slope_sum=sums.slope_sum,
        )  # fmt: skip

    of_a_chunk: dict[str, Callable[[], Any]] = {
        "torch_topk": lambda: teacher.topk(k, dim=-1, sorted=False),
        "statistics": lambda: loss_kernels.row_statistics(teacher, 1.0),
        "statistics_and_top_k": lambda: loss_kernels.statistics_and_top_k(teacher, 1.0, k),
        "divergence_on_support": lambda: loss_kernels.divergence_on_support(
            student, index, log_t, ones, paper
        ),
        "sparse_times_head": lambda: loss_products.sparse_times_head(
            inside, index, head, grad_hidden
        ),
        "full_divergence": lambda: loss_kernels.full_divergence(
            student, teacher, norm, theirs.norm, full
        ),
        "full_gradient": gradient,
        "zero_and_scatter": lambda: student.zero_().scatter_(-1, index, inside.to(student.dtype)),
    }
    of_all: dict[str, Callable[[], Any]] = {
        "sparse_times_hidden": lambda: loss_products.sparse_times_hidden(
            every_inside, every_index, problem.hidden.detach(), problem.vocab
        ),
        "scale_by_one": lambda: loss_products.scale_(grad_head, unit),
    }
    chunks = problem.rows / rows
    times = {name: median(problem.machine, call, repeats) for name, call in of_a_chunk.items()}
    times = {name: round(chunks * value, 3) for name, value in times.items()}
    return times | {name: median(problem.machine, call, repeats) for name, call in of_all.items()}


def median(machine: Machine, call: Callable[[], Any], repeats: int) -> float:
    """Of its milliseconds."""
    return round(1e3 * statistics.median(machine.timed(call, repeats, 3)), 3)


def run(report: Report) -> None:
    problem, repeats = Problem(report.machine), report.repeats
    flop = 8.0 * problem.rows * problem.width * problem.vocab
    gradients = (problem.rows + problem.vocab) * problem.width * problem.head.element_size()
    for name, config in FORMS.items():
        times, extra = problem.measure(config, repeats)
        settings = (
            f"{problem.rows} rows, width {problem.width}, vocabulary {problem.vocab}, chunks of "
            f"{problem.chunk}, beta {config.beta}, top-k {config.top_k}, clip {config.token_clip}"
        )
        in_paper = name == "paper"
        key = "loss" if in_paper else "loss_full"
        report.add(
            f"{key}_ms", times, floor=1e3 * report.ceilings.seconds(flop=flop),
            target=TARGET_MS[name], reference=REFERENCE_MS if in_paper else None,
            settings=settings,
        )  # fmt: skip
        report.add(
            f"{key}_extra_gb", [extra / 1e9], floor=gradients / 1e9, target=TARGET_GB,
            reference=REFERENCE_GB if in_paper else None, settings=settings,
        )  # fmt: skip
    if report.brief:
        return
    for rows in (problem.chunk, problem.chunk // 2):
        report.notes[f"products_ms_in_chunks_of_{rows}"] = product_times(problem, rows, repeats)
    report.notes["figures"] = figures_beside_the_loss(report.machine, repeats)
    report.notes["kernels"] = fast.runs_kernels("loss", problem.head)
    if report.notes["kernels"]:
        report.notes["kernels_ms"] = kernel_times(problem, repeats)
        report.notes["paper_with_dense_products"] = dense_products(problem, repeats)


def figures_beside_the_loss(machine: Machine, repeats: int) -> dict[str, dict[str, float]]:
    """Median ms and GB of the loss and of a measured step's figures, on a step's scored rows."""
    problem = Problem(machine, STEP_ROWS)
    found = {}
    for name, config in MEASURED.items():
        of_form: dict[str, float] = {"rows": problem.rows}
        for kind, call in (("loss", problem.step), ("figures", problem.figures)):
            times, extra = problem.measure(config, min(repeats, 5), call)
            of_form[f"{kind}_ms"] = round(statistics.median(times), 3)
            of_form[f"{kind}_gb"] = round(extra / 1e9, 3)
        found[name] = of_form
    return found


def dense_products(problem: Problem, repeats: int) -> dict[str, float]:
    """The paper's form with the zeros of its gradient multiplied as well."""
    from scripts.visual_opsd.loss import sparse_products as loss_products

    with mock.patch.object(loss_products, "DENSE_PER_SPARSE", problem.vocab):
        times, extra = problem.measure(FORMS["paper"], repeats)
    return {"ms": round(statistics.median(times), 3), "gb": round(extra / 1e9, 3)}


def main(argv: Sequence[str] | None = None) -> int:
    options = parser(__doc__)
    options.set_defaults(repeats=30)
    args = options.parse_args(argv)
    report = start(args)
    run(report)
    return finish(report, args.json)


if __name__ == "__main__":
    run_main(main)
