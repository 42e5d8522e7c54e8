"""The gates in plain torch, any device: two or three elementwise passes over `[B, T, HV]`, small beside everything around them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from gdn.core.checks import accumulate_dtype

LINEAR = 40.0
"""softplus(z) = z above this: the difference e^-40 is below the last bit in float64 (torch's default of 20 is not)."""


def decay_gate(a: Tensor, A_log: Tensor, dt_bias: Tensor) -> Tensor:
    """See `gdn.ops.decay_gate`."""
    return F.softplus(a.to(accumulate_dtype(a.dtype)) + dt_bias, threshold=LINEAR) * -torch.exp(A_log)


def write_gate(b: Tensor, top: float) -> Tensor:
    """See `gdn.ops.write_gate`."""
    beta = torch.sigmoid(b.to(accumulate_dtype(b.dtype)))
    return beta if top == 1 else beta * top
