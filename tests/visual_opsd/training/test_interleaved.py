# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Interleaved SFT: order of a row, latents of its pictures, training, resuming, two ranks."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from data.limits import ContextLimits
from data.packing import context_length, pack
from data.randomness import row_generator
from data.row_groups import ParquetDataset
from data.sequence import Context, ImageSegment, LatentSegment, PixelSegment, TextSegment
from data.thinkmorph import INTERLEAVED_ROWS, BadRow, parse_row
from modeling import load_bagel
from modeling.autoencoder import latent_tokens
from modeling.bagel.flow import flow_loss, training_times
from modeling.release.checkpoint import is_generation_key
from scripts.visual_opsd.config import INTERLEAVED_DEFAULTS, SFT_DEFAULTS, PromptSettings
from scripts.visual_opsd.rows import encode_pictures, make_builder
from scripts.visual_opsd.train_sft import main, read_config
from scripts.visual_opsd.training.interleaved import PrepareInterleaved
from tests.conftest import TINY_BAGEL, assert_generation_pack, load_golden
from tests.modeling.bagel.test_generation_packing import GOLDEN_06, golden_contexts
from tests.visual_opsd.training_runs import figures, full_state, train_arguments

SMALL = {"mode": "interleaved", "vae_max_size": 64, "vae_min_size": 16}
PROMPT = PromptSettings(
    vit_max_size=112, vit_min_size=14, vae_max_size=64, vae_min_size=16, use_system_prompt=False
)


@pytest.fixture(scope="module")
def bundle() -> Any:
    return load_bagel(TINY_BAGEL, visual_gen=True)


def dataset(world: Path) -> ParquetDataset:
    files = sorted((world / "Spatial_Navigation" / "data").glob("train-*.parquet"))
    return ParquetDataset("Spatial_Navigation", files, INTERLEAVED_ROWS)


def prepare(bundle: Any, limit: int = 4096) -> PrepareInterleaved:
    builder = make_builder(bundle.tokenizer, bundle.config, PROMPT)
    return PrepareInterleaved(builder, ContextLimits(tokens=limit))


def kinds(context: Context) -> list[list[Any]]:
    """[kind, loss flag] of each segment, as the goldens' plans have it."""
    found: list[list[Any]] = []
    for segment in context:
        if isinstance(segment, TextSegment):
            found.append(["text", int(segment.scored is not None)])
        elif isinstance(segment, ImageSegment):
            found.append(["vit_image", 0])
        elif isinstance(segment, PixelSegment):
            found.append(["vae_image", int(segment.noised)])
        else:
            found.append(["vae_image", int(segment.noise is not None)])
    return found


# ------------------------------------------------------------------------------------- rows


def test_a_row_has_the_recorded_order(bundle: Any, world: Path) -> None:
    """Plan, texts and attention modes of golden 06's first sample."""
    meta, _ = load_golden(GOLDEN_06[0])
    row = dataset(world).read_row(0, 7)
    sample = parse_row(row, INTERLEAVED_ROWS)
    made = prepare(bundle)(row)
    assert made.position == 7 and not made.targets and made.teacher is None
    context = made.student
    assert kinds(context) == meta["plan"][0]
    texts = [s for s in context if isinstance(s, TextSegment)]
    assert [bundle.tokenizer.decode(s.ids) for s in texts] == [
        sample.question,
        f"<think>{sample.thoughts[0]}</think><image_start>",
        f"<image_end><think>{sample.thoughts[1]}</think><answer>{sample.answer}</answer>",
    ]
    assert all(s.scored is None or all(s.scored) for s in texts)
    noisy, clean, vit = context[4:7]
    assert isinstance(noisy, PixelSegment) and isinstance(clean, PixelSegment)
    assert torch.equal(noisy.pixels, clean.pixels)
    builder = prepare(bundle).builder
    assert builder.vae_transform is not None and isinstance(vit, ImageSegment)
    assert torch.equal(clean.pixels, builder.vae_transform(sample.thought_images[0]))
    assert torch.equal(vit.patches, builder.image(sample.thought_images[0]).patches)
    encoded = encode_pictures(context, bundle.vae, row_generator("x", 1, 2))
    assert kinds(encoded) == kinds(context)
    assert context_length(encoded) == context_length(context)
    modes = ["causal" if k == "text" else ("noise" if f else "full") for k, f in kinds(encoded)]
    assert modes == meta["batch"]["attn_modes"][:8]
    blocks = pack([encoded], bundle.special_tokens).layout.blocks[0]
    assert ["noise" if b.noise else "full" for b in blocks] == [m for m in modes if m != "causal"]


def test_the_recorded_rows_are_packed_as_recorded(bundle: Any) -> None:
    """Golden 06 from pixels: every index, label and position."""
    meta, t = load_golden(GOLDEN_06[0])
    shapes = meta["batch"]["patchified_vae_latent_shapes"]
    pixels = iter(
        p[:, : 16 * h, : 16 * w] for p, (h, w) in zip(t["padded_images"], shapes, strict=True)
    )
    contexts = []
    for number, context in enumerate(golden_contexts(bundle, meta, t)):
        raw = tuple(
            PixelSegment(next(pixels), s.position_ids, s.noise is not None)
            if isinstance(s, LatentSegment)
            else s
            for s in context
        )
        contexts.append(encode_pictures(raw, bundle.vae, row_generator("x", 0, number)))
    batch = pack(contexts, bundle.special_tokens)
    assert batch.latents is not None
    assert_generation_pack(batch, meta, t)


def test_several_drawings(bundle: Any, world: Path) -> None:
    sample = parse_row(dataset(world).read_row(0), INTERLEAVED_ROWS)
    two = replace(
        sample,
        thoughts=("<think>a</think>", "b", "c"),
        thought_images=(sample.thought_images[0], sample.problem_image),
    )
    builder = prepare(bundle).builder
    context = builder.interleaved(two)
    drawing = [["vae_image", 1], ["vae_image", 0], ["vit_image", 0], ["text", 1]]
    start = [["vae_image", 0], ["vit_image", 0], ["text", 0], ["text", 1]]
    assert kinds(context) == [*start, *drawing, *drawing]
    texts = [s for s in context if isinstance(s, TextSegment)]
    assert [bundle.tokenizer.decode(s.ids) for s in texts[1:]] == [
        "<think>a</think><image_start>",
        "<image_end><think>b</think><image_start>",
        f"<image_end><think>c</think><answer>{sample.answer}</answer>",
    ]
    with pytest.raises(ValueError, match="2 visual thoughts need a thought before"):
        builder.interleaved(replace(two, thoughts=("a", "b")))


def test_unusable_rows_say_why(bundle: Any, world: Path) -> None:
    row = dataset(world).read_row(0)
    length = context_length(prepare(bundle)(row).student)
    assert context_length(prepare(bundle, length)(row).student) == length
    with pytest.raises(BadRow, match=f"takes {length} of max_forward_tokens") as long:
        prepare(bundle, length - 1)(row)
    assert long.value.reason == "too_long"
    short = replace(row, values={**row.values, "resoning_thought_1": ""})
    with pytest.raises(BadRow, match="need 2 thoughts around them, not 1") as lacking:
        prepare(bundle)(short)
    assert lacking.value.reason == "thoughts_do_not_fit"
    wide = Image.new("RGB", (32, 32 * 80))
    builder = make_builder(bundle.tokenizer, bundle.config, replace(PROMPT, vae_max_size=2048))
    with pytest.raises(ValueError, match="lower vae_max_size to 1024"):
        builder.picture(wide)


@torch.no_grad()
def test_latents_are_those_of_the_rows_own_draws(bundle: Any, world: Path) -> None:
    context = prepare(bundle)(dataset(world).read_row(1)).student
    encoded = encode_pictures(context, bundle.vae, row_generator("x", 3, 4), time_shift=3.0)
    generator = row_generator("x", 3, 4)
    latents: list[LatentSegment] = []
    for raw, made in zip(context, encoded, strict=True):
        if not isinstance(raw, PixelSegment):
            assert made is raw
            continue
        assert isinstance(made, LatentSegment)
        h, w = raw.pixels.shape[1] // 8, raw.pixels.shape[2] // 8
        noise = torch.randn((1, 16, h, w), generator=generator)
        expected = latent_tokens(bundle.vae.encode(raw.pixels[None], noise=noise)[0])
        assert torch.equal(made.latents, expected)
        if raw.noised:
            time = training_times(torch.randn((), generator=generator), 3.0)
            assert made.time == float(time)
            flow_noise = torch.randn(expected.shape, generator=generator)
            assert made.noise is not None and torch.equal(made.noise, flow_noise)
        latents.append(made)
    noisy, clean = latents[1:]
    assert not torch.equal(noisy.latents, clean.latents)  # the encoder samples twice
    other = encode_pictures(context, bundle.vae, row_generator("x", 3, 5))
    assert not torch.equal(other[0].latents, latents[0].latents)  # type: ignore[union-attr]


# ----------------------------------------------------------------------------------- settings


def test_defaults_follow_the_mode(tmp_path: Path) -> None:
    text, drawn = read_config([]), read_config(["--mode", "interleaved"])
    assert text.flow.mode == "text" and text.run.results_dir == SFT_DEFAULTS["results_dir"]
    assert text.prompt == PromptSettings()
    assert drawn.run.results_dir == INTERLEAVED_DEFAULTS["results_dir"]
    assert drawn.prompt.build().system is None and drawn.prompt.vit_max_size == 518
    assert (drawn.loss.ce_weight, drawn.flow.mse_weight, drawn.loss.jsd_weight) == (1, 1, 0)
    own = tmp_path / "own.yaml"
    own.write_text("mode: interleaved\nvit_max_size: 700\n")
    assert read_config(["--config", str(own)]).prompt.vit_max_size == 700
    with pytest.raises(ValueError, match="--mse_weight must be at least 0 and at most"):
        read_config(["--mse_weight", "-1"])


def test_a_base_that_cannot_draw_is_refused(world: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(TINY_BAGEL, base)
    (base / "ae.safetensors").unlink()
    arguments = train_arguments(world, tmp_path / "out", model_path=base, **SMALL)
    with pytest.raises(ValueError, match="needs the release's autoencoder"):
        main(arguments)
    weights = train_arguments(world, tmp_path / "out", ce_weight=0, mse_weight=0, **SMALL)
    with pytest.raises(ValueError, match="ce_weight and mse_weight are both 0"):
        main(weights)


# ----------------------------------------------------------------------------------- training


def measured(folder: Path, contexts: list[Context]) -> tuple[float, float, dict[str, Tensor]]:
    """Mean CE and mean flow error of some contexts, and the weights."""
    bundle = load_bagel(folder, visual_gen=True)
    batch = pack(contexts, bundle.special_tokens)
    latents = batch.latents
    assert latents is not None
    with torch.no_grad():
        logits, flow = bundle.model(
            batch, head=F.linear, flow_head=lambda v: flow_loss(v, latents.velocity_targets)
        )
    ce = F.cross_entropy(logits, batch.score_labels)
    return float(ce), float(flow) / len(latents.velocity_rows), bundle.model.state_dict()


def encoded_steps(bundle: Any, world: Path, positions: range, order: list[int]) -> list[Context]:
    """The contexts of some rows, as the trainer encodes them at these positions."""
    made = prepare(bundle)
    return [
        encode_pictures(
            made(dataset(world).read_row(row, position)).student,
            bundle.vae,
            row_generator("interleaved", 4396, position),
        )
        for position, row in zip(positions, order, strict=True)
    ]


@pytest.fixture(scope="module")
def trained(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps on the same three rows, in this process."""
    results = tmp_path_factory.mktemp("interleaved") / "whole"
    assert main(three_rows(world, results, save_release=True)) == 0
    return results


def three_rows(world: Path, results: Path, **changes: Any) -> list[str]:
    config = results.with_name("three.yaml")
    config.write_text("datasets:\n  - {name: Spatial_Navigation, num_used_rows: 3}\n")
    values = {
        "dataset_config_file": config, "global_batch_size": 3, "lr": 3e-3,
        "lr_scheduler": "constant", "warmup_steps": 1, "save_every": 4, **SMALL, **changes,
    }  # fmt: skip
    return train_arguments(world, results, **values)


def test_both_losses_fall_and_both_branches_move(bundle: Any, world: Path, trained: Path) -> None:
    rows = [0, 1, 2]
    lines = figures(trained)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for line in lines:
        assert line["loss"] == pytest.approx(line["ce"] + line["mse"])
    assert lines[-1]["ce"] < 0.8 * lines[0]["ce"]
    fixed = encoded_steps(bundle, world, range(100, 103), rows)
    before, after = measured(TINY_BAGEL, fixed), measured(trained / "checkpoints/0000006", fixed)
    assert after[0] < 0.8 * before[0]
    assert after[1] < 0.97 * before[1]
    same = {key for key, value in before[2].items() if torch.equal(value, after[2][key])}
    assert {key for key in same if is_generation_key(key)} == {"latent_pos_embed.pos_embed"}
    assert same == {"latent_pos_embed.pos_embed", "vit_pos_embed.pos_embed"}
    ours, theirs = (
        load_file(f / "ae.safetensors") for f in (TINY_BAGEL, trained / "checkpoints/0000006")
    )
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_resuming_is_exact(world: Path, trained: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    state = trained / "checkpoints" / "step_0000004"
    assert main(three_rows(world, again, resume=state, num_workers=1, pack_tokens=16384)) == 0
    assert figures(again) == figures(trained)[4:]
    ours, theirs = full_state(again, 6, tmp_path), full_state(trained, 6, tmp_path)
    assert ours.keys() == theirs.keys() and any("moe_gen" in key for key in ours)
    different = [key for key in ours if not torch.equal(ours[key], theirs[key])]
    assert not different, different[:5]


def test_a_step_by_hand(bundle: Any, world: Path, trained: Path) -> None:
    """The first step's figures: whose rows, which draws, and what is divided by what."""
    from data.dataset_info import DatasetSource
    from data.parquet import StepOrder, open_sources

    sampler = StepOrder(
        open_sources(
            [DatasetSource("Spatial_Navigation", num_used_rows=3)], INTERLEAVED_ROWS, world
        ), 42, 3,
    )  # fmt: skip
    order = [next(iter(sampler.candidates(0, slot)))[1] for slot in range(3)]
    contexts = encoded_steps(bundle, world, range(3), order)
    ce, mse, _ = measured(TINY_BAGEL, contexts)
    first = figures(trained)[0]
    assert first["ce"] == pytest.approx(ce, rel=1e-5)
    assert first["mse"] == pytest.approx(mse, rel=1e-5)
    noisy = [s for c in contexts for s in c if isinstance(s, LatentSegment) and s.noise is not None]
    assert first["noised_tokens"] == sum(len(s.latents) for s in noisy)
