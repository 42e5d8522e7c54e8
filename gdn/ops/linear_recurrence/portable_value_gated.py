"""Linear attention with a decay for each channel of the values in Triton: forward and backward for any GPU from sm_80 on, or on the CPU under
`TRITON_INTERPRET=1`.

The sides of F in README.md change places: y are the values, b the keys, a the queries and x the gradient of o, so memories are turned, `V x K`, and
plans have the width of the values as K. o is dF/dx here, read from the memories that chunks meet, which are stored forward as well. Value heads that
share queries and keys have decays of their own, so nothing can be shared and queries and keys are repeated for them.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor

from gdn.core.opaque import Tensors
from gdn.core.packing import Packing
from gdn.core.portable_rows import fresh
from gdn.ops.linear_recurrence.portable_channels import channel_read_kernel
from gdn.ops.linear_recurrence.portable_gated import channel_gradient, channels, exponent_sums, other_gradient, segments_alone
from gdn.ops.linear_recurrence.portable_plan import Plan, plan_of
from gdn.ops.linear_recurrence.portable_walk import enter_segments, walk_back, walk_states
from gdn.ops.sequences.portable_recurrence import Call, Gradients, Recurrence


def _forward(call: Call, o: Tensor, final: Tensor, kept: tuple[Tensor, Tensor]) -> None:
    (entering, _), p, q, k, v = kept, call.p, call.q, call.k, call.v
    sums = exponent_sums(p, v)
    _, written, last, _ = channels(call, None, v, sums)
    if p.S:
        enter_segments(call, written, k, None, last, call.initial, entering, backward=False)
    states = walk_states(call, written, k, None, last, call.initial, entering, final, backward=False, turned=True)
    use = p.launches["channel read"]
    use(
        channel_read_kernel, call.key, -(-p.K // use.block) * p.H * p.chunks, v, call.g, sums, q, k, states, o, *call.bounds[:2], p.length, p.per_row,
        call.scale, v.stride(1), q.stride(1), k.stride(1), p.H, p.K, p.V, use.block, use.block, p.packed, p.wide, use.stages,
    )  # fmt: skip


def _backward(call: Call, kept: Tensors, do: Tensor, d_final: Tensor | None, d_initial: Tensor | None) -> Gradients:
    (entering, _), q, k, v, g = kept, call.q, call.k, call.v, call.g
    sums = exponent_sums(call.p, v)
    x, written, last, A = channels(call, do, v, sums)
    read, scores = cast(Tensor, x), cast(Tensor, A)
    states = walk_states(call, written, k, None, last, call.initial, entering, None, backward=False)
    d_states = walk_back(call, read, q, None, last, d_final, entering, d_initial)
    dq, dk, dv, dg = (fresh(x) for x in (q, k, v, g))
    other_gradient(call, read, scores, k, states, dq, turned=False)
    other_gradient(call, written, scores, q, d_states, dk, turned=True)
    channel_gradient(call, (do, v, q, k), sums, states, d_states, (None, dv, dg))
    return dq, dk, dv, dg, None


def _plan(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, chunk_table: Tensor | None) -> Plan:
    return plan_of(v, k.shape[3], v.shape[2], cu_seqlens, chunk_table)


_ROW = Recurrence("value_gated_linear_attention", "value", plan=_plan, kept=segments_alone, forward=_forward, backward=_backward)


def value_gated_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, initial_state: Tensor | None, packing: Packing | None
) -> tuple[Tensor, Tensor]:
    """See `gdn.ops.value_gated_linear_attention`."""
    group = v.shape[2] // q.shape[2]
    if group > 1:
        q, k = (x.repeat_interleave(group, dim=2) for x in (q, k))
    return _ROW(q, k, v, g, None, scale, initial_state, packing)
