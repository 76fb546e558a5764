# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Run by test_distributed.py under torchrun, 2 processes: every check in one launch.

    torchrun --standalone --nproc_per_node 2 two_process_checks.py WORK_DIR

Prints `ok NAME` for each check on rank 0; any failure ends the program with its traceback.
"""

from __future__ import annotations

import copy
import json
import shutil
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save_file
from torch import nn

from modeling.host.disk import DiskRefused
from modeling.host.programs import leave
from modeling.release.weight_files import read_file
from scripts.visual_opsd.processes import (
    DistEnv,
    agree,
    all_reduce_max_int,
    all_reduce_sums,
    barrier,
    check_gpus,
    gather_objects,
    init_distributed,
    on_main,
    raise_together,
    shutdown,
)
from scripts.visual_opsd.training import checkpoint_folders as folders
from scripts.visual_opsd.training import checkpoints as T
from scripts.visual_opsd.training import sharding as D
from scripts.visual_opsd.training.state_files import MARKER, write_marker
from tests.visual_opsd.training.toy_distributed_model import (
    TOY_BLOCKS,
    ToyModel,
    ToyRun,
    expect_error,
    state_hash,
    toy_batch,
    toy_generate,
    toy_model,
    toy_optimizer,
    toy_sizes,
)

MESHES = ((1, 2), (2, 1))


def plain_training(steps: int) -> tuple[list[tuple[float, float]], nn.Module, nn.Module]:
    """One process, the global batch: (loss, gradient norm) a step, the model and its EMA."""
    model = toy_model()
    ema = copy.deepcopy(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = toy_optimizer(trained)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    record = []
    for step in range(steps):
        rows = toy_batch(step)
        tokens = sum(len(ids) - 1 for _, ids in rows)
        loss = sum(model(*row) for row in rows) / tokens
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for average, current in zip(ema.parameters(), model.parameters(), strict=True):
                average.mul_(0.9).add_(current, alpha=0.1)
        record.append((loss.item(), norm.item()))
    return record, model, ema


def largest_difference(sharded: nn.Module, plain: nn.Module) -> float:
    state = plain.state_dict()
    parts = dict(D.iter_full_state(sharded))
    assert list(parts) == list(state)
    return max(float((parts[k] - state[k]).abs().max()) for k in state)


def check_collectives(env: DistEnv, work: Path) -> None:
    sums = all_reduce_sums({"b": env.rank + 0.5, "a": torch.tensor(env.rank * 2)}, env)
    assert sums == {"a": 2.0, "b": 2.0}, sums
    expect_error(
        AssertionError, "different names", lambda: all_reduce_sums({f"only{env.rank}": 1.0}, env)
    )
    assert all_reduce_max_int(10 - env.rank, env) == 10
    assert agree(env.rank == 1, env) and not agree(False, env)
    assert gather_objects({"rank": env.rank}) == [{"rank": 0}, {"rank": 1}]

    def fail() -> None:
        raise ValueError("the disk is full")

    expect_error(ValueError, "the disk is full", lambda: on_main(env, fail))
    refused = DiskRefused("no room") if env.rank == 1 else None
    expect_error(DiskRefused, "no room", lambda: raise_together(refused))
    error = OSError("broken") if env.rank == 1 else None
    expect_error((OSError, RuntimeError), "broken", lambda: raise_together(error))


def check_a_gpu_each(env: DistEnv, work: Path) -> None:
    """Too few GPUs end all ranks with one message; none is left waiting for a refused one."""

    def with_gpus(count: int, local_rank: int) -> None:
        names = [SimpleNamespace(uuid=f"GPU-{i}") for i in range(count)]
        with (
            mock.patch.object(torch.cuda, "device_count", lambda: count),
            mock.patch.object(torch.cuda, "get_device_properties", names.__getitem__),
        ):
            check_gpus(local_rank)

    with_gpus(2, env.rank)
    with_gpus(3, 2 - env.rank)
    alone = "rank 1 has no GPU: it is local rank 1, but its machine shows 1"
    expect_error(ValueError, alone, lambda: with_gpus(1, env.rank))
    # One that sees more is told too; and LOCAL_RANK may be missing.
    expect_error(ValueError, alone, lambda: with_gpus(4 if env.is_main else 1, env.rank))
    expect_error(ValueError, "ranks 0 and 1 share one GPU (GPU-0)", lambda: with_gpus(2, 0))


def check_parity(env: DistEnv, work: Path) -> None:
    """Both meshes, with and without activation checkpointing, against one plain process."""
    record, plain, plain_ema = plain_training(3)
    for shape, checkpointing in zip(MESHES, (True, False), strict=True):
        run = ToyRun(env, shape)
        toy: Any = run.model
        toy.set_gradient_checkpointing(checkpointing)
        for step, (loss, norm) in enumerate(record):
            got_loss, got_norm = run.train_step(step)
            assert abs(got_loss - loss) < 1e-5 * abs(loss), (shape, step, got_loss, loss)
            assert abs(got_norm - norm) < 1e-4 * norm, (shape, step, got_norm, norm)
        assert largest_difference(run.model, plain) < 2e-5, shape
        assert largest_difference(run.ema, plain_ema) < 2e-5, shape


def check_sampling(env: DistEnv, work: Path) -> None:
    """Rank-varying lengths, as the very first action too; training is none the wiser."""
    length = 3 + 4 * env.rank
    patches = toy_batch(7)[env.rank][0]
    for shape in MESHES:
        sampling, silent = ToyRun(env, shape), ToyRun(env, shape)
        plain = toy_model()
        for step in range(3):
            with D.summon_full_params(sampling.model, copy=bool(step % 2)) as full:
                if step == 0:
                    expected = toy_generate(plain, patches, length, env.rank)
                    assert toy_generate(full, patches, length, env.rank) == expected
                for name, tensor in full.named_parameters():
                    assert type(tensor) is nn.Parameter and not tensor.requires_grad, name
                toy_generate(full, patches, length + step, env.rank)
            assert all(t.is_meta for t in [*full.parameters(), *full.buffers()])
            try:
                with D.summon_full_params(sampling.model):
                    if env.rank == 1:
                        raise KeyError("one rank fails while sampling")
            except KeyError:
                assert env.rank == 1
            assert sampling.train_step(step) == silent.train_step(step)
        assert state_hash(sampling.state) == state_hash(silent.state)


def check_bf16(env: DistEnv, work: Path) -> None:
    mesh = D.make_mesh(env)
    model = D.shard_model(toy_model(), mesh, block_classes=TOY_BLOCKS, param_dtype=torch.bfloat16)
    masters = dict(D.iter_full_state(model))
    with D.summon_full_params(model) as full:
        for name, tensor in full.named_parameters():
            assert tensor.dtype == torch.bfloat16, name
            assert torch.equal(tensor, masters[name].bfloat16()), name
        assert dict(full.named_buffers())["inv_freq"].dtype == torch.float32
        toy_generate(full, toy_batch(0)[0][0], 2 + env.rank, 0)
    model(*toy_batch(0)[env.rank]).backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g is not None and g.dtype == torch.float32 for g in grads)
    cast = dict(D.iter_full_state(model, ["head.weight"], lambda key: torch.bfloat16))
    assert list(cast) == ["head.weight"]
    assert torch.equal(cast["head.weight"], masters["head.weight"].bfloat16())


def check_loading(env: DistEnv, work: Path) -> None:
    source = toy_model(seed=3).state_dict()
    for shape in MESHES:
        with torch.device("meta"):
            model: Any = ToyModel()
        D.shard_model(
            model,
            D.make_mesh(env, num_shard=shape[1]),
            block_classes=TOY_BLOCKS,
            param_dtype=torch.float32,
        )
        D.materialise(model, env.device)
        model.reset_buffers()
        D.load_sharded(model, {k: v.double() for k, v in source.items()}.items())
        loaded = dict(D.iter_full_state(model))
        assert loaded.keys() == source.keys()
        assert all(torch.equal(loaded[k], source[k]) for k in source)
        assert torch.equal(model.inv_freq, toy_model().inv_freq)
        twin = ToyRun(env, shape).model
        D.copy_shards(twin, model)
        assert all(torch.equal(t, source[k]) for k, t in D.iter_full_state(twin))
        local = [p.to_local().numel() for p in model.parameters()]
        assert sum(local) * shape[1] <= 1.3 * sum(p.numel() for p in model.parameters())
        file = work / f"toy_{env.rank}_{shape[1]}.safetensors"
        save_file(source, file)
        D.check_shards(model, read_file(file))
        spoilt = {**source, "head.weight": source["head.weight"].clone()}
        spoilt["head.weight"][-1, -1] = float("nan")  # the last rank's, and an error on both
        D.load_sharded(model, spoilt.items())
        stored = read_file(file)
        expect_error(ValueError, "hold NaN or inf", partial(D.check_shards, model, stored))


def check_odd_ranks(env: DistEnv, work: Path) -> None:
    """A rank without rows joins with a zero-weight dummy; a NaN on one rank is seen by both."""
    run = ToyRun(env, (1, 2))
    loss, norm = run.train_step(0, weights=(1.0, 0.0))
    plain = toy_model()
    patches, ids = toy_batch(0)[0]
    expected = plain(patches, ids) / (len(ids) - 1)
    expected.backward()
    assert abs(loss - expected.item()) < 1e-5
    reference = torch.nn.utils.clip_grad_norm_(plain.parameters(), 1e9)
    assert abs(norm - float(reference)) < 1e-4 * norm
    _, norm = run.train_step(1, weights=(1.0, float("nan")))
    assert norm != norm, "a NaN of rank 1 must reach rank 0"


def check_choice(env: DistEnv, folder: Path, state: Path) -> None:
    """Rank 0 chooses; a flipped byte in a file that rank 1 checks is known to both."""
    older, newer = folder / "step_0000003", folder / "step_0000007"

    def prepare() -> None:
        for target in (older, newer):
            shutil.copytree(state, target)
        marker = json.loads((newer / MARKER).read_text())
        (newer / MARKER).unlink()
        files = {n: (size, marker["digests"][n]) for n, size in marker["files"].items()}
        kept = {k: v for k, v in marker.items() if k not in ("files", "digests", "digest")}
        write_marker(newer, kept | {"step": 7}, files)

    on_main(env, prepare)
    find = folders.find_checkpoint
    if env.rank == 1:  # a file system that lags
        folders.find_checkpoint = lambda *_: None
    assert folders.choose_checkpoint(folder, ("latest",), env) == newer
    shard = newer / "state" / "__1_0.distcp"

    def flip() -> None:
        data = bytearray(shard.read_bytes())
        data[len(data) // 2] ^= 1
        shard.write_bytes(data)

    on_main(env, flip)
    assert folders.choose_checkpoint(folder, ("latest",), env) == older
    said = f"the next older whole state is {older}: --resume {older}"
    expect_error(ValueError, said, lambda: folders.choose_checkpoint(folder, ("7",), env))
    folders.find_checkpoint = find


def check_checkpoints(env: DistEnv, work: Path) -> None:
    """Bit-exact continuation; the other mesh; stale, superseded and pruned folders."""
    folder = work / "checkpoints"
    config = {"lr": 0.01, "num_workers": 2, "loss": {"beta": 0.5}}
    stale = folder / "step_0000009.tmp"
    if env.is_main:
        stale.mkdir(parents=True)
        (stale / "rest").write_text("x")
    folders.claim_checkpoint_dir(folder, None, env)
    assert not stale.exists()
    straight = ToyRun(env, (1, 2))
    record, draws = [], []
    torch.manual_seed(50 + env.rank)
    for step in range(4):
        record.append(straight.train_step(step))
        draws.append(torch.rand(2).tolist())
        where = T.save_checkpoint(
            folder, step + 1, straight.state,
            env=env, config=config, contents={}, extra={"rows": 7 + step},
        )  # fmt: skip
        on_main(env, lambda: folders.delete_old_states(folder, 3))
        assert where.name == f"step_{step + 1:07d}"
    end = state_hash(straight.state)
    assert list(folders.complete_steps(folder)) == [2, 3, 4]
    expect_error(
        ValueError,
        "exists already",
        lambda: T.save_checkpoint(
            folder, 4, straight.state, env=env, config=config, contents={}, extra={}
        ),
    )
    expect_error(
        ValueError,
        "already holds checkpoints",
        lambda: folders.claim_checkpoint_dir(folder, None, env),
    )

    found = folders.find_checkpoint(folder, "2")
    assert found is not None
    again = ToyRun(env, (1, 2), seed=99)
    torch.manual_seed(1)
    other = config | {"num_workers": 5}
    resumed = T.load_checkpoint(found, again.state, env=env, config=other, contents={})
    assert resumed == T.Resumed(2, {"rows": 8})
    folders.claim_checkpoint_dir(folder, found, env)
    assert list(folders.complete_steps(folder)) == [2]
    assert sorted(p.name for p in (folder / "superseded").iterdir()) == [
        "step_0000003",
        "step_0000004",
    ]
    for step in (2, 3):
        assert again.train_step(step) == record[step], step
        assert torch.rand(2).tolist() == draws[step], "the random state is not restored"
    assert state_hash(again.state) == end
    expect_error(
        ValueError,
        "loss.beta: saved 0.5, now 0.4",
        lambda: T.load_checkpoint(
            found, again.state, env=env, config=config | {"loss": {"beta": 0.4}}, contents={}
        ),
    )

    check_choice(env, work / "choice", folder / "superseded" / "step_0000003")

    final = folder / "superseded" / "step_0000004"
    other_mesh = ToyRun(env, (2, 1), seed=98)
    T.load_checkpoint(final, other_mesh.state, env=env, config=config, contents={})
    assert state_hash(other_mesh.state) == end
    if env.is_main:
        (work / "hash_two_ranks").write_text(end)

    # A checkpoint of one process (the parent test's) on two.
    single = work / "single" / "step_0000002"
    run = ToyRun(env, (1, 2), seed=97)
    assert T.load_checkpoint(single, run.state, env=env, config=config, contents={}).step == 2
    assert state_hash(run.state) == (work / "hash_one_rank").read_text()
    drawn = gather_objects(torch.rand(1).item())
    assert drawn[0] != drawn[1], "ranks must not share a random stream"


def check_optimizer_states(env: DistEnv, work: Path) -> None:
    """Moments elsewhere: the same trajectory, exact resumes on every mesh and world size."""

    def load(path: Path, run: ToyRun) -> str:
        T.load_checkpoint(path, run.state, env=env, config={}, contents={})
        return state_hash(run.state)

    hashes, states = {}, {}
    with toy_sizes():
        for kind in ("gpu", "host", "8bit"):
            run, folder = ToyRun(env, (1, 2), kind=kind), work / kind
            record = [run.train_step(step) for step in range(2)]
            states[kind] = T.save_checkpoint(
                folder, 2, run.state, env=env, config={}, contents={}, extra={}
            )
            hashes[kind] = state_hash(run.state)
            for shape in MESHES:
                again = ToyRun(env, shape, seed=9, kind=kind)
                assert load(states[kind], again) == hashes[kind], (kind, shape)
                if shape == (1, 2):
                    assert again.train_step(2) == run.train_step(2), (kind, record)
                    assert state_hash(again.state) == state_hash(run.state), kind
            if kind != "gpu":  # the parent test's, of one process
                one = ToyRun(env, (1, 2), seed=9, kind=kind)
                assert (
                    load(work / f"single_{kind}" / "step_0000002", one)
                    == (work / f"hash_one_rank_{kind}").read_text()
                )
        assert hashes["gpu"] == hashes["host"] != hashes["8bit"]
        for kind, other in (("gpu", "host"), ("host", "gpu")):
            assert load(states[kind], ToyRun(env, (2, 1), seed=9, kind=other)) == hashes[kind]
    if env.is_main:
        for kind, text in hashes.items():
            (work / f"hash_two_ranks_{kind}").write_text(text)


CHECKS = (
    check_collectives,
    check_a_gpu_each,
    check_parity,
    check_sampling,
    check_bf16,
    check_loading,
    check_odd_ranks,
    check_checkpoints,
    check_optimizer_states,
)


def main() -> None:
    torch.set_num_threads(1)
    work = Path(sys.argv[1])
    env = init_distributed("cpu", timeout_s=60)
    assert env.world_size == 2
    for check in CHECKS:
        check(env, work)
        barrier(env)
        if env.is_main:
            print(f"ok {check.__name__}", flush=True)
    shutdown()
    leave(0)


if __name__ == "__main__":
    main()
