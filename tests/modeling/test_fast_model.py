# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The whole model with its kernels against the eager one: prompts, drawings, gradients.

On a GPU in fp32 there, elsewhere in Triton's interpreter; which paths are taken is forced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from data.packing import pack, pack_branches
from data.sequence import LatentSegment, Segment
from data.transforms import extrapolated_position_ids
from modeling import fast, load_bagel
from modeling.bagel.flow import Guidance, Prefix, denoise, flow_schedule, initial_noise
from modeling.bagel.kv_cache import KVCache
from modeling.bagel.projections import adjoin_projections
from tests.conftest import TINY_BAGEL
from tests.modeling.segments import image, text

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def bundle() -> Any:
    made = load_bagel(TINY_BAGEL, visual_gen=True, device=DEVICE)
    adjoin_projections(made.model)
    return made


@pytest.fixture
def with_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Called, it turns the kernels of rows and of attention on, also in fp32."""

    def turn_on() -> None:
        monkeypatch.setattr(fast, "runs_kernels", lambda path, _: path in ("rows", "attention"))

    yield turn_on


def test_prompts_in_two_chunks(bundle: Any, with_kernels: Callable[[], None]) -> None:
    """Two samples of different lengths, an image in each chunk; cache and outputs agree."""
    model, special = bundle.model, bundle.special_tokens
    first = [(text(4), image(3, model), text(3)), (text(9),)]
    second = [(text(2, 90),), (image(2, model), text(3, 70))]
    results = []
    for kernels in (False, True):
        if kernels:
            with_kernels()
        cache = KVCache(model.config.llm, 2, 40, DEVICE, model.dtype)
        with torch.no_grad():
            one = pack(first, special)
            out = [model(one.to(DEVICE), cache=cache)]
            past = list(zip(one.layout.query_lens, one.next_positions, strict=True))
            two = pack(second, special, past=past)
            out.append(model(two.to(DEVICE), cache=cache))
        results.append([*out, *cache.keys, *cache.values])
    for actual, expected in zip(*reversed(results), strict=True):
        torch.testing.assert_close(actual, expected, atol=2e-4, rtol=2e-4)


def test_drawing(bundle: Any, with_kernels: Callable[[], None]) -> None:
    """Two pictures of different sizes, three branches in one forward, two experts."""
    model, special = bundle.model, bundle.special_tokens
    side = model.config.max_latent_size
    blanks = [
        LatentSegment.blank(extrapolated_position_ids(h, w, side)) for h, w in ((2, 3), (4, 2))
    ]
    contexts: list[list[tuple[Segment, ...]]]
    contexts = [[(text(7),), (text(4), image(2, model))], [(text(2),), (text(1),)]]
    contexts.append([(text(3),), (image(3, model),)])
    caches, pasts = [], []
    for column in contexts:
        packed = pack(column, special)
        cache = KVCache(model.config.llm, 2, 30, DEVICE, model.dtype)
        with torch.no_grad():
            model(packed.to(DEVICE), cache=cache)
        caches.append(cache)
        pasts.append(list(zip(packed.layout.query_lens, packed.next_positions, strict=True)))
    prefixes = [
        [Prefix(cache, row, past[row][0]) for row in range(2)]
        for cache, past in zip(caches, pasts, strict=True)
    ]
    noise = initial_noise([6, 8], generator=torch.Generator().manual_seed(0))
    guidance = Guidance(4.0, 2.0, (0.4, 1.0), "global")
    times = flow_schedule(3, 3.0)

    def draw() -> Tensor:
        branches = pack_branches(blanks, pasts, special).to(DEVICE)
        return denoise(model, noise, branches, prefixes, times, guidance)

    expected = draw()
    with_kernels()
    torch.testing.assert_close(draw(), expected, atol=5e-4, rtol=5e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients(checkpointing: bool, with_kernels: Callable[[], None]) -> None:
    """Of every parameter, through text, images and the ViT."""
    bundle = load_bagel(TINY_BAGEL, device=DEVICE)
    model = bundle.model
    model.set_gradient_checkpointing(checkpointing)
    contexts = [
        (text(4), image(3, model), text(5, 60, scored=True)),
        (image(2, model), text(3, 40, scored=True)),
    ]
    packed = pack(contexts, bundle.special_tokens).to(DEVICE)
    found = []
    for kernels in (False, True):
        if kernels:
            with_kernels()
        model.zero_grad(set_to_none=True)

        def head(hidden: Tensor, weight: Tensor) -> Tensor:
            logits = hidden @ weight.t()
            return torch.nn.functional.cross_entropy(logits, packed.score_labels)

        loss = model(packed, head=head)
        loss.backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found.append((loss.detach(), grads))
    (loss, grads), (expected_loss, expected) = found[1], found[0]
    torch.testing.assert_close(loss, expected_loss, atol=1e-5, rtol=1e-5)
    assert grads.keys() == expected.keys() and len(grads) > 50
    largest = max(float(grad.norm()) for grad in expected.values())
    for name, grad in grads.items():
        error = (grad - expected[name]).norm()
        # A key's bias changes no softmax: its gradient is rounding alone.
        assert error < 1e-3 * expected[name].norm() + 1e-6 * largest, (name, float(error))


def test_a_cache_is_filled_as_by_a_forward(bundle: Any, with_kernels: Callable[[], None]) -> None:
    """`fill_cache` leaves the last layer's products out, not its keys."""
    model, special = bundle.model, bundle.special_tokens
    packed = pack([(text(4), image(3, model)), (text(9),)], special).to(DEVICE)
    for kernels in (False, True):
        if kernels:
            with_kernels()
        caches = [KVCache(model.config.llm, 2, 20, DEVICE, model.dtype) for _ in range(2)]
        with torch.no_grad():
            model(packed, cache=caches[0])
            model.fill_cache(packed, caches[1])
        for one, other in zip(
            caches[0].keys + caches[0].values, caches[1].keys + caches[1].values, strict=True
        ):
            torch.testing.assert_close(other, one, atol=1e-5, rtol=1e-5)


def test_one_pack_fills_caches_of_different_lengths(
    bundle: Any, with_kernels: Callable[[], None]
) -> None:
    """Where a row goes depends on the cache, not on the pack alone; also with two experts."""
    model, special = bundle.model, bundle.special_tokens
    latents = torch.rand(6, 64, generator=torch.Generator().manual_seed(0))
    drawn = LatentSegment(latents, extrapolated_position_ids(2, 3, model.config.max_latent_size))
    packed = pack([(text(3), drawn), (text(5),)], special).to(DEVICE)
    with_kernels()
    found = []
    for room in (40, 24):
        cache = KVCache(model.config.llm, 2, room, DEVICE, model.dtype)
        with torch.no_grad():
            model(packed, cache=cache)
        found.append([t[:, :16] for t in (*cache.keys, *cache.values)])
    for one, other in zip(*found, strict=True):
        assert one[0].any()
        torch.testing.assert_close(other, one, atol=1e-6, rtol=1e-6)
