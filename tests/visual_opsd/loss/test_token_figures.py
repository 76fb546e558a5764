# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Figures of tokens against whole logits in fp64, sets of ids, and autograd's gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from data.teacher_cache import Entries
from scripts.visual_opsd.loss import token_figures as module
from scripts.visual_opsd.loss.cached import read_entries
from scripts.visual_opsd.opsd_loss import (
    LossConfig,
    divergence_per_token,
    divergence_terms,
)
from tests.visual_opsd.loss.forms import (
    CONFIGS,
    Form,
    chunked_opsd_loss,
    draw_inputs,
    every_config_and_form,
)

token_figures: Callable[..., dict[str, Tensor]] = module.token_figures
figure_names = module.figure_names


def logits_of(tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The student's and the teacher's, fp64."""
    ours, head, theirs, their_head = (tensor.detach().double() for tensor in tensors)
    return ours @ head.t(), theirs @ their_head.t()


def per_token_gradient(student: Tensor, teacher: Tensor, config: LossConfig) -> Tensor:
    """d divergence of each token / d its logits, by autograd."""
    leaf = student.clone().requires_grad_()
    return torch.autograd.grad(divergence_per_token(leaf, teacher, config).sum(), leaf)[0]


def compared(logits: Tensor, index: Tensor | None, config: LossConfig) -> Tensor:
    """Log-probabilities of what the divergence compares."""
    log_p = (logits / config.temperature).log_softmax(-1)
    if index is None:
        return log_p
    if not config.tail_bucket:
        return log_p.gather(-1, index).log_softmax(-1)
    inside = log_p.gather(-1, index).exp()
    outside = log_p.exp().scatter(-1, index, 0.0).sum(-1, keepdim=True)
    return torch.cat([inside, outside], dim=-1).log()


def plain_figures(tensors: list[Tensor], labels: Tensor, config: LossConfig) -> dict[str, Tensor]:
    """Each figure from its definition, (N,) fp64."""
    student, teacher = logits_of(tensors)
    vocab, temperature = student.shape[1], config.temperature
    s, t = (student / temperature).softmax(-1), (teacher / temperature).softmax(-1)
    k = config.top_k_of(vocab)
    size = k or min(256, vocab // 2)
    favourites = teacher.topk(size, dim=-1).indices
    own = student.topk(size, dim=-1).indices
    overlap = [len({*a} & {*b}) / size for a, b in zip(own.tolist(), favourites.tolist())]  # noqa: B905
    found = {
        "student_entropy": -(s * s.log()).sum(-1),
        "teacher_entropy": -(t * t.log()).sum(-1),
        "fork": (student.argmax(-1) != teacher.argmax(-1)).double(),
        "topk_overlap": torch.tensor(overlap, dtype=torch.float64, device=s.device),
        "student_topk_mass": s.gather(-1, favourites).sum(-1),
    }
    if config.loss_kind == "tinker":
        log_s, log_t = (p.log().gather(-1, labels[:, None])[:, 0] for p in (s, t))
        return {**found, "divergence": -(log_t - log_s) * log_s}
    found["divergence"] = divergence_per_token(student, teacher, config)
    if config.token_clip is None:
        return found
    index = favourites if k else None
    terms = divergence_terms(
        compared(student, index, config), compared(teacher, index, config), config.beta
    )
    whole = per_token_gradient(student, teacher, replace(config, token_clip=None))
    left = per_token_gradient(student, teacher, config)
    bound = terms > config.token_clip
    if config.clip_scope == "entry":
        found["clip_entry"] = bound.double().mean(-1)
        found["clip_token"] = bound.any(-1).double()
    else:
        found["clip_token"] = (terms.sum(-1) > config.token_clip).double()
    return {
        **found,
        "gradient": whole.norm(dim=-1),
        "gradient_removed": (whole - left).norm(dim=-1),
    }


@every_config_and_form
def test_equals_the_definitions(
    config: LossConfig, name: str, use_form: Callable[[str], Form]
) -> None:
    """Whatever the chunks."""
    form = use_form(name)
    tensors, labels = form.inputs(11 if name == "torch" else 7)
    expected = plain_figures(tensors, labels, config)
    assert set(figure_names(config)) == expected.keys()
    for size in (1, 4, 11, 512) if name == "torch" else (4,):
        found = token_figures(*tensors, labels, config, chunk_size=size)
        assert tuple(found) == figure_names(config)
        form.assert_close(found, expected)
        assert not any(value.requires_grad for value in found.values())


def test_the_cases_say_something() -> None:
    """In the inputs of this file each figure differs from token to token."""
    config = CONFIGS["uneven_beta"]
    tensors, labels = draw_inputs(11, 37, torch.float64)
    found = token_figures(*tensors, labels, config)
    for name, values in found.items():
        assert values.unique().numel() > 1, name
    assert bool((found["gradient_removed"] < found["gradient"]).any())
    token = token_figures(*tensors, labels, CONFIGS["token_clip"])
    assert {*token["clip_token"].tolist()} == {0.0, 1.0}


@pytest.mark.parametrize("name", ["paper", "tail", "full_clip_T", "tinker"])
def test_sums_are_those_of_the_loss(name: str, form: Form) -> None:
    tensors, labels = form.inputs()
    _, stats = chunked_opsd_loss(*tensors, labels, CONFIGS[name], chunk_size=6)
    found = token_figures(*tensors, labels, CONFIGS[name], chunk_size=6)
    for figure in ("divergence", "student_entropy", "teacher_entropy"):
        form.assert_close(found[figure].sum(), stats[figure])


@pytest.mark.parametrize("name", ["paper", "full_clip_T", "tail"])
def test_the_loss_is_the_same_with_and_without(name: str, form: Form) -> None:
    """To the last bit, gradients too: nothing that the loss reads is written over."""
    tensors, labels = form.inputs()
    found = []
    for measured in (False, True):
        if measured:
            token_figures(*tensors, labels, CONFIGS[name], chunk_size=4)
        loss, _ = chunked_opsd_loss(*tensors, labels, CONFIGS[name], chunk_size=4)
        found.append((loss, *torch.autograd.grad(loss, tensors[:2])))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_equals_are_no_fork() -> None:
    """Among the largest logits of both there is a common one, whichever argmax would name."""

    def figures(student: list[float], teacher: list[float], **config: Any) -> list[float]:
        eye = torch.eye(8)
        hidden = [torch.tensor([values + [-9.0] * 4]) for values in (student, teacher)]
        found = token_figures(
            hidden[0], eye, hidden[1], eye, torch.tensor([0]), LossConfig(**config)
        )
        return found["fork"].tolist()

    for config in ({"top_k": 3}, {"top_k": None}, {"loss_kind": "tinker"}):
        assert figures([2.0, 2.0, 0.0, 0.0], [0.0, 2.0, 2.0, 0.0], **config) == [0.0]
        assert figures([2.0, 2.0, 0.0, 0.0], [0.0, 0.0, 2.0, 2.0], **config) == [1.0]
        assert figures([2.0, 1.0, 0.0, 0.0], [2.0, 0.0, 0.0, 3.0], **config) == [1.0]


@pytest.mark.parametrize("name", ["paper", "tail", "token_clip", "forward_kl"])
@pytest.mark.parametrize("held", [9, 12, 37])
def test_a_cached_teacher(name: str, held: int, use_form: Callable[[str], Form]) -> None:
    """Its entries say what the teacher itself would, but for its entropy; T is 1."""
    form, config = use_form("torch"), CONFIGS[name]
    tensors, labels = form.inputs()
    log_probs, entries, tail = read_entries(tensors[2], tensors[3], held)
    weight = torch.linspace(0.0, 2.0, len(labels), dtype=torch.float64)
    cached = Entries(log_probs, entries, tail, weight)
    found = token_figures(*tensors[:2], None, None, labels, config, chunk_size=3, cached=cached)
    expected = token_figures(*tensors, labels, config)
    for figure in set(expected) - {"teacher_entropy"}:
        form.assert_close(found[figure], expected[figure])


def test_a_cached_tail_at_another_temperature(use_form: Callable[[str], Form]) -> None:
    """The gradient's norms are those of autograd through the loss's own divergence."""
    form = use_form("torch")
    config = replace(CONFIGS["tail"], temperature=2.0, token_clip=0.01)
    tensors, labels = form.inputs()
    eye = torch.eye(37, dtype=torch.float64)
    student = logits_of(tensors)[0].requires_grad_()
    cached = Entries(*read_entries(tensors[2], tensors[3], 9), torch.ones(11).double())
    found = token_figures(student, eye, None, None, labels, config, cached=cached)

    def gradient(config: LossConfig) -> Tensor:
        loss, _ = chunked_opsd_loss(student, eye, None, None, labels, config, cached=cached)
        return torch.autograd.grad(loss, student)[0]

    whole, left = gradient(replace(config, token_clip=None)), gradient(config)
    form.assert_close(found["gradient"], whole.norm(dim=-1))
    form.assert_close(found["gradient_removed"], (whole - left).norm(dim=-1))
    assert bool((found["gradient_removed"] > 0).any())


def test_a_cache_of_the_whole_vocabulary(use_form: Callable[[str], Form]) -> None:
    form, config = use_form("torch"), LossConfig(top_k=None, token_clip=0.02)
    tensors, labels = form.inputs()
    cached = Entries(*read_entries(tensors[2], tensors[3], 37), torch.ones(11).double())
    found = token_figures(*tensors[:2], None, None, labels, config, cached=cached)
    expected = token_figures(*tensors, labels, config)
    for figure in expected:
        form.assert_close(found[figure], expected[figure])


def test_no_tokens(form: Form) -> None:
    """A rank that only takes part has every figure of none."""
    tensors, labels = form.inputs(tokens=0)
    found = token_figures(*tensors, labels, CONFIGS["paper"])
    assert {name: len(values) for name, values in found.items()} == dict.fromkeys(
        figure_names(CONFIGS["paper"]), 0
    )
