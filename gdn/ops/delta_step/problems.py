"""Named shapes of the decoding steps of the delta rules, for tests, the doctor and benchmarks."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Sizes of one call of `gated_delta_step`, `channel_delta_step` or `gated_delta_product_step`."""

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
    writes: int = 2
    """Of a token, for `build_product`."""

    def build(self, *, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu", seed: int = 0) -> dict[str, Any]:
        """Arguments of `gated_delta_step`, the same numbers for every dtype and device up to rounding; keys of norm 1, beta up to 2."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        wide = torch.float64 if dtype == torch.float64 else torch.float32
        gates = (self.B, self.T, self.HV)
        rows = self.B if self.slots is None else self.pool
        return {
            "q": F.normalize(normal(self.B, self.T, self.H, self.K), dim=-1).to(device, dtype),
            "k": F.normalize(normal(self.B, self.T, self.H, self.K), dim=-1).to(device, dtype),
            "v": normal(self.B, self.T, self.HV, self.V).to(device, dtype),
            "g": -normal(*gates).abs().to(device, wide) / 4,
            "beta": 2 * normal(*gates).sigmoid().to(device, wide),
            "state": normal(rows, self.HV, self.K, self.V).to(device, self.storage or wide),
            "slots": None if self.slots is None else torch.tensor(self.slots, device=device),
        }

    def build_channel(self, *, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu", seed: int = 0) -> dict[str, Any]:
        """Arguments of `channel_delta_step`: as `build`, with a decay for each channel of the keys."""
        arguments = self.build(dtype=dtype, device=device, seed=seed)
        generator = torch.Generator().manual_seed(seed + 1)
        g = -torch.randn(self.B, self.T, self.HV, self.K, generator=generator, dtype=torch.float64).abs() / 4
        return arguments | {"g": g.to(arguments["g"])}

    def build_product(self, *, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu", seed: int = 0) -> dict[str, Any]:
        """Arguments of `gated_delta_product_step`: as `build`, with other keys, values and strengths for each write."""
        arguments = self.build(dtype=dtype, device=device, seed=seed)
        every_write = dataclasses.replace(self, T=self.T * self.writes).build(dtype=dtype, device=device, seed=seed + 1)
        return arguments | {name: every_write[name].unflatten(1, (self.T, self.writes)) for name in ("k", "v", "beta")}


PROBLEMS = (
    Problem(name="one token", B=3, H=2, HV=2, K=16, V=24),
    Problem(name="grouped values", B=2, H=2, HV=6, K=8, V=5),
    Problem(name="four tokens", B=2, T=4, H=2, HV=4, K=16, V=8),
    Problem(name="no token", B=2, T=0, H=1, HV=2, K=4, V=4),
    Problem(name="no sequence", B=0, H=1, HV=2, K=4, V=4),
    Problem(name="pool", B=3, T=2, H=1, HV=2, K=8, V=8, slots=(4, 0, 2), pool=5),
    Problem(name="pool, one skipped", B=3, T=2, H=1, HV=2, K=8, V=8, slots=(3, -1, 0), pool=5),
    Problem(name="pool, all skipped", B=2, H=1, HV=2, K=8, V=8, slots=(-1, -7), pool=3),
    Problem(name="bfloat16 memory", B=2, T=3, H=2, HV=4, K=16, V=8, storage=torch.bfloat16),
    Problem(name="float16 memory in a pool", B=2, T=1, H=2, HV=4, K=16, V=8, storage=torch.float16, slots=(1, 2), pool=3),
    Problem(name="large memories", B=2, T=2, H=1, HV=4, K=128, V=130),
    Problem(name="large memories in a pool", B=3, T=1, H=2, HV=4, K=130, V=128, slots=(2, -1, 0), pool=3),
    Problem(name="large bfloat16 memories in a pool", B=2, H=1, HV=4, K=128, V=128, slots=(2, 0), pool=3, storage=torch.bfloat16),
)

BENCHMARKS = (
    Problem(name="one sequence, 16 heads", H=16, HV=16, K=128, V=128),
    Problem(name="one sequence, 32 heads", H=16, HV=32, K=128, V=128),
    Problem(name="16 sequences", B=16, H=16, HV=32, K=128, V=128),
    Problem(name="4 tokens", T=4, H=16, HV=32, K=128, V=128),
)
