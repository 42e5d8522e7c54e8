"""Rotary position embedding (RoFormer, arXiv 2104.09864)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from gdn.core.checks import accumulate_dtype
from gdn.core.errors import ConfigError
from gdn.ops import rotary_embedding


class Rotary(nn.Module):
    """Turns pairs of channels of queries and keys by an angle proportional to the position, so that scores depend on distances only.

    Channel i is paired with channel `i + n / 2` of the first `n = fraction * head_dim` channels (halves, not neighbours, as in LLaMA);
    pair i turns by `position * base ** (-2 i / n)`. The other channels stay. It has no parameters.

    Angles are taken in float64 and brought into one turn before the sine, so that a token a million places away is as exact as the first.
    """

    def __init__(self, head_dim: int, base: float = 10000.0, fraction: float = 1.0) -> None:
        super().__init__()
        if base <= 0:
            raise ConfigError(f"rope_base: expected above 0, got {base}")
        self.channels = rotated_channels(head_dim, fraction)
        self.base = base

    def forward(self, positions: Tensor, *heads: Tensor) -> tuple[Tensor, ...]:
        """
        Args:
            positions: integers `[T]` or `[B, T]`.
            heads: tensors `[B, T, H, K]`, each with its own number of heads.

        Returns:
            The tensors turned, each in its own dtype.
        """
        if not self.channels:
            return heads
        steps = torch.arange(0, self.channels, 2, device=positions.device, dtype=torch.float64) / self.channels
        angles = (positions.double().unsqueeze(-1) * self.base**-steps).remainder(2 * math.pi)
        tables: dict[torch.dtype, tuple[Tensor, Tensor]] = {}
        turned = []
        for x in heads:
            wide = accumulate_dtype(x.dtype)
            if wide not in tables:
                tables[wide] = angles.to(wide).cos(), angles.to(wide).sin()
            turned.append(rotary_embedding(x, *tables[wide]))
        return tuple(turned)

    def extra_repr(self) -> str:
        return f"channels={self.channels}, base={self.base}"


def rotated_channels(head_dim: int, fraction: float) -> int:
    """How many channels of a head are turned; raises `ConfigError` unless that is an even number."""
    channels = round(head_dim * fraction)
    if not 0 <= fraction <= 1 or channels != head_dim * fraction or channels % 2:
        raise ConfigError(f"rope_fraction: expected an even part of head_dim={head_dim} between 0 and 1, got {fraction}")
    return channels
