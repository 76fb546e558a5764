# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Reading and writing checkpoint folders."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import modeling.release.checkpoint as checkpoint
import modeling.release.weight_files as weight_files
from modeling import load_bagel, save_bagel
from modeling.bagel.bagel import Bagel
from modeling.bagel.embeddings import sincos_table
from modeling.bagel.projections import adjoining
from modeling.release.checkpoint import is_generation_key, iter_weights, locate_weights
from modeling.release.weight_files import StoredTensor, open_weights, read_file, write_weights

VIT_TABLE, LATENT_TABLE = checkpoint.VIT_TABLE, checkpoint.LATENT_TABLE
HEAD = "language_model.lm_head.weight"
EMBEDDING = "language_model.model.embed_tokens.weight"
Tensors = dict[str, Tensor]


@pytest.fixture(scope="session")
def tiny(tiny_bagel_path: Path) -> Tensors:
    return load_file(tiny_bagel_path / "model.safetensors")


@pytest.fixture
def make_base(tmp_path: Path, tiny_bagel_path: Path) -> Callable[..., Path]:
    """A copy of the tiny checkpoint with other tensors, under another weight file's name."""

    def make(tensors: Tensors, name: str = "model", ae: bool = False) -> Path:
        folder = tmp_path / "base"
        folder.mkdir()
        for file in tiny_bagel_path.iterdir():
            if file.name != "model.safetensors" and (ae or file.name != "ae.safetensors"):
                shutil.copyfile(file, folder / file.name)
        save_file(tensors, folder / f"{name}.safetensors")
        return folder

    return make


def cast(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    return {key: tensor.to(dtype) for key, tensor in tensors.items()}


def assert_same(actual: Tensors, expected: Tensors) -> None:
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        assert actual[key].dtype == tensor.dtype, key
        assert torch.equal(actual[key].view(torch.uint8), tensor.view(torch.uint8)), key


# -- loading ----------------------------------------------------------------------------------


def test_understanding_branch_only(
    tiny: Tensors, tiny_bagel_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    get = StoredTensor.get

    def recorded(self: StoredTensor, *args: Any, **kwargs: Any) -> Tensor:
        read.append(self.key)
        return get(self, *args, **kwargs)

    monkeypatch.setattr(StoredTensor, "get", recorded)
    bundle = load_bagel(tiny_bagel_path)
    expected = {key: value for key, value in tiny.items() if not is_generation_key(key)}
    assert sorted(read) == sorted(expected)
    assert 0 < len(expected) < len(tiny)
    assert_same(bundle.model.state_dict(), expected)
    frozen = [name for name, p in bundle.model.named_parameters() if not p.requires_grad]
    assert frozen == [VIT_TABLE]
    assert not any(buffer.is_meta for buffer in bundle.model.buffers())
    assert bundle.special_tokens.bos == bundle.tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert bundle.config.vit_max_patches_per_side == 70
    assert bundle.vae is None


def test_generation_branch_goes_the_same_way(tiny: Tensors, tiny_bagel_path: Path) -> None:
    assert_same(load_bagel(tiny_bagel_path, visual_gen=True).model.state_dict(), tiny)


def test_dtype_and_own_memory(tiny: Tensors, make_base: Callable[..., Path]) -> None:
    base = make_base(cast(tiny, torch.bfloat16))
    model = load_bagel(base).model
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.state_dict()[HEAD], tiny[HEAD].bfloat16().float())
    half = load_bagel(base, dtype=torch.bfloat16).model
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    with torch.no_grad():  # stored and loaded dtype agree: still not a view of the file
        half.get_parameter(HEAD).zero_()
    assert_same(load_file(base / "model.safetensors"), cast(tiny, torch.bfloat16))
    assert half.get_parameter(HEAD).untyped_storage().nbytes() == half.get_parameter(HEAD).nbytes


def test_ema_is_read_where_there_is_no_model(tiny: Tensors, make_base: Callable[..., Path]) -> None:
    base = make_base(tiny, "ema")
    assert load_bagel(base).model.get_parameter(HEAD).equal(tiny[HEAD])
    save_file({**tiny, HEAD: tiny[HEAD] + 1}, base / "model.safetensors")
    assert load_bagel(base).model.get_parameter(HEAD).equal(tiny[HEAD] + 1)
    for name in ("ema", "model"):
        (base / f"{name}.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors .* is missing \(found"):
        load_bagel(base)


def test_the_module_is_built_once(tiny_bagel_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = []

    class Counted(Bagel):
        def __init__(self, config: Any) -> None:
            built.append(config)
            super().__init__(config)

    monkeypatch.setattr(checkpoint, "Bagel", Counted)
    assert isinstance(load_bagel(tiny_bagel_path).model, Counted)
    assert len(built) == 1


def test_a_file_is_opened_once(tiny_bagel_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path] = []

    def counted(file: Path, **kwargs: Any) -> Any:
        opened.append(file)
        return safe_open(file, **kwargs)

    monkeypatch.setattr(weight_files, "safe_open", counted)
    load_bagel(tiny_bagel_path)
    assert opened == [tiny_bagel_path / "model.safetensors"]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("visual_gen", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loading_to_a_gpu(dtype: torch.dtype, visual_gen: bool, tiny_bagel_path: Path) -> None:
    plain = load_bagel(tiny_bagel_path, dtype=dtype, visual_gen=visual_gen).model
    model = load_bagel(tiny_bagel_path, device="cuda", dtype=dtype, visual_gen=visual_gen).model
    state = model.state_dict()
    assert {tensor.device.type for tensor in state.values()} == {"cuda"}
    assert_same({key: tensor.cpu() for key, tensor in state.items()}, plain.state_dict())
    layer = "language_model.model.layers.0.self_attn."
    joined = adjoining([state[f"{layer}{name}_proj.weight"] for name in "qkv"])
    assert joined is not None, "q, k and v would be three products"


def test_index(tiny: Tensors, make_base: Callable[..., Path]) -> None:
    keys = list(tiny)
    parts = {"one.safetensors": keys[::2], "two.safetensors": keys[1::2]}
    base = make_base({key: tiny[key] for key in parts["one.safetensors"]}, "one")
    index = {key: file for file, part in parts.items() for key in part}
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    with pytest.raises(ValueError, match=r"names two\.safetensors, which .* lacks"):
        load_bagel(base)
    two = {key: tiny[key] for key in parts["two.safetensors"]}
    save_file({k: v for k, v in two.items() if k != keys[1]}, base / "two.safetensors")
    with pytest.raises(ValueError, match=f"lacks 1 tensors its index promises, e.g. .*{keys[1]}"):
        load_bagel(base)
    save_file({**two, "not.in.the.index": tiny[HEAD]}, base / "two.safetensors")
    assert_same(load_bagel(base, visual_gen=True).model.state_dict(), tiny)
    with pytest.warns(UserWarning, match="ae.safetensors"):
        saved = save_bagel([], base.with_name("out"), base=base)
    assert saved is not None and not (saved / "model.safetensors.index.json").exists()
    assert_same(load_file(saved / "model.safetensors"), tiny)
    (base / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a safetensors index"):
        load_bagel(base)


def test_absent_tables_are_computed(tiny: Tensors, make_base: Callable[..., Path]) -> None:
    tables = (VIT_TABLE, LATENT_TABLE)
    base = make_base({k: v for k, v in tiny.items() if k not in tables}, ae=True)
    assert_same(load_bagel(base, visual_gen=True).model.state_dict(), tiny)
    saved = save_bagel([], base.with_name("out"), base=base)
    assert saved is not None
    assert_same(load_file(saved / "model.safetensors"), tiny)


def test_table_sides_come_from_the_file(tiny: Tensors, make_base: Callable[..., Path]) -> None:
    patch_table = "vit_model.vision_model.embeddings.position_embedding.weight"
    small = {**tiny, patch_table: tiny[patch_table][:64], VIT_TABLE: sincos_table(64, 8)}
    base = make_base(small)
    assert load_bagel(base).config.vit_max_patches_per_side == 8
    save_file({**small, patch_table: tiny[patch_table][:65]}, base / "model.safetensors")
    with pytest.raises(ValueError, match="has 65 rows, not a square number"):
        load_bagel(base)
    save_file({**small, VIT_TABLE: sincos_table(64, 9)}, base / "model.safetensors")
    with pytest.raises(ValueError, match=r"vit_pos_embed.pos_embed: found \[81, 64\]"):
        load_bagel(base)


def test_one_error_names_all_that_does_not_fit(
    tiny: Tensors, make_base: Callable[..., Path]
) -> None:
    wrong = dict(tiny)
    del wrong["connector.fc1.bias"]
    del wrong["language_model.model.norm.weight"]
    wrong["stranger.weight"] = torch.zeros(2)
    wrong["connector.fc2.weight"] = torch.zeros(64, 63)
    wrong["connector.fc2.bias"] = torch.zeros(64, dtype=torch.int8)
    with pytest.raises(ValueError) as caught:
        load_bagel(make_base(wrong))
    text = str(caught.value)
    assert "2 missing: connector.fc1.bias; language_model.model.norm.weight" in text or (
        "2 missing: language_model.model.norm.weight; connector.fc1.bias" in text
    )
    assert "1 unexpected: stranger.weight" in text
    assert "1 of another shape: connector.fc2.weight: found [64, 63], expected [64, 64]" in text
    assert "1 not stored in a floating dtype: connector.fc2.bias: I8" in text
    assert "num_hidden_layers" in text and "bf16 or fp32" in text and "save_bagel" in text


def test_what_does_not_fit_is_listed(tiny: Tensors, make_base: Callable[..., Path]) -> None:
    base = make_base({"module." + key: value for key, value in tiny.items()})
    with pytest.raises(ValueError, match=r"unexpected: module\.\w+.*bare names") as caught:
        load_bagel(base)
    assert "; ..." in str(caught.value) and len(str(caught.value)) < 5000

    def fails(tensors: Tensors, listed: str, visual_gen: bool = False) -> None:
        save_file(tensors, base / "model.safetensors")
        with pytest.raises(ValueError, match=listed):
            load_bagel(base, visual_gen=visual_gen)

    understanding = {k: v for k, v in tiny.items() if not is_generation_key(k)}
    fails(understanding, "missing: .*saved without the drawing branch", visual_gen=True)
    fails({k: v for k, v in tiny.items() if k != HEAD}, f"1 missing: {HEAD}. .*a head of their own")
    shallow = {k: v for k, v in tiny.items() if "language_model.model.layers.2." not in k}
    fails(shallow, r"missing: language_model.model.layers.2.*num_hidden_layers")
    extra = {k.replace("layers.2.", "layers.3."): v.clone() for k, v in tiny.items()}
    fails({**extra, **tiny}, r"unexpected: .*language_model.model.layers.3.*num_hidden_layers")
    patch = "vit_model.vision_model.embeddings.patch_embedding.weight"
    convolution = {**tiny, patch: tiny[patch].reshape(32, 3, 14, 14)}
    fails(convolution, rf"{patch}: found \[32, 3, 14, 14\], expected \[32, 588\]")


def test_wrong_vocabulary(tiny: Tensors, make_base: Callable[..., Path]) -> None:
    base = make_base({**tiny, EMBEDDING: tiny[EMBEDDING][:1400]})
    with pytest.raises(ValueError, match=r"1400 rows but llm_config.json says vocab_size 1408"):
        load_bagel(base)
    config = json.loads((base / "llm_config.json").read_text())
    (base / "llm_config.json").write_text(json.dumps({**config, "vocab_size": 1300}))
    cut = {**tiny, EMBEDDING: tiny[EMBEDDING][:1300], HEAD: tiny[HEAD][:1300]}
    save_file(cut, base / "model.safetensors")
    with pytest.raises(ValueError, match="tokenizer has 1318 tokens but the embedding only 1300"):
        load_bagel(base)


def test_absent_checkpoint(tmp_path: Path, tiny: Tensors, make_base: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match=r"does not exist; give the path .*download_model.py"):
        load_bagel(tmp_path / "ThinkMorph" / "ThinkMorph-7B")
    with pytest.raises(ValueError, match=r"has no weights: .*found nothing"):
        load_bagel(tmp_path)
    base = make_base(tiny)
    (base / "llm_config.json").unlink()
    with pytest.raises(ValueError, match=r"llm_config\.json is missing"):
        load_bagel(base)


@pytest.mark.parametrize("length", [0, 5, 1000, 100_000, -1])
def test_truncated_file(length: int, tiny: Tensors, make_base: Callable[..., Path]) -> None:
    file = make_base(tiny) / "model.safetensors"
    damaged(file, file.read_bytes()[:length])


@pytest.mark.parametrize("more", [1, 8])
def test_bytes_behind_the_last_tensor(
    more: int, tiny: Tensors, make_base: Callable[..., Path]
) -> None:
    """Another file was appended, or a longer one overwritten: it is not what was written."""
    file = make_base(tiny) / "model.safetensors"
    damaged(file, file.read_bytes() + bytes(more))


def damaged(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    why = rf"its {len(content)} bytes are no safetensors file \(.*\)\. .*fetch it again"
    with pytest.raises(ValueError, match=rf"{file.name} cannot be read: {why}"):
        load_bagel(file.parent)


def test_a_pointer_of_git_lfs(tiny: Tensors, make_base: Callable[..., Path]) -> None:
    file = make_base(tiny) / "model.safetensors"
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\nsize 1\n")
    with pytest.raises(ValueError, match="git lfs pull"):
        load_bagel(file.parent)


def test_reading_by_key(tiny: Tensors, tiny_bagel_path: Path) -> None:
    config, sources = locate_weights(tiny_bagel_path)
    assert config.llm.num_hidden_layers == 3
    assert list(sources) == list(load_bagel(tiny_bagel_path).model.state_dict())
    assert torch.equal(sources[HEAD].get(dtype=torch.bfloat16), tiny[HEAD].bfloat16())
    read = dict(iter_weights(tiny_bagel_path))
    assert_same(read, {key: tiny[key] for key in sources})
    assert open_weights(tiny_bagel_path)["vae2llm.bias"].shape == (64,)


# -- saving -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["model", "ema"])
def test_untrained_round_trip_is_bit_equal(
    dtype: torch.dtype, name: str, tiny: Tensors, make_base: Callable[..., Path]
) -> None:
    base = make_base(cast(tiny, dtype), name, ae=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        saved = save_bagel(load_bagel(base).model, base.with_name("out"), base=base)
    assert saved == base.with_name("out")
    assert_same(load_file(saved / "model.safetensors"), cast(tiny, dtype))
    copied = {file.name for file in base.iterdir()} - {f"{name}.safetensors"}
    written = {"model.safetensors", "README.md", "preprocessor_config.json"}
    assert {file.name for file in saved.iterdir()} == copied | written
    for file in copied:
        assert (saved / file).read_bytes() == (base / file).read_bytes(), file
    with safe_open(saved / "model.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    assert [*read_file(saved / "model.safetensors")] == [*read_file(base / f"{name}.safetensors")]


def test_the_shipped_checkpoint_round_trips(
    tiny: Tensors, tiny_bagel_path: Path, tmp_path: Path
) -> None:
    saved = save_bagel(load_bagel(tiny_bagel_path).model, tmp_path / "out", base=tiny_bagel_path)
    assert saved is not None
    assert_same(load_file(saved / "model.safetensors"), tiny)
    for file in tiny_bagel_path.iterdir():
        if file.name != "model.safetensors":
            assert (saved / file.name).read_bytes() == file.read_bytes(), file


def test_trained_tensors_in_any_order(tiny: Tensors, make_base: Callable[..., Path]) -> None:
    base = make_base(cast(tiny, torch.bfloat16))
    model = load_bagel(base).model
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.37)
    trained = dict(model.named_parameters())
    items = ((key, trained[key].t().contiguous().t() if trained[key].ndim == 2 else trained[key])
             for key in reversed(trained))  # fmt: skip
    with pytest.warns(UserWarning, match="VLMEvalKit"):
        saved = save_bagel(items, base.with_name("out"), base=base)
    assert saved is not None
    expected = cast(tiny, torch.bfloat16)
    for key, parameter in trained.items():
        if key != VIT_TABLE:
            expected[key] = (tiny[key].bfloat16().float() + 0.37).bfloat16()
            assert not torch.equal(expected[key], tiny[key].bfloat16()), key
            assert parameter.dtype == torch.float32
    assert_same(load_file(saved / "model.safetensors"), expected)


def test_mixed_dtypes_stay_readable(tiny: Tensors, make_base: Callable[..., Path]) -> None:
    """A base in two files can interleave dtypes; offsets must stay aligned for readers."""
    odd = {"connector.fc1.bias": torch.zeros(64).bfloat16(), "a.odd": torch.ones(3).bfloat16()}
    base = make_base({"a.odd": odd["a.odd"]}, "one")
    rest = {**tiny, "connector.fc1.bias": odd["connector.fc1.bias"]}
    save_file(rest, base / "two.safetensors")
    index = {"a.odd": "one.safetensors", **dict.fromkeys(rest, "two.safetensors")}
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    with pytest.warns(UserWarning):
        saved = save_bagel([(HEAD, tiny[HEAD])], base.with_name("out"), base=base)
    assert saved is not None
    assert_same(load_file(saved / "model.safetensors"), {**rest, **odd})
    for stored in read_file(saved / "model.safetensors").values():
        assert stored.start % (2 if stored.dtype == "BF16" else 4) == 0


def test_base_without_generation_branch(tiny: Tensors, make_base: Callable[..., Path]) -> None:
    understanding = {k: v for k, v in tiny.items() if not is_generation_key(k)}
    base = make_base({k: v for k, v in understanding.items() if k != VIT_TABLE})
    with pytest.warns(UserWarning, match=r"generation weights.*ae\.safetensors.*VLMEvalKit"):
        saved = save_bagel([], base.with_name("out"), base=base)
    assert saved is not None
    assert_same(load_file(saved / "model.safetensors"), understanding)
    assert_same(load_bagel(saved).model.state_dict(), understanding)


@pytest.mark.parametrize(
    ("key", "change", "why"),
    [
        ("module." + HEAD, lambda t: t, r"no tensor 'module\.language_model.*prefixes of wrappers"),
        (HEAD, lambda t: t[:-1], r"lm_head.weight' has shape \[1407, 64\], expected \[1408, 64\]"),
        ("connector.fc1.bias", lambda t: t, "'connector.fc1.bias' was given twice"),
    ],
)
def test_bad_tensor_leaves_nothing_behind(
    key: str,
    change: Callable[[Tensor], Tensor],
    why: str,
    tiny: Tensors,
    tiny_bagel_path: Path,
    tmp_path: Path,
) -> None:
    driven: list[str] = []

    def items() -> Iterator[tuple[str, Tensor]]:
        source = tiny[key.removeprefix("module.")]
        first = ("connector.fc1.bias", tiny["connector.fc1.bias"])
        last = ("connector.fc2.bias", tiny["connector.fc2.bias"])
        for name, tensor in (first, (key, change(source)), last):
            driven.append(name)
            yield name, tensor

    with pytest.raises(ValueError, match=why):
        save_bagel(items(), tmp_path / "out", base=tiny_bagel_path)
    assert driven[-1] == "connector.fc2.bias", "other ranks would hang in the last gather"
    assert list(tmp_path.iterdir()) == []


def test_other_ranks_only_drive_the_iterable(tiny: Tensors, tiny_bagel_path: Path) -> None:
    driven: list[str] = []

    def items() -> Iterator[tuple[str, Tensor]]:
        for key, tensor in tiny.items():
            driven.append(key)
            yield key, tensor

    assert save_bagel(items(), None, base=tiny_bagel_path) is None
    assert driven == list(tiny)


def test_existing_folder(tiny: Tensors, tiny_bagel_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    save_bagel([], out, base=tiny_bagel_path)
    (out / "mine.txt").write_text("kept unless replaced")
    with pytest.raises(ValueError, match=r"exists already; .*overwrite=True"):
        save_bagel([], out, base=tiny_bagel_path)
    with pytest.raises(ValueError, match="no tensor 'x'"):
        save_bagel([("x", tiny[HEAD])], out, base=tiny_bagel_path, overwrite=True)
    assert (out / "mine.txt").exists()
    stale = out.with_name("out.tmp")
    stale.mkdir()
    (stale / "half.safetensors").write_text("of a killed run")
    save_bagel([(HEAD, tiny[HEAD] + 1)], out, base=tiny_bagel_path, overwrite=True)
    assert [entry.name for entry in out.parent.iterdir()] == ["out"]
    assert not (out / "mine.txt").exists() and not (out / "half.safetensors").exists()
    # A run may also continue over its own base: the new folder is complete before the swap.
    save_bagel([("connector.fc1.bias", torch.ones(64))], out, base=out, overwrite=True)
    both = load_file(out / "model.safetensors")
    assert both[HEAD].equal(tiny[HEAD] + 1) and both["connector.fc1.bias"].equal(torch.ones(64))


def test_all_is_on_the_disk_before_it_has_its_name(
    tiny_bagel_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[Path] = []
    monkeypatch.setattr(
        os, "fsync", lambda number: flushed.append(Path(os.readlink(f"/proc/self/fd/{number}")))
    )
    out = save_bagel([], tmp_path / "out", base=tiny_bagel_path)
    assert out is not None
    temporary = tmp_path / "out.tmp"
    assert set(flushed[:-2]) == {temporary / file.name for file in out.iterdir()}
    assert flushed[-2:] == [temporary, tmp_path], "the entries of the folder, then its name"


def test_errors_before_writing(
    tiny: Tensors,
    make_base: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = make_base({**tiny, "connector.fc1.bias": torch.zeros(64, dtype=torch.int8)})
    out = base.with_name("out")
    with pytest.raises(ValueError, match=r"floating-point weights, found .*fc1.bias \(I8\)"):
        save_bagel([], out, base=base)
    save_file(tiny, base / "model.safetensors")
    usage = shutil.disk_usage(base)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with (
        pytest.warns(UserWarning),
        pytest.raises(ValueError, match=r"needs \d+\.\d MB but .* has 1\.0 MB free"),
    ):
        save_bagel([], out, base=base)
    (base / "vit_config.json").unlink()
    with pytest.raises(ValueError, match=r"vit_config\.json is missing"):
        save_bagel([], out, base=base)
    assert [entry.name for entry in base.parent.iterdir()] == ["base"]


def test_float16_overflow_is_named(tiny: Tensors, make_base: Callable[..., Path]) -> None:
    base = make_base(cast(tiny, torch.float16), ae=True)
    bias = torch.zeros(64)
    bias[3] = 7e4
    with pytest.raises(ValueError, match=r"'connector.fc1.bias' holds values beyond float16's"):
        save_bagel([("connector.fc1.bias", bias)], base.with_name("out"), base=base)
    bias[3] = float("nan")  # not ours to judge here; the trainer stops on it
    saved = save_bagel([("connector.fc1.bias", bias)], base.with_name("out"), base=base)
    assert saved is not None
    assert load_file(saved / "model.safetensors")["connector.fc1.bias"][3].isnan()


def test_model_card(tiny: Tensors, make_base: Callable[..., Path]) -> None:
    base = make_base(tiny, ae=True)
    out = base.with_name("out")
    run = {"teacher": {"mode": "ema", "decay": 0.995}, "results_dir": Path("results/x"), "n": None}
    save_bagel([], out, base=base, step=500, run_config=run)
    card = (out / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["license"] == "unknown"
    assert "Optimiser step: 500" in card
    recorded = yaml.safe_load(card.split("```yaml")[1].split("```")[0])
    assert recorded == {**run, "results_dir": "results/x"}
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\nThe base.\n")
    save_bagel([], out, base=base, overwrite=True)
    card = (out / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1]) == {
        "license": "apache-2.0",
        "base_model": "base",
        "tags": ["visual-opsd"],
    }
    assert str(base.parent) not in card


def test_writer_refuses_an_incomplete_file(tmp_path: Path) -> None:
    layout = {"a": ("F32", (2,)), "b": ("BF16", ())}
    with (
        pytest.raises(AssertionError, match="never written"),
        write_weights(tmp_path / "x", layout) as w,
    ):
        w.write("a", torch.ones(2))
    with write_weights(tmp_path / "x", layout) as writer:
        writer.write("b", torch.tensor(2.0))
        writer.write("a", torch.ones(2))
    assert load_file(tmp_path / "x")["b"] == 2


# -- memory -----------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_saving_needs_about_one_tensor(
    tiny: Tensors, tmp_path: Path, tiny_bagel_path: Path
) -> None:
    """200 MB base, half trained: extra memory is the one trained tensor being written."""
    rows, count = 131_072, 12  # 16 MiB each in bf16, 32 MiB in the trainer's fp32
    base = tmp_path / "base"
    base.mkdir()
    for name in ("llm_config.json", "vit_config.json"):
        shutil.copyfile(tiny_bagel_path / name, base / name)
    big = {f"big.{i}": ("BF16", (rows, 64)) for i in range(count)}
    small = {key: ("BF16", tuple(value.shape)) for key, value in tiny.items()}
    with write_weights(base / "model.safetensors", {**big, **small}) as writer:
        for i in range(count):
            writer.write(f"big.{i}", torch.full((rows, 64), float(i)))
        for key, value in tiny.items():
            writer.write(key, value)
    out = tmp_path / "out"
    # In a process of its own: of this one the allocator keeps what other tests have freed. There
    # glibc shall give back at once what is freed.
    command = [sys.executable, "-m", "tests.modeling.release.saving_memory"]
    done = subprocess.run(
        [*command, str(base), str(out), str(rows), str(count)],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parents[3],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    extra = int(done.stdout) / 2**20
    print(f"extra anonymous memory: {extra:.0f} MiB")
    # One fp32 tensor (32) and a piece of it or of an untouched one (up to 16), not six (192).
    assert 16 < extra < 80, f"{extra:.0f} MiB"
    written = open_weights(out)
    for i in range(count):
        value = written[f"big.{i}"].get()
        assert torch.equal(value, torch.full_like(value, i if i % 2 else -i)), i
