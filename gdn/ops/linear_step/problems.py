"""Named shapes of the decoding steps, for tests, the doctor and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from gdn.ops.linear_recurrence.problems import Gates


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Sizes of one call of a step."""

    name: str
    B: int = 1
    T: int = 1
    H: int
    HV: int
    K: int
    V: int
    slots: tuple[int, ...] | None = None
    pool: int = 0
    """Rows of the state, with slots."""
    storage: torch.dtype | None = None
    """Dtype of the state; None for that of the sums."""

    def build(
        self, gates: Gates, *, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu", seed: int = 0
    ) -> dict[str, Any]:
        """Arguments of a step, rounded to bfloat16 first, so that all dtypes start from the same numbers."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).bfloat16()

        wide = torch.float64 if dtype == torch.float64 else torch.float32
        width = {"head": (self.HV,), "key": (self.H, self.K), "value": (self.HV, self.V)}[gates]
        rows = self.B if self.slots is None else self.pool
        return {
            "q": normal(self.B, self.T, self.H, self.K).to(device, dtype),
            "k": normal(self.B, self.T, self.H, self.K).to(device, dtype),
            "v": normal(self.B, self.T, self.HV, self.V).to(device, dtype),
            "g": -normal(self.B, self.T, *width).abs().to(device, wide) / 4,
            "state": normal(rows, self.HV, self.K, self.V).to(device, self.storage or wide),
            "slots": None if self.slots is None else torch.tensor(self.slots, device=device),
        }


PROBLEMS = (
    Problem(name="one token", B=3, H=2, HV=2, K=16, V=24),
    Problem(name="grouped values", B=2, T=2, H=2, HV=6, K=8, V=5),
    Problem(name="no token", B=2, T=0, H=1, HV=2, K=4, V=4),
    Problem(name="no sequence", B=0, H=1, HV=2, K=4, V=4),
    Problem(name="pool, one skipped", B=3, T=2, H=1, HV=2, K=8, V=8, slots=(3, -1, 0), pool=5),
    Problem(name="pool, all skipped", B=2, H=1, HV=2, K=8, V=8, slots=(-1, -7), pool=3),
    Problem(name="bfloat16 memory", B=2, T=3, H=2, HV=4, K=16, V=8, storage=torch.bfloat16),
    Problem(name="large memories in a pool", B=3, T=1, H=2, HV=4, K=130, V=128, slots=(2, -1, 0), pool=3),
)
