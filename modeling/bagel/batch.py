# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""What a forward pass takes: one packed sequence of several samples (built by data/packing.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from modeling.bagel.attention import AttentionLayout


@dataclass(frozen=True)
class PackedLatents:
    """Latent tokens of the VAE images of a packed sequence: Nl tokens of Ni images.

    Attributes:
        tokens: (Nl, 64) fp32, as the model sees them: a clean image's latents, or x_t.
        rows, und_rows: (Nl,) and (T - Nl,) int64; the rows they fill, for the generation expert,
            and all others, for the understanding expert.
        position_ids: (Nl,) int64 into the latent position table; lens: tokens of each image.
        images: (Nl,) int64 image of each token; times: (Ni,) fp32 flow time of each image,
            1 = noise, 0 = clean.
        velocity_rows: (M,) int64 rows of the noised images, where a velocity is predicted;
            velocity_targets: (M, 64) fp32 noise - latents; velocity_counts: of each sample.
    """

    tokens: Tensor
    rows: Tensor
    und_rows: Tensor
    position_ids: Tensor
    lens: tuple[int, ...]
    images: Tensor
    times: Tensor
    velocity_rows: Tensor
    velocity_targets: Tensor
    velocity_counts: tuple[int, ...]

    def to(self, device: torch.device | str) -> PackedLatents:
        """The same with every tensor on `device`."""
        return _moved(self, device)


class SharedFeatures:
    """ViT outputs that one forward computes and another takes: (patches, Hv), of these images.

    images: their numbers in a batch, rising. features: None until a forward has left them here.

    No dataclass, which FSDP2 would search for tensors with a gradient: it would take them for
    the end of the root's backward pass, though the ViT's is still to come.
    """

    def __init__(self, images: tuple[int, ...], features: Tensor | None = None) -> None:
        self.images, self.features = images, features


@dataclass(frozen=True)
class PackedBatch:
    """Tensors, attention layout and scored rows of a packed sequence of T rows.

    Attributes:
        text_ids, text_rows: (Nt,) int64; token ids and the rows they fill.
        vit_patches: (Nv, 588) fp32 or None; vit_rows, vit_position_ids: (Nv,) int64;
            vit_lens: patches of each image.
        position_ids: (T,) int64 rope positions, restarting at each sample.
        layout: lengths, cached lengths and image blocks of each sample.
        score_rows: (S,) int64 rows whose output predicts a sampled label; score_labels: (S,)
            those labels; score_counts: scored rows of each sample, summing to S.
        next_positions: rope position that follows each sample.
        latents: the VAE images, if there are any.
        shared_features: ViT outputs that need not be computed, if any.
    """

    text_ids: Tensor
    text_rows: Tensor
    vit_patches: Tensor | None
    vit_rows: Tensor
    vit_position_ids: Tensor
    vit_lens: tuple[int, ...]
    position_ids: Tensor
    layout: AttentionLayout
    score_rows: Tensor
    score_labels: Tensor
    score_counts: tuple[int, ...]
    next_positions: tuple[int, ...]
    latents: PackedLatents | None = None
    shared_features: SharedFeatures | None = None

    @property
    def total(self) -> int:
        """Rows of the packed sequence."""
        return self.layout.total

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch with every tensor on `device`."""
        return _moved(self, device)

    def with_features(self, features: Tensor, images: tuple[int, ...] | None = None) -> PackedBatch:
        """The same batch with the ViT outputs (patches, Hv) of some images, rising; None: all."""
        images = tuple(range(len(self.vit_lens))) if images is None else images
        return replace(self, shared_features=SharedFeatures(images, features))

    def patch_rows(self, images: Sequence[int]) -> Tensor:
        """(n,) int64: the patches of some images, on the patches' device."""
        bounds = np.cumsum([0, *self.vit_lens])
        rows = [np.arange(bounds[i], bounds[i + 1]) for i in images]
        return torch.from_numpy(np.concatenate(rows)).to(self.vit_position_ids.device)

    def at_time(self, tokens: Tensor, time: Tensor) -> PackedBatch:
        """The same batch with other latent tokens (Nl, 64), all images at one flow time ()."""
        assert self.latents is not None and tokens.shape == self.latents.tokens.shape
        times = time.expand(self.latents.times.shape)
        return replace(self, latents=replace(self.latents, tokens=tokens, times=times))


_Batch = TypeVar("_Batch", PackedBatch, PackedLatents)


def _moved(batch: _Batch, device: torch.device | str) -> _Batch:
    moved: dict[str, Any] = {}
    for f in fields(batch):
        value = getattr(batch, f.name)
        if isinstance(value, Tensor):
            moved[f.name] = value.to(device, non_blocking=True)
        elif isinstance(value, PackedLatents):
            moved[f.name] = value.to(device)
    return replace(batch, **moved)
