# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The launchers: every positional argument and every variable, two values, reaches the program.

A new one without a row fails here. How processes are counted and meet is in test_clusters.py.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from scripts.visual_opsd.analysis.kl_measurement import DiagnosticConfig
from scripts.visual_opsd.analysis.trace_rows import CollectConfig
from scripts.visual_opsd.cli import flat, parse_config
from scripts.visual_opsd.config import SFT_DEFAULTS, SFTConfig, TrainConfig
from scripts.visual_opsd.training.offline import OFFLINE_DEFAULTS, OfflineConfig
from tests.shell import LAUNCHERS, LEADING, dry_run, program_arguments, run

# Script -> usage's name of each positional argument: (setting, two values); None: an output's name.
Arguments = dict[str, tuple[str | None, tuple[Any, Any]]]
OPSD: Arguments = {
    "MODEL_PATH": ("model_path", ("m", "n")),
    "TEACHER_MODE": ("teacher_mode", ("fixed", "self")),
    "JSD_BETA": ("jsd_beta", (0.25, 0.75)),
    "JSD_TEMP": ("jsd_temperature", (2.0, 3.0)),
    "JSD_WEIGHT": ("jsd_weight", (0.5, 1.5)),
    "TOTAL_STEPS": ("total_steps", (300, 400)),
    "OUTPUT_NAME": (None, ("mine", "yours")),
}
POSITIONAL: dict[str, Arguments] = {
    "run_visual_opsd.sh": OPSD,
    "run_visual_opsd_noise.sh": OPSD,
    "run_visual_opsd_control.sh": OPSD,
    "run_sft_baseline.sh": {
        "MODEL_PATH": ("model_path", ("m", "n")),
        "TOTAL_STEPS": ("total_steps", (300, 400)),
        "OUTPUT_NAME": (None, ("mine", "yours")),
    },
    "run_kl_diagnostic.sh": {
        "MODEL_PATH": ("model_path", ("m", "n")),
        "NUM_SAMPLES": ("num_samples", (30, 40)),
        "OUTPUT_DIR": ("output_dir", ("here", "there")),
    },
    "run_collect_traces.sh": {
        "MODEL_PATH": ("model_path", ("m", "n")),
        "OUTPUT_DIR": ("output_dir", ("here", "there")),
    },
    "run_visual_opsd_offline.sh": {
        "MODEL_PATH": ("model_path", ("m", "n")),
        "TEACHER_CACHE": ("teacher_cache", ("here", "there")),
        "KD_WEIGHT": ("jsd_weight", (0.25, 0.75)),
        "KD_TEMP": ("jsd_temperature", (1.0, 3.0)),
        "TOTAL_STEPS": ("total_steps", (300, 400)),
        "OUTPUT_NAME": (None, ("mine", "yours")),
    },
}
CONFIGS: dict[str, tuple[type, dict[str, Any] | None]] = {
    "run_visual_opsd.sh": (TrainConfig, None),
    "run_visual_opsd_noise.sh": (TrainConfig, None),
    "run_visual_opsd_control.sh": (TrainConfig, None),
    "run_sft_baseline.sh": (SFTConfig, SFT_DEFAULTS),
    "run_kl_diagnostic.sh": (DiagnosticConfig, None),
    "run_collect_traces.sh": (CollectConfig, None),
    "run_visual_opsd_offline.sh": (OfflineConfig, OFFLINE_DEFAULTS),
}
VARIABLES: dict[str, tuple[str, tuple[Any, Any]]] = {
    "EMA_DECAY": ("ema_decay", (0.9, 0.8)),
    "JSD_TOP_K": ("jsd_top_k", (32, 64)),
    "JSD_TOKEN_CLIP": ("jsd_token_clip", (0.1, 0.2)),
    "CE_WEIGHT": ("ce_weight", (0.5, 0.75)),
    "SAMPLE_MAX_NEW": ("sample_max_new_tokens", (64, 128)),
    "SAMPLE_TEMP": ("sample_temperature", (0.7, 0.6)),
    "MAX_FORWARD_TOKENS": ("max_forward_tokens", (4096, 2048)),
    "SAMPLE_MAX_IMAGE_SKIPS": ("sample_max_image_skips", (2, 3)),
}


def settings(programs: Path, script: str, *arguments: str, **variables: str) -> dict[str, Any]:
    """What the program reads from the launcher's command line."""
    arguments = (*LEADING.get(script, ()), *arguments)
    words = program_arguments(dry_run(programs, LAUNCHERS / script, *arguments, env=variables))
    config, defaults = CONFIGS[script]
    return flat(parse_config(config, words, "", defaults))


def changed(programs: Path, script: str, given: dict[str, Any]) -> dict[str, Any]:
    """Settings that differ from those of a launch without arguments."""
    plain = settings(programs, script)
    return {name: value for name, value in given.items() if plain[name] != value}


def test_every_launcher_argument_and_variable_has_a_row(programs: Path) -> None:
    assert {path.name for path in LAUNCHERS.glob("run_*.sh")} == POSITIONAL.keys()
    for script, table in POSITIONAL.items():
        usage = run(programs, LAUNCHERS / script, "--help").stdout
        synopsis = usage[usage.index("usage:") : usage.index("[--flag")]
        assert re.findall(r"\[(\w+)\]", synopsis) == list(table)
    text = (LAUNCHERS / "launch.sh").read_text().split("launch_opsd()")[1]
    (added,) = re.findall(r"add_environment ((?:[^\n]*\\\n)*[^\n]*)", text)
    assert dict(re.findall(r"(\w+)=(\w+)", added)) == {n: row[0] for n, row in VARIABLES.items()}
    others = [path.name for path in LAUNCHERS.glob("run_*.sh")
              if "add_environment" in path.read_text()]  # fmt: skip
    assert others == []


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("script", sorted(POSITIONAL))
def test_every_argument_arrives_and_moves_nothing_else(
    programs: Path, script: str, number: int
) -> None:
    table = POSITIONAL[script]
    given = [str(values[number]) for _, values in table.values()]
    expected = {name: values[number] for name, values in table.values() if name}
    if "OUTPUT_NAME" in table:
        results = f"results/{given[-1]}"
        expected |= {"results_dir": results, "checkpoint_dir": f"{results}/checkpoints"}
    assert changed(programs, script, settings(programs, script, *given)) == expected


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize(
    "script", ["run_visual_opsd.sh", "run_visual_opsd_noise.sh", "run_visual_opsd_control.sh"]
)
def test_every_variable_arrives_and_moves_nothing_else(
    programs: Path, script: str, number: int
) -> None:
    variables = {name: str(values[number]) for name, (_, values) in VARIABLES.items()}
    found = changed(programs, script, settings(programs, script, **variables))
    assert found == {name: values[number] for name, values in VARIABLES.values()}


def test_what_the_launchers_of_controls_add(programs: Path) -> None:
    plain, noise, other = (
        settings(programs, f"run_visual_opsd{name}.sh") for name in ("", "_noise", "_control")
    )
    for control, changed_flag, value in ((noise, "noise_vt", True), (other, "vt", "other")):
        differ = {name for name in plain if plain[name] != control[name]}
        assert differ == {changed_flag, "results_dir", "checkpoint_dir"}
        assert control[changed_flag] == value
