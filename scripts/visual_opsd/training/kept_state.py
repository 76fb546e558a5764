# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""An optimiser whose state exists from the start and never changes its place in memory."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor

from scripts.visual_opsd.training.sharding import local_part


class KeptState(torch.optim.Optimizer):
    """Base of the optimisers that choose where their state lies; put it before torch's class.

    As the state is there before the first step, nothing has to take a step of zeros to get one
    (torch.distributed.checkpoint.state_dict would, with gradients of the model's size). What it
    then loads into are the tensors of `state_dict` themselves.
    """

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copy a state into the memory of this one. torch's own would move it to the weights.

        Raises:
            ValueError: the state lacks a tensor, so it is another kind of optimiser's.
        """
        kept = self.state
        super().load_state_dict({**state_dict, "state": {}})
        self.state = kept
        own = self.state_dict()
        names = (chain.from_iterable(g["params"] for g in d["param_groups"])
                 for d in (own, state_dict))  # fmt: skip
        for mine, theirs in zip(*names, strict=True):
            saved = state_dict["state"].get(theirs, {})
            for key, target in own["state"][mine].items():
                if key not in saved:
                    raise ValueError(
                        f"the saved optimiser state has no {key} of parameter {theirs}: it was "
                        "saved with another --optimizer_state"
                    )
                source: Tensor = saved[key]
                local_part(target).copy_(local_part(source))  # does nothing if it is the same
