# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
