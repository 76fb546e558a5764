# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""What measured steps say, recomputed from the lists in samples.jsonl and by hand.

The figures of single tokens: tests/visual_opsd/loss/test_token_figures.py.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from data.answer_tags import answer_mask
from data.json_lines import read_log
from data.parquet import SlotItem
from data.sequence import Completion, TextSegment, given_completion
from scripts.visual_opsd.config import TrainConfig
from scripts.visual_opsd.processes import DistEnv
from scripts.visual_opsd.run_config import RunSettings
from scripts.visual_opsd.scored_rows import ScoredRow
from scripts.visual_opsd.training import figures as module
from scripts.visual_opsd.training.interleaved import InterleavedSFT
from scripts.visual_opsd.training.leaks import LeakProbe
from scripts.visual_opsd.training.offline import VisualOPSDOffline
from scripts.visual_opsd.training.samples import token_lists, write_samples
from scripts.visual_opsd.training.step import PackResult
from scripts.visual_opsd.training.text_sft import TextSFT
from scripts.visual_opsd.training.trainer import Trainer
from tests.visual_opsd.teacher_caches import collect
from tests.visual_opsd.training.trainers import (
    metrics,
    rollout,
    samples,
    train,
)

LISTS = ("divergence", "student_entropy", "teacher_entropy", "fork")
OF_TOKENS = {"fork_rate", "topk_overlap", "student_topk_mass", "divergence_decile/0"}
OF_CLIP = {"clip_entry_rate", "clip_token_rate", "clip_gradient_share"}
OF_TEXTS = {"answered_rate", "leak_rate"}
LENGTHS = {f"completion_length_{name}" for name in ("p10", "p50", "p90", "max")}
OF_MACHINE = {"model_tflop", "host_memory_gb"}
RUN: dict[str, Any] = {
    "total_steps": 2, "global_batch_size": 6, "samples_per_step": 12, "sample_max_new_tokens": 40,
    "gradient_accumulation_steps": 2, "sample_temperature": 1.3, "leak_words": "goal, Right, down",
}  # fmt: skip


@pytest.fixture(scope="module")
def measured(world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trainer]:
    """A run that logs, measures and shows everything, in several packs a step."""
    results = tmp_path_factory.mktemp("measured")
    return results, train(world, results, **RUN)


# ------------------------------------------------------------------------------ a whole run


def test_tokens_are_listed(measured: tuple[Path, Trainer]) -> None:
    """One entry of each list a scored token, as of `logprobs`; their means are the metrics."""
    lines, written = metrics(measured[0]), samples(measured[0])
    assert len(written) == 12
    for line in lines:
        own = [record for record in written if record["step"] == line["step"]]
        for record in own:
            assert {len(record[name]) for name in (*LISTS, "logprobs")} == {len(record["logprobs"])}
            assert set(record["fork"]) <= {"0", "1"}
            assert all(value == round(value, 4) for value in record["divergence"])
        for name in LISTS[:3]:
            values = [value for record in own for value in record[name]]
            assert len(values) == line["scored_tokens"]
            assert line[name] == pytest.approx(sum(values) / len(values), abs=6e-5)
        forks = "".join(record["fork"] for record in own)
        assert line["fork_rate"] == pytest.approx(forks.count("1") / len(forks))
    assert 0 < lines[0]["fork_rate"] < 1


def test_places(measured: tuple[Path, Trainer]) -> None:
    """Deciles of each completion, and its answer."""
    decode = measured[1].base.tokenizer.decode
    answered = 0
    for line in metrics(measured[0]):
        deciles: list[list[float]] = [[] for _ in range(10)]
        answers: list[float] = []
        own = [r for r in samples(measured[0]) if r["step"] == line["step"]]
        for record in own:
            for i, value in enumerate(record["divergence"]):
                deciles[math.floor(10 * i / len(record["divergence"]))].append(value)
            scored = [flag == "1" for flag in record["scored"]]
            inside = answer_mask(record["ids"], scored, decode)
            answers += [v for v, here in zip(record["divergence"], inside, strict=True) if here]
            answered += "</answer>" in record["completion"]
        for i, values in enumerate(deciles):
            found = line[f"divergence_decile/{i}"]
            assert found == pytest.approx(sum(values) / len(values), abs=6e-5)
        if answers:
            found = line["divergence_answer"]
            assert found == pytest.approx(sum(answers) / len(answers), abs=6e-5)
        pair = re.compile("<answer>.*</answer>", re.DOTALL)
        complete = [record for record in own if pair.search(record["completion"])]
        assert line["answered_rate"] == pytest.approx(len(complete) / len(own))
    assert answered > 0


def test_completions(measured: tuple[Path, Trainer]) -> None:
    """Lengths over all of them, and the words that the run was told to look for."""
    leaks = 0
    for line in metrics(measured[0]):
        own = [r for r in samples(measured[0]) if r["step"] == line["step"]]
        lengths = sorted(record["tokens"] for record in own)
        assert [line[f"completion_length_{q}"] for q in ("p10", "p50", "p90", "max")] == [
            lengths[0], lengths[2], lengths[5], lengths[5],
        ]  # fmt: skip
        words = re.compile(r"\b(right|down)\b", re.IGNORECASE)
        leaking = [record for record in own if words.search(record["completion"])]
        assert line["leak_rate"] == pytest.approx(len(leaking) / len(own))
        leaks += len(leaking)
    assert 0 < leaks < 12


def test_nothing_else_changes(world: Path, measured: tuple[Path, Trainer], tmp_path: Path) -> None:
    """Losses, gradients and completions to the last bit, with and without."""
    train(world, tmp_path, **RUN, figures_every=0)
    assert rollout(tmp_path) == samples(tmp_path) == rollout(measured[0])
    for mine, other in zip(metrics(tmp_path), metrics(measured[0]), strict=True):
        assert mine.keys() == other.keys() - set(module.FIELDS)
        for name in mine:
            if not name.startswith(("seconds", "tokens_per_s", "peak")):
                assert mine[name] == other[name], name


def test_which_steps_are_measured(world: Path, tmp_path: Path) -> None:
    """Logged ones, of which every so many; the samples of the others have no lists."""
    train(world, tmp_path, total_steps=5, log_every=2, figures_every=4)
    marked = {line["step"]: "fork_rate" in line for line in metrics(tmp_path)}
    assert marked == {2: False, 4: True, 5: False}
    listed = {record["step"] for record in samples(tmp_path) if set(LISTS) & record.keys()}
    assert listed == {4}


def test_replay_and_resume(world: Path, tmp_path: Path) -> None:
    """Lists are no part of what is replayed; a resumed run writes the lines it cut off."""
    size: dict[str, Any] = {"total_steps": 3, "save_every": 1, "keep_last": 3}
    train(world, tmp_path / "r", **size)
    lines = samples(tmp_path / "r")
    train(world, tmp_path / "r", **size, resume="1")
    assert samples(tmp_path / "r") == lines
    recorded = tmp_path / "r" / "samples.jsonl"
    train(world, tmp_path / "again", **size, replay_samples=recorded)
    assert samples(tmp_path / "again") == lines


KINDS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "no clip": ({"jsd_token_clip": "none"}, OF_TOKENS),
    "token clip": ({"jsd_clip_scope": "token"}, OF_TOKENS | OF_CLIP - {"clip_entry_rate"}),
    "whole vocabulary": ({"jsd_top_k": "none"}, OF_TOKENS | OF_CLIP),
    "tail": ({"jsd_top_k": 16, "jsd_tail_bucket": True}, OF_TOKENS | OF_CLIP),
    "tinker": ({"jsd_loss_kind": "tinker"}, OF_TOKENS),
    "contrast": ({"contrast": 0.5}, OF_TOKENS | OF_CLIP),
    "weights": ({"token_weight": "entropy", "teacher_mode": "self"}, OF_TOKENS | OF_CLIP),
    "adapters": ({"lora_rank": 2, "teacher_mode": "fixed"}, OF_TOKENS | OF_CLIP),
    "given": ({"off_policy_share": 0.25, "leak_words": ""}, OF_TOKENS | OF_CLIP),
    "no divergence": ({"jsd_weight": 0.0, "ce_weight": 1.0}, set()),
}
OTHERS = {"divergence_answer", *(f"divergence_decile/{i}" for i in range(1, 10))}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_loss(world: Path, tmp_path: Path, kind: str) -> None:
    """What makes sense is there; lists agree with the loss's own sums, whatever weighs them."""
    flags, of_tokens = KINDS[kind]
    expected = of_tokens | OF_TEXTS | LENGTHS | OF_MACHINE
    if kind == "given":
        expected -= {"leak_rate"}
    train(world, tmp_path, global_batch_size=4, samples_per_step=4, total_steps=2, **flags)
    for line in metrics(tmp_path):
        assert (line.keys() & set(module.FIELDS)) - OTHERS == expected, kind
        assert all(math.isfinite(value) for value in line.values())
        own = [record for record in samples(tmp_path) if record["step"] == line["step"]]
        if of_tokens:
            for name in LISTS[:3]:
                values = [value for record in own for value in record[name]]
                assert line[name] == pytest.approx(sum(values) / len(values), abs=6e-5)
        else:
            assert not any(set(LISTS) & record.keys() for record in own)


@pytest.mark.parametrize("objective", [TextSFT, InterleavedSFT, VisualOPSDOffline])
def test_other_objectives(world: Path, tmp_path: Path, objective: type[Any]) -> None:
    """SFT has neither teacher nor completions; a cached teacher is compared like a live one."""
    flags: dict[str, Any] = {"jsd_weight": 0, "ce_weight": 1}
    expected = OF_MACHINE
    if objective is VisualOPSDOffline:
        cache = collect(world, tmp_path / "cache", completions="base", top_k=16)
        flags = {"teacher_cache": cache, "kd_loss": "jsd", "jsd_top_k": 16}
        expected = OF_MACHINE | OF_TOKENS | OF_CLIP | OF_TEXTS | LENGTHS
    train(world, tmp_path / "r", objective, **flags)
    (line,) = metrics(tmp_path / "r")
    assert (line.keys() & set(module.FIELDS)) - OTHERS == expected


# ---------------------------------------------------------------------------------- by hand


def row_of(pieces: list[str], name: str = "row", **changes: Any) -> ScoredRow:
    """A row whose token i reads pieces[i]; its end is scored too."""
    completion = replace(given_completion(range(len(pieces))), **changes)
    context = (TextSegment((90, 91)), completion.segment())
    return ScoredRow(name, context, context, completion)


def reader(pieces: list[str]) -> Any:
    return lambda ids: "".join({90: "an edited", 91: " image"}.get(i) or pieces[i] for i in ids)


def columns(values: list[float], **others: list[float]) -> dict[str, Tensor]:
    given = {"divergence": values, "student_entropy": values, "teacher_entropy": values, **others}
    return {name: torch.tensor(column, dtype=torch.float64) for name, column in given.items()}


def test_sums_of_tokens() -> None:
    pieces = ["so", "<answer>", "L", "</answer>"]
    rows = [
        (row_of(pieces), columns([1.0, 2.0, 3.0, 4.0, 5.0], fork=[0.0, 1.0, 0.0, 0.0, 1.0])),
        (row_of(["x"]), columns([6.0, 7.0], fork=[1.0, 1.0])),
        (ScoredRow("(no row)", (), None), columns([], fork=[])),
    ]
    sums = module.token_sums(rows, ["divergence", "fork"], reader(pieces))
    assert (sums["tokens"], sums["fork"], sums["answer"], sums["answer_tokens"]) == (7, 4, 3, 1)
    assert "divergence" not in sums  # the loss has summed it up
    assert [sums[f"decile_{i}"] for i in range(10)] == [7, 0, 2, 0, 3, 7, 4, 0, 5, 0]
    assert [sums[f"decile_{i}_tokens"] for i in range(10)] == [2, 0, 1, 0, 1, 1, 1, 0, 1, 0]
    found = module.means({**sums, "clip_token": 0.0})
    assert found["fork_rate"] == 4 / 7 and found["divergence_decile/0"] == 3.5
    assert "divergence_decile/1" not in found and found["clip_token_rate"] == 0


def test_what_each_mean_is_of() -> None:
    """Figures of tokens over their number, the clip's gradient over all of the gradient."""
    parts = {
        "fork": 1.0, "topk_overlap": 2.0, "student_topk_mass": 3.0, "clip_entry": 4.0,
        "clip_token": 5.0, "gradient": 40.0, "gradient_removed": 6.0, "answer": 7.0, "leaks": 8.0,
        "answered": 9.0,
    }  # fmt: skip
    counts = {"tokens": 100.0, "answer_tokens": 10.0, "texts": 20.0, "unshown": 20.0}
    assert module.means({**parts, **counts, "model_tflop": 11.0}) == {
        "fork_rate": 0.01, "topk_overlap": 0.02, "student_topk_mass": 0.03,
        "clip_entry_rate": 0.04, "clip_token_rate": 0.05, "clip_gradient_share": 0.15,
        "divergence_answer": 0.7, "leak_rate": 0.4, "answered_rate": 0.45, "model_tflop": 11.0,
    }  # fmt: skip


def test_a_rank_without_tokens_has_the_same_names() -> None:
    """And a row's tokens are its own, whatever it is packed with."""
    first, second = row_of(["a", "b"], "first"), row_of(["c"], "second")
    ours = PackResult(torch.zeros(()), {}, torch.zeros(5), (first, second),
                      columns([1.0, 2.0, 3.0, 4.0, 5.0]))  # fmt: skip
    none = replace(ours, rows=(ScoredRow("(no row)", (), None),), tokens=columns([], fork=[]))
    split = module.figures_of_rows([none, ours])
    assert [(row.name, figures["divergence"].tolist()) for row, figures in split] == [
        ("(no row)", []), ("first", [1.0, 2.0, 3.0]), ("second", [4.0, 5.0]),
    ]  # fmt: skip
    names = ["divergence", "fork"]
    sums = module.token_sums(module.figures_of_rows([none]), names, str)
    assert sums.keys() == module.token_sums([], names, str).keys()
    assert not any(sums.values()) and module.means(sums) == {}


def test_sums_of_texts() -> None:
    """Of what the policy wrote; what the student has read, or saw in a rehearsal, is no leak."""
    pieces = ["The edited image", " and my sketch", "<answer>L</answer>"]
    decode, probe = reader(pieces), LeakProbe("edited image, my sketch")
    innocent, leaking = row_of(pieces[:1]), row_of(pieces)
    given = row_of(pieces, given=True)
    rows = [innocent, leaking, given, replace(leaking, rehearsed=True), ScoredRow("x", (), None)]
    sums = module.text_sums(rows, probe, decode)
    assert sums == {"texts": 3, "answered": 2, "leaks": 1, "unshown": 2}
    assert module.text_sums([leaking], LeakProbe(""), decode) == {"texts": 1, "answered": 1}


def test_quantiles_of_lengths() -> None:
    found = module.length_quantiles([*range(20, 0, -1)])
    assert list(found.values()) == [2, 10, 18, 20]
    assert list(module.length_quantiles([7]).values()) == [7, 7, 7, 7]
    assert module.length_quantiles([]) == {}


@pytest.mark.parametrize("gpu", ["NVIDIA H200", "an unknown one", None])
def test_the_machine(monkeypatch: pytest.MonkeyPatch, gpu: str | None) -> None:
    """The fullest rank, lengths of all ranks, and the GPUs' share of what they could do."""
    env = DistEnv(0, 2, 0, 2, torch.device("cpu" if gpu is None else "cuda"))
    own = {"host_memory_gb": 3.0, "gpu_allocated_gb": 1.0}
    other = ([5], {"host_memory_gb": 2.0, "gpu_allocated_gb": 4.0})
    monkeypatch.setattr(module, "memory_gb", lambda device: own)
    monkeypatch.setattr(module, "gather_objects", lambda mine: [mine, other])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: gpu)
    measurement = object.__new__(module.Measurement)
    measurement.env = env
    rows = [row_of(["a"] * 3), row_of(["a"], given=True)]
    found = measurement.of_machine(rows, tflop=989.0, seconds=2.0)
    mfu = {"mfu": 0.25} if gpu == "NVIDIA H200" else {}
    lengths = dict(zip(sorted(LENGTHS), [5, 3, 3, 5], strict=True))  # max, p10, p50, p90
    assert found == {"host_memory_gb": 3.0, "gpu_allocated_gb": 4.0, **lengths, **mfu}


def test_memory_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "own_bytes", lambda: 3 * 10**9)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 10**9)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2 * 10**9)
    assert module.memory_gb(torch.device("cpu")) == {"host_memory_gb": 3.0}
    assert module.memory_gb(torch.device("cuda")) == {
        "host_memory_gb": 3.0, "gpu_allocated_gb": 1.0, "gpu_reserved_gb": 2.0,
    }  # fmt: skip
    monkeypatch.setattr(module, "own_bytes", lambda: None)
    assert module.memory_gb(torch.device("cpu")) == {}


def test_lists_are_json() -> None:
    """Rounded to four digits, null where a number is not finite."""
    figures = columns([0.12345, math.nan, math.inf], fork=[0.0, 1.0, 0.0])
    found = token_lists(figures)
    assert found["divergence"] == [0.1235, None, None] and found["fork"] == "010"
    assert json.loads(json.dumps(found)) == found
    assert token_lists({}) == {}


def test_log_probabilities_are_json(tmp_path: Path) -> None:
    """A student whose weights are NaN samples with probabilities that are none."""
    row: Any = SimpleNamespace(name="d/1", question="?", answer="!", rehearsed=False)
    completion = Completion((1, 2), (True, True, False), (-0.5, math.nan))
    path = tmp_path / "samples.jsonl"
    write_samples(path, 0, [(SlotItem(0, 0, row), 0, completion)], str)
    assert "NaN" not in path.read_text()
    assert read_log(path)[0]["logprobs"] == [-0.5, None]


def test_every_logged_step_is_measured_by_default() -> None:
    run = TrainConfig().run
    assert isinstance(run, RunSettings) and run.figures_every == 1
    assert Completion((), (False,)).count == 0
