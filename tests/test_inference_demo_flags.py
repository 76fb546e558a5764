# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""inference_demo: every setting, two values, and what is seen of it where it acts.

Runs a and b answer in text; c and d draw, with a stand-in for the inferencer, whose own arguments
are tested in test_inferencer.py. A new field of `DemoConfig` without a row fails here.
"""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from data.randomness import position_uniforms
from data.sequence import ContextBuilder
from data.transforms import ImageTransform, decode_image
from inferencer import InterleaveInferencer
from modeling import load_bagel
from modeling.bagel.generate import generate
from modeling.release.spread import load_bagel_spread
from tests.arrivals import (
    ABSENT,
    PROMPTS,
    Arrival,
    Run,
    Stop,
    check_arrival,
    check_complete,
    given_in_run,
    spy,
    spy_all,
    spy_method,
    stop,
    words,
)
from tests.visual_opsd.training.training_flags import HEAD, make_places

demo: Any = importlib.import_module("examples.inference_demo")

ALONE = {"device": "test_device", "max_memory": "test_max_memory", "overwrite": "test_overwrite"}
IDLE = {"use_reference_intro", "use_transition_prompt"}  # the teacher's


class DemoRun(Run):
    shows_thoughts = False

    @property
    def builder(self) -> ContextBuilder:
        return self.calls["ContextBuilder.__init__"][0]["self"]

    @property
    def context(self) -> Any:
        return self.calls["ContextBuilder.question"][0]["result"]

    @property
    def row_values(self) -> dict[str, Any]:
        picture = Path(self.given["image"]).read_bytes()
        return {"question": self.given["question"], "problem_image_0": {"bytes": picture}}

    @property
    def draws(self) -> bool:
        return bool(self.given["interleave"])

    def told(self, text: str, drawing: str) -> Any:
        """An argument of `generate`, or of the inferencer."""
        if self.draws:
            return self.one("InterleaveInferencer.__call__", "kwargs")[drawing]
        return self.one("generate", text)


def uniforms(run: DemoRun) -> Any:
    if run.draws:
        return run.told("", "do_sample"), run.told("", "seed")
    numbers = run.one("generate", "uniforms")
    return (False, None) if numbers is None else (True, numbers[0, :3].tolist())


def expected_uniforms(run: DemoRun) -> Any:
    seed, samples = run.given["seed"], run.given["do_sample"]
    if run.draws:
        return samples, seed
    return samples, position_uniforms(seed, 0, 0, 3).tolist() if samples else None


def asked(run: DemoRun) -> tuple[bytes, str]:
    """Pixels of the image and the question, as they are handed on."""
    if not run.draws:
        call = run.calls["ContextBuilder.question"][0]
        return call["image"].tobytes(), call["question"]
    call = run.calls["InterleaveInferencer.__call__"][0]
    return call["image"].tobytes(), call["text"]


def expected_question(run: DemoRun) -> tuple[bytes, str]:
    g = run.given
    text = g["question"]
    if run.draws:
        prefix = "" if g["prompt_style"] == "packer" else "<img><|image_1|></img> "
        text = prefix + text + g["instruction_suffix"]
    return decode_image(g["image"]).tobytes(), text


def drawn_with(name: str) -> Any:
    return lambda run: run.told("", name)


def rows(places: Mapping[str, Path]) -> dict[str, Arrival]:
    one, two = (places["results"] / f"{name}.png" for name in ("one", "two"))
    prompts = {name: replace(row, runs="ab") for name, row in PROMPTS(places["prompts"]).items()
               if name not in IDLE}  # fmt: skip
    prompts["image_path"] = replace(
        prompts["image_path"], values=["direct", "inferencer", "inferencer", "inferencer"]
    )
    out = places["results"]
    return {
        **prompts,
        "model_path": Arrival(
            [places["model"], places["other"]],
            lambda run: float(run.calls["load_bagel"][0]["result"].model.state_dict()[HEAD][0, 0]),
            lambda run: float(load_file(run.given["model_path"] / "model.safetensors")[HEAD][0, 0]),
            runs="ab",  # in fp32
        ),
        "image": Arrival([one, two], asked, expected_question),
        "question": Arrival(["What?", "Where to?"], asked, expected_question),
        "max_new_tokens": Arrival(
            [4, 5, 6, 7], lambda run: run.told("max_new_tokens", "max_think_token_n")
        ),
        "temperature": Arrival([0.5, 0.6], lambda run: run.told("temperature",
                                                                "text_temperature")),
        "do_sample": Arrival([True, False, False, True], uniforms, expected_uniforms),
        "seed": Arrival([3, 4], uniforms, expected_uniforms),
        "image_skips": Arrival([0, 2], lambda run: run.told("max_image_skips", "image_skips")),
        "dtype": Arrival(
            ["auto", "fp32", "bf16", "fp16"],
            lambda run: run.calls["load_bagel"][0]["result"].model.dtype,
            lambda run: {"auto": torch.float32, "fp32": torch.float32, "bf16": torch.bfloat16,
                         "fp16": torch.float16}[run.given["dtype"]],
        ),
        "interleave": Arrival(
            [False, False, True, True],
            lambda run: (bool(run.calls["InterleaveInferencer.__call__"]),
                         run.one("load_bagel", "visual_gen")),
            lambda run: (run.draws, run.draws),
        ),
        "out": Arrival(
            [ABSENT, ABSENT, out / "page-c", out / "page-d"],
            lambda run: (run.given["out"], (run.given["out"] / "index.html").exists()),
            lambda run: (run.given["out"], True), runs="cd",
        ),
        "num_timesteps": Arrival([ABSENT, ABSENT, 3, 4], drawn_with("num_timesteps"), runs="cd"),
        "cfg_text_scale": Arrival([ABSENT, ABSENT, 2.0, 3.0], drawn_with("cfg_text_scale"),
                                  runs="cd"),
        "cfg_img_scale": Arrival([ABSENT, ABSENT, 1.5, 1.25], drawn_with("cfg_img_scale"),
                                 runs="cd"),
        "max_rounds": Arrival([ABSENT, ABSENT, 1, 2], drawn_with("max_rounds"), runs="cd"),
        "image_size": Arrival(
            [ABSENT, ABSENT, 64, 80],
            lambda run: run.calls["InterleaveInferencer.__call__"][0]["self"].vae_transform,
            lambda run: ImageTransform(run.given["image_size"], run.given["image_size"], 16),
            runs="cd",
        ),
    }  # fmt: skip


NAMES = ("one", "two", "model", "other", "train", "heldout", "prompts", "results")
TABLE = rows(dict.fromkeys(NAMES, Path("places")))  # for the names of its rows


def record(name: str, given: Mapping[str, Any]) -> DemoRun:
    with pytest.MonkeyPatch.context() as patch:
        calls = spy_all(patch, (load_bagel, generate), (
            (ContextBuilder, "__init__"), (ContextBuilder, "question"),
        ))  # fmt: skip
        calls["InterleaveInferencer.__call__"] = spy_method(
            patch, InterleaveInferencer, "__call__", lambda *_, **__: []
        )
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            assert demo.main(words(given)) == 0
    return DemoRun(name, given, calls)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Arrival]:
    places = make_places(tmp_path_factory.mktemp("flags"))
    places["results"].mkdir()
    for name, colour in (("one", "navy"), ("two", "olive")):
        Image.new("RGB", (100, 60), colour).save(places["results"] / f"{name}.png")
    return rows(places)


@pytest.fixture(scope="module")
def runs(table: dict[str, Arrival]) -> list[DemoRun]:
    return [
        record(name, {**given_in_run(table, number), "device": "cpu"})
        for number, name in enumerate("abcd")
    ]


def test_every_setting_has_a_row(table: dict[str, Any]) -> None:
    check_complete(demo.DemoConfig, table, ALONE, dict.fromkeys(IDLE))
    assert all(test in globals() for test in ALONE.values())


@pytest.mark.parametrize("name", TABLE)
def test_every_setting_arrives(table: dict[str, Any], runs: list[DemoRun], name: str) -> None:
    check_arrival(name, table[name], runs)


def test_contexts_of_drawing(runs: list[DemoRun]) -> None:
    """Prompt and sizes reach the inferencer as they reach the student."""
    for run in runs[2:]:
        made, g = run.calls["InterleaveInferencer.__call__"][0], run.given
        vit = ImageTransform(
            g["vit_max_size"], g["vit_min_size"], g["vit_stride"], g["vit_max_pixels"]
        )
        assert made["self"].vit_transform == vit
        assert bool(made["self"].system_prompt) == g["use_system_prompt"] == made["kwargs"]["think"]


# ------------------------------------------------------------------------------- one by one


@pytest.mark.parametrize("device", ["cpu", "cuda", "auto"])
def test_device(runs: list[DemoRun], monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda place: (2**40, 2**40))
    calls = spy(monkeypatch, load_bagel, stop)
    with pytest.raises(Stop):
        demo.main(words({**runs[0].given, "device": device}))
    gpu = device != "cpu"
    assert calls[0]["device"].type == ("cuda" if gpu else "cpu")
    assert calls[0]["dtype"] == (torch.bfloat16 if gpu else torch.float32)


@pytest.mark.parametrize("gigabytes", [1, 2])
def test_max_memory(runs: list[DemoRun], monkeypatch: pytest.MonkeyPatch, gigabytes: int) -> None:
    given = {**runs[0].given, "device": "spread", "max_memory": f"cpu={gigabytes}GiB"}
    calls = spy(monkeypatch, load_bagel_spread, stop)
    with pytest.raises(Stop):
        demo.main(words(given))
    assert calls[0]["max_memory"] == {"cpu": gigabytes * 2**30}


def test_overwrite(runs: list[DemoRun]) -> None:
    with pytest.raises(ValueError, match="or pass --overwrite"):
        record("again", {**runs[2].given, "overwrite": False})
    record("again", {**runs[2].given, "overwrite": True})
