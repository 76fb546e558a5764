# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Our model class for VLMEvalKit, driven as that harness drives a model."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data.tsv import TsvDataset, tsv_images
from scripts.eval import vlmevalkit_model as module
from scripts.eval.vlmevalkit_model import BaseModel, VisualOPSD
from scripts.visual_opsd import evaluate
from scripts.visual_opsd.evaluation import benchmarks
from tests.conftest import TINY_BAGEL, load_golden
from tests.eval.harness import StandInBase
from tests.visual_opsd.evaluation.tsv_files import choice_rows, picture, write_tsv

VIT = {"max_size": 112, "min_size": 56, "stride": 14}
VAE = {"max_size": 128, "min_size": 64, "stride": 16}
JOINT = "<|im_end|><|im_start|>"


class Model(VisualOPSD, *([StandInBase] if BaseModel is object else [])):  # type: ignore[misc]
    """As the harness drives it: with its base class, or the part of it that matters."""


def make_model(**options: Any) -> VisualOPSD:
    given: dict[str, Any] = {"max_think_token_n": 48, "vit": VIT, "device": "cpu", **options}
    return Model(str(TINY_BAGEL), **given)


@pytest.fixture(scope="module")
def model() -> VisualOPSD:
    return make_model(batch_size=3)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    rows = [{**row, "B": "7", "answer": "B"} for row in choice_rows(7)]
    folder = tmp_path_factory.mktemp("LMUData")
    return Dataset(write_tsv(folder / "MMVP.tsv", rows), folder / "images")


class Dataset:
    """What VLMEvalKit's image datasets do for a model: rows, image files, prompts."""

    def __init__(self, file: Path, images: Path) -> None:
        self.name, self.file, self.images = file.stem, file, images
        self.rows = TsvDataset(self.name, file)
        self.benchmark = benchmarks.find_benchmark(self.rows)
        images.mkdir()

    def __len__(self) -> int:
        return len(self.rows)

    def dump_image(self, line: int) -> list[str]:
        paths = []
        for number, image in enumerate(tsv_images(self.rows.read_row(line))):
            path = self.images / f"{line}_{number}.png"
            image.save(path)
            paths.append(str(path))
        return paths

    def build_prompt(self, line: int) -> list[dict[str, Any]]:
        values = self.rows.read_row(line).values
        return benchmarks.make_parts(self.benchmark.prompt, values, self.dump_image(line))

    def accuracy(self, predictions: list[str]) -> float:
        """Without a judge."""
        parsed = [benchmarks.parse_row(self.benchmark, self.rows.read_row(i))
                  for i in range(len(self))]  # fmt: skip
        hits = [row.judge(text).correct for row, text in zip(parsed, predictions, strict=True)]
        return sum(hits) / len(hits)


def test_end_to_end_without_a_judge(model: VisualOPSD, dataset: Dataset, tmp_path: Path) -> None:
    """The harness's loop gives the texts and the accuracy of evaluate.py on the same file."""
    model.set_dump_image(dataset.dump_image)
    assert not model.use_custom_prompt(dataset.name)
    assert model.dump_image(0, dataset.name) == dataset.dump_image(0)
    one_by_one = [
        model.generate(message=dataset.build_prompt(line), dataset=dataset.name)
        for line in range(len(dataset))
    ]
    out = tmp_path / "evaluated"
    sizes = [f"--vit_{name}={value}" for name, value in VIT.items()]
    code = evaluate.main(
        ["--model_path", str(TINY_BAGEL), "--data", str(dataset.file), "--output_dir", str(out),
         "--prompt_style", "inferencer", "--image_path", "inferencer", "--max_new_tokens", "48",
         "--vit_max_pixels", "1806336", "--device", "cpu", "--progress", "False", *sizes]
    )  # fmt: skip
    assert code == 0
    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert one_by_one == [line["text"].replace(JOINT, "") for line in lines]
    assert dataset.accuracy(one_by_one) == sum(line["correct"] for line in lines) / 7
    assert 0 < dataset.accuracy(one_by_one) <= 1


def test_batches_answer_as_single_messages(model: VisualOPSD, dataset: Dataset) -> None:
    messages = [dataset.build_prompt(line) for line in range(len(dataset))]
    together = model.generate_inner_batch(messages, dataset=dataset.name)
    assert together == [model.generate_inner(message, dataset.name) for message in messages]
    assert len(set(together)) > 1
    assert all(JOINT not in text for text in together)
    assert model.batch_size == 3  # what the harness asks before it calls the batched method


def test_every_form_of_a_message_is_answered_alike(model: VisualOPSD, tmp_path: Path) -> None:
    path = tmp_path / "one.png"
    picture(5).save(path)
    parts: list[dict[str, Any]] = [
        {"type": "image", "value": str(path)},
        {"type": "text", "value": "What is it?"},
    ]
    answer = model.generate(parts)
    assert answer == model.generate([str(path), "What is it?"])
    assert answer == model.generate_inner([{"type": "image", "value": picture(5)}, parts[1]])
    assert model.generate("What is it?") == model.generate({"type": "text", "value": "What is it?"})
    if issubclass(Model, StandInBase):
        for wrong in ([], 3, [{"type": "text", "value": "x"}, "y"]):
            with pytest.raises(ValueError, match="a text, a part or a list of one kind"):
                model.generate(wrong)
        with pytest.raises(ValueError, match="text or image"):
            model.generate({"type": "video", "value": "x.mp4"})
    with pytest.raises(ValueError, match="cannot decode the image"):
        (tmp_path / "two.png").write_bytes(b"no picture")
        model.generate_inner([{"type": "image", "value": str(tmp_path / "two.png")}])


def test_prompts_have_the_wrappers_form(model: VisualOPSD, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures first, then one text; each picture leaves its tag where it stood."""
    seen: list[Any] = []
    sample = module.sample_completions

    def watched(bagel: Any, contexts: Any, *args: Any, **kwargs: Any) -> Any:
        seen.extend(contexts)
        return sample(bagel, contexts, *args, **kwargs)

    monkeypatch.setattr(module, "sample_completions", watched)
    message: list[dict[str, Any]] = [
        {"type": "text", "value": "Compare"},
        {"type": "image", "value": picture(1)},
        {"type": "text", "value": "with"},
        {"type": "image", "value": picture(2)},
    ]
    model.generate_inner(message)
    system, first, second, text = seen[0]
    decode = model.bundle.tokenizer.decode
    assert decode(text.ids) == "Compare <img><|image_1|></img> with <img><|image_2|></img>"
    assert decode(system.ids).startswith("\nLet's think step by step")
    assert decode(system.ids).endswith("answer here </answer>.\n")
    for segment, image in ((first, picture(1)), (second, picture(2))):
        assert (segment.patches == model.builder.image(image).patches).all()
    plain = make_model(think=False)
    plain.generate_inner(message)
    assert len(seen[1]) == 3 and seen[1][2].ids == text.ids


def test_sampling_is_the_questions_own(dataset: Dataset) -> None:
    """A sampled answer depends on the seed and the question, not on its neighbours."""
    sampled = make_model(do_sample=True, temperature=2.0, batch_size=4)
    messages = [dataset.build_prompt(line) for line in range(4)]
    together = sampled.generate_inner_batch(messages)
    assert together == [sampled.generate_inner(message) for message in messages]
    sampled.seed += 1
    assert together != sampled.generate_inner_batch(messages)


@pytest.mark.parametrize("upright", [True, False])
def test_pictures_are_turned_unless_told_otherwise(
    upright: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[Any] = []

    def recorded(builder: Any, parts: Any) -> Any:
        seen.extend(part["value"] for part in parts if part["type"] == "image")
        return build(builder, parts)

    build = module.build_context
    monkeypatch.setattr(module, "build_context", recorded)
    exif = Image.Exif()
    exif[0x112] = 6
    stored = Image.new("RGB", (30, 20), "white")
    stored.save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as opened:
        values: list[Any] = [str(tmp_path / "turned.png"), opened]
        message = [{"type": "image", "value": value} for value in values]
        model = make_model(upright=upright, max_think_token_n=1)
        model.generate_inner([*message, {"type": "text", "value": "Which?"}])
    assert [image.size for image in seen] == [(20, 30) if upright else (30, 20)] * 2


@pytest.fixture(scope="module")
def drawing(tmp_path_factory: pytest.TempPathFactory) -> VisualOPSD:
    return make_model(
        understanding_output=False, save_dir=str(tmp_path_factory.mktemp("drawn") / "images"),
        vae=VAE, max_think_token_n=64, batch_size=2, use_torch_compile=True,
        # As golden 09_interleave_wrapper_prompt was recorded.
        num_timesteps=6, cfg_interval=[0.4, 1.0], cfg_renorm_type="global",
    )  # fmt: skip


def test_drawn_answers_have_the_wrappers_form(drawing: VisualOPSD) -> None:
    """ "Round_k:" before each text and a line for each image, which is on disk; the recorded
    texts of the reference from a message as the harness hands it over."""
    meta, tensors = load_golden("09_interleave_wrapper_prompt")
    tag, question = meta["inputs"][1].split("</img> ")
    assert tag == "<img><|image_1|>"
    pixels = tensors["input0_u8"].numpy()
    recorded = [part["text"] for part in meta["outputs"] if part["type"] == "text"]
    message: list[dict[str, Any]] = [
        {"type": "image", "value": Image.fromarray(pixels)},
        {"type": "text", "value": question},
    ]
    other = [{"type": "image", "value": Image.fromarray(pixels[:, ::-1])}, message[1]]
    answers = drawing.generate_inner_batch([message, other, message], dataset="Mine")
    paths = []
    for answer in answers:
        match = re.fullmatch(r"Round_0:\n(.*)\n\[Image: (.*)\]\nRound_1:\n(.*)", answer)
        assert match, answer
        assert [match[1], match[3]] == recorded
        paths.append(Path(match[2]))
        with Image.open(paths[-1]) as image:
            assert image.size == (128, 96)
    assert answers[0] == answers[2] != answers[1]  # a name for each question
    assert all(path.parent == Path(str(drawing.save_dir)) for path in paths)
    assert all(path.name.startswith("Mine_") for path in paths)
    pictures = [np.asarray(Image.open(path), np.int16) for path in paths]
    assert np.abs(pictures[0] - pictures[1]).max() > 1
    assert drawing.generate_inner(other, "Mine") == answers[1]
    alone = np.asarray(Image.open(paths[1]), np.int16)
    assert np.abs(alone - pictures[1]).max() <= 1  # as in a batch, rounding apart


def test_options_and_folders_that_cannot_work_are_refused(tmp_path: Path) -> None:
    cases: dict[str, dict[str, Any]] = {
        "no option 'num_timestep'; did you mean num_timesteps": {"num_timestep": 3},
        "name a folder for them with save_dir": {"understanding_output": False},
        "is for text-only answers": {
            "understanding_output": False, "save_dir": str(tmp_path), "image_path": "direct",
        },
    }  # fmt: skip
    for message, options in cases.items():
        with pytest.raises(ValueError, match=message):
            make_model(**options)
    with pytest.raises(ValueError, match="does not exist"):
        VisualOPSD(str(tmp_path / "nowhere"))


def test_the_harness_base_class_is_used_where_it_is_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class TheirBase:
        allowed_types = ("text", "image")

    for name in ("vlmeval", "vlmeval.vlm", "vlmeval.vlm.base"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setattr(sys.modules["vlmeval.vlm.base"], "BaseModel", TheirBase, raising=False)
    spec = importlib.util.spec_from_file_location("again", str(module.__file__))
    assert spec is not None and spec.loader is not None
    again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    assert again.VisualOPSD.__bases__ == (TheirBase,)
    assert again.VisualOPSD.INTERLEAVE and not again.VisualOPSD.INSTALL_REQ
    assert issubclass(VisualOPSD, BaseModel)
