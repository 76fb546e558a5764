# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""One model over several GPUs, CPU memory and disk, for inference; accelerate moves the data.

The units are whole decoder layers and ViT layers. The rest (embeddings, position tables,
connector, norms, head) stays on the main device, that of the prompt and the logits: the first
GPU, or the CPU without one. A unit in CPU memory or on disk is copied to the main device for
each of its turns; "on disk" is the release's own file, so nothing is written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modeling.bagel.bagel import Bagel
from modeling.bagel.config import BagelConfig
from modeling.release.checkpoint import BagelBundle, load_bagel, locate_weights
from modeling.release.finite import check_finite
from modeling.release.weight_files import StoredTensor

Place = int | str  # a GPU's index, "cpu" or "disk"
_DECODER = "language_model.model.layers."
_VIT = "vit_model.vision_model.encoder.layers."


@dataclass(frozen=True)
class Placement:
    """Where each unit's weights are, and the main device, which holds and does everything else."""

    main: Place
    units: dict[str, Place]

    def place(self, key: str) -> Place:
        """Where the tensor `key` of the state dict is."""
        unit = next((name for name in self.units if key.startswith(name + ".")), None)
        return self.main if unit is None else self.units[unit]

    def device(self, unit: str) -> torch.device:
        """Where a unit computes."""
        place = self.units[unit]
        return to_device(place if isinstance(place, int) else self.main)

    def describe(self) -> str:
        """One line: how many layers are where."""
        where = {"cpu": "in CPU memory", "disk": "on disk"}
        parts = [f"main device {to_device(self.main)}"]
        for title, decoder in (("decoder", True), ("ViT", False)):
            places = [p for n, p in self.units.items() if n.startswith(_DECODER) == decoder]
            counted = [
                f"{n} {where.get(str(p), f'on cuda:{p}')}" for p, n in Counter(places).items()
            ]
            parts.append(f"{title} layers: {', '.join(counted)}")
        return "; ".join(parts)


def to_device(place: Place) -> torch.device:
    """accelerate's name of a device (0, "cpu") as torch's."""
    return torch.device("cuda", place) if isinstance(place, int) else torch.device(place)


# -- sizes ------------------------------------------------------------------------------------


def free_memory() -> dict[Place, int]:
    """Bytes free on each GPU (by index), and in host memory ("cpu")."""
    from accelerate.utils import get_max_memory

    found: dict[Place, int] = get_max_memory()
    # No "cpu" entry where GPU and host share one memory; macOS calls it "mps".
    host = found.get("cpu", found.get("mps", 0))
    return {p: size for p, size in found.items() if isinstance(p, int)} | {"cpu": host}


def _skeleton(config: BagelConfig, dtype: torch.dtype) -> Bagel:
    with torch.device("meta"):
        return Bagel(config).to(dtype)


def _bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def weight_bytes(config: BagelConfig, dtype: torch.dtype) -> int:
    """Bytes of all weights."""
    return _bytes(_skeleton(config, dtype))


def working_bytes(config: BagelConfig, rows: int, dtype: torch.dtype) -> int:
    """Bytes that answering takes beyond the weights, for `rows` of prompt and answer (estimate)."""
    llm = config.llm
    cache = 2 * llm.num_hidden_layers * llm.num_key_value_heads * llm.head_dim
    widest = 3 * llm.intermediate_size + 8 * llm.hidden_size  # inside a decoder layer
    return rows * (cache + widest) * dtype.itemsize + (512 << 20)


# -- placing ----------------------------------------------------------------------------------


def plan_placement(
    config: BagelConfig, dtype: torch.dtype, max_memory: Mapping[Place, int]
) -> Placement:
    """Fill the GPUs in order, then CPU memory, then leave the rest on disk.

    Args:
        max_memory: bytes of weights that each GPU (by index) and "cpu" may hold; devices that
            it does not name are not used.

    Raises:
        ValueError: the main device cannot hold its share and one layer.
    """
    from accelerate import infer_auto_device_map

    model = _skeleton(config, dtype)
    classes = Bagel.block_classes()
    sizes = {n: _bytes(m) for n, m in model.named_modules() if isinstance(m, classes)}
    shared = _bytes(model) - sum(sizes.values())
    main = min((place for place in max_memory if isinstance(place, int)), default="cpu")
    offered, layer = max_memory.get(main, 0), max(sizes.values())
    if offered < shared + layer:
        larger = " or let CUDA_VISIBLE_DEVICES begin with a larger GPU" * isinstance(main, int)
        raise ValueError(
            f"not enough memory: {to_device(main)} may hold {offered / 1e9:.3g} GB of weights, but "
            f"embeddings, tables and head ({shared / 1e9:.3g} GB) and one layer "
            f"({layer / 1e9:.3g} GB) must fit there. Free some, take half precision{larger}"
        )
    # What belongs to the main device is taken off its budget and out of the model to be spread.
    for key in [k for k, _ in model.named_parameters() if not _is_inside(k, sizes)]:
        owner, _, name = key.rpartition(".")
        delattr(model.get_submodule(owner), name)
    found = infer_auto_device_map(
        model,
        {**max_memory, main: offered - shared},
        no_split_module_classes=[c.__name__ for c in classes],
        clean_result=False,
    )
    # A parent that fits as a whole stands for its layers.
    return Placement(
        main, {u: next(p for n, p in found.items() if f"{u}.".startswith(f"{n}.")) for u in sizes}
    )


def _is_inside(key: str, units: Iterable[str]) -> bool:
    return any(key.startswith(unit + ".") for unit in units)


def load_bagel_spread(
    path: str | Path, *, dtype: torch.dtype, max_memory: Mapping[Place, int]
) -> tuple[BagelBundle, Placement]:
    """`load_bagel` for a model that no single device holds; prompts go to `placement.main`.

    `generate` works on the result as on any other model (its cache is made layer by layer where
    the layers compute). Only modules may be called, not used through their weights.

    Raises:
        ValueError: as `load_bagel` and `plan_placement`.
    """
    from accelerate import dispatch_model

    bundle = load_bagel(path, device="meta", dtype=dtype)  # keeps no weights
    model = bundle.model
    placement = plan_placement(bundle.config, dtype, max_memory)
    _, sources = locate_weights(path)
    on_disk: dict[str, dict[str, Any]] = {}
    state = {}
    for key, source in sources.items():
        place = placement.place(key)
        if place == "disk":
            assert isinstance(source, StoredTensor), key  # computed tables are no unit's
            on_disk[key] = {
                "safetensors_file": str(source.file),
                "weight_name": source.key,
                "dtype": str(dtype).removeprefix("torch."),
            }
        else:
            state[key] = source.get(to_device(place), dtype)
    stored = {key: source for key, source in sources.items() if isinstance(source, StoredTensor)}
    check_finite(state, stored)
    for key in on_disk:  # one at a time; every token reads them as well
        check_finite({key: sources[key].get()}, stored)
    absent = model.load_state_dict(state, strict=False, assign=True)
    assert set(absent.missing_keys) == set(on_disk) and not absent.unexpected_keys
    owners = {key.rpartition(".")[0]: placement.main for key in sources}
    others = {n: place for n, place in owners.items() if not _is_inside(n + ".", placement.units)}
    dispatch_model(
        model,
        {**placement.units, **others},
        main_device=placement.main,
        offload_index=on_disk or None,
    )
    for prefix, stack in (
        (_DECODER, model.language_model.model),
        (_VIT, model.vit_model.vision_model),
    ):
        units = [unit for unit in placement.units if unit.startswith(prefix)]
        stack.layer_devices = tuple(map(placement.device, units))
    return bundle, placement
