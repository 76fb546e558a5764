# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Text, JSON and YAML files that people bring: what is wrong with one is said with its name."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import yaml


class _UniqueKeys(yaml.SafeLoader):
    """YAML's plain types; a key that stands twice in a mapping is an error, not the last value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.value == "<<":
                continue
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key.value!r} stands twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_text(path: str | Path, what: str, *, fix: str = "") -> str:
    """The text of a UTF-8 file, without a byte order mark.

    Args:
        path: the file. what: what it is, as in "prompts file". fix: what to do about a bad one.

    Raises:
        ValueError: it is absent, cannot be read, or is not UTF-8; names the file and the byte.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        reason = "does not exist"
    except OSError as error:
        reason = f"cannot be read: {error.strerror or error}"
    except UnicodeDecodeError as error:
        reason, fix = f"is not UTF-8 text (byte {error.start})", fix or "save it as UTF-8"
    except ValueError as error:
        path, reason = repr(str(path)), f"cannot be read: {error}"  # a NUL in the path
    raise _problem(what, path, reason, fix)


def read_json(path: str | Path, what: str, *, fix: str = "") -> Any:
    """The value of a JSON file. Raises ValueError as `read_text`, and for what is no JSON."""
    return _parse(json.loads, "JSON", path, what, fix)


def read_json_object(path: str | Path, what: str, *, fix: str = "") -> dict[str, Any]:
    """The object of a JSON file. Raises ValueError as `read_json`, and for any other value."""
    value = read_json(path, what, fix=fix)
    if not isinstance(value, dict):
        found = f"must hold a JSON object, found {type(value).__name__}"
        raise _problem(what, path, found, fix)
    return value


def read_yaml(path: str | Path, what: str) -> Any:
    """The value of a YAML file of plain types; None if it is empty.

    Raises:
        ValueError: as `read_text`; no YAML; a key that stands twice; nested too deeply.
    """
    return _parse(lambda text: yaml.load(text, _UniqueKeys), "YAML", path, what, "")


def _parse(parse: Callable[[str], Any], kind: str, path: str | Path, what: str, fix: str) -> Any:
    text = read_text(path, what, fix=fix)
    try:
        return parse(text)
    except RecursionError:
        reason = "is nested too deeply to be read"
    except (ValueError, TypeError, yaml.YAMLError) as error:  # also a date that YAML's types refuse
        reason = f"is not valid {kind}: {' '.join(str(error).split())}"
    raise _problem(what, path, reason, fix)


def _problem(what: str, path: str | Path, reason: str, fix: str) -> ValueError:
    return ValueError(f"{what} {path} {reason}" + (f"; {fix}" if fix else ""))
