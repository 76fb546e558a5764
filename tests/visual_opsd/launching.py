# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Start programs that stand beside the tests, alone or under torchrun, with a hard time limit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def program_environment() -> dict[str, str]:
    """For programs beside this file: one thread, the repository importable."""
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1])}


def launch(processes: int, *arguments: str, timeout: float) -> str:
    """Run a program under torchrun; its output. Past the timeout the whole group is killed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    process = subprocess.Popen(
        [*command, "--nproc_per_node", str(processes), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=program_environment(),
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"no end after {timeout} s (a hang):\n{output[-4000:]}")
    assert process.returncode == 0, output[-6000:]
    return output
