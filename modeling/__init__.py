# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The unified model: reading, running and writing BAGEL-type checkpoints."""

from modeling.checkpoint import BagelBundle, load_bagel, save_bagel

__all__ = ["BagelBundle", "load_bagel", "save_bagel"]
