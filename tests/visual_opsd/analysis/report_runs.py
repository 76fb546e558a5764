# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Folders that look like those of training runs and evaluations, and how a report is read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

# Would end an attribute, a cell and a script, start others, turn the text, end the string.
HOSTILE = (
    "\"'><script>alert(1)</script></p></style><img src=http://x/ onerror=alert(1)>&\u202e\0\udcff"
)
VOID = {"meta", "input", "img", "path", "circle"}  # as this report writes them


def write_lines(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def write_run(
    folder: Path,
    metrics: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any] | None = None,
    samples: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """A results folder. JSON is YAML, too."""
    write_lines(folder / "metrics.jsonl", metrics)
    if settings is not None:
        (folder / "config.yaml").write_text(json.dumps(settings))
    if samples:
        write_lines(folder / "samples.jsonl", samples)
    return folder


def sample(step: int, slot: int = 0, **changes: Any) -> dict[str, Any]:
    """A completion of two tokens, the end sampled as well."""
    return {
        "step": step, "slot": slot, "row": "maze/1", "question": "Which way?", "answer": "L",
        "completion": "<answer>L</answer>", "tokens": 2, "capped": False, "ids": [72, 73],
        "scored": "111", "logprobs": [-0.01, -3.5, 0.0], **changes,
    }  # fmt: skip


def write_evaluation(folder: Path, right: int, rows: int = 50, **changes: Any) -> Path:
    """An output folder of `evaluate` in which the first `right` rows are right."""
    where = {"dataset": "maze", "file": "f", "digest": "d"}
    lines = [{**where, "row": i, "pid": str(i), "correct": i < right} for i in range(rows)]
    write_lines(folder / "predictions.jsonl", lines)
    figures = {
        "n": rows, "accuracy": right / rows, "interval": [0.1, 0.9], "lenient_accuracy": 0.75,
        "mean_tokens": 12.5, "cap_rate": 0.25,
    }  # fmt: skip
    summary = {**figures, "tasks": {"maze": figures}, "settings": {"context": "text"}, **changes}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


class Page(HTMLParser):
    """A report as a browser takes it apart: elements, their attributes, the text within.

    Raises AssertionError: an element is closed that is not the open one.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[str, str]] = []  # (innermost element, text)
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    @property
    def text(self) -> str:
        """What a reader sees of it, in one line."""
        shown = (data for tag, data in self.texts if tag not in ("style", "script"))
        return " ".join(" ".join(shown).split())

    def of(self, tag: str, **attributes: str) -> list[dict[str, str]]:
        """Attributes of the elements of a kind that have those given."""
        wanted = attributes.items()
        return [found for name, found in self.elements if name == tag and wanted <= found.items()]
