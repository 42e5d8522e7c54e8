"""The norms in vectorised torch, any device. The backward passes keep the inputs and one number a vector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gdn.core.checks import accumulate_dtype
from gdn.core.opaque import Opaque

Saved = tuple[Tensor, ...]
Grads = Sequence[Tensor | None]


def l2norm(x: Tensor, eps: float) -> Tensor:
    """See `gdn.ops.l2norm`."""
    return _L2NORM(x, eps)[0]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `gdn.ops.rms_norm`."""
    return _RMS_NORM(x, weight, eps)[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `gdn.ops.add_rms_norm`."""
    y, total = _ADD_RMS_NORM(x, residual, weight, eps)
    return y, total


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float, silu: bool = True) -> Tensor:
    """See `gdn.ops.gated_rms_norm`."""
    return _GATED_RMS_NORM(x, gate, weight, eps, silu)[0]


def _l2norm(x: Tensor, eps: float, keep: bool) -> tuple[Tensor, Tensor]:
    wide = x.to(accumulate_dtype(x.dtype))
    inverse = _inverse_norm(wide, eps, 1)
    return _result(wide * inverse, x), inverse


def _l2norm_fake(x: Tensor, eps: float, keep: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), _fake_inverse(x)


def _l2norm_backward(args: tuple[Any, ...], saved: Saved, grads: Grads) -> list[Tensor]:
    x, _ = args
    (inverse,), (dy,) = saved, grads
    assert dy is not None
    unit = x.to(inverse.dtype) * inverse
    return [_through_norm(dy.to(inverse.dtype), unit, inverse, 1).to(x.dtype)]


def _rms_norm(x: Tensor, weight: Tensor, eps: float, keep: bool) -> tuple[Tensor, Tensor]:
    wide = x.to(accumulate_dtype(x.dtype))
    inverse = _inverse_norm(wide, eps, x.shape[-1])
    return _result((wide * inverse).mul_(weight), x), inverse


def _rms_norm_fake(x: Tensor, weight: Tensor, eps: float, keep: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), _fake_inverse(x)


def _rms_norm_backward(args: tuple[Any, ...], saved: Saved, grads: Grads) -> list[Tensor]:
    x, weight, _ = args
    (inverse,), (dy,) = saved, grads
    assert dy is not None
    dx, dweight = _through_weighted_norm(dy.to(inverse.dtype), x, weight, inverse)
    return [dx.to(x.dtype), dweight]


def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    total = _result(x + residual, x)
    y, inverse = _rms_norm(total, weight, eps, keep)
    return y, total, inverse


def _add_rms_norm_fake(x: Tensor, residual: Tensor, weight: Tensor, eps: float, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape), _fake_inverse(x)


def _add_rms_norm_backward(args: tuple[Any, ...], saved: Saved, grads: Grads) -> list[Tensor]:
    _, _, weight, _ = args
    (total, inverse), (dy, dtotal) = saved, grads
    if dy is None:
        assert dtotal is not None
        return [dtotal.clone(), torch.zeros_like(weight)]
    dx, dweight = _through_weighted_norm(dy.to(inverse.dtype), total, weight, inverse)
    return [(dx if dtotal is None else dx.add_(dtotal)).to(total.dtype), dweight]


def gated_forward(x: Tensor, gate: Tensor, weight: Tensor, eps: float, silu: bool, keep: bool) -> tuple[Tensor, Tensor]:
    wide = x.to(accumulate_dtype(x.dtype))
    inverse = _inverse_norm(wide, eps, x.shape[-1])
    return _result((wide * inverse).mul_(weight).mul_(_activated(gate.to(wide.dtype), silu)), x), inverse


def _gated_rms_norm_fake(x: Tensor, gate: Tensor, weight: Tensor, eps: float, silu: bool, keep: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), _fake_inverse(x)


def gated_backward(args: tuple[Any, ...], saved: Saved, grads: Grads) -> list[Tensor]:
    x, gate, weight, _, silu = args
    (inverse,), (dy,) = saved, grads
    assert dy is not None
    dy, wide_gate = dy.to(inverse.dtype), gate.to(inverse.dtype)
    slope, open_ = (x.to(inverse.dtype) * inverse).mul_(weight).mul_(dy), _activated(wide_gate, silu)
    dgate = torch.ops.aten.silu_backward(slope, wide_gate) if silu else torch.ops.aten.sigmoid_backward(slope, open_)
    dx, dweight = _through_weighted_norm(open_.mul_(dy), x, weight, inverse)
    return [dx.to(x.dtype), dgate.to(gate.dtype), dweight]


def _activated(gate: Tensor, silu: bool) -> Tensor:
    return F.silu(gate) if silu else torch.sigmoid(gate)


def _inverse_norm(x: Tensor, eps: float, divisor: int) -> Tensor:
    """`1 / sqrt(sum of x^2 / divisor + eps)`, `[..., 1]`. `vector_norm` reads x once and writes no square: 2x faster than the sum."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(divisor).add_(eps).rsqrt_()


def _result(y: Tensor, x: Tensor) -> Tensor:
    return y.to(x.dtype).contiguous()


def _fake_inverse(x: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], 1, dtype=accumulate_dtype(x.dtype))


def _through_norm(dy: Tensor, unit: Tensor, inverse: Tensor, divisor: int) -> Tensor:
    """The gradient of x from that of `unit = x * inverse`: `inverse (dy - unit <unit, dy> / divisor)`."""
    along = (unit * dy).sum(-1, keepdim=True).div_(-divisor)
    return torch.addcmul(dy, unit, along).mul_(inverse)


def _through_weighted_norm(dy: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x, not rounded yet, and weight from that of `x * inverse * weight`."""
    unit = x.to(inverse.dtype) * inverse
    dweight = (unit * dy).flatten(0, -2).sum(0) if x.ndim > 1 else unit * dy
    dx = _through_norm(dy * weight, unit, inverse, x.shape[-1])
    return dx, dweight.to(weight.dtype)


_L2NORM = Opaque("gdn::l2norm", _l2norm, _l2norm_backward, fake=_l2norm_fake, results=1, differentiable=("x",))
_RMS_NORM = Opaque("gdn::rms_norm", _rms_norm, _rms_norm_backward, fake=_rms_norm_fake, results=1, differentiable=("x", "weight"))
_ADD_RMS_NORM = Opaque(
    "gdn::add_rms_norm",
    _add_rms_norm,
    _add_rms_norm_backward,
    fake=_add_rms_norm_fake,
    results=2,
    differentiable=("x", "weight"),
    follows={"residual": "x"},
    without={"x": 0, "residual": 0},
    saved_results=1,
)
_GATED_RMS_NORM = Opaque(
    "gdn::gated_rms_norm",
    gated_forward,
    gated_backward,
    fake=_gated_rms_norm_fake,
    results=1,
    differentiable=("x", "gate", "weight"),
)
