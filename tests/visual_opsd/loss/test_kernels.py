# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The loss's Triton kernels one by one against torch, and what only the loss by kernels promises.

On a GPU they are compiled; without one, Triton's interpreter runs them on CPU tensors. That the
loss by kernels is the plain one: test_chunked.py.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from scripts.visual_opsd.loss import chunk as loss_chunk
from scripts.visual_opsd.opsd_loss import LossConfig
from tests.visual_opsd.loss.forms import (
    CONFIGS,
    DEVICE,
    Form,
    chunked_opsd_loss,
    draw_inputs,
    every_config,
    gradients,
    in_double,
    kernels_run,
    plain_loss,
)

if not kernels_run():
    pytest.skip(
        "Triton is absent, or was imported without TRITON_INTERPRET=1", allow_module_level=True
    )

from scripts.visual_opsd.loss import kernels as loss_kernels
from scripts.visual_opsd.loss import sparse_products as loss_products

VOCAB = 300  # 10 groups, the last one of 12; two segments of 256
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.fixture(autouse=True)
def small_blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several segments a row; tests at the true size keep the true blocks."""
    if request.node.get_closest_marker("cuda") is None:
        monkeypatch.setattr(loss_kernels, "READ_BLOCK", 256)
        monkeypatch.setattr(loss_kernels, "PAIR_BLOCK", 128)
        monkeypatch.setattr(loss_products, "HIDDEN_BLOCK", 16)


def random_logits(rows: int, vocab: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(rows * vocab)
    return (3 * torch.randn(rows, vocab, generator=generator)).to(dtype).to(DEVICE)


def close(ours: Any, theirs: Any, atol: float = 5e-6, rtol: float = 2e-5) -> None:
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=rtol, check_dtype=False)


# -------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
@pytest.mark.parametrize("vocab", [1, 31, 256, 1000])
def test_row_statistics(vocab: int, temperature: float, dtype: torch.dtype) -> None:
    logits = random_logits(3, vocab, dtype)
    logits[0] += 40.0
    logits[1, vocab // 2] = -60.0
    log_p = (logits.double() / temperature).log_softmax(-1)
    ours = loss_kernels.row_statistics(logits, temperature)
    close(ours.lse, (logits.double() / temperature).logsumexp(-1))
    close(ours.entropy, -(log_p.exp() * log_p).sum(-1))
    close(ours.unit_lse, logits.double().logsumexp(-1))


def test_statistics_of_infinite_and_undefined_logits() -> None:
    """Entries of -inf, a whole segment of them too, have no mass; NaN and inf show."""
    logits = random_logits(4, VOCAB)
    logits[0, :270] = -math.inf
    logits[1, 77], logits[2, 280] = math.nan, math.inf
    lse, entropy, unit_lse, *_ = loss_kernels.row_statistics(logits, 1.5)
    log_p = (logits[[0, 3]].double() / 1.5).log_softmax(-1)
    expected = -(log_p.exp() * log_p).nan_to_num(0.0).sum(-1)
    close(lse[[0, 3]], (logits[[0, 3]].double() / 1.5).logsumexp(-1))
    close(entropy[[0, 3]], expected)
    assert not torch.isfinite(lse[1:3]).any() and not torch.isfinite(entropy[1:3]).any()
    assert unit_lse is not None and not torch.isfinite(unit_lse[1:3]).any()


# ------------------------------------------------------------------------------------- top-k


def check_top_k(logits: Tensor, k: int) -> None:
    """Rows of torch.topk's values; unless they are torch's own, ascending, the first of equals."""
    statistics, values, index = loss_kernels.statistics_and_top_k(logits, 1.0, k)
    close(statistics.lse, logits.double().logsumexp(-1))
    assert index.shape == values.shape == (len(logits), k) and index.dtype == torch.int64
    assert torch.equal(values, logits.gather(-1, index))
    expected = logits.topk(k, dim=-1).values
    assert torch.equal(values.sort(descending=True).values, expected)
    if k <= min(loss_kernels.LARGEST_K, -(-logits.shape[1] // loss_kernels.GROUP)):
        first = logits.float().sort(dim=-1, descending=True, stable=True).indices[:, :k]
        assert torch.equal(index, first.sort().values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [1, 2, 9, 16, 17, 100, 516])
@pytest.mark.parametrize("rows", [1, 5])
def test_top_k(rows: int, k: int, dtype: torch.dtype) -> None:
    check_top_k(random_logits(rows, 517, dtype), k)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_top_k_among_equals(dtype: torch.dtype) -> None:
    """Rows of few distinct values, of one, and with ties across groups and signs."""
    coarse = random_logits(6, 1000, dtype).round()
    coarse[1] = -3.0
    coarse[2] = coarse[2].clamp(max=0.0)  # the threshold is a zero
    coarse[3, 500:] = 30.0
    coarse[4] = 0.0
    coarse[4, -1] = 1.0
    for k in (3, 8, 31):
        check_top_k(coarse, k)


def test_top_k_of_extremes() -> None:
    logits = random_logits(4, 1000, torch.bfloat16)
    logits[0, 17], logits[1, :900] = math.inf, -math.inf
    logits[2] = 1e-39  # subnormal
    logits[3, ::2] *= -1e30
    _, values, _ = loss_kernels.statistics_and_top_k(logits, 1.0, 20)
    expected = logits.topk(20, dim=-1).values
    assert torch.equal(values.sort(descending=True).values, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_top_k_with_nan_stays_complete(dtype: torch.dtype) -> None:
    logits = random_logits(5, 1000, dtype)
    logits[0] = math.nan
    logits[1, 3:400] = math.nan
    logits[2, 999] = -math.nan
    logits[3, ::32] = math.nan
    _, _, index = loss_kernels.statistics_and_top_k(logits, 1.0, 24)
    assert (index >= 0).all() and (index < 1000).all()
    assert (index.diff(dim=-1) > 0).all()  # ascending, so distinct


def test_no_rows_no_kernel() -> None:
    empty = random_logits(1, VOCAB)[:0]
    statistics, values, index = loss_kernels.statistics_and_top_k(empty, 1.0, 9)
    assert statistics.lse.shape == (0,) and values.shape == index.shape == (0, 9)


# ------------------------------------------------------------------------------ the whole loss


@pytest.mark.parametrize("name", ["paper", "full", "full_token_clip", "topk_ce", "tinker_T_ce"])
def test_kernels_are_what_runs(
    name: str, use_form: Callable[[str], Form], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No block of logits reaches the torch form."""
    tensors, labels = use_form("kernels").inputs()

    def never(*_: object) -> None:
        raise AssertionError("the torch form ran")

    monkeypatch.setattr(loss_chunk, "token_blocks", never)
    loss, _ = chunked_opsd_loss(*tensors, labels, CONFIGS[name])
    assert all(torch.isfinite(grad).all() for grad in gradients(loss, tensors))


@pytest.mark.parametrize("name", ["paper", "full", "topk_ce"])
def test_a_row_of_nan_shows_and_spoils_no_other(name: str, use_form: Callable[[str], Form]) -> None:
    tensors, labels = use_form("kernels").inputs()
    sound, before = chunked_opsd_loss(*tensors, labels, CONFIGS[name], chunk_size=4)
    for model in (0, 2):
        spoilt = [t.detach().clone() for t in tensors]
        spoilt[model][5] = math.nan
        loss, stats = chunked_opsd_loss(*spoilt, labels, CONFIGS[name], chunk_size=4)
        assert torch.isfinite(sound) and not torch.isfinite(loss)
        kept = torch.arange(11) != 5
        assert torch.equal(stats["label_logprob"][kept], before["label_logprob"][kept])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("offset", [500.0, -3000.0])
@pytest.mark.parametrize(
    "config",
    [
        LossConfig(top_k=4, token_clip=None),
        LossConfig(top_k=4, token_clip=None, ce_weight=0.3),
        *(LossConfig(beta=beta, top_k=None, token_clip=None) for beta in (0.0, 0.3, 1.0)),
        LossConfig(loss_kind="tinker", ce_weight=0.3),
    ],
    ids=["top_k", "top_k_ce", "forward", "mixture", "reverse", "tinker"],
)
def test_large_logits_lose_no_digits(
    config: LossConfig, offset: float, temperature: float, use_form: Callable[[str], Form]
) -> None:
    """A constant added to all of a row's logits leaves the loss of what they round to then."""
    use_form("kernels")
    config = dataclasses.replace(config, temperature=temperature)
    student, teacher = random_logits(4, 130) + offset, random_logits(4, 130).flip(0) - offset
    eye = torch.eye(130, device=DEVICE)
    labels = torch.tensor([0, 5, 129, 64], device=DEVICE)
    tensors = [student.requires_grad_(), eye, teacher, eye]
    exact = in_double(tensors)
    loss, _ = chunked_opsd_loss(*tensors, labels, config)
    grad = torch.autograd.grad(loss, tensors[0])[0]
    exact_loss = plain_loss(exact, labels, config)
    exact_grad = torch.autograd.grad(exact_loss, exact[0])[0]
    # A cross-entropy is the difference of two numbers as large as the logits.
    close(loss, exact_loss, atol=4 * abs(offset) * 2**-24 if config.ce_weight else 5e-6)
    close(grad, exact_grad)


# ---------------------------------------------------------------------------------- products


@pytest.mark.parametrize("k", [1, 5, 33])
def test_sparse_products(k: int) -> None:
    """Ids that many rows share, ids that none has, and one that all have."""
    generator = torch.Generator().manual_seed(k)
    rows, vocab, width = 40, 90, 24
    order = torch.rand(rows, vocab, generator=generator)
    order[:, 7] = 2.0
    index = order.topk(k).indices.to(DEVICE)
    values = torch.randn(rows, k, generator=generator).to(DEVICE)
    head = torch.randn(vocab, width, generator=generator).to(DEVICE)
    hidden = torch.randn(rows, width, generator=generator).to(DEVICE)
    dense = torch.zeros(rows, vocab, device=DEVICE).scatter_(-1, index, values)
    out = torch.full((rows, width), math.nan, device=DEVICE)
    loss_products.sparse_times_head(values, index, head, out)
    close(out, dense @ head, atol=1e-5)
    ours = loss_products.sparse_times_hidden(values, index, hidden, vocab)
    close(ours, dense.T @ hidden, atol=1e-5)


@pytest.mark.parametrize("factor", [1.0, -0.25, 0.0])
def test_scale_in_place(factor: float) -> None:
    tensor = random_logits(3, 5000)
    expected = tensor * factor
    scaled = loss_products.scale_(tensor, torch.tensor(factor, device=DEVICE))
    assert scaled is tensor and torch.equal(tensor, expected)


# ------------------------------------------------------------------------------ the true size


@pytest.mark.cuda
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [1, 200, 256, 512, 1024, 1025])
def test_top_k_at_the_true_size(k: int, dtype: torch.dtype) -> None:
    logits = random_logits(64, 152064, dtype)
    logits[0] = 1.0
    logits[1] = logits[1].round()
    check_top_k(logits, k)


@pytest.mark.cuda
@needs_gpu
@every_config
def test_the_true_size(config: LossConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16, V = 152,064, against VISUAL_OPSD_EAGER=loss and against autograd.

    All with torch's top-k: among bf16's many equals another choice is as right but moves the loss.
    """

    def with_torch_top_k(logits: Tensor, temperature: float, k: int) -> tuple[Any, ...]:
        statistics = loss_kernels.row_statistics(logits, temperature)
        return statistics, *logits.topk(k, dim=-1, sorted=False)

    monkeypatch.setattr(loss_kernels, "statistics_and_top_k", with_torch_top_k)
    if config.top_k == 9:
        config = dataclasses.replace(config, top_k=256)
    tensors, labels = draw_inputs(200, 152064, torch.bfloat16, width=512, scale=1.0, device="cuda")
    results = []
    for eager in ("", "loss"):
        monkeypatch.setenv("VISUAL_OPSD_EAGER", eager)
        loss, stats = chunked_opsd_loss(*tensors, labels, config, chunk_size=100)
        results.append((loss, stats, gradients(loss, tensors)))
    oracle = plain_loss(tensors, labels, config)
    results.append((oracle, {}, gradients(oracle, tensors)))
    loss, stats, grads = results[0]
    for other, other_stats, other_grads in results[1:]:
        close(loss, other, rtol=2e-4)
        for name, value in other_stats.items():
            close(stats[name], value, atol=1e-4, rtol=2e-4)
        for ours, theirs in zip(grads, other_grads, strict=True):
            share = float((ours.double() - theirs.double()).norm() / theirs.double().norm())
            assert share < 0.01, share


@pytest.mark.cuda
@needs_gpu
@pytest.mark.parametrize("name", ["paper", "full"])
def test_repeats_bit_by_bit_within_its_memory(name: str) -> None:
    """The same bits twice; beyond what was there, the gradients and `chunk_size` logits a row."""
    config = dataclasses.replace(CONFIGS[name], top_k=256 if name == "paper" else None)
    rows, width, vocab = 300, 1024, 152064
    tensors, labels = draw_inputs(
        rows, vocab, torch.bfloat16, width=width, scale=1.0, device="cuda"
    )
    runs = []
    for _ in range(2):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss, _ = chunked_opsd_loss(*tensors, labels, config, chunk_size=128)
        grads = gradients(loss, tensors)
        runs.append((loss, grads, torch.cuda.max_memory_allocated() - before))
    assert torch.equal(runs[0][0], runs[1][0])
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))
    allowed = 2 * width * (vocab + rows) + 2 * 128 * vocab + 40_000_000
    assert runs[1][2] < allowed, (runs[1][2], allowed)
