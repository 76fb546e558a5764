# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Settings that a trainer has no use for are refused, each by its name.

That none is missing from what an objective declares is shown by the tables of `test_train_flags`,
`test_sft_flags` and `test_offline_flags`: every other setting has a row that sees it act. That what
is declared does not act is shown here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from scripts.visual_opsd import plan, train_sft, train_visual_opsd, train_visual_opsd_offline
from scripts.visual_opsd.cli import flat
from scripts.visual_opsd.training.checkpoint_folders import restart_logs
from scripts.visual_opsd.training.interleaved import InterleavedSFT
from scripts.visual_opsd.training.objective import Objective
from scripts.visual_opsd.training.offline import VisualOPSDOffline
from scripts.visual_opsd.training.text_sft import TextSFT
from scripts.visual_opsd.training.visual_opsd import VisualOPSD
from tests.visual_opsd.teacher_caches import PROMPT, collect
from tests.visual_opsd.training.trainers import idle_settings, moved, train, weights
from tests.visual_opsd.training_runs import TINY_BAGEL, figures

# Each trainer in each of the forms that differ in what they use, and a setting of its own.
PROGRAMS: dict[str, tuple[Any, list[str], list[str]]] = {
    "on-policy": (train_visual_opsd, [], ["--teacher_mode", "fixed", "--jsd_beta", "0.3"]),
    "without a divergence": (train_visual_opsd, ["--jsd_weight", "0", "--ce_weight", "1"], []),
    "text": (train_sft, [], ["--sft_format", "reference", "--token_weight", "entropy"]),
    "interleaved": (train_sft, ["--mode", "interleaved"], ["--mse_weight", "2"]),
    "offline, KL": (train_visual_opsd_offline, [], ["--jsd_temperature", "1"]),
    "offline, JSD": (train_visual_opsd_offline, ["--kd_loss", "jsd"], ["--jsd_beta", "0.3"]),
}
OTHER_VALUES: dict[str, Any] = {
    "teacher_mode": "fixed", "ema_decay": 0.9, "teacher_vt": "vae+vit", "vt": "noise",
    "noise_vt": True, "contrast": 0.5, "contrast_with": "none", "teacher_cpu_offload": True,
    "teacher_guard": "warn", "guard_drop": 0.2,
    "use_reference_intro": False, "use_transition_prompt": False,
    "completions_per_row": 2, "off_policy_share": 0.1, "vt_rehearsal": 0.1,
    "sample_temperature": 0.8, "sample_do_sample": False, "samples_per_step": 1,
    "replay_samples": "absent.jsonl", "leak_words": "none",
    "jsd_weight": 0.3, "jsd_beta": 0.3, "jsd_top_k": "none", "jsd_token_clip": "none",
    "jsd_clip_scope": "token", "jsd_tail_bucket": True, "jsd_loss_kind": "tinker",
    "sft_format": "reference", "mse_weight": 2.0, "timestep_shift": 2.0,
}  # fmt: skip
GUARDED = ["--eval_every", "1", "--eval_data", "x", "--teacher_guard", "warn"]
NEEDED = {"teacher_guard": GUARDED[:4], "guard_drop": GUARDED}  # other settings refuse them alone


def objective_of(name: str, more: Sequence[str] = ()) -> Objective:
    program, words, _ = PROGRAMS[name]
    made: Objective = program.make_objective(program.read_config([*words, *more]))
    return made


CASES = [
    (name, setting, why)
    for name in PROGRAMS
    for why, settings in objective_of(name).unused.items()
    for setting in settings
]


@pytest.mark.parametrize(
    ("name", "setting", "why"), CASES, ids=[f"{name}-{setting}" for name, setting, _ in CASES]
)
def test_a_setting_without_effect_is_refused(name: str, setting: str, why: str) -> None:
    """With the cause; the model that it would start from is not looked for."""
    program, words, _ = PROGRAMS[name]
    value = OTHER_VALUES[setting]
    given = [*words, *NEEDED.get(setting, ()), f"--{setting}", str(value)]
    with pytest.raises(ValueError, match=r"leave (it|them) out$") as refused:
        program.main([*given, "--plan", "True", "--model_path", "absent"])
    problem = str(refused.value)
    assert f"--{setting} {value}" in problem and f": {why}" in problem


@pytest.mark.parametrize("more", [[], ["--plan"], ["--dry_run"], ["--mode", "interleaved"]])
def test_all_of_them_are_named_at_once(more: list[str]) -> None:
    given = ["--vt", "noise", "--jsd_top_k", "none", "--vt_rehearsal", "0.1", "--device", "cpu"]
    with pytest.raises(ValueError) as refused:
        train_sft.main([*given, *more, "--model_path", "absent", "--data_root", "absent"])
    assert str(refused.value) == (
        "--vt noise, --jsd_top_k none: SFT has no teacher; --vt_rehearsal 0.1: SFT draws no "
        "completions: leave them out"
    )


@pytest.mark.parametrize("setting", ["--vt noise", "--mse_weight 2.0"])
def test_a_plan_by_its_own_command(setting: str) -> None:
    with pytest.raises(ValueError, match=f"^{setting}: .*: leave it out$"):
        plan.main(["--sft", *setting.split(), "--model_path", "absent"])


def test_a_config_file_is_no_way_around(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("teacher: {teacher_mode: fixed}\nvt: real\n")
    with pytest.raises(ValueError, match="--teacher_mode fixed: SFT has no teacher"):
        train_sft.main(["--config", str(tmp_path / "run.yaml"), "--plan"])


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_saved_settings_of_a_run_are_accepted_again(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """config.yaml holds all settings, also those that the trainer has no use for."""
    program, words, own = PROGRAMS[name]
    size = ["--model_path", str(TINY_BAGEL), "--device", "cpu", "--lr", "0.001"]
    config = program.read_config([*words, *own, *size])
    tmp_path.joinpath("run").mkdir()
    restart_logs(tmp_path / "run", 0, flat(config))
    saved = ["--config", str(tmp_path / "run" / "config.yaml")]
    assert program.read_config(saved) == config
    assert program.main([*saved, "--plan", "True"]) == 0
    assert "Memory plan: " in capsys.readouterr().out


# What a run without the check could not even begin with, or what contradicts another one.
NOT_RUN = {"jsd_weight", "replay_samples", "teacher_guard", "guard_drop"}
ALONE = {"teacher_vt", "sample_do_sample"}
OBJECTIVES: dict[str, type[Objective]] = {
    "on-policy": VisualOPSD, "text": TextSFT, "interleaved": InterleavedSFT,
    "offline, KL": VisualOPSDOffline,
}  # fmt: skip


@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_is_refused_would_change_nothing(name: str, world: Path, tmp_path: Path) -> None:
    size: dict[str, Any] = {"total_steps": 2, "vae_max_size": 64, "vae_min_size": 32, **PROMPT}
    unused = idle_settings(PROGRAMS[name][0], *PROGRAMS[name][1])
    if name.startswith("offline"):
        cache = collect(world, tmp_path / "cache", top_k=16)
        size |= {"teacher_cache": cache, "jsd_top_k": 16}
        unused.remove("jsd_loss_kind")  # tinker has no top-k, which a cache does
    assert unused - NOT_RUN
    plain = train(world, tmp_path / "plain", OBJECTIVES[name], **size)
    for number, names in enumerate((unused - NOT_RUN - ALONE, unused & ALONE)):
        changes = {setting: OTHER_VALUES[setting] for setting in names}
        results = tmp_path / str(number)
        other = train(world, results, OBJECTIVES[name], **{**size, **changes})
        assert figures(results) == figures(tmp_path / "plain")
        assert not moved(weights(plain.student), weights(other.student))
