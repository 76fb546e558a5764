# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Text, JSON and YAML files that people bring: what is wrong with one is said with its name."""

from __future__ import annotations

import json
from collections.abc import Hashable
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
        raise ValueError(f"{what} {path} does not exist{_then(fix)}") from None
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"{what} {path} cannot be read: {reason}{_then(fix)}") from error
    except UnicodeDecodeError as error:
        advice = fix or "save it as UTF-8"
        raise ValueError(
            f"{what} {path} is not UTF-8 text (byte {error.start}); {advice}"
        ) from error
    except ValueError as error:  # a NUL in the path
        raise ValueError(f"{what} {str(path)!r}: {error}") from error


def read_json(path: str | Path, what: str, *, fix: str = "") -> Any:
    """The value of a JSON file. Raises ValueError as `read_text`, and for what is no JSON."""
    text = read_text(path, what, fix=fix)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{what} {path} is not valid JSON: {error}{_then(fix)}") from error
    except RecursionError:
        raise ValueError(f"{what} {path} is nested too deeply to be read{_then(fix)}") from None
    except ValueError as error:  # a number of thousands of digits
        raise ValueError(f"{what} {path}: {error}{_then(fix)}") from error


def read_json_object(path: str | Path, what: str, *, fix: str = "") -> dict[str, Any]:
    """The object of a JSON file. Raises ValueError as `read_json`, and for any other value."""
    value = read_json(path, what, fix=fix)
    if not isinstance(value, dict):
        found = type(value).__name__
        raise ValueError(f"{what} {path} must hold a JSON object, found {found}{_then(fix)}")
    return value


def read_yaml(path: str | Path, what: str) -> Any:
    """The value of a YAML file of plain types; None if it is empty.

    Raises:
        ValueError: as `read_text`; no YAML; a key that stands twice; nested too deeply.
    """
    text = read_text(path, what)
    try:
        return yaml.load(text, _UniqueKeys)  # a SafeLoader
    except yaml.YAMLError as error:
        raise ValueError(f"{what} {path} is not valid YAML: {_one_line(error)}") from error
    except RecursionError:
        raise ValueError(f"{what} {path} is nested too deeply to be read") from None
    except (ValueError, TypeError) as error:  # a date or number YAML's own types refuse
        raise ValueError(f"{what} {path} is not valid YAML: {_one_line(error)}") from error


def _then(fix: str) -> str:
    return f"; {fix}" if fix else ""


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
