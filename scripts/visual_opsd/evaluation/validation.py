# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Validation while training: the evaluation of a student whose weights are in memory.

The trainer is handed what `make_validation` returns, and calls it. Contexts, budget and image
skips are those of the training run; answers are greedy. What `evaluate` writes about a run stands
in <results_dir>/validation/<step>/.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from data.rejects import Reject
from data.row_groups import prepare_row
from modeling import BagelBundle
from modeling.bagel.bagel import Bagel
from modeling.host.disk import disk_errors
from modeling.release.tokenizer import load_tokenizer
from scripts.visual_opsd.config import ComputeSettings, TrainConfig
from scripts.visual_opsd.evaluation.answers import (
    Answering,
    answer_stores,
    result_settings,
    row_limits,
    write_results,
)
from scripts.visual_opsd.evaluation.questions import (
    EvaluateConfig,
    EvaluateSettings,
    PrepareQuestion,
    open_rows,
)
from scripts.visual_opsd.evaluation.rows import RowPool
from scripts.visual_opsd.evaluation.runner import check_bad_rate, run_rows
from scripts.visual_opsd.evaluation.store import SETTINGS_FILE, write_json
from scripts.visual_opsd.on_policy_sampler import MEMORY_ADVICE, Interrupted
from scripts.visual_opsd.processes import DistEnv, agree, attempt, gather_objects, on_main
from scripts.visual_opsd.runs.identity import stable_hash

FOLDER = "validation"  # in the results of a run


class StudentValidation:
    """Measures a student on fixed rows; every call is a collective.

    Attributes:
        identity: digest of all that the figures depend on, but for the weights.
    """

    def __init__(
        self, config: EvaluateConfig, env: DistEnv, pool: RowPool, prepare: PrepareQuestion
    ) -> None:
        self.config, self.env, self.pool, self.prepare = config, env, pool, prepare
        self.folder = Path(config.evaluate.output_dir)
        self.rows = config.evaluate.rows_of(pool)
        self.tokenizer, self.special = load_tokenizer(config.evaluate.model_path)
        dtype = config.compute.dtype(env.device)
        found = on_main(env, lambda: result_settings(config, pool, dtype))
        self.settings: dict[str, Any] = {"trained_from": found.pop("model"), **found}
        self.identity = stable_hash(self.settings)

    def check_rows(self) -> None:
        """Prepare every row once.

        Raises:
            ValueError: too many cannot be used.
        """

        def mine() -> list[Reject]:
            share = self.rows[self.env.rank :: self.env.world_size]
            made = (prepare_row(*self.pool.locate(i), self.prepare, i) for i in share)
            return [item for item in made if isinstance(item, Reject)]

        rejects = [reject for part in gather_objects(attempt(mine)) for reject in part]
        check_bad_rate(rejects, len(self.rows), self.config.evaluate.max_bad_rate)

    def __call__(
        self, step: int, model: Bagel, should_stop: Callable[[], bool] = lambda: False
    ) -> dict[str, float]:
        """Figures of a student after `step` steps, the same on all ranks.

        Raises:
            Interrupted: on all ranks, when `should_stop` said so on any.
            ValueError: as `run_rows`.
        """
        folder = self.folder / f"{step:07d}"
        settings = replace(self.config.evaluate, output_dir=str(folder))
        config = replace(self.config, evaluate=settings)
        wanted = {**self.settings, "step": step}
        on_main(self.env, lambda: self._begin(step, folder, wanted))
        answers, timing = answer_stores(folder)
        bundle = BagelBundle(model, self.tokenizer, self.special, model.config)
        work = Answering(
            config, self.env, self.pool, timing,
            bundle=bundle, should_stop=should_stop, advice=MEMORY_ADVICE,
        )  # fmt: skip
        try:
            found = run_rows(
                self.pool, self.rows, self.prepare, work, answers, self.env, row_limits(config)
            )
        except Exception as error:  # on all ranks together
            if agree(isinstance(error, Interrupted), self.env):
                raise Interrupted from error
            raise
        digest = stable_hash(wanted)

        def finish() -> dict[str, float]:
            summary = write_results(config, self.env, self.pool, timing, found, digest)
            low, high = summary["interval"]
            shown = {name: summary[name] for name in ("accuracy", "mean_tokens", "cap_rate", "n")}
            return {**shown, "low": low, "high": high}

        return on_main(self.env, finish)

    def _begin(self, step: int, folder: Path, settings: dict[str, Any]) -> None:
        """An empty folder; those of this step and later ones belong to a run that was left."""
        with disk_errors(f"writing to {self.folder}", self.folder):
            for old in self.folder.glob("[0-9]" * 7):
                if int(old.name) >= step:
                    shutil.rmtree(old)
            folder.mkdir(parents=True)
        write_json(folder / SETTINGS_FILE, {"hash": stable_hash(settings), "settings": settings})


def make_validation(config: TrainConfig, env: DistEnv) -> StudentValidation:
    """What a run with `--eval_every` validates by; called by all ranks, before a model is loaded.

    Raises:
        ValueError: no such rows, rows that cannot be used, settings that leave no room for any.
    """
    validation, sample = config.validation, config.sample
    assert validation.eval_data is not None
    settings = EvaluateSettings(
        model_path=config.model.model_path,
        data=validation.eval_data,
        split=validation.eval_split,
        data_root=config.data.data_root,
        limit=validation.eval_limit,
        output_dir=str(Path(config.run.results_dir) / FOLDER),
        batch_size=sample.sample_batch_size,
        max_new_tokens=sample.sample_max_new_tokens,
        image_skips=sample.sample_max_image_skips,
        max_bad_rate=config.data.max_bad_rate,
    )
    compute = ComputeSettings(
        device=config.run.device,
        precision=config.model.precision,
        timeout_s=config.run.timeout_s,
        progress=False,
    )
    of = EvaluateConfig(settings, prompt=config.prompt, compute=compute)

    def make() -> tuple[RowPool, PrepareQuestion]:
        pool = open_rows(of)
        return pool, PrepareQuestion.of(of, pool)

    try:
        pool, prepare = attempt(make)
        made = StudentValidation(of, env, pool, prepare)
        made.check_rows()
    except ValueError as error:  # on all ranks together; it speaks of evaluate's flags
        raise ValueError(
            f"validation (--eval_data {settings.data}, --eval_split {settings.split}): {error}"
        ) from error
    return made
