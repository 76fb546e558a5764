# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""What the tests of the loss share: its forms, their inputs, and the plain loss as their oracle."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from scripts.visual_opsd.loss import chunked
from scripts.visual_opsd.opsd_loss import LossConfig, generalized_jsd_loss, tinker_reverse_kl_loss

if not torch.cuda.is_available():  # read when Triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Called with unpacked lists of tensors, whose length a type checker cannot know.
chunked_opsd_loss: Callable[..., tuple[Tensor, dict[str, Tensor]]] = chunked.chunked_opsd_loss
chunked_divergences: Callable[..., dict[str, Tensor]] = chunked.chunked_divergences

CONFIGS = {
    "paper": LossConfig(top_k=9),
    "paper_default": LossConfig(),  # all of a small vocabulary
    "full": LossConfig(top_k=None, token_clip=None),
    "full_clip_T": LossConfig(top_k=None, token_clip=0.02, temperature=1.7),
    "full_token_clip": LossConfig(top_k=0, clip_scope="token", token_clip=0.3),
    "full_ce": LossConfig(top_k=None, ce_weight=0.3, temperature=0.8),
    "forward_kl": LossConfig(beta=0.0, top_k=9, token_clip=None),
    "forward_kl_full_clip": LossConfig(beta=0.0, top_k=None, token_clip=0.05),
    "reverse_kl": LossConfig(beta=1.0, top_k=9, token_clip=0.05, temperature=2.0),
    "reverse_kl_full": LossConfig(beta=1.0, top_k=None, token_clip=None),
    "uneven_beta": LossConfig(beta=0.2, top_k=9, jsd_weight=0.7),
    "token_clip": LossConfig(top_k=9, clip_scope="token", token_clip=0.2),
    "tail": LossConfig(top_k=9, tail_bucket=True),
    "tail_T_no_clip": LossConfig(top_k=9, tail_bucket=True, token_clip=None, temperature=2.0),
    "tail_forward_kl": LossConfig(beta=0.0, top_k=9, tail_bucket=True, token_clip=None),
    "tail_reverse_kl_ce": LossConfig(
        beta=1.0, top_k=9, tail_bucket=True, token_clip=None, ce_weight=0.5
    ),
    "tail_all_but_one": LossConfig(top_k=36, tail_bucket=True),
    "topk_ce": LossConfig(top_k=9, ce_weight=0.4, jsd_weight=0.5, temperature=1.3),
    "tinker": LossConfig(loss_kind="tinker"),
    "tinker_T_ce": LossConfig(loss_kind="tinker", temperature=1.5, ce_weight=0.2),
    "ce_only_with_teacher": LossConfig(jsd_weight=0.0, ce_weight=1.0),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
# Sparse products are taken where the gradient is 0 outside a top-k.
every_config_and_form = pytest.mark.parametrize(
    ("config", "name"),
    [
        pytest.param(config, form, id=f"{name}-{form}")
        for name, config in CONFIGS.items()
        for form in ("torch", "kernels", "sparse")
        if form != "sparse" or (config.top_k == 9 and not (config.tail_bucket or config.ce_weight))
    ],
)


def kernels_run() -> bool:
    """Whether Triton's kernels run here: on a GPU, or on the CPU in its interpreter."""
    try:
        import triton
    except ImportError:
        return False
    compiled = isinstance(triton.language.sum, triton.JITFunction)
    return torch.cuda.is_available() or not compiled  # compiled: imported before us, by itself


@dataclass(frozen=True)
class Form:
    """A way the loss is computed: "torch" in fp64, "kernels" or "sparse" products in fp32."""

    name: str

    @property
    def vocab(self) -> int:
        """37: one more than tail_all_but_one's k; 300: 10 groups, two segments of a kernel."""
        return 37 if self.name == "torch" else 300

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.name == "torch" else torch.float32

    def inputs(
        self, tokens: int = 11, dtype: torch.dtype | None = None, seed: int = 0
    ) -> tuple[list[Tensor], Tensor]:
        """[student hidden, student head, teacher hidden, teacher head], labels."""
        device = "cpu" if self.name == "torch" else DEVICE
        return draw_inputs(tokens, self.vocab, dtype or self.dtype, device=device, seed=seed)

    def assert_close(self, ours: Any, theirs: Any) -> None:
        """Within rounding of the form's dtype."""
        atol, rtol = (1e-12, 1e-10) if self.name == "torch" else (1e-5, 2e-5)
        torch.testing.assert_close(ours, theirs, atol=atol, rtol=rtol, check_dtype=False)


def draw_inputs(
    tokens: int,
    vocab: int,
    dtype: torch.dtype,
    *,
    width: int = 6,
    scale: float = 1.5,
    device: str = "cpu",
    seed: int = 0,
) -> tuple[list[Tensor], Tensor]:
    """[student hidden, student head, teacher hidden, teacher head], labels; teachers are wider."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        values = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return (scale * values * shape[-1] ** -0.25).to(dtype).to(device)

    tensors = [draw(tokens, width), draw(vocab, width)]
    tensors += [draw(tokens, width + 3), draw(vocab, width + 3)]
    tensors[0].requires_grad_()
    tensors[1].requires_grad_()
    return tensors, torch.randint(vocab, (tokens,), generator=generator).to(device)


def gradients(loss: Tensor, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, tensors[:2])


def in_double(tensors: list[Tensor]) -> list[Tensor]:
    """The same numbers in fp64, the first two with a gradient."""
    exact = [tensor.detach().double() for tensor in tensors]
    return [tensor.requires_grad_() if i < 2 else tensor for i, tensor in enumerate(exact)]


def plain_divergence(logits: Tensor, target: Tensor, labels: Tensor, config: LossConfig) -> Tensor:
    """Summed over tokens, by opsd_loss.py."""
    if config.loss_kind == "tinker":
        mean = tinker_reverse_kl_loss(logits, target, labels, temperature=config.temperature)
        return len(labels) * mean
    names = ("beta", "temperature", "top_k", "token_clip", "tail_bucket", "clip_scope")
    options = {name: getattr(config, name) for name in names}
    return generalized_jsd_loss(logits, target, reduction="sum", **options)


def plain_loss(tensors: list[Tensor], labels: Tensor, config: LossConfig) -> Tensor:
    """`chunked_opsd_loss` by whole logits, opsd_loss.py, cross_entropy and autograd."""
    student_hidden, student_head, teacher_hidden, teacher_head = tensors
    logits = student_hidden @ student_head.t()
    with torch.no_grad():
        target = teacher_hidden @ teacher_head.t()
    kind = torch.promote_types(logits.dtype, torch.float32)
    ce = F.cross_entropy(logits.to(kind), labels, reduction="sum")
    divergence = plain_divergence(logits, target, labels, config)
    return config.jsd_weight * divergence + config.ce_weight * ce
