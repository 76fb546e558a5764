# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Packs with clean and noised images: the recorded packer and forward, routing, gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from data.packing import context_length, pack
from data.sequence import (
    Context,
    ImageSegment,
    LatentSegment,
    Segment,
    TextSegment,
    given_completion,
)
from data.transforms import extrapolated_position_ids
from modeling import load_bagel
from modeling.autoencoder import encode_tokens
from modeling.bagel.batch import PackedBatch
from modeling.bagel.flow import flow_loss, mix_noise, training_times
from modeling.release.checkpoint import is_generation_key
from modeling.release.tokenizer import load_tokenizer
from tests.conftest import assert_generation_pack, assert_golden, load_golden

GOLDEN_06 = ("06_train_visual_gen_shift1", "06_train_visual_gen_shift3")


@pytest.fixture(scope="module")
def bundle(tiny_bagel_path: Any) -> Any:
    return load_bagel(tiny_bagel_path, visual_gen=True)


def positions(h: int, w: int) -> Tensor:
    return extrapolated_position_ids(h, w, 64)


def vit_image(h: int = 2, w: int = 3, seed: int = 0) -> ImageSegment:
    patches = torch.randn(h * w, 588, generator=torch.Generator().manual_seed(seed))
    return ImageSegment(patches, extrapolated_position_ids(h, w, 70))


def latents(h: int, w: int, time: float | None = None, seed: int = 0) -> LatentSegment:
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randn(h * w, 64, generator=generator)
    noise = torch.randn(h * w, 64, generator=generator)
    return LatentSegment(clean, positions(h, w), time, None if time is None else noise)


def test_units(bundle: Any) -> None:
    meta, t = load_golden("00_units")
    with torch.no_grad():
        embedded = bundle.model.time_embedder(t["timesteps"])
    assert_golden(meta, "timestep_embedding", embedded, t["timestep_embedding"])
    table = bundle.model.latent_pos_embed(t["latent_pos_embed_rows"])
    assert_golden(meta, "latent_pos_embed_values", table, t["latent_pos_embed_values"])


def test_packer_golden(tiny_bagel_path: Any) -> None:
    meta, t = load_golden("11_special_tokens")
    _, special = load_tokenizer(tiny_bagel_path)
    context = (
        TextSegment((40, 41)),
        vit_image(),
        given_completion((42,)).segment(),
        latents(2, 2),
        latents(2, 2, 0.5),
        given_completion((43, 44)).segment(),
    )
    batch = pack([context], special)
    assert batch.latents is not None
    assert batch.total == context_length(context) == meta["packing"]["sequence_length"]
    for name, actual in {
        "packed_text_ids": batch.text_ids,
        "packed_text_indexes": batch.text_rows,
        "packed_position_ids": batch.position_ids,
        "packed_latent_position_ids": batch.latents.position_ids,
        "packed_vae_token_indexes": batch.latents.rows,
        "packed_vit_position_ids": batch.vit_position_ids,
        "packed_vit_token_indexes": batch.vit_rows,
        "vit_token_seqlens": torch.tensor(batch.vit_lens),
        "mse_loss_indexes": batch.latents.velocity_rows,
        "packed_label_ids": batch.score_labels,
        "ce_loss_indexes": batch.score_rows,
    }.items():
        assert_golden(meta, f"packing.{name}", actual, t[f"packing.{name}"])
    # The reference appends a padding split to both lists.
    lens = [2 + len(s.ids) if isinstance(s, TextSegment) else 2 for s in context]
    assert meta["packing"]["split_lens"][:-1] == [lens[0], 8, lens[2], 6, 6, lens[5]]
    modes = meta["packing"]["attn_modes"][:-1]
    blocks = batch.layout.blocks[0]
    assert [("noise" if b.noise else "full") for b in blocks] == [m for m in modes if m != "causal"]


def golden_contexts(bundle: Any, meta: dict[str, Any], t: dict[str, Tensor]) -> list[Context]:
    """The two samples of golden 06, encoded from the stored pictures and noises."""
    shapes = meta["batch"]["patchified_vae_latent_shapes"]
    pictures = [
        p[:, : 16 * h, : 16 * w] for p, (h, w) in zip(t["padded_images"], shapes, strict=True)
    ]
    with torch.no_grad():
        tokens = encode_tokens(bundle.vae, pictures, noise=t["vae_encode_noise"])
    lens = [h * w for h, w in shapes]
    noises = t["flow_noise"].split(lens)
    times = training_times(t["packed_timesteps"], meta["timestep_shift"]).split(lens)
    vit_lens = t["vit_token_seqlens"].tolist()
    vit = zip(
        t["packed_vit_tokens"].split(vit_lens),
        t["packed_vit_position_ids"].split(vit_lens),
        strict=True,
    )
    contexts: list[Context] = []
    image = 0
    for plan, texts in zip(meta["plan"], meta["text_ids_list"], strict=True):
        queue = iter(texts)
        context: list[Segment] = []
        for kind, loss in plan:
            if kind == "vit_image":
                context.append(ImageSegment(*next(vit)))
            elif kind == "vae_image":
                h, w = shapes[image]
                time, noise = (float(times[image][0]), noises[image]) if loss else (None, None)
                context.append(LatentSegment(tokens[image], positions(h, w), time, noise))
                image += 1
            elif loss:
                context.append(given_completion(next(queue)).segment())
            else:
                context.append(TextSegment(tuple(next(queue))))
        contexts.append(tuple(context))
    return contexts


@pytest.mark.parametrize("name", GOLDEN_06)
@torch.no_grad()
def test_training_forward(bundle: Any, name: str) -> None:
    meta, t = load_golden(name)
    batch = pack(golden_contexts(bundle, meta, t), bundle.special_tokens)
    assert batch.latents is not None
    assert_generation_pack(batch, meta, t)
    assert batch.latents.velocity_counts == (20, 24)
    times = training_times(t["packed_timesteps"], meta["timestep_shift"])
    assert torch.equal(batch.latents.times[batch.latents.images], times)
    logits, velocity = bundle.model(batch, head=F.linear, flow_head=lambda v: v)
    targets = batch.latents.velocity_targets
    squares = (velocity - targets).square()
    assert_golden(meta, "velocity_pred", velocity, t["velocity_pred"])
    assert_golden(meta, "mse", squares, t["mse"])
    assert_golden(meta, "mse_loss", flow_loss(velocity, targets) / len(targets), t["mse_loss"])
    ce = F.cross_entropy(logits, batch.score_labels, reduction="none")
    assert_golden(meta, "logits", logits, t["logits"])
    assert_golden(meta, "ce", ce, t["ce"])
    # Either head alone gives the same.
    assert torch.equal(bundle.model(batch, head=F.linear), logits)
    assert torch.equal(bundle.model(batch, flow_head=lambda v: v), velocity)


@torch.no_grad()
def test_samples_do_not_see_each_other(bundle: Any) -> None:
    meta, t = load_golden(GOLDEN_06[0])
    contexts = golden_contexts(bundle, meta, t)
    together = pack(contexts, bundle.special_tokens)
    velocity = bundle.model(together, flow_head=lambda v: v).split((20, 24))
    for context, expected in zip(contexts, velocity, strict=True):
        alone = bundle.model(pack([context], bundle.special_tokens), flow_head=lambda v: v)
        torch.testing.assert_close(alone, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_noised_image_is_hidden_and_takes_no_position(bundle: Any) -> None:
    before, after = TextSegment((40, 41)), given_completion((42, 43)).segment()
    special = bundle.special_tokens
    noisy = [latents(2, 3, 0.7, seed) for seed in (1, 2)]
    packs = [pack([(before, vit_image(), image, after)], special) for image in noisy]
    without = pack([(before, vit_image(), after)], special)
    outputs = [bundle.model(batch, head=F.linear) for batch in (*packs, without)]
    torch.testing.assert_close(outputs[0], outputs[1], atol=0, rtol=0)
    torch.testing.assert_close(outputs[0], outputs[2], atol=1e-5, rtol=1e-5)
    assert packs[0].next_positions == without.next_positions
    # A clean image is seen, and takes one position.
    clean = [pack([(before, vit_image(), latents(2, 3, seed=s), after)], special) for s in (1, 2)]
    assert clean[0].next_positions[0] == without.next_positions[0] + 1
    seen = [bundle.model(batch, head=F.linear) for batch in clean]
    assert (seen[0] - seen[1]).abs().max() > 1e-3


def test_noised_tokens_and_their_target() -> None:
    image = latents(2, 2, 0.25, 3)
    assert image.noise is not None
    seen, target = mix_noise(image.latents, image.noise, 0.25)
    assert torch.equal(seen, 0.75 * image.latents + 0.25 * image.noise)
    torch.testing.assert_close(seen - 0.25 * target, image.latents)
    assert torch.equal(
        training_times(torch.tensor([-torch.inf, 0.0]), 3.0), torch.tensor([0, 0.75])
    )
    with pytest.raises(ValueError, match=r"must be in \(0, 1\]"):
        latents(2, 2, 0.0)


def losses(model: Any, batch: PackedBatch) -> tuple[Tensor, Tensor]:
    assert batch.latents is not None
    targets = batch.latents.velocity_targets
    return model(
        batch,
        head=lambda rows, weight: F.cross_entropy(F.linear(rows, weight), batch.score_labels),
        flow_head=lambda velocity: flow_loss(velocity, targets),
    )


def gradients(model: Any, batch: PackedBatch, which: int) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    losses(model, batch)[which].backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_gradients_of_both_losses(tiny_bagel_path: Any) -> None:
    bundle = load_bagel(tiny_bagel_path, visual_gen=True)
    context = (
        vit_image(),
        TextSegment((40, 41)),
        given_completion((42, 43)).segment(),
        latents(2, 3, 0.6, 1),
        latents(2, 3, None, 2),
        vit_image(seed=5),
        given_completion((44,)).segment(),
    )
    batch = pack([context], bundle.special_tokens)
    flow = gradients(bundle.model, batch, 1)
    trained = {n for n, p in bundle.model.named_parameters() if p.requires_grad}
    moved = {n for n, g in flow.items() if g.abs().max() > 1e-9}
    # Everything a latent row passes through, and what it looks at; not the text's own end.
    assert {n for n in trained if is_generation_key(n)} <= moved
    assert "language_model.lm_head.weight" not in flow
    assert "language_model.model.embed_tokens.weight" in moved
    assert "language_model.model.layers.2.mlp.up_proj.weight" not in moved
    text = gradients(bundle.model, batch, 0)
    assert "llm2vae.weight" not in text
    assert text["vae2llm.weight"].abs().max() > 1e-9  # the second text reads the clean image
    # Recomputing the activations changes nothing.
    bundle.model.set_gradient_checkpointing(True)
    again = gradients(bundle.model, batch, 1)
    assert again.keys() == flow.keys()
    assert all(torch.equal(again[name], flow[name]) for name in flow)


@torch.no_grad()
def test_models_without_and_with_the_generation_expert(bundle: Any, tiny_bagel_path: Any) -> None:
    plain = load_bagel(tiny_bagel_path)
    context = (vit_image(), given_completion((42, 43)).segment())
    batch = pack([context], bundle.special_tokens)
    assert batch.latents is None
    assert torch.equal(bundle.model(batch, head=F.linear), plain.model(batch, head=F.linear))
    with pytest.raises(ValueError, match="flow_head needs a sequence with a latent image"):
        bundle.model(batch, flow_head=lambda v: v)
    drawn = pack([(*context, latents(2, 2))], bundle.special_tokens)
    with pytest.raises(ValueError, match="load it with visual_gen=True"):
        plain.model(drawn)
    # Clean images alone have no velocity, and their time is exactly 0.
    assert drawn.latents is not None and drawn.latents.times.tolist() == [0.0]
    assert bundle.model(drawn, flow_head=lambda v: v).shape == (0, 64)


def test_moving_a_batch(bundle: Any) -> None:
    batch = pack([(vit_image(), latents(2, 2, 0.5))], bundle.special_tokens)
    moved = batch.to("meta")
    assert moved.latents is not None
    for part in (moved, moved.latents):
        tensors = [v for v in vars(part).values() if isinstance(v, Tensor)]
        assert tensors and all(tensor.is_meta for tensor in tensors)
    assert moved.latents.lens == (4,)
    # `at_time` replaces what the model sees, nothing else.
    other = batch.at_time(torch.ones(4, 64), torch.tensor(0.25))
    assert other.latents is not None and batch.latents is not None
    assert torch.equal(other.latents.tokens, torch.ones(4, 64))
    assert other.latents.times.tolist() == [0.25] and batch.latents.times.tolist() == [0.5]
    kept = replace(other.latents, tokens=batch.latents.tokens, times=batch.latents.times)
    assert vars(kept) == vars(batch.latents)
