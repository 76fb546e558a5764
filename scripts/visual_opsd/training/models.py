# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The sharded student of a run, and its teacher."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.distributed.device_mesh import DeviceMesh

from modeling.bagel.bagel import Bagel
from modeling.bagel.config import BagelConfig
from modeling.release.checkpoint import is_generation_key, iter_weights
from modeling.release.weight_files import open_weights
from scripts.visual_opsd.config import ModelSettings, TrainConfig
from scripts.visual_opsd.processes import DistEnv
from scripts.visual_opsd.training.objective import Objective
from scripts.visual_opsd.training.sharding import (
    check_precision,
    check_shards,
    copy_shards,
    load_sharded,
    make_mesh,
    materialise,
    shard_model,
)
from scripts.visual_opsd.training.teacher import Teacher


def build_models(
    config: TrainConfig, base: BagelConfig, objective: Objective, dtype: torch.dtype, env: DistEnv
) -> tuple[Bagel, Teacher | None]:
    """The student, and the teacher if the objective wants one; called by all ranks.

    Args:
        base: sizes of the release. dtype: what is computed in.

    Raises:
        ValueError: nothing is left to train, or weights that cannot be used.
    """
    run, settings = config.run, objective.teacher
    mesh = make_mesh(env, run.sharding_strategy, run.num_shard, run.num_replicate)
    builder = _Builder(config.model, mesh, dtype, env.device)
    mode = None if settings is None else settings.teacher_mode
    drawing = objective.trains_drawing or (mode == "self" and objective.teacher_reads_latents)
    student = builder.outline(base, drawing)
    freeze(student, config.model, trains_drawing=objective.trains_drawing)
    builder.fill(student, run.cpu_offload)
    model: Bagel | None = None
    if settings is not None and mode != "self":
        model = builder.outline(base, objective.teacher_reads_latents).requires_grad_(False)
        # A fixed teacher never accumulates small steps, so compute dtype is enough.
        model.to(torch.float32 if mode == "ema" else dtype)
        builder.fill(model, settings.teacher_cpu_offload, source=student)
    check_precision(student, dtype, ema=model if mode == "ema" else None)
    if settings is None:
        return student, None
    return student, Teacher(settings.teacher_mode, model, student, settings.ema_decay)


def freeze(model: Bagel, settings: ModelSettings, *, trains_drawing: bool) -> None:
    """Apply the freeze flags.

    Raises:
        ValueError: nothing trains any more.
    """
    parts = (
        (settings.freeze_llm, model.language_model),
        (settings.freeze_vit, model.vit_model),
        (settings.freeze_und, model.connector),
    )
    if all(frozen for frozen, _ in parts):
        raise ValueError("freeze_llm, freeze_vit and freeze_und leave nothing to train")
    for frozen, part in parts:
        part.requires_grad_(not frozen)
    if not trains_drawing:  # a teacher of mode self reads latents; nothing trains on them
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and not is_generation_key(name))


@dataclass(frozen=True)
class _Builder:
    settings: ModelSettings
    mesh: DeviceMesh
    dtype: torch.dtype
    device: torch.device

    def outline(self, base: BagelConfig, visual_gen: bool) -> Bagel:
        """A model without weights, in float32."""
        with torch.device("meta"):
            return Bagel(replace(base, visual_gen=visual_gen))

    def fill(self, model: Bagel, offload: bool, source: Bagel | None = None) -> None:
        """Shard an outline, and give it the weights of `source` or of the release folder."""
        settings = self.settings
        shard_model(
            model,
            self.mesh,
            block_classes=Bagel.block_classes(),
            param_dtype=self.dtype,
            compile_blocks=settings.compile_blocks,
            cpu_offload=offload,
        )
        if source is None and settings.activation_checkpointing:
            model.set_gradient_checkpointing(True, settings.checkpointed_layers)
        materialise(model, self.device, cpu_offload=offload)
        if source is not None and source.config == model.config:
            copy_shards(model, source)  # the same weights: no need to read them again
            return
        path = settings.model_path
        load_sharded(model, iter_weights(path, visual_gen=model.config.visual_gen))
        check_shards(model, open_weights(path))
