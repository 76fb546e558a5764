# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""examples/inference_demo.py --interleave: the recorded reasoning, its files and its page."""

from __future__ import annotations

import importlib
import re
import shutil
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from examples.demo_settings import INTERLEAVE_DEFAULTS, parse
from examples.interleave_page import InterleavePage
from scripts.visual_opsd.cli import flat
from tests.conftest import TINY_BAGEL, assert_golden, load_golden

demo: Any = importlib.import_module("examples.inference_demo")

ROOT = Path(__file__).resolve().parents[1]
TINY_BASE = ROOT / "examples" / "tiny-base"
META, TENSORS = load_golden("09_interleave")
QUESTION: str = META["inputs"][1]
FIRST, LAST = (META["outputs"][k]["text"] for k in (0, 2))
# The golden's image sizes and its flow times.
SMALL = (
    "--vae_max_size", "128", "--vae_min_size", "64", "--vit_max_size", "112",
    "--vit_min_size", "56", "--num_timesteps", str(META["kwargs"]["num_timesteps"]),
    "--max_new_tokens", "64", "--seed", str(META["seed"]), "--device", "cpu",
)  # fmt: skip


class Outline(HTMLParser):
    """What a page shows, in order: ("text", ...) and ("image", src); and the tags it uses."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.shown: list[tuple[str, str]] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "img":
            self.shown.append(("image", dict(attrs)["src"] or ""))
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("p", "h2"):
            self.shown.append((self.open[-1], data))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Sequence[str]:
    """The golden's picture and question; its prompt has no image tag."""
    folder = tmp_path_factory.mktemp("inputs")
    Image.fromarray(TENSORS["input0_u8"].numpy()).save(folder / "problem.png")
    (folder / "prompts.yaml").write_text('question_prefix: ""\n')
    return (
        "--interleave", "--image", str(folder / "problem.png"), "--question", QUESTION,
        "--prompts", str(folder / "prompts.yaml"), "--model_path", str(TINY_BAGEL), *SMALL,
    )  # fmt: skip


def test_the_recorded_reasoning(
    inputs: Sequence[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Texts exactly, the picture as the golden says, and both in order on page and stdout."""
    out = tmp_path / "new" / "folder"
    assert demo.main([*inputs, "--out", str(out)]) == 0
    printed = capsys.readouterr()
    picture, page = out / "round_1.png", out / "index.html"
    assert printed.out.splitlines() == [FIRST, f"[{picture}]", LAST, "answer: B", f"page: {page}"]
    assert re.findall(r"^(text|picture) in [\d.]+ s$", printed.err, re.M) == [
        "text", "picture", "text"
    ]  # fmt: skip
    names = ["answer.txt", "index.html", "problem.png", "round_1.png"]
    assert sorted(file.name for file in out.iterdir()) == names
    drawn = torch.from_numpy(np.array(Image.open(picture)))
    assert_golden(META, "output1_u8", drawn, TENSORS["output1_u8"])
    problem = np.array(Image.open(out / "problem.png"))
    assert np.array_equal(problem, TENSORS["input0_u8"].numpy())
    assert (out / "answer.txt").read_text() == "B\n"
    shown = Outline(page).shown[:-1]  # without the settings of the run
    assert shown == [
        ("h2", "Problem"), ("image", "problem.png"), ("p", QUESTION),
        ("h2", "Round 1"), ("p", FIRST), ("image", "round_1.png"),
        ("h2", "Round 2"), ("p", LAST),
        ("h2", "Answer"), ("p", "B"),
    ]  # fmt: skip


def test_each_part_is_there_when_it_is_made(
    inputs: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted while the second text is written, the page keeps what there was."""
    original = demo.InterleaveInferencer.write
    calls: list[None] = []

    def write(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(demo.InterleaveInferencer, "write", write)
    assert demo.main([*inputs, "--out", str(tmp_path), "--image_size", "64"]) == 130
    shown = Outline(tmp_path / "index.html").shown
    assert ("p", FIRST) in shown and ("image", "round_1.png") in shown
    assert any(text.startswith("not there yet") for _, text in shown)
    assert Image.open(tmp_path / "round_1.png").size == (64, 48)
    assert not (tmp_path / "answer.txt").exists()


def test_flags_reach_the_inferencer(
    inputs: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, Any]] = []
    monkeypatch.setattr(
        demo.InterleaveInferencer,
        "__call__",
        lambda self, image, text, **options: asked.append((self, {"text": text, **options})),
    )
    flags = (
        "--cfg_text_scale", "3", "--cfg_img_scale", "1.5", "--num_timesteps", "4",
        "--max_rounds", "2", "--image_size", "48", "--do_sample", "--temperature", "0.7",
        "--image_skips", "2",
    )  # fmt: skip
    assert demo.main([*inputs, "--out", str(tmp_path), *flags, "--prompts", "none"]) == 0
    inferencer, options = asked[0]
    assert callable(options.pop("on_part"))
    assert options == {
        "text": "<img><|image_1|></img> " + QUESTION, "think": True, "max_think_token_n": 64,
        "do_sample": True, "text_temperature": 0.7, "num_timesteps": 4, "cfg_text_scale": 3.0,
        "cfg_img_scale": 1.5, "cfg_interval": (0.0, 1.0), "cfg_renorm_type": "text_channel",
        "max_rounds": 2, "image_skips": 2, "seed": META["seed"],
    }  # fmt: skip
    assert inferencer.resized(Image.new("RGB", (120, 90))).size == (48, 32)
    assert inferencer.vit_transform.max_size == 112


def test_a_run_without_an_answer(
    inputs: Sequence[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It draws nothing, says so, and leaves nothing of an earlier page; other files stay."""
    for name in ("round_1.png", "round_12.png", "round_1.png.bak", "notes.txt"):
        (tmp_path / name).write_bytes(b"old")
    words = [*inputs, "--out", str(tmp_path), "--max_new_tokens", "3"]
    with pytest.raises(ValueError, match=r"holds round_1\.png, round_12\.png; .* --overwrite"):
        demo.main(words)
    assert (tmp_path / "round_1.png").read_bytes() == b"old"
    assert demo.main([*words, "--overwrite"]) == 0
    printed = capsys.readouterr()
    assert "\nanswer: none\n" in printed.out
    assert "hold no <answer>" in printed.err and "the model drew nothing" in printed.err
    assert (tmp_path / "answer.txt").read_text() == ""
    kept = {"answer.txt", "index.html", "problem.png", "round_1.png.bak", "notes.txt"}
    assert {file.name for file in tmp_path.iterdir()} == kept
    assert ("p", "none: the text holds no answer") in Outline(tmp_path / "index.html").shown


def test_defaults_are_the_wrappers_and_flags_go_before_them() -> None:
    plain, drawing = (flat(parse(flags, "")) for flags in ([], ["--interleave"]))
    changed = {name: drawing[name] for name in plain if drawing[name] != plain[name]}
    assert changed == {"interleave": True, **INTERLEAVE_DEFAULTS}
    assert drawing["out"] == "results/interleave" and drawing["num_timesteps"] == 50
    documented = [line for line in demo.__doc__.splitlines() if "--interleave --image" in line]
    assert parse(documented[0].split()[2:], "").drawing.interleave
    own = parse(["--interleave", "--prompt_style", "packer", "--vit_min_size", "378"], "")
    assert (own.prompt.prompt_style, own.prompt.vit_min_size) == ("packer", 378)


# ---------------------------------------------------------------------------------- the page


def test_markup_is_shown_and_not_obeyed(tmp_path: Path) -> None:
    """Whatever a question, a text, an answer or a setting holds."""
    bad = "<script>alert(1)</script> & \"quotes\" </p></section> <img src='http://x.example/'>"
    picture = Image.new("RGB", (8, 4))
    page = InterleavePage(tmp_path, picture, bad, {"model": bad})
    first = page.add(picture)  # a model may draw before it writes
    parts: list[str | Image.Image] = [bad, picture, "caf\u00e9 \u6771\u4eac", bad, picture]
    found = [page.add(part) for part in parts]
    assert [first, *found] == [
        tmp_path / "round_1.png", None, tmp_path / "round_2.png", None, None,
        tmp_path / "round_3.png",
    ]  # fmt: skip
    outline = Outline(page.finish(bad))
    assert outline.shown == [
        ("h2", "Problem"), ("image", "problem.png"), ("p", bad),
        ("h2", "Round 1"), ("image", "round_1.png"),
        ("h2", "Round 2"), ("p", bad), ("image", "round_2.png"),
        ("h2", "Round 3"), ("p", "caf\u00e9 \u6771\u4eac"), ("p", bad), ("image", "round_3.png"),
        ("h2", "Answer"), ("p", bad), ("p", f"model {bad}"),
    ]  # fmt: skip
    assert not {"script", "link", "iframe"} & set(outline.tags)
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "://" not in re.sub("http://x.example/", "", text) and "@import" not in text


def test_text_that_is_no_unicode_is_written(tmp_path: Path) -> None:
    """As a command line's arguments may be."""
    page = InterleavePage(tmp_path, Image.new("RGB", (4, 4)), "what\udcff?", {})
    assert ("p", "what??") in Outline(page.finish("a\udcff")).shown
    assert (tmp_path / "answer.txt").read_text() == "a?\n"


# ---------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--model_path", str(TINY_BASE)), r"lacks the drawing branch .* and the autoencoder \(ae"),
        (("--model_path", "nowhere"), "the checkpoint folder nowhere does not exist"),
        (("--device", "spread"), "does not go with --device spread"),
        (("--image_path", "direct"), "leave --image_path out"),
        (("--image_size", "100"), "image_size must be a multiple of 16, got 100"),
        (("--image_size", "0"), "--image_size must be at least 1 and at most 8192"),
        (("--image_size", "8192"), r"8192 pixels are too large .* give --image_size \d+ or less"),
        (("--max_rounds", "0"), "max_rounds must be at least 1"),
        (("--num_timesteps", "1"), "num_timesteps must be at least 2"),
        (("--out", str(ROOT / "LICENSE")), "--out .*LICENSE: cannot write there .*; choose"),
        (("--image", "nowhere.png"), r"there is no image file nowhere\.png"),
        (("--interleave", "False", "--max_rounds", "2"), "--max_rounds goes with --interleave"),
    ],
)
def test_wrong_input_is_named(
    inputs: Sequence[str], tmp_path: Path, more: tuple[str, ...], message: str
) -> None:
    given = [*inputs, "--out", str(tmp_path), *more]
    if "False" in more:  # other flags that go with --interleave
        given = [*inputs[1:5], *more]
    with pytest.raises(ValueError, match=message):
        demo.main(given)
    assert list(tmp_path.iterdir()) == []  # an earlier page would still be there


def test_a_release_without_its_autoencoder(inputs: Sequence[str], tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(TINY_BAGEL, model, ignore=shutil.ignore_patterns("ae.safetensors"))
    with pytest.raises(ValueError, match=r"cannot draw: it lacks the autoencoder \(ae\.safe"):
        demo.main([*inputs, "--model_path", str(model), "--out", str(tmp_path / "out")])


def test_not_enough_memory(
    inputs: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The advice is for drawing."""
    given = [*inputs, "--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(demo, "free_memory", lambda: {"cpu": 10**6})
        with pytest.raises(ValueError, match=r"the weights take .* GB free\. .*--image_size"):
            demo.main(given)

    def load(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(demo, "load_bagel", load)
    with pytest.raises(ValueError, match=r"\(MemoryError\) .*--image_size"):
        demo.main(given)
