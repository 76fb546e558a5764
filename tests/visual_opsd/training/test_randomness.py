# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Random numbers belong to their keys: what must change them does, what must not does not.

Every row of these data sets holds the same, so that only its keys (seed, step, slot, place among
all rows) can tell the numbers of one from those of another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from data.parquet import StepRows, make_loader
from data.sequence import Context, ImageSegment, LatentSegment, PixelSegment
from data.thinkmorph import Row
from data.transforms import ImageTransform
from inference.interleave import InterleaveEngine
from modeling import load_bagel
from scripts.visual_opsd.analysis.diagnosis import Diagnosis
from scripts.visual_opsd.analysis.kl_measurement import (
    DiagnosticConfig,
    DiagnosticSettings,
    PrepareDiagnostic,
    choose_rows,
    encode_row,
)
from scripts.visual_opsd.analysis.vt_arms import (
    DrawingSettings,
    Interventions,
    InterventionSettings,
    PrepareProblem,
)
from scripts.visual_opsd.config import PromptSettings, SampleSettings
from scripts.visual_opsd.evaluation.questions import EvaluateSettings, PrepareQuestion
from scripts.visual_opsd.evaluation.rows import RowPool, open_data, read_windows
from scripts.visual_opsd.processes import DistEnv
from scripts.visual_opsd.rows import open_builder
from scripts.visual_opsd.training.interleaved import InterleavedSFT
from scripts.visual_opsd.training.visual_opsd import VisualOPSD
from tests.conftest import TINY_BAGEL
from tests.data.synthetic import good_row, write_dataset
from tests.visual_opsd.training.trainers import build, one_process

PROMPT = PromptSettings(vit_max_size=56, vit_min_size=14, vae_max_size=32, vae_min_size=16)


def latest(context: Context | None, kind: type) -> Any:
    """The last segment of a kind: a teacher's visual thought, not the problem."""
    assert context is not None
    return [segment for segment in context if isinstance(segment, kind)][-1]


def all_differ(found: Sequence[Any]) -> bool:
    return not any(equal(a, b) for a, b in combinations(found, 2))


def equal(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) else bool(a == b)


# ----------------------------------------------------------------------------------- training

Numbers = dict[tuple[int, int], Any]  # by (step, slot)


def completions(trainer: Any, batch: StepRows[Any]) -> list[Any]:
    return [completion.ids for completion in trainer.objective.roll_out(batch, trainer.place)]


def control(trainer: Any, batch: StepRows[Any]) -> list[Any]:
    return [latest(row.teacher, ImageSegment).patches for row in batch.values]


def control_pixels(trainer: Any, batch: StepRows[Any]) -> list[Any]:
    return [latest(row.teacher, PixelSegment).pixels for row in batch.values]


def latents(trainer: Any, batch: StepRows[Any]) -> list[Any]:
    rows = trainer.objective.label(batch, trainer.place)
    return [latest(row.teacher, LatentSegment).latents for row in rows]


def drawings(trainer: Any, batch: StepRows[Any]) -> list[Any]:
    """Latents, flow time and noise of the drawing that is learnt."""
    found = []
    for row in trainer.objective.label(batch, trainer.place):
        segments = [s for s in row.student if isinstance(s, LatentSegment)]
        (learnt,) = [s for s in segments if s.time is not None]
        assert learnt.noise is not None
        time = torch.tensor([learnt.time])
        found.append(torch.cat([learnt.latents.flatten(), learnt.noise.flatten(), time]))
    return found


LATENTS = {"teacher_vt": "vae+vit", "vae_max_size": 32, "vae_min_size": 16}
# What is drawn -> the flags of a run, and how its numbers are found.
STREAMS: dict[str, tuple[dict[str, Any], Callable[[Any, StepRows[Any]], list[Any]]]] = {
    "rollout": ({"sample_temperature": 3}, completions),
    "noise control": ({"noise_vt": True}, control),
    "noise control with latents": ({"noise_vt": True, **LATENTS}, control),
    "pixels of the noise control": ({"noise_vt": True, **LATENTS}, control_pixels),
    "latents of the teacher": (LATENTS, latents),
    "drawings": ({"vae_max_size": 32, "vae_min_size": 16}, drawings),
}


@pytest.fixture(scope="module")
def one_row(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("row")
    write_dataset(folder, rows=1)
    (folder / "datasets.yaml").write_text("datasets:\n  - {name: Jigsaw_Assembly}\n")
    return folder


@pytest.fixture(scope="module")
def env() -> Iterator[DistEnv]:
    with one_process() as found:
        yield found


def numbers(
    stream: str, world: Path, out: Path, env: DistEnv, ranks: int = 1, **changes: Any
) -> Numbers:
    """What two steps of three slots draw, on ranks that know nothing of each other."""
    flags, read = STREAMS[stream]
    size = {"global_batch_size": 3, "total_steps": 2, "sample_max_new_tokens": 12}
    flags = {**size, "global_seed": 1, "data_seed": 1, "teacher_mode": "self", **flags, **changes}
    objective = InterleavedSFT if stream == "drawings" else VisualOPSD
    trainer = build(world, out, env, objective, **flags)
    found: Numbers = {}
    for rank in range(ranks):
        loader = make_loader(
            trainer.order, trainer.prepare, rank=rank, world_size=ranks, total_steps=2
        )
        for batch in loader:
            for item, value in zip(batch.items, read(trainer, batch), strict=True):
                found[batch.step, item.slot] = value
    assert len(found) == 6
    return dict(sorted(found.items()))


@pytest.mark.parametrize("stream", STREAMS)
def test_training(stream: str, one_row: Path, tmp_path: Path, env: DistEnv) -> None:
    """One row, taken by every slot of every step: its numbers are those of seed, step and slot."""
    base = numbers(stream, one_row, tmp_path / "base", env)
    assert all_differ(list(base.values()))
    # Another order of the rows, other ranks and other groups draw the same.
    same = numbers(
        stream, one_row, tmp_path / "same", env, ranks=2, data_seed=2, sample_batch_size=1
    )
    assert all(equal(a, b) for a, b in zip(base.values(), same.values(), strict=True))
    other = numbers(stream, one_row, tmp_path / "other", env, global_seed=2)
    assert all_differ([*base.values(), *other.values()])


def test_the_order_of_the_rows(tmp_path: Path, env: DistEnv) -> None:
    write_dataset(tmp_path, rows=30)
    (tmp_path / "datasets.yaml").write_text("datasets:\n  - {name: Jigsaw_Assembly}\n")

    def order(**seeds: Any) -> list[int]:
        sampler = build(
            tmp_path, tmp_path / "out", env, global_batch_size=5, teacher_mode="self", **seeds
        ).order
        return [next(sampler.candidates(step, slot))[1] for step in range(6) for slot in range(5)]

    base = order(data_seed=1, global_seed=1)
    assert sorted(base) == list(range(30))
    assert order(data_seed=1, global_seed=2) == base
    assert order(data_seed=2, global_seed=1) != base


# ------------------------------------------------------------------- evaluation and diagnostic


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> RowPool:
    """Two data sets of two files of two rows, all alike."""
    folder = tmp_path_factory.mktemp("rows")
    for name in ("first", "second"):
        write_dataset(folder, name, rows=4, files=2, change=lambda index: good_row(0))
    needs = DiagnosticSettings().needs
    return RowPool(open_data("first,second", "train", folder, needs))


def evaluated(seed: int) -> Callable[[Row], Any]:
    settings = EvaluateSettings(model_path=str(TINY_BAGEL), context="noise", noise_seed=seed)
    prepare = PrepareQuestion(open_builder(TINY_BAGEL, PROMPT)[0], settings)
    return lambda row: SimpleNamespace(shown=prepare(row).context, length=1)


def diagnosed(seed: int) -> Callable[[Row], Any]:
    prepare = PrepareDiagnostic(open_builder(TINY_BAGEL, PROMPT)[0], DiagnosticSettings(seed=seed))
    return lambda row: SimpleNamespace(shown=prepare(row).controls["noise"], length=1)


@pytest.mark.parametrize("program", [evaluated, diagnosed])
def test_noise_of_the_programs_that_read(
    program: Callable[[int], Callable[[Row], Any]], pool: RowPool
) -> None:
    """Its key is the row's place among all rows: neither data sets nor files share it."""

    def patches(seed: int, indices: Sequence[int], together: int) -> dict[int, Tensor]:
        windows = read_windows(pool, indices, program(seed), max_rows=together, max_tokens=10**6)
        rows = [row for window in windows for row in window.rows]
        return {index: latest(made.shown, ImageSegment).patches for index, made in rows}

    base = patches(1, range(8), 8)
    assert list(base) == list(range(8)) and all_differ(list(base.values()))
    alone = patches(1, [3, 5], 1)  # another rank, after a kill, in other windows
    assert all(torch.equal(alone[index], base[index]) for index in (3, 5))
    assert all_differ([*base.values(), *patches(2, range(8), 8).values()])


@pytest.fixture(scope="module")
def bundle() -> Any:
    return load_bagel(TINY_BAGEL, visual_gen=True)


def test_latents_of_the_diagnostic(pool: RowPool, bundle: Any) -> None:
    """Both teachers' pictures alike: the numbers are those of the arm, the seed and the row."""
    settings = DiagnosticSettings(teacher_vt="vae+vit")
    builder, _ = open_builder(TINY_BAGEL, PROMPT, visual_gen=True)
    dataset, place = pool.locate(0)
    row = PrepareDiagnostic(builder, settings)(dataset.read_row(place))
    row = replace(row, controls={"noise": row.teacher})
    found: dict[tuple[int, int, str], Tensor] = {}
    for seed in (1, 2):
        for index in (0, 1):
            for made in (encode_row(row, bundle.vae, seed, index) for _ in range(2)):
                for arm, context in (("teacher", made.teacher), ("noise", made.controls["noise"])):
                    tokens = latest(context, LatentSegment).latents
                    assert torch.equal(tokens, found.setdefault((seed, index, arm), tokens))
    assert all_differ(list(found.values()))


def test_rows_of_the_diagnostic() -> None:
    """Each data set draws its own rows; another seed others; more rows keep the same ones."""
    base = choose_rows([50, 50], [1.0, 1.0], 20, 1)
    first = [row for row in base if row < 50]
    second = [row - 50 for row in base if row >= 50]
    assert len(first) == len(second) == 10 and first != second
    assert choose_rows([50, 50], [1.0, 1.0], 20, 1) == base
    assert choose_rows([50, 50], [1.0, 1.0], 20, 2) != base
    assert set(base) < set(choose_rows([50, 50], [1.0, 1.0], 40, 1))


def test_samples_of_the_diagnostic(pool: RowPool, bundle: Any, env: DistEnv) -> None:
    dataset, place = pool.locate(0)
    prepare = PrepareDiagnostic(open_builder(TINY_BAGEL, PROMPT)[0], DiagnosticSettings())
    row = prepare(dataset.read_row(place))

    def ids(seed: int, indices: Sequence[int]) -> list[Any]:
        config = DiagnosticConfig(
            diagnostic=DiagnosticSettings(seed=seed),
            sample=SampleSettings(sample_max_new_tokens=12, sample_temperature=3.0),
        )
        self: Any = SimpleNamespace(config=config, env=env)
        return [c.ids for c in Diagnosis.sample(self, bundle, [(index, row) for index in indices])]

    base = ids(1, range(4))
    assert all_differ([*base, *ids(2, range(4))])
    assert ids(1, [2]) == base[2:3]


# ------------------------------------------------------------------------------ interventions


def test_drawings_of_the_interventions(pool: RowPool, bundle: Any) -> None:
    """The generator of a row before its first word: of (seed, index), whoever stands beside it."""
    vae, vit = ImageTransform(32, 16, 16), ImageTransform(56, 14, 14)
    engine = InterleaveEngine(
        bundle.model, bundle.vae, bundle.tokenizer, vae, vit, bundle.special_tokens
    )
    builder, _ = open_builder(TINY_BAGEL, PROMPT, visual_gen=True)
    settings = InterventionSettings()
    dataset, place = pool.locate(0)
    problem = PrepareProblem(builder, vae, settings.needs)(dataset.read_row(place))

    def states(seed: int, indices: Sequence[int]) -> list[Tensor]:
        settings = InterventionSettings(seed=seed)
        model = Interventions(engine, settings, DrawingSettings(cfg_text_scale=1.0))
        generators = [c.generator for c in model.begin([(index, problem) for index in indices])]
        return [generator.get_state() for generator in generators if generator is not None]

    base = states(1, [0, 1, 2])
    assert all_differ([*base, *states(2, [0, 1, 2])])
    assert torch.equal(states(1, [2])[0], base[2])
    assert torch.equal(states(1, [2, 1])[0], base[2])
