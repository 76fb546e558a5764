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

from modeling import fast

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


def few_rows(x: Tensor, layer: nn.Linear) -> bool:
    """Whether a product is bound by reading the weight, and our kernel for that case can run."""
    return (
        len(x) <= 8
        and not torch.is_grad_enabled()
        and fast.runs_kernels("decode", x)
        and layer.weight.device == x.device
    )


def added(residual: Tensor, x: Tensor, layer: nn.Linear) -> Tensor:
    """residual + layer(x), where nobody else needs `residual`: without a gradient it is reused.

    The sum is then formed inside the product, in fp32, and rounded once.
    """
    if (
        torch.is_grad_enabled()
        or layer.bias is not None
        or layer.weight.device != x.device
        or not fast.runs_kernels("rows", x)
    ):
        return residual + layer(x)
    if few_rows(x, layer):
        from modeling.kernels.stream_linear import stream_linear

        return stream_linear(x, layer.weight, residual=residual, out=residual)
    return residual.addmm_(x, layer.weight.t())


def products(x: Tensor, layers: Sequence[nn.Linear]) -> tuple[Tensor, ...]:
    """x (T, H) through layers side by side, in one product where nothing needs a gradient."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not x.is_cuda:
        return tuple(layer(x) for layer in layers)
    joined = joined_weights(layers) if fast.is_on("projections") else None
    if joined is None or joined[0].device != x.device:
        return tuple(layer(x) for layer in layers)
    sizes = [layer.out_features for layer in layers]
    if not few_rows(x, layers[0]):
        return F.linear(x, *joined).split(sizes, dim=-1)
    from modeling.kernels.stream_linear import stream_linear

    return stream_linear(x, joined[0], bias=joined[1]).split(sizes, dim=-1)
