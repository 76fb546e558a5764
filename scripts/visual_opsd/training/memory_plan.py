# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""How much memory and disk a run takes, by component, before anything is loaded.

    always there: weights, EMA, moments
    and in turn:  sample    the gathered copy, the cache, prompts
                  encode    pictures through the autoencoder
                  train     gradients, gathered layers, activations, heads
                  optimise  gradients, the optimiser's temporaries
                  save      one gathered tensor

A phase is described by its fullest moment. Weights are counted exactly, by building the model
without memory; the rest follows the code (named where it is not obvious) and FSDP2 as of torch
2.11 to 2.13. All sizes are bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scripts.visual_opsd.loss.chunk import BLOCK_ELEMENTS
from scripts.visual_opsd.training.host_adamw import PIECE, SLOTS
from scripts.visual_opsd.training.memory_sizes import (
    Footprint,
    Load,
    Unit,
    Weights,
    largest_load,
    least_load,
    student_weights,
    teacher_weights,
)
from scripts.visual_opsd.training.sharded_files import PIECE_BYTES

# Measured or read in the code of others; none of them depends on a setting.
_CONTEXT = 0.6e9  # a CUDA context with its modules
_NCCL = 0.8e9  # buffers of two communicators
_FRAGMENTS = 0.03  # share of the peak that the allocator can't hand out
_WORKSPACE = 0.15e9  # cuBLAS and a captured decoding step
_ENCODER_BYTES = 3200  # of the autoencoder's activations, a pixel
_HOST_GPU, _HOST_CPU, _WORKER = 3.0e9, 1.0e9, 0.5e9  # a process: Python, torch, CUDA's libraries
_STAGING = 8.0 * SLOTS * PIECE  # on the GPU, of moments on their way from the host
# Bytes a number; of 8 bits with their scales, and a few that stay in fp32.
_MOMENTS = {"gpu": 8.0, "host": 8.0, "8bit": 2.04}
_LATENT_PIXELS = 256  # that a latent token covers


@dataclass(frozen=True)
class Component:
    """One use of memory, and in a phrase what it is."""

    name: str
    size: float
    why: str


@dataclass(frozen=True)
class Moment:
    """The fullest moment of a phase: what is there besides what always is."""

    phase: str
    parts: tuple[Component, ...]

    @property
    def size(self) -> float:
        return sum(part.size for part in self.parts)


@dataclass(frozen=True)
class Plan:
    """Of one GPU (on a CPU: of one process), of one host with all its processes, and of the disk.

    beside: what a GPU needs besides what torch allocates. first_save: disk of the first state and
    release folder.
    """

    of: Footprint
    resident: tuple[Component, ...]
    moments: tuple[Moment, ...]
    beside: tuple[Component, ...]
    host: tuple[Component, ...]
    disk: tuple[Component, ...]
    first_save: float

    @property
    def fullest(self) -> Moment:
        return max(self.moments, key=lambda moment: moment.size)

    @property
    def allocated(self) -> float:
        """The peak that torch.cuda.max_memory_allocated shows."""
        return _sum(self.resident) + self.fullest.size

    @property
    def gpu(self) -> float:
        return self.allocated + _sum(self.beside)

    def phases(self) -> dict[str, float]:
        """Phase -> most bytes allocated in it; "resident": before the first step's moments."""
        always = _sum(self.resident)
        return {"resident": always} | {m.phase: always + m.size for m in self.moments}


def plan_memory(of: Footprint, load: Load) -> Plan:
    """The plan of a run whose rows make this load.

    Raises:
        ValueError: a mesh that the processes do not make.
    """
    student, teacher = student_weights(of), teacher_weights(of)
    gpu = _Gpu(of, load, student, teacher)
    resident, moments = gpu.resident(), tuple(gpu.moments())
    peak = _sum(resident) + max(moment.size for moment in moments)
    state = state_bytes(of, student, teacher)
    return Plan(
        of,
        resident,
        moments,
        _beside(of, peak),
        _some(_host(of, load, student, teacher, state, peak)),
        _disk(of, student, state),
        state + of.release_bytes * of.save_release,
    )


def largest_plan(of: Footprint) -> Plan:
    """With the longest rows that the settings allow."""
    return plan_memory(of, largest_load(of))


def least_plan(of: Footprint) -> Plan:
    """What a run can't do without."""
    return plan_memory(of, least_load(of))


def planned_phases(of: Footprint, load: Load) -> dict[str, float]:
    """Phase -> planned bytes, to be held beside measured peaks of `max_memory_allocated`."""
    return plan_memory(of, load).phases()


def _sum(parts: Sequence[Component]) -> float:
    return sum(part.size for part in parts)


def _some(parts: Sequence[Component]) -> tuple[Component, ...]:
    return tuple(part for part in parts if part.size > 0)


# --------------------------------------------------------------------------------------- GPU


@dataclass(frozen=True)
class _Gpu:
    of: Footprint
    load: Load
    student: Weights
    teacher: Weights | None

    def resident(self) -> tuple[Component, ...]:
        of, student = self.of, self.student
        shard = f"1/{of.shards} of the" if of.shards > 1 else "the"
        parts = []
        if not of.cpu_offload:
            if student.adapted:
                base = of.item * student.total("local")
                parts.append(Component("frozen base", base, f"{shard} weights as computed with"))
            trained = 4 * (student.trained_local if student.adapted else student.total("local"))
            name = "adapters" if student.adapted else "weights"
            parts.append(Component(name, trained, f"{shard} fp32 values that the optimiser moves"))
            if of.optimizer_state != "host":
                size = _MOMENTS[of.optimizer_state] * student.trained_local
                parts.append(Component("moments", size, "AdamW's two averages of gradients"))
        if not of.teacher_cpu_offload:
            size = teacher_bytes(of, student, self.teacher)
            why = f"{of.teacher_mode}: {shard} weights it scores with"
            parts.append(Component("teacher", size, why))
        parts.append(Component("autoencoder", of.autoencoder_bytes, "turns pictures to latents"))
        return _some(parts)

    def moments(self) -> list[Moment]:
        found = []
        if self.load.decoded:
            found.append(_fullest("sample", self._gather(), self._prefill(), self._decode()))
        if self.of.largest_picture:
            encoder = _ENCODER_BYTES * _LATENT_PIXELS * self.of.largest_picture
            found.append(
                _fullest("encode", [Component("encoder", encoder, "one picture's layers")])
            )
        forwards = [self._student_forward(), self._first_backward(), self._last_backward(),
                    self._root_backward()]  # fmt: skip
        if self.load.teacher:
            forwards.append(self._teacher_forward())
        found.append(_fullest("train", *forwards))
        found.append(_fullest("optimise", self._optimise()))
        found.append(_fullest("save", self._save()))
        return found

    # ---- sample: training.sharding.summon_full_params, modeling.bagel.generate

    def _copy(self) -> Component:
        models = [self.student]
        if self.teacher is not None and self.of.teacher_guard != "off":
            models.append(self.teacher)  # one after the other
        size = self.of.item * max(model.total("numbers") for model in models)
        return Component("gathered weights", size, "all of them, to sample from (adapters merged)"
                         if self.student.adapted else "all of them, to sample from")  # fmt: skip

    def _gather(self) -> list[Component]:
        units = (3 if self.student.adapted else 2) * self.of.item * self.student.largest()
        return [self._copy(), Component("a layer", units, "gathered while it is copied")]

    def _cache(self) -> Component:
        llm = self.of.model.llm
        token = 2 * llm.num_hidden_layers * llm.num_key_value_heads * llm.head_dim * self.of.item
        size, rows = token * self.load.cache_tokens, self.load.decoded
        return Component("cache", size, f"keys and values of {rows} rows decoded together")

    def _prefill(self) -> list[Component]:
        load = self.load
        size = load.prefill_tokens * self._pass_bytes + self._pixels(load.prefill_patches)
        return [self._copy(), self._cache(), Component("prompts", size, "one layer's activations "
                f"of {load.prefill_tokens} tokens")]  # fmt: skip

    def _decode(self) -> list[Component]:
        vocab, rows = self.of.model.llm.vocab_size, self.load.decoded
        # Logits; on a CPU also `choose`'s fp32 logarithms and fp64 sums.
        logits = rows * vocab * (2 * self.of.item if self.of.kernels else self.of.item + 16)
        graph = _WORKSPACE if self.of.on_gpu else 0
        why = "a step's logits and its CUDA graph" if self.of.on_gpu else "a step's logits"
        return [self._copy(), self._cache(), Component("decoding", logits + graph, why)]

    # ---- train: training.step.run_pack

    @property
    def _wide(self) -> float:
        """What layers without our kernels keep, over what those with them do, about."""
        return 1.0 if self.of.kernels else 2.0

    @property
    def _pass_bytes(self) -> float:
        """A token's activations at the fullest point of a layer without gradient (its MLP)."""
        llm = self.of.model.llm
        return 3 * (llm.hidden_size + llm.intermediate_size) * self.of.item * self._wide

    @property
    def _kept_bytes(self) -> float:
        """What a layer keeps of a token for its backward pass: inputs of norms and products, q, k
        and v before and after rotation, gate, up and their product."""
        llm = self.of.model.llm
        kv = llm.num_key_value_heads * llm.head_dim
        numbers = 7 * llm.hidden_size + 3 * kv + 3 * llm.intermediate_size
        return numbers * self.of.item * self._wide

    def _pixels(self, patches: int) -> float:
        vision = self.of.model.vision
        return patches * (4 * vision.patch_dim + 2 * vision.hidden_size * self.of.item)

    def _vit_kept(self) -> float:
        """The pack's pixels, and what the ViT's layers keep of them."""
        of, vision, load = self.of, self.of.model.vision, self.load
        patches = load.student_patches
        size = self._pixels(patches + load.teacher_patches)
        if self.student.adapted or of.freeze_vit:
            return size
        inputs = patches * vision.num_hidden_layers * vision.hidden_size * of.item
        whole = patches * (8 * vision.hidden_size + 2 * vision.intermediate_size) * of.item
        if of.activation_checkpointing:
            return size + inputs
        return size + vision.num_hidden_layers * whole * self._wide

    def _kept(self, layers: int) -> Component:
        """Of the first `layers` decoder layers."""
        of, load = self.of, self.load
        inputs = load.student * of.model.llm.hidden_size * of.item
        recomputed = 0
        if of.activation_checkpointing:
            given = of.checkpointed_layers
            recomputed = layers if given is None else min(given, layers)
        size = recomputed * inputs + (layers - recomputed) * load.student * self._kept_bytes
        size += self._vit_kept() + 2 * inputs
        why = f"kept for the backward pass: {load.student} tokens, {load.student_patches} patches"
        return Component("activations", size, why)

    @property
    def _layers(self) -> int:
        return self.of.model.llm.num_hidden_layers

    def _gradients(self) -> Component:
        size = 0 if self.of.cpu_offload else 4 * self.student.trained_local
        return Component("gradients", size, "fp32 shards, summed over a step's packs")

    @property
    def _holds(self) -> bool:
        """Where there are several copies, FSDP2 holds each unit's reduced gradients until the
        backward pass ends; in a step's first pack these are the gradients themselves."""
        several = self.of.gpus > self.of.shards
        return several and (self.load.repeated or self.of.cpu_offload)

    def _held(self, kinds: Sequence[str]) -> Component:
        units = [unit for unit in self.student.units if unit.kind in kinds and self._holds]
        size = 4 * sum(self.student.trained_of(unit, local=True) for unit in units)
        return Component("reduced gradients", size, "of the current pack, until its end")

    def _head(self) -> int:
        llm = self.of.model.llm
        return llm.vocab_size * llm.hidden_size * self.of.item

    def _heads(self, *, with_gradient: bool = False) -> Component:
        """The teacher's (`Teacher.head`), for the whole of the packs; the gradient of ours."""
        size = self._head() if self.teacher is not None else 0
        if with_gradient and not (self.of.freeze_llm or self.student.adapted):
            size += self._head()
        why = "the teacher's, gathered, and our gradient" if with_gradient else "the teacher's"
        return Component("output heads", size, why)

    def _gathered(self, weights: Weights, layers: int = 2) -> Component:
        """The root throughout, a layer, and the next one, which is on its way."""
        size = self.of.item * (weights.root.numbers + layers * weights.largest())
        return Component("gathered layers", size, "embedding and head, and two layers at a time")

    def _teacher_forward(self) -> list[Component]:
        load = self.load
        size = load.teacher * (self._pass_bytes + self.of.model.llm.hidden_size * self.of.item)
        size += self._pixels(load.teacher_patches)
        pack = Component("teacher's pack", size, f"one layer of {load.teacher} tokens")
        gathered = self._gathered(self.teacher or self.student)
        return [self._gradients(), self._heads(), gathered, pack]

    def _student_forward(self) -> list[Component]:
        """In the loss, when every layer's activations are kept."""
        of, load, llm = self.of, self.load, self.of.model.llm
        tokens = min(of.loss_chunk_size, load.scored)
        chunk = tokens * llm.vocab_size * of.item
        hidden = 3 * load.scored * llm.hidden_size * of.item
        # A few blocks in fp32 (loss.chunk).
        blocks = 8 * 4 * min(BLOCK_ELEMENTS, tokens * llm.vocab_size)
        loss = Component("loss", chunk * self._wide + hidden + blocks, f"logits of {tokens} tokens")
        return [self._gradients(), self._heads(with_gradient=True), self._gathered(self.student),
                self._kept(self._layers), loss]  # fmt: skip

    def _layer_backward(self) -> Component:
        llm = self.of.model.llm
        numbers = llm.intermediate_size + 4 * llm.hidden_size
        if self.student.adapted:  # a layer's output and its sum with the adapter's
            numbers += llm.intermediate_size
        slopes = numbers * self.of.item * self._wide
        size = self.load.student * (self._kept_bytes + slopes)
        return Component("a layer again", size, "computed again, with its gradients")

    def _reduction(self, unit: Unit) -> Component:
        """The unit's gradients in fp32, whole, as ranks add them up; before that as computed,
        after it this rank's part of the sum, unless that is among what is held."""
        trained = self.student.trained_of(unit)
        part = 4 * self.student.trained_of(unit, local=True)
        size = 4 * trained + max(self.of.item * trained, part) - part * self._holds
        return Component("reduction", size, "a unit's gradients in fp32, whole, to be added up")

    def _widest(self) -> Unit:
        layers = [unit for unit in self.student.units if unit.kind == "decoder"]
        return max(layers, key=self.student.trained_of)

    def _first_backward(self) -> list[Component]:
        """At the last layer, with which the backward pass begins."""
        return [self._gradients(), self._heads(with_gradient=True), self._gathered(self.student),
                self._kept(self._layers), self._layer_backward()]  # fmt: skip

    def _last_backward(self) -> list[Component]:
        """At the first decoder layer: the reduced gradients of all others are held."""
        return [self._gradients(), self._held(("decoder",)), self._reduction(self._widest()),
                self._heads(with_gradient=True), self._gathered(self.student, 1), self._kept(1),
                self._layer_backward()]  # fmt: skip

    def _root_backward(self) -> list[Component]:
        """At the end, when embedding and head are reduced."""
        return [self._gradients(), self._held(("decoder", "vision", "root")), self._heads(),
                self._reduction(self.student.root)]  # fmt: skip

    # ---- optimise, save

    def _optimise(self) -> list[Component]:
        of, trained = self.of, self.student.trained_local
        if of.cpu_offload:
            size, why = 0.0, ""
        elif of.optimizer_state == "host":
            size, why = min(_STAGING, 8.0 * trained), "moments on their way"
        elif of.optimizer_state == "8bit" or not of.on_gpu:
            longest = max(unit.longest for unit in self.student.units)
            size, why = 8.0 * longest, "of the largest tensor"
        else:  # one pass over all
            size, why = 0.0, ""
        return [self._gradients(), Component("temporaries", size, why)]

    def _save(self) -> list[Component]:
        llm = self.of.model.llm
        size = 2 * llm.vocab_size * llm.hidden_size * self.of.item
        return [Component("a tensor", size, "gathered to be written")]


def _fullest(phase: str, *moments: Sequence[Component]) -> Moment:
    return Moment(phase, _some(max(moments, key=_sum)))


def teacher_bytes(of: Footprint, student: Weights, teacher: Weights | None) -> float:
    """Of its shards; an EMA is fp32, of adapters alone where there are such."""
    if student.adapted:
        return 4.0 * student.trained_local if of.teacher_mode == "ema" else 0.0
    if teacher is None:
        return 0.0
    return (4 if of.teacher_mode == "ema" else of.item) * float(teacher.total("local"))


def _beside(of: Footprint, peak: float) -> tuple[Component, ...]:
    if not of.on_gpu:
        return ()
    return _some(
        (
            Component("CUDA context", _CONTEXT, "driver, kernels"),
            Component("NCCL", _NCCL if of.gpus > 1 else 0, "buffers of the collectives"),
            Component("allocator", _FRAGMENTS * peak, "gaps that nothing fits into"),
        )
    )


# ------------------------------------------------------------------------------ host and disk


def _host(
    of: Footprint, load: Load, student: Weights, teacher: Weights | None, state: float, peak: float
) -> list[Component]:
    ranks = min(of.per_node, of.gpus)
    each = _HOST_GPU if of.on_gpu else _HOST_CPU
    patches = min(of.max_forward_tokens, max(load.teacher_patches, load.student_patches))
    row = 4.0 * (of.model.vision.patch_dim * patches + 3 * _LATENT_PIXELS * of.largest_picture)
    # A step's rows are held as tensors and, on their way through the pipe, as bytes.
    ahead = 2 * of.num_workers * of.prefetch_factor * of.rows * row
    offloaded = pinned_bytes(student, of) if of.cpu_offload else 0.0
    if of.teacher_cpu_offload:
        offloaded += teacher_bytes(of, student, teacher)
    moments = 8.0 * student.trained_local if of.optimizer_state == "host" else 0.0
    kept = 4.0 * student.trained_local if of.teacher_guard == "rollback" else 0.0
    # Pieces of a state; of a release folder one tensor, on the first rank.
    staging = ranks * min(2.0 * PIECE_BYTES, state / of.gpus)
    staging += 4.0 * of.model.llm.vocab_size * of.model.llm.hidden_size * of.save_release
    parts = [
        Component("processes", ranks * each, f"{ranks} of the run: Python, torch, its libraries"),
        Component("data workers", ranks * (of.num_workers * _WORKER + ahead),
                  f"{of.num_workers} a process, rows of {of.prefetch_factor} steps each"),
        Component("offloaded", ranks * offloaded, "shards kept here by --cpu_offload"),
        Component("moments", ranks * moments, "AdamW's averages, pinned"),
        Component("best teacher", ranks * kept, "its shards, kept by --teacher_guard rollback"),
        Component("saving", staging, "staging of what is written"),
    ]  # fmt: skip
    if not of.on_gpu:
        parts.append(Component("computing", ranks * peak, "what a GPU would hold, see below"))
    return parts


def pinned_bytes(student: Weights, of: Footprint) -> float:
    """Weights, gradients and moments in host memory; CUDA's pinned blocks are powers of two, of
    which a tensor fills three quarters on average."""
    weights = 4.0 * student.total("local") * (4 / 3 if of.on_gpu else 1)
    return weights + 12.0 * student.trained_local


def state_bytes(of: Footprint, student: Weights, teacher: Weights | None) -> float:
    """A training state: weights, moments, EMA and the EMA that a guard keeps, whole. Frozen
    weights are left out if they are the most."""
    total, trained = student.total("numbers"), student.trained
    kept = trained if student.adapted or total > 2 * trained else total
    averages = 0
    if of.teacher_mode == "ema":
        averages = trained if teacher is None else teacher.total("numbers")
    if of.teacher_guard == "rollback":
        averages += trained
    return 4.0 * (kept + averages) + _MOMENTS[of.optimizer_state] * trained


def _disk(of: Footprint, student: Weights, state: float) -> tuple[Component, ...]:
    saves = math.ceil(of.total_steps / of.save_every)
    states = min(saves, of.keep_last + 1)
    kept = f"{states}, {state / 1e9:.1f} GB each: --keep_last, and the one being written"
    parts = [Component("states", states * state, kept)]
    if of.save_release:
        folders = 1 if student.adapted else saves
        when = "at the end" if student.adapted else "one every --save_every"
        why = f"{folders}, {of.release_bytes / 1e9:.1f} GB each: {when}"
        parts.append(Component("release folders", folders * of.release_bytes, why))
        if student.adapted:
            size = 4.0 * saves * student.trained
            parts.append(Component("adapters", size, f"{saves}: one every --save_every"))
    if of.keep_best:
        size = 4.0 * student.trained if student.adapted else float(of.release_bytes)
        parts.append(Component("best", 2 * size, "--keep_best, and the one that replaces it"))
    return _some(parts)
