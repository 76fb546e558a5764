# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""A small model of the student's shape, for the distribution and checkpoint tests.

Two kinds of blocks under one root that owns the embeddings and the head, odd sizes (shards are
uneven), a frozen weight, a computed fp32 table and non-persistent fp32 frequencies, and a forward
that ends in a scalar loss.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from scripts.visual_opsd.config import OptimSettings
from scripts.visual_opsd.processes import DistEnv, all_reduce_sums
from scripts.visual_opsd.training import host_adamw
from scripts.visual_opsd.training import sharding as D
from scripts.visual_opsd.training.checkpoints import TrainingState
from scripts.visual_opsd.training.optimizers import make_optimizer

VOCAB, WIDTH, PATCH, SIDE = 37, 12, 6, 5


class ToyVisionBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(WIDTH, 15)
        self.fc2 = nn.Linear(15, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(F.gelu(self.fc1(x)))


class ToyDecoderBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.ones(WIDTH))
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 17), nn.SiLU(), nn.Linear(17, WIDTH))

    def forward(self, x: Tensor, cos: Tensor) -> Tensor:
        h = F.rms_norm(x, (WIDTH,), self.norm)
        q, k, v = (self.qkv(h) * cos.to(h.dtype).repeat(1, 3)).chunk(3, dim=-1)
        a = F.scaled_dot_product_attention(
            q[None, None], k[None, None], v[None, None], None, 0, True
        )
        x = x + self.out(a[0, 0])
        return x + self.mlp(x)


class ToyModel(nn.Module):
    """(patches (n, PATCH), ids (t,)) -> summed next-token cross-entropy, a scalar."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = {"vocab": VOCAB}
        self.connector = nn.Linear(PATCH, WIDTH)
        self.vision = nn.ModuleList([ToyVisionBlock()])
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList([ToyDecoderBlock() for _ in range(2)])
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.frozen = nn.Parameter(torch.full((WIDTH,), 0.5), requires_grad=False)
        self.table: Tensor
        self.inv_freq: Tensor
        self.register_buffer("table", torch.empty(SIDE, WIDTH))
        self.register_buffer("inv_freq", torch.empty(WIDTH), persistent=False)
        self.gradient_checkpointing = False
        self.to(dtype)
        self.reset_buffers()

    def reset_buffers(self) -> None:
        if self.inv_freq.is_meta:
            return
        self.inv_freq.copy_(0.7 ** torch.arange(WIDTH))
        self.table.copy_(torch.linspace(-1, 1, SIDE * WIDTH).view(SIDE, WIDTH))

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        self.gradient_checkpointing = enabled

    def _run(self, block: nn.Module, *args: Tensor) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)

    def hidden(self, patches: Tensor, ids: Tensor) -> Tensor:
        dtype = self.head.weight.dtype
        image = self.connector(patches.to(dtype)) + self.table[: len(patches)].to(dtype)
        for block in self.vision:
            image = self._run(block, image)
        x = torch.cat([image * self.frozen.to(dtype), self.embed(ids)])
        cos = torch.cos(torch.arange(len(x), device=x.device)[:, None] * self.inv_freq)
        for block in self.layers:
            x = self._run(block, x, cos)
        return x[len(patches) :]

    def forward(self, patches: Tensor, ids: Tensor) -> Tensor:
        logits = self.head(self.hidden(patches, ids)).float()
        return F.cross_entropy(logits[:-1], ids[1:], reduction="sum")


TOY_BLOCKS = (ToyVisionBlock, ToyDecoderBlock)


def toy_model(seed: int = 0, dtype: torch.dtype = torch.float32) -> ToyModel:
    torch.manual_seed(seed)
    return ToyModel(dtype)


def toy_batch(step: int, world_size: int = 2) -> list[tuple[Tensor, Tensor]]:
    """One (patches, ids) a rank; lengths differ between ranks and steps."""
    g = torch.Generator().manual_seed(100 + step)
    rows = []
    for rank in range(world_size):
        patches = torch.randn(2 + rank, PATCH, generator=g)
        ids = torch.randint(VOCAB, (4 + 3 * rank + step % 2,), generator=g)
        rows.append((patches, ids))
    return rows


@torch.inference_mode()
def toy_generate(plain: nn.Module, patches: Tensor, length: int, sample_seed: int) -> list[int]:
    """Sample from a plain module: many calls, random numbers drawn before."""
    model: Any = plain
    uniforms = torch.rand(length, generator=torch.Generator().manual_seed(sample_seed))
    ids = torch.zeros(1, dtype=torch.long)
    for u in uniforms:
        probs = model.head(model.hidden(patches, ids)[-1]).float().softmax(-1)
        token = torch.searchsorted(probs.cumsum(-1), u.reshape(1)).clamp(max=VOCAB - 1)
        ids = torch.cat([ids, token])
    return [int(i) for i in ids[1:]]


def toy_optimizer(params: list[nn.Parameter], kind: str = "gpu") -> torch.optim.Optimizer:
    settings = OptimSettings(lr=1e-2, eps=1e-8, weight_decay=0.01, optimizer_state=kind)
    return make_optimizer(params, settings, torch.device("cpu"))


@contextmanager
def toy_sizes() -> Iterator[None]:
    """Pieces and blocks so small that the toy's weights have several."""
    from scripts.visual_opsd.training import eight_bit_adamw  # importing torchao takes seconds

    with (
        mock.patch.object(host_adamw, "PIECE", 64),
        mock.patch.object(eight_bit_adamw, "SMALLEST_WEIGHT", 64),
        mock.patch.object(eight_bit_adamw, "SMALLEST_BLOCK", 4),
    ):
        yield


class ToyRun:
    """A sharded toy student with EMA, AdamW and a schedule, and one training step."""

    def __init__(
        self, env: DistEnv, shape: tuple[int, int], seed: int = 0, kind: str = "gpu"
    ) -> None:
        self.env = env
        mesh = D.make_mesh(env, "HYBRID_SHARD", num_replicate=shape[0], num_shard=shape[1])
        self.model, self.ema = (
            D.shard_model(
                toy_model(seed), mesh, block_classes=TOY_BLOCKS, param_dtype=torch.float32
            )
            for _ in range(2)
        )
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = toy_optimizer(self.trained, kind)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        D.check_precision(self.model, torch.float32, ema=self.ema)
        self.state = TrainingState(self.model, optimizer, scheduler, self.ema)

    def train_step(self, step: int, weights: tuple[float, ...] = (1.0, 1.0)) -> tuple[float, float]:
        """(global loss, gradient norm); a rank of weight 0 runs its row as a dummy."""
        world = self.env.world_size
        rows = toy_batch(step)
        mine = range(self.env.rank, 2, world)
        tokens = sum(len(ids) - 1 for w, (_, ids) in zip(weights, rows, strict=True) if w != 0)
        loss = sum((weights[i] * self.model(*rows[i]) for i in mine), torch.zeros(())) / tokens
        (loss * world).backward()  # FSDP2 averages over ranks
        norm = D.clip_grad_norm(self.trained, 1.0)
        if torch.isfinite(norm):
            self.state.optimizer.step()
            self.state.scheduler.step()
            D.ema_update(self.ema, self.model, 0.9)
        self.state.optimizer.zero_grad()
        return all_reduce_sums({"loss": loss}, self.env)["loss"], norm.item()


def state_hash(state: TrainingState) -> str:
    """sha256 over the full student, EMA and optimiser: equal only when every bit is."""
    digest = hashlib.sha256()
    assert state.ema is not None
    for model in (state.model, state.ema):
        for key, tensor in model.state_dict().items():
            digest.update(key.encode() + D.full_tensor(tensor).numpy().tobytes())
    for number, tensors in sorted(state.optimizer.state_dict()["state"].items()):
        for key, value in sorted(tensors.items()):
            digest.update(f"{number}.{key}".encode() + D.full_tensor(value).numpy().tobytes())
    return digest.hexdigest()


def expect_error(
    kind: type[Exception] | tuple[type[Exception], ...], text: str, action: Callable[[], object]
) -> None:
    """`action` must raise `kind` with `text` in its message (pytest.raises without pytest)."""
    try:
        action()
    except kind as error:
        assert text in str(error), f"{error!r} lacks {text!r}"
    else:
        raise AssertionError(f"no error with {text!r}")
