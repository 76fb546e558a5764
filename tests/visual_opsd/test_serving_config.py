# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The command that gives an existing folder what serving code reads."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from modeling.release.fingerprints import weights_fingerprint
from modeling.release.serving_config import SERVING_FILES
from scripts.visual_opsd.serving_config import main


@pytest.fixture
def release(tmp_path: Path, tiny_bagel_path: Path) -> Path:
    """A release as early BAGEL snapshots were: config.json is no JSON."""
    folder = Path(shutil.copytree(tiny_bagel_path, tmp_path / "release"))
    (folder / "config.json").write_text('{"model_type": "bagel",}')
    return folder


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {f.name: (f.read_bytes(), f.stat().st_mtime_ns) for f in folder.iterdir()}


def test_a_folder_is_mended_once(release: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, fingerprint = contents(release), weights_fingerprint(release, drawing=True)
    assert main([str(release)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"{release / 'config.json'}: written; it was no JSON: ")
    assert said[1] == f"{release / 'preprocessor_config.json'}: written; it was missing"
    mended = contents(release)
    assert mended.keys() == before.keys() | set(SERVING_FILES)
    assert all(mended[name] == before[name] for name in before.keys() - set(SERVING_FILES))
    assert weights_fingerprint(release, drawing=True) == fingerprint
    assert main([str(release)]) == 0
    assert contents(release) == mended, "nothing is written a second time"
    assert capsys.readouterr().out.count("kept as it is") == 2


def test_a_write_that_fails_leaves_the_old_file(
    release: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(release)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ValueError, match=r"writing to .* failed: No space left on device"):
        main([str(release)])
    assert contents(release) == before


def test_what_is_no_release_is_refused(release: Path) -> None:
    before = contents(release)
    with pytest.raises(ValueError, match=r"the checkpoint folder .* does not exist"):
        main([str(release / "nowhere")])
    (release / "vit_config.json").unlink()
    with pytest.raises(ValueError, match=r"vit_config\.json is missing"):
        main([str(release)])
    (release / "model.safetensors").rename(release / "ae.safetensors")
    with pytest.raises(ValueError, match="has no weights"):
        main([str(release)])
    shutil.copy(release / "ae.safetensors", release / "model.safetensors")
    text = before["vit_config.json"][0].replace(
        b'"num_hidden_layers": 3', b'"num_hidden_layers": 4'
    )
    (release / "vit_config.json").write_bytes(text)
    with pytest.raises(ValueError, match="do not fit the model its configuration describes"):
        main([str(release)])
    assert not (release / "preprocessor_config.json").exists()
    assert (release / "config.json").read_bytes() == before["config.json"][0]
