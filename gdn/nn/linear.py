"""When linear layers are nothing but their matrices, and several of them on one input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gdn.ops import parallel_linear


def is_matrix(layer: nn.Module) -> bool:
    """Whether calling the layer multiplies by its weight and does no more, so that an operator may take the weight instead. An adapter,
    a bias, a hook, a sharded or a quantised weight is more. A frozen one in training is less: it needs no gradient, nor its input kept."""
    return is_affine(layer) and layer.bias is None


def is_affine(layer: nn.Module) -> bool:
    """The same for a layer that may have a bias."""
    if type(layer) is not nn.Linear or type(layer.weight) is not nn.Parameter or is_hooked(layer):
        return False
    if torch._C._are_functorch_transforms_active():  # torch.func cannot go through operators with a backward pass of their own
        return False
    return layer.weight.requires_grad or not torch.is_grad_enabled()


def is_hooked(layer: nn.Module) -> bool:
    """Whether somebody listens to calls of the layer, has compiled them, or has put another `forward` in its place, as accelerate does to
    move weights."""
    hooks = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    return (
        bool(hooks) or "forward" in vars(layer) or layer._compiled_call_impl is not None or bool(nn.modules.module._has_any_global_hook())
    )


def projections(x: Tensor, layers: Sequence[nn.Linear], thin: Sequence[nn.Linear]) -> list[Tensor]:
    """The outputs of up to two layers, and of some thin ones, for one x `[..., width]`.

    In training they are one operator with one gradient of x where all layers are but matrices, and the thin ones, of few rows, are one
    matrix: what such a layer costs is reading x and writing its gradient.
    """
    every, casts = (*layers, *thin), torch.is_autocast_enabled(x.device.type)
    dtypes = {x.dtype, *(layer.weight.dtype for layer in every)}
    if not torch.is_grad_enabled() or not all(is_affine(layer) for layer in every):
        return [layer(x) for layer in every]
    if torch.float64 in dtypes if casts else len(dtypes) > 1:  # the layers know what to do or to say
        return [layer(x) for layer in every]
    dtype = torch.get_autocast_dtype(x.device.type) if casts else x.dtype
    matrices = [*(layer.weight for layer in layers), torch.cat([layer.weight for layer in thin])]
    *outputs, last = parallel_linear(x.to(dtype), *(matrix.to(dtype) for matrix in matrices))
    outputs += last.split([layer.out_features for layer in thin], dim=-1)
    return [y if layer.bias is None else y + layer.bias.to(dtype) for layer, y in zip(every, outputs, strict=True)]
