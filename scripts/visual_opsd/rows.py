# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""From a parquet row to the contexts that are forwarded; run in the loader's workers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from data.packing import context_length
from data.sequence import Context, ContextBuilder, TextSegment
from data.thinkmorph import OPSD_ROWS, SFT_ROWS, BadRow, Row, Sample, parse_row
from data.transforms import ImageTransform, image_path
from modeling.bagel.config import BagelConfig
from scripts.visual_opsd.config import PromptSettings


@dataclass(frozen=True)
class TrainRow:
    """One row, ready for a step. `teacher` is None and `targets` filled for SFT."""

    name: str
    position: int
    question: str
    answer: str
    student: Context
    teacher: Context | None = None
    targets: tuple[TextSegment, ...] = ()


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
    )


def noise_generator(seed: int, position: int) -> torch.Generator:
    """Random numbers of the noise control: those of one row of one step."""
    return torch.Generator().manual_seed((seed * 1_000_003 + position) % 2**63)


def _name(sample: Sample) -> str:
    return f"{sample.dataset}/{sample.pid}"


def _check_length(row: Row, context: Context, limit: int | None) -> None:
    """BadRow unless the context leaves room for a completion of one token."""
    length = context_length(context)
    if limit is not None and length + 3 > limit:  # the token between two markers
        raise BadRow(
            "too_long",
            f"its context takes {length} of max_forward_tokens {limit}: raise the limit or lower "
            "vit_max_pixels",
            file=row.file,
            row=row.row,
        )


@dataclass(frozen=True)
class PrepareOPSD:
    """Row -> student and teacher context; with `noise_seed` the VTs become Gaussian noise.

    A row whose contexts leave no room within `max_tokens` is rejected as "too_long".
    with_latents: the teacher also reads the VTs' latents (still pixels here).
    """

    builder: ContextBuilder
    noise_seed: int | None = None
    max_tokens: int | None = None
    with_latents: bool = False

    def __call__(self, row: Row) -> TrainRow:
        sample = parse_row(row, OPSD_ROWS)
        student = self.builder.student(sample)
        noise = None
        if self.noise_seed is not None:
            noise = noise_generator(self.noise_seed, row.position)
        teacher = self.builder.teacher(sample, student, noise, with_latents=self.with_latents)
        _check_length(row, teacher, self.max_tokens)
        return TrainRow(
            _name(sample), row.position, sample.question, sample.answer, student, teacher
        )


@dataclass(frozen=True)
class PrepareSFT:
    """Row -> student context and the scored target text; "too_long" as for `PrepareOPSD`."""

    builder: ContextBuilder
    form: str = "single"
    max_tokens: int | None = None

    def __call__(self, row: Row) -> TrainRow:
        sample = parse_row(row, SFT_ROWS)
        student = self.builder.student(sample)
        targets = self.builder.sft_targets(sample, self.form)
        _check_length(row, (*student, *targets[:-1]), self.max_tokens)
        return TrainRow(
            _name(sample), row.position, sample.question, sample.answer, student, targets=targets
        )
