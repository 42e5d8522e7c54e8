"""Named shapes of the norms, for tests, the doctor and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A shape `[..., D]`, and the size of its numbers."""

    name: str
    shape: tuple[int, ...]
    size: float = 1.0
    zero_rows: bool = False
    """Every third vector is zero."""

    def build(self, *, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu", seed: int = 0) -> dict[str, Any]:
        """Arguments of `gated_rms_norm` (take x and weight for the others), the same numbers for every dtype and device up to rounding."""
        generator = torch.Generator().manual_seed(seed)
        x, gate = (torch.randn(self.shape, generator=generator, dtype=torch.float64) for _ in range(2))
        weight = torch.randn(self.shape[-1], generator=generator, dtype=torch.float64)
        if self.zero_rows:
            x.view(-1, self.shape[-1])[::3] = 0
        return {"x": (self.size * x).to(device, dtype), "gate": gate.to(device, dtype), "weight": weight.to(device, dtype)}

    def build_add(self, *, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu", seed: int = 0) -> dict[str, Any]:
        """Arguments of `add_rms_norm`, likewise."""
        built = self.build(seed=seed)
        residual = self.size * built["gate"]
        if self.zero_rows:
            residual.view(-1, self.shape[-1])[::3] = 0
        return {name: t.to(device, dtype) for name, t in (("x", built["x"]), ("residual", residual), ("weight", built["weight"]))}


PROBLEMS = (
    Problem(name="heads", shape=(2, 17, 3, 40)),
    Problem(name="one vector", shape=(24,)),
    Problem(name="three channels", shape=(5, 3)),
    Problem(name="no vector", shape=(2, 0, 8)),
    Problem(name="zero vectors", shape=(10, 16), zero_rows=True),
    Problem(name="small numbers", shape=(10, 16), size=1e-4),
    Problem(name="large numbers", shape=(10, 16), size=1e4),
    Problem(name="wide", shape=(3, 1025)),
)

BENCHMARKS = (
    Problem(name="heads of 128", shape=(1, 2048, 16, 128)),
    Problem(name="heads of 256", shape=(1, 2048, 16, 256)),
    Problem(name="residual stream", shape=(1, 2048, 2048)),
)
