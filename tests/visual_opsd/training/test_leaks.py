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


def test_phrases_that_overlap_are_all_found() -> None:
    """The context's own does not hide one that it is a part of."""
    probe = LeakProbe("edited image, the edited image of a cat, image of a cat")
    text = "See the edited image of a cat."
    assert probe.finds(text, lambda: "An edited image.")
    assert not probe.finds(text, lambda: text)


# Han has no spaces, Cyrillic has.
@pytest.mark.parametrize(
    ("phrases", "text", "expected"),
    [
        ("\u8f85\u52a9\u7ebf", "\u5982\u56fe\u8f85\u52a9\u7ebf\u6240\u793a", True),
        ("visual thought", "\u8fd9\u4e2avisual thought\u91cc", True),
        ("\u043b\u0438\u043d\u0438\u044f", "\u043b\u0438\u043d\u0438\u044f\u043c\u0438", False),
        ("stra\u00dfe", "Die STRASSE", True),
        ("edited image", "an unedited image", False),
        ("edited image", "edited images", False),
        ("<image>, (b", "as in<image>said", True),
        ("a.*(b[, \\d+, (?P<x>", "a b 12", False),
    ],
)  # fmt: skip
def test_phrases_of_any_script_and_sign(phrases: str, text: str, expected: bool) -> None:
    assert LeakProbe(phrases).finds(text, str) is expected


def test_the_words_given() -> None:
    """Between commas, read as text and not as a pattern; without one there is nothing to find."""
    probe = LeakProbe(" a.b ,, The  Map,")
    assert probe and probe.finds("on the map", str) and probe.finds("(a.b)", str)
    assert not probe.finds("axb on a mapping", str)
    for nothing in ("", " , ", None):
        assert not LeakProbe(nothing) and not LeakProbe(nothing).finds("a, b", str)
