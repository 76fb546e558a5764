# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""One drawing, several answers: what `vt_intervention` asks of the model, row by row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from PIL import Image

from data.limits import NO_LIMITS, ContextLimits
from data.packing import context_length
from data.randomness import row_generator
from data.sequence import ContextBuilder, ImageSegment, Segment, TextSegment
from data.thinkmorph import EVALUATION_ROWS, Row, RowNeeds, parse_row
from data.transforms import ImageTransform
from data.worlds import get_scorer
from inference.contexts import CachedContext
from inference.interleave import Conversation, InterleaveEngine, InterleaveOptions, Turn
from scripts.visual_opsd.cli import (
    ROUNDS,
    ROWS,
    SCALES,
    SEEDS,
    SHARES,
    SHIFTS,
    SIDES,
    TIMESTEPS,
    TOGETHER,
    TOKENS,
    Settings,
    option,
)
from scripts.visual_opsd.config import PromptSettings
from scripts.visual_opsd.evaluation.benchmark_scoring import Verdict, exact_verdict, world_verdict
from scripts.visual_opsd.evaluation.rows import (
    IDENTITY_COLUMNS,
    THOUGHT_IDENTITY_COLUMNS,
    RowName,
    row_name,
)
from scripts.visual_opsd.rows import open_builder

ARMS = ("kept", "removed", "noise", "other", "truth")
FURTHER_ARMS = ("blank", "shuffled", "problem")  # by request
# The contexts of interleaved inference, not those of training.
DEFAULTS: dict[str, Any] = {
    "prompt_style": "inferencer",
    "image_path": "inferencer",
    "vit_min_size": 224,
    "vit_max_pixels": 14 * 14 * 9 * 1024,
}
_OPTIONS = InterleaveOptions()


@dataclass(frozen=True)
class InterventionSettings(Settings):
    """What is answered, and what it is shown."""

    model_path: str = option(
        "models/ThinkMorph-7B", "release folder with its drawing branch", path=True
    )
    data: str = option(
        "Spatial_Navigation", "datasets below the data root, folders or parquet files, by commas",
        path="list",
    )  # fmt: skip
    split: str = option("heldout", "files of a folder that are read (SPLIT-*.parquet)")
    data_root: str | None = option(
        None, "folder of the datasets, else VISUAL_OPSD_DATA_ROOT", path=True
    )
    limit: int | None = option(None, "only the first rows of all", **ROWS)
    arms: str = option(
        ",".join(ARMS), "arms by commas; kept is always among them. Further ones: `blank`, "
        "mid-grey; `shuffled`, the drawing's 16 x 16 patches in random order; `problem`, the "
        "problem image again",
    )  # fmt: skip
    output_dir: str = option(
        "results/vt_intervention", "drawings, outputs, summary and figure", path=True
    )
    overwrite: bool = option(False, "throw away what output_dir holds of other settings")
    batch_size: int = option(8, "rows that draw and answer together", **TOGETHER)
    max_new_tokens: int = option(1024, "budget of each written part", **TOKENS)
    image_skips: int = option(
        1, "how often an answer that asks for another picture goes on", **ROUNDS
    )
    seed: int = option(0, "random numbers of drawings and of the arms", **SEEDS)
    max_bad_rate: float = option(
        0.01, "share of unusable rows beyond which the run fails", **SHARES
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        known = (*ARMS, *FURTHER_ARMS)
        unknown = sorted(self._wished - {"", *known})
        if unknown:
            raise ValueError(f"unknown arms {', '.join(unknown)}: choose from {', '.join(known)}")

    @property
    def _wished(self) -> set[str]:
        return {arm.strip() for arm in self.arms.split(",")}

    @property
    def chosen(self) -> tuple[str, ...]:
        """The arms, in the order of `ARMS` and `FURTHER_ARMS`."""
        known = (*ARMS, *FURTHER_ARMS)
        return tuple(arm for arm in known if arm == "kept" or arm in self._wished)

    @property
    def needs(self) -> RowNeeds:
        """Only `truth` needs the visual thoughts of the data."""
        if "truth" in self.chosen:
            return RowNeeds(visual_thoughts="required")
        return EVALUATION_ROWS


@dataclass(frozen=True)
class DrawingSettings(Settings):
    """How the VT is drawn; defaults are those of `InterleaveOptions`."""

    num_timesteps: int = option(
        _OPTIONS.num_timesteps, "Euler steps of a drawing, plus one", **TIMESTEPS
    )
    timestep_shift: float = option(
        _OPTIONS.timestep_shift, "moves the steps towards the noise", **SHIFTS
    )
    cfg_text_scale: float = option(
        _OPTIONS.cfg_text_scale, "guidance by the text; 1: none", **SCALES
    )
    cfg_img_scale: float = option(
        _OPTIONS.cfg_img_scale, "guidance by the problem image; 1: none", **SCALES
    )
    cfg_from: float = option(
        _OPTIONS.cfg_interval[0], "flow time above which guidance applies", **SHARES
    )
    cfg_to: float = option(
        _OPTIONS.cfg_interval[1], "flow time up to which guidance applies", **SHARES
    )
    cfg_renorm_type: str = option(
        _OPTIONS.cfg_renorm_type, "norm that guidance keeps",
        choices=("global", "channel", "text_channel"),
    )  # fmt: skip
    cfg_renorm_min: float = option(_OPTIONS.cfg_renorm_min, "least factor of that renorm", **SHARES)
    image_size: int | None = option(
        None, "sides of the drawing in pixels; by default those of the problem for the VAE",
        **SIDES,
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cfg_from > self.cfg_to:
            raise ValueError(f"--cfg_from must be at most --cfg_to ({self.cfg_to}), got "
                             f"{self.cfg_from}")  # fmt: skip

    def options(self, settings: InterventionSettings) -> InterleaveOptions:
        return InterleaveOptions(
            max_think_token_n=settings.max_new_tokens,
            max_rounds=1,
            num_timesteps=self.num_timesteps,
            timestep_shift=self.timestep_shift,
            cfg_text_scale=self.cfg_text_scale,
            cfg_img_scale=self.cfg_img_scale,
            cfg_interval=(self.cfg_from, self.cfg_to),
            cfg_renorm_type=self.cfg_renorm_type,
            cfg_renorm_min=self.cfg_renorm_min,
        )


# ---------------------------------------------------------------------------------- rows


@dataclass(frozen=True)
class Problem:
    """One row: what the model reads, what it might be shown, and what judges its answer.

    picture: the problem at the autoencoder's size. judge: whole output -> both verdicts.
    """

    name: RowName
    question: str
    answer: str
    system: tuple[TextSegment, ...]
    picture: Image.Image
    seen: ImageSegment
    asked: TextSegment
    truth: Image.Image | None
    judge: Callable[[str], Verdict]

    @property
    def length(self) -> int:
        return context_length((*self.system, self.seen, self.asked))


@dataclass(frozen=True)
class PrepareProblem:
    builder: ContextBuilder
    vae_transform: ImageTransform
    needs: RowNeeds
    limits: ContextLimits = NO_LIMITS

    @classmethod
    def of(cls, settings: InterventionSettings, prompt: PromptSettings) -> PrepareProblem:
        """Raises ValueError: no row can fit the model's positions."""
        builder, model = open_builder(settings.model_path, prompt, visual_gen=True)
        limits = ContextLimits(
            model.llm.max_position_embeddings,
            # The problem's latents, a text and its end, the VT's latents and image, another text.
            1 + (settings.max_new_tokens + 1) + 2 + settings.max_new_tokens,
        ).check_settings(builder)
        return cls(builder, ImageTransform(**prompt.vae_config()), settings.needs, limits)

    def __call__(self, row: Row) -> Problem:
        sample = parse_row(row, self.needs)
        context = self.builder.student(sample)
        self.limits.check(row, context)
        *system, seen, asked = context
        assert isinstance(seen, ImageSegment) and isinstance(asked, TextSegment)
        judge = partial(exact_verdict, answer=sample.answer)
        if sample.world is not None:
            scorer = get_scorer(sample.world)
            judge = partial(world_verdict, scorer=scorer, state=sample.world_state)
        with_thought = self.needs.visual_thoughts == "required"
        columns = THOUGHT_IDENTITY_COLUMNS if with_thought else IDENTITY_COLUMNS
        return Problem(
            row_name(row, sample.pid, columns),
            sample.question,
            sample.answer,
            tuple(s for s in system if isinstance(s, TextSegment)),
            self.vae_transform.resize(sample.problem_image),
            seen,
            asked,
            sample.thought_images[0] if sample.thought_images else None,
            judge,
        )


# ---------------------------------------------------------------------------------- the model


class Interventions:
    """Draws for rows, and answers after one picture or another.

    A row's random numbers are of its index: one stream draws, another encodes what an arm shows,
    so that all arms share its numbers.

    Args:
        engine: over a model with its drawing branch.
    """

    def __init__(
        self, engine: InterleaveEngine, settings: InterventionSettings, drawing: DrawingSettings
    ) -> None:
        self.engine, self.settings = engine, settings
        self.options = drawing.options(settings)
        self.side = drawing.image_size

    def begin(self, rows: Sequence[tuple[int, Problem]]) -> list[Conversation]:
        """Conversations after [system, problem, question]."""
        empty = CachedContext.empty(self.engine.model)
        seed = self.settings.seed
        conversations = [
            Conversation(
                empty,
                row_generator("drawing", seed, index),
                size=(self.side or p.picture.height, self.side or p.picture.width),
                index=index,
            )
            for index, p in rows
        ]
        pictures = [problem.picture for _, problem in rows]
        latents = self.engine.encode(pictures, [c.generator for c in conversations])
        inputs: list[list[Segment]] = [
            [*p.system, latent, p.seen, p.asked]
            for (_, p), latent in zip(rows, latents, strict=True)
        ]
        self.engine.begin(conversations, inputs, self.options)
        return conversations

    def draw(self, rows: Sequence[tuple[int, Problem]]) -> list[Turn]:
        """The first text of each row and the picture it asked for (None: it did not ask)."""
        return self.engine.take_turns(self.begin(rows), self.options)

    def after_text(
        self, rows: Sequence[tuple[int, Problem]], texts: Sequence[TextSegment]
    ) -> list[Conversation]:
        """The conversations at the moment after their drawing, none of them shown it yet."""
        conversations = self.begin(rows)
        self.engine.extend(conversations, [[text] for text in texts], guidance=False)
        return conversations

    def answer(
        self, starts: Sequence[Conversation], pictures: Sequence[Image.Image | None]
    ) -> list[str]:
        """The rest of each output when it is shown this picture; `starts` stay as they are."""
        seed, skips = self.settings.seed, self.settings.image_skips
        shown = [
            replace(start, generator=row_generator("shown", seed, start.index), parts=[])
            for start in starts
        ]
        self.engine.look(shown, pictures, self.options)
        return [turn.text for turn in self.engine.write(shown, self.options, skips)]


def donors(drawn: Mapping[int, str]) -> dict[int, int]:
    """Whose drawing each row is shown in `other`: the next row of its dataset, the last's is the
    first. A dataset's only row takes that of the next row of all.

    Args:
        drawn: index -> dataset of the rows that drew.

    Raises:
        ValueError: fewer than two rows.
    """
    if len(drawn) < 2:
        raise ValueError(
            f"{len(drawn)} row drew, and the arm `other` needs two: raise --limit, or leave it "
            "out with --arms kept,removed,noise,truth"
        )
    found = {}
    everyone = sorted(drawn)
    for name in set(drawn.values()):
        own = [i for i in everyone if drawn[i] == name]
        ring = own if len(own) > 1 else everyone
        found.update({i: ring[(ring.index(i) + 1) % len(ring)] for i in own})
    return dict(sorted(found.items()))
