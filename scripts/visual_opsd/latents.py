# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Pictures of a context through the autoencoder, with random numbers that belong to the row."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from data.sequence import Context, LatentSegment, PixelSegment, Segment
from modeling.autoencoder import AutoEncoder, latent_tokens
from modeling.bagel.flow import training_times
from scripts.visual_opsd.rows import TrainRow


def row_generator(purpose: str, seed: int, position: int) -> torch.Generator:
    """CPU random numbers of one row of one step, another stream for each purpose."""
    digest = hashlib.blake2b(f"{purpose}\x1f{seed}\x1f{position}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


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


def encode_teachers(rows: Sequence[TrainRow], vae: AutoEncoder, seed: int) -> list[TrainRow]:
    """The rows, the pictures of their teachers' contexts encoded."""
    encoded = []
    for row in rows:
        assert row.teacher is not None
        generator = row_generator("teacher", seed, row.position)
        encoded.append(replace(row, teacher=encode_pictures(row.teacher, vae, generator)))
    return encoded
