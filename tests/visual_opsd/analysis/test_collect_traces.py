# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""What a teacher cache holds, and that kills, ranks and full disks leave a whole one or none."""

from __future__ import annotations

import json
import os
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from data.dataset_info import load_dataset_config
from data.packing import pack
from data.parquet import open_sources
from data.sequence import Completion
from data.teacher_cache import INDEX, SHARDS, SUMMARY, Entries, TeacherCache, row_key
from data.thinkmorph import OPSD_ROWS, parse_row
from modeling import load_bagel
from scripts.visual_opsd import collect_traces
from scripts.visual_opsd.analysis import collection
from scripts.visual_opsd.analysis.trace_rows import CollectSettings
from scripts.visual_opsd.cli import parse_config
from scripts.visual_opsd.config import PromptSettings, TrainConfig
from scripts.visual_opsd.on_policy_sampler import SamplerSettings, sample_completions
from scripts.visual_opsd.rows import open_builder
from tests.visual_opsd.analysis.test_ranks_and_kills import kill_after
from tests.visual_opsd.analysis.two_rank_tools import two_ranks
from tests.visual_opsd.teacher_caches import PROMPT, collect, collect_flags
from tests.visual_opsd.training_runs import TINY_BAGEL

BASE: dict[str, Any] = {"completions": "base", "top_k": 20, "sample_batch_size": 1}
Held = dict[str, list[tuple[Completion, Entries]]]


@pytest.fixture(scope="module")
def base(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two samples of each row, four rows a window."""
    out = tmp_path_factory.mktemp("cache") / "base"
    return collect(world, out, **BASE, completions_per_row=2)


def held(folder: Path) -> Held:
    cache = TeacherCache.open(folder)
    return {key: [cache.read(place) for place in places] for key, places in cache.rows.items()}


def assert_same(one: Held, other: Held) -> None:
    """The same completions; entries within rounding, as rows are packed otherwise."""
    assert one.keys() == other.keys()
    for key, found in one.items():
        for (ours, entries), (theirs, expected) in zip(found, other[key], strict=True):
            assert ours == theirs
            torch.testing.assert_close(entries.weight, expected.weight, atol=1e-4, rtol=1e-3)
            torch.testing.assert_close(entries.log_probs, expected.log_probs, atol=0.01, rtol=1e-3)


def samples(world: Path) -> dict[str, Any]:
    """Digest -> (index, sample)."""
    (source,) = open_sources(load_dataset_config(world / "datasets.yaml"), OPSD_ROWS, world)
    rows = [source.dataset.read_row(index, index) for index in range(len(source.dataset))]
    return {row_key(row): (n, parse_row(row, OPSD_ROWS)) for n, row in enumerate(rows)}


@pytest.mark.parametrize("kind", ["trace", "base"])
def test_it_holds_what_the_teacher_says(
    world: Path, base: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every row's completions and, of three rows, entries, tail and weight by dense arithmetic."""
    folder = base if kind == "base" else collect(world, tmp_path / "trace", top_k=20, limit=5)
    if kind == "trace":
        said = capsys.readouterr().out
        assert "(about, 5 rows of " in said and " tokens, 133 bytes each); 0 bytes are" in said
    prompt = parse_config(TrainConfig, [f"--{k}={v}" for k, v in PROMPT.items()], "").prompt
    assert isinstance(prompt, PromptSettings)
    builder, _ = open_builder(TINY_BAGEL, prompt)
    bundle = load_bagel(TINY_BAGEL)
    found, known = held(folder), samples(world)
    assert found.keys() == set(known) if kind == "base" else len(found) == 5
    for number, (key, completions) in enumerate(found.items()):
        index, sample = known[key]
        student = builder.student(sample)
        if kind == "trace":
            (given,) = completions
            assert given[0].segment() == builder.sft_targets(sample)[0]
        if number > 2:
            continue
        if kind == "base":
            for n, (completion, _) in enumerate(completions):
                (expected,) = sample_completions(
                    bundle.model, [student], [index], tokenizer=bundle.tokenizer,
                    special=bundle.special_tokens, seed=42, step=n,
                    settings=SamplerSettings(max_new_tokens=12),
                )  # fmt: skip
                assert (completion.ids, completion.scored) == (expected.ids, expected.scored)
        teacher = builder.teacher(sample, student)
        for completion, entries in completions:
            log_t, log_s = (
                bundle.model(
                    pack([(*context, completion.segment())], bundle.special_tokens),
                    head=lambda hidden, weight: F.log_softmax(hidden @ weight.t(), -1),
                ).detach()
                for context in (teacher, student)
            )
            values, _ = log_t.topk(20)
            assert entries.log_probs.dtype == torch.float16
            assert entries.entries.dtype == torch.int32
            torch.testing.assert_close(entries.log_probs.float(), values, atol=1e-3, rtol=1e-3)
            there = log_t.gather(-1, entries.entries.long())
            torch.testing.assert_close(there, values, atol=1e-4, rtol=1e-4)
            mass = log_t.exp().sum(-1) - values.exp().sum(-1)
            torch.testing.assert_close(entries.tail.exp(), mass, atol=1e-5, rtol=1e-4)
            kl = (log_t.exp() * (log_t - log_s)).sum(-1)
            torch.testing.assert_close(entries.weight, kl, atol=1e-4, rtol=1e-3)
            assert float(kl.max()) > 0.01


def test_the_summary_counts(base: Path) -> None:
    summary = json.loads((base / SUMMARY).read_text())
    found = [pair for pairs in held(base).values() for pair in pairs]
    assert (summary["rows"], summary["completions"]) == (16, 32)
    assert summary["tokens"] == sum(len(entries) for _, entries in found)
    assert summary["capped"] == sum(completion.capped for completion, _ in found)
    mean = float(torch.cat([entries.weight for _, entries in found]).mean())
    assert summary["mean_vt_weight"] == pytest.approx(mean, rel=1e-5)
    sizes = {path.name: path.stat().st_size for path in base.glob(SHARDS)}
    assert summary["shards"] == sizes and len(sizes) == 4
    assert not [*base.glob("*.tmp"), *base.glob("*.rank_*")]
    first, second = next(iter(held(base).values()))
    assert first[0] != second[0]


def test_a_killed_run_goes_on(
    world: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a kill left is kept or removed; a shard that is gone is made again, and no other."""
    out = tmp_path / "cache"
    command = collect_flags(world, out, **BASE, completions_per_row=2)
    with monkeypatch.context() as patch:
        kill_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            collect_traces.main(command)
    with pytest.raises(ValueError, match="goes on where it was stopped"):
        TeacherCache.open(out)
    for name in ("entries-0000.safetensors", "entries-0000.safetensors.tmp"):
        (out / name).write_bytes(b"of a killed run")
    done: list[int] = []
    work = collection.Collector._records

    def counted(self: Any, rows: Any) -> Any:
        done.extend(index for index, _ in rows)
        return work(self, rows)

    monkeypatch.setattr(collection.Collector, "_records", counted)
    assert collect_traces.main(command) == 0
    assert len(done) == 8 and not [*out.glob("entries-0000*"), *out.glob("*.rank_*")]
    assert json.loads((out / SUMMARY).read_text())["resumed_rows"] == 8
    assert_same(held(out), held(base))
    gone, cut, *_ = sorted(out.glob(SHARDS))
    gone.unlink()
    os.truncate(cut, cut.stat().st_size - 1)  # training says of it: collect again
    assert collect_traces.main(command) == 0
    assert len(done) == 16
    assert_same(held(out), held(base))
    with pytest.raises(ValueError, match=r"other settings \(top_k: saved 20, now 8\)"):
        collect_traces.main([*command, "--top_k=8"])
    assert collect_traces.main([*command, "--top_k=8", "--overwrite"]) == 0
    assert {entries.entries.shape[1] for pairs in held(out).values() for _, entries in pairs} == {8}
    assert len(list(out.glob(SHARDS))) == 4


def test_two_ranks_make_the_same_cache(world: Path, base: Path, tmp_path: Path) -> None:
    flags = collect_flags(world, tmp_path / "cache", **BASE, completions_per_row=2)
    codes, outputs = two_ranks({"collect_traces": flags}, tmp_path / "done")
    assert codes == [0, 0], outputs
    assert "32 completions of 16 rows" in outputs[0] and "completions of" not in outputs[1]
    ours, theirs = (json.loads((tmp_path / f"done-{rank}").read_text()) for rank in range(2))
    shares = [part["collect_traces rows"] for part in (ours, theirs)]
    assert sorted(shares[0] + shares[1]) == list(range(16)) and {*map(len, shares)} == {8}
    assert_same(held(tmp_path / "cache"), held(base))


def test_too_little_room_is_said_before_anything_is_read(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 0, 24_000))
    monkeypatch.setattr(collection, "run_rows", None)
    with pytest.raises(ValueError, match=r"needs 25.5 kB but .* has 24.0 kB free"):
        collect(world, tmp_path / "cache", **BASE)
    assert "16 rows of up to 12 tokens, 133 bytes each" in capsys.readouterr().out


def test_the_teacher_may_read_latents(world: Path, tmp_path: Path) -> None:
    small = {"vae_max_size": 32, "vae_min_size": 16, "limit": 3, "top_k": 20}
    seen = held(collect(world, tmp_path / "vit", **small))
    both = held(collect(world, tmp_path / "vae+vit", **small, teacher_vt="vae+vit"))
    assert seen.keys() == both.keys()
    for key, pairs in seen.items():
        assert not torch.equal(pairs[0][1].tail, both[key][0][1].tail)


def test_mistakes(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a row has one trace"):
        CollectSettings(completions_per_row=2)
    bare = shutil.copytree(world, tmp_path / "world")
    (bare / "datasets.yaml").write_text("datasets:\n  - {name: Elsewhere}\n")
    with pytest.raises(ValueError, match="Elsewhere"):
        collect(bare, tmp_path / "cache")
    assert not (tmp_path / "cache" / INDEX).exists()
