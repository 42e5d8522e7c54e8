"""Softmax attention through torch's `scaled_dot_product_attention`, on any device.

Without a window, padding or packing it is one call that needs no mask. A window is cut into blocks of queries, each with the keys that its
window reaches, so that neither time nor memory grows with the square of the length. Packed documents without a window are attended one
after another; where the graph may not depend on their lengths (torch.compile), under a mask while it is small, and else within one operator
(documents.py), which is slower but takes no memory that grows with the square of the length.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from gdn.core.packing import Packing
from gdn.ops.attention.documents import attention_within_documents, each_document
from gdn.ops.attention.visible import first_keys, visible, without_padding

MASK_ELEMENTS = 1 << 25
"""Largest mask of one call: 32 MiB of booleans, which the CPU kernel turns into 128 MiB."""
LARGEST_SQUARE = 1 << 26
"""Elements of the mask (batch x length x length) up to which packed documents of a compiled graph are attended to under one. 8192 tokens of
16 documents, 16 heads over 4 of 64, bfloat16, on an H200: 3.2 ms forward and backward and 305 MiB, in the operator 43 ms and 144 MiB."""
SMALLEST_BLOCK = 64
"""Queries of a block of a windowed call, at least."""


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float, start: Tensor | None, packing: Packing | None
) -> Tensor:
    """See `gdn.ops.causal_attention`."""
    if q.shape[0] * q.shape[1] == 0:
        return q.new_zeros(*q.shape[:3], v.shape[3])
    if window is not None and window >= k.shape[1]:
        window = None
    if packing is not None and window is None:
        if not torch.compiler.is_compiling():
            return each_document(lambda q, k, v: _attend(q, k, v, scale, None), q, k, v, packing.host)
        if q.shape[0] * q.shape[1] * k.shape[1] > LARGEST_SQUARE:
            return attention_within_documents(q, k, v, scale, packing)
    first = first_keys(q, k, start, packing)
    o = _full(q, k, v, scale, first) if window is None else _windowed(q, k, v, window, scale, first)
    return without_padding(o, k.shape[1] - q.shape[1], start)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """`[B, T, H, V]`, with a mask `[B or 1, 1, T, S]`, or causal with as many keys as queries."""
    return _kernel(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale, mask).transpose(1, 2)


def _kernel(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """Heads before tokens. Keys of grouped heads are repeated under a mask: the GPU kernel that takes masks has no groups, and without it
    all scores would be made in memory."""
    groups = q.shape[1] // k.shape[1]
    grouped = False
    if groups > 1:  # a symbol where a window folds the batch into the heads, and what is compared with one is no bool either
        if mask is None:
            grouped = True
        else:
            k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped)
    return o.to(v.dtype)  # another under autocast


def _full(q: Tensor, k: Tensor, v: Tensor, scale: float, first: Tensor | None) -> Tensor:
    """All keys up to the query's own, in as many calls as the size of the masks asks for."""
    batch, length, total = q.shape[0], q.shape[1], k.shape[1]
    past = total - length
    if first is None and past == 0:
        return _attend(q, k, v, scale, None)
    places = torch.arange(total, device=q.device)
    step = max(1, MASK_ELEMENTS // (total * (1 if first is None else batch)))

    def attend(begin: int, end: int) -> Tensor:
        reach = past + end
        mask = visible(places[past + begin : reach], places[:reach], None if first is None else first[:, None, begin:end], None)
        return _attend(q[:, begin:end], k[:, :reach], v[:, :reach], scale, mask)

    if length <= step:  # without a loop, whose graph would serve one length
        return attend(0, length)
    return torch.cat([attend(begin, min(begin + step, length)) for begin in range(0, length, step)], dim=1)


def _windowed(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float, first: Tensor | None) -> Tensor:
    """Blocks of half a window of queries. The rows of the batch share one mask; where they cannot, each gets a call of its own."""
    if first is not None and q.shape[0] > 1:
        rows = zip(q.split(1), k.split(1), v.split(1), first.split(1))
        return torch.cat([_windowed(one_q, one_k, one_v, window, scale, one) for one_q, one_k, one_v, one in rows])
    batch, length, past = q.shape[0], q.shape[1], k.shape[1] - q.shape[1]
    size = max(SMALLEST_BLOCK, window // 2)
    size, blocks = (length, 1) if length <= size else (size, -(-length // size))
    back = -(-(window - 1) // size) * size
    short = blocks * size - length
    queries = F.pad(q, (0, 0, 0, 0, 0, short)).unflatten(1, (blocks, size)).permute(1, 0, 3, 2, 4).flatten(1, 2)
    keys, values = (_reaches(x, back - past, short, size, back + size, blocks) for x in (k, v))
    mask = _block_masks(window, size, back, blocks, past, None if first is None else F.pad(first[0], (0, short)), q.device)
    o = _kernel(queries, keys, values, scale, mask.unsqueeze(1))
    return o.unflatten(1, (batch, -1)).permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :length]


def _reaches(x: Tensor, before: int, after: int, size: int, reach: int, blocks: int) -> Tensor:
    """The keys (or values) of each block, `[blocks, B * G, reach, K]`; the batch is folded into the heads."""
    padded = F.pad(x, (0, 0, 0, 0, before, after))  # a negative `before` drops keys that no window reaches
    if blocks == 1:  # `unfold` would make a number of a symbol
        return padded.transpose(1, 2).flatten(0, 1).unsqueeze(0)
    return padded.unfold(1, reach, size).permute(1, 0, 2, 4, 3).flatten(1, 2)


def _block_masks(window: int, size: int, back: int, blocks: int, past: int, first: Tensor | None, device: torch.device) -> Tensor:
    """`[blocks, size, back + size]`. Key r of block n is key `n * size + r - back + past` of the row, which is negative before the row."""
    shift = size * torch.arange(blocks, device=device).unsqueeze(1) + past
    own = shift + torch.arange(size, device=device)
    keys = shift + torch.arange(-back, size, device=device)
    distance = own.unsqueeze(2) - keys.unsqueeze(1)
    least = own.new_zeros(1, 1, 1) if first is None else first.view(blocks, size, 1)
    return (distance >= 0) & (distance < window) & (keys.unsqueeze(1) >= least)
