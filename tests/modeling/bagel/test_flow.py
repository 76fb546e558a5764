# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Drawing against the recorded reference: contexts, schedule, guidance, Euler steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from data.packing import pack, pack_branches
from data.sequence import ContextBuilder, LatentSegment, Segment, TextSegment
from data.transforms import ImageTransform, extrapolated_position_ids, to_pixels
from modeling import load_bagel
from modeling.autoencoder import decode_tokens, encode_tokens
from modeling.bagel.flow import (
    Guidance,
    Prefix,
    StepCache,
    combine,
    denoise,
    flow_schedule,
    initial_noise,
)
from modeling.bagel.generate import CachedPrompt, Generation, generate
from modeling.bagel.kv_cache import KVCache
from tests.conftest import assert_golden, load_golden

META, T = load_golden("08_flow")
BRANCHES = ("gen", "cfg_text", "cfg_img")


@pytest.fixture(scope="module")
def bundle(tiny_bagel_path: Any) -> Any:
    return load_bagel(tiny_bagel_path, visual_gen=True)


def blank(h: int, w: int) -> LatentSegment:
    return LatentSegment.blank(extrapolated_position_ids(h, w, 64))


@dataclass(frozen=True)
class Grown:
    """A context in a cache."""

    cache: KVCache
    length: int
    position: int

    @property
    def past(self) -> tuple[int, int]:
        return self.length, self.position

    @property
    def prefix(self) -> Prefix:
        return Prefix(self.cache, 0, self.length)


@torch.no_grad()
def grow(bundle: Any, segments: list[Segment], room: int = 260) -> list[Grown]:
    """The states of one cache after each segment."""
    device = bundle.model.language_model.lm_head.weight.device
    cache = KVCache(bundle.config.llm, 1, room, device, bundle.model.dtype)
    states = [Grown(cache, 0, 0)]
    for segment in segments:
        batch = pack([(segment,)], bundle.special_tokens, past=[states[-1].past])
        bundle.model(batch.to(device), cache=cache)
        states.append(Grown(cache, batch.layout.key_lens[0], batch.next_positions[0]))
    return states


@pytest.fixture(scope="module")
def contexts(bundle: Any) -> dict[str, Grown]:
    """The three contexts of the golden; the text-dropped one is an early state of the first."""
    image = Image.fromarray(T["image_u8_after_vae_resize"].numpy())
    builder = ContextBuilder(bundle.tokenizer, ImageTransform(112, 56, 14))
    with torch.no_grad():
        tokens = encode_tokens(bundle.vae, [to_pixels(image)], noise=T["vae_encode_noise"])[0]
    pictures: list[Segment] = [
        LatentSegment(tokens, extrapolated_position_ids(4, 6, 64)),
        builder.image(image),
    ]
    system, question, text1 = (
        builder.text(META["texts"][name]) for name in ("system", "question", "text1")
    )
    gen = grow(bundle, [system, *pictures, question, text1])
    return {"gen": gen[-1], "cfg_text": gen[3], "cfg_img": grow(bundle, [system, question])[-1]}


def drawn(
    bundle: Any, contexts: dict[str, Grown], variant: dict[str, Any], together: bool, **more: Any
) -> Tensor:
    guidance = Guidance(
        text_scale=variant["cfg_text_scale"],
        image_scale=variant["cfg_img_scale"],
        interval=tuple(variant["cfg_interval"]),
        renorm=variant["cfg_renorm_type"],
        renorm_min=variant["cfg_renorm_min"],
    )
    used = [contexts[name] for name in BRANCHES[: guidance.branches]]
    pasts = [[context.past] for context in used]
    branches = pack_branches([blank(4, 6)], pasts, bundle.special_tokens, together=together)
    times = flow_schedule(
        variant.get("num_timesteps", META["num_timesteps"]),
        variant.get("timestep_shift", META["timestep_shift"]),
    )
    prefixes = [[context.prefix] for context in used]
    return denoise(bundle.model, T["init_noise"], branches, prefixes, times, guidance, **more)


def test_contexts(contexts: dict[str, Grown]) -> None:
    for name, context in contexts.items():
        assert [context.length] == META["contexts"][name]["kv_lens"]
        assert [context.position] == META["contexts"][name]["ropes"]
        for layer in (0, 2):
            for kind, store in (("key", context.cache.keys), ("value", context.cache.values)):
                expected = f"ctx_{name}_{kind}_layer{layer}"
                assert_golden(META, expected, store[layer][0, : context.length], T[expected])


def test_step_packing(bundle: Any, contexts: dict[str, Grown]) -> None:
    """The rows of a denoising step as the reference prepares them."""
    pasts = [[contexts[name].past] for name in BRANCHES]
    branches = pack_branches([blank(4, 6)], pasts, bundle.special_tokens)
    for name, batch in zip(BRANCHES, branches.each, strict=True):
        assert batch.latents is not None
        assert torch.equal(batch.position_ids, T[f"{name}.packed_position_ids"])
        assert batch.layout.past_lens == tuple(T[f"{name}.key_values_lens"].tolist())
        if name == "gen":
            assert torch.equal(batch.text_ids, T["gen.packed_text_ids"])
            assert torch.equal(batch.text_rows, T["gen.packed_text_indexes"])
            assert torch.equal(batch.latents.rows, T["gen.packed_vae_token_indexes"])
            assert torch.equal(batch.latents.position_ids, T["gen.packed_vae_position_ids"])
            assert list(batch.layout.query_lens) == T["gen.packed_seqlens"].tolist()
            assert batch.next_positions == (contexts["gen"].position,)
    assert branches.together is not None
    whole = torch.cat([batch.position_ids for batch in branches.each])
    assert torch.equal(branches.together.position_ids, whole)


@pytest.mark.parametrize("together", [True, False], ids=["together", "in_turn"])
@pytest.mark.parametrize("name", META["variants"])
def test_variants(bundle: Any, contexts: dict[str, Grown], name: str, together: bool) -> None:
    velocities: list[Tensor] = []
    variant = META["variants"][name]
    latent = drawn(
        bundle, contexts, variant, together, on_step=lambda step, v: velocities.append(v)
    )
    assert_golden(META, f"latent.{name}", latent, T[f"latent.{name}"])
    if f"velocities.{name}" in T:
        assert_golden(META, f"velocities.{name}", torch.stack(velocities), T[f"velocities.{name}"])
    if name == "text_channel_iv0.0":
        with torch.no_grad():
            picture = decode_tokens(bundle.vae, latent, 4, 6)
        assert_golden(META, "decoded_u8", picture, T["decoded_u8"])


@pytest.mark.parametrize("name", ["global_iv0.0", "channel_iv0.5-0.9", "textonly_text_channel"])
def test_branches_together_equal_in_turn(
    bundle: Any, contexts: dict[str, Grown], name: str
) -> None:
    both = [drawn(bundle, contexts, META["variants"][name], flag) for flag in (True, False)]
    torch.testing.assert_close(both[0], both[1], atol=1e-5, rtol=0)


def test_contexts_stay_as_they_are(bundle: Any, contexts: dict[str, Grown]) -> None:
    def contents() -> list[Tensor]:
        stores = [c.cache.keys + c.cache.values for c in contexts.values()]
        return [tensor.clone() for store in stores for tensor in store]

    before = contents()
    drawn(bundle, contexts, META["variants"]["global_iv0.0"], True)
    assert all(torch.equal(a, b) for a, b in zip(before, contents(), strict=True))


def test_each_sample_continues_its_own_row_of_a_cache(bundle: Any) -> None:
    cache = KVCache(bundle.config.llm, 3, 8, "cpu", torch.float32)
    for number, store in enumerate(cache.keys + cache.values):
        store.copy_(torch.arange(store.numel()).view(store.shape) + 10_000 * number)
    step = StepCache([Prefix(cache, 2, 5), Prefix(cache, 0, 3)], [2, 4])
    for merged, stores in ((step.keys, cache.keys), (step.values, cache.values)):
        for buffer, store in zip(merged, stores, strict=True):
            assert torch.equal(buffer[:5], store[2, :5])
            assert torch.equal(buffer[7:10], store[0, :3])
            assert len(buffer) == 14 and not buffer[5:7].any() and not buffer[10:].any()


def test_schedule() -> None:
    times = flow_schedule(META["num_timesteps"], META["timestep_shift"])
    assert_golden(META, "shifted_timesteps", times, T["shifted_timesteps"])
    assert flow_schedule(3).tolist() == [1.0, 0.5, 0.0]
    with pytest.raises(ValueError, match="num_timesteps must be at least 2"):
        flow_schedule(1)
    with pytest.raises(ValueError, match="timestep_shift must be positive"):
        flow_schedule(5, 0.0)


def test_interval_is_compared_in_fp32() -> None:
    """One of these times is fp32(0.4): as a double it is above 0.4, as fp32 it is not."""
    times = flow_schedule(12, 3.0)
    assert torch.tensor(0.4) in times and float(torch.tensor(0.4)) > 0.4
    guided = Guidance(4.0, 1.0, (0.4, 1.0)).steps(times)
    assert guided == [t > 0.401 for t in times[:-1].tolist()]
    # The upper bound belongs to the interval, the lower one does not.
    assert Guidance(4.0, 1.0, (0.0, 1.0)).steps(times) == [True] * 11
    assert Guidance(4.0, 1.0, (1.0, 1.0)).steps(times) == [False] * 11
    upto = Guidance(4.0, 1.0, (0.0, 0.4)).steps(times)
    assert upto == [t < 0.401 for t in times[:-1].tolist()]
    # Image guidance alone does nothing, as released.
    assert Guidance(1.0, 4.0).branches == 1 and not any(Guidance(1.0, 4.0).steps(times))
    with pytest.raises(ValueError, match="unknown cfg_renorm_type 'chanel': global"):
        Guidance(renorm="chanel")
    with pytest.raises(ValueError, match="cfg_interval must be"):
        Guidance(interval=(0.9, 0.1))


def written_out(
    v: Tensor, vt: Tensor, vi: Tensor | None, text: float, image: float, kind: str, low: float
) -> Tensor:
    """The three rules number by number, restated."""
    guided = vt + text * (v - vt)
    out = torch.empty_like(v)
    for row in range(len(v)):
        token = guided[row]
        if kind == "text_channel":
            token = token * min(max(float(v[row].norm() / (token.norm() + 1e-8)), low), 1.0)
        if vi is not None:
            token = vi[row] + image * (token - vi[row])
        if kind == "channel":
            token = token * min(max(float(v[row].norm() / (token.norm() + 1e-8)), low), 1.0)
        out[row] = token
    if kind == "global":
        out = out * min(max(float(v.norm() / (out.norm() + 1e-8)), low), 1.0)
    return out


@pytest.mark.parametrize("kind", ["global", "channel", "text_channel"])
@pytest.mark.parametrize("with_image", [True, False])
@pytest.mark.parametrize("low", [0.0, 0.9])
def test_combine(kind: str, with_image: bool, low: float) -> None:
    generator = torch.Generator().manual_seed(3)
    v, vt, vi = torch.randn(3, 10, 64, generator=generator)
    v[:5] *= 3
    vt[5:] *= 2
    image_dropped = vi if with_image else None
    guidance = Guidance(0.5 + 1.0, 2.0, renorm=kind, renorm_min=low)
    expected = written_out(v, vt, image_dropped, 1.5, 2.0, kind, low)
    torch.testing.assert_close(combine(v, vt, image_dropped, guidance), expected)
    # Guidance that shortens is left alone: the upper clamp, which no golden shows.
    torch.testing.assert_close(combine(v, 2 * v, None, guidance), 0.5 * v)


def test_global_norm_is_that_of_an_image() -> None:
    v, vt, vi = torch.randn(3, 10, 64, generator=torch.Generator().manual_seed(4))
    v[:4] *= 5
    guidance = Guidance(4.0, 2.0)
    alone = [combine(v[s], vt[s], vi[s], guidance) for s in (slice(4), slice(4, 10))]
    torch.testing.assert_close(combine(v, vt, vi, guidance, (4, 6)), torch.cat(alone))
    joint = Guidance(4.0, 2.0, joint_global=True)
    expected = written_out(v, vt, vi, 4.0, 2.0, "global", 0.0)
    torch.testing.assert_close(combine(v, vt, vi, joint, (4, 6)), expected)
    assert not torch.allclose(torch.cat(alone), expected)


def prepared(bundle: Any, lens: tuple[int, ...]) -> list[list[Grown]]:
    """Contexts of three branches for images whose texts have these lengths."""
    texts = [TextSegment(tuple(range(40, 40 + n))) for n in lens]
    dropped = TextSegment((33, 34))
    full = [grow(bundle, [dropped, text], 64) for text in texts]
    other = [grow(bundle, [text], 64)[-1] for text in texts]
    return [[states[-1] for states in full], [states[1] for states in full], other]


@pytest.mark.parametrize("together", [True, False])
def test_images_drawn_together_equal_one_by_one(bundle: Any, together: bool) -> None:
    groups = prepared(bundle, (5, 9, 3))
    images = [blank(2, 3), blank(4, 2), blank(1, 1)]
    lens = [6, 8, 1]
    noise = initial_noise(lens, generator=torch.Generator().manual_seed(0))
    times, guidance = flow_schedule(4, 3.0), Guidance(4.0, 2.0, (0.5, 1.0))

    def draw(which: list[int], noise: Tensor) -> Tensor:
        pasts = [[group[i].past for i in which] for group in groups]
        branches = pack_branches(
            [images[i] for i in which], pasts, bundle.special_tokens, together=together
        )
        prefixes = [[group[i].prefix for i in which] for group in groups]
        return denoise(bundle.model, noise, branches, prefixes, times, guidance)

    whole = draw([0, 1, 2], noise)
    for i, (part, own) in enumerate(zip(whole.split(lens), noise.split(lens), strict=True)):
        torch.testing.assert_close(draw([i], own), part, atol=1e-5, rtol=0)
    assert not torch.allclose(whole[:6], draw([0], noise[6:12]))


def test_initial_noise_is_the_references() -> None:
    torch.manual_seed(7)
    expected = [torch.randn(6, 64), torch.randn(2, 64)]
    torch.manual_seed(7)
    assert torch.equal(initial_noise([6, 2]), torch.cat(expected))
    own = initial_noise([6, 2], generator=torch.Generator().manual_seed(7))
    assert torch.equal(own, torch.cat(expected))


def test_the_loop_reads_nothing_from_the_device(bundle: Any) -> None:
    """On the meta device there is nothing to read: a read raises."""
    groups = prepared(bundle, (5, 9))
    model = load_bagel_on_meta(bundle)
    for together in (True, False):
        branches = pack_branches(
            [blank(2, 3), blank(1, 2)],
            [[c.past for c in group] for group in groups],
            bundle.special_tokens,
            together=together,
        )
        empty = KVCache(bundle.config.llm, 1, 64, "meta", torch.float32)
        prefixes = [[Prefix(empty, 0, c.length) for c in group] for group in groups]
        latent = denoise(
            model,
            torch.zeros(8, 64),
            branches.to("meta"),
            prefixes,
            flow_schedule(4, 3.0),
            Guidance(4.0, 2.0, (0.5, 1.0)),
        )
        assert latent.is_meta and latent.shape == (8, 64)


def load_bagel_on_meta(bundle: Any) -> Any:
    with torch.device("meta"):
        return type(bundle.model)(bundle.config)


def test_what_denoise_refuses(bundle: Any) -> None:
    groups = prepared(bundle, (5,))[:1]
    branches = pack_branches([blank(2, 3)], [[groups[0][0].past]], bundle.special_tokens)
    assert branches.together is None  # one branch needs no second packing
    prefixes, times = [[groups[0][0].prefix]], flow_schedule(3)
    with pytest.raises(ValueError, match=r"needs 3 contexts .* got 1 batches"):
        denoise(bundle.model, torch.zeros(6, 64), branches, prefixes, times, Guidance(4.0, 2.0))
    with pytest.raises(ValueError, match=r"initial noise must be \(6, 64\)"):
        denoise(bundle.model, torch.zeros(5, 64), branches, prefixes, times)


def test_unused_branches_are_left_alone(bundle: Any) -> None:
    """Three contexts given, text guidance only: as with two."""
    groups = prepared(bundle, (5,))
    pasts, prefixes = ([[getattr(c, n) for c in g] for g in groups] for n in ("past", "prefix"))
    noise, times = torch.randn(6, 64), flow_schedule(3)
    results = []
    for count in (2, 3):
        branches = pack_branches([blank(2, 3)], pasts[:count], bundle.special_tokens)
        results.append(
            denoise(bundle.model, noise, branches, prefixes[:count], times, Guidance(3.0))
        )
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=0)


def test_step_cache_merges_prefixes_and_new_rows(bundle: Any) -> None:
    states = grow(bundle, [TextSegment((40, 41)), TextSegment((42,))], 16)
    cache = StepCache([states[2].prefix, states[1].prefix], (3, 2))
    batch = pack(
        [(TextSegment((5,)),), (TextSegment(()),)],
        bundle.special_tokens,
        past=[states[2].past, states[1].past],
    )
    new = torch.arange(5.0)[:, None, None].expand(5, 2, 16)
    for view, layout, rows in (
        (cache, batch.layout, new),
        (
            cache.part(1, 2),
            pack([(TextSegment(()),)], bundle.special_tokens, past=[(4, 4)]).layout,
            new[3:],
        ),
    ):
        keys, _ = view.update(1, rows, rows, layout)
        old = [states[2].cache.keys[1][0, :n] for n in layout.past_lens]
        pieces = list(rows.split(list(layout.query_lens)))
        expected = [part for pair in zip(old, pieces, strict=True) for part in pair]
        assert torch.equal(keys, torch.cat(expected))


def two_images(
    bundle: Any, device: str, on_step: Callable[[int, Tensor], None] | None = None
) -> Tensor:
    """Two images, five steps, the second and third guided."""
    groups = prepared(bundle, (5, 9))
    pasts, prefixes = ([[getattr(c, n) for c in g] for g in groups] for n in ("past", "prefix"))
    branches = pack_branches([blank(4, 6), blank(5, 3)], pasts, bundle.special_tokens).to(device)
    noise = initial_noise([24, 15], generator=torch.Generator().manual_seed(2))
    guidance = Guidance(4.0, 2.0, (0.7, 0.95))
    times = flow_schedule(6, 3.0)
    assert guidance.steps(times) == [False, True, True, False, False]
    latent = denoise(bundle.model, noise, branches, prefixes, times, guidance, on_step=on_step)
    assert latent.dtype == torch.float32
    return latent.cpu()


def test_half_precision(bundle: Any, tiny_bagel_path: Any) -> None:
    """bf16 weights: the state stays fp32, and the picture is the same up to rounding."""
    half = load_bagel(tiny_bagel_path, visual_gen=True, dtype=torch.bfloat16)
    expected, actual = two_images(bundle, "cpu"), two_images(half, "cpu")
    error = (actual - expected).norm() / expected.norm()
    assert 0 < error < 0.05, error


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(bundle: Any, tiny_bagel_path: Any, dtype: torch.dtype) -> None:
    """The CPU's picture; in bf16 no wait for the device once both kinds of step have been seen.

    (fp32 runs one SDPA call a segment there, whose bounds it reads back.)
    """
    on_gpu = load_bagel(tiny_bagel_path, visual_gen=True, device="cuda", dtype=dtype)

    def forbid(step: int, _: Tensor) -> None:
        if step == 1 and dtype == torch.bfloat16:
            torch.cuda.set_sync_debug_mode("error")
        elif step == 4:
            torch.cuda.set_sync_debug_mode("default")

    try:
        actual = two_images(on_gpu, "cuda", forbid)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = two_images(bundle, "cpu")
    error = (actual - expected).norm() / expected.norm()
    assert error < (1e-3 if dtype == torch.float32 else 0.05), error


# -- what an inferencer needs of the cache ----------------------------------------------------


def assert_same_text(actual: list[Generation], expected: list[Generation]) -> None:
    """The same ids; log-probabilities but for rounding, as another width sums in another order."""
    for one, other in zip(actual, expected, strict=True):
        assert one.ids == other.ids and one.capped == other.capped
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


def test_decoding_from_a_cached_context(bundle: Any) -> None:
    """Text goes on from cached contexts, which stay as they are; same as packing them anew."""
    special = bundle.special_tokens
    texts = [TextSegment(tuple(range(40, 40 + n))) for n in (5, 9)]
    packed = pack([(text,) for text in texts], special)
    expected = generate(bundle.model, packed, special, max_new_tokens=12)
    cache = KVCache(bundle.config.llm, 2, 40, "cpu", torch.float32)
    with torch.no_grad():
        bundle.model(packed, cache=cache)
    kept = cache.copy(60)  # with more room
    prompt = CachedPrompt(cache, packed.layout.key_lens, packed.next_positions)
    decoded = generate(bundle.model, prompt, special, max_new_tokens=12)
    assert_same_text(decoded, expected)
    for row, length in enumerate(packed.layout.key_lens):
        for old, new in zip(kept.keys, cache.keys, strict=True):
            assert torch.equal(old[row, :length], new[row, :length])
    roomier = CachedPrompt(kept, packed.layout.key_lens, packed.next_positions)
    decoded = generate(bundle.model, roomier, special, max_new_tokens=12)
    assert_same_text(decoded, expected)
    tight = kept.copy(packed.layout.key_lens[1])  # the longer context alone
    for old, new in zip(kept.values, tight.values, strict=True):
        assert torch.equal(new, old[:, : tight.max_len])
    with pytest.raises(ValueError, match=r"make room with KVCache\.copy"):
        generate(bundle.model, prompt, special, max_new_tokens=100)


def test_schedule_lengths_sum_to_one() -> None:
    times = flow_schedule(50, 3.0)
    steps = [a - b for a, b in pairwise(times.tolist())]
    assert len(steps) == 49 and min(steps) > 0 and abs(sum(steps) - 1) < 1e-6
