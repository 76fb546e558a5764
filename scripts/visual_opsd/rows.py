# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""What a step's rows are made with: contexts, their limits, the latents of their pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.limits import ContextLimits
from data.packing import context_length
from data.sequence import Context, ContextBuilder, LatentSegment, PixelSegment, Segment, TextSegment
from data.thinkmorph import Row, Sample
from data.transforms import ImageTransform, image_path
from modeling.autoencoder import AE_FILE, AutoEncoder, latent_tokens
from modeling.bagel.config import BagelConfig
from modeling.bagel.flow import training_times
from modeling.release.checkpoint import locate_weights
from modeling.release.tokenizer import load_tokenizer
from scripts.visual_opsd.config import PromptSettings, SampleSettings


@dataclass(frozen=True)
class TrainRow:
    """One row, ready for a step. `teacher` is None and `targets` filled for SFT.

    control: the teacher's context with a control in the place of the VTs, to contrast with.
    rehearsed: `student` is what the teacher sees.
    """

    name: str
    position: int
    question: str
    answer: str
    student: Context
    teacher: Context | None = None
    targets: tuple[TextSegment, ...] = ()
    control: Context | None = None
    rehearsed: bool = False

    @classmethod
    def of(cls, row: Row, sample: Sample, student: Context, **others: Any) -> TrainRow:
        """The row's sample with its contexts (others: teacher, targets, control)."""
        name = f"{sample.dataset}/{sample.pid}"
        return cls(name, row.position, sample.question, sample.answer, student, **others)


def make_builder(tokenizer: Any, model: BagelConfig, settings: PromptSettings) -> ContextBuilder:
    """The context builder that a model's sizes and the prompt settings describe."""
    transform = image_path(settings.image_path, settings.vit_config(), settings.vae_config())
    patch = model.vision.patch_size
    if settings.vit_stride % patch:
        raise ValueError(
            f"vit_stride {settings.vit_stride} must be a multiple of the ViT's patch size {patch}"
        )
    return ContextBuilder(
        tokenizer,
        transform,
        settings.build(),
        side=model.vit_max_patches_per_side,
        patch_size=patch,
        interpolate=model.interpolate_positions,
        vae_transform=ImageTransform(**settings.vae_config()),
        latent_side=model.max_latent_size,
        latent_stride=8 * model.latent_patch_size,
        max_text_tokens=model.llm.max_position_embeddings,
    )


def open_builder(
    path: str | Path, settings: PromptSettings, *, visual_gen: bool = False
) -> tuple[ContextBuilder, BagelConfig]:
    """The builder of a release folder and its sizes, before any weight is read.

    Raises:
        ValueError: files that are missing or do not fit; for visual_gen also the autoencoder.
    """
    if visual_gen and Path(path).is_dir() and not (Path(path) / AE_FILE).is_file():
        raise ValueError(
            f"{path} lacks {AE_FILE}, which reads and draws pictures: copy it from the release"
        )
    model, _ = locate_weights(path, visual_gen=visual_gen)
    tokenizer, _ = load_tokenizer(path)
    return make_builder(tokenizer, model, settings), model


def scoring_limits(model: BagelConfig, sample: SampleSettings) -> ContextLimits:
    """Of contexts that a completion follows: it may be cut, but not to less than one token."""
    return ContextLimits(
        model.llm.max_position_embeddings,
        sample.sample_max_new_tokens,
        "sample_max_new_tokens",
        sample.max_forward_tokens,
        room=3,  # the token between two markers
    )


def given_positions(ids: Sequence[int], context: Context, limits: ContextLimits) -> int:
    """Rope positions of given text behind a context, cut to what `limits.tokens` leaves."""
    whole = len(ids) + 2
    return whole if limits.tokens is None else min(whole, limits.tokens - context_length(context))


@torch.no_grad()
def encode_pictures(
    context: Context, vae: AutoEncoder, generator: torch.Generator, *, time_shift: float = 1.0
) -> Context:
    """The context with every `PixelSegment` as a `LatentSegment` (fp32 on the CPU).

    Each picture is encoded alone, so that its latents do not depend on what else is packed. A
    picture that comes noised and clean is run once and sampled twice, as upstream samples twice.

    Args:
        generator: gives, in order of the segments, each encoder noise and, for a noised picture,
            z ~ N(0, 1) of its flow time sigmoid(z) and the flow's noise.
        time_shift: moves flow times towards the noise (`shift_times`).
    """
    last: tuple[Tensor, tuple[Tensor, Tensor]] | None = None
    encoded: list[Segment] = []
    for segment in context:
        if not isinstance(segment, PixelSegment):
            encoded.append(segment)
            continue
        if last is None or last[0] is not segment.pixels:
            last = segment.pixels, vae.moments(segment.pixels[None])
        mean, logvar = last[1]
        noise = torch.randn(mean.shape, generator=generator)
        tokens = latent_tokens(vae.sample(mean, logvar, noise)[0].float().cpu())
        time, flow_noise = None, None
        if segment.noised:
            time = float(training_times(torch.randn((), generator=generator), time_shift))
            flow_noise = torch.randn(tokens.shape, generator=generator)
        encoded.append(LatentSegment(tokens, segment.position_ids, time, flow_noise))
    return tuple(encoded)
