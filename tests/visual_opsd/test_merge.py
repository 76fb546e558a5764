# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The command that merges an adapter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from modeling.bagel.adapters import AdapterConfig
from modeling.release.adapters import save_adapter
from modeling.release.weight_files import open_weights
from scripts.visual_opsd.merge import main
from tests.conftest import TINY_BAGEL


def test_right_and_wrong_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter, base, out = tmp_path / "adapter", str(TINY_BAGEL), str(tmp_path / "out")
    config = AdapterConfig(2, 4, ("connector.fc2",))
    pair = {f"connector.fc2.lora_{which}.weight": torch.ones(shape)
            for which, shape in (("A", (2, 64)), ("B", (64, 2)))}  # fmt: skip
    save_adapter(pair, adapter, base=base, config=config)
    lora = str(adapter)
    for words, why in {
        (base, lora, out): "it is a release folder; ADAPTER comes before BASE",
        (lora, lora, out): "adapter has no weights: model.safetensors",
        (base, base, out): "it is a release folder; ADAPTER comes before BASE",
        (out, base, lora): f"OUT {lora} exists already",
        (lora, base, base): f"OUT {base} exists already",
        (lora, out, out): "the checkpoint folder .* does not exist",
        (f"{out}/nothing", base, out): "there is no folder .*nothing",
        (f"{lora}/README.md", base, out): "there is no folder .*README.md",
        (lora, base, f"{lora}/README.md/out"): "File exists",
    }.items():
        with pytest.raises(ValueError, match=why) as raised:
            main(words)
        assert "\n" not in str(raised.value), raised.value
    for wrong in ([lora, base], [lora, base, out, "more"], [lora, base, ""]):
        with pytest.raises(SystemExit) as ended:
            main(wrong)
        assert ended.value.code == 2
    assert [entry.name for entry in tmp_path.iterdir()] == ["adapter"]
    assert main([lora, base, out]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    base_weight = open_weights(base)["connector.fc2.weight"].get()
    # 4 / 2 * (1 * 1 + 1 * 1)
    assert torch.equal(open_weights(out)["connector.fc2.weight"].get(), base_weight + 4)
