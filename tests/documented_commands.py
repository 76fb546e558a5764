# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Would the commands in a document's bash blocks be understood? Nothing is executed but launchers,
with DRY_RUN; every program's own parser reads its arguments and is stopped right after."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.run import get_args_parser as torchrun_parser

from scripts.visual_opsd.analysis.kl_measurement import DiagnosticConfig
from scripts.visual_opsd.analysis.trace_rows import CollectConfig
from scripts.visual_opsd.cli import parse_config
from scripts.visual_opsd.config import SFT_DEFAULTS, SFTConfig, TrainConfig
from scripts.visual_opsd.evaluation.questions import EvaluateConfig
from scripts.visual_opsd.training.objective import check_used
from scripts.visual_opsd.training.offline import OFFLINE_DEFAULTS, OfflineConfig

ROOT = Path(__file__).resolve().parents[1]
# Programs whose flags are the fields of a configuration, and the defaults of their own.
CONFIGS: dict[str, tuple[type, dict[str, Any]]] = {
    "scripts.visual_opsd.train_visual_opsd": (TrainConfig, {}),
    "scripts.visual_opsd.train_sft": (SFTConfig, SFT_DEFAULTS),
    "scripts.visual_opsd.plan": (TrainConfig, {"plan": True}),
    "scripts.visual_opsd.evaluate": (EvaluateConfig, {}),
    "scripts.visual_opsd.kl_diagnostic": (DiagnosticConfig, {}),
    "scripts.visual_opsd.collect_traces": (CollectConfig, {}),
    "scripts.visual_opsd.train_visual_opsd_offline": (OfflineConfig, OFFLINE_DEFAULTS),
}


def blocks(text: str, language: str) -> list[str]:
    """Contents of a document's code blocks in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


# Every command of a block is replaced by a function that says how it was called; launchers run
# for real, with DRY_RUN. Without PATH nothing else can be started.
_PRELUDE = """
set -eu
PATH=$PWD/nothing-here
record() { local word; printf '@call'; for word in "$@"; do printf ' %q' "$word"; done; echo; }
command_not_found_handle() { record unknown "$@"; }
for name in python python3 .venv/bin/python make git pip uv; do
    eval "function $name { record $name \\"\\$@\\"; }"
done
cd() { record cd "$@"; }
bash() {
    local script=$1
    shift
    if [[ $script != scripts/visual_opsd/run_*.sh ]]; then
        record unknown bash "$script"
        return
    fi
    PATH=$REAL_PATH DRY_RUN=1 "$BASH" "$REPOSITORY/$script" "$@"
}
sbatch() {
    local job=$1
    shift
    record sbatch "$job"
    bash scripts/visual_opsd/run_visual_opsd.sh "$@"
}
"""


def bash_environment(**more: str) -> dict[str, str]:
    """Without what would make a launcher look for a cluster."""
    hidden = (
        "SLURM",
        "ARNOLD",
        "MASTER",
        "NPROC",
        "JSD_",
        "SAMPLE_",
        "EMA_",
        "CE_",
        "DRY_RUN",
        "PET_",
        "WORLD_SIZE",
        "RANK",
        "LOCAL_RANK",
        "NNODES",
        "NODE_RANK",
        "HIP_",
        "ROCR_",
    )
    kept = {k: v for k, v in os.environ.items() if not k.startswith(hidden)}
    return {**kept, "CUDA_VISIBLE_DEVICES": "", "PYTHON": "python", **more}


def calls_of(block: str, where: Path) -> Iterator[list[str]]:
    """Every command a block starts, with launchers resolved to what they start."""
    done = subprocess.run(
        ["bash", "-c", _PRELUDE + block],
        cwd=where,
        capture_output=True,
        text=True,
        timeout=60,
        env=bash_environment(REAL_PATH=os.environ["PATH"], REPOSITORY=str(ROOT)),
    )
    assert done.returncode == 0, f"{block}\n{done.stdout}{done.stderr}"
    for line in done.stdout.splitlines():
        words = shlex.split(line)
        if words[0] == "@call":
            yield words[1:]
        elif words[:1] == ["cd"]:  # cd ROOT && env NAME=VALUE ... python -m ...
            yield words[words.index("python") :]


class _Parsed(Exception):
    """The command line was understood; carries what was left over."""


def _leftover(main: Any, argv: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments that a program's own parser does not know; it is stopped right after parsing."""
    original = argparse.ArgumentParser.parse_known_args
    depth = 0

    def parse(self: Any, args: Any = None, namespace: Any = None) -> Any:
        nonlocal depth
        depth += 1  # subcommands parse inside
        try:
            found = original(self, args, namespace)
        finally:
            depth -= 1
        if depth:
            return found
        raise _Parsed(found[1])

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", parse)
        try:
            main(argv)
        except _Parsed as parsed:
            return list(parsed.args[0])
    raise AssertionError("it parsed nothing")


def _main_module(name: str) -> str:
    is_package = (ROOT / name.replace(".", "/") / "__main__.py").is_file()
    return f"{name}.__main__" if is_package else name


def program_problem(module: str, argv: list[str], monkeypatch: pytest.MonkeyPatch) -> str | None:
    """Why a program would refuse its arguments, or None."""
    if any("<" in word or word.endswith("...") for word in argv):
        return f"a placeholder among {argv}"
    try:
        program = importlib.import_module(_main_module(module))
        if module in CONFIGS:
            config_class, defaults = CONFIGS[module]
            config: Any = parse_config(config_class, argv, "", defaults)
            if hasattr(program, "make_objective"):
                check_used(program.make_objective(config))
            return None
        left = _leftover(program.main, argv, monkeypatch)
        if left and module.startswith("scripts.miniworld."):  # they hand these to the trainer
            parse_config(TrainConfig, ["--config", "examples/demo/train.yaml", *left], "")
            left = []
    except (ValueError, ImportError, SystemExit) as error:
        if isinstance(error, SystemExit) and error.code == 0:  # --help
            return None
        return f"{module} {shlex.join(argv)}: {error!r}"
    return f"{module} does not know {left}" if left else None


def call_problem(call: list[str], monkeypatch: pytest.MonkeyPatch) -> str | None:
    """Why a command of a document would fail before it does anything, or None."""
    name, *words = call
    if name.endswith(("python", "python3")):
        if words[:2] == ["-m", "torch.distributed.run"]:
            run = torchrun_parser().parse_args(words[2:])
            assert run.module, call
            return program_problem(run.training_script, run.training_script_args, monkeypatch)
        if words[0] == "-m" and words[1] in ("pip", "venv"):
            return call_problem(["uv", *words[1:]], monkeypatch)
        if words[0] == "-m":
            return program_problem(words[1], words[2:], monkeypatch)
        if words[0] == "-c":
            compile(words[1], "-c", "exec")
            return None
        if not (ROOT / words[0]).is_file():
            return f"no file {words[0]}"
        module = words[0].removesuffix(".py").replace("/", ".")
        return program_problem(module, words[1:], monkeypatch)
    if name == "uv" and words[0] in ("pip", "venv"):
        files = [b for a, b in pairwise(words) if a in ("-r", "-c")]
        missing = [file for file in files if not (ROOT / file).is_file()]
        return f"no file {missing}" if missing else None
    if name == "make":
        makefile = (ROOT / "Makefile").read_text()
        variables = {word.partition("=")[0] for word in words if "=" in word}
        targets = [word for word in words if "=" not in word]
        known = set(re.findall(r"^(\w+) \?=", makefile, re.MULTILINE))
        bad = [t for t in targets if not re.search(rf"^{t}:", makefile, re.MULTILINE)]
        return f"make does not know {bad}{variables - known}" if bad or variables - known else None
    if name == "sbatch":
        return None if (ROOT / words[0]).is_file() else f"no file {words[0]}"
    return None if name in ("git", "cd") else f"unknown command {shlex.join(call)}"


def block_problems(text: str, where: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(ROOT)  # paths in documents are relative to the repository
    calls = [call for block in blocks(text, "bash") for call in calls_of(block, where)]
    problems = [call_problem(call, monkeypatch) for call in calls]
    return [problem for problem in problems if problem is not None]
