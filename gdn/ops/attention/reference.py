"""The definitions: one query at a time, any floating dtype, gradients by autograd. Runs anywhere, slowly.

Sums are float32, or float64 for float64 inputs: the truth that every other implementation is measured against.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gdn.core.checks import accumulate_dtype
from gdn.core.packing import Packing


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float, start: Tensor | None, packing: Packing | None
) -> Tensor:
    """See `gdn.ops.causal_attention`."""

    def read(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        scores = scale * torch.einsum("hk,nhk->nh", query, keys)
        return torch.einsum("nh,nhv->hv", scores.softmax(0), values)

    return _each_query(read, q, k, v, window, start, packing)


def windowed_sigmoid_attention(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, window: int, scale: float, start: Tensor | None, packing: Packing | None
) -> Tensor:
    """See `gdn.ops.windowed_sigmoid_attention`."""
    steep = slopes.to(accumulate_dtype(q.dtype))

    def read(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        distance = torch.arange(keys.shape[0] - 1, -1, -1, device=keys.device).unsqueeze(1)
        scores = scale * torch.einsum("hk,nhk->nh", query, keys) + steep * distance
        return torch.einsum("nh,nhv->hv", scores.sigmoid(), values)

    return _each_query(read, q, k, v, window, start, packing)


def _each_query(
    read: Callable[[Tensor, Tensor, Tensor], Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    start: Tensor | None,
    packing: Packing | None,
) -> Tensor:
    """`read(query [H, K], keys [n, H, K], values [n, H, V]) -> [H, V]` for each query with the keys that it sees, oldest first."""
    wide, group = accumulate_dtype(q.dtype), q.shape[2] // k.shape[2]
    batch, length, past = q.shape[0], q.shape[1], k.shape[1] - q.shape[1]
    begins = [0] * batch if start is None else start.tolist()
    positions = None if packing is None else packing.positions.view(batch, length).tolist()
    keys, values = (x.to(wide).repeat_interleave(group, dim=2) for x in (k, v))
    rows = []
    for b in range(batch):
        for t in range(length):
            own = past + t
            first = begins[b] if positions is None else own - positions[b][t]
            if own < first:
                rows.append(values.new_zeros(values.shape[2:]))
                continue
            seen = slice(first if window is None else max(first, own - window + 1), own + 1)
            rows.append(read(q[b, t].to(wide), keys[b, seen], values[b, seen]))
    shape = (batch, length, q.shape[2], v.shape[3])
    return (torch.stack(rows).view(shape) if rows else values.new_zeros(shape)).to(v.dtype)
