"""Short depthwise causal convolution."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from gdn.core.packing import Packing
from gdn.nn.cache import take
from gdn.ops import causal_conv1d, causal_conv1d_step, convolved_qkv


class ShortConv(nn.Module):
    """One causal filter of `size` taps per channel: `y_t = act(bias + sum_j weight[:, -1 - j] x_{t-j})`, x `[B, T, channels]`.

    Filters and biases start as PyTorch's Conv1d does (uniform within `1 / sqrt(size)`), as in the official Gated DeltaNet.
    """

    def __init__(self, channels: int, size: int = 4, activation: Literal["silu"] | None = None, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, size))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None
        self.activation = activation
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = 1 / math.sqrt(self.weight.shape[1])
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(
        self, x: Tensor, *, state: Tensor | None = None, packing: Packing | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns the output and the last `size - 1` inputs of each sequence, `[N, size - 1, channels]`. `mask` is False at padding on the
        left `[B, T]`, where x is zero: the state stands before the first token that is none, and the output at padding is zero too."""
        weight = self.weight.to(x.dtype)
        if state is None or mask is None:
            return causal_conv1d(x, weight, bias=self.bias, activation=self.activation, initial_state=state, packing=packing)
        row = behind_padding(state.to(x.dtype), x, mask)
        y, after = causal_conv1d(row, weight, bias=self.bias, activation=self.activation)
        return y[:, state.shape[1] :].masked_fill(~mask.unsqueeze(-1), 0), after

    def qkv(self, x: Tensor, heads: int, head_dim: int, packing: Packing | None) -> tuple[Tensor, Tensor, Tensor]:
        """Whole sequences of queries, keys and values side by side: what `convolved_qkv` returns. Needs "silu" and no bias."""
        assert self.activation == "silu" and self.bias is None
        return convolved_qkv(x, self.weight.to(x.dtype), heads=heads, head_dim=head_dim, packing=packing)

    def step(self, x: Tensor, state: Tensor, mask: Tensor | None = None) -> Tensor:
        """Some more tokens `[B, T, channels]` of each sequence; `state` is updated in place. `mask` as in `forward`."""
        if mask is not None:
            y, after = self(x, state=state, mask=mask)
            state.copy_(after)
            return y
        return causal_conv1d_step(x, self.weight.to(x.dtype), state, bias=self.bias, activation=self.activation)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, size={self.weight.shape[1]}, activation={self.activation}"


def behind_padding(state: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    """The state `[B, R, D]` and then x `[B, T, D]` in one row `[B, R + T, D]`, what is before the first token of x moved to the right of
    the padding; zeros come before."""
    row, pads = torch.cat([state, x], dim=1), (~mask).sum(1, keepdim=True)
    at = torch.arange(row.shape[1], device=x.device)
    source = torch.where(at >= state.shape[1] + pads, at, at - pads)
    return take(row, source.clamp(min=0)).masked_fill((source < 0).unsqueeze(-1), 0)
