# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The chunked loss against the readable one, autograd, finite differences and its memory claim."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from scripts.visual_opsd.loss import chunk as loss_chunk
from scripts.visual_opsd.loss import chunked as chunked_loss
from scripts.visual_opsd.opsd_loss import (
    LossConfig,
    generalized_jsd_loss,
    tinker_reverse_kl_loss,
)
from tests.conftest import assert_golden, load_golden

# Called with unpacked lists of tensors, whose length a type checker cannot know.
chunked_opsd_loss: Callable[..., tuple[Tensor, dict[str, Tensor]]] = chunked_loss.chunked_opsd_loss
recomputed_opsd_loss: Callable[..., Tensor] = chunked_loss.recomputed_opsd_loss
chunked_divergences: Callable[..., dict[str, Tensor]] = chunked_loss.chunked_divergences

CONFIGS = {
    "paper": LossConfig(top_k=9),
    "paper_default_k_covers_vocabulary": LossConfig(),
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
VOCAB = 37
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


@pytest.fixture(autouse=True)
def blocks_of_three_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small vocabularies would fit one fp32 block; make the loop over blocks run."""
    monkeypatch.setattr(loss_chunk, "BLOCK_ELEMENTS", 3 * VOCAB + 1)


def inputs(
    rows: int = 11, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[list[Tensor], Tensor, Tensor]:
    """[student hidden, student head, teacher hidden, teacher head], labels, row weights."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    tensors = [draw(rows, 3), draw(VOCAB, 3), draw(rows, 6), draw(VOCAB, 6)]
    tensors[0].requires_grad_()
    tensors[1].requires_grad_()
    labels = torch.randint(VOCAB, (rows,), generator=generator)
    weights = torch.rand(rows, generator=generator, dtype=torch.float64) + 0.1
    return tensors, labels, weights


def gradients(loss: Tensor, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, tensors[:2])


@every_config
def test_gradcheck(config: LossConfig) -> None:
    """The gradient formed in the forward pass against finite differences, and the oracle's."""
    tensors, labels, weights = inputs(rows=5)

    def loss(hidden: Tensor, head: Tensor) -> Tensor:
        return chunked_opsd_loss(
            hidden, head, *tensors[2:], labels, weights, config, chunk_size=2, keep_graph=True
        )[0]

    if config.loss_kind == "jsd":  # tinker's gradient is by definition not that of its value
        assert torch.autograd.gradcheck(loss, tensors[:2], atol=1e-7)
    oracle = recomputed_opsd_loss(*tensors, labels, weights, config, chunk_size=3)
    value = loss(*tensors[:2])
    torch.testing.assert_close(value, oracle, atol=1e-12, rtol=1e-12)
    for ours, theirs in zip(gradients(value, tensors), gradients(oracle, tensors), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-10)


@every_config
def test_is_the_weighted_sum_of_the_plain_loss(config: LossConfig) -> None:
    """Whole logits, opsd_loss.py and cross_entropy; no chunk, no custom gradient."""
    tensors, labels, weights = inputs()
    student, teacher = tensors[0] @ tensors[1].T, tensors[2] @ tensors[3].T
    rows = []
    for row in range(len(labels)):
        part = slice(row, row + 1)
        if config.loss_kind == "tinker":
            divergence = tinker_reverse_kl_loss(
                student[part], teacher[part], labels[part], temperature=config.temperature
            )
        else:
            names = ("beta", "temperature", "top_k", "token_clip", "tail_bucket", "clip_scope")
            options = {name: getattr(config, name) for name in names}
            divergence = generalized_jsd_loss(student[part], teacher[part], **options)
        ce = F.cross_entropy(student[part], labels[part])
        rows.append(config.jsd_weight * divergence + config.ce_weight * ce)
    expected = (weights * torch.stack(rows)).sum()
    actual, _ = chunked_opsd_loss(*tensors, labels, weights, config, chunk_size=4)
    torch.testing.assert_close(actual, expected)
    for ours, theirs in zip(gradients(actual, tensors), gradients(expected, tensors), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-10)


GRADED = [e for e in load_golden("10_opsd_loss")[0]["grid"] if "grad" in e]


@pytest.mark.parametrize("entry", GRADED, ids=lambda e: e["key"])
def test_golden_through_the_chunked_form(entry: dict[str, Any]) -> None:
    """Recorded logits as hidden states under an identity head: the same values and gradients."""
    meta, recorded = load_golden("10_opsd_loss")
    student = recorded["student_logits"].clone().requires_grad_()
    eye = torch.eye(student.shape[1])
    labels = recorded["labels"] if entry["labels"] else torch.zeros(7, dtype=torch.long)
    names = ("beta", "temperature", "top_k", "token_clip")
    config = LossConfig(**{name: entry[name] for name in names})
    loss, stats = chunked_opsd_loss(
        student, eye, recorded["teacher_logits"], eye, labels, None, config, chunk_size=3
    )
    (loss / stats["rows"]).backward()
    assert int(stats["rows"]) == len(entry["none"])
    torch.testing.assert_close(
        loss.detach(), torch.tensor(entry["sum"]), **meta["scalar_tolerance"]
    )
    assert student.grad is not None
    assert_golden(meta, entry["grad"], student.grad, recorded[entry["grad"]])


@every_config
def test_chunk_size_does_not_matter(config: LossConfig) -> None:
    tensors, labels, weights = inputs(dtype=torch.float32)
    results = []
    for size in (1, 4, 11, 512):
        loss, stats = chunked_opsd_loss(*tensors, labels, weights, config, chunk_size=size)
        results.append((loss, *gradients(loss, tensors), *stats.values()))
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("keep_graph", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.0, -2.5, 1 / 4096])
def test_backward_scales_by_what_arrives(scale: float, keep_graph: bool) -> None:
    tensors, labels, weights = inputs()
    config = CONFIGS["topk_ce"]
    oracle = recomputed_opsd_loss(*tensors, labels, weights, config)
    loss, _ = chunked_opsd_loss(*tensors, labels, weights, config, keep_graph=keep_graph)
    for ours, theirs in zip(
        gradients(loss * scale, tensors), gradients(oracle * scale, tensors), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-14, rtol=1e-10)


def test_second_backward_needs_keep_graph() -> None:
    tensors, labels, _ = inputs()
    loss, _ = chunked_opsd_loss(*tensors, labels, None, LossConfig())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="keep_graph=True"):
        loss.backward()
    loss, _ = chunked_opsd_loss(*tensors, labels, None, LossConfig(), keep_graph=True)
    first = torch.autograd.grad(loss, tensors[:2], retain_graph=True)
    for one, two in zip(first, gradients(loss, tensors), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_accumulate_into_parameters(dtype: torch.dtype) -> None:
    """Two losses on one head add up, as micro-batches do, in the parameters' dtype."""
    tensors, labels, weights = inputs(dtype=dtype)
    for _ in range(2):
        chunked_opsd_loss(*tensors, labels, weights, CONFIGS["paper"])[0].backward()
    loss, _ = chunked_opsd_loss(*tensors, labels, weights, CONFIGS["paper"])
    for tensor, once in zip(tensors[:2], gradients(loss, tensors), strict=True):
        assert tensor.grad is not None and tensor.grad.dtype == once.dtype == dtype
        torch.testing.assert_close(tensor.grad, 2 * once)


def test_frozen_head_or_hidden() -> None:
    tensors, labels, weights = inputs()
    loss, _ = chunked_opsd_loss(*tensors, labels, weights, LossConfig())
    both = gradients(loss, tensors)
    for i in (0, 1):
        frozen = [t.detach() if j == 1 - i else t for j, t in enumerate(tensors)]
        loss, _ = chunked_opsd_loss(*frozen, labels, weights, LossConfig())
        assert torch.equal(torch.autograd.grad(loss, tensors[i])[0], both[i])


def test_teacher_gets_no_gradient() -> None:
    """Also when the teacher scores with the student's own head (teacher mode `self`)."""
    tensors, labels, weights = inputs()
    config = CONFIGS["full"]
    teacher_hidden = tensors[0].detach().flip(0).requires_grad_()
    loss, _ = chunked_opsd_loss(
        tensors[0], tensors[1], teacher_hidden, tensors[1], labels, weights, config
    )
    _, shared = gradients(loss, tensors)
    apart = tensors[1].detach().clone()
    loss, _ = chunked_opsd_loss(
        tensors[0], tensors[1], teacher_hidden, apart, labels, weights, config
    )
    assert torch.equal(shared, gradients(loss, tensors)[1])
    loss, _ = chunked_opsd_loss(
        tensors[0], tensors[1], teacher_hidden, tensors[1], labels, weights, config
    )
    loss.backward()
    assert teacher_hidden.grad is None


@every_config
def test_no_rows(config: LossConfig) -> None:
    tensors, labels, weights = inputs(rows=0)
    loss, stats = chunked_opsd_loss(*tensors, labels, weights, config)
    assert loss.item() == 0.0
    for tensor, grad in zip(tensors, gradients(loss, tensors), strict=False):
        assert grad.shape == tensor.shape and not grad.any()
    assert stats.pop("label_logprob").shape == (0,)
    assert all(value.shape == () and value.item() == 0.0 for value in stats.values())


@pytest.mark.parametrize("name", ["paper", "full", "tinker_T_ce", "tail"])
def test_rows_of_weight_zero_and_ignored_labels_do_not_count(name: str) -> None:
    config = CONFIGS[name]
    tensors, labels, weights = inputs()
    kept = torch.ones(11, dtype=torch.bool)
    kept[[2, 7]] = False
    part = [tensors[0][kept], tensors[1], tensors[2][kept], tensors[3]]
    expected, expected_stats = chunked_opsd_loss(*part, labels[kept], weights[kept], config)
    expected_grads = gradients(expected, tensors)
    weights[2], labels[7] = 0.0, -100
    loss, stats = chunked_opsd_loss(*tensors, labels, weights, config, chunk_size=4)
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(gradients(loss, tensors), expected_grads, strict=True):
        torch.testing.assert_close(ours, theirs)
    stats["label_logprob"] = stats["label_logprob"][kept]
    torch.testing.assert_close(stats, expected_stats)
    oracle = recomputed_opsd_loss(*tensors, labels, weights, config)
    torch.testing.assert_close(oracle, expected)


@pytest.mark.parametrize("name", ["paper", "full", "full_clip_T", "tail_T_no_clip", "tinker_T_ce"])
def test_statistics(name: str) -> None:
    config = CONFIGS[name]
    tensors, labels, weights = inputs()
    _, stats = chunked_opsd_loss(*tensors, labels, weights, config, chunk_size=4)
    student, teacher = (tensors[0] @ tensors[1].T).detach(), tensors[2] @ tensors[3].T
    s, t = ((x / config.temperature).softmax(-1) for x in (student, teacher))
    assert not any(value.requires_grad for value in stats.values())

    expected = {
        "rows": torch.tensor(11.0, dtype=torch.float64),
        "ce": F.cross_entropy(student, labels, reduction="sum"),
        "student_entropy": -(s * s.log()).sum(),
        "teacher_entropy": -(t * t.log()).sum(),
        "label_logprob": s.log()[range(11), labels],
        "teacher_topk_mass": torch.tensor(11.0, dtype=torch.float64),
    }
    k = config.top_k_of(VOCAB)
    if config.loss_kind == "tinker":
        gap = (t.log() - s.log())[range(11), labels]
        expected["divergence"] = (-gap * expected["label_logprob"]).sum()
    else:
        rows = generalized_jsd_loss(
            student,
            teacher,
            beta=config.beta,
            temperature=config.temperature,
            top_k=config.top_k,
            token_clip=config.token_clip,
            tail_bucket=config.tail_bucket,
            reduction="sum",
        )
        expected["divergence"] = rows
        if k is not None:
            index = t.topk(k).indices
            s, t = s.gather(1, index), t.gather(1, index)
            expected["teacher_topk_mass"] = t.sum()
            if config.tail_bucket:
                s = torch.cat([s, 1 - s.sum(1, keepdim=True)], 1)
                t = torch.cat([t, 1 - t.sum(1, keepdim=True)], 1)
            s, t = s / s.sum(1, keepdim=True), t / t.sum(1, keepdim=True)
        expected["forward_kl"] = (t * (t / s).log()).sum()
    torch.testing.assert_close(stats, expected)


def test_plain_sft_needs_no_teacher() -> None:
    tensors, labels, weights = inputs()
    config = LossConfig(jsd_weight=0.0, ce_weight=2.0, temperature=1.5)
    loss, stats = chunked_opsd_loss(*tensors[:2], None, None, labels, weights, config, chunk_size=4)
    logits = tensors[0] @ tensors[1].T
    expected = 2 * (weights * F.cross_entropy(logits, labels, reduction="none")).sum()
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(gradients(loss, tensors), gradients(expected, tensors), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert set(stats) == {"rows", "ce", "student_entropy", "label_logprob"}
    with pytest.raises(ValueError, match="there is no teacher"):
        chunked_opsd_loss(*tensors[:2], None, None, labels, weights, LossConfig())


def test_without_grad_mode_nothing_is_formed() -> None:
    tensors, labels, _ = inputs()
    with torch.no_grad():
        loss, _ = chunked_opsd_loss(*tensors, labels, None, LossConfig())
    assert not loss.requires_grad
    expected, _ = chunked_opsd_loss(*tensors, labels, None, LossConfig())
    assert torch.equal(loss, expected)


@every_config
def test_bfloat16(config: LossConfig) -> None:
    """bf16 in: fp32 loss and bf16 gradients, close to fp64 ones at the same bf16-rounded logits."""
    half, labels, weights = inputs(rows=48, dtype=torch.bfloat16)
    ranked = (half[2] @ half[3].T).sort(descending=True).values
    clear = (ranked[:, 8] > ranked[:, 9]) & (ranked[:, 35] > ranked[:, 36])  # no tie at a top-k
    assert clear.sum() > 20
    half = [half[0].detach()[clear].requires_grad_(), half[1], half[2][clear], half[3]]
    labels, weights = labels[clear], weights[clear]

    exact = [t.detach().double() for t in half]
    for tensor in exact[:2]:
        tensor.requires_grad_()
    # The clip is a step: both sides must see the same logits to fall on the same side of it.
    logits = exact[0] @ exact[1].T
    logits = logits + ((half[0] @ half[1].T).double() - logits).detach()
    eye = torch.eye(VOCAB, dtype=torch.float64)
    target = (half[2] @ half[3].T).double()
    expected = recomputed_opsd_loss(logits, eye, target, eye, labels, weights, config)

    loss, stats = chunked_opsd_loss(*half, labels, weights, config, chunk_size=16)
    assert loss.dtype == stats["ce"].dtype == stats["label_logprob"].dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, atol=1e-4, rtol=1e-5)
    for ours, theirs in zip(gradients(loss, half), gradients(expected, exact), strict=True):
        assert ours.dtype == torch.bfloat16
        share = float((ours.double() - theirs).norm() / theirs.norm())
        assert share < 0.01, share


@pytest.mark.parametrize("tail_bucket", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_peaked_to_the_limit_stays_finite(beta: float, tail_bucket: bool) -> None:
    student, teacher = torch.zeros(2, VOCAB), torch.zeros(2, VOCAB)
    student[:, 0], teacher[:, 1] = 500.0, 500.0
    student.requires_grad_()
    eye = torch.eye(VOCAB, requires_grad=True)
    config = LossConfig(beta=beta, top_k=4, tail_bucket=tail_bucket, token_clip=None)
    labels = torch.tensor([0, 5])
    loss, stats = chunked_opsd_loss(student, eye, teacher, eye.detach(), labels, None, config)
    grads = torch.autograd.grad(loss, (student, eye))
    assert all(torch.isfinite(x).all() for x in (loss, *grads, *stats.values()))
    oracle = recomputed_opsd_loss(student, eye, teacher, eye.detach(), labels, None, config)
    torch.testing.assert_close(loss, oracle)
    torch.testing.assert_close(grads, torch.autograd.grad(oracle, (student, eye)))


def test_log_probs() -> None:
    tensors, labels, _ = inputs()
    actual = chunked_loss.chunked_log_probs(
        tensors[0], tensors[1], labels, temperature=0.7, chunk_size=4
    )
    expected = (tensors[0] @ tensors[1].T / 0.7).log_softmax(-1)[range(11), labels]
    torch.testing.assert_close(actual, expected.detach())
    assert not actual.requires_grad


def test_divergences() -> None:
    tensors, _, _ = inputs()
    actual = chunked_divergences(*tensors, chunk_size=4)
    s, t = (tensors[0] @ tensors[1].T).softmax(-1).detach(), (tensors[2] @ tensors[3].T).softmax(-1)
    m = (s + t) / 2
    expected = {
        "kl": (t * (t / s).log()).sum(-1),
        "jsd": 0.5 * (t * (t / m).log() + s * (s / m).log()).sum(-1),
        "student_entropy": -(s * s.log()).sum(-1),
        "teacher_entropy": -(t * t.log()).sum(-1),
    }
    torch.testing.assert_close(actual, expected)
    assert (actual["jsd"] <= math.log(2)).all()


def peak_memory(work: Callable[[], object], trace: Path) -> int:
    """Most bytes alive at once among what `work` allocates on the CPU (profiler's records)."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        work()
    profile.export_chrome_trace(str(trace))
    records = [e for e in json.loads(trace.read_text())["traceEvents"] if e["name"] == "[memory]"]
    records.sort(key=lambda e: (e["ts"], -e["args"]["Bytes"]))
    return max(itertools.accumulate(int(e["args"]["Bytes"]) for e in records))


@pytest.mark.parametrize("name", ["paper", "full", "tail", "topk_ce", "tinker"])
def test_memory_stays_at_chunks_of_logits(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Peak memory is the gradients plus chunk buffers; the plain form holds (N, V) many times."""
    monkeypatch.setattr(loss_chunk, "BLOCK_ELEMENTS", 4 * 3000)
    rows, vocab, chunk = 512, 3000, 32
    config = dataclasses.replace(CONFIGS[name], top_k=CONFIGS[name].top_k and 16)
    tensors = [torch.randn(n, 8, requires_grad=i < 2) for i, n in enumerate((rows, vocab) * 2)]
    labels = torch.randint(vocab, (rows,))

    def ours() -> None:
        loss, _ = chunked_opsd_loss(*tensors, labels, None, config, chunk_size=chunk)
        gradients(loss, tensors)

    def whole() -> None:
        gradients(recomputed_opsd_loss(*tensors, labels, None, config, chunk_size=rows), tensors)

    peak = peak_memory(ours, tmp_path / "ours.json")
    logits, gradient = 4 * rows * vocab, 4 * 8 * (rows + vocab)
    buffers = 1 if name in ("paper", "tail", "topk_ce") else 2
    blocks = (11 if name == "full" else 5) * 4 * loss_chunk.BLOCK_ELEMENTS  # temporaries
    assert peak > 4 * chunk * vocab  # the records do see the buffer
    assert peak < gradient + buffers * 4 * chunk * vocab + blocks + 64 * 4 * rows
    assert peak < 0.3 * logits

    assert peak_memory(whole, tmp_path / "whole.json") > 2 * logits


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({2: torch.zeros(10, 6)}, "teacher_hidden has 10 rows for 11 labels"),
        ({3: torch.zeros(38, 6)}, r"vocabularies differ \(37 and 38\)"),
        ({2: None}, "both teacher_hidden and teacher_head"),
        ({1: torch.zeros(37, 4)}, r"student_hidden \(11, 3\) and student_head \(37, 4\)"),
        ({1: torch.zeros(37, 3).bfloat16()}, "student_head torch.bfloat16"),
        ({5: torch.ones(10)}, r"row_weights has shape \(10,\)"),
        ({4: torch.full((11,), 37)}, "labels span 37..37, the vocabulary has 37"),
        ({4: torch.full((11,), -1)}, "labels span -1..-1"),
    ],
)
def test_mistakes_are_named(change: dict[Any, Any], message: str) -> None:
    tensors, labels, weights = inputs(dtype=torch.float32)
    arguments = [*tensors, labels, weights, LossConfig()]
    for position, value in change.items():
        arguments[position] = value
    with pytest.raises(ValueError, match=message):
        chunked_opsd_loss(*arguments)


def test_chunk_size_below_one_is_named() -> None:
    tensors, labels, _ = inputs()
    with pytest.raises(ValueError, match="chunk_size is 0"):
        chunked_opsd_loss(*tensors, labels, None, LossConfig(), chunk_size=0)
