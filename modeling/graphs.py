# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""A step that is taken many times, as a CUDA graph: one launch instead of hundreds."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import torch

from modeling import fast


class RepeatedStep:
    """Calls `step`, a function of nothing that changes tensors in place and reads none back.

    The first call runs it as it is, which compiles and allocates whatever it needs; the second
    records it, and from then on the recording is replayed. Addresses are fixed by the recording:
    what `step` reads and writes must outlive this object, and no tensor may be swapped for another.
    Recording again costs about as much host time as one plain call, so no graph is kept for later.

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
            self.graph = self._record()
        self.graph.replay()

    def _record(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        here = torch.cuda.current_stream()
        aside = torch.cuda.Stream()
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
