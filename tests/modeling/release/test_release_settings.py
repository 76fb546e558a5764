# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Configuration, tokenizer and index files of a release: one line for what cannot be right."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from modeling.bagel.config import read_llm_config, read_vision_config
from modeling.release.checkpoint import locate_weights
from modeling.release.tokenizer import load_tokenizer
from modeling.release.weight_files import open_weights, read_file

DEEP = "[" * 100_000


@pytest.fixture
def folder(tiny_bagel_path: Path, tmp_path: Path) -> Path:
    for file in tiny_bagel_path.iterdir():
        if file.suffix != ".safetensors":
            shutil.copyfile(file, tmp_path / file.name)
    return tmp_path


def change(folder: Path, name: str, **values: Any) -> None:
    known = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**known, **values}))


def refused(read: Callable[[], Any], *words: str) -> None:
    with pytest.raises(ValueError) as caught:
        read()
    text = str(caught.value)
    assert type(caught.value) is ValueError and "\n" not in text
    assert all(word in text for word in words), text


SIZES = ["64", -64, 0, 64.0, 1.5, True, [64], {"value": 64}, 10**30, "", float("nan")]


@pytest.mark.parametrize("value", SIZES, ids=repr)
def test_sizes(value: Any, folder: Path) -> None:
    for name, read, keys in (
        ("llm_config.json", read_llm_config, (
            "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "intermediate_size", "vocab_size", "max_position_embeddings")),
        ("vit_config.json", read_vision_config, (
            "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
            "patch_size", "num_channels")),
    ):  # fmt: skip
        before = (folder / name).read_text()
        for key in keys:
            change(folder, name, **{key: value})
            refused(partial(read, folder), str(folder / name), f"{key} is ", "whole num")
            (folder / name).write_text(before)


@pytest.mark.parametrize("value", ["1e6", None, 0, -1, float("nan"), float("inf"), True, [1], {}])
def test_numbers(value: Any, folder: Path) -> None:
    for name, read, key in (
        ("llm_config.json", read_llm_config, "rope_theta"),
        ("llm_config.json", read_llm_config, "rms_norm_eps"),
        ("vit_config.json", read_vision_config, "layer_norm_eps"),
    ):
        before = (folder / name).read_text()
        change(folder, name, **{key: value})
        refused(partial(read, folder), name, f"{key} is ", "must be a number between")
        (folder / name).write_text(before)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("llm_config.json", "rope_scaling", {"type": "linear", "factor": 2.0}),
        ("llm_config.json", "rope_scaling", {"rope_type": "dynamic", "factor": 1.0}),
        ("llm_config.json", "rope_scaling", {"type": "default", "mrope_section": [1, 2, 3]}),
        ("llm_config.json", "rope_scaling", {"type": ["yarn"]}),
        ("llm_config.json", "rope_scaling", "yarn"),
        ("llm_config.json", "rope_scaling", ["yarn"]),
        ("llm_config.json", "rope_parameters", {"rope_type": "yarn", "rope_theta": 1e6}),
        ("llm_config.json", "rope_parameters", 3),
        ("llm_config.json", "tie_word_embeddings", True),
        ("llm_config.json", "use_sliding_window", True),
        ("llm_config.json", "qk_norm", False),
        ("llm_config.json", "hidden_act", "gelu"),
        ("llm_config.json", "hidden_act", ["silu"]),
        ("llm_config.json", "head_dim", 32),
        ("llm_config.json", "layer_types", ["full_attention", "sliding_attention"]),
        ("vit_config.json", "hidden_act", "gelu"),
        ("vit_config.json", "rope", True),
    ],
)
def test_settings_the_model_does_not_have(name: str, key: str, value: Any, folder: Path) -> None:
    """They would change every answer: named, not ignored."""
    change(folder, name, **{key: value})
    read = read_llm_config if name.startswith("llm") else read_vision_config
    refused(lambda: read(folder), str(folder / name), f"{key} is ", json.dumps(value)[:20])


def test_the_same_said_in_other_words_is_taken(folder: Path) -> None:
    plain = read_llm_config(folder)
    change(
        folder, "llm_config.json", rope_scaling=None, rope_theta=1000000, head_dim=16,
        layer_types=["full_attention"] * 3, tie_word_embeddings=None,
    )  # fmt: skip
    assert read_llm_config(folder) == plain
    change(folder, "llm_config.json", rope_scaling={"type": "default"})
    values = json.loads((folder / "llm_config.json").read_text())
    del values["rope_theta"], values["num_key_value_heads"], values["hidden_act"]
    values["rope_parameters"] = {"rope_type": "default", "rope_theta": 5e5}
    (folder / "llm_config.json").write_text(json.dumps(values))
    other = read_llm_config(folder)
    assert other.rope_theta == 5e5 and other.num_key_value_heads == plain.num_attention_heads


@pytest.mark.parametrize("depth", [500, 900, 960, 990, 2000])
def test_values_nested_deep(depth: int, folder: Path) -> None:
    text = (folder / "llm_config.json").read_text()
    for key in ("hidden_size", "rope_theta", "hidden_act", "rope_scaling", "layer_types"):
        bare = json.dumps({k: v for k, v in json.loads(text).items() if k != key})
        nested = f'"{key}": ' + "[" * depth + "]" * depth + ", "
        (folder / "llm_config.json").write_text("{" + nested + bare[1:])
        refused(lambda: read_llm_config(folder), str(folder / "llm_config.json"))
    index = folder / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": ' + "[" * depth + "]" * depth + "}}")
    refused(lambda: open_weights(folder), str(index))


@pytest.mark.parametrize("content", ["[]", "null", "3", DEEP, '{"a":' * 5000, "{", ""])
@pytest.mark.parametrize("name", ["llm_config.json", "vit_config.json"])
def test_no_object(name: str, content: str, folder: Path) -> None:
    (folder / name).write_text(content)
    read = read_llm_config if name.startswith("llm") else read_vision_config
    refused(lambda: read(folder), str(folder / name))


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("llm_config.json", "num_hidden_layers", 10**9),
        ("llm_config.json", "intermediate_size", 10**9),
        ("llm_config.json", "hidden_size", 4 * 10**8),
        ("vit_config.json", "num_hidden_layers", 10**9),
        ("vit_config.json", "hidden_size", 10**9),
        ("vit_config.json", "patch_size", 10**9),
        ("vit_config.json", "num_channels", 10**9),
    ],
)
@pytest.mark.parametrize("tables", [True, False])
def test_sizes_beyond_the_weights_cost_nothing(
    name: str, key: str, value: int, tables: bool, folder: Path, tiny_bagel_path: Path
) -> None:
    """10^9 layers took 40 s; and an absent position table is computed from the sizes."""
    tensors = load_file(tiny_bagel_path / "model.safetensors")
    save_file(
        {k: t for k, t in tensors.items() if tables or "pos_embed" not in k},
        folder / "model.safetensors",
    )
    change(folder, name, **{key: value})
    started = time.process_time()
    shown = "patch_dim" if key in ("patch_size", "num_channels") else key
    refused(lambda: locate_weights(folder), str(folder / name), shown, "is more than the weights")
    assert time.process_time() - started < 1


# -- tokenizer --------------------------------------------------------------------------------

TEXTS = {"list": b"[]", "number": b"3", "binary": bytes(range(256)), "empty": b"",
         "deep": DEEP.encode(), "deep object": b'{"a":' * 5000}  # fmt: skip


@pytest.mark.parametrize("kind", [*TEXTS, "cut"])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "vocab.json"])
def test_damaged_tokenizer_files(name: str, kind: str, folder: Path) -> None:
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(TEXTS.get(kind, whole[: len(whole) // 2]))
    if name == "vocab.json":  # read where there is no tokenizer.json
        (folder / "tokenizer.json").unlink()
    refused(lambda: load_tokenizer(folder), str(folder / name), "fetch the tokenizer files")


def test_damaged_merges(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    merges = (folder / "merges.txt").read_bytes()
    known = load_tokenizer(folder)[0].encode("Which way leads to the goal?")
    lines = merges.split(b"\n")
    for damaged in (b"\n".join(lines[:500]) + b"\n", b"", merges[:-200], b"[]", b"\xff" + merges):
        (folder / "merges.txt").write_bytes(damaged)
        refused(lambda: load_tokenizer(folder), "merges.txt", "fetch the tokenizer files")
    (folder / "merges.txt").write_bytes(merges.replace(b"\n", b"\r\n"))
    assert load_tokenizer(folder)[0].encode("Which way leads to the goal?") == known


# -- the files that hold weights --------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["../other.safetensors", "/etc/passwd", "a/../../other.safetensors", "..", ".", "",
     "sub/a.safetensors", "a\0.safetensors", "a\0b", "x" * 5000 + ".safetensors", 7, None, ["a"],
     "..\\other.safetensors"],
    ids=lambda name: repr(name)[:30],
)  # fmt: skip
def test_an_index_names_files_of_its_folder(name: Any, folder: Path, tiny_bagel_path: Path) -> None:
    inside = folder / "inside"
    (inside / "sub").mkdir(parents=True)
    for place in (folder / "other.safetensors", inside / "sub" / "a.safetensors"):
        shutil.copyfile(tiny_bagel_path / "model.safetensors", place)
    index = inside / "model.safetensors.index.json"
    keys = open_weights(tiny_bagel_path)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(keys, name)}))
    refused(lambda: open_weights(inside), str(index), "is not a safetensors index",
            "which is no NAME.safetensors of its folder")  # fmt: skip


@pytest.mark.parametrize(
    "content",
    ["[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": "a"}', DEEP, "{"],
    ids=lambda text: text[:20],
)
def test_a_broken_index(content: str, tmp_path: Path) -> None:
    index = tmp_path / "ema.safetensors.index.json"
    index.write_text(content)
    refused(lambda: open_weights(tmp_path), str(index), "fetch it again")


@pytest.mark.parametrize(
    "header",
    [
        DEEP.encode(),
        b'{"a":{"dtype":"F32","shape":[-1,-2],"data_offsets":[0,8]}}',
        b'{"a":{"dtype":"F32","shape":[2.0],"data_offsets":[0,8]}}',
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0.0,8.0]}}',
        b'{"a":{"dtype":"F32","shape":[true,2],"data_offsets":[0,8]}}',
        b'{"a":{"dtype":"F32","shape":"2","data_offsets":[0,8]}}',
        b'{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}',
        b'{"a": 1}',
        b"[]",
        b"\xff" * 8,
        # A hole, twice the same bytes, an end before the beginning, more bytes than elements.
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"b":{"dtype":"U8","shape":[2],"data_offsets":[6,8]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"b":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[8,4]},'
        b'"b":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"b":{"dtype":"BF16","shape":[1],"data_offsets":[4,8]}}',
    ],
    ids=range(14),
)
def test_headers_of_odd_values(header: bytes, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    refused(lambda: read_file(file), str(file), "are no safetensors file")


def test_a_table_of_no_dimension(folder: Path, tiny_bagel_path: Path) -> None:
    tensors = load_file(tiny_bagel_path / "model.safetensors")
    for key in ("vit_pos_embed.pos_embed", "language_model.model.embed_tokens.weight"):
        odd = {**tensors, key: tensors[key].flatten()[0].clone()}
        save_file(odd, folder / "model.safetensors")
        with pytest.raises(ValueError, match=key):
            locate_weights(folder)
