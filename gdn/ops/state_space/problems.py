"""Named shapes of the parts of a state-space layer, for tests and the doctor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gdn.core.checks import accumulate_dtype


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Sizes of one call."""

    name: str
    B: int = 2
    T: int
    H: int
    P: int
    groups: int = 1

    def build_norm(self, *, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu", seed: int = 0) -> dict[str, Any]:
        """Arguments of `skip_gated_rms_norm`, the same numbers for every dtype up to rounding; x and gate are slices of wider rows."""
        generator = torch.Generator().manual_seed(seed)
        C = self.H * self.P

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

        wide = normal(self.B, self.T, 2 * C + 3)
        tensors = {
            "y": normal(self.B, self.T, self.H, self.P),
            "x": wide[..., :C].unflatten(2, (self.H, self.P)),
            "D": normal(self.H),
            "gate": wide[..., C : 2 * C],
            "weight": normal(C),
        }
        return {name: tensor.requires_grad_() for name, tensor in tensors.items()} | {"groups": self.groups, "eps": 1e-5}

    def build_scale(self, *, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu", seed: int = 0) -> dict[str, Any]:
        """Arguments of `scale_heads`."""
        arguments = self.build_norm(dtype=dtype, device=device, seed=seed)
        factor = arguments["y"].detach().abs().mean(3).to(accumulate_dtype(dtype))
        return {"x": arguments["x"], "factor": factor.requires_grad_()}


PROBLEMS = (
    Problem(name="some", T=13, H=3, P=8),
    Problem(name="groups, odd", T=5, H=4, P=5, groups=2),
    Problem(name="one", B=1, T=1, H=1, P=2),
    Problem(name="none", T=0, H=2, P=4),
)
