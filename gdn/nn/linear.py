"""When linear layers are nothing but their matrices, and what follows from it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def is_matrix(layer: nn.Module) -> bool:
    """Whether calling the layer multiplies by its weight and does no more, so that an operator may take the weight instead. An adapter,
    a bias, a hook, a sharded or a quantised weight is more."""
    return is_affine(layer) and layer.bias is None


def is_affine(layer: nn.Module) -> bool:
    """The same for a layer that may have a bias."""
    return type(layer) is nn.Linear and type(layer.weight) is nn.Parameter and not is_hooked(layer)


def is_hooked(layer: nn.Module) -> bool:
    """Whether somebody listens to calls of the layer."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)


def side_by_side(x: Tensor, first: nn.Linear, second: nn.Linear) -> tuple[Tensor, Tensor]:
    """Both layers' outputs for x. In training their few rows make one matrix: what they cost is reading x, three times, and writing its
    gradient, which is then done for both at once."""
    if not (torch.is_grad_enabled() and is_affine(first) and is_affine(second)):
        return first(x), second(x)
    y = F.linear(x, torch.cat([first.weight, second.weight]))
    a, b = y.split((first.out_features, second.out_features), dim=-1)
    return a if first.bias is None else a + first.bias.to(a.dtype), b if second.bias is None else b + second.bias.to(b.dtype)
