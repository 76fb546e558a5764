# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Writing sharded tensors (torch.distributed.checkpoint) with little host memory.

Left alone, its writer copies tensors from a GPU into pinned memory, which torch never gives back,
and keeps every copy until the file is closed: as much host memory as the state is large. Here a
tensor is written in pieces of at most PIECE_BYTES, and each copy is given back when the next one
is made. Reading holds the piece at hand and the one before, so no more than two.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.state_dict_saver import save

PIECE_BYTES = 2**29


def save_sharded_state(tensors: Mapping[str, Any], folder: Path) -> None:
    """Write a (nested) state dict and flush it to disk; called by all ranks.

    Any torch.distributed.checkpoint reads it. Takes PIECE_BYTES of host memory at most, or one row
    of a tensor whose rows are larger.

    Raises:
        CheckpointException: on all ranks, with what failed on each.
    """
    # One thread that copies nothing ahead: the planner's copy is in use until it asks for another.
    writer = FileSystemWriter(folder, thread_count=1, per_thread_copy_ahead=0)
    save(dict(tensors), storage_writer=writer, planner=_PieceByPiece())


def _nbytes(data: TensorWriteData) -> int:
    return math.prod(data.chunk.sizes) * data.properties.dtype.itemsize


class _PieceByPiece(DefaultSavePlanner):
    """Cuts large shards along their rows, and lends the writer one pageable copy at a time."""

    def __init__(self) -> None:
        super().__init__()
        # Of a piece: the shard it is cut from, and its first row in that.
        self._cut_from: dict[MetadataIndex, tuple[MetadataIndex, int]] = {}
        self._lent: Tensor | None = None

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        self.plan = replace(plan, items=[piece for i in plan.items for piece in self._cut(i)])
        return self.plan

    def _cut(self, item: WriteItem) -> Iterator[WriteItem]:
        data = item.tensor_data
        if data is None or not data.chunk.sizes or _nbytes(data) <= PIECE_BYTES:
            yield item
            return
        (first, *offsets), (rows, *sizes) = data.chunk.offsets, data.chunk.sizes
        step = max(PIECE_BYTES * rows // _nbytes(data), 1)
        for start in range(0, rows, step):
            chunk = ChunkStorageMetadata(
                torch.Size([first + start, *offsets]),
                torch.Size([min(step, rows - start), *sizes]),
            )
            index = MetadataIndex(item.index.fqn, chunk.offsets)
            self._cut_from[index] = item.index, start
            yield WriteItem(index, WriteItemType.SHARD, tensor_data=replace(data, chunk=chunk))

    def resolve_data(self, write_item: WriteItem) -> Tensor | BytesIO:
        if self._lent is not None:
            # The writer is done with it but keeps a reference, so the memory itself must go.
            self._lent.untyped_storage().resize_(0)
            self._lent = None
        if write_item.tensor_data is None:
            return super().resolve_data(write_item)
        source, start = self._cut_from.get(write_item.index, (write_item.index, None))
        shard = super().resolve_data(replace(write_item, index=source))
        assert isinstance(shard, Tensor)
        shard = shard.detach()
        assert type(shard) is Tensor, f"{type(shard).__name__}: a copy would be saved, not itself"
        if start is not None:
            shard = shard.narrow(0, start, write_item.tensor_data.chunk.sizes[0])
        self._lent = torch.empty(shard.shape, dtype=shard.dtype, device="cpu")
        return self._lent.copy_(shard)
