# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Fingerprints: equal for copies, different for other contents, also of files that are sampled."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from modeling.release import fingerprints
from modeling.release.fingerprints import file_fingerprint, weights_fingerprint
from tests.conftest import TINY_BAGEL


def test_fingerprint_tells_weights_apart(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    data = bytearray((TINY_BAGEL / "model.safetensors").read_bytes())
    (copy / "model.safetensors").write_bytes(data)
    assert weights_fingerprint(copy) == weights_fingerprint(TINY_BAGEL)
    data[-3] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    assert weights_fingerprint(copy) != weights_fingerprint(TINY_BAGEL)


@pytest.mark.parametrize("place", [0, 8192, -1])
def test_large_tensors_are_sampled_at_both_ends_and_in_the_middle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    monkeypatch.setattr(fingerprints, "_WHOLE_BYTES", 0)
    tensor = torch.zeros(16384)  # 64 KiB
    save_file({"a": tensor}, tmp_path / "model.safetensors")
    before = weights_fingerprint(tmp_path)
    tensor[place] = 1
    save_file({"a": tensor}, tmp_path / "model.safetensors")
    assert weights_fingerprint(tmp_path) != before


def test_the_drawing_branch_counts_where_it_is_asked_for(tmp_path: Path) -> None:
    found = []
    for part in (0.0, 1.0):
        save_file({"a": torch.zeros(4), "vae2llm.bias": torch.full((4,), part)},
                  tmp_path / "model.safetensors")  # fmt: skip
        found.append([weights_fingerprint(tmp_path, drawing=drawing) for drawing in (False, True)])
    (plain, whole), (same, other) = found
    assert plain == same and whole != other and plain != whole


@pytest.mark.parametrize("sampled", [False, True])
def test_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampled: bool) -> None:
    size = 9 << 20
    if sampled:
        monkeypatch.setattr(fingerprints, "_WHOLE_BYTES", size - 1)
    path, found = tmp_path / "file", set()
    for place in (None, 0, size // 63 * 20, size - 1):
        data = bytearray(size)
        if place is not None:
            data[place] = 1
        path.write_bytes(data)
        found.add(file_fingerprint(path))
    path.write_bytes(bytes(size + 1))
    found.add(file_fingerprint(path))
    assert len(found) == 5
    path.rename(tmp_path / "other")
    assert file_fingerprint(tmp_path / "other") in found
