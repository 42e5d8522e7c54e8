"""Named shapes of the convolution of queries, keys and values, for tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from gdn.core.packing import Packing


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Sizes of one call of `convolved_qkv`; VD is the width of all values."""

    name: str
    B: int = 1
    T: int
    H: int
    K: int
    VD: int
    W: int = 4
    lengths: tuple[int, ...] | None = None
    """Documents of a packed batch."""

    def build(self, *, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu", seed: int = 0) -> dict[str, Any]:
        """Arguments of `convolved_qkv`, the same numbers for every dtype and device up to rounding."""
        generator = torch.Generator().manual_seed(seed)
        D = 2 * self.H * self.K + self.VD
        x, weight = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((self.B, self.T, D), (D, self.W)))
        packing = None if self.lengths is None else Packing.from_lengths(self.lengths, device=device)
        return {"x": x.to(device, dtype), "weight": weight.to(device, dtype), "heads": self.H, "head_dim": self.K, "packing": packing}


PROBLEMS = (
    Problem(name="plain", B=2, T=13, H=2, K=8, VD=24),
    Problem(name="packed", T=20, H=1, K=16, VD=8, lengths=(5, 0, 1, 2, 9, 0, 3)),
    Problem(name="packed rows", B=2, T=10, H=1, K=4, VD=12, lengths=(4, 6, 10)),
    Problem(name="three heads of twelve, few values", B=1, T=6, H=3, K=12, VD=5, W=3),
    Problem(name="one tap", B=2, T=5, H=1, K=4, VD=8, W=1),
    Problem(name="more taps than tokens", B=2, T=3, H=1, K=8, VD=8, W=7),
    Problem(name="no token", B=2, T=0, H=1, K=8, VD=8),
    Problem(name="several blocks and pieces", T=70, H=3, K=130, VD=1100),
)
