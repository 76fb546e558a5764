# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""What decides how much memory a run takes: sizes of weights, who trains, how long rows are.

`Footprint` holds it as plain numbers, so that a plan can be made of settings, of a machine that is
not there, and of one setting changed. `make_footprint` alone reads a configuration.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import nn

from data.transforms import ImageTransform
from modeling import fast
from modeling.autoencoder import AE_FILE
from modeling.bagel.adapters import find_targets
from modeling.bagel.bagel import Bagel
from modeling.bagel.config import BagelConfig, read_llm_config, read_vision_config
from modeling.bagel.decoder import DecoderLayer
from modeling.release.checkpoint import read_bagel_config
from modeling.release.weight_files import open_weights
from scripts.visual_opsd.config import ModelSettings, TrainConfig, compute_dtype
from scripts.visual_opsd.training.models import freeze
from scripts.visual_opsd.training.objective import Objective
from scripts.visual_opsd.training.sharding import mesh_shape

# Tokens of the prompts, about: no tokenizer is needed for a plan.
_SYSTEM_TOKENS, _QUESTION_TOKENS, _REFERENCE_TOKENS = 90, 32, 64
_AUTOENCODER_BYTES = 335_000_000  # of the releases: fp32, in the file and in memory


@dataclass(frozen=True)
class Footprint:
    """Everything of a run that its memory depends on. Fields called like flags mean the same.

    model: sizes of the release. gpus: processes of the run; per_node: of one host.
    item: bytes of a number that is computed with (2: bf16). on_gpu: False on a CPU.
    draws: the drawing branch trains. teacher_latents: the teacher reads latents.
    samples: completions are drawn from the student. lora_rank: None without adapters.
    """

    model: BagelConfig
    gpus: int
    per_node: int
    on_gpu: bool
    item: int
    draws: bool
    teacher_mode: str | None
    teacher_latents: bool
    samples: bool
    sharding_strategy: str
    num_shard: int | None
    num_replicate: int | None
    freeze_llm: bool
    freeze_vit: bool
    freeze_und: bool
    activation_checkpointing: bool
    checkpointed_layers: int | None
    kernels: bool
    cpu_offload: bool
    teacher_cpu_offload: bool
    global_batch_size: int
    gradient_accumulation_steps: int
    num_workers: int
    prefetch_factor: int
    use_system_prompt: bool
    smallest_image: int  # ViT patches
    largest_image: int
    smallest_picture: int  # latent tokens; 0: the autoencoder has no part
    largest_picture: int
    completions_per_row: int
    vt_rehearsal: float
    sample_max_new_tokens: int
    sample_batch_size: int
    max_prefill_tokens: int
    max_forward_tokens: int
    pack_tokens: int
    loss_chunk_size: int
    total_steps: int
    save_every: int
    keep_last: int
    save_release: bool
    release_bytes: int
    autoencoder_bytes: int  # 0: it has no part
    lora_rank: int | None
    lora_targets: tuple[str, ...]
    optimizer_state: str
    validated_rows: int = 0  # rows that a validation decodes together; 0: there is none
    keep_best: bool = False
    teacher_guard: str = "off"

    @property
    def decodes_thoughts(self) -> bool:
        """Whether rows are completed or answered with what the teacher sees."""
        return self.vt_rehearsal > 0 or self.teacher_guard != "off"

    @property
    def shards(self) -> int:
        """Processes that share one copy of the weights. Raises ValueError: as `mesh_shape`."""
        return mesh_shape(
            self.gpus, self.per_node, self.sharding_strategy, self.num_shard, self.num_replicate
        )[1]

    @property
    def rows(self) -> int:
        """Rows of a step on one GPU, at most."""
        return math.ceil(self.global_batch_size / self.gpus)

    @property
    def completions(self) -> int:
        """What is decoded and scored of them: each completion is a row of its own."""
        return self.rows * self.completions_per_row

    @property
    def decoded_rows(self) -> int:
        """Rows decoded together on one GPU, at most, if they are short."""
        sampled = self.completions if self.samples else 0
        return min(self.sample_batch_size, max(sampled, self.validated_rows))


@dataclass(frozen=True)
class World:
    """How many processes there are, how many on one host, and the kind of device they have."""

    gpus: int
    per_node: int
    device: torch.device


@dataclass(frozen=True)
class ReleaseSizes:
    """Of a release folder: of its model, and bytes of the folder and of the autoencoder."""

    model: BagelConfig
    folder: int
    autoencoder: int = _AUTOENCODER_BYTES

    @classmethod
    def of_model(cls, model: BagelConfig) -> ReleaseSizes:
        """As a release of such a model has them: both branches in bf16."""
        units = _units(replace(model, visual_gen=True), 1, (True, True, True), False, 0, ())
        return cls(model, 2 * Weights(units).total("numbers") + _AUTOENCODER_BYTES)

    @classmethod
    def read(cls, path: str | Path) -> ReleaseSizes:
        """Those of a folder; without weights, what its two configuration files describe.

        Raises:
            ValueError: a configuration is missing or malformed, or weights that do not fit it.
        """
        folder = Path(path)
        llm, vision = read_llm_config(folder), read_vision_config(folder)
        if not any(file.name != AE_FILE for file in folder.glob("*.safetensors*")):
            return cls.of_model(BagelConfig(llm, vision))
        found = {f.name: f.stat().st_size for f in folder.iterdir() if f.is_file()}
        model = read_bagel_config(folder, open_weights(folder))
        return cls(model, sum(found.values()), found.get(AE_FILE, _AUTOENCODER_BYTES))


def make_footprint(
    config: TrainConfig, release: ReleaseSizes, objective: Objective, world: World
) -> Footprint:
    """The footprint of a configuration.

    Raises:
        ValueError: bf16 on a CPU, or a mesh that the processes do not make.
    """
    on_gpu, model = world.device.type == "cuda", release.model
    run, settings, sample, prompt = config.run, config.model, config.sample, config.prompt
    transform = ImageTransform(**prompt.vit_config())
    side = model.vit_max_patches_per_side
    patch = model.vision.patch_size

    def patches(pixels: int) -> int:
        width, height = transform.target_size(pixels, pixels)
        return min(width // patch, side) * min(height // patch, side)

    latents = objective.trains_drawing or objective.teacher_reads_latents
    picture = ImageTransform(**prompt.vae_config())

    def latent_tokens(pixels: int) -> int:
        sides = picture.target_size(pixels, pixels)
        stride = 8 * model.latent_patch_size
        return math.prod(min(side // stride, model.max_latent_size) for side in sides) * latents

    footprint = Footprint(
        model=replace(model, visual_gen=False),
        gpus=world.gpus,
        per_node=world.per_node,
        on_gpu=on_gpu,
        item=compute_dtype(settings.precision, world.device).itemsize,
        draws=objective.trains_drawing,
        teacher_mode=None if objective.teacher is None else objective.teacher.teacher_mode,
        teacher_latents=objective.teacher_reads_latents,
        samples=objective.samples,
        sharding_strategy=run.sharding_strategy,
        num_shard=run.num_shard,
        num_replicate=run.num_replicate,
        freeze_llm=settings.freeze_llm,
        freeze_vit=settings.freeze_vit,
        freeze_und=settings.freeze_und,
        activation_checkpointing=settings.activation_checkpointing,
        checkpointed_layers=settings.checkpointed_layers,
        kernels=on_gpu and not settings.compile_blocks and fast.is_on("rows"),
        cpu_offload=run.cpu_offload,
        teacher_cpu_offload=config.teacher.teacher_cpu_offload,
        global_batch_size=config.data.global_batch_size,
        gradient_accumulation_steps=config.optim.gradient_accumulation_steps,
        num_workers=config.data.num_workers,
        prefetch_factor=config.data.prefetch_factor,
        use_system_prompt=prompt.use_system_prompt,
        smallest_image=patches(1),
        largest_image=patches(10**4),
        smallest_picture=latent_tokens(1),
        largest_picture=latent_tokens(10**4),
        completions_per_row=config.rollout.completions_per_row,
        vt_rehearsal=config.rollout.vt_rehearsal,
        sample_max_new_tokens=sample.sample_max_new_tokens,
        sample_batch_size=sample.sample_batch_size,
        max_prefill_tokens=sample.sampler().max_prefill_tokens,
        max_forward_tokens=sample.max_forward_tokens,
        pack_tokens=sample.pack_tokens,
        loss_chunk_size=config.loss.loss_chunk_size,
        total_steps=config.optim.total_steps,
        save_every=run.save_every,
        keep_last=run.keep_last,
        save_release=run.save_release,
        release_bytes=release.folder,
        autoencoder_bytes=release.autoencoder * latents,
        lora_rank=config.lora.lora_rank,
        lora_targets=config.lora.targets,
        optimizer_state=config.optim.optimizer_state,
        validated_rows=_validated_rows(config, world),
        keep_best=config.validation.keep_best,
        teacher_guard=config.validation.teacher_guard,
    )
    assert footprint.shards > 0
    return footprint


def _validated_rows(config: TrainConfig, world: World) -> int:
    """Rows of a validation that one GPU decodes together, at most; 0 without --eval_every."""
    settings, most = config.validation, config.sample.sample_batch_size
    if settings.eval_every is None:
        return 0
    limit = settings.eval_limit
    return most if limit is None else min(most, math.ceil(limit / world.gpus))


# ----------------------------------------------------------------------------------- weights


@dataclass(frozen=True)
class Unit:
    """What is gathered at once: a layer, or ("root") everything that is in none.

    numbers: of all its weights; local: of one shard of them (the largest); trained and
    trained_local: likewise, of those that train; adapters and adapters_local: of what is added to
    it. longest: of the largest tensor's shard.
    """

    kind: str
    numbers: int
    local: int
    trained: int
    trained_local: int
    longest: int
    adapters: int = 0
    adapters_local: int = 0


@lru_cache(maxsize=64)
def _units(
    model: BagelConfig, shards: int, frozen: tuple[bool, bool, bool], draws: bool, rank: int,
    targets: tuple[str, ...],
) -> tuple[Unit, ...]:  # fmt: skip
    with torch.device("meta"):
        bagel = Bagel(model)
    if all(frozen):  # the trainer refuses it with its own words
        bagel.requires_grad_(False)
    else:
        llm, vit, und = frozen
        freeze(bagel, ModelSettings(freeze_llm=llm, freeze_vit=vit, freeze_und=und),
               trains_drawing=draws)  # fmt: skip
    blocks = {n: m for n, m in bagel.named_modules() if isinstance(m, Bagel.block_classes())}
    held = {id(p) for block in blocks.values() for p in block.parameters()}
    units = {"": _unit("root", [p for p in bagel.parameters() if id(p) not in held], shards)}
    for name, block in blocks.items():
        kind = "decoder" if isinstance(block, DecoderLayer) else "vision"
        units[name] = _unit(kind, list(block.parameters()), shards)
    for path in find_targets(bagel, targets) if rank else ():
        module = bagel.get_submodule(path)
        name = next((name for name in blocks if path.startswith(f"{name}.")), "")
        pair = ((rank, int(module.in_features)), (int(module.out_features), rank))  # type: ignore[arg-type]
        units[name] = replace(
            units[name],
            adapters=units[name].adapters + sum(math.prod(shape) for shape in pair),
            adapters_local=units[name].adapters_local + sum(_shard(s, shards) for s in pair),
        )
    return tuple(units.values())


def _unit(kind: str, weights: list[nn.Parameter], shards: int) -> Unit:
    locals_ = [_shard(w.shape, shards) for w in weights]
    trained = [w.requires_grad for w in weights]
    return Unit(
        kind,
        numbers=sum(w.numel() for w in weights),
        local=sum(locals_),
        trained=sum(w.numel() for w, t in zip(weights, trained, strict=True) if t),
        trained_local=sum(n for n, t in zip(locals_, trained, strict=True) if t),
        longest=max(locals_),
    )


def _shard(shape: tuple[int, ...] | torch.Size, shards: int) -> int:
    """Numbers of the largest shard: the first dimension is split."""
    return math.ceil(shape[0] / shards) * math.prod(shape[1:])


@dataclass(frozen=True)
class Weights:
    """A model's units, and sums over them. With adapters only these train."""

    units: tuple[Unit, ...]
    adapted: bool = False

    def total(self, field: str, kind: str | None = None) -> int:
        return sum(getattr(u, field) for u in self.units if kind in (None, u.kind))

    @property
    def trained_local(self) -> int:
        return self.total("adapters_local" if self.adapted else "trained_local")

    @property
    def trained(self) -> int:
        return self.total("adapters" if self.adapted else "trained")

    def largest(self, field: str = "numbers") -> int:
        """Of the largest layer."""
        return max(getattr(unit, field) for unit in self.units if unit.kind != "root")

    def trained_of(self, unit: Unit, *, local: bool = False) -> int:
        name = "adapters" if self.adapted else "trained"
        return int(getattr(unit, name + ("_local" if local else "")))

    @property
    def root(self) -> Unit:
        return next(unit for unit in self.units if unit.kind == "root")


def student_weights(of: Footprint) -> Weights:
    """Of the student, as `models.build_models` makes it."""
    one_model = of.teacher_mode == "self" or of.lora_rank is not None
    draws = of.draws or (one_model and of.teacher_latents)
    frozen = (of.freeze_llm, of.freeze_vit, of.freeze_und)
    model = replace(of.model, visual_gen=draws)
    rank = of.lora_rank or 0
    units = _units(model, of.shards, frozen, of.draws, rank, of.lora_targets if rank else ())
    return Weights(units, adapted=of.lora_rank is not None)


def teacher_weights(of: Footprint) -> Weights | None:
    """Of the teacher where it is a model of its own."""
    if of.teacher_mode in (None, "self") or of.lora_rank is not None:
        return None
    model = replace(of.model, visual_gen=of.teacher_latents)
    return Weights(_units(model, of.shards, (True, True, True), False, 0, ()))


# -------------------------------------------------------------------------------------- rows


@dataclass(frozen=True)
class RowLengths:
    """Of one row, in tokens: a problem image and text; for the teacher another image and text.

    shown: patches of the VT that the teacher reads; 0: there is none. latents: of a picture that
    the teacher reads or, twice (noised and clean), the student learns to draw; 0: there is none.
    new: tokens of the completion.
    """

    image: int
    text: int
    shown: int
    shown_text: int
    new: int
    latents: int = 0
    draws: bool = False

    @property
    def student(self) -> int:
        drawn = 2 * (self.latents + 2) if self.draws else 0
        return self.image + self.text + 4 + drawn  # two markers each

    @property
    def teacher(self) -> int:
        latents = self.latents + 2 if self.latents and not self.draws else 0
        return self.student + (self.shown + self.shown_text + 4 + latents if self.shown else 0)

    @property
    def longest(self) -> int:
        """The longer of both sequences, with the completion."""
        return self.teacher + self.new + 2


def shortest_row(of: Footprint) -> RowLengths:
    """As short as a sensible one can be: the smallest images, a short question and answer."""
    text = _QUESTION_TOKENS + (_SYSTEM_TOKENS if of.use_system_prompt else 0)
    shown = 0 if of.teacher_mode is None else of.smallest_image
    return RowLengths(
        of.smallest_image,
        text,
        shown,
        _REFERENCE_TOKENS if shown else 0,
        new=max(1, min(16, of.sample_max_new_tokens - 1)),
        latents=of.smallest_picture,
        draws=of.draws,
    )


def longest_row(of: Footprint) -> RowLengths:
    """As long as the settings let one be: a completion of full length (of given text: a quarter),
    the largest images that leave room for it, text in what remains."""
    row = shortest_row(of)

    def room() -> int:
        return max(0, of.max_forward_tokens - row.longest)

    new = of.sample_max_new_tokens - 1 if of.teacher_mode or of.samples else 0
    new = max(row.new, new or of.max_forward_tokens // 4)
    row = replace(row, new=min(new, row.new + room()))
    larger = replace(row, latents=of.largest_picture)
    row = larger if larger.longest <= of.max_forward_tokens else row
    row = replace(row, image=min(of.largest_image, row.image + room()))
    return replace(row, text=row.text + room())


@dataclass(frozen=True)
class Load:
    """What one GPU handles at once, at most.

    decoded: rows decoded together, in a cache of cache_tokens; prefill_tokens: of their contexts,
    with prefill_patches. student, teacher: tokens of a pack, with their patches; scored: tokens
    whose hidden states are compared. repeated: a step has more than one pack.
    """

    decoded: int
    cache_tokens: int
    prefill_tokens: int
    prefill_patches: int
    student: int
    teacher: int
    student_patches: int
    teacher_patches: int
    scored: int
    repeated: bool


def _forward_rows(of: Footprint) -> int:
    """Rows of one of a step's forwards, before packs are cut."""
    return math.ceil(of.completions / of.gradient_accumulation_steps)


def _decoded_context(of: Footprint, row: RowLengths) -> tuple[int, int]:
    """Tokens and patches of the longest of the row's contexts that is decoded from."""
    if of.decodes_thoughts:
        return row.teacher, row.image + row.shown
    return row.student, row.image


def load_of(of: Footprint, row: RowLengths) -> Load:
    """The load of rows that are all alike."""
    context, patches = _decoded_context(of, row)
    together = max(1, of.max_prefill_tokens // context)
    decoded = min(of.decoded_rows, together)
    packed = max(1, min(_forward_rows(of), of.pack_tokens // row.longest))
    room = context + of.sample_max_new_tokens + 1
    rehearsed = of.vt_rehearsal > 0  # of all the rows of a pack, at worst
    return Load(
        decoded=decoded,
        cache_tokens=decoded * room,
        prefill_tokens=decoded * context,
        prefill_patches=decoded * patches,
        student=packed * (row.longest if rehearsed else row.student + row.new + 2),
        teacher=packed * row.longest if row.shown else 0,
        student_patches=packed * (patches if rehearsed else row.image),
        teacher_patches=packed * (row.image + row.shown) if row.shown else 0,
        scored=packed * (row.new + 1),
        repeated=of.completions > packed,
    )


def largest_load(of: Footprint) -> Load:
    """The most that rows of any length within the settings can be."""
    row = longest_row(of)
    load = load_of(of, row)
    pack = max(row.longest, min(of.pack_tokens, _forward_rows(of) * row.longest))
    more = pack / max(1, load.teacher or load.student)
    if more > 1:
        load = replace(
            load, student=int(load.student * more), teacher=int(load.teacher * more),
            student_patches=int(load.student_patches * more),
            teacher_patches=int(load.teacher_patches * more), scored=int(load.scored * more),
        )  # fmt: skip
    if of.decoded_rows:
        # A completion may be cut, so a context may be longer; and of shorter ones more are decoded
        # together.
        seen, patches = _decoded_context(of, row)
        context, decoded = seen + row.new - 1, of.decoded_rows
        prefill = max(context, min(decoded * context, of.max_prefill_tokens))
        load = replace(
            load, decoded=decoded, prefill_tokens=prefill,
            cache_tokens=prefill + decoded * (of.sample_max_new_tokens + 1),
            prefill_patches=min(prefill, decoded * patches),
        )  # fmt: skip
    several = of.gradient_accumulation_steps > 1 or of.completions * row.longest > of.pack_tokens
    return replace(load, repeated=of.completions > 1 and several)


def least_load(of: Footprint) -> Load:
    """What every step has at least: one shortest row in a pack, and in the cache."""
    load = load_of(replace(of, sample_batch_size=1, pack_tokens=1), shortest_row(of))
    return replace(load, repeated=of.completions > 1 and of.gradient_accumulation_steps > 1)
