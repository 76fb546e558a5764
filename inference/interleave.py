# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""What both classes of `inferencer.py` run: read, write, draw, look at what was drawn, go on."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from PIL import Image
from torch import Tensor

from data.packing import group_by_tokens
from data.sequence import (
    INFERENCER_SYSTEM_PROMPT,
    ContextBuilder,
    LatentSegment,
    Segment,
    TextSegment,
)
from data.transforms import extrapolated_position_ids, interpolated_position_ids, to_rgb
from inference.contexts import CachedContext, decoding_prompt, device_of, draw_latents, grow
from modeling.autoencoder import AutoEncoder, decode_tokens, encode_tokens
from modeling.bagel.bagel import Bagel
from modeling.bagel.config import SpecialTokens
from modeling.bagel.flow import Guidance, flow_schedule, initial_noise
from modeling.bagel.generate import generate, marker_check
from modeling.host.programs import bounds_problem

IMAGE_MARKER = "<image_start>"

Part: TypeAlias = str | Image.Image
# (sample, how many it drew before, what it drew) -> what it is shown instead; None: nothing. The
# output keeps what was drawn.
EditImage: TypeAlias = Callable[[int, int, Image.Image], Image.Image | None]


@dataclass(frozen=True)
class InterleaveOptions:
    """Options of `interleave_inference`; names and defaults are the release's.

    think: put the system prompt first. understanding_output: text only; images are read through
        the ViT alone and nothing is drawn.
    max_think_token_n: tokens of each written part, its start token included.
    do_sample, text_temperature: sampling of text; greedy without `do_sample`.
    cfg_*, timestep_shift, num_timesteps: drawing, see `modeling.bagel.flow`.
    image_shapes: (H, W) of a drawn image when no image was given.
    max_rounds: images drawn at most.
    update_cfg_contexts: written text and drawn images also enter the guidance contexts, by the
        rule for inputs. Off, as released: those contexts end with the inputs.
    image_skips: how often a reply that asks for a picture it cannot have goes on without one,
        as students do in training. None: the inferencer's setting.
    """

    think: bool = False
    understanding_output: bool = False
    max_think_token_n: int = 1000
    do_sample: bool = False
    text_temperature: float = 0.3
    cfg_text_scale: float = 3.0
    cfg_img_scale: float = 1.5
    cfg_interval: Sequence[float] = (0.4, 1.0)
    timestep_shift: float = 3.0
    num_timesteps: int = 50
    cfg_renorm_min: float = 0.0
    cfg_renorm_type: str = "global"
    image_shapes: Sequence[int] = (1024, 1024)
    enable_taylorseer: bool = False
    max_rounds: int = 3
    update_cfg_contexts: bool = False
    image_skips: int | None = None

    @property
    def image_guidance(self) -> bool:
        """Whether the image-dropped context is ever looked at."""
        drawing = not self.understanding_output and self.max_rounds > 0
        return drawing and self.cfg_text_scale > 1 and self.cfg_img_scale > 1

    def __post_init__(self) -> None:
        if self.max_rounds < 0 or (self.image_skips or 0) < 0:
            raise ValueError("max_rounds and image_skips must not be negative")
        for name, value in vars(self).items():
            problem = bounds_problem(value) if isinstance(value, float) else None
            if problem:
                raise ValueError(f"{name} {problem}")


@dataclass
class Conversation:
    """One conversation under way."""

    index: int
    full: CachedContext
    text_dropped: CachedContext
    image_dropped: CachedContext
    size: tuple[int, int]  # (H, W) of what is drawn
    generator: torch.Generator | None
    parts: list[Part] = field(default_factory=list)


class InterleaveEngine:
    """What the single and the batched class share.

    Args:
        model: a `Bagel` on one device. Drawing and `understanding_output=False` need one loaded
            with visual_gen=True.
        vae_model: the autoencoder, or None for text-only use.
        vae_transform, vit_transform: `data.transforms.ImageTransform`, or the release's class
            (`resize_transform(image)` and a call). vae_transform=None: the ViT transform sees
            the image at its own size, as in training.
        new_token_ids: `SpecialTokens`, or the release's mapping with bos_token_id, eos_token_id,
            start_of_image and end_of_image.
        reference_compat: reproduce the release's defects, see the docstring of `inferencer`.
        system_prompt: what `think=True` puts first.
        image_skips: default of the option; None is 1, and 0 with reference_compat.
        guidance_together: the guidance branches of a step in one forward.
        max_forward_tokens: new rows of one forward; bounds memory, changes no result (under
            reference_compat images are drawn together whatever their number).

    Raises:
        ValueError: a missing token id.
    """

    def __init__(
        self,
        model: Bagel,
        vae_model: AutoEncoder | None,
        tokenizer: Any,
        vae_transform: Any,
        vit_transform: Any,
        new_token_ids: SpecialTokens | Mapping[str, int],
        *,
        reference_compat: bool = False,
        system_prompt: str = INFERENCER_SYSTEM_PROMPT,
        image_skips: int | None = None,
        guidance_together: bool = True,
        max_forward_tokens: int = 32768,
    ) -> None:
        self.model, self.vae_model, self.tokenizer = model, vae_model, tokenizer
        self.vae_transform, self.vit_transform = vae_transform, vit_transform
        self.special = _special_tokens(new_token_ids)
        self.new_token_ids = new_token_ids
        self.reference_compat = reference_compat
        self.system_prompt = system_prompt
        default_skips = 0 if reference_compat else 1
        self.image_skips = default_skips if image_skips is None else image_skips
        self.guidance_together = guidance_together
        self.max_forward_tokens = max_forward_tokens
        config = model.config
        self.pixels = config.latent_patch_size * (
            8 if vae_model is None else vae_model.config.factor
        )
        self.builder = ContextBuilder(
            tokenizer,
            vit_transform,
            side=config.vit_max_patches_per_side,
            patch_size=config.vision.patch_size,
            interpolate=config.interpolate_positions,
        )

    # -- pieces -------------------------------------------------------------------------------

    def grow(
        self, contexts: Sequence[CachedContext], segments: Sequence[Sequence[Segment]]
    ) -> list[CachedContext]:
        limit = self.max_forward_tokens
        return grow(self.model, self.special, contexts, segments, max_tokens=limit)

    def _vae(self) -> AutoEncoder:
        if not self.model.config.visual_gen or self.vae_model is None:
            raise ValueError(
                "drawing, and reading images through the autoencoder, needs the model's drawing "
                "branch and its autoencoder: load_bagel(path, visual_gen=True) over a complete "
                "release; a text-only student takes understanding_output=True (vae=False)"
            )
        return self.vae_model

    def _latent_grid(self, height: int, width: int) -> tuple[int, int, Tensor]:
        """(h, w, position ids) of an image's latent tokens."""
        side, step = self.model.config.max_latent_size, self.pixels
        h, w = height // step, width // step
        if height % step or width % step or not (0 < h <= side and 0 < w <= side):
            raise ValueError(
                f"an image of {height} x {width} pixels (H x W) has no latent grid: both sides "
                f"must be multiples of {step} and at most {side * step}; see image_shapes and the "
                "VAE transform"
            )
        interpolate = self.model.config.interpolate_positions
        positions = interpolated_position_ids if interpolate else extrapolated_position_ids
        return h, w, positions(h, w, side)

    def resized(self, image: Image.Image) -> Image.Image:
        """RGB, at the size the autoencoder takes."""
        image = to_rgb(image, upright=not self.reference_compat)
        if self.vae_transform is None:
            return image
        own = getattr(self.vae_transform, "resize", None)
        return (own or self.vae_transform.resize_transform)(image)

    @torch.no_grad()
    def encode(
        self, images: Sequence[Image.Image], generators: Sequence[torch.Generator | None]
    ) -> list[LatentSegment]:
        """Clean latent segments of resized images, encoded with sampled noise as released."""
        vae = self._vae()
        if self.vae_transform is None:
            raise ValueError(
                "reading an image through the autoencoder needs vae_transform, e.g. "
                'data.transforms.PRESETS["vae"]; or pass vae=False / understanding_output=True'
            )
        pixels = [self.vae_transform(image) for image in images]
        if self.reference_compat:
            tokens = encode_tokens(vae, pixels, noise=self._joint_noise(vae, pixels, generators))
        else:
            tokens = [
                encode_tokens(vae, [p], generator=g)[0]
                for p, g in zip(pixels, generators, strict=True)
            ]
        return [
            LatentSegment(t.cpu(), self._latent_grid(*p.shape[-2:])[2])
            for t, p in zip(tokens, pixels, strict=True)
        ]

    @staticmethod
    def _joint_noise(
        vae: AutoEncoder, pixels: Sequence[Tensor], generators: Sequence[torch.Generator | None]
    ) -> Tensor | None:
        """For images padded to one size; None: drawn for all by the autoencoder."""
        if any(generator is None for generator in generators):
            return None
        h, w = (max(p.shape[side] for p in pixels) // vae.config.factor for side in (-2, -1))
        shape = (vae.config.latent_channels, h, w)
        return torch.stack([torch.randn(shape, generator=g) for g in generators])

    def _decode_text(self, ids: Iterable[int]) -> str:
        """Text of sampled ids without the tokens that begin and end a part."""
        markers = (self.special.bos, self.special.eos)
        return self.tokenizer.decode([i for i in ids if i not in markers])

    def write(
        self,
        contexts: Sequence[CachedContext],
        generators: Sequence[torch.Generator | None],
        length: int,
        do_sample: bool,
        temperature: float,
        skips: int = 0,
    ) -> list[tuple[str, TextSegment]]:
        """The next part of each conversation, and the segment that puts it into the context."""
        uniforms = None
        if do_sample:
            numbers = [torch.rand(length + 1, generator=g, dtype=torch.float64) for g in generators]
            uniforms = torch.stack(numbers).to(device_of(self.model))
        generations = generate(
            self.model,
            decoding_prompt(self.model, contexts, length),
            self.special,
            max_new_tokens=length,
            temperature=temperature if do_sample else 1.0,
            uniforms=uniforms,
            continues=marker_check(self._decode_text, IMAGE_MARKER),
            max_image_skips=skips,
        )
        found = []
        for generation in generations:
            ids = generation.ids if generation.capped else generation.ids[:-1]
            text = self._decode_text(ids)
            again = self.builder.text(text) if self.reference_compat else TextSegment(tuple(ids))
            found.append((text, again))
        return found

    def draw(
        self,
        branches: Sequence[Sequence[CachedContext]],
        sizes: Sequence[tuple[int, int]],
        generators: Sequence[torch.Generator | None],
        guidance: Guidance,
        times: Tensor,
    ) -> list[Image.Image]:
        """An image for each context; branches: the contexts of each guidance branch."""
        self._vae()
        config = self.model.config
        dim = config.latent_patch_size**2 * config.latent_channels
        grids = [self._latent_grid(*size) for size in sizes]
        images = [LatentSegment.blank(positions, dim) for _, _, positions in grids]
        lens = [len(image.latents) for image in images]
        noise = [initial_noise([n], dim, g) for n, g in zip(lens, generators, strict=True)]
        used = branches[: guidance.branches]
        rows = [n * len(used) for n in lens]
        whole = [list(range(len(images)))]
        groups = whole if self.reference_compat else group_by_tokens(rows, self.max_forward_tokens)
        latents: list[Tensor] = []
        for group in groups:
            latents += draw_latents(
                self.model,
                self.special,
                [images[i] for i in group],
                [[column[i] for i in group] for column in used],
                torch.cat([noise[i] for i in group]),
                times,
                guidance,
                together=self.guidance_together,
            )
        return [self.decode_image(x, size) for x, size in zip(latents, sizes, strict=True)]

    @torch.no_grad()
    def decode_image(self, latent: Tensor, image_shape: tuple[int, int]) -> Image.Image:
        """Picture of latent tokens (n, 64), image_shape being its (H, W)."""
        h, w, _ = self._latent_grid(*image_shape)
        patch = self.model.config.latent_patch_size
        return Image.fromarray(decode_tokens(self._vae(), latent, h, w, patch).numpy())

    # -- the conversation ---------------------------------------------------------------------

    def run(
        self,
        inputs: Sequence[Sequence[Part]],
        options: InterleaveOptions,
        generators: Sequence[torch.Generator | None],
        edit_image: EditImage | None = None,
    ) -> list[list[Part]]:
        """Outputs of every sample, in order; edit_image: see `EditImage`."""
        check_taylorseer(options.enable_taylorseer)
        skips = self.image_skips if options.image_skips is None else options.image_skips
        guidance = Guidance(
            options.cfg_text_scale,
            options.cfg_img_scale,
            interval(options.cfg_interval),
            options.cfg_renorm_type,
            options.cfg_renorm_min,
            joint_global=self.reference_compat,
        )
        times = flow_schedule(options.num_timesteps, options.timestep_shift)
        if not options.understanding_output:
            self._vae()
        samples = self._begin(inputs, options, generators)
        active = samples
        drawings = 0 if options.understanding_output else options.max_rounds
        for round_ in range(drawings + 1):
            last = round_ == drawings
            if last and drawings and self.reference_compat:
                break
            replies = self.write(
                [sample.full for sample in active],
                [sample.generator for sample in active],
                options.max_think_token_n,
                options.do_sample,
                options.text_temperature,
                skips if last else 0,
            )
            for sample, (text, _) in zip(active, replies, strict=True):
                sample.parts.append(text)
            pairs = list(zip(active, replies, strict=True))
            going_on = [(s, segment) for s, (text, segment) in pairs if IMAGE_MARKER in text]
            if last or not going_on:
                break
            active = [sample for sample, _ in going_on]
            self._extend(active, [[segment] for _, segment in going_on], options)
            pictures = self.draw(
                [
                    [sample.full for sample in active],
                    [sample.text_dropped for sample in active],
                    [sample.image_dropped for sample in active],
                ],
                [sample.size for sample in active],
                [sample.generator for sample in active],
                guidance,
                times,
            )
            for sample, picture in zip(active, pictures, strict=True):
                sample.parts.append(picture)
            self._look(active, round_, pictures, options, edit_image)
        return [sample.parts for sample in samples]

    def _begin(
        self,
        inputs: Sequence[Sequence[Part]],
        options: InterleaveOptions,
        generators: Sequence[torch.Generator | None],
    ) -> list[Conversation]:
        """Contexts after the inputs.

        Text enters the full and the image-dropped context, an image the full one only. The
        text-dropped context is the full one without a text that was the last input.
        """
        system = (self.builder.text(self.system_prompt),) if options.think else ()
        full: list[list[Segment]] = [list(system) for _ in inputs]
        dropped: list[list[Segment]] = [list(system) for _ in inputs]
        cuts = [len(system)] * len(inputs)
        height, width = options.image_shapes
        sizes = [(height, width)] * len(inputs)
        # Input by input over all samples: the order in which a batch of the release encodes.
        for step in range(max(map(len, inputs), default=0)):
            images: dict[int, Image.Image] = {}
            for i, parts in enumerate(inputs):
                if step < len(parts):
                    part = parts[step]
                    if isinstance(part, str):
                        cuts[i] = len(full[i])
                        text = self.builder.text(part)
                        full[i].append(text)
                        dropped[i].append(text)
                    else:
                        images[i] = self.resized(part)
            latents: list[LatentSegment] = []
            if images and not options.understanding_output:
                own = [generators[i] for i in images]
                latents = self.encode(list(images.values()), own)
            for place, (i, image) in enumerate(images.items()):
                sizes[i] = (image.height, image.width)
                full[i] += [*latents[place : place + 1], self.builder.image(image)]
                cuts[i] = len(full[i])
        empty = [CachedContext.empty(self.model) for _ in range(2 * len(inputs))]
        none: list[list[Segment]] = [[] for _ in inputs]
        grown = self.grow(empty, [*full, *(dropped if options.image_guidance else none)])
        cut = [grown[i].prefix_of(empty[i], full[i][: cuts[i]]) for i in range(len(inputs))]
        return [
            Conversation(i, grown[i], cut[i], grown[len(inputs) + i], sizes[i], generator)
            for i, generator in enumerate(generators)
        ]

    def _look(
        self,
        samples: Sequence[Conversation],
        round_: int,
        pictures: Sequence[Image.Image],
        options: InterleaveOptions,
        edit_image: EditImage | None,
    ) -> None:
        """Put what was drawn into the contexts, resized like an input."""
        shown = {}
        for sample, picture in zip(samples, pictures, strict=True):
            image = picture if edit_image is None else edit_image(sample.index, round_, picture)
            if image is not None:
                shown[sample.index] = self.resized(image)
        seeing = [sample for sample in samples if sample.index in shown]
        if not seeing:
            return
        images = list(shown.values())
        latents = self.encode(images, [sample.generator for sample in seeing])
        new: list[list[Segment]] = [
            [latent, self.builder.image(image)]
            for latent, image in zip(latents, images, strict=True)
        ]
        self._extend(seeing, new, options)

    def _extend(
        self,
        samples: Sequence[Conversation],
        new: Sequence[Sequence[Segment]],
        options: InterleaveOptions,
    ) -> None:
        """Append what was written or drawn."""
        grown = self.grow([sample.full for sample in samples], new)
        if options.update_cfg_contexts:  # the rule of `_begin`
            texts = [[s for s in segments if isinstance(s, TextSegment)] for segments in new]
            if options.image_guidance:
                dropped = self.grow([sample.image_dropped for sample in samples], texts)
                for sample, context in zip(samples, dropped, strict=True):
                    sample.image_dropped = context
            for sample, after, text in zip(samples, grown, texts, strict=True):
                sample.text_dropped = sample.full if text else after
        for sample, context in zip(samples, grown, strict=True):
            sample.full = context


# -- what users pass --------------------------------------------------------------------------


def _special_tokens(ids: SpecialTokens | Mapping[str, int]) -> SpecialTokens:
    if isinstance(ids, SpecialTokens):
        return ids
    names = ("bos_token_id", "eos_token_id", "start_of_image", "end_of_image")
    missing = [name for name in names if name not in ids]
    if missing:
        raise ValueError(f"new_token_ids lacks {', '.join(missing)}; it needs {', '.join(names)}")
    return SpecialTokens(*(ids[name] for name in names))


def interval(bounds: Sequence[float]) -> tuple[float, float]:
    if len(bounds) != 2:
        raise ValueError(f"cfg_interval must be (low, high), got {bounds!r}")
    return float(bounds[0]), float(bounds[1])


def check_taylorseer(enabled: bool) -> None:
    if enabled:
        warnings.warn(
            "enable_taylorseer has no effect here: every step is computed in full, which is "
            "exact but slower; take a smaller num_timesteps to save time",
            stacklevel=4,
        )
