# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Inputs made to do harm. Each must end in a right result, or in one line that says why not.

`python -m tests.hostile` tries all of them and prints the totals; `make test` tries a sample.
"""
