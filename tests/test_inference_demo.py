# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""examples/inference_demo.py: what it prints is what the sampler gives, wherever it computes."""

from __future__ import annotations

import importlib
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from data.sequence import ContextBuilder
from modeling import load_bagel
from scripts.visual_opsd.config import PromptSettings
from scripts.visual_opsd.on_policy_sampler import SamplerSettings, sample_completions
from scripts.visual_opsd.rows import make_builder
from tests.conftest import TINY_BAGEL, load_golden
from tests.modeling.release.test_spread import LAYER, file_bytes

demo: Any = importlib.import_module("examples.inference_demo")  # a script, no package's module

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "tests" / "golden" / "images" / "a.png"
QUESTION = "What color is the square?"
SMALL = ("--vit_max_size", "112", "--vit_min_size", "56")


def arguments(*more: str, image: Path | str = PICTURE, question: str = QUESTION) -> list[str]:
    given = ["--model_path", str(TINY_BAGEL), "--image", str(image), "--question", question]
    return [*given, "--device", "cpu", *SMALL, *more]  # the last of a repeated flag counts


def run(capsys: pytest.CaptureFixture[str], *more: str) -> tuple[str, str]:
    """stdout and stderr of a run that must succeed."""
    capsys.readouterr()
    assert demo.main(arguments(*more)) == 0
    captured = capsys.readouterr()
    return captured.out, captured.err


@pytest.fixture(scope="module")
def bundle() -> Any:
    return load_bagel(TINY_BAGEL)


def sampler_text(bundle: Any, context: Any, seed: int = 0, **settings: Any) -> tuple[Any, str]:
    completion = sample_completions(
        bundle.model, [context], [0], tokenizer=bundle.tokenizer, special=bundle.special_tokens,
        settings=SamplerSettings(**settings), seed=seed, step=0,
    )[0]  # fmt: skip
    return completion, bundle.tokenizer.decode(completion.ids, skip_special_tokens=True)


def student_context(bundle: Any) -> Any:
    settings = PromptSettings(vit_max_size=112, vit_min_size=56)
    builder = make_builder(bundle.tokenizer, bundle.config, settings)
    return builder.question(Image.open(PICTURE), QUESTION)


def test_greedy_text_is_the_samplers(bundle: Any, capsys: pytest.CaptureFixture[str]) -> None:
    context = student_context(bundle)
    completion, text = sampler_text(bundle, context, max_new_tokens=40, do_sample=False)
    out, err = run(capsys, "--max_new_tokens", "40")
    assert len(text) > 40
    assert text.endswith("<answer>7</answer>")
    assert out == f"{text}\nanswer: 7\n"
    assert re.search(rf"^{len(completion.ids)} tokens in .* tokens/s .* tokens of the", err, re.M)
    assert "cpu, float32" in err


def test_sampling_follows_seed_and_temperature(
    bundle: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--max_new_tokens", "24", "--do_sample", "--temperature", "1.3", "--seed")
    context = student_context(bundle)
    _, text = sampler_text(bundle, context, seed=4, max_new_tokens=24, temperature=1.3)
    out, _ = run(capsys, *flags, "4")
    assert out.startswith(text + "\n")
    assert run(capsys, *flags, "6")[0] != out


def test_notes_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    out, err = run(capsys, "--max_new_tokens", "3", "--temperature", "1.3")
    assert out.endswith("\nanswer: none\n")
    assert "no effect without --do_sample" in err
    assert "the budget of 3 tokens ended it" in err
    _, err = run(capsys, "--image_skips", "0")  # ends after <image_start>
    assert "no <answer>...</answer>" in err and "budget" not in err


@pytest.fixture
def stream(bundle: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Answer a context: the printed text, and the pieces in which it came."""
    pieces: list[str] = []
    write = demo.TextStreamer.on_finalized_text

    def note(self: Any, text: str, stream_end: bool = False) -> None:
        pieces.append(text)
        write(self, text, stream_end)

    monkeypatch.setattr(demo.TextStreamer, "on_finalized_text", note)

    def answer(context: Any, **settings: Any) -> tuple[str, list[str]]:
        capsys.readouterr()
        pieces.clear()
        demo.answer_in_text(bundle, context, demo.DemoSettings(**settings))
        text, _, _ = capsys.readouterr().out.rpartition("\nanswer: ")
        return text, [piece for piece in pieces if piece]

    return answer


def test_text_arrives_in_pieces_that_join_to_the_whole(bundle: Any, stream: Any) -> None:
    context = student_context(bundle)
    _, text = sampler_text(bundle, context, max_new_tokens=40, do_sample=False)
    printed, pieces = stream(context, max_new_tokens=40)
    assert "".join(pieces) == printed == text
    assert len(pieces) > 6 and all(piece.endswith(" ") for piece in pieces[:-1])


@pytest.mark.parametrize("budget", range(1, 7))
def test_nothing_beyond_the_budget_is_shown(bundle: Any, stream: Any, budget: int) -> None:
    """The sampler also draws the token after the last; printed, it could not be taken back."""
    context = student_context(bundle)
    completion, text = sampler_text(bundle, context, max_new_tokens=budget, do_sample=False)
    printed, pieces = stream(context, max_new_tokens=budget)
    assert completion.capped and len(completion.ids) == budget - 1
    assert "".join(pieces) == printed == text == bundle.tokenizer.decode(completion.ids)


def test_image_skip_shows_both_rounds_without_their_markers(bundle: Any, stream: Any) -> None:
    meta, tensors = load_golden("12_sampler")
    case = meta["tiny_model_greedy"]["q0_skips1"]
    builder = ContextBuilder(bundle.tokenizer, lambda image: tensors["real_q0_image"])
    context = builder.question(Image.new("RGB", (1, 1)), case["question"])
    completion, _ = sampler_text(
        bundle, context, max_new_tokens=64, do_sample=False, max_image_skips=1
    )
    text, pieces = stream(context, max_new_tokens=64, image_skips=1)
    special = bundle.special_tokens
    joint = completion.ids.index(special.eos)
    assert completion.ids[joint + 1] == special.bos
    rounds = [completion.ids[:joint], completion.ids[joint + 2 :]]
    first, _ = decoded = [bundle.tokenizer.decode(ids) for ids in rounds]
    assert text == "".join(decoded) == "".join(pieces)
    assert "<image_start>" in text and "<|im_" not in text
    assert stream(context, max_new_tokens=64, image_skips=0)[0] == first


# ---------------------------------------------------------------------------------- devices


def test_spread_over_memory_and_disk_prints_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    plain, _ = run(capsys, "--max_new_tokens", "16")
    sizes = file_bytes(TINY_BAGEL)
    budget = (sizes[""] + 2 * sizes[LAYER + "0"]) / 1024
    out, err = run(
        capsys, "--max_new_tokens", "16", "--device", "spread",
        "--max_memory", f"cpu={budget}KiB",
    )  # fmt: skip
    assert out == plain
    assert "decoder layers: 1 in CPU memory, 2 on disk" in err
    # Where there are GPUs, on them; fp32 there too.
    words = ("--max_new_tokens", "16", "--device", "spread", "--dtype", "fp32")
    everything, err = run(capsys, *words)
    assert everything == plain


def test_dtype_flag(capsys: pytest.CaptureFixture[str]) -> None:
    _, err = run(capsys, "--max_new_tokens", "2", "--dtype", "bf16")
    assert "cpu, bfloat16" in err


# ---------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--question", " \n"), "the question is empty"),
        (("--image", "nowhere.png"), r"there is no image file nowhere\.png"),
        (("--image", str(ROOT / "LICENSE")), "cannot decode the image .*LICENSE"),
        (("--model_path", "nowhere"), "the checkpoint folder nowhere does not exist"),
        (("--prompts", "nowhere.yaml"), r"prompts file nowhere\.yaml does not exist"),
        (("--temperature", "0"), r"--temperature must be at least 0\.0001 .*; greedy: no --do_s"),
        (("--max_new_tokens", "0"), "max_new_tokens must be at least 1"),
        (("--max_memory", "cpu=1GiB"), "goes with --device spread"),
        (("--device", "spread", "--max_memory", "cpu=lots"), "is not DEVICE=SIZE"),
        (("--device", "spread", "--max_memory", "99=1GiB"), "names GPU 99, but torch sees"),
        (("--device", "spread", "--max_memory", "cpu=5KB"), "not enough memory: cpu may hold"),
    ],
)
def test_wrong_input_is_named(more: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        demo.main(arguments("--max_new_tokens", "2", *more))


def test_image_and_question_are_required() -> None:
    for given in ([], ["--image", str(PICTURE)], ["--question", "What?"]):
        with pytest.raises(ValueError, match="give an image and a question"):
            demo.main(["--model_path", str(TINY_BAGEL), *given])


def test_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="torch sees no GPU"):
        demo.main(arguments("--device", "cuda"))


def test_not_enough_memory_before_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "free_memory", lambda: {"cpu": 10**6})
    with pytest.raises(ValueError, match=r"take 0\.\d+ GB, and cpu has 0\.001 GB free.* question"):
        demo.main(arguments())


def test_a_question_that_is_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Found before the model is loaded, and blamed on the question or the budget."""
    monkeypatch.setattr(demo, "load_bagel", None)
    with pytest.raises(ValueError, match=r"too long \(200000 char.*rope positions.* has 32768"):
        demo.main(arguments("--question", "why " * 50_000))
    with pytest.raises(ValueError, match=r"too long .*: a text of 9000000 characters"):
        demo.main(arguments("--question", "x" * 9_000_000))
    with pytest.raises(ValueError, match=r"--max_new_tokens: .* 40000 rope positions"):
        demo.main(arguments("--max_new_tokens", "40000"))


@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), ValueError, r"CUDA out.*--device spread"),
        (MemoryError(), ValueError, r"not enough memory \(MemoryError\)"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), ValueError, "not enough"),
        (RuntimeError("shapes differ"), RuntimeError, "shapes differ"),  # not explained away
    ],
)
def test_not_enough_memory_while_answering(
    monkeypatch: pytest.MonkeyPatch, error: Exception, expected: type[Exception], message: str
) -> None:
    def sample(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(demo, "sample_completions", sample)
    with pytest.raises(expected, match=message):
        demo.main(arguments())


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (("--image", "nowhere.png"), 1, "error: there is no image file nowhere.png; check --image"),
        (("--imge", "x"), 2, r"error: unrecognized arguments: --imge x .*mean --image"),
    ],
)
def test_exit_codes(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: tuple[str, ...],
    code: int,
    said: str,
) -> None:
    """1 for wrong input, 2 for an unknown flag, with one message and nothing on stdout."""
    monkeypatch.setattr(sys, "argv", ["inference_demo.py", *arguments(*flags)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "examples" / "inference_demo.py"), run_name="__main__")
    assert end.value.code == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.search(said, captured.err) and "Traceback" not in captured.err


# ---------------------------------------------------------------------------------- example


def documented_commands() -> list[list[str]]:
    """The commands of the script's docstring, as words."""
    lines = demo.__doc__.replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line.startswith("    python ")]


def test_documented_example_runs() -> None:
    command = documented_commands()[1]
    assert "examples/tiny-base" in command
    assert command[1] == "examples/inference_demo.py"
    done = subprocess.run(
        [sys.executable, *command[1:], "--device", "cpu"],
        capture_output=True, text=True, cwd=ROOT, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    text, answer = done.stdout.splitlines()
    assert re.fullmatch(r"answer: [LRUD](,[LRUD])*", answer)
    assert f"<answer>{answer.removeprefix('answer: ')}</answer>" in text
    assert "tokens/s" in done.stderr


def test_documented_command_draws_the_example(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, code = next(command[1:] for command in documented_commands() if command[1] == "-c")
    (tmp_path / "examples" / "demo").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    shipped = ROOT / "examples" / "demo" / "maze.png"
    assert shipped.stat().st_size < 5000
    drawn = tmp_path / "examples" / "demo" / "maze.png"
    assert Image.open(drawn).convert("RGB").tobytes() == Image.open(shipped).tobytes()
