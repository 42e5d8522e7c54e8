"""Linear attention with one decay per head in Triton: forward and backward for any GPU from sm_80 on, or on the CPU under `TRITON_INTERPRET=1`.

Launches, forward: the decays of all chunks at once, then outputs, chunk after chunk with the memory in registers. Backward: the memories
that chunks meet and then their gradients are found chunk after chunk and stored; one more kernel finds all gradients from them, all chunks
at once. Where programs are few, runs of chunks are cut into segments, whose memories are found first (portable_states.py). Nothing that
grows with the length is kept for the backward pass but the arguments and the decays. Sums run in a fixed order and nothing is atomic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gdn.core.opaque import Arguments, Opaque, Tensors
from gdn.core.packing import CHUNK, Packing
from gdn.core.portable_rows import aligned, dense, token_rows
from gdn.ops.delta_rule.portable_prepare import GATES as _GATES
from gdn.ops.delta_rule.portable_prepare import gates_kernel
from gdn.ops.linear_recurrence.portable_heads import gradient_kernel, output_kernel
from gdn.ops.linear_recurrence.portable_plan import Plan, plan_of
from gdn.ops.linear_recurrence.portable_states import handover_kernel, states_kernel
from gdn.ops.sequences.portable import bounds_of, padded

GATES = int(_GATES.value)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """o, final state; saved: the decays and, with segments, the memories that enter them."""
    p = _plan(q, v, cu_seqlens, chunk_table)
    q, k, v, g = token_rows(q), token_rows(k), token_rows(v), aligned(g)
    o, final, gates, entering = _buffers(p, v)
    if p.chunks == 0:
        return o, final.zero_() if initial_state is None else final.copy_(initial_state), gates, entering
    initial_state = None if initial_state is None else aligned(initial_state)
    bounds = (cu_seqlens, chunk_table, chunk_offsets)
    heads = min(16, padded(p.HV))
    key = _key(p, q, k, v, g)
    p.launches["gates"](
        gates_kernel, key, -(-p.HV // heads) * p.chunks, g, g, gates, *bounds[:2], p.length, p.per_row, p.HV, heads, p.packed, False
    )
    if p.S:
        enter_segments(p, key, k, v, gates, None, initial_state, entering, bounds, scale, backward=False)
    use = p.launches["output"]
    use(
        output_kernel, (key, initial_state is None), p.columns("output") * p.HV * p.runs, q, k, v, gates, o, initial_state, entering, final, *bounds,
        p.length, p.per_row, p.chunks, p.documents, p.S, scale, q.stride(1), k.stride(1), v.stride(1), p.HV, p.group, p.K, p.V, p.BK, use.block,
        p.S > 0, p.packed, p.wide, use.stages,
    )  # fmt: skip
    return o, final, gates, entering


def _backward(args: Arguments, saved: Tensors, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    q, k, v, g, initial_state, *rest, scale = args
    (gates, entering), (do, d_final) = saved, grads
    p = _plan(q, v, rest[0], rest[1])
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
    states, d_states = (torch.empty((p.chunks, p.HV, p.K, p.V), dtype=q.dtype, device=q.device) for _ in range(2))
    walk_states(p, key, k, v, gates, None, states, initial_state, entering, None, bounds, scale, backward=False)
    leaving = entering
    if p.S:
        leaving = torch.empty_like(entering)
        enter_segments(p, key, q, do, gates, None, d_final, leaving, bounds, scale, backward=True)
    walk_states(p, key, q, do, gates, None, d_states, d_final, leaving, d_initial, bounds, scale, backward=True)
    dtype = q.dtype if p.parts == 1 else torch.float32
    dq, dk = (torch.empty((p.parts, *q.shape), dtype=dtype, device=q.device) for _ in range(2))
    dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    dg = torch.empty((2, *g.shape), dtype=torch.float32, device=g.device)
    use = p.launches["gradient"]
    use(
        gradient_kernel, key, 2 * p.parts * p.H * p.chunks, q, k, v, g, gates, do, states, d_states, dq, dk, dv, dg, *bounds[:2], p.length, p.per_row,
        scale, p.tokens, q.stride(1), k.stride(1), v.stride(1), p.H, p.HV, p.parts, p.group, p.K, p.V, p.BK, use.block, p.packed, p.wide, use.stages,
    )  # fmt: skip
    dq, dk = (x[0] if p.parts == 1 else x.sum(0).to(q.dtype) for x in (dq, dk))
    return [dq, dk, dv, (dg[0] + dg[1]).to(g.dtype), d_initial]


def enter_segments(
    p: Plan,
    key: Any,
    x: Tensor,
    y: Tensor,
    gates: Tensor | None,
    last: Tensor | None,
    edge: Tensor | None,
    entering: Tensor,
    bounds: tuple[Tensor | None, ...],
    scale: float,
    *,
    backward: bool,
) -> None:
    """Fill `entering`: the memory, or backwards its gradient, at the begin of each segment of the way."""
    added, carried = torch.empty_like(entering), entering.new_empty((p.segments, p.HV, p.K))
    _states(p, key, x, y, gates, last, None, edge, None, None, added, carried, bounds, scale, backward)
    use = p.launches["handover"]
    use(
        handover_kernel, (key, backward), -(-p.V // use.block) * p.HV, added, carried, entering, p.segments, p.HV, p.K, p.V, p.BK, use.block, backward
    )  # fmt: skip


def walk_states(
    p: Plan,
    key: Any,
    x: Tensor,
    y: Tensor,
    gates: Tensor | None,
    last: Tensor | None,
    states: Tensor,
    edge: Tensor | None,
    entering: Tensor,
    out: Tensor | None,
    bounds: tuple[Tensor | None, ...],
    scale: float,
    *,
    backward: bool,
) -> None:
    """Fill `states` with what each chunk meets, and `out` with what is left at the ends of documents."""
    _states(p, key, x, y, gates, last, states, edge, entering, out, None, None, bounds, scale, backward)


def _states(
    p: Plan,
    key: Any,
    x: Tensor,
    y: Tensor,
    gates: Tensor | None,
    last: Tensor | None,
    states: Tensor | None,
    edge: Tensor | None,
    entering: Tensor | None,
    out: Tensor | None,
    added: Tensor | None,
    carried: Tensor | None,
    bounds: tuple[Tensor | None, ...],
    scale: float,
    backward: bool,
) -> None:
    use, summary = p.launches["states"], added is not None
    absent = (last is None, edge is None, out is None, backward, summary)
    use(
        states_kernel, (key, absent), p.columns("states") * p.HV * (p.segments - 1 if summary else p.runs), x, y, gates, last, states, edge, entering,
        out, added, carried, *bounds, p.length, p.per_row, p.chunks, p.documents, p.S, scale, x.stride(1), y.stride(1), p.HV, p.group, p.K, p.V,
        p.BK, use.block, p.S > 0, p.packed, last is not None, backward, summary, p.wide, use.stages,
    )  # fmt: skip


def _plan(q: Tensor, v: Tensor, cu_seqlens: Tensor | None, chunk_table: Tensor | None) -> Plan:
    return plan_of(q, v.shape[3], v.shape[2], cu_seqlens, chunk_table)


def _key(p: Plan, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Any, ...]:
    """What the compiled kernels depend on, beside what each launch is. All pointers are multiples of 16 bytes."""
    return p.code, q.dtype, g.dtype, q.stride(1), k.stride(1), v.stride(1)


def _buffers(p: Plan, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """o, final, decays, entering."""
    f32 = {"dtype": torch.float32, "device": like.device}
    return (
        torch.empty(like.shape, dtype=like.dtype, device=like.device),
        torch.empty((p.documents, p.HV, p.K, p.V), **f32),
        torch.empty((p.chunks, p.HV, GATES, CHUNK), **f32),
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
    return _buffers(_plan(q, v, cu_seqlens, chunk_table), v)


_OPAQUE = Opaque(
    "gdn::linear_attention_portable",
    _forward,
    _backward,
    fake=_fake,
    results=2,
    differentiable=("q", "k", "v", "g", "initial_state"),
)


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, initial_state: Tensor | None, packing: Packing | None
) -> tuple[Tensor, Tensor]:
    """See `gdn.ops.linear_attention`."""
    K, V = q.shape[3], v.shape[3]
    more_k, more_v = -K % 8, -V % 8  # loads take eight elements at a time
    if more_k:
        q, k = F.pad(q, (0, more_k)), F.pad(k, (0, more_k))
    if more_v:
        v = F.pad(v, (0, more_v))
    if initial_state is not None and (more_k or more_v):
        initial_state = F.pad(initial_state, (0, more_v, 0, more_k))
    o, final = _OPAQUE(q, k, v, g, initial_state, *bounds_of(packing), scale)
    return (o[..., :V], final[..., :K, :V]) if more_k or more_v else (o, final)
