# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Sizes of the unified model, read from a release's llm_config.json and vit_config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modeling.host.text_files import read_json_object


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

    @property
    def latent_dim(self) -> int:
        """Numbers of a latent token."""
        return self.latent_patch_size**2 * self.latent_channels


_LARGEST_SIZE = 2**31 - 1
# Settings that would change every answer, and what this model does: the only value it takes.
_FIXED_LLM: dict[str, Any] = {
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "qk_norm": True,
    "partial_rotary_factor": 1,
}
_FIXED_VISION: dict[str, Any] = {
    "hidden_act": "gelu_pytorch_tanh",
    "rope": False,
}


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(
            f"{path} is missing: a checkpoint folder needs llm_config.json and vit_config.json "
            "beside its weights (python download_model.py fetches a complete one)"
        )
    return read_json_object(path, "model configuration", fix="download it again")


class _Values:
    """The values of a configuration file, each checked when it is asked for."""

    def __init__(self, path: Path, fixed: Mapping[str, Any]) -> None:
        self.path, self.values = path, _read_json(path)
        for key, known in fixed.items():
            value = self.values.get(key)
            if value is not None and value != known:
                raise self.refuse(key, value, f"only {json.dumps(known)} is supported")

    def refuse(self, key: str, value: Any, why: str) -> ValueError:
        try:
            shown = json.dumps(value)
        except RecursionError:
            shown = f"a {type(value).__name__} nested deep"
        shown = shown if len(shown) < 80 else shown[:80] + " ..."
        return ValueError(f"{self.path}: {key} is {shown}: {why}; use the release's own file")

    def size(self, key: str, default: int | None = None) -> int:
        """A positive whole number."""
        value = self.values.get(key, default)
        if value is None:
            raise ValueError(
                f"{self.path} lacks {key!r}; is it the configuration of a BAGEL release?"
            )
        if type(value) is not int or not 0 < value <= _LARGEST_SIZE:
            raise self.refuse(key, value, f"it must be a whole number from 1 to {_LARGEST_SIZE}")
        return value

    def number(self, key: str, value: Any, low: float, high: float) -> float:
        """A number inside (low, high)."""
        if type(value) not in (int, float) or not low < value < high:
            raise self.refuse(key, value, f"it must be a number between {low:g} and {high:g}")
        return float(value)


def _check_rope(config: _Values) -> float:
    """The base of the rotary frequencies; scaled ones are refused."""
    theta: Any = 1e6
    for key in ("rope_parameters", "rope_scaling"):  # transformers 5, and before
        value = config.values.get(key)
        if value is None:
            continue
        if not isinstance(value, dict):
            raise config.refuse(key, value, "it must be null or an object")
        kind = value.get("rope_type", value.get("type", "default"))
        if kind != "default" or set(value) - {"rope_type", "type", "rope_theta", "factor"}:
            raise config.refuse(
                key, value, "scaled rotary positions are not supported, only null or the default"
            )
        theta = value.get("rope_theta", theta)
    return config.number("rope_theta", config.values.get("rope_theta", theta), 1, 1e30)


def read_llm_config(folder: str | Path) -> LLMConfig:
    """Read `llm_config.json` (a Qwen2 configuration).

    Raises:
        ValueError: file missing or no JSON object; a size absent, no positive whole number or
            inconsistent; a setting the model does not have (scaled rotary positions, tied
            embeddings, sliding windows). One line with file and key.
    """
    path = Path(folder) / "llm_config.json"
    values = _Values(path, _FIXED_LLM)
    heads = values.size("num_attention_heads")
    config = LLMConfig(
        hidden_size=values.size("hidden_size"),
        num_hidden_layers=values.size("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=values.size("num_key_value_heads", heads),
        intermediate_size=values.size("intermediate_size"),
        vocab_size=values.size("vocab_size"),
        rope_theta=_check_rope(values),
        rms_norm_eps=values.number("rms_norm_eps", values.values.get("rms_norm_eps", 1e-6), 0, 1),
        max_position_embeddings=values.size("max_position_embeddings", 32768),
    )
    if config.hidden_size % heads or heads % config.num_key_value_heads or config.head_dim % 2:
        raise ValueError(
            f"{path}: hidden_size {config.hidden_size}, {heads} heads and "
            f"{config.num_key_value_heads} key/value heads do not divide evenly"
        )
    kinds = values.values.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise values.refuse("layer_types", kinds, "every layer must be full_attention")
    if values.values.get("head_dim") not in (None, config.head_dim):
        head_dim = values.values["head_dim"]
        raise values.refuse("head_dim", head_dim, f"hidden_size / heads is {config.head_dim}")
    return config


def read_vision_config(folder: str | Path) -> VisionConfig:
    """Read `vit_config.json`; layer -2 is selected, so the last layer of the file never runs.

    Raises:
        ValueError: as `read_llm_config`.
    """
    path = Path(folder) / "vit_config.json"
    values = _Values(path, _FIXED_VISION)
    config = VisionConfig(
        hidden_size=values.size("hidden_size"),
        num_hidden_layers=values.size("num_hidden_layers") - 1,
        num_attention_heads=values.size("num_attention_heads"),
        intermediate_size=values.size("intermediate_size"),
        patch_size=values.size("patch_size", 14),
        num_channels=values.size("num_channels", 3),
        layer_norm_eps=values.number(
            "layer_norm_eps", values.values.get("layer_norm_eps", 1e-6), 0, 1
        ),
    )
    if config.num_hidden_layers < 1 or config.hidden_size % config.num_attention_heads:
        raise ValueError(f"{path}: needs two layers or more and a width divisible by its heads")
    return config


def check_sizes(
    folder: str | Path, llm: LLMConfig, vision: VisionConfig, shapes: Sequence[tuple[int, ...]]
) -> None:
    """Find sizes that tensors of these shapes cannot hold, before a module of that size is built.

    Raises:
        ValueError: a width longer than any side, or more layers than there are tensors.
    """
    longest = max((side for shape in shapes for side in shape), default=0)
    for name, config, widths in (
        ("llm_config.json", llm, ("hidden_size", "intermediate_size", "vocab_size")),
        ("vit_config.json", vision, ("hidden_size", "intermediate_size", "patch_dim")),
    ):
        limits = {**dict.fromkeys(widths, longest), "num_hidden_layers": len(shapes)}
        for key, limit in limits.items():
            if getattr(config, key) > limit:
                raise ValueError(
                    f"{Path(folder) / name}: {key} {getattr(config, key)} is more than the weights "
                    f"hold ({len(shapes)} tensors, none with a side longer than {longest}); use "
                    f"the {name} of the same release"
                )
