"""Keys and values of past tokens, kept in slots.

A cache `[N, R, ...]` has R slots for each of N sequences; the token at position p lies in slot `p % R`. With R the width of a window it
is a rolling cache that forgets what the window has left; with R at least the number of tokens it never wraps and keeps everything.
`seen [N]` counts the tokens of each sequence, padding not counted, so that sequences of different lengths share a batch.

The functions are pure, except `append_`. `pads [N]` counts the tokens on the left of `new [N, T, ...]` that are padding; None is none.
"""

from __future__ import annotations

import torch
from torch import Tensor


def held(last: Tensor, slots: int) -> Tensor:
    """The position that each slot holds after the token at position `last [N]`: int64 `[N, slots]`, negative where it is empty."""
    last = last.unsqueeze(1)
    return last - (last - torch.arange(slots, device=last.device)) % slots


def written(cache: Tensor, seen: Tensor, new: Tensor, pads: Tensor | None = None) -> Tensor:
    """The cache after some more tokens."""
    slots, length = cache.shape[1], new.shape[1]
    if length == 0:
        return cache
    first = seen if pads is None else seen - pads  # the position that token 0 would have
    position = held(first + (length - 1), slots)
    source = (position - first.unsqueeze(1)).clamp(0, length - 1)
    fresh = (position >= seen.unsqueeze(1)).unflatten(1, (slots, *[1] * (cache.ndim - 2)))
    return torch.where(fresh, take(new, source).to(cache.dtype), cache)


def append_(cache: Tensor, seen: Tensor, new: Tensor, *, wraps: bool = True) -> None:
    """Write tokens without padding into the cache, in place: costs as much as the tokens, not as much as the cache. A cache that never
    wraps has no place for more tokens than slots, and says so."""
    slots, length = cache.shape[1], new.shape[1]
    kept = min(slots, length)
    position = seen.unsqueeze(1) + torch.arange(length - kept, length, device=seen.device)
    rows = torch.arange(cache.shape[0], device=seen.device).unsqueeze(1)
    cache[rows, position % slots if wraps else position] = new[:, length - kept :].to(cache.dtype)


def lined_up(cache: Tensor, seen: Tensor, new: Tensor, past: int, pads: Tensor | None = None) -> Tensor:
    """The last `past` tokens of the cache and the new ones in one row `[N, past + T, ...]`, moved to the right of their padding: entry j
    holds a token from `line_start(...)` on, and the tokens are in order without a gap."""
    if past == 0:
        return new
    places = seen.unsqueeze(1) + torch.arange(-past, 0, device=seen.device)
    row = torch.cat([take(cache, places % cache.shape[1]).to(new.dtype), new], dim=1)
    if pads is None:
        return row
    at = torch.arange(row.shape[1], device=seen.device)
    pads = pads.unsqueeze(1)
    return take(row, torch.where(at >= past + pads, at, (at - pads).clamp(min=0)))


def line_start(seen: Tensor, past: int, pads: Tensor | None = None) -> Tensor:
    """The first entry of `lined_up` that holds a token, `[N]`."""
    start = past - seen.clamp(max=past)
    return start if pads is None else start + pads


def take(x: Tensor, index: Tensor) -> Tensor:
    """`x[n, index[n, m]]`: `[N, M, ...]` from `x [N, R, ...]` and `index [N, M]`."""
    return x[torch.arange(x.shape[0], device=x.device).unsqueeze(1), index]
