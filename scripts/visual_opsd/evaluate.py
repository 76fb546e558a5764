# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Accuracy of a checkpoint on a world, a parquet split or the paper's benchmarks.

    python -m scripts.visual_opsd.evaluate --model_path DIR --data Spatial_Navigation
    python -m scripts.visual_opsd.evaluate --model_path DIR --benchmark all --tsv_root LMUData

Greedy answers of the text-only student (`--context vt` and `noise` show it what the teacher sees:
the real visual thoughts, or Gaussian noise in their place). A row of a generated world is judged
by the world's scorer, one of a benchmark by its rule (`benchmark_scoring.RULES`), any other by
exact match of its last <answer>...</answer>. A lenient verdict stands beside each, for reading and
not for comparing (EVAL.md). Every raw answer is kept; a killed run is resumed by
the same command; torchrun splits the rows over its processes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from data.json_lines import write_lines
from data.limits import NO_LIMITS, PACKED_TOKENS, ContextLimits
from data.packing import context_length
from data.randomness import RANDOMNESS_VERSION, noise_generator
from data.rejects import Reject, summarise
from data.sequence import Completion, Context, ContextBuilder
from data.thinkmorph import EVALUATION_ROWS, Row, RowNeeds, parse_row
from data.tsv import TsvDataset
from data.worlds import get_scorer
from modeling import BagelBundle, load_bagel
from modeling.host.memory import OutOfMemory
from modeling.release.fingerprints import weights_fingerprint
from scripts.visual_opsd.cli import (
    PACKED,
    ROUNDS,
    ROWS,
    SEEDS,
    SHARES,
    TOGETHER,
    TOKENS,
    Settings,
    flat,
    option,
    parse_config,
    run_main,
)
from scripts.visual_opsd.config import ComputeSettings, PromptSettings
from scripts.visual_opsd.evaluation import benchmarks
from scripts.visual_opsd.evaluation.benchmark_scoring import (
    SCORING_VERSION,
    Verdict,
    exact_verdict,
    world_verdict,
)
from scripts.visual_opsd.evaluation.benchmark_table import (
    FIGURES_FILE,
    benchmark_figures,
    describe,
    versions,
)
from scripts.visual_opsd.evaluation.rows import (
    IDENTITY_COLUMNS,
    BadRows,
    RowName,
    RowPool,
    check_bad_rate,
    memory_advice,
    open_data,
    progress_bar,
    prompt_identity,
    read_windows,
    row_name,
)
from scripts.visual_opsd.evaluation.scoring import (
    ROW_KEY,
    check_same_rules,
    extract_answer,
    read_verdicts,
)
from scripts.visual_opsd.evaluation.store import (
    RankedLines,
    claim_folder,
    hold_output,
    read_json,
    stable_hash,
    write_json,
)
from scripts.visual_opsd.evaluation.summary import (
    comparison,
    comparison_lines,
    split_bad,
    summarise_run,
    summarise_timing,
    table,
    timing_line,
    timing_text,
)
from scripts.visual_opsd.on_policy_sampler import (
    SamplerSettings,
    decoding_groups,
    sample_completions,
)
from scripts.visual_opsd.processes import (
    DistEnv,
    attempt,
    init_distributed,
    on_main,
    shutdown,
)
from scripts.visual_opsd.rows import open_builder

CONTEXTS = ("text", "vt", "noise")
# What figures and comparisons read of a line of predictions.jsonl.
_USED = (
    *ROW_KEY, "answer", "text", "correct", "lenient", "answered", "output_tokens", "capped",
    "empty",
)  # fmt: skip


@dataclass(frozen=True)
class EvaluateSettings(Settings):
    """What is evaluated on what."""

    model_path: str = option("models/ThinkMorph-7B", "release folder to evaluate", path=True)
    data: str = option(
        "Spatial_Navigation", "datasets below the data root, folders or parquet files, by commas",
        path="list",
    )  # fmt: skip
    split: str = option("heldout", "files of a folder that are read (SPLIT-*.parquet)")
    data_root: str | None = option(
        None, "folder of the datasets, else VISUAL_OPSD_DATA_ROOT", path=True
    )
    context: str = option(
        "text", "text: the student's; vt: the teacher's; noise: the teacher's, noise for its VTs",
        choices=CONTEXTS,
    )  # fmt: skip
    limit: int | None = option(None, "only the first rows of all", **ROWS)
    output_dir: str = option("results/eval", "predictions.jsonl and summary.json", path=True)
    overwrite: bool = option(False, "throw away what output_dir holds of other settings")
    batch_size: int = option(
        256, "rows decoded together (no effect on the result)", **TOGETHER
    )
    prefill_tokens: int = option(PACKED_TOKENS, "prompt rows decoded together at most", **PACKED)
    max_new_tokens: int = option(1024, "budget of an answer, over all its rounds", **TOKENS)
    image_skips: int = option(1, "rounds that may follow an <image_start>", **ROUNDS)
    noise_seed: int = option(0, "random numbers of --context noise", **SEEDS)
    max_bad_rate: float = option(
        0.01, "share of unusable rows beyond which the run fails", **SHARES
    )
    compare: str | None = option(
        None, "output folder of another run on the same rows", path=True
    )

    @property
    def needs(self) -> RowNeeds:
        """Columns to read; only the teacher's context needs visual thoughts."""
        if self.context == "text":
            return EVALUATION_ROWS
        return RowNeeds(visual_thoughts="required")


@dataclass(frozen=True)
class BenchmarkSettings(Settings):
    """Benchmarks by name, instead of `--data`."""

    benchmark: str | None = option(
        None, "instead of --data: benchmarks by name, separated by commas, or all"
    )
    tsv_root: str | None = option(
        None, f"folder of the benchmarks' TSV files, else {benchmarks.ROOT_VARIABLE}", path=True
    )


@dataclass(frozen=True)
class EvaluateConfig:
    evaluate: EvaluateSettings = field(default_factory=EvaluateSettings)
    benchmark: BenchmarkSettings = field(default_factory=BenchmarkSettings)
    prompt: PromptSettings = field(default_factory=PromptSettings)
    compute: ComputeSettings = field(default_factory=ComputeSettings)


# ---------------------------------------------------------------------------------- rows


Judge = Callable[[str], Verdict]


@dataclass(frozen=True)
class Question:
    """One row to answer: its context, and what judges the answer.

    `benchmark`: further fields of its line, for a row of a benchmark. `seconds`: reading, decoding
    and resizing took.
    """

    name: RowName
    question: str
    answer: str
    context: Context
    judge: Judge
    benchmark: Mapping[str, str] | None = None
    seconds: float = 0.0

    @property
    def length(self) -> int:
        return context_length(self.context)


@dataclass(frozen=True)
class PrepareQuestion:
    """Row -> the context the model answers from."""

    builder: ContextBuilder
    settings: EvaluateSettings
    rules: Mapping[str, benchmarks.Benchmark] = field(default_factory=dict)
    limits: ContextLimits = NO_LIMITS

    @classmethod
    def of(cls, config: EvaluateConfig, pool: RowPool) -> PrepareQuestion:
        """Raises ValueError: no answer, or no row, can fit the model's positions."""
        settings = config.evaluate
        builder, model = open_builder(settings.model_path, config.prompt)
        limits = ContextLimits(
            model.llm.max_position_embeddings,
            settings.max_new_tokens,
            tokens=max(settings.prefill_tokens, PACKED_TOKENS),
            flag="prefill_tokens",
        ).check_settings(builder, teacher=settings.context != "text")
        rules = {d.name: benchmarks.find_benchmark(d) for d in benchmark_files(pool)}
        return cls(builder, settings, rules, limits)

    def __call__(self, row: Row) -> Question:
        started = time.perf_counter()
        made = self._benchmark(row) if row.dataset in self.rules else self._sample(row)
        self.limits.check(row, made.context)
        return replace(made, seconds=time.perf_counter() - started)

    def _benchmark(self, row: Row) -> Question:
        line = benchmarks.parse_row(self.rules[row.dataset], row)
        return Question(
            row_name(row, line.index, benchmarks.TSV_IDENTITY),
            line.question,
            line.answer,
            benchmarks.build_context(self.builder, line.parts),
            line.judge,
            {"group": line.group, "category": line.category},
        )

    def _sample(self, row: Row) -> Question:
        sample = parse_row(row, self.settings.needs)
        context = self.builder.student(sample)
        if self.settings.context != "text":
            noise = None
            if self.settings.context == "noise":
                noise = noise_generator(self.settings.noise_seed, row.position)
            context = self.builder.teacher(sample, context, noise)
        return Question(
            row_name(row, sample.pid, IDENTITY_COLUMNS),
            sample.question,
            sample.answer,
            context,
            _world_judge(sample.world, sample.world_state)
            if sample.world is not None
            else partial(exact_verdict, answer=sample.answer),
        )


def _world_judge(world: str, state: str | None) -> Judge:
    return partial(world_verdict, scorer=get_scorer(world), state=state)


def prediction(index: int, question: Question, completion: Completion, text: str) -> dict[str, Any]:
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


# ---------------------------------------------------------------------------------- the run


def result_settings(config: EvaluateConfig, pool: RowPool, dtype: torch.dtype) -> dict[str, Any]:
    """Everything the predictions depend on."""
    settings = config.evaluate
    return {
        "model": weights_fingerprint(settings.model_path),
        "data": pool.signature(),
        "context": settings.context,
        "limit": settings.limit,
        "max_new_tokens": settings.max_new_tokens,
        "image_skips": settings.image_skips,
        "noise_seed": settings.noise_seed if settings.context == "noise" else None,
        **({"random_numbers": RANDOMNESS_VERSION} if settings.context == "noise" else {}),
        "precision": str(dtype).removeprefix("torch."),
        **prompt_identity(config.prompt),
        "scoring_version": SCORING_VERSION,
        **(versions() if benchmark_files(pool) else {}),
    }


def open_rows(config: EvaluateConfig) -> RowPool:
    """The rows the settings name.

    Raises:
        ValueError: as `open_data` and `open_benchmarks`; benchmarks with a teacher's context.
    """
    settings, named = config.evaluate, config.benchmark
    if named.benchmark is None:
        return RowPool(open_data(settings.data, settings.split, settings.data_root, settings.needs))
    if settings.context != "text":
        raise ValueError(
            f"--context {settings.context}: benchmarks hold no visual thoughts to show; use "
            "--context text"
        )
    return RowPool(benchmarks.open_benchmarks(named.benchmark, named.tsv_root))


def benchmark_files(pool: RowPool) -> list[TsvDataset]:
    """The benchmarks among the datasets."""
    return [dataset for dataset in pool.datasets if isinstance(dataset, TsvDataset)]


@dataclass(frozen=True)
class Stores:
    """What the ranks append to: answers, and how long they took (which no resume repeats)."""

    answers: RankedLines
    timing: RankedLines

    @classmethod
    def of(cls, folder: Path) -> Stores:
        return cls(RankedLines(folder, "predictions", fields=_USED), RankedLines(folder, "timing"))


def answer_rows(
    config: EvaluateConfig,
    env: DistEnv,
    pool: RowPool,
    indices: Sequence[int],
    stores: Stores,
    prepare: PrepareQuestion,
) -> None:
    """Answer and judge this rank's rows, appending to its files batch by batch."""
    settings = config.evaluate
    if not indices:
        return
    bundle = load_bagel(
        settings.model_path, device=env.device, dtype=config.compute.dtype(env.device)
    )
    sampler = SamplerSettings(
        max_new_tokens=settings.max_new_tokens,
        do_sample=False,
        max_image_skips=settings.image_skips,
        max_rows=settings.batch_size,
        max_prefill_tokens=settings.prefill_tokens,
        check_every=8 if env.device.type == "cuda" else 2,  # a check costs a GPU its run-ahead
    )
    bad = BadRows(settings.max_bad_rate)
    windows = read_windows(
        pool,
        indices,
        prepare,
        max_rows=4 * settings.batch_size,
        max_tokens=8 * settings.prefill_tokens,
    )
    shown = config.compute.progress and env.is_main
    with progress_bar(len(indices), shown) as bar:
        for window in windows:
            stores.answers.append(env.rank, [_bad_line(*pair) for pair in window.rejects])
            bar.update(len(window.rejects))
            groups = decoding_groups([question.context for _, question in window.rows], sampler)
            for rows in [[window.rows[i] for i in group] for group in groups]:
                try:
                    answers, timing = _answer_batch(bundle, rows, sampler, env.device)
                except OutOfMemory as error:
                    if len(rows) > 1:
                        raise
                    index = rows[0][0]  # alone it will never fit: the others are answered
                    window.reject(index, pool.reject(index, "out_of_memory", str(error)))
                    answers, timing = [_bad_line(*window.rejects[-1])], []
                stores.timing.append(env.rank, timing)  # first: an answer on file is never redone
                stores.answers.append(env.rank, answers)
                bar.update(len(rows))
            bad.add(window)


def _bad_line(index: int, reject: Reject) -> dict[str, Any]:
    return {"index": index, "bad": asdict(reject)}


def _answer_batch(
    bundle: BagelBundle,
    rows: Sequence[tuple[int, Question]],
    sampler: SamplerSettings,
    device: torch.device,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Lines of predictions.jsonl and timing.jsonl of rows that are decoded together."""
    started = time.perf_counter()
    with memory_advice(
        [question.name for _, question in rows],
        f"lower --batch_size ({sampler.max_rows}), --prefill_tokens ({sampler.max_prefill_tokens}) "
        f"or --max_new_tokens ({sampler.max_new_tokens}); what was answered is kept, and the same "
        "command goes on from there",
    ):
        completions = sample_completions(
            bundle.model,
            [question.context for _, question in rows],
            [index for index, _ in rows],
            tokenizer=bundle.tokenizer,
            special=bundle.special_tokens,
            settings=sampler,
            seed=0,
            step=0,
            device=device,
        )
    batch = len(rows), time.perf_counter() - started
    answers, timing = [], []
    for (index, question), completion in zip(rows, completions, strict=True):
        text = bundle.tokenizer.decode(completion.ids)
        answers.append(prediction(index, question, completion, text))
        dataset = question.name.dataset
        timing.append(timing_line(index, dataset, question.seconds, batch, len(completion.ids)))
    return answers, timing


def evaluate(config: EvaluateConfig, env: DistEnv) -> dict[str, Any]:
    """Run (or resume) an evaluation on all ranks; returns the summary on rank 0, {} elsewhere.

    Raises:
        ValueError: a missing or damaged checkpoint or dataset, results of other settings in
            `output_dir`, too many unusable rows, or rows that differ from those of `compare`.
    """
    settings = config.evaluate
    folder = Path(settings.output_dir)
    stores = Stores.of(folder)
    store = stores.answers
    dtype = config.compute.dtype(env.device)
    pool = open_rows(config)
    wanted = result_settings(config, pool, dtype)
    prepare = PrepareQuestion.of(config, pool)
    on_main(env, lambda: _prepare_folder(stores, wanted, settings))
    on_main(env, lambda: _check_comparison(settings))
    # Unusable rows are tried again: what kept them from being read may be gone.
    held = attempt(store.read)  # nobody appends before everybody has read
    done = {index for index, record in held.items() if "bad" not in record}
    total = min(len(pool), settings.limit or len(pool))
    todo = [index for index in range(total) if index not in done]

    started = time.perf_counter()
    mine = todo[env.rank :: env.world_size]
    attempt(lambda: answer_rows(config, env, pool, mine, stores, prepare))
    seconds = time.perf_counter() - started
    summary: dict[str, Any] = {}

    def finish() -> None:
        good, rejects = split_bad(store.read())
        store.merge(good)
        timing = list(stores.timing.read().values())
        stores.timing.merge(timing)
        write_json(folder / "timing.json", summarise_timing(timing))
        write_lines(folder / "bad_rows.jsonl", [asdict(reject) for reject in rejects])
        check_bad_rate(rejects, total, settings.max_bad_rate)
        if not good:
            raise ValueError(f"no row could be used: {summarise(rejects)}")
        summary.update(summarise_run(good, rejects))
        summary["seconds"] = seconds
        summary["resumed_rows"] = len(done)
        summary["rows_per_second"] = len(todo) / seconds if todo else None
        summary["processes"] = env.world_size
        summary["device"] = env.device.type
        summary["settings_hash"] = stable_hash(wanted)
        summary["settings"] = flat(config)
        write_json(folder / "summary.json", summary)
        if benchmark_files(pool):
            figures = benchmark_run(pool, good, rejects)
            write_json(folder / FIGURES_FILE, {**versions(), "benchmarks": figures})
        if settings.compare:  # last: other rows there must not cost this run its results
            summary["comparison"] = comparison(folder, settings.compare)
            write_json(folder / "summary.json", summary)

    on_main(env, finish)
    return summary


def _prepare_folder(stores: Stores, wanted: Mapping[str, Any], settings: EvaluateSettings) -> None:
    hold_output(stores.answers.folder)
    if settings.overwrite:
        stores.answers.clear()
        stores.timing.clear()
    claim_folder(
        stores.answers.folder,
        wanted,
        has_results=stores.answers.exists(),
        hint="choose another --output_dir, or pass --overwrite to throw them away",
    )
    for lines in (stores.answers, stores.timing):
        lines.settle()


def _check_comparison(settings: EvaluateSettings) -> None:
    """Find a wrong --compare before the first row is answered."""
    if settings.compare is None:
        return
    if Path(settings.compare).resolve() == Path(settings.output_dir).resolve():
        raise ValueError(f"--compare {settings.compare} is --output_dir itself; name another run")
    read_verdicts(settings.compare)
    check_same_rules(settings.output_dir, settings.compare)


def benchmark_run(
    pool: RowPool, predictions: Sequence[Mapping[str, Any]], rejects: Sequence[Reject]
) -> dict[str, dict[str, Any]]:
    """Figures of each benchmark of which a row was answered, by name."""
    found = {}
    for dataset in benchmark_files(pool):
        lines = [line for line in predictions if line["dataset"] == dataset.name]
        bad = sum(reject.dataset == dataset.name for reject in rejects)
        if lines:
            found[dataset.name] = benchmark_figures(dataset, lines, bad)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    config = parse_config(EvaluateConfig, argv, "Accuracy of a checkpoint on a parquet split.")
    env = init_distributed(config.compute.device, config.compute.timeout_s)
    try:
        summary = evaluate(config, env)
    finally:
        shutdown()
    if env.is_main:
        settings = config.evaluate
        folder = Path(settings.output_dir)
        print(f"{settings.model_path}, context {settings.context}:")
        print(table(summary))
        if (folder / FIGURES_FILE).is_file():
            print(describe(read_json(folder / FIGURES_FILE, "")["benchmarks"]))
        print(timing_text(read_json(folder / "timing.json", "")))
        if settings.compare:
            print(comparison_lines(summary["comparison"]))
        print(f"{summary['seconds']:.1f} s; {folder / 'summary.json'}")
    return 0


if __name__ == "__main__":
    run_main(main)
