"""The definitions of the norms, any floating dtype, gradients by autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from gdn.core.checks import accumulate_dtype


def l2norm(x: Tensor, eps: float) -> Tensor:
    """See `gdn.ops.l2norm`."""
    wide = x.to(accumulate_dtype(x.dtype))
    return (wide / torch.sqrt((wide * wide).sum(-1, keepdim=True) + eps)).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `gdn.ops.rms_norm`."""
    return _rms_norm(x, weight, eps).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `gdn.ops.add_rms_norm`."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float, silu: bool = True) -> Tensor:
    """See `gdn.ops.gated_rms_norm`."""
    gate = gate.to(accumulate_dtype(x.dtype))
    y = _rms_norm(x, weight, eps) * torch.sigmoid(gate)
    return (y * gate if silu else y).to(x.dtype)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.to(accumulate_dtype(x.dtype))
    return wide / torch.sqrt((wide * wide).mean(-1, keepdim=True) + eps) * weight.to(wide.dtype)
