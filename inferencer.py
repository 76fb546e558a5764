# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Interleaved inference: the model writes, draws a visual thought, looks at it, and goes on.

`InterleaveInferencer` has the interface of BAGEL's and ThinkMorph's class of that name;
`BatchInterleaveInferencer` takes lists of inputs. Both run the same code, and what happens to a
sample does not depend on its neighbours as long as its random numbers are its own (`seed`).

    bundle = load_bagel(path, visual_gen=True)
    inferencer = InterleaveInferencer(
        bundle.model, bundle.vae, bundle.tokenizer,
        PRESETS["vae"], PRESETS["wrapper_vit"], bundle.special_tokens,
    )
    for part in inferencer(image, "Which way leads out?", think=True, seed=0):
        ...  # str or PIL image, in order

Where the release has a defect, `reference_compat=True` brings it back:
- contexts: an update returns a new context and leaves its argument alone; compat also changes
  the argument, as callers written for the release may expect;
- after the last allowed drawing the answer is still written; compat ends with the picture;
- in understanding mode, and after the last drawing, a reply that stops to ask for a picture goes
  on without one (`image_skips`); compat returns it unfinished;
- what was sampled enters the context as those ids; compat encodes the decoded string again;
- images of one batch are encoded, and guided under "global", each for itself; compat pads them to
  one size and takes one norm over all;
- a picture with an EXIF or XMP orientation is turned upright; compat takes it as it is stored;
- a call without input raises; compat returns {"image": None, "text": None}.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from typing import Any, TypeAlias

import torch
from PIL import Image

from data.sequence import Segment
from data.transforms import to_rgb
from inference.contexts import CachedContext, ContextStore
from inference.interleave import (
    Conversation,
    EditImage,
    InterleaveEngine,
    InterleaveOptions,
    Part,
)

GenContext: TypeAlias = MutableMapping[str, Any]


class InterleaveInferencer(InterleaveEngine):
    """One conversation at a time, with the release's methods; constructor: see `InterleaveEngine`.

    A context is a dict with `kv_lens` and `ropes` (lists of one int) and `past_key_values`, to
    be handed from method to method. It may be kept, copied and continued more than once.
    """

    def init_gen_context(self) -> dict[str, Any]:
        """An empty context."""
        return _as_mapping(CachedContext.empty(self.model))

    def _updated(self, context: GenContext, segments: Sequence[Segment]) -> GenContext:
        new = _as_mapping(self.grow([_state(context)], [segments])[0])
        if self.reference_compat:
            context.update(new)
            return context
        return {**context, **new}

    def update_context_text(self, text: str, gen_context: GenContext) -> GenContext:
        """The context followed by a text."""
        return self._updated(gen_context, [self.builder.text(text)])

    def update_context_image(
        self,
        image: Image.Image,
        gen_context: GenContext,
        vae: bool = True,
        vit: bool = True,
        *,
        generator: torch.Generator | None = None,
    ) -> GenContext:
        """The context followed by an image: latent tokens, then ViT patches.

        image: resized for the autoencoder, as `interleave_inference` does with its inputs.
        generator: of the autoencoder's noise, on the CPU; None is torch's global one.
        """
        if not vae and not vit:
            raise ValueError("update_context_image: an image enters through vae, vit or both")
        image = to_rgb(image, upright=not self.reference_compat)
        segments = self.image_segments([image], [generator], vae=vae, vit=vit)[0]
        return self._updated(gen_context, segments)

    def gen_image(
        self,
        image_shape: tuple[int, int],
        gen_context: GenContext,
        cfg_text_scale: float = 4.0,
        cfg_img_scale: float = 1.5,
        cfg_text_precontext: GenContext | None = None,
        cfg_img_precontext: GenContext | None = None,
        cfg_interval: Sequence[float] = (0.4, 1.0),
        cfg_renorm_min: float = 0.0,
        cfg_renorm_type: str = "global",
        num_timesteps: int = 50,
        timestep_shift: float = 3.0,
        enable_taylorseer: bool = False,
        *,
        generator: torch.Generator | None = None,
    ) -> Image.Image:
        """Draw an image of (H, W) after the context, which stays as it is.

        cfg_text_precontext, cfg_img_precontext: the contexts with the text and with the images
            dropped, needed where the scale is above 1.
        """
        options = InterleaveOptions(
            cfg_text_scale=cfg_text_scale,
            cfg_img_scale=cfg_img_scale,
            cfg_interval=cfg_interval,
            cfg_renorm_min=cfg_renorm_min,
            cfg_renorm_type=cfg_renorm_type,
            num_timesteps=num_timesteps,
            timestep_shift=timestep_shift,
            enable_taylorseer=enable_taylorseer,
        )
        conversation = Conversation(_state(gen_context), generator, size=image_shape)
        if cfg_text_precontext is not None:
            conversation.text_dropped = _state(cfg_text_precontext)
        if cfg_img_precontext is not None:
            conversation.image_dropped = _state(cfg_img_precontext)
        return self.draw([conversation], options)[0]

    def gen_text(
        self,
        gen_context: GenContext,
        max_length: int = 500,
        do_sample: bool = True,
        temperature: float = 1.0,
        *,
        generator: torch.Generator | None = None,
    ) -> str:
        """Text after the context, which stays as it is; max_length counts the start token."""
        options = InterleaveOptions(
            max_think_token_n=max_length, do_sample=do_sample, text_temperature=temperature
        )
        return self.write([Conversation(_state(gen_context), generator)], options)[0].text

    def interleave_inference(
        self,
        input_lists: Sequence[Part],
        think: bool = False,
        understanding_output: bool = False,
        max_think_token_n: int = 1000,
        do_sample: bool = False,
        text_temperature: float = 0.3,
        cfg_text_scale: float = 3.0,
        cfg_img_scale: float = 1.5,
        cfg_interval: Sequence[float] = (0.4, 1.0),
        timestep_shift: float = 3.0,
        num_timesteps: int = 50,
        cfg_renorm_min: float = 0.0,
        cfg_renorm_type: str = "global",
        image_shapes: Sequence[int] = (1024, 1024),
        enable_taylorseer: bool = False,
        max_rounds: int = 3,
        *,
        update_cfg_contexts: bool = False,
        image_skips: int | None = None,
        seed: int | None = None,
        edit_image: EditImage | None = None,
        on_part: Callable[[Part], None] | None = None,
    ) -> list[Part]:
        """Answer a list of texts and PIL images; options: see `InterleaveOptions`.

        Args:
            seed: of this answer's random numbers (noise, sampling), drawn on the CPU; None takes
                torch's global generators, as released.
            edit_image: shows the model something else than what it drew: called with 0, the
                number of earlier drawings and the picture; None as its result shows nothing.
            on_part: called with each text and picture when it is made.

        Returns:
            texts (str) and drawn images (PIL, RGB) in order; one text in understanding mode,
            where a reply continued after an image skip stays one string.

        Raises:
            ValueError: no input or one that is neither str nor image, sizes or options that do
                not fit, or drawing with a model loaded without its drawing branch.
        """
        options = InterleaveOptions(
            think=think,
            understanding_output=understanding_output,
            max_think_token_n=max_think_token_n,
            do_sample=do_sample,
            text_temperature=text_temperature,
            cfg_text_scale=cfg_text_scale,
            cfg_img_scale=cfg_img_scale,
            cfg_interval=cfg_interval,
            timestep_shift=timestep_shift,
            num_timesteps=num_timesteps,
            cfg_renorm_min=cfg_renorm_min,
            cfg_renorm_type=cfg_renorm_type,
            image_shapes=image_shapes,
            enable_taylorseer=enable_taylorseer,
            max_rounds=max_rounds,
            update_cfg_contexts=update_cfg_contexts,
            image_skips=image_skips,
        )
        inputs = [_checked(input_lists)]
        return self.run(inputs, options, [_generator(seed)], edit_image, on_part)[0]

    def __call__(
        self,
        image: Image.Image | None = None,
        text: str | None = None,
        input_list: Sequence[Part] | None = None,
        **kwargs: Any,
    ) -> list[Part] | dict[str, None]:
        """`interleave_inference` of the image, the text, or of a whole list.

        Returns:
            the list of outputs; with reference_compat and without input, a dict of Nones.
        """
        inputs = [*_given(image, text), *(input_list or ())]
        if not inputs and self.reference_compat:
            return {"image": None, "text": None}
        return self.interleave_inference(inputs, **kwargs)


class BatchInterleaveInferencer(InterleaveEngine):
    """Many conversations at once: lists in, lists out; constructor: see `InterleaveEngine`.

    With a `seed` each sample's result is that of `InterleaveInferencer` with this seed (not under
    reference_compat, where images of one batch share their noise).
    """

    def interleave_inference(
        self,
        input_lists: Sequence[Sequence[Part]],
        *,
        seed: int | Sequence[int] | None = None,
        batch_size: int = 8,
        edit_image: EditImage | None = None,
        **options: Any,
    ) -> list[list[Part]]:
        """Answer each list of texts and images.

        Args:
            seed: one for every sample, or one for each; None takes torch's global generators,
                and then results depend on the samples' order and on the batch.
            batch_size: samples that run together.
            edit_image: as for one, called with the sample's number.
            options: of `InterleaveOptions`.

        Returns:
            for each sample what `InterleaveInferencer.interleave_inference` returns.

        Raises:
            ValueError: as there, or a number of seeds that is not that of the samples.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        chosen = InterleaveOptions(**options)
        inputs = [_checked(parts) for parts in input_lists]
        seeds = [seed] * len(inputs) if seed is None or isinstance(seed, int) else list(seed)
        if len(seeds) != len(inputs):
            raise ValueError(f"{len(seeds)} seeds for {len(inputs)} samples; give one for each")
        results: list[list[Part]] = []
        for first in range(0, len(inputs), batch_size):
            part = slice(first, first + batch_size)
            generators = [_generator(s) for s in seeds[part]]
            results += self.run(inputs[part], chosen, generators, edit_image, first=first)
        return results

    def __call__(
        self,
        images: Sequence[Image.Image | None] | None = None,
        texts: Sequence[str | None] | None = None,
        input_lists: Sequence[Sequence[Part]] | None = None,
        **kwargs: Any,
    ) -> list[list[Part]]:
        """`interleave_inference` of images with their texts, or of whole lists."""
        if input_lists is None:
            count = len(images if images is not None else texts or ())
            pairs = zip(images or [None] * count, texts or [None] * count, strict=True)
            input_lists = [_given(image, text) for image, text in pairs]
        return self.interleave_inference(input_lists, **kwargs)


# -- what users pass --------------------------------------------------------------------------


def _state(context: GenContext) -> CachedContext:
    store = context["past_key_values"]
    if not isinstance(store, ContextStore) or len(context["kv_lens"]) != 1:
        raise ValueError("a context must come from init_gen_context and hold one conversation")
    return CachedContext(store, context["kv_lens"][0], context["ropes"][0])


def _as_mapping(state: CachedContext) -> dict[str, Any]:
    return {
        "kv_lens": [state.length],
        "ropes": [state.position],
        "past_key_values": state.store,
    }


def _given(*parts: Part | None) -> list[Part]:
    return [part for part in parts if part is not None]


def _checked(parts: Sequence[Part]) -> list[Part]:
    if isinstance(parts, str | Image.Image):
        raise ValueError("the inputs of one answer are a list of texts and images; wrap it in [ ]")
    if not parts:
        raise ValueError("there is no input: give an image, a text or a list of them")
    for part in parts:
        if not isinstance(part, str | Image.Image):
            raise ValueError(f"an input must be a text or a PIL image, got {type(part).__name__}")
    return list(parts)


def _generator(seed: int | None) -> torch.Generator | None:
    return None if seed is None else torch.Generator().manual_seed(seed)


__all__ = ["BatchInterleaveInferencer", "InterleaveInferencer", "InterleaveOptions"]
