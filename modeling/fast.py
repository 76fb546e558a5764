# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Which fast paths are on. Every one computes what a readable eager path computes.

They are chosen by themselves on CUDA. The environment variable VISUAL_OPSD_EAGER names those to
turn off, by commas, or "all":

    VISUAL_OPSD_EAGER=decode,loss python -m scripts.visual_opsd.train_visual_opsd ...
"""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

FAST_PATHS = {
    "attention": "flash attention that follows text and images in one pass, as Triton kernels",
    "rows": "Triton kernels for the norms, the rotary embedding and SwiGLU",
    "projections": "q, k and v in one product, gate and up in one",
    "decode": "weight-streaming products, cached attention and sampling as Triton kernels",
    "graphs": "CUDA graphs of decoding and denoising steps",
    "loss": "Triton kernels between the two products of the loss",
    "features": "ViT outputs of the problem image computed once where teacher and student agree",
    "loading": "weight files read by threads, through pinned memory, to a GPU",
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


def runs_kernels(path: str, tensor: Tensor) -> bool:
    """Whether `path`, which is made of Triton kernels, is taken for a tensor like this one."""
    return (
        tensor.is_cuda
        and tensor.dtype in (torch.bfloat16, torch.float16)
        and not torch.compiler.is_compiling()
        and has_triton()
        and is_on(path)
    )
