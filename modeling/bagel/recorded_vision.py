# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The ViT as a CUDA graph for images of a size that comes again.

One image keeps a GPU busy for less time than Python needs to launch the ViT's kernels. A size is
run plainly the first time, recorded the second and replayed from then on.
"""

from __future__ import annotations

from collections import OrderedDict
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from modeling import fast
from modeling.bagel.attention import may_be_recorded
from modeling.bagel.vision import VisionModel
from modeling.graphs import RepeatedStep

# Sizes remembered, and patches beyond which a GPU is kept busy anyway.
_SIZES, _MOST_PATCHES = 8, 8192


class _Recording:
    def __init__(self, vit: VisionModel, patches: Tensor, positions: Tensor, lens: tuple[int, ...]):
        self.patches, self.positions = patches.clone(), positions.clone()
        out: list[Tensor] = []

        def step() -> None:
            features = vit(self.patches, self.positions, lens)
            if not out:
                out.append(features.clone())
            out[0].copy_(features)

        self.step, self.out = RepeatedStep(step, patches.device), out
        self.step()

    def __call__(self, patches: Tensor, positions: Tensor) -> Tensor:
        self.patches.copy_(patches)
        self.positions.copy_(positions)
        self.step()
        return self.out[0].clone()


class _Recordings:
    """Of one ViT whose weights lie where they lay."""

    def __init__(self, addresses: list[int]) -> None:
        self.addresses = addresses
        self.by_size: OrderedDict[tuple[int, ...], _Recording | None] = OrderedDict()


_OF_MODELS: WeakKeyDictionary[VisionModel, _Recordings] = WeakKeyDictionary()


def see(vit: VisionModel, patches: Tensor, positions: Tensor, lens: tuple[int, ...]) -> Tensor:
    """`vit(patches, positions, lens)`: (N, Hv), replayed where that can be."""
    if not _may_record(vit, patches):
        features: Tensor = vit(patches, positions, lens)
        return features
    weights = list(vit.parameters())
    addresses = [weight.data_ptr() for weight in weights]
    known = _OF_MODELS.get(vit)
    if known is None or known.addresses != addresses:
        known = _OF_MODELS[vit] = _Recordings(addresses)
    seen_before = lens in known.by_size
    recording = known.by_size.pop(lens, None)
    if seen_before and recording is None and all(p.device == patches.device for p in weights):
        recording = _Recording(vit, patches, positions, lens)
    known.by_size[lens] = recording
    if len(known.by_size) > _SIZES:
        known.by_size.popitem(last=False)
    if recording is None:
        return vit(patches, positions, lens)
    return recording(patches, positions)


def _may_record(vit: VisionModel, patches: Tensor) -> bool:
    """No gradient, the eager path not asked for, weights that are no shards."""
    if torch.is_grad_enabled() or not patches.is_cuda or not fast.is_on("graphs"):
        return False
    weight = next(vit.parameters())
    return (
        len(patches) <= _MOST_PATCHES
        and type(weight.data) is Tensor  # not a shard
        and may_be_recorded(weight)
        and not torch.cuda.is_current_stream_capturing()
    )
