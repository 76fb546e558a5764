# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""What a pass over logits leaves of each of their rows."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class RowStatistics(NamedTuple):
    """Of each row of (c, V) logits, (c,) each in the compute dtype."""

    lse: Tensor  # log-sum-exp of logits / T
    entropy: Tensor  # at T, in nats
    unit_lse: Tensor | None  # log-sum-exp at T = 1; None where it was not computed
    tail_lse: Tensor | None = None  # that of logits / T outside the top-k, if there is a tail
    # (c, 3), from the kernels alone, both log-sum-exps taken apart so that no digit is lost where
    # logits are large: the largest logit, and the logs of the sums less it, at T and at T = 1
    norm: Tensor | None = None
