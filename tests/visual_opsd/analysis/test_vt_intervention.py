# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The study of interventions on the drawn visual thought, on the tiny checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data.randomness import noise_picture, row_generator
from data.row_groups import ParquetDataset
from data.sequence import PACKER_SYSTEM_PROMPT
from data.thinkmorph import parse_row
from data.transforms import ImageTransform
from data.visual_thoughts import shuffle_picture
from data.worlds import get_scorer
from inference.interleave import InterleaveEngine, InterleaveOptions
from inferencer import InterleaveInferencer
from modeling import load_bagel
from scripts.visual_opsd.analysis.vt_arms import ARMS, FURTHER_ARMS, Interventions, donors
from scripts.visual_opsd.analysis.vt_intervention import main, summarise_arms, table
from scripts.visual_opsd.evaluation.scoring import compare_paired, wilson_interval
from tests.conftest import TINY_BAGEL, needs_gpu
from tests.test_inferencer import next_token_logits

ROWS = 5
VIT, VAE = ImageTransform(56, 14, 14, 2007040), ImageTransform(64, 32, 16)
# The tiny model asks for a picture under the packer's prompt only.
FLAGS = [f"--{name}={value}" for name, value in
         {"vit_max_size": 56, "vit_min_size": 14, "vit_max_pixels": 2007040, "vae_max_size": 64,
          "vae_min_size": 32, "num_timesteps": 3, "max_new_tokens": 40, "batch_size": 2, "seed": 7,
          "limit": ROWS,
          "prompt_style": "packer", "device": "cpu", "progress": False}.items()]  # fmt: skip
OPTIONS = {"num_timesteps": 3, "max_think_token_n": 40, "max_rounds": 1, "think": True}


def study(world: Path, out: Path, *flags: str) -> dict[str, Any]:
    code = main(
        ["--model_path", str(TINY_BAGEL), "--data", "Spatial_Navigation", "--data_root",
         str(world), "--output_dir", str(out), *FLAGS, *flags]
    )  # fmt: skip
    assert code == 0
    return json.loads((out / "summary.json").read_text())


@pytest.fixture(scope="module")
def finished(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "all"
    study(world, out)
    return out


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def samples(world: Path) -> list[Any]:
    files = sorted((world / "Spatial_Navigation" / "data").glob("heldout-*.parquet"))
    dataset = ParquetDataset("Spatial_Navigation", files)
    return [parse_row(dataset.read_row(i)) for i in range(ROWS)]


def drawing(out: Path, index: int) -> Image.Image:
    return Image.open(out / "drawings" / f"{index:06d}.png").convert("RGB")


def shown(arm: str, out: Path, index: int, sample: Any) -> Image.Image | None:
    """What a row is shown in an arm, from the description of the arms alone."""
    if arm == "removed":
        return None
    if arm == "truth":
        return sample.thought_images[0]
    if arm == "other":
        return drawing(out, (index + 1) % ROWS)
    own = drawing(out, index)
    return noise_picture(own.size, 7, index) if arm == "noise" else own


@pytest.fixture(scope="module")
def inferencer() -> InterleaveInferencer:
    bundle = load_bagel(TINY_BAGEL, visual_gen=True)
    return InterleaveInferencer(
        bundle.model, bundle.vae, bundle.tokenizer, VAE, VIT, bundle.special_tokens,
        system_prompt=PACKER_SYSTEM_PROMPT,
    )  # fmt: skip


def test_summary_counts_what_the_outputs_say(finished: Path, world: Path) -> None:
    lines = lines_of(finished / "outputs.jsonl")
    assert [line["index"] for line in lines] == list(range(ROWS))
    summary = json.loads((finished / "summary.json").read_text())
    scorer = get_scorer("spatial_navigation")
    for arm in ARMS:
        for line, sample in zip(lines, samples(world), strict=True):
            found = line["arms"][arm]
            whole = line["first_text"] + "\n" + found["text"]
            assert found["correct"] == scorer({"world_state": sample.world_state}, whole)
        correct = sum(line["arms"][arm]["correct"] for line in lines)
        figures = summary["arms"][arm]
        assert (figures["n"], figures["correct"]) == (ROWS, correct)
        assert figures["interval"] == list(wilson_interval(correct, ROWS))
    assert summary["rows"] == summary["n"] == ROWS and summary["not_drawn"]["n"] == 0
    assert set(summary["differences_to_kept"]) == set(ARMS) - {"kept"}
    assert (finished / "arms.png").stat().st_size > 5000


def test_every_arm_is_interleaved_inference_with_another_picture(
    finished: Path, world: Path, inferencer: InterleaveInferencer
) -> None:
    lines = lines_of(finished / "outputs.jsonl")
    for index, sample in enumerate(samples(world)[:2]):
        for arm in ARMS:
            generator = row_generator("drawing", 7, index)
            picture = shown(arm, finished, index, sample)

            def show(
                *_: Any, picture: Any = picture, index: int = index, own: Any = generator
            ) -> Any:
                own.set_state(row_generator("shown", 7, index).get_state())
                return picture

            parts = inferencer.run(
                [[sample.problem_image, sample.question]],
                InterleaveOptions(**OPTIONS),  # type: ignore[arg-type]
                [generator],
                show,
            )[0]
            first, drawn, answer = parts
            assert isinstance(drawn, Image.Image)
            apart = np.asarray(drawn, np.int16) - np.asarray(drawing(finished, index), np.int16)
            assert np.abs(apart).max() <= 1  # a batch of two rounds otherwise
            assert lines[index]["first_text"] == first
            assert lines[index]["arms"][arm]["text"] == answer


def test_arms_differ_in_the_picture_only(
    finished: Path, world: Path, inferencer: InterleaveInferencer,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The context of each arm against one made by the inferencer's own methods."""
    contexts: list[Any] = []
    write = InterleaveEngine.write

    def spied(self: Any, given: Any, *args: Any) -> Any:
        contexts.append([conversation.full for conversation in given])
        return write(self, given, *args)

    monkeypatch.setattr(InterleaveEngine, "write", spied)
    study(world, tmp_path / "spied", "--limit=2")
    drawing_call, *by_arm = contexts
    assert len(by_arm) == len(ARMS)
    start = drawing_call[1].length
    lines = lines_of(finished / "outputs.jsonl")
    sample = samples(world)[1]
    numbers = row_generator("drawing", 7, 1)
    context: Any = inferencer.init_gen_context()
    context = inferencer.update_context_text(PACKER_SYSTEM_PROMPT, context)
    context = inferencer.update_context_image(
        inferencer.resized(sample.problem_image), context, generator=numbers
    )
    context = inferencer.update_context_text(sample.question, context)
    assert context["kv_lens"] == [start]
    context = inferencer.update_context_text(lines[1]["first_text"], context)
    logits = []
    for arm, found in zip(ARMS, by_arm, strict=True):
        # With two rows the next row of row 1 is row 0.
        picture = drawing(finished, 0) if arm == "other" else shown(arm, finished, 1, sample)
        expected = context
        if picture is not None:
            resized = inferencer.resized(picture)
            expected = inferencer.update_context_image(
                resized, context, generator=row_generator("shown", 7, 1)
            )
        place = [i for i, c in enumerate(found) if [c.length] == expected["kv_lens"]]
        assert place, arm
        got = [next_token_logits(inferencer, found[i]) for i in place]
        wanted = next_token_logits(inferencer, expected)
        assert min(float((g - wanted).abs().max()) for g in got) < 2e-4, arm
        logits.append(wanted)
    for i in range(len(ARMS)):
        for j in range(i):
            assert float((logits[i] - logits[j]).abs().max()) > 1e-3, (ARMS[i], ARMS[j])


@needs_gpu
def test_a_gpu_draws_and_answers_alike(finished: Path, world: Path, tmp_path: Path) -> None:
    study(world, tmp_path, "--device", "cuda", "--precision", "fp32")
    for index in range(ROWS):
        a, b = (np.asarray(drawing(out, index), np.int16) for out in (tmp_path, finished))
        assert np.abs(a - b).max() <= 1
    ours, theirs = (lines_of(folder / "outputs.jsonl") for folder in (tmp_path, finished))
    for one, other in zip(ours, theirs, strict=True):
        assert (one["first_text"], one["arms"]) == (other["first_text"], other["arms"])
    assert study(world, tmp_path / "auto", "--device", "cuda")["rows"] == ROWS  # in bf16


@pytest.mark.parametrize("where", ["draw", "answer"])
def test_a_killed_run_goes_on(
    where: str, world: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    method = getattr(Interventions, where)

    def dying(self: Any, *args: Any) -> Any:
        calls.append(where)
        if len(calls) == {"draw": 2, "answer": 8}[where]:
            raise KeyboardInterrupt
        return method(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(Interventions, where, dying)
        with pytest.raises(KeyboardInterrupt):
            study(world, tmp_path)
    if where == "answer":  # and the line it was writing is torn
        with (tmp_path / "outputs.rank_0.jsonl").open("a") as stream:
            stream.write('{"index": 4, "do')
    summary = study(world, tmp_path)
    assert summary["resumed_drawings"] == {"draw": 2, "answer": ROWS}[where]
    assert summary["resumed_rows"] == {"draw": 0, "answer": 2}[where]
    for name in ("outputs.jsonl", "drawings.jsonl"):
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes()
    monkeypatch.setattr(Interventions, "begin", None)  # nothing is left to compute
    assert study(world, tmp_path)["resumed_rows"] == ROWS
    with pytest.raises(ValueError, match="seed: saved 7, now 8"):
        study(world, tmp_path, "--seed", "8")


def test_without_ground_truth(world: Path, tmp_path: Path) -> None:
    """Fewer arms; the drawing has the size that was asked for."""
    summary = study(world, tmp_path, "--arms=removed", "--limit=1", "--image_size=32")
    assert list(summary["arms"]) == ["kept", "removed"] and summary["n"] == 1
    assert drawing(tmp_path, 0).size == (32, 32)


def test_further_arms(
    finished: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is shown in the place of the drawing, in its size."""
    calls: list[Any] = []
    answer = Interventions.answer

    def spied(self: Any, starts: Any, pictures: Any) -> Any:
        calls.append(pictures)
        return answer(self, starts, pictures)

    monkeypatch.setattr(Interventions, "answer", spied)
    summary = study(world, tmp_path, "--arms=problem,shuffled,blank", "--limit=1")
    assert list(summary["arms"]) == ["kept", *FURTHER_ARMS]
    (kept,), (blank,), (shuffled,), (problem,) = calls
    own = np.asarray(drawing(tmp_path, 0))
    assert np.array_equal(np.asarray(kept), own)
    assert (np.asarray(blank) == 128).all()
    assert np.array_equal(np.asarray(shuffled), np.asarray(shuffle_picture(kept, 7, 0, 16)))
    assert not np.array_equal(np.asarray(shuffled), own)
    expected = VAE.resize(samples(world)[0].problem_image)
    assert np.array_equal(np.asarray(problem), np.asarray(expected))
    assert {p.size for p in (blank, shuffled, problem)} == {kept.size}


def test_donors() -> None:
    drawn = {0: "a", 3: "a", 4: "b", 7: "a"}
    assert donors(drawn) == {0: 3, 3: 7, 4: 7, 7: 0}
    with pytest.raises(ValueError, match="needs two"):
        donors({3: "a"})


def test_figures_of_the_arms() -> None:
    verdicts = {"kept": [1, 1, 1, 0], "removed": [1, 0, 0, 0]}
    lines = [
        {"dataset": "a" if i < 3 else "b",
         "arms": {arm: {"text": f"{arm if i else ''}", "correct": bool(v[i]), "answered": i != 2,
                        "lenient": bool(v[i]) or i == 3}
                  for arm, v in verdicts.items()}}
        for i in range(4)
    ]  # fmt: skip
    found = summarise_arms(lines, ("kept", "removed"))
    assert found["arms"]["kept"]["accuracy"] == 0.75
    assert found["arms"]["removed"]["same_text_as_kept"] == 0.25
    assert found["arms"]["removed"]["answered_rate"] == 0.75
    paired = found["differences_to_kept"]["removed"]
    assert paired["difference"] == -50.0 and (paired["only_a"], paired["only_b"]) == (0, 2)
    assert paired["p_value"] == compare_paired([True, False, False, False], [True] * 3 + [False]
                                               ).p_value  # fmt: skip
    assert found["mean"]["accuracy"] == 0.5
    half = 1.959964 * np.std([1, 0.5, 0.5, 0], ddof=1) / 2
    assert found["mean"]["interval"] == pytest.approx([0.5 - half, 0.5 + half], abs=1e-6)
    assert found["tasks"]["b"]["mean"]["interval"] == list(wilson_interval(0, 1))
    assert found["arms"]["kept"]["lenient_accuracy"] == 1
    assert found["mean"]["lenient_accuracy"] == 0.75
    assert found["lenient_differences_to_kept"]["removed"]["difference"] == -50.0
    assert " 75.0%" in table({**found, "not_drawn": {"n": 0}}).splitlines()[-1]


def test_mistakes(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown arms drawn"):
        study(world, tmp_path, "--arms=kept,drawn")
    with pytest.raises(ValueError, match="none of 2 rows asked for a picture"):
        study(world, tmp_path, "--prompt_style=inferencer", "--limit=2", "--arms=kept")
