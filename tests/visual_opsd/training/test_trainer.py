# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The trainer as a whole on the tiny checkpoint: what each flag does to a step.

Whole steps against plain arithmetic are in test_step_oracle.py, mistakes of the user in
test_trainer_errors.py, kills and resumes in test_resume.py, the pieces of a step in test_step.py.
"""

from __future__ import annotations

import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data.packing import context_length
from data.sequence import ImageSegment
from modeling import load_bagel
from scripts.visual_opsd.cli import flat, parse_config
from scripts.visual_opsd.config import TrainConfig
from scripts.visual_opsd.training.figures import FIELDS
from scripts.visual_opsd.training.text_sft import TextSFT
from tests.data.synthetic import write_dataset
from tests.visual_opsd.training.trainers import (
    base_weights,
    build,
    first_rows,
    metrics,
    moved,
    one_process,
    rollout,
    samples,
    train,
    weights,
)
from tests.visual_opsd.training_runs import TINY_BAGEL


@pytest.fixture(scope="module")
def recorded(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of a run of two steps, whose completions other runs replay."""
    results = tmp_path_factory.mktemp("recorded")
    train(world, results, total_steps=2)
    return results


# ----------------------------------------------------------------------------------- teachers


def vt_patches(row: Any) -> list[Tensor]:
    """Patches of the teacher's images without the problem image."""
    images = [s for s in row.teacher if isinstance(s, ImageSegment)]
    return [image.patches for image in images[1:]]


def test_noise_replaces_the_visual_thoughts_only(world: Path, tmp_path: Path) -> None:
    with one_process() as env:
        real = build(world, tmp_path / "real", env)
        noise = build(world, tmp_path / "noise", env, noise_vt=True, teacher_mode="self")
        again = build(world, tmp_path / "again", env, noise_vt=True, teacher_mode="self")
    values = []
    for ours, theirs, repeated in zip(
        first_rows(real), first_rows(noise), first_rows(again), strict=True
    ):
        assert ours.name == theirs.name
        assert theirs.teacher is not None and ours.teacher is not None
        for left, right in zip(ours.student, theirs.student, strict=True):
            if isinstance(left, ImageSegment) and isinstance(right, ImageSegment):
                assert torch.equal(left.patches, right.patches)
            else:
                assert left == right
        # The shared part of the teacher's context is the student's own, problem image included.
        assert theirs.teacher[: len(theirs.student)] == theirs.student
        drawn, noisy, same = vt_patches(ours), vt_patches(theirs), vt_patches(repeated)
        assert [t.shape for t in drawn] == [t.shape for t in noisy]
        assert all(torch.equal(a, b) for a, b in zip(noisy, same, strict=True))
        assert all(float((a - b).abs().max()) > 1 for a, b in zip(drawn, noisy, strict=True))
        values += noisy
    assert not torch.equal(values[0], values[1])  # each row has its own
    pooled = torch.cat([v.flatten() for v in values])
    assert abs(float(pooled.mean())) < 0.05 and abs(float(pooled.std()) - 1) < 0.05
    # The same row at another place of the run gets other noise.
    dataset, index = next(noise.order.candidates(0, 0))
    later: Any = noise.prepare(dataset.read_row(index, noise.order.position(5, 0)))
    assert vt_patches(later)[0].shape == values[0].shape
    assert not torch.equal(vt_patches(later)[0], values[0])


def test_noise_changes_the_loss_and_nothing_of_the_rollout(
    world: Path, recorded: Path, tmp_path: Path
) -> None:
    """In worker processes too."""
    for workers in (0, 1):
        results = tmp_path / str(workers)
        train(world, results, noise_vt=True, num_workers=workers)
        assert rollout(results) == rollout(recorded)[:2]
    assert metrics(tmp_path / "0")[0]["loss"] == metrics(tmp_path / "1")[0]["loss"]
    assert metrics(tmp_path / "0")[0]["loss"] != metrics(recorded)[0]["loss"]


# --------------------------------------------------------------------- freezing, release folder

PARTS = {
    "freeze_llm": "language_model.",
    "freeze_vit": "vit_model.",
    "freeze_und": "connector.",
}
TABLE = "vit_pos_embed.pos_embed"


@pytest.mark.parametrize("flag", PARTS)
def test_freeze_flags_and_the_release_folder(world: Path, tmp_path: Path, flag: str) -> None:
    """Nothing frozen moves, in memory or on disk; all the rest does, and loads as a release."""
    base = base_weights()
    frozen_part: dict[str, Any] = {flag: True}
    trainer = train(world, tmp_path, **frozen_part, ema_decay=0.5, save_release=True)
    frozen = {name for name in base if name.startswith(PARTS[flag]) or name == TABLE}
    student = weights(trainer.student)
    changed = moved(base, student)
    assert not changed & frozen
    # Keys' biases shift all scores of a query alike: their gradient is rounding.
    still = {name for name in base.keys() - frozen - changed if "k_proj.bias" not in name}
    assert not still
    assert not moved(base, weights(trainer.ema)) & frozen
    assert {n for n, p in trainer.student.named_parameters() if not p.requires_grad} == frozen
    folder = trainer.config.run.checkpoints / "0000001"
    released = load_bagel(folder)
    assert not moved(student, dict(released.model.state_dict()))
    assert len(released.tokenizer) == len(trainer.base.tokenizer)
    # With the drawing branch, which was never loaded here.
    whole, before = (load_bagel(p, visual_gen=True).model for p in (folder, TINY_BAGEL))
    assert moved(dict(before.state_dict()), dict(whole.state_dict())) == changed
    for name in ("ae.safetensors", "config.json", "llm_config.json", "tokenizer.json"):
        assert (folder / name).read_bytes() == (TINY_BAGEL / name).read_bytes()
    assert f"{flag}: true" in (folder / "README.md").read_text()


# ---------------------------------------------------------------------------------------- SFT


def test_sft_single_completion(world: Path, tmp_path: Path) -> None:
    """<think>trace</think><answer>answer</answer> and its end, under the student's context."""
    trainer = train(world, tmp_path, TextSFT)
    with one_process() as env:
        opsd = build(world, tmp_path / "opsd", env)
    labels = 0
    for row, same in zip(first_rows(trainer), first_rows(opsd), strict=True):
        assert row.teacher is None
        assert (row.name, row.question, row.answer) == (same.name, same.question, same.answer)
        assert [type(s) for s in row.student] == [type(s) for s in same.student]
        (target,) = row.targets
        assert target.scored == (True,) * (len(target.ids) + 1)
        text = trainer.base.tokenizer.decode(list(target.ids))
        assert text.startswith("<think>start ")
        assert text.endswith(f"</think><answer>{row.answer}</answer>")
        labels += len(target.ids) + 1
    (line,) = metrics(tmp_path)
    assert line["scored_tokens"] == labels
    assert line["loss"] == line["ce"] > 0
    assert line["truncated_rate"] == 0.0
    assert trainer.teacher is None and trainer.ema is None
    assert not (tmp_path / "samples.jsonl").exists()
    assert "completion_length" not in line and "seconds/sample" not in line


def test_sft_texts_are_cut_to_fit_and_counted(world: Path, tmp_path: Path) -> None:
    """The longer text loses its tail and its end; neither is a label any more."""
    with one_process() as env:
        whole = build(world, tmp_path / "whole", env, TextSFT, global_batch_size=8)
    lengths = [context_length((*row.student, *row.targets)) for row in first_rows(whole)]
    limit = max(lengths) - 1
    cut = sum(length > limit for length in lengths)
    assert 0 < cut < 8
    train(world, tmp_path / "cut", TextSFT, global_batch_size=8, max_forward_tokens=limit)
    (line,) = metrics(tmp_path / "cut")
    assert line["truncated_rate"] == cut / 8
    labels = sum(len(row.targets[0].ids) + 1 for row in first_rows(whole))
    assert line["scored_tokens"] == labels - 2 * cut


def test_sft_reference_splits(world: Path, tmp_path: Path) -> None:
    """The reference's two blocks, each with its own end: the trace, then the bare answer."""
    trainer = train(world, tmp_path, TextSFT, sft_format="reference")
    labels = 0
    for row in first_rows(trainer):
        thought, answer = row.targets
        assert trainer.base.tokenizer.decode(list(answer.ids)) == row.answer
        assert trainer.base.tokenizer.decode(list(thought.ids)).startswith("start ")
        for target in row.targets:
            assert target.scored == (True,) * (len(target.ids) + 1)
            labels += len(target.ids) + 1
    (line,) = metrics(tmp_path)
    assert line["scored_tokens"] == labels


def test_sft_traces_with_tags_are_not_wrapped_again(tmp_path: Path) -> None:
    write_dataset(
        tmp_path, rows=2, change=lambda i: {"full_text_only_thought": f"<think>so {i}</think>"}
    )
    (tmp_path / "datasets.yaml").write_text("datasets:\n  - {name: Jigsaw_Assembly}\n")
    with one_process() as env:
        trainer = build(tmp_path, tmp_path / "r", env, TextSFT)
    for row in first_rows(trainer):
        number = row.answer.split()[-1]
        text = trainer.base.tokenizer.decode(list(row.targets[0].ids))
        assert text == f"<think>so {number}</think><answer>answer {number}</answer>"


# ------------------------------------------------------------- the same work, split differently

SPLITS: dict[str, dict[str, Any]] = {
    "accumulation 2, loss in chunks of 3": {
        "gradient_accumulation_steps": 2, "loss_chunk_size": 3,
    },
    "accumulation beyond the rows, activations kept": {
        "gradient_accumulation_steps": 7, "activation_checkpointing": False,
    },
    "packs of one row, rollout row by row": {"pack_tokens": 20, "sample_batch_size": 1},
    "offloaded": {"cpu_offload": True, "teacher_cpu_offload": True},
    "two workers": {"num_workers": 2, "prefetch_factor": 1},
}  # fmt: skip


@pytest.fixture(scope="module")
def unsplit(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    results = tmp_path_factory.mktemp("unsplit")
    train(world, results, total_steps=2, global_batch_size=3, gradient_accumulation_steps=1)
    return results


@pytest.mark.parametrize("name", SPLITS)
def test_splitting_changes_no_result(world: Path, unsplit: Path, tmp_path: Path, name: str) -> None:
    train(world, tmp_path, total_steps=2, global_batch_size=3, **SPLITS[name])
    assert_same_steps(tmp_path, unsplit)


def assert_same_steps(ours: Path, theirs: Path) -> None:
    """Figures of both steps; completions, where both runs wrote them, exactly at the first."""
    pairs = list(zip(metrics(ours), metrics(theirs), strict=True))
    assert len(pairs) == 2
    for mine, other in pairs:
        for name in ("loss", "grad_norm", "teacher_topk_mass", "student_entropy"):
            assert mine[name] == pytest.approx(other[name], rel=1e-4), name
        for name in ("scored_tokens", "completion_length", "rows_read"):
            assert mine[name] == other[name], name
    first = {line["slot"]: line for line in rollout(theirs) if line["step"] == 1}
    for mine in rollout(ours):
        if mine["step"] == 1:
            other = first[mine["slot"]]
            assert mine.pop("logprobs") == pytest.approx(other["logprobs"], abs=1e-5)
            assert mine == {name: other[name] for name in mine}


# -------------------------------------------------------------------------------------- replay


def test_replayed_completions_give_the_same_run(
    world: Path, recorded: Path, tmp_path: Path
) -> None:
    train(world, tmp_path, total_steps=2, replay_samples=recorded / "samples.jsonl")
    for mine, other in zip(metrics(tmp_path), metrics(recorded), strict=True):
        assert "seconds/sample" not in mine
        for name in ("loss", "grad_norm", "scored_tokens", "eos_rate", "cap_rate"):
            assert mine[name] == pytest.approx(other[name], rel=1e-6), name
        # The file keeps seven digits of each log-probability.
        assert mine["sampler_gap"] == pytest.approx(other["sampler_gap"], abs=2e-7)
    assert samples(tmp_path) == samples(recorded)  # figures of tokens too


def test_the_sampler_gap_is_a_mean_over_labels(world: Path, recorded: Path, tmp_path: Path) -> None:
    """Log-probabilities moved in one of two rows, which are packs of their own."""
    lines = samples(recorded)
    for line in lines:
        if line["slot"] == 0:
            line["logprobs"] = [p + 0.5 for p in line["logprobs"]]
    file = tmp_path / "moved.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    train(world, tmp_path / "r", total_steps=2, replay_samples=file)
    for line in metrics(tmp_path / "r"):
        first, second = (len(x["logprobs"]) for x in lines if x["step"] == line["step"])
        expected = 0.5 * first / (first + second)
        assert line["sampler_gap"] == pytest.approx(expected, abs=1e-5)


# ------------------------------------------------------------------------------------- reports

NAMES = {
    "step", "loss", "grad_norm", "lr", "divergence", "ce", "forward_kl", "teacher_topk_mass",
    "student_entropy", "teacher_entropy", "completion_length", "cap_rate", "eos_rate",
    "empty_rate", "image_skip_rate", "truncated_rate", "sampler_gap", "scored_tokens",
    "rows_read", "skipped_rows", "nonfinite", "peak_memory_gb",
    "seconds/data", "seconds/sample", "seconds/train", "seconds/optimise",
    "tokens_per_s/sample", "tokens_per_s/train",
}  # fmt: skip


def test_what_a_run_leaves_behind(world: Path, tmp_path: Path) -> None:
    trainer = train(
        world, tmp_path, total_steps=5, log_every=2, samples_per_step=1, save_every=2, keep_last=1,
        save_release=True, warmup_steps=2, lr=2e-3,
    )  # fmt: skip
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines] == [2, 4, 5]  # and the last one
    for line in lines:
        assert line.keys() - set(FIELDS) == NAMES
        assert all(math.isfinite(value) for value in line.values())
        assert 0 < line["sampler_gap"] <= 1e-4
        assert 0 < line["teacher_topk_mass"] <= 1.000001
        assert line["cap_rate"] + line["eos_rate"] == pytest.approx(1)
        assert line["rows_read"] == 2 * line["step"] and line["skipped_rows"] == 0
        assert line["tokens_per_s/sample"] > 0 and line["seconds/train"] > 0
    assert [line["lr"] for line in lines] == pytest.approx([2e-3, 1e-3, 1e-7], rel=0.02)
    texts = samples(tmp_path)
    assert [(line["step"], line["slot"]) for line in texts] == [(n, 0) for n in range(1, 6)]
    for line in texts:
        assert line["completion"] == trainer.base.tokenizer.decode(line["ids"])
        assert line["tokens"] == len(line["ids"]) == len(line["scored"]) - 1
        assert line["scored"].count("1") == len(line["logprobs"])
        assert line["row"].startswith("Spatial_Navigation/")
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "0000002", "0000004", "0000005", "step_0000005",
    ]  # fmt: skip
    assert not (tmp_path / "bad_rows.jsonl").exists()
    # The resolved settings are a configuration again.
    again = parse_config(TrainConfig, ["--config", str(tmp_path / "config.yaml")], "")
    assert again == trainer.config
    assert again.loss.jsd_token_clip == 0.05 and again.run.replay_samples is None


def test_wandb_offline(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: dict[str, Any] = {"steps": []}

    class Run:
        def log(self, numbers: dict[str, float], step: int) -> None:
            calls["steps"].append(step)
            calls["numbers"] = numbers

        def finish(self) -> None:
            calls["finished"] = True

    fake = types.ModuleType("wandb")
    fake.init = lambda **options: calls.update(options) or Run()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    trainer = train(
        world, tmp_path, total_steps=2, wandb_project="p", wandb_name="n", wandb_offline=True
    )
    assert (calls["project"], calls["name"], calls["mode"]) == ("p", "n", "offline")
    assert calls["config"] == flat(trainer.config)
    assert calls["steps"] == [1, 2] and calls["finished"]
    assert calls["numbers"]["loss"] == metrics(tmp_path)[-1]["loss"]
    # A resumed run, moved or not, goes on in the same run there.
    first = calls["id"]
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    train(world, moved, total_steps=2, resume="latest", wandb_project="p", wandb_offline=True)
    assert (calls["id"], calls["resume"]) == (first, "allow")


def test_wandb_is_looked_at_before_anything_is_built(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def login(**options: bool) -> None:
        raise RuntimeError("api_key not configured")

    fake = types.ModuleType("wandb")
    fake.login = login  # type: ignore[attr-defined]
    monkeypatch.setattr(
        "scripts.visual_opsd.training.trainer.Trainer._build_models",
        lambda self: pytest.fail("built"),
    )
    for module, message in ((fake, "api_key not configured"), (None, "pip install wandb")):
        monkeypatch.setitem(sys.modules, "wandb", module)
        with pytest.raises(ValueError, match=message):
            train(world, tmp_path, wandb_project="p")
