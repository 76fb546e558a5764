# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The loss against a cached teacher: what it has in common with the one in memory, and its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from data.teacher_cache import Entries
from scripts.visual_opsd.loss.cached import read_entries
from scripts.visual_opsd.opsd_loss import LossConfig, divergence_terms
from tests.visual_opsd.loss.forms import CONFIGS, Form, chunked_opsd_loss, gradients, in_double

# What a cache can teach as a teacher in memory does: all but the policy gradient, and a tail at T.
SAME = {
    name: config
    for name, config in CONFIGS.items()
    if config.loss_kind != "tinker"
    and not (config.tail_bucket and config.temperature != 1.0)
    and name != "tail_all_but_one"  # another vocabulary in each form
}


def keep(tensors: list[Tensor], top_k: int, weight: float = 1.0) -> Entries:
    """What a cache holds of the teacher, unrounded."""
    values, entries, tail = read_entries(tensors[2], tensors[3], top_k, chunk_size=4)
    return Entries(values, entries.to(torch.int32), tail, torch.full_like(tail, weight))


IN_KERNELS = ("paper", "reverse_kl", "token_clip", "topk_ce")  # the others differ in torch only


@pytest.mark.parametrize(
    ("config", "name"),
    [
        pytest.param(config, form, id=f"{name}-{form}")
        for name, config in SAME.items()
        for form in ("torch", "kernels")
        if form == "torch" or name in IN_KERNELS
    ],
)
def test_equals_the_loss_with_the_teacher_in_memory(
    config: LossConfig, name: str, use_form: Callable[[str], Form]
) -> None:
    """Loss, gradients and figures, on a top-k that is the cache's, smaller, or everything."""
    form = use_form(name)
    tensors, labels = form.inputs()
    k = config.top_k_of(form.vocab)
    for held in (form.vocab,) if k is None else (k, k + 5):
        loss, stats = chunked_opsd_loss(*tensors, labels, config, chunk_size=4)
        expected = gradients(loss, tensors)
        cached = keep(tensors, held)
        ours, found = chunked_opsd_loss(
            *tensors[:2], None, None, labels, config, chunk_size=4, cached=cached
        )
        form.assert_close(ours, loss)
        form.assert_close(gradients(ours, tensors), expected)
        assert found.keys() == stats.keys()
        same = {"rows", "ce", "student_entropy", "label_logprob", "divergence", "forward_kl"}
        if k is None:  # else of what is outside only the mass is known
            same |= {"teacher_entropy"}
        if k is None or config.temperature == 1.0:
            same |= {"teacher_topk_mass"}
        for key in same:
            form.assert_close(found[key], stats[key])


def plain(tensors: list[Tensor], labels: Tensor, config: LossConfig, cached: Entries) -> Tensor:
    """The definition, by whole logits and autograd."""
    logits = tensors[0] @ tensors[1].t()
    entries, temperature = cached.entries.long(), config.temperature
    log_s = F.log_softmax(logits, -1)
    inside = log_s.gather(-1, entries)
    outside = log_s.scatter(-1, entries, -torch.inf).logsumexp(-1, keepdim=True)
    ours, theirs = (
        torch.cat([inside, outside], -1),
        torch.cat([cached.log_probs, cached.tail[:, None]], -1),
    )
    if not config.tail_bucket:
        ours, theirs = inside, cached.log_probs
    ours, theirs = (F.log_softmax(x / temperature, -1) for x in (ours, theirs))
    terms = divergence_terms(ours, theirs, config.beta)
    if config.token_clip is not None:
        terms = terms.clamp(max=config.token_clip)
    ce = F.cross_entropy(logits, labels, reduction="none")
    divergence = cached.weight * temperature**2 * terms.sum(-1)
    return (config.jsd_weight * divergence + config.ce_weight * ce).sum()


OWN = {
    "the issue's": LossConfig(
        beta=0.0, temperature=2.0, top_k=9, token_clip=None, jsd_weight=0.5, ce_weight=1.0
    ),
    "tail": LossConfig(
        beta=0.0, temperature=2.0, top_k=9, token_clip=None, ce_weight=1.0, tail_bucket=True
    ),
    "tail, clipped": LossConfig(temperature=0.7, top_k=9, token_clip=0.02, tail_bucket=True),
}


@pytest.mark.parametrize("config", OWN.values(), ids=OWN)
def test_weights_and_a_tail_at_another_temperature(
    config: LossConfig, use_form: Callable[[str], Form]
) -> None:
    form = use_form("torch")
    tensors, labels = form.inputs()
    cached = keep(tensors, 9)
    weights = torch.linspace(0, 2, len(labels), dtype=torch.float64)
    cached = replace(cached, weight=weights)
    exact = in_double(tensors)
    expected = plain(exact, labels, config, cached)
    ours, _ = chunked_opsd_loss(
        *tensors[:2], None, None, labels, config, chunk_size=3, cached=cached
    )
    form.assert_close(ours, expected)
    form.assert_close(gradients(ours, tensors), gradients(expected, exact))
    # A student that is the teacher has nothing to learn of it, whatever the temperature.
    same = [tensors[2].clone().requires_grad_(), tensors[3].clone().requires_grad_()]
    alone = replace(config, ce_weight=0.0)
    loss, _ = chunked_opsd_loss(*same, None, None, labels, alone, cached=cached)
    assert float(loss.detach()) == pytest.approx(0, abs=1e-12)
    assert all(float(g.abs().max()) < 1e-12 for g in gradients(loss, same))


def test_weights_in_the_kernels(use_form: Callable[[str], Form]) -> None:
    form = use_form("kernels")
    tensors, labels = form.inputs()
    cached = keep(tensors, 9)
    cached = replace(cached, weight=torch.linspace(0, 2, len(labels)).to(cached.tail.device))
    exact = in_double(tensors)
    double = Entries(cached.log_probs.double(), cached.entries, cached.tail.double(),
                     cached.weight.double())  # fmt: skip
    expected = plain(exact, labels, OWN["the issue's"], double)
    ours, _ = chunked_opsd_loss(
        *tensors[:2], None, None, labels, OWN["the issue's"], chunk_size=6, cached=cached
    )
    form.assert_close(ours, expected)
    form.assert_close(gradients(ours, tensors), gradients(expected, exact))


def test_what_is_kept() -> None:
    """Log-probabilities of the full softmax, the largest first, and the mass outside."""
    generator = torch.Generator().manual_seed(3)
    hidden, head = (torch.randn(n, 5, generator=generator) for n in (7, 20))
    log_t = F.log_softmax(hidden @ head.t(), -1)
    values, entries, tail = read_entries(hidden, head, 6, chunk_size=3)
    order = log_t.argsort(-1, descending=True)
    torch.testing.assert_close(entries, order[:, :6])
    torch.testing.assert_close(values, log_t.gather(-1, order[:, :6]))
    torch.testing.assert_close(tail.exp(), log_t.exp().gather(-1, order[:, 6:]).sum(-1))
    values, entries, tail = read_entries(hidden, head, 256)
    assert values.shape == (7, 20) and bool((tail == -torch.inf).all())
