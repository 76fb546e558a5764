# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Where the datasets lie, and the YAML files that say which of them a run uses.

Layout: `<root>/<name>/data/<split>*.parquet`, root from VISUAL_OPSD_DATA_ROOT (default
"datasets"). The four ThinkMorph sets are known by name; any other folder of the same layout under
the root (a generated world, say) is a dataset too.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from reprlib import repr as shown  # of bounded length, whatever YAML's anchors make
from typing import Any

from modeling.host.programs import expand_path
from modeling.host.text_files import read_yaml

DATA_ROOT_VARIABLE = "VISUAL_OPSD_DATA_ROOT"
DEFAULT_DATA_ROOT = "datasets"

_FETCH_HINT = (
    "Download the ThinkMorph sets with `python download_model.py --datasets`, make a synthetic "
    f"world with `python -m data.worlds`, or point {DATA_ROOT_VARIABLE} at the folder that holds "
    "the datasets."
)


@dataclass(frozen=True)
class DatasetInfo:
    """A released dataset: its repository on the Hugging Face hub and its row count."""

    name: str
    repo_id: str
    rows: int


DATASETS = {
    name: DatasetInfo(name, f"ThinkMorph/{name}", rows)
    for name, rows in (
        ("Visual_Search", 6990),
        ("Spatial_Navigation", 6000),
        ("Jigsaw_Assembly", 6000),
        ("Chart_Refocus", 6000),
    )
}


def data_root(root: str | Path | None = None) -> Path:
    """`root` if given, else VISUAL_OPSD_DATA_ROOT, else "datasets" in the working directory."""
    found = str(root or os.environ.get(DATA_ROOT_VARIABLE) or DEFAULT_DATA_ROOT)
    try:
        return Path(expand_path(found))
    except ValueError as error:
        raise ValueError(f"the data root ({DATA_ROOT_VARIABLE}) {error}") from None


# os.path says False where the methods of Path raise: names that are too long, links in a circle.


def _data_folder(folder: Path) -> Path:
    return folder / "data" if os.path.isdir(folder / "data") else folder


def is_dataset_folder(folder: Path) -> bool:
    """Whether a folder holds parquet files, directly or in its `data/` (be they all hidden)."""
    return os.path.isdir(folder) and any(_data_folder(folder).glob("*.parquet"))


def check_file(file: str | Path) -> None:
    """Raises ValueError, saying what stands in its place, unless a file of data can be opened."""
    try:
        str(file).encode()
    except UnicodeEncodeError:
        shown = os.fsencode(file).decode("utf-8", "backslashreplace")
        raise ValueError(f"{shown}: the name of this file is not UTF-8; rename it") from None
    if os.path.isfile(file):
        return
    found = "does not exist, or cannot be reached"
    if os.path.isdir(file):
        found = "is a folder, not a file; move the parts that it may hold out of it"
    elif os.path.islink(file):
        found = f"is a link to {os.readlink(file)}, where no file is; copy the files themselves "
        found += "(`cp -rL`), or download it again"
    elif os.path.exists(file):
        found = "is no file that can be read twice; give a file on a disk"
    raise ValueError(f"{file} {found}")


def known_names(root: str | Path | None = None) -> list[str]:
    """The released names and every dataset folder under the root."""
    base = data_root(root)
    local = [p.name for p in base.iterdir() if is_dataset_folder(p)] if os.path.isdir(base) else []
    return [*DATASETS, *sorted(set(local) - set(DATASETS))]


def _of_split(file: Path, split: str) -> bool:
    # A word of the name must begin with the split: "train-00000-of-00002" and "Jigsaw_training"
    # are train files, "constrained" and "pretrain" are not.
    words = re.split(r"[^a-z0-9]+", file.stem.lower())
    return any(word.startswith(split.lower()) for word in words)


def split_files(folder: str | Path, split: str = "train") -> list[Path]:
    """Parquet files of one split in a dataset folder, sorted by name; hidden ones are left out.

    Raises ValueError naming what is there if the split has no file, or no name.
    """
    if not split.strip():  # every file's name begins with nothing
        raise ValueError("the split must not be empty: name one, as in heldout or train")
    where = _data_folder(Path(folder))
    every = sorted(where.glob("*.parquet"), key=lambda path: path.name)
    found = [path for path in every if not path.name.startswith(".")]
    files = [path for path in found if _of_split(path, split)]
    if every and not found:
        raise ValueError(
            f"{where} holds no parquet files but hidden ones, which are left out: "
            f"{', '.join(path.name for path in every[:8])}. They are what macOS (._NAME) or an "
            f"unfinished copy leaves beside the data. {_FETCH_HINT}"
        )
    if not files:
        names = ", ".join(path.name for path in found[:8]) or "no parquet file at all"
        raise ValueError(
            f"{where} has no file of split {split!r} (*{split}*.parquet); found: {names}. "
            f"{'Choose another split.' if found else _FETCH_HINT}"
        )
    return files


def dataset_files(name: str, split: str = "train", root: str | Path | None = None) -> list[Path]:
    """Files of a dataset under the data root.

    Raises ValueError for an unknown name (listing the known ones), a released dataset that is not
    there (saying how to get it) and a split without files.
    """
    base = data_root(root)
    plain = name not in ("", ".", "..") and Path(name).name == name
    folder = base / name
    if not plain or (name not in DATASETS and not is_dataset_folder(folder)):
        raise ValueError(
            f"unknown dataset {name!r}; known under {base}: {', '.join(known_names(base))}. "
            f"A dataset is a folder {base}/NAME/data with *.parquet files."
        )
    if not os.path.isdir(folder):
        raise ValueError(f"dataset {name} is not at {folder}. {_FETCH_HINT}")
    return split_files(folder, split)


@dataclass(frozen=True)
class DatasetSource:
    """One entry of a dataset config.

    `weight`: relative probability that a slot of a batch is drawn from this dataset.
    `num_used_rows`: row budget; training sees only the first that many rows of a seeded
    permutation (None: all rows).
    """

    name: str
    weight: float = 1.0
    num_used_rows: int | None = None
    split: str = "train"

    def __post_init__(self) -> None:
        for key in ("name", "split"):
            value = getattr(self, key)
            if not isinstance(value, str) or not value:
                raise ValueError(f"dataset config: {key} must be a non-empty string, "
                                 f"found {shown(value)}")  # fmt: skip
        number = isinstance(self.weight, int | float) and not isinstance(self.weight, bool)
        if not number or not math.isfinite(self.weight) or self.weight < 0:
            raise ValueError(f"dataset {self.name}: weight must be a finite number of at least 0, "
                             f"found {shown(self.weight)}")  # fmt: skip
        budget = self.num_used_rows
        if budget is not None and (type(budget) is not int or budget < 1):
            raise ValueError(f"dataset {self.name}: num_used_rows must be a positive integer or "
                             f"null (all rows), found {shown(budget)}")  # fmt: skip


def check_sources(sources: list[DatasetSource], where: str = "dataset config") -> None:
    """Raises ValueError if there is nothing to draw from or an entry occurs twice."""
    seen: set[tuple[str, str]] = set()
    for source in sources:
        key = (source.name, source.split)
        if key in seen:
            raise ValueError(f"{where}: dataset {source.name} (split {source.split}) is listed "
                             "twice; merge the entries by adding their weights")  # fmt: skip
        seen.add(key)
    if not any(source.weight > 0 for source in sources):
        raise ValueError(f"{where}: no dataset with a weight above 0")


def load_dataset_config(path: str | Path) -> list[DatasetSource]:
    """Sources of a YAML file `datasets: [{name, weight, num_used_rows, split}, ...]`.

    Raises ValueError for anything that is not that: no mapping, unknown keys, negative weights,
    duplicates, no weight above zero.
    """
    if not os.path.exists(path):
        raise ValueError(f"dataset config {path} does not exist; examples: data/configs/opsd.yaml, "
                         "data/configs/sft.yaml")  # fmt: skip
    document = read_yaml(path, "dataset config")
    if not isinstance(document, Mapping):
        raise ValueError(f"dataset config {path} must be a mapping with the key `datasets`, "
                         f"found {type(document).__name__}")  # fmt: skip
    _only(document, {"datasets"}, str(path))
    entries: Any = document.get("datasets")
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"dataset config {path}: `datasets` must be a non-empty list, "
                         f"found {shown(entries)}")  # fmt: skip
    keys = {field.name for field in fields(DatasetSource)}
    sources = []
    for number, entry in enumerate(entries):
        where = f"{path}, entry {number}"
        if not isinstance(entry, Mapping) or "name" not in entry:
            raise ValueError(f"{where}: expected a mapping with at least `name`, "
                             f"found {shown(entry)}")  # fmt: skip
        _only(entry, keys, where)
        try:
            sources.append(DatasetSource(**entry))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    check_sources(sources, str(path))
    return sources


def _only(mapping: Mapping[Any, Any], allowed: set[str], where: str) -> None:
    unknown = sorted(str(key) for key in mapping if key not in allowed)
    if unknown:
        raise ValueError(f"{where}: unknown keys {', '.join(unknown)}; "
                         f"allowed: {', '.join(sorted(allowed))}")  # fmt: skip
