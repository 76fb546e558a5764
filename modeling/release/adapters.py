# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Adapters in the format of the peft package, and merging one into a release folder.

A folder holds `adapter_config.json` and `adapter_model.safetensors` with two tensors a layer,
"base_model.model.PATH.lora_A.weight" (rank, in) and "....lora_B.weight" (out, rank).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modeling.bagel.adapters import AdapterConfig
from modeling.bagel.bagel import Bagel
from modeling.host.disk import check_room, disk_errors
from modeling.host.programs import bounds_problem
from modeling.host.text_files import read_json_object
from modeling.release.cards import model_card, recorded_step
from modeling.release.checkpoint import is_generation_key, read_bagel_config, save_bagel
from modeling.release.finite import check_finite, find_nonfinite
from modeling.release.folders import drive_to_the_end, new_folder, write_text
from modeling.release.weight_files import (
    FLOAT_DTYPES,
    Layout,
    StoredTensor,
    layout_bytes,
    open_weights,
    read_file,
    write_weights,
)

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PAIR = re.compile(rf"{re.escape(_PREFIX)}([\w.]+)\.lora_([AB])\.weight")
_MOST_ROWS = 2**16  # a rank beyond this is a slip
_SHOWN = 5  # names in an error
# What peft's other settings say about training, loading or what the tensors' names say too.
# Any further one that is set may change the product; `_refuse_other_methods` names it.
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config",
    "megatron_config", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r",
    "revision", "runtime_config", "target_modules", "task_type", "use_rslora", "velora_config",
}  # fmt: skip
# Ways to begin that leave the base's weights alone.
_BEGINNINGS = (None, True, False, "gaussian", "eva", "orthogonal")


# -- saving -----------------------------------------------------------------------------------


def save_adapter(
    tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    out_dir: str | Path | None,
    *,
    base: str | Path,
    config: AdapterConfig,
    step: int | None = None,
    run_config: Mapping[str, Any] | None = None,
    notes: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> Path | None:
    """Write an adapter in peft's format, in fp32, as `save_bagel` writes a release folder.

    Args:
        tensors: (key, full tensor) pairs in any order, on any device: "PATH.lora_A.weight"
            (rank, in) and "PATH.lora_B.weight" (out, rank) for each of `config.modules`. Ranks
            other than 0 pass `out_dir=None` and only drive the iterable.
        out_dir: folder to create, or None.
        base: release folder the adapter belongs to; of its weights only headers are read.
        config: scale and layers.
        step, run_config: recorded in the model card (README.md).
        notes: further text files, by name.
        overwrite: replace an existing `out_dir` (only once the new one is complete).

    Returns:
        The folder written, or None.

    Raises:
        ValueError: `out_dir` exists, the disk is too full or refuses, `base` lacks one of the
            layers, or a tensor is missing, unknown, repeated or of another shape. No partial
            folder is left.
    """
    items = iter(tensors.items() if isinstance(tensors, Mapping) else tensors)
    with drive_to_the_end(items):
        if out_dir is None:
            return None
        base, out_dir = Path(base), Path(out_dir)
        card = model_card(
            base,
            title="Adapter of",
            facts=[
                f"Rank {config.rank}, alpha {config.alpha:g}, {len(config.modules)} linear layers",
                f"Layout: that of the peft package ({CONFIG_FILE}, {WEIGHTS_FILE}).",
            ],
            step=step,
            run_config=run_config,
            header={"library_name": "peft"},
        )
        with (
            disk_errors(f"writing {out_dir}", out_dir.parent),
            new_folder(out_dir, overwrite=overwrite) as folder,
        ):
            layout = _layout(base, config)
            check_room(out_dir.parent, layout_bytes(layout), str(out_dir))
            _write_tensors(folder / WEIGHTS_FILE, items, layout)
            settings = json.dumps(_peft_settings(base, config), indent=2, sort_keys=True)
            write_text(folder / CONFIG_FILE, settings + "\n")
            for name, text in {"README.md": card, **(notes or {})}.items():
                write_text(folder / name, text)
        return out_dir


def _peft_settings(base: Path, config: AdapterConfig) -> dict[str, Any]:
    """Fields of peft's LoraConfig, those that its versions since use_dora (0.9) all know."""
    alpha = int(config.alpha) if float(config.alpha).is_integer() else config.alpha
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base.resolve().name,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": alpha,
        # Whole paths: a bare "q_proj" would also be found in the ViT and the generation expert.
        "target_modules": sorted(config.modules),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": False,
    }


def _layout(base: Path, config: AdapterConfig) -> Layout:
    layout = {}
    for module, (wide, narrow) in _layer_shapes(base, open_weights(base), config.modules).items():
        layout[f"{_PREFIX}{module}.lora_A.weight"] = ("F32", (config.rank, narrow))
        layout[f"{_PREFIX}{module}.lora_B.weight"] = ("F32", (wide, config.rank))
    return layout


def _layer_shapes(
    base: Path, stored: Mapping[str, StoredTensor], modules: Iterable[str]
) -> dict[str, tuple[int, int]]:
    """(out, in) of linear layers of a release.

    Raises:
        ValueError: names those that it lacks.
    """
    draws = any(is_generation_key(key) for key in stored)
    with torch.device("meta"):
        model = Bagel(read_bagel_config(base, stored, visual_gen=draws))
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    modules = list(modules)
    unknown = [m for m in modules if m not in linear or f"{m}.weight" not in stored]
    if unknown:
        raise ValueError(
            f"{base} has no linear layer for {len(unknown)} of the {len(modules)} adapters: "
            f"{_named(unknown)}; give the base that the adapter was trained on"
        )
    shapes = {module: stored[f"{module}.weight"].shape for module in modules}
    return {module: (shape[0], shape[1]) for module, shape in shapes.items()}


def _write_tensors(file: Path, items: Iterator[tuple[str, Tensor]], layout: Layout) -> None:
    with write_weights(file, layout) as writer:
        for key, tensor in items:
            if _PREFIX + key not in layout:
                raise ValueError(f"save_adapter: {key!r} belongs to no layer of the configuration")
            if hasattr(tensor, "full_tensor"):
                raise ValueError(f"save_adapter: {key!r} is sharded; pass its full_tensor()")
            writer.write(_PREFIX + key, tensor)
            del tensor  # before the next one is gathered
        if writer.missing:
            missing = [key.removeprefix(_PREFIX) for key in writer.missing]
            raise ValueError(f"save_adapter: {_named(missing)} not given")


def _named(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + f" and {len(names) - _SHOWN} more" * (len(names) > _SHOWN)


# -- reading ----------------------------------------------------------------------------------


def read_adapter(folder: str | Path) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """An adapter that `save_adapter` or the peft package wrote.

    Returns:
        Scale and layers (those whose tensors are there, whatever way of naming them
        target_modules has; alpha is alpha * sqrt(rank) with use_rslora, so that the scale is
        alpha / sqrt(rank)), and the tensors as `save_adapter` takes them, fp32 on the CPU.

    Raises:
        ValueError: folder or file missing or damaged; another method than plain LoRA on linear
            layers; tensors without partner, of another rank, or with NaN or infinity.
    """
    folder = Path(folder)
    rank, alpha = _read_settings(folder)
    if not (folder / WEIGHTS_FILE).is_file() and (folder / "adapter_model.bin").is_file():
        raise ValueError(
            f"{folder} holds its tensors in adapter_model.bin, which can run code when it is "
            f"opened; save it with peft's safe_serialization=True, as {WEIGHTS_FILE}"
        )
    stored = read_file(folder / WEIGHTS_FILE)
    modules = _paired_modules(folder / WEIGHTS_FILE, stored, rank)
    tensors = {key: source.get(dtype=torch.float32) for key, source in stored.items()}
    check_finite(tensors, stored)
    return (
        AdapterConfig(rank, alpha, modules),
        {key.removeprefix(_PREFIX): tensor for key, tensor in tensors.items()},
    )


def _read_settings(folder: Path) -> tuple[int, float]:
    """Rank and alpha."""
    file = folder / CONFIG_FILE
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; give that of an adapter")
    if not file.is_file():
        release = (folder / "llm_config.json").is_file()
        hint = "it is a release folder; ADAPTER comes before BASE" if release else "it holds none"
        raise ValueError(f"{folder} has no adapter ({CONFIG_FILE} is missing): {hint}")
    settings = read_json_object(file, "adapter configuration", fix="save the adapter again")
    _refuse_other_methods(file, settings)
    rank = _number(file, settings, "r", int, at_least=1, at_most=_MOST_ROWS)
    alpha = _number(file, settings, "lora_alpha", float, at_least=-1e9, at_most=1e9)
    return rank, float(alpha) * (math.sqrt(rank) if settings.get("use_rslora") else 1)


def _number(
    file: Path,
    settings: Mapping[str, Any],
    name: str,
    kind: type[int] | type[float],
    **bounds: float,
) -> Any:
    """A whole number, or (float) any number, within bounds (those of `bounds_problem`)."""
    value = settings.get(name)
    if not isinstance(value, (int, kind)) or isinstance(value, bool):
        wanted = "a whole number" if kind is int else "a number"
        raise ValueError(f"{file}: {name} must be {wanted}, got {json.dumps(value)[:80]}")
    if problem := bounds_problem(value, **bounds):
        raise ValueError(f"{file}: {name} {problem}")
    return value


def _refuse_other_methods(file: Path, settings: Mapping[str, Any]) -> None:
    if settings.get("peft_type") != "LORA":
        raise ValueError(
            f"{file}: peft_type is {json.dumps(settings.get('peft_type'))[:80]}, which is not "
            "supported; only LORA is"
        )
    odd = [json.dumps({name: value})[1:-1][:100] for name, value in settings.items()
           if name not in _HARMLESS and value and value != "none"]  # fmt: skip
    beginning = settings.get("init_lora_weights")
    if beginning not in _BEGINNINGS:
        odd.append(f'"init_lora_weights": {json.dumps(beginning)[:80]} (it changes the base)')
    if odd:
        raise ValueError(
            f"{file} asks for {_named(odd)}, which is not supported: only plain LoRA of one rank "
            "on linear layers is; merge it with the peft package"
        )


def _paired_modules(file: Path, stored: Mapping[str, StoredTensor], rank: int) -> tuple[str, ...]:
    """Layers of an adapter file, in its order."""
    found: dict[str, dict[str, StoredTensor]] = {}
    odd = []
    for key, tensor in stored.items():
        match = _PAIR.fullmatch(key)
        if match is None or tensor.dtype not in FLOAT_DTYPES:
            odd.append(f"{key[:200]!r} ({tensor.dtype})")
        else:
            found.setdefault(match[1], {})[match[2]] = tensor
    if odd or not found:
        raise ValueError(
            f"{file} must hold {_PREFIX}PATH.lora_A.weight and lora_B.weight in floating point, "
            f"found {_named(odd) or 'none'}; only plain LoRA on linear layers is supported"
        )
    alone = [f"{name}.lora_{which}" for name, pair in found.items() for which in pair
             if len(pair) == 1]  # fmt: skip
    if alone:
        raise ValueError(f"{file}: {_named(alone)} without the other of A and B; save it again")
    wrong = [
        f"{name}: A {list(pair['A'].shape)}, B {list(pair['B'].shape)}"
        for name, pair in found.items()
        if not (len(pair["A"].shape) == len(pair["B"].shape) == 2)
        or pair["A"].shape[0] != rank
        or pair["B"].shape[1] != rank
    ]
    if wrong:
        raise ValueError(
            f"{file}: A must be [{rank}, in] and B [out, {rank}], as r of {CONFIG_FILE} says, "
            f"but {_named(wrong)}"
        )
    return tuple(found)


# -- merging ----------------------------------------------------------------------------------


def merge_adapter(
    adapter: str | Path,
    base: str | Path,
    out: str | Path,
    *,
    overwrite: bool = False,
    device: torch.device | str = "cpu",
) -> Path:
    """Write the release folder of a base with an adapter's products added to its weights.

    Each weight is W + scale * B A, in fp32 (fp64 where the base is), rounded once to the base's
    dtype. Memory: the adapter and one such weight. Everything else is as `save_bagel` writes it.

    Args:
        adapter: folder that `read_adapter` reads.
        base: release folder that it was trained on.
        out: folder to create.
        overwrite: replace an existing `out` (only once the new one is complete).
        device: where products are formed.

    Raises:
        ValueError: as `read_adapter` and `save_bagel`; the base lacks a layer or has one of
            another shape; a merged weight is not finite; `out` would replace adapter or base.
    """
    adapter, base, out = Path(adapter), Path(base), Path(out)
    config, tensors = read_adapter(adapter)
    for folder in (adapter, base):
        if overwrite and folder.resolve().is_relative_to(out.resolve()):
            raise ValueError(f"{out} holds what is to be merged ({folder}); choose another folder")
    stored = open_weights(base)
    wrong = []
    for module, shape in _layer_shapes(base, stored, config.modules).items():
        here = len(tensors[f"{module}.lora_B.weight"]), tensors[f"{module}.lora_A.weight"].shape[1]
        if here != shape:
            wrong.append(f"{module}: {list(here)}, in the base {list(shape)}")
    if wrong:
        raise ValueError(
            f"{len(wrong)} of the {len(config.modules)} products of {adapter} have another shape "
            f"than the weights of {base}: {_named(wrong)}; give the base it was trained on"
        )
    merged = {
        "name": adapter.resolve().name,
        "rank": config.rank,
        "alpha": config.alpha,
        "modules": list(config.modules),
    }
    written = save_bagel(
        _merged_weights(config, tensors, stored, device),
        out,
        base=base,
        step=recorded_step(adapter),
        run_config={"merged_adapter": merged},
        overwrite=overwrite,
    )
    assert written is not None
    return written


def _merged_weights(
    config: AdapterConfig,
    tensors: Mapping[str, Tensor],
    stored: Mapping[str, StoredTensor],
    device: torch.device | str,
) -> Iterator[tuple[str, Tensor]]:
    for module in config.modules:
        key = f"{module}.weight"
        dtype = torch.promote_types(FLOAT_DTYPES[stored[key].dtype], torch.float32)
        weight = stored[key].get(device, dtype)
        a, b = (tensors[f"{module}.lora_{which}.weight"].to(weight) for which in "AB")
        weight.addmm_(b, a, alpha=config.scale)
        if find_nonfinite({key: weight}):
            raise ValueError(
                f"{key} holds NaN or infinity once {stored[key].file} and the adapter are added; "
                "use an earlier checkpoint"
            )
        yield key, weight
