# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""A step that is taken many times, as a CUDA graph: one launch instead of hundreds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from weakref import finalize

import torch

from modeling import fast

# Streams and graphs whose steps are gone, by GPU. A stream and a memory are lent to the next graph,
# and no two that live share them: cuBLAS keeps a workspace for each stream, in the memory of the
# graph that first asked for it. Of its own for each graph that ever was, they would pile up: torch
# gives a dead graph's memory to nobody before the GPU is full.
_FREE: defaultdict[int, list[tuple[torch.cuda.Stream, torch.cuda.CUDAGraph]]] = defaultdict(list)


class RepeatedStep:
    """Calls `step`, a function of nothing that changes tensors in place and reads none back.

    The first call runs it as it is, which compiles and allocates whatever it needs; the second
    captures it, and from then on the graph is replayed. Addresses are fixed by the graph: what
    `step` reads and writes must outlive this object, and no tensor may be swapped for another.
    Capturing again costs about as much host time as one plain call, so no graph is kept for later.
    Where a graph finds no memory, `step` is run plainly for good.

    device: where `step` works; anything but CUDA runs it plainly, as VISUAL_OPSD_EAGER=graphs does.
    """

    def __init__(self, step: Callable[[], None], device: torch.device, *, graph: bool = True):
        self.step = step
        self.graph: torch.cuda.CUDAGraph | None = None
        self.captures = graph and device.type == "cuda" and fast.is_on("graphs")
        self.warm = False

    def __call__(self) -> None:
        if self.captures and self.warm and self.graph is None:
            self.graph = self._capture_if_it_fits()
            self.captures = self.graph is not None
        if self.graph is None:
            self.step()
            self.warm = True
        else:
            self.graph.replay()

    def _capture_if_it_fits(self) -> torch.cuda.CUDAGraph | None:
        # A graph has memory of its own, for which torch gives none of its reserve back.
        for _ in range(2):
            try:
                return self._capture()
            except RuntimeError as error:  # torch's own or the driver's
                if "out of memory" not in str(error):
                    raise
            # Not before here: the error's traceback holds what the attempt took.
            torch.cuda.empty_cache()
        return None

    def _capture(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        here = torch.cuda.current_stream()
        free = _FREE[torch.cuda.current_device()]
        aside, earlier = free.pop() if free else (torch.cuda.Stream(), None)
        memory = None if earlier is None else earlier.pool()
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            # thread_local: a loader's thread may pin memory meanwhile.
            graph.capture_begin(memory, capture_error_mode="thread_local")
            try:
                self.step()
            except BaseException:
                with suppress(RuntimeError):  # the error inside says more
                    graph.capture_end()
                raise
            graph.capture_end()
        here.wait_stream(aside)
        finalize(self, free.append, (aside, graph))
        return graph
