# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Which fast paths are on. Every one computes what a readable eager path computes.

They are chosen automatically on CUDA. The environment variable VISUAL_OPSD_EAGER names those to
turn off, by commas, or "all":

    VISUAL_OPSD_EAGER=decode,loss python -m scripts.visual_opsd.train_visual_opsd ...
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache, wraps
from importlib.util import find_spec
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])

FAST_PATHS = {
    "attention": "flash attention that follows text and images in one pass, as Triton kernels",
    "rows": "Triton kernels for the norms, the rotary embedding and SwiGLU",
    "projections": "q, k and v in one product, gate and up in one (`decode` always does so)",
    "decode": "weight-streaming products, cached attention and sampling as Triton kernels",
    "graphs": "CUDA graphs of the ViT, of decoding and of denoising steps",
    "loss": "Triton kernels between the two products of the loss",
    "features": "ViT outputs of the problem image computed once where teacher and student agree",
}


@cache
def _eager(value: str) -> frozenset[str]:
    names = {name.strip() for name in value.split(",") if name.strip()}
    unknown = sorted(names - FAST_PATHS.keys() - {"all"})
    if unknown:
        raise ValueError(
            f"VISUAL_OPSD_EAGER names {', '.join(unknown)}; choose among {', '.join(FAST_PATHS)}, "
            "or all"
        )
    return frozenset(FAST_PATHS if "all" in names else names)


def is_on(path: str) -> bool:
    """Whether a fast path may be taken where it can be.

    Raises:
        ValueError: VISUAL_OPSD_EAGER names something else than fast paths.
    """
    assert path in FAST_PATHS, path
    return path not in _eager(os.environ.get("VISUAL_OPSD_EAGER", ""))


@cache
def has_triton() -> bool:
    return find_spec("triton") is not None


@cache
def is_ampere(device: int) -> bool:
    """Whether a GPU is of compute capability 8.0 or newer, as FlashAttention's kernels and ours
    need."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


def runs_kernels(path: str, tensor: Tensor) -> bool:
    """Whether `path`, which is made of Triton kernels, is taken for a tensor like this one."""
    return (
        tensor.is_cuda
        and tensor.dtype in (torch.bfloat16, torch.float16)
        and not torch.compiler.is_compiling()
        and has_triton()
        and is_on(path)
        # Triton launches on the current GPU, wherever its arguments are.
        and tensor.device.index == torch.cuda.current_device()
        and is_ampere(tensor.device.index)
    )


def on_its_gpu(function: F) -> F:
    """Runs a function of a model with the model's GPU as the current one: Triton's kernels and
    graphs go to no other."""

    @wraps(function)
    def inner(model: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        weight = next(model.parameters())
        if not weight.is_cuda:
            return function(model, *args, **kwargs)
        with torch.cuda.device(weight.device):
            return function(model, *args, **kwargs)

    return cast(F, inner)
