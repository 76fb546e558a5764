# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Release folders, tokenizers, YAML: damaged, foreign, absurd."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file, save_file

from tests.data.synthetic import write_dataset
from tests.hostile.programs import ROOT
from tests.hostile.runner import Case

BAD_SIZES: tuple[Any, ...] = (
    None, "64", -64, 0, 1.5, 10**9, 2**70, True, [64], {"a": 1}, float("nan"), float("inf"), "x",
)  # fmt: skip
LLM_SIZES = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "intermediate_size", "vocab_size",
)  # fmt: skip
VIT_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
             "patch_size")  # fmt: skip
DEEP = "[" * 50_000 + "]" * 50_000


def _release(folder: Path) -> Path:
    """A copy of the tiny release, which may be written to."""
    return Path(shutil.copytree(ROOT / "tests" / "tiny-bagel", folder / "release"))


def _evaluate(folder: Path, change: Callable[[Path], object]) -> list[str]:
    change(_release(folder))
    data = write_dataset(folder, "D", 3)
    return ["--model_path", str(folder / "release"), "--data", str(data), "--split", "train",
            "--output_dir", str(folder / "out")]  # fmt: skip


def _case(name: str, change: Callable[[Path], object], expect: str = "refuse",
          names: tuple[str, ...] = ()) -> Case:  # fmt: skip
    return Case("release", name, partial(_evaluate, change=change), "evaluate", expect, names)


def _set(release: Path, file: str, key: str, value: Any) -> None:
    path = release / file
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))


def _remove(release: Path, file: str) -> None:
    (release / file).unlink()


def _put(release: Path, file: str, content: bytes) -> None:
    (release / file).write_bytes(content)


def _configs() -> Iterator[Case]:
    for file, sizes in (("llm_config.json", LLM_SIZES), ("vit_config.json", VIT_SIZES)):
        for key in sizes:
            for value in BAD_SIZES:
                # A key that may be left out may be null too.
                optional = value is None and key in ("num_key_value_heads", "patch_size")
                change = partial(_set, file=file, key=key, value=value)
                expect = "any" if optional else "refuse"
                names = (file, key, "model.")
                yield _case(f"{file}: {key} = {value!r}", change, expect, names)
    odd: dict[str, tuple[Any, ...]] = {
        "rope_theta": (0, -1, "x", float("nan"), float("inf"), [1], None),
        "rms_norm_eps": (-1, "x", float("nan"), [1], None),
        "rope_scaling": ({"type": "yarn", "factor": 4}, {"rope_type": "linear", "factor": 2}, "x"),
        "hidden_act": ("gelu", 3, [], None),
        "tie_word_embeddings": (True,),
        "max_position_embeddings": (0, -4, "x", [1], float("nan")),
    }
    for key, values in odd.items():
        for value in values:
            expect = "any" if value is None or key == "tie_word_embeddings" else "refuse"
            yield _case(f"llm_config.json: {key} = {value!r}",
                        partial(_set, file="llm_config.json", key=key, value=value), expect,
                        ("llm_config.json",))  # fmt: skip


CONTENTS = {
    "empty": b"", "cut": b'{"a": [1, 2', "a list": b"[1, 2]", "null": b"null", "text": b"hello",
    "binary": bytes(range(256)), "UTF-16": '{"a": 1}'.encode("utf-16"), "deep": DEEP.encode(),
    "a number": b"9" * 5000, "a page": b"<html>404</html>",
}  # fmt: skip


def _texts() -> Iterator[Case]:
    for file in ("llm_config.json", "vit_config.json", "tokenizer.json"):
        for name, content in CONTENTS.items():
            yield _case(f"{file} is {name}", partial(_put, file=file, content=content), "refuse",
                        (file,))  # fmt: skip
    for file in ("tokenizer_config.json", "vocab.json", "merges.txt", "generation_config.json"):
        for name, content in CONTENTS.items():
            yield _case(f"{file} is {name}", partial(_put, file=file, content=content), "any",
                        (file, "tokenizer"))  # fmt: skip
    for file in ("llm_config.json", "tokenizer.json", "model.safetensors"):
        expect = "any" if file == "tokenizer.json" else "refuse"  # vocab.json and merges.txt do
        yield _case(f"{file} is missing", partial(_remove, file=file),
                    expect, (file, "safetensors"))  # fmt: skip
        yield _case(f"{file} is a folder", partial(_as_folder, file=file), expect,
                    (file, "safetensors"))  # fmt: skip
    places: tuple[Any, ...] = (
        "../../canary", "/etc/passwd", "nothing.safetensors", 5, None, [], "a\0b",
    )  # fmt: skip
    for value in places:
        yield _case(f"index names {value!r}", partial(_index, value=value), "refuse",
                    ("index.json", "safetensors"))  # fmt: skip
    for name, content in CONTENTS.items():
        yield _case(f"index.json is {name}", partial(_bad_index, content=content), "refuse",
                    ("index.json",))  # fmt: skip


def _as_folder(release: Path, file: str) -> None:
    (release / file).unlink()
    (release / file).mkdir()


def _index(release: Path, value: Any) -> None:
    keys = load_file(release / "model.safetensors").keys()
    text = json.dumps({"weight_map": dict.fromkeys(keys, value)})
    (release / "model.safetensors.index.json").write_text(text)
    (release / "model.safetensors").unlink()


def _bad_index(release: Path, content: bytes) -> None:
    (release / "model.safetensors.index.json").write_bytes(content)
    (release / "model.safetensors").unlink()


# ------------------------------------------------------------------------------------ weights


def _header(release: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = release / "model.safetensors"
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    changed = change(header)
    text = json.dumps(header if changed is None else changed).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def _first(header: dict[str, Any]) -> dict[str, Any]:
    entry: dict[str, Any] = header["language_model.model.norm.weight"]
    return entry


def _value(release: Path, key: str, value: float, place: int) -> None:
    path = release / "model.safetensors"
    tensors = load_file(path)
    tensors[key].view(-1)[place] = value
    save_file(tensors, path, {"format": "pt"})


def _without(release: Path, key: str) -> None:
    path = release / "model.safetensors"
    tensors = load_file(path)
    del tensors[key]
    save_file(tensors, path, {"format": "pt"})


def _bytes(release: Path, change: Callable[[bytes], bytes]) -> None:
    path = release / "model.safetensors"
    path.write_bytes(change(path.read_bytes()))


def _cut(release: Path, share: float) -> None:
    _bytes(release, lambda raw: raw[: int(len(raw) * share)])


def _weights() -> Iterator[Case]:
    names = ("model.safetensors",)
    keys = sorted(load_file(ROOT / "tests" / "tiny-bagel" / "model.safetensors"))
    drawing = ("vae2llm", "llm2vae", "time_embedder", "latent_pos_embed")
    tables = ("vit_pos_embed",)  # absent ones are computed
    used = [k for k in keys if "moe_gen" not in k and not k.startswith((*drawing, *tables))]
    for number, key in enumerate(used[:: max(1, len(used) // 30)]):
        value = (float("nan"), float("inf"), float("-inf"))[number % 3]
        yield _case(f"{value} in {key}", partial(_value, key=key, value=value, place=-1),
                    "refuse", (key,))  # fmt: skip
        yield _case(f"without {key}", partial(_without, key=key),
                    "refuse", (key, "missing"))  # fmt: skip
    entries: dict[str, Callable[[dict[str, Any]], object]] = {
        "negative offsets": lambda h: _first(h).update(data_offsets=[-8, 8]),
        "offsets beyond the file": lambda h: _first(h).update(data_offsets=[0, 2**40]),
        "offsets reversed": lambda h: _first(h).update(data_offsets=[64, 0]),
        "offsets as text": lambda h: _first(h).update(data_offsets="0, 64"),
        "offsets as floats": lambda h: _first(h).update(data_offsets=[0.5, 1.5]),
        "overlapping": lambda h: _first(h).update(data_offsets=[0, 128]),
        "an unknown dtype": lambda h: _first(h).update(dtype="F7"),
        "an integer dtype": lambda h: _first(h).update(dtype="I32"),
        "a dtype of another size": lambda h: _first(h).update(dtype="F64"),
        "no dtype": lambda h: _first(h).pop("dtype"),
        "a shape of text": lambda h: _first(h).update(shape="x"),
        "a negative shape": lambda h: _first(h).update(shape=[-64]),
        "a huge shape": lambda h: _first(h).update(shape=[2**62, 4]),
        "another shape": lambda h: _first(h).update(shape=[2, 32]),
        "an entry that is a list": lambda h: h.update({"language_model.model.norm.weight": [1]}),
        "metadata that is a list": lambda h: h.update({"__metadata__": [1]}),
        "a list": lambda h: [h],
        "null": lambda h: {},
    }
    for name, change in entries.items():
        expect = "any" if name == "metadata that is a list" else "refuse"
        yield _case(f"header of {name}", partial(_header, change=change), expect,
                    (*names, "norm.weight", "missing"))  # fmt: skip
    for share in (0.0, 0.001, 0.2, 0.5, 0.99, 0.99999):
        yield _case(f"weights cut at {share}", partial(_cut, share=share), "refuse", names)
    whole: dict[str, Callable[[bytes], bytes]] = {
        "appended bytes": lambda raw: raw + bytes(8),
        "a huge header length": lambda raw: struct.pack("<Q", 2**62) + raw[8:],
        "a negative header length": lambda raw: b"\xff" * 8 + raw[8:],
        "a page": lambda raw: b"<html>404</html>",
        "a pointer of git-lfs": lambda raw: b"version https://git-lfs.github.com/spec/v1\n",
        "a pickle": lambda raw: b"\x80\x04cos\nsystem\n(S'touch ../canary2'\ntR.",
        "zeros": lambda raw: bytes(len(raw)),
        "a deep header": lambda raw: struct.pack("<Q", len(DEEP)) + DEEP.encode(),
    }
    for name, build in whole.items():
        yield _case(f"weights of {name}", partial(_bytes, change=build), "refuse", names)
    for seed in range(25):
        yield _case(f"flipped header {seed}", partial(_flip_header, seed=seed), "any", names)


def _flip_header(release: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    raw = bytearray((release / "model.safetensors").read_bytes())
    (length,) = struct.unpack("<Q", raw[:8])
    for place in rng.integers(0, 8 + length, 2):
        raw[place] = int(rng.integers(0, 256))
    (release / "model.safetensors").write_bytes(bytes(raw))


# --------------------------------------------------------------------------------------- YAML

# Nine to the twelfth strings, by aliases of aliases.
BOMB = "\n".join(["  - &a0 [x, x, x, x, x, x, x, x, x]"] + [
    f"  - &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)
])  # fmt: skip
YAMLS = {
    "no mapping": "[1, 2]", "text": "hello", "a number": "5", "a tag":
    "a: !!python/object/apply:os.system ['touch ../canary2']", "a tuple": "lr: !!python/tuple [1]",
    "an unknown tag": "a: !x 1",
    "a key twice": "lr: 1.0e-5\nlr: 1.0e-4", "a tab": "a:\n\tb: 1", "an open bracket": "a: [1",
    "deep": DEEP, "a bad date": "a: 2020-99-99", "an unknown name": "learning_rate: 1",
    "a list as a key": "? [1]\n: 2", "an anchor to itself": "a: &a [*a]", "a colon": "a: b: c",
    "two documents": "lr: 1.0e-5\n---\nlr: 1.0e-4", "NUL": "a: 'b\0c'", "null key": "null: 1",
    "a bomb": BOMB, "a bomb as a value": f"lr:\n{BOMB}", "a list of bombs": f"datasets:\n{BOMB}",
    "a bomb as a prompt": f"system:\n{BOMB}",
}  # fmt: skip


def _train(folder: Path, flag: str, content: bytes) -> list[str]:
    path = folder / "given.yaml"
    path.write_bytes(content)
    data = write_dataset(folder, "D", 6)
    config = folder / "datasets.yaml"
    config.write_text("datasets:\n  - {name: D}\n")
    arguments = {
        "--model_path": str(ROOT / "tests" / "tiny-bagel"), "--dataset_config_file": str(config),
        "--data_root": str(data.parent), "--results_dir": str(folder / "out"), flag: str(path),
    }  # fmt: skip
    return [part for pair in arguments.items() for part in pair]


def _yaml(name: str, flag: str, content: str | bytes, expect: str = "refuse") -> Case:
    raw = content.encode() if isinstance(content, str) else content
    return Case("yaml", f"{flag} {name}", partial(_train, flag=flag, content=raw), "train", expect,
                ("given.yaml", "--jsd_top_k"))  # fmt: skip


def _yamls() -> Iterator[Case]:
    for flag in ("--config", "--prompts", "--dataset_config_file"):
        for name, content in YAMLS.items():
            yield _yaml(f"is {name}", flag, content)
        for name in ("UTF-16", "binary"):
            yield _yaml(f"is {name}", flag, CONTENTS[name])
        yield _yaml("is Latin-1", flag, "a: größe".encode("latin-1"))
    bad: dict[str, tuple[Any, ...]] = {
        "lr": ("x", [], {}, None, True, ".nan", ".inf", -1, "1e400"),
        "total_steps": ("x", 1.5, [], None, True, 0, -1, 10**30),
        "noise_vt": ("maybe", 3, [], None),
        "teacher_mode": ("x", 3, [], None, True),
        "model_path": (5.5, [], {}, True, '""'),
        "jsd_top_k": (-5, 1, "x", 1.5, [1]),
        "sample_temperature": (0, -1, ".nan", "1e-45", "x", []),
        "max_bad_rate": (-0.1, 1.5, ".nan", "x"),
    }
    for key, values in bad.items():
        for value in values:
            text = "null" if value is None else value
            yield _yaml(f"{key}: {value!r}", "--config", f"{key}: {text}")
    sets = (
        "datasets: []", "datasets: {}", "datasets: [5]", "datasets: [{}]", "datasets: [{name: 5}]",
        "datasets: [{name: D, weight: -1}]", "datasets: [{name: D, weight: .nan}]",
        "datasets: [{name: D, weight: x}]", "datasets: [{name: D, weight: .inf}]",
        "datasets: [{name: D}, {name: D}]", "datasets: [{name: D, split: [1]}]",
        "datasets: [{name: D, num_used_rows: -1}]", "datasets: [{name: D, num_used_rows: x}]",
        "datasets: [{name: D, num_used_rows: 1.5}]", "datasets: [{name: ../../etc}]",
        "datasets: [{name: NoSuch}]", "datasets: [{name: D, extra: 1}]", "datasets: [{name: ''}]",
        "datasets: [{name: D, weight: 0}]", "datasets: [{name: D, split: none}]",
        "datasets: [{name: \"a\\0b\"}]", f"datasets: [{{name: {'x' * 5000}}}]",
    )  # fmt: skip
    flag, names = "--dataset_config_file", ("given.yaml", "D", "NoSuch", "etc", "xxx", "name")
    for text in sets:
        make = partial(_train, flag=flag, content=text.encode())
        yield Case("yaml", f"{flag} {text[:60]!r}", make, "train", "refuse", names)


def cases() -> Iterator[Case]:
    yield from _configs()
    yield from _texts()
    yield from _weights()
    yield from _yamls()


assert os.sep == "/"  # forks and links: the cases need a POSIX system
