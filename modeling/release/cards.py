# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Model cards (README.md) of what is saved."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

STEP_LINE = "- Optimiser step: "


def model_card(
    base: Path,
    *,
    title: str,
    facts: Sequence[str],
    step: int | None,
    run_config: Mapping[str, Any] | None,
    header: Mapping[str, Any] | None = None,
) -> str:
    """README.md: where the weights come from, how they were trained, under which licence.

    Args:
        base: folder they were trained from; its own card states the licence.
        title: the heading; the base's name follows.
        facts: lines of the list that say what this folder is.
        step, run_config: how they were trained, where that is known.
        header: entries of the YAML header beside licence, base and tags.
    """
    own_card = base / "README.md"
    text = own_card.read_text(encoding="utf-8", errors="replace") if own_card.is_file() else ""
    stated = re.search(r"^license:\s*(\S+)", text, re.MULTILINE)
    licence = stated.group(1) if stated else "unknown"
    name = base.resolve().name
    entries = {"license": licence, "base_model": name, "tags": ["visual-opsd"], **(header or {})}
    lines = [
        "---",
        yaml.safe_dump(entries, sort_keys=False).strip(),
        "---",
        "",
        f"# {title} {name}",
        "",
        f"- Base: {name}",
        f"{STEP_LINE}{'not recorded' if step is None else step}",
        *(f"- {fact}" for fact in facts),
        f"- Licence: {licence}, the base's"
        + ("." if stated else " (its folder states none; BAGEL-7B-MoT is Apache-2.0)."),
    ]
    if run_config is not None:
        plain = json.loads(json.dumps(run_config, default=str))
        dumped = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
        lines += ["", "## Run configuration", "", "```yaml", dumped.strip(), "```"]
    return "\n".join(lines) + "\n"


def recorded_step(folder: Path) -> int | None:
    """The optimiser step that the model card of a folder states, if it has one and states it."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    stated = re.search(rf"^{STEP_LINE}(\d{{1,12}})$", text, re.MULTILINE)
    return int(stated.group(1)) if stated else None
