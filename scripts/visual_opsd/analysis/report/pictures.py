# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The pictures of the rows that a run took, found again by its own order of the data."""

from __future__ import annotations

import base64
import io
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from data.dataset_info import load_dataset_config
from data.parquet import StepOrder, open_sources
from data.row_groups import prepare_row
from data.thinkmorph import Row, RowNeeds, Sample, parse_row
from scripts.visual_opsd.analysis.report.runs import Run

NEEDS = RowNeeds(visual_thoughts="optional")
_SIDE = 360  # pixels of the longest side that is shown
_PNG_PIXELS = 160 * 160  # larger ones are photographs as a rule: JPEG
_TRIED = 8  # rows of a slot's order: rejected ones come before the one that was taken


@dataclass(frozen=True)
class RowPictures:
    """Pictures of one row as data URIs. `thoughts`: its visual thoughts (VTs)."""

    problem: str
    thoughts: tuple[str, ...]

    @property
    def size(self) -> int:
        return len(self.problem) + sum(map(len, self.thoughts))


@dataclass
class PictureFinder:
    """Finds the pictures of samples of one run; `missing` says why there are none, "" otherwise."""

    run: Run
    missing: str = ""
    _order: StepOrder | None = field(default=None, init=False)

    def find(self, step: int, slot: int, name: str) -> RowPictures | None:
        """Of the row `name` (data set and pid) that 1-based `step` took for `slot`."""
        if self.missing:
            return None
        try:
            if self._order is None:
                self._order = _open(self.run.settings)
            return self._of_row(self._order, step, slot, name)
        except (ValueError, OSError) as error:
            self.missing = " ".join(str(error).split())
            return None

    def _of_row(self, order: StepOrder, step: int, slot: int, name: str) -> RowPictures | None:
        if step < 1 or not 0 <= slot < order.global_batch_size:
            return None
        for dataset, index in itertools.islice(order.candidates(step - 1, slot), _TRIED):
            found = prepare_row(dataset, index, _sample)
            if isinstance(found, Sample) and f"{found.dataset}/{found.pid}" == name:
                return RowPictures(
                    data_uri(found.problem_image), tuple(map(data_uri, found.thought_images))
                )
        return None


def _sample(row: Row) -> Sample:
    return parse_row(row, NEEDS)


def _open(settings: Mapping[str, Any]) -> StepOrder:
    """The order in which a run with these settings takes its rows.

    Raises:
        ValueError: the settings name none, or what they name is not there.
    """
    config, size, seed = (
        settings.get(name) for name in ("dataset_config_file", "global_batch_size", "data_seed")
    )
    if not isinstance(config, str) or type(size) is not int or type(seed) is not int or size < 1:
        raise ValueError("config.yaml does not say which data the run took")
    root = settings.get("data_root")
    sources = open_sources(load_dataset_config(config), NEEDS, root)
    return StepOrder(sources, seed, size)


def data_uri(image: Image.Image) -> str:
    """An RGB image, made smaller where it is larger than what is shown, as a data URI."""
    shown = image
    if max(image.size) > _SIDE:
        shown = image.copy()
        shown.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    kind = "png" if shown.width * shown.height <= _PNG_PIXELS else "jpeg"
    stream = io.BytesIO()
    shown.save(stream, kind, **({"optimize": True} if kind == "png" else {"quality": 82}))
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"
