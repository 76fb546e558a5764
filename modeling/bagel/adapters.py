# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters (LoRA, arXiv 2106.09685, section 4.1): y = W x + b + (alpha / rank) B A x.

W and b stay as they are, A (rank, in) and B (out, rank) train. Parameters keep the names of the
releases; those of an adapter follow its layer's: `...q_proj.lora_A.weight`, as PEFT has them too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)
# What a target stands for: all linear layers below a path, or the decoder's of one name. None is
# of the drawing branch, nor the head, nor what reads pixels.
PARTS = {
    "llm": "language_model.model.layers.",
    "vit": "vit_model.vision_model.encoder.layers.",
    "connector": "connector.",
}
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_GENERATION = "_moe_gen"
_MARKS = (".lora_A.", ".lora_B.")


@dataclass(frozen=True)
class AdapterConfig:
    """What adapters a model has.

    modules: paths of the linear layers, sorted.
    """

    rank: int
    alpha: float
    modules: tuple[str, ...]

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / self.rank


def is_adapter_key(key: str) -> bool:
    """Whether a parameter's name is that of an adapter's A or B."""
    return any(mark in key for mark in _MARKS)


def find_targets(model: nn.Module, targets: Sequence[str]) -> tuple[str, ...]:
    """Paths of the linear layers that `targets` name: "llm", "vit", "connector", "q_proj", ...

    Raises:
        ValueError: a name that stands for none.
    """
    linear = [path for path, m in model.named_modules() if isinstance(m, nn.Linear)]
    linear = [p for p in linear if _GENERATION not in p and not is_adapter_key(f"{p}.")]
    found: set[str] = set()
    for target in targets:
        within = PARTS["llm"] if target in PROJECTIONS else PARTS.get(target)
        if within is None:
            raise ValueError(
                f"no linear layers are called {target!r}: name some of "
                f"{', '.join((*PARTS, *PROJECTIONS))}"
            )
        mine = [path for path in linear if path.startswith(within)]
        found.update(p for p in mine if target in PARTS or p.rpartition(".")[2] == target)
    return tuple(sorted(found))


class AdaptedLinear(nn.Linear):
    """A linear layer with an adapter. `adapts`: False leaves the adapter out (`switch_off`)."""

    def __init__(self, base: nn.Linear, rank: int, scale: float) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        device = base.weight.device
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, device=device)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, device=device)
        self.scale, self.adapts = scale, True

    def forward(self, input: Tensor) -> Tensor:
        """(T, in) -> (T, out)."""
        out = F.linear(input, self.weight, self.bias)
        if not self.adapts:
            return out
        return out.addmm(self.lora_A(input), self.lora_B.weight.t(), alpha=self.scale)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """W + scale B A (out, in), rounded once to the dtype of W."""
        return torch.addmm(self.weight, self.lora_B.weight, self.lora_A.weight, alpha=self.scale)


def add_adapters(model: M, config: AdapterConfig) -> M:
    """Freeze a model, and give the layers that `config` names adapters in fp32; in place.

    The adapters' values are those of `nn.Linear` and not yet the ones to begin with
    (`initial_adapters`). Must come before sharding.
    """
    model.requires_grad_(False)
    for path in config.modules:
        parent, name = _parent(model, path)
        base = getattr(parent, name)
        assert isinstance(base, nn.Linear) and not isinstance(base, AdaptedLinear), path
        setattr(parent, name, AdaptedLinear(base, config.rank, config.scale))
    return model


def remove_adapters(model: M) -> M:
    """The plain layers again, without what the adapters add; in place."""
    for path, module in list(model.named_modules()):
        if isinstance(module, AdaptedLinear):
            plain = nn.Linear(
                module.in_features, module.out_features, module.bias is not None, device="meta"
            )
            plain.weight, plain.bias = module.weight, module.bias
            parent, name = _parent(model, path)
            setattr(parent, name, plain)
    return model


def adapter_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every A and B."""
    shapes = {key: tuple(parameter.shape) for key, parameter in model.named_parameters()}
    return {key: shape for key, shape in shapes.items() if is_adapter_key(key)}


def initial_adapter(key: str, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """What an adapter begins with, fp32 on the CPU: A uniform as PEFT's, B 0, so B A is 0."""
    values = torch.zeros(tuple(shape))
    if _MARKS[0] in key:
        nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=generator)
    return values


@contextmanager
def switch_off(model: nn.Module) -> Iterator[None]:
    """Within this the model computes what it did before it had adapters."""
    adapted = [module for module in model.modules() if isinstance(module, AdaptedLinear)]
    for module in adapted:
        module.adapts = False
    try:
        yield
    finally:
        for module in adapted:
            module.adapts = True


def _parent(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    parent, _, name = path.rpartition(".")
    return model.get_submodule(parent), name
