# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Rectified flow on latent tokens: training targets, guidance, and the Euler sampler.

t = 1 is noise and t = 0 the image: x_t = (1 - t) x_0 + t eps, with velocity eps - x_0. An image is
drawn against cached contexts, which are read and never written. The sampler's loop reads nothing
back from the device: which steps are guided is known beforehand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modeling import fast
from modeling.bagel.attention import AttentionLayout, DecodeLayout, choose_backend, fits_graphs
from modeling.bagel.bagel import Bagel
from modeling.bagel.batch import PackedBatch
from modeling.bagel.graphs import RepeatedStep
from modeling.bagel.kv_cache import KVCache, Placement

RENORMS = ("global", "channel", "text_channel")
# Latent tokens, of all branches, up to which a denoising step is captured as a CUDA graph.
_MOST_CAPTURED = 2048

# -- training ---------------------------------------------------------------------------------


def shift_times(t: Tensor, shift: float) -> Tensor:
    """Move flow times towards the noise: s t / (1 + (s - 1) t); keeps 0 and 1."""
    return shift * t / (1 + (shift - 1) * t)


def training_times(z: Tensor, shift: float = 1.0) -> Tensor:
    """Flow times of standard normal draws z, one an image: sigmoid, then shift (-inf gives 0)."""
    return shift_times(torch.sigmoid(z), shift)


def mix_noise(latents: Tensor, noise: Tensor, time: float) -> tuple[Tensor, Tensor]:
    """x_t at one flow time, and the velocity to predict there; both shaped like `latents`."""
    return (1 - time) * latents + time * noise, noise - latents


def flow_loss(velocity: Tensor, target: Tensor) -> Tensor:
    """Squared error, mean over the channels and summed over the rows, fp32 ().

    Divide by the number of rows of the whole optimiser step.
    """
    return (velocity.float() - target.float()).square().mean(-1).sum()


# -- schedule and guidance --------------------------------------------------------------------


def flow_schedule(num_timesteps: int, shift: float = 1.0) -> Tensor:
    """Shifted flow times from 1 to 0, fp32 (num_timesteps,): num_timesteps - 1 Euler steps.

    Raises:
        ValueError: fewer than two times, or a shift that is not positive.
    """
    if num_timesteps < 2:
        raise ValueError(
            f"num_timesteps must be at least 2 (one step fewer is taken), got {num_timesteps}"
        )
    if not 0 < shift < float("inf"):
        raise ValueError(
            f"timestep_shift must be positive, got {shift}; 1 leaves times as they are"
        )
    return shift_times(torch.linspace(1, 0, num_timesteps, dtype=torch.float32), shift)


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance with two dropped contexts (names of the release's `gen_image`).

    text_scale: 1 or less switches all guidance off, image guidance included, as released.
    interval: a step is guided when interval[0] < t <= interval[1], all taken as fp32.
    renorm: how far guidance may lengthen a velocity: "text_channel" shrinks each token after the
        text guidance, "channel" after both, "global" each image as a whole.
    renorm_min: lower bound of the shrinking factor; the upper one is 1.
    joint_global: "global" takes one norm over all images drawn together, as the reference's
        batches do, so that an image depends on its neighbours.
    """

    text_scale: float = 1.0
    image_scale: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    renorm: str = "global"
    renorm_min: float = 0.0
    joint_global: bool = False

    def __post_init__(self) -> None:
        if self.renorm not in RENORMS:
            raise ValueError(f"unknown cfg_renorm_type {self.renorm!r}: {', '.join(RENORMS)}")
        if len(self.interval) != 2 or not self.interval[0] <= self.interval[1]:
            raise ValueError(f"cfg_interval must be (low, high), got {self.interval!r}")

    @property
    def branches(self) -> int:
        """Contexts needed: full, then text dropped, then image dropped."""
        if self.text_scale <= 1:
            return 1
        return 3 if self.image_scale > 1 else 2

    def steps(self, times: Tensor) -> list[bool]:
        """Which Euler steps are guided; `times` is a schedule on the CPU."""
        low, high = (torch.tensor(bound, dtype=torch.float32) for bound in self.interval)
        start = times[:-1]
        on = (start > low) & (start <= high)
        return [bool(flag) and self.branches > 1 for flag in on]


def combine(
    full: Tensor,
    text_dropped: Tensor,
    image_dropped: Tensor | None,
    guidance: Guidance,
    lens: Sequence[int] | None = None,
) -> Tensor:
    """Guided velocity (N, 64) fp32 of the velocities under the three contexts.

    Args:
        image_dropped: None without image guidance.
        lens: tokens of each image (for the "global" norm); None: one image.
    """
    full, text_dropped = full.float(), text_dropped.float()
    guided = text_dropped + guidance.text_scale * (full - text_dropped)

    def shrink(before: Tensor, after: Tensor, **of_channels: Any) -> Tensor:
        factor = before.norm(**of_channels) / (after.norm(**of_channels) + 1e-8)
        return after * factor.clamp(min=guidance.renorm_min, max=1.0)

    if guidance.renorm == "text_channel":
        guided = shrink(full, guided, dim=-1, keepdim=True)
    if image_dropped is not None:
        dropped = image_dropped.float()
        guided = dropped + guidance.image_scale * (guided - dropped)
    if guidance.renorm == "text_channel":
        return guided
    if guidance.renorm == "channel":
        return shrink(full, guided, dim=-1, keepdim=True)
    sizes = [len(full)] if lens is None or guidance.joint_global else list(lens)
    parts = zip(full.split(sizes), guided.split(sizes), strict=True)
    return torch.cat([shrink(before, after) for before, after in parts])


# -- cached contexts --------------------------------------------------------------------------


@dataclass(frozen=True)
class Prefix:
    """The first `length` rows of row `row` of a cache: a context, or an earlier state of one."""

    cache: KVCache
    row: int
    length: int


class StepCache:
    """Keys and values of denoising steps: the prefixes, copied once, and room for a step's rows.

    The contexts stay as they are, and several branches may share one. Samples follow each other
    as in the layout, so attention reads the buffers without gathering.
    """

    def __init__(self, prefixes: Sequence[Prefix], rows: Sequence[int]) -> None:
        """prefixes, rows: context and new rows of each sample of the layout."""
        lens = [prefix.length + n for prefix, n in zip(prefixes, rows, strict=True)]
        self.starts = np.cumsum([0, *lens])
        self.past_lens = tuple(prefix.length for prefix in prefixes)
        total = int(self.starts[-1])

        def merged(stores: Sequence[Sequence[Tensor]]) -> list[Tensor]:
            buffers = []
            for of_layer in zip(*stores, strict=True):
                buffer = of_layer[0].new_zeros((total, *of_layer[0].shape[2:]))
                for prefix, store, start in zip(prefixes, of_layer, self.starts, strict=False):
                    old = store[prefix.row, : prefix.length]
                    buffer[start : start + prefix.length] = old
                buffers.append(buffer)
            return buffers

        self.keys = merged([list(prefix.cache.keys) for prefix in prefixes])
        self.values = merged([list(prefix.cache.values) for prefix in prefixes])

    def part(self, first: int, stop: int) -> StepCache:
        """Samples first..stop-1, sharing the buffers."""
        view = object.__new__(StepCache)
        view.starts = self.starts[first : stop + 1] - self.starts[first]
        view.past_lens = self.past_lens[first:stop]
        rows = slice(int(self.starts[first]), int(self.starts[stop]))
        view.keys = [keys[rows] for keys in self.keys]
        view.values = [values[rows] for values in self.values]
        return view

    def update(
        self, layer: int, k: Tensor, v: Tensor, layout: AttentionLayout | DecodeLayout
    ) -> tuple[Tensor, Tensor]:
        """Place a step's k, v (T, nkv, d) behind their prefixes; return all keys and values."""
        assert isinstance(layout, AttentionLayout)
        placed = self.place(layer, layout)
        placed.keys.index_copy_(0, placed.rows, k)
        placed.values.index_copy_(0, placed.rows, v)
        return placed.keys, placed.values

    def place(self, layer: int, layout: AttentionLayout) -> Placement:
        """See `KeyValues.place`."""
        keys, values = self.keys[layer], self.values[layer]
        assert layout.past_lens == self.past_lens
        assert sum(layout.key_lens) == len(keys), (layout.key_lens, len(keys))

        def make() -> Tensor:
            ends = np.asarray(self.starts[1:])
            new = [np.arange(end - n, end) for n, end in zip(layout.query_lens, ends, strict=True)]
            return torch.from_numpy(np.concatenate(new)).to(keys.device)

        rows: Tensor = layout.memo(("step", keys.device), make)
        return Placement(keys, values, rows, tuple(self.starts[:-1].tolist()))


# -- sampling ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Branches:
    """The images to draw as packed after each guidance branch (see `data.packing.pack_branches`).

    each: one batch a branch: full context, text dropped, image dropped. together: all of them,
    one after the other; None runs the branches in turn, with less memory for activations.
    """

    each: tuple[PackedBatch, ...]
    together: PackedBatch | None = None

    def to(self, device: torch.device | str) -> Branches:
        """The same with every tensor on `device`."""
        together = self.together.to(device) if self.together is not None else None
        return Branches(tuple(batch.to(device) for batch in self.each), together)


def initial_noise(
    lens: Sequence[int], dim: int = 64, generator: torch.Generator | None = None
) -> Tensor:
    """Standard normal values (sum of lens, dim) fp32, drawn image by image on the CPU.

    generator: a CPU one; None is torch's global generator, as in the reference.
    """
    return torch.cat([torch.randn(n, dim, generator=generator) for n in lens])


def _velocities(model: Bagel, batch: PackedBatch, cache: StepCache, x: Tensor, t: Tensor) -> Tensor:
    return model(batch.at_time(x, t), flow_head=lambda velocity: velocity.float(), cache=cache)


@torch.no_grad()
@fast.on_its_gpu
def denoise(
    model: Bagel,
    noise: Tensor,
    branches: Branches,
    prefixes: Sequence[Sequence[Prefix]],
    times: Tensor,
    guidance: Guidance | None = None,
    *,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Draw images: Euler steps from noise to latent tokens, against cached contexts.

    Args:
        noise: (Nl, 64), see `initial_noise`; moved to the batches' device.
        branches: the images after each context, on the model's device.
        prefixes: of each branch, the cached context of each image.
        times: `flow_schedule(...)`, on the CPU.
        guidance: None: none.
        on_step: called after each step with its number and the velocity used, fp32 (Nl, 64).

    Returns:
        (Nl, 64) fp32 latent tokens, for `decode_tokens`. The contexts are unchanged.

    Raises:
        ValueError: fewer branches than the guidance needs, or noise of another shape.
    """
    guidance = guidance or Guidance()
    needed = guidance.branches
    if len(branches.each) < needed or len(prefixes) < needed:
        raise ValueError(
            f"guidance with text_scale {guidance.text_scale} and image_scale "
            f"{guidance.image_scale} needs {needed} contexts (full, text dropped, image dropped); "
            f"got {len(branches.each)} batches and {len(prefixes)} groups of prefixes"
        )
    first = branches.each[0]
    assert first.latents is not None and times.device.type == "cpu"
    lens, images = first.latents.lens, len(first.layout.query_lens)
    if noise.shape != first.latents.tokens.shape:
        raise ValueError(
            f"the initial noise must be {tuple(first.latents.tokens.shape)}, a row for each token "
            f"to draw; got {tuple(noise.shape)}"
        )
    together = branches.together if needed == len(branches.each) else None
    used = [prefix for group in prefixes[:needed] for prefix in group]
    cache = StepCache(used, first.layout.query_lens * needed)
    parts = [cache.part(b * images, (b + 1) * images) for b in range(needed)]
    device = first.text_ids.device
    x = noise.to(device, torch.float32, copy=True)
    time, length = torch.zeros(2, device=device)
    velocity = torch.empty_like(x)

    def plain_step() -> None:
        velocity.copy_(_velocities(model, first, parts[0], x, time))
        x.sub_(velocity * length)

    def guided_step() -> None:
        if together is not None:
            rows = x.repeat(needed, 1)
            found = list(_velocities(model, together, cache, rows, time).split(len(x)))
        else:
            both = zip(branches.each, parts, strict=False)
            found = [_velocities(model, batch, part, x, time) for batch, part in both]
        image_dropped = found[2] if needed == 3 else None
        velocity.copy_(combine(found[0], found[1], image_dropped, guidance, lens))
        x.sub_(velocity * length)

    # Large pictures keep a GPU busy by themselves; capturing them only takes memory.
    small = needed * len(x) <= _MOST_CAPTURED
    backend = choose_backend(x.new_empty(0, dtype=model.dtype), first.layout)
    graph = small and model.layer_devices is None and fits_graphs(backend)
    take = {
        guided: RepeatedStep(step, device, graph=graph)
        for guided, step in ((False, plain_step), (True, guided_step))
    }
    schedule = torch.stack([times[:-1], times[:-1] - times[1:]], dim=1).to(device)
    for step, guided in enumerate(guidance.steps(times)):
        time.copy_(schedule[step, 0])
        length.copy_(schedule[step, 1])
        take[guided]()
        if on_step is not None:
            on_step(step, velocity.clone())
    return x
