# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The unified model: reading, running and writing BAGEL-type checkpoints."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modeling.release.checkpoint import BagelBundle, load_bagel, save_bagel

__all__ = ["BagelBundle", "load_bagel", "save_bagel"]


def __getattr__(name: str) -> Any:
    """Import on first use: data workers need `modeling.bagel`, not the tokenizer library."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from modeling.release import checkpoint

    return getattr(checkpoint, name)
