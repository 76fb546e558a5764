# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Shared fixtures: recorded reference inputs and outputs ("goldens") and the tiny checkpoint."""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

if not torch.cuda.is_available():
    # Triton reads it when a kernel is defined; its interpreter takes tensors on the CPU.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from modeling.bagel.batch import PackedBatch
from tests.shell import write_program
from tests.visual_opsd.training_runs import make_world

TESTS = Path(__file__).parent
GOLDEN = TESTS / "golden"
TINY_BAGEL = TESTS / "tiny-bagel"

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

torch.set_num_threads(1)

# case -> worst |actual - expected| / (atol + rtol |expected|) and worst absolute difference.
_deviations: dict[str, dict[str, float]] = defaultdict(lambda: {"share": 0.0, "abs": 0.0})


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that hold a `slow` test come first, then those of many tests.

    pyproject.toml has xdist keep this order (by itself it goes by the number of tests), so that
    no core idles at the end while the other is in the middle of a long file.
    """
    counts = Counter(item.path for item in items)
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path not in slow, -counts[item.path]))


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A folder first on PATH, with an nvidia-smi that shows no GPU, whatever this machine has."""
    folder = tmp_path / "programs"
    write_program(folder / "nvidia-smi", "#!/bin/sh\nexit 9\n")
    return folder


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The maze data set of `make_world`, for all tests to read and none to write into."""
    folder = tmp_path_factory.mktemp("world")
    make_world(folder)
    made = _contents(folder)
    yield folder
    assert _contents(folder) == made, "a test wrote into the shared `world`"


def _contents(folder: Path) -> dict[Path, tuple[int, int]]:
    """Size and time of the last change of everything in a folder."""
    found = {path: path.stat() for path in folder.rglob("*")}
    return {path: (stat.st_size, stat.st_mtime_ns) for path, stat in found.items()}


def load_golden(name: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Description and tensors of one recorded case."""
    meta = json.loads((GOLDEN / f"{name}.json").read_text())
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    return meta, tensors


def assert_golden(
    meta: dict[str, Any], name: str, actual: torch.Tensor, expected: torch.Tensor
) -> None:
    """Compare as the case's json says (exact, or allclose with its tolerances)."""
    how = meta["tensors"][name]
    assert how["kind"] == "expected", f"{name} is an input of {meta['case']}"
    assert actual.shape == expected.shape, (name, actual.shape, expected.shape)
    if how["compare"] == "exact":
        assert torch.equal(actual, expected), f"{meta['case']}: {name} differs"
        return
    difference = (actual.double() - expected.double()).abs()
    bound = how["atol"] + how["rtol"] * expected.double().abs()
    worst = _deviations[meta["case"]]
    if difference.numel():
        worst["share"] = max(worst["share"], float((difference / bound).max()))
        worst["abs"] = max(worst["abs"], float(difference.max()))
    torch.testing.assert_close(actual, expected, atol=how["atol"], rtol=how["rtol"])


def assert_generation_pack(
    batch: PackedBatch, meta: dict[str, Any], t: dict[str, torch.Tensor]
) -> None:
    """The packed layout of golden 06: rows, positions and labels of text, ViT and latents."""
    assert batch.latents is not None
    for key, actual in {
        "packed_text_ids": batch.text_ids,
        "packed_text_indexes": batch.text_rows,
        "packed_position_ids": batch.position_ids,
        "packed_latent_position_ids": batch.latents.position_ids,
        "packed_vae_token_indexes": batch.latents.rows,
        "packed_vit_token_indexes": batch.vit_rows,
        "mse_loss_indexes": batch.latents.velocity_rows,
        "ce_loss_indexes": batch.score_rows,
        "packed_label_ids": batch.score_labels,
    }.items():
        assert torch.equal(actual, t[key]), key
    assert list(batch.layout.query_lens) == meta["batch"]["sample_lens"]


@pytest.fixture(scope="session")
def golden() -> Callable[[str], tuple[dict[str, Any], dict[str, torch.Tensor]]]:
    return load_golden


@pytest.fixture(scope="session")
def tiny_bagel_path() -> Path:
    return TINY_BAGEL


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand the deviations seen in one of xdist's processes to the one that reports."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["deviations"] = dict(_deviations)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    for case, worst in getattr(node, "workeroutput", {}).get("deviations", {}).items():
        for key, value in worst.items():
            _deviations[case][key] = max(_deviations[case][key], value)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the worst deviation of every golden, so that it can be quoted."""
    if not _deviations:
        return
    terminalreporter.section("worst deviation per golden (share of tolerance, absolute)")
    for case in sorted(_deviations):
        worst = _deviations[case]
        terminalreporter.write_line(
            f"{case}: {worst['share']:.3f} of tolerance, {worst['abs']:.2e}"
        )


os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
