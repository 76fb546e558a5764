# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Interleaved inference against the recorded reference, one by one and in batches."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from data.packing import pack
from data.sequence import (
    INFERENCER_SYSTEM_PROMPT,
    PACKER_SYSTEM_PROMPT,
    LatentSegment,
    TextSegment,
)
from data.transforms import ImageTransform, extrapolated_position_ids
from inference.contexts import CachedContext, cached_prompt, grow
from inference.interleave import Conversation, InterleaveOptions
from inferencer import BatchInterleaveInferencer, InterleaveInferencer
from modeling import load_bagel
from modeling.autoencoder import decode_tokens
from modeling.bagel.flow import flow_schedule
from tests.conftest import assert_golden, load_golden

CASES = [
    "direct",
    "interleave",
    "interleave_wrapper_prompt",
    "max_rounds1",
    "text_only",
    "understanding",
    "understanding_default_transforms",
    "understanding_nothink_two_images",
]
SMALL = ImageTransform(128, 64, 16), ImageTransform(112, 56, 14)
ASKED = "Which region of the picture holds the red square? (A) left (B) right"
ANSWER = "<image_end><think>The mark is on the right.</think><answer>B</answer>"
QUICK: dict[str, Any] = {
    "think": True,
    "max_think_token_n": 64,
    "cfg_text_scale": 4.0,
    "cfg_img_scale": 2.0,
    "cfg_interval": (0.0, 1.0),
    "num_timesteps": 4,
    "cfg_renorm_type": "text_channel",
}


@pytest.fixture(scope="module")
def bundle(tiny_bagel_path: Any) -> Any:
    return load_bagel(tiny_bagel_path, visual_gen=True)


def make(
    bundle: Any,
    kind: Any = InterleaveInferencer,
    transforms: Any = SMALL,
    ids: Any = None,
    **more: Any,
) -> Any:
    ids = ids or bundle.special_tokens
    return kind(bundle.model, bundle.vae, bundle.tokenizer, *transforms, ids, **more)


@torch.no_grad()
def next_token_logits(inferencer: Any, context: Any) -> Tensor:
    """(1, V) logits of the first token that would be written; the context stays as it is."""
    if not isinstance(context, CachedContext):
        (length,), (position,) = context["kv_lens"], context["ropes"]
        context = CachedContext(context["past_key_values"], length, position)
    prompt = cached_prompt(inferencer.model, [context], 1)
    start, position, slot = (
        torch.tensor(x) for x in ([inferencer.special.bos], prompt.next_positions, prompt.lens)
    )
    return inferencer.model.decode_step(start, position, slot, prompt.cache)


def transforms_of(meta: dict[str, Any]) -> tuple[ImageTransform, ...]:
    specs = (meta["transforms"][name] for name in ("vae_transform", "vit_transform"))
    return tuple(ImageTransform(spec["max"], spec["min"], spec["stride"]) for spec in specs)


def inputs_of(meta: dict[str, Any], tensors: dict[str, Tensor]) -> list[Any]:
    found: list[Any] = []
    for k, given in enumerate(meta["inputs"]):
        if given.startswith("image ("):
            mode = "_rgba" if given.endswith("RGBA") else ""
            found.append(Image.fromarray(tensors[f"input{k}{mode}_u8"].numpy()))
        else:
            found.append(given)
    return found


def as_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image))


def assert_outputs(meta: dict[str, Any], tensors: dict[str, Tensor], outputs: list[Any]) -> None:
    """Texts exactly, images as the golden says."""
    assert len(outputs) == len(meta["outputs"])
    for actual, expected in zip(outputs, meta["outputs"], strict=True):
        if expected["type"] == "text":
            assert actual == expected["text"]
        else:
            assert list(actual.size) == expected["size_wh"]
            name = expected["tensor"]
            assert_golden(meta, name, as_tensor(actual), tensors[name])


def picture(width: int, height: int, seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


SIX: list[list[Any]] = [
    [picture(120, 90, 0), ASKED],
    [picture(64, 64, 1), "Is the cat on the left side?"],
    [picture(70, 100, 2), "<img><|image_1|></img> How many steps lead to the exit of the maze?"],
    [ASKED],
    [picture(90, 60, 3), picture(60, 100, 4), ASKED],
    ["How many steps lead to the exit of the maze?", picture(128, 128, 5)],
]


def assert_same_parts(actual: list[Any], expected: list[Any]) -> None:
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        if isinstance(other, str):
            assert one == other
        else:
            # Batches sum in another order: a value on the edge may be truncated otherwise.
            assert one.size == other.size
            assert (as_tensor(one).int() - as_tensor(other).int()).abs().max() <= 1


@pytest.fixture
def draws(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Every result of torch.randn, in order."""
    found: list[Tensor] = []
    original = torch.randn

    def recorded(*args: Any, **kwargs: Any) -> Tensor:
        found.append(original(*args, **kwargs))
        return found[-1]

    monkeypatch.setattr(torch, "randn", recorded)
    return found


# -- goldens ----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_golden(bundle: Any, draws: list[Tensor], case: str) -> None:
    """The seed alone gives the reference's noises in its order, its texts and its images."""
    meta, tensors = load_golden(f"09_{case}")
    inferencer = make(bundle, transforms=transforms_of(meta), reference_compat=True)
    torch.manual_seed(meta["seed"])
    outputs = inferencer.interleave_inference(inputs_of(meta, tensors), **meta["kwargs"])
    assert_outputs(meta, tensors, outputs)
    recorded = [tensors[name] for name in sorted(tensors) if name.startswith("random")]
    assert len(draws) == len(recorded)
    assert all(torch.equal(a, b) for a, b in zip(draws, recorded, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_golden_by_default(bundle: Any, case: str) -> None:
    """The same, and what the reference leaves out: the answer."""
    meta, tensors = load_golden(f"09_{case}")
    inferencer = make(bundle, transforms=transforms_of(meta))
    torch.manual_seed(meta["seed"])
    outputs = inferencer.interleave_inference(inputs_of(meta, tensors), **meta["kwargs"])
    if case == "max_rounds1":
        assert outputs.pop() == ANSWER
    if case == "understanding":
        assert outputs == [meta["outputs"][0]["text"] + ANSWER]
        return
    assert_outputs(meta, tensors, outputs)


@pytest.mark.parametrize("compat", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_golden_with_a_seed_of_its_own(
    bundle: Any, tiny_bagel_path: Any, compat: bool, dtype: torch.dtype
) -> None:
    """Whatever the global generator does; in half precision the same text, about the image."""
    meta, tensors = load_golden("09_interleave")
    loaded = bundle
    if dtype != torch.float32:
        loaded = load_bagel(tiny_bagel_path, visual_gen=True, dtype=dtype)
    inferencer = make(loaded, transforms=transforms_of(meta), reference_compat=compat)
    state = torch.get_rng_state()
    parts = inputs_of(meta, tensors)
    outputs = inferencer.interleave_inference(parts, seed=meta["seed"], **meta["kwargs"])
    assert torch.equal(torch.get_rng_state(), state)
    if dtype == torch.float32:
        assert_outputs(meta, tensors, outputs)
        return
    assert [outputs[0], outputs[2]] == [meta["outputs"][k]["text"] for k in (0, 2)]
    difference = (as_tensor(outputs[1]).float() - tensors["output1_u8"].float()).abs()
    assert difference.mean() < 8, difference.mean()


@pytest.mark.parametrize("case", ["interleave", "understanding_nothink_two_images"])
@pytest.mark.parametrize("compat", [True, False])
def test_trace_by_the_single_methods(bundle: Any, case: str, compat: bool) -> None:
    """Call by call: lengths and positions of the contexts, texts, and the image."""
    meta, tensors = load_golden(f"09_{case}")
    inferencer = make(bundle, transforms=transforms_of(meta), reference_compat=compat)
    images = [inferencer.resized(x) for x in inputs_of(meta, tensors) if not isinstance(x, str)]
    torch.manual_seed(meta["seed"])
    think = meta["kwargs"]["think"]
    gen, dropped = inferencer.init_gen_context(), inferencer.init_gen_context()
    before_text = gen
    texts = 0
    for i, call in enumerate(meta["trace"]):
        if call["call"] == "gen_text":
            assert inferencer.gen_text(gen, **call["kwargs"]) == call["out"]
            continue
        if call["call"] == "gen_image":
            assert gen["kv_lens"] == call["gen_kv"] and gen["ropes"] == call["gen_rope"]
            assert before_text["kv_lens"] == call["cfg_text_kv"]
            assert dropped["kv_lens"] == call["cfg_img_kv"]
            picture = inferencer.gen_image(
                tuple(call["image_shape_hw"]),
                gen,
                cfg_text_precontext=before_text,
                cfg_img_precontext=dropped,
                **call["kwargs"],
            )
            assert_golden(meta, "output1_u8", as_tensor(picture), tensors["output1_u8"])
            images.append(picture)
            continue
        if call["call"] == "update_context_image":
            updated = inferencer.update_context_image(images.pop(0), gen, **call["flags"])
        else:
            # The inputs' texts go to both contexts in turn, what was written to the first only.
            written = meta["trace"][i - 1]["call"] == "gen_text"
            second = not written and texts % 2 == 1
            texts += not written
            target = dropped if second else gen
            if not written and not second and (texts > 1 or not think):
                before_text = copy.deepcopy(gen)
            updated = inferencer.update_context_text(call["arg"], target)
            if second:
                assert (updated is dropped) == compat
                dropped = updated
                assert (updated["kv_lens"], updated["ropes"]) == (call["kv_lens"], call["ropes"])
                continue
        assert (updated is gen) == compat
        gen = updated
        assert (updated["kv_lens"], updated["ropes"]) == (call["kv_lens"], call["ropes"])


@pytest.mark.parametrize("mode", ["gen", "und"])
def test_golden_batch(bundle: Any, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    meta, tensors = load_golden("09_batch")
    noises = [tensors[name] for name in sorted(tensors) if name.startswith(f"{mode}.random")]

    def stored(*shape: Any, **_: Any) -> Tensor:
        expected = shape[0] if len(shape) == 1 else shape
        noise = noises.pop(0)
        assert tuple(noise.shape) == tuple(expected)
        return noise

    monkeypatch.setattr(torch, "randn", stored)
    inferencer = make(bundle, BatchInterleaveInferencer, transforms_of(meta), reference_compat=True)
    images = [Image.fromarray(tensors[f"image{k}_u8"].numpy()) for k in range(3)]
    outputs = inferencer(images, meta["inputs"], **meta[mode]["kwargs"])
    assert noises == []
    for k, (actual, expected) in enumerate(zip(outputs, meta[mode]["outputs"], strict=True)):
        assert len(actual) == len(expected)
        for place, (part, words) in enumerate(zip(actual, expected, strict=True)):
            if words.startswith("image ("):
                name = f"{mode}.out{k}_{place}_u8"
                assert f"image {part.size}" == words
                assert_golden(meta, name, as_tensor(part), tensors[name])
            else:
                assert part == words


# -- contexts ---------------------------------------------------------------------------------


def test_a_context_is_never_changed(bundle: Any) -> None:
    inferencer = make(bundle)
    start = inferencer.update_context_text("One question.", inferencer.init_gen_context())
    logits = next_token_logits(inferencer, start)
    assert logits.shape == (1, bundle.config.llm.vocab_size)
    kept = dict(start)
    first = inferencer.update_context_text("Left or right?", start)
    second = inferencer.update_context_image(inferencer.resized(SIX[0][0]), start, vae=False)
    longer = inferencer.update_context_text("And then?", first)
    inferencer.gen_text(start, max_length=20, do_sample=False)
    inferencer.gen_image((64, 64), start, cfg_text_scale=1.0, num_timesteps=3)
    assert start == kept
    assert torch.equal(next_token_logits(inferencer, start), logits)
    # Each continuation is what it is when grown alone, in one forward.
    for context, texts in ((first, ["Left or right?"]), (longer, ["Left or right?", "And then?"])):
        encode = bundle.tokenizer.encode
        segments = [TextSegment(tuple(encode(text))) for text in ("One question.", *texts)]
        empty = CachedContext.empty(bundle.model)
        alone = grow(bundle.model, bundle.special_tokens, [empty], [segments])[0]
        assert (context["kv_lens"], context["ropes"]) == ([alone.length], [alone.position])
        for actual, expected in zip(
            context["past_key_values"].cache.keys, alone.store.cache.keys, strict=True
        ):
            torch.testing.assert_close(
                actual[:, : alone.length], expected[:, : alone.length], atol=1e-5, rtol=1e-5
            )
    image_rows = second["kv_lens"][0] - start["kv_lens"][0]
    assert image_rows > 2 and second["ropes"][0] == start["ropes"][0] + 1


def test_contexts_that_part_ways(bundle: Any) -> None:
    """Both continue from the same rows, in a store with room to spare."""
    inferencer = make(bundle)
    start = inferencer.init_gen_context()
    for text in (INFERENCER_SYSTEM_PROMPT, ASKED):
        start = inferencer.update_context_text(text, start)
    assert start["past_key_values"].cache.max_len >= start["kv_lens"][0] + 20
    left = inferencer.update_context_text("Left.", start)
    logits = next_token_logits(inferencer, left)
    right = inferencer.update_context_text("No, right!", start)
    assert left["past_key_values"] is start["past_key_values"]
    assert torch.equal(next_token_logits(inferencer, left), logits)
    assert not torch.equal(next_token_logits(inferencer, right), logits)
    again = inferencer.update_context_text("Left.", start)
    assert torch.equal(next_token_logits(inferencer, again), logits)


def test_text_dropped_context_of_two_texts(bundle: Any) -> None:
    """It lacks the last text only."""
    kept: list[Any] = []

    class Watched(InterleaveInferencer):
        def draw(self, conversations: Any, options: Any) -> list[Image.Image]:
            (c,) = conversations
            kept.append([x.past for x in (c.full, c.text_dropped, c.image_dropped)])
            return super().draw(conversations, options)

    inferencer = make(bundle, Watched)
    context = inferencer.init_gen_context()
    lens = []
    for text in (INFERENCER_SYSTEM_PROMPT, "Look at this.", ASKED):
        context = inferencer.update_context_text(text, context)
        lens.append(context["kv_lens"][0])
    options = {**QUICK, "image_shapes": (64, 64), "num_timesteps": 2, "max_rounds": 1}
    inferencer.interleave_inference(["Look at this.", ASKED], seed=0, **options)
    (full, text_dropped, image_dropped), *_ = kept
    assert text_dropped == (lens[1], lens[1]) and image_dropped == (lens[2], lens[2])
    assert full[0] > lens[2]


def test_compat_changes_the_argument(bundle: Any) -> None:
    inferencer = make(bundle, reference_compat=True)
    context = inferencer.init_gen_context()
    copied = copy.deepcopy(context)
    assert inferencer.update_context_text("Text", context) is context
    assert context["kv_lens"][0] > 0 and copied["kv_lens"] == [0]
    inferencer.update_context_text("Other", copied)
    again = make(bundle)
    expected = again.update_context_text("Text", again.init_gen_context())
    assert torch.equal(next_token_logits(inferencer, context), next_token_logits(again, expected))


def test_what_was_sampled_enters_the_context(bundle: Any) -> None:
    """Wild text is encoded otherwise than it was sampled; compat encodes it anew."""
    segments = {}
    for compat in (False, True):
        inferencer = make(bundle, reference_compat=compat)
        empty = CachedContext.empty(bundle.model)
        conversation = Conversation(empty, torch.Generator().manual_seed(1))
        wild = InterleaveOptions(max_think_token_n=40, do_sample=True, text_temperature=50.0)
        ((text, segment, _),) = inferencer.write([conversation], wild)
        assert segment.scored is None and "<|im_" not in text
        segments[compat] = segment.ids
        if compat:
            assert list(segment.ids) == bundle.tokenizer.encode(text)
        else:
            assert text == bundle.tokenizer.decode(segment.ids)
    assert segments[True] != segments[False]


def expected_interleave(inferencer: Any, parts: list[Any], update: bool, seed: int) -> list[Any]:
    """Two rounds written out with the public methods."""
    generator = torch.Generator().manual_seed(seed)
    image, question = inferencer.resized(parts[0]), parts[1]
    gen = dropped = inferencer.update_context_text(
        INFERENCER_SYSTEM_PROMPT, inferencer.init_gen_context()
    )
    gen = inferencer.update_context_image(image, gen, generator=generator)
    before = gen
    gen, dropped = (inferencer.update_context_text(question, c) for c in (gen, dropped))
    outputs: list[Any] = []
    for _ in range(2):
        text = inferencer.gen_text(gen, 64, do_sample=False)
        outputs.append(text)
        if "<image_start>" not in text:
            break
        if update:
            before, dropped = gen, inferencer.update_context_text(text, dropped)
        gen = inferencer.update_context_text(text, gen)
        drawn = inferencer.gen_image(
            (image.height, image.width),
            gen,
            cfg_text_precontext=before,
            cfg_img_precontext=dropped,
            generator=generator,
            timestep_shift=3.0,
            **{k: v for k, v in QUICK.items() if k.startswith(("cfg", "num"))},
        )
        outputs.append(drawn)
        gen = inferencer.update_context_image(inferencer.resized(drawn), gen, generator=generator)
    return outputs


def test_guidance_contexts(bundle: Any) -> None:
    """They end with the inputs, or follow the conversation by the same rule."""
    inferencer = make(bundle)
    results = []
    for update in (False, True):
        outputs = inferencer.interleave_inference(
            SIX[0], seed=2, update_cfg_contexts=update, **QUICK
        )
        assert_same_parts(outputs, expected_interleave(inferencer, SIX[0], update, 2))
        results.append(as_tensor(outputs[1]).int())
    assert (results[0] - results[1]).abs().max() > 2


# -- students, other people's objects, mistakes -------------------------------------------------


def test_text_only_student(bundle: Any, tiny_bagel_path: Any) -> None:
    """No drawing branch, images as in training: the answer is reached."""
    student = load_bagel(tiny_bagel_path)
    inferencer = make(student, transforms=(None, SMALL[1]), system_prompt=PACKER_SYSTEM_PROMPT)
    options = {"think": True, "understanding_output": True, "max_think_token_n": 64}
    golden, tensors = load_golden("09_understanding")
    parts = inputs_of(golden, tensors)
    (text,) = inferencer.interleave_inference(parts, **options)
    assert text.endswith("</answer>") and "<image_start>" in text and "<|im_" not in text
    (unfinished,) = inferencer.interleave_inference(parts, image_skips=0, **options)
    assert unfinished.endswith("<image_start>") and text.startswith(unfinished)
    with pytest.raises(ValueError, match="needs the model's drawing branch"):
        inferencer.interleave_inference(parts)
    with pytest.raises(ValueError, match="needs vae_transform"):
        drawing = make(bundle, transforms=(None, SMALL[1]))
        drawing.interleave_inference(parts)


class ReleaseTransform:
    """The release's transform: `resize_transform` and a call."""

    def __init__(self, transform: ImageTransform) -> None:
        self.resize_transform: Callable[..., Image.Image] = transform.resize
        self.transform = transform

    def __call__(self, image: Image.Image, img_num: int = 1) -> Tensor:
        return self.transform(image, img_num)


def test_objects_of_the_release(bundle: Any) -> None:
    special = bundle.special_tokens
    ids = {
        "bos_token_id": special.bos,
        "eos_token_id": special.eos,
        "start_of_image": special.start_of_image,
        "end_of_image": special.end_of_image,
    }
    transforms = [ReleaseTransform(transform) for transform in SMALL]
    outputs = make(bundle, transforms=transforms, ids=ids)(
        image=SIX[0][0], text=ASKED, seed=0, **QUICK
    )
    assert_same_parts(outputs, make(bundle)(input_list=SIX[0], seed=0, **QUICK))
    del ids["start_of_image"]
    with pytest.raises(ValueError, match="lacks start_of_image"):
        make(bundle, transforms=transforms, ids=ids)


def test_the_image_shape(bundle: Any) -> None:
    """Beyond the latent position table or off its grid: no image."""
    inferencer = make(bundle)
    context = inferencer.update_context_text("Draw", inferencer.init_gen_context())
    for shape in ((1040, 64), (64, 60), (0, 64)):
        with pytest.raises(ValueError, match="multiples of 16 and at most 1024"):
            inferencer.gen_image(shape, context, cfg_text_scale=1.0)


def test_mistakes(bundle: Any) -> None:
    inferencer = make(bundle)
    context = inferencer.init_gen_context()
    with pytest.raises(ValueError, match="pass cfg_text_precontext"):
        inferencer.gen_image((64, 64), context)
    with pytest.raises(ValueError, match="pass cfg_text_precontext"):
        inferencer.gen_image((64, 64), context, 4.0, 2.0, cfg_text_precontext=context)
    with pytest.raises(ValueError, match="through vae, vit or both"):
        inferencer.update_context_image(SIX[0][0], context, vae=False, vit=False)
    with pytest.raises(ValueError, match="must come from init_gen_context"):
        inferencer.gen_text({"kv_lens": [0], "ropes": [0], "past_key_values": None})
    with pytest.raises(ValueError, match="cfg_interval must be"):
        inferencer.interleave_inference([ASKED], cfg_interval=[0.4])
    with pytest.raises(ValueError, match="there is no input"):
        inferencer()
    with pytest.raises(ValueError, match="wrap it in"):
        inferencer.interleave_inference(ASKED)
    with pytest.raises(ValueError, match="got int"):
        inferencer.interleave_inference([ASKED, 3])
    with pytest.raises(ValueError, match="must not be negative"):
        InterleaveOptions(max_rounds=-1)
    for name in ("text_temperature", "cfg_text_scale", "timestep_shift", "cfg_renorm_min"):
        with pytest.raises(ValueError, match=f"{name} must be a finite number, got nan"):
            InterleaveOptions(**{name: float("nan")})  # type: ignore[arg-type]
    assert make(bundle, reference_compat=True)() == {"image": None, "text": None}
    batch = make(bundle, BatchInterleaveInferencer)
    assert batch.interleave_inference([]) == []
    with pytest.raises(ValueError, match="2 seeds for 1 samples"):
        batch.interleave_inference([[ASKED]], seed=[1, 2])
    with pytest.raises(ValueError, match="batch_size must be"):
        batch.interleave_inference([[ASKED]], batch_size=0)


def test_taylorseer_is_announced(bundle: Any) -> None:
    inferencer = make(bundle)
    with pytest.warns(UserWarning, match="enable_taylorseer has no effect"):
        inferencer.interleave_inference(
            [ASKED], understanding_output=True, enable_taylorseer=True, max_think_token_n=2
        )
    context = inferencer.init_gen_context()
    with pytest.warns(UserWarning, match="enable_taylorseer has no effect"):
        inferencer.gen_image(
            (64, 64), context, cfg_text_scale=1.0, num_timesteps=2, enable_taylorseer=True
        )


def test_an_image_from_nothing(bundle: Any) -> None:
    """An empty context draws too: Euler steps of a sequence without a past."""
    inferencer = make(bundle)
    drawn = inferencer.gen_image(
        (64, 80),
        inferencer.init_gen_context(),
        cfg_text_scale=1.0,
        num_timesteps=3,
        generator=torch.Generator().manual_seed(0),
    )
    blank = LatentSegment.blank(extrapolated_position_ids(4, 5, 64))
    batch = pack([(blank,)], bundle.special_tokens)
    x = torch.randn(20, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for t, after in pairwise(flow_schedule(3, 3.0)):
            x -= bundle.model(batch.at_time(x, t), flow_head=lambda v: v) * (t - after)
        expected = decode_tokens(bundle.vae, x, 4, 5)
    assert (as_tensor(drawn).int() - expected.int()).abs().max() <= 1


def test_pictures_enter_upright_unless_compat(bundle: Any) -> None:
    stored = picture(60, 40, 0)
    exif = Image.Exif()
    exif[0x112] = 6
    stream = io.BytesIO()
    stored.save(stream, "PNG", exif=exif)
    with Image.open(stream) as opened:
        for compat, expected in (
            (False, stored.transpose(Image.Transpose.ROTATE_270)),
            (True, stored),
        ):
            engine = make(bundle, reference_compat=compat)
            assert engine.resized(opened).tobytes() == engine.resized(expected).tobytes()
            logits = [
                next_token_logits(
                    engine, engine.update_context_image(image, engine.init_gen_context(), vae=False)
                )
                for image in (opened, expected)
            ]
            assert torch.equal(*logits)
