"""Linear attention with a decay for each channel of the keys in Triton: forward and backward for any GPU from sm_80 on, or on the CPU under
`TRITON_INTERPRET=1`.

Launches, forward: what each chunk needs of its channels (queries and keys times decays, scores), all chunks at once, then outputs, chunk after chunk with
the memory in registers. Backward: the first again; the memories that chunks meet and then their gradients, chunk after chunk; then the gradient
of the values and those of queries, keys and log decays, all chunks at once. Segments as in portable.py. Nothing that grows with the length
is kept for the backward pass but the arguments. Sums run in a fixed order and nothing is atomic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from gdn.core.opaque import Arguments, Opaque, Tensors
from gdn.core.packing import CHUNK, Packing
from gdn.core.portable_rows import aligned, dense, token_rows
from gdn.ops.linear_recurrence.portable import enter_segments, walk_states
from gdn.ops.linear_recurrence.portable_channels import (
    between_kernel,
    channel_gradient_kernel,
    channel_output_kernel,
    channels_kernel,
    other_gradient_kernel,
)
from gdn.ops.linear_recurrence.portable_plan import Plan, plan_of
from gdn.ops.sequences.portable import Bounds, bounds_of


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_table: Tensor | None,
    chunk_offsets: Tensor | None,
    scale: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """o, final state; saved: with segments, the memories that enter them."""
    p = plan_of(q, v.shape[3], v.shape[2], cu_seqlens, chunk_table)
    q, k, v, g = token_rows(q), token_rows(k), token_rows(v), aligned(g)
    o, final, entering = _buffers(p, v)
    if p.chunks == 0:
        return o, final.zero_() if initial_state is None else final.copy_(initial_state), entering
    initial_state = None if initial_state is None else aligned(initial_state)
    bounds = (cu_seqlens, chunk_table, chunk_offsets)
    key = _key(p, q, k, v, g)
    sums = exponent_sums(p, q)
    read, written, last, scores = channels(p, key, q, k, g, sums, bounds, scale)
    assert read is not None and scores is not None
    if p.S:
        enter_segments(p, key, written, v, None, last, initial_state, entering, bounds, scale, backward=False)
    use = p.launches["channel output"]
    use(
        channel_output_kernel, (key, initial_state is None), p.columns("channel output") * p.HV * p.runs, read, written, last, scores, v, o,
        initial_state, entering, final, *bounds, p.length, p.per_row, p.chunks, p.documents, p.S, v.stride(1), p.H, p.HV, p.group, p.K, p.V, p.BK,
        use.block, p.S > 0, p.packed, p.wide, use.stages,
    )  # fmt: skip
    return o, final, entering


def _backward(args: Arguments, saved: Tensors, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    q, k, v, g, initial_state, *rest, scale = args
    (entering,), (do, d_final) = saved, grads
    p = plan_of(q, v.shape[3], v.shape[2], rest[0], rest[1])
    q, k, v, g = token_rows(q), token_rows(k), token_rows(v), aligned(g)
    do = torch.zeros(v.shape, dtype=v.dtype, device=v.device) if do is None else dense(do)
    d_final = None if d_final is None else aligned(d_final)
    d_initial = None if initial_state is None else torch.empty(initial_state.shape, dtype=torch.float32, device=v.device)
    if p.chunks == 0:
        if d_initial is not None:
            d_initial = d_initial.zero_() if d_final is None else d_final
        return [*(torch.zeros_like(x) for x in (q, k, v, g)), d_initial]
    initial_state = None if initial_state is None else aligned(initial_state)
    bounds = (rest[0], rest[1], rest[2])
    key = _key(p, q, k, v, g)
    sums = exponent_sums(p, q)
    read, written, last, scores = channels(p, key, q, k, g, sums, bounds, scale)
    assert read is not None and scores is not None
    states, d_states = (torch.empty((p.chunks, p.HV, p.K, p.V), dtype=q.dtype, device=q.device) for _ in range(2))
    walk_states(p, key, written, v, None, last, states, initial_state, entering, None, bounds, scale, backward=False)
    leaving = entering
    if p.S:
        leaving = torch.empty_like(entering)
        enter_segments(p, key, read, do, None, last, d_final, leaving, bounds, scale, backward=True)
    walk_states(p, key, read, do, None, last, d_states, d_final, leaving, d_initial, bounds, scale, backward=True)
    dq, dk, dv, dg = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v, g))
    other_gradient(p, key, written, scores, do, d_states, dv, bounds, turned=True)
    channel_gradient(p, key, (q, k, do, v), g, sums, states, d_states, (dq, dk, dg), bounds, scale)
    return [dq, dk, dv, dg, d_initial]


def exponent_sums(p: Plan, like: Tensor) -> Tensor:
    """Which log decays exponents hold. Made anew for each call, for what is kept would lie in the pool of a graph that is captured then."""
    sums = torch.empty((8, CHUNK, CHUNK), dtype=torch.float32 if p.wide else torch.bfloat16, device=like.device)
    p.launches["between"](between_kernel, ("between", p.wide), 8, sums)
    return sums


def channels(
    p: Plan, key: Any, x: Tensor | None, y: Tensor, g: Tensor, sums: Tensor, bounds: Bounds, scale: float
) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:
    """x and y times their decays, the decay over each chunk, and the scores; without x those of y alone."""
    read, written = (None if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, y))
    last = torch.empty((p.chunks, p.H, p.K), dtype=torch.float32, device=y.device)
    scores = None if x is None else torch.empty((p.chunks, p.H, CHUNK, CHUNK), dtype=y.dtype, device=y.device)
    use = p.launches["channels"]
    use(
        channels_kernel, (key, x is None), p.H * p.chunks, y, x, g, sums, read, written, last, scores, *bounds[:2], p.length, p.per_row, scale,
        y.stride(1) if x is None else x.stride(1), y.stride(1), p.H, 1, p.K, use.block, p.packed, False, p.wide,
    )  # fmt: skip
    return read, cast(Tensor, written), last, scores


def other_gradient(
    p: Plan, key: Any, decayed: Tensor, scores: Tensor, rows: Tensor, states: Tensor, out: Tensor, bounds: Bounds, *, turned: bool
) -> None:
    """Fill `out` with the gradient of a, or turned of b."""
    use = p.launches["other gradient"]
    use(
        other_gradient_kernel, (key, turned), p.columns("other gradient") * p.HV * p.chunks, decayed, scores, rows, states, out, *bounds[:2], p.length,
        p.per_row, rows.stride(1), p.H, p.HV, p.group, p.K, p.V, p.BK, use.block, turned, p.packed, p.wide,
    )  # fmt: skip


def channel_gradient(
    p: Plan,
    key: Any,
    sides: tuple[Tensor, Tensor, Tensor, Tensor],
    g: Tensor,
    sums: Tensor,
    states: Tensor,
    d_states: Tensor,
    out: tuple[Tensor | None, Tensor, Tensor],
    bounds: Bounds,
    scale: float,
) -> None:
    """Fill `out`, the gradients of x, y and g, for the sides x, y, a, b."""
    use = p.launches["channel gradient"]
    x, y, a, b = sides
    use(
        channel_gradient_kernel, key, -(-p.K // use.block) * p.H * p.chunks, x, y, g, sums, a, b, states, d_states, *out, *bounds[:2], p.length,
        p.per_row, scale, *(t.stride(1) for t in sides), p.H, p.HV, p.group, p.K, p.V, use.block, use.block, p.packed, p.wide, use.stages,
    )  # fmt: skip


def _key(p: Plan, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Any, ...]:
    """What the compiled kernels depend on, beside what each launch is. All pointers are multiples of 16 bytes."""
    return "key", p.code, q.dtype, g.dtype, q.stride(1), k.stride(1), v.stride(1)


def _buffers(p: Plan, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """o, final, entering."""
    f32 = {"dtype": torch.float32, "device": like.device}
    return (
        torch.empty(like.shape, dtype=like.dtype, device=like.device),
        torch.empty((p.documents, p.HV, p.K, p.V), **f32),
        torch.empty((p.segments, p.HV, p.K, p.V), **f32),
    )


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_table: Tensor | None,
    chunk_offsets: Tensor | None,
    scale: float,
    keep: bool,
) -> Tensors:
    return _buffers(plan_of(q, v.shape[3], v.shape[2], cu_seqlens, chunk_table), v)


_OPAQUE = Opaque(
    "gdn::gated_linear_attention_portable",
    _forward,
    _backward,
    fake=_fake,
    results=2,
    differentiable=("q", "k", "v", "g", "initial_state"),
)


def gated_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, initial_state: Tensor | None, packing: Packing | None
) -> tuple[Tensor, Tensor]:
    """See `gdn.ops.gated_linear_attention`."""
    K, V = q.shape[3], v.shape[3]
    more_k, more_v = -K % 8, -V % 8  # loads take eight elements at a time
    if more_k:
        q, k, g = (F.pad(x, (0, more_k)) for x in (q, k, g))
    if more_v:
        v = F.pad(v, (0, more_v))
    if initial_state is not None and (more_k or more_v):
        initial_state = F.pad(initial_state, (0, more_v, 0, more_k))
    o, final = _OPAQUE(q, k, v, g, initial_state, *bounds_of(packing), scale)
    return (o[..., :V], final[..., :K, :V]) if more_k or more_v else (o, final)
