"""The definitions of the gates, any floating dtype, gradients by autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from gdn.core.checks import accumulate_dtype


def decay_gate(a: Tensor, A_log: Tensor, dt_bias: Tensor) -> Tensor:
    """See `gdn.ops.decay_gate`. `log(1 + exp(z))` is written so that exp cannot overflow."""
    z = a.to(accumulate_dtype(a.dtype)) + dt_bias
    return -torch.exp(A_log) * torch.logaddexp(z, torch.zeros_like(z))


def write_gate(b: Tensor, top: float) -> Tensor:
    """See `gdn.ops.write_gate`."""
    return top * torch.sigmoid(b.to(accumulate_dtype(b.dtype)))
