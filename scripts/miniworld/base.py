# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The miniature's model: a BAGEL-layout folder of about a million parameters, and its card."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import nn

from modeling import save_bagel
from modeling.bagel.bagel import Bagel
from modeling.bagel.config import BagelConfig, read_llm_config, read_vision_config
from modeling.release.tokenizer import load_tokenizer
from scripts.miniworld.tokenizer import write_tokenizer

SIDE = 8  # rows of the ViT position tables: boards of up to 8 x 8 cells
WIDTH, LAYERS, HEADS, KV_HEADS, INTERMEDIATE = 128, 4, 4, 2, 384
VIT_WIDTH, VIT_LAYERS, VIT_HEADS, VIT_INTERMEDIATE = 64, 2, 2, 256


def _write_configs(folder: Path, tokens: int) -> None:
    tokenizer, special = load_tokenizer(folder)
    llm = {
        "architectures": ["Qwen2ForCausalLM"],
        "bos_token_id": tokenizer.pad_token_id,
        "eos_token_id": special.eos,
        "hidden_act": "silu",
        "hidden_size": WIDTH,
        "intermediate_size": INTERMEDIATE,
        "max_position_embeddings": 4096,
        "model_type": "qwen2",
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": KV_HEADS,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": -(-tokens // 64) * 64,
    }
    vit = {
        "hidden_size": VIT_WIDTH,
        "image_size": SIDE * 14,
        "intermediate_size": VIT_INTERMEDIATE,
        "model_type": "siglip_vision_model",
        "num_attention_heads": VIT_HEADS,
        "num_hidden_layers": VIT_LAYERS + 1,  # releases list one more than run
        "patch_size": 14,
    }
    for name, values in (("llm_config.json", llm), ("vit_config.json", vit)):
        (folder / name).write_text(json.dumps(values, indent=2) + "\n")


def initialise(model: nn.Module, seed: int) -> None:
    """Fan-in scaled normal weights, residual outputs damped by depth; norms and biases as built.

    The ViT features carry their place in a sin-cos table of amplitude 1 that is added to them,
    so embeddings start at a comparable scale.
    """
    generator = torch.Generator().manual_seed(seed)
    damped = (2 * LAYERS) ** -0.5
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            std = module.in_features**-0.5
            if name.endswith(("o_proj", "down_proj", "out_proj")):
                std *= damped
            nn.init.normal_(module.weight, 0.0, std, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, 0.0, 0.5, generator=generator)


def write_skeleton(folder: str | Path, strings: Iterable[str], seed: int) -> None:
    """Write a complete folder with untrained bf16 weights.

    Args:
        folder: existing and empty. strings: texts whose words become single tokens.
    """
    folder = Path(folder)
    _write_configs(folder, write_tokenizer(folder, strings))
    config = BagelConfig(
        llm=read_llm_config(folder),
        vision=read_vision_config(folder),
        vit_max_patches_per_side=SIDE,
    )
    model = Bagel(config)
    initialise(model, seed)
    state = {key: value.to(torch.bfloat16) for key, value in model.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def _card(results: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    header = {"license": "apache-2.0", "tags": ["visual-opsd", "miniature"]}
    rows = [
        f"| {name} | {values['text']:.3f} | {values['vt']:.3f} | {values['noise']:.3f} |"
        for name, values in results["accuracy"].items()
    ]
    lines = [
        "---",
        yaml.safe_dump(header, sort_keys=False).strip(),
        "---",
        "",
        "# A miniature base for Visual-OPSD",
        "",
        "A BAGEL-layout checkpoint (understanding branch only, own byte-level BPE, no autoencoder) "
        f"of {results['parameters']:,} parameters, trained from nothing on FrozenLake mazes by "
        "`python -m scripts.miniworld.pretrain`. It reads a maze drawn in the picture of a "
        "visual thought almost perfectly, but plans less well from the maze alone: the gap that "
        "the demo distils. It knows nothing else, and only the prompts of "
        "`examples/demo/prompts.yaml`.",
        "",
        f"Greedy accuracy on {results['mazes']} held-out mazes that training never saw:",
        "",
        "| tile art | text only | with the VT | with a noise VT |",
        "|---|---|---|---|",
        *rows,
        "",
        f"Steps: {results['steps']}. Seconds: {results['seconds']:.0f} on {results['device']}.",
        "",
        "## Settings",
        "",
        "```yaml",
        yaml.safe_dump(dict(settings), sort_keys=False).strip(),
        "```",
    ]
    return "\n".join(lines) + "\n"


def save_base(
    model: nn.Module,
    out: str | Path,
    *,
    skeleton: str | Path,
    results: Mapping[str, Any],
    settings: Mapping[str, Any],
    overwrite: bool,
) -> None:
    """Write the trained folder (bf16) with a model card of its own.

    Raises:
        ValueError: `out` exists and `overwrite` is off.
    """
    with warnings.catch_warnings():
        # The warning is about VLMEvalKit, which the miniature is not made for.
        warnings.filterwarnings("ignore", message=".*VLMEvalKit.*")
        save_bagel(model, out, base=skeleton, overwrite=overwrite)
    card = Path(out) / "README.md.tmp"
    card.write_text(_card(results, settings))
    os.replace(card, Path(out) / "README.md")
