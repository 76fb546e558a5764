# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The objective against the recorded reference values and against its definition in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from scripts.visual_opsd.opsd_loss import (
    LossConfig,
    divergence_per_token,
    generalized_jsd_loss,
    tinker_reverse_kl_loss,
)
from tests.conftest import assert_golden, load_golden

META, TENSORS = load_golden("10_opsd_loss")


def logits_of(key: str) -> tuple[Tensor, Tensor]:
    prefix = "peaky_" if key.startswith("peaky") else ""
    student = TENSORS[prefix + "student_logits"].clone().requires_grad_()
    return student, TENSORS[prefix + "teacher_logits"]


def assert_scalar(actual: Tensor, expected: float | list[float], top_k: int | None) -> None:
    # Rows with top_k 1 hold rounding residue only; the recorded one exceeds the general tolerance.
    tolerance = {"atol": 1e-5, "rtol": 0.0} if top_k == 1 else META["scalar_tolerance"]
    torch.testing.assert_close(actual.detach(), torch.tensor(expected), **tolerance)


@pytest.mark.parametrize("entry", META["grid"] + META["peaky_grid"], ids=lambda e: e["key"])
def test_golden_values_and_gradients(entry: dict[str, Any]) -> None:
    student, teacher = logits_of(entry["key"])
    labels = TENSORS["labels"] if entry.get("labels") else None
    options = {k: entry[k] for k in ("beta", "temperature", "top_k", "token_clip")}

    for reduction in ("mean", "sum", "none"):
        if reduction in entry:
            value = generalized_jsd_loss(student, teacher, labels, reduction=reduction, **options)
            assert_scalar(value, entry[reduction], entry["top_k"])
    loss = generalized_jsd_loss(student, teacher, labels, **options)
    (grad,) = torch.autograd.grad(loss, student)
    if "grad" in entry:
        assert_golden(META, entry["grad"], grad, TENSORS[entry["grad"]])
    if "grad_abs_sum" in entry:
        tolerance = 1e-5 if entry["top_k"] == 1 else 1e-4 * entry["grad_abs_sum"]
        assert abs(float(grad.abs().sum()) - entry["grad_abs_sum"]) <= tolerance


@pytest.mark.parametrize("entry", META["tinker"], ids=lambda e: e["grad"])
def test_golden_tinker(entry: dict[str, Any]) -> None:
    student, teacher = logits_of("")
    teacher = teacher.clone().requires_grad_()
    labels = TENSORS["labels"] if entry["labels"] else None
    ids, temperature = TENSORS["sampled_ids"], entry["temperature"]
    loss = tinker_reverse_kl_loss(student, teacher, ids, labels, temperature)
    assert_scalar(loss, entry["loss"], None)
    loss.backward()
    assert student.grad is not None
    assert_golden(META, entry["grad"], student.grad, TENSORS[entry["grad"]])
    assert teacher.grad is None or not teacher.grad.any()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_all_rows_ignored_is_zero_with_a_graph(reduction: str) -> None:
    student, teacher = logits_of("")
    labels = torch.full((7,), -100)
    loss = generalized_jsd_loss(student, teacher, labels, reduction=reduction)
    loss.backward()
    assert loss.item() == META["all_ignored_labels_loss"] == 0.0
    assert student.grad is not None and not student.grad.any()
    assert generalized_jsd_loss(student, teacher, labels, reduction="none").shape == (0,)
    tinker = tinker_reverse_kl_loss(student, teacher, TENSORS["sampled_ids"], labels)
    tinker.backward()
    assert tinker.item() == 0.0


def peaked(rows: int = 5, vocab: int = 40, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student = 3 * torch.randn(rows, vocab, generator=generator, dtype=torch.float64)
    return student, student + 2 * torch.randn(rows, vocab, generator=generator, dtype=torch.float64)


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("top_k", [None, 7])
@pytest.mark.parametrize("tail_bucket", [False, True])
def test_definition(temperature: float, top_k: int | None, tail_bucket: bool) -> None:
    """The docstring's formulas, with probabilities instead of log-probabilities, in float64."""
    student, teacher = peaked()
    s, t = (student / temperature).softmax(-1), (teacher / temperature).softmax(-1)
    if top_k is not None:
        kept = torch.zeros_like(t, dtype=torch.bool)
        for row in range(len(t)):
            kept[row, t[row].argsort(descending=True)[:top_k]] = True
        s_in, t_in = s[kept].reshape(-1, top_k), t[kept].reshape(-1, top_k)
        s_tail, t_tail = s.sum(-1) - s_in.sum(-1), t.sum(-1) - t_in.sum(-1)
        if tail_bucket:
            s, t = torch.cat([s_in, s_tail[:, None]], -1), torch.cat([t_in, t_tail[:, None]], -1)
        else:
            s, t = s_in / s_in.sum(-1, keepdim=True), t_in / t_in.sum(-1, keepdim=True)
    for beta in (0.0, 0.3, 0.5, 1.0):
        m = beta * t + (1 - beta) * s
        expected = beta * kl(t, m) + (1 - beta) * kl(s, m)
        expected = {0.0: kl(t, s), 1.0: kl(s, t)}.get(beta, expected) * temperature**2
        actual = generalized_jsd_loss(
            student,
            teacher,
            beta=beta,
            temperature=temperature,
            reduction="none",
            top_k=top_k,
            tail_bucket=tail_bucket,
        )
        torch.testing.assert_close(actual, expected, atol=1e-12, rtol=1e-10)


def test_clip_is_per_entry_unless_token_is_asked() -> None:
    student, teacher = peaked()
    clip = 0.05
    s, t = student.softmax(-1), teacher.softmax(-1)
    m = (s + t) / 2
    terms = 0.5 * t * (t / m).log() + 0.5 * s * (s / m).log()
    per_entry, per_token = terms.clamp(max=clip).sum(-1), terms.sum(-1).clamp(max=clip)
    assert (per_entry > per_token + 0.01).any()  # the two readings are told apart by these rows
    rows = generalized_jsd_loss(student, teacher, token_clip=clip, reduction="none")
    torch.testing.assert_close(rows, per_entry)
    rows = generalized_jsd_loss(
        student, teacher, token_clip=clip, clip_scope="token", reduction="none"
    )
    torch.testing.assert_close(rows, per_token)


def test_clip_has_no_lower_bound() -> None:
    """With beta 1 single terms are negative and stay so: the clipped sum can be below zero."""
    student, teacher = peaked()
    clipped = generalized_jsd_loss(student, teacher, beta=1.0, token_clip=0.0, reduction="none")
    assert (clipped < 0).all()


def test_top_k_set_is_the_teachers() -> None:
    """A student peak outside the teacher's set changes nothing; inside, it does."""
    student, teacher = peaked(rows=1)
    order = teacher[0].argsort(descending=True)
    base = generalized_jsd_loss(student, teacher, top_k=3)
    for entry, changes in ((order[3], False), (order[2], True)):
        moved = student.clone()
        moved[0, entry] += 5.0
        assert bool(generalized_jsd_loss(moved, teacher, top_k=3) != base) == changes
        tail: dict[str, Any] = {"top_k": 3, "tail_bucket": True}
        assert generalized_jsd_loss(moved, teacher, **tail) != generalized_jsd_loss(
            student, teacher, **tail
        )


@pytest.mark.parametrize("top_k", [None, 0, -1, 40, 1000])
def test_top_k_outside_the_vocabulary_is_the_full_loss(top_k: int | None) -> None:
    student, teacher = peaked()
    for tail_bucket in (False, True):
        value = generalized_jsd_loss(student, teacher, top_k=top_k, tail_bucket=tail_bucket)
        assert value == generalized_jsd_loss(student, teacher)


def test_batched_logits_equal_flat_ones() -> None:
    student, teacher = peaked(rows=6)
    labels = torch.tensor([1, -100, 3, 4, 5, -100])
    shaped = student.view(2, 3, -1), teacher.view(2, 3, -1), labels.view(2, 3)
    for reduction in ("mean", "sum", "none"):
        flat = generalized_jsd_loss(student, teacher, labels, reduction=reduction)
        torch.testing.assert_close(generalized_jsd_loss(*shaped, reduction=reduction), flat)
    ids = torch.tensor([0, 1, 2, 3, 4, 5])
    torch.testing.assert_close(
        tinker_reverse_kl_loss(shaped[0], shaped[1], ids.view(2, 3), shaped[2]),
        tinker_reverse_kl_loss(student, teacher, ids, labels),
    )


def test_bfloat16_logits_are_computed_in_fp32() -> None:
    student, teacher = (x.bfloat16() for x in peaked())
    for name, loss in {
        "jsd": lambda s, t: generalized_jsd_loss(s, t, top_k=7, token_clip=0.05),
        "tinker": lambda s, t: tinker_reverse_kl_loss(s, t, torch.arange(5)),
    }.items():
        assert loss(student, teacher).dtype == torch.float32, name
        torch.testing.assert_close(
            loss(student, teacher).double(), loss(student.double(), teacher.double())
        )


@pytest.mark.parametrize("tail_bucket", [False, True])
def test_peaked_to_the_limit_stays_finite(tail_bucket: bool) -> None:
    """Probabilities that underflow in fp32 give finite values and gradients."""
    student = torch.zeros(2, 30)
    teacher = torch.zeros(2, 30)
    student[:, 0], teacher[:, 1] = 500.0, 500.0
    student.requires_grad_()
    for beta in (0.0, 0.5, 1.0):
        loss = generalized_jsd_loss(student, teacher, beta=beta, top_k=4, tail_bucket=tail_bucket)
        (grad,) = torch.autograd.grad(loss, student)
        assert torch.isfinite(loss) and torch.isfinite(grad).all(), beta
    limit = generalized_jsd_loss(student.detach(), teacher)
    assert abs(float(limit) - math.log(2)) < 1e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reduction": "avg"}, "unknown reduction 'avg'"),
        ({"beta": 1.5}, r"beta is 1.5.*\[0, 1\]"),
        ({"beta": -0.1}, r"beta is -0.1"),
        ({"beta": math.nan}, r"beta is nan"),
        ({"temperature": 0.0}, "temperature is 0.0.*positive"),
        ({"token_clip": -0.01}, "token_clip is -0.01"),
        ({"clip_scope": "row"}, "unknown clip_scope 'row'"),
        ({"labels": torch.zeros(4, dtype=torch.long)}, r"labels has shape \(4,\).*\(5,\)"),
        ({"teacher_logits": torch.zeros(5, 41)}, r"\(5, 40\) and \(5, 41\).*same tokenizer"),
        ({"teacher_logits": torch.zeros(4, 40)}, r"\(5, 40\) and \(4, 40\).*same tokens"),
    ],
)
def test_mistakes_are_named(change: dict[Any, Any], message: str) -> None:
    student, teacher = peaked()
    arguments = {"student_logits": student, "teacher_logits": teacher} | change
    with pytest.raises(ValueError, match=message):
        generalized_jsd_loss(**arguments)


def test_tinker_mistakes_are_named() -> None:
    student, teacher = peaked()
    with pytest.raises(ValueError, match=r"sampled_token_ids has shape \(4,\).*\(5,\)"):
        tinker_reverse_kl_loss(student, teacher, torch.arange(4))
    with pytest.raises(ValueError, match="temperature is -1"):
        tinker_reverse_kl_loss(student, teacher, torch.arange(5), temperature=-1.0)


def test_tinker_gradient_estimates_reverse_kl() -> None:
    """Averaged over x ~ s, -A d log s(x) is the gradient of KL(s || t)."""
    student, teacher = peaked(rows=1, vocab=12)
    student.requires_grad_()
    (expected,) = torch.autograd.grad(generalized_jsd_loss(student, teacher, beta=1.0), student)
    mean = torch.zeros_like(student)
    for token, probability in enumerate(student.detach().softmax(-1)[0]):
        loss = tinker_reverse_kl_loss(student, teacher, torch.tensor([token]))
        mean += probability * torch.autograd.grad(loss, student)[0]
    torch.testing.assert_close(mean, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss_kind": "kl"}, "unknown loss_kind 'kl'"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"jsd_weight": -1.0}, "jsd_weight is -1.0"),
        ({"ce_weight": math.inf}, "ce_weight is inf"),
    ],
)
def test_loss_config_mistakes_are_named(change: dict[str, Any], message: str) -> None:
    """Those besides the options of `generalized_jsd_loss`, which become a LossConfig there."""
    with pytest.raises(ValueError, match=message):
        LossConfig(**change)


def test_loss_config_defaults_are_the_papers() -> None:
    config = LossConfig()
    assert (config.beta, config.temperature, config.top_k, config.token_clip) == (0.5, 1, 256, 0.05)
    assert (config.jsd_weight, config.ce_weight, config.clip_scope) == (1.0, 0.0, "entry")
    assert [config.top_k_of(v) for v in (100, 256, 257)] == [None, None, 256]
    assert LossConfig(loss_kind="tinker").top_k_of(1000) is None


def test_tokens_do_not_depend_on_each_other() -> None:
    student, teacher = peaked()
    config = LossConfig(temperature=1.5, top_k=6)
    together = divergence_per_token(student, teacher, config)
    alone = [
        divergence_per_token(s[None], t[None], config)
        for s, t in zip(student, teacher, strict=True)
    ]
    torch.testing.assert_close(together, torch.cat(alone))
