"""Windowed sigmoid attention by blocks of queries, in plain torch, on any device: forward and backward hold one block's scores at a time.

A block of C queries reads the `C + window - 1` keys that its windows reach. Packed documents come one after another: a weight of zero times
what is no number, in a document that shares a block, would be no number. Nothing is saved but the arguments: the weights of a block,
which need no normalisation over the row, are computed again in the backward pass. Formulas: README.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from gdn.core.checks import accumulate_dtype
from gdn.core.opaque import Opaque
from gdn.core.packing import Packing
from gdn.ops.attention.visible import first_keys, visible, without_padding

BLOCK = 128
"""Queries of a block."""


def windowed_sigmoid_attention(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, window: int, scale: float, start: Tensor | None, packing: Packing | None
) -> Tensor:
    """See `gdn.ops.windowed_sigmoid_attention`."""
    host = None if packing is None else packing.host
    o = _OPAQUE(q, k, v, slopes, first_keys(q, k, start, None), host, window, scale)[0]
    return without_padding(o, k.shape[1] - q.shape[1], start)


@dataclass(frozen=True)
class _Block:
    """Some queries and the keys that they reach, heads before tokens: R = H / G query heads share a key head."""

    queries: slice
    keys: slice
    weights: Tensor
    """sigmoid of the scores, zero where a query does not see a key: `[B, G, R * C, n]`."""
    distance: Tensor
    """`[C, n]`, in tokens."""


def _documents(host: Tensor | None, *tensors: Tensor) -> Iterator[list[Tensor]]:
    """The tensors `[B, T, ...]` as they are, or what they hold of each document with boundaries `host`, `[1, tokens, ...]`."""
    if host is None:
        yield list(tensors)
        return
    flat = [x.flatten(0, 1).unsqueeze(0) for x in tensors]
    for begin, end in pairwise(host.tolist()):
        if end > begin:
            yield [x[:, begin:end] for x in flat]


def _by_head(x: Tensor, groups: int) -> Tensor:
    """`[B, T, H, K]` as `[B, G, R, T, K]` in the dtype of sums."""
    return x.to(accumulate_dtype(x.dtype)).unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4)


def _blocks(q: Tensor, k: Tensor, slopes: Tensor, first: Tensor | None, window: int, scale: float) -> Iterator[_Block]:
    """q `[B, G, R, T, K]`, k `[B, G, S, K]`, slopes `[G, R, 1, 1]`."""
    length, total = q.shape[3], k.shape[2]
    past, places = total - length, torch.arange(total, device=q.device)
    for begin in range(0, length, BLOCK):
        end = min(begin + BLOCK, length)
        queries, keys = slice(begin, end), slice(max(0, past + begin - window + 1), past + end)
        own, reached = places[past + begin : past + end], places[keys]
        distance = (own.unsqueeze(1) - reached).to(q.dtype)
        # Scaled after the product: its terms cancel, the errors of scaling them would not.
        scores = (q[:, :, :, queries].flatten(2, 3) @ k[:, :, keys].mT).mul_(scale)
        scores = scores.unflatten(2, (q.shape[2], -1)).add_(slopes * distance)
        seen = visible(own, reached, None if first is None else first[:, None, None, queries], window)
        yield _Block(queries, keys, scores.sigmoid_().masked_fill_(~seen, 0).flatten(2, 3), distance)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    first: Tensor | None,
    host: Tensor | None,
    window: int,
    scale: float,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """The outputs; nothing is saved beside the arguments."""
    groups, o = k.shape[2], _empty_output(q, v)
    steep = slopes.to(accumulate_dtype(q.dtype)).view(groups, -1, 1, 1)
    for some_q, some_k, some_v, some_o in _documents(host, q, k, v, o):
        queries, keys, values = _by_head(some_q, groups), _by_head(some_k, groups)[:, :, 0], _by_head(some_v, groups)[:, :, 0]
        for block in _blocks(queries, keys, steep, first, window, scale):
            read = (block.weights @ values[:, :, block.keys]).unflatten(2, (queries.shape[2], -1))
            some_o[:, block.queries] = read.permute(0, 3, 1, 2, 4).flatten(2, 3).to(o.dtype)
    return o, q.new_empty(0)


def _fake(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return _empty_output(q, v), q.new_empty(0)


def _empty_output(q: Tensor, v: Tensor) -> Tensor:
    return v.new_empty(*q.shape[:3], v.shape[3])


def _backward(args: tuple[Any, ...], saved: tuple[Tensor, ...], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    q, k, v, slopes, first, host, window, scale = args
    (do,) = grads
    assert do is not None
    groups = k.shape[2]
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    steep = slopes.to(accumulate_dtype(q.dtype)).view(groups, -1, 1, 1)
    dslopes = torch.zeros_like(steep)
    for *some, some_dq, some_dk, some_dv in _documents(host, q, k, v, do, dq, dk, dv):
        heads = [_by_head(x, groups) for x in some]
        parts = _gradients(heads[0], heads[1][:, :, 0], heads[2][:, :, 0], heads[3], steep, first, window, scale)
        some_dq.copy_(parts[0].permute(0, 3, 1, 2, 4).flatten(2, 3))
        some_dk.copy_(parts[1].transpose(1, 2))
        some_dv.copy_(parts[2].transpose(1, 2))
        dslopes += parts[3]
    return [dq, dk, dv, dslopes.flatten().to(slopes.dtype)]


def _gradients(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    outs: Tensor,
    steep: Tensor,
    first: Tensor | None,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of queries, keys, values and slopes, in their shapes."""
    dq, dk, dv, dslopes = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (queries, keys, values, steep))
    for block in _blocks(queries, keys, steep, first, window, scale):
        out, query = (x[:, :, :, block.queries].flatten(2, 3) for x in (outs, queries))
        dv[:, :, block.keys] += block.weights.mT @ out
        dscores = (out @ values[:, :, block.keys].mT).mul_(block.weights).mul_(1 - block.weights)
        dslopes += (dscores.unflatten(2, (queries.shape[2], -1)) * block.distance).sum((0, 3, 4)).view_as(dslopes)
        dscores *= scale
        dq[:, :, :, block.queries] = (dscores @ keys[:, :, block.keys]).unflatten(2, (queries.shape[2], -1))
        dk[:, :, block.keys] += dscores.mT @ query
    return dq, dk, dv, dslopes


_OPAQUE = Opaque("gdn::windowed_sigmoid_attention", _forward, _backward, fake=_fake, results=1, differentiable=("q", "k", "v", "slopes"))
