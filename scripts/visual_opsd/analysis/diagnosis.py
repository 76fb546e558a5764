# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The run of the KL diagnostic: completions, their divergences row by row, and the report."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.dataset_info import load_dataset_config
from data.json_lines import write_lines
from data.parquet import open_sources
from data.randomness import RANDOMNESS_VERSION
from data.rejects import summarise
from data.sequence import Completion, given_completion
from modeling import BagelBundle, load_bagel
from modeling.release.fingerprints import weights_fingerprint
from modeling.release.tokenizer import load_tokenizer
from scripts.visual_opsd.analysis.baseline import (
    SUMMARY,
    Baseline,
    completion_line,
    completions_hash,
    decode_divergences,
    encode_divergences,
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
)
from scripts.visual_opsd.cli import flat
from scripts.visual_opsd.evaluation.rows import RowPool, open_data, prompt_identity
from scripts.visual_opsd.evaluation.runner import (
    RowLimits,
    claim_folder,
    memory_advice,
    run_rows,
)
from scripts.visual_opsd.evaluation.store import RankedLines, Record, write_json
from scripts.visual_opsd.on_policy_sampler import sample_completions
from scripts.visual_opsd.processes import DistEnv, on_main

Rows = Sequence[tuple[int, DiagnosticRow]]


class Diagnosis:
    """Takes rows through both models, which are loaded for the first of them."""

    def __init__(
        self, config: DiagnosticConfig, env: DistEnv, baseline: Baseline | None, same_model: bool
    ) -> None:
        self.config, self.env, self.baseline = config, env, baseline
        self.same_model = same_model
        self.has_own = not same_model and config.diagnostic.completions == "student"

    @cached_property
    def base(self) -> BagelBundle:
        settings = self.config.diagnostic
        return self._load(settings.base, settings.with_latents)

    @cached_property
    def student(self) -> BagelBundle:
        return self.base if self.same_model else self._load(self.config.diagnostic.model_path)

    def _load(self, path: str, visual_gen: bool = False) -> BagelBundle:
        device = self.env.device
        dtype = self.config.compute.dtype(device)
        return load_bagel(path, visual_gen=visual_gen, device=device, dtype=dtype)

    def sample(self, bundle: BagelBundle, rows: Rows) -> list[Completion]:
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

    def base_completions(self, rows: Rows) -> list[Completion]:
        """The baseline's, the dataset's, or freshly sampled ones."""
        if self.baseline is not None:
            return [self.baseline.completion(index, row.name) for index, row in rows]
        if self.config.diagnostic.completions == "trace":
            return [given_completion(row.trace or ()) for _, row in rows]
        return self.sample(self.base, rows)

    def __call__(self, rows: Rows) -> Iterator[list[Record]]:
        with memory_advice([row.name for _, row in rows], self.config.sample.memory_advice):
            records = self._records(rows)
        yield records

    def _records(self, rows: Rows) -> list[Record]:
        teacher, seed = self.base, self.config.diagnostic.seed
        if teacher.vae is not None:
            rows = [(index, encode_row(row, teacher.vae, seed, index)) for index, row in rows]
        models = [teacher] if self.baseline is None else []
        if self.baseline is not None or not self.same_model:
            models.append(self.student)
        lines, columns = self._measure(models, rows, self.base_completions(rows))
        base = columns[0]
        if self.baseline is not None:
            base = [self.baseline.base[index] for index, _ in rows]
        records: list[Record] = [
            {
                "index": line["index"],
                "completion": line,
                "base": encode_divergences(before),
                "student": encode_divergences(after),
            }
            for line, before, after in zip(lines, base, columns[-1], strict=True)
        ]
        if self.has_own:
            own_lines, (own,) = self._measure([self.student], rows, self.sample(self.student, rows))
            for record, line, divergences in zip(records, own_lines, own, strict=True):
                record.update(own_completion=line, own=encode_divergences(divergences))
        return records

    def _measure(
        self, students: Sequence[BagelBundle], rows: Rows, completions: Sequence[Completion]
    ) -> tuple[list[Record], list[list[SampleDivergences]]]:
        """The completions as they were measured, and for each student its figures of them."""
        sample = self.config.sample
        scored = [
            attach(index, row, completion, sample.max_forward_tokens)
            for (index, row), completion in zip(rows, completions, strict=True)
        ]
        columns = measure(
            self.base,
            [student.model for student in students],
            scored,
            pack_tokens=sample.pack_tokens,
            device=self.env.device,
        )
        decode = self.base.tokenizer.decode
        return [completion_line(s.index, s.name, s.completion, decode) for s in scored], columns


# ---------------------------------------------------------------------------------- the run


def identity(config: DiagnosticConfig, pool: RowPool, dtype: torch.dtype) -> dict[str, Any]:
    """Everything the base's side depends on: a baseline must agree in all of it."""
    settings, sample = config.diagnostic, config.sample
    # Absent for the ViT alone, and for noise alone, so that baselines of before these choices
    # existed still serve.
    latents = {"teacher_vt": settings.teacher_vt, "vae": config.prompt.vae_config()}
    further = len(settings.chosen) > 1
    return {
        **(latents if settings.with_latents else {}),
        **({"controls": list(settings.chosen)} if further else {}),
        "base": weights_fingerprint(settings.base),
        "data": pool.signature(),
        "num_samples": settings.num_samples,
        "completions": settings.completions,
        "seed": settings.seed,
        **sample.identity,
        "max_forward_tokens": sample.max_forward_tokens,
        "random_numbers": RANDOMNESS_VERSION,
        "precision": str(dtype).removeprefix("torch."),
        **prompt_identity(config.prompt),
    }


def diagnose(config: DiagnosticConfig, env: DistEnv) -> dict[str, Any]:
    """Run (or resume) the diagnostic on all ranks; returns what kl_diagnostic.json holds on rank
    0, else {}.

    Raises:
        ValueError: results of other settings in `output_dir`, a missing or damaged checkpoint,
            dataset or baseline, a baseline of other settings or rows, other tokenizers, or too
            many unusable rows.
    """
    settings = config.diagnostic
    started = time.perf_counter()
    root, needs = settings.data_root, settings.needs
    if settings.data:
        pool = RowPool(open_data(settings.data, settings.split, root, needs))
        weights = [float(len(dataset)) for dataset in pool.datasets]
    else:  # its row budgets concern training and do not apply
        sources = open_sources(load_dataset_config(settings.dataset_config_file), needs, root)
        pool = RowPool([source.dataset for source in sources])
        weights = [source.weight for source in sources]
    wanted = identity(config, pool, config.compute.dtype(env.device))
    student = weights_fingerprint(settings.model_path)
    same_model = wanted["base"] == student
    baseline = read_baseline(settings.baseline, wanted) if settings.baseline else None
    prepare = PrepareDiagnostic.of(config)
    if not same_model:
        _check_tokenizer(settings, prepare.builder.tokenizer)
    needed = itemgetter("completion", "base", "student")
    store = RankedLines(Path(settings.output_dir), "rows", needed)
    depends_on = {**wanted, "student": student, "baseline": baseline and baseline.hash}
    on_main(env, lambda: claim_folder(
        settings.output_dir, depends_on, [store], result=SUMMARY, overwrite=settings.overwrite
    ))  # fmt: skip
    if baseline is not None:
        indices = baseline.indices
    else:
        sizes = [len(dataset) for dataset in pool.datasets]
        indices = choose_rows(sizes, weights, settings.num_samples, settings.seed)
    limits = RowLimits(
        max_rows=4 * config.sample.sample_batch_size,
        max_tokens=8 * config.sample.pack_tokens,
        max_bad_rate=settings.max_bad_rate,
        progress=config.compute.progress,
        good_in=None if baseline is None else "the baseline",
    )
    work = Diagnosis(config, env, baseline, same_model)
    found = run_rows(pool, indices, prepare, work, store, env, limits)
    result: dict[str, Any] = {}

    def finish() -> None:
        measured = Measured.of(found.records)
        result.update(
            summarise_run(measured, settings, is_baseline=same_model and baseline is None),
            bad_rows=len(found.rejects),
            bad_summary=summarise(found.rejects) if found.rejects else "",
            seconds=time.perf_counter() - started,
            resumed_rows=found.resumed,
            processes=env.world_size,
            device=env.device.type,
            settings=flat(config),
            identity=wanted,
        )
        write_outputs(Path(settings.output_dir), measured, result, settings)

    on_main(env, finish)
    return result


def _check_tokenizer(settings: DiagnosticSettings, base: Any) -> None:
    student, _ = load_tokenizer(settings.model_path)
    if student.get_vocab() != base.get_vocab():
        raise ValueError(
            f"{settings.model_path} and {settings.base} have different tokenizers, so their "
            "distributions cannot be compared; give the base it was trained from"
        )


# ---------------------------------------------------------------------------------- results


@dataclass(frozen=True)
class Measured:
    """What was found out about all rows, in their order.

    lines: the completions on which both models were measured; own_lines: the student's own, or
    none. blocks: the divergences, of "base", "student" and the student's "own".
    """

    lines: list[Record]
    own_lines: list[Record]
    blocks: dict[str, list[SampleDivergences]]

    @classmethod
    def of(cls, records: Sequence[Record]) -> Measured:
        return cls(
            [record["completion"] for record in records],
            [record["own_completion"] for record in records if "own" in record],
            {
                block: [decode_divergences(record[block]) for record in records]
                for block in ("base", "student", "own")
                if block in records[0]
            },
        )

    @property
    def tasks(self) -> list[str]:
        return [str(line["dataset"]) for line in self.lines]


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
    measured: Measured, settings: DiagnosticSettings, *, is_baseline: bool
) -> dict[str, Any]:
    """The figures of kl_diagnostic.json."""
    tasks, own_lines = measured.tasks, measured.own_lines
    base, student = measured.blocks["base"], measured.blocks["student"]
    own = measured.blocks.get("own")
    base_figures = describe(base, tasks)
    test = go_test(base_figures, settings.go_threshold)
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
        "completions": {"kind": settings.completions, **_describe_completions(measured.lines)},
        "own_completions": _describe_completions(own_lines) if own_lines else None,
        "note": PAPER_NOTE,
    }


def write_outputs(
    folder: Path, measured: Measured, summary: Mapping[str, Any], settings: DiagnosticSettings
) -> None:
    """Completions, divergences, figures and, last, kl_diagnostic.json."""
    write_lines(folder / "completions.jsonl", measured.lines)
    if measured.own_lines:
        write_lines(folder / "own_completions.jsonl", measured.own_lines)
    save_divergences(folder, measured.blocks)
    if settings.figures:
        draw_figures(folder, measured, settings)
    write_json(folder / SUMMARY, summary)


def draw_figures(folder: Path, measured: Measured, settings: DiagnosticSettings) -> None:
    """Distribution of the measured student's KL, and a few completions token by token."""
    # Here, so that the other ranks and runs without figures need not load matplotlib.
    from scripts.visual_opsd.analysis.figures import (
        HeatRow,
        draw_kl_distribution,
        draw_token_heatmap,
        pick_rows,
    )

    title = f"KL of {Path(settings.model_path).name} from the base with VTs, on the same tokens"
    student = measured.blocks["student"]
    real, noise = (
        np.concatenate([s.columns[name] for s in student]) for name in ("kl_real", "kl_noise")
    )
    draw_kl_distribution(folder / "kl_distribution.png", real, noise, title)
    usable = [bool(s.answer.any()) for s in student]
    tokenizer, special = load_tokenizer(settings.base)
    heat = []
    for number in pick_rows(measured.tasks, usable, settings.heatmap_samples):
        line, figures = measured.lines[number], student[number]
        labels = zip((*line["ids"], special.eos), line["scored"], strict=True)
        heat.append(
            HeatRow(
                f"{line['dataset']}/{line['pid']}",
                [tokenizer.decode([label]) for label, is_scored in labels if is_scored],
                figures.columns["kl_real"],
                figures.columns["kl_noise"],
                figures.answer,
            )
        )
    draw_token_heatmap(folder / "token_heatmap.png", heat, title)
