# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""A teacher that reads VTs as at inference: latents, then the ViT image (--teacher_vt vae+vit)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.packing import pack
from data.randomness import row_generator
from data.row_groups import ParquetDataset
from data.sequence import ImageSegment, LatentSegment, PixelSegment, TextSegment
from data.thinkmorph import parse_row
from modeling import load_bagel
from modeling.release.checkpoint import is_generation_key
from scripts.visual_opsd.analysis.baseline import load_divergences
from scripts.visual_opsd.config import PromptSettings, TeacherSettings
from scripts.visual_opsd.kl_diagnostic import main as diagnose
from scripts.visual_opsd.rows import encode_pictures, make_builder
from scripts.visual_opsd.train_visual_opsd import main as train
from scripts.visual_opsd.training.visual_opsd import PrepareOPSD, encode_teachers
from tests.conftest import TINY_BAGEL
from tests.visual_opsd.training_runs import figures, full_state, train_arguments

SMALL = {"vae_max_size": 64, "vae_min_size": 16, "teacher_vt": "vae+vit"}
PROMPT = PromptSettings(vit_max_size=112, vit_min_size=14, vae_max_size=64, vae_min_size=16)


@pytest.fixture(scope="module")
def bundle() -> Any:
    return load_bagel(TINY_BAGEL, visual_gen=True)


def dataset(world: Path) -> ParquetDataset:
    files = sorted((world / "Spatial_Navigation" / "data").glob("train-*.parquet"))
    return ParquetDataset("Spatial_Navigation", files)


def test_contexts_of_the_teacher(bundle: Any, world: Path) -> None:
    """[student, intro, VT pixels, VT patches, transition]; noise replaces both, text nothing."""
    builder = make_builder(bundle.tokenizer, bundle.config, PROMPT)
    row = dataset(world).read_row(2, 5)
    plain = PrepareOPSD(builder)(row)
    made = PrepareOPSD(builder, with_latents=True)(row)
    assert plain.teacher is not None and made.teacher is not None
    kinds = [type(segment) for segment in made.teacher[-4:]]
    assert kinds == [TextSegment, PixelSegment, ImageSegment, TextSegment]
    without = [s for s in made.teacher if not isinstance(s, PixelSegment)]
    old = pack([plain.teacher], bundle.special_tokens)
    same = pack([without], bundle.special_tokens)
    assert torch.equal(old.text_ids, same.text_ids)
    assert old.vit_patches is not None and same.vit_patches is not None
    assert torch.equal(old.vit_patches, same.vit_patches)
    picture = made.teacher[-3]
    assert isinstance(picture, PixelSegment) and builder.vae_transform is not None
    sample = parse_row(row)
    assert torch.equal(picture.pixels, builder.vae_transform(sample.thought_images[0]))
    (encoded,) = encode_teachers([made], bundle.vae, 9)
    assert encoded.student is made.student and encoded.teacher is not None
    latent = encoded.teacher[-3]
    assert isinstance(latent, LatentSegment) and latent.noise is None
    (again,) = encode_teachers([made], bundle.vae, 9)
    (other,) = encode_teachers([made], bundle.vae, 10)
    assert again.teacher is not None and other.teacher is not None
    assert torch.equal(latent.latents, again.teacher[-3].latents)  # type: ignore[union-attr]
    assert not torch.equal(latent.latents, other.teacher[-3].latents)  # type: ignore[union-attr]
    control = PrepareOPSD(builder, "noise", 4396, with_latents=True)(row)
    assert control.teacher is not None
    noise = control.teacher[-3]
    assert isinstance(noise, PixelSegment) and noise.pixels.shape == picture.pixels.shape
    assert 0.9 < float(noise.pixels.std()) < 1.1 and abs(float(noise.pixels.mean())) < 0.1
    seen, real = control.teacher[-2], made.teacher[-2]
    assert isinstance(seen, ImageSegment) and isinstance(real, ImageSegment)
    assert seen.patches.shape == real.patches.shape
    assert 0.9 < float(seen.patches.std()) < 1.1 and abs(float(seen.patches.mean())) < 0.1


@pytest.mark.parametrize("mode", ["ema", "fixed", "self"])
def test_a_step_with_each_teacher(world: Path, tmp_path: Path, mode: str) -> None:
    """The student learns the same way; the drawing branch stays the base's everywhere."""
    out = tmp_path / "out"
    arguments = train_arguments(
        world, out, total_steps=1, warmup_steps=0, teacher_mode=mode, global_batch_size=2,
        save_release=True, sample_max_new_tokens=8, **SMALL,
    )  # fmt: skip
    assert train(arguments) == 0
    (line,) = figures(out)
    vit = tmp_path / "vit"
    assert train([*arguments, "--teacher_vt", "vit", "--results_dir", str(vit)]) == 0
    (plain,) = figures(vit)
    # The same completions, another teacher.
    assert line["scored_tokens"] == plain["scored_tokens"] > 0
    assert line["ce"] == pytest.approx(plain["ce"], rel=1e-6)
    assert line["forward_kl"] != pytest.approx(plain["forward_kl"], rel=1e-3)
    base = load_bagel(TINY_BAGEL, visual_gen=True).model.state_dict()
    saved = load_bagel(out / "checkpoints" / "0000001", visual_gen=True).model.state_dict()
    changed = {key for key in base if not torch.equal(base[key], saved[key])}
    assert changed and not any(is_generation_key(key) for key in changed)
    state = full_state(out, 1, tmp_path)
    drawing = {key for key in state if is_generation_key(key.split("/")[-1])}
    where = {key.split("/")[1] for key in drawing}
    # With mode self most of this student is frozen, and that is in no state.
    assert where == {"ema": {"ema"}, "self": set(), "fixed": set()}[mode]
    assert all(torch.equal(state[key], base[key.split("/")[-1]]) for key in drawing)


def test_unknown_choice() -> None:
    with pytest.raises(ValueError, match=r"--teacher_vt must be one of vit, vae\+vit, got"):
        TeacherSettings(teacher_vt="vae")


def test_diagnostic_of_both_teachers(bundle: Any, world: Path, tmp_path: Path) -> None:
    """Same completions in both; the KL of the one with latents against dense arithmetic."""
    flags = {
        "model_path": TINY_BAGEL, "data": "Spatial_Navigation", "data_root": world, "seed": 5,
        "vit_max_size": 112, "vit_min_size": 14, "vae_max_size": 64, "vae_min_size": 16,
        "num_samples": 4, "sample_max_new_tokens": 24, "pack_tokens": 700, "progress": False,
        "figures": False, "device": "cpu",
    }  # fmt: skip
    found: dict[str, dict[str, Any]] = {}
    for arm in ("vit", "vae+vit"):
        out = tmp_path / arm
        given = {**flags, "teacher_vt": arm, "output_dir": out}
        assert diagnose([f"--{name}={value}" for name, value in given.items()]) == 0
        found[arm] = json.loads((out / "kl_diagnostic.json").read_text())
        assert found[arm]["teacher_vt"] == arm
    assert found["vit"]["completions"] == found["vae+vit"]["completions"]
    with pytest.raises(ValueError, match="teacher_vt"):
        given = {**flags, "baseline": tmp_path / "vit", "output_dir": tmp_path / "x"}
        diagnose([*(f"--{n}={v}" for n, v in given.items()), "--teacher_vt", "vae+vit"])
    lines = [
        json.loads(x) for x in (tmp_path / "vit" / "completions.jsonl").read_text().split("\n") if x
    ]
    real, plain = (load_divergences(tmp_path / arm, "base") for arm in ("vae+vit", "vit"))
    builder = make_builder(bundle.tokenizer, bundle.config, PROMPT)
    for line, with_latents, without in zip(lines, real, plain, strict=True):
        sample = parse_row(dataset(world).read_row(line["index"]))
        student = builder.student(sample)
        teacher = encode_pictures(
            builder.teacher(sample, student, with_latents=True),
            bundle.vae,
            row_generator("teacher", 5, line["index"]),
        )
        log_s, log_t = (dense(bundle, context, line) for context in (student, teacher))
        kl = (log_t.exp() * (log_t - log_s)).sum(-1)
        actual = torch.from_numpy(with_latents.columns["kl_real"]).double()
        torch.testing.assert_close(actual, kl, atol=2e-5, rtol=2e-4)
        assert not np.allclose(
            with_latents.columns["kl_real"], without.columns["kl_real"], rtol=0.01
        )
        assert not np.allclose(with_latents.columns["kl_noise"], with_latents.columns["kl_real"])


@torch.no_grad()
def dense(bundle: Any, context: Any, line: dict[str, Any]) -> torch.Tensor:
    """Float64 log-probabilities (rows, V) of the scored labels, one sequence without packing."""
    ids, scored = line["ids"], line["scored"]
    hidden = bundle.model(pack([(*context, TextSegment(tuple(ids)))], bundle.special_tokens))
    first = len(hidden) - len(ids) - 2
    rows = [first + i for i, flag in enumerate(scored) if flag]
    return bundle.model.language_model.lm_head(hidden).double()[rows].log_softmax(-1)
