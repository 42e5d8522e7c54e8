"""Linear attention with one decay per head by matrix products over chunks, in plain torch, on any device. Derivation: README.md.

The backward pass keeps, beside the inputs, the memory at the begin of each segment; everything else is computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gdn.core.checks import accumulate_dtype
from gdn.core.opaque import Arguments, Opaque, Tensors, decided
from gdn.core.packing import Packing
from gdn.ops.linear_recurrence.memory import CHUNK, Layout, carry, start, unfold
from gdn.ops.sequences.decay import SMALLEST_LOG_DECAY, decays, log_decay_gradient, pair_decay
from gdn.ops.sequences.scratch import Scratch
from gdn.ops.sequences.walk import Segment


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, initial_state: Tensor | None, packing: Packing | None
) -> tuple[Tensor, Tensor]:
    """See `gdn.ops.linear_attention`."""
    o, state = _OPAQUE(q, k, v, g, initial_state, None if packing is None else packing.host, scale)
    return o, state


def _layout(k: Tensor, v: Tensor, bounds: Tensor | None) -> Layout:
    heads, width, value_heads, value_width = k.shape[2], k.shape[3], v.shape[2], v.shape[3]
    token = 4 * heads * width + 6 * value_heads * value_width + 4 * CHUNK * value_heads
    return Layout.of(v, bounds, memory=value_heads * width * value_width, token=token)


@dataclass
class Chunks:
    """What the chunks of a segment need that does not depend on the memory. M = slots * heads, and G value heads share a key head."""

    q: Tensor
    """Queries times scale, `[M, C, K]`."""
    k: Tensor
    """`[M, C, K]`, zero beyond a sequence's end."""
    v: Tensor
    """`[M, G, C, V]`"""
    gram: Tensor
    """Q K^T, `[M, 1, C, C]`."""
    decay: Tensor
    """exp of the sum of g from token j (exclusive) to token i, zero above the diagonal, `[M, G, C, C]`."""
    gated: Tensor
    """`gram * decay`."""
    gamma: Tensor
    """exp of the running sum of g, `[M, G, C, 1]`."""
    tail: Tensor
    """exp of the sum of g after each token, `[M, G, C, 1]`."""
    tailed: Tensor
    """Values times `tail`, in the memory's layout `[M, C, G V]`."""
    last: Tensor
    """exp of the sum of g of all tokens, for each column of the memory, `[M, 1, G V]`."""

    @classmethod
    def load(cls, segment: Segment, q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, size: int, scratch: Scratch) -> Chunks:
        slots, heads, width, value_heads, value_width = segment.size, k.shape[2], k.shape[3], v.shape[2], v.shape[3]
        m, groups = slots * heads, v.shape[2] // k.shape[2]
        queries, keys = scratch("queries", m, size, width), scratch("keys", m, size, width)
        values = scratch("values", m, groups, size, value_width)
        log = scratch("log", slots * value_heads, size, dtype=torch.float64)
        segment.load(q, queries.view(slots, heads, 1, size, width))
        segment.load(k, keys.view(slots, heads, 1, size, width))
        segment.load(v, values.view(slots, value_heads, 1, size, value_width))
        segment.load(g.unsqueeze(-1), log.view(slots, value_heads, 1, size, 1))
        outside = segment.outside(heads)
        if outside is not None:  # a token that neither forgets nor writes
            log.masked_fill_(outside.repeat_interleave(groups, dim=0), 0)
            keys.masked_fill_(outside.unsqueeze(-1), 0)
        total = log.clamp_(min=SMALLEST_LOG_DECAY).cumsum(-1)
        gamma = decays(total, scratch("gamma", *total.shape)).view(m, groups, size, 1)
        tail = decays(total[:, -1:] - total, scratch("tail", *total.shape)).view(m, groups, size, 1)
        decay = pair_decay(total, scratch("decay", slots * value_heads, size, size)).view(m, groups, size, size)
        gram = torch.bmm(queries.mul_(scale), keys.mT, out=scratch("gram", m, size, size)).unsqueeze(1)
        gated = torch.mul(gram, decay, out=scratch("gated", m, groups, size, size))
        tailed = scratch("tailed", m, size, groups, value_width)
        torch.mul(values, tail, out=tailed.transpose(1, 2))
        last = gamma[:, :, -1].expand(-1, -1, value_width).reshape(m, 1, -1)
        return cls(queries, keys, values, gram, decay, gated, gamma, tail, tailed.flatten(2), last)

    def memories(self, segment: Segment, memory: Tensor, scratch: Scratch) -> Tensor:
        """The memory before each chunk, `[M, K, G V]`; `memory` goes from before the segment to after it, in place."""
        shape = (len(self.k), self.k.shape[2], self.tailed.shape[2])
        writes = torch.bmm(self.k.mT, self.tailed, out=scratch("writes", *shape))
        return carry(segment, memory, self.last, writes, scratch("states", *shape))

    def apart(self, x: Tensor) -> Tensor:
        """`[M, C, G V]` as `[M, G, C, V]`."""
        return x.unflatten(2, self.v.shape[1::2]).transpose(1, 2)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    initial_state: Tensor | None,
    bounds: Tensor | None,
    scale: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, final states, and with `keep` the memories at the begin of each segment in the order of the walk."""
    layout = _layout(k, v, bounds)
    walk, size, heads, scratch = layout.walk(v, bounds), layout.chunk, k.shape[2], Scratch(v, accumulate_dtype(v.dtype))
    shape = (len(walk), heads, k.shape[3], v.shape[2] // heads * v.shape[3])
    memory = start(initial_state, v, shape, heads, walk, scratch.dtype)
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    starts = v.new_empty((layout.starts if keep else 0, *shape[1:]), dtype=scratch.dtype)
    for segment in walk.segments():
        c = Chunks.load(segment, q, k, v, g, scale, size, scratch)
        state = memory[segment.block]
        if keep:
            starts[segment.starts] = state[: segment.running[0]]
        states = c.memories(segment, state.flatten(0, 1), scratch)
        carried = torch.bmm(c.q, states, out=scratch("carried", len(c.q), size, shape[3]))
        outputs = torch.mul(c.apart(carried), c.gamma, out=scratch("outputs", *c.v.shape)).flatten(0, 1)
        outputs.baddbmm_(c.gated.flatten(0, 1), c.v.flatten(0, 1))
        segment.store(outputs.view(segment.size, -1, size, v.shape[3]), o)
    return o, unfold(walk.unsort(memory), v.shape[2] // heads), starts


def _backward(args: Arguments, saved: Tensors, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Walk the segments backwards with the gradient of the memory."""
    q, k, v, g, initial_state, bounds, scale = args
    (starts,), (d_o, d_final) = saved, grads
    layout = _layout(k, v, bounds)
    walk, size, heads, scratch = layout.walk(v, bounds), layout.chunk, k.shape[2], Scratch(v, starts.dtype)
    d_memory = start(d_final, starts, (len(walk), *starts.shape[1:]), heads, walk, scratch.dtype)
    d_o = torch.zeros_like(v) if d_o is None else d_o
    out = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, g))
    for segment in reversed(list(walk.segments())):
        c = Chunks.load(segment, q, k, v, g, scale, size, scratch)
        d_out = scratch("d_out", *c.v.shape)
        segment.load(d_o, d_out.view(segment.size, -1, 1, size, v.shape[3]))
        outside = segment.outside(v.shape[2])
        if outside is not None:
            d_out.view(-1, size, v.shape[3]).masked_fill_(outside.unsqueeze(-1), 0)
        states = c.memories(segment, starts[segment.starts].flatten(0, 1).clone(), scratch)
        d_q, d_k, d_v, d_g = _segment_gradients(segment, c, states, d_memory[segment.block].flatten(0, 1), d_out, scratch)
        for target, gradient in zip(out, (d_q.mul_(scale), d_k, d_v, d_g.unsqueeze(-1))):
            target = target.unsqueeze(-1) if target.ndim == 3 else target
            segment.store(gradient.reshape(segment.size, target.shape[2], size, -1), target)
    out[3].masked_fill_(g < SMALLEST_LOG_DECAY, 0)
    return [*out, None if initial_state is None else unfold(walk.unsort(d_memory), v.shape[2] // heads)]


def _segment_gradients(
    segment: Segment, c: Chunks, states: Tensor, d_memory: Tensor, d_out: Tensor, scratch: Scratch
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the scaled queries, of k, v and g at a segment's chunks.

    `d_memory` goes from the memory after the segment to the one before it, in place.
    """
    m, groups, size, value_width = c.v.shape
    d_carried = scratch("d_carried", m, size, groups, value_width)
    torch.mul(d_out, c.gamma, out=d_carried.transpose(1, 2))
    d_carried = d_carried.flatten(2)
    reads = torch.bmm(c.q.mT, d_carried, out=scratch("writes", *states.shape))
    d_states = carry(segment, d_memory, c.last, reads, scratch("d_states", *states.shape), backwards=True)

    d_gated = scratch("d_gated", m, groups, size, size)
    torch.bmm(d_out.flatten(0, 1), c.v.flatten(0, 1).mT, out=d_gated.flatten(0, 1))
    d_gram = torch.mul(d_gated, c.decay, out=scratch("d_decayed", m, groups, size, size)).sum(1)
    d_q = torch.bmm(d_carried, states.mT).baddbmm_(d_gram, c.k)
    d_k = torch.bmm(c.tailed, d_states.mT).baddbmm_(d_gram.mT, c.q)

    carried = torch.bmm(c.q, states, out=scratch("carried", m, size, groups * value_width))
    product = scratch("outputs", *c.v.shape)
    into = torch.mul(c.apart(carried), d_out, out=product).sum(-1).mul_(c.gamma[..., 0])
    written = torch.bmm(c.k, d_states, out=carried)
    d_v = torch.mul(c.apart(written), c.tail, out=scratch("d_v", *c.v.shape))
    onward = torch.mul(d_v, c.v, out=product).sum(-1)
    d_v.flatten(0, 1).baddbmm_(c.gated.flatten(0, 1).mT, d_out.flatten(0, 1))

    through = d_states.mul_(states).sum(1).mul_(c.last[:, 0]).view(m * groups, value_width).sum(-1, keepdim=True)
    between = d_gated.mul_(c.gated).flatten(0, 1)
    d_g = log_decay_gradient(between, into.flatten(0, 1), onward.flatten(0, 1), through, scratch("crossing", *between.shape))
    return d_q, d_k, d_v, d_g


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    initial_state: Tensor | None,
    bounds: Tensor | None,
    scale: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    documents = v.shape[0] if bounds is None else bounds.shape[0] - 1
    dtype, heads = accumulate_dtype(v.dtype), k.shape[2]
    final = v.new_empty((documents, v.shape[2], k.shape[3], v.shape[3]), dtype=dtype)
    starts = decided(lambda: _layout(k, v, bounds).starts, k, v, bounds) if keep else 0
    return v.new_empty(v.shape), final, v.new_empty((starts, heads, k.shape[3], v.shape[2] // heads * v.shape[3]), dtype=dtype)


_OPAQUE = Opaque(
    "gdn::linear_attention_chunked",
    _forward,
    _backward,
    fake=_fake,
    results=2,
    differentiable=("q", "k", "v", "g", "initial_state"),
)
