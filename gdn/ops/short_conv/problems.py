"""Named shapes of the short convolution, for tests, the doctor and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from gdn.core.packing import Packing


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Sizes and options of one call of `causal_conv1d`."""

    name: str
    B: int = 1
    T: int
    D: int
    W: int = 4
    bias: bool = False
    silu: bool = True
    state: bool = False
    lengths: tuple[int, ...] | None = None
    """Documents of a packed batch."""

    def build(self, *, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu", seed: int = 0) -> dict[str, Any]:
        """Arguments of `causal_conv1d`, the same numbers for every dtype and device up to rounding."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

        documents = self.B if self.lengths is None else len(self.lengths)
        return {
            "x": normal(self.B, self.T, self.D),
            "weight": normal(self.D, self.W),
            "bias": normal(self.D) if self.bias else None,
            "activation": "silu" if self.silu else None,
            "initial_state": normal(documents, self.W - 1, self.D) if self.state else None,
            "packing": None if self.lengths is None else Packing.from_lengths(self.lengths, device=device),
        }


PROBLEMS = (
    Problem(name="plain", B=2, T=37, D=24),
    Problem(name="linear with bias and state", B=3, T=20, D=5, bias=True, silu=False, state=True),
    Problem(name="one token", B=2, T=1, D=16, state=True),
    Problem(name="no token", B=2, T=0, D=8, state=True),
    Problem(name="no sequence", B=0, T=4, D=8),
    Problem(name="one tap", B=2, T=6, D=8, W=1, bias=True, state=True),
    Problem(name="more taps than tokens", B=2, T=3, D=8, W=7, state=True),
    Problem(name="packed", T=20, D=12, lengths=(5, 0, 1, 2, 9, 0, 3)),
    Problem(name="packed with state", T=20, D=12, bias=True, state=True, lengths=(5, 0, 1, 2, 9, 0, 3)),
    Problem(name="packed rows", B=2, T=10, D=12, silu=False, state=True, lengths=(4, 6, 10)),
    Problem(name="only empty documents", T=0, D=4, state=True, lengths=(0, 0)),
    Problem(name="long", T=300, D=130, bias=True),
)

BENCHMARKS = (
    Problem(name="0.4B layer", B=4, T=512, D=1024),
    Problem(name="1.3B layer", T=2048, D=6144),
    Problem(name="1.3B layer, 8 documents", T=2048, D=6144, lengths=(256,) * 8),
)
