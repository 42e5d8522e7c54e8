"""An activation and the matrix after it as one operator with gradients, out of the activation's forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gdn.core.checks import accumulate_dtype
from gdn.core.opaque import Opaque

SwiGLUBackward = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""From x `[..., 2 N]` and the gradient of the product `[..., N]`, which it may overwrite: the gradient of x, and the product."""
NormForward = Callable[[Tensor, Tensor, Tensor, float, bool, bool], tuple[Tensor, Tensor]]
"""From `(x, gate, norm_weight, eps, silu, keep)`: the gated norm, and one number a vector."""
NormBackward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, float, bool], tuple[Sequence[Tensor | None], Tensor]]
"""From `(x, gate, norm_weight, inverse, slope, eps, silu)`: gradients of the first three, and the gated norm."""

Linear = Callable[[Tensor, Tensor], Tensor]
"""From h `[..., N]`, dense, and weight `[M, N]`: `h weight^T`."""


def swiglu_linear(
    name: str,
    product: Callable[[Tensor], Tensor],
    backward: SwiGLUBackward,
    *,
    whole: Callable[[Tensor, Tensor], Tensor | None] | None = None,
    linear: Linear | None = None,
    replay: bool = False,
) -> Opaque:
    """`swiglu_linear` out of the product of gates and inputs and a matrix product, or from `whole` where that gives it. `replay` as for
    `Opaque`."""
    linear = linear or _linear

    def run(x: Tensor, weight: Tensor, keep: bool) -> tuple[Tensor]:
        y = None if whole is None else whole(x, weight)
        return (linear(product(x), weight) if y is None else y,)

    def fake(x: Tensor, weight: Tensor, keep: bool) -> tuple[Tensor]:
        return (x.new_empty((*x.shape[:-1], weight.shape[0])),)

    def gradients(args: tuple[Any, ...], saved: tuple[Tensor, ...], grads: Sequence[Tensor | None]) -> list[Tensor]:
        x, weight = args
        (dy,) = grads
        assert dy is not None
        dx, h = backward(x, _linear(dy, weight.T))
        return [dx, _weight_gradient(dy, h)]

    return Opaque(name, run, gradients, fake=fake, results=1, differentiable=("x", "weight"), replay=replay)


def gated_rms_norm_linear(
    name: str,
    forward: NormForward,
    backward: NormBackward,
    *,
    whole: Callable[[Tensor, Tensor, Tensor, Tensor, float, bool], Tensor | None] | None = None,
    linear: Linear | None = None,
    replay: bool = False,
) -> Opaque:
    """`gated_rms_norm_linear` out of the gated norm and a matrix product, or without gradients from `whole` where that gives it. `replay`
    as for `Opaque`."""
    linear = linear or _linear

    def run(x: Tensor, gate: Tensor, norm_weight: Tensor, weight: Tensor, eps: float, silu: bool, keep: bool) -> tuple[Tensor, Tensor]:
        y = None if keep or whole is None else whole(x, gate, norm_weight, weight, eps, silu)
        if y is not None:
            return y, x.new_empty(0, dtype=accumulate_dtype(x.dtype))
        h, inverse = forward(x, gate, norm_weight, eps, silu, keep)
        return linear(h.flatten(-2), weight), inverse if keep else inverse.new_empty(0)

    def fake(x: Tensor, gate: Tensor, norm_weight: Tensor, weight: Tensor, eps: float, silu: bool, keep: bool) -> tuple[Tensor, Tensor]:
        inverse = x.new_empty((*x.shape[:-1], 1) if keep else (0,), dtype=accumulate_dtype(x.dtype))
        return x.new_empty((*x.shape[:-2], weight.shape[0])), inverse

    def gradients(args: tuple[Any, ...], saved: tuple[Tensor, ...], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        x, gate, norm_weight, weight, eps, silu = args
        (inverse,), (dy,) = saved, grads
        assert dy is not None
        of_norm, h = backward(x, gate, norm_weight, inverse, _linear(dy, weight.T).view(x.shape), eps, silu)
        return [*of_norm, _weight_gradient(dy, h.flatten(-2))]

    return Opaque(name, run, gradients, fake=fake, results=1, differentiable=("x", "gate", "norm_weight", "weight"), replay=replay)


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return torch.matmul(x, weight.T)


def _weight_gradient(dy: Tensor, h: Tensor) -> Tensor:
    """Of `y = h weight^T`."""
    return dy.reshape(-1, dy.shape[-1]).T @ h.reshape(-1, h.shape[-1])
