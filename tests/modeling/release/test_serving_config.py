# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""config.json and preprocessor_config.json are true of the weights, whatever the base held."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, Qwen2Config, SiglipVisionConfig

from data.transforms import ImageTransform
from modeling import save_bagel
from modeling.release.checkpoint import read_bagel_config
from modeling.release.serving_config import SERVING_FILES, ServingFile, serving_files
from modeling.release.weight_files import open_weights

Edit = Callable[[dict[str, Any]], object]


@pytest.fixture
def base(tmp_path: Path, tiny_bagel_path: Path) -> Path:
    """The tiny release; its config.json is good and it has no preprocessor_config.json."""
    return Path(shutil.copytree(tiny_bagel_path, tmp_path / "base"))


def files_of(base: Path) -> dict[str, ServingFile]:
    config = read_bagel_config(base, open_weights(base), visual_gen=True)
    return {file.name: file for file in serving_files(base, config)}


def edit(file: Path, change: Edit) -> None:
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


def test_what_is_written(base: Path) -> None:
    (base / "config.json").unlink()
    saved = save_bagel([], base.with_name("out"), base=base)
    assert saved is not None
    written = json.loads((saved / "config.json").read_text())
    llm = json.loads((base / "llm_config.json").read_text())
    vit = json.loads((base / "vit_config.json").read_text())
    assert vit["num_hidden_layers"] == 3, "of which two run"
    assert written == {
        "architectures": ["BagelForConditionalGeneration"],
        "model_type": "bagel",
        "llm_config": {
            **llm,
            "model_type": "qwen2",
            "qk_norm": True,
            "tie_word_embeddings": False,
            "layer_module": "Qwen2MoTDecoderLayer",
        },
        "vit_config": {**vit, "model_type": "siglip_vision_model", "num_channels": 3},
        "vae_config": {"z_channels": 16, "downsample": 8},
        "visual_gen": True,
        "visual_und": True,
        "latent_patch_size": 2,
        "max_latent_size": 64,
        "vit_max_num_patch_per_side": 70,
        "connector_act": "gelu_pytorch_tanh",
        "interpolate_pos": False,
        "timestep_shift": 1.0,
    }
    qwen = Qwen2Config(**written["llm_config"])
    assert (qwen.hidden_size, qwen.num_key_value_heads, qwen.vocab_size) == (64, 2, 1408)
    assert qwen.to_dict()["rope_parameters"]["rope_theta"] == 1e6 and qwen.qk_norm
    siglip = SiglipVisionConfig(**written["vit_config"])
    assert (siglip.num_hidden_layers, siglip.image_size, siglip.patch_size) == (3, 980, 14)
    # A folder of ours is a valid base: its files are kept.
    assert {file.problem for file in files_of(saved).values()} == {None}


def test_transformers_reads_the_image_processor(base: Path) -> None:
    """Its pixels of a square picture are those this repository feeds the ViT."""
    saved = save_bagel([], base.with_name("out"), base=base)
    processor = AutoImageProcessor.from_pretrained(saved)
    assert type(processor).__name__.startswith("SiglipImageProcessor")
    picture = Image.effect_mandelbrot((300, 300), (-2, -1.5, 1, 1.5), 100).convert("RGB")
    pixels = processor(picture, return_tensors="pt")["pixel_values"][0]
    ours = ImageTransform(980, 980, 14)(picture)
    torch.testing.assert_close(pixels, ours, atol=1e-5, rtol=0)


def test_what_the_base_leaves_out_or_has_otherwise(base: Path) -> None:
    """Sides come from the tables, and defaults that transformers has otherwise are said."""

    def shorten(values: dict[str, Any]) -> None:
        for name in ("rope_theta", "rms_norm_eps", "model_type"):
            del values[name]
        values["auto_map"] = {"AutoConfig": "configuration.Config"}

    edit(base / "llm_config.json", shorten)
    edit(base / "vit_config.json", lambda v: (v.pop("patch_size"), v.update(image_size=384)))
    tensors = load_file(base / "model.safetensors")
    tensors = {key: value for key, value in tensors.items() if "pos_embed.pos" not in key}
    key = "vit_model.vision_model.embeddings.position_embedding.weight"
    tensors["vit_pos_embed.pos_embed"] = torch.zeros(20**2, 64)
    tensors["latent_pos_embed.pos_embed"] = torch.zeros(8**2, 64)
    save_file({**tensors, key: tensors[key][:400].clone()}, base / "model.safetensors")
    files = files_of(base)
    config = json.loads(files["config.json"].content)
    assert (config["max_latent_size"], config["vit_max_num_patch_per_side"]) == (8, 20)
    assert (config["vit_config"]["patch_size"], config["vit_config"]["image_size"]) == (14, 280)
    assert (config["llm_config"]["rope_theta"], config["llm_config"]["rms_norm_eps"]) == (1e6, 1e-6)
    assert config["llm_config"]["model_type"] == "qwen2" and "auto_map" not in str(config)
    processor = json.loads(files["preprocessor_config.json"].content)
    assert processor["size"] == {"height": 280, "width": 280}
    assert files["config.json"].problem == "max_latent_size was 64, not 8"


def test_a_rotary_base_that_is_said_once(base: Path) -> None:
    """As transformers 5 saves it; a second value beside it would be one too many."""
    theta = {"rope_type": "default", "rope_theta": 5e5}
    change: Edit = lambda v: (v.pop("rope_theta"), v.update(rope_parameters=theta))  # noqa: E731
    edit(base / "llm_config.json", change)
    (file, _) = files_of(base).values()
    assert file.problem == "llm_config.rope_theta was 1000000.0, not null"
    llm = json.loads(file.content)["llm_config"]
    assert "rope_theta" not in llm and llm["rope_parameters"] == theta


WRONG: dict[str, Edit] = {
    "llm_config.qk_norm was null": lambda v: v["llm_config"].pop("qk_norm"),
    "llm_config.qk_norm was false": lambda v: v["llm_config"].update(qk_norm=False),
    "llm_config.hidden_size was 128": lambda v: v["llm_config"].update(hidden_size=128),
    "llm_config.rope_theta was null": lambda v: v["llm_config"].pop("rope_theta"),
    "llm_config.rope_scaling was {": lambda v: v["llm_config"].update(rope_scaling={"factor": 2}),
    "llm_config.hidden_size was null": lambda v: v.update(llm_config=[]),
    "vit_config.num_hidden_layers was 2": lambda v: v["vit_config"].update(num_hidden_layers=2),
    "vit_config.patch_size was null": lambda v: v["vit_config"].pop("patch_size"),
    "vit_config.num_channels was 1": lambda v: v["vit_config"].update(num_channels=1),
    "max_latent_size was 32": lambda v: v.update(max_latent_size=32),
    "vit_max_num_patch_per_side was null": lambda v: v.pop("vit_max_num_patch_per_side"),
    "model_type was": lambda v: v.update(model_type="qwen2"),
    "architectures was": lambda v: v.update(architectures=["Bagel"]),
    "auto_map was": lambda v: v.update(auto_map={"AutoConfig": "configuration.Config"}),
    "vae_config.downsample was 16": lambda v: v["vae_config"].update(downsample=16),
}


def test_a_config_that_misleads_is_replaced(base: Path) -> None:
    good = (base / "config.json").read_text()
    for expected, change in WRONG.items():
        (base / "config.json").write_text(good)
        edit(base / "config.json", change)
        file = files_of(base)["config.json"]
        assert file.problem is not None and file.problem.startswith(expected), expected
        (base / "config.json").write_bytes(file.content)
        assert files_of(base)["config.json"].problem is None, expected


BROKEN = {
    "cut": b'{"model_type": "bagel", ', "a comma too many": b'{"model_type": "bagel",}',
    "empty": b"", "a list": b"[]", "UTF-16": '{"a": 1}'.encode("utf-16"),
    "deep": b"[" * 100_000, "a byte order mark": b"\xef\xbb\xbf{}",
}  # fmt: skip


@pytest.mark.parametrize("name", SERVING_FILES)
def test_a_file_that_is_no_json_is_replaced(base: Path, name: str) -> None:
    for case, content in BROKEN.items():
        (base / name).write_bytes(content)
        file = files_of(base)[name]
        assert file.problem is not None and "no JSON" in file.problem, case
        assert json.loads(file.content), case
    saved = save_bagel([], base.with_name("out"), base=base)
    assert saved is not None and (saved / name).read_bytes() == file.content


def test_a_valid_file_passes_byte_for_byte(base: Path) -> None:
    """With fields of its own, and without those whose default is right."""
    edit(base / "config.json", lambda v: v.update(timestep_shift=3.0, mine="é"))
    kept = {
        "image_processor_type": "SiglipImageProcessorFast",
        "size": {"width": 980, "height": 980},
        "do_convert_rgb": None,
    }
    (base / "preprocessor_config.json").write_text(json.dumps(kept, indent=7))
    saved = save_bagel([], base.with_name("out"), base=base)
    assert saved is not None
    for name in (*SERVING_FILES, "generation_config.json"):
        assert (saved / name).read_bytes() == (base / name).read_bytes(), name


@pytest.mark.parametrize(
    ("name", "value"),
    [("size", {"height": 384, "width": 384}), ("resample", 2), ("image_mean", [0.48, 0.46, 0.4]),
     ("do_rescale", False), ("image_processor_type", "CLIPImageProcessor")],
)  # fmt: skip
def test_another_image_processor_is_replaced(base: Path, name: str, value: Any) -> None:
    file = base / "preprocessor_config.json"
    file.write_bytes(files_of(base)[file.name].content)
    edit(file, lambda v: v.update({name: value}))
    problem = files_of(base)[file.name].problem
    assert problem is not None and problem.startswith(f"{name} was {json.dumps(value)}, not ")


def test_without_a_drawing_branch(base: Path) -> None:
    """Weights without it are not said to draw, and the latent side is the releases'."""
    tensors = load_file(base / "model.safetensors")
    drawing = ("_moe_gen", "time_embedder", "vae2llm", "llm2vae", "latent_pos_embed")
    kept = {k: v for k, v in tensors.items() if not any(part in k for part in drawing)}
    save_file(kept, base / "model.safetensors")
    with pytest.warns(UserWarning, match="lacks the generation weights"):
        saved = save_bagel([], base.with_name("out"), base=base)
    assert saved is not None
    config = json.loads((saved / "config.json").read_text())
    assert (config["visual_gen"], config["max_latent_size"]) == (False, 64)
