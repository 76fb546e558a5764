# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Is an answer right, how sure is an accuracy, and do two runs differ on the same rows?"""

from __future__ import annotations

import math
import os
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

from data.answer_tags import answer_spans
from data.json_lines import read_given
from scripts.visual_opsd.evaluation.store import read_json
from scripts.visual_opsd.runs.identity import SETTINGS_FILE

_NUMBER = re.compile(r"[+-]?(?:\d+|\d{1,3}(?:,\d{3})+)(?:\.\d+)?")
_QUOTES = {'"': '"', "'": "'", "`": "`", "$": "$", "*": "*", "(": ")", "[": "]", "{": "}"}
_QUOTES |= {"\u201c": "\u201d", "\u2018": "\u2019"}
_STOPS = ".\u3002"

ROW_KEY = ("dataset", "file", "row", "pid", "digest")


# ---------------------------------------------------------------------------------- answers


def extract_answer(text: str) -> str | None:
    """The content of the last complete <answer>...</answer>, or None."""
    spans = answer_spans(text)
    return text[slice(*spans[-1])] if spans else None


def plain_characters(text: str) -> str:
    """Unicode NFKC without characters that nobody sees (zero-width ones), U+2212 as "-"."""
    text = unicodedata.normalize("NFKC", text).replace("\u2212", "-")
    if text.isascii():
        return text
    return "".join(c for c in text if unicodedata.category(c) != "Cf")


def bare(text: str) -> str:
    """Without white space at the ends, final full stops and enclosing quotes and brackets."""
    start, stop = 0, len(text)
    while True:
        while start < stop and text[start].isspace():
            start += 1
        while start < stop and (text[stop - 1].isspace() or text[stop - 1] in _STOPS):
            stop -= 1
        if stop - start < 2 or _QUOTES.get(text[start]) != text[stop - 1]:
            return text[start:stop]
        start, stop = start + 1, stop - 1


def normalise_answer(answer: str) -> str:
    """The form in which answers are compared.

    In this order: Unicode NFKC without zero-width characters and with U+2212 as "-", lower case
    (casefold), white space at the ends and around commas removed and elsewhere one space, final
    full stops (U+3002 too) removed, enclosing quotes, brackets, `*` and `$` removed (so "(B)" is
    "b"), and a plain number without its thousands separators, plus sign and superfluous zeros
    ("1,200.50" is "1200.5"). Units and percent signs are kept.
    """
    text = plain_characters(answer).casefold()
    text = bare(re.sub(r"\s*,\s*", ",", re.sub(r"\s+", " ", text.strip())))
    if _NUMBER.fullmatch(text):
        whole, _, part = text.replace(",", "").lstrip("+").partition(".")
        sign = "-" if whole.startswith("-") else ""
        whole, part = whole.lstrip("-").lstrip("0") or "0", part.rstrip("0")
        text = ("" if whole == "0" and not part else sign) + whole + ("." + part if part else "")
    return text


def exact_match(answer: str, text: str) -> bool:
    """Does the last <answer>...</answer> of a generated text equal the given answer?

    Both are normalised by `normalise_answer`. A text without a complete pair is wrong.
    """
    given = extract_answer(text)
    if given is None or not plain_characters(given).strip():
        return False  # even where the answer is nothing but punctuation, and so "" in normal form
    wanted = extract_answer(answer)
    return normalise_answer(given) == normalise_answer(answer if wanted is None else wanted)


# ---------------------------------------------------------------------------------- intervals


def normal_quantile() -> float:
    """Half width of a two-sided 95 % normal interval, in standard errors: 1.96."""
    return NormalDist().inv_cdf(0.975)


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a share; (0, 1) without observations."""
    if not 0 <= correct <= total:
        raise ValueError(f"{correct} correct of {total} is no share")
    if total == 0:
        return 0.0, 1.0
    z2 = normal_quantile() ** 2
    share = correct / total
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    spread = math.sqrt(z2 * (share * (1 - share) / total + z2 / (4 * total**2))) / (1 + z2 / total)
    # At the ends the bound is exact; rounding must not move it past them.
    low = 0.0 if correct == 0 else max(0.0, centre - spread)
    high = 1.0 if correct == total else min(1.0, centre + spread)
    return low, high


def lenient_figures(correct: int, n: int) -> dict[str, Any]:
    """Figures of the lenient verdict, to stand beside the strict ones of the same names."""
    return {
        "lenient_correct": correct,
        "lenient_accuracy": correct / n,
        "lenient_interval": list(wilson_interval(correct, n)),
    }


def mcnemar_exact(only_a: int, only_b: int) -> float:
    """Two-sided exact p of McNemar's test, from the discordant pairs."""
    pairs = only_a + only_b
    tail = sum(math.comb(pairs, i) for i in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / 2**pairs)


@dataclass(frozen=True)
class PairedComparison:
    """Two runs on the same rows; accuracies are shares, differences (a - b) percentage points.

    `low` and `high`: 95 % normal interval of the mean of the per-row differences. `only_a`,
    `only_b`: rows only one run got right. `p_value`: exact McNemar.
    """

    n: int
    accuracy_a: float
    accuracy_b: float
    difference: float
    low: float
    high: float
    only_a: int
    only_b: int
    p_value: float


def compare_paired(a: Sequence[bool], b: Sequence[bool]) -> PairedComparison:
    """Compare two runs' verdicts, row by row in the same order.

    Raises:
        ValueError: no rows, or different numbers of them.
    """
    n = len(a)
    if n == 0 or len(b) != n:
        raise ValueError(f"cannot compare runs of {n} and {len(b)} rows: they need the same rows")
    only_a = sum(x and not y for x, y in zip(a, b, strict=True))
    only_b = sum(y and not x for x, y in zip(a, b, strict=True))
    mean = (only_a - only_b) / n
    variance = (only_a + only_b - n * mean**2) / max(n - 1, 1)  # of differences in {-1, 0, 1}
    half = normal_quantile() * math.sqrt(max(variance, 0.0) / n)
    return PairedComparison(
        n=n,
        accuracy_a=sum(map(bool, a)) / n,
        accuracy_b=sum(map(bool, b)) / n,
        difference=100 * mean,
        low=100 * (mean - half),
        high=100 * (mean + half),
        only_a=only_a,
        only_b=only_b,
        p_value=mcnemar_exact(only_a, only_b),
    )


# ---------------------------------------------------------------------------------- runs


def read_verdicts(folder: str | Path, verdict: str = "correct") -> dict[tuple[Any, ...], bool]:
    """A verdict ("correct" or "lenient") on each row of a finished evaluation, by `ROW_KEY`.

    Raises:
        ValueError: no predictions there, a line that is none, or one without such a verdict.
    """
    path = Path(folder) / "predictions.jsonl"
    if not os.path.isfile(path):
        raise ValueError(
            f"{path} does not exist: give the output folder of a finished evaluation (python -m "
            "scripts.visual_opsd.evaluate --output_dir DIR; the same command resumes a killed one)"
        )
    found: dict[tuple[Any, ...], bool] = {}
    for number, line in read_given(path, "prediction"):
        if not all(isinstance(line.get(name), str | int) for name in ROW_KEY):
            raise ValueError(
                f"{path} line {number} holds no prediction ({', '.join(ROW_KEY)} name its row); "
                "give the output folder of a finished evaluation"
            )
        if verdict not in line:
            raise ValueError(
                f"{path} line {number} lacks {verdict!r}: an earlier version of this program wrote "
                "it; evaluate that model again (--overwrite)"
            )
        found[tuple(line[name] for name in ROW_KEY)] = bool(line[verdict])
    return found


def _scoring_version(folder: str | Path) -> str | None:
    """The rules a run was judged by; None if it has no settings to say so."""
    path = Path(folder) / SETTINGS_FILE
    if not path.is_file():
        return None
    held = read_json(path, "it says what the results beside it were made with").get("settings")
    return str(held.get("scoring_version", "of an earlier version")) if held else None


def check_same_rules(run_a: str | Path, run_b: str | Path) -> None:
    """Raises ValueError if two evaluations were judged by rules of different versions."""
    a, b = _scoring_version(run_a), _scoring_version(run_b)
    if a is not None and b is not None and a != b:
        raise ValueError(
            f"{run_a} was judged by the rules {a}, {run_b} by those {b}: such verdicts cannot be "
            "compared; evaluate the older run again (--overwrite)"
        )


def compare_runs(
    run_a: str | Path, run_b: str | Path, verdict: str = "correct"
) -> PairedComparison:
    """Compare two finished evaluations on their common rows, which must be all their rows.

    A row is known by dataset, file name, place, pid and a digest of its content. `verdict`:
    "correct", the strict one, or "lenient".

    Raises:
        ValueError: a folder without predictions or such verdicts, runs judged by rules of
            different versions, or runs of different rows (names the first).
    """
    a, b = read_verdicts(run_a, verdict), read_verdicts(run_b, verdict)
    check_same_rules(run_a, run_b)
    for (here, first), (there, second) in (((run_a, a), (run_b, b)), ((run_b, b), (run_a, a))):
        key = next((key for key in first if key not in second), None)
        if key is not None:
            named = dict(zip(ROW_KEY, key, strict=True))
            place = (named["dataset"], named["file"], named["row"])
            moved = any(other[:3] == place for other in second)
            why = "has other content" if moved else "is missing"
            raise ValueError(
                f"{here} ({len(first)} rows) and {there} ({len(second)} rows) did not answer the "
                f"same rows: row {named['row']} of {named['dataset']}/{named['file']} (pid "
                f"{named['pid']}) of {here} {why} in {there}. Evaluate both with the same --data, "
                "--split and --limit"
            )
    return compare_paired([a[key] for key in a], [b[key] for key in a])
