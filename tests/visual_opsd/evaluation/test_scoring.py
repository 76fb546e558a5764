# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Answers, intervals and the paired comparison against values computed by hand or published."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from scripts.visual_opsd.evaluation.benchmark_scoring import SCORING_VERSION, chart_verdict
from scripts.visual_opsd.evaluation.scoring import (
    compare_paired,
    compare_runs,
    exact_match,
    extract_answer,
    mcnemar_exact,
    normalise_answer,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>x</think><answer>B</answer>", "B"),
        ("<answer>A</answer> no, <answer> C\n</answer>", " C\n"),
        ("<answer>A <answer>B</answer>", "B"),
        ("<answer>A</answer><answer>cut off", "A"),
        ("<answer></answer>", ""),
        ("answer: B", None),
        ("<answer>B", None),
        ("B</answer>", None),
    ],
)
def test_last_complete_answer(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    ("given", "normal"),
    [
        ("  The  Red\nCar. ", "the red car"),
        ("(B)", "b"),
        ("**B.**", "b"),
        ('"42".', "42"),
        ("$1,200.50", "$1,200.50"),
        ("1,200.50", "1200.5"),
        ("+007.0", "7"),
        ("-0.0", "0"),
        ("-0.5", "-0.5"),
        ("L, R ,U", "l,r,u"),
        ("1,2", "1,2"),  # a list, not a thousands separator
        ("12%", "12%"),
        ("\uff21", "a"),  # full-width letter
        ("STRASSE", "strasse"),
        ("(a) and (b)", "a) and (b"),  # only ever applied to both sides alike
        (".", ""),
        ("", ""),
        ("B\u3002", "b"),  # the CJK full stop is one by name
        ("\u200bB\ufeff", "b"),  # nothing that a reader sees
        ("\u22125", "-5"),
        ("(" * 3000 + "x" + ")" * 3000, "x"),
    ],
)
def test_normal_form(given: str, normal: str) -> None:
    assert normalise_answer(given) == normal
    assert normalise_answer(normal) == normal


def test_nothing_is_no_answer() -> None:
    """Not even where the right answer is punctuation, of which the normal form leaves nothing."""
    for empty in ("", " ", "\u200b", "\n"):
        assert not exact_match(".", f"<answer>{empty}</answer>")
        assert not chart_verdict(f"<answer>{empty}</answer>", ["()", "."]).correct
    assert exact_match(".", "<answer>.</answer>")


def test_exact_match() -> None:
    assert exact_match("Blue", "<answer> blue.</answer>")
    assert exact_match("<answer>Blue</answer>", "<answer>blue</answer>")
    assert exact_match("3", "<answer>2</answer> wait <answer>3.0</answer>")
    assert not exact_match("blue", "blue")
    assert not exact_match("blue", "<answer>light blue</answer>")


def test_wilson_known_values() -> None:
    # Agresti and Coull's formula, as statsmodels' proportion_confint(method="wilson") gives it.
    assert wilson_interval(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-7)
    assert wilson_interval(50, 100) == pytest.approx((0.4038315, 0.5961685), abs=1e-7)
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.2775328), abs=1e-7)
    assert wilson_interval(10, 10) == pytest.approx((0.7224672, 1.0), abs=1e-7)
    assert wilson_interval(0, 0) == (0.0, 1.0)
    low, high = wilson_interval(1200, 2400)
    assert high - low == pytest.approx(2 * 1.959964 * math.sqrt(0.25 / (2400 + 3.8415)), abs=1e-6)
    with pytest.raises(ValueError, match="3 correct of 2"):
        wilson_interval(3, 2)


def test_mcnemar_by_hand() -> None:
    assert mcnemar_exact(2, 8) == 2 * (1 + 10 + 45) / 1024
    assert mcnemar_exact(8, 2) == mcnemar_exact(2, 8)
    assert mcnemar_exact(5, 5) == 1.0
    assert mcnemar_exact(0, 0) == 1.0
    assert 0 < mcnemar_exact(500, 900) < 1e-20  # beyond the range of floating binomials


def test_paired_comparison_by_hand() -> None:
    # 4 rows only a, 1 only b, 3 both, 2 neither: mean 0.3, variance (5 - 10 * 0.09) / 9.
    a = [True] * 4 + [False] + [True] * 3 + [False] * 2
    b = [False] * 4 + [True] + [True] * 3 + [False] * 2
    result = compare_paired(a, b)
    half = 1.9599640 * math.sqrt((5 - 0.9) / 9 / 10)
    assert (result.n, result.only_a, result.only_b) == (10, 4, 1)
    assert (result.accuracy_a, result.accuracy_b) == (0.7, 0.4)
    assert result.difference == pytest.approx(30.0)
    assert (result.low, result.high) == pytest.approx((100 * (0.3 - half), 100 * (0.3 + half)))
    assert result.p_value == 2 * (1 + 5) / 32
    back = compare_paired(b, a)
    assert (back.difference, back.low, back.high) == pytest.approx(
        (-result.difference, -result.high, -result.low)
    )
    same = compare_paired(a, a)
    assert (same.difference, same.low, same.high, same.p_value) == (0.0, 0.0, 0.0, 1.0)
    assert compare_paired([True], [False]).difference == 100.0
    with pytest.raises(ValueError, match="2 and 1 rows"):
        compare_paired([True, False], [True])


def write_run(folder: Path, rows: dict[int, bool], **changes: Any) -> Path:
    folder.mkdir()
    lines = [
        {"index": i, "dataset": "D", "file": "f.parquet", "row": i, "pid": f"p{i}",
         "digest": f"{i:x}", "correct": correct, **changes}
        for i, correct in rows.items()
    ]  # fmt: skip
    (folder / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_compare_runs_pairs_rows_not_lines(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", {0: True, 1: False, 2: True})
    b = write_run(tmp_path / "b", {2: True, 1: True, 0: False})
    result = compare_runs(a, b)
    assert (result.only_a, result.only_b, result.difference) == (1, 1, 0.0)


def test_runs_of_different_rules_are_not_compared(tmp_path: Path) -> None:
    """Folders written before the rules had a version, by an earlier one, and by this one."""

    def judged(name: str, settings: dict[str, str], **changes: Any) -> Path:
        folder = write_run(tmp_path / name, {0: True, 1: False}, **changes)
        (folder / "settings.json").write_text(json.dumps({"hash": "", "settings": settings}))
        return folder

    plain = judged("plain", {"model": "x"})
    first = judged("first", {"scoring_version": "visual-opsd-exact-1"})
    now = judged("now", {"scoring_version": SCORING_VERSION}, lenient=True)
    for old, said in ((plain, "of an earlier version"), (first, "visual-opsd-exact-1")):
        for pair in ((now, old), (old, now)):
            with pytest.raises(ValueError, match=rf"rules.* {said}.*\(--overwrite\)") as caught:
                compare_runs(*pair)
            assert "\n" not in str(caught.value)
    assert compare_runs(first, first).only_a == 0
    with pytest.raises(ValueError, match=r"first/predictions\.jsonl line 1 lacks 'lenient'"):
        compare_runs(first, first, "lenient")
    strict, lenient = compare_runs(now, now), compare_runs(now, now, "lenient")
    assert (strict.accuracy_a, lenient.accuracy_a) == (0.5, 1.0)


def test_compare_runs_needs_the_same_rows(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", {0: True, 1: False, 2: True})
    short = write_run(tmp_path / "short", {0: True, 2: True})
    for pair in ((a, short), (short, a)):
        with pytest.raises(ValueError, match=r"row 1 of D/f\.parquet \(pid p1\).* is missing in"):
            compare_runs(*pair)
    edited = write_run(tmp_path / "edited", {0: True, 1: False, 2: True}, digest="0")
    with pytest.raises(ValueError, match=r"row 1 .*has other content"):
        compare_runs(a, edited)
    with pytest.raises(ValueError, match="finished evaluation"):
        compare_runs(a, tmp_path / "none")
