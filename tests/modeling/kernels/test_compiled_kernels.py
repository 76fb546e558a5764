# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Every kernel compiles for GPUs of two generations, true size, and fits their shared memory."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[3]
LAUNCH = re.compile(r"^ +(?:\w+ = )?(_\w+)\[(?:\(|grid\]|self\.grid\])", re.MULTILINE)


def launched_kernels() -> set[str]:
    """Names of kernels that the sources launch."""
    folders = (ROOT / "modeling", ROOT / "scripts", ROOT / "data")
    texts = [file.read_text() for folder in folders for file in folder.rglob("*.py")]
    return {name for text in texts if "@triton.jit" in text for name in LAUNCH.findall(text)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "shared"),
    [pytest.param(86, 99 * 1024, id="RTX 3090"), pytest.param(90, 227 * 1024, id="H100")],
)
def test_every_kernel_compiles(capability: int, shared: int, tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    environment["CUDA_VISIBLE_DEVICES"] = ""
    module = "tests.modeling.kernels.compile_kernels"
    command = [sys.executable, "-m", module, str(capability), str(shared)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr[-3000:]
    made = [json.loads(line) for line in done.stdout.splitlines()]
    assert {launch["kernel"] for launch in made} == launched_kernels()
    assert not [launch for launch in made if launch["shared"] > shared]
