# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Which rows share a pack."""

from __future__ import annotations

import pytest

from data.packing import group_by_tokens


@pytest.mark.parametrize(
    ("lengths", "limit", "groups"),
    [
        ([3, 4, 3], 10, [[0, 1, 2]]),  # exactly the limit is one pack
        ([3, 4, 4], 10, [[0, 1], [2]]),
        ([5, 5, 5, 5, 1], 10, [[0, 1], [2, 3], [4]]),  # each pack counts from nothing
        ([12, 1, 9, 12], 10, [[0], [1, 2], [3]]),  # a longer row stands alone
        ([10, 10], 10, [[0], [1]]),
        ([], 10, []),
    ],
)
def test_packs_hold_at_most_the_limit(
    lengths: list[int], limit: int, groups: list[list[int]]
) -> None:
    assert group_by_tokens(lengths, limit) == groups
