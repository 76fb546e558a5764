# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The decoding step as Triton kernels against the eager step; on a GPU as a CUDA graph too."""

from __future__ import annotations

import math
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from data.packing import pack
from data.sequence import TextSegment
from modeling import load_bagel
from modeling.bagel.bagel import Bagel
from modeling.bagel.config import BagelConfig, LLMConfig, SpecialTokens, VisionConfig
from modeling.bagel.decoder import RMSNorm, norm_and_rotate, rotary
from modeling.bagel.generate import DecodePlan, choose, generate
from modeling.bagel.graphs import RepeatedStep
from modeling.bagel.kv_cache import KVCache
from modeling.bagel.projections import adjoin_projections, adjoining
from modeling.bagel.streamed_decode import StreamedDecoder, can_stream
from tests.conftest import TINY_BAGEL

pytest.importorskip("triton")

from modeling.kernels import sampling
from modeling.kernels.decode_attention import DecodeAttention
from modeling.kernels.stream_linear import Tile, stages_within, stream_linear, tile_for

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape).to(DEVICE)


def stream_linear_plain(
    x: Tensor,
    weight: Tensor,
    *,
    gain: Tensor | None = None,
    eps: float = 1e-6,
    bias: Tensor | None = None,
    second: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """What `stream_linear` computes, in fp32, rounded where the kernel rounds."""
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if gain is not None:
        wide = (wide * gain.float()).to(x.dtype).float()
    y = wide @ weight.float().t()
    if gain is not None:
        y = y * scale
    if bias is not None:
        y = y + bias.float()
    if second is not None:
        other = wide @ second.float().t()
        if gain is not None:
            other = other * scale
        y = F.silu(y.to(x.dtype).float()).to(x.dtype).float() * other.to(x.dtype).float()
    if residual is not None:
        y = y.to(x.dtype).float() + residual.float()
    return y.to(x.dtype)


def decode_attention_plain(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, slots: Tensor
) -> Tensor:
    """The attention alone, in fp32: rotated q (B, nh, d), k and v (B, nkv, d) of the new row."""
    _, heads, dim = q.shape
    groups = keys.shape[2]
    out = []
    for b, slot in enumerate(slots.tolist()):
        keys[b, slot], values[b, slot] = k[b], v[b]
        seen_k, seen_v = keys[b, : slot + 1].float(), values[b, : slot + 1].float()
        grouped = q[b].float().view(groups, heads // groups, dim)
        scores = torch.einsum("grd,sgd->grs", grouped, seen_k) / math.sqrt(dim)
        out.append(torch.einsum("grs,sgd->grd", scores.softmax(-1), seen_v).reshape(heads, dim))
    return torch.stack(out).to(q.dtype)


@pytest.mark.parametrize("vocab", [100, 5000])
@pytest.mark.parametrize("greedy", [False, True])
def test_no_token_lies_outside_the_vocabulary(vocab: int, greedy: bool) -> None:
    """Whatever the logits are: all undefined, one undefined, infinite, excluded."""
    logits = torch.randn(5, vocab)
    if DEVICE == "cuda":  # the interpreter's maximum of nothing but NaN is an error
        logits[0] = float("nan")
    logits[1, vocab // 2] = float("nan")
    logits[2] = float("-inf")
    logits[3, 7] = float("inf")
    for number in (0.0, 0.5, 1 - 2**-53):
        uniforms = torch.full((5,), number, dtype=torch.float64, device=DEVICE)
        token, _ = sampling.choose_token(logits.to(DEVICE), 0.7, None if greedy else uniforms)
        assert int(token.min()) >= 0
        assert int(token.max()) < vocab


@pytest.mark.parametrize("count", [2, 8, 16, 32, 64])
@pytest.mark.parametrize(
    ("n", "k", "pair"),
    [(4608, 3584, False), (3584, 18944, False), (18944, 3584, True), (152064, 3584, False)],
)
def test_tiles_fit_small_cards(count: int, n: int, k: int, pair: bool) -> None:
    """As they were tuned on an H100; on cards for desktops fewer of them in flight, never none."""
    tile = tile_for(count, n, k, pair)
    block = max(8 if tile.swap else 16, count)
    assert stages_within(tile, block, pair, 227 * 1024) == tile.stages
    stages = stages_within(tile, block, pair, 99 * 1024)
    assert 2 <= stages <= tile.stages
    assert stages_within(tile, block, pair, 0) == 1


@pytest.mark.parametrize("count", [1, 2, 9, 17])
@pytest.mark.parametrize(("n", "k"), [(40, 48), (64, 96), (30, 72)])
@pytest.mark.parametrize("swap", [False, True])
def test_stream_linear(
    count: int, n: int, k: int, swap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole tiles and torn ones, with everything that may stand around the product."""
    torch.manual_seed(count + n)
    x, weight, second = drawn(count, k), drawn(n, k), drawn(n, k)
    gain, bias, residual = drawn(k), drawn(n), drawn(count, n)
    tile = Tile(16, 16 if count > 1 else 32, 4, 2, swap)
    monkeypatch.setattr("modeling.kernels.stream_linear.tile_for", lambda *_: tile)
    arounds: tuple[dict[str, Any], ...] = (
        {},
        {"gain": gain, "bias": bias},
        {"gain": gain, "second": second},
        {"residual": residual},
    )
    for around in arounds:
        actual = stream_linear(x, weight, **around)
        expected = stream_linear_plain(x, weight, **around)
        error = (actual - expected).norm() / expected.norm()
        assert error < 1e-5, (sorted(around), float(error))
    out = residual.clone()
    assert stream_linear(x, weight, residual=out, out=out) is out
    torch.testing.assert_close(
        out, stream_linear_plain(x, weight, residual=residual), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("chunk", [32, 64, 128])
def test_decode_attention(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots on both sides of a chunk's edge; the new row enters the cache and nothing else does."""
    torch.manual_seed(chunk)
    monkeypatch.setattr("modeling.kernels.decode_attention.chunk_for", lambda *_: chunk)
    batch, length, heads, groups, dim = 4, 100, 6, 2, 32
    positions = torch.tensor([5, 70, 99, 3], device=DEVICE)
    slots = torch.tensor([0, 64, 95, 31], device=DEVICE)
    cos, sin = (t[:, : dim // 2] for t in rotary(torch.arange(128, device=DEVICE), dim, 1e6))
    qkv = drawn(batch, (heads + 2 * groups) * dim)
    q_norm, k_norm = (RMSNorm(dim, 1e-6).to(DEVICE) for _ in range(2))
    for norm in (q_norm, k_norm):
        norm.weight.data.normal_()
    stores = [drawn(batch, length, groups, dim) for _ in range(2)]
    expected_stores = [store.clone() for store in stores]
    attention = DecodeAttention(batch, length, heads, groups, dim, cos, sin)
    out = torch.empty(batch, heads * dim, device=DEVICE)
    for _ in range(2):  # the second time its counters must be where they began
        attention(qkv, q_norm.weight, k_norm.weight, 1e-6, positions, slots, *stores, out=out)
    q, k, v = qkv.split([heads * dim, groups * dim, groups * dim], -1)
    q, k = q.view(batch, heads, dim), k.view(batch, groups, dim)
    with torch.no_grad():
        q, k = norm_and_rotate(q, k, q_norm, k_norm, *rotary(positions, dim, 1e6))
    keys, values = expected_stores
    expected = decode_attention_plain(q, k, v.view(batch, groups, dim), keys, values, slots)
    torch.testing.assert_close(out, expected.flatten(1), atol=1e-5, rtol=1e-5)
    for store, wanted in zip(stores, expected_stores, strict=True):
        torch.testing.assert_close(store, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("vocab", [100, 4096, 9000])
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_choice_of_tokens(vocab: int, temperature: float) -> None:
    torch.manual_seed(vocab)
    logits = drawn(5, vocab) * 3
    logits[4] = -1e4
    logits[4, [7, vocab - 1]] = 0.0  # all mass in two entries, also at the very end
    uniforms = torch.tensor([0.0, 0.3, 0.999999, 0.7, 0.75], dtype=torch.float64, device=DEVICE)
    for numbers in (uniforms, None):
        token, logprob = sampling.choose_token(logits, temperature, numbers)
        wanted, wanted_logprob = choose(logits, temperature, numbers)
        assert torch.equal(token, wanted)
        torch.testing.assert_close(logprob, wanted_logprob, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("offset", [500.0, -3000.0])
def test_large_logits_lose_no_digits_of_the_choice(offset: float) -> None:
    """Against fp64: the logarithm keeps what the logits themselves have."""
    torch.manual_seed(1)
    logits = drawn(5, 9000) * 3 + offset
    uniforms = torch.tensor([0.0, 0.3, 0.999999, 0.7, 0.75], dtype=torch.float64, device=DEVICE)
    for numbers in (uniforms, None):
        token, logprob = sampling.choose_token(logits, 0.3, numbers)
        exact = (logits.double() / 0.3).log_softmax(-1)
        wanted = exact.gather(1, token[:, None])[:, 0]
        torch.testing.assert_close(logprob.double(), wanted, atol=1e-5, rtol=1e-6)
        if numbers is None:
            assert torch.equal(token, logits.argmax(-1))
        else:
            below = exact.exp().cumsum(-1).gather(1, token[:, None])[:, 0]
            assert (below + 1e-6 > numbers).all()
            assert (below - wanted.exp() - 1e-6 < numbers).all()


SPECIAL = SpecialTokens(1, 2, 3, 4)


@pytest.fixture(scope="module")
def model() -> Bagel:
    """Heads of 32, the least that the kernels take on a GPU."""
    torch.manual_seed(0)
    llm = LLMConfig(128, 2, 4, 2, 256, 300)
    with torch.device(DEVICE):
        made = Bagel(BagelConfig(llm=llm, vision=VisionConfig(32, 1, 2, 64)))
    for name, parameter in made.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(0, 0.1)
    return made.requires_grad_(False)


def prompts(count: int) -> list[tuple[TextSegment, ...]]:
    """Texts of different lengths."""
    generator = torch.Generator().manual_seed(3)
    drawn = [torch.randint(5, 300, (5 + 7 * i,), generator=generator) for i in range(count)]
    return [(TextSegment(tuple(ids.tolist())),) for ids in drawn]


@pytest.mark.parametrize("batch", [1, 3])
def test_the_streamed_step_is_the_eager_step(model: Bagel, batch: int) -> None:
    """Logits of several steps, each written into its own cache."""
    packed = pack(prompts(batch), SPECIAL).to(DEVICE)
    lens = torch.tensor(packed.layout.query_lens, device=DEVICE)
    places = torch.tensor(packed.next_positions, device=DEVICE)
    logits = []
    for streamed in (False, True):
        cache = KVCache(model.config.llm, batch, 64, DEVICE, model.dtype)
        with torch.no_grad():
            model(packed, cache=cache)
            step: Any = (
                StreamedDecoder(model, cache, 128)
                if streamed
                else partial(model.decode_step, cache=cache)
            )
            tokens = torch.arange(10, 10 + batch, device=DEVICE)
            logits.append(
                torch.stack([step(tokens + 50 * i, places + i, lens + i) for i in range(4)])
            )
    torch.testing.assert_close(logits[1], logits[0], atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("sampled", [False, True])
def test_generate_takes_it_and_writes_the_same(
    model: Bagel, sampled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp32, so that the tokens are the same; a sampled row's do not change with its neighbours."""
    contexts = prompts(2)
    numbers = torch.rand(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    uniforms = numbers.to(DEVICE) if sampled else None

    def run(some: list[int]) -> list[Any]:
        return generate(
            model,
            pack([contexts[i] for i in some], SPECIAL).to(DEVICE),
            SPECIAL,
            max_new_tokens=3,
            uniforms=None if uniforms is None else uniforms[some],
            check_every=2,
        )

    expected = run([0, 1])
    used: list[int] = []

    def stream(model: Bagel, cache: KVCache, positions: int) -> DecodePlan:
        used.append(1)
        step = StreamedDecoder(model, cache, positions)
        return DecodePlan(step, sampling.choose_token, fits_graphs=True)

    monkeypatch.setattr("modeling.bagel.generate.plan_decoding", stream)
    pairs = [(run([0, 1]), expected)]
    if sampled:
        pairs.append((run([1]), expected[1:]))
    assert len(used) == len(pairs)
    for actual, meant in pairs:
        for ours, theirs in zip(actual, meant, strict=True):
            assert ours.ids == theirs.ids and ours.capped == theirs.capped
            torch.testing.assert_close(
                torch.tensor(ours.logprobs), torch.tensor(theirs.logprobs), atol=1e-3, rtol=1e-3
            )


def test_projections_adjoin_without_a_change() -> None:
    model = load_bagel(TINY_BAGEL, device=DEVICE).model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    names = list(dict(model.named_parameters()))
    assert adjoin_projections(model) is model
    after = model.state_dict()
    assert list(dict(model.named_parameters())) == names
    assert all(torch.equal(after[name], value) for name, value in before.items())
    attention: Any = model.language_model.model.layers[1].self_attn
    weights = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
    joined = adjoining(weights)
    assert joined is not None and torch.equal(joined, torch.cat([w.detach() for w in weights]))
    with torch.no_grad():
        weights[1][0, 0] = 5.0
    assert joined[len(weights[0]), 0] == 5.0  # one memory
    assert adjoining([weights[0], weights[2]]) is None
    assert adjoining([weights[0], weights[1].half()]) is None
    assert adjoining([torch.zeros(2, 3), torch.zeros(2, 3)]) is None


def test_which_models_stream(model: Bagel, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not can_stream(model, 1)  # fp32
    half = deepcopy(model).bfloat16()
    assert can_stream(half, 64) == (DEVICE == "cuda")
    assert not can_stream(half, 65)
    narrow = load_bagel(TINY_BAGEL, device=DEVICE, dtype=torch.bfloat16).model
    assert not can_stream(narrow, 1)  # heads of 16
    monkeypatch.setenv("VISUAL_OPSD_EAGER", "decode")
    assert not can_stream(half, 1)


def test_a_repeated_step_runs_every_time() -> None:
    """On a GPU: once plainly, once recorded and replayed, then replayed."""
    total, add = torch.zeros(3, device=DEVICE), torch.ones(3, device=DEVICE)

    def advance() -> None:
        total.add_(add)

    step = RepeatedStep(advance, torch.device(DEVICE))
    for i in range(5):
        step()
        add.fill_(10.0)  # read at each replay
        assert total.tolist() == [1.0 + 10 * i] * 3
    assert (step.graph is not None) == (DEVICE == "cuda")


@pytest.mark.cuda
@needs_gpu
def test_graphs_are_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VISUAL_OPSD_EAGER", "graphs")
    assert not RepeatedStep(lambda: None, torch.device("cuda")).captures


@pytest.mark.cuda
@needs_gpu
def test_an_error_while_recording_is_the_one_that_is_raised() -> None:
    calls = []

    def step() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyError("not here")

    repeated = RepeatedStep(step, torch.device("cuda"))
    repeated()
    with pytest.raises(KeyError, match="not here"):
        repeated()
    assert float(torch.ones(2, device="cuda").sum()) == 2  # the device still works


@pytest.mark.cuda
@needs_gpu
def test_a_recording_is_tried_again_when_memory_ran_out() -> None:
    """What the first attempt took is given back; the second is replayed."""
    total, calls = torch.zeros(3, device="cuda"), []

    def step() -> None:
        calls.append(1)
        total.add_(torch.ones(3, device="cuda"))
        if len(calls) == 2:
            torch.empty(1 << 44, dtype=torch.uint8, device="cuda")

    repeated = RepeatedStep(step, torch.device("cuda"))
    for count in range(1, 6):
        repeated()
        assert total.tolist() == [count] * 3
    assert repeated.graph is not None
    assert len(calls) == 3


@pytest.mark.cuda
@needs_gpu
def test_bf16_through_graphs_on_a_gpu(model: Bagel, monkeypatch: pytest.MonkeyPatch) -> None:
    """As users have it: recorded or not, the same ids; logits near those of the eager step."""
    half = deepcopy(model).bfloat16()
    packed = pack(prompts(3), SPECIAL).to(DEVICE)
    numbers = torch.rand(3, 41, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def run() -> list[list[int]]:
        made = generate(half, packed, SPECIAL, max_new_tokens=40, uniforms=numbers.to(DEVICE))
        return [row.ids for row in made]

    recorded = run()
    assert max(len(ids) for ids in recorded) > 20
    monkeypatch.setenv("VISUAL_OPSD_EAGER", "graphs")
    assert run() == recorded
    tokens, places = (torch.tensor(x, device=DEVICE) for x in ([5, 6, 7], [9, 9, 9]))
    logits = []
    for streamed in (False, True):
        torch.manual_seed(1)
        cache = KVCache(half.config.llm, 3, 64, DEVICE, half.dtype)
        for store in (*cache.keys, *cache.values):
            store.normal_()
        with torch.no_grad():
            if streamed:
                logits.append(StreamedDecoder(half, cache, 64)(tokens, places, places))
            else:
                logits.append(half.decode_step(tokens, places, places, cache))
    error = (logits[1].float() - logits[0].float()).norm() / logits[0].float().norm()
    assert error < 0.03, float(error)
