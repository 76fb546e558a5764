# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""A model class for VLMEvalKit that answers with this repository's decoder, many rows at a time.

    # in vlmeval/config.py, after supported_VLM (run.py --config cannot name the class); this
    # repository's root on PYTHONPATH
    from scripts.eval.vlmevalkit_model import VisualOPSD
    supported_VLM["visual_opsd"] = partial(VisualOPSD, model_path="/path/to/0001000")

Text-only (the default) it decodes as `scripts.visual_opsd.evaluate` does; with
`understanding_output=False` the model draws visual thoughts and looks at them. Prompts have the
form of the ThinkMorph wrapper: pictures first, then one text in which each has left a tag.
Without VLMEvalKit `generate_inner` and `generate_inner_batch` can be tried alone.
"""

from __future__ import annotations

import difflib
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from data.sequence import Context, ContextBuilder, Prompts
from data.transforms import ImageTransform, decode_image, to_rgb
from data.transforms import image_path as image_transform
from inferencer import BatchInterleaveInferencer, InterleaveOptions
from modeling import load_bagel
from scripts.visual_opsd.evaluation.benchmarks import build_context, prompt_text
from scripts.visual_opsd.on_policy_sampler import SamplerSettings, sample_completions

try:
    from vlmeval.vlm.base import BaseModel
except ImportError:
    BaseModel = object

# The ThinkMorph wrapper's settings of a drawing, where they differ from the inferencer's.
WRAPPER_DRAWING = {
    "cfg_text_scale": 4.0,
    "cfg_img_scale": 2.0,
    "cfg_interval": (0.0, 1.0),
    "cfg_renorm_type": "text_channel",
}
# Names of the wrapper's that mean nothing here: one model on one device, nothing compiled.
_WITHOUT_EFFECT = ("use_cfg_parallel", "use_torch_compile")
_SET_BY_NAME = (
    "think", "understanding_output", "max_think_token_n", "do_sample", "text_temperature",
    "image_skips",
)  # fmt: skip
_JOINT = "<|im_end|><|im_start|>"  # between the rounds of an answer that skipped a picture


class VisualOPSD(BaseModel):
    """See the module. Names of the arguments are the ThinkMorph wrapper's where it has them.

    Args:
        model_path: a release folder; drawing needs one with the generation branch.
        think: begin with the system prompt that asks for <think> and <answer>.
        understanding_output: text only. False: draw, and return "Round_k:" and "[Image: path]"
            lines.
        save_dir: where drawn images go; needed to draw.
        do_sample, temperature: sampling; off by default, as in the paper.
        max_think_token_n: tokens of an answer (of each part of it, when drawing).
        batch_size: rows decoded together.
        image_skips: rounds that may follow an <image_start> when nothing is drawn.
        image_path: "inferencer" resizes for the autoencoder first, as the wrapper does; "direct"
            is the training's single resize, for text-only answers.
        upright: turn pictures as their EXIF or XMP orientation says; False takes them as stored, as
            the wrapper does.
        vit, vae: image sizes, a name of `data.transforms.PRESETS` or a mapping.
        device: "auto" is this process's GPU, else the CPU. precision: "auto" is bf16 on a GPU.
        seed: of sampling and drawing.
        drawing: further options of `inferencer.InterleaveOptions`.

    Raises:
        ValueError: an unknown option, no save_dir to draw into, a checkpoint that cannot be read.
    """

    INSTALL_REQ = False
    INTERLEAVE = True

    def __init__(
        self,
        model_path: str = "models/ThinkMorph-7B",
        think: bool = True,
        understanding_output: bool = True,
        save_dir: str | None = None,
        temperature: float = 0.3,
        max_think_token_n: int = 1024,
        *,
        do_sample: bool = False,
        batch_size: int = 8,
        image_skips: int = 1,
        image_path: str = "inferencer",
        upright: bool = True,
        vit: str | Mapping[str, int] = "wrapper_vit",
        vae: str | Mapping[str, int] = "vae",
        device: str = "auto",
        precision: str = "auto",
        seed: int = 42,
        **drawing: Any,
    ) -> None:
        options = {k: v for k, v in drawing.items() if k not in _WITHOUT_EFFECT}
        _check_names(options)
        if not understanding_output and save_dir is None:
            raise ValueError(
                "understanding_output=False draws images: name a folder for them with save_dir"
            )
        if not understanding_output and image_path != "inferencer":
            raise ValueError(
                f"image_path={image_path!r} is for text-only answers; a model that draws reads "
                "images through both encoders, image_path='inferencer'"
            )
        self.model_path, self.save_dir = model_path, save_dir
        self.understanding_output = understanding_output
        self.batch_size, self.seed, self.upright = int(batch_size), seed, upright
        self.device = _device(device)
        wide = precision == "fp32" or (precision == "auto" and self.device.type == "cpu")
        self.bundle = load_bagel(
            model_path,
            visual_gen=not understanding_output,
            device=self.device,
            dtype=torch.float32 if wide else torch.bfloat16,
        )
        prompts = Prompts.for_style("inferencer")
        if not think:
            prompts = Prompts(system=None, question_prefix=prompts.question_prefix)
        config = self.bundle.config
        self.builder = ContextBuilder(
            self.bundle.tokenizer,
            image_transform(image_path, vit, vae),
            prompts,
            side=config.vit_max_patches_per_side,
            patch_size=config.vision.patch_size,
            interpolate=config.interpolate_positions,
        )
        self.sampler = SamplerSettings(
            max_new_tokens=max_think_token_n,
            temperature=temperature,
            do_sample=do_sample,
            max_image_skips=image_skips,
            max_rows=self.batch_size,
            check_every=8 if self.device.type == "cuda" else 2,
        )
        self.inferencer: BatchInterleaveInferencer | None = None
        if not understanding_output:
            self.options = {
                **WRAPPER_DRAWING,
                **options,
                "think": think,
                "max_think_token_n": max_think_token_n,
                "do_sample": do_sample,
                "text_temperature": temperature,
                "image_skips": image_skips,
            }
            self.inferencer = BatchInterleaveInferencer(
                self.bundle.model,
                self.bundle.vae,
                self.bundle.tokenizer,
                ImageTransform.from_config(vae),
                ImageTransform.from_config(vit),
                self.bundle.special_tokens,
            )
            Path(str(save_dir)).mkdir(parents=True, exist_ok=True)

    def generate_inner(self, message: list[dict[str, Any]], dataset: str | None = None) -> str:
        """The answer to one message."""
        return self.generate_inner_batch([message], dataset)[0]

    def generate_inner_batch(
        self, messages: Sequence[Sequence[Mapping[str, Any]]], dataset: str | None = None
    ) -> list[str]:
        """Answers to many messages, in their order.

        Args:
            messages: lists of {"type": "text" | "image", "value": text, path or PIL image}.

        Raises:
            ValueError: an image that cannot be read.
        """
        loaded = [[_loaded(part, self.upright) for part in message] for message in messages]
        if self.inferencer is not None:
            return self._draw(loaded, dataset or "answer")
        contexts: list[Context] = [build_context(self.builder, parts) for parts in loaded]
        completions = sample_completions(
            self.bundle.model,
            contexts,
            # The same question draws the same random numbers, whatever stands beside it.
            [_number(parts) for parts in loaded],
            tokenizer=self.bundle.tokenizer,
            special=self.bundle.special_tokens,
            settings=self.sampler,
            seed=self.seed,
            step=0,
            device=self.device,
        )
        decode = self.bundle.tokenizer.decode
        return [decode(completion.ids).replace(_JOINT, "") for completion in completions]

    def _draw(self, messages: Sequence[Sequence[dict[str, Any]]], dataset: str) -> list[str]:
        assert self.inferencer is not None
        inputs: list[list[str | Image.Image]] = []
        for parts in messages:
            pictures = [part["value"] for part in parts if part["type"] == "image"]
            text = prompt_text(parts, self.builder.prompts.question_prefix)
            inputs.append([*pictures, text])
        answers = self.inferencer.interleave_inference(
            inputs,
            seed=[self.seed + _number(parts) for parts in messages],
            batch_size=self.batch_size,
            **self.options,
        )
        return [
            self._listed(answer, f"{dataset}_{_number(parts):016x}")
            for answer, parts in zip(answers, messages, strict=True)
        ]

    def _listed(self, answer: Sequence[str | Image.Image], name: str) -> str:
        """The wrapper's form: numbered texts, and where each drawn image was saved."""
        lines, rounds, drawn = [], 0, 0
        for item in answer:
            if isinstance(item, str):
                lines.append(f"Round_{rounds}:\n{item}")
                rounds += 1
                continue
            path = Path(str(self.save_dir)) / f"{name}_{drawn}.png"
            item.save(path)
            lines.append(f"[Image: {path}]")
            drawn += 1
        return "\n".join(lines)


def _check_names(options: Mapping[str, Any]) -> None:
    known = [n for n in InterleaveOptions.__match_args__ if n not in _SET_BY_NAME]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, [*known, *_SET_BY_NAME], 3)
            hint = f"; did you mean {', '.join(near)}?" if near else f": {', '.join(known)}"
            raise ValueError(f"VisualOPSD has no option {name!r}{hint}")


def _device(name: str) -> torch.device:
    """A device by name; "auto": this process's GPU where torchrun shows several, else the CPU."""
    if name != "auto":
        return torch.device(name)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % count)


def _loaded(part: Mapping[str, Any], upright: bool) -> dict[str, Any]:
    """The part with its picture in place of a path."""
    value = part["value"]
    if part["type"] == "image" and isinstance(value, Image.Image):
        value = to_rgb(value, upright=upright)
    elif part["type"] == "image":
        value = decode_image(Path(value), upright=upright)
    return {"type": part["type"], "value": value}


def _number(parts: Sequence[Mapping[str, Any]]) -> int:
    """A number that a prompt's text and pictures decide."""
    digest = hashlib.blake2b(digest_size=7)
    for part in parts:
        value = part["value"]
        digest.update(value.tobytes() if isinstance(value, Image.Image) else str(value).encode())
    return int.from_bytes(digest.digest(), "little")
