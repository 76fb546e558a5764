# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Dataset folders under the data root, and dataset configs."""

from __future__ import annotations

from pathlib import Path

import pytest

from data import dataset_info
from data.dataset_info import (
    DATASETS,
    DatasetSource,
    data_root,
    dataset_files,
    known_names,
    load_dataset_config,
    split_files,
)
from tests.data.synthetic import write_dataset

CONFIGS = Path(dataset_info.__file__).parent / "configs"


def test_root_comes_from_argument_variable_or_default(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("VISUAL_OPSD_DATA_ROOT", raising=False)
    assert data_root() == Path("datasets")
    monkeypatch.setenv("VISUAL_OPSD_DATA_ROOT", str(tmp_path))
    assert data_root() == tmp_path
    assert data_root("elsewhere") == Path("elsewhere")
    write_dataset(tmp_path, "Visual_Search", rows=3, files=2)
    names = [path.name for path in dataset_files("Visual_Search")]
    assert names == ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]


def test_any_folder_of_the_layout_and_any_split(tmp_path: Path) -> None:
    write_dataset(tmp_path, "My_World", rows=2)
    write_dataset(tmp_path, "My_World", rows=2, split="heldout")
    assert [p.name for p in dataset_files("My_World", "heldout", tmp_path)] == [
        "heldout-00000-of-00001.parquet"
    ]
    assert known_names(tmp_path) == [*DATASETS, "My_World"]
    with pytest.raises(ValueError, match=r"no file of split 'test'.*heldout-.*train-"):
        dataset_files("My_World", "test", tmp_path)


def test_split_is_a_word_of_the_file_name(tmp_path: Path) -> None:
    for name in ("Jigsaw_Train-0", "training", "pretrain-0", "constrained", "test"):
        (tmp_path / f"{name}.parquet").touch()
    assert {path.stem for path in split_files(tmp_path)} == {"Jigsaw_Train-0", "training"}
    with pytest.raises(ValueError, match="the split must not be empty"):
        split_files(tmp_path, "")  # with which every file's name begins, those of training too


def test_errors_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown dataset 'Visual_Serch'.*Visual_Search, "):
        dataset_files("Visual_Serch", root=tmp_path)
    with pytest.raises(ValueError, match=r"download_model\.py --datasets.*VISUAL_OPSD_DATA_ROOT"):
        dataset_files("Visual_Search", root=tmp_path)
    (tmp_path / "Chart_Refocus" / "data").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"no parquet file at all\. Download"):
        dataset_files("Chart_Refocus", root=tmp_path)
    write_dataset(tmp_path / "outside", "Secret")
    for name in ("../outside/Secret", "outside/Secret", "..", "", str(tmp_path / "outside")):
        with pytest.raises(ValueError, match="unknown dataset"):
            dataset_files(name, root=tmp_path / "root")


def test_shipped_configs() -> None:
    for name in ("opsd.yaml", "sft.yaml"):
        sources = load_dataset_config(CONFIGS / name)
        assert [source.name for source in sources] == list(DATASETS)
        for source in sources:
            assert source.num_used_rows == DATASETS[source.name].rows == source.weight
            assert source.split == "train"
    assert sum(info.rows for info in DATASETS.values()) == 24_990


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- name: A\n", "must be a mapping with the key `datasets`, found list"),
        ("", "found NoneType"),
        ("{a: [", "not valid YAML"),
        ("datasets: [{name: A}]\nepochs: 3\n", "unknown keys epochs; allowed: datasets"),
        ("datasets: [{name: A, wieght: 3}]\n", "unknown keys wieght; allowed: name, num_used_"),
        ("datasets: []\n", "non-empty list"),
        ("datasets: {A: 1}\n", "non-empty list"),
        ("datasets: [A]\n", "expected a mapping with at least `name`"),
        ("datasets: [{weight: 1}]\n", "expected a mapping with at least `name`"),
        ("datasets: [{name: A, weight: -1}]\n", "weight must be a finite number of at least 0"),
        ("datasets: [{name: A, weight: .nan}]\n", "weight must be a finite number"),
        ("datasets: [{name: A, weight: yes}]\n", "weight must be a finite number"),
        ("datasets: [{name: A, weight: 0}]\n", "no dataset with a weight above 0"),
        ("datasets: [{name: A, num_used_rows: 0}]\n", "num_used_rows must be a positive integer"),
        ("datasets: [{name: A, num_used_rows: 1.5}]\n", "num_used_rows must be a positive"),
        ("datasets: [{name: A}, {name: A}]\n", r"A \(split train\) is listed twice"),
        ("datasets: [{name: 3}]\n", "name must be a non-empty string"),
    ],
)
def test_config_errors(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_dataset_config(path)


def test_config_defaults_and_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("datasets:\n  - name: A\n  - {name: A, split: heldout, weight: 0.5}\n")
    assert load_dataset_config(path) == [
        DatasetSource("A", 1.0, None, "train"),
        DatasetSource("A", 0.5, None, "heldout"),
    ]
    with pytest.raises(ValueError, match="does not exist; examples"):
        load_dataset_config(tmp_path / "absent.yaml")
