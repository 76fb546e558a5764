# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Command lines from dataclasses: one flag a field, the same names in a YAML file.

`--config FILE` is read first, flags override it. Booleans accept `--flag`, `--flag True` and
`--flag False`. A field's help text is its metadata "help".
"""

from __future__ import annotations

import argparse
import difflib
import sys
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import Field, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from modeling import fast
from modeling.text_files import read_yaml
from scripts.visual_opsd.processes import leave

T = TypeVar("T")


def option(default: Any, help: str, **metadata: Any) -> Any:
    """A dataclass field with a help text (and optionally `choices`)."""
    return field(default=default, metadata={"help": help, **metadata})


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
    config_class: type, description: str, defaults: dict[str, Any] | None = None
) -> argparse.ArgumentParser:
    """argparse parser of a dataclass whose fields are dataclasses (one argument group each)."""
    parser = _Parser(description=description, allow_abbrev=False)
    parser.add_argument("--config", default=None, help="YAML file with the same names as the flags")
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
        try:
            return float(value)  # YAML reads 1e-5 as a string
        except ValueError:
            pass
    if base is str and isinstance(value, int) and not isinstance(value, bool):
        value = str(value)  # resume: 500
    allowed = flag.spec.metadata.get("choices")
    if not isinstance(value, base) or (isinstance(value, bool) and base is not bool):
        raise ValueError(f"{path}: {name} must be {base.__name__}, got {value!r}")
    if allowed and value not in allowed:
        raise ValueError(f"{path}: {name} must be one of {', '.join(allowed)}, got {value!r}")
    return value


def parse_config(
    config_class: type[T],
    argv: Sequence[str] | None,
    description: str,
    defaults: dict[str, Any] | None = None,
) -> T:
    """Defaults (those of the fields, or `defaults`), then the YAML file, then the flags."""
    parser = build_parser(config_class, description, defaults)
    given = vars(parser.parse_args(argv))
    config_file = given.pop("config")
    values = read_config_file(config_file, config_class) if config_file else {}
    return make_config(config_class, {**(defaults or {}), **values, **given})


def make_config(config_class: type[T], values: dict[str, Any]) -> T:
    """Build the nested dataclasses from flat names."""
    flags = _flags(config_class)
    unknown = sorted(set(values) - set(flags))
    if unknown:
        raise ValueError(f"unknown settings: {', '.join(unknown)}")
    hints = get_type_hints(config_class)
    groups = {
        group.name: hints[group.name](
            **{n: v for n, v in values.items() if flags[n].group == group.name}
        )
        for group in fields(config_class)  # type: ignore[arg-type]
    }
    return config_class(**groups)


def flat(config: Any) -> dict[str, Any]:
    """Flag name -> value of a resolved configuration."""
    return {name: value for group in asdict(config).values() for name, value in group.items()}


def run_main(main: Callable[[], int | None]) -> typing.NoReturn:
    """Run an entry point; a user's mistake becomes one line on stderr and exit code 1."""
    try:
        fast.is_on("rows")  # reads VISUAL_OPSD_EAGER: a wrong name ends every program, on a CPU too
        code = main()
    except ValueError as error:
        print("; ".join([f"error: {error}", *getattr(error, "__notes__", [])]), file=sys.stderr)
        sys.exit(1)
    leave(code or 0)
