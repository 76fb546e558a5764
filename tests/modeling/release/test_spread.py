# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""A model spread over devices: what is placed where, and that it computes the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from data.packing import pack
from data.sequence import ContextBuilder
from data.transforms import ImageTransform
from modeling import BagelBundle, load_bagel
from modeling.bagel.attention import AttentionLayout, DecodeLayout, attend
from modeling.bagel.bagel import Bagel
from modeling.bagel.config import BagelConfig, LLMConfig, VisionConfig
from modeling.bagel.generate import Generation, generate
from modeling.bagel.kv_cache import KVCache
from modeling.release.checkpoint import locate_weights
from modeling.release.spread import (
    Place,
    Placement,
    free_memory,
    load_bagel_spread,
    plan_placement,
    to_device,
    weight_bytes,
    working_bytes,
)

LAYER = "language_model.model.layers."
VIT = "vit_model.vision_model.encoder.layers."
BIG = 1 << 40
THINKMORPH = BagelConfig(
    llm=LLMConfig(3584, 28, 28, 4, 18944, 152064), vision=VisionConfig(1152, 26, 16, 4304)
)
GIB = 1 << 30


def file_bytes(folder: Path) -> dict[str, int]:
    """fp32 bytes of the tiny model by unit; everything else under ""."""
    sizes: dict[str, int] = {"": 0}
    for key, source in locate_weights(folder)[1].items():
        prefix = next((p for p in (LAYER, VIT) if key.startswith(p)), None)
        unit = "" if prefix is None else prefix + key.removeprefix(prefix).split(".")[0]
        sizes[unit] = sizes.get(unit, 0) + 4 * torch.Size(source.shape).numel()
    return sizes


def answer(bundle: BagelBundle, device: torch.device | str = "cpu") -> Generation:
    """A sampled answer to a picture and a question."""
    builder = ContextBuilder(bundle.tokenizer, ImageTransform(112, 56, 14))
    context = builder.question(Image.new("RGB", (70, 64), (200, 90, 10)), "What color is it?")
    uniforms = torch.rand(1, 41, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return generate(
        bundle.model, pack([context], bundle.special_tokens).to(device), bundle.special_tokens,
        max_new_tokens=40, temperature=1.5, uniforms=uniforms.to(device),
    )[0]  # fmt: skip


# ---------------------------------------------------------------------------------- placing


def test_a_real_model_fits_its_budgets() -> None:
    """7B in bf16 on two GPUs of 7 GiB: no device beyond its budget, room kept for moving layers."""
    total = weight_bytes(THINKMORPH, torch.bfloat16)
    assert total == pytest.approx(16.1e9, rel=0.01)
    memory: dict[Place, int] = {0: 7 * GIB, 1: 7 * GIB, "cpu": 30 * GIB}
    placement = plan_placement(THINKMORPH, torch.bfloat16, memory)
    assert len(placement.units) == 28 + 26
    with torch.device("meta"):
        model = Bagel(THINKMORPH).to(torch.bfloat16)
    used: dict[Place, int] = {0: 0, 1: 0, "cpu": 0}
    for key, parameter in model.named_parameters():
        used[placement.place(key)] += parameter.nbytes
    layer = sum(p.nbytes for p in model.language_model.model.layers[0].parameters())
    assert sum(used.values()) == total
    assert 5 * GIB < used[0] <= 7 * GIB - layer  # a layer in CPU memory computes on the main GPU
    assert 6 * GIB < used[1] <= 7 * GIB
    for key in ("language_model.lm_head.weight", "vit_pos_embed.pos_embed", "connector.fc1.bias"):
        assert placement.place(key) == placement.main == 0
    places = [placement.units[f"{LAYER}{i}"] for i in range(28)]
    assert places == sorted(places, key=[0, 1, "cpu"].index)  # one pass over the devices
    assert placement.device(f"{LAYER}{places.index(1)}") == torch.device("cuda", 1)
    assert placement.device(f"{VIT}25") == torch.device("cuda", 0)  # lives in CPU memory


def test_large_gpus_take_all_and_small_ones_leave_the_rest_to_the_disk() -> None:
    whole = plan_placement(THINKMORPH, torch.bfloat16, {0: 24 * GIB, "cpu": 0})
    assert set(whole.units.values()) == {0}
    assert whole.describe() == (
        "main device cuda:0; decoder layers: 28 on cuda:0; ViT layers: 26 on cuda:0"
    )
    small = plan_placement(THINKMORPH, torch.bfloat16, {0: 4 * GIB})
    assert set(small.units.values()) == {0, "disk"}
    with pytest.raises(ValueError, match=r"not enough memory: cuda:1 .* 2 GB .* larger GPU"):
        plan_placement(THINKMORPH, torch.bfloat16, {1: 2 * 10**9, "cpu": BIG})


def test_sizes_of_memory() -> None:
    assert 0 < free_memory()["cpu"] < BIG
    half = working_bytes(THINKMORPH, 4000, torch.bfloat16) - working_bytes(
        THINKMORPH, 2000, torch.bfloat16
    )
    full = working_bytes(THINKMORPH, 2000, torch.float32) - working_bytes(
        THINKMORPH, 0, torch.float32
    )
    assert half * 2 == full > 2000 * 4 * 2 * 28 * 4 * 128  # more than the cache alone


# ---------------------------------------------------------------------------------- computing


@pytest.mark.parametrize("on_cpu", [0, 1, 2, 3])
def test_layers_on_disk_compute_the_same(tiny_bagel_path: Path, on_cpu: int) -> None:
    """`on_cpu` decoder layers in memory, the rest and perhaps the ViT read from the file."""
    sizes = file_bytes(tiny_bagel_path)
    layer = sizes[LAYER + "0"]
    budget = sizes[""] + (on_cpu + 1) * layer
    bundle, placement = load_bagel_spread(
        tiny_bagel_path, dtype=torch.float32, max_memory={"cpu": budget}
    )
    on_disk = [unit for unit, place in placement.units.items() if place == "disk"]
    assert sum(unit.startswith(LAYER) for unit in on_disk) == 3 - on_cpu
    absent = {k for k, v in bundle.model.state_dict().items() if v.device.type == "meta"}
    assert absent == {k for k in bundle.model.state_dict() if k.startswith(tuple(on_disk))}
    assert answer(bundle) == answer(load_bagel(tiny_bagel_path))
    still = {k for k, v in bundle.model.state_dict().items() if v.device.type == "meta"}
    assert still == absent  # what was read for a turn is given up again


def test_half_precision_and_weights_in_several_files(tiny_bagel_path: Path, tmp_path: Path) -> None:
    """Layers on disk are cast like the others, and found through an index."""
    folder = tmp_path / "split"
    shutil.copytree(tiny_bagel_path, folder)
    (folder / "model.safetensors").unlink()
    tensors = load_file(tiny_bagel_path / "model.safetensors")
    halves = [dict(list(tensors.items())[i::2]) for i in range(2)]
    for i, half in enumerate(halves):
        save_file(half, folder / f"part{i}.safetensors")
    weight_map = {key: f"part{i}.safetensors" for i, half in enumerate(halves) for key in half}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    sizes = file_bytes(tiny_bagel_path)
    memory: dict[Place, int] = {"cpu": sizes[""] // 2 + sizes[LAYER + "0"]}
    bundle, placement = load_bagel_spread(folder, dtype=torch.bfloat16, max_memory=memory)
    assert list(placement.units.values()).count("disk") == 4
    assert bundle.model.dtype == torch.bfloat16
    assert answer(bundle) == answer(load_bagel(tiny_bagel_path, dtype=torch.bfloat16))


def test_all_in_memory_needs_no_moves(tiny_bagel_path: Path) -> None:
    bundle, placement = load_bagel_spread(
        tiny_bagel_path, dtype=torch.float32, max_memory={"cpu": BIG}
    )
    assert set(placement.units.values()) == {"cpu"}
    assert answer(bundle) == answer(load_bagel(tiny_bagel_path))


def test_too_little_memory_is_an_error(tiny_bagel_path: Path) -> None:
    sizes = file_bytes(tiny_bagel_path)
    with pytest.raises(ValueError, match=r"not enough memory: cpu may hold 0.00\d+ GB"):
        load_bagel_spread(
            tiny_bagel_path, dtype=torch.float32, max_memory={"cpu": sizes[""] + 1000}
        )


def test_cache_follows_its_layer() -> None:
    """A layer elsewhere ("meta" refuses to mix) keeps its keys there and is given slots there."""
    config = LLMConfig(64, 3, 4, 2, 128, 100)
    devices = [torch.device("cpu"), torch.device("meta"), torch.device("cpu")]
    cache = KVCache(config, 2, 8, devices, torch.float32)
    assert [k.device for k in cache.keys] == [v.device for v in cache.values] == devices
    prefill = AttentionLayout((3, 2), (0, 0), ((), ()))
    decode = DecodeLayout(torch.tensor([3, 2]))
    for layer, device in enumerate(devices):
        k, v = torch.ones(2, 5, 2, 16, device=device)
        cache.update(layer, k, v, prefill)
        keys, values = cache.update(layer, k[:2], v[:2], decode)
        out = attend(torch.ones(2, 4, 16, device=device), keys, values, decode, "decode")
        assert out.device == keys.device == device
    filled = [3 + 1, 2 + 1]
    for b, n in enumerate(filled):
        assert cache.keys[2][b, :n].eq(1).all() and cache.keys[2][b, n:].eq(0).all()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_gpus_and_cpu_memory_compute_the_same(tiny_bagel_path: Path) -> None:
    """On one GPU: 1 layer there, 2 in CPU memory; on two: one layer on each and one in memory."""
    sizes = file_bytes(tiny_bagel_path)
    layer = sizes[LAYER + "0"]
    gpus = torch.cuda.device_count()
    memory: dict[Place, int] = {0: sizes[""] + 2 * layer, "cpu": BIG}
    if gpus > 1:
        memory = {0: sizes[""] + 2 * layer, 1: layer, "cpu": BIG}
    bundle, placement = load_bagel_spread(tiny_bagel_path, dtype=torch.float32, max_memory=memory)
    expected = [0, 1, "cpu"] if gpus > 1 else [0, "cpu", "cpu"]
    assert [placement.units[f"{LAYER}{i}"] for i in range(3)] == expected
    plain = answer(load_bagel(tiny_bagel_path, device="cuda"), "cuda")
    spread = answer(bundle, to_device(placement.main))
    assert spread.ids == plain.ids
    assert spread.logprobs == pytest.approx(plain.logprobs, abs=1e-4)


def test_placement_names_units_exactly() -> None:
    """Layer 1 is not layer 10."""
    placement = Placement("cpu", {f"{LAYER}1": "disk", f"{LAYER}10": "cpu"})
    assert placement.place(f"{LAYER}10.mlp.up_proj.weight") == "cpu"
    assert placement.place(f"{LAYER}1.mlp.up_proj.weight") == "disk"
    assert placement.device(f"{LAYER}1") == torch.device("cpu")
