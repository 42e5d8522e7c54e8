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
    past = keys - length

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = query + past >= key
        if window is not None:
            seen = seen & (query + past - key < window)
        return seen if first is None else seen & (key >= first[batch, query])

    least = torch.zeros(1, length, dtype=torch.int64, device=q.device) if first is None else first
    return BlockMask((length, keys), *_lists(least, keys, window), BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=sees)


@torch.library.custom_op("gdn::attention_blocks", mutates_args=())
def _lists(first: Tensor, keys: int, window: int | None) -> list[Tensor]:
    """The eight lists of a `BlockMask`, of keys in part and as a whole, then of queries: numbers int32 `[B, 1, M]`, blocks `[B, 1, M, N]`.

    An operator that the compiler does not look into. FlexAttention's kernels step from one sequence to the next by the stride of the
    dimension of one head. That of a tensor which the compiler makes is anything: with torch 2.11 all sequences had the first one's blocks.
    """
    length, device = first.shape[1], first.device
    past = keys - length
    begins = torch.arange(0, length, BLOCK, device=device)
    ends = (begins + BLOCK).clamp(max=length) - 1
    least, most = (_first_seen(queries, past, window, first) for queries in (begins, ends))  # [B, blocks]
    low = torch.arange(0, keys, BLOCK, device=device)
    high = (low + BLOCK).clamp(max=keys) - 1
    reached = (low <= (ends + past).unsqueeze(1)) & (high >= least.unsqueeze(-1))
    whole = (high <= (begins + past).unsqueeze(1)) & (low >= most.unsqueeze(-1))
    kinds = reached & ~whole, whole
    return [found for blocks in (*kinds, *(x.mT for x in kinds)) for found in _listed(blocks)]


@_lists.register_fake
def _(first: Tensor, keys: int, window: int | None) -> list[Tensor]:
    batch, length = first.shape
    m, n = (length + BLOCK - 1) // BLOCK, (keys + BLOCK - 1) // BLOCK
    shapes = 2 * [(batch, 1, m), (batch, 1, m, n)] + 2 * [(batch, 1, n), (batch, 1, n, m)]
    return [first.new_empty(shape, dtype=torch.int32) for shape in shapes]


def _first_seen(queries: Tensor, past: int, window: int | None, first: Tensor) -> Tensor:
    """The first key `[B, queries]` that each of some queries sees."""
    least = first[:, queries]
    return least if window is None else torch.maximum(least, queries + (past - window + 1))


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """For bool `[B, M, N]`: the number in each row `[B, 1, M]`, and all numbers of blocks `[B, 1, M, N]`, theirs first."""
    blocks = blocks.to(torch.int32, memory_format=torch.contiguous_format)
    order = torch.argsort(blocks, dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32).unsqueeze(1), order.to(torch.int32).unsqueeze(1)
