# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Adapters in peft's format: written, read, merged, and the same to the peft package."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from data.packing import pack
from data.sequence import ImageSegment, TextSegment
from modeling import load_bagel
from modeling.bagel.adapters import AdapterConfig
from modeling.release.adapters import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    merge_adapter,
    read_adapter,
    save_adapter,
)
from modeling.release.checkpoint import BagelBundle
from modeling.release.weight_files import open_weights
from tests.conftest import TINY_BAGEL

Tensors = dict[str, Tensor]
LAYERS = "language_model.model.layers"
VIT = "vit_model.vision_model.encoder.layers"
MODULES = (
    f"{LAYERS}.2.mlp.down_proj", f"{LAYERS}.0.self_attn.q_proj", f"{LAYERS}.1.self_attn.k_proj",
    f"{LAYERS}.0.self_attn.o_proj", f"{LAYERS}.1.mlp.gate_proj", f"{VIT}.0.mlp.fc1",
    "connector.fc1",
)  # fmt: skip
CONFIG = AdapterConfig(3, 12.0, MODULES)
HUGE = 10**400


def make_tensors(config: AdapterConfig, seed: int = 0) -> Tensors:
    stored = open_weights(TINY_BAGEL)
    draw = torch.Generator().manual_seed(seed)
    made = {}
    for module in config.modules:
        wide, narrow = stored[f"{module}.weight"].shape
        made[f"{module}.lora_A.weight"] = torch.randn(config.rank, narrow, generator=draw) / 8
        made[f"{module}.lora_B.weight"] = torch.randn(wide, config.rank, generator=draw) / 8
    return made


TENSORS = make_tensors(CONFIG)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    saved = save_adapter(TENSORS, tmp_path / "adapter", base=TINY_BAGEL, config=CONFIG, step=7)
    assert saved is not None
    return saved


def logits(bundle: BagelBundle, model: nn.Module) -> Tensor:
    """Of a pack with an image and of one of text, (T, V)."""
    image = ImageSegment(torch.linspace(-1, 1, 4 * 588).view(4, 588), torch.arange(4))
    contexts = [(image, TextSegment((5, 6, 7))), (TextSegment((8, 9)),)]
    with torch.no_grad():
        hidden: Tensor = model(pack(contexts, bundle.special_tokens))
        return hidden @ bundle.model.language_model.lm_head.weight.t()


def adapted_logits(tensors: Tensors, config: AdapterConfig) -> Tensor:
    """Logits of W x + b + alpha / rank * B A x, the products formed apart."""
    bundle = load_bagel(TINY_BAGEL)

    def add(a: Tensor, b: Tensor) -> Callable[..., Tensor]:
        return lambda _, x, y: y + config.alpha / config.rank * ((x[0] @ a.t()) @ b.t())

    for module in config.modules:
        a, b = (tensors[f"{module}.lora_{which}.weight"] for which in "AB")
        bundle.model.get_submodule(module).register_forward_hook(add(a, b))
    return logits(bundle, bundle.model)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-5)


def assert_same(actual: Tensors, expected: Tensors) -> None:
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        assert actual[key].dtype == tensor.dtype and torch.equal(actual[key], tensor), key


# -- saving and reading -----------------------------------------------------------------------


def test_round_trip(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "adapter"
    items = ((key, TENSORS[key].double()) for key in reversed(TENSORS))
    run = {"lora": {"rank": 3}}
    saved = save_adapter(items, out, base=TINY_BAGEL, config=CONFIG, step=40, run_config=run)
    assert saved == out and [entry.name for entry in out.parent.iterdir()] == ["adapter"]
    assert {file.name for file in out.iterdir()} == {CONFIG_FILE, WEIGHTS_FILE, "README.md"}
    config, tensors = read_adapter(out)
    assert config == CONFIG and config.scale == 4
    assert_same(tensors, TENSORS)
    assert_same(
        load_file(out / WEIGHTS_FILE), {f"base_model.model.{k}": v for k, v in TENSORS.items()}
    )
    settings = json.loads((out / CONFIG_FILE).read_text())
    assert settings["target_modules"] == sorted(MODULES)
    assert (settings["r"], settings["lora_alpha"], settings["peft_type"]) == (3, 12, "LORA")
    card = (out / "README.md").read_text()
    assert "library_name: peft" in card and "- Optimiser step: 40\n" in card
    assert "Rank 3, alpha 12, 7 linear layers" in card and "lora:\n  rank: 3\n" in card


def test_an_alpha_that_is_no_whole_number(tmp_path: Path) -> None:
    config = AdapterConfig(2, 4.5, ("connector.fc2",))
    save_adapter(make_tensors(config), tmp_path / "a", base=TINY_BAGEL, config=config)
    assert read_adapter(tmp_path / "a")[0] == config


def test_other_ranks_only_drive_the_iterable_and_errors_drive_it_to_its_end(
    tmp_path: Path, adapter: Path
) -> None:
    driven: list[str] = []

    def items() -> Iterator[tuple[str, Tensor]]:
        for key, tensor in TENSORS.items():
            driven.append(key)
            yield key, tensor

    assert save_adapter(items(), None, base=TINY_BAGEL, config=CONFIG) is None
    assert driven == list(TENSORS)
    driven.clear()
    with pytest.raises(ValueError, match="exists already"):
        save_adapter(items(), adapter, base=TINY_BAGEL, config=CONFIG)
    assert driven == list(TENSORS)
    assert_same(read_adapter(adapter)[1], TENSORS)
    halved = {key: tensor / 2 for key, tensor in TENSORS.items()}
    save_adapter(halved, adapter, base=TINY_BAGEL, config=CONFIG, overwrite=True)
    assert_same(read_adapter(adapter)[1], halved)


FIRST = next(iter(TENSORS))


@pytest.mark.parametrize(
    ("config", "tensors", "why"),
    [
        (CONFIG, {**TENSORS, "connector.fc2.lora_A.weight": torch.ones(3, 64)},
         r"'connector\.fc2\.lora_A\.weight' belongs to no layer"),
        (CONFIG, {key: TENSORS[key] for key in TENSORS if key != FIRST},
         r"layers\.2\.mlp\.down_proj\.lora_A\.weight not given"),
        (CONFIG, {**TENSORS, FIRST: TENSORS[FIRST][:2]}, r"lora_A\.weight' has shape \[2, "),
        (AdapterConfig(3, 1, ("connector.fc9", "language_model.model.embed_tokens")), {},
         r"no linear layer for 2 of the 2 .*connector\.fc9, .*embed_tokens; give the base"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_not_saved(
    config: AdapterConfig, tensors: Tensors, why: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=why):
        save_adapter(tensors, tmp_path / "a", base=TINY_BAGEL, config=config)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match=r"needs .* kB but .* has 100 bytes free"):
        save_adapter(TENSORS, tmp_path / "a", base=TINY_BAGEL, config=CONFIG)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"peft_type": "IA3"}, 'peft_type is "IA3".*only LORA is'),
        ({"peft_type": None}, "peft_type is null"),
        ({"use_dora": True}, 'asks for "use_dora": true, which is not supported'),
        ({"bias": "all"}, '"bias": "all"'),
        ({"modules_to_save": ["connector"]}, r'"modules_to_save": \["connector"\]'),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern"),
        ({"lora_bias": True}, '"lora_bias": true'),
        ({"init_lora_weights": "pissa_niter_4"}, r"pissa_niter_4.*changes the base"),
        ({"invented_later": 3}, '"invented_later": 3'),
        ({"r": 0}, "r must be at least 1 and at most 65536, got 0"),
        ({"r": True}, "r must be a whole number"),
        ({"r": "3"}, "r must be a whole number"),
        ({"r": HUGE, "use_rslora": True}, "r must be at least 1"),
        ({"r": 4}, r"A must be \[4, in\] and B \[out, 4\].*down_proj: A \[3, "),
        ({"lora_alpha": None}, "lora_alpha must be a number, got null"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be at least"),
        ({"lora_alpha": HUGE}, "lora_alpha must be at least"),
    ],
)
def test_settings_that_are_refused(changes: dict[str, Any], why: str, adapter: Path) -> None:
    file = adapter / CONFIG_FILE
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(ValueError, match=why):
        read_adapter(adapter)


BEGIN = "base_model.model."


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({BEGIN + FIRST: None}, r"down_proj\.lora_B without the other of A and B"),
        ({BEGIN + FIRST: TENSORS[FIRST][:2]}, r"A must be \[3, in\].*A \[2, "),
        ({BEGIN + FIRST: TENSORS[FIRST][0]}, r"A must be \[3, in\]"),
        ({BEGIN + FIRST: TENSORS[FIRST] / 0}, r"1 of 14 tensors hold NaN or infinity.*lora_A"),
        ({BEGIN + FIRST: TENSORS[FIRST].int()}, r"floating point, found .*lora_A\.weight' \(I32\)"),
        ({"connector.fc1.lora_A.weight": torch.ones(3, 2)}, r"must hold base_model\.model\.PATH"),
        ({BEGIN + "connector.fc1.lora_magnitude_vector.weight": torch.ones(2)}, "only plain LoRA"),
        ({BEGIN + "connector.fc1.lora_B.bias": torch.ones(2)}, r"lora_B\.bias' \(F32\)"),
        (dict.fromkeys(BEGIN + key for key in TENSORS), "found none"),
    ],
)  # fmt: skip
def test_tensors_that_are_refused(
    change: dict[str, Tensor | None], why: str, adapter: Path
) -> None:
    tensors = {**load_file(adapter / WEIGHTS_FILE), **change}
    kept = {key: tensor for key, tensor in tensors.items() if tensor is not None}
    save_file(kept, adapter / WEIGHTS_FILE)
    with pytest.raises(ValueError, match=why):
        read_adapter(adapter)


def test_files_that_are_missing_or_damaged(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no folder .*nowhere"):
        read_adapter(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"is missing\): it is a release folder; ADAPTER comes"):
        read_adapter(TINY_BAGEL)
    weights = (adapter / WEIGHTS_FILE).read_bytes()
    (adapter / WEIGHTS_FILE).write_bytes(weights[:-5])
    with pytest.raises(ValueError, match=rf"{WEIGHTS_FILE} cannot be read"):
        read_adapter(adapter)
    (adapter / WEIGHTS_FILE).unlink()
    with pytest.raises(ValueError, match=rf"{WEIGHTS_FILE} cannot be read: No such file"):
        read_adapter(adapter)
    (adapter / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(ValueError, match=r"adapter_model\.bin, which can run code"):
        read_adapter(adapter)
    (adapter / CONFIG_FILE).write_text("{")
    with pytest.raises(ValueError, match=rf"{CONFIG_FILE} is not valid JSON.*save the adapter"):
        read_adapter(adapter)
    (adapter / CONFIG_FILE).unlink()
    with pytest.raises(ValueError, match=r"no adapter \(adapter_config\.json is missing\)"):
        read_adapter(adapter)


# -- merging ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_merged_weights(dtype: torch.dtype, adapter: Path, tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(TINY_BAGEL, base)
    tensors = {k: v.to(dtype) for k, v in load_file(base / "model.safetensors").items()}
    save_file(tensors, base / "model.safetensors")
    assert merge_adapter(adapter, base, out) == out
    expected = dict(tensors)
    for module in MODULES:
        a, b = (TENSORS[f"{module}.lora_{which}.weight"].double() for which in "AB")
        expected[f"{module}.weight"] = tensors[f"{module}.weight"].double() + 4 * (b @ a)
    written = load_file(out / "model.safetensors")
    for key, tensor in expected.items():
        assert written[key].dtype == dtype, key
        if tensor is tensors[key]:
            assert torch.equal(written[key], tensor), key
        else:
            # Of sums of size 1: fp32 and fp64 as they round, bf16 within half its step.
            rtol, atol = {
                torch.float32: (1e-6, 2e-7),
                torch.bfloat16: (2**-8, 2e-7),
                torch.float64: (1e-15, 1e-15),
            }[dtype]
            torch.testing.assert_close(written[key].double(), tensor.double(), rtol=rtol, atol=atol)
    card = (out / "README.md").read_text()
    assert "- Optimiser step: 7\n" in card and "name: adapter\n  rank: 3\n  alpha: 12.0" in card
    assert f"  - {MODULES[0]}\n" in card


def test_a_merged_release_answers_as_the_adapted_model(adapter: Path, tmp_path: Path) -> None:
    merged = load_bagel(merge_adapter(adapter, TINY_BAGEL, tmp_path / "out"))
    expected = adapted_logits(TENSORS, CONFIG)
    assert_close(logits(merged, merged.model), expected)
    base = load_bagel(TINY_BAGEL)
    assert (logits(base, base.model) - expected).abs().max() > 0.1


def test_what_cannot_be_merged(adapter: Path, tmp_path: Path) -> None:
    base, out = tmp_path / "home" / "base", tmp_path / "out"
    shutil.copytree(TINY_BAGEL, base)
    with pytest.raises(ValueError, match="holds what is to be merged"):
        merge_adapter(adapter, base, base.parent, overwrite=True)
    with pytest.raises(ValueError, match="holds what is to be merged"):
        merge_adapter(adapter, base, adapter, overwrite=True)
    tensors = load_file(adapter / WEIGHTS_FILE)
    wide = f"{BEGIN}connector.fc1.lora_B.weight"
    save_file({**tensors, wide: torch.ones(5, 3)}, adapter / WEIGHTS_FILE)
    with pytest.raises(
        ValueError, match=r"1 of the 7 .*connector\.fc1: \[5, 32\], in the base \[64, 32\]"
    ):
        merge_adapter(adapter, base, out)
    save_file({**tensors, wide: torch.full((64, 3), 3e38)}, adapter / WEIGHTS_FILE)
    with pytest.raises(ValueError, match=r"connector\.fc1\.weight holds NaN or infinity once"):
        merge_adapter(adapter, base, out)
    moved = {key.replace(f"{LAYERS}.2", f"{LAYERS}.9"): value for key, value in tensors.items()}
    save_file(moved, adapter / WEIGHTS_FILE)
    with pytest.raises(ValueError, match=r"no linear layer for 1 of the 7 .*layers\.9\.mlp"):
        merge_adapter(adapter, base, out)
    assert {entry.name for entry in tmp_path.iterdir()} == {"home", "adapter"}


# -- the peft package -------------------------------------------------------------------------


def test_peft_loads_it_to_the_same_logits(adapter: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    bundle = load_bagel(TINY_BAGEL)
    model = peft.PeftModel.from_pretrained(bundle.model, str(adapter))
    # Full paths name these layers and no others, such as the ViT's own q_proj.
    wrapped = [name for name, part in model.get_base_model().named_modules()
               if isinstance(part, peft.tuners.lora.Linear)]  # fmt: skip
    assert sorted(wrapped) == sorted(MODULES)
    assert_close(logits(bundle, model), adapted_logits(TENSORS, CONFIG))
    ours = load_file(merge_adapter(adapter, TINY_BAGEL, tmp_path / "out") / "model.safetensors")
    for key, weight in model.merge_and_unload().state_dict().items():
        torch.testing.assert_close(weight, ours[key], atol=1e-6, rtol=1e-6, msg=key)


@pytest.mark.parametrize(
    ("targets", "count", "rslora"),
    [
        (["q_proj", "fc1"], 8, True),
        (r".*layers\.\d\.(self_attn|mlp)\.(o|down)_proj", 6, False),
    ],
)
def test_reading_what_peft_saved(targets: Any, count: int, rslora: bool, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    bundle = load_bagel(TINY_BAGEL)
    settings = peft.LoraConfig(
        r=5, lora_alpha=8, target_modules=targets, lora_dropout=0.3, use_rslora=rslora,
        init_lora_weights="gaussian",
    )  # fmt: skip
    model = peft.get_peft_model(bundle.model, settings).eval()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) / 8)
    model.save_pretrained(tmp_path / "adapter")
    config, tensors = read_adapter(tmp_path / "adapter")
    assert len(config.modules) == count and len(tensors) == 2 * count
    assert config.scale == pytest.approx(8 / math.sqrt(5) if rslora else 8 / 5)
    expected = logits(bundle, model)
    assert_close(adapted_logits(tensors, config), expected)
    merged = load_bagel(merge_adapter(tmp_path / "adapter", TINY_BAGEL, tmp_path / "out"))
    assert_close(logits(merged, merged.model), expected)
