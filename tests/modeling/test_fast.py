# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The switch of the fast paths."""

from __future__ import annotations

import pytest
import torch

from modeling import fast


def test_names_turn_paths_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VISUAL_OPSD_EAGER", raising=False)
    assert all(fast.is_on(path) for path in fast.FAST_PATHS)
    monkeypatch.setenv("VISUAL_OPSD_EAGER", " decode, loss")
    assert [p for p in fast.FAST_PATHS if not fast.is_on(p)] == ["decode", "loss"]
    monkeypatch.setenv("VISUAL_OPSD_EAGER", "all")
    assert not any(fast.is_on(path) for path in fast.FAST_PATHS)


def test_an_unknown_name_is_an_error_that_lists_the_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VISUAL_OPSD_EAGER", "decoding")
    with pytest.raises(ValueError, match=r"names decoding; choose among .*decode.*, or all"):
        fast.is_on("rows")


def test_kernels_want_half_precision_on_a_gpu() -> None:
    assert not fast.runs_kernels("rows", torch.zeros(2))
    if torch.cuda.is_available() and fast.has_triton():
        assert not fast.runs_kernels("rows", torch.zeros(2, device="cuda"))
        assert fast.runs_kernels("rows", torch.zeros(2, device="cuda", dtype=torch.bfloat16))
