# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Flags of `inference_demo.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

import torch

from scripts.visual_opsd.cli import (
    ROUNDS,
    SCALES,
    SEEDS,
    SIDES,
    TEMPERATURES,
    TIMESTEPS,
    TOKENS,
    Settings,
    option,
    parse_config,
)
from scripts.visual_opsd.config import PromptSettings

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# With --interleave, in place of the flags' own defaults: the released wrapper's.
INTERLEAVE_DEFAULTS = {
    "prompt_style": "inferencer", "image_path": "inferencer", "vit_min_size": 224,
}  # fmt: skip


@dataclass(frozen=True)
class DemoSettings(Settings):
    model_path: str = option("models/ThinkMorph-7B", "release folder", path=True)
    image: str | None = option(None, "image file (required)", path=True)
    question: str | None = option(None, "question about it (required)")
    max_new_tokens: int = option(
        1024, "budget of the answer, over all its rounds; with --interleave of each text",
        **TOKENS,
    )  # fmt: skip
    temperature: float = option(
        0.3, "of sampling; without --do_sample it has no effect", **TEMPERATURES,
        hint="greedy: no --do_sample",
    )  # fmt: skip
    do_sample: bool = option(False, "sample; otherwise greedy")
    seed: int = option(0, "random numbers of sampling", **SEEDS)
    image_skips: int = option(1, "rounds that may follow an <image_start>", **ROUNDS)
    device: str = option(
        "auto", "auto: one GPU, else the CPU; spread: over GPUs, CPU memory and disk",
        choices=("auto", "cpu", "cuda", "spread"),
    )  # fmt: skip
    dtype: str = option("auto", "auto: bf16 on a GPU, fp32 on the CPU", choices=("auto", *DTYPES))
    max_memory: str | None = option(
        None, "with --device spread: weights each device may hold, e.g. 0=6GiB,1=6GiB,cpu=20GiB; "
        "devices not named are not used (default: what is free, less room to work)"
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_memory and self.device != "spread":
            raise ValueError("--max_memory goes with --device spread")

    def dtype_on(self, gpu: bool) -> torch.dtype:
        """Of weights and compute."""
        return DTYPES["bf16" if gpu else "fp32"] if self.dtype == "auto" else DTYPES[self.dtype]


@dataclass(frozen=True)
class DrawingSettings(Settings):
    interleave: bool = option(False, "let the model draw, and write a page of its reasoning")
    out: str = option("results/interleave", "folder of the page", path=True)
    overwrite: bool = option(False, "replace the page that --out holds")
    num_timesteps: int = option(50, "flow times of a drawing; one step fewer is taken", **TIMESTEPS)
    cfg_text_scale: float = option(4.0, "text guidance; 1: no guidance at all", **SCALES)
    cfg_img_scale: float = option(2.0, "image guidance; 1: none", **SCALES)
    image_size: int | None = option(
        None, "longest side of problem image and drawings in pixels, a multiple of 16 "
        "(default: by --vae_max_size and --vae_min_size)", **SIDES
    )  # fmt: skip
    max_rounds: int = option(3, "pictures drawn at most", at_least=1, at_most=1000)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.interleave:
            given = [f.name for f in fields(self) if getattr(self, f.name) != f.default]
            if given:
                raise ValueError(f"--{given[0]} goes with --interleave")
        if (self.image_size or 0) % 16:  # what a latent token covers
            raise ValueError(f"--image_size must be a multiple of 16, got {self.image_size}")


@dataclass(frozen=True)
class DemoConfig:
    demo: DemoSettings = field(default_factory=DemoSettings)
    drawing: DrawingSettings = field(default_factory=DrawingSettings)
    prompt: PromptSettings = field(default_factory=PromptSettings)

    def __post_init__(self) -> None:
        if self.drawing.interleave and self.demo.device == "spread":
            raise ValueError(
                "--interleave does not go with --device spread, which holds no drawing branch; "
                "use one GPU or --device cpu"
            )

    def contexts(self) -> PromptSettings:
        """What contexts are made of; the inferencer resizes for the autoencoder by itself."""
        if not self.drawing.interleave:
            return self.prompt
        prompt, size = replace(self.prompt, image_path="direct"), self.drawing.image_size
        return prompt if size is None else replace(prompt, vae_max_size=size, vae_min_size=size)


def parse(argv: Sequence[str] | None, about: str) -> DemoConfig:
    """The flags; those that --interleave leaves open have defaults of their own then."""
    config = parse_config(DemoConfig, argv, about)
    if config.drawing.interleave:
        config = parse_config(DemoConfig, argv, about, INTERLEAVE_DEFAULTS)
        if config.prompt.image_path != "inferencer":
            raise ValueError(
                "--interleave resizes images for the autoencoder first, which is --image_path "
                "inferencer; leave --image_path out"
            )
    return config
