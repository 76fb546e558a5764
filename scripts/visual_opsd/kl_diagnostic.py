# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The KL diagnostic: what the visual thoughts (VTs) hold that the text-only student lacks.

    python -m scripts.visual_opsd.kl_diagnostic --model_path BASE --output_dir DIR0
    python -m scripts.visual_opsd.kl_diagnostic --model_path TRAINED --base_path BASE \
        --baseline DIR0 --output_dir DIR1

The teacher is always the base with the real VTs in view. On every token of the base's own
completions (or of the dataset's text traces) its distribution is compared with the student's:
full-vocabulary KL(teacher || student) and JSD in nats; Gaussian noise in place of the VTs is the
control. The first call is the baseline: it says GO or NO-GO and saves completions and divergences.
The second reuses them, so that

    gap closed = 1 - KL(base teacher || trained student) / KL(base teacher || base student)

is measured on identical tokens; the trained student's own samples are a second column.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.json_lines import write_lines
from data.randomness import RANDOMNESS_VERSION
from data.rejects import Reject, summarise
from data.sequence import Completion, given_completion
from modeling import BagelBundle, load_bagel
from modeling.release.fingerprints import weights_fingerprint
from scripts.visual_opsd.analysis.baseline import (
    SUMMARY,
    Baseline,
    completion_line,
    completions_hash,
    read_baseline,
    save_divergences,
)
from scripts.visual_opsd.analysis.kl_measurement import (
    DiagnosticConfig,
    DiagnosticRow,
    DiagnosticSettings,
    PrepareDiagnostic,
    attach,
    choose_rows,
    encode_row,
    measure,
)
from scripts.visual_opsd.analysis.kl_statistics import (
    PAPER_NOTE,
    SampleDivergences,
    describe,
    gap_closed,
    go_test,
    table,
)
from scripts.visual_opsd.cli import flat, parse_config, run_main
from scripts.visual_opsd.evaluation.rows import (
    BadRows,
    RowPool,
    check_bad_rate,
    memory_advice,
    open_config,
    open_data,
    progress_bar,
    prompt_identity,
    read_windows,
)
from scripts.visual_opsd.evaluation.store import claim_output, write_json
from scripts.visual_opsd.on_policy_sampler import sample_completions
from scripts.visual_opsd.processes import (
    DistEnv,
    attempt,
    gather_objects,
    init_distributed,
    on_main,
    shutdown,
)


@dataclass(frozen=True)
class Result:
    """What a rank found out about one row."""

    index: int
    line: dict[str, Any]
    tokens: tuple[str, ...]
    base: SampleDivergences
    student: SampleDivergences
    own_line: dict[str, Any] | None = None
    own: SampleDivergences | None = None


class Diagnosis:
    """Both models and how rows go through them."""

    def __init__(
        self, config: DiagnosticConfig, env: DistEnv, baseline: Baseline | None, same_model: bool
    ) -> None:
        self.config, self.env, self.baseline = config, env, baseline
        settings, dtype = config.diagnostic, config.compute.dtype(env.device)
        self.base = load_bagel(
            settings.base, visual_gen=settings.with_latents, device=env.device, dtype=dtype
        )
        self.student = self.base
        if not same_model:
            self.student = load_bagel(settings.model_path, device=env.device, dtype=dtype)
            if self.student.tokenizer.get_vocab() != self.base.tokenizer.get_vocab():
                raise ValueError(
                    f"{settings.model_path} and {settings.base} have different tokenizers, so "
                    "their distributions cannot be compared; give the base it was trained from"
                )
        self.same_model = same_model

    def sample(
        self, bundle: BagelBundle, rows: Sequence[tuple[int, DiagnosticRow]]
    ) -> list[Completion]:
        """The bundle's own completions; random numbers belong to (seed, row)."""
        return sample_completions(
            bundle.model,
            [row.student for _, row in rows],
            [index for index, _ in rows],
            tokenizer=bundle.tokenizer,
            special=bundle.special_tokens,
            settings=self.config.sample.sampler(),
            seed=self.config.diagnostic.seed,
            step=0,
            device=self.env.device,
        )

    def base_completions(self, rows: Sequence[tuple[int, DiagnosticRow]]) -> list[Completion]:
        """The baseline's, the dataset's, or freshly sampled ones."""
        if self.baseline is not None:
            return [self.baseline.completion(index, row.name) for index, row in rows]
        if self.config.diagnostic.completions == "trace":
            return [given_completion(row.trace or ()) for _, row in rows]
        return self.sample(self.base, rows)

    def window(self, rows: Sequence[tuple[int, DiagnosticRow]]) -> list[Result]:
        """Everything about some rows."""
        limit = self.config.sample.max_forward_tokens
        run = partial(
            measure, self.base, pack_tokens=self.config.sample.pack_tokens, device=self.env.device
        )
        decode = self.base.tokenizer.decode
        if self.config.diagnostic.with_latents:
            vae, seed = self.base.vae, self.config.diagnostic.seed
            assert vae is not None
            rows = [(index, encode_row(row, vae, seed, index)) for index, row in rows]
        completions = self.base_completions(rows)
        scored = [attach(i, row, c, limit) for (i, row), c in zip(rows, completions, strict=True)]
        models = [self.base.model] if self.baseline is None else []
        if self.baseline is not None or not self.same_model:
            models.append(self.student.model)
        columns = run(models, scored)
        base = columns[0] if self.baseline is None else [self.baseline.base[i] for i, _ in rows]
        results = [
            Result(
                s.index,
                completion_line(s.index, s.row.name, s.completion, decode),
                tuple(decode([label]) for label in _labels(s.completion, self.base)),
                before,
                after,
            )
            for s, before, after in zip(scored, base, columns[-1], strict=True)
        ]
        if self.same_model or self.config.diagnostic.completions == "trace":
            return results
        own = [
            attach(i, row, c, limit)
            for (i, row), c in zip(rows, self.sample(self.student, rows), strict=True)
        ]
        figures = run([self.student.model], own)[0]
        return [
            replace(
                result,
                own_line=completion_line(s.index, s.row.name, s.completion, decode),
                own=divergences,
            )
            for result, s, divergences in zip(results, own, figures, strict=True)
        ]


def _labels(completion: Completion, bundle: BagelBundle) -> list[int]:
    ids = (*completion.ids, bundle.special_tokens.eos)
    return [i for i, scored in zip(ids, completion.scored, strict=True) if scored]


# ---------------------------------------------------------------------------------- the run


def identity(config: DiagnosticConfig, pool: RowPool, dtype: torch.dtype) -> dict[str, Any]:
    """Everything the base's side depends on: a baseline must agree in all of it."""
    settings, sample = config.diagnostic, config.sample
    # Absent for the ViT alone, so that baselines of before this choice existed still serve.
    latents = {"teacher_vt": settings.teacher_vt, "vae": config.prompt.vae_config()}
    return {
        **(latents if settings.with_latents else {}),
        "base": weights_fingerprint(settings.base),
        "data": pool.signature(),
        "num_samples": settings.num_samples,
        "completions": settings.completions,
        "seed": settings.seed,
        "random_numbers": RANDOMNESS_VERSION,
        "sample_max_new_tokens": sample.sample_max_new_tokens,
        "sample_temperature": sample.sample_temperature,
        "sample_do_sample": sample.sample_do_sample,
        "sample_max_image_skips": sample.sample_max_image_skips,
        "max_forward_tokens": sample.max_forward_tokens,
        "precision": str(dtype).removeprefix("torch."),
        **prompt_identity(config.prompt),
    }


def diagnose(config: DiagnosticConfig, env: DistEnv) -> dict[str, Any]:
    """Run the diagnostic on all ranks; returns what kl_diagnostic.json holds on rank 0, else {}.

    Raises:
        ValueError: results in `output_dir` already, a missing or damaged checkpoint, dataset or
            baseline, a baseline of other settings or rows, other tokenizers, or too many unusable
            rows.
    """
    settings = config.diagnostic
    started = time.perf_counter()
    if settings.data:
        datasets = open_data(settings.data, settings.split, settings.data_root, settings.needs)
        weights = [float(len(dataset)) for dataset in datasets]
    else:
        datasets, weights = open_config(
            settings.dataset_config_file, settings.data_root, settings.needs
        )
    pool = RowPool(datasets)
    wanted = identity(config, pool, config.compute.dtype(env.device))
    same_model = wanted["base"] == weights_fingerprint(settings.model_path)
    baseline = read_baseline(settings.baseline, wanted) if settings.baseline else None
    prepare = PrepareDiagnostic.of(config)
    on_main(env, lambda: claim_output(settings.output_dir, SUMMARY, settings.overwrite))
    if baseline is not None:
        indices = baseline.indices
    else:
        sizes = [len(dataset) for dataset in datasets]
        indices = choose_rows(sizes, weights, settings.num_samples, settings.seed)

    mine: list[Result] = []
    rejects: list[tuple[int, Reject]] = []

    def work() -> None:
        found, bad = _run_rank(config, env, pool, indices[env.rank :: env.world_size], baseline,
                               same_model, prepare)  # fmt: skip
        mine.extend(found)
        rejects.extend(bad)

    attempt(work)
    gathered = gather_objects((mine, rejects))
    result: dict[str, Any] = {}

    def finish() -> None:
        results = sorted((r for part, _ in gathered for r in part), key=lambda r: r.index)
        bad = [reject for _, part in gathered for _, reject in part]
        check_bad_rate(bad, len(indices), settings.max_bad_rate)
        if not results:
            raise ValueError(f"no row could be used: {summarise(bad)}")
        result.update(summarise_run(results, settings, is_baseline=same_model and baseline is None))
        result["bad_rows"] = len(bad)
        result["bad_summary"] = summarise(bad) if bad else ""
        result["seconds"] = time.perf_counter() - started
        result["processes"], result["device"] = env.world_size, env.device.type
        result["settings"], result["identity"] = flat(config), wanted
        write_outputs(Path(settings.output_dir), results, result, settings)

    on_main(env, finish)
    return result


def _run_rank(
    config: DiagnosticConfig,
    env: DistEnv,
    pool: RowPool,
    indices: Sequence[int],
    baseline: Baseline | None,
    same_model: bool,
    prepare: PrepareDiagnostic,
) -> tuple[list[Result], list[tuple[int, Reject]]]:
    if not indices:
        return [], []
    diagnosis = Diagnosis(config, env, baseline, same_model)
    bad = BadRows(config.diagnostic.max_bad_rate)
    results: list[Result] = []
    sample = config.sample
    advice = (
        f"lower --sample_batch_size ({sample.sample_batch_size}), --pack_tokens "
        f"({sample.pack_tokens}) or --sample_max_new_tokens ({sample.sample_max_new_tokens})"
    )
    windows = read_windows(
        pool,
        indices,
        prepare,
        max_rows=4 * config.sample.sample_batch_size,
        max_tokens=8 * config.sample.pack_tokens,
    )
    with progress_bar(len(indices), config.compute.progress and env.is_main) as bar:
        for window in windows:
            if baseline is not None and window.rejects:
                reject = window.rejects[0][1]
                raise ValueError(
                    f"{reject.file} row {reject.row} was usable in the baseline and is not now: "
                    f"{reject.detail}"
                )
            bad.add(window)
            if window.rows:
                with memory_advice([row.name for _, row in window.rows], advice):
                    results += diagnosis.window(window.rows)
            bar.update(window.count)
    return results, bad.rejects


# ---------------------------------------------------------------------------------- results


def _describe_completions(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    n = len(lines)
    return {
        "n": n,
        "hash": completions_hash(lines),
        "mean_tokens": sum(len(line["ids"]) for line in lines) / n,
        "cap_rate": sum(bool(line["capped"]) for line in lines) / n,
        "empty_rate": sum(not line["ids"] and not line["capped"] for line in lines) / n,
    }


def summarise_run(
    results: Sequence[Result], settings: DiagnosticSettings, *, is_baseline: bool
) -> dict[str, Any]:
    """The figures of kl_diagnostic.json."""
    tasks = [str(r.line["dataset"]) for r in results]
    base, student = [r.base for r in results], [r.student for r in results]
    base_figures = describe(base, tasks)
    test = go_test(base_figures, settings.go_threshold)
    own = [r.own for r in results if r.own is not None]
    own_lines = [r.own_line for r in results if r.own_line is not None]
    return {
        "decision": "GO" if test["go"] else "NO-GO",
        "go": test["go"],
        "go_test": test,
        "is_baseline": is_baseline,
        "teacher_vt": settings.teacher_vt,
        "gap_closed": gap_closed(base, student),
        "gap_closed_own_samples": gap_closed(base, own, paired=False) if own else None,
        "base": base_figures,
        "student": describe(student, tasks),
        "own_samples": describe(own, tasks) if own else None,
        "completions": {
            "kind": settings.completions,
            **_describe_completions([r.line for r in results]),
        },
        "own_completions": _describe_completions(own_lines) if own_lines else None,
        "note": PAPER_NOTE,
    }


def write_outputs(
    folder: Path,
    results: Sequence[Result],
    summary: Mapping[str, Any],
    settings: DiagnosticSettings,
) -> None:
    """Completions, divergences, figures and, last, kl_diagnostic.json."""
    write_lines(folder / "completions.jsonl", [r.line for r in results])
    own = [r for r in results if r.own is not None and r.own_line is not None]
    if own:
        write_lines(folder / "own_completions.jsonl", [r.own_line or {} for r in own])
    blocks = {"base": [r.base for r in results], "student": [r.student for r in results]}
    if own:
        blocks["own"] = [r.own for r in own if r.own is not None]
    save_divergences(folder, blocks)
    if settings.figures:
        draw_figures(folder, results, settings)
    write_json(folder / SUMMARY, summary)


def draw_figures(
    folder: Path, results: Sequence[Result], settings: DiagnosticSettings
) -> None:
    """Distribution of the measured student's KL, and a few completions token by token."""
    # Here, so that the other ranks and runs without figures need not load matplotlib.
    from scripts.visual_opsd.analysis.figures import (
        HeatRow,
        draw_kl_distribution,
        draw_token_heatmap,
        pick_rows,
    )

    title = f"KL of {Path(settings.model_path).name} from the base with VTs, on the same tokens"
    real, noise = (
        np.concatenate([r.student.columns[name] for r in results])
        for name in ("kl_real", "kl_noise")
    )
    draw_kl_distribution(folder / "kl_distribution.png", real, noise, title)
    tasks = [str(r.line["dataset"]) for r in results]
    usable = [bool(r.student.answer.any()) for r in results]
    heat = [
        HeatRow(
            f"{results[i].line['dataset']}/{results[i].line['pid']}",
            results[i].tokens,
            results[i].student.columns["kl_real"],
            results[i].student.columns["kl_noise"],
            results[i].student.answer,
        )
        for i in pick_rows(tasks, usable, settings.heatmap_samples)
    ]
    draw_token_heatmap(folder / "token_heatmap.png", heat, title)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code (0 for GO and for NO-GO)."""
    config = parse_config(DiagnosticConfig, argv, "Teacher-student divergence on the same tokens.")
    env = init_distributed(config.compute.device, config.compute.timeout_s)
    try:
        result = diagnose(config, env)
    finally:
        shutdown()
    if env.is_main:
        print(table(result))
        folder = Path(config.diagnostic.output_dir)
        print(f"{result['seconds']:.1f} s; {folder / SUMMARY}")
    return 0


if __name__ == "__main__":
    run_main(main)
