# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The objective of `opsd_loss.py` from hidden states and head weights, in chunks of tokens.

With 152 k vocabulary entries the logits of both models are what fills the memory, so they live for
one chunk of tokens only, and are never recomputed: the student's gradient is formed in the forward
pass, chunk by chunk, by a custom autograd.Function, and the backward pass only scales it. Matmuls
run in the weights' dtype; what lies between them is `chunk.py` or, by Triton kernels,
`kernel_chunk.py`. Nothing in here waits for the device.

Memory beyond the gradients that autograd wants anyway: one (chunk, V) buffer in the head's dtype
and a few fp32 blocks of `BLOCK_ELEMENTS`. A divergence over the whole vocabulary needs both models'
logits at once and takes half as many tokens at a time. With kernels and a gradient that is 0
outside a small top-k, the two products behind the loss leave the zeros out (`sparse_products.py`),
and the buffer is gone before the head's gradient comes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from data.teacher_cache import Entries
from modeling import fast
from scripts.visual_opsd.loss import chunk
from scripts.visual_opsd.loss.cached import cached_target
from scripts.visual_opsd.loss.chunk import (
    FIGURES,
    STUDENT_FIGURES,
    ChunkLoss,
    Target,
    TopKGradient,
    compute_dtype,
)
from scripts.visual_opsd.opsd_loss import LossConfig, token_weights, vocabulary_hint

T = TypeVar("T")


def chunked_opsd_loss(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor | None,
    teacher_head: Tensor | None,
    labels: Tensor,
    config: LossConfig,
    *,
    chunk_size: int = 512,
    weights: Tensor | None = None,
    cached: Entries | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """sum over tokens of weight * (jsd_weight * divergence + ce_weight * CE), not divided.

    Args:
        student_hidden: (N, H), final-norm outputs on the scored tokens; gets a gradient in its
            dtype.
        student_head: (V, H), same dtype, a plain (gathered) tensor; gets a gradient in its dtype.
        teacher_hidden: (N, H'), same tokens in the same order; no gradient. None only when
            jsd_weight is 0 (plain SFT) or with `cached`, together with teacher_head.
        teacher_head: (V, H'), dtype of teacher_hidden; no gradient, also if it is student_head.
        labels: (N,) int64, the ids that are scored.
        config: see `LossConfig`.
        chunk_size: tokens whose logits live at the same time, counting both models': chunks are of
            chunk_size // 2 tokens (at least 1) where the divergence needs both at once.
        weights: (N,) in at least fp32, what each token's loss counts (`chunked_token_weights`);
            None: 1.
        cached: instead of the teacher, what was kept of it on these tokens, and a factor for the
            divergence of each (`cached.py`); on the same device.

    Returns:
        The loss (a scalar in fp32), which can be taken backward once, and detached fp32 statistics.
        Scalars, summed over the tokens: `rows` (their number), `ce` (temperature 1),
        `student_entropy`; with a teacher also `divergence`, `teacher_entropy`, `teacher_topk_mass`
        (1 a token without top-k) and, unless tinker, `forward_kl` = KL(teacher || student) on the
        entries the divergence sees, unclipped and without T^2. Entropies, mass and KL are at
        config.temperature, in nats. Weights touch none of them; with weights there is also
        `weightless`, the number of tokens whose weight is 0. Per token: `label_logprob` (N,), the
        student's log p(label) at config.temperature. With fp64 inputs everything is fp64.
    """
    teacher: tuple[Tensor, Tensor] | Entries | None = cached
    if teacher_hidden is not None and teacher_head is not None:
        assert cached is None
        teacher = (teacher_hidden.detach(), teacher_head.detach())
    else:
        assert teacher_hidden is None and teacher_head is None
        assert config.jsd_weight == 0.0 or cached is not None, "a divergence without a teacher"
    _assert_fit(student_hidden, student_head, teacher, labels)
    loss, figures = _gradient_in_forward(
        student_hidden, student_head, teacher, labels, config, chunk_size,
        torch.is_grad_enabled(), weights,
    )  # fmt: skip
    stats = {"rows": loss.new_full((), len(labels))}
    if weights is not None:
        stats["weightless"] = (weights == 0.0).sum().to(loss.dtype)
    for name, figure in zip(FIGURES, figures, strict=False):
        if name == "label_logprob":
            stats[name] = figure
        elif not (name == "forward_kl" and config.loss_kind == "tinker"):
            stats[name] = figure.sum()
    return loss, stats


@torch.no_grad()
def chunked_token_weights(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor | None,
    teacher_head: Tensor | None,
    labels: Tensor,
    counts: Sequence[int],
    config: LossConfig,
    *,
    chunk_size: int = 512,
) -> Tensor:
    """`opsd_loss.token_weights` of all tokens, (N,) in at least fp32, in a pass of its own.

    Shapes as in `chunked_opsd_loss`; counts: scored tokens of each completion. The logits of the
    student ("entropy"), or of both models ("teacher_ahead"), are computed once more than without.
    """

    def read(hidden: Tensor, head: Tensor) -> dict[str, Tensor]:
        form = choose_form(config, head)
        figures = _run_chunks(form, hidden, head, None, labels, config, chunk_size)
        return dict(zip(STUDENT_FIGURES, figures, strict=True))

    if config.token_weight == "entropy":
        values = read(student_hidden, student_head)["student_entropy"].clamp(min=0.0)
    elif config.token_weight == "teacher_ahead":
        assert teacher_hidden is not None and teacher_head is not None, "no teacher can be ahead"
        ours, theirs = read(student_hidden, student_head), read(teacher_hidden, teacher_head)
        values = (theirs["label_logprob"] - ours["label_logprob"]).clamp(min=0.0)
    else:
        values = student_hidden.new_ones(len(labels), dtype=compute_dtype(student_hidden))
    return token_weights(values, counts, config)


@torch.no_grad()
def chunked_divergences(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    chunk_size: int = 512,
) -> dict[str, Tensor]:
    """Exact full-vocabulary figures of every token, in nats at temperature 1, fp32 (N,) each.

    `kl` = KL(teacher || student), `jsd` (beta 0.5, at most log 2), `student_entropy`,
    `teacher_entropy`. Shapes as in `chunked_opsd_loss`.

    Raises:
        ValueError: the vocabularies differ.
    """
    if student_head.shape[0] != teacher_head.shape[0]:
        raise ValueError(vocabulary_hint(student_head.shape[0], teacher_head.shape[0]))
    config = LossConfig(top_k=None, token_clip=None)
    labels = torch.zeros(student_hidden.shape[0], dtype=torch.long, device=student_hidden.device)
    teacher = (teacher_hidden, teacher_head)
    _assert_fit(student_hidden, student_head, teacher, labels)
    form = choose_form(config, student_head, teacher_head)
    figures = _run_chunks(form, student_hidden, student_head, teacher, labels, config, chunk_size)
    found = dict(zip(FIGURES, figures, strict=True))
    return {
        "kl": found["forward_kl"],
        "jsd": found["divergence"],
        "student_entropy": found["student_entropy"],
        "teacher_entropy": found["teacher_entropy"],
    }


class _Form(Protocol):
    """What `chunk` and `kernel_chunk` are: the arithmetic between the products."""

    def read_teacher(self, logits: Tensor, labels: Tensor, config: LossConfig) -> Target: ...

    def chunk_loss(
        self,
        logits: Tensor,
        target: Target | None,
        labels: Tensor,
        config: LossConfig,
        form_gradient: bool,
        weights: Tensor | None,
    ) -> ChunkLoss: ...

    def scale_gradient(self, gradient: Tensor, factor: Tensor) -> Tensor: ...


def choose_form(config: LossConfig, *heads: Tensor, cached: bool = False) -> _Form:
    """The kernels if they compute this loss on the logits of these heads, otherwise torch.

    cached: the teacher's entries are given, which the kernels take where they are a top-k.
    """
    top_k = config.top_k_of(heads[0].shape[0])
    with_tail = config.tail_bucket and top_k is not None
    whole = cached and top_k is None
    if with_tail or whole or not all(fast.runs_kernels("loss", head) for head in heads):
        return chunk
    from scripts.visual_opsd.loss import kernel_chunk

    return kernel_chunk


class _GradientInForward(torch.autograd.Function):
    """Loss and gradient in one pass over the chunks; backward multiplies by what arrives."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # (N, H)
        head: Tensor,  # (V, H)
        teacher: tuple[Tensor, Tensor] | Entries | None,
        labels: Tensor,  # (N,)
        config: LossConfig,
        chunk_size: int,
        form_gradient: bool,
        weights: Tensor | None,  # (N,)
    ) -> tuple[Tensor, Tensor]:
        heads = (head, teacher[1]) if isinstance(teacher, tuple) else (head,)
        form = choose_form(config, *heads, cached=isinstance(teacher, Entries))
        wanted = [form_gradient and needed for needed in ctx.needs_input_grad[:2]]
        gradients = _Gradients(hidden, head, *wanted) if any(wanted) else None
        figures = _run_chunks(
            form, hidden, head, teacher, labels, config, chunk_size, gradients, weights
        )
        found = dict(zip(FIGURES, figures, strict=False))
        losses = torch.zeros_like(found["ce"])
        if teacher is not None:
            losses = config.jsd_weight * found["divergence"]
        if isinstance(teacher, Entries):
            losses = losses * teacher.weight
        if config.ce_weight != 0.0:
            losses = losses + config.ce_weight * found["ce"]
        if weights is not None:
            losses = losses * weights
        ctx.gradients = (None, None) if gradients is None else gradients.finish()
        ctx.scale_gradient = form.scale_gradient
        ctx.mark_non_differentiable(figures)
        return losses.sum(), figures

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _grad_figures: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "backward ran a second time through chunked_opsd_loss, whose gradients were "
                "handed over by the first: compute the loss again"
            )
        gradients = ctx.gradients
        ctx.gradients = None  # the only other reference: AccumulateGrad then needs no copy
        scaled = [None if g is None else ctx.scale_gradient(g, grad_loss) for g in gradients]
        return (*scaled, None, None, None, None, None, None)


_gradient_in_forward: Callable[..., tuple[Tensor, Tensor]] = _GradientInForward.apply


def _run_chunks(
    form: _Form,
    hidden: Tensor,
    head: Tensor,
    teacher: tuple[Tensor, Tensor] | Entries | None,
    labels: Tensor,
    config: LossConfig,
    chunk_size: int,
    gradients: _Gradients | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """FIGURES (number of them, N); the buffers of logits end with it."""
    tokens, vocab, kind = hidden.shape[0], head.shape[0], compute_dtype(hidden)
    count = len(STUDENT_FIGURES if teacher is None else FIGURES)
    figures = hidden.new_zeros(count, tokens, dtype=kind)

    def read(theirs: Tensor | Entries, part: slice) -> Target:
        if isinstance(theirs, Entries):
            return cached_target(theirs, config, vocab, kind)
        return form.read_teacher(theirs, labels[part], config)

    for part, target, logits in in_chunks(hidden, head, teacher, read, config, chunk_size):
        factors = None if weights is None else weights[part]
        found = form.chunk_loss(
            logits, target, labels[part], config, gradients is not None, factors
        )
        figures[:, part] = found.figures
        if gradients is not None:
            assert found.gradient is not None
            gradients.add(part, found.gradient)
    return figures


def in_chunks(
    hidden: Tensor,
    head: Tensor,
    teacher: tuple[Tensor, Tensor] | Entries | None,
    read: Callable[[Tensor | Entries, slice], T],
    config: LossConfig,
    chunk_size: int,
) -> Iterator[tuple[slice, T | None, Tensor]]:
    """Chunks of tokens: which, what `read` makes of the teacher there, the student's logits (c, V).

    Logits last until the next chunk, and may be overwritten.

    Args:
        read: gets the teacher's logits (c, V), which the student's replace unless the loss needs
            both at once, or its entries.
    """
    tokens, vocab = hidden.shape[0], head.shape[0]
    # The top-k form is done with the teacher's logits before it needs the student's.
    shared = not isinstance(teacher, tuple) or (
        config.top_k_of(vocab) is not None and teacher[1].dtype == head.dtype
    )
    if not shared:
        chunk_size = max(1, chunk_size // 2)
    logits_buffer = head.new_empty(min(chunk_size, tokens), vocab)
    teacher_buffer = logits_buffer
    if isinstance(teacher, tuple) and not shared:
        teacher_buffer = teacher[1].new_empty(logits_buffer.shape)
    for start in range(0, tokens, chunk_size):
        part = slice(start, min(start + chunk_size, tokens))
        size = part.stop - start
        target = None
        if isinstance(teacher, Entries):
            target = read(teacher.part(part), part)
        elif teacher is not None:
            out = teacher_buffer[:size]
            torch.mm(teacher[0][part], teacher[1].t(), out=out)
            target = read(out, part)
        yield part, target, torch.mm(hidden[part], head.t(), out=logits_buffer[:size])


class _Gradients:
    """Collects d loss / d hidden (N, H) and d loss / d head (V, H), where they are wanted."""

    def __init__(self, hidden: Tensor, head: Tensor, of_hidden: bool, of_head: bool) -> None:
        self.hidden, self.head = hidden, head
        self.of_hidden = hidden.new_empty(hidden.shape) if of_hidden else None
        self.head_wanted = of_head
        self.of_head: Tensor | None = None
        self.sparse: list[TopKGradient] = []

    def add(self, part: slice, gradient: Tensor | TopKGradient) -> None:
        """d loss / d logits of the tokens `part`, (c, V), which may be overwritten afterwards."""
        if isinstance(gradient, TopKGradient):
            from scripts.visual_opsd.loss import sparse_products

            self.sparse.append(gradient)
            if self.of_hidden is not None:
                sparse_products.sparse_times_head(*gradient, self.head, self.of_hidden[part])
            return
        if self.of_hidden is not None:
            torch.mm(gradient, self.head, out=self.of_hidden[part])
        if self.head_wanted:
            if self.of_head is None:
                self.of_head = self.head.new_empty(self.head.shape)
            beta = 1.0 if part.start else 0.0  # the first chunk overwrites the empty buffer
            out = self.of_head
            torch.addmm(out, gradient.t(), self.hidden[part], beta=beta, out=out)

    def finish(self) -> tuple[Tensor | None, Tensor | None]:
        """Both gradients, when every chunk has been added."""
        if self.head_wanted and self.sparse:
            from scripts.visual_opsd.loss import sparse_products

            values, entries = (torch.cat(parts) for parts in zip(*self.sparse, strict=True))
            vocab = self.head.shape[0]
            self.of_head = sparse_products.sparse_times_hidden(values, entries, self.hidden, vocab)
        elif self.head_wanted and self.of_head is None:  # there was no token
            self.of_head = self.head.new_zeros(self.head.shape)
        return self.of_hidden, self.of_head


def _assert_fit(
    hidden: Tensor,
    head: Tensor,
    teacher: tuple[Tensor, Tensor] | Entries | None,
    labels: Tensor,
) -> None:
    """Shapes and dtypes; labels are held to the vocabulary by `gather`."""
    if isinstance(teacher, Entries):
        assert len(teacher) == len(labels), (len(teacher), len(labels))
    theirs = teacher if isinstance(teacher, tuple) else (hidden, head)
    for states, weight in ((hidden, head), theirs):
        shapes = (states.shape, weight.shape, labels.shape)
        assert states.dim() == weight.dim() == 2 and states.shape[1] == weight.shape[1], shapes
        assert states.dtype == weight.dtype, (states.dtype, weight.dtype)
        assert weight.shape[0] == head.shape[0], vocabulary_hint(head.shape[0], weight.shape[0])
        assert labels.shape == states.shape[:1], shapes
