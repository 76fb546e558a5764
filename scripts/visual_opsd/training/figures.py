# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""What a measured step says besides its loss: of tokens, completions and the machine.

Sums over a rank's tokens and rows travel with those of the loss; what no sum says (quantiles, the
fullest rank) is gathered. All ranks measure the same steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from data.answer_tags import answer_mask, answer_spans
from data.sequence import Completion, TextSegment
from modeling.bagel.bagel import Bagel
from modeling.host.memory import own_bytes
from scripts.visual_opsd.processes import DistEnv, gather_objects
from scripts.visual_opsd.run_config import RunSettings
from scripts.visual_opsd.scored_rows import ScoredRow
from scripts.visual_opsd.training.flops import FlopCounter, peak_flops
from scripts.visual_opsd.training.leaks import LeakProbe
from scripts.visual_opsd.training.step import PackResult

DECILES = 10
OF_THE_LOSS = ("divergence", "student_entropy", "teacher_entropy")  # which it sums up itself
_QUANTILES = {"p10": 0.1, "p50": 0.5, "p90": 0.9, "max": 1.0}
# Figure of metrics.jsonl -> the sum it is made of, and what that is divided by.
_MEANS = {
    "fork_rate": ("fork", "tokens"),
    "topk_overlap": ("topk_overlap", "tokens"),
    "student_topk_mass": ("student_topk_mass", "tokens"),
    "clip_entry_rate": ("clip_entry", "tokens"),
    "clip_token_rate": ("clip_token", "tokens"),
    "clip_gradient_share": ("gradient_removed", "gradient"),
    **{f"divergence_decile/{i}": (f"decile_{i}", f"decile_{i}_tokens") for i in range(DECILES)},
    "divergence_answer": ("answer", "answer_tokens"),
    "answered_rate": ("answered", "texts"),
    "leak_rate": ("leaks", "unshown"),
}
# Everything a measured step may add; what a run has no use for, or cannot know, is absent.
FIELDS = (
    *_MEANS,
    *(f"completion_length_{name}" for name in _QUANTILES),
    *("host_memory_gb", "gpu_allocated_gb", "gpu_reserved_gb", "model_tflop", "mfu"),
)
RowFigures = tuple[ScoredRow, Mapping[str, Tensor]]
Decode = Callable[[list[int]], str]


class Measurement:
    """Measures the steps of a run; the methods but `is_due` are of measured steps.

    decode: ids -> text. samples: the student's completions come from a rollout.
    """

    def __init__(
        self, run: RunSettings, env: DistEnv, student: Bagel, decode: Decode, *, samples: bool
    ) -> None:
        self.every, self.env, self.decode = run.figures_every, env, decode
        self.probe = LeakProbe(run.leak_words)
        self.count_flops = FlopCounter.of(student, samples=samples)

    def is_due(self, step: int) -> bool:
        """Whether the 1-based step is measured if it is logged."""
        return self.every > 0 and step % self.every == 0

    def sums(self, results: Sequence[PackResult], scored: Sequence[ScoredRow]) -> dict[str, float]:
        """Of this rank; the same names on all."""
        sums = text_sums(scored, self.probe, self.decode)
        sums["model_tflop"] = self.count_flops(scored) / 1e12
        if results[0].tokens is not None:
            sums |= token_sums(figures_of_rows(results), results[0].tokens, self.decode)
        return sums

    def of_machine(
        self, scored: Sequence[ScoredRow], tflop: float, seconds: float
    ) -> dict[str, float]:
        """Lengths, memory and speed; tflop: of all ranks, in `seconds`. A collective."""
        lengths = [len(completion.ids) for completion in _sampled(scored)]
        every = gather_objects((lengths, memory_gb(self.env.device)))
        figures = length_quantiles([length for part, _ in every for length in part])
        for _, memory in every:
            for name, value in memory.items():
                figures[name] = max(value, figures.get(name, 0.0))
        peak = None
        if self.env.device.type == "cuda":
            peak = peak_flops(torch.cuda.get_device_name(self.env.device))
        if peak is not None and seconds > 0:
            figures["mfu"] = 1e12 * tflop / (seconds * peak * self.env.world_size)
        return figures


def _sampled(scored: Iterable[ScoredRow]) -> list[Completion]:
    """The completions that a policy wrote."""
    return [c for row in scored if (c := row.completion) is not None and not c.given]


def figures_of_rows(results: Iterable[PackResult]) -> list[RowFigures]:
    """Each measured row with the figures of its scored tokens, (tokens,) fp64 on the host."""
    found: list[RowFigures] = []
    for result in results:
        if result.tokens is None:
            continue
        sizes = [row.scored for row in result.rows]
        columns = {name: v.double().cpu().split(sizes) for name, v in result.tokens.items()}
        for i, row in enumerate(result.rows):
            found.append((row, {name: parts[i] for name, parts in columns.items()}))
    return found


def token_sums(
    rows: Iterable[RowFigures], names: Iterable[str], decode: Decode
) -> dict[str, float]:
    """Sums over scored tokens: of each figure, and of the divergence by place.

    A completion's token i of n is in decile floor(10 i / n).
    """
    places = [f"decile_{i}" for i in range(DECILES)]
    own = [name for name in names if name not in OF_THE_LOSS]
    sums = dict.fromkeys([*own, "tokens", "answer", "answer_tokens"], 0.0)
    sums |= dict.fromkeys([*places, *(f"{place}_tokens" for place in places)], 0.0)
    for row, figures in rows:
        divergence = figures["divergence"]
        sums["tokens"] += len(divergence)
        for name in own:
            sums[name] += float(figures[name].sum())
        decile = torch.arange(len(divergence)) * DECILES // max(len(divergence), 1)
        for i, place in enumerate(places):
            sums[place] += float(divergence[decile == i].sum())
            sums[f"{place}_tokens"] += int((decile == i).sum())
        if row.completion is not None:
            completion = row.completion
            inside = torch.from_numpy(answer_mask(completion.ids, completion.scored, decode))
            sums["answer"] += float(divergence[inside].sum())
            sums["answer_tokens"] += int(inside.sum())
    return sums


def text_sums(scored: Iterable[ScoredRow], probe: LeakProbe, decode: Decode) -> dict[str, float]:
    """Over the completions that a policy wrote: their number, those with an answer, with a leak."""
    sums = {"texts": 0.0, "answered": 0.0}
    sums |= {"leaks": 0.0, "unshown": 0.0} if probe else {}
    for row in scored:
        for completion in _sampled([row]):
            text = decode(list(completion.ids))
            sums["texts"] += 1
            sums["answered"] += bool(answer_spans(text))
            if probe and not row.rehearsed:  # whose student has seen the pictures
                sums["unshown"] += 1
                sums["leaks"] += probe.finds(text, partial(_context, row, decode))
    return sums


def _context(row: ScoredRow, decode: Decode) -> str:
    """What the student reads before its completion."""
    texts = [segment.ids for segment in row.student[:-1] if isinstance(segment, TextSegment)]
    return "\n".join(decode(list(ids)) for ids in texts)


def means(sums: Mapping[str, float]) -> dict[str, float]:
    """Sums over all ranks -> figures: those of which there is anything."""
    own = {name: sums[name] for name in ("model_tflop",) if name in sums}
    return own | {
        name: sums[part] / sums[count]
        for name, (part, count) in _MEANS.items()
        if part in sums and sums[count]
    }


def length_quantiles(lengths: Sequence[int]) -> dict[str, float]:
    """Lengths that a tenth, half, nine tenths and all of the completions do not exceed."""
    ordered = sorted(lengths)
    return {
        f"completion_length_{name}": float(ordered[math.ceil(share * len(ordered)) - 1])
        for name, share in _QUANTILES.items()
        if ordered
    }


def memory_gb(device: torch.device) -> dict[str, float]:
    """GB (1e9 bytes) that this process holds now, between two steps."""
    found = {}
    if (own := own_bytes()) is not None:
        found["host_memory_gb"] = own / 1e9
    if device.type == "cuda":
        found["gpu_allocated_gb"] = torch.cuda.memory_allocated(device) / 1e9
        found["gpu_reserved_gb"] = torch.cuda.memory_reserved(device) / 1e9
    return found
