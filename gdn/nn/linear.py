"""When a linear layer is nothing but its matrix."""

from __future__ import annotations

from torch import nn


def is_matrix(layer: nn.Module) -> bool:
    """Whether calling the layer multiplies by its weight and does no more, so that an operator may take the weight instead. An adapter,
    a bias, a hook, a sharded or a quantised weight is more."""
    return type(layer) is nn.Linear and layer.bias is None and type(layer.weight) is nn.Parameter and not is_hooked(layer)


def is_hooked(layer: nn.Module) -> bool:
    """Whether somebody listens to calls of the layer."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)
