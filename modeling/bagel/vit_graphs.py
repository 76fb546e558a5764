# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The ViT as a CUDA graph for images of a size that comes again, while prompts are cached.

One image keeps a GPU busy for less time than Python needs to launch the ViT's kernels. A size is
run plainly the first time, captured the second and replayed from then on. A sharded ViT is never
captured: its forward communicates.
"""

from __future__ import annotations

from collections import OrderedDict
from threading import Lock
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from modeling import fast
from modeling.bagel.attention import choose_backend, fits_graphs
from modeling.bagel.graphs import RepeatedStep
from modeling.bagel.vision import VisionModel, image_layout

# Sizes remembered, and patches beyond which a GPU is kept busy anyway.
_SIZES, _MOST_PATCHES = 8, 8192


class _SizeGraph:
    """Of one size. Nothing in it holds the ViT, so that a model that is dropped is freed."""

    def __init__(self, vit: VisionModel, patches: Tensor, positions: Tensor, lens: tuple[int, ...]):
        # What attention keeps of a layout is read by every replay.
        self.layout = image_layout(lens)
        model = ref(vit)
        out: list[Tensor] = []

        def step() -> None:
            living = model()
            assert living is not None
            features = living(*inputs, lens)
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


class _Graphs:
    """Of one ViT whose weights lie where they lay; None for a size that came only once."""

    def __init__(self, addresses: list[int]) -> None:
        self.addresses = addresses
        self.by_size: OrderedDict[tuple[int, ...], _SizeGraph | None] = OrderedDict()


_OF_MODELS: WeakKeyDictionary[VisionModel, _Graphs] = WeakKeyDictionary()
# A graph's inputs and outputs lie in one place, whichever thread wants them.
_ONE_AT_A_TIME = Lock()


def drop_vit_graphs(model: nn.Module) -> None:
    """Drop the graphs of a model's ViT, and their memory with them."""
    for module in model.modules():
        if isinstance(module, VisionModel):
            _OF_MODELS.pop(module, None)


def run_vit(vit: VisionModel, patches: Tensor, positions: Tensor, lens: tuple[int, ...]) -> Tensor:
    """`vit(patches, positions, lens)`: (N, Hv), replayed where that can be."""
    weights = list(vit.parameters())
    if _can_capture(weights, patches, lens):
        with _ONE_AT_A_TIME:
            graph = _graph_of_size(vit, weights, patches, positions, lens)
            if graph is not None:
                return graph(patches, positions)
    features: Tensor = vit(patches, positions, lens)
    return features


def _graph_of_size(
    vit: VisionModel,
    weights: list[nn.Parameter],
    patches: Tensor,
    positions: Tensor,
    lens: tuple[int, ...],
) -> _SizeGraph | None:
    """None when the size comes for the first time."""
    addresses = [weight.data_ptr() for weight in weights]
    graphs = _OF_MODELS.get(vit)
    if graphs is None or graphs.addresses != addresses:
        graphs = _OF_MODELS[vit] = _Graphs(addresses)
    came_before = lens in graphs.by_size
    graph = graphs.by_size.pop(lens, None)
    if came_before and graph is None:
        graph = _SizeGraph(vit, patches, positions, lens)
    graphs.by_size[lens] = graph
    if len(graphs.by_size) > _SIZES:
        graphs.by_size.popitem(last=False)
    return graph


def _can_capture(weights: list[nn.Parameter], patches: Tensor, lens: tuple[int, ...]) -> bool:
    """No gradient, the eager path not asked for, all weights here and none of them a shard."""
    if torch.is_grad_enabled() or not patches.is_cuda or not fast.is_on("graphs"):
        return False
    return (
        len(patches) <= _MOST_PATCHES
        and fits_graphs(choose_backend(weights[0], image_layout(lens)))
        and not torch.cuda.is_current_stream_capturing()
        and all(type(w.data) is Tensor and w.device == patches.device for w in weights)
    )
