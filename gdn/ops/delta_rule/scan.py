"""Delta rules by matrix products over chunks: the passes that they share. Derivation: README.md.

A token may write several times (`n` keys and values) and reads once, after its writes. A chunk is C tokens, so R = n C writes and C reads.
What differs between rules is how memory decays; it is in a class of `Chunks`, which says what the rows of a chunk look like to the state
before it and after it, and to each other, and takes the gradients of these back to the arguments.

The sequence is walked in segments of a few chunks of some sequences, whose buffers stay in the cache. The backward pass keeps, beside the
inputs, the errors `Z` (the size of v), the inverses (R numbers per write and head) and the state at the begin of each segment; the states
inside a segment are computed again.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from gdn.core.checks import accumulate_dtype
from gdn.core.opaque import Tensors
from gdn.ops.sequences.decay import SMALLEST_LOG_DECAY, smallest_decay
from gdn.ops.sequences.scratch import Scratch
from gdn.ops.sequences.walk import Segment, Walk

WRITES = 32
"""Writes per chunk, about, for all but very short sequences. Measured against 64 in README.md."""
BLOCK_ELEMENTS = 1 << 19
"""Elements of the states of the sequences that advance together: 2 MiB in float32, the second-level caches of two cores."""
SEGMENT_ELEMENTS = 12 << 20
"""Elements of all buffers of a segment, about."""


@dataclass(frozen=True)
class Inputs:
    """The arguments of a rule; of their gradients, too."""

    q: Tensor
    """`[B, T, H, K]`"""
    k: Tensor
    """`[B, T, n, H, K]`"""
    v: Tensor
    """`[B, T, n, HV, V]`"""
    g: Tensor
    """`[B, T, HV]` or `[B, T, HV, K]`"""
    beta: Tensor
    """`[B, T, n, HV]`"""

    @property
    def writes(self) -> int:
        """n, the writes of a token."""
        return self.k.shape[2]

    @property
    def heads(self) -> int:
        """HV."""
        return self.v.shape[3]

    def empty_state(self, sequences: int) -> Tensor:
        """Room for the states of some sequences, `[sequences, HV, K, V]`."""
        shape = (sequences, self.heads, self.k.shape[4], self.v.shape[4])
        return self.v.new_empty(shape, dtype=accumulate_dtype(self.v.dtype))

    def empty_outputs(self) -> Tensor:
        """Room for `[B, T, HV, V]`."""
        return self.v.new_empty((*self.v.shape[:2], *self.v.shape[3:]))


@dataclass(frozen=True)
class Layout:
    """Sizes that follow from the shapes alone."""

    chunk: int
    """C, tokens of a chunk."""
    rows: int
    """R, writes of a chunk."""
    block: int
    stretch: int
    slots: int
    """At least the number of chunks of all sequences."""
    starts: int
    """At least the number of states saved."""

    @classmethod
    def of(cls, kind: type[Chunks], x: Inputs, bounds: Tensor | None) -> Layout:
        batch, length, writes = x.k.shape[:3]
        width, state = x.k.shape[4] + x.v.shape[4], x.k.shape[4] * x.v.shape[4]
        chunk = kind.tokens(writes) if length * writes > WRITES // 2 else -(-WRITES // (2 * writes))
        rows = chunk * writes
        block = max(1, BLOCK_ELEMENTS // max(1, x.heads * state))
        together = x.heads * (block if bounds is not None else min(block, batch))
        step = together * (kind.buffers * rows * width + state)
        stretch = min(16, max(2, SEGMENT_ELEMENTS // max(1, step)))
        if bounds is None:
            return cls(chunk, rows, block, stretch, batch * -(-length // chunk), batch * -(-length // (chunk * stretch)))
        documents = bounds.shape[0] - 1
        slots, starts = batch * length // chunk + documents, batch * length // (chunk * stretch) + documents
        return cls(chunk, rows, block, stretch, slots, starts)

    def walk(self, v: Tensor, bounds: Tensor | None) -> Walk:
        return Walk(v.shape[0], v.shape[1], bounds, v.device, chunk=self.chunk, block=self.block, stretch=self.stretch)


@dataclass
class Flow:
    """The gradients that the pass backwards over a segment leaves to its chunks."""

    rows: Tensor
    """Of `Chunks.rows`, `[M, R + C, K]`."""
    tails: Tensor
    """Of the keys times `Chunks.tail`, `[M, R, K]`."""
    last: Tensor
    """Of what is left of each row of the state, `[M, K]`."""
    pairs: Tensor
    """Of the strictly lower matrix `L` above the matrix of reads `P`, `[M, R + C, R]`, in places that are always zero, too."""
    solved: Tensor
    """Of the errors times beta, `[M, R, V]`; that of the values is this times beta."""
    error: Tensor
    """The errors themselves, `[M, R, V]`."""


@dataclass
class Chunks(ABC):
    """What the chunks of a segment need that does not depend on the state; M = slots * value heads matrices."""

    buffers: ClassVar[int] = 8
    """Elements of all buffers of a segment per write and channel, about."""

    rows: Tensor
    """Keys above queries, as they meet the state before the chunk, `[M, R + C, K]`."""
    gamma: Tensor
    """A factor on what a key or query then reads, `[M, R + C, 1]`."""
    keys: Tensor
    """Keys as they are, `[M, R, K]`."""
    tail: Tensor
    """A factor on what a key writes that is left after the chunk, `[M, R, 1]` or `[M, R, K]`."""
    last: Tensor
    """What the chunk leaves of the state before it, `[M, 1, 1]` or `[M, K, 1]`."""
    gated: Tensor
    """`[M, R + C, R]`: products of keys with the keys written before, strictly below the diagonal, and of queries with the keys written so
    far; all decayed in between."""
    beta: Tensor
    """`[M, R, 1]`"""

    @classmethod
    def tokens(cls, writes: int) -> int:
        """C for tokens that write `writes` times; a multiple of four where there is room, which matrix products like better."""
        chunk = max(1, WRITES // writes)
        return -(-chunk // 4) * 4 if chunk >= 4 else chunk

    @classmethod
    @abstractmethod
    def load(cls, segment: Segment, x: Inputs, layout: Layout, scratch: Scratch) -> Chunks:
        """From the arguments. Tokens outside a sequence neither forget nor write."""

    @abstractmethod
    def gradients(self, flow: Flow, scratch: Scratch) -> Inputs:
        """Of the arguments at the segment: q `[M, C, K]`, k `[M, R, K]`, v `[M, R, V]`, g `[M, C, 1 or K]`, beta `[M, R, 1]`."""


def load_writes(segment: Segment, x: Tensor, into: Tensor) -> None:
    """Copy the tokens of x `[B, T, n, heads, width]` into `[slots, heads, copies, n C, width]`, the writes of a token side by side."""
    places = into.unflatten(-2, (-1, x.shape[2]))
    for j, part in enumerate(x.unbind(2)):
        segment.load(part, places[..., j, :])


def load_rows(segment: Segment, x: Inputs, layout: Layout, scratch: Scratch) -> Tensor:
    """Keys above queries as they are, `[slots, H, copies, R + C, K]`, a copy for each value head."""
    narrow, width = x.q.shape[2:]
    rows = scratch("rows", segment.size, narrow, x.heads // narrow, layout.rows + layout.chunk, width)
    load_writes(segment, x.k, rows[..., : layout.rows, :])
    segment.load(x.q, rows[..., layout.rows :, :])
    return rows


def load_strength(segment: Segment, x: Inputs, layout: Layout, scratch: Scratch) -> Tensor:
    """beta `[M, R, 1]`, zero outside a sequence."""
    strength = scratch("strength", segment.size, x.heads, 1, layout.rows, 1)
    load_writes(segment, x.beta.unsqueeze(-1), strength)
    strength = strength.view(-1, layout.rows, 1)
    outside = segment.outside(x.heads)
    if outside is not None:
        strength.masked_fill_(outside.repeat_interleave(x.writes, dim=1).unsqueeze(-1), 0)
    return strength


def hide_later_writes(pairs: Tensor, writes: int) -> None:
    """Zero `[M, R, R]` where write s of a token is not before its write r; other places are left as they are."""
    same = pairs.unflatten(2, (-1, writes)).unflatten(1, (-1, writes)).diagonal(dim1=1, dim2=3)
    if writes == 1:
        same.zero_()
    else:
        same.masked_fill_(torch.ones(writes, writes, dtype=torch.bool, device=pairs.device).triu().unsqueeze(-1), 0)


def forward(
    kind: type[Chunks], x: Inputs, initial_state: Tensor | None, bounds: Tensor | None, scale: float, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Outputs, final states; with `keep` the errors, the inverses and the states at the begin of each segment, in the order of the walk."""
    layout = Layout.of(kind, x, bounds)
    walk = layout.walk(x.v, bounds)
    heads, rows = x.heads, layout.rows
    scratch = Scratch(x.v, accumulate_dtype(x.v.dtype))
    memory = x.empty_state(len(walk)).zero_() if initial_state is None else walk.sort(initial_state)
    o = x.empty_outputs()
    errors, inverses, states = saved(kind, x, bounds, keep)
    for segment in walk.segments():
        c = kind.load(segment, x, layout, scratch)
        count, state = segment.size * heads, memory[segment.block]
        here = slice(segment.slots.start * heads, segment.slots.stop * heads)
        if keep:
            states[segment.starts] = state[: segment.running[0]]
        inverse = inverses[here] if keep else scratch("inverse", count, rows, rows)
        _invert(c, inverse, scratch)
        solve = torch.mul(inverse, c.beta.mT, out=scratch("solve", count, rows, rows))
        error = errors[here] if keep else None
        _advance(segment, c, solve, _values(segment, x, rows, scratch), error, state.flatten(0, 1), o, scale, scratch)
    return o, walk.unsort(memory), errors, inverses, states


def _advance(
    segment: Segment,
    c: Chunks,
    solve: Tensor,
    values: Sequence[Tensor],
    errors: Tensor | None,
    state: Tensor,
    o: Tensor,
    scale: float,
    scratch: Scratch,
) -> None:
    """Forward over a segment: `state` goes to that after it, in place; outputs and errors are filled in.

    What belongs to one chunk alone is in buffers of one chunk, which the next uses again while they are in the cache.
    """
    (count, rows, key_width), width, size = c.keys.shape, state.shape[2], c.rows.shape[1] - c.keys.shape[1]
    heads, most = count // segment.size, len(state)
    outputs = _outputs(segment, o, scratch, heads, size)
    steps = _steps(segment, heads, c.rows, c.keys, c.tail, c.gamma, c.last, solve, c.gated[:, rows:])
    kept = [None] * len(values) if errors is None else errors.split([running * heads for running in segment.running])
    for value, z, output, (both, keys, tail, gamma, last, t, pairs) in zip(values, kept, outputs, steps, strict=True):
        here = len(both)
        s, u, tails = state[:here], scratch("written", most, rows, width)[:here], scratch("tails", most, rows, key_width)[:here]
        read = torch.bmm(both, s, out=scratch("reads", most, rows + size, width)[:here])
        z = scratch("error", most, rows, width)[:here] if z is None else z
        torch.addcmul(value, gamma[:, :rows], read[:, :rows], value=-1, out=z)
        torch.bmm(t, z, out=u)
        torch.mul(keys, tail, out=tails)
        s.mul_(last).baddbmm_(tails.mT, u)
        out = torch.mul(read[:, rows:], gamma[:, rows:], out=scratch("output", most, size, width)[:here])
        output.copy_(out.baddbmm_(pairs, u, beta=scale, alpha=scale).view(output.shape))
    if segment.time is None:
        segment.store(scratch("outputs", segment.size, heads, size, width), o)


def _outputs(segment: Segment, o: Tensor, scratch: Scratch, heads: int, size: int) -> Sequence[Tensor]:
    """Where the outputs of each chunk go, `[running, heads, C, V]`: their places in `o`, or a buffer if they are not regular."""
    if segment.time is not None:
        return o[segment.block, segment.time].unflatten(1, (-1, size)).permute(1, 0, 3, 2, 4).unbind(0)
    return scratch("outputs", segment.size, heads, size, o.shape[3]).split(segment.running)


def _values(segment: Segment, x: Inputs, rows: int, scratch: Scratch) -> Sequence[Tensor]:
    """The values of each chunk of the segment, `[M, R, V]`: where they stand if that is possible, or else a copy."""
    if segment.time is not None and segment.running[0] == 1 and x.v.dtype == scratch.dtype:
        here = x.v[segment.block, segment.time].flatten(0, 2).unflatten(0, (-1, rows))
        return here.transpose(1, 2).unbind(0)
    values = scratch("values", segment.size, x.heads, 1, rows, x.v.shape[4])
    load_writes(segment, x.v, values)
    return values.flatten(0, 2).split([count * x.heads for count in segment.running])


def _invert(c: Chunks, out: Tensor, scratch: Scratch) -> None:
    """(I + L)^-1 by substitution, in place of `out`. Its entries are sums of products of decays, and end as these do."""
    lower = torch.mul(c.gated[:, : out.shape[1]], c.beta, out=scratch("lower", *out.shape))
    unit = torch.eye(out.shape[1], dtype=out.dtype, device=out.device).expand_as(out)
    torch.linalg.solve_triangular(lower, unit, upper=False, unitriangular=True, out=out)
    torch.hardshrink(out, smallest_decay(out.dtype), out=out)


def _steps(segment: Segment, heads: int, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """The rows of each tensor that belong to each chunk of the segment."""
    sizes = [count * heads for count in segment.running]
    return list(zip(*(x.split(sizes) for x in tensors)))


def saved(kind: type[Chunks], x: Inputs, bounds: Tensor | None, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the errors, the inverses and the states; without `keep` it is empty."""
    layout, dtype = Layout.of(kind, x, bounds), accumulate_dtype(x.v.dtype)
    slots, starts = (layout.slots * x.heads, layout.starts) if keep else (0, 0)
    errors = x.v.new_empty((slots, layout.rows, x.v.shape[4]), dtype=dtype)
    return errors, x.v.new_empty((slots, layout.rows, layout.rows), dtype=dtype), x.empty_state(starts)


def fake(kind: type[Chunks], x: Inputs, bounds: Tensor | None, keep: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Empty tensors shaped like those of `forward`."""
    documents = x.v.shape[0] if bounds is None else bounds.shape[0] - 1
    return x.empty_outputs(), x.empty_state(documents), *saved(kind, x, bounds, keep)


def backward(
    kind: type[Chunks],
    x: Inputs,
    initial_state: Tensor | None,
    bounds: Tensor | None,
    scale: float,
    kept: Tensors,
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Walk the segments backwards with the gradient of the state. Gradients of q, k, v, g, beta and the initial state."""
    (errors, inverses, states), (d_o, d_final) = kept, grads
    layout = Layout.of(kind, x, bounds)
    walk = layout.walk(x.v, bounds)
    heads, width, size, scratch = x.heads, x.v.shape[4], layout.chunk, Scratch(x.v, errors.dtype)
    d_memory = x.empty_state(len(walk)).zero_() if d_final is None else walk.sort(d_final)
    d_o = x.empty_outputs().zero_() if d_o is None else d_o
    out = Inputs(*(torch.empty_like(getattr(x, f.name), memory_format=torch.contiguous_format) for f in fields(x)))
    for segment in reversed(list(walk.segments())):
        c = kind.load(segment, x, layout, scratch)
        d_out = scratch("d_out", segment.size * heads, size, width)
        segment.load(d_o, d_out.view(-1, heads, 1, size, width))
        outside = segment.outside(heads)
        if outside is not None:
            d_out.masked_fill_(outside.unsqueeze(-1), 0)
        here = slice(segment.slots.start * heads, segment.slots.stop * heads)
        start, d_state = states[segment.starts].flatten(0, 1), d_memory[segment.block].flatten(0, 1)
        flow = _flow(segment, c, errors[here], inverses[here], start, d_out, d_state, scale, scratch)
        _store(segment, c.gradients(flow, scratch), out)
    out.g.masked_fill_(x.g < SMALLEST_LOG_DECAY, 0)
    return [out.q, out.k, out.v, out.g, out.beta, None if initial_state is None else walk.unsort(d_memory)]


def _flow(
    segment: Segment,
    c: Chunks,
    error: Tensor,
    inverse: Tensor,
    start: Tensor,
    d_out: Tensor,
    d_memory: Tensor,
    scale: float,
    scratch: Scratch,
) -> Flow:
    """Backwards over a segment; `d_memory` goes from the gradient of the state after it to that of the state before it, in place."""
    (count, rows, width), size, key_width = error.shape, d_out.shape[1], c.rows.shape[2]
    heads = count // segment.size
    solve = torch.mul(inverse, c.beta.mT, out=scratch("solve", count, rows, rows))
    written = torch.bmm(solve, error, out=scratch("written", count, rows, width))
    tails = torch.mul(c.keys, c.tail, out=scratch("tails", count, rows, key_width))
    states = _states(segment, heads, c, tails, written, start, scratch("states", count, key_width, width))

    d_written = scratch("d_written", count, rows, width).baddbmm_(c.gated[:, rows:].mT, d_out, beta=0, alpha=scale)
    d_solved, d_read = scratch("d_solved", count, rows, width), scratch("d_read", count, rows + size, width)
    torch.mul(d_out, c.gamma[:, rows:] * scale, out=d_read[:, rows:])
    d_rows, d_tails = scratch("d_rows", count, rows + size, key_width), scratch("d_tails", count, rows, key_width)
    d_last, product = scratch("d_last", count, key_width), scratch("product", len(d_memory), key_width, width)
    for both, tail, minus, last, t, u, s, du, dy, dr, db, dk, dl in reversed(
        _steps(
            segment,
            heads,
            c.rows,
            tails,
            -c.gamma[:, :rows] * c.beta,
            c.last,
            inverse,
            written,
            states,
            d_written,
            d_solved,
            d_read,
            d_rows,
            d_tails,
            d_last,
        )
    ):
        ds = d_memory[: len(both)]
        du.baddbmm_(tail, ds)
        torch.bmm(u, ds.mT, out=dk)
        torch.sum(torch.mul(ds, s, out=product[: len(both)]), 2, out=dl)
        torch.bmm(t.mT, du, out=dy)
        torch.mul(dy, minus, out=dr[:, :rows])
        torch.bmm(dr, s.mT, out=db)
        ds.mul_(last).baddbmm_(both.mT, dr)

    pairs = scratch("pairs", count, rows + size, rows)  # a batched product into a part of it would be one product a matrix
    by_keys = torch.bmm(d_solved, written.mT, out=scratch("by_keys", count, rows, rows))
    by_queries = torch.bmm(d_out, written.mT, out=scratch("by_queries", count, size, rows))
    torch.mul(by_keys, -1, out=pairs[:, :rows])
    torch.mul(by_queries, scale, out=pairs[:, rows:])
    return Flow(d_rows, d_tails, d_last, pairs, d_solved, error)


def _states(segment: Segment, heads: int, c: Chunks, tails: Tensor, written: Tensor, start: Tensor, out: Tensor) -> Tensor:
    """The state before each chunk of a segment, from the state before the first."""
    steps = _steps(segment, heads, out, tails, c.last, written)
    steps[0][0].copy_(start)
    for (before, tail, last, u), (after, *_) in itertools.pairwise(steps):
        rows = len(after)
        torch.mul(before[:rows], last[:rows], out=after).baddbmm_(tail[:rows].mT, u[:rows])
    return out


def _store(segment: Segment, gradients: Inputs, out: Inputs) -> None:
    """Write the gradients of a segment's chunks to their tokens."""

    def per_head(gradient: Tensor, heads: int) -> Tensor:
        """`[M, ...]` as `[slots, heads, ...]`; queries and keys serve a group of value heads."""
        gradient = gradient.unflatten(0, (segment.size, out.heads))
        return gradient if heads == out.heads else gradient.unflatten(1, (heads, -1)).sum(2)

    segment.store(per_head(gradients.q, out.q.shape[2]), out.q)
    segment.store(per_head(gradients.g, out.heads), out.g.unsqueeze(-1) if out.g.ndim == 3 else out.g)
    for gradient, target in ((gradients.k, out.k), (gradients.v, out.v), (gradients.beta, out.beta.unsqueeze(-1))):
        writes = per_head(gradient, target.shape[3]).unflatten(2, (-1, out.writes))
        for j, part in enumerate(target.unbind(2)):
            segment.store(writes[..., j, :], part)
