# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""A folder of completions, and of what a teacher says about each of their scored tokens.

    rows.jsonl               a line a row: its name, its digest, and of each completion the shard
                             and the place in it
    entries-*.safetensors    shards: the completions of some rows, one after the other
    collect_traces.json      written last: what the cache was made with, sizes of the shards

A scored token has the teacher's k most probable entries, the most probable first (log-probabilities
of the full softmax at temperature 1 in fp16, ids in int32), the log of the mass outside (fp32) and
`vt_weight` (fp32): KL(teacher with the visual thoughts || the same model without), in nats.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from data.json_lines import read_given
from data.sequence import Completion
from data.thinkmorph import PROBLEM_IMAGE, Row, row_digest
from modeling.host.disk import disk_errors, replace_file
from modeling.host.text_files import read_json_object

FORMAT = 1
INDEX, SUMMARY, SHARDS = "rows.jsonl", "collect_traces.json", "entries-*.safetensors"
# What the student sees of a row, and its id. The visual thoughts are not read for training; that
# they are the same is told by the fingerprints of the data's files.
KEY_COLUMNS = ("pid", "question", "answer", PROBLEM_IMAGE, "world_state")
_LEAST = torch.finfo(torch.float16).min


def row_key(row: Row) -> str:
    """By which a row is found in a cache, wherever its file lies."""
    return row_digest(row, KEY_COLUMNS)


def token_bytes(top_k: int) -> int:
    """Bytes of a token in a shard: entries, tail, weight, id, whether it is scored."""
    return 6 * top_k + 13


@dataclass(frozen=True)
class Entries:
    """Of N scored tokens: log_probs (N, k) and entries (N, k), the most probable first; tail (N,),
    the log of the mass outside; weight (N,), the factor of a token's divergence (in a shard its
    vt_weight)."""

    log_probs: Tensor
    entries: Tensor
    tail: Tensor
    weight: Tensor

    @classmethod
    def blank(cls, tokens: int, top_k: int) -> Entries:
        """Of tokens without a teacher: whatever stands there, its weight is 0."""
        entries = torch.arange(top_k, dtype=torch.int32).expand(tokens, -1)
        return cls(torch.zeros(tokens, top_k), entries, torch.zeros(tokens), torch.zeros(tokens))

    @classmethod
    def joined(cls, parts: Sequence[Entries]) -> Entries:
        columns = ([getattr(part, f.name) for part in parts] for f in fields(cls))
        return cls(*(torch.cat(column) for column in columns))

    def __len__(self) -> int:
        return len(self.tail)

    def part(self, tokens: slice) -> Entries:
        return Entries(*(getattr(self, f.name)[tokens] for f in fields(self)))

    def to(self, device: torch.device) -> Entries:
        return Entries(*(getattr(self, f.name).to(device) for f in fields(self)))


@dataclass(frozen=True)
class Place:
    """Where a completion lies: a shard, its labels' bounds there, those of its scored tokens."""

    shard: str
    labels: tuple[int, int]
    tokens: tuple[int, int]
    capped: bool

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Place:
        """Raises KeyError, TypeError or ValueError: it is none."""
        (a, b), (c, d) = record["labels"], record["tokens"]
        if not (0 <= a < b and 0 <= c <= d) or os.path.basename(record["shard"]) != record["shard"]:
            raise ValueError("no place in a shard")
        return cls(record["shard"], (a, b), (c, d), bool(record["capped"]))


def write_shard(
    folder: Path, name: str, completions: Sequence[Completion], entries: Sequence[Entries]
) -> list[dict[str, Any]]:
    """Write a shard, whole or not at all; returns the place of each completion as JSON values.

    entries: of each completion's scored tokens, in their order.

    Raises:
        DiskRefused: the disk is full or cannot be written to.
    """
    ids: list[int] = []
    scored: list[bool] = []
    places, tokens = [], 0
    for completion, own in zip(completions, entries, strict=True):
        assert len(own) == completion.count
        bounds = [len(ids), len(ids) + len(completion.scored)]
        ids += (*completion.ids, -1)  # the last label is the end
        scored += completion.scored
        places.append(
            {
                "shard": name,
                "labels": bounds,
                "tokens": [tokens, tokens + len(own)],
                "capped": completion.capped,
            }
        )
        tokens += len(own)
    all_entries = Entries.joined(entries)
    tensors = {
        "ids": torch.tensor(ids, dtype=torch.int32),
        "scored": torch.tensor(scored, dtype=torch.uint8),
        "log_probs": all_entries.log_probs.clamp(min=_LEAST).to(torch.float16),
        "entries": all_entries.entries.to(torch.int32),
        "tail": all_entries.tail.float(),
        "vt_weight": all_entries.weight.float(),
    }
    path = folder / name
    with disk_errors(f"writing {path}", folder):
        replace_file(path, save({name: t.contiguous() for name, t in tensors.items()}))
    return places


def is_written(folder: Path, place: Place) -> bool:
    """Whether a completion's shard is there, whole, and reaches as far as its place."""
    path = folder / place.shard
    try:
        found = path.stat()
        labels, tokens = _shard_length(path, found.st_size, found.st_mtime_ns)
    except (SafetensorError, OSError):
        return False
    return place.labels[1] <= labels and place.tokens[1] <= tokens


@lru_cache(maxsize=4096)
def _shard_length(path: Path, _size: int, _changed: int) -> tuple[int, int]:
    """Labels and scored tokens of a shard of this size and time; errors if its file is cut."""
    with safe_open(path, framework="pt") as shard:
        labels, tokens = (shard.get_slice(name).get_shape()[0] for name in ("scored", "tail"))
    return labels, tokens


@dataclass(frozen=True)
class TeacherCache:
    """A finished cache; picklable, for the workers that read rows.

    contents: what it was made with, as JSON values. digest: of `files` as they were written, tells
    it from others. top_k: entries of a token. mean_weight: of all tokens' vt_weight. rows: by
    `row_key`.
    """

    folder: Path
    contents: dict[str, Any]
    digest: str
    top_k: int
    mean_weight: float
    rows: dict[str, tuple[Place, ...]]
    files: tuple[str, ...]

    @classmethod
    def open(cls, path: str | Path) -> TeacherCache:
        """Read the index of a cache.

        Raises:
            ValueError: it is absent, not finished, or damaged.
        """
        folder = Path(path)
        again = "collect_traces makes it, and its same command goes on where it was stopped"
        summary = read_json_object(folder / SUMMARY, "summary of a teacher cache", fix=again)
        damaged = f"{folder} is no whole teacher cache"
        try:
            if summary["format"] != FORMAT:
                raise ValueError(f"its format is {summary['format']}, this version reads {FORMAT}")
            for name, size in summary["shards"].items():
                found = os.stat(folder / name).st_size
                if found != size:
                    raise ValueError(f"{name} has {found} bytes instead of {size}")
            rows: dict[str, tuple[Place, ...]] = {}
            for _, record in read_given(folder / INDEX, "row of a teacher cache"):
                places = tuple(map(Place.of, record["completions"]))
                rows[record["digest"]] = rows.get(record["digest"], ()) + places
            return cls(
                folder, summary["contents"], summary["digest"], int(summary["top_k"]),
                float(summary["mean_vt_weight"]), rows, (INDEX, *summary["shards"]),
            )  # fmt: skip
        except (KeyError, TypeError, AttributeError, OSError) as error:
            raise ValueError(f"{damaged} ({error!r}): {again}") from error
        except ValueError as error:
            raise ValueError(f"{damaged}: {error}; {again}") from error

    def read(self, place: Place) -> tuple[Completion, Entries]:
        """A completion, and the entries of its scored tokens with their vt_weight.

        Raises:
            ValueError: the shard cannot be read.
        """
        path = self.folder / place.shard
        try:
            with safe_open(path, framework="pt") as shard:
                ids, scored = (shard.get_slice(n)[slice(*place.labels)] for n in ("ids", "scored"))
                entries = Entries(
                    *(
                        shard.get_slice(name)[slice(*place.tokens)]
                        for name in ("log_probs", "entries", "tail", "vt_weight")
                    )
                )
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
        completion = Completion(
            tuple(ids[:-1].tolist()), tuple(map(bool, scored.tolist())), capped=place.capped
        )
        if completion.count != len(entries):
            raise ValueError(f"{path} is damaged: {completion.count} tokens, {len(entries)} taught")
        return completion, entries
