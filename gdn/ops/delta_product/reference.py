"""The definition of several writes a token, token by token, any floating dtype, gradients by autograd. Runs anywhere, slowly.

Sums and states are float32, or float64 for float64 inputs: the truth that every other implementation is measured against.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gdn.core.checks import accumulate_dtype
from gdn.core.packing import Packing


def gated_delta_product(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float,
    initial_state: Tensor | None,
    packing: Packing | None,
) -> tuple[Tensor, Tensor]:
    """See `gdn.ops.gated_delta_product`."""
    batch, length = q.shape[:2]
    bounds = [i * length for i in range(batch + 1)] if packing is None else packing.host.tolist()
    flat = [x.flatten(0, 1) for x in (q, k, v, g, beta)]
    shape = (v.shape[3], k.shape[4], v.shape[4])
    zero = v.new_zeros(shape, dtype=accumulate_dtype(v.dtype))
    outputs, states = [v.new_empty(0, *v.shape[3:])], []
    for i in range(len(bounds) - 1):
        state = zero if initial_state is None else initial_state[i]
        o, state = _document([x[bounds[i] : bounds[i + 1]] for x in flat], state, scale)
        outputs.append(o)
        states.append(state)
    final = torch.stack(states) if states else zero.new_empty(0, *shape)
    return torch.cat(outputs).reshape(batch, length, *v.shape[3:]), final


def gated_delta_product_step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, scale: float, slots: Tensor | None
) -> Tensor:
    """See `gdn.ops.gated_delta_product_step`."""
    o = v.new_zeros(*v.shape[:2], *v.shape[3:])
    for b, row in enumerate(range(q.shape[0]) if slots is None else slots.tolist()):
        if row >= 0:
            o[b], state[row] = _document([x[b] for x in (q, k, v, g, beta)], state[row].to(accumulate_dtype(v.dtype)), scale)
    return o


def _document(tokens: list[Tensor], state: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """One document: q `[T, H, K]`, k `[T, n, H, K]`, v `[T, n, HV, V]`, g `[T, HV]`, beta `[T, n, HV]`, state `[HV, K, V]`."""
    wide, dtype = state.dtype, tokens[2].dtype
    q, k, v, g, beta = (x.to(wide) for x in tokens)
    groups = v.shape[2] // q.shape[1]
    q, k = q.repeat_interleave(groups, dim=1), k.repeat_interleave(groups, dim=2)
    outputs = []
    for t in range(q.shape[0]):
        state = g[t].exp()[:, None, None] * state
        for j in range(k.shape[1]):
            recalled = torch.einsum("hk,hkv->hv", k[t, j], state)
            error = beta[t, j, :, None] * (v[t, j] - recalled)
            state = state + torch.einsum("hk,hv->hkv", k[t, j], error)
        outputs.append(scale * torch.einsum("hk,hkv->hv", q[t], state))
    return (torch.stack(outputs) if outputs else v.new_empty(0, *v.shape[2:])).to(dtype), state
