# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""NaN and infinity in weights end loading, wherever they are read, and name tensor and file."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from modeling import load_bagel
from modeling.autoencoder import load_autoencoder
from modeling.release.finite import check_finite
from modeling.release.spread import Place, load_bagel_spread
from modeling.release.weight_files import open_weights, read_file

HEAD = "language_model.lm_head.weight"
GENERATION = "llm2vae.weight"
LAYER = "language_model.model.layers.1.mlp.down_proj.weight"
BAD = [float("nan"), float("inf"), float("-inf")]


def release_with(folder: Path, source: Path, key: str, value: float, name: str = "model") -> Path:
    for file in source.iterdir():
        shutil.copyfile(file, folder / file.name)
    tensors = load_file(source / f"{name}.safetensors")
    tensors[key] = tensors[key].clone()
    tensors[key].view(-1)[-1] = value
    save_file(tensors, folder / f"{name}.safetensors")
    return folder


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_dtype_and_place(dtype: torch.dtype, tmp_path: Path) -> None:
    largest = torch.finfo(dtype).max
    sound = {  # what a sum or a cast to a narrower dtype would take for infinite
        "large": torch.full((1001,), largest, dtype=dtype),
        "both": torch.tensor([largest, -largest], dtype=dtype),
        "empty": torch.zeros(0, dtype=dtype),
        "one": torch.zeros((), dtype=dtype),
        "meta": torch.zeros(3, dtype=dtype, device="meta"),
        "trained": torch.nn.Parameter(torch.zeros(2, dtype=dtype)),
    }
    save_file({k: t.detach() for k, t in sound.items() if not t.is_meta}, tmp_path / "w")
    stored = read_file(tmp_path / "w")
    check_finite(sound, stored)
    for value in BAD:
        for place in (0, 500, 1000):
            wrong: dict[str, Tensor] = {**sound, "large": sound["large"].clone()}
            wrong["large"][place] = value
            with pytest.raises(ValueError, match=r"w: 1 of 6 tensors hold NaN or inf.*: large;"):
                check_finite(wrong, stored)
    with pytest.raises(ValueError, match=r"2 of 2 tensors .*: large, one;"):
        check_finite({k: torch.tensor(torch.nan, dtype=dtype) for k in ("large", "one")}, stored)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loading(dtype: torch.dtype, tiny_bagel_path: Path, tmp_path: Path) -> None:
    folder = release_with(tmp_path, tiny_bagel_path, HEAD, torch.nan)
    with pytest.raises(ValueError, match=rf"model\.safetensors: 1 of \d+ tensors .*: {HEAD};"):
        load_bagel(folder, dtype=dtype)


def test_what_is_not_read_is_not_judged(tiny_bagel_path: Path, tmp_path: Path) -> None:
    folder = release_with(tmp_path, tiny_bagel_path, GENERATION, torch.inf)
    load_bagel(folder)
    with pytest.raises(ValueError, match=f": {GENERATION};"):
        load_bagel(folder, visual_gen=True)


def test_beyond_the_range_that_is_loaded(tiny_bagel_path: Path, tmp_path: Path) -> None:
    folder = release_with(tmp_path, tiny_bagel_path, HEAD, 1e30)
    load_bagel(folder, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"stored as F32, loaded as float16\): .*lm_head"):
        load_bagel(folder, dtype=torch.float16)


def test_the_autoencoder(tiny_bagel_path: Path, tmp_path: Path) -> None:
    key = "decoder.conv_out.bias"
    folder = release_with(tmp_path, tiny_bagel_path, key, torch.nan, "ae")
    with pytest.raises(ValueError, match=rf"ae\.safetensors: 1 of \d+ tensors .*: {key};"):
        load_autoencoder(folder)
    with pytest.raises(ValueError, match=r"ae\.safetensors"):
        load_bagel(folder, visual_gen=True)


@pytest.mark.parametrize("key", [HEAD, LAYER])
def test_layers_that_stay_on_disk(key: str, tiny_bagel_path: Path, tmp_path: Path) -> None:
    folder = release_with(tmp_path, tiny_bagel_path, key, torch.nan)
    shared = sum(s.nbytes for k, s in open_weights(folder).items() if ".layers." not in k)
    layers = [s.nbytes for k, s in open_weights(folder).items() if "model.layers.0." in k]
    memory: dict[Place, int] = {"cpu": shared + sum(layers)}
    with pytest.raises(ValueError, match=f"hold NaN or infinity .*: {key};"):
        load_bagel_spread(folder, dtype=torch.float32, max_memory=memory)
