# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""What the contexts say: prompts and their switches, visual thoughts, targets of SFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from data.sequence import Context, ContextBuilder, ImageSegment, Prompts, TextSegment
from data.thinkmorph import Sample
from data.transforms import ImageTransform
from data.visual_thoughts import ShownThoughts
from modeling.release.tokenizer import load_tokenizer
from scripts.visual_opsd.config import PromptSettings
from tests.conftest import TINY_BAGEL

TOKENIZER, _ = load_tokenizer(TINY_BAGEL)


def sample(thoughts: int = 2, **changes: Any) -> Sample:
    images = tuple(Image.new("RGB", (28, 28), (90 * i, 9, 200)) for i in range(thoughts + 1))
    return Sample(
        "set", "f.parquet", 0, "p", "why?", "B", images[0], images[1:], text_trace="so", **changes
    )


def builder(prompts: Prompts) -> ContextBuilder:
    return ContextBuilder(TOKENIZER, ImageTransform(28, 14, 14), prompts)


def shown(context: Context) -> list[Any]:
    """Texts as they read, images as their first value."""
    return [
        TOKENIZER.decode(list(s.ids)) if isinstance(s, TextSegment) else float(s.patches[0, 0])
        for s in context
        if isinstance(s, TextSegment | ImageSegment)
    ]


# Flags of the prompt -> system, question, intro and transition (None: the segment is not there).
SWITCHES: dict[str, tuple[dict[str, Any], tuple[str | None, str, str | None, str | None]]] = {
    "all": ({}, ("sys", "why?", "intro", "go")),
    "no system": ({"use_system_prompt": False}, (None, "why?", "intro", "go")),
    "no intro": ({"use_reference_intro": False}, ("sys", "why?", None, "go")),
    "no transition": ({"use_transition_prompt": False}, ("sys", "why?", "intro", None)),
    "a suffix": ({"instruction_suffix": " Be brief."}, ("sys", "why? Be brief.", "intro", "go")),
}


@pytest.mark.parametrize("name", SWITCHES)
def test_switches_of_the_prompts(name: str, tmp_path: Path) -> None:
    """Every visual thought is shown to the teacher, in order, and none to the student."""
    flags, (system, question, intro, transition) = SWITCHES[name]
    file = tmp_path / "prompts.yaml"
    file.write_text("system: sys\nintro: intro\ntransition: go\n")
    made = builder(PromptSettings(prompts=str(file), **flags).build())
    row = sample()
    problem, first, second = (
        float(made.image(image).patches[0, 0]) for image in (row.problem_image, *row.thought_images)
    )
    assert len({problem, first, second}) == 3
    student = made.student(row)
    expected = [text for text in (system,) if text] + [problem, question]
    assert shown(student) == expected
    expected += [part for part in (intro, first, second, transition) if part is not None]
    assert shown(made.teacher(row, student)) == expected


def test_a_prompts_file_can_leave_a_string_out(tmp_path: Path) -> None:
    file = tmp_path / "prompts.yaml"
    file.write_text("system: null\nintro: ''\n")
    prompts = Prompts.from_yaml(file)
    assert not prompts.system and not prompts.intro
    assert prompts.transition == Prompts().transition


@pytest.mark.parametrize(
    ("form", "texts"),
    [("single", ["<think>so</think><answer>B</answer>"]), ("reference", ["so", "B"])],
)
def test_sft_targets(form: str, texts: list[str]) -> None:
    targets = builder(Prompts()).sft_targets(sample(), form)
    assert [TOKENIZER.decode(list(target.ids)) for target in targets] == texts
    assert all(target.scored == (True,) * (len(target.ids) + 1) for target in targets)


def test_noise_replaces_patches_by_the_rows_own_numbers() -> None:
    made, row = builder(Prompts()), sample()
    student = made.student(row)
    generator = torch.Generator().manual_seed(3)
    shown = ShownThoughts(
        row.thought_images, lambda x, *_: torch.randn(x.shape, generator=generator)
    )
    context = made.teacher(row, student, shown)
    patches = [s.patches for s in context[len(student) :] if isinstance(s, ImageSegment)]
    generator = torch.Generator().manual_seed(3)
    assert len(patches) == 2
    for found in patches:
        assert torch.equal(found, torch.randn(found.shape, generator=generator))
