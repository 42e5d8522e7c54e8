"""The definition of the short causal convolution: one token at a time, any floating dtype, gradients by autograd. Runs anywhere, slowly."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from gdn.core.checks import accumulate_dtype
from gdn.core.packing import Packing


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    packing: Packing | None,
) -> tuple[Tensor, Tensor]:
    """See `gdn.ops.causal_conv1d`."""
    batch, length, channels = x.shape
    bounds = [i * length for i in range(batch + 1)] if packing is None else packing.host.tolist()
    flat = x.reshape(batch * length, channels)
    zero = x.new_zeros(weight.shape[1] - 1, channels)
    outputs, states = [flat[:0]], []
    for i in range(len(bounds) - 1):
        state = zero if initial_state is None else initial_state[i]
        y, state = _document(flat[bounds[i] : bounds[i + 1]], weight, bias, activation, state)
        outputs.append(y)
        states.append(state)
    return torch.cat(outputs).reshape(x.shape), torch.stack(states) if states else zero.new_zeros(0, *zero.shape)


def _document(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """One document: x `[T, D]`, state `[W - 1, D]`."""
    wide, outputs = accumulate_dtype(x.dtype), [x[:0]]
    for t in range(x.shape[0]):
        window = torch.cat([state.to(x.dtype), x[t : t + 1]])
        y = (window.to(wide) * weight.to(wide).T).sum(0)
        y = y if bias is None else y + bias.to(wide)
        y = F.silu(y) if activation == "silu" else y
        outputs.append(y.to(x.dtype)[None])
        state = window[1:]
    return torch.cat(outputs), state.to(x.dtype)


def causal_conv1d_step(
    x: Tensor, weight: Tensor, state: Tensor, bias: Tensor | None, activation: str | None, slots: Tensor | None
) -> Tensor:
    """See `gdn.ops.causal_conv1d_step`."""
    rows = range(x.shape[0]) if slots is None else slots.tolist()
    y = torch.zeros_like(x)
    for b, row in enumerate(rows):
        if row >= 0:
            y[b], after = _document(x[b], weight, bias, activation, state[row])
            state[row] = after
    return y
