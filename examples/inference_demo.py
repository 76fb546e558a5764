# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
r"""Ask about one image: the text-only student, or with --interleave a model that draws.

    python examples/inference_demo.py --image FILE --question TEXT --model_path DIR

Without a large model, with the miniature that `make demo` starts from (its own prompts and sizes):

    python examples/inference_demo.py --model_path examples/tiny-base \
        --config examples/demo/images.yaml --prompts examples/demo/prompts.yaml \
        --image examples/demo/maze.png --question "Which moves reach the goal?"

With the drawing branch and the autoencoder of a whole release, `--interleave` lets the model draw
visual thoughts and look at them,

    python examples/inference_demo.py --interleave --image FILE --question TEXT --model_path DIR

and writes what it drew (round_1.png, ...), answer.txt and a page with text and pictures in their
order (index.html) to `--out`. Prompt, image sizes and guidance are then those of the released
wrapper (`--prompt_style inferencer`, `--vit_min_size 224`) unless flags say otherwise.

`--device spread` divides the model over all GPUs, then CPU memory, then reads the rest from the
release's file, layer by layer; the slower places are visited for every token. Text and paths go
to stdout, timing and placement to stderr. Exit code 1: wrong input, or not enough memory; 2:
unknown flag. The small maze of the example is one that no training saw; from the repository's root

    python -c "from data.worlds import spatial_navigation as world, writer; \
        maze = world.Maze.parse('FFFF/FFFS/FHHF/GFFH'); \
        open('examples/demo/maze.png', 'wb').write(writer.encode_png(world.render(maze, '', 14)))"

draws it. A right answer is L,L,L,D,D.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also runs as a plain script

import torch
from PIL import Image

from data.limits import SMALLEST_IMAGE, ContextLimits
from data.packing import context_length, pack
from data.randomness import position_uniforms
from data.sequence import Completion, Context, TextSegment
from data.thinkmorph import BadRow
from data.transforms import decode_image
from examples.interleave_page import InterleavePage, check_folder
from inference.interleave import Part
from inferencer import InterleaveInferencer
from modeling import BagelBundle, load_bagel
from modeling.autoencoder import AE_FILE, AutoEncoderConfig
from modeling.bagel.config import BagelConfig
from modeling.bagel.generate import generate, marker_check
from modeling.host.memory import memory_errors
from modeling.release.checkpoint import is_generation_key, locate_weights
from modeling.release.spread import (
    Place,
    free_memory,
    load_bagel_spread,
    to_device,
    weight_bytes,
    working_bytes,
)
from modeling.release.tokenizer import load_tokenizer
from modeling.release.weight_files import open_weights
from scripts.visual_opsd.cli import (
    ROUNDS,
    SCALES,
    SEEDS,
    SIDES,
    TEMPERATURES,
    TIMESTEPS,
    TOKENS,
    Settings,
    option,
    parse_config,
    run_main,
)
from scripts.visual_opsd.config import PromptSettings
from scripts.visual_opsd.evaluation.scoring import extract_answer
from scripts.visual_opsd.on_policy_sampler import IMAGE_MARKER, to_completion
from scripts.visual_opsd.rows import make_builder

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_SYSTEM_ROWS = 512  # more than a system prompt takes
_LONG_QUESTION = 8192  # characters
_SAVE = (
    "--device spread uses every GPU and CPU memory; --dtype bf16 halves fp32; a smaller "
    "--vit_max_size or --max_new_tokens takes less beyond the weights"
)
_SAVE_DRAWING = (
    "--dtype bf16 halves fp32; a smaller --image_size, --max_rounds, --vit_max_size or "
    "--max_new_tokens takes less beyond the weights"
)
# With --interleave, in place of the flags' own defaults: the released wrapper's.
INTERLEAVE_DEFAULTS = {
    "prompt_style": "inferencer", "image_path": "inferencer", "vit_min_size": 224,
}  # fmt: skip
GUIDANCE: dict[str, Any] = {"cfg_interval": (0.0, 1.0), "cfg_renorm_type": "text_channel"}
_LATENT_STEP = 16  # pixels that a latent token of a release covers, to each side


@dataclass(frozen=True)
class DemoSettings(Settings):
    model_path: str = option("models/ThinkMorph-7B", "release folder", path=True)
    image: str | None = option(None, "image file (required)", path=True)
    question: str | None = option(None, "question about it (required)")
    max_new_tokens: int = option(
        1024, "budget of the answer, over all its rounds; with --interleave of each text",
        **TOKENS,
    )  # fmt: skip
    temperature: float = option(
        0.3, "of sampling; without --do_sample it has no effect", **TEMPERATURES,
        hint="greedy: no --do_sample",
    )  # fmt: skip
    do_sample: bool = option(False, "sample; otherwise greedy")
    seed: int = option(0, "random numbers of sampling", **SEEDS)
    image_skips: int = option(1, "rounds that may follow an <image_start>", **ROUNDS)
    device: str = option(
        "auto", "auto: one GPU, else the CPU; spread: over GPUs, CPU memory and disk",
        choices=("auto", "cpu", "cuda", "spread"),
    )  # fmt: skip
    dtype: str = option("auto", "auto: bf16 on a GPU, fp32 on the CPU", choices=("auto", *DTYPES))
    max_memory: str | None = option(
        None, "with --device spread: weights each device may hold, e.g. 0=6GiB,1=6GiB,cpu=20GiB; "
        "devices not named are not used (default: what is free, less room to work)"
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_memory and self.device != "spread":
            raise ValueError("--max_memory goes with --device spread")

    def dtype_on(self, gpu: bool) -> torch.dtype:
        """Of weights and compute."""
        return DTYPES["bf16" if gpu else "fp32"] if self.dtype == "auto" else DTYPES[self.dtype]


@dataclass(frozen=True)
class DrawingSettings(Settings):
    interleave: bool = option(False, "let the model draw, and write a page of its reasoning")
    out: str = option("results/interleave", "folder of the page", path=True)
    overwrite: bool = option(False, "replace the page that --out holds")
    num_timesteps: int = option(
        50, "flow times of a drawing; one step fewer is taken", **TIMESTEPS
    )
    cfg_text_scale: float = option(4.0, "text guidance; 1: no guidance at all", **SCALES)
    cfg_img_scale: float = option(2.0, "image guidance; 1: none", **SCALES)
    image_size: int | None = option(
        None, "longest side of problem image and drawings in pixels, a multiple of 16 "
        "(default: by --vae_max_size and --vae_min_size)", **SIDES
    )  # fmt: skip
    max_rounds: int = option(3, "pictures drawn at most", at_least=1, at_most=1000)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.interleave:
            given = [f.name for f in fields(self) if getattr(self, f.name) != f.default]
            if given:
                raise ValueError(f"--{given[0]} goes with --interleave")
        if (self.image_size or 0) % _LATENT_STEP:
            raise ValueError(
                f"--image_size must be a multiple of {_LATENT_STEP}, got {self.image_size}"
            )


@dataclass(frozen=True)
class DemoConfig:
    demo: DemoSettings = field(default_factory=DemoSettings)
    drawing: DrawingSettings = field(default_factory=DrawingSettings)
    prompt: PromptSettings = field(default_factory=PromptSettings)

    def __post_init__(self) -> None:
        if self.drawing.interleave and self.demo.device == "spread":
            raise ValueError(
                "--interleave does not go with --device spread, which holds no drawing branch; "
                "use one GPU or --device cpu"
            )

    def sized(self) -> PromptSettings:
        """The prompt settings with the pictures' size in place."""
        size = self.drawing.image_size
        if size is None:
            return self.prompt
        return replace(self.prompt, vae_max_size=size, vae_min_size=size)


def log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------ input


def read_input(settings: DemoSettings) -> tuple[Image.Image, str]:
    """The image and the question, checked before a large model is loaded."""
    if not settings.image or settings.question is None:
        raise ValueError("give an image and a question: --image FILE --question TEXT")
    if not settings.question.strip():
        raise ValueError("the question is empty; give one with --question TEXT")
    if not os.path.isfile(settings.image):
        raise ValueError(f"there is no image file {settings.image}; check --image")
    return decode_image(Path(settings.image)), settings.question


def parse_max_memory(text: str) -> dict[Place, int]:
    """ "0=6GiB,cpu=20GiB" as bytes by GPU index or "cpu"."""
    from accelerate.utils import convert_file_size_to_int

    result: dict[Place, int] = {}
    for part in text.split(","):
        name, _, size = (piece.strip() for piece in part.partition("="))
        try:
            place: Place = name if name == "cpu" else int(name)
            result[place] = convert_file_size_to_int(size)
        except ValueError:
            raise ValueError(
                f"--max_memory: {part!r} is not DEVICE=SIZE such as 0=6GiB or cpu=20GiB"
            ) from None
        if isinstance(place, int) and not 0 <= place < torch.cuda.device_count():
            raise ValueError(
                f"--max_memory names GPU {place}, but torch sees {torch.cuda.device_count()} GPUs"
            )
    return result


# ------------------------------------------------------------------------------ model


def load_model(config: DemoConfig, question: str) -> tuple[BagelBundle, torch.device]:
    """The model, and the device on which its prompts are.

    Raises:
        ValueError: a wrong model folder, one that cannot draw where it should, no GPU where one
            is asked for, or not enough memory.
    """
    settings, draws = config.demo, config.drawing.interleave
    if draws:
        check_can_draw(settings.model_path)
    model, _ = locate_weights(settings.model_path, visual_gen=draws)
    # An upper bound: a full grid of patches.
    rows = model.vit_max_patches_per_side**2 + text_rows(config, model, question)
    rows += settings.max_new_tokens
    if settings.device == "spread":
        return _load_spread(settings, model, rows)
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "--device cuda, but torch sees no GPU (a CPU build of torch, a driver older than its "
            "CUDA, or CUDA_VISIBLE_DEVICES hides it; see INSTALL.md); --device cpu needs none"
        )
    gpu = settings.device != "cpu" and torch.cuda.is_available()
    dtype = settings.dtype_on(gpu)
    place: Place = 0 if gpu else "cpu"
    needed = weight_bytes(model, dtype)
    needed += drawing_bytes(config, model, dtype) if draws else working_bytes(model, rows, dtype)
    # Asking for all devices would take memory on GPUs that are not used.
    free = torch.cuda.mem_get_info(0)[0] if gpu else free_memory()["cpu"]
    check_memory(place, needed, free, _advice(config))
    device = to_device(place)
    return load_bagel(settings.model_path, visual_gen=draws, device=device, dtype=dtype), device


def text_rows(config: DemoConfig, model: BagelConfig, question: str) -> int:
    """Packed tokens of the prompt's texts, which must leave the model positions to answer.

    Raises:
        ValueError: they do not; says whether the question or a flag is to blame.
    """
    tokenizer, _ = load_tokenizer(config.demo.model_path)
    builder = make_builder(tokenizer, model, config.prompt)
    limits = ContextLimits(model.llm.max_position_embeddings, config.demo.max_new_tokens)
    limits.check_settings(builder)
    try:
        context = builder.frame(SMALLEST_IMAGE, question)
        problem = limits.problem(context)
    except BadRow as bad:
        problem = bad.detail
    if problem is not None:
        raise ValueError(f"the question is too long ({len(question)} characters): {problem}")
    return context_length(context)


def _advice(config: DemoConfig) -> str:
    """What to do about a lack of memory."""
    save = _SAVE_DRAWING if config.drawing.interleave else _SAVE
    length = len(config.demo.question or "")
    if length <= _LONG_QUESTION:
        return save
    return f"The question is {length} characters long: a shorter one takes less. {save}"


def check_can_draw(path: str) -> None:
    """Raise ValueError unless a folder has a drawing branch and the autoencoder."""
    lacking = []
    if not any(is_generation_key(key) for key in open_weights(path)):
        lacking.append("the drawing branch (tensors *_moe_gen, vae2llm and llm2vae)")
    if not (Path(path) / AE_FILE).is_file():
        lacking.append(f"the autoencoder ({AE_FILE})")
    if lacking:
        raise ValueError(
            f"{path} cannot draw: it lacks {' and '.join(lacking)}; give a whole release such as "
            "ThinkMorph-7B or a student saved over one, or leave --interleave out"
        )


def drawing_bytes(config: DemoConfig, model: BagelConfig, dtype: torch.dtype) -> int:
    """Bytes that interleaved reasoning takes beyond the model's weights (estimate).

    Raises:
        ValueError: pictures larger than the model's latent grid.
    """
    settings, prompt = config.demo, config.sized()
    limit = model.max_latent_size * _LATENT_STEP
    if prompt.vae_max_size > limit:
        raise ValueError(
            f"pictures of {prompt.vae_max_size} pixels are too large for this model, whose limit "
            f"is {limit}; give --image_size {limit} or less"
        )
    latents = (prompt.vae_max_size // _LATENT_STEP) ** 2
    side = min(prompt.vit_max_size // model.vision.patch_size, model.vit_max_patches_per_side)
    looks = config.drawing.max_rounds + 1
    patches = side**2
    rows = looks * (latents + patches + settings.max_new_tokens) + 2 * _SYSTEM_ROWS
    cache = 2 * model.llm.num_hidden_layers * model.llm.num_key_value_heads * model.llm.head_dim
    held = 2 * rows * cache * dtype.itemsize  # once more, side by side, while drawing
    # The autoencoder in fp32; six tensors of the picture's size in its widest last level.
    autoencoder = (Path(settings.model_path) / AE_FILE).stat().st_size
    autoencoder += 6 * 4 * AutoEncoderConfig().width * prompt.vae_max_size**2
    return held + autoencoder + working_bytes(model, 3 * latents + patches, dtype)


def _load_spread(
    settings: DemoSettings, config: BagelConfig, rows: int
) -> tuple[BagelBundle, torch.device]:
    given = settings.max_memory
    memory = parse_max_memory(given) if given else free_memory()
    gpu = any(isinstance(place, int) for place in memory)
    dtype = settings.dtype_on(gpu)
    if not given:
        reserve = working_bytes(config, rows, dtype)
        memory = {place: max(size - reserve, 0) for place, size in memory.items()}
    if not gpu:
        log("no GPU: the CPU computes, and reads from disk what its memory does not hold")
    bundle, placement = load_bagel_spread(settings.model_path, dtype=dtype, max_memory=memory)
    log(placement.describe())
    return bundle, to_device(placement.main)


def check_memory(place: Place, needed: int, free: int, advice: str = _SAVE) -> None:
    """Raise ValueError unless `needed` bytes are free."""
    if needed > free:
        raise ValueError(
            f"not enough memory: this takes about {needed / 1e9:.3g} GB, and {to_device(place)} "
            f"has {free / 1e9:.3g} GB free. {advice}"
        )


# ------------------------------------------------------------------------------ answer


class TextStream:
    """Writes the text of a growing list of ids, each part once.

    Byte-level tokens may end inside a character, which decodes to U+FFFD for the time being; so
    such an end waits for the rest of its bytes, or for `finish`.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], write: Callable[[str], Any]) -> None:
        self.decode, self.write = decode, write
        self.written = ""

    def _show(self, text: str) -> None:
        assert text.startswith(self.written), (self.written, text)
        if len(text) > len(self.written):
            self.write(text[len(self.written) :])
            self.written = text

    def update(self, ids: Sequence[int]) -> None:
        self._show(self.decode(ids).rstrip("\ufffd"))

    def finish(self, ids: Sequence[int]) -> str:
        """Write what is left; the whole text."""
        self._show(self.decode(ids))
        return self.written


def stream_answer(
    bundle: BagelBundle,
    device: torch.device,
    context: Context,
    settings: DemoSettings,
    write: Callable[[str], Any],
) -> tuple[Completion, str]:
    """Decode one answer, handing its text to `write` piece by piece; the answer and its text.

    The ids are those of `sample_completions` for row 0 of step 0 with this seed. Markers between
    rounds are left out of the text.
    """
    budget = settings.max_new_tokens
    uniforms = None
    if settings.do_sample:
        uniforms = position_uniforms(settings.seed, 0, 0, budget + 1)[None].to(device)
    stream = TextStream(lambda ids: bundle.tokenizer.decode(ids, skip_special_tokens=True), write)
    # The token that follows the last of the budget is read too, but is no part of the answer.
    generation = generate(
        bundle.model,
        pack([context], bundle.special_tokens).to(device),
        bundle.special_tokens,
        max_new_tokens=budget,
        temperature=settings.temperature,
        uniforms=uniforms,
        continues=marker_check(bundle.tokenizer.decode, IMAGE_MARKER),
        max_image_skips=settings.image_skips,
        check_every=4 if device.type == "cuda" else 1,  # a check makes a GPU wait
        on_check=lambda read: stream.update(read()[0][: budget - 1]),
    )[0]
    completion = to_completion(generation)
    return completion, stream.finish(completion.ids)


class TellingInferencer(InterleaveInferencer):
    """Hands over each text and picture when it is made, not only at the end."""

    tell: Callable[[Part], None] = print

    def write(self, *args: Any, **kwargs: Any) -> list[tuple[str, TextSegment]]:
        replies = super().write(*args, **kwargs)
        for text, _ in replies:
            self.tell(text)
        return replies

    def draw(self, *args: Any, **kwargs: Any) -> list[Image.Image]:
        pictures = super().draw(*args, **kwargs)
        for picture in pictures:
            self.tell(picture)
        return pictures


def interleave(
    bundle: BagelBundle, config: DemoConfig, image: Image.Image, question: str
) -> InterleavePage:
    """Let the model write and draw; print its texts and the paths of its pictures as they come.

    Returns:
        the page, which holds all parts but is not finished.
    """
    settings, drawing = config.demo, config.drawing
    builder = make_builder(
        bundle.tokenizer, bundle.config, replace(config.sized(), image_path="direct")
    )
    prompts = builder.prompts
    facts = {"model": settings.model_path, "seed": settings.seed} | {
        name: getattr(drawing, name)
        for name in ("num_timesteps", "cfg_text_scale", "cfg_img_scale", "max_rounds")
    }
    page = InterleavePage(Path(drawing.out), image, question, facts)
    started = time.perf_counter()

    def tell(part: Part) -> None:
        nonlocal started
        path = page.add(part)
        print(part if path is None else f"[{path}]", flush=True)
        kind = "text" if path is None else "picture"
        log(f"{kind} in {time.perf_counter() - started:.1f} s")
        started = time.perf_counter()

    inferencer = TellingInferencer(
        bundle.model, bundle.vae, bundle.tokenizer, builder.vae_transform, builder.vit_transform,
        bundle.special_tokens, system_prompt=prompts.system or "",
    )  # fmt: skip
    inferencer.tell = tell
    inferencer(
        image,
        prompts.question_prefix + question + prompts.instruction_suffix,
        think=bool(prompts.system),
        max_think_token_n=settings.max_new_tokens,
        do_sample=settings.do_sample,
        text_temperature=settings.temperature,
        num_timesteps=drawing.num_timesteps,
        cfg_text_scale=drawing.cfg_text_scale,
        cfg_img_scale=drawing.cfg_img_scale,
        max_rounds=drawing.max_rounds,
        image_skips=settings.image_skips,
        seed=settings.seed,
        **GUIDANCE,
    )
    return page


def run(config: DemoConfig) -> int:
    """Load, ask, print."""
    settings = config.demo
    image, question = read_input(settings)
    config.prompt.build()  # a wrong prompts file is found before the model is loaded
    if config.drawing.interleave:
        check_folder(Path(config.drawing.out), config.drawing.overwrite)
    if not settings.do_sample and settings.temperature != DemoSettings().temperature:
        log("note: --temperature has no effect without --do_sample")
    started = time.perf_counter()
    bundle, device = load_model(config, question)
    dtype = str(bundle.model.dtype).removeprefix("torch.")
    log(f"loaded {settings.model_path} in {time.perf_counter() - started:.1f} s: {device}, {dtype}")
    if config.drawing.interleave:
        return run_interleave(bundle, config, image, question)
    context = make_builder(bundle.tokenizer, bundle.config, config.prompt).question(image, question)
    started = time.perf_counter()
    completion, text = stream_answer(
        bundle, device, context, settings, lambda piece: print(piece, end="", flush=True)
    )
    seconds = time.perf_counter() - started
    answer = extract_answer(text)
    print(f"\nanswer: {'none' if answer is None else answer.strip()}")
    if completion.capped:
        log(f"the budget of {settings.max_new_tokens} tokens ended it; see --max_new_tokens")
    elif answer is None:
        log("the text holds no <answer>...</answer>")
    count = len(completion.ids)
    log(
        f"{count} tokens in {seconds:.1f} s, {count / seconds:.1f} tokens/s "
        f"(the {context_length(context)} rows of the prompt included)"
    )
    return 0


def run_interleave(
    bundle: BagelBundle, config: DemoConfig, image: Image.Image, question: str
) -> int:
    """Reason with pictures, then finish the page."""
    page = interleave(bundle, config, image, question)
    answer = extract_answer("".join(page.texts))
    answer = None if answer is None else answer.strip()
    written = page.finish(answer)
    print(f"answer: {'none' if answer is None else answer}\npage: {written}")
    if answer is None:
        log("the texts hold no <answer>...</answer>; see --max_new_tokens and --max_rounds")
    if not page.drawn:
        log("the model drew nothing: it never asked for a picture with <image_start>")
    return 0


def parse(argv: Sequence[str] | None) -> DemoConfig:
    """The flags; those that --interleave leaves open have defaults of their own then."""
    assert __doc__ is not None
    about = __doc__.splitlines()[0]
    config = parse_config(DemoConfig, argv, about)
    if config.drawing.interleave:
        config = parse_config(DemoConfig, argv, about, INTERLEAVE_DEFAULTS)
        if config.prompt.image_path != "inferencer":
            raise ValueError(
                "--interleave resizes images for the autoencoder first, which is --image_path "
                "inferencer; leave --image_path out"
            )
    return config


def main(argv: Sequence[str] | None = None) -> int:
    config = parse(argv)
    try:
        with memory_errors("for the answer", _advice(config)):
            return run(config)
    except KeyboardInterrupt:
        print()
        return 130


if __name__ == "__main__":
    run_main(main)
