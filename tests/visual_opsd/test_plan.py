# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""--plan and --dry_run as a user meets them, and the check before a run."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from scripts.visual_opsd import plan, train_sft, train_visual_opsd
from scripts.visual_opsd.run_config import PlanSettings
from scripts.visual_opsd.training.checkpoints import save_checkpoint
from scripts.visual_opsd.training.memory_check import Room
from scripts.visual_opsd.training.sharding import load_sharded
from scripts.visual_opsd.training.step import run_pack
from tests.arrivals import spy
from tests.visual_opsd.training_runs import TINY_BAGEL, train_arguments

LLM = {
    "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "intermediate_size": 18944, "vocab_size": 152064,
}  # fmt: skip
VISION = {
    "hidden_size": 1152, "num_hidden_layers": 27, "num_attention_heads": 16,
    "intermediate_size": 4304,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def configs_only(tmp_path: Path) -> Path:
    """A folder of the release's two configurations, without weights."""
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "llm_config.json").write_text(json.dumps(LLM))
    (folder / "vit_config.json").write_text(json.dumps(VISION))
    return folder


def contents(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


@pytest.mark.parametrize(
    ("main", "more"),
    [
        (plan.main, []),
        (plan.main, ["--sft"]),
        (plan.main, ["--sft", "--mode", "interleaved"]),
        (train_visual_opsd.main, ["--plan"]),
        (train_sft.main, ["--plan", "True"]),
    ],
)
def test_every_command_prints_the_table_and_the_verdict(
    main: Callable[[list[str]], int], more: list[str], configs_only: Path,
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)
    common = ["--model_path", str(configs_only), *more, "--plan_gpu_gb"]
    assert main([*common, "1000"]) == 0
    shown = capsys.readouterr().out
    for line in ("each GPU, GB", "each host (1 GPU), GB", "disk, GB", "weights", "gradients",
                 "release folders", "it fits each GPU"):  # fmt: skip
        assert line in shown, line
    assert ("while completions are drawn" in shown) == (
        "--sft" not in more and main != train_sft.main
    )
    assert ("pictures become latents" in shown) == ("interleaved" in more)
    assert main([*common, "20"]) == 1
    shown = capsys.readouterr().out
    assert "the run does not fit each GPU" in shown and "8 GPUs: saves" in shown
    assert contents(tmp_path) == before


def test_the_machine_may_be_another(configs_only: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--model_path", str(configs_only), "--plan_gpu_gb", "80", "--plan_gpus"]
    assert [plan.main([*common, gpus]) for gpus in ("2", "4")] == [1, 0]
    two, four = capsys.readouterr().out.split("Memory plan: ")[1:]
    assert "2 GPUs, each holds 1/2 of the weights" in two
    assert "4 GPUs, each holds 1/4 of the weights" in four


def test_a_cpu_holds_all_in_its_memory(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(["--model_path", str(TINY_BAGEL), "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert "each process, GB" in shown and "computing" in shown and "CUDA" not in shown


def test_mistakes_are_explained(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"llm_config\.json is missing: a checkpoint folder needs"):
        plan.main(["--model_path", str(tmp_path)])
    with pytest.raises(ValueError, match="num_shard"):
        plan.main(["--model_path", str(TINY_BAGEL), "--plan_gpus", "4", "--num_shard", "3"])
    with pytest.raises(ValueError, match="are of a plan: add --plan"):
        PlanSettings(plan_gpus=4)
    with pytest.raises(ValueError, match="give one of them"):
        PlanSettings(plan=True, dry_run=True)


# --------------------------------------------------------------------------- before a real run


@pytest.mark.parametrize("resource", ["host", "disk"])
def test_what_cannot_fit_ends_before_anything_is_loaded(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resource: str
) -> None:
    loads = spy(monkeypatch, load_sharded)
    little = Room(**{resource: 1000.0})
    monkeypatch.setattr(Room, "here", lambda *_: little)
    arguments = train_arguments(world, tmp_path / "run", total_steps=1, warmup_steps=0)
    with pytest.raises(ValueError, match=r"does not fit .*--plan False skips this check"):
        train_visual_opsd.main(arguments)
    assert loads == [] and not (tmp_path / "run").exists()
    assert train_visual_opsd.main([*arguments, "--plan", "False"]) == 0


def test_what_is_tight_is_a_warning(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Room, "here", lambda *_: Room(host=5e8))
    arguments = train_arguments(world, tmp_path / "run", total_steps=1, warmup_steps=0)
    assert train_visual_opsd.main(arguments) == 0
    told = capsys.readouterr().err
    assert "warning:" in told and "it may not fit the host's memory" in told


# ------------------------------------------------------------------------------------- dry run


@pytest.mark.parametrize(
    ("module", "more"),
    [
        (train_visual_opsd, {"teacher_vt": "vae+vit"}),
        (train_sft, {"mode": "text"}),
        (train_sft, {"mode": "interleaved"}),
    ],
)
def test_a_dry_run_leaves_nothing(
    module: Any, more: dict[str, Any], world: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "scratch").mkdir()
    saves, packs = spy(monkeypatch, save_checkpoint), spy(monkeypatch, run_pack)
    arguments = train_arguments(
        world, tmp_path / "run", dry_run=True, total_steps=500, warmup_steps=100,
        max_forward_tokens=600, sample_max_new_tokens=40, global_batch_size=2, vae_max_size=64,
        vae_min_size=32, vit_max_size=56, save_release=True, **more,
    )  # fmt: skip
    assert module.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "rows of 600 tokens with completions of" in shown
    # The ratio is a dash where a process that has run much found the memory that it needed.
    table = [line.split() for line in shown.splitlines()]
    phases = {words[0] for words in table if len(words) == 4 and words[1][0].isdigit()}
    assert phases >= {"resident", "train", "optimise"}
    assert ("sample" in phases) == (module is train_visual_opsd)
    assert ("encode" in phases) == (more.get("mode") != "text")
    assert saves == []
    rows = [row for call in packs for row in call["rows"]]
    assert {row.length for row in rows} == {600}, "each row is as long as the limit"
    assert not (tmp_path / "run").exists() and contents(tmp_path / "scratch") == set()


def test_a_dry_run_without_room_for_a_row(world: Path, tmp_path: Path) -> None:
    arguments = train_arguments(
        world, tmp_path / "run", dry_run=True, max_forward_tokens=400, vit_min_size=112,
        use_system_prompt=False, use_reference_intro=False, use_transition_prompt=False,
    )  # fmt: skip
    with pytest.raises(ValueError, match="--max_forward_tokens 400 leaves no room"):
        train_visual_opsd.main([*arguments, "--vit_max_size", "224", "--vit_min_size", "196"])
