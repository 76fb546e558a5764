# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The two verdicts on answers as models write them: what a reader takes for the answer, and traps.

In every table a text without tags of its own stands in <answer>...</answer>.
"""

from __future__ import annotations

import time

import pytest

from data.worlds import get_scorer
from scripts.visual_opsd.evaluation.benchmark_scoring import (
    chart_verdict,
    choice_verdict,
    exact_verdict,
    maze_verdict,
    parse_maze,
    world_verdict,
)

OPTIONS = {"A": "left", "B": "right", "C": "a cat", "D": "none"}


def tagged(text: str) -> str:
    return f"<think>A or B?</think><answer>{text}</answer>"


# What a reader takes for B, by spellings the strict rule does not list.
B_TO_A_READER = [
    r"\boxed{\text{B}}", r"\text{B}", r"\textbf{B}", r"\mathrm{B}", r"$\text{B}$", r"$$B$$ ",
    r"\(B\)", r"\[B\]", r"\boxed{\mathbf{(B)}}", r"\displaystyle \boxed{B}", r"\fbox{B}",
    r"\left(B\right)", "_B_", "__B__", "**B** is right", "`B`;", "<b>B</b>", "# B", "> B", "- B",
    "\u300cB\u300d", "\u3010B\u3011", "\uff08B\uff09\u3002\u3002", "\u200b(B)\u200b", "B\ufe0f",
    "B, right", "B - right", "B \u2013 right", "B \u2014 right", "B\nright", "right (B)",
    "right, B",
    "B right", "B: right.", "Right!", "right;", "the right", "It is right", "on the right",
    "The answer is right", "right, because the arrow points there", "right is correct",
    "The answer is B because it points that way", "The answer is: **B**", "Answer: B, right",
    "I think B", "I think it's B", "It is B", "It's B!", "It must be option B", "B is correct",
    "B is the correct answer", "Option B is the best choice", "My choice would be B", "B;", "B!",
    "B?", "B \u2714", "So B", "Therefore, (B)", "Letter B", "choose B", "I'd go with B", "\"B\"!",
    "'B' is it", "b, right", "(b) right it is", "b because", "B. B.", "B (B)", "B B",
    "B, not A", "Not A but B", "not A, B", "neither A nor C, so B", "It isn't A. It is B",
    "B because A is blocked", "not left but right", "it's right!", "The answer is B. A is wrong",
    "B rather than A", "A is wrong, so B", "~~A~~ B",
    "I'm between A and C, but the answer is B", "\u9009B", "\u7b54\u6848\u662fB",
    "\u7b54\u6848\uff1aB", "B\u3001right", "\u24b7", "\U0001d401", "B\u00a0",
    "The correct option is B",
    "A no, B yes", "A \u274c B \u2705", "Option-B", "A? No, B", "exclude A; B",
    "$\\textbf{B}$ not $\\textbf{A}$",
    "Final answer: B", "B (the arrow points right)", "I choose option (B).", "B.\n\nThe arrow.",
]  # fmt: skip


@pytest.mark.parametrize("text", B_TO_A_READER)
def test_an_option_to_a_reader(text: str) -> None:
    verdict = choice_verdict(tagged(text), "B", OPTIONS)
    assert verdict.lenient, verdict
    others = [gold for gold in "ACD" if choice_verdict(tagged(text), gold, OPTIONS).lenient]
    assert not others


@pytest.mark.parametrize(
    "text",
    [
        "A or B", "B or A", "A and B", "A, B", "A/B", "A & B", "A B", "(A)(B)", "A; B", "A\nB",
        "Answer: A or B", "either A or B", "both A and B", "The answer is A or maybe B", "AB", "BA",
        "B. left", "B, left", "B: left", "B left", "B - left", "left (B)", "right or left",
        "left and right", "right, left", "B, or is it A?", "not B", "Not (B).", "B is wrong",
        "B is not correct", "B isn't right", "The answer is not B", "I don't think it is B",
        "It can't be B", "anything but B", "neither A nor B", "not A or B", "~~B~~",
        "A dog is on the left", "A dog", "A bird sits there", "A right turn leads to a goal",
        "I see it", "I would say", "I", "", " ", "?", "E", "b2", "B2", "2B", "Bright", "B's",
        "A left one", "U.S.B", "the dog is right of the cat, left of it", "A. left\nB. right",
        "A. left B. right C. a cat D. none", "\u4e0d\u662fB", "unclear", "None of A, B, C",
        "The answer is B. left", "The answer is B. No, A.", "not left, not right",
        "A vs B", "A versus B", "first A then B", "A to D", "A through D", "A oder B", "non-B",
        "no B", "B? No.", "right? no", "B won't work", "B fails", "B is out", "exclude B",
        "rule out B",
        "I doubt B", "unlikely B", "B is unlikely", "wrong: B", "B \u2717", "B \u274c", "\u00acB",
        "\u2260 B", "B != answer", "B-52", "B&W", "B/W photo", "N/A", "left, then right",
        "<del>B</del>", "between left and right", r"\boxed{A}\boxed{B}",
        r"$\boxed{A}$ or $\boxed{B}$",
        r"not $\textbf{B}$", "$B$ is wrong", "\u6392\u9664B", "\u975eB", "option A/option B",
    ],
)  # fmt: skip
def test_no_option_to_a_reader(text: str) -> None:
    """Two candidates, a negated one, an article or a pronoun are no answer; never B nor A."""
    for gold in "AB":
        assert not choice_verdict(tagged(text), gold, OPTIONS).lenient, gold


TRAPS: list[tuple[dict[str, str], str, str | None]] = [
    ({"A": "vitamin B", "B": "vitamin C"}, "vitamin C!", "B"),
    ({"A": "vitamin B", "B": "vitamin C"}, "A, vitamin B", "A"),
    ({"A": "vitamin B", "B": "vitamin C"}, "The answer is vitamin C", "B"),
    ({"A": "vitamin B", "B": "vitamin C"}, "A, vitamin C", None),
    ({"A": "point A", "B": "point B"}, "It is point B", "B"),
    ({"A": "point B", "B": "point A"}, "the answer is point B.", "A"),
    ({"A": "red", "B": "dark red"}, "It is dark red!", "B"),
    ({"A": "black", "B": "white", "C": "black and white"}, "black and white;", "C"),
    ({"A": "black", "B": "white", "C": "black and white"}, "black or white", None),
    ({"A": "a cat", "B": "a dog"}, "A cat!", "A"),
    ({"A": "a dog", "B": "a cat"}, "A cat, I think", "B"),
    ({"A": "a cat", "B": "the cat"}, "cat", None),
    ({"A": "same", "B": "same"}, "same!", None),
    ({"A": "Yes", "B": "No"}, "No, it is not.", "B"),
    ({"A": "Yes", "B": "No"}, "A, yes!", "A"),
    ({"A": "Yes", "B": "No"}, "Yes and no", None),
    ({"A": "7", "B": "17"}, "It is 17!", "B"),
    ({"A": "7", "B": "17"}, "**17** of them", None),
    ({"A": "1,200", "B": "1,500"}, "It is 1200;", "A"),
    ({"A": "B", "B": "A"}, "B;", "B"),
    ({"A": "the left one", "B": "the right one"}, "right one!", "B"),
    ({"A": "Washington D.C.", "B": "New York", "C": "x", "D": "y"}, "Washington D.C.!", "A"),
    ({"H": "x", "I": "y"}, "I think H", "H"),
    ({"H": "x", "I": "y"}, "(I);", "I"),
    ({"H": "x", "I": "y"}, "The answer is I;", "I"),
    ({"A": r"$\alpha$", "B": r"$\beta$"}, r"The answer is $\beta$", "B"),
    ({"A": "", "B": "right"}, "right!", "B"),
    ({"A": "C++ (new)", "B": "a|b [c]"}, "a|b [c]!", "B"),
    ({}, "Q;", "Q"),
    ({}, "The answer is Q because", "Q"),
]


@pytest.mark.parametrize(("options", "text", "letter"), TRAPS)
def test_texts_of_options_are_no_traps(
    options: dict[str, str], text: str, letter: str | None
) -> None:
    right = [gold for gold in "ABCDHIQ" if choice_verdict(tagged(text), gold, options).lenient]
    assert right == ([letter] if letter else [])


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("<Answer>B</Answer>", "B"), ("<ANSWER>B</ANSWER>", "B"), ("<answer>B</answer >", "B"),
        ("< answer >B< / answer >", "B"), ("<answer>B<answer>", "B"), ("<answer>B<\\answer>", "B"),
        ("<answer>B", "B"), ("<answer>\nB\n", "B"), ("<answer>B\n\nI chose this, not A", "B"),
        ("<answer>(B) right", "B"), ("B</answer>", "B"), ("The answer is B</answer>", "B"),
        ("&lt;answer&gt;B&lt;/answer&gt;", "B"), ("\uff1canswer\uff1eB\uff1c/answer\uff1e", "B"),
        ("[answer]B[/answer]", "B"), ("<final_answer>B</final_answer>", "B"),
        ("**<Answer>**B**</Answer>**", "B"), ("<Answer>A</Answer> no <Answer>B</Answer>", "B"),
        ("<answer>B<answer></answer>", None), ("<answer></answer>", None), ("<answer>", None),
        ("<answer> </answer>The answer is B", None), ("The answer is B. <answer>", "B"),
        ("I use <answer> tags. The answer is B", "B"),
        ("The answer is B.", "B"), ("the answer is (b).", "B"), ("Answer: B", "B"),
        ("**Answer:** B", "B"), ("### Final Answer\nB", "B"), ("Answer:\n\n**B**", "B"),
        ("So it is \\boxed{B}", "B"), ("\\boxed{A} was wrong. \\boxed{\\text{B}}", "B"),
        ("The answer is A. Wait, the answer is B.", "B"), ("The answer is B, not A.", "B"),
        ("The correct option is B.", "B"), ("Option A is nearer, so the answer is B.", "B"),
        ("The answer to the question is clearly B.", "B"), ("I choose B.", "B"), ("B", "B"),
        ("B.", "B"), ("B. right", "B"), ("(B) right", "B"), ("Right", "B"), ("right (B)", "B"),
        ("B is correct.", "B"), ("The arrow points there. B is the correct answer.", "B"),
        ("The arrow points away.\n\nB", "B"), ("The arrow points away.\n\n(B) right", "B"),
        ("The arrow points away. So B.", "B"), ("The arrow points away. Therefore, it is B.", "B"),
        ("The answer is right.", "B"), ("<think>The answer is A.</think>The answer is B.", "B"),
        ("<think>The answer is B.</think>", "B"), ("<think>It may be A</think>B", "B"),
        ("Look at the point named B in the picture.", None), ("The answer is A or B.", None),
        ("A. left\nB. right\nC. a cat\nD. none", None), ("A dog is on the left.", None),
        ("There is a dog. A dog is right of B in here.", None), ("The answer is not B.", None),
        ("The answer is unclear.", None), ("", None), ("I cannot tell from this picture.", None),
        ("The answer is A. The answer is not B.", "A"), ("A is right of B in this picture.", None),
        ("Is the answer A? No.", None), ("If the answer is A, the arrow lies.", None),
        ("Is the answer A? No. The answer is B.", "B"),
        ("A. left is wrong. B. right is wrong.", None),
        ("\u7b54\u6848\u662f B\u3002", "B"), ("What is the answer? It depends on B here", None),
    ],
)  # fmt: skip
def test_tags_to_a_reader(text: str, letter: str | None) -> None:
    right = [gold for gold in "ABCD" if choice_verdict(text, gold, OPTIONS).lenient]
    assert right == ([letter] if letter else []), right


@pytest.mark.parametrize(
    ("text", "gold", "strict", "lenient"),
    [
        ("45\u20ac", "45", True, True), ("45 \u20ac", "45", True, True), ("$45", "45", True, True),
        ("45$", "45", True, True), ("\u20ac 45", "45", True, True),
        ("-\u20ac45", "-45", True, True),
        ("-$45 m", "-45", False, True), ("1_234", "1234", False, True),
        ("\u20ac-45", "-45", True, True), ("45\u20b9", "45", True, True),
        ("\u20a945", "45", True, True),
        ("\uff0445", "45", True, True), ("45\uffe1", "45", True, True),
        ("\u20ac45%", "45", True, True),
        ("\u22125", "-5", True, True), ("\u2212 5", "-5", True, True),
        ("\u20135", "-5", False, True),
        ("\u22125", "5", False, False), ("minus 5", "-5", False, True),
        ("negative 5", "-5", False, True),
        ("-0", "0", True, True), ("-0.0 m", "0", False, True), ("0.1", "0", False, False),
        ("45 years", "45", False, True), ("45 USD", "45", False, True),
        ("USD 45", "45", False, True),
        ("US$45", "45", False, True), ("EUR45", "45", False, True), ("45kg", "45", False, True),
        ("45 m2", "45", False, True), ("45 m\u00b2", "45", False, True),
        ("45 m^2", "45", False, True),
        ("45 t CO2", "45", False, True), ("45 km/h", "45", False, True),
        ("45th", "45", False, True),
        ("CO2", "2", False, False), ("m2", "2", False, False), ("45 of 60", "45", False, False),
        ("~45", "45", False, True), ("\u224845", "45", False, True),
        ("about 45", "45", False, True),
        ("approx. 45", "45", False, True), ("45.", "45", True, True), ("45!", "45", False, True),
        ("**45**", "45", True, True), ("**45** people", "45", False, True),
        ("`45`", "45", True, True),
        (r"$\boxed{45}$", "45", True, True), (r"\boxed{45}.", "45", True, True),
        (r"\boxed{\text{45}}", "45", False, True), (r"45\%", "45", False, True),
        (r"\(45\)", "45", False, True), (r"\$45", "45", False, True),
        (r"1{,}234", "1234", False, True),
        (r"1\,234", "1234", False, True), (r"4.5 \times 10^{6}", "4500000", False, True),
        ("4.5e6", "4500000", True, True), ("4.5E+6", "4500000", True, True),
        ("4.5\u00d710^6", "4500000", False, True), ("4.5 x 10^6", "4500000", False, True),
        ("4.5\u00b710\u2076", "4500000", False, True), ("10^6", "1000000", False, True),
        ("10\u00b2", "100", True, True), ("10\u00b2", "10", False, False),
        ("45\u00b2", "45", False, False),
        ("4.5 million", "4500000", False, True), ("4.5M", "4500000", False, True),
        ("4.5 Million people", "4500000", False, True), ("$4.5 billion", "4.5e9", False, True),
        ("$4.5B", "4500000000", False, True), ("4.5bn", "4500000000", False, True),
        ("45K", "45000", False, True), ("45 k", "45000", False, True), ("45k", "45", False, False),
        ("45 thousand", "45000", False, True), ("45 thousands", "45000", False, True),
        ("2 trillion", "2e12", False, True), ("45\u4e07", "450000", False, True),
        ("45 kilograms", "45", False, True), ("45 Mbit", "45", False, True),
        ("45 m", "45", False, True),
        ("4500000", "4.5 million", False, True), ("4.5 million", "4.5", False, False),
        (r"\boxed{45 \text{ million}}", "45000000", False, True),
        (r"45\ \text{million}", "45", False, False),
        ("0.45 (45%)", "45", False, True), ("45%, i.e. 0.45", "0.45", False, True),
        ("45% (0.46)", "45", False, False), (r"\boxed{3} or \boxed{4}", "4", False, False),
        ("10  000", "10000", False, False),
        ("1,234", "1234", True, True), ("1,234", "1.234", False, False),
        ("1.234", "1234", False, False),
        ("1,5", "1.5", False, True), ("4,5", "4.5", False, True), ("0,45", "0.45", False, True),
        ("1,5", "15", False, False), ("1.234,5", "1234.5", False, True),
        ("1,234.5", "1234.5", True, True),
        ("1.234.567", "1234567", False, True), ("1'234", "1234", False, True),
        ("1\u2019234", "1234", False, True), ("12,34,567", "1234567", False, True),
        ("10 000", "10000", False, True), ("10\u2009000", "10000", False, True),
        ("10\u00a0000", "10000", False, True), ("10\u202f000", "10000", False, True),
        ("1 234 567", "1234567", False, True), ("10 000,5", "10000.5", False, True),
        ("10 00", "1000", False, False), ("3, 4", "3", False, False), ("3, 4", "3.4", False, False),
        ("3 4", "34", False, False), ("3 and 4", "3", False, False), ("3 or 4", "4", False, False),
        ("3; 4", "3", False, False), ("3\n4", "4", False, False), ("3/4", "3", False, False),
        ("3-4", "3", False, False), ("3-4", "4", False, False), ("3 to 4", "3", False, False),
        ("3\u20134", "3", False, False), ("1,2,3", "1", False, False),
        ("1,2,3", "123", False, False),
        ("5/5", "5", False, False), ("2019-05-03", "2019", False, False),
        ("12:30", "12", False, False),
        ("03/05/2019", "2019", False, False), ("May 2019", "2019", False, True),
        ("45 (2015)", "45", False, False), ("45 (45.0)", "45", False, True),
        ("45, 45", "45", False, True),
        ("45%", "45", True, True), ("45%", "0.45", False, True), ("0.45", "45%", False, True),
        ("45 percent", "45", False, True), ("45 per cent", "0.45", False, True),
        ("45 pct", "45%", False, True),
        ("45\uff05", "45", True, True), ("0.45%", "45%", False, False),
        ("45", "0.45", False, False),
        ("0.45", "45", False, False), ("45%", "4500", False, False), ("45%", "45 %", True, True),
        ("not 45", "45", False, False), ("not 45 but 46.0 m", "46", False, True),
        ("more than 45", "45", False, False), (">45", "45", False, False),
        ("at least 45", "45", False, False),
        ("The answer is 45 years", "45", False, True), ("20 + 25 = 45", "45", False, True),
        ("There are 45.", "45", False, True), ("45 because 20 and 25", "45", False, False),
        ("2012 or so", "2011", False, True), ("1900 AD", "2011", False, False),
        ("**India**", "India", True, True), ("_India_", "India", False, True),
        ("India!", "India", False, True),
        (r"\text{India}", "India", False, True), ("The answer is India", "India", False, True),
        ("It is India", "India", False, True),
        ("India, because it is largest", "India", False, True),
        ("India or China", "India", False, False), ("India, China", "India", False, False),
        ("Not India", "India", False, False), ("Yes, it is", "Yes", False, True),
        ("Yes and no", "Yes", False, False),
        ("No", "Yes", False, False), ("Type 3", "Type 2", False, False),
        ("2", "Type 2", False, False),
        ("2010-2015", "2010-2015", True, True), ("", "45", False, False),
        ("forty", "45", False, False),
    ],
)  # fmt: skip
def test_numbers_and_words_of_charts(text: str, gold: str, strict: bool, lenient: bool) -> None:
    verdict = chart_verdict(tagged(text), [gold])
    assert (verdict.correct, verdict.lenient) == (strict, lenient)


@pytest.mark.parametrize(
    ("text", "gold", "lenient"),
    [
        ("The answer is 45.", "45", True), ("Answer: 45%", "0.45", True), ("45", "45", True),
        ("So the result is 1,200 units.", "1200", True), ("\\boxed{45}", "45", True),
        ("<Answer>45</Answer>", "45", True), ("<answer>45", "45", True), ("45 years", "45", True),
        ("In 2015 there were 30. The answer is 45.", "45", True), ("30 + 15 = 45", "45", True),
        ("In 2015 there were 45 people in the town hall.", "45", False),
        ("The bars say 30 and 15, I see.\n\n45", "45", True),
        ("The answer is 45 or 46.", "45", False),
        ("The answer is India.", "India", True),
        ("I see India there, in the chart.", "India", False),
        ("The answer is 30. No, the answer is 45.", "45", True),
    ],
)  # fmt: skip
def test_charts_without_tags(text: str, gold: str, lenient: bool) -> None:
    verdict = chart_verdict(text, [gold])
    assert (verdict.correct, verdict.lenient) == (False, lenient)


MAZE = parse_maze("SFF/FHF/FFG")


@pytest.mark.parametrize(
    "text",
    [
        "R\uff0cR\uff0cD\uff0cD", "\uff32\uff32\uff24\uff24", "R|R|D|D", "R/R/D/D", "R\\R\\D\\D",
        "R-R-D-D", "R+R+D+D", "R & R & D & D", "R\u3001R\u3001D\u3001D", "R\u2022R\u2022D\u2022D",
        "R->R->D->D", "R \u2192 R \u2192 D \u2192 D", "R=>R=>D=>D", "R \u21d2 R \u21d2 D \u21d2 D",
        "R > R > D > D", "R\nR\nD\nD", "R R D D", "R. R. D. D.", "R;R;D;D", "R_R_D_D", "R:R:D:D",
        "['R', 'R', 'D', 'D']", '{"R","R","D","D"}', "(R)(R)(D)(D)", "<R><R><D><D>" , "**RRDD**",
        "`R,R,D,D`", "_RRDD_", r"\boxed{\text{R,R,D,D}}", r"\text{RRDD}", "$R, R, D, D$",
        r"R \rightarrow R \rightarrow D \rightarrow D", r"\(RRDD\)",
        "Right 2, Down 2", "right 2 down 2", "2 right, 2 down", "2 right 2 down", "2R 2D", "2R2D",
        "R2 D2", "R2D2", "R2,D2", "R x2, D x2", "R x 2, D x 2", "R\u00d72 D\u00d72", "R*2, D*2",
        "2xR, 2xD",
        "2 x R, 2 x D", "2\u00d7R, 2\u00d7D", "R^2 D^2", "R\u00b2D\u00b2", "right (2), down (2)",
        "Right: 2, Down: 2",
        "right twice, down twice", "right twice, then down twice", "two right, two down",
        "2 rights and 2 downs", "right two times, down two times", "2 steps right, 2 steps down",
        "Move right 2 steps, then move down 2 steps.", "go right, right, down, down",
        "right by 2, down by 2", "move right, move right, move down, move down",
        "First right, then right, then down, finally down.", "Rightwards, right, downward, down",
        "1. R 2. R 3. D 4. D", "1) R 2) R 3) D 4) D", "1: right\n2: right\n3: down\n4: down",
        "Step 1: R\nStep 2: R\nStep 3: D\nStep 4: D", "(1) R (2) R (3) D (4) D",
        "1. R\n2. R\n3. D\n4. D",
        "1- R 2- R 3- D 4- D", "\u2460 R \u2461 R \u2462 D \u2463 D", "R, R, D, D (4 moves)",
        "right to b1, right to c1, down to c2, down to c3",
        "First, right. Second, right. Third, down. Fourth, down.",
        "\u27a1\ufe0f\u27a1\ufe0f\u2b07\ufe0f\u2b07\ufe0f", "\u2192\u2192\u2193\u2193",
        "\u2192, \u2192, \u2193, \u2193",
        "\u21d2\u21d2\u21d3\u21d3", "\u2192 2 \u2193 2", "\u2192x2, \u2193x2",
        "\U0001f449\U0001f449\U0001f447\U0001f447",
        "\u25b6\u25b6\u25bc\u25bc", ">>vv", "> > v v",
        r"\rightarrow\rightarrow\downarrow\downarrow",
        "R\u2192 R\u2192 D\u2193 D\u2193", "\u53f3\u53f3\u4e0b\u4e0b",
        "\u53f3\uff0c\u53f3\uff0c\u4e0b\uff0c\u4e0b",
        "east, east, south, south", "The plan is R,R,D,D", "Plan: RRDD", "Answer: R, R, D, D",
        "R,R,D,D reaches the goal", "rrdd!", "RIGHT, RIGHT, DOWN, DOWN",
        "R,R,L,R,D,D because of the hole", "R, R, D, D (4 steps)", "R,R,D,D, not through the hole",
        "1 right, 1 right, 1 down, 1 down", "R1 R1 D1 D1", "R\u200b,R\u200b,D,D",
    ],
)  # fmt: skip
def test_plans_to_a_reader(text: str) -> None:
    assert maze_verdict(tagged(text), MAZE).lenient
    state = MAZE.state
    assert world_verdict(tagged(text), get_scorer("spatial_navigation"), state).lenient


@pytest.mark.parametrize(
    "text",
    [
        "R,R,D", "R,D,R,D", "R,R,R,D,D", "R|D|R|D", "RRDDU", "2 right, 1 down", "Right 2, Down 3",
        "R,R,D,D or D,D,R,R", "R,R,D,D; no: D,R,R,D", "not R,R,D,D but R,D,R,D", "RDD", "DD",
        "R 2 D", "R2D", "2 R 2", "up", "", " ", "the right path", "I cannot tell", "2", "R x",
        "\u2197\u2198", "\u2192\u2193", "R99999999999D", "R x999999999, D x999999999",
        "\u2191\u2191",
        "not RRDD", "never RRDD", "don't go R, R, D, D", "RRDD is wrong", "R,R,D,D fails",
        "I tried RRDD but it falls into the hole", "instead of right, right, down, down",
        "3. R 1. R 2. D", "right R", "right right down", "1 R 2 R 3 D 4 D", "\u2193\u2193\u2192",
    ],
)  # fmt: skip
def test_no_plan_to_a_reader(text: str) -> None:
    assert not maze_verdict(tagged(text), MAZE).lenient
    assert not world_verdict(tagged(text), get_scorer("spatial_navigation"), MAZE.state).lenient


@pytest.mark.parametrize(
    ("text", "lenient"),
    [
        ("The plan: \\boxed{\\text{D,D,R,R}}", True), ("\\boxed{R|R|D|D}", True), ("RRDD", True),
        ("The answer is R, R, D, D.", True), ("Plan: right 2, down 2", True),
        ("<answer>R,R,D,D", True),
        ("<Answer>R,R,D,D</Answer>", True),
        ("There is a hole in the middle, so.\n\nR, R, D, D", True),
        ("The hole is below the right square. Go down.", False), ("Answer: R,R,D", False),
        ("<think>R,D,R,D?</think>The moves are: R, R, D, D", True),
    ],
)  # fmt: skip
def test_plans_without_tags(text: str, lenient: bool) -> None:
    verdict = maze_verdict(text, MAZE)
    assert (verdict.correct, verdict.lenient) == (False, lenient)


@pytest.mark.parametrize(
    ("text", "answer", "strict", "lenient"),
    [
        ("blue", "Blue", True, True), ("It is blue!", "blue", False, True),
        ("**B**, left", "B", False, True),
        ("light blue", "blue", False, False), ("7 cats", "7", False, True),
        ("7.2", "7", False, False),
        ("R -> R -> D", "R,R,D", False, True), ("R -> D", "R,R,D", False, False),
        ("A or B", "B", False, False),
        ("1,5", "1.5", False, True), ("B", "<answer>B</answer>", True, True),
        ("\\text{seven}", "seven", False, True),
    ],
)  # fmt: skip
def test_answers_of_other_data_sets(text: str, answer: str, strict: bool, lenient: bool) -> None:
    verdict = exact_verdict(tagged(text), answer)
    assert (verdict.correct, verdict.lenient) == (strict, lenient)
    assert not exact_verdict("", answer).lenient


def test_the_lenient_verdict_never_takes_back_the_strict_one() -> None:
    """Where the strict rule reads an answer, a reader takes the same one."""
    assert choice_verdict("<answer>A</answer> or <answer>B", "A", OPTIONS).lenient
    assert not choice_verdict("<answer>A</answer> or <answer>B", "B", OPTIONS).lenient
    assert not choice_verdict("<answer>A</answer><Answer>B</Answer>", "B", OPTIONS).lenient
    assert not maze_verdict("<answer>R,R,D</answer> \\boxed{R,R,D,D}", MAZE).lenient


@pytest.mark.parametrize(
    "unit",
    [
        " ", "A ", "(", "\\", "\\boxed{", "\\text{", "*", "~", "<answer>", "&lt;", "the answer is ",
        "answer: B ", "not ", "B because A ", "left or ", "1 ", "1,234 ", "12 345 ", "1.2.3.",
        "10^",
        "= ", "R2", "2R ", "1. R ", "\u2192", "x 2 ", "\u200b", "\u00b2", "\n",
    ],
)  # fmt: skip
def test_long_answers_are_judged_at_once(unit: str) -> None:
    """200 kB of anything: no pattern goes back and back over what it has read."""
    long = (unit * (200_000 // len(unit)))[:200_000]
    for text in (long, f"<answer>{long}"):
        started = time.process_time()
        choice_verdict(text, "B", OPTIONS)
        chart_verdict(text, ["45", "India"])
        maze_verdict(text, MAZE)
        exact_verdict(text, "B")
        assert time.process_time() - started < 3  # four verdicts, on a busy machine


def test_an_answer_is_found_at_the_end_of_a_long_text() -> None:
    long = "The arrow points there. " * 8000
    assert choice_verdict(long + "The answer is B.", "B", OPTIONS).lenient
    assert choice_verdict(f"{long}<answer>B;", "B", OPTIONS).lenient
    assert choice_verdict(f"<answer>B, {long}</answer>", "B", OPTIONS).lenient
    assert chart_verdict(long + "The answer is 45.", ["45"]).lenient
