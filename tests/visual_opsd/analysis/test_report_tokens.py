# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Tokens of completions in the report: their figures, their colours, which steps have them."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from scripts.visual_opsd import report
from scripts.visual_opsd.analysis.report import page as page_file
from scripts.visual_opsd.analysis.report.completions import chosen_steps
from scripts.visual_opsd.analysis.report.runs import read_runs
from scripts.visual_opsd.analysis.report.tokens import COLOURS, Token, split_tokens, token_markup
from tests.visual_opsd.analysis.report_runs import Page, sample, write_run
from tests.visual_opsd.training_runs import TINY_BAGEL

NAMES = {1: "a", 2: "\ufffd", 3: "b"}
STEPS = [{"step": n, "loss": 1 / n} for n in range(1, 4)]
KNOWN: dict[str, Any] = {
    "divergence": [0.5, 0.0, 0.02], "student_entropy": [0.1, 3.0, 0.0],
    "teacher_entropy": [0.2, 0.0, 0.0], "fork": "100",
}  # fmt: skip


def decode(ids: list[int]) -> str:
    return "\u00e9" if ids == [2, 2] else "".join(NAMES[i] for i in ids)


def make(tmp_path: Path, *words: Any) -> Page:
    out = tmp_path / "report.html"
    assert report.main([*map(str, words), "--out", str(out), "--overwrite"]) == 0
    assert out.stat().st_size <= 3_000_000
    return Page(out)


def test_tokens_and_their_probabilities() -> None:
    chances = [0.5, 0.25, 0.125, 0.0625]
    record = {"ids": [1, 3, 2, 2, 1], "scored": "101101",
              "logprobs": [math.log(chance) for chance in chances]}  # fmt: skip

    found = split_tokens(record, decode)
    assert [(t.text, t.is_scored) for t in found] == [
        ("a", True), ("b", False), ("\u00e9", True), ("a", False), ("\u25a0", True),
    ]  # fmt: skip
    assert [t.probability for t in found] == pytest.approx([0.5, None, 0.125, None, 0.0625])
    shown = token_markup(found)
    assert shown.startswith('<b class=t1 title="p = 0.5">a</b><s title="not scored')
    assert '<b class=t3 title="p = 0.13">\u00e9</b>' in shown
    # The middle of a long completion is left out; without probabilities there is no colour.
    assert "[100 tokens left out]" in token_markup(found * 100)
    plain = split_tokens({**record, "logprobs": []}, decode)
    assert token_markup(plain).count("<b") == 0 and {t.probability for t in plain} == {None}
    with pytest.raises(ValueError, match="do not fit"):
        split_tokens({**record, "scored": "1"}, decode)


def test_figures_of_tokens() -> None:
    record = {
        "ids": [1, 3, 2, 2, 1], "scored": "101101", "logprobs": [0.0] * 4,
        "divergence": [0.5, 0.25, 0.125, "nan"], "student_entropy": [1, 2.5, 3, None],
        "teacher_entropy": ["inf", 1, 2, 0], "fork": "1010",
    }  # fmt: skip
    a, given, accent, other, end = split_tokens(record, decode)
    assert a == Token("a", True, 1.0, 0.5, 1.0, math.inf, 1.0)
    # A character of two tokens: the larger figures, and a fork if one of them is.
    assert accent == Token("\u00e9", True, 1.0, 0.25, 3.0, 2.0, 1.0)
    assert math.isnan(end.divergence or 0) and end.student_entropy is None and end.fork == 0
    for token in (given, other):
        assert token == Token(token.text, False, None)
    shown = token_markup([a, given, accent, end])
    assert shown.startswith(
        '<b class="d5 e4 f1" title="p = 1, D = 0.5, H = 1, teacher\'s H = inf, fork">a</b><s '
    )
    assert '<b class="d4 e5 f1" title="p = 1, D = 0.25, H = 3, teacher\'s H = 2, fork">' in shown
    assert shown.endswith('<b title="p = 1, D = nan, teacher\'s H = 0">\u25a0</b>')


@pytest.mark.parametrize(
    "changes",
    [
        {"divergence": [0.5]}, {"divergence": "0.5"}, {"divergence": {"a": 1}},
        {"divergence": [[], {}, True, "x"]}, {"fork": "10"}, {"fork": "10x0"}, {"fork": 5},
        {"student_entropy": None},
    ],
)  # fmt: skip
def test_figures_that_do_not_fit_are_unknown(changes: dict[str, Any]) -> None:
    record = {"ids": [1, 3, 2, 2, 1], "scored": "101101", "logprobs": [-1.0] * 4}
    assert split_tokens({**record, **changes}, decode) == split_tokens(record, decode)


@pytest.mark.parametrize("colour", COLOURS, ids=lambda colour: colour.letter)
def test_shades_follow_their_limits(colour: Any) -> None:
    """Each limit begins a shade, stronger towards what is worth a look, and each has a name."""
    assert all(low < high for low, high in pairwise(colour.limits))

    def shade(value: float) -> str:
        return colour.shade(Token("x", True, **{"probability": None, colour.field: value}))

    found = [shade(0.0), *(shade(limit) for limit in colour.limits)]
    assert [*dict(colour.shades())] == found
    assert [shade(-limit) for limit in colour.limits] == found[1:]  # a reverse KL has a sign
    strengths = [int(name[1:] or 0) for name in found]
    assert strengths == sorted(strengths, reverse=not colour.is_rising)
    assert {name[:1] for name in found} == {colour.letter, ""}
    assert colour.shade(Token("x", True, None)) == ""
    style = Path(page_file.__file__).with_name("report.css").read_text()
    for name in filter(None, found):  # in light, in dark, and where the class means it
        assert style.count(f"--{name}: #") == 2
        assert f".{name} {{ --{colour.letter}: var(--{name}); }}" in style
    assert f"#completions:has(#by-{colour.letter}:checked) .key.by-{colour.letter}" in style


def runs_with(tmp_path: Path, *samples: list[dict[str, Any]]) -> list[Path]:
    settings = {"model_path": str(TINY_BAGEL)}
    return [
        write_run(tmp_path / f"run{n}", STEPS, settings, lines) for n, lines in enumerate(samples)
    ]


def test_the_control_offers_what_is_known(tmp_path: Path) -> None:
    plain, known = [sample(1)], [sample(1, **KNOWN)]
    page = make(tmp_path, *runs_with(tmp_path, plain))
    assert page.of("input", type="radio") == [] and page.of("fieldset") == []
    assert [key["class"] for key in page.of("p") if "by-" in key.get("class", "")] == ["key by-t"]
    assert "divergence by token" not in page.text and "H, entropy" not in page.text

    page = make(tmp_path, *runs_with(tmp_path, known, plain))
    buttons = page.of("input", type="radio")
    assert [button["id"] for button in buttons] == ["by-d", "by-e", "by-f", "by-t"]
    assert {button["name"] for button in buttons} == {"colour"}
    assert [button["id"] for button in buttons if "checked" in button] == ["by-d"]
    assert "Colour tokens by divergence student's entropy fork probability" in page.text
    for said in ("below 0.003 to 0.01 to 0.03 to 0.1 to 0.3 0.3 and more", "the same they differ",
                 "below 0.05 to 0.2 to 0.5 to 1 to 2 2 and more",
                 "below 0.01 to 0.05 to 0.2 to 0.5 to 0.9 0.9 and more"):  # fmt: skip
        assert said in page.text, said
    assert "Without some of the colours, as samples.jsonl of these steps" in page.text
    assert "does not hold them: run1." in page.text
    titles = [found["title"] for found in page.of("b") if "title" in found]
    assert titles[0] == "p = 0.99, D = 0.5, H = 0.1, teacher's H = 0.2, fork"
    assert titles[3] == "p = 0.99"

    # One figure alone, and none of the sampler's.
    page = make(tmp_path, *runs_with(tmp_path, [sample(1, fork="010", logprobs=[])]))
    assert [button["id"] for button in page.of("input", type="radio")] == ["by-f"]
    assert [found.get("class", "") for found in page.of("b") if "title" in found] == ["f1"]


def test_steps_are_those_with_figures(tmp_path: Path) -> None:
    every = [sample(n, **(KNOWN if n % 5 == 0 else {})) for n in range(1, 31)]
    plain = [sample(n) for n in range(1, 31)]
    other = [sample(n, **(KNOWN if n % 10 == 0 else {})) for n in range(1, 31)]
    apart = [sample(n, **(KNOWN if n % 5 == 1 else {})) for n in range(1, 31)]

    def chosen(*samples: list[dict[str, Any]], wanted: Any = None) -> list[int]:
        return chosen_steps(read_runs(runs_with(tmp_path, *samples)), wanted)

    assert chosen(plain) == [1, 8, 15, 23, 30]
    assert chosen(every) == chosen(every, plain) == [5, 10, 15, 25, 30]
    assert chosen(every, other) == [10, 20, 30]
    assert chosen(every, apart) == [1, 8, 15, 23, 30]  # none that both have
    assert chosen(every, wanted=[7]) == [7]


def test_long_completions_in_any_script_stay_small(tmp_path: Path) -> None:
    """With all figures of tokens, and in letters of several bytes."""
    many = {
        "ids": [65] * 400, "scored": "1" * 401, "logprobs": [-3.0] * 401,
        "divergence": [0.123] * 401, "student_entropy": [1.234] * 401,
        "teacher_entropy": [0.0123] * 401, "fork": "1" * 401,
    }  # fmt: skip
    wide = {"ids": None, "question": "\u8ff7" * 1500, "completion": "\u5bab" * 1600}
    for changes in (many, wide):
        lines = [
            sample(step, slot, row=f"maze/{slot}", number=number, **changes)
            for step in range(1, 6) for slot in range(4) for number in range(3)
        ]  # fmt: skip
        page = make(tmp_path, *runs_with(tmp_path, *[lines] * 8))
        assert "further rows of these steps are left out" in page.text
        assert (tmp_path / "report.html").stat().st_size < 1_000_000
