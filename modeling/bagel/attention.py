# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Attention over packed sequences: the only place that names a backend.

Rule (one sample; i a query, j a key, both positions in the sample): i sees j when
(j <= i, or both lie in the same image block) and (j is in no noise block, or i is in that block).
Text is therefore causal, an image is bidirectional inside and sees everything before it, and a
noised image is seen by nobody but itself.

Backends, chosen by `choose_backend` (override: environment variable VISUAL_OPSD_ATTENTION):
    blocks  our Triton kernels, which follow the layout in one pass; the default on CUDA, bf16/fp16
    varlen  torch >= 2.11 `varlen_attn`; there without Triton, and where `blocks` can't serve
    flash   flash-attn, when importable and asked for by name
    sdpa    torch's scaled_dot_product_attention; CPU, and fp32 on CUDA: with one dense mask for
            short sequences on a CPU ("padded"), else segment by segment ("segments")
varlen, flash and segments make two calls, without a dense mask: one causal call over the rows of
samples that hold text, then one full call whose queries are the image blocks; its rows replace
theirs.
Shapes: q (T, nh, d), k and v (S, nkv, d), T query rows, S = T + cached rows; result (T, nh, d).
"""

from __future__ import annotations

import inspect
import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from modeling import fast

BACKENDS = ("blocks", "varlen", "flash", "sdpa")
# A padded dense mask is quickest for many short sequences on a CPU; beyond this many entries
# (64 MB of booleans) the segment loop is used instead.
_DENSE_MASK_LIMIT = 1 << 26


@dataclass(frozen=True)
class Block:
    """An image: rows [start, end) of its sample's queries; `noise` hides it from other rows."""

    start: int
    end: int
    noise: bool = False


@dataclass(frozen=True)
class _Call:
    """Row indices and lengths of one variable-length call (None = all rows in order)."""

    query_rows: Tensor | None
    key_rows: Tensor | None
    cu_query: Tensor
    cu_key: Tensor
    max_query: int
    max_key: int


@dataclass(frozen=True)
class AttentionLayout:
    """Who attends whom in a packed sequence. Lengths are host integers, indices are cached.

    query_lens: rows of each sample; past_lens: rows of each sample already in the cache, which
    precede its queries in the keys; blocks: images of each sample, relative to its queries.
    """

    query_lens: tuple[int, ...]
    past_lens: tuple[int, ...]
    blocks: tuple[tuple[Block, ...], ...]
    _memo: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def total(self) -> int:
        return sum(self.query_lens)

    @property
    def key_lens(self) -> tuple[int, ...]:
        return tuple(p + n for p, n in zip(self.past_lens, self.query_lens, strict=True))

    def allowed(self, sample: int) -> Tensor:
        """Dense mask of one sample, bool (queries, keys): the definition the backends follow."""
        n, past = self.query_lens[sample], self.past_lens[sample]
        rows = torch.arange(n)[:, None]
        keys = torch.arange(past + n)[None, :] - past
        mask = keys <= rows
        for block in self.blocks[sample]:
            inside_q = (rows >= block.start) & (rows < block.end)
            inside_k = (keys >= block.start) & (keys < block.end)
            mask |= inside_q & inside_k
            if block.noise:
                mask &= ~inside_k | inside_q
        return mask

    @property
    def limits(self) -> list[np.ndarray] | None:
        """How many of its sample's keys each row sees, if all rows see a prefix of them.

        Not so where other rows must not see a noised image that stands before them: None.
        """

        def make() -> list[np.ndarray] | None:
            found = []
            for n, past, blocks in zip(self.query_lens, self.past_lens, self.blocks, strict=True):
                limit = past + np.arange(1, n + 1)
                for block in blocks:
                    if block.noise and block.end < n:
                        return None
                    limit[block.start : block.end] = past + block.end
                found.append(limit)
            return found

        limits: list[np.ndarray] | None = self.memo("limits", make)
        return limits

    def memo(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._memo:
            # A layout may outlive a caller's inference mode, and serve training then.
            with torch.inference_mode(False), torch.no_grad():
                self._memo[key] = make()
        return self._memo[key]


@dataclass(frozen=True)
class DecodeLayout:
    """One query row per sample against a static cache: keys 0..slots[b] of row b are seen."""

    slots: Tensor  # (B,) int64, where the new key was written


@cache
def _varlen() -> Callable[..., Any] | None:
    if find_spec("torch.nn.attention.varlen") is None:
        return None
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn


@cache
def _varlen_has_gqa_flag() -> bool:
    function = _varlen()
    return function is not None and "enable_gqa" in inspect.signature(function).parameters


def _wished_backend(half_on_gpu: bool) -> str:
    """The backend that VISUAL_OPSD_ATTENTION names, as far as it serves; "" if it names none."""
    wish = os.environ.get("VISUAL_OPSD_ATTENTION", "")
    if wish not in ("", *BACKENDS):
        raise ValueError(f"VISUAL_OPSD_ATTENTION={wish!r}: choose one of {', '.join(BACKENDS)}")
    if wish and not half_on_gpu:
        return "sdpa"
    if wish == "blocks" and not fast.has_triton():
        raise ValueError("VISUAL_OPSD_ATTENTION=blocks, but Triton is not installed")
    if wish == "flash" and find_spec("flash_attn") is None:
        raise ValueError("VISUAL_OPSD_ATTENTION=flash, but flash-attn is not installed")
    return wish


def choose_backend(x: Tensor, layout: AttentionLayout, *, compiled: bool = False) -> str:
    """Name of the backend for queries of x's device and dtype; sdpa as "padded" or "segments".

    compiled: by torch, which our kernels would stop.

    Raises:
        ValueError: VISUAL_OPSD_ATTENTION names an unknown or unusable backend.
    """
    half_on_gpu = x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)
    backend = _wished_backend(half_on_gpu)
    if not backend and not compiled and fast.runs_kernels("attention", x):
        backend = "blocks"
    elif not backend:
        flash = half_on_gpu and fast.is_ampere(x.device.index) and _varlen() is not None
        backend = "varlen" if flash else "sdpa"
    if backend == "blocks" and layout.limits is None:
        backend = "varlen" if _varlen() is not None else "sdpa"
    if backend != "sdpa":
        return backend
    widest = max(layout.query_lens) * max(layout.key_lens) * len(layout.query_lens)
    return "segments" if x.is_cuda or widest > _DENSE_MASK_LIMIT else "padded"


def fits_graphs(backend: str) -> bool:
    """Whether attention reads nothing back, as a CUDA graph needs it."""
    return backend in ("blocks", "varlen", "flash")


def attend(
    q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout | DecodeLayout, backend: str
) -> Tensor:
    """Scaled dot-product attention under `layout`; grouped key/value heads are shared.

    Args:
        q: (T, nh, d). k, v: (S, nkv, d), each sample's cached rows then its new ones; with a
            DecodeLayout T is the batch size and k, v are the static cache (B, M, nkv, d).
        backend: of `choose_backend`; a DecodeLayout needs none.

    Returns:
        (T, nh, d) in q's dtype.
    """
    if isinstance(layout, DecodeLayout):
        return _attend_decode(q, k, v, layout.slots)
    assert q.shape[0] == layout.total, (q.shape, layout.query_lens)
    assert k.shape[0] == sum(layout.key_lens), (k.shape, layout.key_lens)
    if backend == "blocks":
        return _attend_blocks(q, k, v, layout)
    if backend == "padded":
        return _attend_padded(q, k, v, layout)
    return _attend_in_two_calls(q, k, v, layout, backend)


def _attend_decode(q: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> Tensor:
    batch, heads, dim = q.shape
    groups = k.shape[2]
    # The query heads of a group become query rows of one key head, so nothing is repeated.
    q = q.view(batch, groups, heads // groups, dim)
    slots = slots.to(q.device)  # elsewhere only if the model is spread over several devices
    seen = torch.arange(k.shape[1], device=q.device) <= slots[:, None]  # (B, M)
    out = F.scaled_dot_product_attention(
        q, k.transpose(1, 2), v.transpose(1, 2), attn_mask=seen[:, None, None, :]
    )
    return out.reshape(batch, heads, dim)


def _attend_blocks(q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout) -> Tensor:
    from modeling.kernels.block_attention import block_attention, make_plan

    def make() -> Any:
        assert layout.limits is not None
        first_keys = np.cumsum([0, *layout.key_lens])[:-1].tolist()
        return make_plan(layout.limits, first_keys, q.device, layout.key_lens)

    return block_attention(q, k, v, layout.memo(("blocks", q.device), make))


def attend_in_place(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    layout: AttentionLayout,
    starts: Sequence[int],
    order: Tensor | None,
) -> Tensor:
    """`attend` by blocks over keys that stay where a cache has them, for queries in any order.

    Args:
        q: (T, nh, d). keys, values: (R, nkv, d). starts: first row of each sample in them.
        order: (T,) int64, the packed row of each query, rising but for a few jumps; None: as
            packed.

    Returns:
        (T, nh, d), in the order of q.
    """
    from modeling.kernels.block_attention import block_attention, make_plan

    def make() -> Any:
        assert layout.limits is not None
        rows = np.arange(layout.total) if order is None else order.cpu().numpy()
        samples = np.repeat(np.arange(len(layout.query_lens)), layout.query_lens)[rows]
        jumps = (np.diff(samples) != 0) | (np.diff(rows) < 0)
        runs = np.split(np.arange(layout.total), np.flatnonzero(jumps) + 1)
        limits = np.concatenate(layout.limits)[rows]
        first_keys = [starts[samples[run[0]]] for run in runs]
        return make_plan([limits[run] for run in runs], first_keys, q.device)

    key = ("in place", q.device, tuple(starts), order is None)
    return block_attention(q, keys, values, layout.memo(key, make))


# ------------------------------------------------------------------ two variable-length calls


def _as_call(
    layout: AttentionLayout, parts: list[tuple[np.ndarray, np.ndarray]], device: torch.device
) -> _Call | None:
    """One call from (query rows, key rows) of each part; None when there is nothing to do."""
    if not parts:
        return None
    lens_q = [len(rows) for rows, _ in parts]
    lens_k = [len(rows) for _, rows in parts]

    def on_device(values: Any, dtype: torch.dtype) -> Tensor:
        return torch.as_tensor(np.asarray(values), dtype=dtype).to(device)

    def rows(arrays: list[np.ndarray], total: int) -> Tensor | None:
        joined = np.concatenate(arrays)
        if len(joined) == total and np.array_equal(joined, np.arange(total)):
            return None
        return on_device(joined, torch.int64)

    return _Call(
        query_rows=rows([part[0] for part in parts], layout.total),
        key_rows=rows([part[1] for part in parts], sum(layout.key_lens)),
        cu_query=on_device(np.cumsum([0, *lens_q]), torch.int32),
        cu_key=on_device(np.cumsum([0, *lens_k]), torch.int32),
        max_query=max(lens_q),
        max_key=max(lens_k),
    )


def _parts(layout: AttentionLayout) -> tuple[list[Any], list[Any]]:
    """(causal parts, full parts), each a list of (query rows, key rows)."""
    causal, full = [], []
    query_start = key_start = 0
    for n, past, blocks in zip(layout.query_lens, layout.past_lens, layout.blocks, strict=True):
        visible = np.ones(n, dtype=bool)
        for block in blocks:
            if block.noise:
                visible[block.start : block.end] = False
        chunk = np.flatnonzero(visible)
        before = np.arange(key_start, key_start + past)
        if sum(block.end - block.start for block in blocks) < n:  # some row is text
            causal.append((query_start + chunk, np.concatenate([before, key_start + past + chunk])))
        for block in blocks:
            own = np.arange(block.start, block.end)
            earlier = chunk[chunk < block.start]
            keys = np.concatenate([before, key_start + past + np.concatenate([earlier, own])])
            full.append((query_start + own, keys))
        query_start += n
        key_start += past + n
    return causal, full


def _calls(layout: AttentionLayout, device: torch.device) -> tuple[_Call | None, _Call | None]:
    def make() -> tuple[_Call | None, _Call | None]:
        causal, full = _parts(layout)
        return _as_call(layout, causal, device), _as_call(layout, full, device)

    result: tuple[_Call | None, _Call | None] = layout.memo(("calls", device), make)
    return result


def _one_call(q: Tensor, k: Tensor, v: Tensor, call: _Call, causal: bool, backend: str) -> Tensor:
    if backend == "segments":
        return _call_by_segment(q, k, v, call, causal)
    arguments = (q, k, v, call.cu_query, call.cu_key, call.max_query, call.max_key)
    if backend == "flash":
        from flash_attn import flash_attn_varlen_func

        return flash_attn_varlen_func(*arguments, causal=causal)
    function = _varlen()
    assert function is not None
    extra: dict[str, Any] = {"window_size": (-1, 0) if causal else (-1, -1)}
    if _varlen_has_gqa_flag():
        extra["enable_gqa"] = q.shape[1] != k.shape[1]
    return function(*arguments, **extra)


def _call_by_segment(q: Tensor, k: Tensor, v: Tensor, call: _Call, causal: bool) -> Tensor:
    bounds = list(zip(call.cu_query.tolist(), call.cu_key.tolist(), strict=True))
    outs = []
    for (q0, k0), (q1, k1) in itertools.pairwise(bounds):
        mask = causal_lower_right(q1 - q0, k1 - k0) if causal else None
        outs.append(_sdpa(q[None, q0:q1], k[None, k0:k1], v[None, k0:k1], mask)[0])
    return torch.cat(outs)


def _attend_in_two_calls(
    q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout, backend: str
) -> Tensor:
    """The causal call, then the image blocks, whose rows replace the causal call's."""
    out: Tensor | None = None
    for call, causal in zip(_calls(layout, q.device), (True, False), strict=True):
        if call is None:
            continue
        q_part = q if call.query_rows is None else q.index_select(0, call.query_rows)
        k_part = k if call.key_rows is None else k.index_select(0, call.key_rows)
        v_part = v if call.key_rows is None else v.index_select(0, call.key_rows)
        part = _one_call(q_part, k_part, v_part, call, causal, backend)
        if call.query_rows is None:
            out = part
        else:
            out = torch.zeros_like(q) if out is None else out
            out = out.index_copy(0, call.query_rows, part)
    return torch.zeros_like(q) if out is None else out


# ------------------------------------------------------------------ padded SDPA, short sequences


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """(B, T, nh, d) x (B, S, nkv, d) -> (B, T, nh, d)."""
    repeat = q.shape[2] // k.shape[2]
    if repeat > 1:  # CausalBias refuses enable_gqa, so heads are repeated on this small path
        k, v = k.repeat_interleave(repeat, dim=2), v.repeat_interleave(repeat, dim=2)
    return F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask
    ).transpose(1, 2)


def _padding(lens: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """(B, max) row of each padded position (0 where empty) and (T,) padded position of each row."""
    width = max(lens)
    starts = np.cumsum([0, *lens])[:-1]
    gather = np.zeros((len(lens), width), dtype=np.int64)
    for b, (start, n) in enumerate(zip(starts, lens, strict=True)):
        gather[b, :n] = np.arange(start, start + n)
    scatter = np.concatenate([b * width + np.arange(n) for b, n in enumerate(lens)])
    return torch.from_numpy(gather), torch.from_numpy(scatter)


def _padded_indices(layout: AttentionLayout, device: torch.device) -> tuple[Tensor, ...]:
    query_gather, query_scatter = _padding(layout.query_lens)
    key_gather, _ = _padding(layout.key_lens)
    mask = torch.zeros(len(layout.query_lens), query_gather.shape[1], key_gather.shape[1])
    mask = mask.bool()
    mask[:, :, 0] = True  # an empty query row must see something, or softmax gives NaN
    for b in range(len(layout.query_lens)):
        allowed = layout.allowed(b)
        mask[b, : allowed.shape[0], : allowed.shape[1]] = allowed
    return tuple(x.to(device) for x in (query_gather, query_scatter, key_gather, mask[:, None]))


def _attend_padded(q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout) -> Tensor:
    query_gather, query_scatter, key_gather, mask = layout.memo(
        ("padded", q.device), lambda: _padded_indices(layout, q.device)
    )
    out = _sdpa(q[query_gather], k[key_gather], v[key_gather], mask)
    return out.flatten(0, 1)[query_scatter]
