"""Softmax attention through torch's FlexAttention, for a compiled graph on a GPU.

`scaled_dot_product_attention` has no fused kernel for a window or for packed documents; it takes a mask of every pair. FlexAttention is
compiled with the rule itself and visits the blocks of 128 queries and 128 keys that the rule reaches. What a query sees begins and ends no
earlier than for the query before it, so the first and the last query of a block say which these are: of the square of the length only the
blocks are listed.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from gdn.core.packing import Packing
from gdn.ops.attention.visible import first_keys, without_padding

BLOCK = 128


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float, start: Tensor | None, packing: Packing | None
) -> Tensor:
    """See `gdn.ops.causal_attention`."""
    if q.shape[0] * q.shape[1] == 0:
        return q.new_zeros(*q.shape[:3], v.shape[3])
    first = first_keys(q, k, start, packing)
    queries, keys, values = (x.transpose(1, 2) for x in (q, k, v))
    blocks = _blocks(q, k.shape[1], window, first)
    o = flex_attention(queries, keys, values, block_mask=blocks, scale=scale, enable_gqa=q.shape[2] != k.shape[2])
    assert isinstance(o, Tensor)
    return without_padding(o.transpose(1, 2), k.shape[1] - q.shape[1], start)


def _blocks(q: Tensor, keys: int, window: int | None, first: Tensor | None) -> BlockMask:
    """Which blocks of keys a block of queries reaches, and which of them as a whole."""
    length = q.shape[1]
    past, device = keys - length, q.device
    begins = torch.arange(0, length, BLOCK, device=device)
    ends = (begins + BLOCK).clamp(max=length) - 1
    least, most = _first_seen(begins, past, window, first), _first_seen(ends, past, window, first)  # [B or 1, blocks]
    low = torch.arange(0, keys, BLOCK, device=device)
    high = (low + BLOCK).clamp(max=keys) - 1
    reached = (low <= (ends + past).unsqueeze(1)) & (high >= least.unsqueeze(-1))
    whole = (high <= (begins + past).unsqueeze(1)) & (low >= most.unsqueeze(-1))

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = query + past >= key
        if window is not None:
            seen = seen & (query + past - key < window)
        return seen if first is None else seen & (key >= first[batch, query])

    return BlockMask.from_kv_blocks(
        *_listed(reached & ~whole), *_listed(whole), BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(length, keys)
    )


def _first_seen(queries: Tensor, past: int, window: int | None, first: Tensor | None) -> Tensor:
    """The first key `[B or 1, queries]` that each of some queries sees."""
    least = torch.zeros_like(queries).unsqueeze(0) if first is None else first[:, queries]
    return least if window is None else torch.maximum(least, queries + (past - window + 1))


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """For bool `[B, M, N]`: the number in each row `[B, 1, M]`, and all numbers of blocks `[B, 1, M, N]`, theirs first."""
    order = torch.argsort(blocks.to(torch.int32), dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32).unsqueeze(1), order.to(torch.int32).unsqueeze(1)
