# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""One optimiser step: the recorded one (golden 13), span identity, packs, schedules."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from data.packing import context_length, pack
from data.sequence import (
    Completion,
    Context,
    ImageSegment,
    LatentSegment,
    TextSegment,
    given_completion,
)
from data.transforms import extrapolated_position_ids, patchify
from modeling.bagel.bagel import Bagel
from modeling.release.checkpoint import iter_weights, locate_weights
from modeling.release.tokenizer import load_tokenizer
from scripts.visual_opsd.config import LossSettings, OptimSettings
from scripts.visual_opsd.processes import DistEnv, init_distributed, shutdown
from scripts.visual_opsd.rows import TrainRow
from scripts.visual_opsd.scored_rows import (
    ScoredRow,
    check_same_labels,
    empty_row,
    score_completion,
    score_targets,
)
from scripts.visual_opsd.training.sharding import (
    clip_grad_norm,
    load_sharded,
    make_mesh,
    materialise,
    shard_model,
)
from scripts.visual_opsd.training.step import (
    PackResult,
    StepContext,
    learning_rate_factor,
    plan_packs,
    run_pack,
    sampler_gap,
    shared_images,
    summarise,
)
from scripts.visual_opsd.training.teacher import Teacher
from tests.conftest import TINY_BAGEL, assert_golden, load_golden


@pytest.fixture
def env() -> Iterator[DistEnv]:
    yield init_distributed("cpu", 60)
    shutdown()


def sharded(path: Path, env: DistEnv, *, trains: bool) -> Bagel:
    config, _ = locate_weights(path)
    with torch.device("meta"):
        model = Bagel(config)
    if not trains:
        model.requires_grad_(False)
    shard_model(
        model, make_mesh(env), block_classes=Bagel.block_classes(), param_dtype=torch.float32
    )
    if trains:
        model.set_gradient_checkpointing(True)
    materialise(model, env.device)
    load_sharded(model, iter_weights(path))
    return model


def local(tensor: Any) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def recorded_context(name: str, images: list[str]) -> Context:
    """The context of golden 04 without its completion, from the recorded ids and images."""
    meta, t = load_golden(name)
    ends = torch.tensor(meta["batch"]["split_lens"]).cumsum(0).tolist()
    pictures = iter(images)
    segments: list[Any] = []
    for start, end in zip([0, *ends[:-2]], ends[:-1], strict=True):
        inside = (t["packed_text_indexes"] >= start) & (t["packed_text_indexes"] < end)
        ids = t["packed_text_ids"][inside].tolist()
        if len(ids) == end - start:
            segments.append(TextSegment(tuple(ids[1:-1])))
            continue
        pixels = t[next(pictures)]
        grid = extrapolated_position_ids(pixels.shape[1] // 14, pixels.shape[2] // 14, 70)
        segments.append(ImageSegment(patchify(pixels, 14), grid))
    return tuple(segments)


def contexts(row: TrainRow) -> tuple[str, Context, Context]:
    assert row.teacher is not None
    return row.name, row.student, row.teacher


def recorded_row() -> ScoredRow:
    meta, _ = load_golden("13_opsd_step")
    completion = given_completion(meta["setup"]["completion_ids"])
    row = TrainRow(
        "golden", 0, "", "",
        recorded_context("04_train_student", ["problem_image"]),
        recorded_context("04_train_teacher", ["problem_image", "vt_image0", "vt_image1"]),
    )  # fmt: skip
    return score_completion(*contexts(row), completion, 4096)


def step_context(
    student: Any, teacher: Teacher | None, head: Tensor | None = None, **changes: Any
) -> StepContext:
    """A step on the CPU of the tiny model, in chunks of 7 tokens."""
    tokenizer, special = load_tokenizer(TINY_BAGEL)
    settings: dict[str, Any] = {
        "loss": LossSettings().build(), "chunk_size": 7, "scale": 1.0, "special": special,
        "device": torch.device("cpu"), "decode": tokenizer.decode,
    }  # fmt: skip
    return StepContext(student, teacher, head, **{**settings, **changes})


@pytest.mark.parametrize("packs", [1, 2])
def test_recorded_step(tiny_bagel_path: Path, env: DistEnv, packs: int) -> None:
    """Golden 13 through the trainer's own pieces; once as one pack, once over two packs."""
    meta, t = load_golden("13_opsd_step")
    setup = meta["setup"]
    _, special = load_tokenizer(tiny_bagel_path)
    student = sharded(tiny_bagel_path, env, trains=True)
    teacher_model = sharded(tiny_bagel_path, env, trains=False)
    changed = dict(teacher_model.named_parameters())
    with torch.no_grad():
        local(changed["language_model.model.layers.1.self_attn.v_proj.weight"]).mul_(1.05)
    teacher = Teacher("ema", teacher_model, student, setup["ema_decay"])
    row = recorded_row()
    with torch.no_grad():
        for name, model, context in (
            ("student_logits", student, row.student),
            ("teacher_logits", teacher_model, row.teacher),
        ):
            assert context is not None
            logits = model(pack([context], special), head=F.linear)
            assert_golden(meta, name, logits, t[name])
    # The same row twice, in one pack or two: the token mean, hence the gradient, is unchanged.
    rows = [[row, row]] if packs == 1 else [[row], [row]]
    loss = LossSettings(ce_weight=0.3).build()
    scored = sum(r.scored for part in rows for r in part)
    head = teacher.head(torch.float32)
    step = step_context(student, teacher, head, loss=loss, scale=1 / scored)
    results = [run_pack(part, step) for part in rows]
    total = {n: sum(float(r.stats[n]) for r in results) for n in ("divergence", "ce", "rows")}
    assert total["rows"] == scored == 50
    assert_golden(meta, "jsd", torch.tensor(total["divergence"] / scored), t["jsd"])
    assert_golden(meta, "ce_mean", torch.tensor(total["ce"] / scored), t["ce_mean"])
    params = {n: p for n, p in student.named_parameters() if p.requires_grad}
    assert {n for n, p in student.named_parameters() if not p.requires_grad} == set(
        meta["no_grad_params"]
    )
    for name, norm in meta["grad_norms"].items():
        if name not in (*meta["zero_grad_params"], *meta["no_grad_params"]):
            grad = params[name].grad
            assert grad is not None
            assert float(local(grad).norm()) == pytest.approx(norm, rel=1e-3, abs=1e-6), name
    for key in t:
        if key.startswith("grad."):
            assert_golden(meta, key, local(params[key.removeprefix("grad.")].grad), t[key])
    optimizer = torch.optim.AdamW(
        params.values(), lr=setup["adamw"]["lr"], betas=tuple(setup["adamw"]["betas"]),
        eps=setup["adamw"]["eps"], weight_decay=0.0,
    )  # fmt: skip
    norm = clip_grad_norm(params.values(), setup["clip"])
    assert_golden(meta, "total_grad_norm", norm, t["total_grad_norm"])
    clipped = torch.stack([local(p.grad).norm() for p in params.values()]).norm()
    assert float(clipped) == pytest.approx(1.0, abs=1e-4)
    optimizer.step()
    teacher.update()
    averages = dict(teacher_model.named_parameters())
    for key, expected in t.items():
        prefix, _, name = key.partition(".")
        if prefix in ("after_step", "ema"):
            mask = t[f"compare_mask.{name}"]
            actual = local((params if prefix == "after_step" else averages)[name]).detach()
            assert_golden(meta, key, torch.where(mask, actual, expected), expected)


@pytest.mark.parametrize("mode", ["self", "ema"])
def test_shared_features_change_nothing(
    tiny_bagel_path: Path, env: DistEnv, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rows with 1 of 3 images in common, and one with 0 of 2; the ViT trains with mode self.

    The ViT then runs once for each image: in the teacher's forward.
    """
    row = recorded_row()
    assert row.completion is not None and row.teacher is not None
    blind = tuple(s for s in row.student if not isinstance(s, ImageSegment))
    seeing = tuple(s for i, s in enumerate(row.teacher) if i != 1)
    rows = [row, replace(row, student=blind, teacher=seeing), row]
    student = sharded(tiny_bagel_path, env, trains=True)
    teacher_model = None
    if mode == "ema":
        teacher_model = sharded(tiny_bagel_path, env, trains=False)
        student.vit_model.requires_grad_(False)
    teacher = Teacher(mode, teacher_model, student, 0.9)
    assert not teacher.shares_features(torch.device("cpu")), "only where it was measured"
    assert teacher.shares_features(torch.device("cuda"))
    with monkeypatch.context() as patch:
        patch.setenv("VISUAL_OPSD_EAGER", "features")
        assert not teacher.shares_features(torch.device("cuda"))
    found, seen = [], []
    for part in (student, teacher_model):
        if part is not None:
            part.vit_model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[2]))
    for shares in (False, True):
        seen.clear()
        monkeypatch.setattr(Teacher, "shares_features", lambda *_, shares=shares: shares)
        student.zero_grad(set_to_none=True)
        loss = LossSettings(ce_weight=0.3).build()
        head = teacher.head(torch.float32)
        result = run_pack(rows, step_context(student, teacher, head, loss=loss, scale=0.01))
        images = [len(lens) for lens in seen]
        assert images == ([2, 6] if shares else [8, 2])
        grads = {n: local(p.grad).clone() for n, p in student.named_parameters() if p.requires_grad}
        found.append((result.loss, grads))
    torch.testing.assert_close(found[1][0], found[0][0], atol=1e-4, rtol=1e-5)
    assert found[1][1].keys() == found[0][1].keys()
    assert any("vit_model" in name for name in found[0][1]) == (mode == "self")
    for name, grad in found[1][1].items():
        torch.testing.assert_close(grad, found[0][1][name], atol=2e-5, rtol=1e-3, msg=name)


def test_ema_follows_the_stated_formula(tiny_bagel_path: Path, env: DistEnv) -> None:
    """e <- d e + (1 - d) p, for trained tensors, in fp32 and to the last bits."""
    student = sharded(tiny_bagel_path, env, trains=True)
    average = sharded(tiny_bagel_path, env, trains=False)
    before = {n: local(p).clone() for n, p in average.named_parameters()}
    with torch.no_grad():
        for parameter in student.parameters():
            local(parameter).add_(0.01)
    Teacher("ema", average, student, 0.9).update()
    live = dict(student.named_parameters())
    for name, parameter in average.named_parameters():
        expected = before[name]
        if live[name].requires_grad:
            expected = 0.9 * expected + 0.1 * local(live[name]).detach()
        torch.testing.assert_close(local(parameter), expected, atol=1e-7, rtol=1e-6)


def text_context(*ids: int) -> Context:
    return (TextSegment(ids),)


def test_different_labels_raise_and_name_the_row(tiny_bagel_path: Path) -> None:
    """Equal counts with one id changed, and unequal counts: both are caught."""
    tokenizer, special = load_tokenizer(tiny_bagel_path)
    good, other = given_completion([5, 6, 7]), given_completion([5, 9, 7])
    longer = given_completion([5, 6, 7, 8])
    student = pack([(good.segment(),), (good.segment(),)], special)
    check_same_labels(student, student, ["a", "b"], tokenizer.decode)
    for wrong in (other, longer):
        teacher = pack([(good.segment(),), (wrong.segment(),)], special)
        with pytest.raises(ValueError, match="b: student and teacher score different tokens"):
            check_same_labels(student, teacher, ["a", "b"], tokenizer.decode)
        # A pack looks before it computes anything.
        row = ScoredRow("b", (good.segment(),), (wrong.segment(),))
        nobody: Any = None
        with pytest.raises(ValueError, match="b: student and teacher score different tokens"):
            run_pack([row], step_context(nobody, cast(Any, "a teacher")))


def test_completion_is_cut_for_both_contexts() -> None:
    row = TrainRow("r", 0, "", "", text_context(1, 2), text_context(1, 2, 3, 4, 5, 6))
    completion = Completion(
        (7, 8, 9, 10), (True, True, False, True, True), (-1.0, -2.0, -3.0, -4.0)
    )
    whole = score_completion(*contexts(row), completion, 14)
    assert not whole.truncated
    assert whole.scored == 4
    cut = score_completion(*contexts(row), completion, 13)
    assert cut.truncated
    assert cut.length == 13
    assert cut.completion is not None
    assert cut.completion.ids == (7, 8, 9)
    assert cut.completion.scored == (True, True, False, False)  # the forced end is no label
    assert cut.completion.logprobs == (-1.0, -2.0)
    with pytest.raises(AssertionError, match="r: its context takes 8 of 10 tokens"):
        score_completion(*contexts(row), completion, 10)


def test_sft_targets_are_cut_too() -> None:
    target = given_completion([7, 8, 9, 10]).segment()
    row = TrainRow("r", 0, "", "", text_context(1, 2), targets=(target,))
    assert score_targets(row, 10).scored == 5
    cut = score_targets(row, 8)
    assert (cut.truncated, cut.scored, cut.length) == (True, 2, 8)
    with pytest.raises(AssertionError, match="r: 10 of 6 tokens"):
        score_targets(row, 6)


def test_sampler_gap_is_over_the_labels_that_were_compared() -> None:
    """Rows without recorded log-probabilities count in neither sum nor number."""

    def row(*logprobs: float) -> ScoredRow:
        completion = Completion((7,), (True, True), logprobs)
        return ScoredRow("r", text_context(1), None, completion)

    ours = torch.tensor([-1.0, -2.0, -3.0, -4.0])  # some above the recorded ones, some below
    both = PackResult(torch.zeros(()), {}, ours, (row(-1.5, -1.5), row(-3.0, -5.0)))
    one = PackResult(torch.zeros(()), {}, ours, (row(), row(-3.25, -4.0)))
    none = PackResult(torch.zeros(()), {}, ours, (row(), row()))
    assert sampler_gap([both]) == (2.0, 4)
    assert sampler_gap([one]) == (0.25, 2)
    assert sampler_gap([both, none, one]) == (2.25, 6)
    assert sampler_gap([none]) == (0.0, 0)
    sums = {"loss": 0.0, "rows": 9.0, "gap": 2.25, "gap_rows": 6.0}
    assert summarise(sums)["sampler_gap"] == 0.375
    assert "sampler_gap" not in summarise({**sums, "gap_rows": 0.0})


def test_packs_cover_every_row_once() -> None:
    lengths = [5, 5, 5, 9, 2, 2, 2]
    for accumulation in (1, 2, 3, 9):
        packs = plan_packs(lengths, accumulation, 10)
        assert [i for part in packs for i in part] == list(range(7))
        assert all(sum(lengths[i] for i in part) <= 10 for part in packs)
    assert plan_packs([50], 1, 10) == [[0]]  # a long row stands alone
    # As many runs as are asked for at least, though one pack would hold all.
    assert plan_packs([1] * 6, 3, 99) == [[0, 1], [2, 3], [4, 5]]
    assert plan_packs([1] * 2, 3, 99) == [[0], [1]]
    assert plan_packs([], 2, 10) == []


def test_a_pack_of_nothing_runs_what_others_run() -> None:
    """Also where features are shared: the ViT runs for the images both see, then for others."""
    row = empty_row(588, with_teacher=True)
    assert row.teacher is not None and row.scored == 0
    assert [type(s) for s in row.student] == [ImageSegment, TextSegment]
    assert [type(s) for s in row.teacher] == [ImageSegment, ImageSegment, TextSegment]
    assert shared_images([row, row]).images == (0, 2)
    without = empty_row(588, with_teacher=True, with_shown=False)  # --vt none
    assert without.teacher is not None
    assert [type(s) for s in without.teacher] == [ImageSegment, TextSegment]
    drawing = empty_row(588, with_teacher=False, latent_dim=64)
    assert [type(s) for s in drawing.student] == [LatentSegment, ImageSegment, TextSegment]
    assert drawing.teacher is None and drawing.noised == 0


def test_a_rank_without_rows_gives_zero_gradient(tiny_bagel_path: Path, env: DistEnv) -> None:
    """The filler touches every trained parameter with gradient 0, so no collective is missed."""
    student = sharded(tiny_bagel_path, env, trains=True)
    teacher = Teacher("self", None, student, 0.0)
    rows = [empty_row(588, with_teacher=True)]
    result = run_pack(rows, step_context(student, teacher))
    assert float(result.loss) == 0.0
    assert float(result.stats["rows"]) == 0
    missing = [n for n, p in student.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing
    assert all(
        float(local(p.grad).abs().max()) == 0 for p in student.parameters() if p.requires_grad
    )


def test_pack_of_two_is_the_sum_of_both(tiny_bagel_path: Path, env: DistEnv) -> None:
    """Rows do not see each other: losses add up, in any grouping."""
    student = sharded(tiny_bagel_path, env, trains=True)
    teacher = Teacher("self", None, student, 0.0)
    row = recorded_row()
    assert row.completion is not None
    short = TrainRow(
        "short", 1, "", "", row.student[:-1], row.teacher[:-1] if row.teacher else None
    )
    other = score_completion(*contexts(short), given_completion(row.completion.ids[:9]), 4096)

    def loss_of(rows: list[ScoredRow]) -> float:
        return float(run_pack(rows, step_context(student, teacher)).loss)

    assert loss_of([row, other]) == pytest.approx(loss_of([row]) + loss_of([other]), rel=1e-5)


def test_learning_rate_schedule() -> None:
    optim = OptimSettings(total_steps=1000, warmup_steps=200)
    factor = [learning_rate_factor(step, optim) for step in range(1000)]
    assert factor[0] == pytest.approx(1 / 200)
    assert factor[199] == 1.0 == factor[200]
    assert factor[-1] == pytest.approx(1e-7 / 1e-5)
    assert all(a >= b for a, b in pairwise(factor[200:]))
    middle = factor[200 + 399]
    assert middle == pytest.approx((1 + 0.01) / 2, abs=2e-3)
    flat = replace(optim, lr_scheduler="constant")
    assert learning_rate_factor(999, flat) == 1.0
    with pytest.raises(ValueError, match="warmup_steps"):
        OptimSettings(total_steps=100, warmup_steps=100)


def test_lengths_of_contexts() -> None:
    row = recorded_row()
    assert context_length(row.student) == 190
    assert row.length == 337


def test_checkpointing_of_some_layers(tiny_bagel_path: Path, env: DistEnv) -> None:
    """The first layers recompute, the rest keep; gradients are the same."""
    _, special = load_tokenizer(tiny_bagel_path)
    student = sharded(tiny_bagel_path, env, trains=True)
    packed = pack([recorded_row().student], special)
    grads = []
    for layers in (None, 1):
        student.set_gradient_checkpointing(True, layers)
        flags = [bool(layer.checkpointing) for layer in student.language_model.model.layers]
        assert flags == ([True] * 3 if layers is None else [True, False, False])
        assert student.connector.checkpointing
        student.zero_grad(set_to_none=True)
        loss = student(packed, head=lambda hidden, weight: (hidden @ weight.t()).square().mean())
        loss.backward()
        grads.append([local(p.grad) for p in student.parameters() if p.requires_grad])
    for one, other in zip(*grads, strict=True):
        assert torch.equal(one, other)
