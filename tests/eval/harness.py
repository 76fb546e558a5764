# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""VLMEvalKit's base class in miniature, for tests without that harness."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image


class StandInBase:
    """The part of VLMEvalKit's BaseModel that a model class relies on."""

    INTERLEAVE = False
    allowed_types = ("text", "image")

    def use_custom_prompt(self, dataset: str) -> bool:
        return False

    def set_dump_image(self, dump_image: Callable[[Any], Any]) -> None:
        self.dump_image_func = dump_image

    def dump_image(self, line: Any, dataset: str) -> Any:
        return self.dump_image_func(line)

    def check_content(self, content: Any) -> str:
        """ "str", "dict", "liststr", "listdict" or "unknown"."""
        if isinstance(content, list) and content:
            kinds = {self.check_content(item) for item in content}
            return f"list{kinds.pop()}" if kinds in ({"str"}, {"dict"}) else "unknown"
        if isinstance(content, dict):
            return "dict"
        return "str" if isinstance(content, str) else "unknown"

    def preproc_content(self, content: Any) -> list[dict[str, Any]]:
        """Any of these forms as a list of parts; a string that names an image file is one."""
        parts = content if isinstance(content, list) else [content]
        return [part if isinstance(part, dict) else _part(part) for part in parts]

    def generate(self, message: Any, dataset: str | None = None) -> str:
        if self.check_content(message) == "unknown":
            raise ValueError(f"a message is a text, a part or a list of one kind; got {message!r}")
        parts = self.preproc_content(message)
        wrong = [part for part in parts if part.get("type") not in self.allowed_types]
        if wrong:
            raise ValueError(f"parts must be of type text or image, got {wrong[0]!r}")
        return self.generate_inner(parts, dataset)

    def generate_inner(self, message: list[dict[str, Any]], dataset: str | None = None) -> str:
        raise TypeError(f"{type(self).__name__} must define generate_inner")


def _part(text: str) -> dict[str, str]:
    is_image = Path(text).suffix.lower() in Image.registered_extensions() and Path(text).is_file()
    return {"type": "image" if is_image else "text", "value": text}
