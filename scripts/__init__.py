# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0

import sys
from types import TracebackType


def _interrupted(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    if kind is KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


# Ctrl-C while a program still imports (torch takes seconds), before its main can answer. While
# `python -m` looks for a module of ours, this is what it is called by.
if sys.argv[:1] == ["-m"]:
    sys.excepthook = _interrupted
