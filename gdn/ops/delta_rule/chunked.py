"""The gated delta rule by matrix products over chunks of 32 tokens, in plain torch, on any device. Derivation and measurements: README.md.

The sequence is walked in segments of a few chunks of some sequences, whose buffers stay in the cache. The backward pass keeps, beside the
inputs, the errors `Z` (the size of v), the inverses (32 numbers per token and head) and the state at the begin of each segment; the states
inside a segment are computed again.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gdn.core.checks import accumulate_dtype
from gdn.core.opaque import Arguments, Opaque, Tensors
from gdn.core.packing import Packing
from gdn.ops.sequences.decay import SMALLEST_LOG_DECAY, log_decay_gradient, pair_decay
from gdn.ops.sequences.scratch import Scratch
from gdn.ops.sequences.walk import Segment, Walk

CHUNK = 32
"""Tokens per chunk, for all but very short sequences. Measured against 64 in README.md."""
BLOCK_ELEMENTS = 1 << 19
"""Elements of the states of the sequences that advance together: 2 MiB in float32, the second-level caches of two cores."""
SEGMENT_ELEMENTS = 3 << 20
"""Elements of all buffers of a segment, about."""


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float,
    initial_state: Tensor | None,
    packing: Packing | None,
) -> tuple[Tensor, Tensor]:
    """See `gdn.ops.gated_delta_rule`."""
    o, state = _OPAQUE(q, k, v, g, beta, initial_state, None if packing is None else packing.host, scale)
    return o, state


@dataclass(frozen=True)
class Layout:
    """Sizes that follow from the shapes alone."""

    chunk: int
    block: int
    stretch: int
    slots: int
    """At least the number of chunks of all sequences."""
    starts: int
    """At least the number of states saved."""

    @classmethod
    def of(cls, k: Tensor, v: Tensor, bounds: Tensor | None) -> Layout:
        batch, length, heads = v.shape[:3]
        state = k.shape[3] * v.shape[3]
        chunk = CHUNK if length > CHUNK // 2 else CHUNK // 2
        block = max(1, BLOCK_ELEMENTS // max(1, heads * state))
        together = heads * (block if bounds is not None else min(block, batch))
        step = together * (8 * chunk * (k.shape[3] + v.shape[3]) + state)
        stretch = min(16, max(2, SEGMENT_ELEMENTS // max(1, step)))
        if bounds is None:
            return cls(chunk, block, stretch, batch * -(-length // chunk), batch * -(-length // (chunk * stretch)))
        documents = bounds.shape[0] - 1
        return cls(chunk, block, stretch, batch * length // chunk + documents, batch * length // (chunk * stretch) + documents)

    def walk(self, v: Tensor, bounds: Tensor | None) -> Walk:
        return Walk(v.shape[0], v.shape[1], bounds, v.device, chunk=self.chunk, block=self.block, stretch=self.stretch)


@dataclass
class Chunks:
    """What the chunks of a segment need that does not depend on the state; M = slots * value heads matrices."""

    both: Tensor
    """Keys above queries, `[M, 2C, K]`."""
    keys: Tensor
    """The upper half of `both`."""
    gram: Tensor
    """K K^T above Q K^T, `[slots, H, 1, 2, C, C]`."""
    decay: Tensor
    """Gam, `[M, C, C]`: exp of the sum of g from token j (exclusive) to token i, zero above the diagonal."""
    gated: Tensor
    """`[M, 2, C, C]`: K K^T * Gam below the diagonal, and Q K^T * Gam on it and below."""
    beta: Tensor
    """`[M, C, 1]`"""
    gamma: Tensor
    """exp of the running sum of g, `[M, C, 1]`."""
    tail: Tensor
    """exp of the sum of g after each token, `[M, C, 1]`."""
    tails: Tensor
    """Keys times `tail`, `[M, C, K]`."""
    last: Tensor
    """exp of the sum of g, `[M, 1, 1]`."""

    @classmethod
    def load(cls, segment: Segment, q: Tensor, k: Tensor, g: Tensor, beta: Tensor, chunk: int, scratch: Scratch) -> Chunks:
        slots, size, dtype = segment.size, chunk, scratch.dtype
        heads, narrow, width = g.shape[2], k.shape[2], k.shape[3]
        both = scratch("both", slots, narrow, heads // narrow, 2 * size, width)
        segment.load(k, both[..., :size, :])
        segment.load(q, both[..., size:, :])
        shared = both.view(slots * narrow, -1, 2 * size, width)[:, 0]  # one of the equal copies
        gram = torch.bmm(shared, shared[:, :size].mT, out=scratch("gram", slots * narrow, 2 * size, size))
        gram = gram.view(slots, narrow, 1, 2, size, size)
        log, strength = scratch("log", slots * heads, size, dtype=torch.float64), scratch("strength", slots * heads, size)
        segment.load(g.unsqueeze(-1), log.view(slots, heads, 1, size, 1))
        segment.load(beta.unsqueeze(-1), strength.view(slots, heads, 1, size, 1))
        outside = segment.outside(heads)
        if outside is not None:  # a token that neither forgets nor writes
            log.masked_fill_(outside, 0)
            strength.masked_fill_(outside, 0)
        total = log.clamp_(min=SMALLEST_LOG_DECAY).cumsum(-1)
        gamma, tail = total.exp(), (total[:, -1:] - total).exp_()
        decay = pair_decay(total, scratch("decay", slots * heads, size, size))
        gated = scratch("gated", slots * heads, 2, size, size)
        torch.mul(gram, decay.view(slots, narrow, -1, 1, size, size), out=gated.view(slots, narrow, -1, 2, size, size))
        gated[:, 0].diagonal(dim1=-2, dim2=-1).zero_()
        both = both.view(-1, 2 * size, width)
        gamma, tail, strength = (x.to(dtype).unsqueeze(-1) for x in (gamma, tail, strength))
        tails = torch.mul(both[:, :size], tail, out=scratch("tails", slots * heads, size, width))
        return cls(both, both[:, :size], gram, decay, gated, strength, gamma, tail, tails, gamma[:, -1:])

    def invert(self, out: Tensor, scratch: Scratch) -> None:
        """(I + diag(beta) stril(K K^T * Gam))^-1 by substitution, in place of `out`."""
        lower = torch.mul(self.gated[:, 0], self.beta, out=scratch("lower", *out.shape))
        unit = torch.eye(out.shape[1], dtype=out.dtype, device=out.device).expand_as(out)
        torch.linalg.solve_triangular(lower, unit, upper=False, unitriangular=True, out=out)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    bounds: Tensor | None,
    scale: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Outputs, final states; with `keep` the errors, the inverses and the states at the begin of each segment, in the order of the walk."""
    layout = Layout.of(k, v, bounds)
    walk = layout.walk(v, bounds)
    heads, width, size, scratch = v.shape[2], v.shape[3], layout.chunk, Scratch(v, accumulate_dtype(v.dtype))
    shape = (len(walk), heads, k.shape[3], width)
    memory = v.new_zeros(shape, dtype=scratch.dtype) if initial_state is None else walk.sort(initial_state)
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    errors, inverses, states = _saved(layout, k, v, keep)
    for segment in walk.segments():
        c = Chunks.load(segment, q, k, g, beta, size, scratch)
        count, state = segment.size * heads, memory[segment.block]
        values, written = scratch("values", count, size, width), scratch("written", count, size, width)
        segment.load(v, values.view(-1, heads, 1, size, width))
        here = slice(segment.slots.start * heads, segment.slots.stop * heads)
        if keep:
            states[segment.starts] = state[: segment.running[0]]
        error = errors[here] if keep else scratch("error", count, size, width)
        inverse = inverses[here] if keep else scratch("inverse", count, size, size)
        c.invert(inverse, scratch)
        solve = torch.mul(inverse, c.beta.mT, out=scratch("solve", count, size, size))
        state, reads = state.flatten(0, 1), scratch("reads", count, 2 * size, width)
        for both, tails, gamma, last, value, z, t, u, read in _steps(
            segment, heads, c.both, c.tails, c.gamma, c.last, values, error, solve, written, reads
        ):
            s = state[: len(both)]
            torch.bmm(both, s, out=read)
            torch.addcmul(value, gamma, read[:, :size], value=-1, out=z)
            torch.bmm(t, z, out=u)
            s.mul_(last).baddbmm_(tails.mT, u)
        outputs = torch.mul(reads[:, size:], c.gamma, out=values)
        outputs.baddbmm_(c.gated[:, 1], written, beta=scale, alpha=scale)
        segment.store(outputs.view(-1, heads, size, width), o)
    return o, walk.unsort(memory), errors, inverses, states


def _steps(segment: Segment, heads: int, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """The rows of each tensor that belong to each chunk of the segment."""
    sizes = [count * heads for count in segment.running]
    return list(zip(*(x.split(sizes) for x in tensors)))


def _saved(layout: Layout, k: Tensor, v: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the errors, the inverses and the states; without `keep` it is empty."""
    dtype, heads, size, width = accumulate_dtype(v.dtype), v.shape[2], layout.chunk, v.shape[3]
    slots, starts = (layout.slots * heads, layout.starts) if keep else (0, 0)
    return (
        v.new_empty((slots, size, width), dtype=dtype),
        v.new_empty((slots, size, size), dtype=dtype),
        v.new_empty((starts, heads, k.shape[3], width), dtype=dtype),
    )


def _backward(args: Arguments, saved: Tensors, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Walk the segments backwards with the gradient of the state."""
    q, k, v, g, beta, initial_state, bounds, scale = args
    (errors, inverses, states), (d_o, d_final) = saved, grads
    layout = Layout.of(k, v, bounds)
    walk = layout.walk(v, bounds)
    heads, width, size, scratch = v.shape[2], v.shape[3], layout.chunk, Scratch(v, errors.dtype)
    d_memory = states.new_zeros((len(walk), *states.shape[1:])) if d_final is None else walk.sort(d_final)
    d_o = torch.zeros_like(v) if d_o is None else d_o
    out = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, g, beta))
    for segment in reversed(list(walk.segments())):
        c = Chunks.load(segment, q, k, g, beta, size, scratch)
        d_out = scratch("d_out", segment.size * heads, size, width)
        segment.load(d_o, d_out.view(-1, heads, 1, size, width))
        outside = segment.outside(heads)
        if outside is not None:
            d_out.masked_fill_(outside.unsqueeze(-1), 0)
        here = slice(segment.slots.start * heads, segment.slots.stop * heads)
        start = states[segment.starts].flatten(0, 1)
        gradients = _segment_gradients(
            segment, c, errors[here], inverses[here], start, d_out, d_memory[segment.block].flatten(0, 1), scale, scratch
        )
        for target, gradient in zip(out, gradients):
            target = target.unsqueeze(-1) if target.ndim == 3 else target
            gradient = gradient.unflatten(0, (segment.size, heads))
            if target.shape[2] != heads:  # queries and keys serve a group of value heads
                gradient = gradient.unflatten(1, (target.shape[2], -1)).sum(2)
            segment.store(gradient, target)
    out[3].masked_fill_(g < SMALLEST_LOG_DECAY, 0)
    return [*out, None if initial_state is None else walk.unsort(d_memory)]


def _segment_gradients(
    segment: Segment,
    c: Chunks,
    error: Tensor,
    inverse: Tensor,
    start: Tensor,
    d_out: Tensor,
    d_memory: Tensor,
    scale: float,
    scratch: Scratch,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g and beta at a segment's chunks; `d_memory` goes from the state after it to the state before it, in place."""
    count, size, width = error.shape
    heads = count // segment.size
    key_width = c.keys.shape[2]
    solve = torch.mul(inverse, c.beta.mT, out=scratch("solve", count, size, size))
    written = torch.bmm(solve, error, out=scratch("written", count, size, width))
    states = _states(segment, heads, c, written, start, scratch("states", count, key_width, width))

    d_written = torch.baddbmm(d_out, c.gated[:, 1].mT, d_out, beta=0, alpha=scale, out=scratch("d_written", count, size, width))
    d_solved = scratch("d_solved", count, size, width)
    d_read = scratch("d_read", count, 2 * size, width)
    torch.mul(d_out, c.gamma * scale, out=d_read[:, size:])
    d_both, d_keys = scratch("d_both", count, 2 * size, key_width), scratch("d_keys", count, size, key_width)
    kept, product = scratch("kept", count), scratch("product", len(d_memory), key_width, width)
    steps = _steps(
        segment,
        heads,
        c.both,
        c.tails,
        -c.gamma * c.beta,
        c.last,
        inverse,
        written,
        states,
        d_written,
        d_solved,
        d_read,
        d_both,
        d_keys,
        kept,
    )
    for both, tails, minus, last, t, u, s, du, dy, dr, db, dk, inner in reversed(steps):
        ds = d_memory[: len(both)]
        du.baddbmm_(tails, ds)
        torch.bmm(u, ds.mT, out=dk)
        torch.sum(torch.mul(ds, s, out=product[: len(both)]).flatten(1), 1, out=inner)
        torch.bmm(t.mT, du, out=dy)
        torch.mul(dy, minus, out=dr[:, :size])
        torch.bmm(dr, s.mT, out=db)
        ds.mul_(last).baddbmm_(both.mT, dr)

    d_keys.mul_(c.tail)
    buffer = scratch("dots", count, 2 * size, key_width)
    into = torch.mul(c.both, d_both, out=buffer).sum(-1)
    into = into[:, :size] + into[:, size:]
    onward = torch.mul(c.keys, d_keys, out=buffer[:, :size]).sum(-1)

    pairs = scratch("pairs", 2, count, size, size)
    pairs[0].baddbmm_(d_solved, written.mT, beta=0, alpha=-1)
    pairs[1].baddbmm_(d_out, written.mT, beta=0, alpha=scale)
    d_gram = torch.mul(pairs.transpose(0, 1), c.decay.unsqueeze(1), out=scratch("d_gram", count, 2, size, size))
    d_gram[:, 0].diagonal(dim1=-2, dim2=-1).zero_()
    d_pairs = scratch("d_pairs", count, 2, size, size)
    grouped = (segment.size, c.gram.shape[1], -1, 2, size, size)
    torch.mul(d_gram.view(grouped), c.gram, out=d_pairs.view(grouped))
    d_beta = torch.mul(d_solved, error, out=scratch("d_written", count, size, width)).sum(-1).add_(d_pairs[:, 0].sum(-1))
    between = d_pairs[:, 1].addcmul_(d_pairs[:, 0], c.beta)
    d_g = log_decay_gradient(between, into, onward, kept.unsqueeze(-1) * c.last[:, 0], pairs[0])
    d_gram[:, 0].mul_(c.beta)
    d_gram = d_gram.view(count, 2 * size, size)
    d_both.baddbmm_(d_gram, c.keys)
    d_keys.baddbmm_(d_gram.mT, c.both).add_(d_both[:, :size])
    return d_both[:, size:], d_keys, d_solved.mul_(c.beta), d_g.unsqueeze(-1), d_beta.unsqueeze(-1)


def _states(segment: Segment, heads: int, c: Chunks, written: Tensor, start: Tensor, out: Tensor) -> Tensor:
    """The state before each chunk of a segment, from the state before the first."""
    steps = _steps(segment, heads, out, c.tails, c.last, written)
    steps[0][0].copy_(start)
    for (before, tails, last, u), (after, *_) in itertools.pairwise(steps):
        rows = len(after)
        torch.mul(before[:rows], last[:rows], out=after).baddbmm_(tails[:rows].mT, u[:rows])
    return out


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    bounds: Tensor | None,
    scale: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    documents = v.shape[0] if bounds is None else bounds.shape[0] - 1
    final = v.new_empty((documents, v.shape[2], k.shape[3], v.shape[3]), dtype=accumulate_dtype(v.dtype))
    return v.new_empty(v.shape), final, *_saved(Layout.of(k, v, bounds), k, v, keep)


_OPAQUE = Opaque(
    "gdn::gated_delta_rule_chunked",
    _forward,
    _backward,
    fake=_fake,
    results=2,
    differentiable=("q", "k", "v", "g", "beta", "initial_state"),
)
