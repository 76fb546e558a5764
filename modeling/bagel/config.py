# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Sizes of the unified model, read from a release's llm_config.json and vit_config.json."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modeling.text_files import read_json_object


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the four markers every packed sequence is built from."""

    bos: int  # <|im_start|>
    eos: int  # <|im_end|>
    start_of_image: int  # <|vision_start|>
    end_of_image: int  # <|vision_end|>


@dataclass(frozen=True)
class LLMConfig:
    """Qwen2 decoder sizes (per-head q/k RMSNorm is always on in BAGEL)."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    vocab_size: int
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 32768

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class VisionConfig:
    """SigLIP tower. `num_hidden_layers` counts the layers that run (the file's minus one)."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    patch_size: int = 14
    num_channels: int = 3
    layer_norm_eps: float = 1e-6

    @property
    def patch_dim(self) -> int:
        return self.patch_size**2 * self.num_channels


@dataclass(frozen=True)
class BagelConfig:
    """Everything needed to build the module; table sides come from the checkpoint's shapes."""

    llm: LLMConfig
    vision: VisionConfig
    visual_gen: bool = False
    vit_max_patches_per_side: int = 70
    interpolate_positions: bool = False
    latent_patch_size: int = 2
    latent_channels: int = 16
    max_latent_size: int = 64


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(
            f"{path} is missing: a checkpoint folder needs llm_config.json and vit_config.json "
            "beside its weights (python download_model.py fetches a complete one)"
        )
    return read_json_object(path, "model configuration", fix="download it again")


def _pick(values: dict[str, Any], key: str, path: Path, default: Any = None) -> Any:
    value = values.get(key, default)
    if value is None:
        raise ValueError(f"{path} lacks {key!r}; is it the configuration of a BAGEL release?")
    return value


def read_llm_config(folder: str | Path) -> LLMConfig:
    """Read `llm_config.json` (a Qwen2 configuration).

    Raises:
        ValueError: file missing, not JSON, or a size absent or inconsistent.
    """
    path = Path(folder) / "llm_config.json"
    values = _read_json(path)
    if values.get("hidden_act", "silu") != "silu":
        raise ValueError(f"{path}: hidden_act {values['hidden_act']!r} is not supported, only silu")
    rope = values.get("rope_parameters") or {}
    heads = _pick(values, "num_attention_heads", path)
    config = LLMConfig(
        hidden_size=_pick(values, "hidden_size", path),
        num_hidden_layers=_pick(values, "num_hidden_layers", path),
        num_attention_heads=heads,
        num_key_value_heads=_pick(values, "num_key_value_heads", path, heads),
        intermediate_size=_pick(values, "intermediate_size", path),
        vocab_size=_pick(values, "vocab_size", path),
        rope_theta=float(values.get("rope_theta", rope.get("rope_theta", 1e6))),
        rms_norm_eps=float(values.get("rms_norm_eps", 1e-6)),
        max_position_embeddings=int(values.get("max_position_embeddings", 32768)),
    )
    if config.hidden_size % heads or heads % config.num_key_value_heads or config.head_dim % 2:
        raise ValueError(
            f"{path}: hidden_size {config.hidden_size}, {heads} heads and "
            f"{config.num_key_value_heads} key/value heads do not divide evenly"
        )
    return config


def read_vision_config(folder: str | Path) -> VisionConfig:
    """Read `vit_config.json`; layer -2 is selected, so the last layer of the file never runs.

    Raises:
        ValueError: file missing, not JSON, or a size absent.
    """
    path = Path(folder) / "vit_config.json"
    values = _read_json(path)
    if values.get("hidden_act", "gelu_pytorch_tanh") != "gelu_pytorch_tanh":
        raise ValueError(f"{path}: hidden_act {values['hidden_act']!r} is not supported")
    config = VisionConfig(
        hidden_size=_pick(values, "hidden_size", path),
        num_hidden_layers=_pick(values, "num_hidden_layers", path) - 1,
        num_attention_heads=_pick(values, "num_attention_heads", path),
        intermediate_size=_pick(values, "intermediate_size", path),
        patch_size=values.get("patch_size", 14),
        num_channels=values.get("num_channels", 3),
        layer_norm_eps=float(values.get("layer_norm_eps", 1e-6)),
    )
    if config.num_hidden_layers < 1 or config.hidden_size % config.num_attention_heads:
        raise ValueError(f"{path}: needs two layers or more and a width divisible by its heads")
    return config
