"""The definition of the steps: one sequence, one head, one token at a time, any floating dtype. Runs anywhere, slowly."""

from __future__ import annotations

import torch
from torch import Tensor

from gdn.core.checks import accumulate_dtype


def linear_attention_step(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor, scale: float, slots: Tensor | None) -> Tensor:
    """See `gdn.ops.linear_attention_step`."""
    return _steps(q, k, v, g[..., None, None], state, scale, slots)


def gated_linear_attention_step(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor, scale: float, slots: Tensor | None) -> Tensor:
    """See `gdn.ops.gated_linear_attention_step`."""
    g = g.repeat_interleave(v.shape[2] // k.shape[2], dim=2)
    return _steps(q, k, v, g.unsqueeze(-1), state, scale, slots)


def value_gated_linear_attention_step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor, scale: float, slots: Tensor | None
) -> Tensor:
    """See `gdn.ops.value_gated_linear_attention_step`."""
    return _steps(q, k, v, g.unsqueeze(-2), state, scale, slots)


def _steps(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor, scale: float, slots: Tensor | None) -> Tensor:
    """All three: g `[B, T, HV, 1 or K, 1 or V]`."""
    batch, length, value_heads, _ = v.shape
    wide = accumulate_dtype(v.dtype)
    group = value_heads // k.shape[2]
    o = torch.zeros_like(v)
    for b, row in enumerate(range(batch) if slots is None else slots.tolist()):
        for h in range(value_heads if row >= 0 else 0):
            memory = state[row, h].to(wide)
            for t in range(length):
                query, key, value = q[b, t, h // group].to(wide), k[b, t, h // group].to(wide), v[b, t, h].to(wide)
                memory = g[b, t, h].to(wide).exp() * memory + key[:, None] * value
                o[b, t, h] = scale * (query[:, None] * memory).sum(0)
            state[row, h] = memory
    return o
