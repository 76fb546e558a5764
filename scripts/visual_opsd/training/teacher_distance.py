# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""How far a student is from its teacher on fixed texts, the base's answers to validation rows.

Completions of training change with the student, these do not, so the figures of a run's validations
can be compared with each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from data.packing import pack
from data.sequence import Completion
from data.thinkmorph import Row
from modeling.host.memory import memory_errors
from scripts.visual_opsd.config import TrainConfig
from scripts.visual_opsd.loss.chunked import chunked_divergences, chunked_opsd_loss
from scripts.visual_opsd.opsd_loss import LossConfig
from scripts.visual_opsd.processes import FailedAlone, agree, all_reduce_sums, attempt
from scripts.visual_opsd.rows import TrainRow
from scripts.visual_opsd.scored_rows import (
    ScoredRow,
    check_same_labels,
    empty_row,
    score_completion,
)
from scripts.visual_opsd.training.objective import Workplace
from scripts.visual_opsd.training.teacher import Teacher
from scripts.visual_opsd.training.visual_opsd import PrepareOPSD, encode_teachers

# Row -> ids, a 0 or 1 for each label (whether it is scored), whether the budget ended it.
StoredCompletions: TypeAlias = dict[int, tuple[list[int], str, bool]]
_CE = LossConfig(jsd_weight=0.0, ce_weight=1.0)
_ADVICE = "lower --pack_tokens or --loss_chunk_size"


class ReadRows(Protocol):
    """`Validate.rows`."""

    def __call__(
        self, indices: Sequence[int], prepare: Callable[[Row], TrainRow], /
    ) -> Iterator[tuple[int, TrainRow]]: ...


def store_completions(completions: Mapping[int, Completion]) -> StoredCompletions:
    """Completions as a training state holds them."""
    return {
        index: (list(c.ids), "".join("01"[scored] for scored in c.scored), c.capped)
        for index, c in sorted(completions.items())
    }


def _restore(ids: Sequence[int], scored: str, capped: bool) -> Completion:
    return Completion(tuple(ids), tuple(flag == "1" for flag in scored), capped=capped)


class TeacherDistance:
    """Compares the student of a run with its teacher, and the teacher with itself.

    Args:
        prepare: what makes a training row of a row. dtype: what is computed in.
    """

    def __init__(
        self,
        config: TrainConfig,
        place: Workplace,
        teacher: Teacher,
        prepare: Callable[[Row], TrainRow],
        dtype: torch.dtype,
    ) -> None:
        assert isinstance(prepare, PrepareOPSD), "only Visual-OPSD has a teacher"
        self.prepare = replace(prepare, contrast_with=None, with_trace=False)
        self.config, self.place, self.teacher, self.dtype = config, place, teacher, dtype

    @torch.no_grad()
    def measure(self, completions: StoredCompletions, read: ReadRows) -> dict[str, float]:
        """Means over the scored tokens of the rows that have VTs, in nats; {} if none has.

        A collective; the same on all ranks.

        Args:
            completions: the same on all ranks.

        Returns:
            kl: KL(teacher || student) over the whole vocabulary, the teacher with what it sees in
            the place of the VTs. teacher_advantage: how much more probable (log) the teacher finds
            a token with that than without.
        """
        env = self.place.env
        sums = {"kl": 0.0, "advantage": 0.0, "tokens": 0.0}
        packs = self._packs(completions, read)
        with memory_errors("while the teacher is compared", _ADVICE, FailedAlone):
            head = self.teacher.head(self.dtype)
            while True:
                rows = attempt(lambda: next(packs, None))
                if not agree(rows is not None, env):
                    break
                rows = rows or [self._filler()]
                sums["tokens"] += sum(row.scored for row in rows)
                for name, value in self._score(rows, head).items():
                    sums[name] += float(value)
        total = all_reduce_sums(sums, env)
        tokens = total.pop("tokens")
        if not tokens:
            return {}
        return {
            "kl": total["kl"] / tokens,
            "teacher_advantage": total["advantage"] / tokens,
        }

    def _filler(self) -> ScoredRow:
        """For a rank that has no row left."""
        shown = self.prepare.vt != "none"
        vision = self.place.base.model.vision
        return empty_row(vision.patch_dim, with_teacher=True, with_shown=shown)

    def _packs(self, completions: StoredCompletions, read: ReadRows) -> Iterator[list[ScoredRow]]:
        """This rank's rows with their completions, as many together as `pack_tokens` lets."""
        env, sample = self.place.env, self.config.sample
        rows: list[ScoredRow] = []
        tokens = 0
        mine = sorted(completions)[env.rank :: env.world_size]
        for index, row in read(mine, self.prepare):
            if self.prepare.with_latents:
                vae, seed = self.place.base.vae, self.config.run.global_seed
                assert vae is not None
                (row,) = encode_teachers([row], vae, seed)
            assert row.teacher is not None
            completion = _restore(*completions[index])
            scored = score_completion(
                row.name, row.student, row.teacher, completion, sample.max_forward_tokens
            )
            if rows and tokens + scored.length > sample.pack_tokens:
                yield rows
                rows, tokens = [], 0
            rows.append(scored)
            tokens += scored.length
        if rows:
            yield rows

    def _score(self, rows: Sequence[ScoredRow], teacher_head: Tensor | None) -> dict[str, Tensor]:
        """Sums over the scored tokens of one pack."""
        base, device = self.place.base, self.place.env.device
        text = pack([row.student for row in rows], base.special)
        shown = pack([row.teacher for row in rows if row.teacher is not None], base.special)
        check_same_labels(text, shown, [row.name for row in rows], base.tokenizer.decode)
        with_thoughts = self.teacher.hidden(shown.to(device))
        text = text.to(device)
        without = self.teacher.hidden(text)
        chunk_size = self.config.loss.loss_chunk_size

        def head(hidden: Tensor, weight: Tensor) -> dict[str, Tensor]:
            theirs = weight if teacher_head is None else teacher_head
            labels = text.score_labels

            def surprise(seen: Tensor) -> Tensor:
                _, stats = chunked_opsd_loss(
                    seen, theirs, None, None, labels, _CE, chunk_size=chunk_size
                )
                return stats["ce"]

            apart = chunked_divergences(hidden, weight, with_thoughts, theirs, chunk_size)
            gained = surprise(without) - surprise(with_thoughts)
            return {"kl": apart["kl"].sum(), "advantage": gained}

        found: dict[str, Tensor] = self.place.student(text, head=head)
        return found
