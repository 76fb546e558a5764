# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Segments and contexts: what the student, the teacher and the SFT baseline read.

Student: [system, problem image, question]. Teacher: the same, then [intro, VT images,
transition]; neither the written thoughts nor the answer ever enter it (the paper's method).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from PIL import Image
from torch import Tensor

from data.thinkmorph import BadRow, Sample
from data.transforms import (
    ImageTransform,
    extrapolated_position_ids,
    interpolated_position_ids,
    patchify,
)
from data.visual_thoughts import ShownThoughts
from modeling.host.text_files import read_yaml

# Taken over letter for letter: the released weights were trained with this prompt, odd spelling
# of </image_end> included. The packer's copy has a space after "i.e." and no newlines around it.
_THINK_PROMPT = (
    "Let's think step by step to answer the question. For text-based thinking, enclose the "
    "process within <think> </think>, e.g. <think> thinking process here </think>. For visual "
    "thinking, enclose the content within <image_start> </image_end>, e.g. <image_start> "
    "thinking image here </image_end>. Finally conclude with the final answer wrapped in "
    "<answer></answer> tags, i.e.{gap}<answer> answer here </answer>."
)
PACKER_SYSTEM_PROMPT = _THINK_PROMPT.format(gap=" ")
INFERENCER_SYSTEM_PROMPT = "\n" + _THINK_PROMPT.format(gap="") + "\n"

# Our own wording of the two teacher strings; a YAML file given by --prompts replaces them.
REFERENCE_INTRO = (
    "The following pictures are privileged visual references for this problem. Look at them "
    "silently: never mention, quote or describe them in your reply."
)
TRANSITION = (
    "Now answer the question above with your own step-by-step reasoning, as if only the problem "
    "picture had been given."
)

# Characters that Unicode's composition (which the tokenizer applies) makes one of, at most.
_COMPOSED = 4


@dataclass(frozen=True)
class TextSegment:
    """A block `<|im_start|> ids <|im_end|>`.

    scored: None for context; otherwise one flag for each label, the ids and then the final
    `<|im_end|>`: True exactly where the policy sampled that label.
    """

    ids: tuple[int, ...]
    scored: tuple[bool, ...] | None = None

    def __post_init__(self) -> None:
        assert self.scored is None or len(self.scored) == len(self.ids) + 1


@dataclass(frozen=True)
class ImageSegment:
    """A block `<|vision_start|> patches <|vision_end|>`.

    patches: (n, 588) fp32 in [-1, 1]; position_ids: (n,) int64 into the position tables.
    """

    patches: Tensor
    position_ids: Tensor


@dataclass(frozen=True)
class LatentSegment:
    """A block `<|vision_start|> latent tokens <|vision_end|>` of the autoencoder's image.

    latents: (n, 64) fp32, scaled and shifted. position_ids: (n,) int64 into the latent table.
    time, noise: None for a clean image that the rest may look at; otherwise the flow time in
        (0, 1] and the standard normal values (n, 64) of an image to be denoised: the model sees
        (1 - time) latents + time noise, nothing but the image itself sees it, and what follows
        reuses its rope position.
    """

    latents: Tensor
    position_ids: Tensor
    time: float | None = None
    noise: Tensor | None = None

    def __post_init__(self) -> None:
        assert len(self.position_ids) == len(self.latents)
        assert (self.time is None) == (self.noise is None)
        if self.time is not None and not 0 < self.time <= 1:
            raise ValueError(f"the flow time of a noised image must be in (0, 1], got {self.time}")
        assert self.noise is None or self.noise.shape == self.latents.shape

    @classmethod
    def blank(cls, position_ids: Tensor, dim: int = 64) -> LatentSegment:
        """An image about to be drawn: `denoise` replaces its tokens and its time."""
        empty = torch.zeros(len(position_ids), dim)
        return cls(empty, position_ids, 1.0, empty)


@dataclass(frozen=True)
class PixelSegment:
    """A picture on its way to a `LatentSegment`: rows are prepared without the autoencoder.

    It has its final length; `pack` takes it once it is encoded.

    pixels: (3, 16 h, 16 w) fp32 in [-1, 1]. position_ids: (h * w,) int64 into the latent table.
    noised: to be denoised (training), otherwise clean.
    """

    pixels: Tensor
    position_ids: Tensor
    noised: bool = False


Segment: TypeAlias = TextSegment | ImageSegment | LatentSegment | PixelSegment
Context: TypeAlias = tuple[Segment, ...]


@dataclass(frozen=True)
class Completion:
    """A sampled (or given) answer, as scored by student and teacher alike.

    ids: the body without the first `<|im_start|>` and without the final `<|im_end|>`; an image
    skip leaves `<|im_end|><|im_start|>` inside. scored: see `TextSegment`.
    logprobs: the sampler's log-probability of each scored label, in order (empty if unknown).
    given: it is a text of the data set, in the place of one that the policy writes.
    """

    ids: tuple[int, ...]
    scored: tuple[bool, ...]
    logprobs: tuple[float, ...] = ()
    capped: bool = False
    given: bool = False

    def segment(self) -> TextSegment:
        return TextSegment(self.ids, self.scored)

    @property
    def count(self) -> int:
        """Scored rows."""
        return sum(self.scored)

    def truncated(self, keep: int) -> Completion:
        """The first `keep` ids; the forced end is not scored."""
        assert 0 < keep < len(self.ids)
        scored = (*self.scored[:keep], False)
        return replace(
            self, ids=self.ids[:keep], scored=scored, logprobs=self.logprobs[: sum(scored)]
        )


def given_completion(ids: Sequence[int]) -> Completion:
    """A completion whose every token and final end are labels (SFT, dataset traces)."""
    return Completion(tuple(ids), (True,) * (len(ids) + 1))


@dataclass(frozen=True)
class Prompts:
    """The fixed strings of a context; None or "" leaves a string out."""

    system: str | None = PACKER_SYSTEM_PROMPT
    intro: str | None = REFERENCE_INTRO
    transition: str | None = TRANSITION
    instruction_suffix: str = ""
    question_prefix: str = ""

    @classmethod
    def for_style(cls, style: str) -> Prompts:
        """ "packer": the paper's training prompt. "inferencer": the prompt of the VLMEvalKit
        wrapper, system text between newlines and an image tag before the question."""
        if style == "packer":
            return cls()
        if style == "inferencer":
            return cls(system=INFERENCER_SYSTEM_PROMPT, question_prefix="<img><|image_1|></img> ")
        raise ValueError(f"unknown prompt style {style!r}: packer or inferencer")

    @classmethod
    def from_yaml(cls, path: str | Path, base: Prompts | None = None) -> Prompts:
        """Replace strings of `base` by those of a YAML mapping.

        Raises:
            ValueError: missing file, not a mapping, or unknown keys.
        """
        values = read_yaml(path, "prompts file")
        known = {f.name for f in fields(cls)}
        if (
            not isinstance(values, dict)
            or not set(values) <= known
            or not all(value is None or isinstance(value, str) for value in values.values())
        ):
            raise ValueError(f"{path} must map some of {', '.join(sorted(known))} to strings")
        return replace(base or cls(), **{name: text or "" for name, text in values.items()})


class ContextBuilder:
    """Turns samples into contexts with one tokenizer, one image transform and one set of prompts.

    Args:
        tokenizer: a transformers tokenizer. vit_transform: PIL image -> (3, H, W) in [-1, 1].
        side: rows of the ViT position table (70 in the releases).
        vae_transform: likewise for the autoencoder, where its images are used; latent_side and
            latent_stride: rows of its position table and pixels a latent token covers.
        max_text_tokens: tokens of a text at most, checked by its characters before megabytes are
            tokenised; `data.limits` counts exactly.
    """

    def __init__(
        self,
        tokenizer: Any,
        vit_transform: ImageTransform | Callable[[Image.Image], Tensor],
        prompts: Prompts | None = None,
        *,
        side: int = 70,
        patch_size: int = 14,
        interpolate: bool = False,
        vae_transform: ImageTransform | Callable[[Image.Image], Tensor] | None = None,
        latent_side: int = 64,
        latent_stride: int = 16,
        max_text_tokens: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.vit_transform = vit_transform
        self.prompts = prompts or Prompts()
        self.side, self.patch_size, self.interpolate = side, patch_size, interpolate
        self.vae_transform = vae_transform
        self.latent_side, self.latent_stride = latent_side, latent_stride
        self.max_text: int | None = None  # characters
        if max_text_tokens is not None:
            longest = max(map(len, tokenizer.get_vocab()))
            self.max_text = max_text_tokens * longest * _COMPOSED

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids. Raises BadRow ("too_long") for more characters than they could stand for."""
        if self.max_text is not None and len(text) > self.max_text:
            raise BadRow(
                "too_long",
                f"a text of {len(text)} characters has more tokens than the model has positions",
            )
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))

    def text(self, text: str) -> TextSegment:
        return TextSegment(self.encode(text))

    def image(self, image: Image.Image) -> ImageSegment:
        """ViT segment of one image.

        Raises:
            ValueError: more patches on a side than the position table holds.
        """
        pixels = self.vit_transform(image)  # (3, H, W)
        grid = self._grid(pixels, self.patch_size, self.side, "vit_max_size")
        return ImageSegment(patchify(pixels, self.patch_size), grid)

    def picture(self, image: Image.Image, *, noised: bool = False) -> PixelSegment:
        """The autoencoder's segment of one image, still in pixels.

        Raises:
            ValueError: more latent tokens on a side than the position table holds.
        """
        assert self.vae_transform is not None, "this builder was made without a VAE transform"
        pixels = self.vae_transform(image)
        grid = self._grid(pixels, self.latent_stride, self.latent_side, "vae_max_size")
        return PixelSegment(pixels, grid, noised)

    def _grid(self, pixels: Tensor, stride: int, side: int, flag: str) -> Tensor:
        """Position ids of an image's patches."""
        h, w = pixels.shape[1] // stride, pixels.shape[2] // stride
        if self.interpolate:
            return interpolated_position_ids(h, w, side)
        if max(h, w) > side:
            raise ValueError(
                f"an image of {w} x {h} patches does not fit the model's position table of "
                f"{side} a side; lower {flag} to {side * stride}"
            )
        return extrapolated_position_ids(h, w, side)

    def student(self, sample: Sample) -> Context:
        """[system, problem image, question]"""
        return self.question(sample.problem_image, sample.question)

    def question(self, image: Image.Image, question: str) -> Context:
        """The student's context of a bare image and question."""
        return self.frame(self.image(image), question)

    def frame(self, image: ImageSegment, question: str = "", *, teacher: bool = False) -> Context:
        """The student's context of an image that is a segment already.

        teacher: then also intro, the same image in the place of VTs, and transition.
        """
        prompts = self.prompts
        asked = prompts.question_prefix + question + prompts.instruction_suffix
        system = (self.text(prompts.system),) if prompts.system else ()
        seen = self._shown((image,)) if teacher else ()
        return (*system, image, self.text(asked), *seen)

    def _shown(self, images: Sequence[Segment]) -> Context:
        """[intro, images, transition]"""
        prompts = self.prompts
        intro = (self.text(prompts.intro),) if prompts.intro else ()
        transition = (self.text(prompts.transition),) if prompts.transition else ()
        return (*intro, *images, *transition)

    def teacher(
        self,
        sample: Sample,
        student: Context,
        shown: ShownThoughts | None = None,
        *,
        with_latents: bool = False,
    ) -> Context:
        """The student's context, then [intro, VT images, transition].

        Args:
            student: `self.student(sample)`, reused so that the shared part is the same object.
            shown: what stands in the place of the VTs; None: they themselves.
            with_latents: put each VT's picture for the autoencoder before its ViT image, as when
                a released model reads what it drew.
        """
        if not sample.thought_images:
            raise ValueError(f"{sample.file} row {sample.row} has no visual thought to teach with")
        shown = shown or ShownThoughts(sample.thought_images)
        images: list[Segment] = []
        for number, image in enumerate(shown.images):
            seen = self.image(image)
            seen = replace(seen, patches=shown.alter(seen.patches, number, None))
            if with_latents:
                picture = self.picture(image)
                pixels = shown.alter(picture.pixels, number, self.latent_stride)
                images.append(replace(picture, pixels=pixels))
            images.append(seen)
        return (*student, *self._shown(images))

    def interleaved(self, sample: Sample) -> Context:
        """What interleaved SFT trains on: [system, problem image, question, thought, drawing, ...].

        The problem and every finished drawing are read as a clean VAE image and a ViT image; a
        drawing is learnt from a noised VAE image before them. All thoughts are scored, the last
        one with the answer. (Order of the upstream training data; it has no system prompt.)

        Raises:
            ValueError: not exactly one thought more than visual thoughts.
        """
        images, thoughts = sample.thought_images, sample.thoughts
        if not images or len(thoughts) != len(images) + 1:
            raise ValueError(
                f"{len(images)} visual thoughts need a thought before, between and after them; "
                f"there are {len(thoughts)} thoughts"
            )
        *system, problem, question = self.student(sample)
        segments = [*system, self.picture(sample.problem_image), problem, question]
        for i, thought in enumerate(thoughts):
            text = thought if "<think>" in thought else f"<think>{thought}</think>"
            text = ("<image_end>" if i else "") + text
            last = i == len(images)
            text += f"<answer>{sample.answer}</answer>" if last else "<image_start>"
            segments.append(given_completion(self.encode(text)).segment())
            if not last:
                clean = self.picture(images[i])
                segments += [replace(clean, noised=True), clean, self.image(images[i])]
        return tuple(segments)

    def sft_targets(self, sample: Sample, form: str = "single") -> tuple[TextSegment, ...]:
        """Scored text of the SFT baseline.

        "single": one completion, the text-only thought followed by the answer in <answer> tags.
        "reference": the reference's two splits, the thought and then the bare answer.
        """
        if form == "single":
            thought = sample.text_trace
            if "<think>" not in thought:
                thought = f"<think>{thought}</think>"
            texts = [thought + f"<answer>{sample.answer}</answer>"]
        elif form == "reference":
            texts = [sample.text_trace, sample.answer]
        else:
            raise ValueError(f"unknown sft_format {form!r}: single or reference")
        return tuple(given_completion(self.encode(text)).segment() for text in texts)
