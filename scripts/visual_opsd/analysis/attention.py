# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Where the tokens of an answer look, layer by layer, before and after the visual thoughts (VTs).

    python -m scripts.visual_opsd.analysis.attention --model_path DIR --data Spatial_Navigation

The answer of a row (its text-only trace and answer, as the SFT baseline learns them) is read twice
by the model: `before` behind the student's context, `after` behind the teacher's, which shows the
VTs. Each layer's attention is computed again from the layer's input, in fp32, with scores scaled
by d^-0.5 and masked as the layout says, for the rows that predict the answer; its mass is summed
over the keys of each part, and averaged over heads, rows, then samples. The parts:

    first_token    the very first row, on which models park attention they do not need
    problem_image  the problem, its two markers included
    vt             the VTs likewise, however they are read
    text           system prompt, question and the teacher's strings
    answer         what was written of the answer so far
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.limits import NO_LIMITS, PACKED_TOKENS, ContextLimits
from data.packing import context_length, group_by_tokens, pack, segment_length
from data.randomness import noise_generator, row_generator
from data.sequence import Context, ContextBuilder, TextSegment
from data.thinkmorph import Row, RowNeeds, parse_row
from modeling import load_bagel
from modeling.bagel.attention import AttentionLayout
from modeling.bagel.bagel import Bagel
from modeling.bagel.batch import PackedBatch
from modeling.bagel.config import SpecialTokens
from modeling.bagel.decoder import Attention
from modeling.release.fingerprints import weights_fingerprint
from scripts.visual_opsd.analysis.figures import draw_attention
from scripts.visual_opsd.cli import (
    PACKED,
    ROWS,
    SEEDS,
    SHARES,
    Settings,
    flat,
    option,
    parse_config,
    run_main,
)
from scripts.visual_opsd.config import ComputeSettings, PromptSettings
from scripts.visual_opsd.evaluation.rows import (
    BadRows,
    RowPool,
    check_bad_rate,
    memory_advice,
    open_data,
    progress_bar,
    prompt_identity,
    read_windows,
)
from scripts.visual_opsd.evaluation.store import claim_output, write_json
from scripts.visual_opsd.processes import init_distributed, shutdown
from scripts.visual_opsd.rows import encode_pictures, open_builder

PARTS = ("first_token", "problem_image", "vt", "text", "answer")
PHASES = ("before", "after")
NEEDS = RowNeeds(visual_thoughts="required", text_trace="required")
_MAX_SCORES = 1 << 26  # entries of one (heads, rows, keys) block, 256 MB in fp32


@dataclass(frozen=True)
class AnalysisSettings(Settings):
    """Whose attention, over what."""

    model_path: str = option("models/ThinkMorph-7B", "release folder", path=True)
    data: str = option(
        "Spatial_Navigation", "datasets below the data root, folders or parquet files, by commas",
        path="list",
    )  # fmt: skip
    split: str = option("heldout", "files of a folder that are read (SPLIT-*.parquet)")
    data_root: str | None = option(
        None, "folder of the datasets, else VISUAL_OPSD_DATA_ROOT", path=True
    )
    limit: int | None = option(64, "only the first rows of all; None: every row", **ROWS)
    context: str = option(
        "vit", "how the VTs are read; vae+vit: as at inference; noise: ViT, noise for its VTs",
        choices=("vit", "vae+vit", "noise"),
    )  # fmt: skip
    output_dir: str = option(
        "results/attention", "attention.json and attention.png", path=True
    )
    overwrite: bool = option(False, "replace the results that output_dir holds")
    max_forward_tokens: int = option(
        16384, "packed rows of a forward (no effect on the result)", **PACKED
    )
    seed: int = option(0, "random numbers of --context noise, and of the VAE", **SEEDS)
    max_bad_rate: float = option(
        0.01, "share of unusable rows beyond which the run fails", **SHARES
    )


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
        """(rows,) int64: the part each row belongs to."""
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
    dataset: str
    position: int
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
        builder, model = open_builder(
            settings.model_path, prompt, visual_gen=settings.context == "vae+vit"
        )
        limits = ContextLimits(
            model.llm.max_position_embeddings,
            tokens=max(settings.max_forward_tokens, PACKED_TOKENS),
        )
        return cls(builder, settings, limits.check_settings(builder, teacher=True))

    def __call__(self, row: Row) -> AnalysisRow:
        sample = parse_row(row, NEEDS)
        student = self.builder.student(sample)
        noise = None
        if self.settings.context == "noise":
            noise = noise_generator(self.settings.seed, row.position)
        teacher = self.builder.teacher(
            sample, student, noise, with_latents=self.settings.context == "vae+vit"
        )
        (answer,) = self.builder.sft_targets(sample)
        self.limits.check(row, (*teacher, answer))
        return AnalysisRow(row.dataset, row.position, student, teacher[len(student) :], answer)


# ---------------------------------------------------------------------------------- attention


def attention_shares(
    q: Tensor, k: Tensor, layout: AttentionLayout, rows: Tensor, parts: Sequence[Tensor], count: int
) -> Tensor:
    """Attention mass on each part of the own sample's keys, fp32 (samples, heads, count).

    Averaged over the query rows of each sample.

    Args:
        q: (T, nh, d), k: (T, nkv, d), rotated, of a packed sequence without cached rows.
        rows: (R,) int64, the packed rows that are looked at; each sample has at least one.
        parts: for each sample (rows,) int64 in [0, count), the part of each key.
    """
    assert not any(layout.past_lens)
    repeat, scale = q.shape[1] // k.shape[1], q.shape[2] ** -0.5
    found, start = [], 0
    for sample, n in enumerate(layout.query_lens):
        own = rows[(rows >= start) & (rows < start + n)] - start
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
def watched(model: Bagel, see: Callable[[int, Tensor, Tensor], None]) -> Iterator[None]:
    """Call `see(layer, q, k)` with the rotated queries and keys of every layer of a forward."""

    def hook(module: Attention, inputs: tuple[Any, ...]) -> None:
        xs, cos, sin, _, routing, _, layer, *_ = inputs
        q, k, _ = module.project(xs, cos, sin, routing)
        see(layer, q, k)

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
    """Shares of a packed batch of `readings`, of the rows that predict the answers.

    Returns:
        (samples, layers, heads, parts) attention, and (samples, parts): the same if every visible
        key got as much as any other.
    """
    parts = [reading.key_parts for reading in readings]
    found: dict[int, Tensor] = {}

    def see(layer: int, q: Tensor, k: Tensor) -> None:
        rows = batch.score_rows.to(q.device)
        found[layer] = attention_shares(q, k, batch.layout, rows, parts, len(PARTS)).cpu()

    with watched(model, see):
        model(batch)
    uniform = attention_shares(
        torch.zeros(batch.total, 1, 1), torch.zeros(batch.total, 1, 1),
        batch.layout, batch.score_rows.cpu(), parts, len(PARTS),
    )  # fmt: skip
    layers = torch.stack([found[layer] for layer in range(len(found))], dim=1)
    return layers.numpy(), uniform[:, 0].numpy()


# ---------------------------------------------------------------------------------- the run


def measure_rows(
    model: Bagel,
    special: SpecialTokens,
    rows: Sequence[AnalysisRow],
    *,
    device: torch.device,
    max_tokens: int,
) -> list[dict[str, tuple[np.ndarray, np.ndarray]]]:
    """For each row and phase, what `measure` gives of this sample."""
    results: list[dict[str, tuple[np.ndarray, np.ndarray]]] = [{} for _ in rows]
    for group in group_by_tokens([row.length for row in rows], max_tokens):
        for phase in PHASES:
            readings = [
                reading(rows[i].student, rows[i].extra if phase == "after" else (), rows[i].answer)
                for i in group
            ]
            batch = pack([r.context for r in readings], special).to(device)
            shares, uniform = measure(model, batch, readings)
            for number, i in enumerate(group):
                results[i][phase] = (shares[number], uniform[number])
    return results


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


def analyse(config: AnalysisConfig, device: torch.device) -> dict[str, Any]:
    """Run the analysis; writes and returns the summary.

    Raises:
        ValueError: a missing or damaged checkpoint or dataset, or too many unusable rows.
    """
    settings = config.analysis
    folder = Path(settings.output_dir)
    with_latents = settings.context == "vae+vit"
    pool = RowPool(open_data(settings.data, settings.split, settings.data_root, NEEDS))
    prepare = PrepareAnalysis.of(settings, config.prompt)
    claim_output(folder, "attention.json", settings.overwrite)
    bundle = load_bagel(
        settings.model_path, visual_gen=with_latents, device=device,
        dtype=config.compute.dtype(device),
    )  # fmt: skip
    total = min(len(pool), settings.limit or len(pool))
    bad = BadRows(settings.max_bad_rate)
    advice = f"lower --max_forward_tokens ({settings.max_forward_tokens}) or --vit_max_pixels"
    found: dict[int, tuple[str, dict[str, tuple[np.ndarray, np.ndarray]]]] = {}
    with progress_bar(total, config.compute.progress) as bar:
        for window in read_windows(
            pool, range(total), prepare, max_rows=64, max_tokens=4 * settings.max_forward_tokens
        ):
            names = [f"{row.dataset} row {row.position}" for _, row in window.rows]
            with memory_advice(names, advice):
                rows = [_encoded(row, bundle.vae, settings.seed) for _, row in window.rows]
                results = measure_rows(
                    bundle.model, bundle.special_tokens, rows,
                    device=device, max_tokens=settings.max_forward_tokens,
                )  # fmt: skip
            for (index, row), result in zip(window.rows, results, strict=True):
                found[index] = (row.dataset, result)
            bad.add(window)
            bar.update(window.count)
    check_bad_rate([reject for _, reject in bad.rejects], total, settings.max_bad_rate)
    if not found:
        raise ValueError("no row could be used; `python -m data.check` shows what is wrong")
    everything = [found[index] for index in sorted(found)]
    names = list(dict.fromkeys(name for name, _ in everything))

    def phases(chosen: list[dict[str, tuple[np.ndarray, np.ndarray]]]) -> dict[str, Any]:
        return {
            phase: summarise_shares(
                np.stack([result[phase][0] for result in chosen]),
                np.stack([result[phase][1] for result in chosen]),
            )
            for phase in PHASES
        }

    summary = {
        "n": len(everything),
        "bad_rows": len(bad.rejects),
        "layers": bundle.config.llm.num_hidden_layers,
        "heads": bundle.config.llm.num_attention_heads,
        "parts": list(PARTS),
        **phases([result for _, result in everything]),
        "tasks": {t: phases([r for name, r in everything if name == t]) for t in names},
        "model": weights_fingerprint(settings.model_path, drawing=with_latents),
        "data": pool.signature(),
        "identity": prompt_identity(config.prompt),
        "settings": flat(config),
    }
    write_json(folder / "attention.json", summary)
    draw_attention(folder / "attention.png", summary)
    return summary


def _encoded(row: AnalysisRow, vae: Any, seed: int) -> AnalysisRow:
    if vae is None:
        return row
    extra = encode_pictures(row.extra, vae, row_generator("attention", seed, row.position))
    return AnalysisRow(row.dataset, row.position, row.student, extra, row.answer)


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
    env = init_distributed(config.compute.device, config.compute.timeout_s)
    try:
        if env.world_size > 1:
            raise ValueError("this analysis runs in one process; start it without torchrun")
        summary = analyse(config, env.device)
    finally:
        shutdown()
    print(table(summary))
    print(Path(config.analysis.output_dir) / "attention.json")
    return 0


if __name__ == "__main__":
    run_main(main)
