"""The rotary embedding in plain torch, any device, gradients by autograd."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See `gdn.ops.rotary_embedding`."""
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    pairs = cos.shape[-1]
    turned, rest = x.split([2 * pairs, x.shape[-1] - 2 * pairs], dim=-1)
    a, b = turned.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat([(a * cos - b * sin).to(x.dtype), (a * sin + b * cos).to(x.dtype), rest], dim=-1)
