"""The definition of the rotary embedding, with complex numbers, gradients by autograd."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See `gdn.ops.rotary_embedding`."""
    pairs, wide = cos.shape[-1], x.to(cos.dtype)
    turned = torch.complex(wide[..., :pairs], wide[..., pairs : 2 * pairs]) * torch.complex(cos, sin).unsqueeze(-2)
    return torch.cat([turned.real, turned.imag, wide[..., 2 * pairs :]], dim=-1).to(x.dtype)
