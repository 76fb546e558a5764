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
from collections.abc import Callable, Sequence

# Scripts that put no space between words: Thai, Lao, Myanmar, Khmer, kana, Han.
_UNSPACED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_LETTER = rf"[^\W{_UNSPACED}]"  # one next to it belongs to the same word


class LeakProbe:
    """Looks for phrases, whole words in any case, however they are spaced. Where a script does not
    separate words, or a phrase ends in a sign, it may stand beside anything.

    phrases: separated by commas; None: there is nothing to look for.
    """

    def __init__(self, phrases: str | None) -> None:
        words = [phrase.split() for phrase in _plain(phrases or "").split(",")]
        self._patterns = {" ".join(phrase): _pattern(phrase) for phrase in words if phrase}

    def __bool__(self) -> bool:
        """Whether there is anything to look for."""
        return bool(self._patterns)

    def finds(self, text: str, context: Callable[[], str]) -> bool:
        """Whether a completion has a phrase that the student's context, asked for then, lacks."""
        found = self._phrases(text)
        return bool(found) and bool(found - self._phrases(context()))

    def _phrases(self, text: str) -> set[str]:
        plain = _plain(text)
        return {phrase for phrase, pattern in self._patterns.items() if re.search(pattern, plain)}


def _pattern(words: Sequence[str]) -> str:
    before = rf"(?<!{_LETTER})" if re.match(_LETTER, words[0]) else ""
    after = rf"(?!{_LETTER})" if re.match(_LETTER, words[-1][-1]) else ""
    return before + r"\s+".join(map(re.escape, words)) + after


def _plain(text: str) -> str:
    return text.casefold().replace("\u2019", "'")
