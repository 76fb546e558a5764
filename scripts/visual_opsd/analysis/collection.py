# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The run of `collect_traces`: completions of every row, and the teacher's word on their tokens."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.packing import group_by_tokens, pack
from data.randomness import RANDOMNESS_VERSION, row_generator
from data.rejects import Reject, summarise
from data.row_groups import prepare_row
from data.sequence import Completion, given_completion
from data.teacher_cache import (
    FORMAT,
    INDEX,
    SHARDS,
    SUMMARY,
    Entries,
    Place,
    TeacherCache,
    is_written,
    token_bytes,
    write_shard,
)
from modeling import BagelBundle, load_bagel
from modeling.bagel.bagel import Bagel
from modeling.bagel.batch import PackedBatch
from modeling.host.disk import check_room, disk_errors, size_text
from scripts.visual_opsd.analysis.trace_rows import CollectConfig, PrepareTraces, TraceRow
from scripts.visual_opsd.cli import flat
from scripts.visual_opsd.evaluation.rows import RowPool
from scripts.visual_opsd.evaluation.runner import (
    Outcome,
    RowLimits,
    claim_folder,
    memory_advice,
    run_rows,
)
from scripts.visual_opsd.evaluation.store import RankedLines, Record, write_json
from scripts.visual_opsd.loss.cached import read_entries
from scripts.visual_opsd.loss.chunked import chunked_divergences
from scripts.visual_opsd.on_policy_sampler import sample_completions
from scripts.visual_opsd.processes import DistEnv, on_main
from scripts.visual_opsd.rows import encode_pictures
from scripts.visual_opsd.runs.identity import files_digest, stable_hash
from scripts.visual_opsd.scored_rows import ScoredRow, check_same_labels, score_completion

_LOOKED_AT = 64  # rows whose traces say how long traces are

Rows = Sequence[tuple[int, TraceRow]]


# ---------------------------------------------------------------------------------- the work


class Collector:
    """Takes rows through the model, which is loaded for the first of them; a window is a shard."""

    def __init__(self, config: CollectConfig, env: DistEnv) -> None:
        self.config, self.env = config, env

    @cached_property
    def base(self) -> BagelBundle:
        settings, device = self.config.collect, self.env.device
        return load_bagel(
            settings.model_path,
            visual_gen=settings.with_latents,
            device=device,
            dtype=self.config.compute.dtype(device),
        )

    def __call__(self, rows: Rows) -> Iterator[list[Record]]:
        with memory_advice([row.name for _, row in rows], self.config.sample.memory_advice):
            records = self._records(rows)
        yield records

    def _records(self, rows: Rows) -> list[Record]:
        settings = self.config.collect
        if self.base.vae is not None:
            rows = [(index, self._encoded(index, row)) for index, row in rows]
        per_row = [self._completions(rows, n) for n in range(settings.completions_per_row)]
        limit = self.config.sample.max_forward_tokens
        scored = [  # row by row
            score_completion(str(row.name), row.student, row.teacher, drawn[place], limit)
            for place, (_, row) in enumerate(rows)
            for drawn in per_row
        ]
        completions = [row.completion for row in scored if row.completion is not None]
        entries = self.measure(scored)
        known = [[index for index, _ in rows], [completion.ids for completion in completions]]
        name = SHARDS.replace("*", stable_hash(known)[:16])
        places = write_shard(Path(settings.output_dir), name, completions, entries)
        each = settings.completions_per_row
        return [
            {
                "index": index,
                **asdict(row.name),
                "completions": places[n * each : (n + 1) * each],
                "vt_weight": sum(float(e.weight.sum()) for e in entries[n * each : (n + 1) * each]),
            }
            for n, (index, row) in enumerate(rows)
        ]

    def _encoded(self, index: int, row: TraceRow) -> TraceRow:
        assert self.base.vae is not None
        generator = row_generator("teacher", self.config.collect.seed, index)
        return replace(row, teacher=encode_pictures(row.teacher, self.base.vae, generator))

    def _completions(self, rows: Rows, number: int) -> list[Completion]:
        """The completion of this number of each row; random numbers belong to (seed, it, row)."""
        if self.config.collect.completions == "trace":
            return [given_completion(row.trace or ()) for _, row in rows]
        return sample_completions(
            self.base.model,
            [row.student for _, row in rows],
            [index for index, _ in rows],
            tokenizer=self.base.tokenizer,
            special=self.base.special_tokens,
            settings=self.config.sample.sampler(),
            seed=self.config.collect.seed,
            step=number,
            device=self.env.device,
        )

    @torch.no_grad()
    def measure(self, scored: Sequence[ScoredRow]) -> list[Entries]:
        """What is kept of the teacher on the scored tokens of each row, on the CPU."""
        found = [Entries.blank(0, 1)] * len(scored)
        order = sorted(range(len(scored)), key=lambda i: scored[i].length)
        lengths = [scored[i].length for i in order]
        for group in group_by_tokens(lengths, self.config.sample.pack_tokens):
            numbers = [order[i] for i in group]
            parts = self._measure_pack([scored[i] for i in numbers])
            for number, part in zip(numbers, parts, strict=True):
                found[number] = part
        return found

    def _measure_pack(self, rows: Sequence[ScoredRow]) -> list[Entries]:
        base, top_k = self.base, self.config.collect.top_k
        teachers = [row.teacher for row in rows if row.teacher is not None]
        text = pack([row.student for row in rows], base.special_tokens)
        shown = pack(teachers, base.special_tokens)
        check_same_labels(text, shown, [row.name for row in rows], base.tokenizer.decode)
        theirs, ours = (_score(base.model, batch, self.env.device) for batch in (shown, text))
        values, ids, tail = read_entries(*theirs, top_k)
        weight = chunked_divergences(*ours, *theirs)["kl"]
        # Rounded here, so that a window does not hold what its shard will not.
        pack_entries = Entries(values.half(), ids.to(torch.int32), tail.float(), weight.float())
        pack_entries = pack_entries.to(torch.device("cpu"))
        bounds = torch.tensor([0, *text.score_counts]).cumsum(0).tolist()
        return [pack_entries.part(slice(a, b)) for a, b in pairwise(bounds)]


def _score(model: Bagel, batch: PackedBatch, device: torch.device) -> tuple[Tensor, Tensor]:
    """Hidden states of the scored tokens (S, H) and the head weight (V, H)."""
    return model(batch.to(device), head=lambda hidden, weight: (hidden, weight))


# ---------------------------------------------------------------------------------- the run


def expected_bytes(
    config: CollectConfig, pool: RowPool, indices: Sequence[int], prepare: PrepareTraces, vocab: int
) -> tuple[float, str]:
    """Bytes that the shards of these rows take, and how that is known.

    Of samples at most, by their budget; of traces about, by the lengths of some of them.
    """
    settings = config.collect
    each = token_bytes(min(settings.top_k, vocab))
    rows = f"{len(indices)} rows"
    if settings.completions == "base":
        tokens = settings.completions_per_row * config.sample.sample_max_new_tokens
        return float(len(indices) * tokens * each), (
            f"at most, {rows} of up to {tokens} tokens, {each} bytes each"
        )
    lengths = []
    for index in indices[:: max(1, len(indices) // _LOOKED_AT)]:
        found = prepare_row(*pool.locate(index), prepare, index)
        if not isinstance(found, Reject) and found.trace is not None:
            lengths.append(len(found.trace) + 1)
    mean = sum(lengths) / max(len(lengths), 1)
    return len(indices) * mean * each, f"about, {rows} of {mean:.0f} tokens, {each} bytes each"


def collect(
    config: CollectConfig, env: DistEnv, pool: RowPool, contents: Mapping[str, Any]
) -> dict[str, Any]:
    """Make (or go on with) a cache on all ranks; returns what its summary holds on rank 0, else {}.

    Args:
        pool: the data sets. contents: what an offline run must have in common with the cache.

    Raises:
        ValueError: a cache of other settings in `output_dir`, too little room, a missing or
            damaged checkpoint, or too many unusable rows.
    """
    settings, folder = config.collect, Path(config.collect.output_dir)
    started = time.perf_counter()
    prepare, model = PrepareTraces.of(config)
    starts = zip(pool.starts, pool.datasets, strict=False)
    indices = [
        start + row
        for start, dataset in starts
        for row in range(min(len(dataset), settings.limit or len(dataset)))
    ]

    def is_whole(record: Record) -> bool:
        """Whether the shards of a row are still there, and whole."""
        return all(is_written(folder, Place.of(place)) for place in record["completions"])

    store = RankedLines(folder, INDEX.removesuffix(".jsonl"), is_whole)
    made_with = {**contents, **_own(config, env)}

    def begin() -> None:
        claim_folder(folder, made_with, [store], result=SUMMARY, overwrite=settings.overwrite)
        held = store.read()
        used = {place["shard"] for r in held.values() for place in r.get("completions", ())}
        written = _clear(folder, used)
        size, how = expected_bytes(config, pool, indices, prepare, model.llm.vocab_size)
        print(f"{folder} will hold {size_text(size)} ({how}); {size_text(written)} are there")
        check_room(folder, max(0.0, size - written), f"the teacher cache ({how})")

    on_main(env, begin)
    limits = RowLimits(
        max_rows=4 * config.sample.sample_batch_size,
        max_tokens=8 * config.sample.pack_tokens,
        max_bad_rate=settings.max_bad_rate,
        progress=config.compute.progress,
    )
    found = run_rows(pool, indices, prepare, Collector(config, env), store, env, limits)
    result: dict[str, Any] = {}

    def finish() -> None:
        result.update(_summary(found, folder, dict(contents)))
        result.update(
            top_k=min(settings.top_k, model.llm.vocab_size),
            bad_rows=len(found.rejects),
            bad_summary=summarise(found.rejects) if found.rejects else "",
            seconds=time.perf_counter() - started,
            resumed_rows=found.resumed,
            processes=env.world_size,
            settings=flat(config),
        )
        write_json(folder / SUMMARY, result)
        TeacherCache.open(folder)

    on_main(env, finish)
    return result


def _own(config: CollectConfig, env: DistEnv) -> dict[str, Any]:
    """What the cache depends on besides base, prompts and data."""
    settings = config.collect
    own: dict[str, Any] = {
        "completions": settings.completions,
        "top_k": settings.top_k,
        "teacher_vt": settings.teacher_vt,
        "limit": settings.limit,
        "precision": str(config.compute.dtype(env.device)).removeprefix("torch."),
        "random numbers": RANDOMNESS_VERSION,
    }
    if settings.with_latents:
        own["vae"] = config.prompt.vae_config()
    if settings.completions == "base" or settings.with_latents:
        own["seed"] = settings.seed
    if settings.completions == "base":
        own |= {
            "completions_per_row": settings.completions_per_row,
            **config.sample.identity,
        }
    return own


def _clear(folder: Path, used: set[str]) -> float:
    """Remove shards that no row names, left by a killed run; bytes of the others."""
    size = 0.0
    with disk_errors(f"emptying {folder}", folder):
        for shard in (*folder.glob(SHARDS), *folder.glob(f"{SHARDS}.tmp")):
            if shard.name in used:
                size += shard.stat().st_size
            else:
                shard.unlink()
    return size


def _summary(found: Outcome, folder: Path, contents: dict[str, Any]) -> dict[str, Any]:
    """Figures of a finished cache, and what tells it from others."""
    places = [place for record in found.records for place in record["completions"]]
    tokens = sum(place["tokens"][1] - place["tokens"][0] for place in places)
    weight = sum(record["vt_weight"] for record in found.records)
    shards = sorted({place["shard"] for place in places})
    return {
        "format": FORMAT,
        "contents": contents,
        "digest": files_digest(folder, (INDEX, *shards)),
        "rows": len(found.records),
        "completions": len(places),
        "tokens": tokens,
        "capped": sum(place["capped"] for place in places),
        "mean_vt_weight": weight / tokens if tokens else 0.0,
        "shards": {name: (folder / name).stat().st_size for name in shards},
    }
