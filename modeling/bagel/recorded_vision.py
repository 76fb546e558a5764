# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The ViT as a CUDA graph for images of a size that comes again, while prompts are cached.

One image keeps a GPU busy for less time than Python needs to launch the ViT's kernels. A size is
run plainly the first time, recorded the second and replayed from then on. A sharded ViT is never
recorded: its forward communicates.
"""

from __future__ import annotations

from collections import OrderedDict
from threading import Lock
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from modeling import fast
from modeling.bagel.attention import may_be_recorded
from modeling.bagel.graphs import RepeatedStep
from modeling.bagel.vision import VisionModel, image_layout

# Sizes remembered, and patches beyond which a GPU is kept busy anyway.
_SIZES, _MOST_PATCHES = 8, 8192


class _Recording:
    """Nothing in it holds the ViT, so that a model that is dropped is freed."""

    def __init__(self, vit: VisionModel, patches: Tensor, positions: Tensor, lens: tuple[int, ...]):
        # What attention keeps of a layout is read by every replay.
        self.layout = image_layout(lens)
        model = ref(vit)
        out: list[Tensor] = []

        def step() -> None:
            seen = model()
            assert seen is not None
            features = seen(*inputs, lens)
            if out:
                out[0].copy_(features)
            else:
                out.append(features.clone())

        # Later calls need not be in inference mode, even if this one is.
        with torch.inference_mode(False), torch.no_grad():
            inputs = patches.clone(), positions.clone()
            self.step = RepeatedStep(step, patches.device)
            self.step()
        self.inputs, self.out = inputs, out

    def __call__(self, patches: Tensor, positions: Tensor) -> Tensor:
        for held, new in zip(self.inputs, (patches, positions), strict=True):
            held.copy_(new)
        self.step()
        return self.out[0].clone()


class _Recordings:
    """Of one ViT whose weights lie where they lay."""

    def __init__(self, addresses: list[int]) -> None:
        self.addresses = addresses
        self.by_size: OrderedDict[tuple[int, ...], _Recording | None] = OrderedDict()


_OF_MODELS: WeakKeyDictionary[VisionModel, _Recordings] = WeakKeyDictionary()
# A recording's inputs and outputs lie in one place, whichever thread wants them.
_ONE_AT_A_TIME = Lock()


def forget(model: nn.Module) -> None:
    """Drop what was recorded of a model's ViT, and the memory with it."""
    for module in model.modules():
        if isinstance(module, VisionModel):
            _OF_MODELS.pop(module, None)


def see(vit: VisionModel, patches: Tensor, positions: Tensor, lens: tuple[int, ...]) -> Tensor:
    """`vit(patches, positions, lens)`: (N, Hv), replayed where that can be."""
    weights = list(vit.parameters())
    if _may_record(weights, patches):
        with _ONE_AT_A_TIME:
            recording = _recording(vit, weights, patches, positions, lens)
            if recording is not None:
                return recording(patches, positions)
    features: Tensor = vit(patches, positions, lens)
    return features


def _recording(
    vit: VisionModel,
    weights: list[nn.Parameter],
    patches: Tensor,
    positions: Tensor,
    lens: tuple[int, ...],
) -> _Recording | None:
    """That of a size; None when it comes for the first time."""
    addresses = [weight.data_ptr() for weight in weights]
    known = _OF_MODELS.get(vit)
    if known is None or known.addresses != addresses:
        known = _OF_MODELS[vit] = _Recordings(addresses)
    seen_before = lens in known.by_size
    recording = known.by_size.pop(lens, None)
    if seen_before and recording is None:
        recording = _Recording(vit, patches, positions, lens)
    known.by_size[lens] = recording
    if len(known.by_size) > _SIZES:
        known.by_size.popitem(last=False)
    return recording


def _may_record(weights: list[nn.Parameter], patches: Tensor) -> bool:
    """No gradient, the eager path not asked for, all weights here and none of them a shard."""
    if torch.is_grad_enabled() or not patches.is_cuda or not fast.is_on("graphs"):
        return False
    return (
        len(patches) <= _MOST_PATCHES
        and may_be_recorded(weights[0])
        and not torch.cuda.is_current_stream_capturing()
        and all(type(w.data) is Tensor and w.device == patches.device for w in weights)
    )
