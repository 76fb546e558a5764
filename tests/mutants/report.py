# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Faults of the report: strangers' texts, curves, tokens, pictures, what is compared."""

from __future__ import annotations

from tests.mutants import faults

FOLDER = "scripts/visual_opsd/analysis/report"
TESTS = "visual_opsd/analysis/test_report.py"
TOKENS = "visual_opsd/analysis/test_report_tokens.py"

FAULTS = [
    *faults(f"{FOLDER}/markup.py", TESTS, [
        ("texts become markup", "return html.escape(plain, quote=True)", "return plain"),
        ("quotes end attributes", "html.escape(plain, quote=True)",
         "html.escape(plain, quote=False)"),
        ("text may turn its surroundings", '"Cc", "Cf", "Cs"', '"Cc", "Cs"'),
        ("shares are no per cent", 'f"{100 * value:.{digits}g} %"', 'f"{value:.{digits}g} %"'),
    ]),
    *faults(f"{FOLDER}/charts.py", TESTS, [
        ("missing values are bridged", 'pen = "L" if pair else "M"', 'pen = "L"'),
        ("smoothing lags", "near = min(reach, place, len(finite) - 1 - place)", "near = reach"),
        ("differences overflow", "_LARGEST = 1e300", "_LARGEST = 1.7e308"),
        ("a profile's axis is logarithmic", "may_be_log=not figure.tenths", "may_be_log=True"),
        ("numbers at an axis are alike", "for digits in (4, 6, 8):", "for digits in (4,):"),
        ("marks are drawn anywhere", "if x.low <= step <= x.high", "if True"),
        ("the interval has one end", "corners += [p for p in reversed",
         "corners = [p for p in reversed"),
    ]),
    *faults(f"{FOLDER}/completions.py", TOKENS, [
        ("texts have no bound", "if not card or size > self._text_left:", "if not card:"),
        ("characters are counted for bytes", 'size = len(card.encode("utf-8"))', "size = len(card)"),
        ("steps without figures are shown", "{n for n, known in steps.items() if known} or set(steps)",
         "set(steps)"),
    ]),
    *faults(f"{FOLDER}/tokens.py", TOKENS, [
        ("a token has another's figures",
         'return [next(scored, None) if flag == "1" else None for flag in flags]',
         'return [held[0] if flag == "1" else None for flag in flags]'),
        ("figures that do not fit are spread", "if len(held) > count or (len(held) < count and not is_cut):",
         "if False:"),
        ("one short list is a cut completion", "for values in listed.values()}) == 1",
         "for values in listed.values()}) > 0"),
        ("a cut completion has no figures", "(len(held) < count and not is_cut)",
         "len(held) < count"),
        ("shades are turned round", "size >= x if self.is_rising else size < x",
         "size < x if self.is_rising else size >= x"),
        ("a piece has the figures of its least token", "name: max(values, key=lambda",
         "name: min(values, key=lambda"),
        ("the control is not offered", "if offered != [_SAMPLED]:", "if False:"),
        ("no choice is taken", "{' checked' if c is offered[0] else ''}", ""),
    ]),
    *faults(f"{FOLDER}/figures.py", TESTS, [
        ("quantiles are no band", '("_p50", "_p10", "_p90"),', ""),
        ("the teacher's interval is not found", '("accuracy", "low", "high"), ', ""),
        ("clipper is of the clip", "(?![a-z0-9])", ""),
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
        ("a profile is of the first steps alone", "first = round(place * (len(steps) - size))",
         "first = 0"),
        ("any script may run", "default-src 'none'; img-src data:", "img-src data:"),
    ]),
    *faults(f"{FOLDER}/runs.py", TESTS, [
        ("each validation of a bad teacher is marked", "if now and not was]", "if now]"),
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
