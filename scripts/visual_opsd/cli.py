# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Command lines from dataclasses: one flag a field, the same names in a YAML file.

`--config FILE` is read first, flags override it. Booleans accept `--flag`, `--flag True` and
`--flag False`. A field's help text is its metadata "help".
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from reprlib import repr as shown  # of bounded length
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from modeling import fast
from modeling.bagel import generate
from modeling.host import programs
from modeling.host.programs import MAX_SEED, bounds_problem, expand_path, path_argument, valid_text
from modeling.host.text_files import read_yaml

T = TypeVar("T")
BOUNDS = ("above", "at_least", "below", "at_most")
# Bounds that several options share. The upper ones keep out slips, not anybody's plans.
SEEDS = {"at_least": 0, "at_most": MAX_SEED}
SHARES = {"at_least": 0, "at_most": 1}
TOKENS = {"at_least": 1, "at_most": 2**17}  # of one text: four times the largest model's positions
PACKED = {"at_least": 1, "at_most": 2**22}  # rows of one forward
ROWS = {"at_least": 1, "at_most": 10**9}
TOGETHER = {"at_least": 1, "at_most": 2**16}  # rows decoded at once
ROUNDS = {"at_least": 0, "at_most": 1000}
TEMPERATURES = dict(zip(("at_least", "at_most"), generate.TEMPERATURES, strict=True))
WEIGHTS = {"at_least": 0, "at_most": 1e6}
SIDES = {"at_least": 1, "at_most": 8192}  # pixels
SHIFTS = {"at_least": 1e-3, "at_most": 1e3}  # of flow times
TIMESTEPS = {"at_least": 2, "at_most": 10_000}
SCALES = {"at_least": 0, "at_most": 1000}  # of guidance; 1 and less: none
TIMEOUTS = {"at_least": 1, "at_most": 1e9}  # seconds; torch counts nanoseconds in 64 bits


def option(default: Any, help: str, **metadata: Any) -> Any:
    """A dataclass field with a help text, and what its value must be.

    metadata: `choices`; bounds of a number (`above`, `at_least`, `below`, `at_most`; it must be
    finite anyway); `path`: True for a path, "list" for some by commas, in which `~` is expanded;
    `hint`: how to say what a refused value may have been meant to say.
    """
    return field(default=default, metadata={"help": help, **metadata})


@dataclass(frozen=True)
class Settings:
    """A group of options, each checked however the group was made (`checked`).

    A subclass that has a `__post_init__` of its own calls this one first.
    """

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for spec in fields(self):
            value = checked(spec, hints[spec.name], getattr(self, spec.name))
            object.__setattr__(self, spec.name, value)


def checked(spec: Field[Any], hint: Any, value: Any) -> Any:
    """The value of an option, with paths expanded.

    Raises:
        ValueError: "--NAME must be ..., got ...".
    """
    base, optional = _base_type(hint)
    if optional and value is None:
        return None
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    try:
        return _checked_value(spec.metadata, base, value)
    except ValueError as error:
        advice = spec.metadata.get("hint")
        raise ValueError(f"--{spec.name} {error}{f'; {advice}' if advice else ''}") from None


def _checked_value(meta: Mapping[str, Any], base: Any, value: Any) -> Any:
    allowed = (int, float) if base is float else base
    if not isinstance(value, allowed) or (isinstance(value, bool) and base is not bool):
        raise ValueError(f"must be {base.__name__}, got {shown(value)}")
    if "choices" in meta and value not in meta["choices"]:
        raise ValueError(f"must be one of {', '.join(meta['choices'])}, got {shown(value)}")
    if base in (int, float):
        problem = bounds_problem(value, **{name: meta[name] for name in BOUNDS if name in meta})
        if problem:
            raise ValueError(problem)
    return _checked_text(meta.get("path"), value) if isinstance(value, str) else value


def _checked_text(path: bool | str | None, value: str) -> str:
    if path == "list":
        parts = (part.strip() for part in value.split(","))
        return ",".join(expand_path(part) if part else part for part in parts)
    return expand_path(value) if path else valid_text(value)


def parse_bool(text: str) -> bool:
    lowered = text.strip().lower()
    if lowered in ("true", "1", "yes", "on"):
        return True
    if lowered in ("false", "0", "no", "off"):
        return False
    raise argparse.ArgumentTypeError(f"expected True or False, got {text!r}")


def _base_type(hint: Any) -> tuple[Any, bool]:
    """(type, may be None) of a field's annotation."""
    if get_origin(hint) in (types.UnionType, typing.Union):
        inner = [arg for arg in get_args(hint) if arg is not type(None)]
        assert len(inner) == 1, hint
        return inner[0], True
    return hint, False


def _converter(hint: Any) -> Callable[[str], Any]:
    base, optional = _base_type(hint)
    convert: Callable[[str], Any] = parse_bool if base is bool else base

    def parse(text: str) -> Any:
        return None if optional and text.lower() in ("none", "") else convert(text)

    parse.__name__ = getattr(base, "__name__", str(base))
    return parse


@dataclass(frozen=True)
class _Flag:
    group: str
    spec: Field[Any]
    hint: Any

    @property
    def name(self) -> str:
        return self.spec.name


def _flags(config_class: type) -> dict[str, _Flag]:
    found: dict[str, _Flag] = {}
    hints = get_type_hints(config_class)
    for group in fields(config_class):
        group_class = hints[group.name]
        assert is_dataclass(group_class)
        group_hints = get_type_hints(group_class)
        for spec in fields(group_class):
            assert spec.name not in found, f"two fields are called {spec.name}"
            found[spec.name] = _Flag(group.name, spec, group_hints[spec.name])
    return found


class _Parser(argparse.ArgumentParser):
    """argparse whose complaint about an unknown flag names the nearest known ones."""

    known: Sequence[str] = ()

    def error(self, message: str) -> typing.NoReturn:
        if "unrecognized arguments" in message:
            wrong = [w for w in message.split(": ", 1)[1].split() if w.startswith("--")]
            for word in wrong:
                near = difflib.get_close_matches(word.split("=")[0].lstrip("-"), self.known, 3)
                if near:
                    message += f" (did you mean {', '.join('--' + n for n in near)}?)"
        self.exit(2, f"{self.prog}: error: {message}\nsee {self.prog} --help\n")


def build_parser(
    config_class: type, description: str, defaults: Mapping[str, Any] | None = None
) -> argparse.ArgumentParser:
    """argparse parser of a dataclass whose fields are dataclasses (one argument group each)."""
    parser = _Parser(description=description, allow_abbrev=False)
    parser.add_argument(
        "--config",
        default=None,
        type=path_argument,
        help="YAML file with the same names as the flags",
    )
    flags = _flags(config_class)
    parser.known = list(flags)
    groups: dict[str, Any] = {}
    for flag in flags.values():
        group = groups.setdefault(flag.group, parser.add_argument_group(flag.group))
        base, _ = _base_type(flag.hint)
        extra: dict[str, Any] = {"nargs": "?", "const": True} if base is bool else {}
        if "choices" in flag.spec.metadata:
            extra["choices"] = flag.spec.metadata["choices"]
        text = flag.spec.metadata.get("help", "").replace("%", "%%")
        group.add_argument(
            f"--{flag.name}",
            type=_converter(flag.hint),
            default=argparse.SUPPRESS,
            help=f"{text} (default: {(defaults or {}).get(flag.name, flag.spec.default)})",
            **extra,
        )
    return parser


def read_config_file(path: str | Path, config_class: type) -> dict[str, Any]:
    """Flat mapping of a YAML file; groups may be written as nested mappings.

    Raises:
        ValueError: missing file, not a mapping, unknown name, or a value of the wrong type.
    """
    path = Path(path)
    loaded = read_yaml(path, "config file") or {}
    if not isinstance(loaded, dict):
        raise ValueError(f"{path} must be a mapping of flag names to values")
    flags = _flags(config_class)
    group_names = {flag.group for flag in flags.values()}
    flat: dict[str, Any] = {}
    for name, value in loaded.items():
        flat.update(value if name in group_names and isinstance(value, dict) else {name: value})
    for name, value in flat.items():
        if name not in flags:
            near = difflib.get_close_matches(str(name), list(flags), 3)
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise ValueError(f"{path}: unknown name {name!r}{hint}")
        flat[name] = _typed(name, value, flags[name], path)
    return flat


def _typed(name: str, value: Any, flag: _Flag, path: Path) -> Any:
    base, optional = _base_type(flag.hint)
    if optional and (value is None or (isinstance(value, str) and value.lower() == "none")):
        return None
    if base is float and isinstance(value, int | str) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            value = float(value)  # YAML reads 1e-5 as a string
    if base is str and isinstance(value, int) and not isinstance(value, bool):
        value = str(value)  # resume: 500
    try:
        return checked(flag.spec, flag.hint, value)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def parse_config(
    config_class: type[T],
    argv: Sequence[str] | None,
    description: str,
    defaults: Mapping[str, Any] | None = None,
) -> T:
    """Defaults (those of the fields, or `defaults`), then the YAML file, then the flags."""
    parser = build_parser(config_class, description, defaults)
    given = vars(parser.parse_args(argv))
    config_file = given.pop("config")
    values = read_config_file(config_file, config_class) if config_file else {}
    values = {**(defaults or {}), **values, **given}
    flags, hints = _flags(config_class), get_type_hints(config_class)
    groups: dict[str, dict[str, Any]] = {group.name: {} for group in fields(config_class)}  # type: ignore[arg-type]
    for name, value in values.items():
        groups[flags[name].group][name] = value
    return config_class(**{name: hints[name](**group) for name, group in groups.items()})


def flat(config: Any) -> dict[str, Any]:
    """Flag name -> value of a resolved configuration."""
    return {name: value for group in asdict(config).values() for name, value in group.items()}


def run_main(main: Callable[[], int | None]) -> typing.NoReturn:
    """`modeling.host.programs.run_main`, for programs that run a model."""

    def checked_main() -> int | None:
        fast.is_on("rows")  # reads VISUAL_OPSD_EAGER: a wrong name ends every program, on a CPU too
        return main()

    programs.run_main(checked_main)
