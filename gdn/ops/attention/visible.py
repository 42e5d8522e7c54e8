"""Which keys a query sees, in one form for packed documents, for padding on the left and for keys from before the queries.

Query t of T stands at key `s = S - T + t` of S. It sees the keys from `first` to s, of those the last `window`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gdn.core.packing import Packing


def first_keys(q: Tensor, k: Tensor, start: Tensor | None, packing: Packing | None) -> Tensor | None:
    """The first key that each query may see, int64 `[B, T]`; None where that is key 0 for all. A query in padding sees itself only."""
    batch, length, past = q.shape[0], q.shape[1], k.shape[1] - q.shape[1]
    own = torch.arange(past, past + length, device=q.device)
    if packing is not None:
        return own - packing.positions.view(batch, length)
    return None if start is None else torch.minimum(own, start.unsqueeze(1))


def visible(own: Tensor, keys: Tensor, first: Tensor | None, window: int | None) -> Tensor:
    """Bool `[..., queries, keys]`: own `[queries]` and keys `[keys]` are places among the keys, first `[..., queries]`."""
    distance = own.unsqueeze(-1) - keys
    seen = distance >= 0
    if window is not None:
        seen = seen & (distance < window)
    return seen if first is None else seen & (keys >= first.unsqueeze(-1))


def without_padding(o: Tensor, past: int, start: Tensor | None) -> Tensor:
    """Outputs `[B, T, ...]` with zeros at the queries before `start [B]`."""
    if start is None:
        return o
    own = torch.arange(past, past + o.shape[1], device=o.device)
    return o.masked_fill((own < start.unsqueeze(1)).unflatten(1, (-1, *[1] * (o.ndim - 2))), 0)
