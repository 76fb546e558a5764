# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""A saved folder is what VLMEvalKit's ThinkMorph wrapper opens: every file, key, shape and table.

The wrapper builds the module on the meta device and fills it from the file, so a tensor that is
absent, misnamed or of another shape stays empty or stops it. The keys are written out here by
hand, from the layout of the releases, and not taken from this repository's module.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen2Tokenizer

from data.packing import pack
from modeling import load_bagel, save_bagel
from modeling.release.checkpoint import is_generation_key
from modeling.release.tokenizer import load_tokenizer
from scripts.visual_opsd.config import PromptSettings
from scripts.visual_opsd.rows import make_builder
from tests.visual_opsd.evaluation.tsv_files import picture

Shapes = dict[str, tuple[int, ...]]

# What the wrapper opens by name, and what its tokenizer class reads.
OPENED = ("llm_config.json", "vit_config.json", "model.safetensors", "ae.safetensors")
TOKENIZER = ("vocab.json", "merges.txt", "tokenizer_config.json")
SIDE, LATENT_SIDE = 70, 64


def wrapper_layout(folder: Path) -> Shapes:
    """Every tensor of the wrapper's module, from the sizes in the folder's configurations."""
    llm = json.loads((folder / "llm_config.json").read_text())
    vit = json.loads((folder / "vit_config.json").read_text())
    h, inner, vocab = llm["hidden_size"], llm["intermediate_size"], llm["vocab_size"]
    d = h // llm["num_attention_heads"]
    q, kv = llm["num_attention_heads"] * d, llm["num_key_value_heads"] * d
    shapes: Shapes = {
        "language_model.model.embed_tokens.weight": (vocab, h),
        "language_model.lm_head.weight": (vocab, h),
        "language_model.model.norm.weight": (h,),
        "language_model.model.norm_moe_gen.weight": (h,),
    }
    for i in range(llm["num_hidden_layers"]):
        for expert in ("", "_moe_gen"):
            attention = f"language_model.model.layers.{i}.self_attn."
            for name, rows in (("q", q), ("k", kv), ("v", kv)):
                shapes[f"{attention}{name}_proj{expert}.weight"] = (rows, h)
                shapes[f"{attention}{name}_proj{expert}.bias"] = (rows,)
            shapes[f"{attention}o_proj{expert}.weight"] = (h, q)
            shapes[f"{attention}q_norm{expert}.weight"] = (d,)
            shapes[f"{attention}k_norm{expert}.weight"] = (d,)
            mlp = f"language_model.model.layers.{i}.mlp{expert}."
            shapes[mlp + "gate_proj.weight"] = shapes[mlp + "up_proj.weight"] = (inner, h)
            shapes[mlp + "down_proj.weight"] = (h, inner)
            for norm in ("input_layernorm", "post_attention_layernorm"):
                shapes[f"language_model.model.layers.{i}.{norm}{expert}.weight"] = (h,)
    hv, iv = vit["hidden_size"], vit["intermediate_size"]
    tower = "vit_model.vision_model."
    shapes[tower + "embeddings.patch_embedding.weight"] = (hv, 3 * 14 * 14)  # linear, no conv
    shapes[tower + "embeddings.patch_embedding.bias"] = (hv,)
    shapes[tower + "embeddings.position_embedding.weight"] = (SIDE**2, hv)
    for j in range(vit["num_hidden_layers"] - 1):  # layer -2 is selected
        layer = f"{tower}encoder.layers.{j}."
        for name in ("q", "k", "v", "out"):
            shapes[f"{layer}self_attn.{name}_proj.weight"] = (hv, hv)
            shapes[f"{layer}self_attn.{name}_proj.bias"] = (hv,)
        for name in ("layer_norm1", "layer_norm2"):
            shapes[f"{layer}{name}.weight"] = shapes[f"{layer}{name}.bias"] = (hv,)
        shapes[layer + "mlp.fc1.weight"], shapes[layer + "mlp.fc1.bias"] = (iv, hv), (iv,)
        shapes[layer + "mlp.fc2.weight"], shapes[layer + "mlp.fc2.bias"] = (hv, iv), (hv,)
    for name in ("weight", "bias"):
        shapes[f"{tower}post_layernorm.{name}"] = (hv,)
    shapes["connector.fc1.weight"], shapes["connector.fc1.bias"] = (h, hv), (h,)
    shapes["connector.fc2.weight"], shapes["connector.fc2.bias"] = (h, h), (h,)
    shapes["vit_pos_embed.pos_embed"] = (SIDE**2, h)
    shapes["time_embedder.mlp.0.weight"], shapes["time_embedder.mlp.0.bias"] = (h, 256), (h,)
    shapes["time_embedder.mlp.2.weight"], shapes["time_embedder.mlp.2.bias"] = (h, h), (h,)
    shapes["vae2llm.weight"], shapes["vae2llm.bias"] = (h, 64), (h,)
    shapes["llm2vae.weight"], shapes["llm2vae.bias"] = (64, h), (64,)
    shapes["latent_pos_embed.pos_embed"] = (LATENT_SIDE**2, h)
    return shapes


def sincos(width: int, side: int) -> np.ndarray:
    """The fixed table [sin(col), cos(col), sin(row), cos(row)], float64 (side^2, width)."""
    frequencies = 10000.0 ** (-np.arange(width // 4) / (width // 4))
    row, column = np.divmod(np.arange(side**2), side)
    angles = [column[:, None] * frequencies, row[:, None] * frequencies]
    return np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], axis=1)


def autoencoder_layout(width: int) -> Shapes:
    """Every tensor of the FLUX autoencoder whose first convolution has `width` channels."""
    widths = [width, 2 * width, 4 * width, 4 * width]
    shapes: Shapes = {}

    def conv(name: str, inputs: int, outputs: int, kernel: int = 3) -> None:
        shapes[name + ".weight"], shapes[name + ".bias"] = (
            (outputs, inputs, kernel, kernel), (outputs,),
        )  # fmt: skip

    def norm(name: str, channels: int) -> None:
        shapes[name + ".weight"] = shapes[name + ".bias"] = (channels,)

    def block(name: str, inputs: int, outputs: int) -> int:
        norm(name + ".norm1", inputs)
        conv(name + ".conv1", inputs, outputs)
        norm(name + ".norm2", outputs)
        conv(name + ".conv2", outputs, outputs)
        if inputs != outputs:
            conv(name + ".nin_shortcut", inputs, outputs, 1)
        return outputs

    def middle(part: str) -> None:
        block(f"{part}.mid.block_1", widths[-1], widths[-1])
        norm(f"{part}.mid.attn_1.norm", widths[-1])
        for name in ("q", "k", "v", "proj_out"):
            conv(f"{part}.mid.attn_1.{name}", widths[-1], widths[-1], 1)
        block(f"{part}.mid.block_2", widths[-1], widths[-1])

    conv("encoder.conv_in", 3, width)
    now = width
    for i, outputs in enumerate(widths):
        for j in range(2):
            now = block(f"encoder.down.{i}.block.{j}", now, outputs)
        if i < 3:
            conv(f"encoder.down.{i}.downsample.conv", now, now)
    middle("encoder")
    norm("encoder.norm_out", now)
    conv("encoder.conv_out", now, 32)
    conv("decoder.conv_in", 16, now)
    middle("decoder")
    for i in (3, 2, 1, 0):
        for j in range(3):
            now = block(f"decoder.up.{i}.block.{j}", now, widths[i])
        if i:
            conv(f"decoder.up.{i}.upsample.conv", now, now)
    norm("decoder.norm_out", now)
    conv("decoder.conv_out", now, 3)
    return shapes


def stored(file: Path) -> Shapes:
    with safe_open(file, "pt") as tensors:
        return {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118


def trained_student(base: Path) -> dict[str, Tensor]:
    """The student's tensors after one step of plain gradient descent on a text."""
    bundle = load_bagel(base)
    settings = PromptSettings(vit_max_size=112, vit_min_size=14)
    builder = make_builder(bundle.tokenizer, bundle.config, settings)
    model = bundle.model
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("pos_embed.pos_embed" not in name)  # the tables are fixed
    batch = pack([builder.question(picture(1), "Which way leads out?")], bundle.special_tokens)
    hidden = model(batch)
    logits = model.language_model.lm_head(hidden)
    logits.log_softmax(-1)[:, 7].mean().neg().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.sub_(0.1 * parameter.grad)
    return dict(model.state_dict())


@pytest.fixture(scope="module", params=["untrained", "trained", "tables absent from the base"])
def saved(
    request: pytest.FixtureRequest, tiny_bagel_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A student's folder; the third base lacks both tables and is called ema, as BAGEL's."""
    folder = tmp_path_factory.mktemp("saved")
    base = tiny_bagel_path
    if request.param.startswith("tables"):
        base = folder / "base"
        shutil.copytree(tiny_bagel_path, base, ignore=shutil.ignore_patterns("model.safetensors"))
        tensors = load_file(tiny_bagel_path / "model.safetensors")
        kept = {key: value for key, value in tensors.items() if "pos_embed.pos" not in key}
        assert len(kept) == len(tensors) - 2
        save_file(kept, base / "ema.safetensors")
    if request.param == "untrained":
        tensors = dict(load_bagel(base).model.state_dict())
    else:
        tensors = trained_student(base)
    out = save_bagel(tensors, folder / "0001000", base=base, step=1000)
    assert out is not None
    return out


def test_every_key_and_shape(saved: Path) -> None:
    assert stored(saved / "model.safetensors") == wrapper_layout(saved)


def test_the_list_is_the_releases(tiny_bagel_path: Path) -> None:
    """The list above also describes a folder this repository did not write."""
    assert stored(tiny_bagel_path / "model.safetensors") == wrapper_layout(tiny_bagel_path)
    missing = wrapper_layout(tiny_bagel_path)
    del missing["llm2vae.bias"]
    assert stored(tiny_bagel_path / "model.safetensors") != missing


def test_the_list_has_the_releases_size(tmp_path: Path) -> None:
    """At the 7B model's sizes the list counts the parameters BAGEL-7B-MoT is known to have."""
    llm = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
           "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064}  # fmt: skip
    vit = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27}
    (tmp_path / "llm_config.json").write_text(json.dumps(llm))
    (tmp_path / "vit_config.json").write_text(json.dumps(vit))
    assert sum(math.prod(shape) for shape in wrapper_layout(tmp_path).values()) == 14_607_260_128


def test_both_position_tables_are_written(saved: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    for key, side in (("vit_pos_embed", SIDE), ("latent_pos_embed", LATENT_SIDE)):
        table = tensors[f"{key}.pos_embed"]
        expected = torch.from_numpy(sincos(table.shape[1], side)).to(table.dtype)
        torch.testing.assert_close(table, expected, atol=1e-6, rtol=0)


def test_one_file_of_weights_and_all_others(saved: Path, tiny_bagel_path: Path) -> None:
    assert [file.name for file in saved.glob("*model*")] == ["model.safetensors"]
    assert {f.name for f in saved.glob("*.safetensors")} == {"model.safetensors", "ae.safetensors"}
    assert not list(saved.glob("*.index.json"))
    for name in OPENED + TOKENIZER:
        assert (saved / name).is_file(), name
    for name in ("ae.safetensors", "llm_config.json", "vit_config.json", *TOKENIZER):
        assert (saved / name).read_bytes() == (tiny_bagel_path / name).read_bytes(), name
    width = 32  # of the tiny checkpoint; the releases have 128
    assert stored(saved / "ae.safetensors") == autoencoder_layout(width)
    assert len(autoencoder_layout(width)) == 244
    parameters = sum(math.prod(shape) for shape in autoencoder_layout(128).values())
    assert parameters == 83_819_683


def test_configurations_hold_what_the_wrapper_reads(saved: Path) -> None:
    llm = json.loads((saved / "llm_config.json").read_text())
    vit = json.loads((saved / "vit_config.json").read_text())
    assert llm["model_type"] == "qwen2"
    assert vit["num_hidden_layers"] >= 2 and vit["patch_size"] == 14
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "vocab_size", "rms_norm_eps", "rope_theta")  # fmt: skip
    for name in sizes:
        assert name in llm, name


def test_serving_files_describe_the_weights(saved: Path, tiny_bagel_path: Path) -> None:
    """Whatever was trained; a base's own config.json that is good is kept."""
    assert (saved / "config.json").read_bytes() == (tiny_bagel_path / "config.json").read_bytes()
    config = json.loads((saved / "config.json").read_text())
    shapes, llm, vit = (
        stored(saved / "model.safetensors"),
        config["llm_config"],
        config["vit_config"],
    )
    embedding = shapes["language_model.model.embed_tokens.weight"]
    assert (llm["vocab_size"], llm["hidden_size"]) == embedding and llm["qk_norm"] is True
    assert shapes["vit_pos_embed.pos_embed"][0] == config["vit_max_num_patch_per_side"] ** 2
    assert shapes["latent_pos_embed.pos_embed"][0] == config["max_latent_size"] ** 2
    processor = json.loads((saved / "preprocessor_config.json").read_text())
    assert processor["size"] == {"height": 980, "width": 980} and vit["image_size"] == 980


def test_tokenizer_opens_as_the_wrapper_opens_it(saved: Path, tiny_bagel_path: Path) -> None:
    tokenizer = Qwen2Tokenizer.from_pretrained(str(saved))
    ours, special = load_tokenizer(saved)
    markers = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
    ids = [tokenizer.convert_tokens_to_ids(marker) for marker in markers]
    assert ids == [special.bos, special.eos, special.start_of_image, special.end_of_image]
    assert (
        len(tokenizer)
        == len(ours)
        <= wrapper_layout(saved)["language_model.model.embed_tokens.weight"][0]
    )
    text = "Which way? <answer>R, D</answer>"
    assert tokenizer.encode(text, add_special_tokens=False) == ours.encode(
        text, add_special_tokens=False
    )


def test_what_training_moved_and_what_it_did_not(
    saved: Path, tiny_bagel_path: Path, request: pytest.FixtureRequest
) -> None:
    before = load_file(tiny_bagel_path / "model.safetensors")
    after = load_file(saved / "model.safetensors")
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert not [key for key in moved if is_generation_key(key) or "pos_embed.pos" in key]
    for key, tensor in after.items():
        assert tensor.dtype == before[key].dtype, key
        assert bool(torch.isfinite(tensor).all()), key
    assert bool(moved) == ("[untrained]" not in request.node.name)
    if moved:  # every part of the understanding branch did
        for part in ("connector.fc1", "language_model.lm_head", "vit_model.vision_model.post_l"):
            assert any(key.startswith(part) for key in moved), part


def test_it_loads_with_its_drawing_branch(saved: Path) -> None:
    bundle = load_bagel(saved, visual_gen=True)
    assert bundle.vae is not None
    assert set(bundle.model.state_dict()) == set(wrapper_layout(saved))
