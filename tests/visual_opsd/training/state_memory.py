# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Save a training state and load it, in a process of its own; how much memory each took more.

    python -m tests.visual_opsd.training.state_memory FOLDER DEVICE ROWS COUNT PIECE_BYTES

The model has COUNT weights of (ROWS, 64) in float32; with EMA and moments four times as much is
saved. Prints one JSON object: bytes of anonymous memory at most beyond those before ("saving",
"loading"), and of pinned memory beyond ("pinned").
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from scripts.bench.load import MemoryWatch
from scripts.visual_opsd.processes import init_distributed
from scripts.visual_opsd.training import sharded_files, state_files
from scripts.visual_opsd.training.checkpoints import (
    TrainingState,
    load_checkpoint,
    save_checkpoint,
)

SETTINGS: dict[str, Any] = {"config": {}, "contents": {}}


def weights(device: str, rows: int, count: int, value: float) -> nn.ParameterDict:
    """Each weight is part of a larger storage, as a rank's shard is where rows do not divide."""
    parts = [torch.full((rows + 1, 64), value + n, device=device)[:-1] for n in range(count)]
    return nn.ParameterDict({str(n): nn.Parameter(part) for n, part in enumerate(parts)})


def state(device: str, rows: int, count: int, value: float) -> TrainingState:
    model, ema = (weights(device, rows, count, value + shift) for shift in (0.0, 0.5))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, foreach=False)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, value + 1)
    optimizer.step()
    optimizer.zero_grad()
    return TrainingState(model, optimizer, LambdaLR(optimizer, lambda _: 1.0), ema)


def tensors(of: TrainingState) -> list[Tensor]:
    assert of.ema is not None
    moments = [v for values in of.optimizer.state.values() for v in values.values()]
    return [*of.model.parameters(), *of.ema.parameters(), *moments]


def pinned() -> int:
    if not torch.cuda.is_available():
        return 0
    return int(torch.cuda.host_memory_stats().get("allocated_bytes.current", 0))


def main(folder: Path, device: str, rows: int, count: int, piece_bytes: int) -> dict[str, int]:
    sharded_files.PIECE_BYTES = piece_bytes
    state_files._BLOCK_BYTES = piece_bytes // 8  # of which up to four are hashed at once
    env = init_distributed(device)
    here = str(env.device)
    saved, loaded = state(here, rows, count, 1.0), state(here, rows, count, 7.0)
    # What the first save and load need of torch's own, imports above all.
    small = state(here, 1, 1, 0.0)
    path = save_checkpoint(folder / "first", 1, small, env=env, **SETTINGS, extra={})
    load_checkpoint(path, small, env=env, **SETTINGS)
    before = pinned()
    with MemoryWatch(every_s=0.001) as saving:
        path = save_checkpoint(folder, 1, saved, env=env, **SETTINGS, extra={})
    with MemoryWatch(every_s=0.001) as loading:
        load_checkpoint(path, loaded, env=env, **SETTINGS)
    pairs = zip(tensors(saved), tensors(loaded), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs), "loaded other values than saved"
    return {
        "saving": saving.peak - saving.before,
        "loading": loading.peak - loading.before,
        "pinned": pinned() - before,
    }


if __name__ == "__main__":
    where, on, *numbers = sys.argv[1:]
    rows, count, piece_bytes = map(int, numbers)
    print(json.dumps(main(Path(where), on, rows, count, piece_bytes)))
