"""The definitions of the parts of a state-space layer, any floating dtype, gradients by autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from gdn.core.checks import accumulate_dtype


def scale_heads(x: Tensor, factor: Tensor) -> Tensor:
    """See `gdn.ops.scale_heads`."""
    return (factor.unsqueeze(-1) * x).to(x.dtype)


def skip_gated_rms_norm(y: Tensor, x: Tensor, D: Tensor, gate: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    """See `gdn.ops.skip_gated_rms_norm`."""
    wide = accumulate_dtype(y.dtype)
    z = gate.to(wide)
    u = (y.to(wide) + D.to(wide)[:, None] * x.to(wide)).flatten(2) * z * torch.sigmoid(z)
    parts = u.unflatten(-1, (groups, -1))
    normed = parts / torch.sqrt((parts * parts).mean(-1, keepdim=True) + eps)
    return (normed.flatten(-2) * weight.to(wide)).to(y.dtype)
