# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Accuracy of a checkpoint on a world or a parquet split.

    python -m scripts.visual_opsd.evaluate --model_path DIR --data Spatial_Navigation

Greedy answers of the text-only student (`--context vt` and `noise` show it what the teacher sees:
the real visual thoughts, or Gaussian noise in their place). A row of a generated world is judged
by the world's scorer, any other by exact match of its last <answer>...</answer>. Every raw answer
is kept; a killed run is resumed by the same command; torchrun splits the rows over its processes.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from data.packing import context_length
from data.parquet import Reject
from data.rejects import summarise
from data.sequence import Completion, Context, ContextBuilder
from data.thinkmorph import EVALUATION_ROWS, Row, RowNeeds, parse_row
from data.worlds import get_scorer
from modeling import BagelBundle, load_bagel
from scripts.visual_opsd.cli import flat, option, parse_config, run_main
from scripts.visual_opsd.config import PromptSettings
from scripts.visual_opsd.on_policy_sampler import SamplerSettings, sample_completions
from scripts.visual_opsd.processes import (
    DistEnv,
    attempt,
    barrier,
    init_distributed,
    on_main,
    shutdown,
)
from scripts.visual_opsd.row_windows import (
    IDENTITY_COLUMNS,
    BadRows,
    ComputeSettings,
    RowName,
    RowPool,
    check_bad_rate,
    open_data,
    progress_bar,
    prompt_identity,
    read_windows,
    row_name,
)
from scripts.visual_opsd.rows import make_builder, noise_generator
from scripts.visual_opsd.run_store import (
    RankedLines,
    claim_folder,
    stable_hash,
    weights_fingerprint,
    write_json,
    write_lines,
)
from scripts.visual_opsd.scoring import (
    PairedComparison,
    compare_runs,
    exact_match,
    extract_answer,
    wilson_interval,
)

CONTEXTS = ("text", "vt", "noise")


@dataclass(frozen=True)
class EvaluateSettings:
    """What is evaluated on what."""

    model_path: str = option("models/ThinkMorph-7B", "release folder to evaluate")
    data: str = option(
        "Spatial_Navigation", "datasets below the data root, folders or parquet files, by commas"
    )
    split: str = option("heldout", "files of a folder that are read (SPLIT-*.parquet)")
    data_root: str | None = option(None, "folder of the datasets, else VISUAL_OPSD_DATA_ROOT")
    context: str = option(
        "text", "text: the student's; vt: the teacher's; noise: the teacher's, noise for its VTs",
        choices=CONTEXTS,
    )  # fmt: skip
    limit: int | None = option(None, "only the first rows of all")
    output_dir: str = option("results/eval", "predictions.jsonl and summary.json")
    overwrite: bool = option(False, "throw away what output_dir holds of other settings")
    batch_size: int = option(256, "rows decoded together (no effect on the result)")
    prefill_tokens: int = option(32768, "prompt rows decoded together at most")
    max_new_tokens: int = option(1024, "budget of an answer, over all its rounds")
    image_skips: int = option(1, "rounds that may follow an <image_start>")
    noise_seed: int = option(0, "random numbers of --context noise")
    max_bad_rate: float = option(0.01, "share of unusable rows beyond which the run fails")
    compare: str | None = option(None, "output folder of another run on the same rows")

    def __post_init__(self) -> None:
        for name in ("batch_size", "prefill_tokens", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.image_skips < 0 or (self.limit is not None and self.limit < 1):
            raise ValueError("image_skips must not be negative, limit at least 1")
        if self.context not in CONTEXTS:
            raise ValueError(f"unknown context {self.context!r}: choose {', '.join(CONTEXTS)}")

    @property
    def needs(self) -> RowNeeds:
        """Columns to read; only the teacher's context needs visual thoughts."""
        if self.context == "text":
            return EVALUATION_ROWS
        return RowNeeds("required", "unused", "unused")


@dataclass(frozen=True)
class EvaluateConfig:
    evaluate: EvaluateSettings = field(default_factory=EvaluateSettings)
    prompt: PromptSettings = field(default_factory=PromptSettings)
    compute: ComputeSettings = field(default_factory=ComputeSettings)


# ---------------------------------------------------------------------------------- rows


@dataclass(frozen=True)
class Question:
    """One row to answer: its context, and what judges the answer."""

    name: RowName
    question: str
    answer: str
    world: str | None
    world_state: str | None
    context: Context

    @property
    def length(self) -> int:
        return context_length(self.context)

    def correct(self, text: str) -> bool:
        """The world's verdict on a generated text, or exact match."""
        if self.world is not None:
            return get_scorer(self.world)({"world_state": self.world_state}, text)
        return exact_match(self.answer, text)


@dataclass(frozen=True)
class PrepareQuestion:
    """Row -> the context the model answers from."""

    builder: ContextBuilder
    settings: EvaluateSettings

    def __call__(self, row: Row) -> Question:
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
            sample.world,
            sample.world_state,
            context,
        )


def prediction(index: int, question: Question, completion: Completion, text: str) -> dict[str, Any]:
    """A line of predictions.jsonl."""
    return {
        "index": index,
        **asdict(question.name),
        "question": question.question,
        "answer": question.answer,
        "text": text,
        "output_tokens": len(completion.ids),
        "correct": question.correct(text),
        "answered": extract_answer(text) is not None,
        "capped": completion.capped,
        "empty": not completion.ids and not completion.capped,
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
        "precision": str(dtype).removeprefix("torch."),
        **prompt_identity(config.prompt),
    }


def answer_rows(
    config: EvaluateConfig, env: DistEnv, pool: RowPool, indices: Sequence[int], store: RankedLines
) -> None:
    """Answer and judge this rank's rows, appending to its file window by window."""
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
    prepare = PrepareQuestion(
        make_builder(bundle.tokenizer, bundle.config, config.prompt), settings
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
            lines = [_bad_line(index, reject) for index, reject in window.rejects]
            lines += _answer_window(bundle, window.rows, sampler, env.device, bar)
            store.append(env.rank, sorted(lines, key=lambda line: int(line["index"])))
            bar.update(len(window.rejects))
            bad.add(window)


def _answer_window(
    bundle: BagelBundle,
    rows: Sequence[tuple[int, Question]],
    sampler: SamplerSettings,
    device: torch.device,
    bar: Any,
) -> list[dict[str, Any]]:
    if not rows:
        return []
    before = bar.n
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
        on_rows=lambda done: bar.update(before + done - bar.n),
    )
    return [
        prediction(index, question, completion, bundle.tokenizer.decode(completion.ids))
        for (index, question), completion in zip(rows, completions, strict=True)
    ]


def _bad_line(index: int, reject: Reject) -> dict[str, Any]:
    return {"index": index, "bad": asdict(reject)}


def split_bad(
    records: Mapping[int, Mapping[str, Any]],
) -> tuple[list[Mapping[str, Any]], list[Reject]]:
    """Predictions, and the rows that could not be used."""
    good = [record for record in records.values() if "bad" not in record]
    return good, [Reject(**record["bad"]) for record in records.values() if "bad" in record]


def evaluate(config: EvaluateConfig, env: DistEnv) -> dict[str, Any]:
    """Run (or resume) an evaluation on all ranks; returns the summary on rank 0, {} elsewhere.

    Raises:
        ValueError: a missing or damaged checkpoint or dataset, results of other settings in
            `output_dir`, too many unusable rows, or rows that differ from those of `compare`.
    """
    settings = config.evaluate
    folder = Path(settings.output_dir)
    store = RankedLines(folder, "predictions")
    dtype = config.compute.dtype(env.device)
    pool = RowPool(open_data(settings.data, settings.split, settings.data_root, settings.needs))
    wanted = result_settings(config, pool, dtype)
    on_main(env, lambda: _prepare_folder(store, wanted, settings))
    # Unusable rows are tried again: what kept them from being read may be gone.
    done = {index for index, record in store.read().items() if "bad" not in record}
    total = min(len(pool), settings.limit or len(pool))
    todo = [index for index in range(total) if index not in done]
    barrier(env)  # nobody appends before everybody has read

    started = time.perf_counter()
    mine = todo[env.rank :: env.world_size]
    attempt(lambda: answer_rows(config, env, pool, mine, store))
    seconds = time.perf_counter() - started
    summary: dict[str, Any] = {}

    def finish() -> None:
        good, rejects = split_bad(store.read())
        store.merge(good)
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
        if settings.compare:
            summary["comparison"] = {
                "other": settings.compare,
                **asdict(compare_runs(folder, settings.compare)),
            }
        write_json(folder / "summary.json", summary)

    on_main(env, finish)
    return summary


def _prepare_folder(
    store: RankedLines, wanted: Mapping[str, Any], settings: EvaluateSettings
) -> None:
    if settings.overwrite:
        store.clear()
    claim_folder(
        store.folder,
        wanted,
        has_results=store.exists(),
        hint="choose another --output_dir, or pass --overwrite to throw them away",
    )


# ---------------------------------------------------------------------------------- results


def summarise_run(
    predictions: Sequence[Mapping[str, Any]], rejects: Sequence[Reject]
) -> dict[str, Any]:
    """The figures of summary.json, over all rows and for each dataset."""
    names = list(dict.fromkeys(str(line["dataset"]) for line in predictions))
    return {
        **_figures(predictions),
        "tasks": {n: _figures([p for p in predictions if p["dataset"] == n]) for n in names},
        "bad_rows": len(rejects),
        "bad_reasons": {
            reason: sum(reject.reason == reason for reject in rejects)
            for reason in sorted({reject.reason for reject in rejects})
        },
        "bad_summary": summarise(rejects) if rejects else "",
    }


def _figures(predictions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    n = len(predictions)

    def share(name: str) -> float:
        return sum(bool(line[name]) for line in predictions) / n

    correct = sum(bool(line["correct"]) for line in predictions)
    tokens = sum(int(line["output_tokens"]) for line in predictions)
    return {
        "n": n,
        "correct": correct,
        "accuracy": share("correct"),
        "interval": list(wilson_interval(correct, n)),
        "mean_tokens": tokens / n,
        "cap_rate": share("capped"),
        "empty_rate": share("empty"),
        "answered_rate": share("answered"),
    }


def table(summary: Mapping[str, Any]) -> str:
    """The summary as text, one line a dataset and one for all."""
    names = "".join(f"{name:>8}" for name in ("tokens", "capped", "empty"))
    lines = [f"{'':24}{'n':>7}{'accuracy':>10}{'95 % interval':>17}{names}"]
    tasks = summary["tasks"] if len(summary["tasks"]) > 1 else {}
    for name, figures in [*tasks.items(), ("all", summary)]:
        low, high = figures["interval"]
        lines.append(
            f"{name:24}{figures['n']:>7}{figures['accuracy']:>10.1%}"
            f"{f'{low:.1%} - {high:.1%}':>17}{figures['mean_tokens']:>8.1f}"
            f"{figures['cap_rate']:>8.1%}{figures['empty_rate']:>8.1%}"
        )
    if summary["bad_rows"]:
        lines.append(f"{summary['bad_rows']} rows left out: {summary['bad_summary']}")
    return "\n".join(lines)


def comparison_line(comparison: PairedComparison, this: str, other: str) -> str:
    """A paired comparison in one line."""
    c = comparison
    return (
        f"{this} {c.accuracy_a:.1%} - {other} {c.accuracy_b:.1%} = {c.difference:+.1f} points "
        f"(95 % {c.low:+.1f} .. {c.high:+.1f}; {c.only_a} rows only the former, {c.only_b} only "
        f"the latter, McNemar p = {c.p_value:.2g}; n = {c.n})"
    )


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
        print(f"{settings.model_path}, context {settings.context}:")
        print(table(summary))
        if settings.compare:
            figures = {k: v for k, v in summary["comparison"].items() if k != "other"}
            print(comparison_line(PairedComparison(**figures), "this", settings.compare))
        print(f"{summary['seconds']:.1f} s; {Path(settings.output_dir) / 'summary.json'}")
    return 0


if __name__ == "__main__":
    run_main(main)
