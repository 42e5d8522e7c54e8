"""What the Triton rows of linear attention launch to find the memories that chunks meet, and their gradients (portable_states.py)."""

from __future__ import annotations

import torch
from torch import Tensor

from gdn.ops.linear_recurrence.portable_plan import Plan
from gdn.ops.linear_recurrence.portable_states import handover_kernel, states_kernel
from gdn.ops.sequences.portable_recurrence import Call


def enter_segments(
    call: Call, x: Tensor, y: Tensor, gates: Tensor | None, last: Tensor | None, edge: Tensor | None, entering: Tensor, *, backward: bool
) -> None:
    """Fill `entering`: the memory, or backwards its gradient, at the begin of each segment of the way."""
    p = call.p
    added, carried = torch.empty_like(entering), entering.new_empty((p.segments, p.HV, p.K))
    _states(call, x, y, gates, last, None, edge, None, None, added, carried, backward)
    use = p.launches["handover"]
    use(
        handover_kernel, (call.key, backward), -(-p.V // use.block) * p.HV, added, carried, entering, p.segments, p.HV, p.K, p.V, p.BK, use.block,
        backward,
    )  # fmt: skip


def walk_states(
    call: Call,
    x: Tensor,
    y: Tensor,
    gates: Tensor | None,
    last: Tensor | None,
    edge: Tensor | None,
    entering: Tensor,
    out: Tensor | None,
    *,
    backward: bool,
    turned: bool = False,
) -> Tensor:
    """What each chunk meets, `[chunks, HV, K, V]` in the dtype of y; fills `out`, perhaps turned, with what is left at the ends of documents."""
    p = call.p
    states = torch.empty((p.chunks, p.HV, p.K, p.V), dtype=y.dtype, device=y.device)
    _states(call, x, y, gates, last, states, edge, entering, out, None, None, backward, turned)
    return states


def walk_back(
    call: Call,
    x: Tensor,
    y: Tensor,
    gates: Tensor | None,
    last: Tensor | None,
    d_final: Tensor | None,
    entering: Tensor,
    d_initial: Tensor | None,
) -> Tensor:
    """The gradient of the memory after each chunk, from the last to the first; fills `d_initial`. `entering` has the shape of those at the begins of segments."""
    leaving = entering
    if call.p.S:
        leaving = torch.empty_like(entering)
        enter_segments(call, x, y, gates, last, d_final, leaving, backward=True)
    return walk_states(call, x, y, gates, last, d_final, leaving, d_initial, backward=True)


def entering_segments(p: Plan, like: Tensor) -> Tensor:
    """Room for the memories that enter segments."""
    return torch.empty((p.segments, p.HV, p.K, p.V), dtype=torch.float32, device=like.device)


def _states(
    call: Call,
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
    backward: bool,
    turned: bool = False,
) -> None:
    p = call.p
    use, summary = p.launches["states"], added is not None
    kind = (last is None, edge is None, out is None, backward, summary, turned)
    use(
        states_kernel, (call.key, kind), p.columns("states") * p.HV * (p.segments - 1 if summary else p.runs), x, y, gates, last, states, edge, entering,
        out, added, carried, *call.bounds, p.length, p.per_row, p.chunks, p.documents, p.S, call.scale, x.stride(1), y.stride(1), p.HV, p.group, p.K,
        p.V, p.BK, use.block, p.S > 0, p.packed, last is not None, backward, summary, turned, p.wide, use.stages,
    )  # fmt: skip
