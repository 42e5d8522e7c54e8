"""The definition: the references of its parts. Gradients by autograd."""

from __future__ import annotations

from torch import Tensor

from gdn.core.packing import Packing
from gdn.ops.norm import reference as norm
from gdn.ops.qkv import EPS
from gdn.ops.short_conv import reference as conv


def convolved_qkv(x: Tensor, weight: Tensor, heads: int, head_dim: int, packing: Packing | None) -> tuple[Tensor, Tensor, Tensor]:
    """See `gdn.ops.convolved_qkv`."""
    y, _ = conv.causal_conv1d(x, weight, None, "silu", None, packing)
    width = heads * head_dim
    q, k, v = y.split((width, width, y.shape[-1] - 2 * width), dim=-1)
    q, k = (norm.l2norm(t.unflatten(-1, (heads, head_dim)), EPS) for t in (q, k))
    return q, k, v
