# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The loss's Triton kernels against the plain torch form, torch.topk, and autograd in fp64.

On a GPU they are compiled; without one, Triton's interpreter runs them on CPU tensors. It cuts
bf16 off where a GPU rounds, so most inputs are fp32.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():  # read when Triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")
triton = pytest.importorskip("triton")
if not torch.cuda.is_available() and isinstance(triton.language.sum, triton.JITFunction):
    pytest.skip("Triton was imported without TRITON_INTERPRET=1", allow_module_level=True)

from scripts.visual_opsd.loss import chunk as loss_chunk  # noqa: E402
from scripts.visual_opsd.loss import chunked as chunked_loss  # noqa: E402
from scripts.visual_opsd.loss import kernels as loss_kernels  # noqa: E402
from scripts.visual_opsd.loss import sparse_products as loss_products  # noqa: E402
from scripts.visual_opsd.opsd_loss import LossConfig  # noqa: E402
from tests.visual_opsd.loss.test_chunked import CONFIGS, gradients  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCAB = 300  # 10 groups, the last one of 12; two segments of 256
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)

chunked_opsd_loss: Callable[..., tuple[Tensor, dict[str, Tensor]]] = chunked_loss.chunked_opsd_loss
recomputed_opsd_loss: Callable[..., Tensor] = chunked_loss.recomputed_opsd_loss
chunked_divergences: Callable[..., dict[str, Tensor]] = chunked_loss.chunked_divergences
chunked_log_probs: Callable[..., Tensor] = chunked_loss.chunked_log_probs


@pytest.fixture(autouse=True)
def small_blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several segments a row; tests at the true size keep the true blocks."""
    if request.node.get_closest_marker("cuda") is None:
        monkeypatch.setattr(loss_kernels, "READ_BLOCK", 256)
        monkeypatch.setattr(loss_kernels, "PAIR_BLOCK", 128)
        monkeypatch.setattr(loss_products, "HIDDEN_BLOCK", 16)


@pytest.fixture
def use_kernels(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Switches between the kernels and the torch form, whatever the device and dtype."""

    def switch(on: bool) -> None:
        monkeypatch.setattr("modeling.fast.runs_kernels", lambda path, tensor: on)

    return switch


def random_logits(rows: int, vocab: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(rows * vocab)
    return (3 * torch.randn(rows, vocab, generator=generator)).to(dtype).to(DEVICE)


def inputs(
    rows: int = 11, width: int = 24, dtype: torch.dtype = torch.float32, vocab: int = VOCAB
) -> tuple[list[Tensor], Tensor, Tensor]:
    """[student hidden, student head, teacher hidden, teacher head], labels, row weights."""
    generator = torch.Generator().manual_seed(rows)

    def draw(*shape: int) -> Tensor:
        values = torch.randn(*shape, generator=generator) * shape[-1] ** -0.25
        return values.to(dtype).to(DEVICE)

    tensors = [draw(rows, width), draw(vocab, width), draw(rows, width + 8), draw(vocab, width + 8)]
    tensors[0].requires_grad_()
    tensors[1].requires_grad_()
    labels = torch.randint(vocab, (rows,), generator=generator).to(DEVICE)
    weights = (torch.rand(rows, generator=generator) + 0.1).to(DEVICE)
    return tensors, labels, weights


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


@every_config
def test_equals_the_torch_form(
    config: LossConfig, use_kernels: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss, every figure and both gradients; rows of weight 0 and without a label included."""
    tensors, labels, weights = inputs()
    weights[2], labels[7] = 0.0, -100
    results = []
    for form in ("torch", "kernels", "sparse"):
        use_kernels(form != "torch")
        monkeypatch.setattr(loss_products, "DENSE_PER_SPARSE", 1 if form == "sparse" else 1 << 30)
        loss, stats = chunked_opsd_loss(*tensors, labels, weights, config, chunk_size=4)
        grads = gradients(-1.5 * loss, tensors)
        assert all(grad.is_contiguous() for grad in grads)
        results.append((loss, stats, grads))
    for other in results[1:]:
        close(other, results[0])


@every_config
def test_equals_autograd_in_double_precision(
    config: LossConfig, use_kernels: Callable[[bool], None]
) -> None:
    use_kernels(True)
    tensors, labels, weights = inputs()
    exact = [t.detach().double() for t in tensors]
    for tensor in exact[:2]:
        tensor.requires_grad_()
    expected = recomputed_opsd_loss(*exact, labels, weights, config)
    loss, _ = chunked_opsd_loss(*tensors, labels, weights, config, chunk_size=4)
    close(loss, expected)
    close(gradients(loss, tensors), gradients(expected, exact), atol=1e-5)


@pytest.mark.parametrize("name", ["paper", "full", "full_token_clip", "topk_ce", "tinker_T_ce"])
def test_kernels_are_what_runs(
    name: str, use_kernels: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No block of logits reaches the torch form."""
    use_kernels(True)

    def never(*_: object) -> None:
        raise AssertionError("the torch form ran")

    monkeypatch.setattr(loss_chunk, "_blocks", never)
    monkeypatch.setattr(loss_chunk, "_divergence", never)
    tensors, labels, weights = inputs()
    loss, _ = chunked_opsd_loss(*tensors, labels, weights, CONFIGS[name])
    assert all(torch.isfinite(grad).all() for grad in gradients(loss, tensors))


def test_plain_sft(use_kernels: Callable[[bool], None]) -> None:
    tensors, labels, weights = inputs()
    results = []
    for on in (False, True):
        use_kernels(on)
        for ce_weight in (2.0, 0.0):
            config = LossConfig(jsd_weight=0.0, ce_weight=ce_weight, temperature=1.5)
            loss, stats = chunked_opsd_loss(
                *tensors[:2], None, None, labels, weights, config, chunk_size=4
            )
            results.append((loss, stats, gradients(loss, tensors)))
    close(results[2:], results[:2])
    assert not results[3][2][0].any() and not results[3][2][1].any()


def test_divergences_and_log_probs(use_kernels: Callable[[bool], None]) -> None:
    tensors, labels, _ = inputs()
    results = []
    for on in (False, True):
        use_kernels(on)
        figures = chunked_divergences(*tensors, chunk_size=4)
        log_probs = chunked_log_probs(*tensors[:2], labels, 0.7, chunk_size=4)
        results.append((figures, log_probs))
    close(results[1], results[0])


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("rows", [0, 1])
def test_none_and_one_row(
    rows: int, sparse: bool, use_kernels: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_products, "DENSE_PER_SPARSE", 1 if sparse else 1 << 30)
    tensors, labels, weights = inputs(rows)
    results = []
    for on in (False, True):
        use_kernels(on)
        loss, stats = chunked_opsd_loss(*tensors, labels, weights, CONFIGS["paper"])
        results.append((loss, stats, gradients(loss, tensors)))
    close(results[1], results[0])


@pytest.mark.parametrize("sparse", [False, True])
def test_frozen_head_or_hidden(
    sparse: bool, use_kernels: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    use_kernels(True)
    monkeypatch.setattr(loss_products, "DENSE_PER_SPARSE", 1 if sparse else 1 << 30)
    tensors, labels, weights = inputs()
    both = gradients(chunked_opsd_loss(*tensors, labels, weights, CONFIGS["paper"])[0], tensors)
    for i in (0, 1):
        frozen = [t.detach() if j == 1 - i else t for j, t in enumerate(tensors)]
        loss, _ = chunked_opsd_loss(*frozen, labels, weights, CONFIGS["paper"])
        assert torch.equal(torch.autograd.grad(loss, tensors[i])[0], both[i])


@pytest.mark.parametrize("sparse", [False, True])
def test_second_backward(
    sparse: bool, use_kernels: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    use_kernels(True)
    monkeypatch.setattr(loss_products, "DENSE_PER_SPARSE", 1 if sparse else 1 << 30)
    tensors, labels, _ = inputs()
    loss, _ = chunked_opsd_loss(*tensors, labels, None, CONFIGS["paper"], keep_graph=True)
    first = torch.autograd.grad(loss, tensors[:2], retain_graph=True)
    for one, two in zip(first, gradients(loss, tensors), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("name", ["paper", "full", "topk_ce"])
def test_a_row_of_nan_shows_and_spoils_no_other(
    name: str, use_kernels: Callable[[bool], None]
) -> None:
    use_kernels(True)
    tensors, labels, weights = inputs()
    sound, before = chunked_opsd_loss(*tensors, labels, weights, CONFIGS[name], chunk_size=4)
    for model in (0, 2):
        spoilt = [t.detach().clone() for t in tensors]
        spoilt[model][5] = math.nan
        loss, stats = chunked_opsd_loss(*spoilt, labels, weights, CONFIGS[name], chunk_size=4)
        assert torch.isfinite(sound) and not torch.isfinite(loss)
        kept = torch.arange(11) != 5
        assert torch.equal(stats["label_logprob"][kept], before["label_logprob"][kept])


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("top_k", [4, None])
def test_peaked_to_the_limit_stays_finite(
    top_k: int | None, beta: float, use_kernels: Callable[[bool], None]
) -> None:
    use_kernels(True)
    student = torch.zeros(2, 130, device=DEVICE)
    teacher = -0.01 * torch.arange(130, device=DEVICE).repeat(2, 1)  # no ties
    student[:, 0], teacher[:, 1] = 500.0, 500.0
    student.requires_grad_()
    eye = torch.eye(130, device=DEVICE, requires_grad=True)
    config = LossConfig(beta=beta, top_k=top_k, token_clip=None)
    labels = torch.tensor([0, 5], device=DEVICE)
    loss, stats = chunked_opsd_loss(student, eye, teacher, eye.detach(), labels, None, config)
    grads = torch.autograd.grad(loss, (student, eye))
    assert all(torch.isfinite(x).all() for x in (loss, *grads, *stats.values()))
    oracle = recomputed_opsd_loss(student, eye, teacher, eye.detach(), labels, None, config)
    close(loss, oracle)
    close(grads, torch.autograd.grad(oracle, (student, eye)))


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
    config: LossConfig, offset: float, temperature: float, use_kernels: Callable[[bool], None]
) -> None:
    """A constant added to all of a row's logits leaves the loss of what they round to then."""
    use_kernels(True)
    config = dataclasses.replace(config, temperature=temperature)
    student, teacher = random_logits(4, 130) + offset, random_logits(4, 130).flip(0) - offset
    eye = torch.eye(130, device=DEVICE)
    labels, weights = torch.tensor([0, 5, 129, 64], device=DEVICE), torch.ones(4, device=DEVICE)
    results = []
    for dtype, form in ((torch.float32, chunked_opsd_loss), (torch.float64, recomputed_opsd_loss)):
        hidden = student.to(dtype).requires_grad_()
        others = (eye.to(dtype), teacher.to(dtype), eye.to(dtype))
        loss = form(hidden, *others, labels, weights, config)
        loss = loss[0] if isinstance(loss, tuple) else loss
        results.append((loss, torch.autograd.grad(loss, hidden)[0]))
    (loss, grad), (exact_loss, exact_grad) = results
    # A cross-entropy is the difference of two numbers as large as the logits.
    close(loss, exact_loss, atol=4 * abs(offset) * 2**-24 if config.ce_weight else 5e-6)
    close(grad, exact_grad)


@pytest.mark.parametrize("name", ["paper", "full", "topk_ce"])
def test_bfloat16(
    name: str, use_kernels: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp32 loss and bf16 gradients, by both ways; loose, as the interpreter does not round."""
    tensors, labels, weights = inputs(48, dtype=torch.bfloat16)
    ranked = (tensors[2] @ tensors[3].T).sort(descending=True).values
    weights = weights * (ranked[:, 8] > ranked[:, 9])  # no tie at the top-k
    assert weights.count_nonzero() > 10
    results = []
    for form in ("torch", "kernels", "sparse"):
        use_kernels(form != "torch")
        monkeypatch.setattr(loss_products, "DENSE_PER_SPARSE", 1 if form == "sparse" else 1 << 30)
        loss, _ = chunked_opsd_loss(*tensors, labels, weights, CONFIGS[name], chunk_size=16)
        assert loss.dtype == torch.float32
        results.append((loss, gradients(loss, tensors)))
    for loss, grads in results[1:]:
        close(loss, results[0][0], rtol=1e-4)
        for ours, theirs in zip(grads, results[0][1], strict=True):
            assert ours.dtype == torch.bfloat16
            assert (ours - theirs).float().norm() < 0.02 * theirs.float().norm()


@pytest.mark.parametrize(("name", "sizes"), [("paper", [6, 5]), ("full", [3, 3, 3, 2])])
def test_both_models_logits_count_in_the_chunk_size(
    name: str, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks are halved where the divergence needs both models' logits at once."""
    seen = []
    read = loss_chunk.Chunk.read_teacher

    def noted(self: loss_chunk.Chunk, logits: Tensor) -> None:
        seen.append(len(logits))
        read(self, logits)

    monkeypatch.setattr(loss_chunk.Chunk, "read_teacher", noted)
    tensors, labels, weights = inputs()
    chunked_opsd_loss(*tensors, labels, weights, CONFIGS[name], chunk_size=6)
    assert seen == sizes
    seen.clear()
    chunked_opsd_loss(*tensors, labels, weights, CONFIGS["full"], chunk_size=1)
    assert seen == [1] * 11


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
    tensors, labels, weights = inputs(200, 512, torch.bfloat16, 152064)
    results = []
    for eager in ("", "loss"):
        monkeypatch.setenv("VISUAL_OPSD_EAGER", eager)
        loss, stats = chunked_opsd_loss(*tensors, labels, weights, config, chunk_size=100)
        results.append((loss, stats, gradients(loss, tensors)))
    oracle = recomputed_opsd_loss(*tensors, labels, weights, config, chunk_size=100)
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
    tensors, labels, weights = inputs(rows, width, torch.bfloat16, vocab)
    runs = []
    for _ in range(2):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss, _ = chunked_opsd_loss(*tensors, labels, weights, config, chunk_size=128)
        grads = gradients(loss, tensors)
        runs.append((loss, grads, torch.cuda.max_memory_allocated() - before))
    assert torch.equal(runs[0][0], runs[1][0])
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))
    allowed = 2 * width * (vocab + rows) + 2 * 128 * vocab + 40_000_000
    assert runs[1][2] < allowed, (runs[1][2], allowed)
