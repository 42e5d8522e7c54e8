"""In vectorised torch, any device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gdn.core.checks import accumulate_dtype
from gdn.core.opaque import Opaque
from gdn.ops.norm import plain as norm
from gdn.ops.projection import recompute


def swiglu_linear(x: Tensor, weight: Tensor) -> Tensor:
    """See `gdn.ops.swiglu_linear`."""
    return _SWIGLU(x, weight)[0]


def gated_rms_norm_linear(x: Tensor, gate: Tensor, norm_weight: Tensor, weight: Tensor, eps: float, silu: bool) -> Tensor:
    """See `gdn.ops.gated_rms_norm_linear`."""
    return _GATED_RMS_NORM(x, gate, norm_weight, weight, eps, silu)[0]


def parallel_linear(x: Tensor, first: Tensor, second: Tensor | None, third: Tensor | None) -> tuple[Tensor, ...]:
    """See `gdn.ops.parallel_linear`."""
    return _PARALLEL(x, first, second, third)


def _product(x: Tensor) -> Tensor:
    gate, up = x.to(accumulate_dtype(x.dtype)).chunk(2, dim=-1)
    return F.silu(gate).mul_(up).to(x.dtype)


def _product_backward(x: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = x.to(accumulate_dtype(x.dtype)).chunk(2, dim=-1)
    slope, opened = slope.to(gate.dtype), F.silu(gate)
    dx = torch.cat([torch.ops.aten.silu_backward(slope * up, gate), slope * opened], dim=-1)
    return dx.to(x.dtype), opened.mul_(up).to(x.dtype)


def _norm_backward(
    x: Tensor, gate: Tensor, norm_weight: Tensor, inverse: Tensor, slope: Tensor, eps: float, silu: bool
) -> tuple[list[Tensor], Tensor]:
    args = (x, gate, norm_weight, eps, silu)
    return norm.gated_backward(args, (inverse,), (slope,)), norm.gated_forward(*args, False)[0]


_SWIGLU = recompute.swiglu_linear("gdn::swiglu_linear", _product, _product_backward)
_GATED_RMS_NORM = recompute.gated_rms_norm_linear("gdn::gated_rms_norm_linear", norm.gated_forward, _norm_backward)


def _parallel(x: Tensor, first: Tensor, second: Tensor | None, third: Tensor | None, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    y, z, w = (x.new_empty(0) if weight is None else torch.matmul(x, weight.T) for weight in (first, second, third))
    return y, z, w


def _parallel_fake(x: Tensor, first: Tensor, second: Tensor | None, third: Tensor | None, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    y, z, w = (x.new_empty(0 if weight is None else (*x.shape[:-1], weight.shape[0])) for weight in (first, second, third))
    return y, z, w


def _parallel_backward(args: tuple[Any, ...], saved: tuple[Tensor, ...], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    x, *weights = args
    rows, dx = x.reshape(-1, x.shape[-1]), None
    gradients: list[Tensor | None] = [None] * len(weights)
    # The narrowest first: what is summed onto dx is read and written once more, which a wide product hides (notes/training_memory.md).
    for i, weight in sorted(enumerate(weights), key=lambda pair: 0 if pair[1] is None else len(pair[1])):
        if weight is None or (dy := grads[i]) is None:
            gradients[i] = None if weight is None else torch.zeros_like(weight)
            continue
        dy = dy.reshape(-1, dy.shape[-1])
        dx = dy @ weight if dx is None else dx.addmm_(dy, weight)
        gradients[i] = dy.T @ rows
    assert dx is not None
    return [dx.view(x.shape), *gradients]


_PARALLEL = Opaque(
    "gdn::parallel_linear", _parallel, _parallel_backward, fake=_parallel_fake, results=3, differentiable=("x", "first", "second", "third")
)
