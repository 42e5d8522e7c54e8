"""Linear attention with one decay per head in Triton: forward and backward for any GPU from sm_80 on, or on the CPU under `TRITON_INTERPRET=1`.

Launches, forward: the decays of all chunks at once, then outputs, chunk after chunk with the memory in registers. Backward: the memories
that chunks meet and then their gradients are found chunk after chunk and stored; one more kernel finds all gradients from them, all chunks
at once. Where programs are few, runs of chunks are cut into segments, whose memories are found first (portable_states.py). Nothing that
grows with the length is kept for the backward pass but the arguments and the decays. Sums run in a fixed order and nothing is atomic.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gdn.core.opaque import Tensors
from gdn.core.packing import CHUNK, Packing
from gdn.core.portable_rows import fresh
from gdn.ops.delta_rule.portable_prepare import GATES as _GATES
from gdn.ops.linear_recurrence.portable_heads import gates_kernel, gradient_kernel, output_kernel
from gdn.ops.linear_recurrence.portable_plan import Plan, plan_of
from gdn.ops.linear_recurrence.portable_walk import enter_segments, entering_segments, walk_back, walk_states
from gdn.ops.sequences.portable import padded
from gdn.ops.sequences.portable_recurrence import Call, Gradients, Recurrence

GATES = int(_GATES.value)


def _forward(call: Call, o: Tensor, final: Tensor, kept: tuple[Tensor, Tensor]) -> None:
    (entering, gates), p, q, k, v, g, bounds = kept, call.p, call.q, call.k, call.v, call.g, call.bounds
    heads = min(16, padded(p.HV))
    p.launches["gates"](
        gates_kernel, call.key, -(-p.HV // heads) * p.chunks, g, gates, *bounds[:2], p.length, p.per_row, p.HV, heads, p.packed
    )
    if p.S:
        enter_segments(call, k, v, gates, None, call.initial, entering, backward=False)
    use = p.launches["output"]
    use(
        output_kernel, (call.key, call.initial is None), p.columns("output") * p.HV * p.runs, q, k, v, gates, o, call.initial, entering, final, *bounds,
        p.length, p.per_row, p.chunks, p.documents, p.S, call.scale, q.stride(1), k.stride(1), v.stride(1), p.HV, p.group, p.K, p.V, p.BK, use.block,
        p.S > 0, p.packed, p.wide, use.stages,
    )  # fmt: skip


def _backward(call: Call, kept: Tensors, do: Tensor, d_final: Tensor | None, d_initial: Tensor | None) -> Gradients:
    (entering, gates), p, q, k, v, g = kept, call.p, call.q, call.k, call.v, call.g
    states = walk_states(call, k, v, gates, None, call.initial, entering, None, backward=False)
    d_states = walk_back(call, q, do, gates, None, d_final, entering, d_initial)
    dtype = q.dtype if p.parts == 1 else torch.float32
    dq, dk = (torch.empty((p.parts, *q.shape), dtype=dtype, device=q.device) for _ in range(2))
    dv = fresh(v)
    dg = torch.empty((2, *g.shape), dtype=torch.float32, device=g.device)
    use = p.launches["gradient"]
    use(
        gradient_kernel, call.key, 2 * p.parts * p.H * p.chunks, q, k, v, g, gates, do, states, d_states, dq, dk, dv, dg, *call.bounds[:2], p.length,
        p.per_row, call.scale, p.tokens, q.stride(1), k.stride(1), v.stride(1), p.H, p.HV, p.parts, p.group, p.K, p.V, p.BK, use.block, p.packed,
        p.wide, use.stages,
    )  # fmt: skip
    dq, dk = (x[0] if p.parts == 1 else x.sum(0).to(q.dtype) for x in (dq, dk))
    return dq, dk, dv, dg.sum(0).to(g.dtype), None


def _plan(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, chunk_table: Tensor | None) -> Plan:
    return plan_of(q, v.shape[3], v.shape[2], cu_seqlens, chunk_table)


def _kept(p: Plan, like: Tensor) -> tuple[Tensor, Tensor]:
    """With segments the memories that enter them; the decays."""
    return entering_segments(p, like), torch.empty((p.chunks, p.HV, GATES, CHUNK), dtype=torch.float32, device=like.device)


_ROW = Recurrence("linear_attention", "head", plan=_plan, kept=_kept, forward=_forward, backward=_backward)


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, initial_state: Tensor | None, packing: Packing | None
) -> tuple[Tensor, Tensor]:
    """See `gdn.ops.linear_attention`."""
    return _ROW(q, k, v, g, None, scale, initial_state, packing)
