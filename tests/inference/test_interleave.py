# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Many conversations at once, guidance in one forward or in turn, rounds, what is shown again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import inference.contexts
from data.sequence import INFERENCER_SYSTEM_PROMPT
from inference.interleave import Turn
from inferencer import BatchInterleaveInferencer, InterleaveInferencer
from modeling import load_bagel
from tests.test_inferencer import (
    ASKED,
    QUICK,
    SIX,
    as_tensor,
    assert_same_parts,
    make,
    picture,
)


@pytest.fixture(scope="module")
def bundle(tiny_bagel_path: Any) -> Any:
    return load_bagel(tiny_bagel_path, visual_gen=True)


# -- batches ----------------------------------------------------------------------------------


@pytest.mark.parametrize("renorm", ["text_channel", "global"])
def test_batch_equals_one_by_one(bundle: Any, renorm: str) -> None:
    single, batch = make(bundle), make(bundle, BatchInterleaveInferencer)
    options = {**QUICK, "cfg_renorm_type": renorm, "image_shapes": (64, 80), "num_timesteps": 3}
    seeds = [3, 1, 4, 1, 5, 9]
    alone = [
        single.interleave_inference(parts, seed=seed, **options)
        for parts, seed in zip(SIX, seeds, strict=True)
    ]
    together = batch.interleave_inference(SIX, seed=seeds, **options)
    for actual, expected in zip(together, alone, strict=True):
        assert_same_parts(actual, expected)
    drawn = [part.size for parts in alone for part in parts if not isinstance(part, str)]
    assert len(drawn) >= 3 and len(set(drawn)) >= 3 and len({len(parts) for parts in alone}) > 1
    if renorm == "text_channel":
        return
    # In groups and with small forwards.
    batch.max_forward_tokens = 100
    for actual, expected in zip(
        batch.interleave_inference(SIX, seed=seeds, batch_size=4, **options), alone, strict=True
    ):
        assert_same_parts(actual, expected)
    other = single.interleave_inference(SIX[0], seed=4, **options)
    assert (as_tensor(other[1]).int() - as_tensor(alone[0][1]).int()).abs().max() > 10


def test_sampled_batch_equals_one_by_one(bundle: Any) -> None:
    options = {
        "think": True,
        "understanding_output": True,
        "do_sample": True,
        "text_temperature": 3.0,
        "max_think_token_n": 24,
    }
    single, batch = make(bundle), make(bundle, BatchInterleaveInferencer)
    together = batch.interleave_inference(SIX, seed=7, **options)
    alone = [single.interleave_inference(parts, seed=7, **options) for parts in SIX]
    assert together == alone
    assert together != batch.interleave_inference(SIX, seed=8, **options)


@pytest.mark.parametrize("renorm", ["text_channel", "global", "channel"])
def test_guidance_in_turn_when_memory_ends(
    bundle: Any, monkeypatch: pytest.MonkeyPatch, renorm: str
) -> None:
    """Branches that do not fit in one forward give the same latents one after the other."""
    latents: dict[str, list[Tensor]] = {"one": [], "turn": []}
    how = "one"
    original = inference.contexts.denoise
    tried = []

    def small(model: Any, noise: Tensor, branches: Any, *rest: Any) -> Tensor:
        tried.append(branches.together is not None)
        if tried[-1]:
            raise torch.OutOfMemoryError("pretended")
        return original(model, noise, branches, *rest)

    class Keeping(BatchInterleaveInferencer):
        def decode_image(self, latent: Tensor, image_shape: tuple[int, int]) -> Image.Image:
            latents[how].append(latent)
            return super().decode_image(latent, image_shape)

    options = {**QUICK, "cfg_renorm_type": renorm, "image_shapes": (64, 80), "max_rounds": 1}
    inferencer = make(bundle, Keeping)
    inferencer.interleave_inference(SIX, seed=0, **options)
    monkeypatch.setattr(inference.contexts, "denoise", small)
    how = "turn"
    with pytest.warns(UserWarning, match="3 guidance branches do not fit"):
        inferencer.interleave_inference(SIX, seed=0, **options)
    assert tried == [True, False]
    assert len(latents["one"]) >= 3
    for one, other in zip(latents["one"], latents["turn"], strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


# -- rounds -----------------------------------------------------------------------------------


class Scripted(InterleaveInferencer):
    """Writes what the test says; keeps what it was asked."""

    script: tuple[str, ...] = ()

    def write(self, conversations: Any, options: Any, skips: int = 0) -> Any:
        (conversation,) = conversations
        self.asked = [*getattr(self, "asked", []), (conversation.full.past, skips)]
        text = self.script[len(self.asked) - 1]
        conversation.add(text)
        return [Turn(text, self.builder.text(text))]


@pytest.mark.parametrize("compat", [True, False])
def test_rounds(bundle: Any, compat: bool) -> None:
    """Drawings are limited; then the answer is written, with a skip if it asks for more."""
    more = "look<image_start>"
    options = {**QUICK, "image_shapes": (64, 64), "num_timesteps": 2, "max_rounds": 2}
    inferencer = make(bundle, Scripted, reference_compat=compat)
    inferencer.script = (more, more, "<answer>B</answer>")
    outputs = inferencer(text=ASKED, seed=0, **options)
    kinds = ["text" if isinstance(part, str) else "image" for part in outputs]
    assert kinds == ["text", "image"] * 2 + ["text"] * (not compat)
    skips = [skip for _, skip in inferencer.asked]
    assert skips == ([0, 0] if compat else [0, 0, 1])
    without = make(bundle, Scripted)
    without.script = ("<answer>A</answer>",)
    assert without.interleave_inference([ASKED], **{**options, "max_rounds": 0}) == [
        "<answer>A</answer>"
    ]
    assert without.asked[0][1] == 1


def test_shown_instead(bundle: Any) -> None:
    """The output keeps the drawing; the context gets what it is replaced by."""
    more = "look<image_start>"
    seen: list[Any] = []
    after = {}

    def edit(answer: Image.Image | None) -> Callable[[int, int, Image.Image], Any]:
        def change(sample: int, drawing: int, drawn: Image.Image) -> Image.Image | None:
            seen.append((sample, drawing, drawn.size))
            return answer

        return change

    for name, hook in (
        ("kept", None),
        ("nothing", edit(None)),
        ("larger", edit(picture(140, 150, 0))),
    ):
        inferencer = make(bundle, Scripted)
        inferencer.script = (more, "done")
        outputs = inferencer.interleave_inference(
            [ASKED], seed=0, edit_image=hook, **{**QUICK, "image_shapes": (64, 80)}
        )
        assert outputs[1].size == (80, 64)
        after[name] = inferencer.asked[1][0]
    assert seen == [(0, 0, (80, 64))] * 2
    # Latent tokens and ViT patches, each with two markers and at one position.
    assert after["kept"][0] - after["nothing"][0] == 4 * 5 + 2 + 5 * 6 + 2
    assert after["larger"][0] - after["nothing"][0] == 8 * 7 + 2 + 8 * 7 + 2
    assert after["kept"][1] - after["nothing"][1] == 2
    numbers: list[int] = []

    def note(sample: int, drawing: int, drawn: Image.Image) -> Image.Image:
        numbers.append(sample)
        return drawn

    batch = make(bundle, BatchInterleaveInferencer)
    batch.interleave_inference([SIX[1], SIX[0], SIX[0]], batch_size=2, edit_image=note, **QUICK)
    assert numbers[-2:] == [1, 2]


def test_text_limit_counts_the_start_token(bundle: Any) -> None:
    inferencer = make(bundle)
    context = inferencer.init_gen_context()
    for text in (INFERENCER_SYSTEM_PROMPT, ASKED):
        context = inferencer.update_context_text(text, context)
    whole = inferencer.gen_text(context, 64, do_sample=False)
    cut = inferencer.gen_text(context, 5, do_sample=False)
    assert bundle.tokenizer.encode(whole)[:4] == bundle.tokenizer.encode(cut)
    drawn = [
        inferencer.gen_text(
            context, 20, temperature=3.0, generator=torch.Generator().manual_seed(seed)
        )
        for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(bundle: Any, tiny_bagel_path: Any, dtype: torch.dtype) -> None:
    """A seed gives the CPU's answer, as all noise is drawn there."""
    options = {**QUICK, "image_shapes": (64, 80)}
    on_gpu = load_bagel(tiny_bagel_path, visual_gen=True, device="cuda", dtype=dtype)
    cases = SIX[:4]
    expected = make(bundle, BatchInterleaveInferencer)(input_lists=cases, seed=0, **options)
    actual = make(on_gpu, BatchInterleaveInferencer)(input_lists=cases, seed=0, **options)
    worst = 0
    for one, other in zip(actual, expected, strict=True):
        assert [type(part) for part in one] == [type(part) for part in other]
        for a, b in zip(one, other, strict=True):
            if isinstance(b, str):
                assert a == b
            else:
                worst = max(worst, int((as_tensor(a).int() - as_tensor(b).int()).abs().max()))
    assert worst <= (4 if dtype == torch.float32 else 100), worst
