# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Offline training: the on-policy loss without a teacher in memory, from a cache that fits."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from data.json_lines import append_records
from data.packing import pack
from data.parquet import SlotItem
from data.teacher_cache import INDEX, SUMMARY, Entries, TeacherCache, row_key
from data.thinkmorph import EVALUATION_ROWS
from modeling import load_bagel
from scripts.visual_opsd.train_visual_opsd_offline import main
from scripts.visual_opsd.training.offline import VisualOPSDOffline
from scripts.visual_opsd.training.samples import write_samples
from scripts.visual_opsd.training.trainer import Trainer
from scripts.visual_opsd.training.visual_opsd import VisualOPSD
from tests.visual_opsd.teacher_caches import PROMPT, collect, sign
from tests.visual_opsd.training.trainers import (
    SMALL,
    base_weights,
    build,
    first_rows,
    metrics,
    moved,
    one_process,
    train,
    weights,
)
from tests.visual_opsd.training_runs import TINY_BAGEL, train_arguments


@pytest.fixture(scope="module")
def whole(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples of the base and all the teacher says about them."""
    out = tmp_path_factory.mktemp("cache") / "whole"
    return collect(world, out, completions="base", top_k=2**20)


@pytest.fixture(scope="module")
def traces(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data set's traces with 16 entries a token."""
    return collect(world, tmp_path_factory.mktemp("cache") / "traces", top_k=16)


def offline(world: Path, results: Path, cache: Path, **changes: Any) -> Trainer:
    """A run of the command's own defaults, but for its size."""
    settings: dict[str, Any] = {
        "jsd_weight": 0.5,
        "jsd_temperature": 2.0,
        "ce_weight": 1.0,
        "jsd_top_k": 16,
    }
    given = {"teacher_cache": cache, **settings, **changes}
    return train(world, results, VisualOPSDOffline, **given)


LOSSES: dict[str, dict[str, Any]] = {
    "JSD": {"jsd_beta": 0.5, "jsd_temperature": 1.0},
    "JSD, top-k, T": {"jsd_top_k": 40, "jsd_temperature": 2.0, "jsd_token_clip": 0.01},
    "KL": {"jsd_beta": 0, "jsd_token_clip": "none", "jsd_temperature": 2.0, "ce_weight": 0.5},
    "tail": {"jsd_top_k": 40, "jsd_tail_bucket": True, "jsd_temperature": 1.0},
}


@pytest.mark.parametrize("name", LOSSES)
def test_it_is_the_on_policy_loss_of_a_fixed_teacher(
    world: Path, whole: Path, tmp_path: Path, name: str
) -> None:
    """Loss, figures and gradients on the same completions, but for the rounding of the cache."""
    loss = {"jsd_weight": 1.5, "jsd_top_k": "none", "ce_weight": 0, **LOSSES[name]}
    loss |= {"eps": 1, "lr": 1}  # so that a step moves a weight by about its gradient
    cached = {"teacher_cache": whole, "kd_use_vt_weights": False,
              "kd_loss": "kl" if name == "KL" else "jsd"}  # fmt: skip
    if name == "KL":  # its meaning does not hang on these
        cached |= {"jsd_beta": 0.5, "jsd_token_clip": 0.05}
    with one_process() as env:
        trainer = build(world, tmp_path / "rows", env, VisualOPSDOffline, **{**loss, **cached})
        rows: list[Any] = first_rows(trainer)
        decode = trainer.base.tokenizer.decode
    recorded = tmp_path / "samples.jsonl"
    items = [SlotItem(slot, slot, row) for slot, row in enumerate(rows)]
    write_samples(recorded, 0, [(item, 0, item.value.completion) for item in items], decode)
    fixed = {"teacher_mode": "fixed", "replay_samples": recorded}
    runs = [
        train(world, tmp_path / "on", VisualOPSD, **{**loss, **fixed}),
        train(world, tmp_path / "off", VisualOPSDOffline, **{**loss, **cached}),
    ]
    assert runs[0].teacher is not None and runs[1].teacher is None
    (ours,), (theirs,) = metrics(tmp_path / "off"), metrics(tmp_path / "on")
    for figure in ("loss", "divergence", "forward_kl", "grad_norm", "ce", "scored_tokens"):
        assert ours[figure] == pytest.approx(theirs[figure], rel=2e-3), figure
    assert ours["grad_norm"] > 1e-3 and ours["divergence"] > 1e-3
    on, off = (weights(run.student) for run in runs)
    for key, before in base_weights().items():
        apart, moved = (off[key] - on[key]).norm(), (on[key] - before).norm()
        if key.startswith("vit_model") and key.endswith("k_proj.bias"):
            # It moves all scores of a query alike: no gradient but rounding.
            assert max(apart, moved) < 1e-7, key
        else:
            assert apart <= 2e-3 * moved, key


def test_the_loss_recomputed(world: Path, traces: Path, tmp_path: Path) -> None:
    """CE + 0.5 * 4 * w * KL on 16 entries, renormalised at T = 2, from the cache's own files."""
    trainer = offline(world, tmp_path, traces, global_batch_size=3)
    cache = TeacherCache.open(traces)
    summary = json.loads((traces / SUMMARY).read_text())
    rows: list[Any] = first_rows(trainer)
    bundle = load_bagel(TINY_BAGEL)
    total, tokens = 0.0, 0
    every = [cache.read(place)[1].weight for places in cache.rows.values() for place in places]
    mean = float(torch.cat(every).double().mean())
    assert summary["mean_vt_weight"] == pytest.approx(mean)
    for row in rows:
        context = (*row.student, row.completion.segment())
        batch = pack([context], bundle.special_tokens)
        with torch.no_grad():
            logits = bundle.model(batch, head=lambda hidden, weight: hidden @ weight.t())
        taught = row.taught
        theirs = (taught.log_probs.float() / 2).log_softmax(-1)
        ours = (logits.gather(-1, taught.entries.long()) / 2).log_softmax(-1)
        kl = (theirs.exp() * (theirs - ours)).sum(-1)
        ce = F.cross_entropy(logits, batch.score_labels, reduction="none")
        total += float((ce + 0.5 * 4 * taught.weight / mean * kl).sum())
        tokens += len(taught)
    (line,) = metrics(tmp_path)
    assert line["scored_tokens"] == tokens
    assert line["loss"] == pytest.approx(total / tokens, rel=1e-5)
    even = offline(world, tmp_path / "even", traces, global_batch_size=3, kd_use_vt_weights=False)
    assert even.step == 1 and metrics(tmp_path / "even")[0]["loss"] != line["loss"]


def test_it_learns_and_goes_on(world: Path, traces: Path, tmp_path: Path) -> None:
    """No teacher in memory; a state is resumed to the last bit, with the cache elsewhere."""
    steps: dict[str, Any] = {"total_steps": 6, "save_every": 3, "lr": 0.01, "max_grad_norm": 100}
    trainer = offline(world, tmp_path, traces, **steps)
    assert trainer.teacher is None and trainer.ema is None
    lines = metrics(tmp_path)
    assert lines[-1]["loss"] < 0.9 * lines[0]["loss"] and lines[0]["truncated_rate"] == 0
    whole = weights(trainer.student)
    elsewhere = shutil.copytree(traces, tmp_path / "elsewhere")
    again = offline(world, tmp_path, elsewhere, **steps, resume="3")
    assert again.step == 6 and moved(whole, weights(again.student)) == set()
    (elsewhere / INDEX).write_text((elsewhere / INDEX).read_text() + "\n")
    sign(elsewhere)
    with pytest.raises(ValueError, match="teacher cache: saved"):
        offline(world, tmp_path, elsewhere, **steps, resume="3")


def test_another_base_tokenizer_prompt_or_data_is_refused(
    world: Path, traces: Path, tmp_path: Path
) -> None:
    """With what differs, before a model is built."""
    other = shutil.copytree(TINY_BAGEL, tmp_path / "other")
    file = other / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    words = shutil.copytree(TINY_BAGEL, tmp_path / "words")
    (words / "tokenizer_config.json").write_text(
        (words / "tokenizer_config.json").read_text().replace("{", "{ ", 1)
    )
    (tmp_path / "heldout.yaml").write_text(
        "datasets:\n  - {name: Spatial_Navigation, split: heldout}\n"
    )
    cases: list[tuple[dict[str, Any], str]] = [
        ({"model_path": other}, r"base: weights: saved '\w+', now"),
        ({"model_path": words}, r"base: tokenizer_config.json: saved"),
        ({"instruction_suffix": " Be brief."}, r"prompts: instruction_suffix: saved ''"),
        ({"use_reference_intro": False}, "prompts: intro: saved"),
        ({"vit_max_size": 84}, "images: max_size: saved 56, now 84"),
        ({"dataset_config_file": tmp_path / "heldout.yaml"},
         r"data: Spatial_Navigation \(heldout\): saved '\(absent\)'"),
        ({"max_forward_tokens": 5000}, "max_forward_tokens: saved 10240, now 5000"),
        ({"jsd_top_k": 17}, r"16 most probable entries of a token, fewer than --jsd_top_k asks"),
        ({"jsd_top_k": "none"}, "fewer than --jsd_top_k"),
        ({"teacher_cache": tmp_path / "none"}, "collect_traces makes it"),
    ]  # fmt: skip
    for changes, text in cases:
        with pytest.raises(ValueError, match=text):
            offline(world, tmp_path / "run", **{"cache": traces, **changes_of(changes)})
    assert not (tmp_path / "run").exists()
    # What the student does not see, and what it holds besides, is no difference.
    offline(world, tmp_path / "run", traces, data_seed=3, jsd_top_k=8)


def changes_of(changes: dict[str, Any]) -> dict[str, Any]:
    """`teacher_cache` is the third argument of `offline`."""
    return {("cache" if k == "teacher_cache" else k): v for k, v in changes.items()}


def test_damage_is_named(world: Path, traces: Path, tmp_path: Path) -> None:
    cache = shutil.copytree(traces, tmp_path / "cache")
    (shard,) = cache.glob("entries-*")
    with shard.open("r+b") as stream:
        stream.truncate(100)
    with pytest.raises(ValueError, match=r"has 100 bytes instead of \d+"):
        TeacherCache.open(cache)
    shard.unlink()
    with pytest.raises(ValueError, match="is no whole teacher cache"):
        TeacherCache.open(cache)
    shutil.copyfile(traces / shard.name, shard)
    with shard.open("r+b") as stream:
        stream.seek(shard.stat().st_size // 2)
        byte = stream.read(1)[0] ^ 64
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte]))
    with pytest.raises(ValueError, match="is damaged: its files are not what collect_traces wrote"):
        offline(world, tmp_path / "run", cache)
    shutil.rmtree(cache)
    shutil.copytree(traces, cache)
    append_records(cache / INDEX, [{"index": 1, "digest": "x", "completions": [{"shard": "../y"}]}])
    with pytest.raises(ValueError, match="is no whole teacher cache"):
        TeacherCache.open(cache)


def test_rows_that_the_cache_lacks_are_counted_and_bounded(
    world: Path, traces: Path, tmp_path: Path
) -> None:
    """They are replaced, never learnt by cross-entropy alone."""
    cache = shutil.copytree(traces, tmp_path / "cache")
    lines = (cache / INDEX).read_text().splitlines(keepends=True)
    (cache / INDEX).write_text("".join(lines[4:]))
    sign(cache)
    gone = {json.loads(line)["digest"] for line in lines[:4]}
    steps: dict[str, Any] = {"total_steps": 8, "warmup_steps": 0}
    trainer = offline(world, tmp_path / "run", cache, **steps, max_bad_rate=0.5)
    bad = [json.loads(line) for line in (tmp_path / "run" / "bad_rows.jsonl").open()]
    assert len(bad) >= 4 and {line["reason"] for line in bad} == {"not_in_cache"}
    assert "holds no completion of it" in bad[0]["detail"]
    dataset = trainer.order.sources[0].dataset
    assert {row_key(dataset.read_row(line["row"])) for line in bad} == gone
    last = metrics(tmp_path / "run")[-1]
    assert last["skipped_rows"] == len(bad) and last["rows_read"] == 16 + len(bad)
    with pytest.raises(ValueError, match=r"not_in_cache\), more than the allowed 1.00%"):
        offline(world, tmp_path / "strict", cache, total_steps=120, global_batch_size=4)


def test_one_of_several_completions_is_drawn_by_place(world: Path, tmp_path: Path) -> None:
    cache = collect(world, tmp_path / "cache", completions="base", completions_per_row=3, top_k=4)
    with one_process() as env:
        made = [
            build(world, tmp_path / str(seed), env, VisualOPSDOffline, teacher_cache=cache,
                  jsd_top_k=4, global_batch_size=16, global_seed=seed)
            for seed in (1, 1, 2)
        ]  # fmt: skip
        rows: list[list[Any]] = [list(first_rows(trainer)) for trainer in made]
        drawn = [[row.completion.ids for row in part] for part in rows]
    assert drawn[0] == drawn[1] != drawn[2]
    held = TeacherCache.open(cache)
    assert {len(places) for places in held.rows.values()} == {3}
    numbers = set()
    for ids in drawn[0]:
        numbers |= {
            n for places in held.rows.values() for n, p in enumerate(places)
            if held.read(p)[0].ids == ids
        }  # fmt: skip
    assert numbers == {0, 1, 2}


def test_a_dry_run_needs_no_taught_rows(
    world: Path, traces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {**SMALL, "teacher_cache": traces, "jsd_top_k": 16, "dry_run": True,
             "max_forward_tokens": 10240, "sample_max_new_tokens": 8}  # fmt: skip
    given |= {"vit_max_pixels": 2007040, **PROMPT}
    assert main(train_arguments(world, tmp_path / "run", **given)) == 0
    assert "planned, GB" in capsys.readouterr().out
    assert Entries.blank(2, 3).weight.tolist() == [0, 0]
    assert VisualOPSDOffline.needs == EVALUATION_ROWS
