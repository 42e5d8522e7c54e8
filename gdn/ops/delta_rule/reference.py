"""The definition of the gated delta rule: one token at a time, any floating dtype, gradients by autograd. Runs anywhere, slowly.

Sums and states are float32, or float64 for float64 inputs: the truth that every other implementation is measured against.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gdn.core.checks import accumulate_dtype
from gdn.core.packing import Packing


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
    dtype, wide = v.dtype, accumulate_dtype(v.dtype)
    batch, length, heads, width = k.shape
    groups = v.shape[2] // heads
    q, k = (x.to(wide).repeat_interleave(groups, dim=2) for x in (q, k))
    v, decay, beta = v.to(wide), g.to(wide).exp(), beta.to(wide)
    if packing is None:
        bounds = range(0, batch * length + 1, length) if length else [0] * (batch + 1)
    else:
        bounds = packing.host.tolist()
    flat = [x.reshape(batch * length, *x.shape[2:]) for x in (q, k, v, decay, beta)]
    zero = v.new_zeros(v.shape[2], width, v.shape[3])
    outputs, states = [], []
    for i in range(len(bounds) - 1):
        state = zero if initial_state is None else initial_state[i]
        queries, keys, values, decays, strengths = (x[bounds[i] : bounds[i + 1]] for x in flat)
        o, state = _document(queries, keys, values, decays, strengths, scale, state)
        outputs.append(o)
        states.append(state)
    if not states:
        return torch.zeros_like(v, dtype=dtype), zero.new_empty(0, *zero.shape)
    return torch.cat(outputs).reshape(v.shape).to(dtype), torch.stack(states)


def _document(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, scale: float, state: Tensor) -> tuple[Tensor, Tensor]:
    """One document: q, k `[T, HV, K]`, v `[T, HV, V]`, decay, beta `[T, HV]`, state `[HV, K, V]`."""
    outputs = []
    for t in range(q.shape[0]):
        state = state * decay[t, :, None, None]
        recalled = torch.einsum("hk,hkv->hv", k[t], state)
        error = beta[t, :, None] * (v[t] - recalled)
        state = state + torch.einsum("hk,hv->hkv", k[t], error)
        outputs.append(scale * torch.einsum("hk,hkv->hv", q[t], state))
    return (torch.stack(outputs) if outputs else torch.zeros_like(v)), state
