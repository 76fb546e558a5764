# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Floating-point operations that a step's model needs, and what a GPU could do in that time.

Counted are the products of decoder, ViT, connector and head, two operations a multiplication, and
attention as if every sequence were causal: the rollout's forward, the teacher's, the student's with
its backward. What is computed twice to save memory, or for the figures, is not; nor are norms, the
sampler's draws, the autoencoder and the optimiser.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from data.packing import context_length
from data.sequence import Context, ImageSegment
from modeling.bagel.bagel import Bagel
from modeling.bagel.config import BagelConfig, LLMConfig, VisionConfig
from scripts.visual_opsd.scored_rows import ScoredRow

# Dense bf16, 1e12 a second, by what `torch.cuda.get_device_name` calls a GPU; the first that fits.
_PEAK_TFLOPS = (
    (r"GH200|H[12]00 NVL|H[18]00 PCIe", None),  # what they reach depends on their power limits
    (r"MIG", None),  # a part of a GPU
    (r"H200|H100|H800", 989.0),
    (r"A100|A800", 312.0),
    (r"B200", 2250.0),
    (r"L40S", 362.0),
    (r"A40", 150.0),
    (r"A30", 165.0),
)


def peak_flops(gpu: str) -> float | None:
    """Dense bf16 operations a second of a GPU by its name; None: not known."""
    for pattern, peak in _PEAK_TFLOPS:
        if re.search(rf"\b(?:{pattern})\b", gpu):
            return None if peak is None else 1e12 * peak
    return None


def sequence_flops(llm: LLMConfig, tokens: int) -> float:
    """A forward of the decoder over one sequence, without the head."""
    queries = llm.num_attention_heads * llm.head_dim
    keys = llm.num_key_value_heads * llm.head_dim
    weights = 2 * llm.hidden_size * (queries + keys) + 3 * llm.hidden_size * llm.intermediate_size
    return llm.num_hidden_layers * (2.0 * weights * tokens + 2.0 * queries * tokens**2)


def image_flops(vision: VisionConfig, width: int, patches: int) -> float:
    """A forward of ViT and connector over one image; width: the decoder's."""
    own = vision.hidden_size
    layer = 4 * own**2 + 2 * own * vision.intermediate_size
    weights = vision.num_hidden_layers * layer + vision.patch_dim * own + own * width + width**2
    return 2.0 * weights * patches + 4.0 * vision.num_hidden_layers * own * patches**2


def _passes(*parts: nn.Module) -> float:
    """Forward and backward of some parts, in forwards: 3 where all of their weights learn."""
    named = [p for part in parts for n, p in part.named_parameters() if "_moe_gen" not in n]
    trained = sum(p.numel() for p in named if p.requires_grad)
    return 2.0 + trained / sum(p.numel() for p in named)


@dataclass(frozen=True)
class FlopCounter:
    """Operations of rows in one step.

    text_passes, image_passes: forward and backward of the student's decoder and ViT, in forwards.
    samples: completions come from a rollout.
    """

    model: BagelConfig
    text_passes: float
    image_passes: float
    samples: bool

    @classmethod
    def of(cls, student: Bagel, *, samples: bool) -> FlopCounter:
        seeing = (student.vit_model, student.connector)
        learns = any(p.requires_grad for part in seeing for p in part.parameters())
        image_passes = _passes(*seeing) if learns else 1.0
        return cls(student.config, _passes(student.language_model), image_passes, samples)

    def __call__(self, rows: Iterable[ScoredRow]) -> float:
        return sum(self._of_row(row) for row in rows)

    def _of_row(self, row: ScoredRow) -> float:
        text, images = self._forward(row.student)
        head = 2.0 * self.model.llm.hidden_size * self.model.llm.vocab_size
        flops = self.text_passes * (text + head * row.scored) + self.image_passes * images
        for context in (row.teacher, row.control):
            if context is not None:
                flops += sum(self._forward(context))
        if row.teacher is not None:
            flops += head * row.scored
        completion = row.completion
        if self.samples and completion is not None and not completion.given:
            flops += text + images + head * len(completion.ids)
        return flops

    def _forward(self, context: Context) -> tuple[float, float]:
        """Of the decoder, and of the ViT."""
        patches = [len(s.position_ids) for s in context if isinstance(s, ImageSegment)]
        width = self.model.llm.hidden_size
        images = sum(image_flops(self.model.vision, width, count) for count in patches)
        return sequence_flops(self.model.llm, context_length(context)), images
