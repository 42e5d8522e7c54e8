"""The gated delta rule by matrix products over chunks of at most 64 tokens, in plain torch, on any device. Derivation: README.md.

The sequence is walked in groups of a few chunks of all heads, so that everything between two products stays in the cache: on two CPU cores
a product of [128, 128] matrices runs at 180 GFLOP/s from cache and at 90 to 110 from memory (batches of 16 and 512, float32).
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gdn.core.checks import accumulate_dtype
from gdn.core.opaque import Arguments, Opaque, Tensors
from gdn.core.packing import Packing
from gdn.ops.delta_rule import SMALLEST_LOG_DECAY

GROUP = 2048
"""Rows of chunks (tokens times value heads) that are handled together, about; a group is at least one chunk of every sequence."""


def chunk_size(longest: int) -> int:
    """Tokens of a chunk: 64, and less where the longest document would leave most of a chunk empty."""
    return 16 if longest <= 16 else 32 if longest <= 32 else 64


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


class Scratch:
    """Buffers by name, reused from group to group: touching fresh memory costs more than the arithmetic on it."""

    def __init__(self, like: Tensor) -> None:
        self.dtype, self.device = accumulate_dtype(like.dtype), like.device
        self.buffers: dict[str, Tensor] = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        """An uninitialised tensor; its contents last until the name is asked for again."""
        count = math.prod(shape)
        if name not in self.buffers or self.buffers[name].numel() < count:
            self.buffers[name] = torch.empty(count, dtype=self.dtype, device=self.device)
        return self.buffers[name][:count].view(shape)


@dataclass(frozen=True)
class Group:
    """Consecutive chunk numbers `first : last` of every document that has them; chunk rows `row : row + sum(active)`."""

    first: int
    row: int
    active: tuple[int, ...]
    """For each chunk number, how many documents (the longest ones) reach it."""


class Plan:
    """In which order the chunks are walked: by chunk number, and for each number the documents in order of falling length."""

    def __init__(self, batch: int, length: int, heads: int, bounds: Tensor | None) -> None:
        self.length = length
        begins = [i * length for i in range(batch)] if bounds is None else bounds[:-1].tolist()
        ends = [begin + length for begin in begins] if bounds is None else bounds[1:].tolist()
        self.chunk = chunk_size(max((end - begin for begin, end in zip(begins, ends)), default=0))
        counts = [-(-(end - begin) // self.chunk) for begin, end in zip(begins, ends)]
        self.order = sorted(range(len(counts)), key=lambda i: -counts[i])
        self.regular = bounds is None
        self.begins = [begins[i] for i in self.order]
        self.ends = [ends[i] for i in self.order]
        sizes = [counts[i] for i in self.order]
        self.active = [bisect.bisect_left(sizes, -j, key=lambda size: -size) for j in range(sizes[0] if sizes else 0)]
        self.rows = sum(self.active)
        self.documents = len(counts)
        self.heads = heads

    def groups(self) -> Iterator[Group]:
        """The groups in order."""
        first = row = 0
        active: list[int] = []
        for count in self.active:
            if active and (sum(active) + count) * self.heads * self.chunk > GROUP:
                yield Group(first, row, tuple(active))
                first, row, active = first + len(active), row + sum(active), []
            active.append(count)
        if active:
            yield Group(first, row, tuple(active))

    def load(self, x: Tensor, group: Group, out: Tensor) -> Tensor:
        """The group's tokens of x `[B, T, heads, width]` into out `[chunks, heads, C, width]`, zero beyond a document's end."""
        if not self.regular:
            index, inside = self._places(group, x.device)
            values = x.flatten(0, 1)[index].masked_fill_(~inside[..., None, None], 0)
            return out.copy_(values.transpose(1, 2))
        low = group.first * self.chunk
        piece = x[:, low : low + len(group.active) * self.chunk]
        missing = len(group.active) * self.chunk - piece.shape[1]
        if missing:
            piece = torch.nn.functional.pad(piece, (0, 0, 0, 0, 0, missing))
        out.unflatten(0, (len(group.active), -1)).copy_(piece.unflatten(1, (-1, self.chunk)).permute(1, 0, 3, 2, 4))
        return out

    def store(self, out: Tensor, values: Tensor, group: Group) -> None:
        """Write `[chunks, heads, C, width]` back to the group's tokens of out `[B, T, heads, width]`."""
        if self.regular:
            low = group.first * self.chunk
            high = min(self.length, low + len(group.active) * self.chunk)
            values = values.unflatten(0, (len(group.active), -1)).permute(1, 0, 3, 2, 4)
            if high - low == len(group.active) * self.chunk:
                out[:, low:high].unflatten(1, values.shape[1:3]).copy_(values)
            else:
                out[:, low:high] = values.flatten(1, 2)[:, : high - low]
            return
        index, inside = self._places(group, out.device)
        out.flatten(0, 1)[index[inside]] = values.transpose(1, 2)[inside].to(out.dtype)

    def _places(self, group: Group, device: torch.device) -> tuple[Tensor, Tensor]:
        """Token numbers `[chunks, C]`, and which of them lie inside their document."""
        begins, ends = [], []
        for j, count in enumerate(group.active, start=group.first):
            begins += [begin + j * self.chunk for begin in self.begins[:count]]
            ends += self.ends[:count]
        index = torch.tensor(begins).unsqueeze(1) + torch.arange(self.chunk)
        inside = index < torch.tensor(ends).unsqueeze(1)
        return index.masked_fill(~inside, 0).to(device), inside.to(device)

    def sort(self, states: Tensor) -> Tensor:
        """States `[N, ...]` in the order of the walk."""
        return states.clone() if self.regular else states[self.order]

    def unsort(self, states: Tensor) -> Tensor:
        """States in the order of the documents."""
        if self.regular:
            return states
        out = torch.empty_like(states)
        out[self.order] = states
        return out


@dataclass
class Chunks:
    """What does not depend on the state, for M = chunks * value heads matrices. Every exponent is at most zero."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    """`[M, C, 1]`"""
    gamma: Tensor
    """exp of the running sum of g in the chunk, `[M, C, 1]`."""
    tail: Tensor
    """exp of the sum of g after each token, `[M, C, 1]`."""
    decay: Tensor
    """Gam, `[M, C, C]`: exp of the sum of g from token j (exclusive) to token i, zero above the diagonal."""
    keys: Tensor
    """Gam * K K^T below the diagonal, `[M, C, C]`."""
    inverse: Tensor
    """(I + diag(beta) keys)^-1, `[M, C, C]`."""
    reads: Tensor
    """scale * Gam * Q K^T on and below the diagonal, `[M, C, C]`."""
    both: Tensor
    """Minus keys times gamma above queries times scale * gamma, `[M, 2C, K]`: what reads the state."""

    @classmethod
    def load(cls, plan: Plan, group: Group, inputs: tuple[Tensor, ...], scale: float, scratch: Scratch) -> Chunks:
        q, k, v, g, beta = inputs
        count, size, repeat = sum(group.active), plan.chunk, v.shape[2] // k.shape[2]

        def load(name: str, x: Tensor) -> Tensor:
            return plan.load(x, group, scratch(name, count, x.shape[2], size, x.shape[3]))

        queries, keys = load("q", q), load("k", k)
        pairs = (count * k.shape[2], size, size)
        kk = torch.bmm(keys.flatten(0, 1), keys.flatten(0, 1).mT, out=scratch("kk", *pairs)).unflatten(0, (count, -1))
        qk = torch.bmm(queries.flatten(0, 1), keys.flatten(0, 1).mT, out=scratch("qk", *pairs)).unflatten(0, (count, -1))
        if repeat > 1:
            queries, keys, kk, qk = (x.repeat_interleave(repeat, dim=1) for x in (queries, keys, kk, qk))
        queries, keys, kk, qk = (x.flatten(0, 1) for x in (queries, keys, kk, qk))
        values = load("v", v).flatten(0, 1)
        log, strength = (load(name, x.unsqueeze(-1)).flatten(0, 1) for name, x in (("g", g), ("beta", beta)))
        exact = log.clamp_(min=SMALLEST_LOG_DECAY).cumsum(1, dtype=torch.float64)
        total = exact.to(scratch.dtype)
        rest = (exact - total).to(scratch.dtype)  # what rounding took: a difference of two large sums must still be right
        gamma, tail = exact.exp().to(scratch.dtype), (exact[:, -1:] - exact).exp().to(scratch.dtype)
        decay = torch.sub(total, total.mT, out=scratch("decay", *kk.shape))
        decay.add_(rest).sub_(rest.mT).tril_().exp_().tril_()
        kk.mul_(decay).tril_(-1)
        qk.mul_(decay).mul_(scale)
        inverse = scratch("inverse", *kk.shape).copy_(torch.eye(size, dtype=scratch.dtype, device=v.device).expand_as(kk))
        lower = torch.mul(kk, strength, out=scratch("lower", *kk.shape))
        torch.linalg.solve_triangular(lower, inverse, upper=False, unitriangular=True, out=inverse)
        both = scratch("both", len(keys), 2 * size, keys.shape[2])
        torch.mul(keys, -gamma, out=both[:, :size])
        torch.mul(queries, scale * gamma, out=both[:, size:])
        return cls(queries, keys, values, strength, gamma, tail, decay, kk, inverse, qk, both)


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, final states, and with `keep` the state at the beginning of each chunk, in the order of the walk."""
    plan, scratch = Plan(v.shape[0], v.shape[1], v.shape[2], bounds), Scratch(v)
    heads, size, dtype = v.shape[2], plan.chunk, scratch.dtype
    shape = (plan.documents, heads, k.shape[3], v.shape[3])
    state = v.new_zeros(shape, dtype=dtype) if initial_state is None else plan.sort(initial_state)
    memory = state.flatten(0, 1)
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    states = v.new_empty((plan.rows * heads if keep else 0, *shape[2:]), dtype=dtype)
    for group in plan.groups():
        c = Chunks.load(plan, group, (q, k, v, g, beta), scale, scratch)
        last, keys = c.gamma[:, -1:], torch.mul(c.k, c.tail, out=scratch("tail_keys", *c.k.shape)).mT
        low, outputs = 0, scratch("outputs", *c.v.shape)
        for count in group.active:
            high = low + count * heads
            s = memory[: count * heads]
            if keep:
                states[group.row * heads + low : group.row * heads + high] = s
            read = torch.bmm(c.both[low:high], s, out=scratch("read", high - low, 2 * size, v.shape[3]))
            error = c.v[low:high].add_(read[:, :size]).mul_(c.beta[low:high])
            written = torch.bmm(c.inverse[low:high], error, out=scratch("written", *error.shape))
            torch.bmm(c.reads[low:high], written, out=outputs[low:high]).add_(read[:, size:])
            s.mul_(last[low:high]).baddbmm_(keys[low:high], written)
            low = high
        plan.store(o, outputs.unflatten(0, (-1, heads)), group)
    return o, plan.unsort(state), states


def _backward(args: Arguments, saved: Tensors, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Walk the groups backwards with the gradient of the state; chunk states were saved, everything else is computed again."""
    q, k, v, g, beta, initial_state, bounds, scale = args
    (states,), (d_o, d_final) = saved, grads
    plan, scratch = Plan(v.shape[0], v.shape[1], v.shape[2], bounds), Scratch(v)
    heads = v.shape[2]
    shape = (plan.documents, heads, k.shape[3], v.shape[3])
    d_state = v.new_zeros(shape, dtype=scratch.dtype) if d_final is None else plan.sort(d_final)
    d_memory = d_state.flatten(0, 1)
    out = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, g, beta)]
    for group in reversed(list(plan.groups())):
        c = Chunks.load(plan, group, (q, k, v, g, beta), scale, scratch)
        d_both = scratch("d_both", len(c.v), 2 * plan.chunk, v.shape[3])
        d_out = scratch("d_out", *c.v.shape)
        if d_o is None:
            d_out.zero_()
        else:
            plan.load(d_o, group, d_out.unflatten(0, (-1, heads)))
        d_both[:, plan.chunk :] = d_out
        rows = slice(group.row * heads, group.row * heads + len(c.v))
        results = _group_gradients(c, group, heads, states[rows], d_out, d_both, d_memory, scale, scratch)
        for target, value in zip(out, results):
            value = value.unflatten(0, (-1, heads))
            if target.shape[2] != heads:  # queries and keys serve a group of value heads
                value = value.unflatten(1, (target.shape[2], -1)).sum(2)
            plan.store(target.unsqueeze(-1) if target.ndim == 3 else target, value, group)
    out[3].masked_fill_(g < SMALLEST_LOG_DECAY, 0)
    return [*out, None if initial_state is None else plan.unsort(d_state)]


def _group_gradients(
    c: Chunks,
    group: Group,
    heads: int,
    states: Tensor,
    d_out: Tensor,
    d_both: Tensor,
    d_memory: Tensor,
    scale: float,
    scratch: Scratch,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g and beta of a group's chunks; `d_memory` goes from the state after the group to the state before it."""
    size, last = c.k.shape[1], c.gamma[:, -1:]
    tail_keys = torch.mul(c.k, c.tail, out=scratch("tail_keys", *c.k.shape))
    error = torch.bmm(c.both[:, :size], states, out=scratch("error", *c.v.shape)).add_(c.v)
    written = torch.bmm(c.inverse, torch.mul(error, c.beta, out=scratch("strong", *c.v.shape)), out=scratch("written", *c.v.shape))
    d_written = torch.bmm(c.reads.mT, d_out, out=scratch("d_written", *c.v.shape))
    d_solved, d_tail, d_last = scratch("d_solved", *c.v.shape), scratch("d_tail", *c.k.shape), torch.empty_like(last)
    high = len(error)
    for count in reversed(group.active):
        low = high - count * heads
        ds = d_memory[: count * heads]
        dw = d_written[low:high].baddbmm_(tail_keys[low:high], ds)
        torch.bmm(c.inverse[low:high].mT, dw, out=d_solved[low:high])
        torch.mul(d_solved[low:high], c.beta[low:high], out=d_both[low:high, :size])
        torch.bmm(written[low:high], ds.mT, out=d_tail[low:high])
        d_last[low:high, 0, 0] = torch.linalg.vecdot(ds.flatten(1), states[low:high].flatten(1))
        ds.mul_(last[low:high]).baddbmm_(c.both[low:high].mT, d_both[low:high])
        high = low
    d_tail.mul_(c.tail)
    d_state_reads = torch.bmm(d_both, states.mT, out=scratch("d_state_reads", *c.both.shape))
    d_k = torch.mul(d_state_reads[:, :size], -c.gamma, out=scratch("d_k", *c.k.shape))
    d_q = torch.mul(d_state_reads[:, size:], scale * c.gamma, out=scratch("d_q", *c.k.shape))
    d_reads = torch.bmm(d_out, written.mT, out=scratch("d_reads", *c.keys.shape)).tril_()
    d_keys = torch.bmm(d_solved, written.mT, out=scratch("d_keys", *c.keys.shape)).tril_(-1).neg_()
    through_keys = torch.mul(d_keys, c.keys, out=scratch("through_keys", *c.keys.shape))
    d_beta = torch.linalg.vecdot(d_solved, error).add_(through_keys.sum(-1))
    pairs = through_keys.mul_(c.beta).addcmul_(d_reads, c.reads)
    # g_t decays what passes from before t to t or after: pairs (i, j) with j < t <= i. Summed as such, nothing cancels.
    crossing = torch.cumsum(pairs, 2, out=scratch("crossing", *pairs.shape)).sub_(pairs).tril_()
    d_g = crossing.sum(1)
    d_g += (torch.linalg.vecdot(c.k, d_k) + torch.linalg.vecdot(c.q, d_q)).flip(1).cumsum(1).flip(1)
    from_tail = torch.linalg.vecdot(c.k, d_tail)
    d_g += from_tail.cumsum(1) - from_tail
    d_g += (d_last * last).squeeze(-1)
    d_qk = d_reads.mul_(c.decay).mul_(scale)
    d_kk = d_keys.mul_(c.decay).mul_(c.beta)
    symmetric = torch.add(d_kk, d_kk.mT, out=scratch("through_keys", *d_kk.shape))
    d_q.baddbmm_(d_qk, c.k)
    d_k.baddbmm_(d_qk.mT, c.q).add_(d_tail).baddbmm_(symmetric, c.k)
    return d_q, d_k, d_both[:, :size], d_g.unsqueeze(-1), d_beta.unsqueeze(-1)


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
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulate_dtype(v.dtype)
    documents = v.shape[0] if bounds is None else bounds.shape[0] - 1
    final = v.new_empty((documents, v.shape[2], k.shape[3], v.shape[3]), dtype=dtype)
    rows = v.shape[0] * -(-v.shape[1] // chunk_size(v.shape[1])) if bounds is None else torch.library.get_ctx().new_dynamic_size()
    states = v.new_empty((rows * v.shape[2] if keep else 0, k.shape[3], v.shape[3]), dtype=dtype)
    return v.new_empty(v.shape), final, states


_OPAQUE = Opaque(
    "gdn::gated_delta_rule_chunked",
    _forward,
    _backward,
    fake=_fake,
    results=2,
    differentiable=("q", "k", "v", "g", "beta", "initial_state"),
)
