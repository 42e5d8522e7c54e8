"""Named problems of the delta rule with channel decays, for tests and benchmarks: those of the gated delta rule, with a decay a channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from gdn.core.checks import accumulate_dtype
from gdn.ops.delta_rule import problems as rule


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Sizes and character of a call of `channel_delta_rule`."""

    rule: rule.Problem
    """`decay` is that of the strongest channel; from channel to channel it grows from a hundredth of that. `clear_every` clears every
    other channel."""

    @property
    def name(self) -> str:
        return self.rule.name

    def build(self, *, seed: int = 0, dtype: torch.dtype = torch.float64, device: str = "cpu", gradient: bool = True) -> dict[str, Any]:
        """Fresh arguments of the contract, see `gdn.ops.delta_rule.problems`."""
        arguments = self.rule.build(seed=seed, dtype=dtype, device=device, gradient=gradient)
        generator = torch.Generator().manual_seed(seed + 1)
        shape = (self.rule.B, self.rule.T, self.rule.HV, self.rule.K)
        strength = self.rule.decay * torch.logspace(-2, 0, self.rule.K, dtype=torch.float64)
        g = -strength * torch.randn(*shape, generator=generator, dtype=torch.float64).abs()
        if self.rule.clear_every:
            g[:, self.rule.clear_every - 1 :: self.rule.clear_every, :, ::2] = -torch.inf
        return arguments | {"g": g.bfloat16().to(device, accumulate_dtype(dtype)).requires_grad_(gradient)}


_LEFT_OUT = ("chunk minus one", "batch of several chunks", "packed, no initial state", "cleared", "repeated keys at full strength")

SMALL = tuple(Problem(rule=problem) for problem in rule.SMALL if problem.name not in _LEFT_OUT)
"""What every implementation must get right, small enough for the recurrence with autograd."""

BENCHMARK = (Problem(rule=rule.LAYER.with_(name="1024 tokens", T=1024, H=8, HV=8)),)
"""One layer of about 1024 channels."""
