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
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also runs as a plain script

import torch
from PIL import Image
from transformers import TextStreamer

from data.limits import SMALLEST_IMAGE, ContextLimits
from data.packing import context_length
from data.sequence import Completion, Context
from data.thinkmorph import BadRow
from data.transforms import decode_image
from examples.interleave_page import InterleavePage, check_folder
from inference.interleave import Part
from inferencer import InterleaveInferencer
from modeling import BagelBundle, load_bagel
from modeling.autoencoder import AE_FILE
from modeling.bagel.config import BagelConfig
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
from scripts.visual_opsd.on_policy_sampler import SamplerSettings, sample_completions
from scripts.visual_opsd.rows import make_builder

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_LATENT_STEP = 16  # pixels that a latent token of a release covers, to each side
# With --interleave, in place of the flags' own defaults: the released wrapper's.
INTERLEAVE_DEFAULTS = {
    "prompt_style": "inferencer", "image_path": "inferencer", "vit_min_size": 224,
}  # fmt: skip
GUIDANCE: dict[str, Any] = {"cfg_interval": (0.0, 1.0), "cfg_renorm_type": "text_channel"}


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

    def sampler(self, device: torch.device) -> SamplerSettings:
        return SamplerSettings(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            do_sample=self.do_sample,
            max_image_skips=self.image_skips,
            check_every=4 if device.type == "cuda" else 1,  # a check makes a GPU wait
        )


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

    def memory_advice(self) -> str:
        """What takes less memory."""
        if self.drawing.interleave:
            flags = "--image_size, --max_rounds, --vit_max_size or --max_new_tokens"
            spread = ""
        else:
            flags = "--vit_max_size or --max_new_tokens"
            spread = "; --device spread uses every GPU and CPU memory"
        return (
            f"--dtype bf16 halves fp32; a shorter question or a smaller {flags} takes less beyond "
            f"the weights{spread}"
        )


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
            is asked for, a question that is too long, or not enough memory.
    """
    settings, draws = config.demo, config.drawing.interleave
    if draws:
        check_can_draw(settings.model_path)
    model, _ = locate_weights(settings.model_path, visual_gen=draws)
    tokens = count_tokens(config, model, question)
    if settings.device == "spread":
        return load_spread(settings, model, tokens)
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "--device cuda, but torch sees no GPU (a CPU build of torch, a driver older than its "
            "CUDA, or CUDA_VISIBLE_DEVICES hides it; see INSTALL.md); --device cpu needs none"
        )
    gpu = settings.device != "cpu" and torch.cuda.is_available()
    dtype = settings.dtype_on(gpu)
    device = to_device(0 if gpu else "cpu")
    needed = weight_bytes(model, dtype) + working_bytes(model, tokens, dtype)
    # Asking for all devices would take memory on GPUs that are not used.
    free = torch.cuda.mem_get_info(0)[0] if gpu else free_memory()["cpu"]
    if needed > free:
        raise ValueError(
            f"not enough memory: this takes about {needed / 1e9:.3g} GB, and {device} has "
            f"{free / 1e9:.3g} GB free. {config.memory_advice()}"
        )
    return load_bagel(settings.model_path, visual_gen=draws, device=device, dtype=dtype), device


def count_tokens(config: DemoConfig, model: BagelConfig, question: str) -> int:
    """Packed tokens of prompt, pictures and answer at most (every ViT grid taken as full).

    Raises:
        ValueError: the texts leave the model no positions to answer, or pictures are larger than
            its latent grid; says whether the question or a flag is to blame.
    """
    tokenizer, _ = load_tokenizer(config.demo.model_path)
    builder = make_builder(tokenizer, model, config.prompt)
    answer = config.demo.max_new_tokens
    limits = ContextLimits(model.llm.max_position_embeddings, answer)
    limits.check_settings(builder)
    try:
        context = builder.frame(SMALLEST_IMAGE, question)
        problem = limits.problem(context)
    except BadRow as bad:
        problem = bad.detail
    if problem is not None:
        raise ValueError(f"the question is too long ({len(question)} characters): {problem}")
    texts, patches = context_length(context), model.vit_max_patches_per_side**2
    if not config.drawing.interleave:
        return texts + patches + answer
    side, limit = config.sized().vae_max_size, model.max_latent_size * _LATENT_STEP
    if side > limit:
        raise ValueError(
            f"pictures of {side} pixels are too large for this model, whose limit is {limit}; "
            f"give --image_size {limit} or less"
        )
    latents = (side // _LATENT_STEP) ** 2
    return texts + (config.drawing.max_rounds + 1) * (latents + patches + answer)


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


def load_spread(
    settings: DemoSettings, config: BagelConfig, tokens: int
) -> tuple[BagelBundle, torch.device]:
    given = settings.max_memory
    memory = parse_max_memory(given) if given else free_memory()
    gpu = any(isinstance(place, int) for place in memory)
    dtype = settings.dtype_on(gpu)
    if not given:
        reserve = working_bytes(config, tokens, dtype)
        memory = {place: max(size - reserve, 0) for place, size in memory.items()}
    if not gpu:
        log("no GPU: the CPU computes, and reads from disk what its memory does not hold")
    bundle, placement = load_bagel_spread(settings.model_path, dtype=dtype, max_memory=memory)
    log(placement.describe())
    return bundle, to_device(placement.main)


# ------------------------------------------------------------------------------ answer


def print_answer(
    bundle: BagelBundle, device: torch.device, context: Context, settings: DemoSettings
) -> tuple[Completion, str]:
    """Decode one answer and print it word by word; its ids and its text, without markers."""
    streamer = TextStreamer(bundle.tokenizer, skip_special_tokens=True)
    printed = 0

    def show(_: int, ids: Sequence[int]) -> None:
        nonlocal printed
        streamer.put(torch.tensor(ids[printed:]))
        printed = max(printed, len(ids))

    completion = sample_completions(
        bundle.model,
        [context],
        [0],
        tokenizer=bundle.tokenizer,
        special=bundle.special_tokens,
        settings=settings.sampler(device),
        seed=settings.seed,
        step=0,
        device=device,
        on_ids=show,
    )[0]
    show(0, completion.ids)
    streamer.end()
    return completion, bundle.tokenizer.decode(completion.ids, skip_special_tokens=True)


def answer_in_text(
    bundle: BagelBundle,
    device: torch.device,
    config: DemoConfig,
    image: Image.Image,
    question: str,
) -> None:
    """The text-only student: print its reasoning and its answer."""
    context = make_builder(bundle.tokenizer, bundle.config, config.prompt).question(image, question)
    started = time.perf_counter()
    completion, text = print_answer(bundle, device, context, config.demo)
    seconds = time.perf_counter() - started
    answer = extract_answer(text)
    print(f"answer: {'none' if answer is None else answer.strip()}")
    if completion.capped:
        budget = config.demo.max_new_tokens
        log(f"the budget of {budget} tokens ended it; see --max_new_tokens")
    elif answer is None:
        log("the text holds no <answer>...</answer>")
    count = len(completion.ids)
    log(
        f"{count} tokens in {seconds:.1f} s, {count / seconds:.1f} tokens/s "
        f"(the {context_length(context)} tokens of the prompt included)"
    )


def answer_with_drawings(
    bundle: BagelBundle, config: DemoConfig, image: Image.Image, question: str
) -> None:
    """A model that draws: print its texts and the paths of its pictures, and write the page."""
    settings, drawing = config.demo, config.drawing
    # The inferencer itself resizes for the autoencoder first.
    prompt = replace(config.sized(), image_path="direct")
    builder = make_builder(bundle.tokenizer, bundle.config, prompt)
    prompts = builder.prompts
    options: dict[str, Any] = {
        name: getattr(drawing, name)
        for name in ("num_timesteps", "cfg_text_scale", "cfg_img_scale", "max_rounds")
    }
    facts = {"model": settings.model_path, "seed": settings.seed, **options}
    page = InterleavePage(Path(drawing.out), image, question, facts)
    started = time.perf_counter()

    def show(part: Part) -> None:
        nonlocal started
        path = page.add(part)
        print(part if path is None else f"[{path}]", flush=True)
        kind = "text" if path is None else "picture"
        log(f"{kind} in {time.perf_counter() - started:.1f} s")
        started = time.perf_counter()

    inferencer = InterleaveInferencer(
        bundle.model,
        bundle.vae,
        bundle.tokenizer,
        builder.vae_transform,
        builder.vit_transform,
        bundle.special_tokens,
        system_prompt=prompts.system or "",
    )
    inferencer(
        image,
        prompts.question_prefix + question + prompts.instruction_suffix,
        think=bool(prompts.system),
        max_think_token_n=settings.max_new_tokens,
        do_sample=settings.do_sample,
        text_temperature=settings.temperature,
        image_skips=settings.image_skips,
        seed=settings.seed,
        on_part=show,
        **options,
        **GUIDANCE,
    )
    answer = extract_answer("".join(page.texts))
    answer = None if answer is None else answer.strip()
    written = page.finish(answer)
    print(f"answer: {'none' if answer is None else answer}\npage: {written}")
    if answer is None:
        log("the texts hold no <answer>...</answer>; see --max_new_tokens and --max_rounds")
    if not page.drawn:
        log("the model drew nothing: it never asked for a picture with <image_start>")


def run(config: DemoConfig) -> None:
    """Check what was given, load, answer."""
    settings, drawing = config.demo, config.drawing
    image, question = read_input(settings)
    config.prompt.build()  # a wrong prompts file is found before the model is loaded
    if drawing.interleave:
        check_folder(Path(drawing.out), drawing.overwrite)
    if not settings.do_sample and settings.temperature != DemoSettings().temperature:
        log("note: --temperature has no effect without --do_sample")
    started = time.perf_counter()
    bundle, device = load_model(config, question)
    dtype = str(bundle.model.dtype).removeprefix("torch.")
    log(f"loaded {settings.model_path} in {time.perf_counter() - started:.1f} s: {device}, {dtype}")
    if drawing.interleave:
        answer_with_drawings(bundle, config, image, question)
    else:
        answer_in_text(bundle, device, config, image, question)


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
        with memory_errors("for the answer", config.memory_advice()):
            run(config)
    except KeyboardInterrupt:
        print()
        return 130
    return 0


if __name__ == "__main__":
    run_main(main)
