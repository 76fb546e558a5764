# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Run shell scripts with nothing of the caller's environment; read what they would start."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LAUNCHERS = ROOT / "scripts" / "visual_opsd"
RUN_OPSD = LAUNCHERS / "run_visual_opsd.sh"
DRY = {"DRY_RUN": "1"}
# Arguments that a launcher must have before all others.
LEADING = {"run_visual_opsd_control.sh": ("other",)}


def write_program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def run(
    programs: Path,
    script: Path,
    *arguments: str,
    cwd: Path = ROOT,
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a shell script with nothing of this process' environment but the usual tools."""
    clean = {"PATH": f"{programs}:/usr/local/bin:/usr/bin:/bin", "HOME": str(programs)}
    return subprocess.run(
        ["bash", str(script), *arguments],
        cwd=cwd,
        env=clean | dict(env or {}),
        capture_output=True,
        text=True,
        timeout=60,
    )


def dry_run(
    programs: Path,
    script: Path,
    *arguments: str,
    cwd: Path = ROOT,
    env: Mapping[str, str] | None = None,
) -> list[str]:
    """The words of the one command line that DRY_RUN=1 prints."""
    done = run(programs, script, *arguments, cwd=cwd, env=DRY | dict(env or {}))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1, done.stdout
    return shlex.split(done.stdout)


def torchrun_options(words: list[str]) -> list[str]:
    """What stands between torch.distributed.run and -m MODULE."""
    start = words.index("torch.distributed.run") + 1
    return words[start : words.index("-m", start)]


def program_arguments(words: list[str]) -> list[str]:
    """What the Python program gets."""
    return words[words.index("-m", words.index("torch.distributed.run")) + 2 :]


def words_of(line: str) -> list[str]:
    return line.split(" ")


def flag(words: list[str], name: str) -> str:
    """The value a flag ends up with: the last one given."""
    places = [i for i, word in enumerate(words) if word == name]
    assert places, f"{name} is missing in {words}"
    return words[places[-1] + 1]
