"""The delta rule with channel decays by matrix products over chunks, in plain torch, on any device. Derivation: README.md.

The passes are those of `gdn/ops/delta_rule/scan.py`. Here are the pairs of a chunk: halves of halves, in each of which every decay is the
exponential of a sum of g that is at most zero, however strong the decay.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gdn.core.opaque import Arguments, Opaque, Tensors
from gdn.core.packing import Packing
from gdn.ops.delta_rule import scan
from gdn.ops.delta_rule.scan import Flow, Inputs, Layout
from gdn.ops.sequences.decay import SMALLEST_LOG_DECAY, decays
from gdn.ops.sequences.scratch import Scratch
from gdn.ops.sequences.walk import Segment


def channel_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float,
    initial_state: Tensor | None,
    packing: Packing | None,
) -> tuple[Tensor, Tensor]:
    """See `gdn.ops.channel_delta_rule`."""
    bounds = None if packing is None else packing.host
    o, state = _OPAQUE(q, k.unsqueeze(2), v.unsqueeze(2), g, beta.unsqueeze(2), initial_state, bounds, scale)
    return o, state


@dataclass
class Level:
    """The pairs of one size: a token of the later half of `2 size` tokens with one of the earlier half."""

    size: int
    later: Tensor
    """exp of the sum of g from the middle up to each token of the later half, `[M, C / 2 size, size, K]`."""
    earlier: Tensor
    """exp of the sum of g from each token of the earlier half (exclusive) up to the middle, the same shape."""
    rows: Tensor
    """Keys, then queries, of the later half times `later`, `[M, C / 2 size, 2 size, K]`."""
    columns: Tensor
    """Keys of the earlier half times `earlier`, `[M, C / 2 size, size, K]`."""

    def blocks(self, pairs: Tensor) -> Tensor:
        """This level's places in `[M, 2 C, C]`, as a view `[M, 2, size, size, C / 2 size]`."""
        count, double, width = pairs.shape
        split = pairs.view(count, 2, double // 2 // (2 * self.size), 2, self.size, width // (2 * self.size), 2, self.size)
        return split[:, :, :, 1, :, :, 0].diagonal(dim1=2, dim2=4)


@dataclass
class Chunks(scan.Chunks):
    """Chunks whose tokens decay by one number a channel of the keys."""

    buffers: ClassVar[int] = 24

    both: Tensor
    """Keys above queries as they are, `[M, 2 C, K]`."""
    before: Tensor
    """exp of the sum of g from the begin of the chunk up to each token, `[M, C, K]`."""
    levels: list[Level]

    @classmethod
    def load(cls, segment: Segment, x: Inputs, layout: Layout, scratch: Scratch) -> Chunks:
        size, width = layout.chunk, x.q.shape[3]
        both = scan.load_rows(segment, x, layout, scratch).view(-1, 2 * size, width)
        count = both.shape[0]
        gated = scratch("gated", count, 2 * size, size).zero_()
        torch.sum(torch.mul(both[:, :size], both[:, size:], out=scratch("dots", count, size, width)), -1, out=scratch("own", count, size))
        gated[:, size:].diagonal(dim1=1, dim2=2).copy_(scratch("own", count, size))
        since, until = _log_decays(segment, x, size, scratch)
        levels = []
        for half in _halves(size):
            level = _level(half, both, since, until, scratch)
            levels.append(level)
            _double(half, since, until)
            products = torch.bmm(level.rows.flatten(0, 1), level.columns.flatten(0, 1).mT)
            level.blocks(gated).copy_(products.view(count, -1, 2, half, half).permute(0, 2, 3, 4, 1))
        before, after = decays(since, since), decays(until, until)
        rows = torch.mul(both.view(count, 2, size, width), before.unsqueeze(1), out=scratch("decayed", count, 2, size, width))
        return cls(
            rows=rows.view(count, 2 * size, width),
            gamma=both.new_ones(()).expand(count, 2 * size, 1),
            keys=both[:, :size],
            tail=after,
            last=before[:, -1].unsqueeze(-1),
            gated=gated,
            beta=scan.load_strength(segment, x, layout, scratch),
            both=both,
            before=before,
            levels=levels,
        )

    def gradients(self, flow: Flow, scratch: Scratch) -> Inputs:
        count, size, width = self.before.shape
        keys, queries = self.keys, self.both[:, size:]
        d_beta = torch.mul(flow.solved, flow.error, out=scratch("d_written", *flow.error.shape)).sum(-1)
        pairs = flow.pairs
        d_beta += torch.mul(pairs[:, :size], self.gated[:, :size], out=scratch("d_pairs", count, size, size)).sum(-1)
        pairs[:, :size].mul_(self.beta)

        rows = (count, 2, size, width)
        d_since = torch.mul(flow.rows, self.rows, out=scratch("dots", *flow.rows.shape)).view(rows).sum(1)
        d_since[:, -1].addcmul_(flow.last, self.before[:, -1])
        d_keys = flow.tails.mul_(self.tail)
        d_until = torch.mul(d_keys, keys, out=scratch("d_until", count, size, width))
        d_both = torch.mul(flow.rows.view(rows), self.before.unsqueeze(1), out=scratch("d_both", *rows))
        d_both[:, 0].add_(d_keys)
        own = pairs[:, size:].diagonal(dim1=1, dim2=2).unsqueeze(-1)
        d_both[:, 0].addcmul_(queries, own)
        d_both[:, 1].addcmul_(keys, own)
        for level in reversed(self.levels):
            _undouble(level.size, d_since, d_until)
            _level_gradients(level, pairs, d_both, d_since, d_until)
        return Inputs(d_both[:, 1], d_both[:, 0], flow.solved.mul_(self.beta), d_since, d_beta.unsqueeze(-1))


def _halves(size: int) -> Iterator[int]:
    """1, 2, 4, ... size / 2."""
    half = 1
    while half < size:
        yield half
        half *= 2


def _log_decays(segment: Segment, x: Inputs, size: int, scratch: Scratch) -> tuple[Tensor, Tensor]:
    """For blocks of one token: the sum of g from the begin of the block up to each token, and after it to the end, `[M, C, K]`."""
    shape = (segment.size * x.heads, size, x.g.shape[3])
    since, until = scratch("since", *shape), scratch("until", *shape).zero_()
    segment.load(x.g, since.view(segment.size, x.heads, 1, *shape[1:]))
    outside = segment.outside(x.heads)
    if outside is not None:
        since.masked_fill_(outside.unsqueeze(-1), 0)
    return since.clamp_(min=SMALLEST_LOG_DECAY), until


def _split(x: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """Earlier and later halves of blocks of `2 half` tokens: of `[..., C, K]` two `[..., C / 2 half, half, K]`."""
    blocks = x.unflatten(-2, (-1, 2, half))
    return blocks[..., 0, :, :], blocks[..., 1, :, :]


def _double(half: int, since: Tensor, until: Tensor) -> None:
    """From blocks of `half` tokens to blocks of twice as many, in place. Every sum is of numbers of one sign."""
    (first, second), (first_until, _) = _split(since, half), _split(until, half)
    first_until += second[..., -1:, :]
    second += first[..., -1:, :]


def _undouble(half: int, d_since: Tensor, d_until: Tensor) -> None:
    """`_double` backwards: gradients of the sums over larger blocks become those of the sums over halves, in place."""
    (first, second), (first_until, _) = _split(d_since, half), _split(d_until, half)
    first[..., -1, :] += second.sum(-2)
    second[..., -1, :] += first_until.sum(-2)


def _level(half: int, both: Tensor, since: Tensor, until: Tensor, scratch: Scratch) -> Level:
    count, _, width = both.shape
    blocks = since.shape[1] // (2 * half)
    shape = (count, blocks, half, width)
    later = decays(_split(since, half)[1], scratch(f"later {half}", *shape))
    earlier = decays(_split(until, half)[0], scratch(f"earlier {half}", *shape))
    first, second = _split(both.view(count, 2, -1, width), half)
    rows = scratch(f"rows {half}", count, blocks, 2, half, width)
    torch.mul(second.transpose(1, 2), later.unsqueeze(2), out=rows)
    columns = torch.mul(first[:, 0], earlier, out=scratch(f"columns {half}", *shape))
    return Level(half, later, earlier, rows.view(count, blocks, 2 * half, width), columns)


def _level_gradients(level: Level, pairs: Tensor, d_both: Tensor, d_since: Tensor, d_until: Tensor) -> None:
    """Add what the pairs of a level contribute to the gradients of keys and queries `[M, 2, C, K]` and of the sums of g."""
    count, blocks, _, width = level.rows.shape
    half = level.size
    d_blocks = level.blocks(pairs).permute(0, 4, 1, 2, 3).reshape(count * blocks, 2 * half, half)
    d_rows = torch.bmm(d_blocks, level.columns.flatten(0, 1)).view(count, blocks, 2, half, width)
    d_columns = torch.bmm(d_blocks.mT, level.rows.flatten(0, 1)).view(count, blocks, half, width)
    first, second = _split(d_both, half)
    second.transpose(1, 2).addcmul_(d_rows, level.later.unsqueeze(2))
    first[:, 0].addcmul_(d_columns, level.earlier)
    _split(d_since, half)[1].add_(d_rows.mul_(level.rows.view(d_rows.shape)).sum(2))
    _split(d_until, half)[0].add_(d_columns.mul_(level.columns))


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
    return scan.forward(Chunks, Inputs(q, k, v, g, beta), initial_state, bounds, scale, keep)


def _backward(args: Arguments, saved: Tensors, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    *inputs, initial_state, bounds, scale = args
    return scan.backward(Chunks, Inputs(*inputs), initial_state, bounds, scale, saved, grads)


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
    return scan.fake(Chunks, Inputs(q, k, v, g, beta), bounds, keep)


_OPAQUE = Opaque(
    "gdn::channel_delta_rule_chunked",
    _forward,
    _backward,
    fake=_fake,
    results=2,
    differentiable=("q", "k", "v", "g", "beta", "initial_state"),
)
