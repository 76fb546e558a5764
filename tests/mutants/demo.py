# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Faults of the demo: its arms, its verdict, its exit code."""

from __future__ import annotations

from tests.mutants import faults

FAULTS = [
    *faults("scripts/miniworld/demo.py", "miniworld/test_demo.py", [
        ("the verdict has the wrong sign", "if gain.difference < LEAST_GAIN:",
         "if gain.difference > LEAST_GAIN:"),
        ("the upper end decides", "if gain.difference < LEAST_GAIN:", "if gain.high < LEAST_GAIN:"),
        ("an interval around 0 passes", "elif gain.low <= 0:", "elif gain.high <= 0:"),
        ("the least gain is another", "LEAST_GAIN, MOST_DRIFT = 8.0, 4.0",
         "LEAST_GAIN, MOST_DRIFT = 0.8, 4.0"),
        ("a drift downwards is none", "or drift.high < -MOST_DRIFT:", "or False:"),
        ("a drift upwards is none", "if drift.low > MOST_DRIFT or", "if"),
        ("the gain is over the base", 'gain, drift = paired["real - noise"],',
         'gain, drift = paired["real - base"],'),
        ("the noise arm trains on real visual thoughts",
         'self.train("noise", *flags(noise_vt=True))', 'self.train("noise")'),
        ("both arms train on noise", '[self.train("real"),', '[self.train("real", *flags(noise_vt=True)),'),
        ("the first checkpoint is judged", "return max(folders, key", "return min(folders, key"),
        ("the last checkpoint is that of the last name", "key=lambda folder: int(folder.name))",
         "key=lambda folder: folder.name)"),
        ("failures are never reported", '"failures": verdict(comparisons)', '"failures": []'),
        ("the demo always succeeds", '    if result["failures"]:\n        return 1\n', ""),
        ("a failed stage passes", "    if code:\n", "    if False:\n"),
        ("real is compared with the base",
         '"real - noise": compare_runs(out / "eval" / "real", out / "eval" / "noise")',
         '"real - noise": compare_runs(out / "eval" / "real", out / "eval" / "base")'),
        ("the seed does not reach the training", "            global_seed=self.args.seed,\n", ""),
        ("the trainer's flags are lost", "(*arguments, *more, *self.args.train_flags))",
         "(*arguments, *more))"),
        ("somebody's folder is cleared",
         'if held and not any((out / name).exists() for name in (MARKER, "result.json")):',
         "if False:", "miniworld/test_miniworld.py"),
        ("the base with visual thoughts is text only", 'self.evaluate("base-vt", base, "vt")',
         'self.evaluate("base-vt", base)'),
        ("the gap is to the arm itself", '"--base_path", str(base), "--baseline",',
         '"--base_path", str(self.release(arm)), "--baseline",'),
        ("an evaluation ignores its context", "            context=context,\n",
         '            context="text",\n'),
        ("an arm's evaluation is the base's", "[self.evaluate(arm, self.release(arm)) for arm in",
         "[self.evaluate(arm, base) for arm in"),
    ]),
    *faults("scripts/miniworld/arms.py", "miniworld/test_arms.py", [
        ("arms are of one kind", "return flags(vt=arm)", 'return flags(vt="real")'),
        ("finished arms are run again", "if not result.exists():", "if True:"),
        ("a stopped arm is refused", ", *flags(auto_resume=True))", ")"),
        ("an offline arm trains on another cache",
         'flags(teacher_cache=self.out / arm / "cache")', 'flags(teacher_cache=self.out / "cache")'),
        ("seeds count by the first", "return statistics.mean(values), half", "return values[0], half"),
        ("intervals of seeds add up", "sum(width**2 for width in half_widths)) / len(half_widths)",
         "sum(width**2 for width in half_widths))"),
        ("a failed arm passes", "return 1 if failures else 0", "return 0"),
    ]),
]  # fmt: skip
