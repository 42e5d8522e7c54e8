"""Named shapes of the rotary embedding, for tests and the doctor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from gdn.core.checks import accumulate_dtype


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Sizes of one call."""

    name: str
    B: int = 2
    T: int
    H: int
    K: int
    N: int
    each: bool = False
    """Every sequence has angles of its own."""

    def build(self, *, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu", seed: int = 0) -> dict[str, Any]:
        """Arguments of `rotary_embedding`, the same numbers for every dtype and device up to rounding. x is a slice of wider rows."""
        generator = torch.Generator().manual_seed(seed)
        heads = torch.randn(self.B, self.T, self.H + 1, self.K, generator=generator, dtype=torch.float64)
        shape = (self.B, self.T, self.N) if self.each else (self.T, self.N)
        angles = 6 * torch.rand(shape, generator=generator, dtype=torch.float64)
        wide = accumulate_dtype(dtype)
        x = heads.to(device, dtype)[:, :, 1:].requires_grad_()
        return {"x": x, "cos": angles.cos().to(device, wide), "sin": angles.sin().to(device, wide)}


PROBLEMS = (
    Problem(name="some", T=13, H=3, K=8, N=4),
    Problem(name="a part, odd, of each sequence", T=5, H=2, K=11, N=3, each=True),
    Problem(name="one", B=1, T=1, H=1, K=2, N=1),
    Problem(name="none", T=0, H=2, K=4, N=2),
    Problem(name="several programs", T=70, H=3, K=40, N=20),
)
