# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The offline form: cached completions, and what a cached teacher said about their tokens.

    loss = sum over tokens of (ce_weight * CE + w * jsd_weight * T^2 * D(teacher, student)) / tokens

D compares both models on the cached entries (`loss/cached.py`): KL(teacher || student), or with
`--kd_loss jsd` the on-policy divergence with its beta, clip and tail. w is the token's vt_weight
over the mean of all in the cache, or 1. No teacher is in memory and nothing is sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from data.dataset_info import load_dataset_config
from data.limits import ContextLimits
from data.parquet import StepRows, open_sources
from data.randomness import row_generator
from data.sequence import Completion, ContextBuilder
from data.teacher_cache import Entries, TeacherCache, row_key
from data.thinkmorph import EVALUATION_ROWS, Row, parse_row
from scripts.visual_opsd.cli import Settings, option
from scripts.visual_opsd.config import TrainConfig
from scripts.visual_opsd.opsd_loss import LossConfig
from scripts.visual_opsd.rows import TrainRow, make_builder, scoring_limits
from scripts.visual_opsd.runs.identity import differences, files_digest
from scripts.visual_opsd.scored_rows import ScoredRow, score_targets
from scripts.visual_opsd.training.objective import (
    ROLLOUT,
    TEACHER,
    Base,
    Objective,
    Workplace,
    check_weights,
)
from scripts.visual_opsd.training.run_contents import teacher_contents
from scripts.visual_opsd.training.step import (
    PackResult,
    StepContext,
    completion_counts,
    run_pack,
)

KD_LOSSES = ("kl", "jsd")


@dataclass(frozen=True)
class OfflineSettings(Settings):
    """Which teacher was kept, and how its word counts."""

    teacher_cache: str = option(
        "results/teacher-cache", "folder that `collect_traces` wrote, of the same base, prompts "
        "and data", path=True,
    )  # fmt: skip
    kd_loss: str = option(
        "kl", "`kl`: KL(teacher, student) without a bound; `jsd`: the divergence that "
        "`--jsd_beta`, `--jsd_token_clip` and `--jsd_clip_scope` describe. Either is multiplied by "
        "`--jsd_weight` and taken at `--jsd_temperature`, on the `--jsd_top_k` most probable "
        "entries of the cache, with `--jsd_tail_bucket` also on the mass outside",
        choices=KD_LOSSES,
    )  # fmt: skip
    kd_use_vt_weights: bool = option(
        True, "weight each token's divergence by its `vt_weight` (how far the visual thoughts move "
        "the teacher there), over the mean of all in the cache"
    )  # fmt: skip


@dataclass(frozen=True)
class OfflineConfig(TrainConfig):
    """The settings of offline training: those of every training run, and its teacher's cache."""

    offline: OfflineSettings = field(default_factory=OfflineSettings)


# What the offline form sets differently: the authors' weights, temperature and number of steps.
OFFLINE_DEFAULTS: dict[str, Any] = {
    "results_dir": "results/visual-opsd-offline",
    "total_steps": 8000,
    "jsd_weight": 0.5,
    "jsd_temperature": 2.0,
    "ce_weight": 1.0,
}


@dataclass(frozen=True)
class OfflineRow(TrainRow):
    """A row with a cached completion and what is kept of the teacher on its scored tokens."""

    completion: Completion | None = None
    taught: Entries | None = None


@dataclass(frozen=True)
class TaughtRow(ScoredRow):
    """A scored row with what is kept of the teacher on its scored tokens."""

    taught: Entries | None = None


def check_bytes(cache: TeacherCache) -> None:
    """Raises ValueError: the files are not those that were written, though of their sizes."""
    if files_digest(cache.folder, cache.files) != cache.digest:
        raise ValueError(
            f"{cache.folder} is damaged: its files are not what collect_traces wrote, though as "
            "long: bring back a copy, or make it anew by collect_traces with --overwrite"
        )


@dataclass(frozen=True)
class PrepareOffline:
    """Row -> student context, one of its cached completions, its entries; "not_in_cache" without.

    Which of several completions a place takes is keyed by (seed, place).
    """

    builder: ContextBuilder
    cache: TeacherCache
    limits: ContextLimits
    seed: int

    def __call__(self, row: Row) -> TrainRow:
        sample = parse_row(row, EVALUATION_ROWS)
        places = self.cache.rows.get(row_key(row), ())
        if not places:
            raise row.bad(
                "not_in_cache",
                f"{self.cache.folder} holds no completion of it: its collect_traces listed it in "
                "bad_rows.jsonl, or was given a --limit",
            )
        generator = row_generator("cached completion", self.seed, row.position)
        chosen = int(torch.randint(len(places), (), generator=generator))
        completion, taught = self.cache.read(places[chosen])
        student = self.builder.student(sample)
        self.limits.check(row, (*student, completion.segment()))
        return OfflineRow.of(row, sample, student, completion=completion, taught=taught)


class VisualOPSDOffline(Objective):
    """Trains on a cache of completions and of a teacher's word on them.

    Raises:
        ValueError: neither divergence nor cross-entropy, or weights that need a teacher in memory.
    """

    needs = EVALUATION_ROWS
    defaults = OFFLINE_DEFAULTS

    def __init__(self, config: OfflineConfig) -> None:
        super().__init__(config)
        self.settings = config.offline
        check_weights(jsd_weight=config.loss.jsd_weight, ce_weight=config.loss.ce_weight)
        if config.loss.token_weight == "teacher_ahead":
            raise ValueError(
                "--token_weight teacher_ahead compares probabilities of the completion's tokens, "
                "and a cache holds the teacher's most probable ones: use none, early:N or entropy"
            )
        self.loss = distillation_loss(self.settings, config.loss.build())
        self.held = 0

    @property
    def unused(self) -> dict[str, Sequence[str]]:
        unused: dict[str, Sequence[str]] = {
            "the teacher's word comes from --teacher_cache, no teacher is in memory": TEACHER,
            "completions come from --teacher_cache": (*ROLLOUT, "sft_format"),
            "it draws on the student's own samples, offline use --kd_loss": ("jsd_loss_kind",),
        }
        if self.settings.kd_loss == "kl":
            of_jsd = ("jsd_beta", "jsd_token_clip", "jsd_clip_scope")
            unused["--kd_loss kl has neither beta nor bound, --kd_loss jsd has both"] = of_jsd
        return unused

    def prepare(self, base: Base) -> PrepareOffline:
        """Raises ValueError: a cache that is absent, damaged, or of other contents (named)."""
        config = self.config
        cache = TeacherCache.open(self.settings.teacher_cache)
        sources = open_sources(
            load_dataset_config(config.data.dataset_config_file), self.needs, config.data.data_root
        )
        own = teacher_contents(config.model.model_path, config.prompt, config.sample, sources)
        check_contents(cache, own)
        check_bytes(cache)
        vocab = base.model.llm.vocab_size
        self.held = cache.top_k
        wanted = self.loss.top_k_of(vocab) or vocab
        if wanted > cache.top_k:
            raise ValueError(
                f"{cache.folder} holds the teacher's {cache.top_k} most probable entries of a "
                f"token, fewer than --jsd_top_k asks for ({wanted}): lower it, or collect with "
                "--top_k"
            )
        if self.settings.kd_use_vt_weights and not cache.mean_weight > 0:
            raise ValueError(
                f"{cache.folder}: the visual thoughts move the teacher nowhere (all vt_weights are "
                "0), so nothing would be distilled; see --kd_use_vt_weights"
            )
        self.mean_weight = cache.mean_weight
        self.identity = {"objective": type(self).__name__, "teacher cache": cache.digest}
        builder = make_builder(base.tokenizer, base.model, config.prompt)
        # The completion is checked with its context: the cache cut it to fit the teacher's.
        limits = replace(scoring_limits(base.model, config.sample), new_positions=0, room=0)
        return PrepareOffline(
            builder, cache, limits.check_settings(builder), config.run.global_seed
        )

    def label(self, batch: StepRows[TrainRow], place: Workplace) -> list[ScoredRow]:
        limit = self.config.sample.max_forward_tokens
        scored: list[ScoredRow] = []
        for row in batch.values:
            if not isinstance(row, OfflineRow):  # --dry_run's, which nobody taught
                scored.append(score_targets(row, limit))
                continue
            assert row.completion is not None and row.taught is not None
            context = (*row.student, row.completion.segment())
            scored.append(
                TaughtRow(
                    row.name, context, None, row.completion, taught=self._weighted(row.taught)
                )
            )
        return scored

    def _weighted(self, taught: Entries) -> Entries:
        """The entries with the factors of their tokens' divergence."""
        weight = torch.ones_like(taught.weight)
        if self.settings.kd_use_vt_weights:
            weight = taught.weight / self.mean_weight
        return replace(taught, weight=weight)

    def run_pack(self, rows: Sequence[ScoredRow], step: StepContext) -> PackResult:
        taught = [
            row.taught if isinstance(row, TaughtRow) else Entries.blank(row.scored, self.held)
            for row in rows
        ]
        return run_pack(rows, step, Entries.joined([part for part in taught if part is not None]))

    def counts(
        self, scored: Sequence[ScoredRow], results: Sequence[PackResult], base: Base
    ) -> dict[str, float]:
        sums = super().counts(scored, results, base)
        return sums | completion_counts(scored, base.special.eos)


def distillation_loss(settings: OfflineSettings, loss: LossConfig) -> LossConfig:
    """What is lost on a token: the on-policy divergence, or KL(teacher || student) unbounded."""
    if settings.kd_loss == "kl":
        return replace(loss, beta=0.0, token_clip=None)
    return loss


def check_contents(cache: TeacherCache, own: dict[str, Any]) -> None:
    """Raises ValueError, naming what differs: the cache was made with other contents than ours.

    Data sets that the cache holds besides are no difference.
    """

    def flat(contents: dict[str, Any]) -> dict[str, Any]:
        return {
            f"{part}: {name}": value
            for part, values in contents.items()
            for name, value in values.items()
            if part != "data" or name in own["data"]
        }

    found = differences(flat({part: cache.contents.get(part, {}) for part in own}), flat(own))
    if found:
        raise ValueError(
            f"{cache.folder} was collected with other contents ({'; '.join(found)}): train with "
            "the same base, prompts and data, or collect anew"
        )
