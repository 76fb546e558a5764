# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""What rows are completed with: several completions each, and given texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data.randomness import off_policy_uniform
from scripts.visual_opsd.config import LossSettings, RolloutSettings, SampleSettings, TrainConfig
from scripts.visual_opsd.training import visual_opsd
from scripts.visual_opsd.training.memory_sizes import largest_load, load_of, longest_row
from tests.data.synthetic import write_dataset
from tests.visual_opsd.training.test_memory_plan import footprint
from tests.visual_opsd.training.trainers import build, metrics, one_process, samples, train

MANY = 99  # more than any step has
RUN: dict[str, Any] = {
    "global_batch_size": 4, "total_steps": 3, "samples_per_step": MANY, "global_seed": 2,
    "sample_temperature": 3, "jsd_temperature": 3,
}  # fmt: skip
BOTH: dict[str, Any] = {
    **RUN, "completions_per_row": 2, "off_policy_share": 0.4, "token_weight": "entropy",
}  # fmt: skip


@pytest.fixture(scope="module")
def both(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of a run with several completions, given texts and weights."""
    results = tmp_path_factory.mktemp("both")
    train(world, results, **BOTH, save_every=2)
    return results


def of_step(results: Path, step: int = 1) -> dict[tuple[int, int], dict[str, Any]]:
    return {(s["slot"], s["number"]): s for s in samples(results) if s["step"] == step}


def is_given(step: int, slot: int) -> bool:
    """Steps count from 1."""
    return off_policy_uniform(RUN["global_seed"], step - 1, slot) < 0.4


def test_which_completions_a_row_has(world: Path, both: Path, tmp_path: Path) -> None:
    """Of each row its text alone, or the completion it would have alone and another one."""
    train(world, tmp_path, **{**RUN, "total_steps": 1})
    alone, found = of_step(tmp_path), of_step(both)
    assert all(not sample["given"] and sample["number"] == 0 for sample in alone.values())
    given = {slot for slot in range(4) if is_given(1, slot)}
    assert 0 < len(given) < 4
    assert list(found) == [(s, n) for s in range(4) for n in range(1 if s in given else 2)]
    for slot in range(4):
        first = found[slot, 0]
        if slot in given:
            assert first["given"] and first["logprobs"] == [] and first["capped"]
            assert first["completion"].startswith("<think>") and len(first["ids"]) == 7
            continue
        assert first["ids"] == alone[slot, 0]["ids"] != found[slot, 1]["ids"]
        assert not first["given"] and not found[slot, 1]["given"]


def test_figures(both: Path) -> None:
    """Given texts count among the rows, not among the completions of the policy."""
    for line in metrics(both):
        found = of_step(both, line["step"]).values()
        own = [sample for sample in found if not sample["given"]]
        assert line["off_policy_rate"] == pytest.approx(1 - len(own) / len(found))
        assert line["completion_length"] == pytest.approx(sum(s["tokens"] for s in own) / len(own))
        assert line["cap_rate"] == pytest.approx(sum(s["capped"] for s in own) / len(own))
        assert line["cap_rate"] + line["eos_rate"] == pytest.approx(1)
        assert line["truncated_rate"] == line["off_policy_rate"]  # the texts are cut, all of them
        assert line["weightless_rate"] == 0 and line["sampler_gap"] < 1e-5
        assert line["loss"] != line["divergence"]


def test_resumed_and_replayed_runs_are_the_same(world: Path, both: Path, tmp_path: Path) -> None:
    """To the last bit when resumed; replayed completions have the numbers they were drawn with."""
    lines, drawn = metrics(both), samples(both)
    train(world, both, **BOTH, save_every=2, resume="2")
    for one, other in zip(lines, metrics(both), strict=True):
        assert (one["loss"], one["grad_norm"]) == (other["loss"], other["grad_norm"])
    assert samples(both) == drawn
    replayed = tmp_path / "replayed"
    train(world, replayed, **BOTH, replay_samples=both / "samples.jsonl")
    for one, other in zip(lines, metrics(replayed), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
    assert samples(replayed) == drawn
    with pytest.raises(
        ValueError, match=r"step 1, slot \d, number 2: record with .*completions_per"
    ):
        train(
            world, tmp_path / "more", **{**BOTH, "completions_per_row": 3},
            replay_samples=both / "samples.jsonl",
        )  # fmt: skip
    with pytest.raises(ValueError, match=r"off_policy_share: saved 0\.4, now 0\.3"):
        train(world, both, **{**BOTH, "off_policy_share": 0.3}, resume="2")


def test_all_rows_given(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No weights are gathered; texts of any length that fits the budget are whole."""
    monkeypatch.delattr(visual_opsd, "sample_completions")
    monkeypatch.delattr(visual_opsd, "summon_full_params")
    flags = {**RUN, "total_steps": 1, "off_policy_share": 1.0, "sample_max_new_tokens": 512}
    train(world, tmp_path, **flags)
    (line,) = metrics(tmp_path)
    assert line["off_policy_rate"] == 1 and line["truncated_rate"] == 0
    # The policy wrote nothing: a mean length of 0, or "none was capped", would be said of nothing.
    rates = {"cap_rate", "eos_rate", "empty_rate", "image_skip_rate"}
    assert line.keys().isdisjoint({*rates, "completion_length", "sampler_gap"})
    for sample in samples(tmp_path):
        assert sample["completion"].endswith("</answer>") and not sample["capped"]
        assert sample["scored"] == "1" * (len(sample["ids"]) + 1)


def test_a_row_without_a_text_is_bad(tmp_path: Path) -> None:
    """Where a share of the rows takes it, whether this one does or not."""
    without = {1, 2, 5}
    write_dataset(
        tmp_path, rows=8, change=lambda i: {"full_text_only_thought": ""} if i in without else {}
    )
    (tmp_path / "datasets.yaml").write_text("datasets:\n  - {name: Jigsaw_Assembly}\n")
    flags = {**RUN, "total_steps": 2, "max_bad_rate": 1.0}
    rejected = []
    for share in (0, 0.01):
        results = tmp_path / str(share)
        train(tmp_path, results, **flags, off_policy_share=share)
        rejected.append(metrics(results)[-1]["skipped_rows"])
    assert rejected[0] == 0 < rejected[1]
    assert '"no_text_trace"' in (results / "bad_rows.jsonl").read_text()


def test_settings_that_contradict() -> None:
    sample, rollout = SampleSettings(sample_do_sample=False), RolloutSettings(completions_per_row=2)
    with pytest.raises(ValueError, match="--completions_per_row 2: greedy completions"):
        TrainConfig(sample=sample, rollout=rollout)
    assert not LossSettings().build().weighs_tokens


def test_memory_of_several_completions() -> None:
    """They are decoded and packed like so many rows; the loader reads no more."""
    one = footprint(global_batch_size=2)
    four = footprint(global_batch_size=2, completions_per_row=4)
    eight = footprint(global_batch_size=8)
    row = longest_row(one)
    assert load_of(four, row) == load_of(eight, row) != load_of(one, row)
    assert largest_load(four) == largest_load(eight) != largest_load(one)
    assert four.rows == one.rows


def test_a_trainer_asks_for_the_column(world: Path, tmp_path: Path) -> None:
    with one_process() as env:
        needs = [
            build(world, tmp_path / str(share), env, off_policy_share=share).objective.needs
            for share in (0, 0.5)
        ]
    assert [need.text_trace for need in needs] == ["optional", "required"]
