"""Linear attention with a decay for each channel of the keys in Triton: forward and backward for any GPU from sm_80 on, or on the CPU under
`TRITON_INTERPRET=1`.

Launches, forward: what each chunk needs of its channels (queries and keys times decays, scores), all chunks at once, then outputs, chunk after chunk with
the memory in registers. Backward: the first again; the memories that chunks meet and then their gradients, chunk after chunk; then the gradient
of the values and those of queries, keys and log decays, all chunks at once. Segments as in portable.py. Nothing that grows with the length
is kept for the backward pass but the arguments. Sums run in a fixed order and nothing is atomic.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from gdn.core.opaque import Tensors
from gdn.core.packing import CHUNK, Packing
from gdn.core.portable_rows import fresh
from gdn.ops.linear_recurrence.portable_channels import (
    between_kernel,
    channel_gradient_kernel,
    channel_output_kernel,
    channels_kernel,
    other_gradient_kernel,
)
from gdn.ops.linear_recurrence.portable_plan import Plan, plan_of
from gdn.ops.linear_recurrence.portable_walk import enter_segments, entering_segments, walk_back, walk_states
from gdn.ops.sequences.portable_recurrence import Call, Gradients, Recurrence


def _forward(call: Call, o: Tensor, final: Tensor, kept: tuple[Tensor, Tensor]) -> None:
    (entering, _), p, v, initial = kept, call.p, call.v, call.initial
    read, written, last, scores = channels(call, call.q, call.k, exponent_sums(p, v))
    if p.S:
        enter_segments(call, written, v, None, last, initial, entering, backward=False)
    use = p.launches["channel output"]
    use(
        channel_output_kernel, (call.key, initial is None), p.columns("channel output") * p.HV * p.runs, read, written, last, scores, v, o, initial,
        entering, final, *call.bounds, p.length, p.per_row, p.chunks, p.documents, p.S, v.stride(1), p.H, p.HV, p.group, p.K, p.V, p.BK, use.block,
        p.S > 0, p.packed, p.wide, use.stages,
    )  # fmt: skip


def _backward(call: Call, kept: Tensors, do: Tensor, d_final: Tensor | None, d_initial: Tensor | None) -> Gradients:
    (entering, _), q, k, v, g = kept, call.q, call.k, call.v, call.g
    sums = exponent_sums(call.p, v)
    read, written, last, scores = channels(call, q, k, sums)
    states = walk_states(call, written, v, None, last, call.initial, entering, None, backward=False)
    d_states = walk_back(call, cast(Tensor, read), do, None, last, d_final, entering, d_initial)
    dq, dk, dv, dg = (fresh(x) for x in (q, k, v, g))
    other_gradient(call, written, cast(Tensor, scores), do, d_states, dv, turned=True)
    channel_gradient(call, (q, k, do, v), sums, states, d_states, (dq, dk, dg))
    return dq, dk, dv, dg, None


def exponent_sums(p: Plan, like: Tensor) -> Tensor:
    """Which log decays exponents hold. Made anew for each call, for what is kept would lie in the pool of a graph that is captured then."""
    sums = torch.empty((8, CHUNK, CHUNK), dtype=torch.float32 if p.wide else torch.bfloat16, device=like.device)
    p.launches["between"](between_kernel, ("between", p.wide), 8, sums)
    return sums


def channels(call: Call, x: Tensor | None, y: Tensor, sums: Tensor) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:
    """x and y times their decays, the decay over each chunk, and the scores; without x those of y alone."""
    p = call.p
    read, written = (None if t is None else fresh(t) for t in (x, y))
    last = torch.empty((p.chunks, p.H, p.K), dtype=torch.float32, device=y.device)
    scores = None if x is None else torch.empty((p.chunks, p.H, CHUNK, CHUNK), dtype=y.dtype, device=y.device)
    use = p.launches["channels"]
    use(
        channels_kernel, (call.key, x is None), p.H * p.chunks, y, x, call.g, sums, read, written, last, scores, *call.bounds[:2], p.length, p.per_row,
        call.scale, y.stride(1) if x is None else x.stride(1), y.stride(1), p.H, 1, p.K, use.block, p.packed, False, p.wide,
    )  # fmt: skip
    return read, cast(Tensor, written), last, scores


def other_gradient(call: Call, decayed: Tensor, scores: Tensor, rows: Tensor, states: Tensor, out: Tensor, *, turned: bool) -> None:
    """Fill `out` with the gradient of a, or turned of b."""
    p = call.p
    use = p.launches["other gradient"]
    use(
        other_gradient_kernel, (call.key, turned), p.columns("other gradient") * p.HV * p.chunks, decayed, scores, rows, states, out, *call.bounds[:2],
        p.length, p.per_row, rows.stride(1), p.H, p.HV, p.group, p.K, p.V, p.BK, use.block, turned, p.packed, p.wide,
    )  # fmt: skip


def channel_gradient(
    call: Call,
    sides: tuple[Tensor, Tensor, Tensor, Tensor],
    sums: Tensor,
    states: Tensor,
    d_states: Tensor,
    out: tuple[Tensor | None, Tensor, Tensor],
) -> None:
    """Fill `out`, the gradients of x, y and g, for the sides x, y, a, b."""
    p = call.p
    use = p.launches["channel gradient"]
    x, y, a, b = sides
    use(
        channel_gradient_kernel, call.key, -(-p.K // use.block) * p.H * p.chunks, x, y, call.g, sums, a, b, states, d_states, *out, *call.bounds[:2],
        p.length, p.per_row, call.scale, *(t.stride(1) for t in sides), p.H, p.HV, p.group, p.K, p.V, use.block, use.block, p.packed, p.wide,
        use.stages,
    )  # fmt: skip


def _plan(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, chunk_table: Tensor | None) -> Plan:
    return plan_of(q, v.shape[3], v.shape[2], cu_seqlens, chunk_table)


def segments_alone(p: Plan, like: Tensor) -> tuple[Tensor, Tensor]:
    """All that is kept: with segments, the memories that enter them."""
    return entering_segments(p, like), torch.empty(0, device=like.device)


_ROW = Recurrence("gated_linear_attention", "key", plan=_plan, kept=segments_alone, forward=_forward, backward=_backward)


def gated_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, initial_state: Tensor | None, packing: Packing | None
) -> tuple[Tensor, Tensor]:
    """See `gdn.ops.gated_linear_attention`."""
    return _ROW(q, k, v, g, None, scale, initial_state, packing)
