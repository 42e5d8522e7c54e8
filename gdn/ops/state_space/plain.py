"""The parts of a state-space layer in plain torch, any device, gradients by autograd but for the norm's."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from gdn.core.checks import accumulate_dtype
from gdn.ops.norm.plain import rms_norm


def scale_heads(x: Tensor, factor: Tensor) -> Tensor:
    """See `gdn.ops.scale_heads`."""
    return (x * factor.unsqueeze(-1)).to(x.dtype)


def skip_gated_rms_norm(y: Tensor, x: Tensor, D: Tensor, gate: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    """See `gdn.ops.skip_gated_rms_norm`."""
    wide = accumulate_dtype(y.dtype)
    gated = (y.to(wide) + D.to(wide).unsqueeze(-1) * x).flatten(2) * F.silu(gate.to(wide))
    if groups == 1:
        return rms_norm(gated, weight.to(wide), eps).to(y.dtype)
    parts = gated.unflatten(-1, (groups, -1))
    return (rms_norm(parts, weight.new_ones(parts.shape[-1], dtype=wide), eps).flatten(-2) * weight).to(y.dtype)
