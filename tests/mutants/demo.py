# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Faults of the demo: its arms, its verdict, its exit code."""

from __future__ import annotations

from tests.mutants import faults

FAULTS = [
    *faults("scripts/miniworld/demo.py", "scripts/test_miniworld.py", [
        ("the verdict has the wrong sign", "if gain.high < LEAST_GAIN:",
         "if gain.high > LEAST_GAIN:"),
        ("the least gain is another", "LEAST_GAIN, MOST_DRIFT = 8.0, 4.0",
         "LEAST_GAIN, MOST_DRIFT = 0.8, 4.0"),
        ("a drift downwards is none", "or drift.high < -MOST_DRIFT:", "or False:"),
        ("a drift upwards is none", "if drift.low > MOST_DRIFT or", "if"),
        ("the gain is over the base", 'gain, drift = paired["real - noise"],',
         'gain, drift = paired["real - base"],'),
        ("the noise arm trains on real visual thoughts", 'noise_vt=arm == "noise"',
         "noise_vt=False"),
        ("both arms train on noise", 'noise_vt=arm == "noise"', "noise_vt=True"),
        ("the first checkpoint is judged", "return folders[-1]", "return folders[0]"),
        ("failures are never reported", '"failures": verdict(comparisons)', '"failures": []'),
        ("the demo always succeeds", '    if result["failures"]:\n        return 1\n', ""),
        ("a failed stage passes", "            if code:\n", "            if False:\n"),
        ("real is compared with the base",
         '"real - noise": compare_runs(out / "eval" / "real", out / "eval" / "noise")',
         '"real - noise": compare_runs(out / "eval" / "real", out / "eval" / "base")'),
        ("the seed does not reach the training", "            global_seed=self.args.seed,\n", ""),
        ("the trainer's flags are lost", "(*arguments, *self.args.train_flags))", "arguments)"),
        ("somebody's folder is cleared",
         'if held and not any((out / name).exists() for name in (MARKER, "result.json")):',
         "if False:"),
        ("the base with visual thoughts is text only", 'self.evaluate("base-vt", base, "vt")',
         'self.evaluate("base-vt", base)'),
        ("the gap is to the arm itself", '"--base_path", str(base), "--baseline",',
         '"--base_path", str(self.release(arm)), "--baseline",'),
    ]),
]  # fmt: skip
