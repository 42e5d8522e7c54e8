"""The gated delta rule by matrix products over chunks, in plain torch, on any device, for one or several writes a token.

The passes are those of `scan.py`; here is a decay of one number a token. Derivation and measurements: README.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gdn.core.opaque import Arguments, Opaque, Tensors
from gdn.core.packing import Packing
from gdn.ops.delta_rule import scan
from gdn.ops.delta_rule.scan import Flow, Inputs, Layout, hide_later_writes
from gdn.ops.sequences.decay import SMALLEST_LOG_DECAY, decays, log_decay_gradient, pair_decay
from gdn.ops.sequences.scratch import Scratch
from gdn.ops.sequences.walk import Segment


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
    """See `gdn.ops.gated_delta_rule`: one write a token."""
    return gated_delta_product(q, k.unsqueeze(2), v.unsqueeze(2), g, beta.unsqueeze(2), scale, initial_state, packing)


def gated_delta_product(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float,
    initial_state: Tensor | None,
    packing: Packing | None,
) -> tuple[Tensor, Tensor]:
    """See `gdn.ops.gated_delta_product`."""
    o, state = _OPAQUE(q, k, v, g, beta, initial_state, None if packing is None else packing.host, scale)
    return o, state


@dataclass
class Chunks(scan.Chunks):
    """Chunks whose tokens decay by one number."""

    gram: Tensor
    """K K^T above Q K^T, `[slots, H, 1, R + C, R]`."""
    decay: Tensor
    """Gam, `[M, C, R]`: exp of the sum of g from the token of write s (exclusive) to token i, zero above the diagonal."""
    writes: int

    @classmethod
    def load(cls, segment: Segment, x: Inputs, layout: Layout, scratch: Scratch) -> Chunks:
        slots, size, rows = segment.size, layout.chunk, layout.rows
        heads, narrow, width = x.heads, x.q.shape[2], x.q.shape[3]
        count, writes = slots * heads, x.writes
        both = scan.load_rows(segment, x, layout, scratch)
        shared = both.view(slots * narrow, -1, rows + size, width)[:, 0]  # one of the equal copies
        gram = torch.bmm(shared, shared[:, :rows].mT, out=scratch("gram", slots * narrow, rows + size, rows))
        both = both.view(-1, rows + size, width)
        total = _running_sum(segment, x, size, scratch)
        gamma, tail = decays(total, scratch("gamma", count, size)), decays(total[:, -1:] - total, scratch("tail", count, size))
        gamma, tail = gamma.unsqueeze(-1), _per_write(tail, writes).unsqueeze(-1)
        decay = pair_decay(total, scratch("decay", count, size, size))
        if writes > 1:
            decay = torch.stack([decay] * writes, dim=-1, out=scratch("spread", count, size, size, writes)).view(count, size, rows)
        beta = scan.load_strength(segment, x, layout, scratch)
        both_gamma = torch.cat([_per_write(gamma, writes), gamma], dim=1)
        gated, gram = scratch("gated", count, rows + size, rows), gram.view(slots, narrow, 1, rows + size, rows)
        c = cls(both, both_gamma, both[:, :rows], tail, gamma[:, -1:], gated, beta, gram, decay, writes)
        c._decayed(gram, out=gated)
        return c

    def _decayed(self, pairs: Tensor, out: Tensor) -> Tensor:
        """`pairs` `[slots, H, 1 or copies, R + C, R]` times the decay in between; zero where a write is not before a write of its token."""
        rows = pairs.shape[4]
        places = out.view(*self.gram.shape[:2], -1, *pairs.shape[3:])
        decay = self.decay.view(*places.shape[:3], *self.decay.shape[1:])
        if self.writes == 1:
            torch.mul(pairs.unflatten(3, (2, -1)), decay.unsqueeze(3), out=places.unflatten(3, (2, -1)))
        else:
            written, read = (x[..., :rows, :].unflatten(3, (-1, self.writes)) for x in (pairs, places))
            torch.mul(written, decay.unsqueeze(4), out=read)
            torch.mul(pairs[..., rows:, :], decay, out=places[..., rows:, :])
        hide_later_writes(out[:, :rows], self.writes)
        return out

    def gradients(self, flow: Flow, scratch: Scratch) -> Inputs:
        (count, rows, width), writes = self.keys.shape, self.writes
        keys, d_rows, d_keys = self.keys, flow.rows, flow.tails.mul_(self.tail)
        dots = torch.mul(self.rows, d_rows, out=scratch("dots", *d_rows.shape)).sum(-1)
        into = _per_token(dots[:, :rows], writes) + dots[:, rows:]
        onward = _per_token(torch.mul(keys, d_keys, out=scratch("dots", count, rows, width)).sum(-1), writes)

        grouped = (*self.gram.shape[:2], -1, *self.gram.shape[3:])
        d_gram = self._decayed(flow.pairs.view(grouped), out=scratch("d_gram", *flow.pairs.shape))
        d_pairs = scratch("d_pairs", *flow.pairs.shape)
        torch.mul(d_gram.view(grouped), self.gram, out=d_pairs.view(grouped))
        d_beta = torch.mul(flow.solved, flow.error, out=scratch("d_written", *flow.error.shape)).sum(-1).add_(d_pairs[:, :rows].sum(-1))
        if writes == 1:
            between = d_pairs[:, rows:].addcmul_(d_pairs[:, :rows], self.beta)
        else:
            read_by = d_pairs[:, :rows].mul_(self.beta).unflatten(1, (-1, writes)).sum(2).add_(d_pairs[:, rows:])
            between = _per_token(read_by, writes)
        through = flow.last.sum(-1, keepdim=True) * self.last[:, 0]
        d_g = log_decay_gradient(between, into, onward, through, scratch("crossing", *between.shape))

        d_gram[:, :rows].mul_(self.beta)
        d_rows.baddbmm_(d_gram, keys)
        d_keys.baddbmm_(d_gram.mT, self.rows).add_(d_rows[:, :rows])
        return Inputs(d_rows[:, rows:], d_keys, flow.solved.mul_(self.beta), d_g.unsqueeze(-1), d_beta.unsqueeze(-1))


def _running_sum(segment: Segment, x: Inputs, size: int, scratch: Scratch) -> Tensor:
    """Sums of g from the begin of the chunk up to each token, `[M, C]`, float64."""
    log = scratch("log", segment.size * x.heads, size, dtype=torch.float64)
    segment.load(x.g.unsqueeze(-1), log.view(segment.size, x.heads, 1, size, 1))
    outside = segment.outside(x.heads)
    if outside is not None:
        log.masked_fill_(outside, 0)
    return log.clamp_(min=SMALLEST_LOG_DECAY).cumsum(-1)


def _per_write(x: Tensor, writes: int) -> Tensor:
    """A number of each token `[M, C, ...]` for each of its writes, `[M, R, ...]`."""
    return x if writes == 1 else x.repeat_interleave(writes, dim=1)


def _per_token(x: Tensor, writes: int) -> Tensor:
    """Sums over the writes of each token along the last dimension."""
    return x if writes == 1 else x.unflatten(-1, (-1, writes)).sum(-1)


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
    "gdn::gated_delta_product_chunked",
    _forward,
    _backward,
    fake=_fake,
    results=2,
    differentiable=("q", "k", "v", "g", "beta", "initial_state"),
)
