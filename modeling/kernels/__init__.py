# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Triton kernels, each with a plain torch form beside it that says what it computes.

Nothing here is imported unless `modeling.fast` says that a fast path is on: Triton comes with
torch's CUDA builds and with no other. Kernels are generic in their float dtype; on a machine
without a GPU `TRITON_INTERPRET=1` runs them in Triton's interpreter, as the tests do.
"""
