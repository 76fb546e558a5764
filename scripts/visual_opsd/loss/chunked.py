# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The objective of `opsd_loss.py` from hidden states and head weights, in chunks of tokens.

With 152 k vocabulary entries the logits of both models are what fills the memory, so they live for
one chunk of tokens only, and are never recomputed: the student's gradient is formed in the forward
pass, chunk by chunk, by a custom autograd.Function, and the backward pass only scales it. Matmuls
run in the weights' dtype; everything between the two matmuls is fp32 (fp64 for fp64 inputs) in
blocks of a few rows, or in the kernels of `loss_kernels.py`. Nothing in here waits for the device.

Memory beyond the gradients that autograd wants anyway: one (chunk, V) buffer in the head's dtype
and a few fp32 blocks of `BLOCK_ELEMENTS`. A divergence over the whole vocabulary needs both models'
logits at once and takes half as many rows at a time. With kernels and a gradient that is 0 outside
a small top-k, the two products behind the loss leave the zeros out (`loss_products.py`), and the
buffer is gone before the head's gradient comes.

`recomputed_opsd_loss` is the same loss through the readable form, autograd and checkpointing: slow,
obvious, and the oracle of the tests.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from scripts.visual_opsd.loss.chunk import (
    STUDENT_FIGURES,
    TEACHER_FIGURES,
    Chunk,
    compute_dtype,
    kernels_for,
)
from scripts.visual_opsd.opsd_loss import (
    IGNORE_LABEL,
    LossConfig,
    divergence_per_row,
    tinker_per_row,
    vocabulary_hint,
)


def chunked_opsd_loss(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor | None,
    teacher_head: Tensor | None,
    labels: Tensor,
    row_weights: Tensor | None,
    config: LossConfig,
    *,
    chunk_size: int = 512,
    keep_graph: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """sum over rows of row_weight * (jsd_weight * divergence + ce_weight * CE), not divided.

    Args:
        student_hidden: (N, H), final-norm outputs on the scored rows; gets a gradient in its dtype.
        student_head: (V, H), same dtype, a plain (gathered) tensor; gets a gradient in its dtype.
        teacher_hidden: (N, H'), same rows in the same order; no gradient. None only when
            jsd_weight is 0 (plain SFT), together with teacher_head.
        teacher_head: (V, H'), dtype of teacher_hidden; no gradient, also if it is student_head.
        labels: (N,) int64, the token each row scores. -100 counts as weight 0.
        row_weights: (N,) or None for ones. Rows of weight 0 are in no statistic.
        config: see `LossConfig`.
        chunk_size: rows whose logits live at the same time, counting both models': chunks are of
            chunk_size // 2 rows (at least 1) where the divergence needs both at once.
        keep_graph: allow more than one backward pass (retain_graph), at the cost of a second
            copy of the head's gradient; otherwise backward scales the gradients in place.

    Returns:
        The loss (a scalar in fp32), and detached fp32 statistics. Scalars, summed over the rows
        of non-zero weight: `rows` (their number), `ce` (temperature 1), `student_entropy`; with a
        teacher also `divergence`, `teacher_entropy`, `teacher_topk_mass` (1 a row without top-k)
        and, unless tinker, `forward_kl` = KL(teacher || student) on the entries the divergence
        sees, unclipped and without T^2. Entropies, mass and KL are at config.temperature, in nats.
        Per row: `label_logprob` (N,), the student's log p(label) at config.temperature. With fp64
        inputs everything is fp64.

    Raises:
        ValueError: shapes or dtypes that do not fit, a missing teacher, chunk_size < 1.
    """
    _check_inputs(
        student_hidden, student_head, teacher_hidden, teacher_head, labels, row_weights, chunk_size
    )
    with_teacher = teacher_hidden is not None
    if not with_teacher and config.jsd_weight != 0.0:
        raise ValueError(
            f"jsd_weight is {config.jsd_weight} but there is no teacher: pass teacher_hidden and "
            "teacher_head, or set jsd_weight to 0 for plain SFT"
        )
    kind = compute_dtype(student_hidden)
    counted = labels != IGNORE_LABEL
    weights = counted.to(kind)
    if row_weights is not None:
        weights = torch.where(counted, row_weights.detach().to(kind), weights)
        counted = counted & (row_weights != 0)
    teacher = None
    if teacher_hidden is not None and teacher_head is not None:
        teacher = (teacher_hidden.detach(), teacher_head.detach())
    loss, figures = _gradient_in_forward(
        student_hidden,
        student_head,
        teacher,
        labels.clamp(min=0),
        weights,
        config,
        chunk_size,
        torch.is_grad_enabled(),
        keep_graph,
    )
    names = STUDENT_FIGURES + (TEACHER_FIGURES if with_teacher else ())
    stats = {"rows": counted.sum().to(kind)}
    for name, row in zip(names, figures, strict=True):
        if name == "label_logprob":
            stats[name] = row
        elif not (name == "forward_kl" and config.loss_kind == "tinker"):
            stats[name] = torch.where(counted, row, 0.0).sum()
    return loss, stats


class _GradientInForward(torch.autograd.Function):
    """Loss and gradient in one pass over the chunks; backward multiplies by what arrives."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # (N, H)
        head: Tensor,  # (V, H)
        teacher: tuple[Tensor, Tensor] | None,
        labels: Tensor,  # (N,), all valid ids
        weights: Tensor,  # (N,)
        config: LossConfig,
        chunk_size: int,
        form_gradient: bool,
        keep_graph: bool,
    ) -> tuple[Tensor, Tensor]:
        heads = (head,) if teacher is None else (head, teacher[1])
        kernels = kernels_for(config, *heads)
        wanted = [form_gradient and needed for needed in ctx.needs_input_grad[:2]]
        products: _Products | None = None
        if any(wanted):
            sparse = kernels is not None and teacher is not None
            sparse = sparse and _pays_to_skip_zeros(config, head.shape[0])
            products = (_SparseProducts if sparse else _DenseProducts)(hidden, head, wanted)
        losses, figures = _run_chunks(
            hidden, head, teacher, labels, weights, config, chunk_size, kernels, products
        )
        ctx.gradients = (None, None) if products is None else products.finish()
        ctx.scale = _scaled if kernels is None else _scaled_by_kernel
        ctx.keep_graph = keep_graph
        ctx.mark_non_differentiable(figures)
        return losses.sum(), figures

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _grad_figures: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "backward ran a second time through chunked_opsd_loss, whose gradients were "
                "handed over by the first: pass keep_graph=True"
            )
        gradients = ctx.gradients
        if ctx.keep_graph:
            scaled = [None if g is None else g * grad_loss for g in gradients]
        else:
            ctx.gradients = None  # the only other reference: AccumulateGrad then needs no copy
            scaled = [None if g is None else ctx.scale(g, grad_loss) for g in gradients]
        return (*scaled, None, None, None, None, None, None, None)


def _run_chunks(
    hidden: Tensor,
    head: Tensor,
    teacher: tuple[Tensor, Tensor] | None,
    labels: Tensor,
    weights: Tensor,
    config: LossConfig,
    chunk_size: int,
    kernels: ModuleType | None,
    products: _Products | None,
) -> tuple[Tensor, Tensor]:
    """Weighted losses (N,) and figures (number of them, N); the buffers of logits end with it."""
    rows, vocab = hidden.shape[0], head.shape[0]
    # The top-k form is done with the teacher's logits before it needs the student's.
    shared = config.top_k_of(vocab) is not None
    shared = shared and teacher is not None and teacher[1].dtype == head.dtype
    if teacher is not None and not shared:
        chunk_size = max(1, chunk_size // 2)
    student_buffer = head.new_empty(min(chunk_size, rows), vocab)
    teacher_buffer = student_buffer
    if teacher is not None and not shared:
        teacher_buffer = teacher[1].new_empty(student_buffer.shape)
    figures = weights.new_zeros(len(STUDENT_FIGURES + (TEACHER_FIGURES if teacher else ())), rows)
    losses = torch.zeros_like(weights)
    for start in range(0, rows, chunk_size):
        part = slice(start, min(start + chunk_size, rows))
        size = part.stop - start
        chunk = Chunk(labels[part], weights[part], config, products is not None, kernels)
        if teacher is not None:
            out = teacher_buffer[:size]
            torch.mm(teacher[0][part], teacher[1].t(), out=out)
            chunk.read_teacher(out)
        logits = torch.mm(hidden[part], head.t(), out=student_buffer[:size])
        losses[part] = chunk.read_student(logits)
        figures[:, part] = chunk.figures()
        if products is not None:
            products.add(part, chunk, logits)
    return losses, figures


class _Products(Protocol):
    """Collects d loss / d hidden and d loss / d head, those of them that are wanted."""

    def add(self, part: slice, chunk: Chunk, logits: Tensor) -> None:
        """Rows `part`: a chunk that has read its student's logits, which may be overwritten."""

    def finish(self) -> tuple[Tensor | None, Tensor | None]:
        """Both gradients, when every chunk has been added."""


class _DenseProducts:
    """d loss / d logits, written over the logits, times the head and the hidden states."""

    def __init__(self, hidden: Tensor, head: Tensor, wanted: list[bool]) -> None:
        self.hidden, self.head = hidden, head
        self.grad_hidden = hidden.new_empty(hidden.shape) if wanted[0] else None
        self.grad_head: Tensor | None = None
        if wanted[1]:
            # Without rows there is no first chunk to overwrite it.
            self.grad_head = (head.new_empty if len(hidden) else head.new_zeros)(head.shape)

    def add(self, part: slice, chunk: Chunk, logits: Tensor) -> None:
        chunk.overwrite_with_gradient(logits)  # (size, V)
        if self.grad_hidden is not None:
            torch.mm(logits, self.head, out=self.grad_hidden[part])
        if self.grad_head is not None:
            beta = 1.0 if part.start else 0.0  # the first chunk overwrites the empty buffer
            out = self.grad_head
            torch.addmm(out, logits.t(), self.hidden[part], beta=beta, out=out)

    def finish(self) -> tuple[Tensor | None, Tensor | None]:
        return self.grad_hidden, self.grad_head


class _SparseProducts:
    """The same from the top-k's entries alone; the head's gradient is formed when all are there."""

    def __init__(self, hidden: Tensor, head: Tensor, wanted: list[bool]) -> None:
        from scripts.visual_opsd.loss import sparse_products as loss_products

        self.products = loss_products
        self.hidden, self.head, self.head_wanted = hidden, head, wanted[1]
        self.grad_hidden = hidden.new_empty(hidden.shape) if wanted[0] else None
        self.values: list[Tensor] = []  # (c, k) fp32 of each chunk
        self.index: list[Tensor] = []

    def add(self, part: slice, chunk: Chunk, logits: Tensor) -> None:
        assert chunk.inside is not None and chunk.index is not None
        self.values.append(chunk.inside)
        self.index.append(chunk.index)
        if self.grad_hidden is not None:
            out = self.grad_hidden[part]
            self.products.sparse_times_head(chunk.inside, chunk.index, self.head, out)

    def finish(self) -> tuple[Tensor | None, Tensor | None]:
        if not self.head_wanted:
            return self.grad_hidden, None
        if not self.values:
            return self.grad_hidden, self.head.new_zeros(self.head.shape)
        values, index = torch.cat(self.values), torch.cat(self.index)
        grad_head: Tensor = self.products.sparse_times_hidden(
            values, index, self.hidden, self.head.shape[0]
        )
        return self.grad_hidden, grad_head


def _pays_to_skip_zeros(config: LossConfig, vocab: int) -> bool:
    """Whether d loss / d logits is 0 outside a top-k that is small enough."""
    from scripts.visual_opsd.loss import sparse_products as loss_products

    k = config.top_k_of(vocab)
    if k is None or config.tail_bucket or config.ce_weight != 0.0:
        return False
    return loss_products.pays(k, vocab)


def _scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    return gradient.mul_(factor)


def _scaled_by_kernel(gradient: Tensor, factor: Tensor) -> Tensor:
    """Leaves a gradient alone that is to be multiplied by 1."""
    from scripts.visual_opsd.loss import sparse_products as loss_products

    return loss_products.scale_(gradient, factor)


_gradient_in_forward: Callable[..., tuple[Tensor, Tensor]] = _GradientInForward.apply


def recomputed_opsd_loss(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor | None,
    teacher_head: Tensor | None,
    labels: Tensor,
    row_weights: Tensor | None,
    config: LossConfig,
    *,
    chunk_size: int = 512,
) -> Tensor:
    """`chunked_opsd_loss` by the readable form: chunks checkpointed, gradients by autograd."""

    def chunk_loss(hidden: Tensor, head: Tensor, part: slice) -> Tensor:
        logits = hidden @ head.t()
        ids = labels[part].clamp(min=0)
        loss = torch.zeros(ids.shape, dtype=compute_dtype(logits), device=logits.device)
        if config.jsd_weight != 0.0:
            assert teacher_hidden is not None and teacher_head is not None
            with torch.no_grad():
                target = teacher_hidden[part] @ teacher_head.t()
            if config.loss_kind == "tinker":
                divergence = tinker_per_row(logits, target, ids, config.temperature)
            else:
                divergence = divergence_per_row(
                    logits,
                    target,
                    beta=config.beta,
                    temperature=config.temperature,
                    top_k=config.top_k,
                    token_clip=config.token_clip,
                    tail_bucket=config.tail_bucket,
                    clip_scope=config.clip_scope,
                )
            loss = loss + config.jsd_weight * divergence
        if config.ce_weight != 0.0:
            ce = F.cross_entropy(logits.to(loss.dtype), ids, reduction="none")
            loss = loss + config.ce_weight * ce
        weights = (labels[part] != IGNORE_LABEL).to(loss.dtype)
        return ((weights if row_weights is None else weights * row_weights[part]) * loss).sum()

    total = student_hidden.new_zeros((), dtype=compute_dtype(student_hidden))
    total = total + 0.0 * (student_hidden.sum() + student_head.sum())  # a graph for N == 0 as well
    for start in range(0, labels.shape[0], chunk_size):
        part = slice(start, start + chunk_size)
        total = total + checkpoint(
            chunk_loss, student_hidden[part], student_head, part, use_reentrant=False
        )
    return total


@torch.no_grad()
def chunked_log_probs(
    hidden: Tensor, head: Tensor, labels: Tensor, temperature: float = 1.0, chunk_size: int = 512
) -> Tensor:
    """log p(label) at `temperature`: hidden (N, H), head (V, H), labels (N,) -> (N,) fp32."""
    config = LossConfig(temperature=temperature, jsd_weight=0.0)
    _, stats = chunked_opsd_loss(
        hidden, head, None, None, labels, None, config, chunk_size=chunk_size
    )
    return stats["label_logprob"]


@torch.no_grad()
def chunked_divergences(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    chunk_size: int = 512,
) -> dict[str, Tensor]:
    """Exact full-vocabulary figures of every row, in nats at temperature 1, fp32 (N,) each.

    `kl` = KL(teacher || student), `jsd` (beta 0.5, at most log 2), `student_entropy`,
    `teacher_entropy`. Shapes as in `chunked_opsd_loss`.
    """
    labels = torch.zeros(student_hidden.shape[0], dtype=torch.long, device=student_hidden.device)
    _check_inputs(
        student_hidden, student_head, teacher_hidden, teacher_head, labels, None, chunk_size
    )
    config = LossConfig(top_k=None, token_clip=None)
    teacher = (teacher_hidden, teacher_head)
    weights = torch.ones_like(labels, dtype=compute_dtype(student_hidden))
    _, figures = _gradient_in_forward(
        student_hidden, student_head, teacher, labels, weights, config, chunk_size, False, False
    )
    rows = dict(zip(STUDENT_FIGURES + TEACHER_FIGURES, figures, strict=True))
    return {
        "kl": rows["forward_kl"],
        "jsd": rows["divergence"],
        "student_entropy": rows["student_entropy"],
        "teacher_entropy": rows["teacher_entropy"],
    }


def _check_inputs(
    hidden: Tensor,
    head: Tensor,
    teacher_hidden: Tensor | None,
    teacher_head: Tensor | None,
    labels: Tensor,
    row_weights: Tensor | None,
    chunk_size: int,
) -> None:
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}: it must be at least 1 row")
    if (teacher_hidden is None) != (teacher_head is None):
        raise ValueError("pass both teacher_hidden and teacher_head, or neither")
    for name, states, weight in (
        ("student", hidden, head),
        ("teacher", teacher_hidden, teacher_head),
    ):
        if states is None or weight is None:
            continue
        if states.dim() != 2 or weight.dim() != 2 or states.shape[1] != weight.shape[1]:
            raise ValueError(
                f"{name}_hidden {tuple(states.shape)} and {name}_head {tuple(weight.shape)} must "
                "be (N, H) and (V, H)"
            )
        if states.dtype != weight.dtype:
            raise ValueError(
                f"{name}_hidden is {states.dtype}, {name}_head {weight.dtype}: cast the hidden "
                "states to the head's dtype"
            )
        if weight.shape[0] != head.shape[0]:
            raise ValueError(vocabulary_hint(head.shape[0], weight.shape[0]))
        if states.shape[0] != labels.numel():
            raise ValueError(
                f"{name}_hidden has {states.shape[0]} rows for {labels.numel()} labels: student "
                "and teacher must score the same completion, one hidden state a label"
            )
    for name, rows in (("labels", labels), ("row_weights", row_weights)):
        if rows is not None and rows.shape != hidden.shape[:1]:
            raise ValueError(f"{name} has shape {tuple(rows.shape)}: ({hidden.shape[0]},) expected")
    # Free on the CPU; elsewhere looking would wait for the device, and gather fails by itself.
    if labels.device.type == "cpu" and labels.numel():
        low, high = int(labels.min()), int(labels.max())
        if high >= head.shape[0] or (low < 0 and low != IGNORE_LABEL):
            raise ValueError(
                f"labels span {low}..{high}, the vocabulary has {head.shape[0]} entries: the "
                "tokenizer does not belong to this checkpoint"
            )
