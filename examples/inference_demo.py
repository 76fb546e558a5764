# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
r"""Ask the text-only student about one image; the answer is printed as it is made.

    python examples/inference_demo.py --image FILE --question TEXT --model_path DIR

Without a large model, with the miniature that `make demo` starts from (its own prompts and sizes):

    python examples/inference_demo.py --model_path examples/tiny-base \
        --config examples/demo/images.yaml --prompts examples/demo/prompts.yaml \
        --image examples/demo/maze.png --question "Which moves reach the goal?"

`--device spread` divides the model over all GPUs, then CPU memory, then reads the rest from the
release's file, layer by layer; the slower places are visited for every token. The text goes to
stdout, timing and placement to stderr. Exit code 1: wrong input, or not enough memory; 2: unknown
flag. The small maze of the example is one that no training saw; from the repository's root

    python -c "from data.worlds import spatial_navigation as world, writer; \
        maze = world.Maze.parse('FFFF/FFFS/FHHF/GFFH'); \
        open('examples/demo/maze.png', 'wb').write(writer.encode_png(world.render(maze, '', 14)))"

draws it. A right answer is L,L,L,D,D.
"""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also runs as a plain script

import torch
from PIL import Image

from data.packing import context_length, pack
from data.sequence import Completion, Context
from data.transforms import decode_image
from modeling import BagelBundle, load_bagel
from modeling.bagel.config import BagelConfig
from modeling.bagel.generate import generate, marker_check
from modeling.checkpoint import locate_weights
from modeling.spread import (
    Place,
    free_memory,
    load_bagel_spread,
    to_device,
    weight_bytes,
    working_bytes,
)
from scripts.visual_opsd.cli import option, parse_config, run_main
from scripts.visual_opsd.config import PromptSettings
from scripts.visual_opsd.on_policy_sampler import IMAGE_MARKER, position_uniforms, to_completion
from scripts.visual_opsd.rows import make_builder
from scripts.visual_opsd.scoring import extract_answer

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_SYSTEM_ROWS = 512  # more than a system prompt takes
_SAVE = (
    "--device spread uses every GPU and CPU memory; --dtype bf16 halves fp32; a smaller "
    "--vit_max_size or --max_new_tokens takes less beyond the weights"
)


@dataclass(frozen=True)
class DemoSettings:
    model_path: str = option("models/ThinkMorph-7B", "release folder")
    image: str | None = option(None, "image file (required)")
    question: str | None = option(None, "question about it (required)")
    max_new_tokens: int = option(1024, "budget of the answer, over all its rounds")
    temperature: float = option(0.3, "of sampling; without --do_sample it has no effect")
    do_sample: bool = option(False, "sample; otherwise greedy")
    seed: int = option(0, "random numbers of sampling")
    image_skips: int = option(1, "rounds that may follow an <image_start>")
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
        if self.max_new_tokens < 1 or self.image_skips < 0 or self.seed < 0:
            raise ValueError("max_new_tokens must be at least 1, image_skips and seed at least 0")
        if self.temperature <= 0:
            raise ValueError(
                f"temperature must be positive, got {self.temperature}; greedy: no --do_sample"
            )
        if self.max_memory and self.device != "spread":
            raise ValueError("--max_memory goes with --device spread")

    def dtype_on(self, gpu: bool) -> torch.dtype:
        """Of weights and compute."""
        return DTYPES["bf16" if gpu else "fp32"] if self.dtype == "auto" else DTYPES[self.dtype]


@dataclass(frozen=True)
class DemoConfig:
    demo: DemoSettings = field(default_factory=DemoSettings)
    prompt: PromptSettings = field(default_factory=PromptSettings)


def log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------ input


def read_input(settings: DemoSettings) -> tuple[Image.Image, str]:
    """The image and the question, checked before a large model is loaded."""
    if not settings.image or settings.question is None:
        raise ValueError("give an image and a question: --image FILE --question TEXT")
    if not settings.question.strip():
        raise ValueError("the question is empty; give one with --question TEXT")
    if not Path(settings.image).is_file():
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


def load_model(settings: DemoSettings, question: str) -> tuple[BagelBundle, torch.device]:
    """The model, and the device on which its prompts are.

    Raises:
        ValueError: a wrong model folder, no GPU where one is asked for, or not enough memory.
    """
    config, _ = locate_weights(settings.model_path)
    # An upper bound: a full grid of patches, and no token shorter than a character.
    rows = config.vit_max_patches_per_side**2 + len(question) + _SYSTEM_ROWS
    rows += settings.max_new_tokens
    if settings.device == "spread":
        return _load_spread(settings, config, rows)
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "--device cuda, but torch sees no GPU (a CPU build of torch, a driver older than its "
            "CUDA, or CUDA_VISIBLE_DEVICES hides it; see INSTALL.md); --device cpu needs none"
        )
    gpu = settings.device != "cpu" and torch.cuda.is_available()
    dtype = settings.dtype_on(gpu)
    place: Place = 0 if gpu else "cpu"
    needed = weight_bytes(config, dtype) + working_bytes(config, rows, dtype)
    # Asking for all devices would take memory on GPUs that are not used.
    check_memory(place, needed, torch.cuda.mem_get_info(0)[0] if gpu else free_memory()["cpu"])
    return load_bagel(settings.model_path, device=to_device(place), dtype=dtype), to_device(place)


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


def check_memory(place: Place, needed: int, free: int) -> None:
    """Raise ValueError unless `needed` bytes are free."""
    if needed > free:
        raise ValueError(
            f"not enough memory: this takes about {needed / 1e9:.3g} GB, and {to_device(place)} "
            f"has {free / 1e9:.3g} GB free. {_SAVE}"
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


def _out_of_memory(error: BaseException) -> bool:
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or "can't allocate memory" in str(error)


def run(config: DemoConfig) -> int:
    """Load, ask, print."""
    settings = config.demo
    image, question = read_input(settings)
    config.prompt.build()  # a wrong prompts file is found before the model is loaded
    if not settings.do_sample and settings.temperature != DemoSettings().temperature:
        log("note: --temperature has no effect without --do_sample")
    started = time.perf_counter()
    bundle, device = load_model(settings, question)
    dtype = str(bundle.model.dtype).removeprefix("torch.")
    log(f"loaded {settings.model_path} in {time.perf_counter() - started:.1f} s: {device}, {dtype}")
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


def main(argv: Sequence[str] | None = None) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character
    assert __doc__ is not None
    config = parse_config(DemoConfig, argv, __doc__.splitlines()[0])
    try:
        return run(config)
    except KeyboardInterrupt:
        print()
        return 130
    except (RuntimeError, MemoryError) as error:
        if not _out_of_memory(error):
            raise
        cause = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"not enough memory ({cause}). {_SAVE}") from error


if __name__ == "__main__":
    run_main(main)
