"""Attention within packed documents as one registered operator: a compiled graph may not depend on their lengths, this does.

The forward pass is one call of torch's fused kernel for each document. The backward pass computes the weights again, of some queries of a
document at a time with the keys that they see, in float32 for every narrower type:

    p = softmax(scale q k^T)        dv = p^T do        dz = p (do v^T - sum(p do v^T))        dq = scale dz k        dk = scale dz^T q

Neither makes anything as large as the square of the row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from gdn.core.checks import accumulate_dtype
from gdn.core.opaque import Opaque
from gdn.core.packing import Packing

SCORES = 1 << 25
"""Most weights that the backward pass holds at a time: 128 MiB in float32."""
BLOCK = 128
"""Most queries that it takes at a time: no more than these see keys that come later."""


def attention_within_documents(q: Tensor, k: Tensor, v: Tensor, scale: float, packing: Packing) -> Tensor:
    """Causal attention `[B, T, H, V]` of `q` `[B, T, H, K]` to `k` and `v` of as many tokens and G heads."""
    return _OPAQUE(q, k, v, packing.host, scale)[0]


def each_document(attend: Callable[[Tensor, Tensor, Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor, host: Tensor) -> Tensor:
    """Call `attend` with the tokens of one document after another, `[1, tokens, heads, width]`."""
    lengths = [n for n in host.diff().tolist() if n]
    pieces = zip(*(x.reshape(1, -1, *x.shape[2:]).split(lengths, dim=1) for x in (q, k, v)))
    return torch.cat([attend(*piece) for piece in pieces], dim=1).view(*q.shape[:3], v.shape[3])


def _forward(q: Tensor, k: Tensor, v: Tensor, host: Tensor, scale: float, keep: bool) -> tuple[Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        queries, keys, values = (x.transpose(1, 2) for x in (q, k, v))
        grouped = q.shape[2] != k.shape[2]
        return F.scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=scale, enable_gqa=grouped).transpose(1, 2)

    return (each_document(attend, q, k, v, host).contiguous(),)


def _fake(q: Tensor, k: Tensor, v: Tensor, host: Tensor, scale: float, keep: bool) -> tuple[Tensor]:
    return (q.new_empty(*q.shape[:3], v.shape[3]),)


def _backward(
    args: tuple[Tensor, Tensor, Tensor, Tensor, float], saved: tuple[Tensor, ...], grads: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, host, scale = args
    (do,) = grads
    assert do is not None
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    flat = [x.flatten(0, 1) for x in (q, k, v, do, dq, dk, dv)]
    for begin, end in pairwise(host.tolist()):
        if end > begin:
            _document_gradients(*(x[begin:end] for x in flat), scale=scale)
    return dq, dk, dv


def _document_gradients(q: Tensor, k: Tensor, v: Tensor, do: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, *, scale: float) -> None:
    """Fill `dq`, `dk` and `dv` of one document, `[tokens, heads, width]` like the others."""
    (length, heads, _), kv_heads = q.shape, k.shape[1]
    keys, values = (x.transpose(0, 1).to(accumulate_dtype(q.dtype)) for x in (k, v))
    d_keys, d_values = torch.zeros_like(keys), torch.zeros_like(values)
    for begin, end in _blocks(length, heads):
        # Query heads of one group of keys become rows of one matrix: [G, H / G * queries, width].
        queries, d_out = (x[begin:end].to(keys.dtype).transpose(0, 1).unflatten(0, (kv_heads, -1)).flatten(1, 2) for x in (q, do))
        seen_keys, seen_values = keys[:, :end], values[:, :end]
        own = torch.arange(begin, end, device=q.device).repeat(heads // kv_heads)
        later = torch.arange(end, device=q.device) > own.unsqueeze(1)
        p = (queries @ seen_keys.mT).mul_(scale).masked_fill_(later, -torch.inf).softmax(-1)
        d_values[:, :end] += p.mT @ d_out
        d_scores = d_out @ seen_values.mT
        d_scores = d_scores.sub_((p * d_scores).sum(-1, keepdim=True)).mul_(p).mul_(scale)
        d_keys[:, :end] += d_scores.mT @ queries
        dq[begin:end] = (d_scores @ seen_keys).unflatten(1, (heads // kv_heads, -1)).flatten(0, 1).transpose(0, 1)
    dk.copy_(d_keys.transpose(0, 1))
    dv.copy_(d_values.transpose(0, 1))


def _blocks(length: int, heads: int) -> Iterator[tuple[int, int]]:
    """Begin and end of the queries that are taken together."""
    size = max(1, min(BLOCK, SCORES // (heads * length)))
    return ((begin, min(begin + size, length)) for begin in range(0, length, size))


_OPAQUE = Opaque("gdn::attention_within_documents", _forward, _backward, fake=_fake, results=1, differentiable=("q", "k", "v"))
