"""The gated delta rule token by token, with a hand-written backward: exact to rounding, for short sequences and for comparing bits.

The forward pass is the definition. The backward pass walks the tokens from the last to the first (the adjoint of the recurrence; README.md)
and needs the state at each of them: one state in every `STRIDE` tokens is saved, the others are computed again, a stretch at a time.
All documents advance together, sorted by length, so that the work per token is one batch of matrix-vector products.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gdn.core.checks import accumulate_dtype
from gdn.core.opaque import Arguments, Opaque, Tensors
from gdn.core.packing import Packing
from gdn.ops.sequences.decay import SMALLEST_LOG_DECAY

STRIDE = 64


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


class Walk:
    """All documents token by token, the longest first, so that those still running are always the first rows."""

    def __init__(self, v: Tensor, bounds: Tensor | None) -> None:
        batch, length = v.shape[:2]
        host = torch.arange(batch + 1) * length if bounds is None else bounds
        lengths = host.diff()
        order = torch.argsort(lengths, descending=True, stable=True)
        self.steps = int(lengths.max()) if len(lengths) else 0
        self.running = [int((lengths > t).sum()) for t in range(self.steps)]
        self.begins, self.order = host[:-1][order].to(v.device), order.to(v.device)

    def rows(self, t: int) -> Tensor:
        """The flat number of token t of every document that has one."""
        return self.begins[: self.running[t]] + t


class Token:
    """The inputs of one token of every running document, wide, with queries and keys for every value head."""

    def __init__(self, walk: Walk, t: int, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> None:
        rows, dtype, groups = walk.rows(t), accumulate_dtype(v.dtype), v.shape[2] // k.shape[2]
        self.q, self.k = (x.flatten(0, 1)[rows].to(dtype).repeat_interleave(groups, dim=1) for x in (q, k))
        self.v, self.beta = v.flatten(0, 1)[rows].to(dtype), beta.flatten(0, 1)[rows].to(dtype).unsqueeze(-1)
        self.decay = g.flatten(0, 1)[rows].to(dtype).clamp(min=SMALLEST_LOG_DECAY).exp()[..., None, None]

    def write(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Forget and write in place; the state after forgetting, and the error."""
        forgotten = state.mul_(self.decay).clone()
        error = self.v - _read(self.k, forgotten)
        state.add_(_outer(self.k, self.beta * error))
        return forgotten, error


def _read(key: Tensor, state: Tensor) -> Tensor:
    return torch.einsum("nhk,nhkv->nhv", key, state)


def _outer(key: Tensor, value: Tensor) -> Tensor:
    return key.unsqueeze(-1) * value.unsqueeze(-2)


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
    walk, dtype = Walk(v, bounds), accumulate_dtype(v.dtype)
    shape = (len(walk.order), v.shape[2], k.shape[3], v.shape[3])
    state = v.new_zeros(shape, dtype=dtype) if initial_state is None else initial_state[walk.order]
    o, saved = torch.empty_like(v, memory_format=torch.contiguous_format), []
    for t, running in enumerate(walk.running):
        if keep and t % STRIDE == 0:
            saved.append(state[:running].clone())
        token = Token(walk, t, q, k, v, g, beta)
        token.write(state[:running])
        o.flatten(0, 1)[walk.rows(t)] = (scale * _read(token.q, state[:running])).to(o.dtype)
    final = torch.empty_like(state)
    final[walk.order] = state
    return o, final, torch.cat(saved) if saved else state.new_empty((0, *shape[1:]))


def _backward(args: Arguments, saved: Tensors, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    q, k, v, g, beta, initial_state, bounds, scale = args
    (states,), (d_o, d_final) = saved, grads
    walk, dtype = Walk(v, bounds), accumulate_dtype(v.dtype)
    shape = (len(walk.order), v.shape[2], k.shape[3], v.shape[3])
    d_state = v.new_zeros(shape, dtype=dtype) if d_final is None else d_final[walk.order]
    out = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, g, beta)]
    d_o = torch.zeros_like(v) if d_o is None else d_o
    end = len(states)
    for first in reversed(range(0, walk.steps, STRIDE)):
        begin = end - walk.running[first]
        state, end = states[begin:end].clone(), begin
        stretch = []
        for t in range(first, min(first + STRIDE, walk.steps)):
            token = Token(walk, t, q, k, v, g, beta)
            stretch.append((t, token, *token.write(state[: walk.running[t]])))
        for t, token, forgotten, error in reversed(stretch):
            rows = walk.rows(t)
            upstream = scale * d_o.flatten(0, 1)[rows].to(dtype)
            for target, value in zip(out, _token_gradients(token, forgotten, error, upstream, d_state[: len(rows)])):
                heads = target.shape[2]
                target.flatten(0, 1)[rows] = (value if heads == v.shape[2] else value.unflatten(1, (heads, -1)).sum(2)).to(target.dtype)
    out[3].masked_fill_(g < SMALLEST_LOG_DECAY, 0)
    if initial_state is None:
        return [*out, None]
    d_initial = torch.empty_like(d_state)
    d_initial[walk.order] = d_state
    return [*out, d_initial]


def _token_gradients(token: Token, forgotten: Tensor, error: Tensor, upstream: Tensor, ds: Tensor) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, g and beta at one token; `ds` goes from the state after the token to the state before it, in place."""
    written = token.beta * error
    state = forgotten + _outer(token.k, written)
    d_q = torch.einsum("nhkv,nhv->nhk", state, upstream)
    ds.add_(_outer(token.q, upstream))
    d_written = _read(token.k, ds)
    d_error = token.beta * d_written
    d_k = torch.einsum("nhkv,nhv->nhk", ds, written) - torch.einsum("nhkv,nhv->nhk", forgotten, d_error)
    ds.sub_(_outer(token.k, d_error))
    d_g = (ds * forgotten).sum((-1, -2))
    ds.mul_(token.decay)
    return d_q, d_k, d_error, d_g, (error * d_written).sum(-1)


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
    documents = v.shape[0] if bounds is None else bounds.shape[0] - 1
    shape, dtype = (v.shape[2], k.shape[3], v.shape[3]), accumulate_dtype(v.dtype)
    if not keep:
        rows = 0
    elif bounds is None:
        rows = v.shape[0] * -(-v.shape[1] // STRIDE)
    else:
        rows = torch.library.get_ctx().new_dynamic_size()
    return v.new_empty(v.shape), v.new_empty((documents, *shape), dtype=dtype), v.new_empty((rows, *shape), dtype=dtype)


_OPAQUE = Opaque(
    "gdn::gated_delta_rule_recurrent",
    _forward,
    _backward,
    fake=_fake,
    results=2,
    differentiable=("q", "k", "v", "g", "beta", "initial_state"),
)
