# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""AdamW with its moments in host memory and in 8 bits. On two ranks: two_process_checks.py."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from modeling.bagel.bagel import Bagel
from scripts.bench.common import TRUE_SIZE
from scripts.visual_opsd.config import OptimSettings, TrainConfig
from scripts.visual_opsd.processes import DistEnv, init_distributed, shutdown
from scripts.visual_opsd.run_config import RunSettings
from scripts.visual_opsd.training import checkpoints as T
from scripts.visual_opsd.training import host_adamw
from scripts.visual_opsd.training.host_adamw import HostAdamW, plan_blocks
from scripts.visual_opsd.training.sharding import local_part, make_mesh
from scripts.visual_opsd.training.state_keeper import is_finite
from tests.visual_opsd.training.toy_distributed_model import ToyRun, state_hash, toy_sizes

KINDS = ("gpu", "host", "8bit")
SETTINGS: dict[str, Any] = {"contents": {}, "extra": {}}


@pytest.fixture
def env() -> Iterator[DistEnv]:
    yield init_distributed("cpu")
    shutdown()


@pytest.fixture
def small() -> Iterator[None]:
    with toy_sizes():
        yield


def shards(env: DistEnv, tensors: list[Tensor]) -> list[Any]:
    mesh = make_mesh(env)
    made = [DTensor.from_local(t.clone(), mesh, [Shard(0)]) for t in tensors]
    return [nn.Parameter(tensor) for tensor in made]


def give_gradients(parameters: list[Any], gradients: list[Tensor]) -> None:
    for p, gradient in zip(parameters, gradients, strict=True):
        p.grad = DTensor.from_local(gradient.clone(), p.device_mesh, p.placements)


# ------------------------------------------------------------------------------------- host


def test_host_follows_torch_to_the_last_bit(env: DistEnv, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces that end within a shard, decay, a schedule, a weight that has no gradient."""
    monkeypatch.setattr(host_adamw, "PIECE", 64)
    torch.manual_seed(0)
    start = [torch.randn(shape) for shape in ((33, 7), (5,), (3, 50), (4, 4), (0, 3))]
    settings: dict[str, Any] = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-15, "weight_decay": 0.3}
    found = []
    for kind in (torch.optim.AdamW, HostAdamW):
        parameters = shards(env, start)
        optimizer = kind(parameters, **settings)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
        g = torch.Generator().manual_seed(1)
        for _ in range(6):
            give_gradients(parameters, [torch.randn(t.shape, generator=g) for t in start])
            parameters[3].grad = None
            optimizer.step()
            schedule.step()
        tensors = [
            tensor.to_local() if isinstance(tensor, DTensor) else tensor
            for p in parameters
            for tensor in (p.detach(), *(v for _, v in sorted(optimizer.state[p].items())))
        ]
        found.append(tensors)
        if kind is HostAdamW:  # torch makes no state where there is no gradient
            place = 4 * 3 + 1
            assert not any(t.any() for t in tensors[place : place + 3])
            del tensors[place : place + 3]
    assert len(found[0]) == len(found[1])
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


def test_pinned_blocks_hold_everything_and_waste_little() -> None:
    with torch.device("meta"):
        true = [4 * p.numel() for p in Bagel(TRUE_SIZE).parameters() for _ in range(2)]
    for sizes in ([1, 0, 700, 5], true):
        blocks = plan_blocks(sizes)
        places = sorted(i for _, block in blocks for i, _ in block)
        assert places == list(range(len(sizes)))
        for size, block in blocks:
            assert size & (size - 1) == 0, "torch would round it up"
            end = 0
            for i, start in sorted(block, key=lambda place: place[1]):
                assert start >= end and start % 512 == 0
                end = start + sizes[i]
            assert end <= size
    assert sum(size for size, _ in blocks) < 1.01 * sum(true)


def test_carved_tensors_have_storages_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda *size, pin_memory, **rest: empty(*size, **rest).fill_(7)
    )
    made = host_adamw.pinned_zeros([3, 200, 0, 77])
    assert [len(tensor) for tensor in made] == [3, 200, 0, 77]
    for number, tensor in enumerate(made):
        assert not tensor.any()
        assert tensor.untyped_storage().nbytes() == 4 * len(tensor)
        tensor.fill_(number)
    assert [set(tensor.tolist()) for tensor in made] == [{0}, {1}, set(), {3}]


# ------------------------------------------------------------------------------------ 8 bits


def test_which_weights_are_quantised_hangs_on_whole_shapes() -> None:
    from scripts.visual_opsd.training.eight_bit_adamw import block_size

    expected = {
        (152064, 3584): 256, (3584, 18944): 256, (4304, 1152): 128, (1152, 4304): 16,
        (3584,): None, (5000,): None, (63, 64): None, (64, 64): 64, (1152, 588): None,
        (1152, 3, 32): 32,
    }  # fmt: skip
    assert {shape: block_size(shape) for shape in expected} == expected


def test_eight_bits_follow_adamw(env: DistEnv) -> None:
    """The first update is AdamW's, the next ones differ by what 8 bits lose; odd shapes too."""
    from scripts.visual_opsd.training.eight_bit_adamw import EightBitAdamW

    torch.manual_seed(0)
    start = [torch.randn(shape) for shape in ((64, 256), (48, 3, 32), (7,), (5, 3), (1, 1))]
    settings: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-15, "weight_decay": 0.1}
    weights = {}
    for kind in (torch.optim.AdamW, EightBitAdamW):
        parameters = shards(env, start)
        optimizer = kind(parameters, **settings)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
        g = torch.Generator().manual_seed(1)
        for step in range(8):
            give_gradients(parameters, [torch.randn(t.shape, generator=g) for t in start])
            optimizer.step()
            schedule.step()
            weights[kind, step] = [p.to_local().detach().clone() for p in parameters]
    for step, bound in ((0, 1e-4), (7, 0.1)):
        pairs = zip(weights[torch.optim.AdamW, step], weights[EightBitAdamW, step], start,
                    strict=True)  # fmt: skip
        for exact, ours, first in pairs:
            assert (ours - exact).norm() < bound * (exact - first).norm(), (step, first.shape)
    assert (
        optimizer.param_groups[0]["lr"] == 1e-3 / 2**8
    )  # a number, as schedules and states want it
    assert optimizer.state_dict()["state"][0]["exp_avg.codes"].dtype == torch.uint8


def test_a_small_second_moment_does_not_become_zero(env: DistEnv) -> None:
    """Gradients of very different size in a block, the smallest of them often zero, eps 1e-15."""
    from scripts.visual_opsd.training.eight_bit_adamw import EightBitAdamW

    g = torch.Generator().manual_seed(0)
    size = 10 ** (-3 - 6 * torch.rand(16, 256, generator=g))
    (weight,) = shards(env, [torch.zeros(16, 256)])
    optimizer = EightBitAdamW([weight], lr=1.0, betas=(0.9, 0.95), eps=1e-15, weight_decay=0.0)
    before, largest = weight.to_local().detach().clone(), 0.0
    for step in range(12):
        gradient = size * torch.randn(16, 256, generator=g)
        gradient[:, ::3] *= step % 4 == 0
        give_gradients([weight], [gradient])
        optimizer.step()
        now = weight.to_local().detach().clone()
        largest, before = max(largest, float((now - before).abs().max())), now
    assert largest < 3, "torchao's own table gives 1e8 times the learning rate"


# ------------------------------------------------------------------------------- all of them


@pytest.mark.parametrize("kind", KINDS)
def test_states_resume_exactly_and_must_be_finite(
    env: DistEnv, small: None, tmp_path: Path, kind: str
) -> None:
    run = ToyRun(env, (1, 1), kind=kind)
    run.train_step(0)
    path = T.save_checkpoint(tmp_path, 1, run.state, env=env, config={}, **SETTINGS)
    other = ToyRun(env, (1, 1), seed=9, kind=kind)
    T.load_checkpoint(path, other.state, env=env, config={}, contents={})
    memory = pointers(other) if kind != "gpu" else None
    for step in (1, 2):
        assert other.train_step(step) == run.train_step(step)
    assert state_hash(other.state) == state_hash(run.state)
    assert memory is None or memory == pointers(other)
    # Another way in: torch's own dictionary, with other memory.
    saved = run.state.optimizer.state_dict()
    third = ToyRun(env, (1, 1), seed=9, kind=kind)
    third.train_step(0)
    third.state.optimizer.load_state_dict(saved)
    assert third.state.optimizer.param_groups[0]["lr"] == run.state.optimizer.param_groups[0]["lr"]
    third.model.load_state_dict(run.model.state_dict())
    assert third.train_step(3) == run.train_step(3)
    ours, theirs = (r.state.optimizer.state_dict()["state"] for r in (third, run))
    for number, tensors in theirs.items():
        for name, tensor in tensors.items():
            assert torch.equal(local_part(ours[number][name]), local_part(tensor)), name
    assert is_finite(run.state, env)
    for p in run.trained:
        p.grad = torch.full_like(p, float("nan"))
    run.state.optimizer.param_groups[0]["lr"] = 0.0
    with torch.no_grad():
        kept = [p.to_local().clone() for p in run.trained]  # type: ignore[attr-defined]
        run.state.optimizer.step()
        for p, weight in zip(run.trained, kept, strict=True):
            p.to_local().copy_(weight)  # type: ignore[attr-defined]
    assert not is_finite(run.state, env)


def pointers(run: ToyRun) -> list[int]:
    states = run.state.optimizer.state_dict()["state"].values()
    return [t.to_local().data_ptr() for s in states for t in s.values() if isinstance(t, DTensor)]


def test_another_kind_of_state(env: DistEnv, small: None, tmp_path: Path) -> None:
    """gpu and host read each other's states; 8bit is refused against both, before loading."""
    configs: dict[str, Any] = {k: {"optim": {"lr": 1.0, "optimizer_state": k}} for k in KINDS}
    runs = {kind: ToyRun(env, (1, 1), kind=kind) for kind in KINDS}
    paths = {}
    for kind, run in runs.items():
        run.train_step(0)
        paths[kind] = T.save_checkpoint(
            tmp_path / kind, 1, run.state, env=env, config=configs[kind], **SETTINGS
        )
    for saved, now in (("gpu", "host"), ("host", "gpu")):
        other = ToyRun(env, (1, 1), seed=9, kind=now)
        T.load_checkpoint(paths[saved], other.state, env=env, config=configs[now], contents={})
        assert state_hash(other.state) == state_hash(runs[saved].state)
    for saved, now in (("gpu", "8bit"), ("8bit", "host")):
        with pytest.raises(ValueError, match=r"optim\.optimizer_state: saved .*8bit"):
            T.check_resumable(paths[saved], config=configs[now], contents={})
    old: dict[str, Any] = {"optim": {"lr": 1.0}}  # from before there was a choice
    path = T.save_checkpoint(
        tmp_path / "old", 1, runs["gpu"].state, env=env, config=old, **SETTINGS
    )
    for now in ("gpu", "host"):
        T.check_resumable(path, config=configs[now], contents={})
    with pytest.raises(ValueError, match=r"optim\.optimizer_state: saved .*8bit"):
        T.check_resumable(path, config=configs["8bit"], contents={})
    with pytest.raises(ValueError, match="saved with another --optimizer_state"):
        runs["8bit"].state.optimizer.load_state_dict(runs["gpu"].state.optimizer.state_dict())


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("host", "8bit"):
        with pytest.raises(ValueError, match=f"does not go with --optimizer_state {kind}"):
            TrainConfig(
                optim=OptimSettings(optimizer_state=kind), run=RunSettings(cpu_offload=True)
            )
    TrainConfig(run=RunSettings(cpu_offload=True))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    OptimSettings(optimizer_state="host")
    with pytest.raises(ValueError, match="pip install 'torchao>="):
        OptimSettings(optimizer_state="8bit")


# ------------------------------------------------------------------------------------ a GPU


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pinned moments in the ring of slots agree with torch's AdamW; 8 bits, compiled, nearly."""
    from scripts.visual_opsd.training.eight_bit_adamw import EightBitAdamW

    monkeypatch.setattr(host_adamw, "PIECE", 1000)
    env = init_distributed("cuda")
    try:
        torch.manual_seed(0)
        start = [torch.randn(shape, device="cuda") for shape in ((64, 256), (77,), (300, 64))]
        settings: dict[str, Any] = {
            "lr": 1e-3,
            "betas": (0.9, 0.95),
            "eps": 1e-15,
            "weight_decay": 0.1,
        }
        found = {}
        for kind in (torch.optim.AdamW, HostAdamW, EightBitAdamW):
            parameters = shards(env, start)
            optimizer = kind(parameters, **settings)
            g = torch.Generator("cuda").manual_seed(1)
            for _ in range(5):
                made = [torch.randn(t.shape, generator=g, device="cuda") for t in start]
                give_gradients(parameters, made)
                optimizer.step()
            if kind is HostAdamW:
                for p in parameters:
                    moment = optimizer.state[p]["exp_avg"]
                    assert moment.to_local().is_pinned() and p.is_cuda
                    assert moment.device_mesh == p.device_mesh
            found[kind] = [p.to_local().detach() for p in parameters]
        for exact, host, eight, first in zip(*found.values(), start, strict=True):
            torch.testing.assert_close(host, exact, rtol=1e-6, atol=1e-7)
            assert (eight - exact).norm() < 0.1 * (exact - first).norm()
    finally:
        shutdown()
