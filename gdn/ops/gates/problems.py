"""Named shapes of the gates, for tests, the doctor and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Sizes of one call."""

    name: str
    B: int = 1
    T: int
    HV: int

    def build_decay(self, *, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu", seed: int = 0) -> dict[str, Any]:
        """Arguments of `decay_gate`, the same numbers for every dtype and device up to rounding; parameters are float32 or float64."""
        generator = torch.Generator().manual_seed(seed)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        a = torch.randn(self.B, self.T, self.HV, generator=generator, dtype=torch.float64)
        rate = 16 * torch.rand(self.HV, generator=generator, dtype=torch.float64)
        bias = torch.randn(self.HV, generator=generator, dtype=torch.float64) - 4
        return {"a": a.to(device, dtype), "A_log": rate.log().to(device, wide), "dt_bias": bias.to(device, wide)}

    def build_write(self, *, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu", seed: int = 0) -> dict[str, Any]:
        """Arguments of `write_gate`."""
        generator = torch.Generator().manual_seed(seed)
        b = torch.randn(self.B, self.T, self.HV, generator=generator, dtype=torch.float64)
        return {"b": b.to(device, dtype), "top": 2.0}


PROBLEMS = (
    Problem(name="some", B=2, T=13, HV=3),
    Problem(name="one", T=1, HV=1),
    Problem(name="none", T=0, HV=4),
)

BENCHMARKS = (Problem(name="1.3B layer", T=2048, HV=32),)
