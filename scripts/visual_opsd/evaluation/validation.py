# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Validation while training: the evaluation of a student whose weights are in memory.

The trainer is handed what `make_validation` returns, and calls it. Contexts, budget and image
skips are those of the training run; answers are greedy. What `evaluate` writes about a run stands
in <results_dir>/validation/<step>/.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from data.rejects import Reject
from data.row_groups import prepare_row
from data.sequence import Completion
from data.thinkmorph import WHOLE_ROWS, Row
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
    benchmark_files,
    open_rows,
)
from scripts.visual_opsd.evaluation.rows import RowPool, open_data
from scripts.visual_opsd.evaluation.runner import check_bad_rate, run_rows
from scripts.visual_opsd.evaluation.store import write_json
from scripts.visual_opsd.on_policy_sampler import MEMORY_ADVICE, Interrupted
from scripts.visual_opsd.processes import DistEnv, agree, attempt, gather_objects, on_main
from scripts.visual_opsd.rows import TrainRow
from scripts.visual_opsd.runs.identity import SETTINGS_FILE, stable_hash
from scripts.visual_opsd.validation_config import BASE_ANSWERS

FOLDER = "validation"  # in the results of a run
TEACHER = "teacher"  # in the folder of a step


@dataclass(frozen=True)
class Asked:
    """What a model is asked: settings, rows, and how a row becomes a question.

    Raises:
        ValueError: by `of`, as `open_rows` and `PrepareQuestion.of`.
    """

    config: EvaluateConfig
    pool: RowPool
    prepare: PrepareQuestion

    @classmethod
    def of(cls, config: EvaluateConfig) -> Asked:
        pool = open_rows(config)
        return cls(config, pool, PrepareQuestion.of(config, pool))


class StudentValidation:
    """Measures a student on fixed rows, and its teacher; every call is a collective.

    Args:
        asked: of the student. of_teacher: likewise; None: it is not asked.

    Attributes:
        identity: digest of all that the figures depend on, but for the weights.
        answers: as `Validate` has them.
    """

    def __init__(self, asked: Asked, env: DistEnv, of_teacher: Asked | None = None) -> None:
        self.asked, self.env, self.of_teacher = asked, env, of_teacher
        config, pool = asked.config, asked.pool
        self.folder = Path(config.evaluate.output_dir)
        self.indices = config.evaluate.rows_of(pool)
        self.answers: dict[int, Completion] = {}
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
        self._check(self.asked)
        if self.of_teacher is not None:
            try:
                self._check(self.of_teacher)
            except ValueError as error:
                raise ValueError(f"for the teacher (--teacher_guard): {error}") from error

    def _check(self, asked: Asked) -> None:
        def mine() -> list[Reject]:
            share = self.indices[self.env.rank :: self.env.world_size]
            made = (prepare_row(*asked.pool.locate(i), asked.prepare, i) for i in share)
            return [item for item in made if isinstance(item, Reject)]

        rejects = [reject for part in gather_objects(attempt(mine)) for reject in part]
        check_bad_rate(rejects, len(self.indices), asked.config.evaluate.max_bad_rate)

    def __call__(
        self, step: int, model: Bagel, should_stop: Callable[[], bool] = lambda: False
    ) -> dict[str, float]:
        """Figures of a student after `step` steps, the same on all ranks.

        Raises:
            Interrupted: on all ranks, when `should_stop` said so on any.
            ValueError: as `run_rows`.
        """
        folder = self.folder / f"{step:07d}"
        wanted = {**self.settings, "step": step}
        on_main(self.env, lambda: self._begin(step, folder, wanted))
        self.answers = {}
        keep = self._keep if step == 0 else None
        summary = self._ask(self.asked, folder, wanted, model, should_stop, keep)
        shown = {name: summary[name] for name in ("accuracy", "mean_tokens", "cap_rate", "n")}
        low, high = summary["interval"]
        return {**shown, "low": low, "high": high}

    def ask_teacher(
        self, step: int, model: Bagel, should_stop: Callable[[], bool] = lambda: False
    ) -> dict[str, float]:
        """The same of a teacher's weights, with the VTs in view; after the student's call."""
        assert self.of_teacher is not None, "validations with a guard know what to ask it"
        folder = self.folder / f"{step:07d}" / TEACHER
        context = self.of_teacher.config.evaluate.context
        wanted = {**self.settings, "step": step, "context": context}
        on_main(self.env, lambda: _claim(folder, wanted))
        summary = self._ask(self.of_teacher, folder, wanted, model, should_stop)
        low, high = summary["interval"]
        return {"accuracy": summary["accuracy"], "low": low, "high": high}

    def rows(
        self, indices: Sequence[int], prepare: Callable[[Row], TrainRow]
    ) -> Iterator[tuple[int, TrainRow]]:
        """Those of the rows that can be prepared for training; no collective."""
        pool = self._whole
        if pool is None:
            return
        for index in indices:
            dataset, number = pool.locate(index)
            item = prepare_row(dataset, number, prepare, index)
            if not isinstance(item, Reject):
                yield index, item

    @cached_property
    def _whole(self) -> RowPool | None:
        """The rows with all their columns; None: they are a benchmark's, which has no others."""
        settings, pool = self.asked.config.evaluate, self.asked.pool
        if benchmark_files(pool):
            return None
        return RowPool(open_data(settings.data, settings.split, settings.data_root, WHOLE_ROWS))

    def _keep(self, index: int, completion: Completion) -> None:
        if index < BASE_ANSWERS:
            self.answers[index] = completion

    def _ask(
        self,
        asked: Asked,
        folder: Path,
        wanted: dict[str, Any],
        model: Bagel,
        should_stop: Callable[[], bool],
        keep: Callable[[int, Completion], None] | None = None,
    ) -> dict[str, Any]:
        """The summary of a model's answers, on all ranks; a collective."""
        settings = replace(asked.config.evaluate, output_dir=str(folder))
        config, pool = replace(asked.config, evaluate=settings), asked.pool
        answers, timing = answer_stores(folder)
        bundle = BagelBundle(model, self.tokenizer, self.special, model.config)
        work = Answering(
            config, self.env, pool, timing,
            bundle=bundle, should_stop=should_stop, advice=MEMORY_ADVICE, keep=keep,
        )  # fmt: skip
        try:
            found = run_rows(
                pool, self.indices, asked.prepare, work, answers, self.env, row_limits(config)
            )
        except Exception as error:  # on all ranks together
            if agree(isinstance(error, Interrupted), self.env):
                raise Interrupted from error
            raise
        digest = stable_hash(wanted)
        return on_main(
            self.env, lambda: write_results(config, self.env, pool, timing, found, digest)
        )

    def _begin(self, step: int, folder: Path, settings: dict[str, Any]) -> None:
        """An empty folder; those of this step and later ones belong to a run that was left."""
        with disk_errors(f"writing to {self.folder}", self.folder):
            for old in self.folder.glob("[0-9]" * 7):
                if int(old.name) >= step:
                    shutil.rmtree(old)
        _claim(folder, settings)


def _claim(folder: Path, settings: dict[str, Any]) -> None:
    """Make a new folder of an evaluation by these settings."""
    with disk_errors(f"writing to {folder}", folder.parent):
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
    of_teacher = replace(of, evaluate=replace(settings, context="vt"))
    guarded = validation.teacher_guard != "off"
    try:
        asked = attempt(lambda: Asked.of(of))
        seen = attempt(lambda: Asked.of(of_teacher)) if guarded else None
        made = StudentValidation(asked, env, seen)
        made.check_rows()
    except ValueError as error:  # on all ranks together; it speaks of evaluate's flags
        raise ValueError(
            f"validation (--eval_data {settings.data}, --eval_split {settings.split}): {error}"
        ) from error
    return made
