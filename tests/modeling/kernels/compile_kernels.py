# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Compile every Triton kernel at the true size for a GPU that need not be here.

    python -m tests.modeling.kernels.compile_kernels 86 101376

The arguments are a compute capability (8.6) and the shared memory that one program may have there,
in bytes. One JSON line for each launch: the kernel's name and the shared memory it takes. Nothing
runs: the wrappers are called as by the model, on tensors of zeros, and a launch ends where the
machine code is made.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from modeling.bagel.attention import AttentionLayout, Block
from modeling.kernels import block_attention, decode_attention, rows, sampling, stream_linear
from scripts.visual_opsd.loss import kernels as loss_kernels
from scripts.visual_opsd.loss import sparse_products as loss_products
from scripts.visual_opsd.opsd_loss import LossConfig

HIDDEN, INTERMEDIATE, VOCAB, HEADS, KV_HEADS, DIM = 3584, 18944, 152064, 28, 4, 128
QKV = (HEADS + 2 * KV_HEADS) * DIM


class AbsentGPU:
    """What Triton asks a driver for while it compiles."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def products(capability: int) -> None:
    """Every product of a decoding step, for every class of batches that has tiles of its own."""
    qkv, square = empty(QKV, HIDDEN), empty(HIDDEN, HEADS * DIM)
    gate, down, head = (
        empty(INTERMEDIATE, HIDDEN),
        empty(HIDDEN, INTERMEDIATE),
        empty(VOCAB, HIDDEN),
    )
    for count in (1, 8, 16, 32, 64):
        for chained in {False, capability >= 90 and count <= 8}:
            norm: dict[str, Any] = {"gain": empty(HIDDEN), "chained": chained}
            x = empty(count, HIDDEN)
            onto: dict[str, Any] = {"residual": x, "out": x, "chained": chained}
            stream_linear.stream_linear(x, qkv, bias=empty(QKV), **norm)
            stream_linear.stream_linear(empty(count, HEADS * DIM), square, **onto)
            stream_linear.stream_linear(x, gate, second=gate, **norm)
            stream_linear.stream_linear(empty(count, INTERMEDIATE), down, **onto)
            stream_linear.stream_linear(x, head, **norm)


def decoding(capability: int) -> None:
    """Attention to the cache for short and long ones, and the choice of a token."""
    for batch, length in ((1, 512), (1, 8192), (8, 2048), (64, 4096)):
        attention = decode_attention.DecodeAttention(
            batch, length, HEADS, KV_HEADS, DIM, empty(length, DIM // 2), empty(length, DIM // 2)
        )
        where = torch.zeros(batch, dtype=torch.int64)
        cached = empty(batch, length, KV_HEADS, DIM)
        attention(
            empty(batch, QKV), empty(DIM), empty(DIM), 1e-6, where, where, cached, cached,
            out=empty(batch, HEADS * DIM), chained=capability >= 90 and batch <= 8,
        )  # fmt: skip
        for uniforms in (None, empty(batch, dtype=torch.float32)):
            sampling.choose_token(empty(batch, VOCAB), 0.7, uniforms)


def prompts(_: int) -> None:
    """Norms, rotary embedding and SwiGLU of rows, forward and backward."""
    count = 300
    for width in (HIDDEN, 1152):
        x, weight = (t.requires_grad_() for t in (empty(count, width), empty(width)))
        rows.rms_norm(x, weight, 1e-6).backward(empty(count, width))
    q, k, v = (empty(count, QKV)[:, :n].unflatten(1, (-1, DIM)) for n in (3584, 512, 512))
    angles = empty(count, DIM // 2)
    norms = empty(DIM), empty(DIM)
    a, b, c, d = (t.detach().requires_grad_() for t in (q, k, *norms))
    turned = rows.norm_rotary(a, b, c, d, angles, angles, 1e-6)
    torch.autograd.backward(turned, [torch.empty_like(t) for t in turned])
    cached = empty(2048, KV_HEADS, DIM)
    places = torch.zeros(count, dtype=torch.int64)
    rows.place_rows(
        q, k, v, *norms, angles, angles, 1e-6, places, torch.empty_like(q), cached, cached
    )
    gate, up = (empty(count, INTERMEDIATE).requires_grad_() for _ in range(2))
    rows.silu_mul(gate, up).backward(empty(count, INTERMEDIATE))


def attention(_: int) -> None:
    """Of the decoder and of the ViT, whose heads are no power of two; forward and backward."""
    for heads, kv_heads, dim in ((HEADS, KV_HEADS, DIM), (16, 16, 72)):
        layout = AttentionLayout((300,), (0,), ((Block(20, 150),),))
        assert layout.limits is not None
        plan = block_attention.make_plan(layout.limits, [0], torch.device("cpu"), layout.key_lens)
        q, k, v = (empty(300, n, dim).requires_grad_() for n in (heads, kv_heads, kv_heads))
        block_attention.block_attention(q, k, v, plan).backward(empty(300, heads, dim))


def losses(_: int) -> None:
    """Every kind of divergence and every clip, on which the loss's kernels are specialised."""
    count = 4
    logits, labels = empty(count, VOCAB), torch.zeros(count, dtype=torch.int64)
    numbers, norm = empty(count, dtype=torch.float32), empty(count, 3, dtype=torch.float32)
    for temperature in (1.0, 2.0):
        loss_kernels.row_statistics(logits, temperature)
        loss_kernels.statistics_and_top_k(logits, temperature, 256)
    index, log_t = labels[:, None].expand(count, 256).contiguous(), numbers[:, None].expand(-1, 256)
    clips: tuple[dict[str, Any], ...]
    clips = ({"token_clip": None}, {"clip_scope": "entry"}, {"clip_scope": "token"})
    for beta, clip in zip((0.0, 0.5, 1.0), clips, strict=True):
        config = LossConfig(beta=beta, **clip)
        loss_kernels.divergence_on_support(logits, index, log_t.contiguous(), numbers, config)
        loss_kernels.full_divergence(logits, logits, norm, norm, config)
        loss_kernels.write_gradient(
            logits, config, labels, norm, ce_weight=numbers, pull=numbers,
            teacher=logits, teacher_norm=norm, slope_sum=numbers,
        )  # fmt: skip
    loss_kernels.write_gradient(logits, LossConfig(), labels, norm, pull=numbers)
    loss_kernels.write_gradient(logits, LossConfig(), labels, norm, ce_weight=numbers)
    hidden, values = empty(count, HIDDEN), empty(count, 256, dtype=torch.float32)
    loss_products.sparse_times_head(values, index, empty(VOCAB, HIDDEN), hidden)
    loss_products.sparse_times_hidden(values, index, hidden, VOCAB)
    loss_products.scale_(hidden, numbers[:1])


def compile_all(capability: int, shared: int) -> None:
    changes = [
        (torch, "empty", torch.zeros),  # what a kernel would have filled is an index somewhere
        (Tensor, "is_cuda", property(lambda _: True)),
        (stream_linear, "_shared_memory", lambda _: shared),
    ]
    for where, name, value in changes:
        setattr(where, name, value)
    driver.set_active(AbsentGPU(capability))
    launch: Callable[..., Any] = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **flags: Any) -> Any:
        made = launch(self, *args, grid=grid, warmup=True, **flags)
        print(json.dumps({"kernel": self.__name__, "shared": made.metadata.shared}))
        return made

    JITFunction.run = compile_only
    for group in (products, decoding, prompts, attention, losses):
        group(capability)


if __name__ == "__main__":
    assert not triton.knobs.runtime.interpret, "unset TRITON_INTERPRET"
    compile_all(int(sys.argv[1]), int(sys.argv[2]))
