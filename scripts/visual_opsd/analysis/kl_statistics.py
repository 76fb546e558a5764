# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""From divergences per scored token to the diagnostic's figures: means, gap closed, GO or NO-GO."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data.visual_thoughts import CONTROLS, VT_KINDS
from scripts.visual_opsd.evaluation.scoring import normal_quantile

PAPER_NOTE = (
    "The paper's 4.64 nats is another quantity: its script compares a teacher and a student text "
    "that differ, cut to the shorter length and aligned from the end, so that most rows compare "
    "different tokens. Here both models score the same tokens; do not set the two side by side."
)


def columns_of(controls: Sequence[str]) -> tuple[str, ...]:
    """Figures of each scored token: KL(teacher || student) and JSD in nats against the teacher with
    the real VTs and against those with controls in their place; the entropies of the first pair."""
    divergences = (f"{name}_{kind}" for kind in ("real", *controls) for name in ("kl", "jsd"))
    return (*divergences, "student_entropy", "teacher_entropy")


COLUMNS = columns_of(["noise"])  # those that are always there


@dataclass(frozen=True)
class SampleDivergences:
    """One completion's figures, a float32 array (tokens,) for each of `columns_of` the controls,
    and which of its scored tokens belong to the answer, bool (tokens,)."""

    columns: dict[str, np.ndarray]
    answer: np.ndarray

    def __post_init__(self) -> None:
        assert set(self.columns) == set(columns_of(self.controls)) >= set(COLUMNS)
        assert all(v.shape == self.answer.shape for v in self.columns.values())

    @property
    def controls(self) -> list[str]:
        """The controls that were measured, in the order of `data.visual_thoughts.CONTROLS`."""
        return [kind for kind in CONTROLS if f"kl_{kind}" in self.columns]


# ---------------------------------------------------------------------------------- figures


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if values.size else None


def _standard_error(values: np.ndarray) -> float | None:
    return float(values.std(ddof=1) / math.sqrt(values.size)) if values.size > 1 else None


def _describe(values: np.ndarray, per_sample: np.ndarray) -> dict[str, float | None]:
    """Figures of one divergence: over tokens (float64), and over the samples' means."""
    if not values.size:
        names = ("mean", "median", "p95", "max", "top5_share", "sample_mean", "sample_se")
        return dict.fromkeys(names)
    top = np.sort(values)[::-1][: max(1, round(0.05 * values.size))]
    total = float(values.sum())
    return {
        "mean": float(values.mean()),
        "median": float(np.median(values)),
        "p95": float(np.quantile(values, 0.95)),
        "max": float(values.max()),
        "top5_share": float(top.sum()) / total if total > 0 else None,
        "sample_mean": _mean(per_sample),
        "sample_se": _standard_error(per_sample),
    }


def _select(sample: SampleDivergences, column: str, answer: bool) -> np.ndarray:
    values = sample.columns[column].astype(np.float64)
    return values[sample.answer] if answer else values


def describe_tokens(samples: Sequence[SampleDivergences], *, answer: bool) -> dict[str, Any]:
    """Figures of all scored tokens, or of those in the answer.

    Returns:
        rows (their number), samples (those with any); for "real" and each control the figures of
        kl and jsd: mean, median, p95, max over tokens, share of the sum in the top 5 %, mean and
        standard error of the samples' means; "difference": real - noise of the samples' means
        with its standard error, paired; "difference_KIND": the same of another control; mean
        entropies. None where there is nothing to average.
    """
    controls = samples[0].controls if samples else ["noise"]
    names = columns_of(controls)
    values = {name: [_select(s, name, answer) for s in samples] for name in names}
    used = [i for i, some in enumerate(values["kl_real"]) if some.size]
    tokens = {
        name: np.concatenate([columns[i] for i in used]) if used else np.zeros(0)
        for name, columns in values.items()
    }
    means = {name: np.array([columns[i].mean() for i in used]) for name, columns in values.items()}
    kinds = ("kl", "jsd")
    return {
        "rows": int(tokens["kl_real"].size),
        "samples": len(used),
        **{
            vt: {k: _describe(tokens[f"{k}_{vt}"], means[f"{k}_{vt}"]) for k in kinds}
            for vt in ("real", *controls)
        },
        **{
            "difference" if control == "noise" else f"difference_{control}": {
                k: {
                    "mean": _mean(means[f"{k}_real"] - means[f"{k}_{control}"]),
                    "se": _standard_error(means[f"{k}_real"] - means[f"{k}_{control}"]),
                }
                for k in kinds
            }
            for control in controls
        },
        "student_entropy": _mean(tokens["student_entropy"]),
        "teacher_entropy": _mean(tokens["teacher_entropy"]),
    }


def describe(samples: Sequence[SampleDivergences], tasks: Sequence[str]) -> dict[str, Any]:
    """`describe_tokens` of all tokens ("all") and of the answers ("answer"), also for each task."""

    def both(chosen: Sequence[SampleDivergences]) -> dict[str, Any]:
        return {
            "all": describe_tokens(chosen, answer=False),
            "answer": describe_tokens(chosen, answer=True),
        }

    names = list(dict.fromkeys(tasks))
    by_task = {n: both([s for s, t in zip(samples, tasks, strict=True) if t == n]) for n in names}
    return {**both(samples), "tasks": by_task}


def _closed(
    base: Sequence[SampleDivergences],
    student: Sequence[SampleDivergences],
    column: str,
    answer: bool,
    paired: bool,
) -> dict[str, float | None]:
    before = [_select(sample, column, answer) for sample in base]
    after = [_select(sample, column, answer) for sample in student]
    counts = [sum(part.size for part in side) for side in (before, after)]
    total = sum(float(part.sum()) for part in before)
    if min(counts) == 0 or total <= 0.0:
        return {"value": None, "se": None}
    ratio = (sum(float(part.sum()) for part in after) / counts[1]) / (total / counts[0])
    error = None
    if paired and len(before) > 1:
        # Delta method for a ratio of sums over samples.
        residuals = np.array(
            [float(a.sum()) - ratio * float(b.sum()) for a, b in zip(after, before, strict=True)]
        )
        spread = float(residuals.std(ddof=1)) * math.sqrt(len(residuals))
        error = spread / total
    return {"value": 1.0 - ratio, "se": error}


def gap_closed(
    base: Sequence[SampleDivergences],
    student: Sequence[SampleDivergences],
    *,
    paired: bool = True,
) -> dict[str, dict[str, float | None]]:
    """1 - D(base teacher || student) / D(base teacher || base), means over tokens, real VTs.

    Keys kl, jsd (all tokens), answer_kl, answer_jsd, each with a value and a standard error over
    samples. `paired`: both scored the same tokens; otherwise (the student's own samples) there is
    no standard error. None where the base's divergence is 0 or there are no tokens.
    """
    assert not paired or all(
        a.answer.shape == b.answer.shape for a, b in zip(base, student, strict=True)
    )
    return {
        ("answer_" if answer else "") + kind: _closed(base, student, f"{kind}_real", answer, paired)
        for answer in (False, True)
        for kind in ("kl", "jsd")
    }


def go_test(base: dict[str, Any], threshold: float) -> dict[str, Any]:
    """GO or NO-GO from the base's figures (`describe`).

    GO if, in the answer span, the mean KL with the real VTs exceeds `threshold` and the samples'
    mean KL with real VTs exceeds that with noise by two standard errors (paired).
    """
    answer = base["answer"]
    kl = answer["real"]["kl"]["mean"]
    difference, error = (answer["difference"]["kl"][key] for key in ("mean", "se"))
    above = kl is not None and kl > threshold
    beyond = difference is not None and error is not None and difference > 2 * error
    if kl is None:
        why = "no completion holds a complete <answer>...</answer>, so there is no answer span"
    else:
        noise = answer["noise"]["kl"]["mean"]
        why = (
            f"answer-span KL {kl:.4f} nats is {'above' if above else 'not above'} {threshold:g}, "
            f"and {'exceeds' if beyond else 'does not exceed'} the {noise:.4f} of noise VTs by two "
            "standard errors"
        )
        if error is not None:
            why += f" (difference per sample {difference:+.4f}, standard error {error:.4f})"
    return {
        "go": above and beyond,
        "threshold": threshold,
        "answer_kl_real": kl,
        "answer_kl_noise": answer["noise"]["kl"]["mean"],
        "difference": difference,
        "standard_error": error,
        "samples": answer["samples"],
        "above_threshold": above,
        "above_noise": beyond,
        "why": why,
    }


# ---------------------------------------------------------------------------------- the table


def _number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _shown(figures: dict[str, Any]) -> list[str]:
    return [vt for vt in VT_KINDS if vt in figures]


def _line(title: str, figures: dict[str, Any]) -> str:
    cells = [
        _number(figures[vt][kind][name])
        for vt in _shown(figures)
        for kind in ("kl", "jsd")
        for name in ("mean", "median")
    ]
    return f"{title:32}{figures['rows']:>8}" + "".join(f"{cell:>9}" for cell in cells)


def _block(title: str, block: dict[str, Any]) -> list[str]:
    lines = [_line(f"{title}, all tokens", block["all"])]
    lines.append(_line(f"{title}, answer", block["answer"]))
    if len(block["tasks"]) > 1:
        for name, task in block["tasks"].items():
            lines.append(_line(f"  {name}", task["all"]))
            lines.append(_line(f"  {name}, answer", task["answer"]))
    return lines


def _gap_line(title: str, closed: dict[str, dict[str, float | None]]) -> str:
    def part(name: str, label: str) -> str:
        value, error = closed[name]["value"], closed[name]["se"]
        if value is None:
            return f"{label} -"
        half = "" if error is None else f" +- {100 * normal_quantile() * error:.1f}"
        return f"{label} {100 * value:.1f} %{half}"

    names = (("kl", "KL"), ("jsd", "JSD"), ("answer_kl", "answer KL"), ("answer_jsd", "answer JSD"))
    return f"{title}: " + ", ".join(part(*pair) for pair in names)


def table(result: dict[str, Any]) -> str:
    """The diagnostic as text, from what kl_diagnostic.json holds."""
    shown = _shown(result["base"]["all"])
    top = f"{'nats per scored token':40}" + "".join(f"{f'{vt} VT':^36}" for vt in shown)
    columns = ("KL mean", "median", "JSD mean", "median") * len(shown)
    names = "".join(f"{name:>9}" for name in columns)
    lines = [top, f"{'':32}{'tokens':>8}{names}", *_block("base", result["base"])]
    if not result["is_baseline"]:
        lines += _block("student", result["student"])
        lines.append(_gap_line("gap closed (same tokens)", result["gap_closed"]))
        if result["own_samples"] is not None:
            lines += _block("student, own samples", result["own_samples"])
            title = "gap closed (each its own samples)"
            lines.append(_gap_line(title, result["gap_closed_own_samples"]))
    lines.append(f"{'GO' if result['go'] else 'NO-GO'}: {result['go_test']['why']}")
    lines.append(f"Note: {PAPER_NOTE}")
    return "\n".join(lines)
