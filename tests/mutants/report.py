# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Faults of the report: strangers' texts, curves, tokens, pictures, what is compared."""

from __future__ import annotations

from tests.mutants import faults

FOLDER = "scripts/visual_opsd/analysis/report"
TESTS = "visual_opsd/analysis/test_report.py"

FAULTS = [
    *faults(f"{FOLDER}/markup.py", TESTS, [
        ("texts become markup", "return html.escape(plain, quote=True)", "return plain"),
        ("quotes end attributes", "html.escape(plain, quote=True)",
         "html.escape(plain, quote=False)"),
        ("text may turn its surroundings", '"Cc", "Cf", "Cs"', '"Cc", "Cs"'),
        ("shares are no per cent", 'f"{100 * value:.4g} %"', 'f"{value:.4g} %"'),
    ]),
    *faults(f"{FOLDER}/charts.py", TESTS, [
        ("missing values are bridged", 'pen = "L" if pair else "M"', 'pen = "L"'),
        ("smoothing lags", "near = min(reach, place, len(finite) - 1 - place)", "near = reach"),
        ("differences overflow", "_LARGEST = 1e300", "_LARGEST = 1.7e308"),
        ("the interval has one end", "corners += [p for p in reversed",
         "corners = [p for p in reversed"),
    ]),
    *faults(f"{FOLDER}/completions.py", TESTS, [
        ("a token has another's probability",
         "chances = [next(values) if known and flag == \"1\" else None for flag in flags]",
         "chances = [0.0 if flag == \"1\" else None for flag in flags]"),
        ("shades are turned round", "rank = sum(token.probability < limit for",
         "rank = sum(token.probability >= limit for"),
        ("texts have no bound", "if not card or len(card) > self._text_left:", "if not card:"),
    ]),
    *faults(f"{FOLDER}/pictures.py", TESTS, [
        ("pictures are those of the next step", "order.candidates(step - 1, slot)",
         "order.candidates(step, slot)"),
        ("whichever row comes first is shown",
         'if isinstance(found, Sample) and f"{found.dataset}/{found.pid}" == name:',
         "if isinstance(found, Sample):"),
    ]),
    *faults(f"{FOLDER}/tables.py", TESTS, [
        ("arms are compared the other way round", "compare_runs(path, first)",
         "compare_runs(first, path)"),
        ("settings that differ are not shown", "any(v != values[0] for v in values)", "False"),
    ]),
    *faults(f"{FOLDER}/page.py", TESTS, [
        ("a control's teacher is not told", 'if run.settings.get("noise_vt") is True:', "if False:"),
        ("skipped steps are not told", "        if skipped:\n", "        if False:\n"),
        ("any script may run", "default-src 'none'; img-src data:", "img-src data:"),
    ]),
    *faults(f"{FOLDER}/runs.py", TESTS, [
        ("a run is drawn twice", "if len({path.resolve() for path in found}) < len(found):",
         "if False:"),
    ]),
    *faults("scripts/visual_opsd/report.py", TESTS, [
        ("an earlier file is lost", 'overwrite=given.overwrite', "overwrite=True"),
    ]),
    *faults("scripts/miniworld/demo.py", "miniworld/test_demo.py", [
        ("the demo writes no report", "    write_report([out / \"real\", out / \"noise\"], report, "
         "evaluations=arms)\n", ""),
    ]),
]  # fmt: skip
