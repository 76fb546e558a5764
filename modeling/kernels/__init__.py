# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Triton kernels. What they compute is said by the eager code that runs without them.

Nothing here is imported unless a plan (`modeling/bagel/plan.py`) or the loss takes a fast path:
Triton comes with torch's CUDA builds and with no other. Kernels are generic in their float dtype;
on a machine without a GPU `TRITON_INTERPRET=1` runs them in Triton's interpreter, as the tests do.
"""
