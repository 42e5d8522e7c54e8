"""The definition of linear attention with decay: one token at a time, any floating dtype, gradients by autograd. Runs anywhere, slowly.

Sums and states are float32, or float64 for float64 inputs: the truth that every other implementation is measured against.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gdn.core.checks import accumulate_dtype
from gdn.core.packing import Packing


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, initial_state: Tensor | None, packing: Packing | None
) -> tuple[Tensor, Tensor]:
    """See `gdn.ops.linear_attention`."""
    return _recurrence(q, k, v, g[..., None, None], scale, initial_state, packing)


def gated_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, initial_state: Tensor | None, packing: Packing | None
) -> tuple[Tensor, Tensor]:
    """See `gdn.ops.gated_linear_attention`."""
    g = g.repeat_interleave(v.shape[2] // k.shape[2], dim=2)
    return _recurrence(q, k, v, g.unsqueeze(-1), scale, initial_state, packing)


def value_gated_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, initial_state: Tensor | None, packing: Packing | None
) -> tuple[Tensor, Tensor]:
    """See `gdn.ops.value_gated_linear_attention`."""
    return _recurrence(q, k, v, g.unsqueeze(-2), scale, initial_state, packing)


def _recurrence(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, initial_state: Tensor | None, packing: Packing | None
) -> tuple[Tensor, Tensor]:
    """All three: g `[B, T, HV, 1 or K, 1 or V]`."""
    dtype, wide = v.dtype, accumulate_dtype(v.dtype)
    batch, length, heads, width = k.shape
    groups = v.shape[2] // heads
    q, k = (x.to(wide).repeat_interleave(groups, dim=2) for x in (q, k))
    v, decay = v.to(wide), g.to(wide).exp()
    if packing is None:
        bounds = range(0, batch * length + 1, length) if length else [0] * (batch + 1)
    else:
        bounds = packing.host.tolist()
    flat = [x.reshape(batch * length, *x.shape[2:]) for x in (q, k, v, decay)]
    zero = v.new_zeros(v.shape[2], width, v.shape[3])
    outputs, states = [], []
    for i in range(len(bounds) - 1):
        state = zero if initial_state is None else initial_state[i]
        queries, keys, values, decays = (x[bounds[i] : bounds[i + 1]] for x in flat)
        o, state = _document(queries, keys, values, decays, scale, state)
        outputs.append(o)
        states.append(state)
    if not states:
        return torch.zeros_like(v, dtype=dtype), zero.new_empty(0, *zero.shape)
    return torch.cat(outputs).reshape(v.shape).to(dtype), torch.stack(states)


def _document(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, scale: float, state: Tensor) -> tuple[Tensor, Tensor]:
    """One document: q, k `[T, HV, K]`, v `[T, HV, V]`, decay `[T, HV, 1 or K, 1 or V]`, state `[HV, K, V]`."""
    outputs = []
    for t in range(q.shape[0]):
        state = decay[t] * state + torch.einsum("hk,hv->hkv", k[t], v[t])
        outputs.append(scale * torch.einsum("hk,hkv->hv", q[t], state))
    return (torch.stack(outputs) if outputs else torch.zeros_like(v)), state
