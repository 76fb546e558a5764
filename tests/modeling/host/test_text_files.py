# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Text, JSON and YAML that people bring: the value, or one ValueError that names the file."""

from pathlib import Path

import pytest

from modeling.host.text_files import read_json, read_json_object, read_text, read_yaml

BAD_BYTES = {
    "latin1": "größe: 1".encode("latin-1"),
    "utf16": "a: 1".encode("utf-16"),
    "binary": bytes(range(256)),
}


@pytest.mark.parametrize("reader", [read_text, read_json, read_yaml])
@pytest.mark.parametrize("content", BAD_BYTES.values(), ids=BAD_BYTES)
def test_not_utf8(tmp_path: Path, reader, content: bytes) -> None:
    file = tmp_path / "given.txt"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"thing .*given\.txt is not UTF-8 text \(byte \d+\)") as e:
        reader(file, "thing")
    assert type(e.value) is ValueError  # not the codec's own, which names no file


@pytest.mark.parametrize("reader", [read_text, read_json, read_yaml])
def test_absent_folder_or_impossible_name(tmp_path: Path, reader) -> None:
    with pytest.raises(ValueError, match=r"thing .*none does not exist"):
        reader(tmp_path / "none", "thing")
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        reader(tmp_path, "thing")
    with pytest.raises(ValueError, match="File name too long"):
        reader(tmp_path / ("x" * 5000), "thing")
    with pytest.raises(ValueError, match="null byte"):
        reader("a\0b", "thing")


def test_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "a", "thing") == {"a": 1}
    assert read_yaml(tmp_path / "a", "thing") == {"a": 1}


@pytest.mark.parametrize(
    "text, match",
    [
        ('{"a": 1', "is not valid JSON"),
        ("", "is not valid JSON"),
        ("[" * 100_000, "nested too deeply"),
        ("9" * 10_000, "digits"),
        ("[1]", "must hold a JSON object, found list"),
    ],
)
def test_no_json_object(tmp_path: Path, text: str, match: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=match) as error:
        read_json_object(tmp_path / "a.json", "thing", fix="fetch it again")
    assert "a.json" in str(error.value) and str(error.value).endswith("; fetch it again")
    assert type(error.value) is ValueError


@pytest.mark.parametrize(
    "text, match",
    [
        ("a: [1", "is not valid YAML"),
        ("a: 1\nb: 2\na: 3", "the key 'a' stands twice.*line 3"),
        ("x: {b: 1, b: 2}", "the key 'b' stands twice"),
        ("[" * 20_000, "nested too deeply"),
        ("a: !!python/object/apply:os.system [x]", "is not valid YAML"),
        ("a: 2020-99-99", "is not valid YAML"),
        ("? [a]\n: 1", "is not valid YAML"),
    ],
)
def test_no_yaml(tmp_path: Path, text: str, match: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match=match) as error:
        read_yaml(tmp_path / "a.yaml", "thing")
    assert "a.yaml" in str(error.value) and "\n" not in str(error.value)


def test_yaml_values(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("base: &b {x: 1}\nmore: {<<: *b, y: 2}")
    assert read_yaml(tmp_path / "a", "t") == {"base": {"x": 1}, "more": {"x": 1, "y": 2}}
    (tmp_path / "a").write_text("")
    assert read_yaml(tmp_path / "a", "t") is None
