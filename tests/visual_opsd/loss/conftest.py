# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Forms of the loss as fixtures."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from scripts.visual_opsd.loss import chunk
from tests.visual_opsd.loss.forms import Form, kernels_run


@pytest.fixture
def use_form(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Form]:
    """Switches to a form of the loss, whatever the device and dtype, with several blocks each."""

    def use(name: str) -> Form:
        form = Form(name)
        monkeypatch.setattr(chunk, "BLOCK_ELEMENTS", 3 * form.vocab + 1)
        monkeypatch.setattr("modeling.fast.runs_kernels", lambda path, tensor: name != "torch")
        if name != "torch":
            if not kernels_run():
                pytest.skip("Triton is absent, or was imported without TRITON_INTERPRET=1")
            from scripts.visual_opsd.loss import kernels, sparse_products

            monkeypatch.setattr(kernels, "READ_BLOCK", 256)
            monkeypatch.setattr(kernels, "PAIR_BLOCK", 128)
            monkeypatch.setattr(sparse_products, "HIDDEN_BLOCK", 16)
            ratio = 1 if name == "sparse" else 1 << 30
            monkeypatch.setattr(sparse_products, "DENSE_PER_SPARSE", ratio)
        return form

    return use


@pytest.fixture(params=["torch", "kernels", "sparse"])
def form(request: pytest.FixtureRequest, use_form: Callable[[str], Form]) -> Form:
    """Each form in turn."""
    return use_form(request.param)
