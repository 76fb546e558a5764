# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The (replicate, shard) mesh, sharding with FSDP2, and full weights for sampling.

One process without torchrun takes exactly the same path (a group of one), so what the tests run
is what a cluster runs. Only public torch APIs are used.

Three things a caller must know:

* FSDP2 *averages* gradients over all ranks: `step.loss_scale` makes up for it.
* Every rank must run the same number of forwards and backwards through the sharded model, each
  touching the same blocks; the sequence lengths are free to differ.
* Nothing may call a block of a sharded model before the root's own first forward.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from modeling import fast
from modeling.bagel.adapters import AdaptedLinear, is_adapter_key, remove_adapters
from modeling.bagel.projections import empty_adjoining
from modeling.bagel.vit_graphs import drop_vit_graphs
from modeling.release.finite import check_finite
from modeling.release.weight_files import StoredTensor
from scripts.visual_opsd.processes import DistEnv, attempt

# What to do where a GPU has too little memory for its shards.
OFFLOAD_ADVICE = "use more GPUs, or --cpu_offload True and --teacher_cpu_offload True"
# Sharded model -> its plain twin on the meta device (see `summon_full_params`).
_PLAIN_TWINS: weakref.WeakKeyDictionary[nn.Module, nn.Module] = weakref.WeakKeyDictionary()
# Of a parameter: its name in the model, the module that holds it, and its name there.
_Place: TypeAlias = tuple[str, nn.Module, str]


# --------------------------------------------------------------------------------------- mesh


def mesh_shape(
    world_size: int,
    local_world_size: int,
    sharding_strategy: str = "HYBRID_SHARD",
    num_shard: int | None = None,
    num_replicate: int | None = None,
) -> tuple[int, int]:
    """(replicas, shards) for a world.

    HYBRID_SHARD shards inside a node and replicates across nodes unless told otherwise;
    FULL_SHARD shards over all ranks.

    Raises:
        ValueError: replicas x shards is not the world size.
    """
    if sharding_strategy == "FULL_SHARD":
        shards, replicas = num_shard or world_size, num_replicate or 1
        if (replicas, shards) != (1, world_size):
            raise ValueError(
                f"FULL_SHARD shards over all {world_size} processes, but num_shard={num_shard}, "
                f"num_replicate={num_replicate}: leave both out, or use HYBRID_SHARD"
            )
        return replicas, shards
    # A replica count alone determines the shard count; otherwise one node holds one copy.
    shards = num_shard or (world_size // num_replicate if num_replicate else local_world_size)
    if num_shard and num_shard > world_size:
        raise ValueError(
            f"num_shard must be at most the number of processes, got {num_shard}, but there are "
            f"{world_size} processes: choose a factor of that, or leave it out"
        )
    replicas = num_replicate or world_size // max(shards, 1)
    if replicas * shards != world_size:
        raise ValueError(
            f"num_replicate ({replicas}) x num_shard ({shards}) = {replicas * shards}, but there "
            f"are {world_size} processes: choose factors of the world size, or leave one out"
        )
    return replicas, shards


def make_mesh(
    env: DistEnv,
    sharding_strategy: str = "HYBRID_SHARD",
    num_shard: int | None = None,
    num_replicate: int | None = None,
) -> DeviceMesh:
    """The mesh ("replicate", "shard"), or ("shard",) where there is one copy; also for one process.

    Over two dimensions FSDP2 keeps every layer's reduced gradients until a backward pass ends, in
    case that they travel between copies: 4 bytes a weight of the shard, for nothing where there
    are none.

    Raises:
        ValueError: as `mesh_shape`.
    """
    shape = mesh_shape(
        env.world_size, env.local_world_size, sharding_strategy, num_shard, num_replicate
    )
    mesh = init_device_mesh(env.device.type, shape, mesh_dim_names=("replicate", "shard"))
    return mesh if shape[0] > 1 else mesh["shard"]


# ---------------------------------------------------------------------------------- sharding


def shard_model(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    block_classes: Sequence[type[nn.Module]],
    param_dtype: torch.dtype,
    compile_blocks: bool = False,
    cpu_offload: bool = False,
) -> nn.Module:
    """Apply FSDP2 in place, block by block and then the root; returns the same module.

    Shards keep the parameters' dtype, compute runs in `param_dtype`, gradients are reduced in
    fp32. The model may be on meta (then `materialise` and `load_sharded` follow) or hold values
    that are equal on every rank. The root re-shards after its forward as well: FSDP2's default
    would leave a teacher, which has no backward, gathered.
    """
    classes = tuple(block_classes)
    blocks = [m for m in model.modules() if isinstance(m, classes) and m is not model]
    assert blocks, f"{type(model).__name__} holds no {[c.__name__ for c in classes]} block"
    _PLAIN_TWINS[model] = _plain_twin(model)
    if compile_blocks:
        for block in blocks:
            block.compile()
    precision = MixedPrecisionPolicy(
        param_dtype=param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    on_gpu = mesh.device_type == "cuda"  # pinned memory needs one
    offload = CPUOffloadPolicy(pin_memory=on_gpu) if cpu_offload else OffloadPolicy()
    for module in [*reversed(blocks), model]:  # children before parents
        fully_shard(
            module,
            mesh=mesh,
            mp_policy=precision,
            offload_policy=offload,
            reshard_after_forward=True,
        )
    return model


def check_precision(
    model: nn.Module, param_dtype: torch.dtype, *, ema: nn.Module | None = None
) -> None:
    """Raise ValueError, at start-up, where the precision contract is broken.

    It is: fp32 shards of everything that trains and of the whole EMA (a bf16 EMA freezes: one
    step's change is below its rounding), fp32 buffers (rotary frequencies), fp32 compute on CPU.
    """
    if param_dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"compute dtype {param_dtype} is not supported: float32 or bfloat16")
    wrong = _precision_faults("model", model, every=False)
    if ema is not None:
        wrong += _precision_faults("ema", ema, every=True)
    shards = [p for p in model.parameters() if isinstance(p, DTensor)]
    if param_dtype != torch.float32 and any(p.device_mesh.device_type == "cpu" for p in shards):
        wrong.append(f"compute dtype on CPU is {param_dtype}")
    if wrong:
        shown = "; ".join(wrong[:5]) + (f"; and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        raise ValueError(
            f"precision contract broken: {shown}. Build the model in float32, shard it with "
            "shard_model (compute may be bfloat16 on CUDA only), keep buffers in float32"
        )


def _precision_faults(label: str, module: nn.Module, *, every: bool) -> list[str]:
    """Parameters and buffers in another dtype than fp32; of the former all, or those that train."""
    wrong = []
    for name, param in module.named_parameters():
        if not isinstance(param, DTensor):
            wrong.append(f"{label} {name} is not sharded")
        elif (every or param.requires_grad) and param.dtype != torch.float32:
            wrong.append(f"{label} {name} has {param.dtype} shards")
    return wrong + [
        f"{label} buffer {name} is {buffer.dtype}"
        for name, buffer in module.named_buffers()
        if buffer.is_floating_point() and buffer.dtype != torch.float32
    ]


# ----------------------------------------------------------------------------------- weights


def materialise(model: nn.Module, device: torch.device, *, cpu_offload: bool = False) -> None:
    """Give a sharded meta model uninitialised shards on its device (`Bagel` has no buffers)."""
    model.to_empty(device=torch.device("cpu") if cpu_offload else device)


@torch.no_grad()
def load_sharded(model: nn.Module, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Fill the shards from (key, full tensor) pairs, one at a time, casting to the shard's dtype.

    Every rank reads the same pairs, in any order, and keeps its own slice: no collective runs, and
    no rank ever holds more than one full tensor.

    Raises:
        ValueError: names all missing, unexpected and mis-shaped keys.
    """
    targets = model.state_dict()
    missing, problems = set(targets), []
    for key, full in weights:
        target = targets.get(key)
        if target is None:
            problems.append(f"unexpected {key}")
            continue
        missing.discard(key)
        if full.shape != target.shape:
            problems.append(f"{key} is {tuple(full.shape)}, expected {tuple(target.shape)}")
        elif isinstance(target, DTensor):
            part = distribute_tensor(
                full, target.device_mesh, target.placements, src_data_rank=None
            )
            target.to_local().copy_(part.to_local())
        else:
            target.copy_(full)
    problems += [f"missing {key}" for key in sorted(missing)]
    if problems:
        raise ValueError(f"the weights do not fit {type(model).__name__}: " + "; ".join(problems))


def check_shards(model: nn.Module, stored: Mapping[str, StoredTensor]) -> None:
    """`check_finite` of each rank's shards; its ValueError is raised on all ranks together."""
    shards = {key: local_part(tensor) for key, tensor in model.state_dict().items()}
    attempt(lambda: check_finite(shards, stored))


@torch.no_grad()
def copy_shards(target: nn.Module, source: nn.Module) -> None:
    """Copy parameters and buffers between two equally sharded models, without communication."""
    for (_, into), (_, out) in _paired(target.state_dict(), source.state_dict()):
        local_part(into).copy_(local_part(out))


@contextmanager
def summon_full_params(model: nn.Module, *, copy: bool | None = None) -> Iterator[nn.Module]:
    """Full weights, in the compute dtype, as a plain module to sample from.

    What FSDP1 calls `summon_full_params` (recurse=True, writeback=False): every unit is unsharded
    once, and a plain twin of the model (made on the meta device before sharding) gets the
    unsharded weights. The twin has no hooks, so nothing inside communicates: ranks may decode
    different lengths, which hangs when the sharded model itself is called. Training afterwards is
    bit-identical to never having sampled.

    copy: True: unit by unit into memory of the twin's own, where projections adjoin and no address
        changes until the end, as fast decoding wants; at most one unit is gathered besides. False:
        all units stay unsharded and the twin points at them, without a copy. None: True on CUDA.

    All ranks enter and leave together. The tensors are dead after the context: keep none. Writes
    to parameters are lost; buffers are shared with the model. Works before any forward. Sample
    under `torch.inference_mode()` *inside* the context only: entered under it, later training
    would meet inference tensors.
    """
    plain = _PLAIN_TWINS[model]
    assert not torch.is_inference_mode_enabled(), "enter summon_full_params outside inference_mode"
    assert all(p.is_meta for p in plain.parameters()), "summon_full_params does not nest"
    units = [m for m in model.modules() if isinstance(m, FSDPModule)]
    if copy is None:
        first = next(model.parameters())
        on_gpu = isinstance(first, DTensor) and first.device_mesh.device_type == "cuda"
        copy = on_gpu and fast.is_on("projections")
    try:
        if copy:
            _bind(plain, model, copy_units(model))
        else:
            weights: dict[str, Tensor] = {}
            for unit, places in _units(model):
                unit.unshard()
                weights |= _plain_weights(places)
            _bind(plain, model, weights)
        yield plain
    finally:
        drop_vit_graphs(plain)
        plain.to(device="meta")
        for unit in units:
            unit.reshard()


@torch.no_grad()
def copy_units(model: nn.Module, into: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Full weights by name, in the compute dtype, gathered one unit at a time: a collective.

    into: what an earlier call returned, to be filled again where it is.
    """
    copies = {} if into is None else into
    for unit, places in _units(model):
        unit.unshard()
        full = _plain_weights(places)
        if into is None and full:
            some = next(iter(full.values()))
            shapes = {name: parameter.shape for name, parameter in full.items()}
            copies.update(empty_adjoining(shapes, some.dtype, some.device))
        for name, parameter in full.items():
            copies[name].copy_(parameter)
        unit.reshard()
    return copies


def _plain_weights(places: Sequence[_Place]) -> dict[str, Tensor]:
    """Gathered weights by name, as the plain twin has them: adapters are merged."""
    return {
        name: owner.merged_weight()
        if isinstance(owner, AdaptedLinear) and attribute == "weight"
        else getattr(owner, attribute)
        for name, owner, attribute in places
        if not is_adapter_key(name)
    }


def _units(model: nn.Module) -> list[tuple[FSDPModule, list[_Place]]]:
    """Each unit with what it gathers."""
    modules = dict(model.named_modules(remove_duplicate=False))
    units = {name: m for name, m in modules.items() if isinstance(m, FSDPModule)}
    assert "" in units, "the root is sharded last, as a unit of its own"
    places: dict[str, list[_Place]] = {name: [] for name in units}
    for prefix, module in modules.items():
        unit = prefix
        while unit not in units:
            unit = unit.rpartition(".")[0]
        for attribute, _ in module.named_parameters(recurse=False):
            name = f"{prefix}.{attribute}" if prefix else attribute
            places[unit].append((name, module, attribute))
    return [(units[name], found) for name, found in places.items()]


def _plain_twin(model: nn.Module) -> nn.Module:
    """A deep copy on meta, without adapters: costs no memory, needs no factory."""
    memo: dict[int, Any] = {}
    for param in model.parameters():
        memo[id(param)] = nn.Parameter(torch.empty_like(param, device="meta"), requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return remove_adapters(copy.deepcopy(model, memo)).eval()


def _bind(plain: nn.Module, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Point the twin's parameters at these full weights and its buffers at the model's."""
    # Detached: load_state_dict(assign=True) would otherwise set requires_grad on FSDP's own
    # parameters, and a graph could grow into them.
    full = {name: tensor.detach() for name, tensor in weights.items()}
    sharded = [name for name, tensor in full.items() if isinstance(tensor, DTensor)]
    assert not sharded, f"still sharded: {sharded[:3]}"
    modules = dict(model.named_modules(remove_duplicate=False))
    for prefix, module in plain.named_modules():
        source = modules.get(prefix)
        assert source is not None, f"module {prefix} appeared after sharding"
        for name, buffer in source.named_buffers(recurse=False):
            setattr(module, name, buffer)  # persistent or not: a state dict lacks the latter
    names = {name for name, _ in plain.named_parameters(remove_duplicate=False)}
    assert names == set(full), f"keys differ: {sorted(names ^ set(full))[:3]}"
    assert {n for n, _ in plain.named_buffers()} == {n for n, _ in model.named_buffers()}
    result = plain.load_state_dict(full, strict=False, assign=True)
    assert not result.unexpected_keys, result.unexpected_keys
    left = [n for n, t in [*plain.named_parameters(), *plain.named_buffers()] if t.is_meta]
    assert not left, f"still on meta: {left[:3]}"


def full_tensor(param: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The whole tensor on every rank. The shard is cast first: less to send than after.

    A collective for a DTensor; a plain tensor is only cast. Do not write to the result.
    """
    tensor = param.detach()
    if not isinstance(tensor, DTensor):
        return tensor.to(dtype=dtype)
    # Offloaded shards go to the mesh's device, so that the gather runs where it is fast.
    moved = tensor.to(device=tensor.device_mesh.device_type, dtype=dtype)
    assert isinstance(moved, DTensor)
    return moved.full_tensor()


def iter_full_state(
    model: nn.Module,
    keys: Collection[str] | None = None,
    dtype_of: Callable[[str], torch.dtype | None] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """(key, full tensor) one by one, in state-dict order, for a writer on rank 0.

    Ranks other than 0 must drive the generator too (each step is a collective). Rank 0 gets CPU
    tensors.

    Args:
        keys: only these, all when None.
        dtype_of: the dtype wanted of a key (the base checkpoint's); None keeps the shard's.
    """
    state = model.state_dict()
    unknown = sorted(set(keys or ()) - set(state))
    assert not unknown, f"no tensors of these names: {unknown}"
    is_main = not dist.is_initialized() or dist.get_rank() == 0
    for key, tensor in state.items():
        if keys is None or key in keys:
            full = full_tensor(tensor, dtype_of(key) if dtype_of else None)
            yield key, full.cpu() if is_main else full


@torch.no_grad()
def ema_update(ema_model: nn.Module, model: nn.Module, decay: float) -> None:
    """ema <- decay * ema + (1 - decay) * model, on this rank's fp32 shards; no communication.

    Frozen parameters of `model` cannot have moved and are left out; further parameters of
    `ema_model` (a drawing branch that only the teacher has) stay as they are.
    """
    averages, currents = [], []
    for (name, average), (_, current) in trained_pairs(ema_model, model):
        assert average.dtype == current.dtype == torch.float32, f"{name} is not fp32"
        averages.append(local_part(average))
        currents.append(local_part(current))
    # swa_utils' own multi-tensor update; it does not use the count of updates so far.
    make_update: Callable[[float], Any] = get_ema_multi_avg_fn
    make_update(decay)(averages, currents, torch.tensor(1))


def trained_pairs(
    other: nn.Module, model: nn.Module
) -> Iterator[tuple[tuple[str, Tensor], tuple[str, Tensor]]]:
    """What trains of `model`, beside the parameters of the same names of `other`."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    theirs = dict(other.named_parameters())
    return _paired({name: theirs[name] for name in trained}, trained)


def clip_grad_norm(params: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Clip the global gradient norm in place; returns the norm before clipping, a plain scalar.

    A collective (call it on all ranks). Non-finite on any rank is non-finite on all.
    """
    norm = torch.nn.utils.clip_grad_norm_(params, max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, or a whole one."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def _paired(
    left: Mapping[str, Tensor], right: Mapping[str, Tensor]
) -> Iterator[tuple[tuple[str, Tensor], tuple[str, Tensor]]]:
    """Both models' tensors side by side, with the checks that make local arithmetic valid."""
    assert left.keys() == right.keys(), f"keys differ: {sorted(left.keys() ^ right.keys())[:3]}"
    for name, tensor in left.items():
        same = local_part(tensor).shape == local_part(right[name]).shape
        assert same, f"{name} is sharded differently"
        yield (name, tensor), (name, right[name])
