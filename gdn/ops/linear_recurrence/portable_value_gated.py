"""Linear attention with a decay for each channel of the values in Triton: forward and backward for any GPU from sm_80 on, or on the CPU under
`TRITON_INTERPRET=1`.

The sides of F in README.md change places: y are the values, b the keys, a the queries and x the gradient of o, so memories are turned, `V x K`, and
plans have the width of the values as K. o is dF/dx here, read from the memories that chunks meet, which are stored forward as well. Value heads that
share queries and keys have decays of their own, so nothing can be shared and queries and keys are repeated for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gdn.core.opaque import Arguments, Opaque, Tensors
from gdn.core.packing import Packing
from gdn.core.portable_rows import aligned, dense, token_rows
from gdn.ops.linear_recurrence.portable import enter_segments, walk_states
from gdn.ops.linear_recurrence.portable_channels import channel_read_kernel
from gdn.ops.linear_recurrence.portable_gated import channel_gradient, channels, exponent_sums, other_gradient
from gdn.ops.linear_recurrence.portable_plan import Plan, plan_of
from gdn.ops.sequences.portable import bounds_of


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
    """o, final state (turned, as the initial one is); saved: with segments, the memories that enter them."""
    p = plan_of(v, k.shape[3], v.shape[2], cu_seqlens, chunk_table)
    q, k, v, g = token_rows(q), token_rows(k), token_rows(v), aligned(g)
    o, final, entering = _buffers(p, v)
    if p.chunks == 0:
        return o, final.zero_() if initial_state is None else final.copy_(initial_state), entering
    initial_state = None if initial_state is None else aligned(initial_state)
    bounds = (cu_seqlens, chunk_table, chunk_offsets)
    key, sums = _key(p, q, k, v, g), exponent_sums(p, v)
    _, written, last, _ = channels(p, key, None, v, g, sums, bounds, scale)
    if p.S:
        enter_segments(p, key, written, k, None, last, initial_state, entering, bounds, scale, backward=False)
    states = torch.empty((p.chunks, p.HV, p.K, p.V), dtype=v.dtype, device=v.device)
    walk_states(p, key, written, k, None, last, states, initial_state, entering, final, bounds, scale, backward=False)
    use = p.launches["channel read"]
    use(
        channel_read_kernel, key, -(-p.K // use.block) * p.H * p.chunks, v, g, sums, q, k, states, o, *bounds[:2], p.length, p.per_row, scale,
        v.stride(1), q.stride(1), k.stride(1), p.H, p.K, p.V, use.block, use.block, p.packed, p.wide, use.stages,
    )  # fmt: skip
    return o, final, entering


def _backward(args: Arguments, saved: Tensors, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    q, k, v, g, initial_state, *rest, scale = args
    (entering,), (do, d_final) = saved, grads
    p = plan_of(v, k.shape[3], v.shape[2], rest[0], rest[1])
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
    key, sums = _key(p, q, k, v, g), exponent_sums(p, v)
    read, written, last, scores = channels(p, key, do, v, g, sums, bounds, scale)
    assert read is not None and scores is not None
    states, d_states = (torch.empty((p.chunks, p.HV, p.K, p.V), dtype=v.dtype, device=v.device) for _ in range(2))
    walk_states(p, key, written, k, None, last, states, initial_state, entering, None, bounds, scale, backward=False)
    leaving = entering
    if p.S:
        leaving = torch.empty_like(entering)
        enter_segments(p, key, read, q, None, last, d_final, leaving, bounds, scale, backward=True)
    walk_states(p, key, read, q, None, last, d_states, d_final, leaving, d_initial, bounds, scale, backward=True)
    dq, dk, dv, dg = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v, g))
    other_gradient(p, key, read, scores, k, states, dq, bounds, turned=False)
    other_gradient(p, key, written, scores, q, d_states, dk, bounds, turned=True)
    channel_gradient(p, key, (do, v, q, k), g, sums, states, d_states, (None, dv, dg), bounds, scale)
    return [dq, dk, dv, dg, d_initial]


def _key(p: Plan, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Any, ...]:
    """What the compiled kernels depend on, beside what each launch is. All pointers are multiples of 16 bytes."""
    return "value", p.code, q.dtype, g.dtype, q.stride(1), k.stride(1), v.stride(1)


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
    return _buffers(plan_of(v, k.shape[3], v.shape[2], cu_seqlens, chunk_table), v)


_OPAQUE = Opaque(
    "gdn::value_gated_linear_attention_portable",
    _forward,
    _backward,
    fake=_fake,
    results=2,
    differentiable=("q", "k", "v", "g", "initial_state"),
)


def value_gated_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, initial_state: Tensor | None, packing: Packing | None
) -> tuple[Tensor, Tensor]:
    """See `gdn.ops.value_gated_linear_attention`."""
    K, V, group = q.shape[3], v.shape[3], v.shape[2] // q.shape[2]
    more_k, more_v = -K % 8, -V % 8  # loads take eight elements at a time
    if group > 1:
        q, k = (x.repeat_interleave(group, dim=2) for x in (q, k))
    if more_k:
        q, k = F.pad(q, (0, more_k)), F.pad(k, (0, more_k))
    if more_v:
        v, g = F.pad(v, (0, more_v)), F.pad(g, (0, more_v))
    if initial_state is not None:
        initial_state = F.pad(initial_state, (0, more_v, 0, more_k)).transpose(2, 3)
    o, final = _OPAQUE(q, k, v, g, initial_state, *bounds_of(packing), scale)
    return o[..., :V], final.transpose(2, 3)[..., :K, :V].contiguous()
