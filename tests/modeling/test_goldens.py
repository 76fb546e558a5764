# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The model against the recorded reference: units, ViT, packed forward, cached inference."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from data.packing import pack
from data.sequence import (
    INFERENCER_SYSTEM_PROMPT,
    PACKER_SYSTEM_PROMPT,
    Context,
    ContextBuilder,
    ImageSegment,
    Segment,
    TextSegment,
    given_completion,
)
from data.transforms import ImageTransform, extrapolated_position_ids, patchify, to_rgb
from modeling import load_bagel
from modeling.bagel.attention import AttentionLayout, Block
from modeling.bagel.batch import PackedBatch
from modeling.bagel.decoder import RMSNorm, apply_rotary, rotary
from modeling.bagel.embeddings import timestep_frequencies
from modeling.bagel.kv_cache import KVCache
from modeling.release.tokenizer import load_tokenizer
from tests.conftest import assert_golden, load_golden


@pytest.fixture(scope="module")
def bundle(tiny_bagel_path: Any) -> Any:
    return load_bagel(tiny_bagel_path)


def image_segment(pixels: Tensor) -> ImageSegment:
    _, height, width = pixels.shape
    return ImageSegment(
        patchify(pixels, 14), extrapolated_position_ids(height // 14, width // 14, 70)
    )


def text_splits(tensors: dict[str, Tensor], meta: dict[str, Any]) -> list[tuple[int, ...]]:
    """Ids of each split's text, markers included, in order."""
    starts = torch.tensor([0, *meta["batch"]["split_lens"]]).cumsum(0).tolist()
    rows = tensors["packed_text_indexes"]
    ids = tensors["packed_text_ids"]
    return [tuple(ids[(rows >= a) & (rows < b)].tolist()) for a, b in pairwise(starts)]


def check_pack(batch: PackedBatch, tensors: dict[str, Tensor]) -> None:
    pairs = {
        "packed_text_ids": batch.text_ids,
        "packed_text_indexes": batch.text_rows,
        "packed_position_ids": batch.position_ids,
        "packed_vit_token_indexes": batch.vit_rows,
        "packed_vit_position_ids": batch.vit_position_ids,
        "ce_loss_indexes": batch.score_rows,
        "packed_label_ids": batch.score_labels,
    }
    for name, actual in pairs.items():
        assert torch.equal(actual, tensors[name]), name
    assert batch.vit_patches is not None
    assert torch.equal(batch.vit_patches, tensors["packed_vit_tokens"])
    assert list(batch.vit_lens) == tensors["vit_token_seqlens"].tolist()


def logits_of(bundle: Any, batch: PackedBatch) -> Tensor:
    with torch.no_grad():
        return bundle.model(batch, head=F.linear)


def test_units(bundle: Any) -> None:
    meta, t = load_golden("00_units")
    norm = bundle.model.language_model.model.layers[0].input_layernorm
    assert isinstance(norm, RMSNorm)
    with torch.no_grad():
        assert_golden(meta, "rmsnorm_y", norm(t["rmsnorm_x"]), t["rmsnorm_y"])
    cos, sin = rotary(t["rope_position_ids"], 16, 1e6)
    assert_golden(meta, "rope_cos", cos, t["rope_cos"])
    assert_golden(meta, "rope_sin", sin, t["rope_sin"])
    assert_golden(meta, "rope_q_out", apply_rotary(t["rope_q"], cos, sin), t["rope_q_out"])
    assert_golden(meta, "rope_k_out", apply_rotary(t["rope_k"], cos, sin), t["rope_k_out"])
    frequencies = timestep_frequencies(t["timesteps"])
    assert_golden(meta, "timestep_freq_embedding", frequencies, t["timestep_freq_embedding"])
    table = bundle.model.vit_pos_embed.pos_embed[t["vit_pos_embed_rows"]]
    assert_golden(meta, "vit_pos_embed_values", table, t["vit_pos_embed_values"])


@pytest.mark.parametrize("name", ["mask0", "mask1", "mask2"])
def test_mask_rule(name: str) -> None:
    meta, t = load_golden("00_units")
    splits, modes = meta[name]["split_lens"], meta[name]["attn_modes"]
    ends = torch.tensor(splits).cumsum(0).tolist()
    blocks = tuple(
        Block(end - length, end, mode == "noise")
        for end, length, mode in zip(ends, splits, modes, strict=True)
        if mode != "causal"
    )
    layout = AttentionLayout((sum(splits),), (0,), (blocks,))
    assert_golden(meta, f"{name}_allowed", layout.allowed(0), t[f"{name}_allowed"])


def test_vit(bundle: Any) -> None:
    meta, t = load_golden("03_vit")
    lens = tuple(t["vit_token_seqlens"].tolist())
    model = bundle.model
    with torch.no_grad():
        features = model.vit_model(t["pixel_patches"], t["position_ids"], lens)
        connected = model.connector(features)
        features = model.vit_model(t["pixel_patches"], t["position_ids"], lens)
        positioned = model.connect_images(features, t["position_ids"])
    expected = "vit_out_after_post_layernorm"
    assert_golden(meta, expected, features, t[expected])
    assert_golden(meta, "connector_out", connected, t["connector_out"])
    assert_golden(meta, "connector_plus_pos", positioned, t["connector_plus_pos"])


def test_train_student(bundle: Any) -> None:
    meta, t = load_golden("04_train_student")
    builder = ContextBuilder(bundle.tokenizer, lambda image: t["problem_image"])
    texts = meta["texts"]
    assert texts["system"] == PACKER_SYSTEM_PROMPT
    context = builder.question(Image.new("RGB", (1, 1)), texts["question"])
    completion = given_completion(builder.encode(texts["completion"]))
    assert list(completion.ids) == texts["completion_ids"]
    batch = pack([(*context, completion.segment())], bundle.special_tokens)
    check_pack(batch, t)
    logits = logits_of(bundle, batch)
    ce = F.cross_entropy(logits, batch.score_labels, reduction="none")
    assert_golden(meta, "logits", logits, t["logits"])
    assert_golden(meta, "ce", ce, t["ce"])
    assert_golden(meta, "ce_mean", ce.mean(), t["ce_mean"])
    assert_golden(meta, "allowed_mask", batch.layout.allowed(0), t["allowed_mask"])


def test_train_teacher(bundle: Any) -> None:
    meta, t = load_golden("04_train_teacher")
    splits = text_splits(t, meta)

    def text(split: int) -> TextSegment:
        return TextSegment(splits[split][1:-1])

    images = [image_segment(t[name]) for name in ("problem_image", "vt_image0", "vt_image1")]
    completion = given_completion(meta["texts"]["completion_ids"]).segment()
    context = (
        text(0), images[0], text(2), text(3), images[1], images[2], text(6), completion
    )  # fmt: skip
    batch = pack([context], bundle.special_tokens)
    check_pack(batch, t)
    logits = logits_of(bundle, batch)
    ce = F.cross_entropy(logits, batch.score_labels, reduction="none")
    assert_golden(meta, "logits", logits, t["logits"])
    assert_golden(meta, "ce", ce, t["ce"])
    assert_golden(meta, "ce_mean", ce.mean(), t["ce_mean"])
    assert_golden(meta, "allowed_mask", batch.layout.allowed(0), t["allowed_mask"])


def plan_contexts(meta: dict[str, Any], t: dict[str, Tensor]) -> list[tuple[Any, ...]]:
    """The contexts of golden 05: images by their recorded patches, texts by their ids."""
    patches = list(t["packed_vit_tokens"].split(t["vit_token_seqlens"].tolist()))
    ids = list(t["packed_vit_position_ids"].split(t["vit_token_seqlens"].tolist()))
    contexts, image = [], 0
    for plan, texts in zip(meta["plan"], meta["text_ids_list"], strict=True):
        queue = iter(texts)
        context: list[Any] = []
        for kind, loss in plan:
            if kind == "vit_image":
                context.append(ImageSegment(patches[image], ids[image]))
                image += 1
            elif loss:
                context.append(given_completion(next(queue)).segment())
            else:
                context.append(TextSegment(tuple(next(queue))))
        contexts.append(tuple(context))
    return contexts


def test_two_samples(bundle: Any) -> None:
    meta, t = load_golden("05_train_two_samples")
    contexts = plan_contexts(meta, t)
    batch = pack(contexts, bundle.special_tokens)
    check_pack(batch, t)
    logits = logits_of(bundle, batch)
    ce = F.cross_entropy(logits, batch.score_labels, reduction="none")
    assert_golden(meta, "logits", logits, t["logits"])
    assert_golden(meta, "ce", ce, t["ce"])
    for i, context in enumerate(contexts):
        alone = logits_of(bundle, pack([context], bundle.special_tokens))
        assert_golden(meta, f"single{i}_logits", alone, t[f"single{i}_logits"])


def greedy(
    bundle: Any, cache: KVCache, kv_lens: list[int], ropes: list[int], steps: int
) -> tuple[Tensor, Tensor]:
    """ids (steps, B) beginning with the start token, and the logits after each (steps, B, V)."""
    token = torch.full((len(kv_lens),), bundle.special_tokens.bos)
    ids, rows = [], []
    for step in range(steps):
        ids.append(token)
        positions, slots = torch.tensor(ropes) + step, torch.tensor(kv_lens) + step
        rows.append(bundle.model.decode_step(token, positions, slots, cache))
        token = rows[-1].argmax(-1)
    return torch.stack(ids), torch.stack(rows)


@torch.no_grad()
def test_cached_greedy(bundle: Any) -> None:
    meta, t = load_golden("07_kv_greedy")
    transform = ImageTransform(112, 56, 14)
    image = Image.fromarray(t["image_u8"].numpy())
    builder = ContextBuilder(bundle.tokenizer, transform)
    vae_resized = ImageTransform(128, 64, 16).resize(image)
    pixels = {len(patchify(transform(i), 14)): i for i in (image, vae_resized)}
    picture = ImageSegment(t["stage1.packed_vit_tokens"], t["stage1.packed_vit_position_ids"])
    segments: list[Segment] = [
        builder.text(meta["stages"][0]["text"]),
        picture,
        builder.text(meta["stages"][2]["text"]),
    ]
    assert len(picture.patches) in pixels
    cache = KVCache(bundle.config.llm, 1, 200, "cpu", torch.float32)
    kv, rope = 0, 0
    for segment, stage in zip(segments, meta["stages"], strict=True):
        batch = pack([(segment,)], bundle.special_tokens, past=[(kv, rope)])
        bundle.model(batch, cache=cache)
        kv, rope = kv + batch.total, batch.next_positions[0]
        assert ([kv], [rope]) == (stage["kv_lens"], stage["ropes"])
    for layer in (0, 2):
        for kind, store in (("key", cache.keys), ("value", cache.values)):
            name = f"prefill_{kind}_layer{layer}"
            assert_golden(meta, name, store[layer][0, :kv], t[name])
    ids, logits = greedy(bundle, cache, [kv], [rope], 24)
    assert_golden(meta, "next_token_logits", logits[0], t["next_token_logits"])
    assert_golden(meta, "greedy_ids", ids[:, 0], t["greedy_ids"])
    assert_golden(meta, "greedy_logits", logits[:, 0], t["greedy_logits"])
    # One prefill of all segments fills the same cache.
    whole = KVCache(bundle.config.llm, 1, 200, "cpu", torch.float32)
    bundle.model(pack([tuple(segments)], bundle.special_tokens), cache=whole)
    assert_golden(meta, "prefill_key_layer2", whole.keys[2][0, :kv], t["prefill_key_layer2"])


@torch.no_grad()
def test_cached_batch(bundle: Any) -> None:
    meta, t = load_golden("07_kv_batch")
    builder = ContextBuilder(bundle.tokenizer, ImageTransform(112, 56, 14))
    lens = t["stage1.vit_token_seqlens"].tolist()
    patches = t["stage1.packed_vit_tokens"].split(lens)
    position_ids = t["stage1.packed_vit_position_ids"].split(lens)
    cache = KVCache(bundle.config.llm, 2, 200, "cpu", torch.float32)
    past = [(0, 0), (0, 0)]
    contexts: list[Context]
    for stage in meta["stages"]:
        if stage["kind"] == "text":
            contexts = [(builder.text(text),) for text in stage["texts"]]
        else:
            contexts = [(ImageSegment(*pair),) for pair in zip(patches, position_ids, strict=True)]
        batch = pack(contexts, bundle.special_tokens, past=past)
        bundle.model(batch, cache=cache)
        past = list(zip(batch.layout.key_lens, batch.next_positions, strict=True))
        assert [kv for kv, _ in past] == stage["kv_lens"]
        assert [rope for _, rope in past] == stage["ropes"]
    kv_lens, ropes = (list(values) for values in zip(*past, strict=True))
    for layer in (0, 2):
        for kind, store in (("key", cache.keys), ("value", cache.values)):
            merged = torch.cat([store[layer][b, :n] for b, n in enumerate(kv_lens)])
            name = f"prefill_{kind}_layer{layer}"
            assert_golden(meta, name, merged, t[name])
    ids, logits = greedy(bundle, cache, kv_lens, ropes, 24)
    assert_golden(meta, "greedy_ids", ids, t["greedy_ids"])
    assert_golden(meta, "greedy_logits", logits, t["greedy_logits"])


def test_packed_segments_of_golden_11(tiny_bagel_path: Any) -> None:
    """The text and ViT part of the recorded pack (its VAE images belong to the drawing path)."""
    _, t = load_golden("11_special_tokens")
    _, special = load_tokenizer(tiny_bagel_path)
    image = ImageSegment(torch.zeros(6, 588), extrapolated_position_ids(2, 3, 70))
    context = (TextSegment((40, 41)), image, given_completion((42,)).segment())
    batch = pack([context], special)
    texts = len(batch.text_ids)
    assert torch.equal(batch.text_ids, t["packing.packed_text_ids"][:texts])
    assert torch.equal(batch.text_rows, t["packing.packed_text_indexes"][:texts])
    assert torch.equal(batch.position_ids, t["packing.packed_position_ids"][: batch.total])
    assert torch.equal(batch.vit_rows, t["packing.packed_vit_token_indexes"])
    assert torch.equal(batch.vit_position_ids, t["packing.packed_vit_position_ids"])
    assert torch.equal(batch.score_rows, t["packing.ce_loss_indexes"][:2])
    assert torch.equal(batch.score_labels, t["packing.packed_label_ids"][:2])


def test_special_tokens_and_prompts(tiny_bagel_path: Any) -> None:
    meta, _ = load_golden("11_special_tokens")
    tokenizer, special = load_tokenizer(tiny_bagel_path)
    for entry in meta["encode"]:
        assert tokenizer.encode(entry["text"], add_special_tokens=False) == entry["ids"]
    for entry in meta["decode"]:
        assert tokenizer.decode(entry["ids"]) == entry["text"]
    assert len(tokenizer) == meta["len_tokenizer"]
    texts = [entry["text"] for entry in meta["encode"]]
    assert PACKER_SYSTEM_PROMPT in texts
    assert INFERENCER_SYSTEM_PROMPT in texts
    assert (special.bos, special.eos) == (1297, 1298)


def test_alpha_images_become_white_backed() -> None:
    transparent = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert to_rgb(transparent).getpixel((0, 0)) == (255, 255, 255)
