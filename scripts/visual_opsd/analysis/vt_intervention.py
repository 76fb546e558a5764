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

Text is greedy. The autoencoder's noise is the same in all arms, so `kept` is what
`InterleaveInferencer` gives with one round. Drawings are kept as PNG files, outputs as JSON lines;
a killed run is resumed by the same command, and torchrun splits the rows over its processes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from data.json_lines import write_lines
from data.randomness import RANDOMNESS_VERSION, noise_picture
from data.rejects import Reject, summarise
from data.sequence import TextSegment
from data.transforms import decode_image
from inference.interleave import IMAGE_MARKER, InterleaveEngine
from modeling import load_bagel
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
from scripts.visual_opsd.evaluation.rows import (
    BadRows,
    RowPool,
    Window,
    check_bad_rate,
    memory_advice,
    open_data,
    progress_bar,
    prompt_identity,
    read_windows,
)
from scripts.visual_opsd.evaluation.scoring import (
    compare_paired,
    extract_answer,
    lenient_figures,
    normal_quantile,
    wilson_interval,
)
from scripts.visual_opsd.evaluation.store import (
    RankedLines,
    claim_folder,
    hold_output,
    stable_hash,
    write_json,
)
from scripts.visual_opsd.evaluation.summary import share, split_bad
from scripts.visual_opsd.processes import (
    DistEnv,
    attempt,
    init_distributed,
    on_main,
    shutdown,
)


@dataclass(frozen=True)
class InterventionConfig:
    intervention: InterventionSettings = field(default_factory=InterventionSettings)
    drawing: DrawingSettings = field(default_factory=DrawingSettings)
    prompt: PromptSettings = field(default_factory=lambda: PromptSettings(**DEFAULTS))
    compute: ComputeSettings = field(default_factory=ComputeSettings)


# ---------------------------------------------------------------------------------- the run


@dataclass(frozen=True)
class Stores:
    folder: Path
    drawings: RankedLines
    outputs: RankedLines

    @classmethod
    def of(cls, folder: Path) -> Stores:
        return cls(folder, RankedLines(folder, "drawings"), RankedLines(folder, "outputs"))

    def picture(self, index: int) -> Path:
        return self.folder / "drawings" / f"{index:06d}.png"

    def save(self, index: int, picture: Image.Image) -> None:
        """Whole or not at all: a killed run must not leave half a picture."""
        path = self.picture(index)
        temporary = path.with_suffix(".tmp")
        with disk_errors(f"writing {path}", path.parent):
            picture.save(temporary, "PNG")
            temporary.replace(path)


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
        "random_numbers": RANDOMNESS_VERSION,
        "drawing": asdict(config.drawing),
        "precision": str(dtype).removeprefix("torch."),
        "vae": config.prompt.vae_config(),
        **prompt_identity(config.prompt),
        "scoring_version": SCORING_VERSION,
    }


class Runner:
    """One rank's part of a run."""

    def __init__(
        self, config: InterventionConfig, env: DistEnv, pool: RowPool, prepare: PrepareProblem
    ) -> None:
        self.config, self.env, self.pool, self.prepare = config, env, pool, prepare
        self.settings = settings = config.intervention
        bundle = load_bagel(
            settings.model_path,
            visual_gen=True,
            device=env.device,
            dtype=config.compute.dtype(env.device),
        )
        builder = prepare.builder
        engine = InterleaveEngine(
            bundle.model,
            bundle.vae,
            bundle.tokenizer,
            prepare.vae_transform,
            builder.vit_transform,
            bundle.special_tokens,
        )
        self.model = Interventions(engine, builder, settings, config.drawing)

    def _windows(self, indices: Sequence[int], title: str) -> Iterator[Window[Problem]]:
        size = self.settings.batch_size
        bad = BadRows(self.settings.max_bad_rate)
        shown = self.config.compute.progress and self.env.is_main
        with progress_bar(len(indices), shown) as bar:
            bar.set_description(title)
            for window in read_windows(
                self.pool, indices, self.prepare, max_rows=size, max_tokens=262144
            ):
                yield window
                bar.update(window.count)
                bad.add(window)

    def draw(self, indices: Sequence[int], stores: Stores) -> None:
        """First texts and drawings of these rows."""
        for window in self._windows(indices, "drawing"):
            lines = [{"index": i, "bad": asdict(reject)} for i, reject in window.rejects]
            with self._memory_advice(window.rows):
                replies = self.model.draw(window.rows) if window.rows else []
            for (index, problem), (text, segment, picture) in zip(
                window.rows, replies, strict=True
            ):
                if picture is not None:
                    stores.save(index, picture)  # first: a line on file has its picture
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
            stores.drawings.append(self.env.rank, sorted(lines, key=lambda line: line["index"]))

    def answer(
        self,
        indices: Sequence[int],
        drawn: Mapping[int, Mapping[str, Any]],
        donor_of: Mapping[int, int],
        stores: Stores,
    ) -> None:
        """Answers of these rows in every arm."""
        for window in self._windows(indices, "answering"):
            rows = window.rows
            if window.rejects:
                index, reject = window.rejects[0]
                raise ValueError(f"row {index} could be read before, and now not: {reject.detail}")
            first = [TextSegment(tuple(drawn[index]["ids"])) for index, _ in rows]
            with self._memory_advice(rows):
                starts = self.model.after_text(rows, first)
            answers: list[dict[str, Any]] = [{} for _ in rows]
            for arm in self.settings.chosen:
                pictures = [self._picture(arm, i, p, donor_of, stores) for i, p in rows]
                with self._memory_advice(rows):
                    texts = self.model.answer(starts, pictures)
                for found, (index, problem), text in zip(answers, rows, texts, strict=True):
                    whole = drawn[index]["text"] + "\n" + text
                    found[arm] = {
                        "text": text,
                        **_verdicts(problem, whole),
                        "answered": extract_answer(whole) is not None,
                    }
            lines = [
                {
                    "index": index,
                    **asdict(problem.name),
                    "question": problem.question,
                    "answer": problem.answer,
                    "first_text": drawn[index]["text"],
                    "donor": donor_of.get(index),
                    "arms": found,
                }
                for (index, problem), found in zip(rows, answers, strict=True)
            ]
            stores.outputs.append(self.env.rank, sorted(lines, key=lambda line: line["index"]))

    def _memory_advice(self, rows: Sequence[tuple[int, Problem]]) -> AbstractContextManager[None]:
        settings = self.settings
        return memory_advice(
            [problem.name for _, problem in rows],
            f"lower --batch_size ({settings.batch_size}) or --max_new_tokens "
            f"({settings.max_new_tokens}); what was drawn and answered is kept, and the same "
            "command goes on from there",
        )

    def _picture(
        self, arm: str, index: int, problem: Problem, donor_of: Mapping[int, int], stores: Stores
    ) -> Image.Image | None:
        if arm == "removed":
            return None
        if arm == "truth":
            return problem.truth
        own = decode_image(stores.picture(donor_of[index] if arm == "other" else index))
        return noise_picture(own.size, self.settings.seed, index) if arm == "noise" else own


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
    stores = Stores.of(Path(settings.output_dir))
    pool = RowPool(open_data(settings.data, settings.split, settings.data_root, settings.needs))
    wanted = result_settings(config, pool, config.compute.dtype(env.device))
    prepare = PrepareProblem.of(settings, config.prompt)
    on_main(env, lambda: _prepare_folder(stores, wanted, settings))
    started = time.perf_counter()
    total = min(len(pool), settings.limit or len(pool))
    runner: list[Runner] = []

    def worker() -> Runner:
        if not runner:
            runner.append(Runner(config, env, pool, prepare))
        return runner[0]

    # After each `attempt` everybody has read: only then may somebody append or merge.
    held = {i for i, line in attempt(stores.drawings.read).items() if "bad" not in line}
    todo = [i for i in range(total) if i not in held]
    mine = todo[env.rank :: env.world_size]
    attempt(lambda: worker().draw(mine, stores) if mine else None)
    good, rejects = split_bad(attempt(stores.drawings.read))
    on_main(env, lambda: _merge_drawings(stores, good, rejects, total, settings))

    drawn = {int(line["index"]): line for line in good if line["drawn"]}
    donor_of: dict[int, int] = {}
    if "other" in settings.chosen:
        donor_of = donors({index: line["dataset"] for index, line in drawn.items()})
    # A row that could be read only now may have become another row's donor.
    finished = {
        index: line
        for index, line in attempt(stores.outputs.read).items()
        if index in drawn and line["donor"] == donor_of.get(index)
    }
    answering = [i for i in drawn if i not in finished]
    own = answering[env.rank :: env.world_size]
    attempt(lambda: worker().answer(own, drawn, donor_of, stores) if own else None)
    summary: dict[str, Any] = {}

    def finish() -> None:
        lines = [line for index, line in stores.outputs.read().items() if index in drawn]
        stores.outputs.merge(lines)
        summary.update(summarise_arms(lines, settings.chosen))
        without = [line for line in good if not line["drawn"]]
        summary.update(
            rows=len(good),
            not_drawn={
                "n": len(without),
                "correct": sum(bool(x["correct"]) for x in without),
                "lenient_correct": sum(bool(x["lenient"]) for x in without),
            },
            bad_rows=len(rejects),
            seconds=time.perf_counter() - started,
            resumed_drawings=len(held),
            resumed_rows=len(finished),
            settings_hash=stable_hash(wanted),
            settings=flat(config),
        )
        write_json(stores.folder / "summary.json", summary)
        draw_arms(stores.folder / "arms.png", summary)

    on_main(env, finish)
    return summary


def _prepare_folder(
    stores: Stores, wanted: Mapping[str, Any], settings: InterventionSettings
) -> None:
    hold_output(stores.folder)
    if settings.overwrite:
        for lines in (stores.drawings, stores.outputs):
            lines.clear()
        for picture in (stores.folder / "drawings").glob("*.png"):
            picture.unlink()
    claim_folder(
        stores.folder,
        wanted,
        has_results=stores.drawings.exists(),
        hint="choose another --output_dir, or pass --overwrite to throw them away",
    )
    for lines in (stores.drawings, stores.outputs):
        lines.settle()
    with disk_errors(f"writing to {stores.folder}", stores.folder):
        (stores.folder / "drawings").mkdir(exist_ok=True)


def _merge_drawings(
    stores: Stores,
    good: Sequence[Mapping[str, Any]],
    rejects: Sequence[Reject],
    total: int,
    settings: InterventionSettings,
) -> None:
    stores.drawings.merge(good)
    write_lines(stores.folder / "bad_rows.jsonl", [asdict(reject) for reject in rejects])
    check_bad_rate(rejects, total, settings.max_bad_rate)
    if not good:
        raise ValueError(f"no row could be used: {summarise(rejects)}")
    if not any(line["drawn"] for line in good):
        raise ValueError(
            f"none of {len(good)} rows asked for a picture ({IMAGE_MARKER}), so there is nothing "
            "to compare: take a model that draws, the prompts it was trained with "
            "(--prompt_style), or a larger --max_new_tokens; the texts are in drawings.jsonl"
        )


# ---------------------------------------------------------------------------------- figures


def summarise_arms(lines: Sequence[Mapping[str, Any]], arms: Sequence[str]) -> dict[str, Any]:
    """Figures of the arms over all rows that drew, and for each dataset."""
    names = list(dict.fromkeys(str(line["dataset"]) for line in lines))
    tasks = {n: _figures([x for x in lines if x["dataset"] == n], arms) for n in names}
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
    env = init_distributed(config.compute.device, config.compute.timeout_s)
    try:
        summary = run(config, env)
    finally:
        shutdown()
    if env.is_main:
        print(table(summary))
        folder = Path(config.intervention.output_dir)
        print(f"{summary['seconds']:.1f} s; {folder / 'summary.json'}, {folder / 'arms.png'}")
    return 0


if __name__ == "__main__":
    run_main(main)
