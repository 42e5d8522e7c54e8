"""Named shapes of the core, for tests, the doctor and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from gdn.core.packing import Packing
from gdn.ops.delta_fused import GateParameters


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Sizes and options of one call of `delta_core`."""

    name: str
    B: int = 1
    T: int
    H: int
    HV: int
    K: int
    V: int
    top: float = 1.0
    state: bool = False
    lengths: tuple[int, ...] | None = None
    """Documents of a packed batch."""
    padding: int = 0
    """Tokens at the left that are padding: q, k and v zero, a and b minus infinity."""

    def build(self, *, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu", seed: int = 0) -> dict[str, Any]:
        """Arguments of `delta_core`, the same numbers for every dtype and device up to rounding."""
        generator = torch.Generator().manual_seed(seed)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        padded = torch.arange(self.T) < self.padding

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        def tokens(*shape: int, fill: float = 0.0) -> torch.Tensor:
            values = normal(self.B, self.T, *shape)
            return values.masked_fill(padded.reshape(-1, *[1] * len(shape)), fill).to(device, dtype)

        documents = self.B if self.lengths is None else len(self.lengths)
        return {
            "q": tokens(self.H, self.K),
            "k": tokens(self.H, self.K),
            "v": tokens(self.HV, self.V),
            "a": tokens(self.HV, fill=float("-inf")),
            "b": tokens(self.HV, fill=float("-inf")),
            "gates": GateParameters(normal(self.HV).to(device, wide), (normal(self.HV) - 2).to(device, wide), self.top),
            "initial_state": normal(documents, self.HV, self.K, self.V).to(device, wide) if self.state else None,
            "packing": None if self.lengths is None else Packing.from_lengths(self.lengths, device=device),
        }


PROBLEMS = (
    Problem(name="plain", B=2, T=70, H=2, HV=2, K=16, V=24),
    Problem(name="grouped values, negative eigenvalues, state", B=2, T=33, H=2, HV=4, K=8, V=12, top=2.0, state=True),
    Problem(name="packed", T=80, H=1, HV=2, K=8, V=8, state=True, lengths=(1, 0, 66, 13)),
    Problem(name="padded", B=2, T=20, H=1, HV=2, K=8, V=8, state=True, padding=7),
    Problem(name="one token", B=2, T=1, H=1, HV=1, K=4, V=4),
)

BENCHMARKS = (
    Problem(name="0.4B layer", B=4, T=512, H=6, HV=6, K=128, V=256),
    Problem(name="1.3B layer", T=2048, H=16, HV=32, K=128, V=128),
)
