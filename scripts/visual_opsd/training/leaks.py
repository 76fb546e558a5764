# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Does a completion speak of a picture that the student never saw?

A student is taught by somebody who looks at visual thoughts, and may learn to write as if it had
seen them too. The problem's image it does see: "the image", "as shown" or "the red line" prove
nothing, and a problem may itself be a drawing or a highlighted chart. So the phrases are of what is
made only in a visual thought ("the edited image", "I have highlighted", "the drawn path") or of how
the teacher's context names it, and one that stands in the student's own context does not count.
Promises ("I will draw") are no such phrases: the base makes them, and they claim to have seen
nothing. The defaults stand in `run_config.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable


class LeakProbe:
    """Looks for phrases, whole words in any case, however they are spaced.

    phrases: separated by commas.
    """

    def __init__(self, phrases: str) -> None:
        words = [phrase.split() for phrase in _plain(phrases).split(",")]
        any_of = "|".join(r"\s+".join(map(re.escape, phrase)) for phrase in words if phrase)
        self._pattern = rf"(?<!\w)(?:{any_of})(?!\w)" if any_of else None

    def __bool__(self) -> bool:
        """Whether there is anything to look for."""
        return self._pattern is not None

    def finds(self, text: str, context: Callable[[], str]) -> bool:
        """Whether a completion has a phrase that the student's context, asked for then, lacks."""
        found = self._phrases(text)
        return bool(found) and bool(found - self._phrases(context()))

    def _phrases(self, text: str) -> set[str]:
        if self._pattern is None:
            return set()
        return {" ".join(match.split()) for match in re.findall(self._pattern, _plain(text))}


def _plain(text: str) -> str:
    return text.lower().replace("\u2019", "'")
