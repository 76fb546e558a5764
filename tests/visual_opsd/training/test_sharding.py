# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Sharding in one process (bit-equal to the plain model), and one launch of two processes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from scripts.visual_opsd.processes import DistEnv, init_distributed, shutdown
from scripts.visual_opsd.training import checkpoints as T
from scripts.visual_opsd.training import sharding as D
from tests.visual_opsd.launching import launch
from tests.visual_opsd.training.toy_distributed_model import (
    TOY_BLOCKS,
    ToyModel,
    ToyRun,
    state_hash,
    toy_batch,
    toy_generate,
    toy_model,
    toy_sizes,
)
from tests.visual_opsd.training.two_process_checks import CHECKS

HERE = Path(__file__).parent
CONFIG = {"lr": 0.01, "num_workers": 2, "loss": {"beta": 0.5}}


@pytest.fixture(scope="module")
def env() -> Iterator[DistEnv]:
    yield init_distributed("cpu")
    shutdown()


@pytest.fixture
def sharded(env: DistEnv) -> Any:
    return D.shard_model(
        toy_model(), D.make_mesh(env), block_classes=TOY_BLOCKS, param_dtype=torch.float32
    )


@pytest.mark.parametrize(
    ("world", "local", "options", "expected"),
    [
        (1, 1, {}, (1, 1)),
        (8, 8, {}, (1, 8)),
        (16, 8, {}, (2, 8)),
        (16, 8, {"num_shard": 4}, (4, 4)),
        (16, 8, {"num_replicate": 1}, (1, 16)),
        (16, 8, {"num_shard": 16, "num_replicate": 1}, (1, 16)),
        (4, 4, {"num_shard": 1}, (4, 1)),
        (16, 8, {"sharding_strategy": "FULL_SHARD"}, (1, 16)),
    ],
)
def test_mesh_shape(world: int, local: int, options: dict[str, Any], expected: Any) -> None:
    assert D.mesh_shape(world, local, **options) == expected


@pytest.mark.parametrize(
    ("world", "local", "options", "message"),
    [
        (8, 8, {"num_shard": 3}, r"= 6, but there are 8 processes"),
        (8, 8, {"num_shard": 4, "num_replicate": 4}, r"= 16, but there are 8"),
        (4, 8, {}, r"\(8\) = 0, but there are 4"),
        (2, 2, {"num_shard": 3}, "at most the number of processes, got 3, but there are 2"),
        (8, 8, {"num_replicate": 3}, r"\(3\) x num_shard \(2\) = 6"),
        (8, 8, {"sharding_strategy": "FULL_SHARD", "num_shard": 4}, "FULL_SHARD shards over all"),
    ],
)
def test_mesh_errors(world: int, local: int, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        D.mesh_shape(world, local, **options)


def test_device_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="sees no GPU"):
        init_distributed("cuda")


def test_one_process_is_bit_equal_to_the_plain_model(env: DistEnv, sharded: Any) -> None:
    """Same path as a cluster's, same bits as no sharding at all; sampling changes nothing."""
    plain = toy_model()
    assert [n for n, _ in sharded.named_parameters()] == [n for n, _ in plain.named_parameters()]
    patches = toy_batch(0)[0][0]
    trained = {}
    for label, model in (("sharded", sharded), ("plain", plain)):
        params = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(params, lr=1e-2)
        for step in range(3):
            if label == "sharded":
                with D.summon_full_params(sharded, copy=step == 1) as full:
                    trained[step] = toy_generate(full, patches, 6, step)
            else:
                assert toy_generate(plain, patches, 6, step) == trained[step]
            model(*toy_batch(step)[0]).backward()
            D.clip_grad_norm(params, 1.0)
            optimizer.step()
            optimizer.zero_grad()
    for key, tensor in D.iter_full_state(sharded):
        assert torch.equal(tensor, plain.state_dict()[key]), key


def test_summon_is_zero_copy_and_returns_to_meta(sharded: Any) -> None:
    with D.summon_full_params(sharded) as full:
        assert type(full) is ToyModel and not full.training
        inside = dict(sharded.named_parameters())
        for name, tensor in full.named_parameters():
            assert tensor.data_ptr() == inside[name].data_ptr(), name
        assert full.inv_freq.data_ptr() == sharded.inv_freq.data_ptr()
        with pytest.raises(AssertionError, match="does not nest"), D.summon_full_params(sharded):
            pass
        before = full.head.weight.clone()
        full.head.weight.add_(1)
    assert all(t.is_meta for t in [*full.parameters(), *full.buffers()])
    assert torch.equal(D.full_tensor(sharded.head.weight), before), "writes must be lost"
    with pytest.raises(KeyError), D.summon_full_params(sharded):
        raise KeyError("while sampling")
    assert all(p.is_meta for p in full.parameters())
    # Trainable stays trainable, frozen stays frozen.
    flags = [p.requires_grad for p in sharded.parameters()]
    assert flags == [p.requires_grad for p in toy_model().parameters()]


def test_summon_into_memory_of_its_own(sharded: Any) -> None:
    """As on CUDA: unit by unit, and filled again at the same addresses after a step."""
    with D.summon_full_params(sharded, copy=True) as full:
        for (name, tensor), shard in zip(
            full.named_parameters(), sharded.parameters(), strict=True
        ):
            assert isinstance(shard, DTensor), "nothing stays gathered"
            assert torch.equal(tensor, shard.full_tensor()), name
        buffer: Any = full.inv_freq
        assert buffer.data_ptr() == sharded.inv_freq.data_ptr()
    assert all(t.is_meta for t in full.parameters())
    kept = D.copy_units(sharded)
    addresses = {name: tensor.data_ptr() for name, tensor in kept.items()}
    with torch.no_grad():
        for shard in sharded.parameters():
            shard.to_local().add_(1.0)
    assert D.copy_units(sharded, kept) is kept
    for name, shard in sharded.named_parameters():
        assert torch.equal(kept[name], shard.full_tensor()), name
        assert kept[name].data_ptr() == addresses[name]


def test_summon_misuse(sharded: Any) -> None:
    with (
        torch.inference_mode(),
        pytest.raises(AssertionError, match="outside inference_mode"),
        D.summon_full_params(sharded),
    ):
        pass


def test_a_model_without_blocks(env: DistEnv) -> None:
    mesh = D.make_mesh(env)
    with pytest.raises(AssertionError, match=r"holds no \['Conv2d'\] block"):
        D.shard_model(toy_model(), mesh, block_classes=[nn.Conv2d], param_dtype=torch.float32)


def test_compiled_blocks_keep_names(env: DistEnv, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(self))
    model = D.shard_model(
        toy_model(),
        D.make_mesh(env),
        block_classes=TOY_BLOCKS,
        param_dtype=torch.float32,
        compile_blocks=True,
    )
    assert len(compiled) == 3
    assert list(model.state_dict()) == list(toy_model().state_dict())


def test_precision_contract(env: DistEnv, sharded: Any) -> None:
    D.check_precision(sharded, torch.float32, ema=sharded)
    mesh = D.make_mesh(env)

    def shard(model: nn.Module) -> nn.Module:
        return D.shard_model(model, mesh, block_classes=TOY_BLOCKS, param_dtype=torch.float32)

    toy = toy_model(dtype=torch.bfloat16)
    toy.inv_freq, toy.table = toy.inv_freq.float(), toy.table.float()
    half = shard(toy)
    with pytest.raises(ValueError, match=r"model connector.weight has torch.bfloat16 shards"):
        D.check_precision(half, torch.float32)
    half.requires_grad_(False)
    D.check_precision(half, torch.float32)  # a fixed teacher may be bf16
    with pytest.raises(ValueError, match=r"ema .* has torch.bfloat16 shards.*and \d+ more"):
        D.check_precision(sharded, torch.float32, ema=half)
    with pytest.raises(ValueError, match="is not sharded"):
        D.check_precision(toy_model(), torch.float32)
    with pytest.raises(ValueError, match=r"compute dtype on CPU is torch\.bfloat16"):
        D.check_precision(sharded, torch.bfloat16)
    with pytest.raises(ValueError, match="not supported"):
        D.check_precision(sharded, torch.float16)
    sharded.inv_freq = sharded.inv_freq.bfloat16()
    with pytest.raises(ValueError, match=r"buffer inv_freq is torch\.bfloat16"):
        D.check_precision(sharded, torch.float32)


def test_load_sharded_names_every_problem(env: DistEnv, sharded: Any) -> None:
    weights = toy_model(seed=5).state_dict()
    D.load_sharded(sharded, weights.items())
    assert all(torch.equal(t, weights[k]) for k, t in D.iter_full_state(sharded))
    wrong = dict(weights)
    del wrong["head.weight"]
    wrong["embed.weight"] = wrong["embed.weight"][:5]
    wrong["surplus"] = torch.zeros(1)
    with pytest.raises(ValueError) as caught:
        D.load_sharded(sharded, wrong.items())
    text = str(caught.value)
    assert "missing head.weight" in text and "unexpected surplus" in text
    assert "embed.weight is (5, 12), expected (37, 12)" in text and "table" not in text
    with pytest.raises(AssertionError, match=r"no tensors of these names: \['nothing'\]"):
        list(D.iter_full_state(sharded, ["nothing"]))


def test_cpu_offload_and_full_shard_are_bit_equal_too(env: DistEnv) -> None:
    plain = toy_model()
    mesh = D.make_mesh(env, "FULL_SHARD")
    with torch.device("meta"):
        model: Any = ToyModel()
    D.shard_model(
        model, mesh, block_classes=TOY_BLOCKS, param_dtype=torch.float32, cpu_offload=True
    )
    D.materialise(model, env.device, cpu_offload=True)
    model.reset_buffers()
    D.load_sharded(model, plain.state_dict().items())
    for each in (model, plain):
        params = [p for p in each.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(params, lr=1e-2)
        each(*toy_batch(0)[0]).backward()
        D.clip_grad_norm(params, 1.0)
        optimizer.step()
    for key, tensor in D.iter_full_state(model):
        assert torch.equal(tensor, plain.state_dict()[key]), key


@pytest.mark.slow
def test_two_processes(env: DistEnv, tmp_path: Path) -> None:
    """Everything that needs a second rank, and checkpoints that change the world size."""
    single = ToyRun(env, (1, 1))
    for step in range(2):
        single.train_step(step)
    T.save_checkpoint(
        tmp_path / "single", 2, single.state, env=env, config=CONFIG, contents={}, extra={}
    )
    (tmp_path / "hash_one_rank").write_text(state_hash(single.state))
    with toy_sizes():
        for kind in ("host", "8bit"):
            one = ToyRun(env, (1, 1), kind=kind)
            for step in range(2):
                one.train_step(step)
            T.save_checkpoint(
                tmp_path / f"single_{kind}", 2, one.state,
                env=env, config={}, contents={}, extra={},
            )  # fmt: skip
            (tmp_path / f"hash_one_rank_{kind}").write_text(state_hash(one.state))

    output = launch(2, str(HERE / "two_process_checks.py"), str(tmp_path), timeout=150)
    passed = [line.removeprefix("ok ") for line in output.splitlines() if line.startswith("ok ")]
    assert passed == [check.__name__ for check in CHECKS]

    run = ToyRun(env, (1, 1), seed=96)
    path = tmp_path / "checkpoints" / "superseded" / "step_0000004"
    assert T.load_checkpoint(path, run.state, env=env, config=CONFIG, contents={}).step == 4
    assert state_hash(run.state) == (tmp_path / "hash_two_ranks").read_text()
    with toy_sizes():
        for kind in ("host", "8bit"):
            one = ToyRun(env, (1, 1), seed=96, kind=kind)
            path = tmp_path / kind / "step_0000002"
            T.load_checkpoint(path, one.state, env=env, config={}, contents={})
            assert state_hash(one.state) == (tmp_path / f"hash_two_ranks_{kind}").read_text()
