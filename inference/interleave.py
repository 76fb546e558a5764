# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""What both classes of `inferencer.py` run: read, write, draw, look at what was drawn, go on."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, NamedTuple, TypeAlias

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
from inference.contexts import (
    CachedContext,
    Drawing,
    cached_prompt,
    device_of,
    draw_latents,
    grow,
)
from modeling.autoencoder import AutoEncoder, decode_tokens, encode_tokens
from modeling.bagel.bagel import Bagel
from modeling.bagel.config import SpecialTokens
from modeling.bagel.flow import Guidance, flow_schedule, initial_noise
from modeling.bagel.generate import IMAGE_MARKER, generate, marker_check
from modeling.host.programs import bounds_problem

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
        as students do in training. None: once, or never with the inferencer's reference_compat.
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

    def __post_init__(self) -> None:
        if self.max_rounds < 0 or (self.image_skips or 0) < 0:
            raise ValueError("max_rounds and image_skips must not be negative")
        if len(self.cfg_interval) != 2:
            raise ValueError(f"cfg_interval must be (low, high), got {self.cfg_interval!r}")
        for name, value in vars(self).items():
            problem = bounds_problem(value) if isinstance(value, float) else None
            if problem:
                raise ValueError(f"{name} {problem}")
        if self.enable_taylorseer:
            warnings.warn(
                "enable_taylorseer has no effect here: every step is computed in full, which is "
                "exact but slower; take a smaller num_timesteps to save time",
                stacklevel=4,  # who called the inferencer
            )

    @property
    def drawings(self) -> int:
        """How many pictures it may draw."""
        return 0 if self.understanding_output else self.max_rounds

    @property
    def times(self) -> Tensor:
        return flow_schedule(self.num_timesteps, self.timestep_shift)

    def guidance(self, *, joint_global: bool = False) -> Guidance:
        """See `Guidance` for joint_global."""
        low, high = self.cfg_interval
        return Guidance(
            self.cfg_text_scale,
            self.cfg_img_scale,
            (float(low), float(high)),
            self.cfg_renorm_type,
            self.cfg_renorm_min,
            joint_global,
        )


@dataclass
class Conversation:
    """One conversation under way.

    full: its context. text_dropped, image_dropped: those of guidance, None where it has none.
    generator: of its random numbers, on the CPU; None is torch's global one.
    size: (H, W) of what it draws. index: its number among those that run together.
    parts: what it wrote and drew; each is also handed to `on_part` when it is made.
    """

    full: CachedContext
    generator: torch.Generator | None = None
    text_dropped: CachedContext | None = None
    image_dropped: CachedContext | None = None
    size: tuple[int, int] = (1024, 1024)
    index: int = 0
    parts: list[Part] = field(default_factory=list)
    on_part: Callable[[Part], None] | None = None

    def add(self, part: Part) -> None:
        self.parts.append(part)
        if self.on_part is not None:
            self.on_part(part)

    def branches(self, guidance: Guidance) -> list[CachedContext]:
        """The contexts that a drawing looks at.

        Raises:
            ValueError: guidance needs one that is not there.
        """
        wanted = [self.full, self.text_dropped, self.image_dropped][: guidance.branches]
        found = [context for context in wanted if context is not None]
        if len(found) < len(wanted):
            raise ValueError(
                "guidance needs its contexts: pass cfg_text_precontext when cfg_text_scale is "
                "above 1, and cfg_img_precontext when cfg_img_scale is, or set the scale to 1"
            )
        return found


class Turn(NamedTuple):
    """What a conversation wrote, as text and as its context holds it, and the picture it drew."""

    text: str
    segment: TextSegment
    picture: Image.Image | None = None


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

    Raises:
        ValueError: a missing token id.
    """

    # New tokens of one forward: bounds memory, changes no result (under reference_compat images
    # are drawn together whatever their number).
    max_forward_tokens = 32768

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
    ) -> None:
        self.model, self.vae_model, self.tokenizer = model, vae_model, tokenizer
        self.vae_transform, self.vit_transform = vae_transform, vit_transform
        self.special = _special_tokens(new_token_ids)
        self.new_token_ids = new_token_ids
        self.reference_compat = reference_compat
        self.system_prompt = system_prompt
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

    def _positions(self, height: int, width: int) -> Tensor:
        """Position ids of the latent tokens of an image of this size."""
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
        return positions(h, w, side)

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
        if self.reference_compat:  # padded to one size, with one tensor of noise
            tokens = encode_tokens(vae, pixels, generator=generators[0])
        else:
            tokens = [
                encode_tokens(vae, [p], generator=g)[0]
                for p, g in zip(pixels, generators, strict=True)
            ]
        return [
            LatentSegment(t.cpu(), self._positions(*p.shape[-2:]))
            for t, p in zip(tokens, pixels, strict=True)
        ]

    def _decode_text(self, ids: Iterable[int]) -> str:
        """Text of sampled ids without the tokens that begin and end a part."""
        markers = (self.special.bos, self.special.eos)
        return self.tokenizer.decode([i for i in ids if i not in markers])

    def image_segments(
        self,
        images: Sequence[Image.Image],
        generators: Sequence[torch.Generator | None],
        *,
        vae: bool = True,
        vit: bool = True,
    ) -> list[list[Segment]]:
        """What each of these resized images is in a context: latent tokens, then ViT patches."""
        found: list[list[Segment]] = [[] for _ in images]
        if vae and images:
            for segments, latent in zip(found, self.encode(images, generators), strict=True):
                segments.append(latent)
        if vit:
            for segments, image in zip(found, images, strict=True):
                segments.append(self.builder.image(image))
        return found

    @torch.no_grad()
    def decode_image(self, latent: Tensor, image_shape: tuple[int, int]) -> Image.Image:
        """Picture of latent tokens (n, 64), image_shape being its (H, W)."""
        h, w = (side // self.pixels for side in image_shape)
        patch = self.model.config.latent_patch_size
        return Image.fromarray(decode_tokens(self._vae(), latent, h, w, patch).numpy())

    # -- steps of conversations ---------------------------------------------------------------

    def begin(
        self,
        conversations: Sequence[Conversation],
        inputs: Sequence[Sequence[Segment]],
        options: InterleaveOptions,
    ) -> None:
        """Fill the empty contexts of conversations (a system prompt is the first input)."""
        if options.drawings and options.guidance().branches == 3:
            for c in conversations:
                c.image_dropped = c.full
        self.extend(conversations, inputs, guidance=True)

    def extend(
        self,
        conversations: Sequence[Conversation],
        new: Sequence[Sequence[Segment]],
        *,
        guidance: bool,
    ) -> None:
        """Append segments to the contexts; guidance: also to those that guidance looks at.

        Text enters the full and the image-dropped context, an image the full one only. The
        text-dropped context is the full one without a text at its end.
        """
        guided = [
            (c, c.image_dropped, [s for s in segments if isinstance(s, TextSegment)])
            for c, segments in zip(conversations, new, strict=True)
            if guidance and c.image_dropped is not None
        ]
        contexts = [c.full for c in conversations] + [context for _, context, _ in guided]
        grown = iter(self.grow(contexts, [*new, *(texts for _, _, texts in guided)]))
        for c, segments in zip(conversations, new, strict=True):
            c.full = next(grown)
            if guidance:
                last = segments[-1:] if isinstance(segments[-1], TextSegment) else []
                c.text_dropped = c.full.before(last)
        for c, _, _ in guided:
            c.image_dropped = next(grown)

    def write(
        self, conversations: Sequence[Conversation], options: InterleaveOptions, skips: int = 0
    ) -> list[Turn]:
        """The next part of each conversation; its context does not hold it yet.

        skips: how often a text that asks for a picture goes on without one.
        """
        length = options.max_think_token_n
        uniforms = None
        if options.do_sample:
            numbers = [
                torch.rand(length + 1, generator=c.generator, dtype=torch.float64)
                for c in conversations
            ]
            uniforms = torch.stack(numbers).to(device_of(self.model))
        generations = generate(
            self.model,
            cached_prompt(self.model, [c.full for c in conversations], length),
            self.special,
            max_new_tokens=length,
            temperature=options.text_temperature if options.do_sample else 1.0,
            uniforms=uniforms,
            continues=marker_check(self._decode_text),
            max_image_skips=skips,
        )
        turns = []
        for conversation, generation in zip(conversations, generations, strict=True):
            ids = generation.ids if generation.capped else generation.ids[:-1]
            text = self._decode_text(ids)
            again = self.builder.text(text) if self.reference_compat else TextSegment(tuple(ids))
            turns.append(Turn(text, again))
            conversation.add(text)
        return turns

    def draw(
        self, conversations: Sequence[Conversation], options: InterleaveOptions
    ) -> list[Image.Image]:
        """An image after each conversation's context, which does not hold it yet."""
        self._vae()
        guidance = options.guidance(joint_global=self.reference_compat)
        dim = self.model.config.latent_dim
        drawings = []
        for c in conversations:
            image = LatentSegment.blank(self._positions(*c.size), dim)
            noise = initial_noise([len(image.latents)], dim, c.generator)
            drawings.append(Drawing(image, noise, c.branches(guidance)))
        groups = [list(range(len(drawings)))]
        if not self.reference_compat:
            tokens = [len(drawing.noise) * guidance.branches for drawing in drawings]
            groups = group_by_tokens(tokens, self.max_forward_tokens)
        latents: list[Tensor] = []
        for group in groups:
            chosen = [drawings[i] for i in group]
            latents += draw_latents(self.model, self.special, chosen, options.times, guidance)
        pictures = []
        for conversation, latent in zip(conversations, latents, strict=True):
            picture = self.decode_image(latent, conversation.size)
            pictures.append(picture)
            conversation.add(picture)
        return pictures

    def take_turns(
        self, conversations: Sequence[Conversation], options: InterleaveOptions
    ) -> list[Turn]:
        """What each conversation writes next and, if that asks for a picture, draws.

        The contexts of those that drew then hold the text, but not yet the picture (`look`).
        """
        turns = self.write(conversations, options)
        asking = [i for i, turn in enumerate(turns) if IMAGE_MARKER in turn.text]
        chosen = [conversations[i] for i in asking]
        new = [[turns[i].segment] for i in asking]
        self.extend(chosen, new, guidance=options.update_cfg_contexts)
        pictures = dict(zip(asking, self.draw(chosen, options) if asking else (), strict=True))
        return [Turn(text, segment, pictures.get(i)) for i, (text, segment, _) in enumerate(turns)]

    def look(
        self,
        conversations: Sequence[Conversation],
        pictures: Sequence[Image.Image | None],
        options: InterleaveOptions,
    ) -> None:
        """Put a picture into each context, resized like an input; None: nothing."""
        shown = [
            (c, self.resized(picture))
            for c, picture in zip(conversations, pictures, strict=True)
            if picture is not None
        ]
        chosen = [c for c, _ in shown]
        new = self.image_segments([image for _, image in shown], [c.generator for c in chosen])
        self.extend(chosen, new, guidance=options.update_cfg_contexts)

    # -- the whole of them --------------------------------------------------------------------

    def run(
        self,
        inputs: Sequence[Sequence[Part]],
        options: InterleaveOptions,
        generators: Sequence[torch.Generator | None],
        edit_image: EditImage | None = None,
        on_part: Callable[[Part], None] | None = None,
        first: int = 0,
    ) -> list[list[Part]]:
        """Outputs of every sample, in order.

        edit_image: see `EditImage`; there the samples are numbered from `first`. on_part: called
        with every part when it is made.
        """
        if not options.understanding_output:
            self._vae()
        conversations = [
            Conversation(CachedContext.empty(self.model), generator, index=index, on_part=on_part)
            for index, generator in enumerate(generators, first)
        ]
        self._read(conversations, inputs, options)
        active = conversations
        for number in range(options.drawings):
            active = self._draw_once(active, number, options, edit_image)
            if not active:
                break
        if active and not (self.reference_compat and options.drawings):
            skips = options.image_skips
            if skips is None:
                skips = 0 if self.reference_compat else 1
            self.write(active, options, skips)
        return [c.parts for c in conversations]

    def _draw_once(
        self,
        conversations: Sequence[Conversation],
        number: int,
        options: InterleaveOptions,
        edit_image: EditImage | None,
    ) -> list[Conversation]:
        """Write, draw for the `number`-th time and look; those that did draw."""
        turns = self.take_turns(conversations, options)
        drew, shown = [], []
        for c, turn in zip(conversations, turns, strict=True):
            picture = turn.picture
            if picture is not None:
                drew.append(c)
                shown.append(edit_image(c.index, number, picture) if edit_image else picture)
        self.look(drew, shown, options)
        return drew

    def _read(
        self,
        conversations: Sequence[Conversation],
        inputs: Sequence[Sequence[Part]],
        options: InterleaveOptions,
    ) -> None:
        """Begin the conversations; the last image of each says the size of its drawings."""
        system = [self.builder.text(self.system_prompt)] if options.think else []
        segments: list[list[Segment]] = [[*system] for _ in inputs]
        for c in conversations:
            c.size = (options.image_shapes[0], options.image_shapes[1])
        # Input by input over all samples: the order in which a batch of the release encodes.
        for parts in zip_longest(*inputs):
            images = {}
            for i, part in enumerate(parts):
                if isinstance(part, str):
                    segments[i].append(self.builder.text(part))
                elif part is not None:
                    images[i] = self.resized(part)
            own = [conversations[i].generator for i in images]
            read_latents = not options.understanding_output
            new = self.image_segments(list(images.values()), own, vae=read_latents)
            for (i, image), found in zip(images.items(), new, strict=True):
                segments[i] += found
                conversations[i].size = (image.height, image.width)
        self.begin(conversations, segments, options)


def _special_tokens(ids: SpecialTokens | Mapping[str, int]) -> SpecialTokens:
    if isinstance(ids, SpecialTokens):
        return ids
    names = ("bos_token_id", "eos_token_id", "start_of_image", "end_of_image")
    missing = [name for name in names if name not in ids]
    if missing:
        raise ValueError(f"new_token_ids lacks {', '.join(missing)}; it needs {', '.join(names)}")
    return SpecialTokens(*(ids[name] for name in names))
