# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Where the tokens of an answer look, layer by layer, before and after the visual thoughts (VTs).

    python -m scripts.visual_opsd.analysis.attention --model_path DIR --data Spatial_Navigation

The answer of a row (its text-only trace and answer, as the SFT baseline learns them) is read twice
by the model: `before` behind the student's context, `after` behind the teacher's, which shows the
VTs. Each layer's attention is computed again from the layer's input, in fp32, with scores scaled
by d^-0.5 and masked as the layout says, for the tokens that predict the answer; its mass is summed
over the keys of each part, and averaged over heads, tokens, then samples. The parts:

    first_token    the very first token, on which models park attention they do not need
    problem_image  the problem, its two markers included
    vt             the VTs likewise, however they are read
    text           system prompt, question and the teacher's strings
    answer         what was written of the answer so far
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.limits import NO_LIMITS, PACKED_TOKENS, ContextLimits
from data.packing import context_length, group_by_tokens, pack, segment_length
from data.randomness import RANDOMNESS_VERSION, row_generator
from data.sequence import Context, ContextBuilder, TextSegment
from data.thinkmorph import Row, RowNeeds, parse_row
from data.visual_thoughts import show_thoughts
from modeling import BagelBundle, load_bagel
from modeling.bagel.attention import AttentionLayout
from modeling.bagel.bagel import Bagel
from modeling.bagel.batch import PackedBatch
from modeling.bagel.decoder import Attention
from modeling.release.fingerprints import weights_fingerprint
from scripts.visual_opsd.analysis.figures import draw_attention
from scripts.visual_opsd.cli import PACKED, ROWS, SEEDS, flat, option, parse_config, run_main
from scripts.visual_opsd.config import ComputeSettings, PromptSettings
from scripts.visual_opsd.evaluation.rows import (
    THOUGHT_IDENTITY_COLUMNS,
    RowName,
    RowPool,
    open_data,
    prompt_identity,
    row_name,
)
from scripts.visual_opsd.evaluation.runner import (
    RowLimits,
    RowSettings,
    claim_folder,
    memory_advice,
    run_rows,
)
from scripts.visual_opsd.evaluation.store import RankedLines, Record, write_json
from scripts.visual_opsd.evaluation.summary import by_dataset
from scripts.visual_opsd.processes import DistEnv, on_main, process_group
from scripts.visual_opsd.rows import encode_pictures, open_builder

PARTS = ("first_token", "problem_image", "vt", "text", "answer")
PHASES = ("before", "after")
NEEDS = RowNeeds(visual_thoughts="required", text_trace="required")
_MAX_SCORES = 1 << 26  # entries of one (heads, tokens, keys) block, 256 MB in fp32


@dataclass(frozen=True)
class AnalysisSettings(RowSettings):
    """Whose attention, over what."""

    limit: int | None = option(64, "only the first rows of all; None: every row", **ROWS)
    output_dir: str = option("results/attention", "attention.json and attention.png", path=True)
    context: str = option(
        "vit", "how the VTs are read; vae+vit: as at inference; noise: ViT, noise for its VTs",
        choices=("vit", "vae+vit", "noise"),
    )  # fmt: skip
    max_forward_tokens: int = option(
        16384, "packed tokens of a forward (no effect on the result)", **PACKED
    )
    seed: int = option(0, "random numbers of --context noise, and of the VAE", **SEEDS)

    @property
    def with_latents(self) -> bool:
        """Whether the VTs' latents are read too."""
        return self.context == "vae+vit"


@dataclass(frozen=True)
class AnalysisConfig:
    analysis: AnalysisSettings = field(default_factory=AnalysisSettings)
    prompt: PromptSettings = field(default_factory=PromptSettings)
    compute: ComputeSettings = field(default_factory=ComputeSettings)


# ---------------------------------------------------------------------------------- contexts


@dataclass(frozen=True)
class Reading:
    """A context with its answer, and the part (number in `PARTS`) of each segment."""

    context: Context
    parts: tuple[int, ...]

    @property
    def key_parts(self) -> Tensor:
        """(tokens,) int64: the part each token belongs to."""
        lens = torch.tensor([segment_length(segment) for segment in self.context])
        found = torch.tensor(self.parts).repeat_interleave(lens)
        found[0] = PARTS.index("first_token")
        return found


def reading(student: Context, extra: Context, answer: TextSegment) -> Reading:
    """[student's context, what a teacher sees besides, answer]."""

    def parts(segments: Context, image: str) -> list[int]:
        return [PARTS.index("text" if isinstance(s, TextSegment) else image) for s in segments]

    numbers = [*parts(student, "problem_image"), *parts(extra, "vt"), PARTS.index("answer")]
    return Reading((*student, *extra, answer), tuple(numbers))


@dataclass(frozen=True)
class AnalysisRow:
    name: RowName
    student: Context
    extra: Context  # the rest of the teacher's context
    answer: TextSegment

    @property
    def length(self) -> int:
        return context_length((*self.student, *self.extra, self.answer))


@dataclass(frozen=True)
class PrepareAnalysis:
    builder: ContextBuilder
    settings: AnalysisSettings
    limits: ContextLimits = NO_LIMITS

    @classmethod
    def of(cls, settings: AnalysisSettings, prompt: PromptSettings) -> PrepareAnalysis:
        """Raises ValueError: no row can fit the model's positions."""
        builder, model = open_builder(settings.model_path, prompt, visual_gen=settings.with_latents)
        limits = ContextLimits(
            model.llm.max_position_embeddings,
            tokens=max(settings.max_forward_tokens, PACKED_TOKENS),
        )
        return cls(builder, settings, limits.check_settings(builder, teacher=True))

    def __call__(self, row: Row) -> AnalysisRow:
        sample = parse_row(row, NEEDS)
        student = self.builder.student(sample)
        kind = "noise" if self.settings.context == "noise" else "real"
        shown = show_thoughts(kind, row, sample, self.settings.seed)
        teacher = self.builder.teacher(
            sample, student, shown, with_latents=self.settings.with_latents
        )
        (answer,) = self.builder.sft_targets(sample)
        self.limits.check(row, (*teacher, answer))
        name = row_name(row, sample.pid, THOUGHT_IDENTITY_COLUMNS)
        return AnalysisRow(name, student, teacher[len(student) :], answer)


# ---------------------------------------------------------------------------------- attention


def attention_shares(
    q: Tensor,
    k: Tensor,
    layout: AttentionLayout,
    tokens: Tensor,
    parts: Sequence[Tensor],
    count: int,
) -> Tensor:
    """Attention mass on each part of the own sample's keys, fp32 (samples, heads, count).

    Averaged over the queries of each sample.

    Args:
        q: (T, nh, d), k: (T, nkv, d), rotated, of a packed sequence without a cache.
        tokens: (R,) int64, places of the queries that are looked at; each sample has at least one.
        parts: for each sample (tokens,) int64 in [0, count), the part of each key.
    """
    assert not any(layout.past_lens)
    repeat, scale = q.shape[1] // k.shape[1], q.shape[2] ** -0.5
    found, start = [], 0
    for sample, n in enumerate(layout.query_lens):
        own = tokens[(tokens >= start) & (tokens < start + n)] - start
        keys = k[start : start + n].float().repeat_interleave(repeat, dim=1)  # (n, nh, d)
        mask = layout.allowed(sample)[own.cpu()].to(q.device)  # (R, n)
        one_hot = torch.nn.functional.one_hot(parts[sample].to(q.device), count).float()
        total = torch.zeros(q.shape[1], count, device=q.device)
        step = max(1, _MAX_SCORES // (q.shape[1] * n))
        for some, allowed in zip(own.split(step), mask.split(step), strict=True):
            scores = torch.einsum("qhd,khd->hqk", q[start + some].float(), keys) * scale
            weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
            total += (weights @ one_hot).sum(1)
        found.append(total / len(own))
        start += n
    return torch.stack(found)


@contextmanager
def watch(model: Bagel, look: Callable[[int, Tensor, Tensor], None]) -> Iterator[None]:
    """Call `look(layer, q, k)` with the rotated queries and keys of every layer of a forward."""

    def hook(module: Attention, inputs: tuple[Any, ...]) -> None:
        xs, shared, plan, layer, *_ = inputs
        q, k, _ = module.project(xs, shared, plan)
        look(layer, q, k)

    layers = model.language_model.model.layers
    handles = [layer.self_attn.register_forward_pre_hook(hook) for layer in layers]  # type: ignore[union-attr]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def measure(
    model: Bagel, batch: PackedBatch, readings: Sequence[Reading]
) -> tuple[np.ndarray, np.ndarray]:
    """Shares of a packed batch of `readings`, of the tokens that predict the answers.

    Returns:
        (samples, layers, heads, parts) attention, and (samples, parts): the same if every visible
        key got as much as any other.
    """
    parts = [reading.key_parts for reading in readings]
    found: dict[int, Tensor] = {}

    def look(layer: int, q: Tensor, k: Tensor) -> None:
        tokens = batch.score_rows.to(q.device)
        found[layer] = attention_shares(q, k, batch.layout, tokens, parts, len(PARTS)).cpu()

    with watch(model, look):
        model(batch)
    uniform = attention_shares(
        torch.zeros(batch.total, 1, 1), torch.zeros(batch.total, 1, 1),
        batch.layout, batch.score_rows.cpu(), parts, len(PARTS),
    )  # fmt: skip
    layers = torch.stack([found[layer] for layer in range(len(found))], dim=1)
    return layers.numpy(), uniform[:, 0].numpy()


# ---------------------------------------------------------------------------------- the run


class Watching:
    """Reads rows before and after their VTs. The model is loaded for the first of them.

    A row's two readings share a pack, if they fit, and no other row's does: so its figures depend
    on neither ranks nor kills.
    """

    def __init__(self, config: AnalysisConfig, device: torch.device) -> None:
        self.config, self.device = config, device

    @cached_property
    def bundle(self) -> BagelBundle:
        settings = self.config.analysis
        return load_bagel(
            settings.model_path,
            visual_gen=settings.with_latents,
            device=self.device,
            dtype=self.config.compute.dtype(self.device),
        )

    def __call__(self, rows: Sequence[tuple[int, AnalysisRow]]) -> Iterator[list[Record]]:
        most = self.config.analysis.max_forward_tokens
        for index, row in rows:
            with memory_advice([row.name], f"lower --max_forward_tokens ({most}) or "
                               "--vit_max_pixels"):  # fmt: skip
                phases = self._read(index, row)
            yield [{"index": index, **asdict(row.name), **phases}]

    def _read(self, index: int, row: AnalysisRow) -> dict[str, dict[str, Any]]:
        """Of each phase the shares (layers, heads, parts), and the uniform ones (parts,)."""
        settings, extra = self.config.analysis, row.extra
        if self.bundle.vae is not None:
            generator = row_generator("attention", settings.seed, index)
            extra = encode_pictures(extra, self.bundle.vae, generator)
        readings = [reading(row.student, shown, row.answer) for shown in ((), extra)]
        lengths = [context_length(r.context) for r in readings]
        found = {}
        for group in group_by_tokens(lengths, settings.max_forward_tokens):
            together = [readings[i] for i in group]
            contexts = [r.context for r in together]
            batch = pack(contexts, self.bundle.special_tokens).to(self.device)
            for i, shares, uniform in zip(
                group, *measure(self.bundle.model, batch, together), strict=True
            ):
                found[PHASES[i]] = {"shares": shares.tolist(), "uniform": uniform.tolist()}
        return found


def summarise_shares(shares: np.ndarray, uniform: np.ndarray) -> dict[str, Any]:
    """Figures of one phase, from (samples, layers, heads, parts) and (samples, parts).

    Mean over samples (each counts once, however long its answer) and the standard error of it.
    """
    n = len(shares)
    by_layer = shares.mean(2)  # (samples, layers, parts)
    error = by_layer.std(0, ddof=1) / n**0.5 if n > 1 else None

    def named(values: np.ndarray) -> dict[str, Any]:
        return {part: values[..., i].tolist() for i, part in enumerate(PARTS)}

    return {
        "shares": named(by_layer.mean(0)),
        "standard_error": None if error is None else named(error),
        "heads": named(shares.mean(0)),
        "mean_over_layers": named(by_layer.mean((0, 1))),
        "uniform": named(uniform.mean(0)),
    }


def summarise_records(records: Sequence[Record]) -> dict[str, Any]:
    """`summarise_shares` of both phases."""
    found = {}
    for phase in PHASES:
        shares, uniform = (
            np.array([record[phase][name] for record in records], dtype=np.float32)
            for name in ("shares", "uniform")
        )
        found[phase] = summarise_shares(shares, uniform)
    return found


def result_settings(config: AnalysisConfig, pool: RowPool, dtype: torch.dtype) -> dict[str, Any]:
    """Everything the records depend on."""
    settings = config.analysis
    return {
        "model": weights_fingerprint(settings.model_path, drawing=settings.with_latents),
        "data": pool.signature(),
        "context": settings.context,
        "limit": settings.limit,
        "seed": None if settings.context == "vit" else settings.seed,
        "precision": str(dtype).removeprefix("torch."),
        **({"vae": config.prompt.vae_config()} if settings.with_latents else {}),
        "random_numbers": RANDOMNESS_VERSION,
        **prompt_identity(config.prompt),
    }


def analyse(config: AnalysisConfig, env: DistEnv) -> dict[str, Any]:
    """Run (or resume) the analysis on all ranks; returns the summary on rank 0, {} elsewhere.

    Raises:
        ValueError: a missing or damaged checkpoint or dataset, results of other settings in
            `output_dir`, or too many unusable rows.
    """
    settings = config.analysis
    folder = Path(settings.output_dir)
    pool = RowPool(open_data(settings.data, settings.split, settings.data_root, NEEDS))
    prepare = PrepareAnalysis.of(settings, config.prompt)
    wanted = result_settings(config, pool, config.compute.dtype(env.device))
    store = RankedLines(folder, "rows", itemgetter("dataset", *PHASES))
    on_main(env, lambda: claim_folder(
        folder, wanted, [store], result="attention.json", overwrite=settings.overwrite
    ))  # fmt: skip
    limits = RowLimits(
        max_rows=64,
        max_tokens=4 * settings.max_forward_tokens,
        max_bad_rate=settings.max_bad_rate,
        progress=config.compute.progress,
    )
    work = Watching(config, env.device)
    found = run_rows(pool, settings.rows_of(pool), prepare, work, store, env, limits)
    summary: dict[str, Any] = {}

    def finish() -> None:
        records = found.records
        layers, heads, _ = np.shape(records[0]["before"]["shares"])
        summary.update(
            n=len(records),
            bad_rows=len(found.rejects),
            layers=layers,
            heads=heads,
            parts=list(PARTS),
            **summarise_records(records),
            tasks={name: summarise_records(some) for name, some in by_dataset(records).items()},
            model=wanted["model"],
            data=wanted["data"],
            identity=prompt_identity(config.prompt),
            settings=flat(config),
        )
        write_json(folder / "attention.json", summary)
        draw_attention(folder / "attention.png", summary)

    on_main(env, finish)
    return summary


def table(summary: dict[str, Any]) -> str:
    """Shares over all layers as text; in brackets what uniform attention would give."""
    lines = [f"{'answer tokens look at':22}" + "".join(f"{part:>18}" for part in PARTS)]
    for phase in PHASES:
        mean, flat_ = summary[phase]["mean_over_layers"], summary[phase]["uniform"]
        cells = (f"{mean[part]:.1%} ({flat_[part]:.1%})" for part in PARTS)
        lines.append(f"{phase + ' the VT':22}" + "".join(f"{cell:>18}" for cell in cells))
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    config = parse_config(AnalysisConfig, argv, "Where answer tokens look, before and after VTs.")
    with process_group(config.compute.device, config.compute.timeout_s) as env:
        summary = analyse(config, env)
    if env.is_main:
        print(table(summary))
        print(Path(config.analysis.output_dir) / "attention.json")
    return 0


if __name__ == "__main__":
    run_main(main)
