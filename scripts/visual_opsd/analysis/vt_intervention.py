# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The pilot study: what an answer owes to the visual thought (VT) that was drawn before it.

    python -m scripts.visual_opsd.analysis.vt_intervention --model_path DIR --data NAME

A model that draws answers each row: it writes, draws a VT and goes on. Every row draws once; the
answer is then written once for each arm, after the same text, and only the picture differs:

    kept     the VT that was drawn
    removed  no picture
    noise    uniform random pixels of the drawing's size
    other    the VT that the next row of the data set drew
    truth    the row's own first ground-truth VT, from the data

and, if `--arms` names them, `blank` (mid-grey), `shuffled` (the drawing's patches in random order)
and `problem` (the problem image again).

Text is greedy. The autoencoder's noise is the same in all arms, so `kept` is what
`InterleaveInferencer` gives with one round. Drawings are kept as PNG files, outputs as JSON lines;
a killed run is resumed by the same command, and torchrun splits the rows over its processes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from data.randomness import RANDOMNESS_VERSION, noise_picture
from data.sequence import TextSegment
from data.transforms import decode_image
from data.visual_thoughts import blank_picture, resize, shuffle_picture
from inference.interleave import InterleaveEngine
from modeling import load_bagel
from modeling.bagel.generate import IMAGE_MARKER
from modeling.host.disk import disk_errors
from modeling.release.fingerprints import weights_fingerprint
from scripts.visual_opsd.analysis.figures import draw_arms
from scripts.visual_opsd.analysis.vt_arms import (
    DEFAULTS,
    DrawingSettings,
    Interventions,
    InterventionSettings,
    PrepareProblem,
    Problem,
    donors,
)
from scripts.visual_opsd.cli import flat, parse_config, run_main
from scripts.visual_opsd.config import ComputeSettings, PromptSettings
from scripts.visual_opsd.evaluation.benchmark_scoring import SCORING_VERSION
from scripts.visual_opsd.evaluation.rows import RowPool, open_data, prompt_identity
from scripts.visual_opsd.evaluation.runner import (
    RowLimits,
    claim_folder,
    memory_advice,
    run_rows,
)
from scripts.visual_opsd.evaluation.scoring import (
    compare_paired,
    extract_answer,
    lenient_figures,
    normal_quantile,
    wilson_interval,
)
from scripts.visual_opsd.evaluation.store import RankedLines, Record, write_json
from scripts.visual_opsd.evaluation.summary import by_dataset, share
from scripts.visual_opsd.processes import DistEnv, on_main, process_group
from scripts.visual_opsd.runs.identity import stable_hash


@dataclass(frozen=True)
class InterventionConfig:
    intervention: InterventionSettings = field(default_factory=InterventionSettings)
    drawing: DrawingSettings = field(default_factory=DrawingSettings)
    prompt: PromptSettings = field(default_factory=lambda: PromptSettings(**DEFAULTS))
    compute: ComputeSettings = field(default_factory=ComputeSettings)


# ---------------------------------------------------------------------------------- the run


def result_settings(
    config: InterventionConfig, pool: RowPool, dtype: torch.dtype
) -> dict[str, Any]:
    """Everything the outputs depend on."""
    settings = config.intervention
    return {
        "model": weights_fingerprint(settings.model_path, drawing=True),
        "data": pool.signature(),
        "arms": list(settings.chosen),
        "limit": settings.limit,
        "max_new_tokens": settings.max_new_tokens,
        "image_skips": settings.image_skips,
        "seed": settings.seed,
        "drawing": asdict(config.drawing),
        "precision": str(dtype).removeprefix("torch."),
        "vae": config.prompt.vae_config(),
        "random_numbers": RANDOMNESS_VERSION,
        **prompt_identity(config.prompt),
        "scoring_version": SCORING_VERSION,
    }


class Study:
    """What a process does with rows: draw for them, then answer. The model is loaded for the first.

    drawn: after the drawing, the line of every row that drew. donor_of: whose drawing a row is
    shown in the arm `other`.
    """

    def __init__(self, config: InterventionConfig, env: DistEnv, prepare: PrepareProblem) -> None:
        self.config, self.env, self.prepare = config, env, prepare
        self.settings = config.intervention
        self.pictures = Path(self.settings.output_dir) / "drawings"
        self.drawn: dict[int, Record] = {}
        self.donor_of: dict[int, int] = {}

    @cached_property
    def model(self) -> Interventions:
        bundle = load_bagel(
            self.settings.model_path,
            visual_gen=True,
            device=self.env.device,
            dtype=self.config.compute.dtype(self.env.device),
        )
        builder = self.prepare.builder
        engine = InterleaveEngine(
            bundle.model,
            bundle.vae,
            bundle.tokenizer,
            self.prepare.vae_transform,
            builder.vit_transform,
            bundle.special_tokens,
        )
        return Interventions(engine, self.settings, self.config.drawing)

    def draw(self, rows: Sequence[tuple[int, Problem]]) -> Iterator[list[Record]]:
        """First texts (drawings.jsonl) and pictures."""
        with self._memory_advice(rows):
            replies = self.model.draw(rows)
        lines = []
        for (index, problem), (text, segment, picture) in zip(rows, replies, strict=True):
            if picture is not None:
                self._save(index, picture)  # first: a line on file has its picture
            lines.append(
                {
                    "index": index,
                    **asdict(problem.name),
                    "text": text,
                    "ids": list(segment.ids),
                    "drawn": picture is not None,
                    **_verdicts(problem, text),
                }
            )
        yield lines

    def answer(self, rows: Sequence[tuple[int, Problem]]) -> Iterator[list[Record]]:
        """Answers in every arm (outputs.jsonl)."""
        first = [TextSegment(tuple(self.drawn[index]["ids"])) for index, _ in rows]
        with self._memory_advice(rows):
            starts = self.model.after_text(rows, first)
        lines = [
            {
                "index": index,
                **asdict(problem.name),
                "question": problem.question,
                "answer": problem.answer,
                "first_text": self.drawn[index]["text"],
                "donor": self.donor_of.get(index),
                "arms": {},
            }
            for index, problem in rows
        ]
        for arm in self.settings.chosen:
            pictures = [self._picture(arm, index, problem) for index, problem in rows]
            with self._memory_advice(rows):
                texts = self.model.answer(starts, pictures)
            for line, (_, problem), text in zip(lines, rows, texts, strict=True):
                whole = line["first_text"] + "\n" + text
                line["arms"][arm] = {
                    "text": text,
                    **_verdicts(problem, whole),
                    "answered": extract_answer(whole) is not None,
                }
        yield lines

    def _memory_advice(self, rows: Sequence[tuple[int, Problem]]) -> AbstractContextManager[None]:
        settings = self.settings
        return memory_advice(
            [problem.name for _, problem in rows],
            f"lower --batch_size ({settings.batch_size}) or --max_new_tokens "
            f"({settings.max_new_tokens})",
        )

    def _file(self, index: int) -> Path:
        return self.pictures / f"{index:06d}.png"

    def _save(self, index: int, picture: Image.Image) -> None:
        """Whole or not at all: a killed run must not leave half a picture."""
        path = self._file(index)
        temporary = path.with_suffix(".tmp")
        with disk_errors(f"writing {path}", path.parent):
            picture.save(temporary, "PNG")
            temporary.replace(path)

    def _picture(self, arm: str, index: int, problem: Problem) -> Image.Image | None:
        if arm == "removed":
            return None
        if arm == "truth":
            return problem.truth
        own = decode_image(self._file(self.donor_of[index] if arm == "other" else index))
        if arm == "noise":
            return noise_picture(own.size, self.settings.seed, index)
        if arm == "blank":
            return blank_picture(own.size)
        if arm == "shuffled":
            stride = self.prepare.vae_transform.stride
            return shuffle_picture(own, self.settings.seed, index, stride)
        return resize(problem.picture, own.size) if arm == "problem" else own


def _verdicts(problem: Problem, text: str) -> dict[str, bool]:
    verdict = problem.judge(text)
    return {"correct": verdict.correct, "lenient": verdict.lenient}


def run(config: InterventionConfig, env: DistEnv) -> dict[str, Any]:
    """Run (or resume) the study on all ranks; returns the summary on rank 0, {} elsewhere.

    Raises:
        ValueError: a missing, damaged or text-only checkpoint, data that cannot be read, results
            of other settings in `output_dir`, too many unusable rows, or a model that never drew.
    """
    settings = config.intervention
    folder = Path(settings.output_dir)
    pool = RowPool(open_data(settings.data, settings.split, settings.data_root, settings.needs))
    wanted = result_settings(config, pool, config.compute.dtype(env.device))
    study = Study(config, env, PrepareProblem.of(settings, config.prompt))
    drawings = RankedLines(folder, "drawings")
    # A row that could be read only now may have become another row's donor.
    outputs = RankedLines(
        folder, "outputs", lambda line: line["donor"] == study.donor_of.get(line["index"])
    )

    def claim() -> None:
        claim_folder(
            folder,
            wanted,
            [drawings, RankedLines(folder, "outputs")],  # whole: donors are not known yet
            result="summary.json",
            overwrite=settings.overwrite,
        )
        with disk_errors(f"writing to {folder}", folder):
            study.pictures.mkdir(exist_ok=True)
            for picture in study.pictures.glob("*.png") if settings.overwrite else ():
                picture.unlink()

    on_main(env, claim)
    started = time.perf_counter()
    limits = RowLimits(
        max_rows=settings.batch_size,
        max_tokens=262144,
        max_bad_rate=settings.max_bad_rate,
        progress=config.compute.progress,
    )
    rows = range(min(len(pool), settings.limit or len(pool)))
    first = run_rows(pool, rows, study.prepare, study.draw, drawings, env, limits)
    study.drawn = {line["index"]: line for line in first.records if line["drawn"]}
    if not study.drawn:
        raise ValueError(
            f"none of {len(first.records)} rows asked for a picture ({IMAGE_MARKER}), so there is "
            "nothing to compare: take a model that draws, the prompts it was trained with "
            "(--prompt_style), or a larger --max_new_tokens; the texts are in drawings.jsonl"
        )
    if "other" in settings.chosen:
        study.donor_of = donors({i: line["dataset"] for i, line in study.drawn.items()})
    limits = replace(limits, good_in="the drawing")
    second = run_rows(pool, list(study.drawn), study.prepare, study.answer, outputs, env, limits)
    summary: dict[str, Any] = {}

    def finish() -> None:
        without = [line for line in first.records if not line["drawn"]]
        summary.update(
            summarise_arms(second.records, settings.chosen),
            rows=len(first.records),
            not_drawn={
                "n": len(without),
                "correct": sum(bool(x["correct"]) for x in without),
                "lenient_correct": sum(bool(x["lenient"]) for x in without),
            },
            bad_rows=len(first.rejects),
            seconds=time.perf_counter() - started,
            resumed_drawings=first.resumed,
            resumed_rows=second.resumed,
            settings_hash=stable_hash(wanted),
            settings=flat(config),
        )
        write_json(folder / "summary.json", summary)
        draw_arms(folder / "arms.png", summary)

    on_main(env, finish)
    return summary


# ---------------------------------------------------------------------------------- figures


def summarise_arms(lines: Sequence[Record], arms: Sequence[str]) -> dict[str, Any]:
    """Figures of the arms over all rows that drew, and for each dataset."""
    tasks = {name: _figures(some, arms) for name, some in by_dataset(lines).items()}
    return {**_figures(lines, arms), "tasks": tasks}


def _figures(lines: Sequence[Mapping[str, Any]], arms: Sequence[str]) -> dict[str, Any]:
    n = len(lines)
    right, lenient = (
        {arm: [bool(line["arms"][arm][name]) for line in lines] for arm in arms}
        for name in ("correct", "lenient")
    )
    figures = {
        arm: {
            "n": n,
            "correct": sum(right[arm]),
            "accuracy": sum(right[arm]) / n,
            "interval": list(wilson_interval(sum(right[arm]), n)),
            **lenient_figures(sum(lenient[arm]), n),
            "answered_rate": sum(bool(line["arms"][arm]["answered"]) for line in lines) / n,
            "same_text_as_kept": sum(
                line["arms"][arm]["text"] == line["arms"]["kept"]["text"] for line in lines
            )
            / n,
        }
        for arm in arms
    }
    return {
        "n": n,
        "arms": figures,
        "mean": {**_mean(right), **{f"lenient_{k}": v for k, v in _mean(lenient).items()}},
        "differences_to_kept": _differences(right),
        "lenient_differences_to_kept": _differences(lenient),
    }


def _mean(right: Mapping[str, Sequence[bool]]) -> dict[str, Any]:
    """Arms of a row are no independent trials: the mean's spread is that of the rows' means."""
    means = np.array(list(right.values()), dtype=float).T.mean(1)
    n, mean = len(means), float(means.mean())
    spread = float(means.std(ddof=1)) if n > 1 else 0.0
    half = normal_quantile() * spread / n**0.5
    interval = [max(0.0, mean - half), min(1.0, mean + half)]
    if spread == 0:  # says nothing about rows not seen
        interval = list(wilson_interval(round(mean * n), n))
    return {"accuracy": mean, "interval": interval}


def _differences(right: Mapping[str, Sequence[bool]]) -> dict[str, Any]:
    return {a: asdict(compare_paired(right[a], right["kept"])) for a in right if a != "kept"}


def table(summary: Mapping[str, Any]) -> str:
    """The summary as text, one line an arm."""
    columns = "".join(f"{name:>10}{'95 % interval':>17}" for name in ("accuracy", "lenient"))
    lines = [f"{'arm':10}{'n':>6}{columns}{'to kept, points':>26}"]
    for arm, figures in summary["arms"].items():
        line = f"{arm:10}{figures['n']:>6}{share(figures)}{share(figures, 'lenient_')}"
        paired = summary["differences_to_kept"].get(arm)
        if paired:
            shown = f"{paired['difference']:+.1f} ({paired['low']:+.1f} .. {paired['high']:+.1f})"
            line += f"{shown:>26}"
        lines.append(line)
    mean = share(summary["mean"]) + share(summary["mean"], "lenient_")
    lines.append(f"{'mean':10}{summary['n']:>6}{mean}")
    if summary["not_drawn"]["n"]:
        lines.append(f"{summary['not_drawn']['n']} rows did not ask for a picture: left out")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    config = parse_config(
        InterventionConfig,
        argv,
        "Accuracy with the drawn visual thought kept, removed or replaced.",
        DEFAULTS,
    )
    with process_group(config.compute.device, config.compute.timeout_s) as env:
        summary = run(config, env)
    if env.is_main:
        print(table(summary))
        folder = Path(config.intervention.output_dir)
        print(f"{summary['seconds']:.1f} s; {folder / 'summary.json'}, {folder / 'arms.png'}")
    return 0


if __name__ == "__main__":
    run_main(main)
