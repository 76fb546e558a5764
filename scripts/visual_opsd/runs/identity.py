# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""What a run depends on, as JSON: a digest of it, and in what two runs differ."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from modeling.release.fingerprints import file_fingerprint

SETTINGS_FILE = "settings.json"  # what the results beside it depend on
_SHOWN, _SHOWN_TEXT = 8, 80


def stable_hash(value: Any) -> str:
    """Digest of a JSON-able value; the order of keys does not matter."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def files_digest(folder: Path, names: Iterable[str]) -> str:
    """Digest of some files of a folder: their names and what `file_fingerprint` sees of them."""
    return stable_hash({name: file_fingerprint(folder / name) for name in names})


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Texts "name: saved ..., now ..." for each entry in which two mappings differ as JSON."""
    old, new = (json.loads(json.dumps(entries)) for entries in (old, new))
    found = []
    for name in sorted(old.keys() | new.keys()):
        saved, now = (repr(entries.get(name, "(absent)")) for entries in (old, new))
        if saved != now:
            found.append(f"{name}: saved {_short(saved, now)}, now {_short(now, saved)}")
    if len(found) > _SHOWN:
        found[_SHOWN:] = [f"and {len(found) - _SHOWN} more"]
    return found


def _short(text: str, other: str) -> str:
    """The text, of a long one the part that begins where it differs from `other`."""
    if len(text) <= _SHOWN_TEXT:
        return text
    same = next((n for n, (a, b) in enumerate(zip(text, other)) if a != b), len(other))  # noqa: B905
    start = max(0, same - _SHOWN_TEXT // 4)
    stop = start + _SHOWN_TEXT
    return "..." * (start > 0) + text[start:stop] + "..." * (stop < len(text))
