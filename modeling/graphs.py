# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""A step that is taken many times, as a CUDA graph: one launch instead of hundreds."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress

import torch

from modeling import fast

_SIDE = threading.local()


def _side_stream() -> torch.cuda.Stream:
    """For recordings, one a thread and GPU: cuBLAS keeps a workspace for every stream it saw."""
    streams: dict[int, torch.cuda.Stream] = _SIDE.__dict__.setdefault("streams", {})
    device = torch.cuda.current_device()
    if device not in streams:
        streams[device] = torch.cuda.Stream(device)
    return streams[device]


class RepeatedStep:
    """Calls `step`, a function of nothing that changes tensors in place and reads none back.

    The first call runs it as it is, which compiles and allocates whatever it needs; the second
    records it, and from then on the recording is replayed. Addresses are fixed by the recording:
    what `step` reads and writes must outlive this object, and no tensor may be swapped for another.
    Recording again costs about as much host time as one plain call, so no graph is kept for later.
    Where a recording finds no memory, `step` is run plainly for good.

    device: where `step` works; anything but CUDA runs it plainly, as VISUAL_OPSD_EAGER=graphs does.
    """

    def __init__(self, step: Callable[[], None], device: torch.device, *, graph: bool = True):
        self.step = step
        self.graph: torch.cuda.CUDAGraph | None = None
        self.records = graph and device.type == "cuda" and fast.is_on("graphs")
        self.warm = False

    def __call__(self) -> None:
        if not self.records or not self.warm:
            self.step()
            self.warm = True
            return
        if self.graph is None:
            self.graph = self._recorded()
        if self.graph is None:
            self.records = False
            self.step()
        else:
            self.graph.replay()

    def _recorded(self) -> torch.cuda.CUDAGraph | None:
        # A recording has memory of its own, for which torch gives none of its reserve back.
        for _ in range(2):
            try:
                return self._record()
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
        return None

    def _record(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        here = torch.cuda.current_stream()
        aside = _side_stream()
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            # thread_local: a loader's thread may pin memory meanwhile.
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                self.step()
            except BaseException:
                with suppress(RuntimeError):  # the error inside says more
                    graph.capture_end()
                raise
            graph.capture_end()
        here.wait_stream(aside)
        return graph
