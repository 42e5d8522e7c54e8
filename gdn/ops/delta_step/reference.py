"""The definition of the step: one sequence, one head, one token at a time, any floating dtype. Runs anywhere, slowly."""

from __future__ import annotations

import torch
from torch import Tensor

from gdn.core.checks import accumulate_dtype


def gated_delta_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    scale: float,
    slots: Tensor | None,
) -> Tensor:
    """See `gdn.ops.gated_delta_step`."""
    batch, length, value_heads, _ = v.shape
    wide = accumulate_dtype(v.dtype)
    group = value_heads // k.shape[2]
    rows = range(batch) if slots is None else slots.tolist()
    o = torch.zeros_like(v)
    for b, row in enumerate(rows):
        for h in range(value_heads if row >= 0 else 0):
            memory = state[row, h].to(wide)
            for t in range(length):
                query, key = q[b, t, h // group].to(wide), k[b, t, h // group].to(wide)
                memory = memory * g[b, t, h].to(wide).exp()
                error = v[b, t, h].to(wide) - (key[:, None] * memory).sum(0)
                memory = memory + beta[b, t, h].to(wide) * key[:, None] * error
                o[b, t, h] = scale * (query[:, None] * memory).sum(0)
            state[row, h] = memory
    return o
