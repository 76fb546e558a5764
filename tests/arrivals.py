# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Does every setting arrive? Tables of settings, values and what is seen of them where they act.

A command runs a few times in this process, each time with other values of (nearly) all settings at
once, while `spy` records what its functions are called with. A row of the table then says where a
setting acts (`seen`) and what must be seen there (`means`, from the values given).
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data.randomness import noise_generator
from data.sequence import (
    INFERENCER_SYSTEM_PROMPT,
    PACKER_SYSTEM_PROMPT,
    REFERENCE_INTRO,
    TRANSITION,
    ImageSegment,
    TextSegment,
)
from data.transforms import ImageTransform, InferencerPath, decode_image, patchify
from scripts.visual_opsd.cli import _flags

OURS = ("data.", "modeling.", "scripts.", "examples.", "inferencer")
Calls = list[dict[str, Any]]


class Stop(Exception):
    """Raised by a stand-in where a test has seen enough."""


def recorder(function: Callable[..., Any], calls: Calls, instead: Any) -> Callable[..., Any]:
    signature = inspect.signature(function)

    @functools.wraps(function)
    def record(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        call = {**bound.arguments}
        calls.append(call)
        call["result"] = (instead or function)(*args, **kwargs)
        return call["result"]

    return record


def spy(patch: pytest.MonkeyPatch, function: Callable[..., Any], instead: Any = None) -> Calls:
    """The arguments (and the "result") of all calls from now on, whichever module makes them.

    instead: called in the function's place.
    """
    calls: Calls = []
    record = recorder(function, calls, instead)
    held = [m for name, m in list(sys.modules.items()) if name.startswith(OURS)]
    places = [(m, name) for m in held for name, value in vars(m).items() if value is function]
    assert places, function
    for module, name in places:
        patch.setattr(module, name, record)
    return calls


def spy_method(patch: pytest.MonkeyPatch, owner: type, name: str, instead: Any = None) -> Calls:
    calls: Calls = []
    patch.setattr(owner, name, recorder(getattr(owner, name), calls, instead))
    return calls


def spy_all(
    patch: pytest.MonkeyPatch,
    functions: Sequence[Callable[..., Any]],
    methods: Sequence[tuple[type, str]] = (),
) -> dict[str, Any]:
    """Calls of each by its name ("function", "Class.method")."""
    calls = {function.__name__: spy(patch, function) for function in functions}
    for owner, name in methods:
        calls[f"{owner.__name__}.{name}"] = spy_method(patch, owner, name)
    return calls


def stop(*_: Any, **__: Any) -> Any:
    raise Stop


@dataclass
class Run:
    """One run of a command: the values it was given, and what was recorded."""

    name: str
    given: Mapping[str, Any]
    calls: Mapping[str, Any]  # by name: `Calls`, or what else a recording keeps

    def all(self, function: str, argument: str) -> list[Any]:
        """An argument of every call of a function."""
        calls = self.calls[function]
        assert calls, f"{function} was not called"
        return [call[argument] for call in calls]

    def one(self, function: str, argument: str) -> Any:
        """The argument that every call had."""
        first, *others = self.all(function, argument)
        assert all(other is first or other == first for other in others), (function, argument)
        return first


@dataclass(frozen=True)
class Arrival:
    """values: one for each run (a shorter list begins again). runs: those that can show it."""

    values: Sequence[Any]
    seen: Callable[[Any], Any]
    means: Callable[[Any], Any] | None = None
    runs: str | None = None


Table = Mapping[str, Arrival]


def table_of(*parts: Table) -> dict[str, Arrival]:
    return {name: row for part in parts for name, row in part.items()}


def given_in_run(table: Table, number: int) -> dict[str, Any]:
    """Flag -> value of the run of that number."""
    return {name: row.values[number % len(row.values)] for name, row in table.items()}


def words(given: Mapping[str, Any]) -> list[str]:
    """A command line. ABSENT leaves a flag out."""
    shown = {name: value for name, value in given.items() if value is not ABSENT}
    return [word for name, value in shown.items() for word in (f"--{name}", str(value))]


def noise_of(seed: int, position: int, shapes: Sequence[Any]) -> list[Tensor]:
    """The noise control's pictures of the row at a place."""
    generator = noise_generator(seed, position)
    return [torch.randn(shape, generator=generator) for shape in shapes]


class _Absent:
    def __repr__(self) -> str:
        return "left out"


ABSENT = _Absent()


def check_complete(config: type, *tables: Mapping[str, Any]) -> None:
    """Every setting of a command is in exactly one of the tables, and they hold nothing else."""
    names = [name for table in tables for name in table]
    assert len(names) == len(set(names)), "a setting has two rows"
    flags = set(_flags(config))
    assert flags - set(names) == set(), "settings without a row that says where they act"
    assert set(names) - flags == set(), "rows of settings that are gone"
    for table in tables:
        for name, row in table.items():
            if isinstance(row, Arrival):
                assert len({repr(value) for value in row.values}) > 1, f"{name}: one value only"


def check_arrival(name: str, row: Arrival, runs: Sequence[Any]) -> None:
    """What is seen is what was meant, in every run, and not the same in all."""
    found = []
    for run in runs:
        if row.runs is not None and run.name not in row.runs:
            continue
        seen = row.seen(run)
        expected = run.given[name] if row.means is None else row.means(run)
        assert seen == expected, f"--{name} {run.given[name]} in run {run.name}"
        found.append(repr(seen))
    assert len(set(found)) > 1, f"--{name}: the same is seen of all values"


# ------------------------------------------------------------------- settings of the contexts
# Shared by all commands. A run has `builder` (a ContextBuilder), `context` (one that a model got,
# teacher's if `shows_thoughts`) and `row_values` (cells of its row).


def texts(run: Any) -> list[str]:
    """The texts of a context up to what was written or given as an answer."""
    decode = run.builder.tokenizer.decode
    held = [s for s in run.context if isinstance(s, TextSegment) and s.scored is None]
    return [decode(list(segment.ids)) for segment in held]


def expected_texts(run: Any) -> list[str]:
    given, values = run.given, run.row_values
    packer = given["prompt_style"] == "packer"
    from_file = given.get("prompts", ABSENT) is not ABSENT
    system = PACKER_SYSTEM_PROMPT if packer else INFERENCER_SYSTEM_PROMPT
    asked = values["question"] + given["instruction_suffix"]
    found = [system] if given["use_system_prompt"] else []
    found.append(asked if packer else "<img><|image_1|></img> " + asked)
    if run.shows_thoughts:
        intro, transition = "Look here.", "Now you."
        found += [intro if from_file else REFERENCE_INTRO] * given["use_reference_intro"]
        found += [transition if from_file else TRANSITION] * given["use_transition_prompt"]
    return found


def sizes(run: Any) -> Any:
    """The transform that the first image of the context went through, which is its problem's."""
    image = next(s for s in run.context if isinstance(s, ImageSegment))
    problem = decode_image(run.row_values["problem_image_0"]["bytes"])
    pixels = run.builder.vit_transform(problem)
    assert (image.patches == patchify(pixels, 14)).all(), "another transform made this image"
    return run.builder.vit_transform


def expected_sizes(run: Any) -> Any:
    g = run.given
    vit = ImageTransform(g["vit_max_size"], g["vit_min_size"], g["vit_stride"], g["vit_max_pixels"])
    vae = ImageTransform(g["vae_max_size"], g["vae_min_size"], 16)
    return vit if g["image_path"] == "direct" else InferencerPath(vit, vae)


def PROMPTS(file: Path) -> dict[str, Arrival]:
    """Rows of `PromptSettings`; the file replaces intro and transition."""
    return {
        "prompt_style": Arrival(["packer", "inferencer"], texts, expected_texts),
        "image_path": Arrival(["direct", "inferencer"], sizes, expected_sizes),
        "prompts": Arrival([ABSENT, file, file, ABSENT], texts, expected_texts),
        "use_system_prompt": Arrival([False, True], texts, expected_texts),
        "use_reference_intro": Arrival([True, True, False, True], texts, expected_texts),
        "use_transition_prompt": Arrival([True, True, True, False], texts, expected_texts),
        "instruction_suffix": Arrival([" Answer.", " Be brief."], texts, expected_texts),
        "vit_max_size": Arrival([56, 112], sizes, expected_sizes),
        "vit_min_size": Arrival([14, 28], sizes, expected_sizes),
        "vit_stride": Arrival([14, 28], sizes, expected_sizes),
        "vit_max_pixels": Arrival([2500, 12000], sizes, expected_sizes),
        "vae_max_size": Arrival([64, 96], lambda run: run.builder.vae_transform.max_size),
        "vae_min_size": Arrival([32, 48], lambda run: run.builder.vae_transform.min_size),
    }
