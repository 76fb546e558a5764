# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Signals that ask a run to stop: the step is left, the state saved, the run ends."""

from __future__ import annotations

import os
import signal
import sys
import time
from types import FrameType, TracebackType
from typing import Any

# Ctrl-C, a scheduler's end, its warning before the end (SLURM's --signal), a lost terminal.
_NAMES = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")
# Within this time a second signal is the same request: terminals and launchers send it twice.
_SAME_REQUEST_S = 1.0


class StopRequest:
    """Notes the first signal inside its `with` block; a second one ends the process at once.

    Not so SIGTERM, which schedulers repeat or send after their warning while a state is being
    saved: it never cuts a save short. A signal that was ignored at the start (nohup) stays so.

    Attributes:
        number: the signal, 0 while there is none. May be set by a caller, too.
    """

    def __init__(self) -> None:
        self.number = 0
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for name in _NAMES:
            number = getattr(signal, name, None)  # Windows has two of them
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:  # fmt: skip
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if isinstance(error, RuntimeError) and signal.SIGTERM in self._before:
            # Perhaps another rank died. The launcher terminates this one, too, which must not cut
            # short the search for the cause (peers.Watch.leave).
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.number:
            self.number, self._since = number, now
        elif number != signal.SIGTERM and now - self._since > _SAME_REQUEST_S:
            print(f"second {signal.Signals(number).name}: ended at once, nothing more is saved",
                  file=sys.stderr, flush=True)  # fmt: skip
            os._exit(exit_code(number))


def exit_code(number: int) -> int:
    """What a shell reports for a process that signal `number` ended."""
    return 128 + number
