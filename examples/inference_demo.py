# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
r"""Ask about one image: the text-only student, or with --interleave a model that draws.

    python examples/inference_demo.py --image FILE --question TEXT --model_path DIR

Without a large model, with the miniature that `make demo` starts from (its own prompts and sizes):

    python examples/inference_demo.py --model_path examples/tiny-base \
        --config examples/demo/images.yaml --prompts examples/demo/prompts.yaml \
        --image examples/demo/maze.png --question "Which moves reach the goal?"

A right answer is L,L,L,D,D. No training saw this maze; from the repository's root

    python -c "from data.worlds import spatial_navigation as world, writer; \
        maze = world.Maze.parse('FFFF/FFFS/FHHF/GFFH'); \
        open('examples/demo/maze.png', 'wb').write(writer.encode_png(world.render(maze, '', 14)))"

draws it. A whole release (drawing branch and autoencoder) draws visual thoughts and looks at them:

    python examples/inference_demo.py --interleave --image FILE --question TEXT --model_path DIR

writes round_1.png, ..., answer.txt and a page with text and pictures in their order (index.html) to
`--out`. Prompt, image sizes and guidance are then those of the released wrapper (`--prompt_style
inferencer`, `--vit_min_size 224`) unless flags say otherwise.

`--device spread` divides the model over all GPUs, then CPU memory, then reads the rest from the
release's file, layer by layer; the slower places are visited for every token. Text and paths go
to stdout, timing and placement to stderr. Exit code 1: wrong input, or not enough memory; 2:
unknown flag.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also runs as a plain script

import torch
from PIL import Image
from transformers import TextStreamer

from data.limits import SMALLEST_IMAGE, ContextLimits
from data.packing import context_length
from data.sequence import Context, ContextBuilder
from data.thinkmorph import BadRow
from data.transforms import decode_image
from examples.demo_settings import DemoConfig, DemoSettings, parse
from examples.interleave_page import InterleavePage, check_folder
from inference.contexts import device_of
from inference.interleave import Part
from inferencer import InterleaveInferencer
from modeling import BagelBundle, load_bagel
from modeling.autoencoder import AE_FILE
from modeling.bagel.config import BagelConfig
from modeling.host.memory import memory_errors
from modeling.release.checkpoint import is_generation_key
from modeling.release.spread import (
    Place,
    free_memory,
    load_bagel_spread,
    to_device,
    weight_bytes,
    working_bytes,
)
from modeling.release.weight_files import open_weights
from scripts.visual_opsd.cli import run_main
from scripts.visual_opsd.evaluation.scoring import extract_answer
from scripts.visual_opsd.on_policy_sampler import SamplerSettings, sample_completions
from scripts.visual_opsd.rows import open_builder

_SAVE = (
    "--dtype bf16 halves fp32; a shorter question, a smaller --vit_max_size or --max_new_tokens, "
    "with --interleave also --image_size or --max_rounds, takes less beyond the weights; without "
    "--interleave, --device spread uses every GPU and CPU memory"
)
GUIDANCE: dict[str, Any] = {"cfg_interval": (0.0, 1.0), "cfg_renorm_type": "text_channel"}


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


def check_question(question: str, limits: ContextLimits, builder: ContextBuilder) -> int:
    """Packed tokens of the prompt's texts.

    Raises:
        ValueError: they leave the model no positions to answer; says whether the question or a
            flag is to blame.
    """
    limits.check_settings(builder)
    try:
        context = builder.frame(SMALLEST_IMAGE, question)
        problem = limits.problem(context)
    except BadRow as bad:
        problem = bad.detail
    if problem is not None:
        raise ValueError(f"the question is too long ({len(question)} characters): {problem}")
    return context_length(context)


# ------------------------------------------------------------------------------ model


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


def load_model(config: DemoConfig, model: BagelConfig, tokens: int) -> BagelBundle:
    """The model; `tokens` of prompt and answer are what a spread one keeps memory for.

    Raises:
        ValueError: no GPU where one is asked for, or not enough memory for the weights.
    """
    settings = config.demo
    if settings.device == "spread":
        return load_spread(settings, model, tokens)
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "--device cuda, but torch sees no GPU (a CPU build of torch, a driver older than its "
            "CUDA, or CUDA_VISIBLE_DEVICES hides it; see INSTALL.md); --device cpu needs none"
        )
    gpu = settings.device != "cpu" and torch.cuda.is_available()
    device, dtype = to_device(0 if gpu else "cpu"), settings.dtype_on(gpu)
    # Asking for all devices would take memory on GPUs that are not used.
    free = torch.cuda.mem_get_info(0)[0] if gpu else free_memory()["cpu"]
    needed = weight_bytes(model, dtype)
    if needed > free:
        raise ValueError(
            f"not enough memory: the weights take {needed / 1e9:.3g} GB, and {device} has "
            f"{free / 1e9:.3g} GB free. {_SAVE}"
        )
    draws = config.drawing.interleave
    return load_bagel(settings.model_path, visual_gen=draws, device=device, dtype=dtype)


def load_spread(settings: DemoSettings, model: BagelConfig, tokens: int) -> BagelBundle:
    given = settings.max_memory
    memory = parse_max_memory(given) if given else free_memory()
    gpu = any(isinstance(place, int) for place in memory)
    dtype = settings.dtype_on(gpu)
    if not given:
        reserve = working_bytes(model, tokens, dtype)
        memory = {place: max(size - reserve, 0) for place, size in memory.items()}
    if not gpu:
        log("no GPU: the CPU computes, and reads from disk what its memory does not hold")
    bundle, placement = load_bagel_spread(settings.model_path, dtype=dtype, max_memory=memory)
    log(placement.describe())
    return bundle


# ------------------------------------------------------------------------------ answer


def answer_in_text(bundle: BagelBundle, context: Context, settings: DemoSettings) -> None:
    """The text-only student: print its reasoning word by word, and its answer."""
    device = device_of(bundle.model)
    streamer = TextStreamer(bundle.tokenizer, skip_special_tokens=True)
    printed = 0

    def show(_: int, ids: Sequence[int]) -> None:
        nonlocal printed
        streamer.put(torch.tensor(ids[printed:]))
        printed = max(printed, len(ids))

    started = time.perf_counter()
    completion = sample_completions(
        bundle.model,
        [context],
        [0],
        tokenizer=bundle.tokenizer,
        special=bundle.special_tokens,
        settings=SamplerSettings(
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            do_sample=settings.do_sample,
            max_image_skips=settings.image_skips,
            check_every=4 if device.type == "cuda" else 1,  # a check makes a GPU wait
        ),
        seed=settings.seed,
        step=0,
        device=device,
        on_ids=show,
    )[0]
    show(0, completion.ids)
    streamer.end()
    seconds = time.perf_counter() - started
    answer = print_answer(bundle.tokenizer.decode(completion.ids, skip_special_tokens=True))
    if completion.capped:
        log(f"the budget of {settings.max_new_tokens} tokens ended it; see --max_new_tokens")
    elif answer is None:
        log("the text holds no <answer>...</answer>")
    count = len(completion.ids)
    log(
        f"{count} tokens in {seconds:.1f} s, {count / seconds:.1f} tokens/s "
        f"(the {context_length(context)} tokens of the prompt included)"
    )


def print_answer(text: str) -> str | None:
    """The answer that a text holds, printed."""
    answer = extract_answer(text)
    answer = None if answer is None else answer.strip()
    print(f"answer: {'none' if answer is None else answer}")
    return answer


def answer_with_drawings(
    bundle: BagelBundle,
    builder: ContextBuilder,
    config: DemoConfig,
    image: Image.Image,
    question: str,
) -> None:
    """A model that draws: print its texts and the paths of its pictures, and write the page."""
    settings, drawing, prompts = config.demo, config.drawing, builder.prompts
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
    answer = print_answer("".join(page.texts))
    print(f"page: {page.finish(answer)}")
    if answer is None:
        log("the texts hold no <answer>...</answer>; see --max_new_tokens and --max_rounds")
    if not page.drawn:
        log("the model drew nothing: it never asked for a picture with <image_start>")


def run(config: DemoConfig) -> None:
    """Check what was given, load, answer."""
    settings, drawing = config.demo, config.drawing
    image, question = read_input(settings)
    if drawing.interleave:
        check_can_draw(settings.model_path)
    builder, model = open_builder(
        settings.model_path, config.contexts(), visual_gen=drawing.interleave
    )
    limits = ContextLimits(model.llm.max_position_embeddings, settings.max_new_tokens)
    tokens = check_question(question, limits, builder) + settings.max_new_tokens
    if drawing.interleave:
        size, limit = config.contexts().vae_max_size, builder.latent_side * builder.latent_stride
        if size > limit:
            raise ValueError(
                f"pictures of {size} pixels are too large for this model, whose limit is {limit}; "
                f"give --image_size {limit} or less"
            )
        check_folder(Path(drawing.out), drawing.overwrite)
    if not settings.do_sample and settings.temperature != DemoSettings().temperature:
        log("note: --temperature has no effect without --do_sample")
    started = time.perf_counter()
    bundle = load_model(config, model, tokens + model.vit_max_patches_per_side**2)
    seconds, device = time.perf_counter() - started, device_of(bundle.model)
    dtype = str(bundle.model.dtype).removeprefix("torch.")
    log(f"loaded {settings.model_path} in {seconds:.1f} s: {device}, {dtype}")
    if drawing.interleave:
        answer_with_drawings(bundle, builder, config, image, question)
    else:
        answer_in_text(bundle, builder.question(image, question), settings)


def main(argv: Sequence[str] | None = None) -> int:
    assert __doc__ is not None
    config = parse(argv, __doc__.splitlines()[0])
    try:
        with memory_errors("for the answer", _SAVE):
            run(config)
    except KeyboardInterrupt:
        print()
        return 130
    return 0


if __name__ == "__main__":
    run_main(main)
