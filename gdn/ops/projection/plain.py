"""In vectorised torch, any device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from gdn.core.checks import accumulate_dtype
from gdn.ops.norm import plain as norm
from gdn.ops.projection import recompute


def swiglu_linear(x: Tensor, weight: Tensor) -> Tensor:
    """See `gdn.ops.swiglu_linear`."""
    return _SWIGLU(x, weight)[0]


def gated_rms_norm_linear(x: Tensor, gate: Tensor, norm_weight: Tensor, weight: Tensor, eps: float, silu: bool) -> Tensor:
    """See `gdn.ops.gated_rms_norm_linear`."""
    return _GATED_RMS_NORM(x, gate, norm_weight, weight, eps, silu)[0]


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
