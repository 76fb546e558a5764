# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""config.json and preprocessor_config.json of a release folder: what serving code reads.

Neither our loader nor VLMEvalKit's wrapper reads them. vLLM, vllm-omni and NeMo do, and what they
read there must be true of the weights: without `qk_norm`, for one, vLLM builds plain Qwen2 layers.
A folder's own file is kept byte for byte if it agrees with ours in every field that changes what
such a program computes; otherwise ours, made from llm_config.json, vit_config.json and the sides of
the position tables, takes its place.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from modeling.bagel.config import BagelConfig, LLMConfig, VisionConfig
from modeling.host.text_files import read_json_object

SERVING_FILES = ("config.json", "preprocessor_config.json")
_ARCHITECTURE = "BagelForConditionalGeneration"
_LATENT_DOWNSAMPLE = 8  # pixels a side that the autoencoder makes one latent of
# Fields that change what is computed, per part of config.json; timestep_shift is free, since
# every sampler is told its own.
_LLM_FIELDS = (
    *(field.name for field in fields(LLMConfig)),
    "model_type", "qk_norm", "tie_word_embeddings", "layer_module", "hidden_act", "head_dim",
    "rope_parameters", "rope_scaling", "use_sliding_window", "layer_types",
)  # fmt: skip
_VISION_FIELDS = (
    *(field.name for field in fields(VisionConfig)), "image_size", "model_type", "hidden_act",
)  # fmt: skip
_TOP_FIELDS = (
    "model_type", "architectures", "auto_map", "visual_gen", "visual_und", "latent_patch_size",
    "max_latent_size", "vit_max_num_patch_per_side", "connector_act", "interpolate_pos",
)  # fmt: skip
# What SiglipVisionConfig and SiglipImageProcessor take for a field that a file leaves out.
_VISION_DEFAULTS = {
    "model_type": "siglip_vision_model",
    "num_channels": 3,
    "layer_norm_eps": 1e-6,
    "hidden_act": "gelu_pytorch_tanh",
}
_IMAGE_DEFAULTS: dict[str, Any] = {
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "resample": 3,  # bicubic, as PIL numbers it
    "rescale_factor": 1 / 255,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
_Difference = Callable[[Mapping[str, Any], Mapping[str, Any]], str | None]


@dataclass(frozen=True)
class ServingFile:
    """One of `SERVING_FILES` as a folder should hold it."""

    name: str
    content: bytes
    problem: str | None  # why the folder's own will not do; None: `content` is its bytes


def build_config(folder: str | Path, config: BagelConfig) -> dict[str, Any]:
    """The value of config.json.

    Args:
        folder: where llm_config.json and vit_config.json are; all their fields are taken over.
        config: of the same folder (`modeling.release.checkpoint.read_bagel_config`), with
            `visual_gen` saying whether the weights hold the drawing branch.

    Raises:
        ValueError: one of the two files is missing or no JSON object.
    """
    return {
        "architectures": [_ARCHITECTURE],
        "model_type": "bagel",
        "llm_config": _llm_part(Path(folder), config.llm),
        "vit_config": _vision_part(Path(folder), config),
        "vae_config": {"z_channels": config.latent_channels, "downsample": _LATENT_DOWNSAMPLE},
        "visual_gen": config.visual_gen,
        "visual_und": True,
        "latent_patch_size": config.latent_patch_size,
        "max_latent_size": config.max_latent_size,
        "vit_max_num_patch_per_side": config.vit_max_patches_per_side,
        "connector_act": "gelu_pytorch_tanh",
        "interpolate_pos": config.interpolate_positions,
        "timestep_shift": 1.0,
    }


def build_preprocessor_config(config: BagelConfig) -> dict[str, Any]:
    """The value of preprocessor_config.json: SigLIP's processor at the size of the ViT's table."""
    side = _image_side(config)
    return {
        "image_processor_type": "SiglipImageProcessor",
        "size": {"height": side, "width": side},
        **_IMAGE_DEFAULTS,
    }


def serving_files(folder: str | Path, config: BagelConfig) -> list[ServingFile]:
    """Both files: the folder's own where it will do, else ours. Arguments as `build_config`."""
    config_json, preprocessor = SERVING_FILES
    wanted = build_config(folder, config)
    wanted_images = build_preprocessor_config(config)
    return [
        _choose(Path(folder) / config_json, wanted, _config_difference),
        _choose(Path(folder) / preprocessor, wanted_images, _preprocessor_difference),
    ]


# -- ours -------------------------------------------------------------------------------------


def _image_side(config: BagelConfig) -> int:
    return config.vit_max_patches_per_side * config.vision.patch_size


def _llm_part(folder: Path, llm: LLMConfig) -> dict[str, Any]:
    file = _fields_of(folder / "llm_config.json")
    # What the file leaves out is said, because Qwen2Config's defaults are not always ours.
    said = {*file, *(file.get("rope_parameters") or {})}
    used = {field.name: getattr(llm, field.name) for field in fields(llm)}
    return {
        **file,
        **{name: value for name, value in used.items() if name not in said},
        "model_type": "qwen2",
        "qk_norm": True,
        "tie_word_embeddings": False,
        "layer_module": "Qwen2MoTDecoderLayer",
    }


def _vision_part(folder: Path, config: BagelConfig) -> dict[str, Any]:
    # The file counts the last layer too, which never runs: loaders take one off by themselves.
    return {
        **_fields_of(folder / "vit_config.json"),
        "patch_size": config.vision.patch_size,  # absent it is 14 here, 16 in SiglipVisionConfig
        "image_size": _image_side(config),  # loaders size the position table by it
        "model_type": "siglip_vision_model",
        "num_channels": config.vision.num_channels,
    }


def _fields_of(file: Path) -> dict[str, Any]:
    value = read_json_object(file, "model configuration", fix="download it again")
    value.pop("auto_map", None)  # it names Python files, which a release does not hold
    return value


# -- the folder's own -------------------------------------------------------------------------


def _choose(file: Path, wanted: Mapping[str, Any], difference: _Difference) -> ServingFile:
    problem: str | None = "it was missing"
    if file.is_file():
        content = file.read_bytes()
        try:  # as serving code reads it, so a byte order mark will not do
            found = json.loads(content.decode("utf-8"))
            is_object = isinstance(found, dict)
            problem = difference(found, wanted) if is_object else "it was no JSON object"
        except (ValueError, RecursionError) as error:
            problem = f"it was no JSON: {' '.join(str(error).split())}"
        if problem is None:
            return ServingFile(file.name, content, None)
    text = json.dumps(wanted, indent=2, ensure_ascii=False) + "\n"
    return ServingFile(file.name, text.encode("utf-8"), problem)


def _config_difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    """The first field of config.json that would mislead a loader, or None."""
    llm, vision, vae = (_part(found, name) for name in ("llm_config", "vit_config", "vae_config"))
    return (
        _difference("", found, wanted, _TOP_FIELDS)
        or _difference("llm_config.", llm, wanted["llm_config"], _LLM_FIELDS)
        or _difference(
            "vit_config.",
            {**_VISION_DEFAULTS, **vision},
            {**_VISION_DEFAULTS, **wanted["vit_config"]},
            _VISION_FIELDS,
        )
        or _difference("vae_config.", vae, wanted["vae_config"], wanted["vae_config"])
    )


def _part(found: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = found.get(name)
    return part if isinstance(part, dict) else {}


def _preprocessor_difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    if found.get("image_processor_type") == "SiglipImageProcessorFast":  # the same, by torchvision
        found = {**found, "image_processor_type": wanted["image_processor_type"]}
    return _difference("", {**_IMAGE_DEFAULTS, **found}, wanted, wanted)


def _difference(
    prefix: str, found: Mapping[str, Any], wanted: Mapping[str, Any], names: Iterable[str]
) -> str | None:
    for name in names:
        if found.get(name) != wanted.get(name):
            shown = json.dumps(found.get(name))
            shown = shown if len(shown) < 80 else shown[:80] + " ..."
            return f"{prefix}{name} was {shown}, not {json.dumps(wanted.get(name))}"
    return None
