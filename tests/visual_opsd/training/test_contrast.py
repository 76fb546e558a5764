# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""A target that contrasts the teacher with a control (--contrast): settings, rows and a whole run.

Its figures are recomputed in test_step_oracle.py, the forms of its loss in loss/test_chunked.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from data.packing import context_length
from data.row_groups import ParquetDataset
from data.sequence import Completion, ImageSegment
from scripts.visual_opsd.config import PromptSettings, TeacherSettings
from scripts.visual_opsd.opsd_loss import contrast
from scripts.visual_opsd.rows import open_builder
from scripts.visual_opsd.scored_rows import score_completion
from scripts.visual_opsd.training.visual_opsd import PrepareOPSD
from tests.conftest import TINY_BAGEL
from tests.visual_opsd.training.trainers import metrics, rollout, train

FIGURES = ("loss", "grad_norm", "divergence", "teacher_entropy", "forward_kl")


def test_what_is_combined() -> None:
    real, control = torch.randn(2, 5, 7).bfloat16()
    assert torch.equal(contrast(real, control, 0.0), real)
    exact = real.double() + 0.7 * (real.double() - control.double())
    found = contrast(real, control, 0.7)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, exact.bfloat16())  # rounded once
    log_p, log_q = real.float().log_softmax(-1), control.float().log_softmax(-1)
    by_logits = contrast(real.float(), control.float(), 2.0).log_softmax(-1)
    torch.testing.assert_close(by_logits, (log_p + 2 * (log_p - log_q)).log_softmax(-1))


def test_a_run_of_none_is_one_without(world: Path, tmp_path: Path) -> None:
    """A = 0 to the last bit, whatever it is not contrasted with; else another loss, the same rows
    and completions."""
    runs: dict[str, dict[str, Any]] = {
        "plain": {},
        "zero": {"contrast": 0.0, "contrast_with": "other"},
        "half": {"contrast": 0.5, "contrast_with": "other", "num_workers": 1},
    }
    lines, samples = {}, set()
    for name, flags in runs.items():
        train(world, tmp_path / name, total_steps=2, **flags)
        lines[name] = [[line[figure] for figure in FIGURES] for line in metrics(tmp_path / name)]
        samples.add(str(rollout(tmp_path / name)[0]))
    assert lines["zero"] == lines["plain"]
    assert lines["half"][0] != lines["plain"][0]
    assert len(samples) == 1


def test_rows_carry_the_control_they_are_contrasted_with(world: Path) -> None:
    files = sorted((world / "Spatial_Navigation" / "data").glob("train-*.parquet"))
    row = ParquetDataset("Spatial_Navigation", files).read_row(0, 3)
    builder, _ = open_builder(TINY_BAGEL, PromptSettings(vit_max_size=112, vit_min_size=14))
    assert PrepareOPSD(builder)(row).control is None
    for kind in ("noise", "other", "none"):
        made = PrepareOPSD(builder, contrast_with=kind)(row)
        shown = PrepareOPSD(builder, kind)(row)
        assert made.control is not None and made.teacher is not None and shown.teacher is not None
        images = [
            [s.patches for s in context if isinstance(s, ImageSegment)]
            for context in (made.control, shown.teacher)
        ]
        assert len(images[0]) == (1 if kind == "none" else 2)
        assert all(torch.equal(a, b) for a, b in zip(*images, strict=True))
    # A control that is longer than what the teacher sees decides where a completion is cut.
    made = PrepareOPSD(builder, "none", contrast_with="other")(row)
    assert made.teacher is not None and made.control is not None
    completion = Completion((5,) * 30, (True,) * 31)
    limit = context_length(made.control) + 10
    scored = score_completion("r", made.student, made.teacher, completion, limit, made.control)
    assert scored.length == limit and scored.control is not None
    without = score_completion("r", made.student, made.teacher, completion, limit)
    assert scored.completion is not None and without.completion is not None
    assert scored.completion.count < without.completion.count


def test_combinations_without_meaning_are_refused() -> None:
    with pytest.raises(ValueError, match="--contrast_with noise is what the teacher sees"):
        TeacherSettings(contrast=1.0, noise_vt=True)
    with pytest.raises(ValueError, match=r"--contrast_with none shows no picture .* vae\+vit"):
        TeacherSettings(contrast=1.0, contrast_with="none", teacher_vt="vae+vit")
    with pytest.raises(ValueError, match="--contrast must be at least 0"):
        TeacherSettings(contrast=-0.5)
    assert TeacherSettings(vt="noise").contrast == 0.0  # nothing to refuse
