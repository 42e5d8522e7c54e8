"""Sums of log decays, one number a token: their exponentials for all pairs of tokens of a chunk, and the way back to each log decay."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SMALLEST_LOG_DECAY = -64.0
"""Per-token log decay below this acts as this: exp(-64) = 1.6e-28 is zero to every dtype, and sums of g keep their precision."""


def smallest_decay(dtype: torch.dtype) -> float:
    """A decay over several tokens below this counts as zero: 4e-29 in float32, 1e-231 in float64.

    Smaller ones would make denormal numbers of what they are multiplied by, gradients above all, and each product with a denormal number
    takes an Intel processor some hundred cycles (delta_rule/README.md). A quarter of the exponents is left for the other factors.
    """
    return torch.finfo(dtype).tiny ** 0.75


def decays(log: Tensor, out: Tensor) -> Tensor:
    """The decays of sums of g, computed in the dtype of these."""
    return torch.threshold_(torch.exp(log, out=out), smallest_decay(out.dtype), 0)


def pair_decay(total: Tensor, out: Tensor) -> Tensor:
    """exp(G_i - G_j) for i >= j, else 0, of the running sums G `[M, C]` in float64.

    The sums are taken apart into two numbers of the dtype of `out`: after a token with g = -64 a single float32 would lose the decays that
    follow it (a chunk of such tokens reaches -2048, where neighbours are 1.2e-4 apart).
    """
    high = total.to(out.dtype)
    torch.sub(high.unsqueeze(-1), high.unsqueeze(-2), out=out)
    if out.dtype != total.dtype:
        low = (total - high).to(out.dtype)
        out.add_(low.unsqueeze(-1)).sub_(low.unsqueeze(-2))
    # Above the diagonal the differences are positive. The exponential is several times slower where its result is denormal or zero, so what
    # will be zero stays just above that.
    smallest = math.log(smallest_decay(out.dtype)) - 1
    return decays(out.clamp_(smallest, 0), out).tril_()


def log_decay_gradient(between: Tensor, into: Tensor, onward: Tensor, through: Tensor, buffer: Tensor) -> Tensor:
    """The gradient of g `[M, C]` from what passes over each token.

    g_t scales what goes from token j < t to token i >= t (`between[i, j]`), from the state before the chunk to i >= t (`into`), from
    j < t to the state after the chunk (`onward`), and from state to state (`through`). Summed as it stands, without differences of
    large sums, so that it is exact under strong decay too.
    """
    later = torch.ones_like(between[0]).triu_().expand_as(between)
    crossing = torch.bmm(later, between, out=buffer).tril_(-1).sum(-1)
    crossing[:, 1:] += onward[:, :-1].cumsum(-1)
    return crossing.add_(into.flip(-1).cumsum(-1).flip(-1)).add_(through)
