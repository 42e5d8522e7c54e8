"""Linear attention with a decay for each channel of the keys or of the values, by matrix products over chunks, in plain torch.

Both operators and all their gradients are derivatives of one function of four sequences (README.md), with one decay per channel of x and y:

    F = sum over tokens i >= j of  (sum over channels of x_i y_j exp(g_{j+1} + ... + g_i))  (a_i . b_j)

|                  | x           | y | a           | b | output | S     |
|------------------|-------------|---|-------------|---|--------|-------|
| decay on keys    | q           | k | gradient of o | v | dF/da  | `K x V` |
| decay on values  | gradient of o | v | q           | k | dF/dx  | `V x K` |

so that a memory is always the sum of decayed `y_j b_j^T`. The backward pass keeps, beside the inputs, the memory at the begin of each
segment; everything else is computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gdn.core.checks import accumulate_dtype
from gdn.core.opaque import Arguments, Opaque, Tensors, decided
from gdn.core.packing import Packing
from gdn.ops.linear_recurrence.intervals import Intervals
from gdn.ops.linear_recurrence.memory import CHUNK, Layout, carry, start, unfold
from gdn.ops.sequences.decay import SMALLEST_LOG_DECAY
from gdn.ops.sequences.scratch import Scratch
from gdn.ops.sequences.walk import Segment


def gated_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, initial_state: Tensor | None, packing: Packing | None
) -> tuple[Tensor, Tensor]:
    """See `gdn.ops.gated_linear_attention`."""
    o, state = _KEYS(q, k, v, g, initial_state, None if packing is None else packing.host, scale)
    return o, state


def value_gated_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, initial_state: Tensor | None, packing: Packing | None
) -> tuple[Tensor, Tensor]:
    """See `gdn.ops.value_gated_linear_attention`."""
    o, state = _VALUES(q, k, v, g, initial_state, None if packing is None else packing.host, scale)
    return o, state


def _wide(x: Tensor, heads: int) -> Tensor:
    """`[B, T, HV, V]` as `[B, T, H, G V]`: value heads that share queries and keys are one wide head."""
    return x.unflatten(2, (heads, -1)).flatten(3)


def _layout(k: Tensor, v: Tensor, bounds: Tensor | None, on_values: bool) -> Layout:
    keys, values = k.shape[2] * k.shape[3], v.shape[2] * v.shape[3]
    gated, plain = (values, keys) if on_values else (keys, values)
    return Layout.of(v, bounds, memory=k.shape[3] * values, token=16 * gated + 5 * plain + 3 * CHUNK * k.shape[2])


@dataclass
class Chunks:
    """The sides of F that are inputs, for the chunks of a segment, and what follows without the memory. M = slots * heads."""

    y: Tensor
    """`[M, C, X]`, zero beyond a sequence's end."""
    b: Tensor
    """`[M, C, A]`"""
    intervals: Intervals
    tailed: Tensor
    """y times `intervals.tail`, `[M, C, X]`."""
    last: Tensor
    """exp of the sum of g of all tokens, `[M, X, 1]`."""

    @classmethod
    def load(cls, segment: Segment, y: Tensor, g: Tensor, b: Tensor, size: int, scratch: Scratch) -> Chunks:
        written, log, plain = (load(segment, x, name, size, scratch) for x, name in ((y, "y"), (g, "g"), (b, "b")))
        blank(segment, y.shape[2], written, log)  # tokens that neither forget nor write
        intervals = Intervals.of(log.clamp_(min=SMALLEST_LOG_DECAY), scratch)
        tailed = torch.mul(written, intervals.tail, out=scratch("tailed", *written.shape))
        return cls(written, plain, intervals, tailed, intervals.gamma[:, -1].unsqueeze(-1).clone())

    def memories(self, segment: Segment, memory: Tensor, scratch: Scratch) -> Tensor:
        """The memory before each chunk, `[M, X, A]`; `memory` goes from before the segment to after it, in place."""
        shape = (len(self.y), self.y.shape[2], self.b.shape[2])
        writes = torch.bmm(self.tailed.mT, self.b, out=scratch("writes", *shape))
        return carry(segment, memory, self.last, writes, scratch("states", *shape))


def load(segment: Segment, x: Tensor, name: str, size: int, scratch: Scratch) -> Tensor:
    """The tokens of x `[B, T, H, width]` in a segment, `[M, C, width]`."""
    heads, width = x.shape[2:]
    into = scratch(name, segment.size * heads, size, width)
    segment.load(x, into.view(segment.size, heads, 1, size, width))
    return into


def blank(segment: Segment, heads: int, *tensors: Tensor) -> None:
    """Zero the places beyond a sequence's end."""
    outside = segment.outside(heads)
    if outside is not None:
        for x in tensors:
            x.masked_fill_(outside.unsqueeze(-1), 0)


def _paths(c: Chunks, x: Tensor, scratch: Scratch) -> tuple[Tensor, Tensor]:
    """The weight of every pair of tokens of a chunk `[M, C, C]`, and x as it reads the memory before the chunk `[M, C, X]`."""
    scores = c.intervals.score(x, c.y, scratch("scores", *x.shape[:2], x.shape[1]), scratch)
    return scores, torch.mul(x, c.intervals.gamma, out=scratch("decayed", *x.shape))


def _by_a(c: Chunks, paths: tuple[Tensor, Tensor], states: Tensor, scratch: Scratch) -> Tensor:
    """dF/da."""
    scores, decayed = paths
    return torch.bmm(decayed, states, out=scratch("by a", *c.b.shape)).baddbmm_(scores, c.b)


def _by_x(c: Chunks, a: Tensor, states: Tensor, scratch: Scratch) -> Tensor:
    """dF/dx."""
    pairs = torch.bmm(a, c.b.mT, out=scratch("products", *a.shape[:2], a.shape[1])).tril_()
    out = torch.bmm(a, states.mT, out=scratch("by x", *c.y.shape)).mul_(c.intervals.gamma)
    return c.intervals.read(pairs, c.y, out, scratch)


def _gradients(
    segment: Segment, c: Chunks, x: Tensor, a: Tensor, paths: tuple[Tensor, Tensor], states: Tensor, d_memory: Tensor, scratch: Scratch
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dF/dx, dF/dy, dF/db and dF/dg.

    `d_memory` goes from the gradient of the memory after the segment to that of the memory before it, in place.
    """
    scores, decayed = paths
    reads = torch.bmm(decayed.mT, a, out=scratch("writes", *states.shape))
    d_states = carry(segment, d_memory, c.last, reads, scratch("d_states", *states.shape), backwards=True)

    products = torch.bmm(a, c.b.mT, out=scratch("products", *scores.shape)).tril_()
    by_b = torch.bmm(c.tailed, d_states, out=scratch("by b", *c.b.shape)).baddbmm_(scores.mT, a)
    by_x = torch.bmm(a, states.mT, out=scratch("by x", *x.shape)).mul_(c.intervals.gamma)
    by_y = torch.bmm(c.b, d_states.mT, out=scratch("by y", *x.shape)).mul_(c.intervals.tail)
    d_before, d_after = (torch.mul(p, q, out=scratch(n, *x.shape)) for p, q, n in ((by_x, x, "d_before"), (by_y, c.y, "d_after")))
    d_before[:, -1] += d_states.mul_(states).sum(-1).mul_(c.last[..., 0])
    by_g = c.intervals.gradients(products, x, c.y, by_x, by_y, d_before, d_after, scratch)
    return by_x, by_y, by_b, by_g


def _forward(
    on_values: bool,
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
    layout, heads = _layout(k, v, bounds, on_values), k.shape[2]
    walk, size, scratch = layout.walk(v, bounds), layout.chunk, Scratch(v, accumulate_dtype(v.dtype))
    y, b, g = (_wide(v, heads), k, _wide(g, heads)) if on_values else (k, _wide(v, heads), g)
    memory = start(initial_state, v, (len(walk), heads, y.shape[3], b.shape[3]), heads, walk, scratch.dtype, turned=on_values)
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    starts = v.new_empty((layout.starts if keep else 0, *memory.shape[1:]), dtype=scratch.dtype)
    for segment in walk.segments():
        c = Chunks.load(segment, y, g, b, size, scratch)
        queries, state = load(segment, q, "q", size, scratch).mul_(scale), memory[segment.block]
        if keep:
            starts[segment.starts] = state[: segment.running[0]]
        states = c.memories(segment, state.flatten(0, 1), scratch)
        outputs = _by_x(c, queries, states, scratch) if on_values else _by_a(c, _paths(c, queries, scratch), states, scratch)
        segment.store(outputs.unflatten(0, (segment.size, heads)), _wide(o, heads))
    return o, unfold(walk.unsort(memory), v.shape[2] // heads, turned=on_values), starts


def _backward(on_values: bool, args: Arguments, saved: Tensors, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Walk the segments backwards with the gradient of the memory."""
    q, k, v, g, initial_state, bounds, scale = args
    (starts,), (d_o, d_final) = saved, grads
    layout, heads = _layout(k, v, bounds, on_values), k.shape[2]
    walk, size, scratch = layout.walk(v, bounds), layout.chunk, Scratch(v, starts.dtype)
    y, b, gates = (_wide(v, heads), k, _wide(g, heads)) if on_values else (k, _wide(v, heads), g)
    d_memory = start(d_final, starts, (len(walk), *starts.shape[1:]), heads, walk, scratch.dtype, turned=on_values)
    d_o = torch.zeros_like(v) if d_o is None else d_o
    out = d_q, d_k, d_v, d_g = tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v, g))
    targets = (d_q, d_k, _wide(d_v, heads), _wide(d_g, heads) if on_values else d_g)
    for segment in reversed(list(walk.segments())):
        c = Chunks.load(segment, y, gates, b, size, scratch)
        queries = load(segment, q, "q", size, scratch).mul_(scale)
        upstream = load(segment, _wide(d_o, heads), "d_o", size, scratch)
        blank(segment, heads, upstream)
        states = c.memories(segment, starts[segment.starts].flatten(0, 1).clone(), scratch)
        x, a = (upstream, queries) if on_values else (queries, upstream)
        paths = _paths(c, x, scratch)
        by_x, by_y, by_b, by_g = _gradients(segment, c, x, a, paths, states, d_memory[segment.block].flatten(0, 1), scratch)
        by_q = _by_a(c, paths, states, scratch) if on_values else by_x
        for target, gradient in zip(targets, (by_q.mul_(scale), *((by_b, by_y) if on_values else (by_y, by_b)), by_g)):
            segment.store(gradient.unflatten(0, (segment.size, heads)), target)
    d_g.masked_fill_(g < SMALLEST_LOG_DECAY, 0)
    return [*out, None if initial_state is None else unfold(walk.unsort(d_memory), v.shape[2] // heads, turned=on_values)]


def _fake(
    on_values: bool,
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
    dtype, heads, width, values = accumulate_dtype(v.dtype), k.shape[2], k.shape[3], v.shape[2] // k.shape[2] * v.shape[3]
    final = v.new_empty((documents, v.shape[2], width, v.shape[3]), dtype=dtype)
    starts = decided(lambda: _layout(k, v, bounds, on_values).starts, k, v, bounds) if keep else 0
    return v.new_empty(v.shape), final, v.new_empty((starts, heads, *((values, width) if on_values else (width, values))), dtype=dtype)


def _opaque(name: str, on_values: bool) -> Opaque:
    """The operator with `on_values` filled in; its signature is what torch registers."""

    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        initial_state: Tensor | None,
        bounds: Tensor | None,
        scale: float,
        keep: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _forward(on_values, q, k, v, g, initial_state, bounds, scale, keep)

    def backward(args: Arguments, saved: Tensors, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        return _backward(on_values, args, saved, grads)

    def fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        return _fake(on_values, *args)

    return Opaque(name, forward, backward, fake=fake, results=2, differentiable=("q", "k", "v", "g", "initial_state"))


_KEYS = _opaque("gdn::gated_linear_attention_chunked", on_values=False)
_VALUES = _opaque("gdn::value_gated_linear_attention_chunked", on_values=True)
