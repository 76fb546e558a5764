# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""No weight is NaN or infinite: checked once they are where they compute."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor

from modeling.release.weight_files import StoredTensor

_SHOWN = 5


@torch.no_grad()
def find_nonfinite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of floating tensors, whole or this rank's part, in which a value is no finite number.

    One pass over each on its device, without memory of its size, and one wait for each device
    and dtype. What has no memory ("meta") is passed over.
    """
    ranges: dict[tuple[torch.device, torch.dtype], dict[str, tuple[Tensor, Tensor]]]
    ranges = defaultdict(dict)
    for key, tensor in tensors.items():
        if tensor.numel() and tensor.is_floating_point() and not tensor.is_meta:
            # Both ends are NaN if any value is. A sum would overflow on sound weights.
            low, high = torch.aminmax(tensor.detach())
            ranges[tensor.device, tensor.dtype][key] = low, high
    bad = []
    for group in ranges.values():
        ends = torch.stack([end for pair in group.values() for end in pair])
        finite = ends.isfinite().view(-1, 2).all(1).tolist()
        bad += [key for key, sound in zip(group, finite, strict=True) if not sound]
    return bad


def check_finite(tensors: Mapping[str, Tensor], stored: Mapping[str, StoredTensor]) -> None:
    """Every value of the tensors is a finite number.

    Args:
        tensors: by the names of `stored`, which says where a bad one came from.

    Raises:
        ValueError: names the tensors that hold NaN or infinity, and the file.
    """
    bad = find_nonfinite(tensors)
    if bad:
        shown = ", ".join(bad[:_SHOWN]) + ", ..." * (len(bad) > _SHOWN)
        own, here = stored[bad[0]].dtype, str(tensors[bad[0]].dtype).removeprefix("torch.")
        raise ValueError(
            f"{stored[bad[0]].file}: {len(bad)} of {len(tensors)} tensors hold NaN or infinity "
            f"(stored as {own}, loaded as {here}): {shown}; the training that wrote them diverged "
            "or the file is damaged: use an earlier checkpoint or fetch it again"
        )
