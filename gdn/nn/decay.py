"""How the parameters of a decay gate (`gdn.ops.decay_gate`) begin, and the gate without any."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gdn.core.checks import accumulate_dtype
from gdn.ops import decay_gate


@torch.no_grad()
def draw_rate(A_log: Tensor, low: float, high: float) -> None:
    """`exp(A_log)` uniformly from a range."""
    A_log.copy_(torch.empty_like(A_log).uniform_(low, high).clamp_(min=1e-4).log())  # log 0 would freeze the head for ever


@torch.no_grad()
def draw_time_step(dt_bias: Tensor, low: float, high: float) -> None:
    """`softplus(dt_bias)` log-uniformly from a range, at least 1e-4."""
    dt = torch.empty_like(dt_bias).uniform_(math.log(low), math.log(high)).exp().clamp_(min=1e-4)
    dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))


def log_sigmoid(x: Tensor, over: float = 1.0) -> Tensor:
    """`log(sigmoid(x)) / over` of x `[B, T, channels]`, float32 (float64 with float64 x): one pass each way on a GPU."""
    A_log = x.new_full((x.shape[2],), -math.log(over), dtype=accumulate_dtype(x.dtype))
    return decay_gate(-x, A_log, torch.zeros_like(A_log))
