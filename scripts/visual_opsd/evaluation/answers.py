# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""An evaluation: greedy answers to all questions, judged and counted."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch

from data.randomness import RANDOMNESS_VERSION
from data.rejects import Reject
from data.sequence import Completion
from data.visual_thoughts import KEYED_KINDS
from modeling import BagelBundle, load_bagel
from modeling.host.memory import OutOfMemory
from modeling.release.fingerprints import weights_fingerprint
from scripts.visual_opsd.cli import flat
from scripts.visual_opsd.evaluation.benchmark_scoring import SCORING_VERSION
from scripts.visual_opsd.evaluation.benchmark_table import (
    FIGURES_FILE,
    benchmark_figures,
    versions,
)
from scripts.visual_opsd.evaluation.questions import (
    EvaluateConfig,
    EvaluateSettings,
    PrepareQuestion,
    Question,
    benchmark_files,
    open_rows,
)
from scripts.visual_opsd.evaluation.rows import RowPool, prompt_identity
from scripts.visual_opsd.evaluation.runner import (
    Outcome,
    RowLimits,
    bad_record,
    claim_folder,
    memory_advice,
    run_rows,
)
from scripts.visual_opsd.evaluation.scoring import (
    ROW_KEY,
    check_same_rules,
    extract_answer,
    read_verdicts,
)
from scripts.visual_opsd.evaluation.store import RankedLines, Record, write_json
from scripts.visual_opsd.evaluation.summary import (
    by_dataset,
    comparison,
    summarise_run,
    summarise_timing,
    timing_line,
)
from scripts.visual_opsd.on_policy_sampler import (
    SamplerSettings,
    decoding_groups,
    sample_completions,
)
from scripts.visual_opsd.processes import DistEnv, on_main
from scripts.visual_opsd.runs.identity import stable_hash

# What figures and comparisons read of a line of predictions.jsonl.
_USED = (
    *ROW_KEY, "answer", "text", "correct", "lenient", "answered", "output_tokens", "capped",
    "empty",
)  # fmt: skip


def result_settings(config: EvaluateConfig, pool: RowPool, dtype: torch.dtype) -> dict[str, Any]:
    """Everything the predictions depend on."""
    settings = config.evaluate
    keyed = settings.context in KEYED_KINDS
    return {
        "model": weights_fingerprint(settings.model_path),
        "data": pool.signature(),
        "context": settings.context,
        "limit": settings.limit,
        "max_new_tokens": settings.max_new_tokens,
        "image_skips": settings.image_skips,
        "noise_seed": settings.noise_seed if keyed else None,
        "precision": str(dtype).removeprefix("torch."),
        **({"random_numbers": RANDOMNESS_VERSION} if keyed else {}),
        **prompt_identity(config.prompt),
        "scoring_version": SCORING_VERSION,
        **(versions() if benchmark_files(pool) else {}),
    }


class Answering:
    """Answers questions, batch by batch.

    Args:
        timing: what each answer took goes there; no resume repeats it.
        bundle: the model; None: it is loaded for the first of the questions.
        should_stop: polled while decoding.
        advice: what to lower where memory lacks, in a program whose flags are not evaluate's.
        keep: called with each question's index and the completion that answers it.

    Raises:
        Interrupted: by a call, when `should_stop` says so.
    """

    def __init__(
        self, config: EvaluateConfig, env: DistEnv, pool: RowPool, timing: RankedLines,
        *, bundle: BagelBundle | None = None, should_stop: Callable[[], bool] = lambda: False,
        advice: str | None = None, keep: Callable[[int, Completion], None] | None = None,
    ) -> None:  # fmt: skip
        self.keep = keep
        self.config, self.env, self.pool, self.timing = config, env, pool, timing
        self.should_stop = should_stop
        if bundle is not None:
            self.bundle = bundle
        settings = config.evaluate
        self.sampler = SamplerSettings(
            max_new_tokens=settings.max_new_tokens,
            do_sample=False,
            max_image_skips=settings.image_skips,
            max_rows=settings.batch_size,
            max_prefill_tokens=settings.prefill_tokens,
            check_every=8 if env.device.type == "cuda" else 2,  # a check costs a GPU its run-ahead
        )
        self.advice = advice or (
            f"lower --batch_size ({settings.batch_size}), --prefill_tokens "
            f"({settings.prefill_tokens}) or --max_new_tokens ({settings.max_new_tokens})"
        )

    @cached_property
    def bundle(self) -> BagelBundle:
        device = self.env.device
        dtype = self.config.compute.dtype(device)
        return load_bagel(self.config.evaluate.model_path, device=device, dtype=dtype)

    def __call__(self, rows: Sequence[tuple[int, Question]]) -> Iterator[list[Record]]:
        for group in decoding_groups([question.context for _, question in rows], self.sampler):
            batch = [rows[i] for i in group]
            try:
                answers, timing = self._answer(batch)
            except OutOfMemory as error:
                if len(batch) > 1:
                    raise
                index, _ = batch[0]  # alone it will never fit: the others are answered
                reject = self.pool.reject(index, "out_of_memory", str(error))
                answers, timing = [bad_record(index, reject)], []
            self.timing.append(self.env.rank, timing)  # first: an answer on file is never redone
            yield answers

    def _answer(self, rows: Sequence[tuple[int, Question]]) -> tuple[list[Record], list[Record]]:
        """Lines of predictions.jsonl and timing.jsonl of rows that are decoded together."""
        bundle, sampler = self.bundle, self.sampler
        started = time.perf_counter()
        with memory_advice([question.name for _, question in rows], self.advice):
            completions = sample_completions(
                bundle.model,
                [question.context for _, question in rows],
                [index for index, _ in rows],
                tokenizer=bundle.tokenizer,
                special=bundle.special_tokens,
                settings=sampler,
                seed=0,
                step=0,
                device=self.env.device,
                should_stop=self.should_stop,
            )
        batch = len(rows), time.perf_counter() - started
        answers, timing = [], []
        for (index, question), completion in zip(rows, completions, strict=True):
            if self.keep is not None:
                self.keep(index, completion)
            text = bundle.tokenizer.decode(completion.ids)
            answers.append(prediction(index, question, completion, text))
            dataset, tokens = question.name.dataset, len(completion.ids)
            timing.append(timing_line(index, dataset, question.seconds, batch, tokens))
        return answers, timing


def prediction(index: int, question: Question, completion: Completion, text: str) -> Record:
    """A line of predictions.jsonl; `given` is what a benchmark's rule took for the answer."""
    verdict = question.judge(text)
    extra = {}
    if question.benchmark is not None:
        extra = {**question.benchmark, "given": verdict.given}
    return {
        "index": index,
        **asdict(question.name),
        "question": question.question,
        "answer": question.answer,
        "text": text,
        "output_tokens": len(completion.ids),
        "correct": verdict.correct,
        "lenient": verdict.lenient,
        "answered": extract_answer(text) is not None,
        "capped": completion.capped,
        "empty": not completion.ids and not completion.capped,
        **extra,
    }


def evaluate(config: EvaluateConfig, env: DistEnv) -> dict[str, Any]:
    """Run (or resume) an evaluation on all ranks; returns the summary on rank 0, {} elsewhere.

    Raises:
        ValueError: a missing or damaged checkpoint or dataset, results of other settings in
            `output_dir`, too many unusable rows, or rows that differ from those of `compare`.
    """
    settings = config.evaluate
    folder = Path(settings.output_dir)
    pool = open_rows(config)
    wanted = result_settings(config, pool, config.compute.dtype(env.device))
    prepare = PrepareQuestion.of(config, pool)
    answers, timing = answer_stores(folder)

    def claim() -> None:
        claim_folder(
            folder, wanted, [answers, timing], result="summary.json", overwrite=settings.overwrite
        )
        _check_comparison(settings)

    on_main(env, claim)
    work = Answering(config, env, pool, timing)
    found = run_rows(pool, settings.rows_of(pool), prepare, work, answers, env, row_limits(config))
    summary: dict[str, Any] = {}

    def finish() -> None:
        summary.update(write_results(config, env, pool, timing, found, stable_hash(wanted)))
        if settings.compare:  # last: other rows there must not cost this run its results
            summary["comparison"] = comparison(folder, settings.compare)
            write_json(folder / "summary.json", summary)

    on_main(env, finish)
    return summary


def answer_stores(folder: Path) -> tuple[RankedLines, RankedLines]:
    """What ranks append to: predictions.jsonl and timing.jsonl."""
    return RankedLines(folder, "predictions", itemgetter(*_USED)), RankedLines(folder, "timing")


def row_limits(config: EvaluateConfig) -> RowLimits:
    """What an evaluation reads at once."""
    settings = config.evaluate
    return RowLimits(
        max_rows=4 * settings.batch_size,
        max_tokens=8 * settings.prefill_tokens,
        max_bad_rate=settings.max_bad_rate,
        progress=config.compute.progress,
    )


def write_results(
    config: EvaluateConfig,
    env: DistEnv,
    pool: RowPool,
    timing: RankedLines,
    found: Outcome,
    settings_hash: str,
) -> dict[str, Any]:
    """Write timing, summary and the figures of benchmarks; returns the summary. Rank 0 only."""
    lines = list(timing.read().values())
    timing.merge(lines)
    write_json(timing.folder / "timing.json", summarise_timing(lines))
    answered = len(config.evaluate.rows_of(pool)) - found.resumed
    summary = {
        **summarise_run(found.records, found.rejects),
        "seconds": found.seconds,
        "resumed_rows": found.resumed,
        "rows_per_second": answered / found.seconds if answered else None,
        "processes": env.world_size,
        "device": env.device.type,
        "settings_hash": settings_hash,
        "settings": flat(config),
    }
    write_json(timing.folder / "summary.json", summary)
    if benchmark_files(pool):
        figures = benchmark_run(pool, found.records, found.rejects)
        write_json(timing.folder / FIGURES_FILE, {**versions(), "benchmarks": figures})
    return summary


def _check_comparison(settings: EvaluateSettings) -> None:
    """Find a wrong --compare before the first row is answered."""
    if settings.compare is None:
        return
    if Path(settings.compare).resolve() == Path(settings.output_dir).resolve():
        raise ValueError(f"--compare {settings.compare} is --output_dir itself; name another run")
    for verdict in ("correct", "lenient"):
        read_verdicts(settings.compare, verdict)
    check_same_rules(settings.output_dir, settings.compare)


def benchmark_run(
    pool: RowPool, predictions: Sequence[Record], rejects: Sequence[Reject]
) -> dict[str, dict[str, Any]]:
    """Figures of each benchmark of which a row was answered, by name."""
    answered = by_dataset(predictions)
    bad = Counter(reject.dataset for reject in rejects)
    return {
        dataset.name: benchmark_figures(dataset, answered[dataset.name], bad[dataset.name])
        for dataset in benchmark_files(pool)
        if dataset.name in answered
    }
