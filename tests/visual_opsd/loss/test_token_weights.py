# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Weights of scored tokens: by their definition, and in each form of the loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from scripts.visual_opsd.config import LossSettings
from scripts.visual_opsd.loss.chunked import chunked_token_weights
from scripts.visual_opsd.opsd_loss import (
    LossConfig,
    generalized_jsd_loss,
    tinker_reverse_kl_loss,
    token_weights,
    weigh_by,
)
from tests.visual_opsd.loss.forms import CONFIGS, Form, chunked_opsd_loss, gradients, in_double

WEIGHED = {
    "early": {"token_weight": "early:2"},
    "skip": {"skip_first_tokens": 1},
    "early_skip": {"token_weight": "early:3", "skip_first_tokens": 1},
    "entropy": {"token_weight": "entropy"},
    "teacher_ahead_skip": {"token_weight": "teacher_ahead", "skip_first_tokens": 1},
}  # fmt: skip
COUNTS = (4, 0, 2, 1)  # of completions with 7 scored tokens


def weights_of(kind: str, values: list[float], counts: tuple[int, ...], skip: int = 0) -> Any:
    config = LossConfig(token_weight=kind, skip_first_tokens=skip)
    return token_weights(torch.tensor(values, dtype=torch.float64), counts, config).tolist()


def test_definition() -> None:
    """Mean 1 over each completion; zeros before what counts, after it, and where nothing does."""
    ones = [1.0] * 7
    assert weights_of("none", ones, COUNTS) == ones
    assert weights_of("none", ones, COUNTS, 1) == [0, 4 / 3, 4 / 3, 4 / 3, 0, 2, 0]
    assert weights_of("early:2", ones, COUNTS) == [2, 2, 0, 0, 1, 1, 1]
    assert weights_of("early:3", ones, COUNTS, 1) == [0, 2, 2, 0, 0, 2, 0]
    by_value = weights_of("entropy", [1, 2, 3, 2, 0.5, 1.5, 9], COUNTS)
    assert by_value == [0.5, 1, 1.5, 1, 0.5, 1.5, 1]
    assert weights_of("teacher_ahead", [0, 0, 0, 0, 0, 3, 9], COUNTS, 1) == [0, 0, 0, 0, 0, 2, 0]
    values = torch.ones(3)
    token_weights(values, (3,), LossConfig(skip_first_tokens=2))
    assert values.tolist() == [1, 1, 1], "what is weighed by stays as it is"


def test_what_is_weighed_by() -> None:
    student, teacher = torch.randn(2, 5, 9, dtype=torch.float64).unbind()
    labels, at = torch.tensor([0, 8, 3, 3, 1]), torch.arange(5)
    s, t = (student / 1.7).softmax(-1), (teacher / 1.7).softmax(-1)
    entropy = LossConfig(temperature=1.7, token_weight="entropy")
    ahead = LossConfig(temperature=1.7, token_weight="teacher_ahead")
    found = weigh_by(student, None, labels, entropy)
    torch.testing.assert_close(found, -(s * s.log()).sum(-1))
    lead = (t[at, labels] / s[at, labels]).log()
    torch.testing.assert_close(weigh_by(student, teacher, labels, ahead), lead.clamp(min=0))
    assert weigh_by(student, None, labels, LossConfig()).tolist() == [1] * 5


def plain_loss(tensors: list[Tensor], labels: Tensor, config: LossConfig) -> Tensor:
    """By whole logits, opsd_loss.py, cross_entropy and autograd."""
    logits = tensors[0] @ tensors[1].t()
    target = (tensors[2] @ tensors[3].t()).detach()
    values = weigh_by(logits, target, labels, config)
    weights = token_weights(values, COUNTS, config)
    ce = F.cross_entropy(logits, labels, reduction="none") @ weights
    if config.loss_kind == "tinker":
        divergence = len(labels) * tinker_reverse_kl_loss(
            logits, target, labels, temperature=config.temperature, weights=weights
        )
    else:
        names = ("beta", "temperature", "top_k", "token_clip", "tail_bucket", "clip_scope")
        options = {name: getattr(config, name) for name in names}
        divergence = generalized_jsd_loss(
            logits, target, reduction="sum", weights=weights, **options
        )
    return config.jsd_weight * divergence + config.ce_weight * ce


FORMS = [("torch", name) for name in CONFIGS] + [
    ("kernels", "topk_ce"), ("kernels", "full_ce"), ("kernels", "tinker_T_ce"),
    ("kernels", "full_token_clip"), ("sparse", "paper"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "config"), FORMS)
def test_chunked_equals_plain_with_its_gradients(
    name: str, config: str, use_form: Callable[[str], Form]
) -> None:
    form = use_form(name)
    tensors, labels = form.inputs(7)
    exact = in_double(tensors)
    kinds = WEIGHED if name == "torch" else {"teacher_ahead_skip": WEIGHED["teacher_ahead_skip"]}
    for size in (2, 512) if name == "torch" else (4,):
        for options in kinds.values():
            asked = replace(CONFIGS[config], **options)  # type: ignore[arg-type]
            weights = chunked_token_weights(
                tensors[0], tensors[1], tensors[2], tensors[3], labels, COUNTS, asked,
                chunk_size=size,
            )  # fmt: skip
            assert weights.dtype == form.dtype and not weights.requires_grad
            loss, stats = chunked_opsd_loss(
                *tensors, labels, asked, chunk_size=size, weights=weights
            )
            expected = plain_loss(exact, labels, asked)
            form.assert_close(loss, expected)
            form.assert_close(gradients(loss, tensors), gradients(expected, exact))
            assert stats["weightless"] == (weights == 0).sum()
            _, without = chunked_opsd_loss(*tensors, labels, asked, chunk_size=size)
            assert "weightless" not in without
            for figure, value in without.items():
                assert torch.equal(stats[figure], value), figure


def test_without_a_teacher_and_without_tokens(use_form: Callable[[str], Form]) -> None:
    """As in SFT; and the pack of a rank that has no row."""
    tensors, labels = use_form("torch").inputs(7)
    alone: Any = (*tensors[:2], None, None)
    config = LossConfig(jsd_weight=0.0, ce_weight=1.0, token_weight="entropy")
    weights = chunked_token_weights(tensors[0], tensors[1], None, None, labels, COUNTS, config)
    loss, _ = chunked_opsd_loss(*alone, labels, config, weights=weights)
    ce = F.cross_entropy(tensors[0] @ tensors[1].t(), labels, reduction="none")
    torch.testing.assert_close(loss, (weights * ce).sum())
    config = LossConfig(token_weight="teacher_ahead")
    nothing = (tensors[0][:0], tensors[1], tensors[2][:0], tensors[3])
    weights = chunked_token_weights(*nothing, labels[:0], (0,), config)
    loss, stats = chunked_opsd_loss(*nothing, labels[:0], config, weights=weights)
    loss.backward()
    assert loss == 0 and stats["weightless"] == 0


def test_labels_and_weights_go_together() -> None:
    """Dropped tokens take their weights with them; a weight for each token is asked for."""
    student, teacher = torch.randn(2, 4, 6).unbind()
    labels, weights = torch.tensor([1, -100, 2, -100]), torch.tensor([2.0, 9.0, 0.5, 9.0])
    each = generalized_jsd_loss(student, teacher, labels, reduction="none")
    loss = generalized_jsd_loss(student, teacher, labels, weights=weights)
    torch.testing.assert_close(loss, (2 * each[0] + 0.5 * each[1]) / 2)
    with pytest.raises(ValueError, match=r"weights has shape \(3,\), the logits are of \(4,\)"):
        generalized_jsd_loss(student, teacher, labels, weights=weights[:3])


@pytest.mark.parametrize("text", ["early", "early:0", "early:x", "early:N", "early:-1", "late:3"])
def test_unknown_weights(text: str) -> None:
    with pytest.raises(ValueError, match="unknown token_weight"):
        LossConfig(token_weight=text)
    with pytest.raises(ValueError, match="--token_weight must be none, early:N"):
        LossSettings(token_weight=text)


def test_settings_that_leave_nothing() -> None:
    with pytest.raises(ValueError, match="leaves none"):
        LossConfig(token_weight="early:3", skip_first_tokens=3)
    with pytest.raises(ValueError, match="--skip_first_tokens 3 leaves none: lower the latter"):
        LossSettings(token_weight="early:3", skip_first_tokens=3)
    with pytest.raises(ValueError, match="skip_first_tokens is -1"):
        LossConfig(skip_first_tokens=-1)
    with pytest.raises(ValueError, match="teacher_ahead needs a teacher"):
        LossSettings(token_weight="teacher_ahead", jsd_weight=0)
    assert not LossConfig().weighs_tokens
