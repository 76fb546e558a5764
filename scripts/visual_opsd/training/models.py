# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The sharded student of a run, and its teacher."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from data.randomness import row_generator
from modeling.bagel.adapters import (
    AdapterConfig,
    adapter_shapes,
    add_adapters,
    find_targets,
    initial_adapter,
)
from modeling.bagel.bagel import Bagel
from modeling.bagel.config import BagelConfig
from modeling.release.checkpoint import is_generation_key, iter_weights
from modeling.release.weight_files import open_weights
from scripts.visual_opsd.config import LoraSettings, ModelSettings, TrainConfig
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
from scripts.visual_opsd.training.teacher import AdapterTeacher, Teacher


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
    builder = _Builder(config, mesh, dtype, env.device)
    mode = None if settings is None else settings.teacher_mode
    # Where the weights do not change, or are the teacher's, one model is both.
    one_model = mode == "self" or config.lora.lora_rank is not None
    drawing = objective.trains_drawing or (one_model and objective.teacher_reads_latents)
    student = builder.outline(base, drawing)
    if config.lora.lora_rank is not None:
        add_adapters(student.to(dtype), adapter_config(student, config.lora))
    else:
        freeze(student, config.model, trains_drawing=objective.trains_drawing)
    builder.fill(student, run.cpu_offload)
    if settings is None:
        check_precision(student, dtype)
        return student, None
    if config.lora.lora_rank is not None:
        teacher: Teacher = AdapterTeacher(settings.teacher_mode, student, settings.ema_decay)
    else:
        model: Bagel | None = None
        if not one_model:
            model = builder.outline(base, objective.teacher_reads_latents).requires_grad_(False)
            # A fixed teacher never accumulates small steps, so compute dtype is enough.
            model.to(torch.float32 if mode == "ema" else dtype)
            builder.fill(model, settings.teacher_cpu_offload, source=student)
        teacher = Teacher(settings.teacher_mode, model, student, settings.ema_decay)
    check_precision(student, dtype, ema=teacher.ema)
    return student, teacher


def adapter_config(model: Bagel, settings: LoraSettings) -> AdapterConfig:
    """The adapters of a run with `lora_rank`."""
    rank, alpha = settings.lora_rank, settings.lora_alpha
    assert rank is not None
    modules = find_targets(model, settings.targets)
    return AdapterConfig(rank, 2.0 * rank if alpha is None else alpha, modules)


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
    config: TrainConfig
    mesh: DeviceMesh
    dtype: torch.dtype
    device: torch.device

    def outline(self, base: BagelConfig, visual_gen: bool) -> Bagel:
        """A model without weights, in float32."""
        with torch.device("meta"):
            return Bagel(replace(base, visual_gen=visual_gen))

    def fill(self, model: Bagel, offload: bool, source: Bagel | None = None) -> None:
        """Shard an outline, and give it the weights of `source` or of the release folder."""
        settings = self.config.model
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
        weights = iter_weights(path, visual_gen=model.config.visual_gen)
        load_sharded(model, chain(weights, self._adapters(model)))
        check_shards(model, open_weights(path))

    def _adapters(self, model: Bagel) -> Iterator[tuple[str, Tensor]]:
        """What the model's adapters begin with, the same on every rank."""
        seed = self.config.run.global_seed
        for place, (key, shape) in enumerate(adapter_shapes(model).items()):
            yield key, initial_adapter(key, shape, row_generator("adapter", seed, place))
