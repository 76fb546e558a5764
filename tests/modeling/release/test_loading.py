# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""`load_bagel` where threads read the weights."""

from __future__ import annotations

import gc
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import modeling.release.checkpoint as checkpoint
import modeling.release.weight_files as weight_files
from modeling import load_bagel
from modeling.bagel.bagel import Bagel
from modeling.release.checkpoint import is_generation_key, locate_weights
from modeling.release.weight_files import StoredTensor, open_weights, read_file
from modeling.release.weight_stream import calm_interpreter, stream_weights, streaming
from tests.modeling.release.test_weight_stream import (
    Sources,
    assert_same,
    empty_like,
    needs_gpu,
    write_by_hand,
)


@pytest.fixture
def streamed(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The keys that `load_bagel` leaves to threads."""
    keys: set[str] = set()

    def recorded(sources: Sources, device: torch.device) -> Any:
        keys.update(sources)
        return streaming(sources, device)

    monkeypatch.setattr(checkpoint, "streaming", recorded)
    return keys


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The road to a GPU, for the CPU too."""
    monkeypatch.setattr(checkpoint, "_streams", lambda device: True)


def copy_with(tensors: dict[str, Tensor], source: Path, folder: Path) -> Path:
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            shutil.copyfile(file, folder / file.name)
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("visual_gen", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loading_by_threads(
    dtype: torch.dtype,
    visual_gen: bool,
    tiny_bagel_path: Path,
    streamed: set[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    eager = load_bagel(tiny_bagel_path, dtype=dtype, visual_gen=visual_gen).model.state_dict()
    assert not streamed
    monkeypatch.setattr(checkpoint, "_streams", lambda device: True)
    one_by_one, get = [], StoredTensor.get

    def recorded(self: StoredTensor, *args: Any) -> Tensor:
        one_by_one.append(self.key)
        return get(self, *args)

    monkeypatch.setattr(StoredTensor, "get", recorded)
    model = load_bagel(tiny_bagel_path, dtype=dtype, visual_gen=visual_gen).model
    assert streamed == eager.keys() and not streamed & set(one_by_one)
    assert_same(dict(model.state_dict()), dict(eager))
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert checkpoint.VIT_TABLE in frozen and len(frozen) == 1 + visual_gen


@pytest.mark.usefixtures("on_cpu")
def test_computed_tables_join_what_threads_read(
    tiny_bagel_path: Path, tmp_path: Path, streamed: set[str]
) -> None:
    tensors = load_file(tiny_bagel_path / "model.safetensors")
    understanding = {k: t for k, t in tensors.items() if not is_generation_key(k)}
    lacking = {k: t for k, t in understanding.items() if k != checkpoint.VIT_TABLE}
    model = load_bagel(copy_with(lacking, tiny_bagel_path, tmp_path)).model
    assert streamed == lacking.keys()
    assert_same(dict(model.state_dict()), understanding)


@pytest.mark.usefixtures("on_cpu")
def test_a_file_that_does_not_fit_is_named_all_the_same(
    tiny_bagel_path: Path, tmp_path: Path
) -> None:
    """Reading has begun before the module says which tensors it wants."""
    tensors = load_file(tiny_bagel_path / "model.safetensors")
    tensors["connector.fc1.bias"] = torch.zeros(64, dtype=torch.int8)
    tensors["connector.fc2.weight"] = torch.zeros(64, 63)
    tensors["stranger.weight"] = torch.zeros(2)
    before = threading.active_count()
    with pytest.raises(ValueError, match=r"fc2.weight: found \[64, 63\].*") as caught:
        load_bagel(copy_with(tensors, tiny_bagel_path, tmp_path))
    assert "connector.fc1.bias: I8" in str(caught.value)
    assert "1 unexpected: stranger.weight" in str(caught.value)
    assert threading.active_count() == before and gc.isenabled()


@pytest.mark.usefixtures("on_cpu")
def test_loading_a_file_that_is_cut_meanwhile(
    tiny_bagel_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = load_file(tiny_bagel_path / "model.safetensors")
    file = copy_with(tensors, tiny_bagel_path, tmp_path) / "model.safetensors"
    open_whole = open_weights

    def then_cut(path: Path, weights: Any) -> Any:
        stored = open_whole(path, weights)
        os.truncate(file, file.stat().st_size - 8)
        return stored

    monkeypatch.setattr(checkpoint, "open_weights", then_cut)
    with pytest.raises(ValueError, match=rf"{file.name} cannot be read: it ends inside .*again"):
        load_bagel(tmp_path, visual_gen=True)


def test_when_threads_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """To a GPU, unless VISUAL_OPSD_EAGER says otherwise; never to other devices."""

    def streams(device: str) -> bool:
        return checkpoint._streams(torch.device(device))

    monkeypatch.delenv("VISUAL_OPSD_EAGER", raising=False)
    assert streams("cuda") and streams("cuda:1")
    assert not streams("cpu") and not streams("meta")
    for value in ("loading", "all", "rows,loading"):
        monkeypatch.setenv("VISUAL_OPSD_EAGER", value)
        assert not streams("cuda")
    monkeypatch.setenv("VISUAL_OPSD_EAGER", "rows")
    assert streams("cuda")


def test_the_module_is_built_once(tiny_bagel_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = []

    class Counted(Bagel):
        def __init__(self, config: Any) -> None:
            built.append(config)
            super().__init__(config)

    monkeypatch.setattr(checkpoint, "Bagel", Counted)
    assert isinstance(load_bagel(tiny_bagel_path).model, Counted)
    assert len(built) == 1


def test_the_collector_pauses_and_comes_back(
    tiny_bagel_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    build = checkpoint._build

    def watched(*args: Any) -> Any:
        seen.append(gc.isenabled())
        return build(*args)

    monkeypatch.setattr(checkpoint, "_build", watched)
    assert gc.isenabled()
    load_bagel(tiny_bagel_path)
    assert seen == [False] and gc.isenabled()
    with pytest.raises(KeyError), calm_interpreter():
        raise KeyError
    assert gc.isenabled()
    with calm_interpreter():
        with calm_interpreter():
            pass
        assert not gc.isenabled(), "it was off before, so it stays off"


def test_opening_maps_no_file(tiny_bagel_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path] = []

    def counted(file: Path, **kwargs: Any) -> Any:
        opened.append(file)
        return safe_open(file, **kwargs)

    monkeypatch.setattr(weight_files, "safe_open", counted)
    _, sources = locate_weights(tiny_bagel_path)
    stored = {k: s for k, s in sources.items() if isinstance(s, StoredTensor)}
    stream_weights(stored, empty_like(stored, torch.float32))
    assert opened == []
    for key in list(sources)[:3]:
        sources[key].get()
    assert len(opened) == 1, "one reader for all tensors of a file"


@pytest.mark.parametrize(
    "entries",
    [
        {"a": ("F32", [2], 0, 8), "b": ("F32", [2], 12, 20)},  # a hole
        {"a": ("F32", [2], 0, 8), "b": ("F32", [2], 4, 12)},  # twice the same bytes
        {"a": ("F32", [2], 8, 0), "b": ("F32", [4], 0, 16)},  # ends before it begins
        {"a": ("F32", [2], 0, 8), "b": ("BF16", [3], 8, 16)},  # more bytes than elements
    ],
)
def test_headers_that_misplace_tensors(entries: dict[str, Any], tmp_path: Path) -> None:
    """Found when the header is read: streaming never asks the library's reader."""
    size = max(stop for *_, stop in entries.values())
    file = write_by_hand(tmp_path / "model.safetensors", entries, bytes(size))
    with pytest.raises(ValueError, match=r"header is malformed \(the bytes of [ab] do not fit\)"):
        read_file(file)


@pytest.mark.cuda
@needs_gpu
@pytest.mark.parametrize("visual_gen", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loading_to_a_gpu_as_eagerly(
    dtype: torch.dtype,
    visual_gen: bool,
    tiny_bagel_path: Path,
    streamed: set[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load() -> dict[str, Tensor]:
        bundle = load_bagel(tiny_bagel_path, device="cuda", dtype=dtype, visual_gen=visual_gen)
        return dict(bundle.model.state_dict())

    monkeypatch.delenv("VISUAL_OPSD_EAGER", raising=False)
    by_threads = load()
    assert streamed == by_threads.keys()
    streamed.clear()
    monkeypatch.setenv("VISUAL_OPSD_EAGER", "loading")
    eager = load()
    assert not streamed
    assert {tensor.device.type for tensor in by_threads.values()} == {"cuda"}
    assert_same(by_threads, eager)
