# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Settings that question the paper's recipe: which tokens count, what rows are completed with."""

from __future__ import annotations

from dataclasses import dataclass
from reprlib import repr as shown  # of bounded length

from scripts.visual_opsd.cli import SHARES, TOGETHER, Settings, option
from scripts.visual_opsd.opsd_loss import early_tokens


@dataclass(frozen=True)
class RolloutSettings(Settings):
    """What Visual-OPSD's rows are completed with."""

    completions_per_row: int = option(
        1, "completions of each row in a step, each with random numbers of its own; scored as so "
        "many rows", **TOGETHER,
    )  # fmt: skip
    off_policy_share: float = option(
        0.0, "share of the rows that take the data set's text trace, with its answer, in the place "
        "of their completions", **SHARES,
    )  # fmt: skip

    def check(self, samples: bool) -> None:
        """Raises ValueError: several completions, all alike; samples: whether they are drawn."""
        if self.completions_per_row > 1 and not samples:
            raise ValueError(
                f"--completions_per_row {self.completions_per_row}: greedy completions "
                "(--sample_do_sample False) of a row are all alike; leave one of the two out"
            )


def check_token_weights(token_weight: str, skip_first_tokens: int, teacher: bool) -> None:
    """Raises ValueError: an unknown weight, or one that leaves no token or lacks its teacher."""
    try:
        first = early_tokens(token_weight)
    except ValueError:
        raise ValueError(
            "--token_weight must be none, early:N (N a whole number of at least 1, as in "
            f"early:32), entropy or teacher_ahead, got {shown(token_weight)}"
        ) from None
    if first is not None and first <= skip_first_tokens:
        raise ValueError(
            f"--token_weight {token_weight} counts the first {first} tokens, of which "
            f"--skip_first_tokens {skip_first_tokens} leaves none: lower the latter"
        )
    if token_weight == "teacher_ahead" and not teacher:
        raise ValueError(
            "--token_weight teacher_ahead needs a teacher, and with --jsd_weight 0 there is none: "
            "use none, early:N or entropy"
        )
