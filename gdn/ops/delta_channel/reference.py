"""The definition of the delta rule with channel decays, token by token, any floating dtype, gradients by autograd. Runs anywhere, slowly.

Sums and states are float32, or float64 for float64 inputs: the truth that every other implementation is measured against.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gdn.core.checks import accumulate_dtype
from gdn.core.packing import Packing


def channel_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float,
    initial_state: Tensor | None,
    packing: Packing | None,
) -> tuple[Tensor, Tensor]:
    """See `gdn.ops.channel_delta_rule`."""
    batch, length = q.shape[:2]
    bounds = [i * length for i in range(batch + 1)] if packing is None else packing.host.tolist()
    flat = [x.flatten(0, 1) for x in (q, k, v, g, beta)]
    zero = v.new_zeros(v.shape[2], k.shape[3], v.shape[3], dtype=accumulate_dtype(v.dtype))
    outputs, states = [], []
    for i in range(len(bounds) - 1):
        state = zero if initial_state is None else initial_state[i]
        o, state = _document([x[bounds[i] : bounds[i + 1]] for x in flat], state, scale)
        outputs.append(o)
        states.append(state)
    if not states:
        return torch.zeros_like(v), zero.new_empty(0, *zero.shape)
    return torch.cat(outputs).reshape(v.shape), torch.stack(states)


def channel_delta_step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, scale: float, slots: Tensor | None
) -> Tensor:
    """See `gdn.ops.channel_delta_step`."""
    o = v.new_zeros(v.shape)
    for b, row in enumerate(range(q.shape[0]) if slots is None else slots.tolist()):
        if row >= 0:
            o[b], state[row] = _document([x[b] for x in (q, k, v, g, beta)], state[row].to(accumulate_dtype(v.dtype)), scale)
    return o


def _document(tokens: list[Tensor], state: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """One document: q, k `[T, H, K]`, v `[T, HV, V]`, g `[T, HV, K]`, beta `[T, HV]`, state `[HV, K, V]`."""
    wide, dtype = state.dtype, tokens[2].dtype
    q, k, v, g, beta = (x.to(wide) for x in tokens)
    q, k = (x.repeat_interleave(v.shape[1] // q.shape[1], dim=1) for x in (q, k))
    outputs = []
    for t in range(q.shape[0]):
        state = g[t].exp().unsqueeze(-1) * state
        recalled = torch.einsum("hk,hkv->hv", k[t], state)
        error = beta[t].unsqueeze(-1) * (v[t] - recalled)
        state = state + torch.einsum("hk,hv->hkv", k[t], error)
        outputs.append(scale * torch.einsum("hk,hkv->hv", q[t], state))
    return (torch.stack(outputs) if outputs else torch.zeros_like(v)).to(dtype), state
