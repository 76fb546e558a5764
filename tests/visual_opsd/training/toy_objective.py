# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""An objective of one's own, in one file: every row is to answer with the same text."""

from __future__ import annotations

from collections.abc import Callable

from data.sequence import TextSegment
from data.thinkmorph import EVALUATION_ROWS, Row, parse_row
from scripts.visual_opsd.rows import TrainRow, make_builder
from scripts.visual_opsd.training.objective import Base, Objective


class ConstantText(Objective):
    """Cross-entropy on "left, then right" after each problem."""

    needs = EVALUATION_ROWS

    def prepare(self, base: Base) -> Callable[[Row], TrainRow]:
        builder = make_builder(base.tokenizer, base.model, self.config.prompt)
        ids = tuple(base.tokenizer.encode("left, then right", add_special_tokens=False))
        target = TextSegment(ids, (True,) * (len(ids) + 1))

        def make_row(row: Row) -> TrainRow:
            sample = parse_row(row, self.needs)
            return TrainRow.of(row, sample, builder.student(sample), targets=(target,))

        return make_row
