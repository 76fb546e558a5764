# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Linear layers that read the same rows, as one product: q, k and v; gate and up.

Parameters keep their names and values. Those of a group are moved next to each other in one
storage, so that one view spans them all: it costs no memory and can't go stale, because nothing
is kept: whether weights adjoin is looked up at each use.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modeling.bagel.plan import LayerPlan

# What layers of the decoder and the ViT apply to the same rows; `_moe_gen` is the decoder's other
# expert, and the ViT has no gate.
_GROUPS = (
    ("self_attn.q_proj{0}.weight", "self_attn.k_proj{0}.weight", "self_attn.v_proj{0}.weight"),
    ("self_attn.q_proj{0}.bias", "self_attn.k_proj{0}.bias", "self_attn.v_proj{0}.bias"),
    ("mlp{0}.gate_proj.weight", "mlp{0}.up_proj.weight"),
)


def adjoining(tensors: Sequence[Tensor]) -> Tensor | None:
    """One view of tensors that follow each other in one storage (joined along dimension 0)."""
    first = tensors[0]
    if first.device.type == "meta":
        return None
    end = first.data_ptr()
    for tensor in tensors:
        if tensor.data_ptr() != end or not tensor.is_contiguous() or tensor.dtype != first.dtype:
            return None
        end += tensor.numel() * tensor.element_size()
    storage = first.untyped_storage()
    if storage.data_ptr() + storage.nbytes() < end:  # neighbours by chance
        return None
    shape = (sum(len(tensor) for tensor in tensors), *first.shape[1:])
    return first.detach().as_strided(shape, first.stride())


def projection_groups(names: Sequence[str]) -> Iterator[list[str]]:
    """The groups of parameter names among `names` (state-dict keys of a model)."""
    known = set(names)
    layers = dict.fromkeys(name.rpartition(".self_attn.")[0] for name in names if ".q_proj" in name)
    for layer in layers:
        for suffix in ("", "_moe_gen"):
            for group in _GROUPS:
                keys = [f"{layer}.{key.format(suffix)}" for key in group]
                if known.issuperset(keys):
                    yield keys


def empty_adjoining(
    shapes: Mapping[str, Sequence[int]], dtype: torch.dtype, device: torch.device | str
) -> dict[str, Tensor]:
    """Uninitialised tensors by state-dict key, those of each group next to each other."""
    made: dict[str, Tensor] = {}
    for keys in projection_groups(list(shapes)):
        rows = [shapes[key][0] for key in keys]
        joined = torch.empty((sum(rows), *shapes[keys[0]][1:]), dtype=dtype, device=device)
        made.update(zip(keys, joined.split(rows), strict=True))
    for key, shape in shapes.items():
        if key not in made:
            made[key] = torch.empty(tuple(shape), dtype=dtype, device=device)
    return made


@torch.no_grad()
def adjoin_projections(model: nn.Module) -> nn.Module:
    """Move the weights of each group next to each other, in place; returns the model.

    Needs room for one group at a time. Tensors that share the old storages keep them.
    """
    parameters = dict(model.named_parameters())
    for keys in projection_groups(list(parameters)):
        group = [parameters[key] for key in keys]
        if adjoining(group) is not None or len({(p.device, p.dtype) for p in group}) > 1:
            continue
        # A caller's inference mode ends, the weights stay what they are.
        with torch.inference_mode(group[0].is_inference()):
            joined = torch.cat([parameter.detach() for parameter in group])
        for parameter, part in zip(group, joined.split([len(p) for p in group]), strict=True):
            parameter.data = part
    return model


def joined_weights(layers: Sequence[nn.Linear]) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of layers whose parameters adjoin; None if they do not."""
    weight = adjoining([layer.weight for layer in layers])
    if weight is None or layers[0].bias is None:
        return None if weight is None else (weight, None)
    bias = adjoining([layer.bias for layer in layers])
    return None if bias is None else (weight, bias)


def are_plain(*layers: nn.Module) -> bool:
    """Whether the layers are nothing but their weights and biases: no adapters, no wrappers."""
    return all(type(layer) is nn.Linear for layer in layers)


def project_rows(x: Tensor, layers: Sequence[nn.Linear], plan: LayerPlan) -> tuple[Tensor, ...]:
    """x (T, H) through layers side by side, in one product where planned and weights adjoin."""
    joined = joined_weights(layers) if plan.joins_products and are_plain(*layers) else None
    if joined is None:
        return tuple(layer(x) for layer in layers)
    weight, bias = joined
    if plan.streams(x):
        from modeling.kernels.stream_linear import stream_linear

        product = stream_linear(x, weight, bias=bias)
    else:
        product = F.linear(x, weight, bias)
    return product.split([layer.out_features for layer in layers], dim=-1)


def add_linear(residual: Tensor, x: Tensor, layer: nn.Linear, plan: LayerPlan) -> Tensor:
    """residual + layer(x); a plain layer must have no bias.

    Where planned, the sum is formed inside the product, in fp32, and rounded once; it then takes
    the residual's memory, which nobody else may need.
    """
    if not (plan.adds_in_product and are_plain(layer)):
        return residual + layer(x)
    if plan.streams(x):
        from modeling.kernels.stream_linear import stream_linear

        return stream_linear(x, layer.weight, residual=residual, out=residual)
    return residual.addmm_(x, layer.weight.t())
