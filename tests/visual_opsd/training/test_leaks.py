# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Which completions speak of a picture that the student never saw."""

from __future__ import annotations

import pytest

from scripts.visual_opsd.config import TrainConfig
from scripts.visual_opsd.training.leaks import LeakProbe

DEFAULT = TrainConfig().run.leak_words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("In the edited image the path is free.", True),
        ("In the Edited\n Image the path is free.", True),
        ("I have highlighted the bar.", True),
        ("I\u2019ve drawn a line to the goal.", True),
        ("The drawn line stays on the ice.", True),
        ("The visual references show it.", True),
        # The problem's image is the student's to speak of.
        ("In the image above, the highlighted bar is the tallest.", False),
        ("The picture is a drawing of a red line, as shown.", False),
        ("I will draw a safe path from the elf to the goal.", False),
        ("We withdrew; the unedited images say nothing.", False),
        ("", False),
    ],
)
def test_default_phrases(text: str, expected: bool) -> None:
    assert LeakProbe(DEFAULT).finds(text, str) is expected


def test_what_the_student_has_read_is_no_leak() -> None:
    probe = LeakProbe("edited image, my sketch")
    asked = "What differs in the EDITED  image?"
    assert not probe.finds("The edited image has a cat.", lambda: asked)
    assert probe.finds("The edited image has a cat, as my sketch says.", lambda: asked)


def test_the_words_given() -> None:
    """Between commas, read as text and not as a pattern; without one there is nothing to find."""
    probe = LeakProbe(" a.b ,, The  Map,")
    assert probe and probe.finds("on the map", str) and probe.finds("(a.b)", str)
    assert not probe.finds("axb on a mapping", str)
    for nothing in ("", " , "):
        assert not LeakProbe(nothing) and not LeakProbe(nothing).finds("a, b", str)
