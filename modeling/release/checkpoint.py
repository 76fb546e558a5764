# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Read and write checkpoint folders in the layout of BAGEL-7B-MoT and ThinkMorph-7B.

A folder holds `model.safetensors` or `ema.safetensors` (the whole module, generation expert
included), `ae.safetensors`, `llm_config.json`, `vit_config.json` and the tokenizer. The module
class alone decides which of the file's tensors are read, so with `visual_gen=False` no
generation tensor is; saving streams those back from the base, and the result is complete.
"""

from __future__ import annotations

import math
import shutil
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modeling.autoencoder import AE_FILE, AutoEncoder, load_autoencoder
from modeling.bagel.bagel import Bagel
from modeling.bagel.config import (
    BagelConfig,
    SpecialTokens,
    check_sizes,
    read_llm_config,
    read_vision_config,
)
from modeling.bagel.projections import empty_adjoining
from modeling.host.disk import check_room, disk_errors, flush_to_disk
from modeling.release.cards import model_card
from modeling.release.finite import check_finite
from modeling.release.folders import drive_to_the_end, new_folder, write_text
from modeling.release.serving_config import serving_files
from modeling.release.tokenizer import load_tokenizer
from modeling.release.weight_files import (
    FLOAT_DTYPES,
    ComputedTensor,
    Layout,
    StoredTensor,
    TensorSource,
    WeightWriter,
    describe_mismatch,
    layout_bytes,
    open_weights,
    write_weights,
)

VIT_TABLE = "vit_pos_embed.pos_embed"
LATENT_TABLE = "latent_pos_embed.pos_embed"
_EMBEDDING = "language_model.model.embed_tokens.weight"
_PATCH_POSITIONS = "vit_model.vision_model.embeddings.position_embedding.weight"
_SQUARE_TABLES = (VIT_TABLE, _PATCH_POSITIONS, LATENT_TABLE)
_GENERATION_PREFIXES = ("time_embedder.", "vae2llm.", "llm2vae.", "latent_pos_embed.")
_LAYOUT = (
    "Layout: a BAGEL / ThinkMorph release folder. Tensors that training did not touch, the "
    "autoencoder, llm_config.json, vit_config.json and the tokenizer are byte for byte the base's."
)
_COPIED_FILES = (
    AE_FILE,
    "llm_config.json",
    "vit_config.json",
    "generation_config.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "NOTICE",
)


@dataclass
class BagelBundle:
    """What `load_bagel` returns; `vae` is None unless images are drawn."""

    model: Bagel
    tokenizer: Any
    special_tokens: SpecialTokens
    config: BagelConfig
    vae: AutoEncoder | None = None


def is_generation_key(key: str) -> bool:
    """Whether a release's tensor belongs to the drawing branch (unused with visual_gen=False)."""
    return "_moe_gen" in key or key.startswith(_GENERATION_PREFIXES)


# -- configuration and the match between file and module --------------------------------------


def _table_side(stored: StoredTensor) -> int:
    rows = stored.shape[0] if stored.shape else 0
    side = math.isqrt(rows)
    if not side or side * side != rows:
        raise ValueError(
            f"{stored.file}: {stored.key} has {rows} rows, not a square number; "
            "position tables cover a square grid, so this is no BAGEL checkpoint"
        )
    return side


def read_bagel_config(
    path: str | Path, stored: Mapping[str, StoredTensor], *, visual_gen: bool = False
) -> BagelConfig:
    """Sizes from llm_config.json and vit_config.json, table sides from the stored shapes.

    Raises:
        ValueError: a configuration is missing or malformed, a table is not square, or the
            vocabulary of llm_config.json is not that of the weights.
    """
    llm, vision = read_llm_config(path), read_vision_config(path)
    sides = {key: _table_side(stored[key]) for key in _SQUARE_TABLES if key in stored}
    embedding = stored[_EMBEDDING].shape if _EMBEDDING in stored else ()
    if embedding and embedding[0] != llm.vocab_size:
        raise ValueError(
            f"{path}: the embedding has {embedding[0]} rows but llm_config.json "
            f"says vocab_size {llm.vocab_size}; use the llm_config.json of the same release"
        )
    check_sizes(path, llm, vision, [tensor.shape for tensor in stored.values()])
    vit_side = sides.get(_PATCH_POSITIONS, sides.get(VIT_TABLE, 70))
    return BagelConfig(
        llm=llm,
        vision=vision,
        visual_gen=visual_gen,
        vit_max_patches_per_side=vit_side,
        max_latent_size=sides.get(LATENT_TABLE, 64),
    )


def _computed_tables(
    config: BagelConfig, stored: Mapping[str, StoredTensor]
) -> dict[str, ComputedTensor]:
    """Position tables (fp32) that the model has and the file lacks."""
    if VIT_TABLE in stored and (LATENT_TABLE in stored or not config.visual_gen):
        return {}
    tables = Bagel.fixed_tables(config)
    return {key: ComputedTensor(key, t) for key, t in tables.items() if key not in stored}


def locate_weights(
    path: str | Path, *, visual_gen: bool = False
) -> tuple[BagelConfig, dict[str, TensorSource]]:
    """Where each tensor of `Bagel(config)` comes from, in the module's order; reads no tensor.

    `source.get(device, dtype)` reads one. Position tables that the file lacks are computed.

    Raises:
        ValueError: everything `open_weights` raises, and one that names the missing,
            unexpected and mis-shaped tensors.
    """
    config, _, sources = _build(path, open_weights(path), visual_gen)
    return config, sources


def _build(
    path: str | Path, stored: Mapping[str, StoredTensor], visual_gen: bool
) -> tuple[BagelConfig, Bagel, dict[str, TensorSource]]:
    """Configuration, module without memory ("meta"), and what fills it, in the module's order."""
    config = read_bagel_config(path, stored, visual_gen=visual_gen)
    with torch.device("meta"):
        model = Bagel(config)
    expected = {key: value.shape for key, value in model.state_dict().items()}
    sources: dict[str, TensorSource] = {
        key: source
        for key, source in stored.items()
        if key in expected or visual_gen or not is_generation_key(key)
    }
    sources.update(_computed_tables(config, stored))
    problems = describe_mismatch(expected, sources)
    if problems:
        raise ValueError(
            f"the weights in {path} do not fit the model its configuration describes: {problems}. "
            + _likely_cause(expected.keys() - sources.keys())
        )
    return config, model, {key: sources[key] for key in expected}


def _likely_cause(missing: Set[str]) -> str:
    if missing and all(is_generation_key(key) for key in missing):
        return (
            "The file was saved without the drawing branch: load it with visual_gen=False, or "
            "save it again over a complete base"
        )
    return (
        "llm_config.json or vit_config.json (num_hidden_layers, sizes) belong to another model, or "
        "the weights were not saved as a release holds them (bare names, a head of their own, "
        "bf16 or fp32): use the release's own files, or save with save_bagel"
    )


# -- loading ----------------------------------------------------------------------------------


def iter_weights(path: str | Path, *, visual_gen: bool = False) -> Iterator[tuple[str, Tensor]]:
    """The model's tensors one by one, on the CPU in the stored dtype.

    Raises:
        ValueError: as `locate_weights`.
    """
    _, sources = locate_weights(path, visual_gen=visual_gen)
    for key, source in sources.items():
        yield key, source.get()


def load_bagel(
    path: str | Path,
    *,
    visual_gen: bool = False,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> BagelBundle:
    """Load a checkpoint folder to `device` and `dtype`, one tensor at a time.

    Args:
        path: folder with model.safetensors or, without it, ema.safetensors (or an index),
            llm_config.json, vit_config.json and the tokenizer files.
        visual_gen: also build and read the generation expert and the autoencoder (always fp32);
            otherwise nothing of them is read.
        device: where the parameters live.
        dtype: of all parameters, the fixed position tables included.

    Raises:
        ValueError: folder, file or configuration missing or damaged; tensors missing,
            unexpected or of another shape (all of them named), or with values that are NaN or
            infinite; a tokenizer with more tokens than the embedding has rows.

    Warns:
        UserWarning: `visual_gen=True` and no ae.safetensors; `vae` is None then.
    """
    device = torch.device(device)
    stored = open_weights(path)
    config, model, sources = _build(path, stored, visual_gen)
    tokenizer, special_tokens = load_tokenizer(path)
    if len(tokenizer) > config.llm.vocab_size:
        raise ValueError(
            f"{path}: the tokenizer has {len(tokenizer)} tokens but the embedding only "
            f"{config.llm.vocab_size} rows; use the tokenizer files of the same release"
        )
    state = _read(sources, device, dtype)
    check_finite(state, stored)
    model.load_state_dict(state, strict=True, assign=True)
    vae = _load_vae(Path(path), device) if visual_gen else None
    return BagelBundle(model, tokenizer, special_tokens, config, vae)


def _read(
    sources: Mapping[str, TensorSource], device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Every tensor; on a GPU, projections that read the same input lie side by side."""
    if device.type != "cuda":
        return {key: source.get(device, dtype) for key, source in sources.items()}
    state = empty_adjoining({k: source.shape for k, source in sources.items()}, dtype, device)
    for key, source in sources.items():
        state[key].copy_(source.get(device))
    return state


def _load_vae(path: Path, device: torch.device) -> AutoEncoder | None:
    if (path / AE_FILE).is_file():
        return load_autoencoder(path, device=device)
    warnings.warn(
        f"{path} lacks {AE_FILE}, so images can be neither encoded to latents nor drawn; "
        "copy it from the release",
        stacklevel=3,
    )
    return None


# -- saving -----------------------------------------------------------------------------------


def save_bagel(
    tensors: nn.Module | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    out_dir: str | Path | None,
    *,
    base: str | Path,
    step: int | None = None,
    run_config: Mapping[str, Any] | None = None,
    notes: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> Path | None:
    """Write a complete release folder: `tensors` over the base checkpoint they were trained from.

    Every tensor gets the base's dtype and shape; those not given are copied from the base as
    bytes, as are the autoencoder, the configurations and the tokenizer; only a config.json or
    preprocessor_config.json that is absent or contradicts the weights is written anew
    (`modeling.release.serving_config`). The output is always one `model.safetensors`. Both
    position tables are written (the latent one if the base has a generation branch). Written
    under `out_dir` + ".tmp", flushed, then renamed. Memory beyond the caller's tensor stays near
    16 MiB.

    Args:
        tensors: a module, or (release key, full tensor) pairs in any order, on any device. When
            the iterable runs collectives, ranks other than 0 pass `out_dir=None` and only drive
            it; on an error rank 0 drives it to its end too before raising.
        out_dir: folder to create, or None.
        base: checkpoint folder the tensors belong to.
        step, run_config: recorded in the model card (README.md).
        notes: further text files, by name.
        overwrite: replace an existing `out_dir` (only once the new one is complete).

    Returns:
        The folder written, or None.

    Raises:
        ValueError: `out_dir` exists, the base is incomplete, the disk is too full or refuses, or
            a tensor is unknown, repeated or of another shape. No partial folder is left.

    Warns:
        UserWarning: the base lacks what VLMEvalKit's ThinkMorph wrapper needs.
    """
    if isinstance(tensors, nn.Module):
        tensors = tensors.state_dict()
    items = iter(tensors.items() if isinstance(tensors, Mapping) else tensors)
    with drive_to_the_end(items):
        if out_dir is None:
            return None
        card = model_card(
            Path(base), title="Trained from", facts=[_LAYOUT], step=step, run_config=run_config
        )
        with disk_errors(f"writing {out_dir}", Path(out_dir).parent):
            texts = {"README.md": card, **(notes or {})}
            return _write_folder(items, Path(out_dir), Path(base), texts, overwrite)


def _write_folder(
    items: Iterator[tuple[str, Tensor]],
    out_dir: Path,
    base: Path,
    texts: Mapping[str, str],
    overwrite: bool,
) -> Path:
    with new_folder(out_dir, overwrite=overwrite) as folder:
        stored = open_weights(base)
        config, layout, tables = _layout(base, stored)
        copied = [base / name for name in _COPIED_FILES if (base / name).is_file()]
        serving = serving_files(base, config)
        _warn_if_incomplete(base, stored)
        size = layout_bytes(layout) + sum(file.stat().st_size for file in copied)
        check_room(out_dir.parent, size, str(out_dir))
        with write_weights(folder / "model.safetensors", layout) as writer:
            _write_tensors(writer, items, stored, tables)
        for file in copied:
            shutil.copyfile(file, folder / file.name)
            flush_to_disk(folder / file.name)
        for made in serving:
            (folder / made.name).write_bytes(made.content)
            flush_to_disk(folder / made.name)
        for name, text in texts.items():
            write_text(folder / name, text)
    return out_dir


def _layout(
    base: Path, stored: Mapping[str, StoredTensor]
) -> tuple[BagelConfig, Layout, dict[str, ComputedTensor]]:
    """Configuration, the output's tensors in file order (base's, then tables it lacks), tables."""
    odd = [f"{key} ({s.dtype})" for key, s in stored.items() if s.dtype not in FLOAT_DTYPES]
    if odd or not stored:
        raise ValueError(
            f"the base {base} must hold floating-point weights, found {odd[:20] or 'none'}; "
            "use the release's own files"
        )
    draws = any(is_generation_key(key) for key in stored)
    config = read_bagel_config(base, stored, visual_gen=draws)
    tables = _computed_tables(config, stored)
    usual = Counter(source.dtype for source in stored.values()).most_common(1)[0][0]
    layout = {key: (source.dtype, source.shape) for key, source in stored.items()}
    layout.update({key: (usual, table.shape) for key, table in tables.items()})
    return config, layout, tables


def _write_tensors(
    writer: WeightWriter,
    items: Iterator[tuple[str, Tensor]],
    stored: Mapping[str, StoredTensor],
    tables: Mapping[str, ComputedTensor],
) -> None:
    for key, tensor in items:
        if key not in writer.layout:
            raise ValueError(
                f"save_bagel: the base has no tensor {key!r}; names must be the release's, "
                "without prefixes of wrappers (module., _orig_mod., _checkpoint_wrapped_module.)"
            )
        if hasattr(tensor, "full_tensor"):
            raise ValueError(f"save_bagel: {key!r} is a sharded tensor; pass its full_tensor()")
        writer.write(key, tensor)
        del tensor  # before the next one is gathered
    for key in writer.missing:
        if key in stored:
            writer.copy(stored[key])
        else:
            writer.write(key, tables[key].value)


def _warn_if_incomplete(base: Path, stored: Mapping[str, StoredTensor]) -> None:
    lacking = [
        name for name in (AE_FILE, "vocab.json", "merges.txt") if not (base / name).is_file()
    ]
    if not any(is_generation_key(key) for key in stored):
        lacking.insert(0, "the generation weights (*_moe_gen and the VAE connectors)")
    if lacking:
        warnings.warn(
            f"the base {base} lacks {', '.join(lacking)}, so the saved folder lacks them too: it "
            "trains and answers here, but VLMEvalKit's ThinkMorph wrapper needs them to load it",
            stacklevel=4,
        )
