"""Through the tables of its parts, so that their fastest rows, or forced ones, apply. Runs wherever they do."""

from __future__ import annotations

from torch import Tensor

from gdn.core.packing import Packing
from gdn.ops.norm import l2norm
from gdn.ops.qkv import EPS
from gdn.ops.short_conv import causal_conv1d


def convolved_qkv(x: Tensor, weight: Tensor, heads: int, head_dim: int, packing: Packing | None) -> tuple[Tensor, Tensor, Tensor]:
    """See `gdn.ops.convolved_qkv`."""
    y, _ = causal_conv1d(x, weight, activation="silu", packing=packing)
    width = heads * head_dim
    q, k, v = y.split((width, width, y.shape[-1] - 2 * width), dim=-1)
    q, k = (l2norm(t.unflatten(-1, (heads, head_dim)), eps=EPS) for t in (q, k))
    return q, k, v
