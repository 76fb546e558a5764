# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The chunked loss, in each of its forms, against the plain loss on whole logits with autograd.

"torch" is what runs on a CPU; "kernels" and "sparse" (products without the gradient's zeros) are
Triton's, which its interpreter runs where there is no GPU. It cuts bf16 off where a GPU rounds.
"""

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
from scripts.visual_opsd.opsd_loss import LossConfig, contrast
from tests.conftest import assert_golden, load_golden
from tests.visual_opsd.loss.forms import (
    CONFIGS,
    Form,
    chunked_divergences,
    chunked_opsd_loss,
    every_config,
    every_config_and_form,
    gradients,
    in_double,
    plain_divergence,
    plain_loss,
)


@every_config_and_form
def test_equals_the_plain_loss_and_its_gradients(
    config: LossConfig, name: str, use_form: Callable[[str], Form]
) -> None:
    """Whatever the chunks."""
    form = use_form(name)
    tensors, labels = form.inputs(11 if name == "torch" else 7)
    exact = in_double(tensors)
    expected = plain_loss(exact, labels, config)
    expected_gradients = gradients(-1.5 * expected, exact)
    for size in (1, 4, 11, 512) if name == "torch" else (4,):
        loss, _ = chunked_opsd_loss(*tensors, labels, config, chunk_size=size)
        ours = gradients(-1.5 * loss, tensors)
        form.assert_close(loss, expected)
        form.assert_close(ours, expected_gradients)
        assert all(gradient.is_contiguous() for gradient in ours)


@pytest.mark.parametrize(
    ("config", "name"),
    [("paper", "torch"), ("paper", "sparse"), ("full_clip_T", "kernels"), ("tail", "torch"),
     ("tinker_T_ce", "torch"), ("topk_ce", "kernels")],
)  # fmt: skip
def test_a_contrasted_target(config: str, name: str, use_form: Callable[[str], Form]) -> None:
    """Hidden states combined before the head, against log-probabilities combined after it."""
    form, settings, amount = use_form(name), CONFIGS[config], 0.8
    tensors, labels = form.inputs()
    control = form.inputs(seed=1)[0][2]
    exact = in_double(tensors)
    logits = exact[0] @ exact[1].t()
    real, other = (
        (hidden.double() @ exact[3].t() / settings.temperature).log_softmax(-1)
        for hidden in (tensors[2], control)
    )
    target = (real + amount * (real - other)) * settings.temperature
    ce = F.cross_entropy(logits, labels, reduction="sum")
    expected = settings.jsd_weight * plain_divergence(logits, target, labels, settings)
    expected = expected + settings.ce_weight * ce
    seen = contrast(tensors[2], control, amount)
    loss, _ = chunked_opsd_loss(*tensors[:2], seen, tensors[3], labels, settings, chunk_size=6)
    form.assert_close(loss, expected)
    form.assert_close(gradients(loss, tensors), gradients(expected, exact))


# The gradient of "tinker" is by definition not that of its value.
VALUED = {name: config for name, config in CONFIGS.items() if config.loss_kind != "tinker"}


@pytest.mark.parametrize("config", VALUED.values(), ids=VALUED)
def test_gradients_equal_finite_differences(
    config: LossConfig, use_form: Callable[[str], Form]
) -> None:
    tensors, labels = use_form("torch").inputs(tokens=5)
    loss, _ = chunked_opsd_loss(*tensors, labels, config, chunk_size=2)
    for tensor, gradient in zip(tensors, gradients(loss, tensors), strict=False):
        entries = tensor.detach().view(-1)  # the same memory
        for i, slope in enumerate(gradient.view(-1)):
            middle, around = entries[i].item(), []
            for step in (-1e-6, 1e-6):
                entries[i] = middle + step
                with torch.no_grad():
                    around.append(float(chunked_opsd_loss(*tensors, labels, config)[0]))
            entries[i] = middle
            assert (around[1] - around[0]) / 2e-6 == pytest.approx(float(slope), 1e-3, 1e-7)


GRADED = [e for e in load_golden("10_opsd_loss")[0]["grid"] if "grad" in e]


@pytest.mark.parametrize("entry", GRADED, ids=lambda e: e["key"])
def test_golden_through_the_chunked_form(entry: dict[str, Any]) -> None:
    """Recorded logits as hidden states under an identity head: the same values and gradients."""
    meta, recorded = load_golden("10_opsd_loss")
    student = recorded["student_logits"].clone().requires_grad_()
    eye = torch.eye(student.shape[1])
    labels = recorded["labels"] if entry["labels"] else torch.zeros(7, dtype=torch.long)
    kept = labels != -100
    names = ("beta", "temperature", "top_k", "token_clip")
    config = LossConfig(**{name: entry[name] for name in names})
    loss, stats = chunked_opsd_loss(
        student[kept], eye, recorded["teacher_logits"][kept], eye, labels[kept], config,
        chunk_size=3,
    )  # fmt: skip
    (loss / stats["rows"]).backward()
    assert int(stats["rows"]) == len(entry["none"])
    torch.testing.assert_close(
        loss.detach(), torch.tensor(entry["sum"]), **meta["scalar_tolerance"]
    )
    assert student.grad is not None
    assert_golden(meta, entry["grad"], student.grad, recorded[entry["grad"]])


def test_backward_scales_by_what_arrives(form: Form) -> None:
    tensors, labels = form.inputs(tokens=4)
    expected = gradients(chunked_opsd_loss(*tensors, labels, CONFIGS["paper"])[0], tensors)
    for scale in (0.0, -2.5, 1 / 4096):
        loss, _ = chunked_opsd_loss(*tensors, labels, CONFIGS["paper"])
        ours = gradients(loss * scale, tensors)
        form.assert_close(ours, tuple(scale * gradient for gradient in expected))


def test_a_second_backward_is_refused(form: Form) -> None:
    tensors, labels = form.inputs(tokens=4)
    loss, _ = chunked_opsd_loss(*tensors, labels, CONFIGS["paper"])
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="compute the loss again"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_accumulate_into_parameters(
    dtype: torch.dtype, use_form: Callable[[str], Form]
) -> None:
    """Two losses on one head add up, as micro-batches do, in the parameters' dtype."""
    tensors, labels = use_form("torch").inputs(dtype=dtype)
    for _ in range(2):
        chunked_opsd_loss(*tensors, labels, CONFIGS["paper"])[0].backward()
    loss, _ = chunked_opsd_loss(*tensors, labels, CONFIGS["paper"])
    for tensor, once in zip(tensors[:2], gradients(loss, tensors), strict=True):
        assert tensor.grad is not None and tensor.grad.dtype == once.dtype == dtype
        torch.testing.assert_close(tensor.grad, 2 * once)


def test_frozen_head_or_hidden(form: Form) -> None:
    tensors, labels = form.inputs(tokens=4)
    both = gradients(chunked_opsd_loss(*tensors, labels, CONFIGS["paper"])[0], tensors)
    for i in (0, 1):
        frozen = [t.detach() if j == 1 - i else t for j, t in enumerate(tensors)]
        loss, _ = chunked_opsd_loss(*frozen, labels, CONFIGS["paper"])
        assert torch.equal(torch.autograd.grad(loss, tensors[i])[0], both[i])


def test_teacher_gets_no_gradient(use_form: Callable[[str], Form]) -> None:
    """Also when the teacher scores with the student's own head (teacher mode `self`)."""
    (hidden, head, *_), labels = use_form("torch").inputs()
    teacher_hidden = hidden.detach().flip(0).requires_grad_()
    heads = (head, head.detach().clone())
    losses = [
        chunked_opsd_loss(hidden, head, teacher_hidden, theirs, labels, CONFIGS["full"])[0]
        for theirs in heads
    ]
    shared, apart = (torch.autograd.grad(loss, head)[0] for loss in losses)
    assert torch.equal(shared, apart)
    chunked_opsd_loss(hidden, head, teacher_hidden, head, labels, CONFIGS["full"])[0].backward()
    assert teacher_hidden.grad is None


@every_config
@pytest.mark.parametrize("name", ["torch", "kernels"])
def test_no_tokens(config: LossConfig, name: str, use_form: Callable[[str], Form]) -> None:
    tensors, labels = use_form(name).inputs(tokens=0)
    loss, stats = chunked_opsd_loss(*tensors, labels, config)
    assert loss.item() == 0.0
    for tensor, grad in zip(tensors, gradients(loss, tensors), strict=False):
        assert grad.shape == tensor.shape and not grad.any()
    assert stats.pop("label_logprob").shape == (0,)
    assert all(value.shape == () and value.item() == 0.0 for value in stats.values())


def test_one_token(form: Form) -> None:
    tensors, labels = form.inputs(tokens=1)
    loss, _ = chunked_opsd_loss(*tensors, labels, CONFIGS["paper"])
    exact = in_double(tensors)
    expected = plain_loss(exact, labels, CONFIGS["paper"])
    form.assert_close(loss, expected)
    form.assert_close(gradients(loss, tensors), gradients(expected, exact))


@every_config
@pytest.mark.parametrize("name", ["torch", "kernels"])
def test_statistics(config: LossConfig, name: str, use_form: Callable[[str], Form]) -> None:
    form = use_form(name)
    tensors, labels = form.inputs()
    _, stats = chunked_opsd_loss(*tensors, labels, config, chunk_size=6)
    assert not any(value.requires_grad for value in stats.values())
    exact = [tensor.detach().double() for tensor in tensors]
    student, teacher = exact[0] @ exact[1].T, exact[2] @ exact[3].T
    s, t = ((x / config.temperature).softmax(-1) for x in (student, teacher))
    expected = {
        "rows": torch.tensor(11.0, device=labels.device),
        "ce": F.cross_entropy(student, labels, reduction="sum"),
        "student_entropy": -(s * s.log()).sum(),
        "teacher_entropy": -(t * t.log()).sum(),
        "label_logprob": s.log()[range(11), labels],
        "teacher_topk_mass": torch.tensor(11.0, device=labels.device),
        "divergence": plain_divergence(student, teacher, labels, config),
    }
    k = config.top_k_of(form.vocab)
    if k is not None:
        index = t.topk(k).indices
        s, t = s.gather(1, index), t.gather(1, index)
        expected["teacher_topk_mass"] = t.sum()
        if config.tail_bucket:
            s = torch.cat([s, 1 - s.sum(1, keepdim=True)], 1)
            t = torch.cat([t, 1 - t.sum(1, keepdim=True)], 1)
        s, t = s / s.sum(1, keepdim=True), t / t.sum(1, keepdim=True)
    if config.loss_kind != "tinker":
        expected["forward_kl"] = (t * (t / s).log()).sum()
    assert stats.keys() == expected.keys()
    form.assert_close(stats, expected)


@pytest.mark.parametrize("ce_weight", [2.0, 0.0])
def test_plain_sft_needs_no_teacher(ce_weight: float, form: Form) -> None:
    tensors, labels = form.inputs()
    config = LossConfig(jsd_weight=0.0, ce_weight=ce_weight, temperature=1.5)
    loss, stats = chunked_opsd_loss(*tensors[:2], None, None, labels, config, chunk_size=4)
    exact = in_double(tensors)
    logits = exact[0] @ exact[1].T
    expected = ce_weight * F.cross_entropy(logits, labels, reduction="sum")
    form.assert_close(loss, expected)
    form.assert_close(gradients(loss, tensors), gradients(expected, exact))
    assert set(stats) == {"rows", "ce", "student_entropy", "label_logprob"}
    log_probs = (logits.detach() / 1.5).log_softmax(-1)
    form.assert_close(stats["label_logprob"], log_probs[range(11), labels])
    form.assert_close(stats["student_entropy"], -(log_probs.exp() * log_probs).sum())


def test_without_grad_mode_nothing_is_formed(form: Form) -> None:
    tensors, labels = form.inputs(tokens=4)
    with torch.no_grad():
        loss, stats = chunked_opsd_loss(*tensors, labels, LossConfig())
    assert not loss.requires_grad
    expected, expected_stats = chunked_opsd_loss(*tensors, labels, LossConfig())
    assert torch.equal(loss, expected)
    torch.testing.assert_close(stats, expected_stats, atol=0.0, rtol=0.0)


@every_config
def test_bfloat16(config: LossConfig, use_form: Callable[[str], Form]) -> None:
    """bf16 in: fp32 loss and bf16 gradients, close to fp64 ones at the same bf16-rounded logits."""
    check_bfloat16(use_form("torch"), config, share=0.01)


@pytest.mark.parametrize("name", ["paper", "full", "topk_ce"])
@pytest.mark.parametrize("kernels", ["kernels", "sparse"])
def test_bfloat16_by_kernels(name: str, kernels: str, use_form: Callable[[str], Form]) -> None:
    """Loose, as the interpreter does not round."""
    check_bfloat16(use_form(kernels), CONFIGS[name], share=0.02)


def check_bfloat16(form: Form, config: LossConfig, share: float) -> None:
    half, labels = form.inputs(tokens=32, dtype=torch.bfloat16)
    ranked = (half[2] @ half[3].T).sort(descending=True).values
    clear = (ranked[:, 8] > ranked[:, 9]) & (ranked[:, 35] > ranked[:, 36])  # no tie at a top-k
    assert clear.sum() > 10
    half = [half[0].detach()[clear].requires_grad_(), half[1], half[2][clear], half[3]]
    labels = labels[clear]
    exact = in_double(half)
    # The clip is a step: both sides must see the same logits to fall on the same side of it.
    logits = exact[0] @ exact[1].T
    logits = logits + ((half[0] @ half[1].T).double() - logits).detach()
    eye = torch.eye(form.vocab, dtype=torch.float64, device=labels.device)
    target = (half[2] @ half[3].T).double()
    expected = plain_loss([logits, eye, target, eye], labels, config)

    loss, stats = chunked_opsd_loss(*half, labels, config, chunk_size=16)
    assert loss.dtype == stats["ce"].dtype == stats["label_logprob"].dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, atol=1e-4, rtol=1e-4)
    for ours, theirs in zip(gradients(loss, half), gradients(expected, exact), strict=True):
        assert ours.dtype == torch.bfloat16
        found = float((ours.double() - theirs).norm() / theirs.norm())
        assert found < share, found


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", ["top_k", "tail", "full"])
@pytest.mark.parametrize("name", ["torch", "kernels"])
def test_peaked_to_the_limit_stays_finite(
    name: str, kind: str, beta: float, use_form: Callable[[str], Form]
) -> None:
    labels = use_form(name).inputs()[1].new_tensor([0, 5])
    student = torch.zeros(2, 130, device=labels.device)
    teacher = -0.01 * torch.arange(130, device=labels.device).repeat(2, 1)  # no ties
    student[:, 0], teacher[:, 1] = 500.0, 500.0
    eye = torch.eye(130, device=labels.device)
    tensors = [student.requires_grad_(), eye.clone().requires_grad_(), teacher, eye]
    config = LossConfig(
        beta=beta, top_k=None if kind == "full" else 4, tail_bucket=kind == "tail", token_clip=None
    )
    loss, stats = chunked_opsd_loss(*tensors, labels, config)
    ours = gradients(loss, tensors)
    assert all(torch.isfinite(x).all() for x in (loss, *ours, *stats.values()))
    expected = plain_loss(tensors, labels, config)
    torch.testing.assert_close(loss, expected, atol=5e-6, rtol=2e-5)
    torch.testing.assert_close(ours, gradients(expected, tensors), atol=5e-6, rtol=2e-5)


def test_divergences(form: Form) -> None:
    tensors, _ = form.inputs()
    actual = chunked_divergences(*tensors, chunk_size=4)
    exact = [tensor.detach().double() for tensor in tensors]
    s, t = (exact[0] @ exact[1].T).softmax(-1), (exact[2] @ exact[3].T).softmax(-1)
    m = (s + t) / 2
    expected = {
        "kl": (t * (t / s).log()).sum(-1),
        "jsd": 0.5 * (t * (t / m).log() + s * (s / m).log()).sum(-1),
        "student_entropy": -(s * s.log()).sum(-1),
        "teacher_entropy": -(t * t.log()).sum(-1),
    }
    form.assert_close(actual, expected)
    assert (actual["jsd"] <= math.log(2)).all()
    assert not any(value.requires_grad for value in actual.values())


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
    tokens, vocab, size = 512, 3000, 32
    config = dataclasses.replace(CONFIGS[name], top_k=CONFIGS[name].top_k and 16)
    tensors = [torch.randn(n, 8, requires_grad=i < 2) for i, n in enumerate((tokens, vocab) * 2)]
    labels = torch.randint(vocab, (tokens,))

    def ours() -> None:
        loss, _ = chunked_opsd_loss(*tensors, labels, config, chunk_size=size)
        gradients(loss, tensors)

    def whole() -> None:
        gradients(plain_loss(tensors, labels, config), tensors)

    peak = peak_memory(ours, tmp_path / "ours.json")
    logits, gradient = 4 * tokens * vocab, 4 * 8 * (tokens + vocab)
    buffers = 1 if name in ("paper", "tail", "topk_ce") else 2
    blocks = (11 if name == "full" else 5) * 4 * loss_chunk.BLOCK_ELEMENTS  # temporaries
    assert peak > 4 * size * vocab  # the records do see the buffer
    assert peak < gradient + buffers * 4 * size * vocab + blocks + 64 * 4 * tokens
    assert peak < 0.3 * logits

    assert peak_memory(whole, tmp_path / "whole.json") > 2 * logits


@pytest.mark.parametrize(("name", "sizes"), [("paper", [6, 5]), ("full", [3, 3, 3, 2])])
def test_both_models_logits_count_in_the_chunk_size(
    name: str, sizes: list[int], use_form: Callable[[str], Form], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks are halved where the divergence needs both models' logits at once."""
    seen, read = [], loss_chunk.read_teacher

    def noted(logits: Tensor, labels: Tensor, config: LossConfig) -> loss_chunk.Target:
        seen.append(len(logits))
        return read(logits, labels, config)

    monkeypatch.setattr(loss_chunk, "read_teacher", noted)
    tensors, labels = use_form("torch").inputs()
    chunked_opsd_loss(*tensors, labels, CONFIGS[name], chunk_size=6)
    assert seen == sizes
    seen.clear()
    chunked_opsd_loss(*tensors, labels, CONFIGS["full"], chunk_size=1)
    assert seen == [1] * 11


def test_what_does_not_fit_is_refused(use_form: Callable[[str], Form]) -> None:
    """Models of two vocabularies are a mistake of the diagnostic's user, the others are ours."""
    tensors, labels = use_form("torch").inputs()
    hidden, head, teacher_hidden, teacher_head = tensors
    with pytest.raises(ValueError, match=r"vocabularies differ \(37 and 36\)"):
        chunked_divergences(hidden, head, teacher_hidden, teacher_head[1:])
    for arguments in (
        (hidden, head, teacher_hidden[1:], teacher_head),
        (hidden, head, teacher_hidden, teacher_head[1:]),
        (hidden, head, teacher_hidden, None),
        (hidden, head, None, None),
        (hidden, head[:, 1:], teacher_hidden, teacher_head),
        (hidden, head.float(), teacher_hidden, teacher_head),
    ):
        with pytest.raises(AssertionError):
            chunked_opsd_loss(*arguments, labels, LossConfig())
